"""training/bases.py: what a stage starts from, of every kind that a stranger can get, whole and in parts."""

import json
from types import SimpleNamespace

import pytest
import test_llama
import torch

import lora
from kmeans import KMeans
from llama import Llama, LlamaConfig
from tokenizer import Tokenizer
from training import bases, shard

TEXTS = ["What is three plus four?", "Three plus four is seven.", "Tom is in the library."] * 5


def transformers_folder(folder, model: Llama, **options):
    """As transformers writes it: one file, or many."""
    from transformers import LlamaForCausalLM

    model.save_pretrained(folder / "ours")
    LlamaForCausalLM.from_pretrained(folder / "ours").save_pretrained(folder, **options)


def bin_folder(folder, model: Llama, files: int):
    """As transformers wrote it before version 5, and the released SpeechGPT has it."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state = list(model.state_dict().items())
    where = {}
    for i in range(files):
        name = "pytorch_model.bin" if files == 1 else f"pytorch_model-{i + 1:05}-of-{files:05}.bin"
        torch.save(dict(state[i::files]), folder / name)
        where |= {key: name for key, _ in state[i::files]}
    if files > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


WRITERS = {
    "ours": lambda folder, model: model.save_pretrained(folder),
    "ours, files": lambda folder, model: model.save_pretrained(folder, max_shard_size=40_000),
    "transformers": transformers_folder,
    "transformers, files": lambda folder, model: transformers_folder(folder, model, max_shard_size="40KB"),
    "bin": lambda folder, model: bin_folder(folder, model, 1),
    "bin, files": lambda folder, model: bin_folder(folder, model, 3),
    "Meta": lambda folder, model: test_llama.write_meta(model, folder, 1),
    "Meta, files": lambda folder, model: test_llama.write_meta(model, folder, 2),
}
SHAPES = {
    "LLaMA": {"vocab_size": 104, "n_kv_heads": 6},
    "TinyLlama": {"vocab_size": 104, "n_kv_heads": 2},  # grouped queries
    "tied": {"vocab_size": 104, "tie_embeddings": True},
}


@pytest.fixture(
    params=[(w, s) for w in WRITERS for s in SHAPES if not (w.startswith("Meta") and s == "tied")]
)
def folder(request, tmp_path):
    writer, shape = request.param
    model = test_llama.make(**SHAPES[shape])
    WRITERS[writer](tmp_path, model)
    return tmp_path, model


def test_a_base_of_every_kind_is_the_model_that_was_saved(folder):
    path, model = folder
    loaded = bases.read_llama(path).load(torch.device("cpu"))
    assert loaded.config == Llama.from_pretrained(path).config
    expected = dict(model.named_parameters())
    found = dict(loaded.named_parameters())
    assert found.keys() == expected.keys()
    for name, p in found.items():
        assert p.dtype == torch.float32 and torch.equal(p, expected[name]), name


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_the_rows_of_all_processes_are_the_model(folder, ranks):
    """As FSDP2 divides them: equal pieces, of which the last ones may be short or empty."""
    path, model = folder
    source = bases.read_llama(path).source
    for name, p in model.named_parameters():
        size = -(-len(p) // ranks)
        pieces = [
            source[name].rows(min(i, len(p)), min(i + size, len(p))) for i in range(0, size * ranks, size)
        ]
        assert torch.equal(torch.cat(pieces), p), name


@pytest.fixture
def run(tmp_path):
    """A run whose text model knows text alone, and whose HuBERT has five clusters."""
    tok = Tokenizer.train(TEXTS, tmp_path / "tokenizer", 345, 5)
    model = test_llama.randomized(Llama(LlamaConfig(**test_llama.GROUPED | {"vocab_size": tok.n_text})))
    model.save_pretrained(tmp_path / "text")
    (tmp_path / "hubert").mkdir()
    KMeans(torch.randn(5, 60, generator=torch.Generator().manual_seed(0))).save(tmp_path / "hubert")
    return SimpleNamespace(out=tmp_path, model=tmp_path), tok, model


@pytest.mark.parametrize("centers", [0.0, 0.3])
def test_a_grown_vocabulary_keeps_its_rows_and_draws_the_new_ones_alike(run, centers):
    """Eq. 1 and 2; what is drawn does not depend on how many processes there are."""
    where, tok, model = run
    config = SimpleNamespace(pretrained="", units=SimpleNamespace(embed_centers=centers, clusters=5))
    torch.manual_seed(7)
    base = bases.grown_llama(where, config, tok)
    grown = base.load(torch.device("cpu"))
    torch.manual_seed(7)
    model.resize_vocab(len(tok))
    for name, p in model.named_parameters():
        found = grown.get_parameter(name)
        if name in ("model.embed_tokens.weight", "lm_head.weight") and centers:
            units = slice(tok.unit_ids.start, tok.unit_ids.stop)
            drawn = KMeans.from_pretrained(where.model / "hubert").embeddings(found.shape[1])
            assert torch.equal(found[units], drawn * centers)
            assert torch.equal(found[: tok.n_text], p[: tok.n_text])
            assert torch.equal(found[tok.unit_ids.stop :], p[tok.unit_ids.stop :])
        else:
            assert torch.equal(found, p), name
        halves = [base.source[name].rows(0, 3), base.source[name].rows(3, len(p))]
        assert torch.equal(torch.cat(halves), found)


@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_a_base_in_int8_is_rounded_row_by_row(run, ranks):
    where, tok, model = run
    model.save_pretrained(where.model / "llama")
    adapter = SimpleNamespace(r=2, alpha=4.0, targets=["q_proj"], dropout=0.0, int8=True)
    base = bases.adapted_llama(where, SimpleNamespace(lora=adapter), tok)
    expected = dict(Llama.from_pretrained(where.model / "llama", int8=True).named_parameters())
    assert {str(p.dtype) for p in expected.values()} == {"torch.float32", "torch.int8"}
    for name, p in expected.items():
        source = base.source[name.replace("q_proj.", "q_proj.base_layer.")]
        size = -(-len(p) // ranks)
        pieces = [source.rows(min(i, len(p)), min(i + size, len(p))) for i in range(0, size * ranks, size)]
        assert torch.equal(torch.cat(pieces), p) and source.shape == p.shape, name
    loaded = base.load(torch.device("cpu"))
    lora.merge(lora.apply(model, 2, 4.0, ["q_proj"]))  # adds nothing
    ids = torch.arange(12)[None]
    near, exact = loaded(ids), model(ids)
    assert 1e-4 < (near - exact).std() / exact.std() < 0.05


def test_a_base_that_lacks_a_tensor_or_has_another_shape_is_told_in_one_line(tmp_path):
    model = test_llama.make()
    model.save_pretrained(tmp_path)
    base = bases.read_llama(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    base.source[name] = bases.Matrix([torch.zeros(3, 48)])
    with pytest.raises(ValueError, match=rf"{name}: is \(3, 48\), expected \(80, 48\)"):
        base.load(torch.device("cpu"))
    base.source[name] = bases.Matrix([torch.full((80, 48), torch.nan)])
    with pytest.raises(ValueError, match=f"{name}.*holds NaN or infinity"):
        bases.Base(bases.shapes(model.config), base.source, tmp_path).load(torch.device("cpu"))
    assert not shard.is_divided(model.lm_head.weight)

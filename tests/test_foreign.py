"""foreign.py and the readers of other people's files: each key is honored or refused by name, each damaged
table is one line, and none asks for the machine's memory."""

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import joblib
import numpy as np
import pytest
import test_hubert
import test_llama
import test_lora
import test_vocoder
import torch
from hostile import run_python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.cluster import BisectingKMeans, MeanShift
from sklearn.cluster import KMeans as SklearnKMeans

import checkpoint
import foreign
import hubert_formats
import llama
import llama_formats
import lora
import vocoder
from config import Limits
from hubert import HuBERT, HuBERTConfig, UnitExtractor
from kmeans import KMeans
from llama import Llama
from tokenizer import Tokenizer
from vocoder import UnitVocoder

read_llama = partial(llama_formats.read_config, llama.LlamaConfig)
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def one_line(error: Exception, folder: Path) -> str:
    """The message, if it is as it should be."""
    message = str(error)
    assert str(folder) in message and message.isprintable(), ascii(message)
    assert len(message) <= 300 + len(str(folder)) + 40, message
    return message


# ---- The reader of tables ----------------------------------------------------------------------------------


@dataclass
class Table:
    size: Annotated[int, Limits(1, 10)]
    names: tuple[str, ...] = ()
    share: float = 0.5


KEYS = foreign.Keys(
    {"n_size": "size", "size": "size", "names": "names", "share": "share"}, {"act": ("silu", "swish")}, "a b"
)


def read(table: object, tmp_path: Path) -> Table:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(table))
    return foreign.settings(Table, KEYS, foreign.read_table(path), path)


def test_a_table_of_known_keys_is_read(tmp_path):
    table = {"n_size": 3, "names": ["x", "y"], "share": 1, "act": "swish", "a": [1], "c": None, "d": {}}
    assert read(table, tmp_path) == Table(3, ("x", "y"), 1.0)


@pytest.mark.parametrize(
    "table, why",
    [
        ([], "not a table"),
        ({}, "key 'n_size' is missing"),
        ({"n_size": None}, "key 'n_size' is missing"),
        ({"n_size": 11}, "n_size: must be 1 to 10, found 11"),
        ({"n_size": True}, "n_size: expected int"),
        ({"n_size": 3, "size": 4}, "size is 4, which contradicts 3"),
        ({"n_size": 3, "names": ["x", 1]}, "names: expected str"),
        ({"n_size": 3, "share": 10**400}, "share"),
        ({"n_size": 3, "act": "gelu"}, "act is 'gelu'; only 'silu' is implemented"),
        (
            {"n_size": 3, "rope\u2028\x1b[2J": 1},
            r"unknown key 'rope\\u2028\\x1b\[2J'.*may change what is comp",
        ),
        ({"n_size": 3, "long" * 1000: 1}, r"unknown key 'longlong.*'\.\.\."),
        ({"n_size": 3, "act": ["\x1b[2J" * 10_000]}, "act is"),
    ],
)
def test_everything_else_is_refused_by_name(table, why, tmp_path):
    with pytest.raises(ValueError, match=why) as error:
        read(table, tmp_path)
    one_line(error.value, tmp_path)


# ---- Damaged tables: whatever a reader finds, it loads or is one line --------------------------------------

JUNK = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 2**16, 2**31, 2**63, 10**30, 10**400, "", "1", [], {}]),
    st.sampled_from([0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), "\x1b[2J", "\u2028", "a" * 5000]),
    st.integers(-4, 70),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
)


@st.composite
def mutated(draw, text: str) -> bytes:
    """A JSON table of which a few values are others, missing, nested or added; or its text is damaged."""
    if draw(st.integers(0, 4)) == 0:
        data = text.encode()
        at, n = draw(st.integers(0, len(data))), draw(st.integers(0, 30))
        return data[:at] + draw(st.binary(max_size=8)) + data[at + n :]
    table = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        place, key = table, draw(st.sampled_from([*table, "new"]) if table else st.just("new"))
        if isinstance(table.get(key), dict) and table[key] and draw(st.booleans()):
            place, key = table[key], draw(st.sampled_from([*table[key], "new"]))
        if draw(st.integers(0, 5)) == 0:
            place.pop(key, None)
        else:
            value = draw(JUNK)
            place[key] = [value] if draw(st.integers(0, 7)) == 0 else value
    return json.dumps(table).encode()


def vocoder_folder(folder: Path):
    table = {"context_dilations": (1, 2), "unit_dilations": (1,)}
    test_vocoder.make(**table, **test_vocoder.SPEAKERS).save_pretrained(folder)
    return lambda: UnitVocoder.from_pretrained(folder)([1, 2, 3], 1, [2, 1, 2])


def hubert_folder(folder: Path):
    test_hubert.extractor().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"do_normalize": false, "feature_size": 1, "sampling_rate": 16000, "return_attention_mask": true}'
    )
    return lambda: UnitExtractor.from_pretrained(folder)(torch.zeros(2000))


def llama_folder(folder: Path):
    test_llama.make(n_layers=1).save_pretrained(folder)
    return lambda: Llama.from_pretrained(folder)(torch.tensor([[1, 2, 3]]))


def meta_folder(folder: Path):
    test_llama.write_meta(test_llama.make(n_layers=1, vocab_size=104), folder, 2)
    return lambda: Llama.from_pretrained(folder)(torch.tensor([[1, 2, 3]]))


def lora_folder(folder: Path):
    lora.save(test_lora.adapted(), folder)
    return lambda: lora.load(test_lora.base(), folder)(torch.tensor([[1, 2, 3]]))


def tokenizer_folder(folder: Path):
    Tokenizer.train(["one two three four five six"] * 20, folder, 400, 10)
    return lambda: Tokenizer.from_pretrained(folder).encode("<1> two")


READERS = {
    "vocoder config.json": vocoder_folder,
    "hubert config.json": hubert_folder,
    "hubert preprocessor_config.json": hubert_folder,
    "hubert units.json": hubert_folder,
    "llama config.json": llama_folder,
    "meta params.json": meta_folder,
    "lora adapter_config.json": lora_folder,
    "tokenizer tokenizer_config.json": tokenizer_folder,
    "tokenizer special_tokens_map.json": tokenizer_folder,
    "tokenizer added_tokens.json": tokenizer_folder,
}


@pytest.fixture(scope="module", params=READERS)
def reader(request, tmp_path_factory):
    """(path of a good table, a function that uses what it describes)."""
    folder = tmp_path_factory.mktemp("f")
    use = READERS[request.param](folder)
    use()
    return folder / request.param.split(" ")[1], use


@FUZZ
@given(data=st.data())
def test_damaged_tables_load_or_are_one_line(reader, data):
    path, use = reader
    whole = path.read_text()
    try:
        path.write_bytes(data.draw(mutated(whole)))
        use()
    except (ValueError, OSError) as error:
        one_line(error, path.parent)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"7", b"null", b'{"a":1,"a":1}']
)
def test_tables_that_are_none_are_one_line(reader, content):
    path, use = reader
    whole = path.read_text()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name) as error:
        use()
    path.write_text(whole)
    one_line(error.value, path.parent)


@pytest.fixture(scope="module")
def centers_files(tmp_path_factory):
    """A k-means as we and as scikit-learn write it: path, bytes."""
    folder = tmp_path_factory.mktemp("k")
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    joblib.dump(SklearnKMeans(7, n_init=1, random_state=0).fit(x), folder / "x_km7.bin")
    KMeans(torch.from_numpy(x[:7])).save(folder)
    return [(path, path.read_bytes()) for path in (folder / "x_km7.bin", folder / "kmeans.safetensors")]


@FUZZ
@given(
    at=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=4), cut=st.integers(1, 10**4)
)
def test_damaged_clusters_load_or_are_one_line(centers_files, at, cut):
    for path, whole in centers_files:
        data = bytearray(whole[: cut if cut % 3 == 0 else None])
        for i, byte in at:
            data[i % len(data)] = byte
        path.write_bytes(data)
        try:
            centers = KMeans.from_pretrained(path).centers
            assert centers.isfinite().all() and centers.dtype == torch.float32
            KMeans(centers).predict(torch.zeros(2, centers.shape[1]))
        except ValueError as error:
            one_line(error, path.parent)


@pytest.mark.parametrize(
    "make, changes",
    [
        (vocoder_folder, {"upsample_rates": [999] * 300_000, "upsample_kernel_sizes": [999] * 300_000}),
        (vocoder_folder, {"resblock_dilation_sizes": [[1]] * 300_000}),
        (
            hubert_folder,
            {"conv_dim": [8] * 300_000, "conv_kernel": [9] * 300_000, "conv_stride": [9] * 300_000},
        ),
        (lora_folder, {"target_modules": ["q_proj"] * 300_000}),
    ],
    ids=["rates", "dilations", "convolutions", "targets"],
)
def test_lists_without_end_take_a_second(make, changes, tmp_path):
    """Products of 300,000 numbers would take minutes, and their digits a message of a megabyte."""
    use = make(tmp_path)
    path = tmp_path / ("adapter_config.json" if make is lora_folder else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        use()
    one_line(error.value, tmp_path)
    assert time.process_time() - start < 5


# ---- Memory ------------------------------------------------------------------------------------------------

GREEDY = {  # folder: (file, what it says instead); each would take gigabytes if it were believed
    "vocoder": [
        {"num_embeddings": 2**20, "embedding_dim": 65536, "model_in_dim": 131072},
        {"upsample_initial_channel": 65536},
        {"resblock_kernel_sizes": [999, 999], "upsample_channels": [65536, 65536, 65536]},
        {"num_speakers": 2**20},
        {"dur_predictor_params": {"encoder_embed_dim": 8, "var_pred_hidden_dim": 65536}},
        {"unit_dilations": [1] * 10**6},
    ],
    "llama": [
        {"vocab_size": 2**24},
        {"hidden_size": 65520, "num_attention_heads": 6},
        {"intermediate_size": 2**20},
    ],
    "hubert": [
        {"hidden_size": 65536},
        {"intermediate_size": 65536},
        {"conv_dim": [65536] * 7},
        {"num_conv_pos_embeddings": 65536},
    ],
    "lora": [{"r": 4096, "target_modules": ["q_proj", "down_proj"]}],
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_that_ask_for_the_machines_memory_are_refused_before_they_get_it(tmp_path):
    for make in (vocoder_folder, llama_folder, hubert_folder, lora_folder):
        name = make.__name__.removesuffix("_folder")
        (tmp_path / f"{name}0").mkdir()
        make(tmp_path / f"{name}0")
        for i, changes in enumerate(GREEDY[name]):
            folder = shutil.copytree(tmp_path / f"{name}0", tmp_path / f"{name}{i + 1}")
            path = folder / ("adapter_config.json" if name == "lora" else "config.json")
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    test_lora.base().save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "vocoder0", tmp_path / "vocoder99")
    tensors = dict(checkpoint.read_tensors(tmp_path / "vocoder0/generator.safetensors"))
    tensors["conv_pre.weight_g"] = torch.ones(40_000, 1, 1)  # broadcast: 6.4 GB
    tensors["conv_pre.weight_v"] = torch.ones(1, 40_000, 1)
    del tensors["conv_pre.weight"]
    checkpoint.save_tensors(tmp_path / "vocoder99/generator.safetensors", tensors)
    output = run_python(
        """
        import re, resource, sys
        from pathlib import Path
        import lora
        from hubert import UnitExtractor
        from llama import Llama
        from vocoder import UnitVocoder
        folder = Path(sys.stdin.read())
        base = Llama.from_pretrained(folder / "base")
        used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**29,) * 2)
        load = {"vocoder": UnitVocoder.from_pretrained, "llama": Llama.from_pretrained,
                "hubert": UnitExtractor.from_pretrained, "lora": lambda path: lora.load(base, path)}
        for path in sorted(folder.iterdir()):
            if path.name != "base":
                try:
                    load[path.name.rstrip("0123456789")](path)
                    print("accepted", path.name)
                except ValueError as error:
                    if str(path) not in str(error) or "Memory" in str(error) or "alloc" in str(error):
                        print("badly refused", error)
        """,
        str(tmp_path),
    )
    assert output.split("\n") == [
        "accepted " + name for name in ("hubert0", "llama0", "lora0", "vocoder0")
    ] + [""]


def test_tensors_that_share_their_numbers_are_few(tmp_path):
    """Ties are allowed. A hundred layers that are views of one are a file of 40 kB that takes 4 MB."""
    storage = torch.randn(100, 100)
    torch.save({"a": storage, "b": storage}, tmp_path / "tied.bin")
    assert torch.equal(checkpoint.read_tensors(tmp_path / "tied.bin")["b"], storage)
    torch.save({f"layer.{i}": storage.view(100, 100) for i in range(100)}, tmp_path / "many.bin")
    with pytest.raises(ValueError, match="tensors have 4000000 bytes, the file .*: they share"):
        checkpoint.read_tensors(tmp_path / "many.bin")


# ---- NaN ---------------------------------------------------------------------------------------------------


def damaged(path: Path, name: str, value: float, dtype: torch.dtype) -> None:
    tensors = {key: t.to(dtype) for key, t in checkpoint.read_tensors(path).items()}
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] = value
    checkpoint.save_tensors(path, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "make, file, tensor",
    [
        (llama_folder, "model.safetensors", "model.layers.0.mlp.up_proj.weight"),
        (llama_folder, "model.safetensors", "model.norm.weight"),
        (
            lora_folder,
            "adapter_model.safetensors",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
        ),
        (hubert_folder, "model.safetensors", "encoder.layers.0.layer_norm.bias"),
        (hubert_folder, "kmeans.safetensors", "centers"),
        (vocoder_folder, "generator.safetensors", "dict.weight"),
    ],
    ids=["llama", "norm", "lora", "hubert", "kmeans", "vocoder"],
)
def test_weights_that_are_not_finite_are_refused(make, file, tensor, value, dtype, tmp_path):
    use = make(tmp_path)
    damaged(tmp_path / file, tensor, value, dtype)
    with pytest.raises(ValueError, match="holds NaN or infinity") as error:
        use()
    message = one_line(error.value, tmp_path)
    assert tensor.removesuffix(".weight") in message


def test_int8_and_half_precision_refuse_them_too(tmp_path):
    llama_folder(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    damaged(tmp_path / "model.safetensors", name, 1e30, torch.float32)
    assert Llama.from_pretrained(tmp_path, torch.bfloat16).config.n_layers == 1
    with pytest.raises(ValueError, match=f"{name}.* too large for torch.float16"):
        Llama.from_pretrained(tmp_path, torch.float16)
    damaged(tmp_path / "model.safetensors", name, float("nan"), torch.float32)
    for options in ({"int8": True}, {"dtype": torch.float16}):
        with pytest.raises(ValueError, match=f"{name}.* holds NaN"):
            Llama.from_pretrained(tmp_path, **options)


# ---- Real configs are read ---------------------------------------------------------------------------------


def test_the_released_configs_are_read(tmp_path):
    """Word for word as released, as far as is known: SpeechGPT-7B-cm, its adapter (peft 0.3), its vocoder."""
    path = tmp_path / "config.json"
    llama_table = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    llama_table |= {
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "model_type": "llama",
    }
    llama_table |= {"intermediate_size": 11008, "max_position_embeddings": 2048, "num_attention_heads": 32}
    llama_table |= {"num_hidden_layers": 32, "rms_norm_eps": 1e-06, "tie_word_embeddings": False}
    llama_table |= {"torch_dtype": "float16", "transformers_version": "4.29.0.dev0", "use_cache": True}
    path.write_text(json.dumps(llama_table | {"vocab_size": 33006}))
    assert read_llama(path) == llama.LlamaConfig(33006, 4096, 32, 32, 11008, max_len=2048)

    adapter = {"base_model_name_or_path": "/cache/cm", "bias": "none", "fan_in_fan_out": False, "r": 8}
    adapter |= {"inference_mode": True, "init_lora_weights": True, "lora_alpha": 16, "lora_dropout": 0.05}
    adapter |= {"modules_to_save": None, "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    adapter |= {"target_modules": ["q_proj", "v_proj"]}
    found = foreign.settings(lora.AdapterConfig, lora.KEYS, adapter, path)
    assert found == lora.AdapterConfig(8, 16, ("q_proj", "v_proj"), 0.05)

    table = {
        "input_training_file": "/x/train.txt",
        "input_validation_file": "/x/val.txt",
        "input_wavs_dir": None,
    }
    table |= {"resblock": "1", "num_gpus": 0, "batch_size": 16, "learning_rate": 0.0002, "adam_b1": 0.8}
    table |= {"adam_b2": 0.99, "lr_decay": 0.999, "seed": 1234, "upsample_rates": [5, 4, 4, 2, 2]}
    table |= {
        "upsample_kernel_sizes": [11, 8, 8, 4, 4],
        "upsample_initial_channel": 512,
        "num_embeddings": 1000,
    }
    table |= {"resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5]] * 3}
    table |= {
        "embedding_dim": 128,
        "model_in_dim": 128,
        "segment_size": 8960,
        "code_hop_size": 320,
        "f0": False,
    }
    table |= {"num_mels": 80, "num_freq": 1025, "n_fft": 1024, "hop_size": 256, "win_size": 1024}
    table |= {"dur_prediction_weight": 1.0, "sampling_rate": 16000, "fmin": 0, "fmax": 8000}
    table |= {"fmax_for_loss": None, "num_workers": 4}
    table |= {"dist_config": {"dist_backend": "nccl", "dist_url": "env://"}}
    table |= {
        "dur_predictor_params": {
            "encoder_embed_dim": 128,
            "var_pred_hidden_dim": 128,
            "var_pred_kernel_size": 3,
            "var_pred_dropout": 0.5,
        }
    }
    path.write_text(json.dumps(table))
    assert vocoder.read_config(path) == vocoder.VocoderConfig()


def test_every_key_that_transformers_writes_is_known(tmp_path):
    from transformers import HubertConfig, LlamaConfig, Wav2Vec2FeatureExtractor

    LlamaConfig().to_json_file(tmp_path / "llama.json", use_diff=False)
    assert read_llama(tmp_path / "llama.json") == llama.LlamaConfig(32000, 4096, 32, 32, 11008)
    HubertConfig().to_json_file(tmp_path / "hubert.json", use_diff=False)
    table = foreign.read_table(tmp_path / "hubert.json")
    found = foreign.settings(HuBERTConfig, hubert_formats.KEYS, table, tmp_path / "hubert.json")
    assert found == HuBERTConfig() and len(table) > 40
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    table = foreign.read_table(tmp_path / "preprocessor_config.json")
    assert not foreign.settings(
        hubert_formats.Preprocessor, hubert_formats.PREPROCESSOR_KEYS, table, tmp_path
    ).do_normalize


# ---- Keys that change the function: honored, or refused by name --------------------------------------------


@pytest.mark.parametrize(
    "changes, refused",
    [
        ({}, None),
        ({"num_key_value_heads": 3}, None),
        ({"rms_norm_eps": 1e-3}, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 70.0}}, None),
        ({"tie_word_embeddings": True}, None),
        ({"pretraining_tp": 2, "attention_dropout": 0.3, "use_cache": False}, None),
        ({"max_position_embeddings": 8}, None),
        ({"hidden_act": "swish"}, None),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"head_dim": 16}, "head_dim"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
            "rope_parameters",
        ),
    ],
)
def test_llamas_of_transformers_compute_the_same_here_or_are_refused(changes, refused, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(
        vocab_size=61, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=80
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**shape | {"initializer_range": 0.2} | changes)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    same(
        Llama.from_pretrained,
        lambda model, ids: model(ids),
        lambda ids: theirs(ids).logits,
        refused,
        tmp_path,
    )


def same(load, ours, theirs, refused: str | None, folder: Path) -> None:
    """Loads and computes what `theirs` does, or is refused by the name of the key."""
    if refused:
        with pytest.raises(ValueError, match=refused) as error:
            load(folder)
        one_line(error.value, folder)
        return
    ids = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.allclose(ours(load(folder), ids), theirs(ids), atol=1e-4)


@pytest.mark.parametrize(
    "changes, refused",
    [
        ({}, None),
        ({"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}, None),
        ({"num_conv_pos_embeddings": 9, "num_conv_pos_embedding_groups": 2}, None),
        ({"hidden_dropout": 0.5, "layerdrop": 0.5, "mask_time_prob": 0.5, "feat_proj_dropout": 0.1}, None),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"feat_extract_activation": "relu"}, "feat_extract_activation"),
        ({"layer_norm_eps": 0.1}, "layer_norm_eps"),
        ({"feat_proj_layer_norm": False}, "feat_proj_layer_norm"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm"),
        ({"do_stable_layer_norm": True, "adapter_attn_dim": 4}, "adapter_attn_dim"),
        ({"conv_stride": [4, 2, 2, 2, 2, 2, 2]}, "samples every"),
    ],
)
def test_huberts_of_transformers_compute_the_same_here_or_are_refused(changes, refused, tmp_path):
    from transformers import HubertConfig, HubertModel

    shape = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    shape |= dict(conv_dim=[8] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    torch.manual_seed(0)
    theirs = HubertModel(HubertConfig(**shape | changes)).eval()
    theirs.save_pretrained(tmp_path)
    wav = test_hubert.speech(0.5)[None]
    same(
        HuBERT.from_pretrained,
        lambda model, _: model.features(wav, 1),
        lambda _: theirs(wav, output_hidden_states=True).hidden_states[1],
        refused,
        tmp_path,
    )


def test_the_preprocessor_is_asked_where_it_matters(tmp_path):
    """A large model hears what its preprocessor_config.json says. A base one is nearly indifferent: and what
    the released mHuBERT's says is wrong."""
    for config, asked, expected in (
        (test_hubert.LARGE, True, True),
        (test_hubert.LARGE, False, False),
        (test_hubert.TINY, True, False),
    ):
        test_hubert.randomized(config).save_pretrained(tmp_path)
        table = json.loads((tmp_path / "config.json").read_text())
        del table["normalize"]  # ours
        (tmp_path / "config.json").write_text(json.dumps(table))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": asked}))
        assert HuBERT.from_pretrained(tmp_path).config.standardize_wav == expected
    (tmp_path / "preprocessor_config.json").write_text('{"sampling_rate": 8000}')
    with pytest.raises(ValueError, match="sampling_rate is 8000; only 16000"):
        HuBERT.from_pretrained(tmp_path)
    model, wav = test_hubert.randomized(test_hubert.TINY), test_hubert.speech(1)[None]
    plain = model.features(wav, 2)
    model.config = replace(model.config, standardize_wav=True)
    assert (model.features(wav, 2) - plain).std() < 0.02 * plain.std()


def test_a_file_of_another_layer_is_not_read_as_layer_11(tmp_path):
    test_hubert.randomized(replace(test_hubert.TINY, n_layers=12)).save_pretrained(tmp_path)
    x = np.random.default_rng(0).normal(size=(60, 32)).astype(np.float32)
    joblib.dump(SklearnKMeans(7, n_init=1, random_state=0).fit(x), tmp_path / "base_L9_km7.bin")
    with pytest.raises(ValueError, match="base_L9_km7.bin: not of layer 11; write the layer to units.json"):
        UnitExtractor.from_pretrained(tmp_path)
    assert UnitExtractor.from_pretrained(tmp_path, layer=5).layer == 5  # who calls it so means it
    (tmp_path / "units.json").write_text('{"layer": 9}')
    assert UnitExtractor.from_pretrained(tmp_path).layer == 9


def test_clusters_that_predict_in_another_way_are_refused(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    for estimator, why in ((BisectingKMeans(7, random_state=0), "sklearn"), (MeanShift(), "MeanShift")):
        joblib.dump(estimator.fit(x), tmp_path / "x.bin")
        with pytest.raises(ValueError, match=why) as error:
            KMeans.from_pretrained(tmp_path / "x.bin")
        one_line(error.value, tmp_path)

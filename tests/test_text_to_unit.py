"""text_to_unit.py: fairseq's architecture, layout and search on random weights, against plain forms of them
and against transformers; learning; files that are not what they should be."""

import argparse
import io
import json
import math
import os
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
from torch import Tensor

import checkpoint
from text_to_unit import Search, Stack, TextToUnit, TextToUnitConfig, Vocabulary

PAD, EOS = 1, 2
UNITS = 20
TEXTS = ["the cat sat on the mat", "a", "cats and dogs", "what is on the mat today", "no", "on and on and on"]


# ---- A released folder, written by hand after formats.md: joint dictionary, names and settings of fairseq --


@pytest.fixture(scope="module")
def spm() -> bytes:
    """As the released one: <lang:unit> <lang:en> and the units come first, no space before the first word."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_writer=model,
        vocab_size=4 + 2 + UNITS + 25,
        model_type="bpe",
        add_dummy_prefix=False,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        user_defined_symbols=["<lang:unit>", "<lang:en>", *(f"<{u}>" for u in range(UNITS))],
        minloglevel=2,
    )
    return model.getvalue()


def symbols(spm: bytes) -> list[str]:
    sp = sentencepiece.SentencePieceProcessor(model_proto=spm)
    return [sp.id_to_piece(i) for i in range(4, len(sp))]


BASE = {  # of argparse: what the released file may hold
    "arch": "transformer", "task": "translation", "source_lang": "en", "target_lang": "unit", "lr": [5e-4],
    "encoder_layers": 2, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 24, "encoder_attention_heads": 4,
    "encoder_normalize_before": False, "encoder_learned_pos": False, "encoder_embed_path": None,
    "encoder_layerdrop": 0.1, "encoder_layers_to_keep": None,
    "decoder_layers": 2, "decoder_embed_dim": 16, "decoder_ffn_embed_dim": 24, "decoder_attention_heads": 4,
    "decoder_normalize_before": False, "decoder_learned_pos": False, "decoder_embed_path": None,
    "decoder_layerdrop": 0, "decoder_output_dim": 16, "decoder_input_dim": 16,
    "share_all_embeddings": False, "share_decoder_input_output_embed": False, "no_scale_embedding": False,
    "layernorm_embedding": False, "activation_fn": "relu", "activation_dropout": 0.1, "dropout": 0.3,
    "adaptive_softmax_cutoff": None, "adaptive_softmax_dropout": 0, "adaptive_input": False,
    "no_token_positional_embeddings": False, "no_cross_attention": False, "cross_self_attention": False,
    "tie_adaptive_weights": False, "max_source_positions": 1024, "max_target_positions": 1024,
    "no_progress_bar": True, "no_epoch_checkpoints": True, "label_smoothing": 0.1, "left_pad_source": "True",
}  # fmt: skip
VARIANTS = {
    "base": {},
    "pre_norm": {"encoder_normalize_before": True, "decoder_normalize_before": True, "seed": 2},
    "joint": {"share_all_embeddings": True, "seed": 4},
    "tied": {"share_decoder_input_output_embed": True, "decoder_normalize_before": True, "seed": 2},
    "other": {"no_scale_embedding": True, "layernorm_embedding": True, "activation_fn": "gelu",
              "seed": 2},
    "uneven": {"decoder_layers": 1, "encoder_embed_dim": 12, "encoder_attention_heads": 2,
               "encoder_ffn_embed_dim": 8, "decoder_attention_heads": 1, "seed": 3},
}  # fmt: skip


def random_tensors(settings: dict, vocabulary: int, seed: int = 1) -> dict[str, Tensor]:
    """Random weights by fairseq's names; of sizes with which each unit depends on the one before."""
    draw = torch.Generator().manual_seed(seed)
    made = {}

    def linear(name: str, n_out: int, n_in: int):
        made[f"{name}.weight"] = torch.randn(n_out, n_in, generator=draw) * 0.8 / math.sqrt(n_in)
        made[f"{name}.bias"] = torch.randn(n_out, generator=draw) * 0.2

    def norm(name: str, n: int):
        made[f"{name}.weight"] = 1 + torch.randn(n, generator=draw) * 0.2
        made[f"{name}.bias"] = torch.randn(n, generator=draw) * 0.2

    def attention(name: str, n: int, source: int):
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(f"{name}.{part}", n, source if part in ("k_proj", "v_proj") else n)
        norm(f"{name}_layer_norm", n)

    sizes = {}
    for side in ("encoder", "decoder"):
        sizes[side] = n = settings[f"{side}_embed_dim"]
        made[f"{side}.version"] = torch.tensor([3.0])
        made[f"{side}.embed_positions._float_tensor"] = torch.zeros(1)
        made[f"{side}.embed_tokens.weight"] = torch.randn(vocabulary, n, generator=draw) * 3 / math.sqrt(n)
        if settings["layernorm_embedding"]:
            norm(f"{side}.layernorm_embedding", n)
        for i in range(settings[f"{side}_layers"]):
            attention(f"{side}.layers.{i}.self_attn", n, n)
            if side == "decoder":
                attention(f"{side}.layers.{i}.encoder_attn", n, sizes["encoder"])
            linear(f"{side}.layers.{i}.fc1", settings[f"{side}_ffn_embed_dim"], n)
            linear(f"{side}.layers.{i}.fc2", n, settings[f"{side}_ffn_embed_dim"])
            norm(f"{side}.layers.{i}.final_layer_norm", n)
        if settings[f"{side}_normalize_before"]:
            norm(f"{side}.layer_norm", n)
    if settings["share_all_embeddings"]:
        made["decoder.embed_tokens.weight"] = made["encoder.embed_tokens.weight"]
    made["decoder.output_projection.weight"] = torch.randn(vocabulary, n, generator=draw) / math.sqrt(n)
    if settings["share_all_embeddings"] or settings["share_decoder_input_output_embed"]:
        made["decoder.output_projection.weight"] = made["decoder.embed_tokens.weight"]
    made["decoder.output_projection.weight"][EOS] *= 1.5  # so that some hypotheses end early
    return made


def released(folder: Path, spm: bytes, settings: dict, tensors: dict | None = None, cfg: bool = False):
    """Writes the four files; returns the tensors."""
    folder.mkdir(exist_ok=True)
    names = symbols(spm)
    tensors = (
        random_tensors(settings, len(names) + 4, settings.get("seed", 1)) if tensors is None else tensors
    )
    namespace = argparse.Namespace(**settings)
    saved = {"args": None, "cfg": {"_name": None, "model": namespace}} if cfg else {"args": namespace}
    torch.save(saved | {"model": tensors, "extra_state": {"epoch": 1}}, folder / "text2unit.pt")
    (folder / "spm.model").write_bytes(spm)
    for name in ("dict.en.txt", "dict.unit.txt"):
        lines = [f"{symbol} {i}\n" for i, symbol in enumerate(names)]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return tensors


@pytest.fixture(params=VARIANTS)
def variant(request, spm, tmp_path):
    """(settings, tensors, the model that was read from them)."""
    settings = BASE | VARIANTS[request.param]
    tensors = released(tmp_path / "t2u", spm, settings, cfg=request.param == "joint")
    return settings, tensors, TextToUnit.from_pretrained(tmp_path / "t2u")


# ---- The plain form: one text, all units anew at each step, every sum written out --------------------------


def plain_logits(settings: dict, w: dict[str, Tensor], text: list[int], units: list[int]) -> Tensor:
    """(T, V) after Vaswani et al. and formats.md, with nothing but matrix products."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(name: str, heads: int, x: Tensor, source: Tensor, causal: bool) -> Tensor:
        q, k, v = (
            linear(f"{name}.q_proj", x),
            linear(f"{name}.k_proj", source),
            linear(f"{name}.v_proj", source),
        )
        size = q.shape[1] // heads
        out = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            weights = q[:, part] @ k[:, part].T / math.sqrt(size)
            if causal:
                weights = weights + torch.full_like(weights, -math.inf).triu(1)
            out.append(weights.softmax(1) @ v[:, part])
        return linear(f"{name}.out_proj", torch.cat(out, 1))

    def embed(side: str, ids: list[int]) -> Tensor:
        table = w[f"{side}.embed_tokens.weight"]
        n = table.shape[1]
        x = table[ids] * (1 if settings["no_scale_embedding"] else math.sqrt(n))
        rows = []
        for position in range(2, 2 + len(ids)):  # the first is the padding's id, 1, plus 1
            angles = [position / 10000 ** (i / (n // 2 - 1)) for i in range(n // 2)]
            rows.append([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        x = x + torch.tensor(rows)
        return norm(f"{side}.layernorm_embedding", x) if settings["layernorm_embedding"] else x

    def side(name: str, x: Tensor, memory: Tensor | None) -> Tensor:
        before = settings[f"{name}_normalize_before"]
        heads = settings[f"{name}_attention_heads"]
        activation = torch.nn.functional.gelu if settings["activation_fn"] == "gelu" else torch.relu

        def add(norm_name: str, x: Tensor, branch) -> Tensor:
            return x + branch(norm(norm_name, x)) if before else norm(norm_name, x + branch(x))

        def layer(at: str, x: Tensor) -> Tensor:
            causal = memory is not None

            def own(x):
                return attention(f"{at}.self_attn", heads, x, x, causal)

            def cross(x):
                return attention(f"{at}.encoder_attn", heads, x, memory, False)

            def feed_forward(x):
                return linear(f"{at}.fc2", activation(linear(f"{at}.fc1", x)))

            x = add(f"{at}.self_attn_layer_norm", x, own)
            x = x if memory is None else add(f"{at}.encoder_attn_layer_norm", x, cross)
            return add(f"{at}.final_layer_norm", x, feed_forward)

        for i in range(settings[f"{name}_layers"]):
            x = layer(f"{name}.layers.{i}", x)
        return norm(f"{name}.layer_norm", x) if before else x

    memory = side("encoder", embed("encoder", text), None)
    return side("decoder", embed("decoder", [EOS, *units]), memory) @ w["decoder.output_projection.weight"].T


def plain_beam(next_log_p, beam: int, limit: int, penalty: float) -> list[int]:
    """Beam search over Python lists. next_log_p(units) -> log p of every symbol after them."""
    active, finished = [(0.0, [])], []
    for step in range(limit + 1):
        candidates = []
        for score, units in active:
            for symbol, log_p in enumerate(next_log_p(units).tolist()):
                allowed = symbol == EOS if step == limit else symbol != PAD and (step > 0 or symbol != EOS)
                if allowed:
                    candidates.append((score + log_p, [*units, symbol]))
        candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * beam]
        for score, units in candidates[:beam]:
            if units[-1] == EOS and len(finished) < beam:
                finished.append((score / len(units) ** penalty, units[:-1]))
        active = [c for c in candidates if c[1][-1] != EOS][:beam]
        if len(finished) == beam:
            break
    return max(finished)[1]


def search_plainly(settings, tensors, text, beam, limit, penalty=1.0) -> list[int]:
    def next_log_p(units):
        return plain_logits(settings, tensors, text, units)[-1].log_softmax(0)

    return plain_beam(next_log_p, beam, limit, penalty)


def ids_of(model: TextToUnit, texts: list[str], search: Search) -> list[list[int]]:
    from text_to_unit import beam_search

    with torch.inference_mode():
        return beam_search(model, [model.vocabulary.encode(text) for text in texts], search)


# ---- Golden values -----------------------------------------------------------------------------------------


def test_logits_are_those_of_the_plain_form(variant):
    settings, tensors, model = variant
    draw = random.Random(0)
    for text in TEXTS:
        ids = model.vocabulary.encode(text)
        units = [draw.randrange(4, 4 + UNITS) for _ in range(9)]
        ours = model(torch.tensor([ids]), torch.tensor([[EOS, *units]]))[0]
        assert (ours - plain_logits(settings, tensors, ids, units)).abs().max() < 1e-5


def test_a_batch_of_texts_and_units_of_different_lengths_changes_no_logits(variant):
    _, _, model = variant
    rows = [torch.tensor(model.vocabulary.encode(text)) for text in TEXTS]
    units = [torch.tensor([EOS, *range(5, 5 + n)]) for n in (3, 8, 1, 5, 9, 2)]
    pad = {"batch_first": True, "padding_value": PAD}
    logits = model(*(torch.nn.utils.rnn.pad_sequence(x, **pad) for x in (rows, units)))
    for row, text, previous in zip(logits, rows, units):
        alone = model(text[None], previous[None])[0]
        assert (row[: len(previous)] - alone).abs().max() < 1e-5


def test_beam_5_with_a_cache_gives_the_symbols_of_the_plain_search(variant):
    settings, tensors, model = variant
    found = ids_of(model, TEXTS, Search(beam=5, max_len_b=16))
    for text, row in zip(TEXTS, found):
        if len(text) < 14:  # the plain search takes its time
            assert row == search_plainly(settings, tensors, model.vocabulary.encode(text), 5, 16)
        assert ids_of(model, [text], Search(beam=5, max_len_b=16)) == [row]  # alone as in a batch
    assert 16 in map(len, found) and min(map(len, found)) < 16, "some should end at the limit, some before"


@pytest.mark.parametrize("beam, penalty, a", [(1, 1.0, 0), (2, 0.0, 0.5), (3, 2.0, 0), (30, 1.0, 0)])
def test_beams_penalties_and_limits(spm, tmp_path, beam, penalty, a):
    tensors = released(tmp_path / "t2u", spm, BASE)
    model = TextToUnit.from_pretrained(tmp_path / "t2u")
    texts = TEXTS[1::2]
    found = ids_of(model, texts, Search(beam, a, 4, penalty))
    for text, row in zip(texts, found):
        ids = model.vocabulary.encode(text)
        assert row == search_plainly(BASE, tensors, ids, beam, int(a * len(ids)) + 4, penalty)
        assert 1 <= len(row) <= int(a * len(ids)) + 4


def test_greedy_search_takes_the_likeliest_symbol_each_time(spm, tmp_path):
    tensors = released(tmp_path / "t2u", spm, BASE)
    model = TextToUnit.from_pretrained(tmp_path / "t2u")
    ids = model.vocabulary.encode(TEXTS[0])
    units = []
    while len(units) < 12:
        logits = plain_logits(BASE, tensors, ids, units)[-1]
        logits[PAD] = -math.inf
        logits[EOS] = logits[EOS] if units else -math.inf
        if logits.argmax() == EOS:
            break
        units.append(int(logits.argmax()))
    assert ids_of(model, TEXTS[:1], Search(beam=1, max_len_b=12)) == [units]


def test_transformers_has_the_same_logits_and_the_same_beams(spm, tmp_path):
    """FSMT is fairseq's post-norm Transformer with separate embeddings; never seen by whoever wrote ours."""
    transformers = pytest.importorskip("transformers")
    n = len(symbols(spm)) + 4
    config = transformers.FSMTConfig(
        langs=["en", "unit"], src_vocab_size=n, tgt_vocab_size=n, d_model=16,
        encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        encoder_attention_heads=4, decoder_attention_heads=4,
        max_position_embeddings=64, forced_eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.FSMTForConditionalGeneration(config).eval()
    positions = {name: t for name, t in theirs.state_dict().items() if "embed_positions" in name}
    lengths = []
    for seed in (0, 1, 2):
        tensors = released(tmp_path / "t2u", spm, BASE | {"seed": seed})
        model = TextToUnit.from_pretrained(tmp_path / "t2u")
        weights = [name for name in tensors if "version" not in name and "_float_tensor" not in name]
        theirs.load_state_dict({f"model.{name}": tensors[name] for name in weights} | positions)
        for side in (theirs.model.encoder, theirs.model.decoder):
            side.embed_positions.make_weight(66, 16, 1)
        for text in TEXTS[:3]:
            ids = torch.tensor([model.vocabulary.encode(text)])
            units = torch.tensor([[EOS, 7, 9, 4, 11, 6]])
            with torch.no_grad():
                logits = theirs(input_ids=ids, decoder_input_ids=units, use_cache=False).logits
                assert (model(ids, units) - logits).abs().max() < 1e-5
            limits = {"max_new_tokens": 20, "min_new_tokens": 1, "early_stopping": True}
            made = theirs.generate(ids, num_beams=5, length_penalty=1.0, **limits)[0, 1:].tolist()
            if EOS in made:  # at its limit theirs does not count </s>
                lengths.append(made.index(EOS))
                assert ids_of(model, [text], Search(beam=5, max_len_b=30)) == [made[: lengths[-1]]]
    assert len(lengths) >= 4 and len(set(lengths)) >= 3, lengths


# ---- Text in, units out ------------------------------------------------------------------------------------


def test_text_becomes_units_without_repetitions(spm, tmp_path):
    released(tmp_path / "t2u", spm, BASE)
    model = TextToUnit.from_pretrained(tmp_path / "t2u")
    search = Search(beam=2, max_len_b=12)
    units = model.generate([*TEXTS, "", "  "], search, batch=3)
    for text, row, ids in zip(TEXTS, units, ids_of(model, TEXTS, search)):
        wanted = [i - 6 for i in ids if 6 <= i < 6 + UNITS]  # <lang:unit> <lang:en> are 4 and 5
        wanted = [unit for n, unit in enumerate(wanted) if n == 0 or wanted[n - 1] != unit]
        assert row == wanted and model.generate([text], search) == [row]
        assert all(type(unit) is int for unit in row)
    assert units[-2] == [], "an empty text has no units"
    assert model.generate([]) == []


def test_the_pieces_of_the_joint_vocabulary_have_the_ids_of_sentencepiece(spm, tmp_path):
    released(tmp_path / "t2u", spm, BASE)
    vocabulary = TextToUnit.from_pretrained(tmp_path / "t2u").vocabulary
    sp = sentencepiece.SentencePieceProcessor(model_proto=spm)
    assert vocabulary.encode("the cat") == [*sp.encode("the cat"), EOS]
    assert vocabulary.encode("the ☃")[-2:] == [3, EOS]  # <unk>
    assert vocabulary.from_units([0, 19]) == [6, 25, EOS] and vocabulary.to_units([6, 4, 6, 25, 30, 3]) == [
        0,
        19,
    ]
    with pytest.raises(ValueError):
        vocabulary.encode("\ud800")


def small(spm: bytes, **more) -> TextToUnit:
    torch.manual_seed(0)
    stack = Stack(dim=32, ffn_dim=64, n_layers=1, n_heads=4, pre_norm=True)
    return TextToUnit(TextToUnitConfig(stack, stack, dropout=0.0, **more), Vocabulary.new(spm, UNITS))


@pytest.mark.parametrize("share_output", [True, False])
def test_a_folder_of_ours_gives_the_same_model(spm, tmp_path, share_output):
    model = small(spm, share_output=share_output, activation="gelu", norm_embeddings=True).eval()
    model.save_pretrained(tmp_path / "t2u")
    again = TextToUnit.from_pretrained(tmp_path / "t2u")
    assert again.config == model.config and again.vocabulary.text == model.vocabulary.text
    assert (again.decoder.embed_tokens.weight is again.decoder.output_projection.weight) == share_output
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.generate(TEXTS, Search(2, 0, 9)) == model.generate(TEXTS, Search(2, 0, 9))


def test_a_released_folder_saved_as_ours_stays_the_same(variant, tmp_path):
    _, _, model = variant
    model.save_pretrained(tmp_path / "ours")
    again = TextToUnit.from_pretrained(tmp_path / "ours")
    ids = torch.tensor([model.vocabulary.encode(TEXTS[0])]), torch.tensor([[EOS, 7, 9]])
    assert torch.equal(again(*ids), model(*ids))


# ---- Learning ----------------------------------------------------------------------------------------------


def batch(vocabulary: Vocabulary, pairs: list[tuple[str, list[int]]]) -> list[Tensor]:
    rows = [[torch.tensor(vocabulary.encode(text)) for text, _ in pairs]]
    rows.append([torch.tensor(vocabulary.from_units(units)) for _, units in pairs])
    return [torch.nn.utils.rnn.pad_sequence(side, batch_first=True, padding_value=PAD) for side in rows]


def test_label_smoothing_is_the_sum_over_targets_of_a_mixture(spm):
    model = small(spm)
    pairs = [("the cat", [3, 1, 4]), ("a dog and a cat", [1, 5, 9, 2, 6, 5])]
    text, target = batch(model.vocabulary, pairs)
    smoothed, plain, n = model.losses(text, target, smoothing=0.1)
    assert n == 4 + 7
    expected, expected_plain = 0.0, 0.0
    for sentence, units in pairs:
        ids = model.vocabulary.from_units(units)
        alone = torch.tensor([model.vocabulary.encode(sentence)]), torch.tensor([[EOS, *ids[:-1]]])
        log_p = model(*alone)[0].log_softmax(1)
        V = log_p.shape[1]
        for t, right in enumerate(ids):
            others = log_p[t].sum() - log_p[t, right]
            expected -= 0.9 * log_p[t, right] + 0.1 / (V - 1) * others
            expected_plain -= log_p[t, right]
    assert smoothed.item() == pytest.approx(expected.item(), rel=1e-5)
    assert plain.item() == pytest.approx(expected_plain.item(), rel=1e-5)
    assert model.losses(text, target, smoothing=0.0)[0].item() == pytest.approx(plain.item(), rel=1e-6)


def test_it_learns_to_spell(spm):
    """Each letter is two units, and a space is one: of words that it has never read, too."""
    letters = {letter: [2 * i, 2 * i + 1] for i, letter in enumerate("acdeghmno")}
    draw = random.Random(0)

    def pair() -> tuple[str, list[int]]:
        words = ["".join(draw.choice(list(letters)) for _ in range(draw.randint(1, 3))) for _ in range(2)]
        units = []
        for number, word in enumerate(words):
            units += [19] * (number > 0) + [unit for letter in word for unit in letters[letter]]
        return " ".join(words), units

    torch.manual_seed(0)
    stack = Stack(dim=48, ffn_dim=96, n_layers=1, n_heads=4, pre_norm=True)
    model = TextToUnit(TextToUnitConfig(stack, stack, dropout=0.0), Vocabulary.new(characters(), UNITS))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(160):
        smoothed, plain, n = model.losses(*batch(model.vocabulary, [pair() for _ in range(32)]))
        (smoothed / n).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (plain / n).item() < 0.25
    held_out = [pair() for _ in range(20)]
    made = model.eval().generate([text for text, _ in held_out], Search(beam=3, max_len_b=30))
    wanted = [[u for n, u in enumerate(units) if not n or units[n - 1] != u] for _, units in held_out]
    assert sum(a == b for a, b in zip(made, wanted)) >= 16


def characters() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a c d e g h m n o"] * 5), model_writer=model, model_type="char",
        vocab_size=14, minloglevel=2, add_dummy_prefix=False, hard_vocab_limit=False,
    )  # fmt: skip
    return model.getvalue()


# ---- Mistakes: one line, that says what is wrong -----------------------------------------------------------


def refused(folder: Path, *expected: str, error=ValueError) -> str:
    with pytest.raises(error) as found:
        TextToUnit.from_pretrained(folder)
    message = str(found.value)
    assert "\n" not in message and len(message.replace(str(folder), "")) < 300, message
    assert all(word in message for word in expected), message
    return message


@pytest.mark.parametrize(
    "name, value",
    [
        ("encoder_learned_pos", True),
        ("decoder_learned_pos", True),
        ("no_token_positional_embeddings", True),
        ("adaptive_softmax_cutoff", "1000,2000"),
        ("adaptive_input", True),
        ("no_cross_attention", True),
        ("cross_self_attention", True),
        ("decoder_layers_to_keep", "0,2"),
        ("decoder_output_dim", 8),
        ("no_decoder_final_norm", True),
        ("encoder_langtok", "src"),
        ("scale_resids", True),
        ("decoder_of_the_future", 1),
    ],
)
def test_a_setting_of_another_model_is_refused_by_its_name(spm, tmp_path, name, value):
    released(tmp_path / "t2u", spm, BASE | {name: value})
    refused(tmp_path / "t2u", name, "not implemented")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"activation_fn": "swish"}, "activation must be relu or gelu"),
        ({"encoder_attention_heads": 3}, "multiple of n_heads 3"),
        ({"encoder_layers": 10**9}, "must be 1 to 1000"),
        ({"decoder_ffn_embed_dim": "24"}, "expected int"),
        ({"encoder_normalize_before": 1}, "expected bool"),
        ({"encoder_layers": 3}, "encoder.layers.2"),
        ({"decoder_ffn_embed_dim": 12}, "expected [12, 16]"),
        ({"decoder_layers": 1}, "decoder.layers.1"),
        ({"share_all_embeddings": True}, "differs"),
    ],
)
def test_settings_that_cannot_be_or_do_not_fit_the_tensors(spm, tmp_path, change, said):
    n = len(symbols(spm)) + 4
    released(tmp_path / "t2u", spm, BASE | change, random_tensors(BASE, n))
    refused(tmp_path / "t2u", said)


def test_settings_that_are_not_there(spm, tmp_path):
    tensors = released(tmp_path / "t2u", spm, BASE)
    without = {name: value for name, value in BASE.items() if name != "decoder_attention_heads"}
    released(tmp_path / "t2u", spm, without, tensors)
    refused(tmp_path / "t2u", "decoder_attention_heads is missing")
    torch.save({"model": tensors}, tmp_path / "t2u/text2unit.pt")
    refused(tmp_path / "t2u", "has the settings of a Transformer")
    torch.save(tensors, tmp_path / "t2u/text2unit.pt")
    refused(tmp_path / "t2u", "has the settings of a Transformer")


def test_tensors_that_are_missing_or_too_many(spm, tmp_path):
    tensors = random_tensors(BASE, len(symbols(spm)) + 4)
    released(
        tmp_path / "t2u", spm, BASE, {k: v for k, v in tensors.items() if k != "decoder.layers.1.fc1.bias"}
    )
    refused(tmp_path / "t2u", "decoder.layers.1.fc1.bias", "missing")
    released(tmp_path / "t2u", spm, BASE, tensors | {"decoder.adapter": torch.zeros(2)})
    refused(tmp_path / "t2u", "'decoder.adapter'", "no place")
    old = {k.replace("output_projection.weight", "embed_out"): v for k, v in tensors.items()}
    released(tmp_path / "t2u", spm, BASE, old)
    model = TextToUnit.from_pretrained(tmp_path / "t2u")
    assert torch.equal(model.decoder.output_projection.weight, tensors["decoder.output_projection.weight"])


def test_weights_that_are_no_numbers(spm, tmp_path):
    tensors = random_tensors(BASE, len(symbols(spm)) + 4)
    tensors["decoder.layers.0.fc1.bias"][0] = math.nan
    released(tmp_path / "t2u", spm, BASE, tensors)
    with pytest.raises(ValueError, match="NaN"):
        TextToUnit.from_pretrained(tmp_path / "t2u").generate(TEXTS, Search(2, 0, 5))


def test_code_in_the_released_file_is_not_run(spm, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    released(tmp_path / "t2u", spm, BASE)
    torch.save({"args": Evil(), "model": {}}, tmp_path / "t2u/text2unit.pt")
    refused(tmp_path / "t2u", "refused")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "line 1"),
        (b"<0> 1\n<1>\n", "line 2"),
        (b"<0> 1\n<0> 1\n", "line 2"),
        (b"<s> 1\n", "line 1"),
        (b"<0> one\n", "line 1"),
        (b"\xff 1\n", "damaged"),
        (b"a 1\nb 1\n", "no units"),
        (b"<0> 1\n", "has 51 rows, its dictionary 5 symbols"),
    ],
)
def test_dictionaries_that_are_not_what_they_should_be(spm, tmp_path, content, said):
    released(tmp_path / "t2u", spm, BASE)
    (tmp_path / "t2u/dict.unit.txt").write_bytes(content)
    refused(tmp_path / "t2u", said)


def test_a_dictionary_written_on_windows_is_the_same(spm, tmp_path):
    released(tmp_path / "t2u", spm, BASE)
    before = TextToUnit.from_pretrained(tmp_path / "t2u").vocabulary.units
    path = tmp_path / "t2u/dict.unit.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert TextToUnit.from_pretrained(tmp_path / "t2u").vocabulary.units == before


@pytest.mark.parametrize("name", ["spm.model", "dict.en.txt", "dict.unit.txt"])
def test_files_that_are_missing(spm, tmp_path, name):
    released(tmp_path / "t2u", spm, BASE)
    (tmp_path / "t2u" / name).unlink()
    refused(tmp_path / "t2u", name, "missing", error=FileNotFoundError)


def test_a_folder_that_holds_no_model(tmp_path):
    refused(tmp_path, "neither config.json nor fairseq's text2unit.pt", error=FileNotFoundError)


def test_a_damaged_sentencepiece_model(spm, tmp_path):
    released(tmp_path / "t2u", spm, BASE)
    (tmp_path / "t2u/spm.model").write_bytes(b"nonsense")
    refused(tmp_path / "t2u", "damaged")


def test_configs_of_ours_that_cannot_be(spm, tmp_path):
    small(spm).save_pretrained(tmp_path / "t2u")
    path = tmp_path / "t2u/config.json"
    table = json.loads(path.read_text())
    for change, said in [
        ({"model_type": "llama"}, "not a text-to-unit generator"),
        ({"dropout": 2}, "must be 0 to 1"),
        ({"heads": 2}, "unknown key 'heads'"),
        ({"encoder": 3}, "expected Stack"),
        ({"encoder": table["encoder"] | {"dim": 10**12}}, "must be 1 to 65536"),
        ({"encoder": table["encoder"] | {"dim": 65536}}, "expected ["),
        ({"share_embeddings": True}, "one dictionary"),
    ]:
        path.write_text(json.dumps(table | change))
        refused(tmp_path / "t2u", said)
    path.write_text("[]")
    refused(tmp_path / "t2u", "not a text-to-unit generator")


def test_texts_that_are_too_long(spm):
    model = small(spm, max_source=8).eval()
    assert len(model.generate(["ab ab ab"[:7]], Search(1, 0, 3))) == 1
    with pytest.raises(ValueError, match="pieces, at most 8 fit"):
        model.generate(["the cat sat on the mat and on the mat"])


def test_the_limit_of_positions_is_never_passed(spm):
    model = small(spm, max_target=6).eval()
    assert all(len(row) <= 5 for row in ids_of(model, TEXTS, Search(beam=3)))


def test_what_is_written_is_read_by_the_same_names(spm, tmp_path):
    """The names are fairseq's, and a tied matrix is stored once."""
    small(spm).save_pretrained(tmp_path)
    names = set(checkpoint.read_tensors(tmp_path))
    assert {"encoder.embed_tokens.weight", "decoder.layers.0.encoder_attn.k_proj.weight"} <= names
    assert "decoder.output_projection.weight" not in names
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "dict.en.txt", "dict.unit.txt", "model.safetensors", "spm.model",
    ]  # fmt: skip

"""tokenizer.py: ids of the slow LlamaTokenizer of transformers 4.33.1, exact masks, parsing that survives
anything."""

import io
import json
import re
import time
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from tokenizer import (
    ASR_INSTRUCTIONS,
    TTS_INSTRUCTIONS,
    Tokenizer,
    chain_of_modality,
    cross_modal,
    plain,
    standard,
    text_to_units,
    units_to_text,
)

GOLDEN = Path(__file__).parent / "golden"
MODES = ("s2s", "s2t", "t2s", "t2t")
TEXTS = [f"What is {a} plus {b}?" for a in ("one", "two", "three") for b in ("four", "five", "six")] + [
    "It is nine.",
    "The capital of France is Paris.",
    "Today is Monday, so tomorrow is Tuesday.",
] * 2


def released_folder(folder: Path, end: str) -> Path:
    """The tokenizer files of fnlp/SpeechGPT-7B-cm with a smaller sentencepiece model."""
    tokens = [f"<{u}>" for u in range(1000)] + ["<sosp>", "<eosp>", "[Human]", "[SpeechGPT]", "<eoh>", end]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes((GOLDEN / "llama.model").read_bytes())
    (folder / "added_tokens.json").write_text(
        json.dumps({t: 1000 + i for i, t in enumerate(tokens)}, sort_keys=True)
    )
    return folder


@pytest.fixture(scope="session")
def toks(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "base").mkdir()
    (folder / "base/tokenizer.model").write_bytes((GOLDEN / "tiny.model").read_bytes())
    Tokenizer.extend(folder / "base", folder / "tiny", n_units=100)
    released_folder(folder / "eos", "<eos>")
    released_folder(folder / "eoa", "<eoa>")
    return {name: Tokenizer.from_pretrained(folder / name) for name in ("eos", "eoa", "tiny")}


@pytest.fixture(scope="session")
def golden() -> dict:
    return json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))


# ---- Equality with transformers 4.33.1 (tests/golden/make_tokenizer_golden.py) -----------------------------


@pytest.mark.parametrize("name", ["eos", "eoa", "tiny"])
def test_ids_equal_transformers(toks, golden, name):
    assert "transformers 4.33.1" in golden["made by"] and len(golden["encode"]) > 400
    for row in golden["encode"]:
        expected = row[name] if name in row else row["eos"]
        assert toks[name].encode(row["text"]) == expected, row["text"][:80]


@pytest.mark.parametrize("name", ["eos", "eoa", "tiny"])
def test_decoding_equals_transformers(toks, golden, name):
    rows = [row for row in golden["decode"] if row["by"] == name]
    assert len(rows) >= 150
    for row in rows:
        assert toks[name].decode(row["ids"]) == row["text"], row["ids"]


def test_golden_covers_every_template(golden):
    texts = {row["text"] for row in golden["encode"]}
    for style, templates in tokenizer.STYLES.items():
        for name, template in templates.items():
            parts = [re.escape(part) for part in re.split(r"\{\w+\}", template)]
            assert any(re.fullmatch(".+".join(parts), t, re.S) for t in texts), (style, name)


# ---- Templates ---------------------------------------------------------------------------------------------


PAPER_TEMPLATES = {  # copied from the paper: Appendix C, then Appendix E
    (
        "C",
        "s2s",
    ): "[Human]: This is a speech instruction: {SpeechI}. And your response should be speech. You can do it "
    "step by step. You can first transcribe the instruction and get the text Instruction. Then you can think about the "
    "instruction and get the text response. Last, you should speak the response aloud <eoh>. [SpeechGPT]: "
    "[tq] {TextI}; [ta] {TextR}; [ua] {SpeechR}<eoa>.",
    (
        "C",
        "s2t",
    ): "[Human]: This is a speech instruction: {SpeechI}. And your response should be text. You can do it "
    "step by step. You can first transcribe the instruction and get the text instruction. Then you can think about the "
    "instruction and get the text response. <eoh>. [SpeechGPT]: [tq] {TextI}; [ta] {TextR}<eoa>.",
    (
        "C",
        "t2s",
    ): "[Human]: This is a text instruction: {TextI}. And your response should be speech. You can do it "
    "step by step. You can think about the instruction and get the text response. Then you should speak the response "
    "aloud <eoh>. [SpeechGPT]: [ta] {TextR}; [ua] {SpeechR}<eoa>.",
    (
        "C",
        "t2t",
    ): "[Human]: This is a text instruction: {TextI}. And your response should be text. You can think "
    "about the instruction and get the text response. [SpeechGPT]: [ta] {TextR}<eoa>.",
    (
        "E",
        "s2s",
    ): "[Human]: This is a speech instruction: {SpeechI}. And your response should be speech <eoh>. "
    "[SpeechGPT]: [ua] {SpeechR}<eoa>.",
    (
        "E",
        "s2t",
    ): "[Human]: This is a speech instruction: {SpeechI}. And your response should be text. <eoh>. "
    "[SpeechGPT]: [ta] {TextR}<eoa>.",
    ("E", "t2s"): "[Human]: This is a text instruction: {TextI}. And your response should be speech <eoh>. "
    "[SpeechGPT]: [ua] {SpeechR}<eoa>.",
    ("E", "t2t"): "[Human]: This is a text instruction: {TextI}. And your response should be text. "
    "[SpeechGPT]: [ta] {TextR}<eoa>.",
}


@pytest.mark.parametrize("appendix, mode", PAPER_TEMPLATES)
def test_templates_are_the_papers(appendix, mode):
    template = chain_of_modality if appendix == "C" else standard
    prompt, answer = template(mode, "{SpeechI}", "{TextI}", "{TextR}", "{SpeechR}")
    assert prompt + answer == PAPER_TEMPLATES[appendix, mode]
    assert prompt.endswith("[SpeechGPT]: ")


def test_released_templates_are_the_published_rows():
    """The two rows that the official README shows, with shorter speech."""
    meta = (
        "You are an AI assistant whose name is SpeechGPT.\n- SpeechGPT is a intrinsic cross-modal conversational "
        "language model that is developed by Fudan University.  SpeechGPT can understand and communicate fluently "
        "with human through speech or text chosen by the user.\n- It can perceive cross-modal inputs and generate "
        "cross-modal outputs.\n"
    )
    speech = "<sosp><661><588><eosp>"
    row = "".join(
        cross_modal("Try to speak out this sentence, please.", "The alchemist rode.", speech, "released")
    )
    assert row == (
        f"{meta}[Human]: Try to speak out this sentence, please. This is input: The alchemist rode.<eoh> [SpeechGPT]: "
        f"{speech}<eoa> "
    )
    assert "".join(
        chain_of_modality("s2s", speech, "What is it?", "It is so.", speech, style="released")
    ) == (f"{meta}[Human]: {speech}<eoh>. [SpeechGPT]: What is it?; [ta] It is so.; [ua] {speech}<eoa>.")


def test_cross_modal_is_section_3_1():
    assert cross_modal("{D}", "{U}", "{T}") == (
        "[Human]: {D} This is input: {U}<eoh>. [SpeechGPT]: ",
        "{T}<eoa>.",
    )


def test_text_with_braces_and_markers_is_put_in_as_it_is():
    prompt, answer = plain("{TextR} [SpeechGPT]: {", "}{0}")
    assert prompt == "[Human]: {TextR} [SpeechGPT]: {<eoh>. [SpeechGPT]: " and answer == "}{0}<eoa>."


def test_there_are_enough_descriptions():
    for descriptions in (ASR_INSTRUCTIONS, TTS_INSTRUCTIONS):
        assert len(set(descriptions)) == len(descriptions) >= 20
        assert all(d[-1] in ".?" and d == d.strip() for d in descriptions)
    assert "Can you document the speech in written form?" in ASR_INSTRUCTIONS
    assert "Could you please relay the message below verbally?" in TTS_INSTRUCTIONS


def test_unknown_mode_or_style_is_a_programmer_error():
    with pytest.raises(AssertionError, match="s3s"):
        chain_of_modality("s3s")
    with pytest.raises(AssertionError, match="papre"):
        cross_modal("", "", style="papre")


# ---- Documents, masks, prompts -----------------------------------------------------------------------------

UNITS = st.lists(st.integers(0, 99), min_size=1, max_size=20)
# Text of a dialogue: anything printable that spells no marker and no "▁" of sentencepiece.
SENTENCES = st.text(
    st.characters(exclude_categories=("C", "Z"), exclude_characters="<>[]▁;") | st.just(" "), max_size=40
)
SENTENCES = SENTENCES.map(lambda t: " ".join(t.split())).filter(bool)


def pairs(tok, mode, text_i, text_r, units_i, units_r):
    """Every template that answers in `mode`, filled, in every style."""
    quadruplet = (units_to_text(units_i), text_i, text_r, units_to_text(units_r))
    hears, speaks = mode[0] == "s", mode[2] == "s"
    yield standard(mode, *quadruplet), ("ua",) if speaks else ("ta",)
    for style in ("paper", "released"):
        yield chain_of_modality(mode, *quadruplet, style=style), ("tq",) * hears + ("ta",) + ("ua",) * speaks
        yield cross_modal("Say it.", text_i, quadruplet[3], style), ("ua",)
        yield cross_modal("Write it.", quadruplet[0], text_r, style), ("ta",)
        yield plain(text_i, text_r, style), ("ta",)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["eos", "eoa", "tiny"]),
    mode=st.sampled_from(MODES),
    text_i=SENTENCES,
    text_r=SENTENCES,
    units_i=UNITS,
    units_r=UNITS,
)
def test_document_mask_prompt_and_parse_agree(toks, name, mode, text_i, text_r, units_i, units_r):
    """The mask is the answer, all of it and nothing else; the prompt is the rest; parse gives the parts
    back."""
    tok = toks[name]
    for (prompt, answer), filled in pairs(tok, mode, text_i, text_r, units_i, units_r):
        ids, mask = tok.document(prompt, answer)
        start = mask.index(True)
        assert mask == [False] * start + [True] * (len(ids) - start) and len(mask) == len(ids)
        assert ids[:start] == tok.prompt(prompt)
        assert ids == tok.encode(prompt + answer) + [tok.eos]
        squeeze = "".join(tok.decode(ids[start:]).split())
        assert squeeze == "".join(answer.split()) + "</s>"
        assert "".join(tok.decode(ids[:start]).split()) == "<s>" + "".join(prompt.split())
        parts = tok.parse(ids[start:])
        assert parts.complete
        assert parts.tq == (text_i if "tq" in filled else "")
        assert parts.ta == (text_r if "ta" in filled else "")
        assert parts.ua == (units_r if "ua" in filled else [])


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(["eos", "tiny"]),
    answer=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
)
def test_prompt_is_a_prefix_whatever_the_answer_starts_with(toks, name, answer):
    for prompt in (
        plain("hi")[0],
        chain_of_modality("t2t", text_i="hi")[0],
        cross_modal("Say it.", "hi")[0],
        "",
    ):
        ids, mask = toks[name].document(prompt, answer)
        assert ids[: mask.index(True)] == toks[name].prompt(prompt) and ids[-1] == toks[name].eos


def test_document_example(toks):
    """The example of the module's docstring."""
    tok = toks["tiny"]
    ids, mask = tok.document(*cross_modal("Write it.", units_to_text([1, 7]), "hi"))
    prompt, answer = (
        [tok.name.get(i) or tok.sp.id_to_piece(i) for i, m in zip(ids, mask) if m is kind]
        for kind in (False, True)
    )
    assert prompt[:3] == ["<s>", "[Human]", "▁:"] and prompt[-4:] == ["<eoh>", "▁.", "[SpeechGPT]", "▁:"]
    assert answer[-3:] == ["<eoa>", "▁.", "</s>"] and "".join(answer[:-3]) == "▁hi"


def test_empty_prompt_trains_everything_but_bos(toks):
    tok = toks["tiny"]
    ids, mask = tok.document("", units_to_text([5, 6]))
    assert ids == [tok.bos, tok.sosp, tok.unit_id(5), tok.unit_id(6), tok.eosp, tok.eos]
    assert mask == [False] + [True] * 5


def test_official_prompt_ends_with_a_lone_space(toks):
    for name in ("eos", "tiny"):
        tok, (prompt, _) = toks[name], plain("hi", style="released")
        official = tok.prompt(prompt, official=True)
        assert official[:-1] == tok.prompt(prompt) and tok.sp.id_to_piece(official[-1]) == "▁"
        assert official == tok.encode(prompt)


def test_a_model_that_joins_prompt_and_answer_is_refused(tmp_path):
    """Here ": yes" is one piece, so no prompt is a prefix."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["▁:▁yes"],
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tok = Tokenizer.extend(tmp_path, tmp_path / "grown")
    assert tok.document(*plain("hi", "no"))
    with pytest.raises(ValueError, match="do not cross spaces"):
        tok.document(*plain("hi", "yes"))


# ---- Text and ids ------------------------------------------------------------------------------------------


@given(units=st.lists(st.integers(0, 10**9 - 1)))
def test_units_to_text_and_back(units):
    assert text_to_units(units_to_text(units)) == units


def test_units_example():
    assert units_to_text([1, 7]) == "<sosp><1><7><eosp>" and units_to_text([]) == "<sosp><eosp>"
    assert text_to_units("<sosp> <1> <7> <eosp>, <8 9> <x> <٣>") == [1, 7]


@settings(deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<["), max_size=60).filter(
        lambda t: not t.startswith(" ")
    ),
    name=st.sampled_from(["eos", "tiny"]),
)
def test_any_text_comes_back(toks, text, name):
    """Byte fallback: nothing is out of vocabulary. (A leading space is lost, as it is by the original.)"""
    ids = toks[name].encode(text)
    assert toks[name].unk not in ids and ids[0] == toks[name].bos
    assert toks[name].decode(ids[1:]) == text


def test_ids_are_in_released_order(toks):
    for name, end in (("eos", "<eos>"), ("eoa", "<eoa>"), ("tiny", "<eoa>")):
        tok = toks[name]
        k = tok.n_units
        assert (len(tok), list(tok.unit_ids)) == (tok.n_text + k + 6, list(range(tok.n_text, tok.n_text + k)))
        markers = [tok.sosp, tok.eosp, tok.human, tok.speechgpt, tok.eoh, tok.eoa]
        assert markers == [tok.n_text + k + i for i in range(6)]
        assert tok.encode(end, bos=False) == [tok.eoa] and tok.encode("</s>", bos=False) == [tok.eos]
        assert [tok.unit_of(tok.unit_id(u)) for u in range(k)] == list(range(k))
        assert tok.encode("".join(f"<{u}>" for u in range(k)), bos=False) == [
            tok.unit_id(u) for u in range(k)
        ]
        assert tok.unit_of(tok.sosp) is None and tok.unit_of(5) is None
        with pytest.raises(AssertionError, match=str(k)):
            tok.unit_id(k)
    assert (
        len(toks["eos"].encode("<eoa>", bos=False)) > 1
    )  # ordinary text where the folder has the other marker


def test_half_a_surrogate_pair_is_one_line(toks):
    with pytest.raises(ValueError) as error:
        toks["tiny"].encode("caf\udce9")
    assert "\n" not in str(error.value)


def test_thousands_of_documents_take_seconds(toks):
    units = units_to_text([u % 100 for u in range(60)])
    pair = chain_of_modality("s2s", units, "What is two plus two?", "Two plus two is four.", units)
    start = time.perf_counter()
    for _ in range(1000):
        toks["tiny"].document(*pair)
    assert time.perf_counter() - start < 10  # measured: 0.4 s


# ---- Parsing -----------------------------------------------------------------------------------------------

MARKER = re.compile(r"<(sosp|eosp|eoh|eoa|eos|s|/s|unk|[0-9])>|\[(Human|SpeechGPT|tq|ta|ua)\]")


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(["eos", "eoa", "tiny"]), data=st.data())
def test_parse_survives_any_ids_and_leaks_no_marker(toks, name, data):
    tok = toks[name]
    bits = [
        tok.encode(t, bos=False)
        for t in (
            "[ta]",
            "[tq]",
            "[ua]",
            "; [ta] a",
            "<",
            "5",
            ">",
            "<sosp",
            "<sosp>",
            "<eosp>",
            "<eoa",
            "<eoh",
            "[",
            "Human",
            "]",
            "[t",
            "q]",
            "<s",
            "hi",
            ";",
            "\n",
            "<5>",
            "</s",
        )
    ]
    token = st.integers(-3, len(tok) + 3) | st.integers(tok.n_text, len(tok) - 1)
    runs = st.lists(st.lists(token, max_size=5) | st.sampled_from(bits), max_size=12)
    ids = [i for run in data.draw(runs) for i in run]
    parts = tok.parse(ids)
    assert not MARKER.search(parts.tq) and not MARKER.search(parts.ta)
    assert all(0 <= u < tok.n_units for u in parts.ua)
    assert parts.tq == parts.tq.strip() and parts.ta == parts.ta.strip()
    assert parts.complete or not {tok.eos, tok.eoa} & set(ids[:1])


def test_markers_spelled_in_ordinary_pieces_do_not_leak(toks):
    tok = toks["eos"]
    spelled = [tok.sp.piece_to_id(c) for c in "a<5>b[Human]c<sosp>d</s>e"]
    assert tok.unk not in spelled
    assert tok.parse(spelled).ta == "a b c d e"


@pytest.mark.parametrize(
    "reply, tq, ta, ua, complete",
    [
        ("[tq] What?; [ta] So.; [ua] <sosp><1><2><eosp><eoa>.", "What?", "So.", [1, 2], True),
        ("What?; [ta] So.; [ua] <sosp><1><2><eosp><eoa>.", "What?", "So.", [1, 2], True),  # released
        ("[tq] What?; [ta] So.<eoa>.", "What?", "So.", [], True),
        ("So.<eoa>", "", "So.", [], True),
        ("<sosp><1><eosp><eoa>", "", "", [1], True),
        ("[ua] <sosp><1><eosp><eoa>", "", "", [1], True),
        ("[tq] What?; [ta] So.; [ua] <sosp><1>", "What?", "So.", [1], False),
        ("[tq] What", "What", "", [], False),
        ("", "", "", [], False),
        ("<eoa>", "", "", [], True),
        ("</s>", "", "", [], True),
        ("[ta] So.</s>[ta] Not so.", "", "So.", [], True),
        ("[ta] So. [Human]: Next?", "", "So.", [], False),
        ("[ta] one [ta] two", "", "one", [], False),
        ("[ta] a; b", "", "a; b", [], False),
        (
            "[ta] <1> So. <sosp><2><eosp> <3> <sosp><4><eosp>",
            "",
            "So.",
            [2, 4],
            False,
        ),  # speech is what follows <sosp>
    ],
)
def test_parse_examples(toks, reply, tq, ta, ua, complete):
    for name in ("eos", "eoa", "tiny"):
        parts = toks[name].parse(toks[name].encode(reply, bos=False))
        assert (parts.tq, parts.ta, parts.ua, parts.complete) == (tq, ta, ua, complete), name


# ---- Training and folders ----------------------------------------------------------------------------------


def test_training_is_deterministic_and_documents_are_short(tmp_path):
    one, two = (Tokenizer.train(iter(TEXTS), tmp_path / name, vocab_size=420, n_units=100) for name in "ab")
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == [
        "added_tokens.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert one.n_text == 420 and len(Tokenizer.from_pretrained(tmp_path / "a")) == len(two) == 526
    for mark in ("[tq]", "[ta]", "[ua]"):
        assert len(one.encode(mark, bos=False)) == 1
    units = list(range(60))
    said = ("What is two plus four?", "The capital of France is Paris.")
    words = sum(len(one.encode(t, bos=False)) for t in said)
    for mode in MODES:
        ids, _ = one.document(*chain_of_modality(mode, units_to_text(units), *said, units_to_text(units)))
        content = {"s2s": words + 120, "s2t": words + 60, "t2s": words + 60, "t2t": words}[mode]
        assert len(ids) - content <= 22, (mode, len(ids), content)
    for description in (*ASR_INSTRUCTIONS, *TTS_INSTRUCTIONS):
        assert len(one.prompt(cross_modal(description, units_to_text(units))[0])) == 60 + 11


def test_fixed_pieces_round_trip_and_leave_the_prompts_end_alone(toks):
    pieces, tok = tokenizer.template_pieces(), toks["tiny"]
    assert len(set(pieces)) == len(pieces) and not any(p.startswith("▁:▁") for p in pieces)
    for piece in pieces:
        text = "hi" + piece.replace("▁", " ")
        ids = tok.encode(text, bos=False)
        assert tok.sp.id_to_piece(ids[-1]) == piece and tok.decode(ids) == text


def test_vocabulary_larger_than_the_corpus_gives_fewer_pieces(tmp_path):
    tok = Tokenizer.train(TEXTS, tmp_path, vocab_size=5000, n_units=4)
    assert 330 < tok.n_text < 1000 and tok.n_units == 4


@pytest.mark.parametrize("texts, size", [(TEXTS, 100), ([], 400), (["", "\n"], 400)])
def test_impossible_training_is_one_line(tmp_path, texts, size):
    with pytest.raises(ValueError, match=f"no tokenizer of {size} pieces") as error:
        Tokenizer.train(texts, tmp_path / "out", vocab_size=size, n_units=4)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_extend_gives_the_released_layout(tmp_path, toks):
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "llama.model").read_bytes())
    tok = Tokenizer.extend(tmp_path, tmp_path / "grown")
    assert tok.added == toks["eoa"].added and len(tok) == 2006
    with pytest.raises(FileNotFoundError, match="nowhere/tokenizer.model is missing"):
        Tokenizer.extend(tmp_path / "nowhere", tmp_path / "other")
    (tmp_path / "tokenizer.model").write_bytes(b"hello")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        Tokenizer.extend(tmp_path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_extend_adds_only_what_is_missing(tmp_path):
    stage2 = released_folder(tmp_path / "cm", "<eos>")
    assert Tokenizer.extend(stage2, tmp_path / "2").added == Tokenizer.from_pretrained(stage2).added
    stage1 = released_folder(tmp_path / "ma", "<eoa>")
    added = Tokenizer.from_pretrained(stage1).added
    (stage1 / "added_tokens.json").write_text(json.dumps({t: i for t, i in added.items() if i < 2002}))
    assert Tokenizer.extend(stage1, tmp_path / "1").added == added
    with pytest.raises(ValueError, match="in order"):  # 1000 units cannot become 1100 any more
        Tokenizer.extend(stage1, tmp_path / "3", n_units=1100)


def test_stage_one_folder_without_dialogue_markers(tmp_path):
    """fnlp/SpeechGPT-7B-ma: 1002 added tokens."""
    folder = released_folder(tmp_path / "ma", "<eoa>")
    added = json.loads((folder / "added_tokens.json").read_text())
    (folder / "added_tokens.json").write_text(json.dumps({t: i for t, i in added.items() if i < 2002}))
    tok = Tokenizer.from_pretrained(folder)
    assert (len(tok), tok.n_units, tok.human, tok.eoa) == (2002, 1000, None, None)
    assert tok.parse(tok.encode("hi", bos=False)).ta == "hi"


def test_check_vocab(toks):
    toks["eos"].check_vocab(2006)
    for size in (2002, 2007, 1000):
        with pytest.raises(ValueError, match=f"the-folder has {size} tokens but its tokenizer 2006"):
            toks["eos"].check_vocab(size, "the-folder")


# ---- Malformed files ---------------------------------------------------------------------------------------

UNITS_ONLY = {"<0>": 1000, "<1>": 1001, "<sosp>": 1002, "<eosp>": 1003}
BAD_TABLES = {
    "not json": b"{",
    "not utf-8": b'{"<0>\xff": 1000}',
    "nested": b"[" * 100_000,
    "nested tables": b'{"a":' * 100_000,
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "empty file": b"",
    "empty table": b"{}",
    "ids as text": json.dumps({t: str(i) for t, i in UNITS_ONLY.items()}).encode(),
    "ids as fractions": json.dumps({t: i + 0.5 for t, i in UNITS_ONLY.items()}).encode(),
    "ids as truth": json.dumps(UNITS_ONLY | {"x": True}).encode(),
    "infinite id": b'{"<0>": Infinity}',
    "absurd id": b'{"<0>": ' + b"9" * 10_000 + b"}",
    "large id": json.dumps(UNITS_ONLY | {"x": 10**30}).encode(),
    "negative id": json.dumps(UNITS_ONLY | {"x": -1}).encode(),
    "duplicate id": json.dumps(UNITS_ONLY | {"x": 1000}).encode(),
    "gap": json.dumps(UNITS_ONLY | {"x": 1005}).encode(),
    "another model's": json.dumps({t: i + 31000 for t, i in UNITS_ONLY.items()}).encode(),
    "no units": json.dumps({"<sosp>": 1000, "<eosp>": 1001}).encode(),
    "no <sosp>": json.dumps({"<0>": 1000, "<eosp>": 1001}).encode(),
    "units out of order": json.dumps(UNITS_ONLY | {"<0>": 1001, "<1>": 1000}).encode(),
    "units not first": json.dumps({"<sosp>": 1000, "<eosp>": 1001, "<0>": 1002}).encode(),
    "a missing unit": json.dumps({"<0>": 1000, "<2>": 1001, "<sosp>": 1002, "<eosp>": 1003}).encode(),
    "empty token": json.dumps(UNITS_ONLY | {"": 1004}).encode(),
    "white space": json.dumps(UNITS_ONLY | {" x": 1004}).encode(),
    "too large": b'{"<0>": 1000' + b" " * (5 << 20) + b"}",
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_added_tokens_are_one_line(tmp_path, case):
    folder = released_folder(tmp_path, "<eos>")
    (folder / "added_tokens.json").write_bytes(BAD_TABLES[case])
    with pytest.raises(ValueError, match="added_tokens.json") as error:
        Tokenizer.from_pretrained(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_absurdly_large_files_are_not_read(tmp_path):
    for name, limit in (("added_tokens.json", 4), ("tokenizer.model", 16)):
        folder = released_folder(tmp_path, "<eos>")
        with open(folder / name, "r+b") as file:
            file.truncate(1 << 40)  # a terabyte of nothing
        with pytest.raises(ValueError, match=f"{name} is over {limit} MiB"):
            Tokenizer.from_pretrained(folder)


def test_a_model_without_llamas_first_ids_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=60,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="starts with .*'<pad>', '<unk>', '<s>'.*, not <unk> <s> </s>"):
        Tokenizer(model.getvalue(), UNITS_ONLY)


def test_the_longest_added_token_wins(toks):
    tok = Tokenizer(
        (GOLDEN / "llama.model").read_bytes(), toks["eos"].added | {"[Human] says": 2006, "[Hu": 2007}
    )
    assert tok.encode("[Human] says", bos=False) == [2006] and tok.encode("[Human][Hu", bos=False) == [
        tok.human,
        2007,
    ]


MODEL = (GOLDEN / "llama.model").read_bytes()


@pytest.mark.parametrize(
    "model",
    [
        b"",
        b"\0" * 1000,
        b"not a model",
        MODEL[:5000],
        MODEL[100:],
        b"PK\3\4" + MODEL,
        b"\x80\x04cos\nsystem\n(S'false'\ntR.",
        b"\n" * (17 << 20),
    ],
)
def test_bad_models_are_one_line(tmp_path, model):
    folder = released_folder(tmp_path, "<eos>")
    (folder / "tokenizer.model").write_bytes(model)
    with pytest.raises(ValueError, match="tokenizer.model") as error:
        Tokenizer.from_pretrained(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_missing_files_say_which(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.model is missing"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    folder = released_folder(tmp_path, "<eos>")
    (folder / "added_tokens.json").unlink()
    with pytest.raises(FileNotFoundError, match="added_tokens.json is missing.*Tokenizer.extend"):
        Tokenizer.from_pretrained(folder)


@settings(max_examples=150, deadline=None)
@given(
    at=st.lists(st.tuples(st.integers(0, len(MODEL) - 1), st.integers(0, 255)), max_size=5),
    cut=st.integers(1, 2 * len(MODEL)),
)
def test_damaged_models_load_or_raise_value_error(toks, at, cut):
    damaged = bytearray(MODEL[:cut])
    for i, byte in at:
        damaged[i % len(damaged)] = byte
    try:
        tok = Tokenizer(bytes(damaged), toks["eos"].added)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert len(tok) == 2006


@pytest.fixture(scope="session")
def bad_folder(tmp_path_factory) -> Path:
    return released_folder(tmp_path_factory.mktemp("bad"), "<eos>")


@settings(max_examples=100, deadline=None)
@given(
    data=st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
        max_leaves=8,
    ).map(lambda x: json.dumps(x).encode())
)
def test_any_added_tokens_json_is_refused(bad_folder, data):
    (bad_folder / "added_tokens.json").write_bytes(data)
    with pytest.raises(ValueError) as error:
        Tokenizer.from_pretrained(bad_folder)
    assert "\n" not in str(error.value)


def test_the_style_of_templates_is_noted_for_whoever_prompts_the_model(tmp_path):
    """A plain LLaMA's tokenizer, extended, has no piece [tq]; what train.py makes of it reads the paper's form."""
    trained = Tokenizer.train(["one two three four five six"] * 20, tmp_path / "trained", 400, 10)
    assert trained.trained_style == Tokenizer.from_pretrained(tmp_path / "trained").trained_style == "paper"
    extended = Tokenizer.extend(tmp_path / "trained", tmp_path / "extended", 10)
    assert extended.trained_style == "paper"
    path = tmp_path / "trained/tokenizer_config.json"
    for content in ("[]", '{"template_style": "other"}', '{"template_style": 3}', '{"legacy": false}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="tokenizer_config.json"):
            Tokenizer.from_pretrained(tmp_path / "trained")
    path.write_text("{}")
    assert Tokenizer.from_pretrained(tmp_path / "trained").trained_style is None
    (tmp_path / "trained/tokenizer_config.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path / "trained").trained_style is None


@pytest.mark.parametrize(
    "changes, why",
    [
        ({}, None),
        (
            {"legacy": None, "add_prefix_space": True, "chat_template": "{{ x }}", "tokenizer_file": None},
            None,
        ),
        ({"bos_token": "<s>", "additional_special_tokens": []}, None),
        ({"add_bos_token": False}, "add_bos_token is False; only True"),
        ({"add_eos_token": True}, "add_eos_token is True"),
        ({"legacy": False}, "legacy is False"),
        ({"add_prefix_space": False}, "add_prefix_space is False"),
        ({"sp_model_kwargs": {"enable_sampling": True}}, "unknown key 'sp_model_kwargs'"),
        ({"tokenizer_class": "GPT2Tokenizer"}, "tokenizer_class is 'GPT2Tokenizer'"),
        ({"eos_token": "<eos>"}, "eos_token is '<eos>'; only '</s>'"),
        ({"bos_token": {"content": "<s>", "lstrip": True}}, "bos_token is"),
        ({"additional_special_tokens": ["<x>"]}, "additional_special_tokens is"),
        ({"added_tokens_decoder": {"0": {"content": "<unk>"}}}, "unknown key 'added_tokens_decoder'"),
    ],
)
def test_settings_that_make_other_ids_are_refused(tmp_path, changes, why):
    """From the table that transformers 4.29 wrote for the released model."""
    folder = released_folder(tmp_path, "<eos>")
    flags = {
        "__type": "AddedToken",
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }
    table = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    table |= {"model_max_length": 512, "pad_token": None, "padding_side": "right", "sp_model_kwargs": {}}
    table |= {
        "tokenizer_class": "LlamaTokenizer",
        "use_fast": False,
        "bos_token": {"content": "<s>", **flags},
    }
    table |= {"eos_token": {"content": "</s>", **flags}, "unk_token": {"content": "<unk>", **flags}}
    (folder / "tokenizer_config.json").write_text(json.dumps(table | changes))
    if why is None:
        assert Tokenizer.from_pretrained(folder).trained_style is None
        return
    with pytest.raises(ValueError, match=why) as error:
        Tokenizer.from_pretrained(folder)
    assert "\n" not in str(error.value) and "tokenizer_config.json" in str(error.value)

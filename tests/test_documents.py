"""data/documents.py: what each stage reads, from a small hand-made corpus; and what --show prints of it."""

import json
import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from data import documents
from data.corpus import TARGET_SPEAKER
from tokenizer import Tokenizer, chain_of_modality, units_to_text

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rows, unit_rows = [], []

    def add(text, split, speaker, kind):
        rows.append(
            {
                "id": str(len(rows)),
                "wav": "x.wav",
                "text": text,
                "speaker": speaker,
                "split": split,
                "kind": kind,
                "seconds": 1.0,
            }
        )
        unit_rows.append({"id": rows[-1]["id"], "units": [len(rows) % 10, 3, 7], "durations": [1, 2, 3]})

    for speaker in (0, 1):
        add("What is one plus one?", "train", speaker, "question")
    add("One plus one is two.", "train", 0, "answer")
    add("What is one plus one?", "rendition", 2, "question")
    add("What is two plus two?", "heldout", 1, "question")
    add("Tom sees a dog.", "train", 1, "statement")
    add("Anna sees a cow.", "heldout", 1, "statement")
    dialogues = [
        {
            "question": "What is one plus one?",
            "answer": "One plus one is two.",
            "split": "train",
            "family": "plus",
        },
        {
            "question": "Add one and one.",
            "answer": "One plus one is two.",
            "split": "train",
            "family": "more",
        },
        {"question": "What is two plus two?", "answer": "Two plus two is four.", "split": "heldout"},
    ]
    for name, table in (("manifest", rows), ("units", unit_rows), ("dialogues", dialogues)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return folder


def tables(folder: Path) -> documents.Tables:
    return documents.read_tables(folder, 10)


@pytest.fixture(scope="module")
def tok(corpus, tmp_path_factory):
    return Tokenizer.train(
        documents.sentences(tables(corpus), "train"), tmp_path_factory.mktemp("tok"), 700, 10
    )


def test_nothing_held_out_is_in_training_examples(corpus):
    everything = dict.fromkeys(documents.KINDS, 1.0)
    seen = repr(
        [
            documents.examples(tables(corpus), "train", everything),
            documents.exchanges(tables(corpus), "rendition"),
        ]
    )
    assert "two plus two" not in seen.lower() and "cow" not in seen
    assert "Add one and one" in seen


def test_exchanges_pair_a_recorded_question_with_the_target_speakers_answer(corpus):
    e, unspoken = documents.exchanges(tables(corpus), "train")
    assert (len(e.question_units), len(e.answer_units)) == (2, 1)
    assert (len(unspoken.question_units), len(unspoken.answer_units)) == (0, 1)
    r, _ = documents.exchanges(tables(corpus), "rendition")
    assert r.question == e.question and r.question_units != e.question_units
    (h,) = documents.exchanges(tables(corpus), "heldout")
    assert h.answer == "Two plus two is four." and h.answer_units == []


def test_the_text_to_unit_generator_speaks_answers_and_unrecorded_questions(corpus):
    spoken = {"One plus one is two.": [5, 6], "Add one and one.": [8], "What is one plus one?": [9]}
    made = tables(corpus)._replace(generated=True)
    e, unrecorded = documents.exchanges(made, "train")
    assert e.answer_units == unrecorded.answer_units == unrecorded.question_units == documents.TO_COME
    e, unrecorded = (documents.with_speech(exchange, spoken) for exchange in (e, unrecorded))
    assert e.answer_units == unrecorded.answer_units == [[5, 6]]
    assert len(e.question_units) == 2 and [9] not in e.question_units  # recordings are better
    assert unrecorded.question_units == [[8]]
    (h,) = documents.exchanges(made, "heldout")
    assert documents.with_speech(h, spoken).answer_units == [[]] and len(h.question_units) == 1
    _, unrecorded = documents.exchanges(made, "rendition")
    assert unrecorded.question_units == []


def test_dialogues_without_a_single_recording_can_be_trained_on(corpus):
    text_only = tables(corpus)._replace(rows=[])
    with pytest.raises(ValueError, match="nothing of kind 's2s'"):
        documents.examples(text_only, "train", {"s2s": 1.0})
    found = documents.examples(text_only._replace(generated=True), "train", {"s2s": 1.0})
    assert [example.source.question for example in found] == ["What is one plus one?", "Add one and one."]


def test_what_the_generator_could_not_speak_is_read_as_text(corpus, tok):
    _, unrecorded = documents.exchanges(tables(corpus)._replace(generated=True), "train")
    question, answer = unrecorded.question, unrecorded.answer
    for spoken, mode in (
        ({question: [8], answer: [5, 6]}, "s2s"),
        ({question: [8], answer: []}, "s2t"),
        ({answer: [5, 6]}, "t2s"),
        ({}, "t2t"),
    ):
        example = documents.Example("s2s", documents.with_speech(unrecorded, spoken))
        slots = {"text_i": question, "text_r": answer}
        slots |= {"speech_i": units_to_text([8]), "speech_r": units_to_text([5, 6])}
        expected = tok.document(*chain_of_modality(mode, **slots))
        assert documents.render(tok, example, random.Random(0)) == expected, mode


def test_the_mask_covers_the_answer_and_nothing_else(corpus, tok):
    e, _ = documents.exchanges(tables(corpus), "train")
    for k in range(40):
        ids, mask = documents.render(
            tok, documents.Example(("chain", "standard")[k % 2], e), random.Random(k), 0.1
        )
        first = mask.index(True)
        assert all(mask[first:]) and tok.human not in ids[first:] and tok.speechgpt == ids[first - 2]
        parts = tok.parse(ids[first:])
        assert parts.complete and (parts.ta == e.answer or parts.ua in e.answer_units)
        assert parts.tq in ("", e.question)


def test_only_the_target_speaker_is_a_tts_target(corpus, tok):
    found = documents.examples(tables(corpus), "train", {"asr": 0.5, "tts": 0.5})
    assert {e.source.speaker for e in found if e.kind == "asr"} == {0, 1}
    assert {e.source.speaker for e in found if e.kind == "tts"} == {TARGET_SPEAKER}
    for example in found:
        ids, mask = documents.render(tok, example, random.Random(0))
        answer = [i for i, m in zip(ids, mask) if m]
        assert (tok.sosp in answer) == (example.kind == "tts")
        assert tok.parse(answer).ta == example.source.text or tok.parse(answer).ua == example.source.units


def test_sentences_to_read_aloud_are_not_answered_in_text(corpus, tmp_path):
    for name in ("manifest", "units"):
        (tmp_path / f"{name}.jsonl").write_text((corpus / f"{name}.jsonl").read_text())
    row = {
        "question": "Please say: One plus one is two.",
        "answer": "One plus one is two.",
        "split": "train",
        "family": documents.READING,
    }
    (tmp_path / "dialogues.jsonl").write_text(
        (corpus / "dialogues.jsonl").read_text() + json.dumps(row) + "\n"
    )
    reads = {
        kind: row["question"]
        in {e.source.question for e in documents.examples(tables(tmp_path), "train", {kind: 1.0})}
        for kind in ("t2t", "t2s", "t2t/reading")
    }
    assert reads == {"t2t": False, "t2s": True, "t2t/reading": True}


def test_every_kind_has_its_share_and_every_example_its_turn(corpus):
    mix = {"asr": 0.6, "tts": 0.1, "s2t": 0.2, "text": 0.1}
    found = documents.examples(tables(corpus), "train", mix)
    for kind, share in mix.items():
        assert abs(sum(e.kind == kind for e in found) - share * len(found)) < 1
    alone = {kind: documents.examples(tables(corpus), "train", {kind: 1.0}) for kind in mix}
    for kind, examples in alone.items():
        assert all(e in found for e in examples) and {e.kind for e in examples} == {kind}


def test_speech_of_a_question_needs_a_recording_of_it(corpus):
    asked = {
        kind: {e.source.question for e in documents.examples(tables(corpus), "train", {kind: 1.0})}
        for kind in ("s2s", "s2t", "t2s", "t2t", "chain", "standard")
    }
    spoken = {"What is one plus one?"}
    assert asked == dict.fromkeys(asked, spoken) | dict.fromkeys(
        ("t2s", "t2t"), spoken | {"Add one and one."}
    )


def test_a_family_may_have_a_share_of_its_own(corpus):
    found = documents.examples(tables(corpus), "train", {"t2t": 0.5, "t2t/plus": 0.5})
    assert {e.kind for e in found} == {"t2t"}
    assert (
        sum(e.source.family == "plus" for e in found) == 3 * sum(e.source.family == "more" for e in found) > 0
    )
    for kind in ("t2t/minus", "asr/plus", "text/plus", "tts/plus", "speech/plus"):
        with pytest.raises(ValueError, match=f"nothing of kind '{kind}'"):
            documents.examples(tables(corpus), "train", {kind: 1.0})


@pytest.mark.parametrize(
    "mix",
    [
        {"asr": 0},
        {"asr": "much"},
        {"song": 1.0},
        {"song/plus": 1.0},
        {},
        {"asr": 1e-9},
        {"asr": float("nan")},
    ],
)
def test_a_mix_that_cannot_be_is_one_line(corpus, mix):
    with pytest.raises(ValueError, match="mix: "):
        documents.examples(tables(corpus), "train", mix)


def test_a_kind_without_examples_is_refused_in_train_and_left_out_elsewhere(corpus, tmp_path):
    for name in ("manifest", "units"):
        rows = (corpus / f"{name}.jsonl").read_text().splitlines()
        keep = [row for row in rows if json.loads(row)["id"] not in ("2",)]  # the only spoken answer
        (tmp_path / f"{name}.jsonl").write_text("\n".join(keep))
    (tmp_path / "dialogues.jsonl").write_text((corpus / "dialogues.jsonl").read_text())
    with pytest.raises(ValueError, match="nothing of kind 's2s'"):
        documents.examples(tables(tmp_path), "train", {"s2s": 1.0})
    assert {e.kind for e in documents.examples(tables(tmp_path), "heldout", {"s2s": 0.5, "s2t": 0.5})} == {
        "s2t"
    }


def test_speech_documents_train_every_token(corpus, tok):
    (example, *_) = documents.examples(tables(corpus), "train", {"speech": 1.0})
    ids, mask = documents.render(
        tok, example, random.Random(0), noise=0.5
    )  # output speech is never disturbed
    assert tok.decode(ids[1:]).replace(" ", "") == units_to_text(example.source.units) and all(mask)


def test_as_many_units_are_dropped_and_replaced_as_asked_for_and_none_comes_twice():
    units_ = [i % 10 for i in range(10_000)]
    noisy = documents.drop_and_replace(units_, 0.1, 1000, random.Random(0))
    assert 0.88 < len(noisy) / len(units_) < 0.92 and all(a != b for a, b in zip(noisy, noisy[1:]))
    assert 0.08 < sum(u >= 10 for u in noisy) / len(units_) < 0.12
    assert documents.drop_and_replace(units_, 0.0, 1000, random.Random(0)) == units_
    assert documents.drop_and_replace([5], 1.0, 1000, random.Random(0)) == [5]  # never silence


# ---- one's own data: texts that differ a little, kinds that nobody gave, long recordings -------------------


def with_tables(
    folder: Path, rows: list[dict], dialogues: list[dict], units: list[list[int]]
) -> documents.Tables:
    unit_rows = []
    for i, row in enumerate(rows):
        row |= {"id": str(i), "wav": f"{i}.wav", "seconds": 1.0}
        unit_rows.append(
            {"id": str(i), "units": units[i % len(units)], "durations": [1] * len(units[i % len(units)])}
        )
    for name, table in (("manifest", rows), ("units", unit_rows), ("dialogues", dialogues)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return documents.read_tables(folder, 10)


def test_a_question_is_found_by_another_spelling_but_its_own_comes_first(tmp_path):
    rows = [{"text": text} for text in ("who  is there", "Who is there?", "It is me", "Where?")]
    dialogues = [
        {"question": "Who is there?", "answer": "It is me!"},
        {"question": "who is THERE", "answer": "Nobody."},
        {"question": "Why?", "answer": "?!"},
    ]
    found = documents.exchanges(with_tables(tmp_path, rows, dialogues, [[1], [2], [3], [4]]), "train")
    assert [e.question_units for e in found] == [[[2]], [[1], [2]], []]
    assert [e.answer_units for e in found] == [[[3]], [], []]
    assert found[0].question == "Who is there?"  # as the dialogue writes it


def test_every_text_reaches_the_tokenizer_once(tmp_path):
    rows = [
        {"text": "A question of no dialogue.", "kind": "question"},
        {"text": "Who is there?", "kind": "question"},
        {"text": "It is me.", "kind": "answer"},
        {"text": "No kind."},
        {"text": "No kind.", "speaker": 3},
        {"text": "My own kind.", "kind": "poem"},
        {"text": ""},
        {"text": "Another split.", "split": "heldout", "kind": "poem"},
    ]
    dialogues = [{"question": "Who is there?", "answer": "It is me."}]
    tables = with_tables(tmp_path, rows, dialogues, [[1]])
    found = documents.sentences(tables, "train")
    assert sorted(found) == [
        "A question of no dialogue.",
        "My own kind.",
        "No kind.",
        "Who is there? It is me.",
        "[tq] Who is there?; [ta] It is me.; [ua]",
    ]
    assert documents.sentences(tables, "heldout") == ["Another split."]


def test_a_recording_without_text_is_speech_and_nothing_else(tmp_path):
    tables = with_tables(tmp_path, [{"text": ""}, {"text": "Hello."}], [], [[1], [2]])
    found = documents.sources_of(tables, "train", dict.fromkeys(("speech", "asr", "tts", "text"), 1.0))
    assert {kind: len(sources) for kind, sources in found.items()} == {
        "speech": 2,
        "asr": 1,
        "tts": 1,
        "text": 1,
    }
    tables = with_tables(tmp_path, [{"text": None}], [], [[1]])
    assert len(documents.examples(tables, "train", {"speech": 1.0})) == 1
    for kind, words in (
        ("asr", "their text"),
        ("tts", "corpus.voice"),
        ("s2t", "dialogues.jsonl"),
        ("text", "mix"),
    ):
        with pytest.raises(ValueError, match=f"nothing of kind '{kind}' .*{words}") as error:
            documents.examples(tables, "train", {kind: 1.0})
        assert "\n" not in str(error.value)


def test_documents_are_counted_before_there_are_units(corpus):
    before, after = documents.read_tables(corpus, None), tables(corpus)
    mix = dict.fromkeys(documents.KINDS, 1.0)
    for split in ("train", "heldout", "rendition"):
        counts = [
            {kind: len(found) for kind, found in documents.sources_of(these, split, mix).items()}
            for these in (before, after)
        ]
        assert counts[0] == counts[1] and sum(counts[0].values()) > 3


def test_no_rendering_is_longer_than_the_longest(corpus, tok):
    for kind in documents.KINDS:
        for example in documents.examples(tables(corpus), "train", {kind: 1.0}):
            lengths = {
                len(documents.render(tok, example, random.Random(i), noise)[0])
                for i in range(60)
                for noise in (0.0, 0.1)
            }
            assert max(lengths) == documents.longest(tok, example), kind


def test_long_documents_are_left_out_whole_and_said(tmp_path, tok):
    rows = [{"text": f"Sentence {i}."} for i in range(4)]
    tables = with_tables(tmp_path, rows, [], [[1, 2, 3], [4, 5, 6], [7, 8] * 40, [1, 2] * 60])
    said = []
    shorten = partial(documents.short_enough, tok, 80, lambda *line: said.append(line))
    found = documents.examples(tables, "train", {"asr": 1.0, "speech": 0.5}, shorten)
    assert {len(e.source.units) for e in found} == {3}
    assert {e.kind: sum(f.kind == e.kind for f in found) for e in found} == {"asr": 4, "speech": 2}
    pair = documents.pairs(tables, "train")[3]
    longest = [documents.longest(tok, documents.Example(kind, pair)) for kind in ("asr", "speech")]
    assert said == [
        (f"2 of 4 documents of kind 'asr', of up to {longest[0]} tokens", 2),
        (f"2 of 4 documents of kind 'speech', of up to {longest[1]} tokens", 2),
    ]
    said.clear()
    assert (
        documents.examples(tables, "train", {"asr": 1.0}, partial(shorten.func, tok, 9, shorten.args[2]))
        == []
    )
    assert said[0][1] == 0


def test_the_exact_length_decides(tmp_path, tok):
    tables = with_tables(tmp_path, [{"text": "Hello."}], [], [[1, 2, 3] * 9])
    (pair,) = documents.pairs(tables, "train")
    for kind in ("asr", "tts", "speech"):
        exact = documents.longest(tok, documents.Example(kind, pair))
        for max_len, kept in ((exact - 1, []), (exact, [pair]), (exact + 1, [pair])):
            assert documents.short_enough(tok, max_len, lambda *line: None, kind, [pair]) == kept


# ---- python -m data.documents --show -----------------------------------------------------------------------


def show(*flags: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    env |= {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"} | environment
    command = [sys.executable, "-m", "data.documents", *flags]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, encoding="utf-8")


@pytest.fixture(scope="module")
def tok_folder(tok, tmp_path_factory) -> str:
    folder = tmp_path_factory.getbasetemp() / "tok0"
    assert (folder / "tokenizer.model").exists()
    return str(folder)


def test_show_works_on_a_fresh_clone(tmp_path):
    folder = str(ROOT / "weights/tiny/llama")
    done = show("--show", "5", "--tokenizer", folder, cwd=tmp_path)  # there is no out/ in this folder
    assert done.returncode == 0 and done.stderr == "", done.stderr
    out = done.stdout
    assert "built-in examples" in out and "\x1b" not in out
    for number, kind in enumerate(("asr", "tts", "s2s", "speech", "text")):
        assert f"document {number}: {kind}," in out
    assert "[[ Tom is in the garden.<eoa> .</s>]]" in out  # the answer of recognition is its target ...
    assert (
        "[[<sosp><5><12><2><17><eosp><eoa> .</s>]]" in out and "<sosp><7><3><19>" in out
    )  # ... and of synthesis
    assert "packed (--max-len 512): 1 rows" in out and "document 4" in out.split("packed")[1]


def test_show_prints_the_documents_that_training_reads(corpus, tok, tok_folder):
    flags = (
        "--run",
        str(corpus),
        "--tokenizer",
        tok_folder,
        "--mix",
        "{ asr = 0.5, t2t = 0.5 }",
        "--seed",
        "3",
    )
    done = show("--show", "6", "--max-len", "80", *flags)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    examples = documents.examples(tables(corpus), "train", {"asr": 0.5, "t2t": 0.5})

    def read(index: int) -> documents.Document:
        return documents.render(tok, *documents.draw_example(examples, index, 3))

    (batch,) = documents.batches.documents(read, 6, 80, 1)(0)
    assert f"{batch.ids.shape[0]} rows of {batch.ids.shape[1]} columns" in done.stdout
    assert done.stdout.count("document ") >= 12
    for row in range(len(batch.ids)):  # every column is some document's, or padding
        columns = done.stdout.split(f"row {row}  ")[1].split("\n")[1]
        ends = [int(end) for end in re.findall(r"columns \d+-(\d+)", columns)]
        starts = [int(start) for start in re.findall(r"columns (\d+)-", columns)]
        assert starts == [0, *(end + 1 for end in ends[:-1])] and ends[-1] == batch.ids.shape[1] - 1
        padding = int((batch.docs[row] < 0).sum())
        assert ("padding" in columns) == (padding > 0)
        if padding:
            assert starts[-1] == batch.ids.shape[1] - padding


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_show_colors_a_terminal():
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "data.documents", "--show", "1"]
    env = os.environ | {"NO_COLOR": "", "TERM": "xterm"}
    child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    out = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        out += data
    os.close(ours)
    assert child.wait() == 0 and b"\x1b[1;32m" in out and b"[[" not in out


def test_no_color_is_honored(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert documents.Marks.choose().target == ("[[", "]]")
    monkeypatch.delenv("NO_COLOR")
    assert documents.Marks.choose().target[0].startswith("\x1b")


def test_a_mistake_of_the_user_of_show_is_one_line_and_exit_code_1():
    done = show("--run", "nowhere")
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "no such file" in done.stderr
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--show", "0"], "--show must be at least 1"),
        (["--show", "many"], "--show"),
        (["--shwo", "3"], "--shwo"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["--mix", "asr"], "--mix"),
        (["--mix", "{ song = 1 }"], "song"),
        (["--split", "test"], "--split"),
        (["--noise", "2"], "--noise"),
        (["--max-len", "1"], "--max-len"),
    ],
)
def test_a_mistake_in_the_flags_of_show_is_one_line(monkeypatch, flags, words):
    monkeypatch.setattr(sys, "argv", ["data.documents", *flags])
    with pytest.raises((ValueError, OSError), match=words) as error:
        documents.main()
    assert "\n" not in str(error.value)


def test_show_refuses_units_that_the_tokenizer_does_not_have(corpus, tok_folder, tmp_path, monkeypatch):
    for name in ("manifest", "dialogues"):
        (tmp_path / f"{name}.jsonl").write_text((corpus / f"{name}.jsonl").read_text())
    units_text = (corpus / "units.jsonl").read_text()
    (tmp_path / "units.jsonl").write_text(units_text.replace(", 3, 7]", ", 3, 77]"))
    monkeypatch.setattr(sys, "argv", ["data.documents", "--run", str(tmp_path), "--tokenizer", tok_folder])
    with pytest.raises(ValueError, match="unit 77 is not one of 0 to 9"):
        documents.main()

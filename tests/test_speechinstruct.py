"""data/speechinstruct: the descriptions, the roles, and what prepare.py makes of a corpus."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import tokenizer
from data.speechinstruct import prepare
from data.tokens import to_document
from files import read_json, read_jsonl, write_jsonl
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


# ---- Appendices A and B ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["asr", "tts"])
def test_descriptions_meet_the_requirements_of_appendix_a(task):
    texts = prepare.descriptions(task)
    assert len(texts) == 100
    plain = [re.sub(r"\W+", " ", text).strip().lower() for text in texts]
    assert len(set(plain)) == 100, "no description twice"
    first = Counter(text.split()[0] for text in plain)
    assert max(first.values()) <= 3 and len(first) >= 85, "verbs are hardly repeated (2)"
    questions = [text for text in texts if "?" in text]
    assert 15 <= len(questions) <= 50, "questions and imperatives (3)"
    for text in texts:
        sentences = [part for part in re.split(r"(?<=[.?!])\s+", text) if part]
        assert 1 <= len(sentences) <= 2, f"one or two sentences (6): {text}"
        assert text.isascii() and text[0].isupper() and text[-1] in ".?", f"English (5): {text}"
        assert 3 <= len(text.split()) <= 20, text
        assert not prepare.problem(text)


def test_the_examples_of_appendix_b_are_among_them():
    asr, tts = prepare.descriptions("asr"), prepare.descriptions("tts")
    assert asr[:10] == list(tokenizer.ASR_INSTRUCTIONS[:10])
    assert {"Whisper the given sentence softly.", "Sing the text provided in a melodic voice."} <= set(
        tts[:10]
    )
    assert set(tokenizer.TTS_INSTRUCTIONS[:8]) <= set(tts[:10])
    assert not set(asr) & set(tts)


def test_six_roles_of_ten_pairs():
    roles = read_json(prepare.HERE / "roles.json")
    names = {"talking encyclopedia", "personal assistant", "chat partner"}
    assert {row["role"] for row in roles} == names | {"poet", "psychologist", "educational assistant"}
    instructions = [pair["instruction"] for row in roles for pair in row["pairs"]]
    responses = [pair["response"] for row in roles for pair in row["pairs"]]
    assert len(set(instructions)) == len(set(responses)) == 60
    assert all(len(row["pairs"]) == 10 for row in roles)
    assert all(len(text.split()) < prepare.WORDS for text in responses)


# ---- prepare.py --------------------------------------------------------------------------------------------


def make_corpus(folder: Path) -> Path:
    folder.mkdir()
    texts = {
        "a": "Hello.",
        "b": "What is red?",
        "c": "A color.",
        "d": "Not to be seen.",
        "e": "Say [ta] now.",
    }
    rows = [{"wav": f"{name}.wav", "text": text} for name, text in texts.items()]
    rows[1] |= {"kind": "question", "speaker": 3}
    rows[3] |= {"split": "heldout"}
    rows += [
        {"wav": "f.wav", "text": " "},
        {"wav": "g.wav", "text": "No units."},
        {"wav": "h.wav", "text": "Bad."},
    ]
    rows += [{"wav": "i.wav", "id": "again", "text": "What is red?"}]  # by the target speaker
    write_jsonl(folder / "manifest.jsonl", rows)
    units = []
    for number, row in enumerate(rows):
        name = row.get("id", Path(row["wav"]).stem)
        if name != "g":
            units.append({"id": name, "units": [number, number + 1], "durations": [1, 2]})
    units[-2]["units"] = [1, 1000]
    write_jsonl(folder / "units.jsonl", units)
    long = "word " * 35
    dialogues = [
        {"question": "What is red?", "answer": "A color."},
        {"question": "What is blue?", "answer": "A color."},
        {"question": "And now?", "answer": long},
        {"question": "Held out?", "answer": "Yes.", "split": "heldout"},
        {"question": "<5>?", "answer": "No."},
    ]
    write_jsonl(folder / "dialogues.jsonl", dialogues)
    return folder


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "data/speechinstruct/prepare.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    corpus = make_corpus(tmp_path_factory.mktemp("s") / "corpus")
    done = run(corpus, corpus / "out", "--units", corpus / "units.jsonl", "--standard")
    assert done.returncode == 0, done.stderr
    assert "left out, cross-modal: a unit outside 0..999: 1" in done.stdout
    return corpus / "out"


def test_cross_modal_lines(made):
    rows = read_jsonl(made / "cross_modal_instruction.jsonl")
    assert [set(row) for row in rows] == [{"prefix", "plain_text"}] * 4  # a, b, c and the second of b's text
    texts = [row["plain_text"] for row in rows]
    speech = ["<sosp><0><1><eosp>", "<sosp><1><2><eosp>", "<sosp><2><3><eosp>", "<sosp><8><9><eosp>"]
    for text, units, said in zip(texts, speech, ["Hello.", "What is red?", "A color.", "What is red?"]):
        match = re.fullmatch(r"\[Human\]: (.+) This is input: (.+)<eoh>\. \[SpeechGPT\]: (.+)<eoa>\.", text)
        is_asr = match[1] in prepare.descriptions("asr")
        assert is_asr or match[1] in prepare.descriptions("tts")
        assert (match[2], match[3]) == ((units, said) if is_asr else (said, units))


def test_what_was_left_out_is_listed_by_reason(made):
    rows = read_jsonl(made / "left_out.jsonl")
    assert {(row["part"], row["id"], row["reason"]) for row in rows} == {
        ("cross-modal", "e", "a marker in the text"),
        ("cross-modal", "f", "no text"),
        ("cross-modal", "g", "no units"),
        ("cross-modal", "h", "a unit outside 0..999"),
        ("chain", 3, "a response of 35 words or more"),
        ("chain", 5, "a marker in the text"),
        ("chain", 2, "no speech for s2s"),
        ("chain", 2, "no speech for s2t"),
    }


def test_chains_in_four_directions_and_two_appendices(made):
    quadruplets = read_jsonl(made / "quadruplets.jsonl")
    red = {"speech_i": [8, 9], "text_i": "What is red?", "text_r": "A color.", "speech_r": [2, 3]}
    assert quadruplets == [red, red | {"speech_i": [], "text_i": "What is blue?"}]
    rows = read_jsonl(made / "chain_of_modality_instruction.jsonl")
    assert len(rows) == 8 + 4
    slots = red | {"speech_i": "<sosp><8><9><eosp>", "speech_r": "<sosp><2><3><eosp>"}
    expected = []
    for mode in ("s2s", "s2t", "t2s", "t2t"):
        expected.append("".join(tokenizer.chain_of_modality(mode, **slots)))
        expected.append("".join(tokenizer.standard(mode, **slots)))
    assert [row["plain_text"] for row in rows[:8]] == expected
    tok = Tokenizer.from_pretrained("weights/tiny/llama")
    assert all(any(to_document(row, tok)[1]) for row in rows)


def test_the_released_style_has_its_prefix_and_is_the_same_again(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    for out in ("x", "y"):
        done = run(
            corpus, tmp_path / out, "--units", corpus / "units.jsonl", "--style", "released", "--asr", "1"
        )
        assert done.returncode == 0, done.stderr
    for name in ("cross_modal_instruction.jsonl", "chain_of_modality_instruction.jsonl", "left_out.jsonl"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()
    row = read_jsonl(tmp_path / "x" / "cross_modal_instruction.jsonl")[0]
    assert row["prefix"] == tokenizer.META and row["plain_text"].endswith("<eoh> [SpeechGPT]: Hello.<eoa> ")


def test_texts_without_recordings_are_spoken_by_the_generator(tmp_path):
    class Generator:
        asked: list[list[str]] = []

        def generate(self, texts):
            self.asked.append(texts)
            return [[len(text)] for text in texts]

    dialogues = iter([("a?", "b."), ("a?", "c!")])
    rows = list(prepare.quadruplets(dialogues, {"b.": [7]}, Generator()))
    assert Generator.asked == [["a?", "c!"]]
    assert [(row["speech_i"], row["speech_r"]) for row in rows] == [([2], [7]), ([2], [2])]


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give either --hubert"),
        (["--units", "nothing.jsonl"], "nothing.jsonl"),
        (["--units", "UNITS", "--asr", "2"], "--asr is 2"),
        (["--units", "UNITS", "--words", "0"], "at least 1"),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, message):
    corpus = make_corpus(tmp_path / "corpus")
    flags = [str(corpus / "units.jsonl") if flag == "UNITS" else flag for flag in flags]
    done = run(corpus, tmp_path / "out", *flags)
    assert done.returncode == 1 and message in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.glob("out/*instruction*"))


def test_units_of_another_order_are_refused(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    rows = read_jsonl(corpus / "units.jsonl")
    write_jsonl(corpus / "units.jsonl", rows[::-1])
    done = run(corpus, tmp_path / "out", "--units", corpus / "units.jsonl")
    assert done.returncode == 1 and "does not follow the order" in done.stderr
    assert not (tmp_path / "out" / "cross_modal_instruction.jsonl").exists()


def test_roles_become_a_corpus_and_quadruplets(tmp_path, monkeypatch):
    pytest.importorskip("hibari")
    table = read_json(prepare.HERE / "roles.json")
    small = [{"role": row["role"], "pairs": row["pairs"][:1]} for row in table[:2]]
    (tmp_path / "roles.json").write_text(json.dumps(small))
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    prepare.make_roles(tmp_path / "corpus")
    out = tmp_path / "out"
    hubert = ROOT / "weights/tiny/hubert"
    done = run(tmp_path / "corpus", out, "--roles", "--hubert", hubert, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(out / "quadruplets.jsonl")
    assert [row["text_i"] for row in rows] == [row["pairs"][0]["instruction"] for row in small]
    assert all(len(row["speech_i"]) > 20 and len(row["speech_r"]) > 20 for row in rows)
    assert len(read_jsonl(out / "chain_of_modality_instruction.jsonl")) == 8

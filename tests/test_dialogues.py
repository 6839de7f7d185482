"""data/dialogues.py, and the recipes of moss-002-sft-data and Alpaca, on small files in their layouts."""

import json
import sys
import zipfile

import pytest

from data import corpus, dialogues
from data.alpaca import prepare as alpaca
from data.moss import prepare as moss


def run(module, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
    module.main()


def left_out(out) -> list[str]:
    lines = (out / "dialogues_left_out.jsonl").read_text().splitlines()
    return [json.loads(line)["reason"].split(":")[0] for line in lines]


def turns(*pairs):
    return "".join(f"[Human]: {question}<eoh>\n[MOSS]: {answer}<eoa>\n" for question, answer in pairs)


MOSS = [
    {"plain_text": turns(("Who are you?", "I am MOSS."), ("Why?", "Because.")), "num_turns": 2},
    {"plain_text": turns(("Tell me\nall.", "word " * 35))},
    {"plain_text": turns(("Tell me less.", "word " * 34))},
    {"plain_text": "[Human]: Hello?<eoh>"},
    {"plain_text": turns(("", "Empty."))},
    {"plain_text": turns(("Привет?", "Hello."))},
    {"other": 1},
]


@pytest.mark.parametrize("layout", ["list", "lines", "zip", "folder"])
def test_moss(tmp_path, monkeypatch, capsys, layout):
    source = tmp_path / "moss"
    source.mkdir()
    name = "en_helpfulness.jsonl" if layout == "lines" else "en_helpfulness.json"
    text = "\n".join(map(json.dumps, MOSS)) if layout == "lines" else json.dumps(MOSS, indent=1)
    (source / name).write_text(text)
    (source / "zh_honesty.json").write_text(json.dumps(MOSS))
    given = source / name if layout == "list" else source
    if layout == "zip":
        given = tmp_path / "moss.zip"
        with zipfile.ZipFile(given, "w") as archive:
            archive.write(source / name, f"data/{name}")
    run(moss, monkeypatch, given, tmp_path / "out", "--english", "--heldout", "0")
    assert corpus.read_dialogues(tmp_path / "out") == [
        {"question": "Who are you?", "answer": "I am MOSS.", "family": "en_helpfulness", "split": "train"},
        {
            "question": "Tell me less.",
            "answer": "word " * 33 + "word",
            "family": "en_helpfulness",
            "split": "train",
        },
    ]
    assert left_out(tmp_path / "out") == [
        "answer too long", "no question with an answer", "question or answer empty", "text not English",
        "no question with an answer",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "train            2 dialogues" in said and "2 no question with an answer" in said


def test_all_turns_and_all_lengths(tmp_path, monkeypatch):
    (tmp_path / "en.json").write_text(json.dumps(MOSS))
    run(moss, monkeypatch, tmp_path / "en.json", tmp_path / "out", "--turns", "all", "--max-words", "0")
    found = corpus.read_dialogues(tmp_path / "out")
    assert [row["question"] for row in found] == [
        "Who are you?",
        "Why?",
        "Tell me all.",
        "Tell me less.",
        "Привет?",
    ]


def test_alpaca_and_its_evaluation(tmp_path, monkeypatch):
    rows = [{"instruction": f"Name {n} fruits.", "input": "", "output": "Apple."} for n in range(200)]
    rows[0]["input"] = "In French."
    rows.append({"instruction": "No output."})
    (tmp_path / "alpaca_data.json").write_text(json.dumps(rows))
    run(alpaca, monkeypatch, tmp_path / "alpaca_data.json", tmp_path / "out")
    found = corpus.read_dialogues(tmp_path / "out")
    assert found[0]["question"] == "Name 0 fruits. In French." and found[1]["question"] == "Name 1 fruits."
    assert len(found) == 200 and 2 <= sum(row["split"] == "heldout" for row in found) <= 20
    assert left_out(tmp_path / "out") == ["no instruction with an output"]

    rows = [{"instruction": "Who?", "output": "I.", "generator": "text_davinci_003", "dataset": "koala"}]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(rows))
    run(alpaca, monkeypatch, tmp_path / "alpaca_eval.json", tmp_path / "eval")
    assert corpus.read_dialogues(tmp_path / "eval") == [
        {"question": "Who?", "answer": "I.", "family": "koala", "split": "heldout"}
    ]


def test_a_file_cut_in_half(tmp_path, monkeypatch):
    rows = json.dumps([{"instruction": f"{n}?", "output": "Yes."} for n in range(10)])
    (tmp_path / "alpaca_data.json").write_text(rows[: len(rows) // 2])
    run(alpaca, monkeypatch, tmp_path / "alpaca_data.json", tmp_path / "out")
    assert len(corpus.read_dialogues(tmp_path / "out")) in (4, 5) and left_out(tmp_path / "out") == [
        "cut short or damaged"
    ]


def test_nothing_is_lost(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out/dialogues.jsonl"
    mine.write_text('{"question": "By hand?", "answer": "Yes."}\n')
    with pytest.raises(ValueError, match="not made by a recipe"):
        run(alpaca, monkeypatch, tmp_path / "a.json", tmp_path / "out")
    with pytest.raises(ValueError, match="no dialogue was found"):
        run(alpaca, monkeypatch, tmp_path / "a.json", tmp_path / "new")
    assert "By hand" in mine.read_text() and not (tmp_path / "new/dialogues.jsonl").exists()
    (tmp_path / "empty").mkdir()
    for source, words in (("gone.json", "no such file"), ("empty", "there is no file that ends in")):
        with pytest.raises((ValueError, OSError), match=words):
            run(alpaca, monkeypatch, tmp_path / source, tmp_path / "x")
    with pytest.raises(ValueError, match="--heldout"):
        run(alpaca, monkeypatch, tmp_path / "a.json", tmp_path / "x", "--heldout", "2")


def test_a_row_that_is_a_dialogue():
    limits = dialogues.Limits(max_words=3, heldout=0.0, english=False)
    assert dialogues.dialogue(" Who\n are you? ", "I\x1b[31m.", "f", limits, "w") == {
        "question": "Who are you?", "answer": "I[31m.", "family": "f", "split": "train",
    }  # fmt: skip

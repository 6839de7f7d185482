"""data/corpus.py: one manifest, its defaults and mistakes; what cannot be used is told and left out."""

import json

import numpy as np
import pytest
import soundfile

from data import audio, corpus
from files import read_jsonl


def tone(seconds: float = 0.5, rate: int = 16000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def write_table(folder, name, *rows) -> None:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def write_manifest(folder, *rows) -> None:
    write_table(folder, "manifest", *rows)


# ---- the manifest ------------------------------------------------------------------------------------------


def test_own_recordings_need_only_wav_and_text(tmp_path):
    audio.save(tmp_path / "mine" / "one.wav", tone(0.5))
    soundfile.write(tmp_path / "two.flac", tone(1.0, 44100), 44100)
    write_manifest(tmp_path, {"wav": "mine/one.wav", "text": "Hello."}, "",
                   {"wav": "two.flac", "text": "Ça va ?", "speaker": 3, "split": "heldout"})  # fmt: skip
    one, two = corpus.resolve(tmp_path)
    assert one == {"wav": "mine/one.wav", "text": "Hello.", "id": "one", "speaker": 0, "kind": "statement",
                   "split": "train", "family": "", "seconds": 0.5}  # fmt: skip
    assert (two["speaker"], two["split"], two["text"]) == (3, "heldout", "Ça va ?")
    assert abs(two["seconds"] - 1) < 1e-3


def test_what_is_written_is_read(tmp_path):
    rows = [{"id": "a", "wav": "a.wav", "text": "Héllo.", "speaker": 1, "split": "rendition",
             "kind": "question", "family": "plus", "seconds": 1.5, "answer": "x"}]  # fmt: skip
    corpus.write_manifest(tmp_path, rows)
    assert corpus.read_manifest(tmp_path) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.jsonl"]


@pytest.mark.parametrize("row, words", [
    ("not json", ["line 2"]), ("[1]", ["line 2", "wav, text"]), ({"wav": "a.wav"}, ["line 2", "wav, text"]),
    ("{", ["line 2"]), ({"id": "1"}, ["line 2", "wav, text"]),
    ({"wav": 3, "text": "x"}, ['"wav" is 3', "string"]), ({"wav": "b.wav", "text": None}, ['"text" is None']),
    ({"wav": "a.wav", "text": "x"}, ["row 2", "twice"]),
    ({"wav": "b.wav", "text": "x", "split": "test"}, ["row 2", "split is 'test'", "heldout"]),
    ({"wav": "b.wav", "text": "x", "speaker": "Ann"}, ["row 2", "\"speaker\" is 'Ann'", "whole number"]),
    ({"wav": "b.wav", "text": "x", "speaker": -1}, ["row 2", "0 or more"]),
    ({"wav": "b.wav", "text": "x", "speaker": True}, ["row 2", '"speaker" is True', "whole number"]),
    ({"wav": "b.wav", "text": "x", "id": 7}, ["row 2", '"id" is 7']),
    ({"wav": "b.wav", "text": "x", "seconds": "long"}, ["row 2", "seconds"]),
    ({"wav": "b.wav", "text": "x", "seconds": float("nan")}, ["row 2", "seconds"]),
])  # fmt: skip
def test_a_bad_row_is_named(tmp_path, row, words):
    audio.save(tmp_path / "a.wav", tone())
    write_manifest(tmp_path, {"wav": "a.wav", "text": "fine"}, row)
    with pytest.raises((ValueError, OSError)) as error:
        corpus.read_manifest(tmp_path)
    one_line(error, "manifest.jsonl", *words)


def test_no_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        corpus.read_manifest(tmp_path)
    write_manifest(tmp_path)
    with pytest.raises(ValueError, match="no rows"):
        corpus.read_manifest(tmp_path)


def test_dialogues_are_optional(tmp_path):
    assert corpus.read_dialogues(tmp_path) == []
    write_table(
        tmp_path,
        "dialogues",
        {"question": "a", "answer": "b"},
        {"question": "c", "answer": "d", "split": "heldout", "family": "plus", "spoken": True},
    )
    assert corpus.read_dialogues(tmp_path) == [
        {"question": "a", "answer": "b", "split": "train", "family": ""},
        {"question": "c", "answer": "d", "split": "heldout", "family": "plus", "spoken": True},
    ]
    for row, words in (
        ({"question": "a"}, "line 1"),
        ({"question": "a", "answer": 4}, '"answer" is 4'),
        ({"question": "a", "answer": "b", "split": "dev"}, "row 1: split is 'dev'"),
    ):
        write_table(tmp_path, "dialogues", row)
        with pytest.raises(ValueError) as error:
            corpus.read_dialogues(tmp_path)
        one_line(error, "dialogues.jsonl", words)


# ---- the check before training -----------------------------------------------------------------------------


def recordings(folder, n: int) -> list[dict]:
    rows = [{"wav": f"wav/{i}.wav", "text": f"Sentence {i}."} for i in range(n)]
    for row in rows:
        audio.save(folder / row["wav"], tone())
    return rows


def test_what_can_be_used_is_used_without_a_word_and_nothing_is_written_beside_it(tmp_path, capsys):
    folder, out = tmp_path / "my corpus", tmp_path / "out"
    rows = recordings(folder, 3)
    write_manifest(folder, *rows)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    found = corpus.check(folder, out)
    assert [row["id"] for row in found] == ["0", "1", "2"] and corpus.read_manifest(out) == found
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert capsys.readouterr().out == "" and corpus.read_dialogues(out) == []
    assert (out / "skipped.jsonl").read_text() == ""


def test_a_run_does_not_replace_the_manifest_of_its_corpus(tmp_path):
    write_manifest(tmp_path, *recordings(tmp_path, 3))
    before = (tmp_path / "manifest.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match="is the corpus, whose manifest a run would replace: choose another --out"
    ):
        corpus.check(tmp_path, tmp_path / "wav/..")
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.jsonl", "wav"}
    assert (tmp_path / "manifest.jsonl").read_bytes() == before


def test_a_few_unusable_recordings_are_told_listed_and_left_out(tmp_path, capsys):
    out = tmp_path / "out"
    write_manifest(tmp_path, *recordings(tmp_path, 40))
    (tmp_path / "wav/5.wav").unlink()
    (tmp_path / "wav/7.wav").write_bytes(b"")
    data = (tmp_path / "wav/9.wav").read_bytes()
    (tmp_path / "wav/9.wav").write_bytes(data[:900])
    (tmp_path / "wav/11.wav").unlink()

    usable = corpus.check(tmp_path, out)
    (line,) = capsys.readouterr().out.splitlines()
    for words in (
        "4 of 40",
        "2 no such file, 1 empty (0 bytes), 1 cut short",
        "wav/5.wav: no such file",
        "left out",
    ):
        assert words in line
    skipped = {row["id"]: row for row in read_jsonl(out / "skipped.jsonl")}
    assert skipped.keys() == {"5", "7", "9", "11"} and skipped["9"]["wav"] == "wav/9.wav"
    assert "copy it again" in skipped["9"]["reason"]
    assert corpus.read_manifest(out) == usable and len(usable) == 36

    for i in (5, 7, 9, 11):  # mended: nothing is left out any more
        audio.save(tmp_path / f"wav/{i}.wav", tone())
    assert len(corpus.check(tmp_path, out)) == len(corpus.read_manifest(out)) == 40
    assert read_jsonl(out / "skipped.jsonl") == []


def test_many_unusable_recordings_are_a_mistake(tmp_path):
    rows = recordings(tmp_path, 10)
    (tmp_path / "wav/3.wav").write_bytes(b"What is this?" * 9)
    audio.save(tmp_path / "wav/4.wav", tone(0.01))
    write_manifest(tmp_path, *rows)
    for _ in range(2):  # also when it is asked again
        with pytest.raises(ValueError) as error:
            corpus.check(tmp_path, tmp_path / "out")
        one_line(error, "2 of 10", "1 not a sound file", "1 too short", "wav/3.wav", "mend them")
    write_manifest(tmp_path, *[row | {"wav": row["wav"].replace("wav/", "sound/")} for row in rows])
    with pytest.raises(ValueError, match="10 of 10 .*10 no such file"):
        corpus.check(tmp_path, tmp_path / "out")
    assert len(read_jsonl(tmp_path / "out/skipped.jsonl")) == 10
    assert not (tmp_path / "out/manifest.jsonl").exists()


def test_a_damaged_table_of_dialogues_is_told_before_training(tmp_path):
    write_manifest(tmp_path, *recordings(tmp_path, 1))
    write_table(tmp_path, "dialogues", {"question": 1, "answer": "b"})
    with pytest.raises(ValueError, match="dialogues.jsonl"):
        corpus.check(tmp_path, tmp_path / "out")

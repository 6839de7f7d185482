"""data/corpus.py: one manifest, its defaults and mistakes; what cannot be used is told and left out."""

import json

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

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
    one, two = corpus.resolve(tmp_path, tmp_path)
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
    ("not json", ["line 2"]), ("[1]", ["line 2", "wav"]), ({"text": "x"}, ["line 2", "wav"]),
    ("{", ["line 2"]), ("[" * 100_000, ["line 2"]), ('{"wav": "b.wav", "wav": "c.wav"}', ["line 2", "twice"]),
    ({"wav": 3, "text": "x"}, ['"wav" is 3', "string"]), ({"wav": "b.wav", "text": 4}, ['"text" is 4']),
    ({"wav": "", "text": "x"}, ['"wav" is empty']), ({"wav": None, "text": "x"}, ['"wav" is empty']),
    ({"wav": "a.wav", "text": "x"}, ["row 2", "twice"]),
    ({"wav": "b.wav", "text": "x", "split": "test"}, ["row 2", "split is 'test'", "heldout"]),
    ({"wav": "b.wav", "text": "x", "speaker": ["Ann"]}, ["row 2", '"speaker" is <list>', "name"]),
    ({"wav": "b.wav", "text": "x", "speaker": 10**40}, ["row 2", '"speaker" is', "whole number"]),
    ({"wav": "b.wav", "text": "x", "speaker": "\x1b[2J"}, ["row 2", "control characters"]),
    ({"wav": "b.wav", "text": "x", "family": "\ud800"}, ["row 2", "half of a character"]),
    ({"wav": "b.wav", "text": "x" * 100_001}, ["row 2", "100001 characters"]),
    ({"wav": "/etc/b.wav", "text": "x"}, ["row 2", "absolute"]),
    ({"wav": "C:\\sound\\b.wav", "text": "x"}, ["row 2", "absolute"]),
    ({"wav": "\\\\host\\share\\b.wav", "text": "x"}, ["row 2", "absolute"]),
    ({"wav": "../b.wav", "text": "x"}, ["row 2", "leads out"]),
    ({"wav": "a\\..\\..\\b.wav", "text": "x"}, ["row 2", "leads out"]),
    ({"wav": "a\x00.wav", "text": "x"}, ["row 2", "control characters"]),
    ({"wav": "b.wav", "text": "x", "speaker": -1}, ["row 2", "0 or more"]),
    ({"wav": "b.wav", "text": "x", "speaker": True}, ["row 2", '"speaker" is', "whole number"]),
    ({"wav": "b.wav", "text": "x", "id": 7}, ["row 2", '"id" is 7']),
    ({"wav": "b.wav", "text": "x", "seconds": "long"}, ["row 2", "seconds"]),
    ({"wav": "b.wav", "text": "x", "seconds": float("nan")}, ["line 2", "NaN is no number"]),
    ({"wav": "b.wav", "text": "x", "seconds": 1e300}, ["row 2", "seconds"]),
    ('{"wav": "b.wav", "seconds": ' + "1" * 5000 + "}", ["line 2"]),
])  # fmt: skip
def test_a_bad_row_is_named(tmp_path, row, words):
    audio.save(tmp_path / "a.wav", tone())
    write_manifest(tmp_path, {"wav": "a.wav", "text": "fine"}, row)
    with pytest.raises((ValueError, OSError)) as error:
        corpus.read_manifest(tmp_path)
    one_line(error, "manifest.jsonl", *words)
    assert str(error.value).isprintable() and len(str(error.value)) < len(str(tmp_path)) + 300


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
        {"question": "without an answer", "answer": None},
        {"question": " ", "answer": "without a question"},
    )
    assert corpus.read_dialogues(tmp_path) == [
        {"question": "a", "answer": "b", "split": "train", "family": ""},
        {"question": "c", "answer": "d", "split": "heldout", "family": "plus"},
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


def test_what_can_be_used_is_told_and_nothing_is_written_beside_it(tmp_path, capsys):
    folder, out = tmp_path / "my corpus", tmp_path / "out"
    rows = recordings(folder, 3)
    write_manifest(folder, *rows)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    found = corpus.check(folder, out)
    assert [row["id"] for row in found] == ["0", "1", "2"] and corpus.read_manifest(out) == found
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    counted, voice = capsys.readouterr().out.splitlines()
    assert counted == "corpus: 3 recordings, 0.0 minutes: 3 train" and "speaker '0'" in voice
    assert corpus.read_dialogues(out) == []
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


def test_nor_that_of_another_folder(tmp_path):
    folder, out = tmp_path / "corpus", tmp_path / "out"
    write_manifest(folder, *recordings(folder, 3))
    out.mkdir()
    write_manifest(out, {"wav": "mine.wav", "text": "My own."})
    before = (out / "manifest.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match="manifest.jsonl is there and no run has made it: choose another --out"
    ):
        corpus.check(folder, out)
    assert list(out.iterdir()) == [out / "manifest.jsonl"] and (out / "manifest.jsonl").read_bytes() == before
    (out / "manifest.jsonl").unlink()
    assert corpus.check(folder, out) == corpus.check(folder, out), "but that of an earlier run"


def test_a_few_unusable_recordings_are_told_listed_and_left_out(tmp_path, capsys):
    out = tmp_path / "out"
    write_manifest(tmp_path, *recordings(tmp_path, 40))
    (tmp_path / "wav/5.wav").unlink()
    (tmp_path / "wav/7.wav").write_bytes(b"")
    data = (tmp_path / "wav/9.wav").read_bytes()
    (tmp_path / "wav/9.wav").write_bytes(data[:900])
    (tmp_path / "wav/11.wav").unlink()

    usable = corpus.check(tmp_path, out)
    line, counted, _ = capsys.readouterr().out.splitlines()
    for words in ("4 of 40", "2 no such file, 1 empty (0 bytes), 1 cut short", "skipped.jsonl", "left out"):
        assert words in line
    assert counted.startswith("corpus: 36 recordings")
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
        one_line(error, "2 of 10", "1 not a sound file", "1 too short", "skipped.jsonl", "mend them")
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


# ---- one's own data, as people have it ---------------------------------------------------------------------


def test_a_table_from_windows_is_read(tmp_path):
    rows = ['{"wav": "wav\\\\a.wav", "text": "Hello."}', '{"wav": "wav/b.wav", "text": "Bye."}']
    (tmp_path / "manifest.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\r\n")
    assert [row["wav"] for row in corpus.read_manifest(tmp_path)] == ["wav/a.wav", "wav/b.wav"]
    (tmp_path / "manifest.jsonl").write_text("\n".join(rows), encoding="utf-16")
    with pytest.raises(ValueError, match="line 1: not UTF-8; save the file as UTF-8"):
        corpus.read_manifest(tmp_path)


def test_null_is_as_if_the_field_were_missing(tmp_path):
    bare = {"wav": "a.wav", "text": "Hello."}
    keys = ("id", "speaker", "split", "kind", "family", "seconds", "answer", "of_no_meaning")
    write_manifest(tmp_path, bare | dict.fromkeys(keys))
    with_nulls = corpus.read_manifest(tmp_path)
    write_manifest(tmp_path, bare)
    assert with_nulls == corpus.read_manifest(tmp_path)


def test_recordings_of_one_name_in_several_folders_have_names_of_their_own(tmp_path):
    rows = [{"wav": f"{name}/0001.wav", "text": "x"} for name in ("ann", "bob", "cleo")]
    write_manifest(tmp_path, *rows)
    assert [row["id"] for row in corpus.read_manifest(tmp_path)] == ["0001", "bob/0001", "cleo/0001"]


def test_text_that_says_nothing_is_none_and_is_counted(tmp_path, capsys):
    texts = ["Hello.", "", None, "  \t", "It ends <eoa>.", "<17>", "[Human]", "one\u2028two\x1b[31m three "]
    rows = recordings(tmp_path / "corpus", len(texts) + 1)
    for row, text in zip(rows, texts):
        row["text"] = text
    del rows[-1]["text"]
    write_manifest(tmp_path / "corpus", *rows)
    found = corpus.check(tmp_path / "corpus", tmp_path / "out")
    assert [row["text"] for row in found] == ["Hello.", "", "", "", "", "", "", "one two [31m three", ""]
    assert "without text, or with a marker such as <eoa> in it: 7 recordings" in capsys.readouterr().out


def test_a_link_out_of_the_corpus_is_not_followed(tmp_path):
    folder = tmp_path / "corpus"
    rows = recordings(folder, 12)
    audio.save(tmp_path / "secret.wav", tone())
    (folder / "wav/3.wav").unlink()
    try:
        (folder / "wav/3.wav").symlink_to(tmp_path / "secret.wav")
        (folder / "within.wav").symlink_to(folder / "wav/4.wav")
    except OSError:
        pytest.skip("no symbolic links here")
    write_manifest(folder, *rows, {"wav": "within.wav", "text": "x"})
    found = corpus.check(folder, tmp_path / "out")
    assert "3" not in {row["id"] for row in found} and "within" in {row["id"] for row in found}
    (skipped,) = read_jsonl(tmp_path / "out/skipped.jsonl")
    assert skipped["id"] == "3" and "leads out of the corpus" in skipped["reason"]


def test_damage_inside_a_file_is_found_before_anything_is_trained(tmp_path):
    rows = recordings(tmp_path, 12)
    rng = np.random.default_rng(0)
    rows[5]["wav"] = "noise.flac"
    soundfile.write(tmp_path / "noise.flac", 0.1 * rng.standard_normal(32000), 16000)
    data = bytearray((tmp_path / "noise.flac").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    (tmp_path / "noise.flac").write_bytes(data)
    write_manifest(tmp_path, *rows)
    assert "noise" not in {row["id"] for row in corpus.check(tmp_path, tmp_path / "out")}
    (skipped,) = read_jsonl(tmp_path / "out/skipped.jsonl")
    assert skipped["wav"] == "noise.flac" and len(skipped["reason"]) > 10


def test_speakers_may_be_names_and_the_most_recorded_is_the_voice(tmp_path, capsys):
    folder, out = tmp_path / "corpus", tmp_path / "out"
    rows = recordings(folder, 9)
    names = ["Zoe", "Zoe", "Ann", 7, "7", "Zoe", "Ann", "Bob", "Bob"]
    for i, name in enumerate(names):
        rows[i]["speaker"] = name
    rows[7] |= {"split": "heldout"}
    rows[8] |= {"split": "heldout"}
    write_manifest(folder, *rows)
    found = corpus.check(folder, out)
    assert [row["speaker"] for row in found] == [0, 0, 2, 1, 1, 0, 2, 3, 3]
    assert "speaker 'Zoe', who has 3 recordings to train on, of 4 speakers" in capsys.readouterr().out
    assert corpus.resolve(folder, out) == corpus.read_manifest(out) == found

    found = corpus.check(folder, out, voice="Ann")  # a key says otherwise
    assert [row["speaker"] for row in found] == [3, 3, 0, 1, 1, 3, 0, 2, 2]
    write_manifest(folder, *rows, {"wav": "wav/0.wav", "id": "more", "text": "x", "speaker": "Dan"})
    numbers = [row["speaker"] for row in corpus.resolve(folder, out)]  # of another corpus: a report on it
    assert numbers == [3, 3, 0, 1, 1, 3, 0, 2, 2, corpus.UNKNOWN_SPEAKER]
    with pytest.raises(ValueError, match="corpus.voice is 'Anne', who has no .* did you mean 'Ann'"):
        corpus.check(folder, out, voice="Anne")


@pytest.mark.parametrize(
    "speakers, voice, numbers",
    [
        ([0, 3, 3], "", [0, 3, 3]),  # as they are: speaker 0 is there
        ([None, None, None], "", [0, 0, 0]),
        ([1089, 61, 61], "", [1, 0, 0]),  # nobody is 0
        ([0, 3, 3], 3, [1, 0, 0]),
        ([0, 3, 3], "3", [1, 0, 0]),
        ([0, 3, 3], 0, [0, 3, 3]),
        ([0, "Ann", "Ann"], "", [1, 0, 0]),
    ],
)
def test_numbers_of_speakers_stay_where_there_is_a_speaker_0(speakers, voice, numbers):
    rows = [{"speaker": speaker or 0, "seconds": 1.0, "split": "train", "text": "x"} for speaker in speakers]
    found = corpus.with_numbers(rows, corpus.number_speakers(rows, voice))
    assert [row["speaker"] for row in found] == numbers


def test_a_speaker_0_without_training_recordings_is_not_the_voice():
    rows = [
        {"speaker": 0, "seconds": 9.0, "split": "heldout", "text": "x"},
        {"speaker": 0, "seconds": 9.0, "split": "train", "text": ""},
        {"speaker": 5, "seconds": 1.0, "split": "train", "text": "x"},
    ]
    assert corpus.number_speakers(rows) == {"5": 0, "0": 1}


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("What is three plus four?", " what is  three plus four", True),
        ("It’s here.", "It's here", True),
        ("Straße", "STRASSE!", True),
        ("What is 2-1?", "What is 21?", False),
        ("3+4", "3 4", False),
        ("कि", "का", False),  # vowel signs are no punctuation
    ],
)
def test_texts_are_compared_without_case_spaces_and_punctuation(one, other, same):
    assert (corpus.text_key(one) == corpus.text_key(other)) == same


# ---- whatever a table holds, it is read or refused in one line ---------------------------------------------

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
keys = ["wav", "text", "id", "speaker", "split", "kind", "family", "seconds", "answer", "question"]
good = {"wav": "a.wav", "text": "Hello.", "question": "Who?", "answer": "Me."}
tables = st.lists(st.dictionaries(st.sampled_from(keys), anything, max_size=4).map(lambda row: good | row))


def mutated(lines: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    for place, new in edits:
        place %= len(lines) + 1
        lines = lines[:place] + new + lines[place + 1 :]
    return lines


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(tables, st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=4)), max_size=4))
def test_any_table_is_read_or_refused_in_one_line(tmp_path_factory, rows, edits):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    for i, row in enumerate(rows):
        row.setdefault("id", f"row {i}")
    content = mutated("".join(json.dumps(row) + "\n" for row in rows).encode(), edits)
    for name, read in (("manifest", corpus.read_manifest), ("dialogues", corpus.read_dialogues)):
        (folder / f"{name}.jsonl").write_bytes(content)
        try:
            found = read(folder)
        except ValueError as error:
            message = str(error)
            assert message.isprintable() and len(message) < len(str(folder)) + 300, message
            continue
        for row in found:
            assert row["split"] in corpus.SPLITS and type(row["family"]) is str
            if name == "dialogues":
                assert row["question"] and row["answer"] and row.keys() == {*DIALOGUE_FIELDS}
                continue
            assert {*corpus.DEFAULTS, "wav", "id"} <= row.keys() <= {*keys, "id"}
            assert not row["wav"].startswith("/") and ".." not in row["wav"].split("/")
            assert type(row["speaker"]) in (int, str) and 0 < row.get("seconds", 1) < 1e6
            assert not any(c in text for text in (row["text"], row["id"]) for c in "\x1b\n\u2028")
        corpus.write_jsonl(folder / "again.jsonl", found)
        if name == "manifest":
            assert corpus.read_manifest(folder / "again.jsonl") == found


DIALOGUE_FIELDS = ("question", "answer", "split", "family")

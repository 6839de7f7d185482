"""data/recipe.py and the recipes of public corpora, on small trees in their published layouts."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import audio, corpus, recipe
from data.commonvoice import prepare as commonvoice
from data.folder import prepare as folder
from data.gigaspeech import prepare as gigaspeech
from data.librilight import prepare as librilight
from data.librispeech import prepare as librispeech
from data.ljspeech import prepare as ljspeech
from files import locked

ROOT = Path(__file__).resolve().parent.parent


def speech(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """Noise that swells and fades, four times a second."""
    n = np.arange(round(seconds * rate))
    noise = np.random.default_rng(seed).standard_normal(len(n))
    return (0.1 * noise * (1 + np.sin(2 * np.pi * 4 * n / rate))).astype(np.float32)


def write(path: Path, seconds: float = 0.5, rate: int = 16000, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, speech(seconds, rate, len(str(path))), rate, **options)
    return path


def run(recipe_module, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments), "--workers", "1"])
    recipe_module.main()


def rows(out: Path, name: str = "manifest") -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def left_out(out: Path) -> dict[str, str]:
    """Recording -> why it is not in the manifest."""
    return {row["audio"]: row["reason"] for row in rows(out, "left_out")}


def pack(tree: Path, archive: Path, **changed) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, tree.name)
        info = tarfile.TarInfo("../climbs.flac")
        tar.addfile(info, io.BytesIO())
    return archive


def check_corpus(out: Path) -> list[dict]:
    """Every row names a recording inside the folder, of the length that it says."""
    found = rows(out)
    for row in found:
        assert not row["wav"].startswith(("/", "..")) and ".." not in row["wav"]
        assert audio.seconds(out / row["wav"]) == pytest.approx(row["seconds"], abs=0.06)  # mp3 has a margin
    assert len({row["id"] for row in found}) == len(found)
    return found


# ---- LibriSpeech -------------------------------------------------------------------------------------------


@pytest.fixture
def librispeech_tree(tmp_path):
    root = tmp_path / "LibriSpeech"
    for subset, speaker, chapter in (("train-clean-100", "103", "1240"), ("dev-clean", "84", "121123")):
        lines = []
        for n in range(3):
            name = f"{speaker}-{chapter}-{n:04}"
            write(root / subset / speaker / chapter / f"{name}.flac", 0.5 + n / 10)
            lines.append(
                f"{name} CHAPTER {'ONE TWO THREE'.split()[n]} I'M HERE SAID MISSUS LYNDE AND I AM TOO\n"
            )
        (root / subset / speaker / chapter / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    (root / "SPEAKERS.TXT").write_text(
        ";ID  |SEX| SUBSET |MINUTES| NAME\n"
        "103 | F | train-clean-100 | 25 | A\n84 | M | dev-clean | 8 | B | C\n"
    )
    return root


def test_librispeech(tmp_path, librispeech_tree, monkeypatch, capsys):
    chapter = librispeech_tree / "train-clean-100/103/1240"
    write(chapter / "103-1240-0009.flac")  # not in the transcripts
    with open(chapter / "103-1240.trans.txt", "a") as file:
        file.write("103-1240-0010 NO SUCH FILE\n103-1240-0001 SAID AGAIN\n103-1240-0011\n")
    (chapter / "103-1240-0002.flac").write_bytes((chapter / "103-1240-0002.flac").read_bytes()[:2000])
    run(librispeech, monkeypatch, librispeech_tree, tmp_path / "out")
    found = {row["id"]: row for row in check_corpus(tmp_path / "out")}
    assert list(found) == [f"84-121123-000{n}" for n in range(3)] + ["103-1240-0000", "103-1240-0001"]
    assert found["103-1240-0000"] == {
        "id": "103-1240-0000",
        "wav": "audio/train-clean-100/103/1240/103-1240-0000.flac",
        "text": "Chapter one I'm here said missus lynde and I am too",
        "speaker": "103",
        "split": "train",
        "kind": "statement",
        "family": "train-clean-100",
        "seconds": 0.5,
    }
    assert {row["split"] for row in found.values() if row["speaker"] == "84"} == {"heldout"}
    reasons = [row["reason"].split(":")[0] for row in rows(tmp_path / "out", "left_out")]
    assert len(reasons) == 5 and {"no transcript", "no such file", "named twice", "empty text"} < set(reasons)
    said = capsys.readouterr().out
    assert (
        "train            2 utterances" in said and "left out         5:" in said and "1 named twice" in said
    )

    run(librispeech, monkeypatch, librispeech_tree / "dev-clean/84", tmp_path / "one", "--capitals")
    (one, *_) = rows(tmp_path / "one")  # no folder tells the subset, and SPEAKERS.TXT is not beside it
    assert one["text"].startswith("CHAPTER ONE I'M HERE") and one["speaker"] == "84"


def test_librispeech_as_an_archive(tmp_path, librispeech_tree, monkeypatch):
    archive = pack(librispeech_tree, tmp_path / "all.tar.gz")
    run(librispeech, monkeypatch, archive, tmp_path / "out")
    found = check_corpus(tmp_path / "out")
    assert len(found) == 6 and found[0]["wav"].startswith("source/LibriSpeech/dev-clean/84/")
    assert not (tmp_path / "out/audio").exists()  # unpacked inside OUT: nothing is linked or copied
    assert left_out(tmp_path / "out") == {"../climbs.flac": "refused: a path that climbs out"}


# ---- LJSpeech, Common Voice --------------------------------------------------------------------------------


def test_ljspeech(tmp_path, monkeypatch):
    root = tmp_path / "LJSpeech-1.1"
    for n in range(1, 5):
        write(root / "wavs" / f"LJ001-000{n}.wav", rate=22050)
    (root / "metadata.csv").write_text(
        'LJ001-0001|Printed "1455|Printed "fourteen fifty-five\nLJ001-0002|Only raw.|\nLJ001-0003||\n'
        "LJ001-0004|Four.|Four.\nLJ001-0005|Five.|Five.\n"
    )
    run(ljspeech, monkeypatch, tmp_path, tmp_path / "out", "--heldout", "0")
    found = check_corpus(tmp_path / "out")
    assert [row["text"] for row in found] == ['Printed "fourteen fifty-five', "Only raw.", "Four."]
    assert {(row["speaker"], row["split"]) for row in found} == {("LJ", "train")}
    reasons = {Path(name).stem: reason for name, reason in left_out(tmp_path / "out").items()}
    assert reasons == {"LJ001-0003": "empty text", "LJ001-0005": "no such file"}
    run(ljspeech, monkeypatch, root, tmp_path / "raw", "--raw")
    assert rows(tmp_path / "raw")[0]["text"] == 'Printed "1455'


HEADER = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\tsegment\n"


def test_commonvoice(tmp_path, monkeypatch):
    root = tmp_path / "cv-corpus-17.0/en"
    clip = "common_voice_en_{}.mp3".format
    for n in range(8):
        write(root / "clips" / clip(n), 0.8, 48000, format="MP3")

    def line(speaker, n, text, up=2, down=0):
        return f"{speaker * 64}\t{clip(n)}\t{text}\t{up}\t{down}\t\t\t\ten\t\n"

    (root / "train.tsv").write_text(HEADER + line("a", 0, "One.") + line("a", 1, "Two.", 2, 2))
    (root / "dev.tsv").write_text(HEADER + line("b", 2, "Three."))
    (root / "test.tsv").write_text(HEADER + line("c", 3, '"Four" she said.'))
    (root / "validated.tsv").write_text(
        HEADER + line("a", 0, "One.") + line("d", 4, "Three.") + line("c", 5, "Five.") + line("e", 6, "Six.")
        + line("b", 2, "Three.")
    )  # fmt: skip
    (root / "other.tsv").write_text(HEADER + line("f", 7, "Seven."))
    run(commonvoice, monkeypatch, root, tmp_path / "out")
    found = {row["text"]: row for row in check_corpus(tmp_path / "out")}
    assert {text: row["split"] for text, row in found.items()} == {
        "One.": "train", "Three.": "heldout", '"Four" she said.': "heldout",
    }  # fmt: skip
    assert found["One."]["id"] == "common_voice_en_0" and found["One."]["speaker"] == "a" * 16
    assert list(left_out(tmp_path / "out").values()) == ["too few votes: 0"]

    run(commonvoice, monkeypatch, tmp_path, tmp_path / "validated", "--validated")  # found two folders below
    assert [row["text"] for row in rows(tmp_path / "validated") if row["split"] == "train"] == [
        "One.",
        "Six.",
    ]
    reasons = list(left_out(tmp_path / "validated").values())
    assert reasons == ["sentence or speaker of dev or test"] * 3
    (root / "train.tsv").write_text("what\tis\tthis\n")
    with pytest.raises(ValueError, match="no column 'client_id'"):
        run(commonvoice, monkeypatch, root, tmp_path / "new")


# ---- long recordings ---------------------------------------------------------------------------------------


def segment(n, begin, end, text="HELLO <COMMA> IT IS I <PERIOD>", subsets=("{M}", "{XL}"), **more):
    return {"sid": f"POD1_S{n:07}", "speaker": "N/A", "begin_time": begin, "end_time": end,
            "text_tn": text, "subsets": list(subsets)} | more  # fmt: skip


def test_gigaspeech(tmp_path, monkeypatch):
    root = tmp_path / "GigaSpeech"
    opus = root / "audio/podcast/P0000/POD1.opus"
    wav = speech(30, 16000)
    wav[16000 * 20 : 16000 * 22] = 0
    opus.parent.mkdir(parents=True)
    soundfile.write(opus, wav, 16000, format="OGG", subtype="OPUS")
    segments = [
        segment(1, 3.0, 5.5),
        segment(0, 1.0, 2.0, "WHO ARE YOU <QUESTIONMARK>", ["{DEV}"]),
        segment(2, 6, 7, " <MUSIC> "),
        segment(3, 8, 9, subsets=["{XL}"]),
        segment(4, 20.5, 21.5),
        segment(5, 28, 33),
        segment(6, "x", 3),
        segment(7, 10, 10.05),
        segment(8, float("nan"), 12),
        segment(9, 25, 27, speaker="ann"),
        segment("../../x", 25, 27),
        "what",
        segment(10, 4, 5),
        segment(10, 4, 5),
    ]
    table = {"dataset": "GigaSpeech", "audios": [
        {"aid": "POD1", "path": "audio/podcast/P0000/POD1.opus", "segments": segments},
        {"aid": "POD2", "path": "../../etc/x.opus", "segments": [segment(11, 1, 2)]},
        {"aid": "POD3", "path": "audio/gone.opus", "segments": [segment(12, 1, 2)]},
        {"aid": "POD4"}, {"aid": "POD5", "path": "x.opus", "segments": None}, None,
        {"aid": "POD6", "path": "\ud800.opus", "segments": [segment(13, 1, 2, "\ud800 <PERIOD>")]},
    ]}  # fmt: skip
    (root / "GigaSpeech.json").write_text(json.dumps(table))
    run(gigaspeech, monkeypatch, root, tmp_path / "out", "--subset", "M")
    check_corpus(tmp_path / "out")
    by_id = {row["id"]: row for row in rows(tmp_path / "out")}
    assert list(by_id) == [f"POD1_S{n:07}" for n in (0, 1, 10, 9)]
    assert by_id["POD1_S0000001"] == {
        "id": "POD1_S0000001", "wav": "cut/audio/podcast/P0000/POD1/POD1_S0000001.flac",
        "text": "Hello, it is I.", "speaker": "POD1", "split": "train", "kind": "statement", "family": "",
        "seconds": 2.5,
    }  # fmt: skip
    assert (by_id["POD1_S0000000"]["split"], by_id["POD1_S0000000"]["text"]) == ("heldout", "Who are you?")
    assert by_id["POD1_S0000009"]["speaker"] == "ann"
    cut = audio.load(tmp_path / "out" / by_id["POD1_S0000001"]["wav"])
    whole = audio.load(opus)
    assert np.abs(cut - whole[48000:88000]).max() < 2e-3  # sample for sample, from the right place
    reasons = [row["reason"] for row in rows(tmp_path / "out", "left_out")]
    for words, n in (
        ("no speech: <MUSIC>", 1),
        ("silent", 1),
        ("cut short", 1),
        ("too short", 1),
        ("damaged row", 5),
        ("times make no sense", 1),
        ("named twice", 1),
        ("no such file", 1),
        ("refused: a path", 2),
    ):
        assert sum(words in reason for reason in reasons) == n, (words, reasons)
    assert not list(tmp_path.glob("*x.flac"))


def test_gigaspeech_cut_in_half(tmp_path, monkeypatch):
    write(tmp_path / "in/audio/a.opus", 5, format="OGG", subtype="OPUS")
    table = json.dumps({"audios": [{"aid": "a", "path": "audio/a.opus", "segments": [segment(1, 1, 2)]}] * 2})
    (tmp_path / "in/GigaSpeech.json").write_text(table[:-30])
    run(gigaspeech, monkeypatch, tmp_path / "in", tmp_path / "out")
    assert len(rows(tmp_path / "out")) == 1
    assert list(left_out(tmp_path / "out").values()) == ["cut short or damaged: the JSON ends in the middle"]


def test_librilight(tmp_path, monkeypatch):
    root = tmp_path / "small"
    book = root / "100/sea_fairies"
    for n in range(5):
        write(book / f"{n:02}.flac", 40)
    activity = [[0.4, 4], [4.5, 9], [20, 21], [30, 39]]
    info = {"speaker": "100", "book_meta": {"title": "x"}, "snr": 7.1, "voice_activity": activity}
    (book / "00.json").write_text(json.dumps(info))
    (book / "01.json").write_text(json.dumps(info | {"snr": 1.5}))
    (book / "02.json").write_text(json.dumps(info)[:-9])
    (book / "03.json").write_text(json.dumps(info | {"voice_activity": []}))
    run(librilight, monkeypatch, root, tmp_path / "out", "--target", "10", "--snr", "3")
    found = check_corpus(tmp_path / "out")
    assert [(row["id"], row["seconds"]) for row in found] == [
        ("100/sea_fairies/00-0000", 8.6),
        ("100/sea_fairies/00-0001", 1.0),
        ("100/sea_fairies/00-0002", 9.0),
    ]
    assert {(row["text"], row["speaker"], row["family"]) for row in found} == {("", "100", "")}
    cut = audio.load(tmp_path / "out" / found[1]["wav"])
    assert np.abs(cut - audio.load(book / "00.flac")[320000:336000]).max() < 1e-3
    reasons = {Path(name).stem: reason.split(":")[0] for name, reason in left_out(tmp_path / "out").items()}
    assert reasons == {"01": "noisy", "02": "damaged segments", "03": "no speech", "04": "no segments"}


def test_speech_is_joined_and_cut_to_length():
    joined = librilight.join_speech([(0, 4), (4.5, 9), (20, 21), (30, 54)], target=10, pause=1)
    assert joined == [(0, 9), (20, 21), (30, 38), (38, 46), (46, 54)]
    assert librilight.join_speech([(5, 6), (0, 1)], 10, 5) == [(0, 6)]
    for times in ((3, 2), (-1, 2), (0, float("inf")), (float("nan"), 1)):
        with pytest.raises(ValueError, match="no sense"):
            librilight.join_speech([times], 10, 1)


# ---- a folder of anybody -----------------------------------------------------------------------------------

TEXTS = {"a/one": "Tom is in the garden.", "a/two": "Ça va, Tom?", "b/three": "What is three plus four?"}


@pytest.fixture
def mine(tmp_path):
    root = tmp_path / "my recordings"
    write(root / "a/one.wav", 0.5)
    write(root / "a/two.flac", 0.6, 44100)
    write(root / "b/three.mp3", 0.7, 22050, format="MP3")
    return root


PATHS = {"a/one": "a/one.wav", "a/two": "a/two.flac", "b/three": "b/three.mp3"}


def table_of(separator, header=(), path=PATHS.get, more=lambda name: ()):
    lines = [separator.join(header)] if header else []
    for name, text in TEXTS.items():
        text = f'"{text}"' if separator == "," else text
        lines.append(separator.join([path(name), text, *more(name)]))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "name, content",
    [
        ("list.tsv", table_of("\t", ("path", "sentence"))),
        ("list.csv", table_of(",", ("File Name", "Text"))),
        ("list.csv", table_of(",")),
        ("metadata.csv", table_of("|", path=str)),
        ("metadata.csv", table_of("|", path=str, more=lambda name: [TEXTS[name]])),
        ("prompts.txt", table_of(": ", path=str)),
        ("prompts.txt", table_of(" ")),
        (
            "list.tsv",
            table_of("\t", ("n", "text", "file"), path=lambda n: "7", more=lambda name: [PATHS[name]]),
        ),
        ("a/list.tsv", table_of("\t", ("path", "text"), path=lambda name: "../" + PATHS[name])),
        (
            "list.tsv",
            table_of(
                "\t",
                ("path", "text"),
                path=lambda name: "C:\\Users\\Ann\\rec\\" + PATHS[name].replace("/", "\\"),
            ),
        ),
        ("list.tsv", table_of("\t", ("path", "text"), path=lambda name: "/home/ann/rec/" + PATHS[name])),
        (
            "list.jsonl",
            "".join(
                json.dumps({"audio_filepath": PATHS[n], "text": t, "duration": 1}) + "\n"
                for n, t in TEXTS.items()
            ),
        ),
        ("list.json", json.dumps([{"wav": PATHS[n], "transcript": t} for n, t in TEXTS.items()], indent=1)),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_tables_of_all_kinds_are_found(tmp_path, mine, monkeypatch, capsys, name, content, encoding):
    (mine / name).write_bytes(content.replace("\n", "\r\n").encode(encoding))
    run(folder, monkeypatch, mine, tmp_path / "out")
    found = check_corpus(tmp_path / "out")
    assert {row["id"]: row["text"] for row in found} == TEXTS
    assert rows(tmp_path / "out", "left_out") == [] and "speaker" not in found[0]
    assert f"transcripts: '{name}'" in capsys.readouterr().out


@pytest.mark.parametrize("ending", [".txt", ".lab", ".TXT"])
def test_texts_beside_the_recordings(tmp_path, mine, monkeypatch, capsys, ending):
    for name, text in TEXTS.items():
        (mine / f"{name}{ending}").write_text(text.replace(" ", "\n", 1) + "\n", encoding="utf-8-sig")
    write(mine / "b/four.wav")
    (mine / "b/five.txt").write_text("No recording.")
    run(folder, monkeypatch, mine, tmp_path / "out", "--speaker-folder", "inner")
    found = check_corpus(tmp_path / "out")
    assert {row["id"]: row["text"] for row in found} == TEXTS
    assert {row["id"]: row["speaker"] for row in found} == {"a/one": "a", "a/two": "a", "b/three": "b"}
    assert left_out(tmp_path / "out")["b/four.wav"] == "no transcript"
    assert "no table" in capsys.readouterr().out


def test_a_manifest_of_others_is_a_table_too(tmp_path, mine, monkeypatch, capsys):
    lines = [json.dumps({"audio_filepath": path, "text": TEXTS[name]}) for name, path in PATHS.items()]
    (mine / "manifest.jsonl").write_text("\n".join(lines))
    (mine / "a/103-1240.trans.txt").write_text("x Y\n")
    run(folder, monkeypatch, mine, tmp_path / "out")
    assert {row["id"]: row["text"] for row in rows(tmp_path / "out")} == TEXTS
    assert "data/librispeech/prepare.py knows more" in capsys.readouterr().out


def test_columns_for_speaker_split_and_id(tmp_path, mine, monkeypatch):
    (mine / "list.tsv").write_text(
        "id\tpath\tquote\tclient_id\tsplit\tsentence\nx1\ta/one.wav\tno\tAnn\ttrain\tOne.\n"
        "x2\ta/two.flac\tno\tBob\tTest\tTwo.\nx1\tb/three.mp3\tno\tBob\tdev\tThree.\n"
    )
    run(folder, monkeypatch, mine, tmp_path / "out")
    assert [(row["id"], row["text"], row["speaker"], row["split"]) for row in rows(tmp_path / "out")] == [
        ("x1", "One.", "Ann", "train"), ("x2", "Two.", "Bob", "heldout")
    ]  # fmt: skip
    assert left_out(tmp_path / "out") == {"b/three.mp3": "named twice: 'x1'"}
    run(folder, monkeypatch, mine, tmp_path / "more", "--text-column", "quote", "--speaker-column", "split")
    assert [(row["text"], row["speaker"]) for row in rows(tmp_path / "more")][:2] == [
        ("no", "train"),
        ("no", "Test"),
    ]
    with pytest.raises(ValueError, match="no row names a recording"):
        run(folder, monkeypatch, mine, tmp_path / "x", "--table", "list.tsv", "--audio-column", "quote")
    with pytest.raises(OSError, match="--table other.tsv: no such file"):
        run(folder, monkeypatch, mine, tmp_path / "x", "--table", "other.tsv")


def test_a_list_of_recorded_prompts_that_lies_elsewhere(tmp_path, mine, monkeypatch):
    """As telephone exchanges ship them: names without folder or ending, comments, beeps."""
    write(mine / "a/beep.wav")
    write(mine / "c/digits/7.wav")
    write(mine / "a/same.wav")
    (mine / "a/one.g722").write_bytes(b"another form of it, which cannot be read")
    write(mine / "b/same.wav")
    table = tmp_path / "core-sounds.txt"
    table.write_text(
        "; Core sounds\n\none: Activated.\ndigits/7: seven\nbeep: [a beep: short]\n"
        "same: Which?\nx: Gone.\n/: Root.\n"  # and with other separators, names like "x:"
    )
    run(folder, monkeypatch, mine, tmp_path / "out", "--table", table)
    assert {row["id"]: row["text"] for row in rows(tmp_path / "out")} == {
        "a/one": "Activated.",
        "c/digits/7": "seven",
    }
    found = left_out(tmp_path / "out")
    assert found.pop("a/beep.wav") == "no speech: [a beep: short]"
    assert found.pop("same") == "ambiguous: several recordings have this name"
    assert found.pop("x") == "no such file"
    assert found.pop("/") == "no recording is named"
    assert set(found.values()) == {"no transcript"} and len(found) == 5
    table.write_bytes(gzip.compress(table.read_bytes()))
    with pytest.raises(ValueError, match="compressed: unpack it first"):
        run(folder, monkeypatch, mine, tmp_path / "out", "--table", table)


def test_names_alone_are_found_in_any_number_of_folders(tmp_path, mine, monkeypatch):
    names = [f"s{n:02}/deep/u{n:02}" for n in range(60)]
    for name in names:
        (mine / name).parent.mkdir(parents=True)
        os.link(mine / "a/one.wav", mine / f"{name}.wav")
    for form in (Path(names[7]).name, "deep/u07", "/data/rec/u07.wav", "D:\\u07.wav"):
        (mine / "list.tsv").write_text(f"a/one\tOne.\n{form}\tSeven.\n")
        run(folder, monkeypatch, mine, tmp_path / "out")
        found = {row["id"]: row["text"] for row in rows(tmp_path / "out")}
        assert found == {"a/one": "One.", "s07/deep/u07": "Seven."}, form


def test_a_table_speaks_of_what_is_below_it(tmp_path, mine, monkeypatch):
    for who, names in (("ann", [1, 2]), ("bob", [1, 2, 3])):
        for name in names:
            write(mine / who / f"takes/{name}.wav")
        lines = [f"{n}: {who} says {n}.\n" for n in (1, 2, 3)]
        (mine / who / "list.txt").write_text("".join(lines) + f"/old/{who}/4.wav: {who} says 4.\n")
    write(mine / "3.wav")
    write(mine / "4.wav")
    run(folder, monkeypatch, mine, tmp_path / "out")
    found = {row["id"]: row["text"] for row in rows(tmp_path / "out")}
    said = [
        ("ann", 1),
        ("ann", 2),
        ("bob", 1),
        ("bob", 2),
        ("bob", 3),
    ]  # not: bob's third take with ann's text
    assert found == {f"{who}/takes/{n}": f"{who} says {n}." for who, n in said}
    found = left_out(tmp_path / "out")
    assert found["3"] == found["/old/ann/4.wav"] == found["/old/bob/4.wav"] == "no such file"
    assert found["3.wav"] == found["4.wav"] == "no transcript"

    (mine / "texts").mkdir()
    for path in (mine / "ann/list.txt", mine / "bob/list.txt", mine / "3.wav"):
        path.unlink()
    (mine / "texts/list.txt").write_text("3: Three.\none: One.\n1: Which?\n")  # nothing is below it
    run(folder, monkeypatch, mine, tmp_path / "apart")
    found = {row["id"]: row["text"] for row in rows(tmp_path / "apart")}
    assert found == {"bob/takes/3": "Three.", "a/one": "One."}
    assert left_out(tmp_path / "apart")["1"] == "ambiguous: several recordings have this name"


def test_a_speaker_is_the_inner_or_the_outer_folder(tmp_path, mine, monkeypatch):
    write(mine / "a/day 1/four.wav")
    write(mine / "five.wav")
    for which, name in (("inner", "day 1"), ("outer", "a")):
        run(folder, monkeypatch, mine, tmp_path / which, "--unlabelled", "--speaker-folder", which)
        speakers = {row["id"]: row.get("speaker") for row in rows(tmp_path / which)}
        assert speakers == {"a/one": "a", "a/two": "a", "b/three": "b", "a/day 1/four": name, "five": None}


def test_tables_called_train_and_test_make_the_split(tmp_path, mine, monkeypatch):
    (mine / "train.tsv").write_text("path\ttext\na/one.wav\tOne.\na/two.flac\tTwo.\n")
    (mine / "test.tsv").write_text("path\ttext\nb/three.mp3\tThree.\na/one.wav\tOne.\n")
    run(folder, monkeypatch, mine, tmp_path / "out")
    assert {row["id"]: row["split"] for row in rows(tmp_path / "out")} == {
        "b/three": "heldout", "a/one": "heldout", "a/two": "train",
    }  # fmt: skip


def test_a_share_of_the_texts_is_held_out(tmp_path, mine, monkeypatch):
    lines = []
    for n in range(200):
        os.makedirs(mine / "more", exist_ok=True)
        os.link(mine / "a/one.wav", mine / f"more/{n}.wav")
        lines.append(f"more/{n}.wav\tSentence {n % 100}.\tspeaker {n % 20}\n")
    (mine / "list.tsv").write_text("path\ttext\tspeaker\n" + "".join(lines))
    run(folder, monkeypatch, mine, tmp_path / "out", "--heldout", "0.2")
    split = {}
    for row in rows(tmp_path / "out"):
        assert split.setdefault(row["text"], row["split"]) == row["split"]
    assert 10 <= sum(name == "heldout" for name in split.values()) <= 30
    run(folder, monkeypatch, mine, tmp_path / "by", "--heldout", "0.2", "--split-by", "speaker")
    pairs = {(row["speaker"], row["split"]) for row in rows(tmp_path / "by")}
    assert len(pairs) == 20 and {"train", "heldout"} == {split for _, split in pairs}


def test_bad_input_is_counted_and_the_rest_processed(tmp_path, mine, monkeypatch, capsys):
    lines = [f"{PATHS[name]}\t{text}" for name, text in TEXTS.items()]
    wav = speech(0.5)
    bad = {
        "empty text": ("empty_text.wav", "..."),
        "text not English": ("russian.wav", "Привет"),
        "no such file": ("gone.wav", "Gone."),
        "refused": ("../../etc/a.wav", "Out."),
        "named twice": ("a/one.wav", "Again."),
        "empty": ("zero.wav", "Zero bytes."),
        "not a sound file that can be read": ("noise.wav", "Noise."),
        "cut short": ("cut.wav", "Cut."),
        "too short": ("short.wav", "Short."),
        "too long": ("hour.wav", "An hour."),
        "silent": ("silent.wav", "Nothing."),
        "format cannot be read": ("phone.m4a", "Phone."),
        "no recording is named": ("", "Nothing."),
        "more columns than the header": ("a.wav\tx", "y"),
        "text with a marker that means something to the model": ("marker.wav", "Yes <eoa> no."),
    }
    for name in ("empty_text.wav", "russian.wav", "marker.wav"):
        audio.save(mine / name, wav)
    (mine / "zero.wav").write_bytes(b"")
    (mine / "noise.wav").write_bytes(b"What is this?" * 100)
    (mine / "phone.m4a").write_bytes(b"ftypM4A")
    audio.save(mine / "cut.wav", wav)
    (mine / "cut.wav").write_bytes((mine / "cut.wav").read_bytes()[:-1000])
    audio.save(mine / "short.wav", wav[:1000])
    audio.save(mine / "silent.wav", 0 * wav)
    soundfile.write(mine / "hour.wav", np.zeros(3600 * 1000, np.int16), 1000)
    soundfile.write(mine / "opposite.wav", np.stack([wav, -wav], 1), 16000)
    lines.append("opposite.wav\tOne channel of it is taken.")
    write(mine / "untold.wav")
    write(mine / "a/\x1b[31mred.wav")
    lines += [f"{name}\t{text}" for name, text in bad.values()] + ["a/\x1b[31mred.wav\tRed."]
    (mine / "list.tsv").write_text("path\ttext\n" + "\n".join(lines) + "\n", encoding="utf-8")
    run(folder, monkeypatch, mine, tmp_path / "out", "--english")
    texts = [row["text"] for row in check_corpus(tmp_path / "out")]
    assert texts == [*TEXTS.values(), "One channel of it is taken."]
    found = rows(tmp_path / "out", "left_out")
    reasons = [row["reason"].split(":")[0].split(" (")[0] for row in found]
    assert sorted(reasons) == sorted([*bad, "refused", "no transcript"])
    assert next(row for row in found if row["reason"].startswith("named twice"))["where"].startswith(
        "list.tsv, line "
    )
    said = capsys.readouterr().out
    assert "\x1b" not in said and "left out        17:" in said and "1 cut short" in said


def test_quick_reads_headers_only(tmp_path, mine, monkeypatch):
    audio.save(mine / "silent.wav", np.zeros(16000))
    (mine / "list.tsv").write_text("path\ttext\nsilent.wav\tNot noticed.\na/one.wav\tOne.\n")
    monkeypatch.setattr(audio, "load", None)
    run(folder, monkeypatch, mine, tmp_path / "out", "--quick")
    assert [row["seconds"] for row in rows(tmp_path / "out")] == [1.0, 0.5]


def test_recordings_without_transcripts(tmp_path, mine, monkeypatch):
    with pytest.raises(ValueError, match="no recording can be used .3 no transcript"):
        run(folder, monkeypatch, mine, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "left_out.jsonl"]
    run(folder, monkeypatch, mine, tmp_path / "out", "--unlabelled")
    assert [row["text"] for row in rows(tmp_path / "out")] == ["", "", ""]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no recording was found there"):
        run(folder, monkeypatch, tmp_path / "empty", tmp_path / "x")


# ---- where things are --------------------------------------------------------------------------------------


def test_links_copies_and_the_manifest_beside_the_recordings(tmp_path, mine, monkeypatch):
    (mine / "list.tsv").write_text(table_of("\t", ("path", "text")))
    before = {path: path.stat().st_mtime_ns for path in mine.rglob("*")}
    run(folder, monkeypatch, mine, tmp_path / "linked")
    assert (tmp_path / "linked/audio/a/one.wav").samefile(mine / "a/one.wav")
    run(folder, monkeypatch, mine, tmp_path / "copied", "--copy")
    assert not (tmp_path / "copied/audio/a/one.wav").samefile(mine / "a/one.wav")

    def refuse(*_):
        raise OSError("another disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        run(folder, patch, mine, tmp_path / "refused")
    copied = tmp_path / "refused/audio/a/one.wav"
    assert copied.read_bytes() == (mine / "a/one.wav").read_bytes() and not copied.samefile(
        mine / "a/one.wav"
    )
    assert rows(tmp_path / "linked") == rows(tmp_path / "copied") == rows(tmp_path / "refused")
    assert {path: path.stat().st_mtime_ns for path in mine.rglob("*")} == before  # nothing was written there

    run(folder, monkeypatch, mine, mine)
    assert [row["wav"] for row in check_corpus(mine)] == list(PATHS.values()) and not (
        mine / "audio"
    ).exists()
    again = (mine / "manifest.jsonl").read_bytes()
    run(folder, monkeypatch, mine, mine)  # its own manifest is no table of transcripts
    assert (mine / "manifest.jsonl").read_bytes() == again
    run(folder, monkeypatch, mine, mine / "out")  # OUT in SOURCE: its recordings are not found again
    run(folder, monkeypatch, mine, mine / "out")
    assert len(rows(mine / "out")) == 3 and rows(mine / "out", "left_out") == []


def test_the_work_of_others_is_not_overwritten(tmp_path, mine, monkeypatch):
    (mine / "list.tsv").write_text(table_of("\t", ("path", "text")))
    (mine / "manifest.jsonl").write_text('{"wav": "a/one.wav", "text": "By hand."}\n')
    with pytest.raises(ValueError, match="not made by a recipe"):
        run(folder, monkeypatch, mine, mine)
    assert "By hand" in (mine / "manifest.jsonl").read_text()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--workers", "0"], "--workers is 0"),
        (["--heldout", "1"], "--heldout is 1"),
        (["--max-seconds", "nan"], "--max-seconds"),
        (["--encoding", "utf-99"], "--encoding utf-99"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_flags_that_make_no_sense(tmp_path, mine, monkeypatch, flags, words):
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(mine), str(tmp_path / "out"), *flags])
    with pytest.raises(ValueError, match=words):
        folder.main()


def test_a_source_that_is_none(tmp_path, mine, monkeypatch):
    for source, words in (
        (tmp_path / "gone", "no such file or folder"),
        (mine / "a/one.wav", "neither a folder nor"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            run(folder, monkeypatch, source, tmp_path / "out")
    with pytest.raises(ValueError, match="there is no GigaSpeech.json"):
        run(gigaspeech, monkeypatch, mine, tmp_path / "out")


# ---- killed and continued, in parallel ---------------------------------------------------------------------


def many(tmp_path, n):
    root = tmp_path / "many"
    lines = []
    for i in range(n):
        write(root / f"{i:03}.wav", 0.3)
        lines.append(f"{i:03}.wav\tSentence {i}.\n")
    (root / "list.tsv").write_text("path\ttext\n" + "".join(lines) + "gone.wav\tGone.\n")
    return root


def test_a_killed_run_continues_with_the_same_bytes(tmp_path, monkeypatch):
    root = many(tmp_path, 100)
    run(folder, monkeypatch, root, tmp_path / "whole")
    opened = []
    real = recipe.finish

    def dies(settings, batch):
        opened.append(len(batch))
        if len(opened) == 3:
            raise KeyboardInterrupt
        return real(settings, batch)

    monkeypatch.setattr(recipe, "finish", dies)
    with pytest.raises(KeyboardInterrupt):
        run(folder, monkeypatch, root, tmp_path / "out")
    journal = tmp_path / "out" / recipe.JOURNAL
    assert len(journal.read_bytes().splitlines()) == 1 + 64 and not (tmp_path / "out/manifest.jsonl").exists()
    with open(journal, "ab") as file:
        file.write(b'{"job": "cut in ha')  # the power failed
    opened.clear()
    opened.append(0)
    monkeypatch.setattr(
        recipe, "finish", lambda settings, batch: opened.append(len(batch)) or real(settings, batch)
    )
    run(folder, monkeypatch, root, tmp_path / "out")
    assert sum(opened) == 100 + 1 - 64 and not journal.exists()
    for name in ("manifest.jsonl", "left_out.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    opened[:] = [0, 0]  # killed once more; then the source changes, and what was done is not believed
    monkeypatch.setattr(recipe, "finish", dies)
    with pytest.raises(KeyboardInterrupt):
        run(folder, monkeypatch, root, tmp_path / "new")
    monkeypatch.setattr(recipe, "finish", real)
    table = root / "list.tsv"
    table.write_text(table.read_text().replace("Sentence 1.", "Sentence one."))
    run(folder, monkeypatch, root, tmp_path / "new")
    assert [row["text"] for row in rows(tmp_path / "new")][:3] == [
        "Sentence 0.",
        "Sentence one.",
        "Sentence 2.",
    ]


def test_processes_give_the_same(tmp_path, monkeypatch):
    root = many(tmp_path, 100)
    run(folder, monkeypatch, root, tmp_path / "one")
    command = [
        sys.executable,
        str(ROOT / "data/folder/prepare.py"),
        str(root),
        str(tmp_path / "two"),
        "--workers",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two/manifest.jsonl").read_bytes() == (tmp_path / "one/manifest.jsonl").read_bytes()
    assert "100 utterances" in done.stderr and "train" in done.stdout


def test_two_runs_at_once_do_not_mix(tmp_path, mine):
    with locked(tmp_path / "out"):  # by this process; another one is told
        command = [
            sys.executable,
            "-m",
            "data.folder.prepare",
            str(mine),
            str(tmp_path / "out"),
            "--unlabelled",
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "another run is at work here" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / recipe.JOURNAL).exists()


def test_a_mistake_is_one_line(tmp_path):
    command = [sys.executable, "-m", "data.folder.prepare", "gone", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: gone: no such file or folder\n"


PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
from config import command_line
from data import recipe

def slow(settings, item):
    time.sleep(60)

if __name__ == "__main__":
    command_line(lambda: list(recipe.ordered(slow, None, iter(range(100)), 2)))
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="counts processes in /proc")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_run_ends_at_once_and_its_workers_with_it(tmp_path, number):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(ROOT)]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    children = []
    until = time.monotonic() + 30
    while len(children) < 2 and time.monotonic() < until:
        time.sleep(0.1)
        children = workers_of(parent.pid)
    parent.send_signal(getattr(signal, number))
    said = parent.communicate(timeout=20)[1]
    assert len(children) == 2
    if number != "SIGKILL":
        assert parent.returncode == {"SIGINT": 130, "SIGTERM": 143}[number]
        assert "what was finished is kept" in said and "Traceback" not in said
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def workers_of(pid: int) -> list[int]:
    """Processes whose parent is pid and that have started working (the resource tracker is none)."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def test_the_readers_of_a_corpus_take_what_a_recipe_makes(tmp_path, mine, monkeypatch):
    (mine / "list.tsv").write_text(table_of("\t", ("path", "text")))
    run(folder, monkeypatch, mine, tmp_path / "out")
    assert [row["id"] for row in corpus.read_manifest(tmp_path / "out")] == list(TEXTS)
    odd = ["x" * 201, "half\ud800", "line\u2028", "escape\x1b[2J"]  # as ids; and as speakers
    lines = [{"wav": "a/one.wav", "text": "One.", "id": name, "speaker": "Ann"} for name in odd]
    lines += [{"wav": path, "text": "Two.", "speaker": odd[n]} for n, path in enumerate(PATHS.values())]
    (mine / "list.tsv").unlink()
    (mine / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run(folder, monkeypatch, mine, tmp_path / "odd")
    found = corpus.read_manifest(tmp_path / "odd")
    assert [(row["id"], row["speaker"]) for row in found] == [("a/two", "half"), ("b/three", "line")]

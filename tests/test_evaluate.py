"""The report must say what was measured: a model with known answers gets its known numbers."""

import json
import shutil
import time

import numpy as np
import pytest
import soundfile
import torch
from test_measures import DIALOGUES, OnlyLogits

import evaluate
from data import audio
from evaluation import voices
from evaluation.measures import MEASURES
from request import Reply

pytest.importorskip("jiwer")

# ---- Four sentences of each split, a model with known answers, and a recognizer without errors -------------

TEXTS = {
    "rendition": ["What is one plus one?", "What is one plus two?", "Is the sky blue?", "Tom is here."],
    "heldout": [
        "What is two plus two?",
        "What is two plus three?",
        "Is the sky wide?",
        "Lucy has a red hat.",
    ],
}
ANSWERS = {
    "What is one plus one?": "Two.",
    "What is one plus two?": "Three.",
    "Is the sky blue?": "Yes.",
    "What is two plus two?": "Four.",
    "What is two plus three?": "Five.",
    "Is the sky wide?": "Yes.",
}
SENTENCES = [
    *TEXTS["rendition"],
    *TEXTS["heldout"],
    "Two.",
    "Three.",
    "Yes.",
    "Four.",
    "Five.",
    "wrong answer",
]


def sound_of(text):
    return np.full(1600, (SENTENCES.index(text) + 1) / 100, np.float32)


def text_of(wav):
    return "" if wav is None else SENTENCES[round(float(wav[0]) * 100) - 1]


class PerfectRecognizer:
    SILENCE, FULL = 0.3, 30

    def transcribe(self, wavs, done):
        done(len(wavs))
        return [text_of(wav) for wav in wavs]

    def close(self):
        pass


class NoAdapter:
    """The model without its adapter."""

    def answer_each(self, prompts, request):
        assert (request.mode, request.task) == ("s2t", "asr")
        return [Reply("", "", [], None) for _ in prompts]


class KnownModel(OnlyLogits):
    """Transcribes and reads aloud without errors. Answers held-out questions wrongly if they are spoken, and
    all questions without the chain. Never speaks about the sky."""

    n_speakers, takes = 1, 3

    def to_units(self, prompt):
        raise AssertionError("answer_each encodes")

    def extractor(self, wav):
        return [SENTENCES.index(text_of(wav)) % 8, 7 - SENTENCES.index(text_of(wav)) % 8], [2, 3]

    def vocoder(self, units, speaker=None, durations=None):
        assert speaker in (None, 0)
        if len(units) == 1:  # of KnownGenerator
            return torch.from_numpy(sound_of(SENTENCES[units[0]]))
        return torch.from_numpy(sound_of("Tom is here." if durations is None else SENTENCES[units[0]]))

    def answer_each(self, prompts, request):
        assert request.max_new and len(prompts) <= 32
        texts = [p if request.mode[0] == "t" else text_of(audio.load(p)) for p in prompts]
        return [self.one(text, request.mode, request.task, request.chain) for text in texts]

    def one(self, text, mode, task, chain):
        if task == "asr":
            return Reply(text, text, [], None)
        if task == "tts":
            return Reply("", "", [1], sound_of(text))
        known = chain and not (mode[0] == "s" and text in TEXTS["heldout"])
        answer = ANSWERS[text] if known else "wrong answer"
        silent = mode[2] == "t" or "sky" in text
        return Reply(
            text, answer, [] if silent else [1], None if silent else sound_of(answer), "silent" * silent
        )


class KnownGenerator:
    """A text-to-unit generator that makes no errors, but for the sky."""

    def generate(self, texts, search):
        return [[SENTENCES.index("Tom is here." if "sky" in text else text)] for text in texts]


def write_world(folder, splits=("train", "rendition", "heldout"), answers=True):
    """folder/corpus with four recordings of each split, dialogues if there are answers; folder/metrics."""
    rows = []
    for split in splits:
        for i, text in enumerate(TEXTS["rendition" if split == "train" else split]):
            row = {
                "id": f"{split}{i}",
                "wav": f"{split}{i}.wav",
                "text": text,
                "speaker": i % 2,
                "seconds": 0.1,
                "kind": "question" if text in ANSWERS else "statement",
                "split": split,
                "family": "sky" if "sky" in text else "plus" if "plus" in text else "statement",
            }
            rows.append(row | ({"answer": ANSWERS[text]} if answers and text in ANSWERS else {}))
            audio.save(folder / "corpus" / row["wav"], sound_of(text))
    lines = {"manifest": rows}
    if answers:
        lines["dialogues"] = [d | {"split": "train"} for d in DIALOGUES]
    for name, content in lines.items():
        (folder / f"corpus/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "metrics").mkdir()
    steps = [json.dumps({"step": i, "loss": 1 / (i + 1), "lr": 0.1, "said": "text"}) for i in range(5)]
    (folder / "metrics/stage1.jsonl").write_text("\n".join([*steps, '{"half a li', "[1]", '{"loss": 3}']))
    (folder / "metrics/empty.jsonl").write_text("")
    (folder / "model/lora").mkdir(parents=True)
    (folder / "model/text_to_unit").mkdir()


def report_on(folder, patch, model=None, recognizer=PerfectRecognizer, **options):
    """evaluate() on that world: the returned numbers."""
    talking = type(
        "Talking",
        (),
        {"from_pretrained": lambda *_: model or KnownModel(), "__new__": lambda *_: NoAdapter()},
    )
    patch.setattr(evaluate, "SpeechGPT", talking)
    patch.setattr(evaluate, "Llama", type("Any", (), {"from_pretrained": lambda *_, **__: None}))
    generator = type("Generator", (), {"from_pretrained": lambda *_: KnownGenerator()})
    patch.setattr(evaluate, "TextToUnit", generator)
    patch.setattr(evaluate, "Recognizer", recognizer)
    patch.setattr(evaluate.measures, "first_reply", lambda *_: (3.0, 1.5))
    options = {"items": 10, "device": "cpu"} | options
    return evaluate.evaluate(folder / "model", folder / "corpus", folder / "report", **options)


TARGETS = {
    "asr.heldout": 0.1,
    "answer.heldout": 0.6,
    "text.heldout": 1,
    "spoken": 0.2,
    "first": 10,
    "bits.1": 2,
}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """evaluate() on that world: (returned numbers, report folder)."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    with pytest.MonkeyPatch.context() as patch:
        numbers = report_on(folder, patch, targets=TARGETS)
    return numbers, folder / "report"


def test_known_answers_give_known_numbers(reported):
    numbers, _ = reported
    expected = {
        "source.rendition": 0,
        "source.heldout": 0,
        "asr.rendition": 0,
        "asr.heldout": 0,
        "tts.rendition": 0,
        "tts.heldout": 0,
        "t2u.rendition": 4 / 17,  # all words of "Is the sky blue?"
        "t2u.heldout": 4 / 19,
        "resynthesis.own": 0,
        "answer.rendition": 1,
        "answer.heldout": 0,
        "text.rendition": 1,
        "text.heldout": 1,
        "standard.rendition": 0,
        "standard.heldout": 0,
        "asr.before.heldout": 1,
        "transcript.heldout": 0,
        "spoken.answer.rendition": 2 / 3,
        "spoken.answer.heldout": 0,
        "first": 3.0,
        "first.factor": 1.5,
    }
    for key, value in expected.items():
        assert numbers[key] == pytest.approx(value), key
    # 3 of 9 words: the 2 of a silent "wrong answer" and the 1 of a silent "Yes."; "Two.", "Three." and two
    # more "wrong answer" are spoken as they are written
    assert numbers["spoken"] == pytest.approx(3 / 9)
    assert numbers["resynthesis"] > 0.8  # the vocoder gives "Tom is here", whatever the units are


def test_the_report_has_every_row_with_its_number_of_items_and_baseline(reported):
    numbers, out = reported
    report = json.loads((out / "report.json").read_text())
    rows = {row["key"]: row for row in report["rows"]}
    keys = {key for measure in MEASURES for key, _, split in measure.rows() if split != "train"}
    assert rows.keys() == keys | {"bits", "bits.second", "first", "first.factor"} == numbers.keys()
    text = (out / "report.md").read_text()
    for key, row in rows.items():
        assert row["n"] > 0 and row["value"] is not None, key
        assert row["baseline"] or key.startswith(("source", "first", "bits.second")), f"{key} has no baseline"
        assert f"| {row['name']} | " in text, f"{key} is not in report.md"
    assert rows["asr.heldout"]["baseline"] == {"recognizer": 0.0}
    assert rows["answer.heldout"]["baseline"] == {
        "text question": 1.0,
        "majority": pytest.approx(1 / 3),
        "majority of its family": pytest.approx(1 / 3),
        "nearest train question": pytest.approx(1 / 3),
    }
    assert (
        rows["answer.rendition"]["n"] == 3 and rows["source.rendition"]["n"] == 4 and rows["spoken"]["n"] == 6
    )
    assert rows["bits"]["unit"] == "bits" and set(rows["bits"]["baseline"]) == {"unigram", "bigram"}
    about = report["about"]
    assert (
        about["seed"] == 0
        and about["commit"]
        and "cores" in about["hardware"]
        and "torch" in about["versions"]
    )


def test_the_report_says_which_targets_were_reached(reported):
    _, out = reported
    report = json.loads((out / "report.json").read_text())
    rows = {row["key"]: row for row in report["rows"]}
    assert {key: row["target"] for key, row in rows.items() if row["target"] is not None} == {
        key: target for key, target in TARGETS.items() if key != "bits.1"
    }
    reached = {
        "asr.heldout": True,
        "answer.heldout": False,
        "text.heldout": True,
        "spoken": False,
        "first": True,
    }
    assert {key: row["reached"] for key, row in rows.items() if row["reached"] is not None} == reached
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "| baseline | target |" in text
    for shown in (
        "at most 10.0 %: reached |",
        "at least 60.0 %: not reached |",
        "at most 10.00 s: reached |",
    ):
        assert shown in text
    assert "- targets: 3 of 6 reached; not answer.heldout, spoken; not measured: bits.1\n" in text


def test_the_report_lists_groups_examples_items_and_curves(reported):
    _, out = reported
    text = (out / "report.md").read_text()
    assert "| plus | 100 % of 2 | 0 % of 2 | 100 % of 2 | 100 % of 2 |" in text
    assert "| sky | 100 % of 1 | 0 % of 1 |" in text and "| 0 | 0 % of 4 |" in text
    assert text.count("examples/") == sum(1 for _ in (out / "examples").iterdir()) >= 5
    for wav in (out / "examples").iterdir():
        assert wav.name in text and len(audio.load(wav))
    assert "](curve-stage1.png)" in text and (out / "curve-stage1.png").stat().st_size > 1000
    assert [p.name for p in out.glob("*.png")] == ["curve-stage1.png"], "a curve without points is not drawn"
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert {item["measure"] for item in items} >= {m.key for m in MEASURES}


# ---- Many voices -------------------------------------------------------------------------------------------


def write_voices(folder, names=("flite awb", "pico en-GB", "flite slt")):
    """A corpus of voices, which say "What is one plus one?" and "Tom is here."; training hears the last."""
    rows = []
    for voice in names:
        for split, text in (("rendition", "What is one plus one?"), ("heldout", "Tom is here.")):
            wav = f"{voice}-{split}.wav"
            row = {"wav": wav, "text": text, "speaker": voice, "kind": "question", "split": split}
            rows.append(row | ({"answer": ANSWERS[text]} if text in ANSWERS else {}))
            audio.save(folder / wav, sound_of(text))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {"unseen": list(names[:-1]), "seen": [names[-1]], "missing": {"x y": "x is not installed"}}
    (folder / "voices.json").write_text(json.dumps(known | {"failed": {"flite awb": 2}}))


class Misunderstands(KnownModel):
    """One voice, and whatever comes by telephone."""

    def answer_each(self, prompts, request):
        replies = super().answer_each(prompts, request)
        for i, prompt in enumerate(prompts):
            if request.mode[0] == "s" and "pico" in str(prompt):
                replies[i] = Reply("wrong", "wrong", [], None)
        return replies


def misunderstand_the_telephone(wav, condition, name):
    return wav if condition == "noise" else sound_of("Lucy has a red hat.")


VOICE_ROWS = {
    "source.unseen": 0,
    "source.seen": 0,
    "asr.unseen": 1 / 2,
    "asr.unseen.worst": 1,
    "asr.unseen.noise": 0,
    "asr.seen": 0,
    "answer.unseen": 1 / 2,
    "answer.unseen.worst": 0,
    "answer.unseen.noise": 1,
    "answer.unseen.telephone": 0,
    "answer.unseen.loss": 1 / 2,
    "answer.seen": 1,
}


def test_unseen_voices_have_rows_and_a_table(tmp_path, monkeypatch, capsys):
    write_world(tmp_path)
    write_voices(tmp_path / "voices")
    monkeypatch.setattr(evaluate.voices, "disguise", misunderstand_the_telephone)
    targets = {"asr.unseen.worst": 0.3, "answer.unseen.loss": 0.08, "answer.seen": 0.9}
    numbers = report_on(tmp_path, monkeypatch, Misunderstands(), targets=targets)
    for key, value in VOICE_ROWS.items():
        assert numbers[key] == pytest.approx(value), key
    assert numbers["asr.rendition"] == 0, "the corpus has its own rows"
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "- voices: 2 unseen, 1 of training; without x y (x is not installed); " in text
    assert "2 recordings of flite awb failed" in text
    assert "- targets: 1 of 3 reached; not asr.unseen.worst, answer.unseen.loss\n" in text
    assert "| flite awb | 0 % of 2 | 0 % of 1 | 0 % of 1 | 0 % of 2 |" in text
    assert "| pico en-GB | 0 % of 2 | 100 % of 1 | 100 % of 1 | 0 % of 2 |" in text
    assert "| flite slt | 0 % of 2 | 0 % of 1 | 0 % of 1 | 100 % of 1 |" in text
    assert (
        "| noise -50.0 points; telephone 50.0 points |" in text and "the worst: pico en-GB | 100.0 %" in text
    )


def test_a_corpus_of_voices_alone_has_no_other_rows(tmp_path, monkeypatch):
    write_world(tmp_path)
    shutil.rmtree(tmp_path / "corpus")
    write_voices(tmp_path / "corpus")
    monkeypatch.setattr(evaluate.voices, "disguise", misunderstand_the_telephone)
    numbers = report_on(tmp_path, monkeypatch, Misunderstands())
    assert numbers.keys() == {*VOICE_ROWS, "asr.unseen.loss", "asr.unseen.telephone"}
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "By speaker" not in text and "By family" not in text


@pytest.mark.parametrize("content", ["[]", "{", '{"unseen": "flite awb"}'])
def test_damaged_voices_are_one_line(tmp_path, monkeypatch, content):
    write_world(tmp_path)
    write_voices(tmp_path / "voices")
    (tmp_path / "voices/voices.json").write_text(content)
    with pytest.raises(ValueError, match="voices.json") as error:
        report_on(tmp_path, monkeypatch)
    assert "\n" not in str(error.value)


def test_noise_and_telephone_are_the_same_for_each_model():
    draw = np.random.default_rng(0)
    wav = (0.1 * draw.standard_normal(16_000)).astype(np.float32)
    noisy = voices.disguise(wav, "noise", "a")
    np.testing.assert_array_equal(noisy, voices.disguise(wav, "noise", "a"))
    assert (noisy != voices.disguise(wav, "noise", "b")).any()
    ratio = 10 * np.log10((wav**2).mean() / ((noisy - wav) ** 2).mean())
    assert ratio == pytest.approx(15, abs=0.1)
    spectrum = np.abs(np.fft.rfft(voices.disguise(wav, "telephone", "a"))) ** 2
    hertz = np.fft.rfftfreq(len(wav), 1 / audio.RATE)
    assert spectrum[hertz > 4000].mean() < 0.01 * spectrum[(hertz > 500) & (hertz < 3000)].mean()


# ---- Corpora that have less, and evaluations that fail in part ---------------------------------------------


def test_ones_own_recordings_without_splits_and_dialogues_have_a_report(tmp_path, monkeypatch):
    write_world(tmp_path, ["train"], answers=False)
    numbers = report_on(tmp_path, monkeypatch, targets={"asr.heldout": 0.1, "tts.train": 0.2})
    parts = ("source", "asr", "asr.before", "tts", "t2u")
    assert numbers.keys() == {f"{key}.train" for key in parts} | {
        "resynthesis", "resynthesis.own", "first", "first.factor"
    }  # fmt: skip
    assert numbers["asr.train"] == numbers["resynthesis.own"] == 0 and numbers["asr.before.train"] == 1
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "| speech to text (ASR), training recordings | 0.0 % |" in text and "| recognizer 0.0 % |" in text
    assert "By family" not in text and "Examples" not in text and "| - |" not in text
    assert "- targets: 1 of 2 reached; not measured: asr.heldout\n" in text


def test_one_recording_is_enough(tmp_path, monkeypatch):
    write_world(tmp_path, ["heldout"])
    manifest = tmp_path / "corpus/manifest.jsonl"
    manifest.write_text(manifest.read_text().splitlines()[0])
    numbers = report_on(tmp_path, monkeypatch)
    assert numbers["asr.heldout"] == 0 and numbers["text.heldout"] == 1 and "asr.rendition" not in numbers
    assert "/1-question.wav" in (tmp_path / "report/report.md").read_text(encoding="utf-8")


def test_what_cannot_be_measured_is_left_out_and_told(tmp_path, monkeypatch, capsys):
    write_world(tmp_path)
    broken = tmp_path / "corpus/heldout3.wav"
    soundfile.write(broken, np.full(1600, np.nan), 16000, "FLOAT")

    class Deaf(KnownModel):
        def answer_each(self, prompts, request):
            replies = super().answer_each(prompts, request)
            if request.mode[0] == "t" and request.task == "chat":
                replies[0] = ValueError("the prompt is too long")
            return replies

    numbers = report_on(tmp_path, monkeypatch, Deaf())
    rows = {row["key"]: row for row in json.loads((tmp_path / "report/report.json").read_text())["rows"]}
    assert rows["source.heldout"]["n"] == 3 and rows["text.heldout"]["n"] == 3
    assert numbers["text.heldout"] == pytest.approx(2 / 3), "an answer that is not there is no right one"
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "- problems: " in text and "heldout3.wav contains NaN or infinity" in text
    assert "not everything could be measured" in capsys.readouterr().out


def test_the_numbers_are_kept_whatever_fails_after_them(tmp_path, monkeypatch):
    write_world(tmp_path)

    def fail(*_):
        assert json.loads((tmp_path / "report/report.json").read_text())["rows"], "written before"
        raise ZeroDivisionError("no picture")

    for name in ("plot_curves", "write_examples"):
        monkeypatch.setattr(evaluate.report, name, fail)
    numbers = report_on(tmp_path, monkeypatch)
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert numbers["asr.heldout"] == 0 and "- problems: examples: no picture; curves: no picture\n" in text
    assert numbers["first"] == 3.0


def test_a_recognizer_that_fails_costs_its_rows_alone(tmp_path, monkeypatch):
    class Fails(PerfectRecognizer):
        def transcribe(self, wavs, done):
            raise RuntimeError("out of luck")

    write_world(tmp_path)
    numbers = report_on(tmp_path, monkeypatch, recognizer=Fails)
    assert numbers["asr.heldout"] == 0 and numbers["answer.rendition"] == 1
    assert not {"source.heldout", "tts.heldout", "spoken", "resynthesis"} & numbers.keys()


def test_ctrl_c_does_not_wait_for_what_is_to_be_transcribed(tmp_path, monkeypatch):
    started = []

    class Slow(PerfectRecognizer):
        def transcribe(self, wavs, done):
            started.append(len(wavs))
            time.sleep(0.5)
            return super().transcribe(wavs, done)

    class Interrupted(KnownModel):
        def answer_each(self, prompts, request):
            if request.mode == "t2t":
                raise KeyboardInterrupt
            return super().answer_each(prompts, request)

    write_world(tmp_path)
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        report_on(tmp_path, monkeypatch, Interrupted(), Slow)
    took = time.perf_counter() - began
    time.sleep(0.6)
    assert len(started) <= 2 and took < 2.0, "eight were waiting"


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path, monkeypatch):
    asked = []
    heard = []

    class Counting(KnownModel):
        def answer_each(self, prompts, request):
            asked.append((request.mode, request.task, request.chain))
            return super().answer_each(prompts, request)

    class Killed(Counting):
        def answer_each(self, prompts, request):
            if not request.chain:
                raise KeyboardInterrupt
            return super().answer_each(prompts, request)

    class Recorded(PerfectRecognizer):
        def transcribe(self, wavs, done):
            heard.append(len(wavs))
            return super().transcribe(wavs, done)

    write_world(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        report_on(tmp_path, monkeypatch, Killed(), Recorded)
    assert len(asked) == 6 and len(list((tmp_path / "report/kept").iterdir())) > 6
    numbers = report_on(tmp_path, monkeypatch, Counting(), Recorded)
    assert len(asked) == 12 and asked[6] == ("s2t", "chat", False), "nothing is asked twice"
    assert 12 <= len(heard) <= 13, "nor heard, but for what was just being transcribed"
    assert not (tmp_path / "report/kept").exists()
    shutil.rmtree(tmp_path / "report")
    assert report_on(tmp_path, monkeypatch) == numbers

    with pytest.raises(KeyboardInterrupt):
        report_on(tmp_path, monkeypatch, Killed(), seed=1)
    (tmp_path / "model/lora/adapter").write_text("another model")
    asked.clear()
    report_on(tmp_path, monkeypatch, Counting(), seed=1)
    assert asked[0] == ("s2t", "asr", True), "of another model nothing is taken"


def test_a_report_replaces_no_file_that_no_report_made(tmp_path, monkeypatch):
    write_world(tmp_path)
    mine = tmp_path / "report/report.md"
    mine.parent.mkdir()
    mine.write_text("my own")
    with pytest.raises(ValueError, match=r"report.md is there and no report of this program: choose another"):
        report_on(tmp_path, monkeypatch)
    assert mine.read_text() == "my own" and list(mine.parent.iterdir()) == [mine]
    mine.unlink()
    first = report_on(tmp_path, monkeypatch)
    assert report_on(tmp_path, monkeypatch) == first, "but an earlier report"


def test_a_corpus_with_nothing_to_measure_is_one_line(tmp_path, monkeypatch):
    write_world(tmp_path, ["train"], answers=False)
    manifest = tmp_path / "corpus/manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"statement", "split"', '"answer", "split"').replace(
        '"question", "split"', '"answer", "split"'))  # fmt: skip
    with pytest.raises(ValueError, match="has no recording that can be measured"):
        report_on(tmp_path, monkeypatch)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("part, message", [("vocoder", "has no vocoder/"), ("extractor", "has no hubert/")])
def test_a_model_without_vocoder_or_hubert_is_one_line(part, message, monkeypatch, tmp_path):
    model = KnownModel()
    setattr(model, part, None)
    monkeypatch.setattr(evaluate, "need_extra", lambda: None)
    monkeypatch.setattr(evaluate.SpeechGPT, "from_pretrained", lambda *_: model)
    write_world(tmp_path)
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate(tmp_path, tmp_path / "corpus", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_model_or_corpus_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "need_extra", lambda: None)
    write_world(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model"):
        evaluate.evaluate(tmp_path / "nothing", tmp_path / "corpus", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="manifest.jsonl"):  # before the model is loaded
        evaluate.evaluate(tmp_path, tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="items is -1"):
        evaluate.evaluate(tmp_path, tmp_path, tmp_path / "out", items=-1)


@pytest.mark.parametrize("flags", [["--modle", "x"], ["--items", "many"], ["model"]])
def test_a_wrong_flag_is_one_line(flags, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags])
    with pytest.raises(ValueError, match="see python evaluate.py --help"):
        evaluate.main()


def test_a_recording_without_text_is_not_compared_with_nothing(tmp_path):
    audio.save(tmp_path / "a.wav", np.full(16000, 0.1))
    row = {"path": tmp_path / "a.wav", "split": "heldout", "kind": "statement", "text": ""}
    rows = [
        row,
        row | {"answer": "Me."},
        row | {"text": "Who?", "answer": ""},
        row | {"text": "Who?", "answer": "Me."},
    ]
    problems: list[str] = []
    drawn = evaluate.draw(rows, 9, 0, problems)
    assert [len(drawn.speech["heldout"]), len(drawn.questions["heldout"]), problems] == [2, 1, []]

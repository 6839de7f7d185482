"""The report must say what was measured: a model with known answers gets its known numbers."""

import json
import math

import numpy as np
import pytest
import torch

import evaluate
from data import audio
from evaluate import MEASURES, Item, Memory, ngram_bits, ratio, score_all, unit_bits, wilson
from llama import Llama, LlamaConfig
from sample import Reply

pytest.importorskip("jiwer")

# ---- Numbers


def test_a_rate_is_edits_over_words_of_all_items():
    value, low, high = ratio([(1, 2), (0, 8), (2, 10)])
    assert value == 3 / 20 and low < value < high
    assert ratio([]) == (None, None, None) and ratio([(0, 0)]) == (None, None, None)


def test_no_error_in_sixty_words_is_not_certainty():
    assert ratio([(0, 6)] * 10) == (0.0, 0.0, 3 / 60)


def test_the_bootstrap_is_as_wide_as_theory_says():
    """400 items of 5 independent words, each wrong with p: the standard error is sqrt(p (1 - p) / 2000)."""
    edits = np.random.default_rng(1).binomial(5, 0.2, 400)
    p, low, high = ratio([(e, 5) for e in edits])
    error = math.sqrt(p * (1 - p) / 2000)
    assert high - p == pytest.approx(1.96 * error, rel=0.15) and p - low == pytest.approx(
        1.96 * error, rel=0.15
    )


def test_wilson():
    value, low, high = wilson([True] * 8 + [False] * 2)  # 0.490, 0.943: Wilson 1927 for 8 of 10
    assert (
        value == 0.8 and math.isclose(low, 0.4902, abs_tol=1e-4) and math.isclose(high, 0.9433, abs_tol=1e-4)
    )
    assert wilson([True] * 10)[1] < 0.75 and wilson([True] * 10)[2] == 1 and wilson([False] * 10)[1] == 0


DIALOGUES = [
    {"question": "What is one plus one?", "answer": "Two.", "family": "plus"},
    {"question": "What is one plus two?", "answer": "Three.", "family": "plus"},
    {"question": "What is two plus one?", "answer": "Three.", "family": "plus"},
    {"question": "Is the sky blue?", "answer": "Yes.", "family": "sky"},
    {"question": "Is the sky up?", "answer": "Yes.", "family": "sky"},
    {"question": "Is the sky high?", "answer": "Yes.", "family": "sky"},
]


def answer_item(measure, expected, got, *, id="a", split="heldout", family="plus", question="?"):
    return Item(measure, id, split, 0, family, question, expected, got)


def test_baselines_know_the_train_split_by_heart_and_no_more():
    memory = Memory(DIALOGUES)
    assert (
        memory.majority() == "Yes." and memory.majority("plus") == "Three." and memory.majority("new") == ""
    )
    assert (
        memory.nearest("what is one plus ONE") == "Two." and memory.nearest("Is the red sky high?") == "Yes."
    )
    items = [
        answer_item("answer", "Three.", "", question="Tell me: is the sky high?"),
        answer_item("answer", "Yes", "", family="sky", question="Is the sky so blue?"),
    ]
    assert memory.score(items) == {
        "majority": 0.5,
        "majority of its family": 1.0,
        "nearest train question": 0.5,
    }
    assert Memory([]).score(items)["nearest train question"] == 0


def test_ngram_bits_by_hand():
    bits = ngram_bits([[0, 1, 0], [0, 2]], [[0, 1]], n_units=3)
    p = {0: 4 / 8, 1: 2 / 8}  # (count + 1) / (5 + 3)
    start = (2 + 10 * p[0]) / (2 + 10)  # both train utterances begin with 0
    then = (1 + 10 * p[1]) / (2 + 10)  # 0 is followed twice, once by 1
    assert math.isclose(bits["unigram"], -(math.log2(p[0]) + math.log2(p[1])) / 2)
    assert math.isclose(bits["bigram"], -(math.log2(start) + math.log2(then)) / 2)


def test_ngrams_are_distributions():
    train = [[0, 1, 2, 1, 0, 2], [2, 1]]
    for context in ([], [0], [1], [2]):
        total = 0.0
        for unit in range(3):
            one = ngram_bits(train, [[*context, unit]], 3)["bigram"] * (len(context) + 1)
            before = ngram_bits(train, [context], 3)["bigram"] * len(context) if context else 0.0
            total += 2 ** -(one - before)
        assert math.isclose(total, 1.0), (context, total)


class UnitTokens:
    """<s> 1, <sosp> 3, <eosp> 4, unit u is 5 + u."""

    sosp, n_units = 3, 8

    def encode(self, text):
        names = text.replace("><", "> <").split()
        return [1] + [{"<sosp>": 3, "<eosp>": 4}.get(name) or 5 + int(name[1:-1]) for name in names]


class OnlyLogits:
    tok = UnitTokens()

    def __init__(self, vocab=13):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=vocab, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_len=64)
        self.llama = Llama(config).eval()

    @torch.no_grad()
    def logits(self, ids):
        return self.llama(torch.tensor([ids]))[0].float()


def test_unit_bits_equal_the_sum_one_by_one():
    model, units = OnlyLogits(), [4, 0, 7, 2]
    [(bits, n)] = unit_bits(model, [units])
    expected, ids = 0.0, [1, 3]  # <s> <sosp>
    for unit in units:
        expected -= math.log2(model.logits(ids)[-1].softmax(-1)[5 + unit].item())
        ids.append(5 + unit)
    assert n == 4 and math.isclose(bits, expected, rel_tol=1e-5)


# ---- A world of four sentences of each split, a model that knows what it should, and a judge that never errs

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


class PerfectJudge:
    def hear(self, wavs, done):
        done(len(wavs))
        return [text_of(wav) for wav in wavs]


class Deaf:
    """The model without its adapter."""

    def reply_batch(self, prompts, mode, task, max_new):
        assert (mode, task) == ("s2t", "asr")
        return [Reply("", "", [], None) for _ in prompts]


class KnownModel(OnlyLogits):
    """Hears and reads perfectly; answers wrongly what is held out if it was spoken; without chain it knows nothing;
    never speaks about the sky."""

    n_speakers, takes = 1, 3

    def hear(self, prompt):
        raise AssertionError("reply_batch hears")

    def extractor(self, wav):
        return [SENTENCES.index(text_of(wav)) % 8, 7 - SENTENCES.index(text_of(wav)) % 8], [2, 3]

    def vocoder(self, units, speaker=None, durations=None):
        assert speaker in (None, 0)
        return torch.from_numpy(sound_of("Tom is here." if durations is None else SENTENCES[units[0]]))

    def reply_batch(self, prompts, mode, task="chat", chain=True, max_new=None, seed=0, takes=None):
        assert max_new and len(prompts) <= 32
        return [self.one(p if mode[0] == "t" else text_of(audio.load(p)), mode, task, chain) for p in prompts]

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


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """evaluate() on that world: (returned numbers, report folder)."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("world")
    rows = []
    for split in ("train", "rendition", "heldout"):
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
            rows.append(row | ({"answer": ANSWERS[text]} if text in ANSWERS else {}))
            audio.save(folder / "corpus" / row["wav"], sound_of(text))
    lines = {"manifest": rows, "dialogues": [d | {"split": "train"} for d in DIALOGUES]}
    for name, content in lines.items():
        (folder / f"corpus/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "metrics").mkdir()
    steps = [json.dumps({"step": i, "loss": 1 / (i + 1), "lr": 0.1, "said": "text"}) for i in range(5)]
    (folder / "metrics/stage1.jsonl").write_text("\n".join([*steps, '{"half a li', "[1]", '{"loss": 3}']))
    (folder / "metrics/empty.jsonl").write_text("")
    patch = pytest.MonkeyPatch()
    talking = type("Talking", (), {"from_pretrained": lambda *_: KnownModel(), "__new__": lambda *_: Deaf()})
    patch.setattr(evaluate, "SpeechGPT", talking)
    patch.setattr(evaluate, "Llama", type("Any", (), {"from_pretrained": lambda *_, **__: None}))
    (folder / "model/lora").mkdir(parents=True)
    patch.setattr(evaluate, "Recognizer", PerfectJudge)
    patch.setattr(evaluate, "first_reply", lambda *_: (3.0, 1.5))
    numbers = evaluate.evaluate(
        folder / "model", folder / "corpus", folder / "report", items=10, device="cpu"
    )
    patch.undo()
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
    # "wrong answer", twice 2 words of 2 right; "wrong answer", silent: 2 of 2; "Yes.", silent: 1 of 1; "Two", "Three"
    assert numbers["spoken"] == pytest.approx(3 / 9)
    assert numbers["resynthesis"] > 0.8  # the voice says "Tom is here", whatever the units are


def test_the_report_has_every_row_with_its_number_of_items_and_baseline(reported):
    numbers, out = reported
    report = json.loads((out / "report.json").read_text())
    rows = {row["key"]: row for row in report["rows"]}
    keys = {
        f"{m.key}.{s}" if m.split else m.key for m in MEASURES for s in (evaluate.SPLITS if m.split else [""])
    }
    assert rows.keys() == keys | {"bits", "first", "first.factor"} == numbers.keys()
    text = (out / "report.md").read_text()
    for key, row in rows.items():
        assert row["n"] > 0 and row["value"] is not None, key
        assert row["baseline"] or key.startswith(("source", "first")), f"{key} has no baseline"
        assert f"| {row['name']} | " in text, f"{key} is not in report.md"
    assert rows["asr.heldout"]["baseline"] == {"judge": 0.0} and rows["asr.heldout"]["target"].startswith(
        "≤ 10"
    )
    assert rows["answer.heldout"]["baseline"] == {
        "read": 1.0,
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


def test_measures_are_not_mixed_up():
    """Each row sees its own items only, and takes baselines from the same recordings."""
    items = [
        answer_item("source", "a b", "a b", id="1"),
        answer_item("source", "c d", "x y", id="2"),
        answer_item("asr", "a b", "a x", id="1"),
    ]
    rows = {row.key: row for row in score_all(items, Memory([]))}
    assert rows["source.heldout"].value == 0.5 and rows["asr.heldout"].value == 0.5
    assert rows["asr.heldout"].baseline == {"judge": 0.0}, "of recording 1 alone"
    assert rows["asr.rendition"].value is None and rows["asr.rendition"].n == 0


@pytest.mark.parametrize("part, message", [("vocoder", "has no vocoder/"), ("extractor", "has no hubert/")])
def test_a_model_that_cannot_speak_or_hear_is_one_line(part, message, monkeypatch, tmp_path):
    model = KnownModel()
    setattr(model, part, None)
    monkeypatch.setattr(evaluate, "need_extra", lambda: None)
    monkeypatch.setattr(evaluate.SpeechGPT, "from_pretrained", lambda *_: model)
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate(tmp_path, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_model_or_corpus_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "need_extra", lambda: None)
    with pytest.raises(FileNotFoundError, match="no model"):
        evaluate.evaluate(tmp_path / "nothing", tmp_path, tmp_path / "out")
    monkeypatch.setattr(evaluate.SpeechGPT, "from_pretrained", lambda *_: KnownModel())
    with pytest.raises(FileNotFoundError, match="manifest.jsonl"):
        evaluate.evaluate(tmp_path, tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="items is -1"):
        evaluate.evaluate(tmp_path, tmp_path, tmp_path / "out", items=-1)


@pytest.mark.parametrize("flags", [["--modle", "x"], ["--items", "many"], ["model"]])
def test_a_wrong_flag_is_one_line(flags, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags])
    with pytest.raises(ValueError, match="see python evaluate.py --help"):
        evaluate.main()

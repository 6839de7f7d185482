"""The measures: rates, intervals, baselines and bits against values computed by hand; targets."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import config
import train
from evaluation.measures import (
    Item,
    LookupBaselines,
    Row,
    bits_rows,
    check_targets,
    count_reached,
    ngram_bits,
    ratio,
    read_targets,
    score_all,
    unit_bits,
    wilson,
)
from llama import Llama, LlamaConfig

pytest.importorskip("jiwer")
CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# ---- Rates and baselines -----------------------------------------------------------------------------------


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


def test_baselines_know_the_training_split_and_no_more():
    lookup = LookupBaselines(DIALOGUES)
    assert (
        lookup.majority() == "Yes." and lookup.majority("plus") == "Three." and lookup.majority("new") == ""
    )
    assert (
        lookup.nearest("what is one plus ONE") == "Two." and lookup.nearest("Is the red sky high?") == "Yes."
    )
    items = [
        answer_item("answer", "Three.", "", question="Tell me: is the sky high?"),
        answer_item("answer", "Yes", "", family="sky", question="Is the sky so blue?"),
    ]
    assert lookup.score(items) == {
        "majority": 0.5,
        "majority of its family": 1.0,
        "nearest train question": 0.5,
    }
    assert LookupBaselines([]).score(items)["nearest train question"] == 0
    wordless = LookupBaselines([{"question": "?", "answer": "Yes.", "family": ""}])
    assert wordless.nearest("...") == "Yes.", "texts without a word have nothing in common, and are no fault"


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


def test_bits_are_counted_by_unit_and_by_second():
    model, speech = OnlyLogits(), [([4, 0, 7], [10, 20, 20]), ([2, 1], [25, 25])]  # a second each
    rows = {row.key: row.value for row in bits_rows({"bits": model, "bits.1": model}, speech, [[1, 2]])}
    assert rows.keys() == {"bits", "bits.1", "bits.second"}
    assert rows["bits.second"] * 2 == pytest.approx(rows["bits"] * 5)


def test_measures_are_not_mixed_up():
    """Each row sees its own items only, and takes baselines from the same recordings."""
    items = [
        answer_item("source", "a b", "a b", id="1"),
        answer_item("source", "c d", "x y", id="2"),
        answer_item("asr", "a b", "a x", id="1"),
    ]
    rows = {row.key: row for row in score_all(items, LookupBaselines([]))}
    assert rows["source.heldout"].value == 0.5 and rows["asr.heldout"].value == 0.5
    assert rows["asr.heldout"].baseline == {"recognizer": 0.0}, "of recording 1 alone"
    assert rows["asr.rendition"].value is None and rows["asr.rendition"].n == 0


# ---- Targets -----------------------------------------------------------------------------------------------


def test_a_target_is_reached_from_its_own_side():
    wer = Row("asr.heldout", "ASR", 0.05, 0.0, 0.1, 9)
    share = Row("answer.heldout", "answers", 0.9, 0.8, 1.0, 9, higher_is_better=True)
    assert wer.reached is None and wer.show_target() == "", "without a target"
    wer.target = share.target = 0.05
    assert wer.reached and wer.show_target() == "at most 5.0 %: reached"
    assert share.reached and share.show_target() == "at least 5.0 %: reached"
    wer.target, share.target = 0.049, 0.91
    assert wer.reached is False and wer.show_target() == "at most 4.9 %: not reached"
    assert share.reached is False and share.show_target() == "at least 91.0 %: not reached"
    wer.value = None
    assert wer.reached is None and wer.show_target() == "at most 4.9 %: not measured"
    seconds = Row("first", "time", 9.5, None, None, 2, "s", target=10)
    assert seconds.show_target() == "at most 10.00 s: reached"


def test_rows_know_which_direction_is_better():
    better = {row.key: row.higher_is_better for row in score_all([], LookupBaselines([]))}
    assert better["answer.heldout"] and better["spoken.answer.rendition"] and better["text.heldout"]
    assert not better["asr.heldout"] and not better["spoken"] and not better["resynthesis"]


def test_targets_are_counted_with_those_of_rows_that_are_not_there():
    rows = [
        Row("asr.heldout", "ASR", 0.05, 0.0, 0.1, 9, target=0.1),
        Row("spoken", "", 0.3, 0, 1, 9, target=0.2),
    ]
    assert count_reached(rows[:1], {"asr.heldout": 0.1}) == "1 of 1 reached"
    targets = {"asr.heldout": 0.1, "spoken": 0.2, "first": 10}
    assert count_reached(rows, targets) == "1 of 3 reached; not spoken; not measured: first"
    assert count_reached(rows, {}) == ""


@pytest.mark.parametrize("targets, message", [
    ({"asr.held": 0.1}, 'no row \'asr.held\'; did you mean "asr.heldout"'),
    ({"asr": {"heldout": 0.1}}, "no row 'asr'"),  # the dot without quotes is a table in TOML
    ({"xyz": 1}, "no row 'xyz'; rows: source.rendition, "),
    ({"spoken": "0.2"}, "key 'spoken': expected a number, found '0.2'"),
    ({"spoken": True}, "key 'spoken': expected a number, found True"),
    ({"spoken": float("nan")}, "key 'spoken': expected a number, found nan"),
])  # fmt: skip
def test_a_wrong_target_is_one_line(targets, message):
    with pytest.raises(ValueError, match=message) as found:
        check_targets(targets)
    assert "\n" not in str(found.value)


def test_train_refuses_a_wrong_target_as_it_reads_the_config():
    with pytest.raises(ValueError, match="no row 'asr.held'"):
        config.read(CONFIGS / "ci.toml", train.Config, ["--evaluate.targets", '{ "asr.held" = 0.1 }'])


@pytest.mark.parametrize("name", ["tiny", "long"])
def test_the_configs_have_targets_for_rows_that_there_are(name):
    targets = read_targets(CONFIGS / f"{name}.toml")
    check_targets(targets)
    assert len(targets) == 7
    assert config.read(CONFIGS / f"{name}.toml", train.Config).evaluate.targets == targets


def test_a_file_without_targets_is_one_line(tmp_path):
    for text in ("", "evaluate = 3", "[evaluate]\nitems = 3"):
        (tmp_path / "a.toml").write_text(text)
        with pytest.raises(ValueError, match=r"no section \[evaluate.targets\]"):
            read_targets(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text("x =")
    with pytest.raises(ValueError, match="not valid TOML"):
        read_targets(tmp_path / "a.toml")
    with pytest.raises(FileNotFoundError):
        read_targets(tmp_path / "nothing.toml")

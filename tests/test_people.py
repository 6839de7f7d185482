"""data/tiny/people.py: real recordings as a corpus of voices, of whatever is installed."""

import re

import numpy as np
import pytest

from data import audio
from data.tiny import people, prepare
from evaluation import voices


def test_words_and_spliced_sums_of_what_is_there(tmp_path, capsys):
    t = np.arange(8000) / audio.RATE
    words = people.WORDS["Allison"]
    for i, word in enumerate(("one", "two", "three", "plus", "minus", "is", "Monday")):
        tone = (0.3 * np.sin(2 * np.pi * (200 + 50 * i) * t)).astype(np.float32)
        audio.save(tmp_path / "share" / words[word], np.pad(tone, 4000))
    people.prepare(tmp_path / "out", tmp_path / "share")
    groups = voices.read_rows(tmp_path / "out")
    assert groups["seen"] == []
    rows = {row["text"]: row for row in groups["unseen"]}
    said = {"one", "two", "three", "plus", "minus", "is", "Monday"}
    assert rows.keys() == said | {text for text in people.sums() if set(text.split()) <= said}
    assert "one plus one is two" in rows and rows["one plus one is two"]["speaker"] == "Allison, spliced"
    assert 0.6 < rows["one"]["seconds"] < 0.8, "half a second of tone, and a tenth before and after"
    assert 5 * 0.5 < rows["one plus one is two"]["seconds"] < 5 * 0.7
    assert "without " in capsys.readouterr().out
    assert "four" in str(voices.read_voices(tmp_path / "out")["missing"])


def test_without_packages_it_says_which(tmp_path):
    with pytest.raises(ValueError, match="people.py names"):
        people.prepare(tmp_path / "out", tmp_path)


def test_each_word_is_one_of_the_world():
    spoken = prepare.plan(3000, 1)[0]
    known = {word for u in spoken for word in re.findall("[a-z]+", u.text.lower())}
    for words in people.WORDS.values():
        assert {word.lower() for word in words} <= known

"""What an evaluation keeps comes back as it was, or not at all."""

import numpy as np
import pytest

from evaluation.kept import Kept, stamps
from request import Reply

REPLIES = [
    Reply(
        "what is it",
        "Two. \u2028 é",
        [3, 1],
        np.linspace(-1, 1, 77, dtype=np.float32),
        "cut off",
        {"takes": 3},
    ),
    Reply("", "", [], None, "", {"failed": True}),
]


def never():
    raise AssertionError("it is there")


def same(found: list[Reply]) -> bool:
    texts = [(r.transcript, r.text, r.units, r.note, r.stats) for r in found]
    return (
        texts == [(r.transcript, r.text, r.units, r.note, r.stats) for r in REPLIES]
        and found[1].wav is None
        and np.array_equal(found[0].wav, REPLIES[0].wav)
    )


def test_what_was_kept_comes_back_to_the_last_bit(tmp_path):
    kept = Kept(tmp_path / "kept", {"seed": 1})
    assert same(kept.replies("a", lambda: REPLIES)) and kept.texts("b", lambda: ["x", ""]) == ["x", ""]
    assert kept.texts("empty", list) == []
    kept = Kept(tmp_path / "kept", {"seed": 1})
    assert same(kept.replies("a", never)) and kept.texts("b", never) == ["x", ""]
    assert kept.texts("empty", never) == []
    kept.forget()
    assert not (tmp_path / "kept").exists()


def test_of_other_settings_or_damaged_it_is_made_anew(tmp_path):
    Kept(tmp_path, {"seed": 1}).texts("a", lambda: ["one"])
    assert Kept(tmp_path, {"seed": 2}).texts("a", lambda: ["two"]) == ["two"]
    assert Kept(tmp_path, {"seed": 2}).texts("a", never) == ["two"]
    for damage in (b"", b"no", (tmp_path / "a.safetensors").read_bytes()[:-1]):
        (tmp_path / "a.safetensors").write_bytes(damage)
        assert Kept(tmp_path, {"seed": 2}).texts("a", lambda: ["three"]) == ["three"]
        assert Kept(tmp_path, {"seed": 2}).texts("a", never) == ["three"]


@pytest.mark.parametrize("change", ["content", "name"])
def test_stamps_tell_one_folder_from_another(tmp_path, change):
    (tmp_path / "a").write_text("1")
    before = stamps(tmp_path)
    assert stamps(tmp_path) == before
    (tmp_path / "a").write_text("12") if change == "content" else (tmp_path / "a").rename(tmp_path / "b")
    assert stamps(tmp_path) != before

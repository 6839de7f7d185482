"""Requests that cannot be, what names a file and what is a text, and files that a reply must not replace."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from request import Reply, Request, is_missing, is_sound, modalities, reply_paths


@pytest.mark.parametrize(
    "options, says",
    [
        ({"mode": "s2x"}, "mode is 's2x'; choose one of s2s"),
        ({"task": "sing"}, "task is 'sing'; choose one of chat"),
        ({"style": "baroque"}, "style is 'baroque'; choose one of auto"),
        ({"max_new": 0}, "max_new is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 10**30}, "seed is 10"),
        ({"takes": 0}, "at least once"),
        ({"takes": 2, "chain": False}, "text to compare"),
        ({"takes": 2, "task": "asr"}, "text to compare"),
        ({"takes": 2, "task": "continue"}, "text to compare"),
    ],
)
def test_a_request_that_cannot_be_is_one_line(options, says):
    with pytest.raises(ValueError, match=says) as found:
        Request(**options)
    assert "\n" not in str(found.value)


# ---- A file or a text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [
    "a.wav", "b c.FLAC", "q.m4a", "my answer.opus", "q.xyz", "talks/one", "./what is this", "../q", "/a b/c",
    "~/q", r"C:\sounds\my q", r"sounds\q", Path("x"), np.zeros(3),
], ids=str)  # fmt: skip
def test_the_shape_of_a_file(prompt):
    assert is_sound(prompt)
    assert modalities(prompt, Request())[0] == "s"


@pytest.mark.parametrize("prompt", [
    "What is this?", "What is 3.5?", "3.5", "3/4", "What is 3/4?", "It costs 3.50.", "Tom and/or Lucy?",
    "What/who?", "U.S.A.", "e.g.", "Is node.js a file", "What is an .mp3", "...", "?", "", "x" * 5000, "a\0b",
    "I am late...", "Read a.txt and b.txt", "12.03.2026", "wav", "q.", "Yes.",
], ids=lambda text: repr(text[:20]))  # fmt: skip
def test_the_shape_of_a_text(prompt):
    assert not is_sound(prompt) and not is_missing(prompt)
    assert modalities(prompt, Request())[0] == "t"


def test_what_is_there_is_a_file_whatever_its_shape(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("question", "what is this", "folder"):
        assert not is_sound(name)
        Path(name).mkdir() if name == "folder" else Path(name).touch()
        assert is_sound(name) and not is_missing(name)
    assert is_missing("q.m4a") and is_missing(Path("x")) and not is_missing(np.zeros(3))
    assert modalities("question", Request(mode="t2s")) == ("t", "s"), (
        "but who says that it is a text is right"
    )


# ---- The files of a reply ----------------------------------------------------------------------------------


def write_reply(path: Path, **changes):
    row = {"prompt": "q", **vars(Reply("", "", [], None)), "wav": path.name} | changes
    path.with_suffix(".json").write_text(json.dumps(row))


def names(prompts: list[str], out: str = "out") -> list[str]:
    return [path.name for path in reply_paths(prompts, Path(out))]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_names_of_replies(folder):
    assert names(["What is 2 + 2?", "a/q.wav", "b/q.flac", "Q.ogg", "?"]) == [
        "what-is-2-2.wav", "q.wav", "q-2.wav", "Q-3.wav", "reply.wav",
    ]  # fmt: skip
    assert names(["q.wav", "q-2.wav", "q.wav"]) == ["q.wav", "q-2.wav", "q-3.wav"]
    assert len(names(["x" * 300 + ".wav"])[0]) < 220 and names(["\udcff.wav"]) == ["reply.wav"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("aB.1/\\ ~?\0\ud800é-") | st.text(), max_size=4))
def test_every_text_has_a_shape_and_a_name(prompts):
    paths = reply_paths(prompts, Path("nowhere"))
    assert len({str(path).lower() for path in paths}) == len(prompts)
    for prompt, path in zip(prompts, paths):
        assert path.parent == Path("nowhere") and path.name.isprintable() and len(path.name.encode()) < 256
        assert is_missing(prompt) <= is_sound(prompt)


def test_a_file_that_no_reply_made_is_never_replaced(folder):
    (folder / "q.json").write_text('{"my": "notes"}')
    assert names(["q.flac"]) == ["q-2.wav"]
    (folder / "q.json").write_text("no JSON")
    (folder / "q-2.wav").touch()
    assert names(["q.flac"]) == ["q-3.wav"]
    write_reply(folder / "q-2.wav")
    assert names(["q.flac"]) == ["q-2.wav"], "an earlier reply"
    write_reply(folder / "q-2.wav", wav=None)
    assert names(["q.flac"]) == ["q-3.wav"], "a reply without sound made no wav"
    (folder / "q-2.wav").unlink()
    assert names(["q.flac"]) == ["q-2.wav"]


def test_a_question_is_never_replaced_even_if_it_is_a_reply(folder):
    write_reply(folder / "q.wav")
    (folder / "q.wav").touch()
    assert names(["q.wav"]) == ["q.wav"], "of another folder"
    assert names(["out/q.wav"]) == ["q-2.wav"]
    assert names(["a/q.flac", "out/q.wav"]) == ["q-2.wav", "q-3.wav"], "nor that of another prompt"


def test_a_named_file_is_written_if_a_reply_made_it(folder):
    assert names(["q"], "out/a.wav") == ["a.wav"]
    write_reply(folder / "a.wav")
    (folder / "a.wav").touch()
    assert names(["q"], "out/a.wav") == ["a.wav"]
    (folder / "a.json").write_text("{}")
    for out in ("out/a.wav", "out/A.WAV"):
        if Path(out).exists():
            with pytest.raises(ValueError, match="no reply of this program: choose another --out"):
                names(["q"], out)

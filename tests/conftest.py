"""Tests import the files as a reader does, `import llama`; and what several of them begin from."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: there is a process of tests for each core
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a shell's background: the programs that the tests
    signal.signal(signal.SIGINT, signal.default_int_handler)  # interrupt would inherit it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from runs import stages  # noqa: E402


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that waiting for a second one takes longer."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def spoken(tmp_path_factory) -> Path:
    """A run as far as its units: what every stage of the language model starts from."""
    out = tmp_path_factory.mktemp("run") / "ci"
    stages(out, "corpus", "hubert", "units")
    return out


@pytest.fixture
def out(spoken, tmp_path) -> Path:
    return Path(shutil.copytree(spoken, tmp_path / "ci"))


@pytest.fixture(scope="session")
def adapted(spoken, tmp_path_factory) -> Path:
    """The same as far as stage 1: a LLaMA that knows units."""
    out = Path(shutil.copytree(spoken, tmp_path_factory.mktemp("run") / "ci"))
    stages(out, "text", "1")
    return out


@pytest.fixture
def grown(adapted, tmp_path) -> Path:
    return Path(shutil.copytree(adapted, tmp_path / "ci"))

"""Three minutes of tests/torture.py, which draws other kills and flips with every seed."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it finds processes in /proc")
def test_three_minutes_of_kills_and_flips(tmp_path):
    pytest.importorskip("hibari")
    pytest.importorskip("faster_whisper")
    script = Path(__file__).parent / "torture.py"
    command = [sys.executable, script, "--minutes", "3", "--folder", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]

"""config.py and run.py: what a user may write, and what they are told."""

import json
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

import config
import run


@dataclass
class Part:
    steps: int = 3
    lr: float = 1e-3
    kernel: tuple[int, ...] = (1, 2)
    limit: config.Count | None = None
    share: config.Share = 0.5
    weight: config.Amount = 1.0
    pair: tuple[config.Share, config.Share] = (0.0, 1.0)
    rule: bool | str | None = None


@dataclass
class Whole:
    out: str = "somewhere"
    table: dict = field(default_factory=dict)
    part: Part = field(default_factory=Part)


def read(tmp_path, text, *flags):
    path = tmp_path / "a.toml"
    path.write_text(text)
    return config.read(path, Whole, list(flags))


def test_flags_lie_over_the_file_and_the_file_over_defaults(tmp_path):
    c = read(
        tmp_path,
        "[part]\nsteps = 4\nkernel = [3, 4, 5]\n",
        "--part.lr",
        "1",
        "--part.limit=7",
        "--out",
        "x y",
    )
    assert c == Whole("x y", {}, Part(4, 1.0, (3, 4, 5), 7))
    assert isinstance(c.part.lr, float)
    for rule, found in (("true", True), ("by name", "by name")):
        assert read(tmp_path, "", "--part.rule", rule).part.rule == found
    assert read(tmp_path, "[part]\nshare = 1\npair = [1, 0]\n").part == Part(share=1.0, pair=(1.0, 0.0))


@pytest.mark.parametrize(
    "text, flags, said",
    [
        ("[part]\nstep = 4", (), "did you mean 'steps'"),
        ("[prat]\nsteps = 4", (), "did you mean 'part'"),
        ("[part]\nsteps = 4.5", (), "expected int, found 4.5"),
        ("[part]\nsteps = true", (), "expected int, found True"),
        ("[part]\nkernel = [1, 'a']", (), "expected int, found 'a'"),
        ("part = 3", (), "expected Part, found 3"),
        ("[part]\nkernel = 3", (), "key 'kernel': expected a list, found 3"),
        ("[part]\nlimit = 0", (), "key 'limit': must be at least 1, found 0"),
        ("[part]\nlimit = 'a'", (), "key 'limit': expected int, found 'a'"),
        ("[part]\nshare = 1.5", (), "key 'share': must be 0 to 1, found 1.5"),
        ("[part]\nshare = nan", (), "must be 0 to 1, found nan"),
        ("", ("--part.weight", "inf"), "must be 0 to 1e.09, found inf"),
        ("[part]\npair = [0.1, -0.1]", (), "key 'pair': must be 0 to 1, found -0.1"),
        ("[part]\npair = [0.1]", (), "expected 2 values, found"),
        ("[part]\nrule = 3", (), "key 'rule': expected str, found 3"),
        ("[part\n", (), "not valid TOML"),
        ("", ("--part.lr",), "needs a value"),
        ("", ("part.lr", "3"), "unexpected argument"),
        ("out = 'x'", ("--out.lr", "3"), "is a value, not a section"),
        ("", ("--quick", "3"), "unknown key 'quick'"),
    ],
)
def test_mistakes_are_one_readable_line(tmp_path, text, flags, said):
    with pytest.raises(ValueError, match=said) as found:
        read(tmp_path, text, *flags)
    assert "\n" not in str(found.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.toml"):
        config.read(tmp_path / "nothing.toml", Whole)


@pytest.mark.parametrize(
    "action, code, said",
    [
        ("raise ValueError('bad\\nthing')", 1, "error: bad thing"),
        ("open('/no/such/file')", 1, "error: /no/such/file: No such file or directory"),
        ("raise KeyboardInterrupt", 1, "interrupted"),
        ("print('fine')", 0, ""),
    ],
)
def test_command_line_turns_mistakes_into_one_line_and_exit_code_1(action, code, said):
    script = f"import config\ndef main():\n    {action}\nconfig.command_line(main)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code
    assert said in done.stderr and "Traceback" not in done.stderr


def test_a_bug_still_shows_its_traceback():
    script = "import config\nconfig.command_line(lambda: [][1])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_metrics_drop_what_a_killed_run_wrote_beyond_its_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    log = run.Metrics(path)
    for step in range(5):
        log.write(step=step, loss=step / 2)
    path.write_text(path.read_text() + '{"step": 5, "lo')  # killed in the middle of a line
    run.Metrics(path, 3).write(step=3, loss=9.0)
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [0.0, 0.5, 1.0, 9.0]


def test_learning_rate_warms_up_then_falls_to_its_floor():
    rates = [run.cosine(step, 10, 100, 2.0, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[10] == 2.0
    assert rates[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_unknown_devices_are_refused():
    with pytest.raises(ValueError, match="unknown device"):
        run.device("tpu")

"""config.py and run.py: what a user may write, and what they are told."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import typing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import config
import run
import train

ROOT = Path(__file__).resolve().parent.parent


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


# ---- Whatever is written, it is a Config or one line -------------------------------------------------------


def keys(schema, prefix: str = "") -> list[str]:
    """Every section and every key of a config, dotted."""
    found = []
    hints = typing.get_type_hints(schema)
    for each in dataclasses.fields(schema):
        parts = [*typing.get_args(hints[each.name]), hints[each.name]]
        inner = [part for part in parts if dataclasses.is_dataclass(part)]
        found += [prefix + each.name, *(keys(inner[0], f"{prefix}{each.name}.") if inner else ())]
    return found


KEYS = keys(train.Config)
STRANGE = "\x1b]0;x\x07 \u2028\u2029\u0085\u202e\x00\t\\'\"~$%{}[]=#.é漢\U0001f600"
NUMBERS = ["nan", "-nan", "inf", "-inf", "1e400", "-1e400", "1e-400", "-0.0", "0", "-1", "1", "2", "7", "0.5",
           str(2**31), str(2**70), str(-(2**70)), "1" * 4000, "1" * 4400]  # fmt: skip
OTHERS = [
    "true",
    "false",
    "1979-05-27",
    "{}",
    "[]",
    "[[]]",
    "[[1, 2], [3]]",
    "{ x = 1 }",
    "{ x = { y = [] } }",
]
DEEP = ["[" * 200 + "]" * 200, "[" * 3000, "{a=" * 300 + "1" + "}" * 300, "{" + "a." * 1900 + "a=1}"]
VALUES = st.one_of(
    st.sampled_from(NUMBERS + OTHERS + DEEP),
    st.text(STRANGE + "abtiny", max_size=20).map(json.dumps),
    st.lists(st.sampled_from(NUMBERS), max_size=8).map(lambda items: f"[{', '.join(items)}]"),
    st.sampled_from(["x" * 5000, "out/\x1b[2J", "é"]).map(json.dumps),
)
PATHS = st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS).map(lambda key: key + ".x"), st.text(STRANGE))
CI = (ROOT / "configs/ci.toml").read_bytes()


def is_read_or_told(content: bytes, flags: list[str]):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.toml"
        path.write_bytes(content)
        try:
            assert isinstance(config.read(path, train.Config, flags), train.Config)
        except ValueError as problem:
            line = str(problem)
            assert line.isprintable() and 0 < len(line) <= 300, line


fuzz = settings(max_examples=150, derandomize=True, deadline=2000, database=None)


@fuzz
@given(st.lists(st.tuples(PATHS, VALUES), min_size=1, max_size=3))
def test_odd_flags_are_read_or_told_in_one_line(pairs):
    is_read_or_told(CI, [word for key, value in pairs for word in (f"--{key}", value)])


@pytest.mark.parametrize("value", NUMBERS + OTHERS + [json.dumps(STRANGE)])
def test_every_key_may_be_given_anything(tmp_path, value):
    path = tmp_path / "a.toml"
    path.write_text("pretrained = 'x'")
    for key in KEYS:
        try:
            assert isinstance(config.read(path, train.Config, [f"--{key}", value]), train.Config)
        except ValueError as problem:
            assert str(problem).isprintable() and len(str(problem)) <= 300


@fuzz
@given(st.lists(st.tuples(st.integers(0, len(CI)), st.integers(0, 40), st.binary(max_size=12)), max_size=4))
def test_damaged_toml_is_read_or_told_in_one_line(cuts):
    data = CI
    for at, length, put in cuts:
        data = data[:at] + put + data[at + length :]
    is_read_or_told(data, [])


@pytest.mark.parametrize("deep", [*DEEP, "[" + "a." * 2000 + "a]", "a." * 2000 + "a = 1", "[[a]]\n" * 9000])
def test_nesting_ends_soon(deep):
    is_read_or_told(f"x = {deep}".encode(), [])
    is_read_or_told(deep.encode(), [])


def test_a_file_of_another_kind_is_no_config(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfseed = 3")  # as Windows' Notepad writes it
    assert config.parse(tmp_path / "a") == {"seed": 3}
    for content, said in (
        (b"#" * 70_000, "no config file"),
        (b"#" * 5000, "a line of more"),
        (b"\xff", "not val"),
    ):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ValueError, match=said):
            config.parse(tmp_path / "a")


def test_a_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    flags = ["--out", "~/x", "--corpus.name=~/y", "--pretrained", "~/z"]
    c = config.read(ROOT / "configs/ci.toml", train.Config, flags)
    assert [c.out, c.corpus.name, c.pretrained] == [str(tmp_path / name) for name in "xyz"]
    parser = config.Parser("")
    parser.add_argument("--out", type=Path, default="~/x")
    assert parser.parse_args([]).out == parser.parse_args(["--out=~/x"]).out == tmp_path / "x"


# ---- How a program ends ------------------------------------------------------------------------------------

PROGRAM = """
import starting
starting.starting()
import sys, time, config
if "imports" in sys.argv:
    print("ready", flush=True)
    for _ in range(400): time.sleep(0.05)
def main():
    {action}
config.command_line(main)
"""
WAITING = "print('ready', flush=True)\n    for _ in range(400): time.sleep(0.05)"
WITH_BAR = "from tqdm import tqdm; bar = tqdm(total=9); bar.update(); "


def program(action: str, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM.format(action=action), *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT} | options
    return subprocess.Popen(command, **options)


@pytest.mark.parametrize(
    "action, code, said",
    [
        ("raise ValueError('bad\\nthing')", 1, "error: bad thing"),
        ("raise ValueError('bad \\x1b[2J')", 1, r"error: bad \x1b[2J"),
        ("open('/no/such/file')", 1, "error: /no/such/file: No such file or directory"),
        (WITH_BAR + "raise OSError(28, 'No space left', 'x')", 1, "error: x: No space left"),
        ("raise KeyboardInterrupt", 130, config.INTERRUPTED),
        ("raise MemoryError('9 GB')", 1, "error: not enough memory (9 GB); make batch_size smaller or "
         "accumulate larger, or try --workers 0"),
        ("raise RuntimeError('CUDA out of memory. Tried ...')", 1, "error: not enough memory (CUDA out of "
         "memory. Tried ...); make batch_size smaller or accumulate larger, or try --workers 0"),
        ("print('fine')", 0, None),
    ],
)  # fmt: skip
def test_an_end_is_one_line_the_last_one_and_a_code(action, code, said):
    process = program(action)
    _, complaint = process.communicate()
    assert process.returncode == code and "Traceback" not in complaint
    assert complaint.splitlines()[-1:] == ([said] if said else [])


@pytest.mark.parametrize("when", ["in main", "imports"])
@pytest.mark.parametrize(
    "number, code, said", [("SIGINT", 130, "interrupted; "), ("SIGTERM", 143, "terminated; ")]
)
def test_signals_end_it_with_a_line(when, number, code, said):
    process = program(WITH_BAR + WAITING, when)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, number))
    _, complaint = process.communicate(timeout=15)
    assert process.returncode == code and "Traceback" not in complaint
    assert complaint.splitlines()[-1].startswith(said) and complaint.count(said) == 1


SLEEPER = "import time; print('here', flush=True); time.sleep(60)"


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows sends it to all")
def test_a_ctrl_c_while_a_process_is_started_is_heard_by_its_parent_alone():
    lines = (
        "import subprocess",
        "try:",
        "    with config.deaf_to_ctrl_c():",
        f"        child = subprocess.Popen([sys.executable, '-c', {SLEEPER!r}], stdout=subprocess.PIPE)",
        "        child.stdout.readline()",
        "        print('ready', flush=True)",
        "        sys.stdin.readline()",
        "    time.sleep(20)",
        "finally:",
        "    print(child.poll(), flush=True)",
        "    child.kill()",
    )
    process = program("\n    ".join(lines), stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to both
    time.sleep(0.2)
    output, complaint = process.communicate("go on\n", timeout=15)
    assert (output, process.returncode) == ("None\n", 130)
    assert complaint.splitlines()[-1].startswith("interrupted; ")


CALLED_BACK = """import io, signal, numpy as np
    from data import audio, augment
    class Memory(io.BytesIO):  # libsndfile calls it back, and cffi ignores what it raises
        def write(self, content):
            signal.raise_signal(signal.SIGINT)
            return super().write(content)
    def lines():
        signal.raise_signal(signal.SIGINT)
        yield "text"
    audio.io = augment.io = type("io", (), {"BytesIO": Memory})
    wav = np.full(1600, 0.1, np.float32)
    """


@pytest.mark.parametrize(
    "work",
    [
        "audio.save(sys.argv[1], wav)",
        "augment.encode(wav, 'opus')",
        "from tokenizer import Tokenizer; Tokenizer.train(lines(), sys.argv[1], 600, 5)",
    ],
    ids=["a file is written", "a codec", "a tokenizer"],
)
def test_a_signal_that_comes_while_c_calls_back_is_heard(work, tmp_path):
    process = program(CALLED_BACK + work, str(tmp_path / "a.flac"))
    said, complaint = process.communicate(timeout=30)
    assert process.returncode == 130 and complaint.startswith("interrupted; "), complaint
    assert complaint.count("\n") == 1 and not list(tmp_path.iterdir())


def test_of_many_ranks_one_says_that_they_were_terminated():
    process = program(WAITING, env=os.environ | {"RANK": "3"})
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.communicate() == ("", "") and process.returncode == 143


def test_an_output_that_nobody_reads_and_a_full_one_are_told():
    process = program("for i in range(100_000): print('line', i)")
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    complaint = process.stderr.read()
    assert complaint == "error: nobody reads the output any more; what was finished is kept\n"
    assert process.wait() == 1
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            process = program("print('line')", stdout=full)
            assert process.communicate()[1] == "error: [Errno 28] No space left on device\n"
            assert process.returncode == 1


def test_what_a_code_page_lacks_is_replaced():
    """Output that is redirected on Windows."""
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    process = program(r"print('\u2047 \u00fc'); raise ValueError('\u6f22')", env=environment, text=False)
    assert process.communicate() == (b"? \xfc\n", b"error: ?\n")


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

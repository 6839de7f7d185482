"""Configuration: a dataclass for every section of a TOML file, and flags that overrule it.

A config file is a list of sections, one for each dataclass; the defaults stand in the dataclass, next to
their meaning:

    out = "out/tiny"                 # keys above the first section belong to the run itself
    [stage2]
    steps = 2000
    lr = 3e-3

and on the command line the same names, dotted:

    python train.py configs/tiny.toml --stage2.steps 100 --out /tmp/try

Nothing in a config file is executed. An unknown key, a value of the wrong type or beyond its limits: one
readable line.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple, NoReturn

from files import harmless, show
from starting import INTERRUPTED, TERMINATED, end_at_once, on_signal, signals_held

MOST_BYTES = 65_536  # of a config file; an honest one has 5 kB
MOST_COLUMNS = 4096  # of a line in it: the time that tomllib takes is the square of a dotted key's length


class Limits(NamedTuple):
    """What a number may be: the annotation of a field, as in `share: Annotated[float, Limits(0, 1)] =
    0.5`."""

    least: float
    most: float = math.inf


Whole = Annotated[int, Limits(0, 4e9)]
Count = Annotated[int, Limits(1, 4e9)]
Size = Annotated[int, Limits(1, 65536)]  # of a layer
Share = Annotated[float, Limits(0, 1)]
Amount = Annotated[float, Limits(0, 1e9)]
Positive = Annotated[float, Limits(0.001, 1000)]
BatchSize = Annotated[int, Limits(1, 16_384)]  # ten times the paper's; more would only fill the memory


def coerce(value, hint, where: str):
    """`value` as type `hint` says (ints serve as floats, lists as tuples), else ValueError naming the
    place."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value, (least, most) = coerce(value, arguments[0], where), arguments[1]
        if not least <= value <= most:  # NaN neither
            limits = f"at least {least:g}" if value < least and most >= 1e9 else f"{least:g} to {most:g}"
            raise ValueError(f"{where}: must be {limits}, found {show(value)}")
        return value
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{where}: choose {' or '.join(map(repr, arguments))}, found {show(value)}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        *others, last = (choice for choice in arguments if choice is not types.NoneType)
        for choice in others:
            with contextlib.suppress(ValueError):
                return coerce(value, choice, where)
        return coerce(value, last, where)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        inner = arguments if origin is tuple and ... not in arguments else arguments[:1] * len(value)
        if len(inner) != len(value):
            raise ValueError(f"{where}: expected {len(inner)} values, found {show(value)}")
        return origin(coerce(item, of, where) for item, of in zip(value, inner))
    if origin is dict and isinstance(value, dict):  # dict[str, Share]: keys of the user's own
        return {key: coerce(item, arguments[1], f"{where}, key {show(key)}") for key, item in value.items()}
    if hint is dict and isinstance(value, dict):
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return load(hint, value, where)
    if hint is float and (type(value) is float or type(value) is int and abs(value) < 2**1000):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    expected = "a list" if origin in (list, tuple) else "a table" if origin is dict else hint.__name__
    raise ValueError(f"{where}: expected {expected}, found {show(value)}")


def load(cls, table: dict, where: str):
    """A `cls` from one TOML table; `where` (file and section) begins every complaint."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key[:100], fields, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(fields))}"
            raise ValueError(f"{where}: unknown key {show(key)}; {advice}")
    for name, field in fields.items():
        without = field.default is field.default_factory is dataclasses.MISSING
        if without and name not in table:
            raise ValueError(f"{where}: key '{name}' is missing; give it a value")
    values = {key: coerce(value, hints[key], f"{where}, key '{key}'") for key, value in table.items()}
    try:
        return cls(**values)
    except ValueError as problem:  # two values that do not fit together
        raise ValueError(f"{where}: {problem}") from None


def read(path: str | Path, schema: type, flags: list[str] = ()):
    """The config file at `path`, with `--section.key value` flags laid over it, as the dataclass `schema`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file; see configs/ for examples")
    try:
        table = parse(path)
        for flag, value in pair_flags(flags):
            *sections, key = flag.split(".")
            place = table
            for section in sections:
                place = place.setdefault(section, {})
                if not isinstance(place, dict):
                    raise ValueError(f"--{flag}: '{section}' is a value, not a section")
            place[key] = toml_value(value)
        return load(schema, table, str(path))
    except ValueError as problem:
        raise ValueError(harmless(str(problem))) from None


def parse(path: Path) -> dict:
    """The tables of a TOML file, or a ValueError."""
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path}: it is no config file, with more than {MOST_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")  # Windows' Notepad begins a file with a byte order mark
        if any(len(line) > MOST_COLUMNS for line in text.split("\n")):
            raise ValueError(f"a line of more than {MOST_COLUMNS} characters")
        return tomllib.loads(text)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path}: not valid TOML ({problem}); mend that line") from None


def pair_flags(flags: list[str]) -> list[tuple[str, str]]:
    """['--a.b', '1', '--c=2'] -> [('a.b', '1'), ('c', '2')]."""
    pairs, rest = [], list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"unexpected argument {show(flag)}; options look like --stage2.steps 100")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise ValueError(f"--{name} needs a value, as in --{name} 100")
            value = rest.pop(0)
        pairs.append((name, value))
    return pairs


def toml_value(text: str):
    """'3' -> 3, '1e-3' -> 0.001, 'true' -> True, '[1, 2]' -> [1, 2]; anything else is a string."""
    try:
        return text if len(text) > MOST_COLUMNS else tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def folder(text: str) -> Path:
    """The type of a flag that names a folder or file: ~ is the home folder, also in --out=~/x."""
    return Path(text).expanduser()


class Parser(argparse.ArgumentParser):
    """Flags, spelled out; a mistake in them is a ValueError, hence one line (`command_line`). In a Path, ~ is
    the home folder."""

    def __init__(self, description: str, **options):
        super().__init__(description=description, allow_abbrev=False, **options)
        self.register("type", Path, folder)

    def error(self, message: str):
        raise ValueError(f"{message}; see {self.prog} --help")


# ---- How a program ends ------------------------------------------------------------------------------------
# Whatever ends it early is one line, the last one, and a code: 1 a mistake or a full disk, 130 Ctrl-C, 143
# SIGTERM; 0 if SIGTERM has come between two steps of training, which are then saved first.

STOPPED = "told to end; step {step} is saved, the same command continues"
AGAIN = 5.0  # seconds: a signal that soon after the first is the same one on another way (of torchrun)
# What a cluster sends before it takes a machine back. Windows has only the first.
WARNINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "allocate memory",
    "bad alloc",
    "shared memory",
    "</torch_",
)


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT: what is open is closed, and child processes are ended."""


@contextlib.contextmanager
def told_to_end() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM and SIGUSR1 end nothing at once: yields a function that says whether one has come, for
    the caller to ask between two steps. A second one ends the program where it is."""
    first: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, frame):
        if first and time.monotonic() - first[0] > AGAIN:
            terminate(number, frame)
        first.append(time.monotonic())

    heard = [number for number in WARNINGS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield lambda: bool(first)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if first:  # after the last step
        raise Terminated


def leave_end_to_parent():
    """In a process forked by this one: SIGTERM ends it only if its parent sends it. A cluster sends it to
    all."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS, where no cluster is
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)

    def wait():
        while signal.sigwaitinfo(WARNINGS).si_pid != os.getppid():
            continue
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """A process started inside leaves Ctrl-C to its parent, from its first moment on (but on Windows). A
    signal that arrives meanwhile is delivered afterwards, not lost."""
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    # A new process inherits the blocked signals, but no handler. Other threads of this process still receive
    # the signal, and Python then calls the handler.
    can_block = hasattr(signal, "pthread_sigmask")
    with signals_held():
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]) if can_block else None
        try:
            yield
        finally:
            if can_block:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def end_with_parent() -> None:
    """In a process started by this one: leaves Ctrl-C to its parent, and ends when that does, in whatever
    way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()  # returns however it ended, by SIGKILL, too
    os._exit(1)


def terminate(number: int, frame):
    signal.signal(number, signal.SIG_IGN)  # once is enough
    raise Terminated


def command_line(main: Callable[[], None]):
    """Runs `main`; a mistake of the user (ValueError, OSError) is one line on stderr and exit code 1.

    DEBUG=1 in the environment shows the traceback instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Windows writes what its code page lacks to a pipe as an error
            stream.reconfigure(errors="replace")
    if os.environ.get("DEBUG"):
        return main()
    if threading.current_thread() is threading.main_thread():
        on_signal(signal.SIGINT, end_at_once, signal.default_int_handler)
        for number in WARNINGS:
            for before in (signal.SIG_DFL, end_at_once):
                on_signal(number, before, terminate)
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except KeyboardInterrupt:
        end(INTERRUPTED, 130)
    except Terminated:
        end(TERMINATED, 143)
    except (ValueError, OSError) as problem:
        message = str(problem)
        if isinstance(problem, OSError) and problem.strerror and problem.filename:
            message = f"{problem.filename}: {problem.strerror}"
        elif isinstance(problem, BrokenPipeError):  # of `| head`
            message = "nobody reads the output any more; what was finished is kept"
        end(f"error: {message}", 1)
    except (MemoryError, RuntimeError) as problem:  # torch says it in many ways
        if not isinstance(problem, MemoryError) and not any(no in str(problem).lower() for no in NO_MEMORY):
            raise
        advice = "make batch_size smaller or accumulate larger, or try --workers 0"
        end(f"error: not enough memory ({str(problem)[:100]}); {advice}", 1)


def end(message: str, code: int) -> NoReturn:
    """Prints the last line, below all progress bars, and exits. Of many ranks that were told to end, the
    first alone prints it."""
    with contextlib.suppress(OSError, ValueError):
        for bar in list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else []:
            bar.close()
    try:
        if sys.stdout:
            sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python will flush stdout once more
    if code == 1 or os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError, ValueError):
            after_ctrl_c = "\n" if code == 130 and sys.stderr and sys.stderr.isatty() else ""
            print(after_ctrl_c + harmless(message), file=sys.stderr, flush=True)
    sys.exit(code)

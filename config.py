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
import os
import sys
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple


class Limits(NamedTuple):
    """What a number may be: the annotation of a field, as in `share: Annotated[float, Limits(0, 1)] =
    0.5`."""

    least: float
    most: float = math.inf


Whole = Annotated[int, Limits(0)]
Count = Annotated[int, Limits(1)]
Size = Annotated[int, Limits(1, 65536)]  # of a layer
Share = Annotated[float, Limits(0, 1)]
Amount = Annotated[float, Limits(0, 1e9)]
Positive = Annotated[float, Limits(0.001, 1000)]


def coerce(value, hint, where: str):
    """`value` as type `hint` says (ints serve as floats, lists as tuples), else ValueError naming the
    place."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value, (least, most) = coerce(value, arguments[0], where), arguments[1]
        if not least <= value <= most:  # NaN neither
            limits = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
            raise ValueError(f"{where}: must be {limits}, found {value!r}")
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
            raise ValueError(f"{where}: expected {len(inner)} values, found {value!r}")
        return origin(coerce(item, of, where) for item, of in zip(value, inner))
    if hint is dict and isinstance(value, dict):
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return load(hint, value, where)
    if hint is float and (type(value) is float or type(value) is int and abs(value) < 2**1000):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    expected = "a list" if origin in (list, tuple) else hint.__name__
    raise ValueError(f"{where}: expected {expected}, found {value!r}")


def load(cls, table: dict, where: str):
    """A `cls` from one TOML table; `where` (file and section) begins every complaint."""
    hints = typing.get_type_hints(cls, include_extras=True)
    names = {field.name for field in dataclasses.fields(cls)}
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(names))}"
            raise ValueError(f"{where}: unknown key '{key}'; {advice}")
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - table.keys()):
        raise ValueError(f"{where}: key '{missing[0]}' is missing; give it a value")
    return cls(**{key: coerce(value, hints[key], f"{where}, key '{key}'") for key, value in table.items()})


def read(path: str | Path, schema: type, flags: list[str] = ()):
    """The config file at `path`, with `--section.key value` flags laid over it, as the dataclass `schema`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file; see configs/ for examples")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path}: not valid TOML ({problem}); mend that line") from None
    for flag, value in pair_flags(flags):
        *sections, key = flag.split(".")
        place = table
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ValueError(f"--{flag}: '{section}' is a value, not a section")
        place[key] = toml_value(value)
    return load(schema, table, str(path))


def pair_flags(flags: list[str]) -> list[tuple[str, str]]:
    """['--a.b', '1', '--c=2'] -> [('a.b', '1'), ('c', '2')]."""
    pairs, rest = [], list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"unexpected argument '{flag}'; options look like --stage2.steps 100")
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
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


class Parser(argparse.ArgumentParser):
    """Flags, spelled out; a mistake in them is a ValueError, hence one line (`command_line`)."""

    def __init__(self, description: str, **options):
        super().__init__(description=description, allow_abbrev=False, **options)

    def error(self, message: str):
        raise ValueError(f"{message}; see {self.prog} --help")


def command_line(main: Callable[[], None]):
    """Runs `main`; a mistake of the user (ValueError, OSError) is one line on stderr and exit code 1.

    DEBUG=1 in the environment shows the traceback instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Windows writes what its code page lacks to a pipe as an error
            stream.reconfigure(errors="replace")
    if os.environ.get("DEBUG"):
        return main()
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept, the same command continues", file=sys.stderr)
        sys.exit(1)
    except (ValueError, OSError) as problem:
        message = " ".join(str(problem).split())
        if isinstance(problem, OSError) and problem.strerror and problem.filename:
            message = f"{problem.filename}: {problem.strerror}"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)

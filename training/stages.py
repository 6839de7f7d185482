"""The order of stages: finished ones are skipped, interrupted ones resume, changed settings are refused.

A stage keeps three things in out/state/STAGE: config.json, what it was begun with; its own state while it
works; done.json when it is finished. It continues only with what it was begun with, so that the result of a
killed run is the result of one that was not:

    sections   its settings, and the seed
    after      when the stages whose results it uses were finished
    corpus     the fingerprint of what it reads of the manifest and of the dialogues

As long as nothing is saved beside config.json, it binds nobody: a mistake that is refused can be corrected.

    run_stage(STAGES, "stage1", run, config)
    with in_parallel(...):                     a stage in a second process, on half of the cores
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch

from config import command_line, deaf_to_ctrl_c, end_with_parent, load
from files import fingerprint, one_line, read_json, show, stream_jsonl, write_json
from run import Run, barrier, rank, world_size
from training import states
from training.loop import MAY_CHANGE

SOUND = ("id", "wav", "speaker", "split", "seconds")  # fields of the manifest that say nothing of its texts


def never(config) -> bool:
    return False


def sound_alone(config) -> tuple[str, ...]:
    return SOUND


class Stage(NamedTuple):
    """A row of the table STAGES in train.py."""

    starts_from: str  # this and the next four are the columns of `python train.py --stages`
    trains: str
    reads: str
    loss: str
    paper: str
    work: Callable[[Run, object], None]  # (run, config)
    after: tuple[str, ...]  # stages whose results it uses
    # keys of the config, such as "text" or "units.clusters", that its result depends on, besides `seed` and
    # those of the stages before it
    sections: tuple[str, ...]
    skip: Callable[[object], bool] = never  # config -> is there nothing to do?
    # config -> fields of the manifest that its result depends on; None: all of it, and the dialogues
    fields: Callable[[object], tuple[str, ...]] | None = None


def run_stage(stages: dict[str, Stage], name: str, run: Run, config):
    """Runs one stage, unless it is finished. ValueError if a stage before it is not, or if what it was begun
    with has changed."""
    stage = stages[name]
    folder = run.state(name)
    if stage.skip(config):
        if rank() == 0:
            print(f"stage {name}: nothing to do with these settings", flush=True)
        return
    for before in stage.after:
        if finished(stages, before, run, config) is None:
            raise ValueError(
                f"stage {name} needs stage {before}, which is not finished; run --stage {before} first"
            )
    check_unchanged(stages, name, run, config)
    done = folder / "done.json"
    if finished(stages, name, run, config) is not None:
        if stage.after or (run.manifest.exists() and read_done(done)[1] == source(run)):
            if rank() == 0:
                print(f"stage {name}: finished before, {folder} says so")
            return
        if rank() == 0:
            print(f"stage {name}: {run.corpus} has changed since and is read again", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        write_json(folder / "config.json", record(stages, name, run, config))
        threads = torch.get_num_threads()
        print(f"stage {name} on {run.device}, {world_size()} process(es), {threads} threads", flush=True)
    barrier()  # nobody looks at the record before it is written
    began = time.perf_counter()
    stage.work(run, config)
    if rank() == 0:
        ended = {"finished": time.time(), "seconds": time.perf_counter() - began}
        write_json(done, ended | ({} if stage.after else {"source": source(run)}))
        for state in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
            states.remove(state)
    barrier()


def source(run: Run) -> str:
    """The fingerprint of what stage corpus reads (the tiny world: of what it makes)."""
    return fingerprint(run.corpus / "manifest.jsonl", run.corpus / "dialogues.jsonl")


def finished(stages: dict[str, Stage], name: str, run: Run, config) -> float | None:
    """When a stage was finished (seconds since 1970), 0 if it is skipped, or None."""
    if stages[name].skip(config):
        return 0.0
    done = run.state(name) / "done.json"
    return read_done(done)[0] if done.exists() else None


def read_done(path: Path) -> tuple[float, str]:
    """(when a stage was finished, the fingerprint of its source or "")."""
    with damaged(path):
        table = read_json(path)
        when = table["finished"]
        if type(when) not in (int, float) or not 0 <= when < math.inf:
            raise ValueError('"finished" must be a time')
        return when, str(table.get("source", ""))


@contextlib.contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Says what to do where a record is not as it should be."""
    try:
        with one_line(path):
            yield
    except ValueError as problem:
        what = str(problem).removeprefix(f"{path}: ")  # read_json has named it, too
        raise ValueError(f"{path}: {what}; delete {path.parent} to begin anew") from None


# ---- What a stage was begun with ---------------------------------------------------------------------------


def record(stages: dict[str, Stage], name: str, run: Run, config) -> dict:
    """What config.json says."""
    stage = stages[name]
    return {
        "sections": {key: to_json(attrgetter(key)(config)) for key in ("seed", *stage.sections)},
        "after": {before: finished(stages, before, run, config) for before in stage.after},
        "corpus": read_of_corpus(stage, run, config),
    }


def read_of_corpus(stage: Stage, run: Run, config) -> str:
    """The fingerprint of what a stage reads of the run's manifest and dialogues; "" before there are any."""
    if not stage.after or not run.manifest.exists():
        return ""
    if stage.fields is None:
        return fingerprint(run.manifest, run.manifest.with_name("dialogues.jsonl"))
    state = run.manifest.stat()
    return fingerprint_of_fields(
        run.manifest, (state.st_size, state.st_mtime_ns), tuple(stage.fields(config))
    )


@lru_cache
def fingerprint_of_fields(path: Path, state: tuple[int, int], fields: tuple[str, ...]) -> str:
    """Of some fields of a table, as of a list of lists in JSON; row by row, and once for each state of it."""
    digest = hashlib.blake2b(b"[", digest_size=16)
    for number, row in enumerate(stream_jsonl(path)):
        digest.update(b", " * (number > 0) + json.dumps([row.get(field) for field in fields]).encode())
    digest.update(b"]")
    return digest.hexdigest()


def begun(folder: Path) -> bool:
    """Has a stage saved anything in its folder, besides the record of what it was begun with?"""
    others = (folder / "config.json", folder / "log.txt")
    files = (path for path in folder.rglob("*") if path.is_file() and path not in others)
    return any(not path.name.startswith(".") for path in files)  # .NAME.tmp: of a killed process


def check_unchanged(stages: dict[str, Stage], name: str, run: Run, config, settings_alone: bool = False):
    """ValueError, one line, if a stage was begun with other settings, results of other stages, or another
    corpus."""
    folder = run.state(name)
    path = folder / "config.json"
    if stages[name].skip(config) or not (path.exists() and begun(folder)):
        return
    with damaged(path):
        table = read_json(path)
        settings, after = dict(table["sections"]), dict(table["after"])
        for key in settings:
            section = getattr(config, key, None)
            if dataclasses.is_dataclass(section):
                settings[key] = as_it_was(section, settings[key])
    later = [other for other in followers(stages, name) if begun(run.state(other))]
    anew = f"delete {folder} to begin anew" + (f", and {', '.join(later)} beside it" if later else "")
    for key, old in settings.items():
        try:
            setting = to_json(attrgetter(key)(config))
        except AttributeError:  # known to another version alone
            continue
        if change := first_change(old, setting):
            where, was, value = change
            what = f"[{key}] {where}" if where else key
            raise ValueError(
                f"stage {name} was begun with {what} = {was}, now it is {value}; "
                f"put the old value back, or {anew}"
            )
    if settings_alone:
        return
    now = record(stages, name, run, config)
    for stage, when in now["after"].items():
        if stage != "corpus" and when != after.get(stage):
            raise ValueError(f"stage {name} was begun before stage {stage} was made anew; {anew}")
    if now["corpus"] and table.get("corpus", now["corpus"]) != now["corpus"]:
        others = [other for other in outdated(stages, run, config) if other != name]
        anew = f"delete {folder} to begin anew" + (f", and {', '.join(others)} beside it" if others else "")
        raise ValueError(
            f"stage {name} was begun with other recordings or texts than {run.manifest} has now; "
            f"put the old ones back and run --stage corpus, or {anew}"
        )


def outdated(stages: dict[str, Stage], run: Run, config) -> list[str]:
    """The stages that were begun with another corpus than that of now, and those that use their results."""
    found = set()
    for name, stage in stages.items():  # they are in order
        path = run.state(name) / "config.json"
        if stage.skip(config) or not (path.exists() and begun(path.parent)):
            continue
        with damaged(path):
            before = read_json(path).get("corpus", "")
        now = read_of_corpus(stage, run, config)
        if now and before and before != now or found & set(stage.after):
            found.add(name)
    return [name for name in stages if name in found]


def followers(stages: dict[str, Stage], name: str) -> list[str]:
    """The stages that use the result of stage `name`, directly or not."""
    found = [name]
    for other, stage in stages.items():  # they are in order
        if set(stage.after) & set(found):
            found.append(other)
    return found[1:]


def as_it_was(section, old: dict):
    """The section of a record with today's keys: one that its version did not know had its default."""
    known = {field.name for field in dataclasses.fields(section) if field.init}
    table = {key: value for key, value in old.items() if key in known}
    return to_json(load(type(section), table, "sections"))


def first_change(old: object, now: object, where: str = "") -> tuple[str, str, str] | None:
    """(dotted key, old value, new value) of the first setting that may not change and has."""
    if isinstance(old, dict) and isinstance(now, dict):
        for key in sorted({*old, *now} - MAY_CHANGE - {"workers"}):
            if change := first_change(old.get(key), now.get(key), f"{where}.{key}".lstrip(".")):
                return change
        return None
    return None if old == now else (where, show(old), show(now))


def to_json(value):
    """A dataclass as JSON would give it back."""
    return json.loads(json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value))


def table_of(stages: dict[str, Stage]) -> str:
    """What `python train.py --stages` prints."""
    lines = []
    for name, stage in stages.items():
        lines.append(name)
        for question in ("starts_from", "trains", "reads", "loss", "paper"):
            lines.append(f"    {question.replace('_', ' '):11} {getattr(stage, question)}")
    return "\n".join(lines)


# ---- Two stages at a time ----------------------------------------------------------------------------------
# Matrices as small as those of the tiny world hardly profit from a second core (LOG.md), so on a CPU two
# stages that need nothing of each other run faster on half of the cores each.


def in_background(
    stages: dict[str, Stage], names: tuple[str, ...], run_some: Callable, run: Run, config
) -> contextlib.AbstractContextManager:
    """Context manager: runs the stages `names` by run_some(names, run, config), which can be pickled, in a
    second process on half of the cores and joins it on exit; yields a function that raises ValueError if it
    failed. Without cores to share it runs them first."""
    names = tuple(name for name in names if not stages[name].skip(config))
    able = run.device.type == "cpu" and world_size() == 1 and torch.get_num_threads() > 1
    is_shared = able and config.parallel_stages
    if is_shared and any(finished(stages, name, run, config) is None for name in names):
        alone = dataclasses.replace(run, workers=0)  # a background process may have none of its own
        work = partial(run_some, names, alone, config)
        return in_parallel(work, f"stage {' and '.join(names)}", run.state(names[-1]) / "log.txt")
    run_some(names, run, config)
    return on_half_of_the_cores() if is_shared else contextlib.nullcontext(lambda: None)


@contextlib.contextmanager
def in_parallel(work: Callable[[], None], title: str, log: Path) -> Iterator[Callable[[], None]]:
    """Runs `work` (picklable) in a second process on half of the cores; inside the context this process has
    the rest.

    Yields a function that raises ValueError if the other process has failed, for the caller to call now and
    then. On exit waits for it, showing its progress bar. Its output goes to the file `log`.
    """
    cores = torch.get_num_threads()
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("", encoding="utf-8")
    print(f"{title} in parallel with what follows, on {cores // 2} of {cores} threads: {log}", flush=True)
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=work_in_child, args=(work, cores // 2, log), daemon=True)
    with deaf_to_ctrl_c():
        child.start()

    def check():
        if child.exitcode:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [
                "it printed nothing"
            ]
            why = lines[-1].removeprefix("error: ")
            raise ValueError(f"{title} ended with code {child.exitcode}: {why} ({log})")

    with on_half_of_the_cores():
        try:
            yield check
            print(f"waiting for {title}", flush=True)
            shown = log.stat().st_size
            while child.is_alive():
                child.join(1)
                with log.open("rb") as file:
                    file.seek(shown)
                    sys.stderr.write(file.read().decode(errors="replace"))
                    shown = file.tell()
        finally:  # also when the stages of this process have failed
            child.terminate()
            child.join(5)
            child.kill()
            child.join()
    check()


@contextlib.contextmanager
def on_half_of_the_cores() -> Iterator[Callable[[], None]]:
    """Half of the threads for this process. A resumed run needs them too if the other process has finished
    before: rounding of sums depends on the number of threads."""
    cores = torch.get_num_threads()
    torch.set_num_threads(cores - cores // 2)
    try:
        yield lambda: None
    finally:
        torch.set_num_threads(cores)


def work_in_child(work: Callable[[], None], threads: int, log: Path):
    """The second process: output goes to `log`, and it exits when its parent dies."""
    end_with_parent()
    with (
        log.open("w", encoding="utf-8", errors="replace") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        torch.set_num_threads(threads)
        try:
            command_line(work)
        except SystemExit as ended:
            sys.exit(ended.code or 143)  # told to end, and not finished
        except Exception:
            traceback.print_exc()  # into the log
            sys.exit(1)

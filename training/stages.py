"""The order of stages: finished ones are skipped, interrupted ones resume, changed settings are refused.

A stage keeps three things in out/state/STAGE: config.json, the settings and inputs that it was begun with;
its own state while it works; done.json when it is finished. A stage continues only with the settings and
inputs that it was begun with, so that the result of a killed run is the result of one that was not.

    run_stage(STAGES, "stage1", run, config)
    with in_parallel(...):                     a stage in a second process, on half of the cores
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import torch

import checkpoint
from config import command_line
from files import read_json, write_json
from run import Run, barrier, rank, world_size
from training.loop import MAY_CHANGE


def never(config) -> bool:
    return False


class Stage(NamedTuple):
    """A row of the table STAGES in train.py."""

    starts_from: str  # this and the next four are the columns of `python train.py --stages`
    trains: str
    reads: str
    loss: str
    paper: str
    work: Callable[[Run, object], None]  # (run, config)
    after: tuple[str, ...]  # stages whose results it uses
    sections: tuple[
        str, ...
    ]  # keys of the config that its result depends on, besides those of the stages before it
    skip: Callable[[object], bool] = never  # config -> is there nothing to do?


def run_stage(stages: dict[str, Stage], name: str, run: Run, config):
    """Runs one stage, unless it is finished. ValueError if a stage before it is not, or if settings have
    changed."""
    stage = stages[name]
    folder = run.state(name)
    folder.mkdir(parents=True, exist_ok=True)
    if stage.skip(config):
        return
    inputs = {before: finished(stages, before, run, config) for before in stage.after}
    for before, when in inputs.items():
        if when is None:
            raise ValueError(
                f"stage {name} needs stage {before}, which is not finished; run --stage {before} first"
            )
    now = {"sections": {key: to_json(getattr(config, key)) for key in stage.sections}, "after": inputs}
    record = folder / "config.json"
    if record.exists():
        check_unchanged(name, folder, read_json(record), now)
    elif rank() == 0:
        write_json(record, now)
    done = folder / "done.json"
    if done.exists():
        if rank() == 0:
            print(f"stage {name}: finished before, {folder} says so")
        return

    if rank() == 0:
        threads = torch.get_num_threads()
        print(f"stage {name} on {run.device}, {world_size()} process(es), {threads} threads", flush=True)
    began = time.perf_counter()
    stage.work(run, config)
    if rank() == 0:
        write_json(done, {"finished": time.time(), "seconds": time.perf_counter() - began})
        checkpoint.remove_training(folder / "state.safetensors")
    barrier()


def finished(stages: dict[str, Stage], name: str, run: Run, config) -> float | None:
    """When a stage was finished (seconds since 1970), 0 if it is skipped, or None."""
    if stages[name].skip(config):
        return 0.0
    done = run.state(name) / "done.json"
    return read_json(done)["finished"] if done.exists() else None


def check_unchanged(name: str, folder: Path, before: dict, now: dict):
    """ValueError, one line, if the config or the inputs of a stage are not those that it was begun with."""
    if not isinstance(before, dict) or not {"sections", "after"} <= before.keys():
        raise ValueError(f"stage {name} was begun by another version; delete {folder} to begin anew")
    advice = f"put the old value back, or delete {folder} to begin anew"
    for section, value in now["sections"].items():
        if change := first_change(before["sections"].get(section), value):
            where, was, value = change
            setting = f"[{section}] {where}" if where else section
            raise ValueError(f"stage {name} was begun with {setting} = {was}, now it is {value}; {advice}")
    for stage, when in now["after"].items():
        if when != before["after"].get(stage):
            raise ValueError(
                f"stage {name} was begun before stage {stage} was made anew; delete {folder} to follow it"
            )


def first_change(old: object, now: object, where: str = "") -> tuple[str, str, str] | None:
    """(dotted key, old value, new value) of the first setting that may not change and has."""
    if isinstance(old, dict) and isinstance(now, dict):
        for key in sorted(now.keys() - MAY_CHANGE):
            if change := first_change(old.get(key), now.get(key), f"{where}.{key}".lstrip(".")):
                return change
        return None
    return None if old == now else (where, f"{old}"[:80], f"{now}"[:80])


def to_json(value):
    """A dataclass as JSON would give it back."""
    return json.loads(json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value))


# ---- Two stages at a time ----------------------------------------------------------------------------------
# Matrices as small as those of the tiny world hardly profit from a second core (LOG.md), so on a CPU two
# stages that need nothing of each other run faster on half of the cores each.


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
    child.start()
    torch.set_num_threads(cores - cores // 2)

    def check():
        if child.exitcode:
            lines = log.read_text(encoding="utf-8").strip().splitlines() or ["it printed nothing"]
            raise ValueError(f"{title} ended with code {child.exitcode}: {lines[-1]} ({log})")

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
        child.join()
        torch.set_num_threads(cores)
    check()


def work_in_child(work: Callable[[], None], threads: int, log: Path):
    """The second process: output goes to `log`, and it exits when its parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    parent = multiprocessing.parent_process()
    Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()
    with (
        log.open("w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        torch.set_num_threads(threads)
        try:
            command_line(work)
        except Exception:
            traceback.print_exc()  # into the log
            sys.exit(1)

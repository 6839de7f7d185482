"""train.py as its user meets it: processes that are started, killed and started again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import ENVIRONMENT, ROOT, metrics, stages, train

import config
from files import locked
from kmeans import KMeans
from llama import Llama
from run import Run
from text_to_unit import TextToUnit
from tokenizer import Tokenizer
from train import STAGES, Config
from training.before import check_before

pytest.importorskip("hibari", reason="the tiny world is spoken by the extra 'demo'")


def test_all_stages_of_the_language_model_run_once_and_are_then_skipped(grown):
    stages(grown, "2", "t2u", "3")
    for name in ("hubert1", "hubert2", "text", "stage1", "stage2", "t2u", "stage3"):
        lines = metrics(grown, name)
        assert [line["step"] for line in lines] == [0, 1, 2] and all(line["loss"] > 0 for line in lines)
    assert (grown / "model/llama/model.safetensors").exists() and (
        grown / "model/lora/adapter_config.json"
    ).exists()
    spoken = {json.loads(line)["text"] for line in (grown / "t2u.jsonl").read_text().splitlines()}
    dialogues = [json.loads(line) for line in (grown / "dialogues.jsonl").read_text().splitlines()]
    assert spoken and spoken <= {row[side] for row in dialogues for side in ("question", "answer")}
    assert TextToUnit.from_pretrained(grown / "model/text_to_unit").generate([""]) == [[]]
    before = (grown / "model/llama/model.safetensors").read_bytes()
    again = train("configs/ci.toml", "--out", grown, "--stage", "2")
    assert again.returncode == 0 and "finished before" in again.stdout
    assert (grown / "model/llama/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("stage, name", [("text", "text"), ("hubert", "hubert1")])
def test_a_killed_run_ends_like_one_that_was_not(spoken, tmp_path, stage, name):
    section = {"text": "text"}.get(stage, stage)
    flags = [
        f"--{section}.steps",
        9,
        f"--{section}.save_every",
        3,
        f"--{section}.eval_every",
        4,
        f"--{section}.muon",
        "true" if stage == "text" else "false",
    ]
    runs = {}
    for way in ("whole", "killed"):
        here = Path(shutil.copytree(spoken, tmp_path / way))
        if stage == "hubert":
            shutil.rmtree(here / "state/hubert")
            shutil.rmtree(here / "metrics")
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            "configs/ci.toml",
            "--out",
            str(here),
            "--stage",
            stage,
        ]
        command += map(str, flags)
        if way == "killed":
            process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
            log, state = here / f"metrics/{name}.jsonl", next(iter([here / f"state/{stage}"]))
            deadline = time.time() + 120
            while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 5):
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not (state / "done.json").exists()
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        runs[way] = metrics(here, name)
    assert len(runs["whole"]) == 9
    assert runs["killed"] == runs["whole"]  # every loss, to the last bit


@pytest.mark.parametrize(
    "flag, value, said",
    [
        ("normalizer.others", 1.5, "must be 0 to 1, found 1.5"),
        ("normalizer.perturb", "[2, 0]", "must be 0 to 1, found 2"),
        ("normalizer.temperature", 0, "must be 0.001 to 1000, found 0"),
        ("normalizer.perturb", "[0.1]", "expected 2 values, found"),
        ("units.embed_centers", -1, "must be 0 to 100, found -1"),
        ("units.smooth", 2, "must be odd"),
        ("units.smooth", 101, "must be 1 to 99, found 101"),  # units.json could not be read again
        ("lora.r", 5000, "must be 1 to 4096, found 5000"),  # nor adapter_config.json
        ("lora.alpha", 2e6, "must be 0 to 1e.06, found 2000000"),
        ("units.layer", 0, "must be at least 1, found 0"),
        ("units.layer", 2, "hubert.model has layers 1 to 1"),
        ("hubert.layer", 2, "hubert.model has layers 1 to 1"),
        ("hubert.perturb", 800, "must be 0 to 1, found 800"),
        ("stage2.unit_weight", 0, "must be 0.001 to 1000, found 0"),
        ("stage3.accumulate", 0, "must be at least 1, found 0"),
        ("stage1.lr", "nan", "must be 0 to 1e.09, found nan"),
        ("stage1.clip", "inf", "must be 0 to 1e.09, found inf"),
        ("seed", -1, "must be at least 0, found -1"),
        ("vocoder.margin", -1, "must be 0 to 1000, found -1"),
        ("vocoder.frame_steps", -1, "must be at least 0, found -1"),
        ("vocoder.frame_batch", 0, "must be 1 to 16384, found 0"),
        ("vocoder.msd_layers", "[[16, 15, 1]]", "expected 4 values, found"),
        ("evaluate.takes", 0, "must be at least 1, found 0"),
    ],
)
def test_a_number_that_cannot_be_is_told_as_the_config_is_read(flag, value, said):
    with pytest.raises(ValueError, match=said) as found:
        config.read(ROOT / "configs/ci.toml", Config, [f"--{flag}", str(value)])
    assert "\n" not in str(found.value)


def test_none_of_the_limits_takes_away_a_zero_that_says_all_or_nothing():
    zeros = [
        "evaluate.items",
        "normalizer.steps",
        "vocoder.frame_steps",
        "stage1.steps",
        "workers",
    ]
    c = config.read(ROOT / "configs/ci.toml", Config, [word for key in zeros for word in (f"--{key}", "0")])
    assert c.evaluate.items == c.normalizer.steps == c.vocoder.frame_steps == c.stage1.steps == 0
    one_round = ["--hubert.clusters", "[20]", "--hubert.layer", "9"]  # which then teaches nobody
    assert config.read(ROOT / "configs/ci.toml", Config, one_round).hubert.layer == 9


def test_a_mistaken_number_ends_train_before_anything_begins(tmp_path):
    done = train("configs/ci.toml", "--out", tmp_path / "ci", "--normalizer.temperature", 0)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "'temperature': must be 0.001 to 1000, found 0" in done.stderr and not (tmp_path / "ci").exists()


def test_stage_3_speaks_as_recorded_without_a_text_to_unit_generator(grown):
    stages(grown, "2", "t2u", "3", flags=["--stage3.speech", "recorded", "--lora.int8", "true"])
    assert metrics(grown, "stage3") and not (grown / "t2u.jsonl").exists()
    wrong = train("configs/ci.toml", "--out", grown, "--stage", "3", "--stage3.speech", "synthetic")
    assert wrong.returncode == 1 and "'speech': choose 't2u' or 'recorded', found 'synthetic'" in wrong.stderr


def test_units_can_count_less_than_text(grown):
    first = {}
    for weight in (1, 0.01):
        stages(grown, "2", flags=["--stage2.unit_weight", weight, "--stage2.steps", 1])
        first[weight] = metrics(grown, "stage2")[0]["loss"]
        shutil.rmtree(grown / "state/stage2")
    assert (
        first[1] > 0 and first[0.01] > 0 and abs(first[1] - first[0.01]) > 1e-3
    )  # another mean of the same losses


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["configs/ci.toml", "--stage", "4"], "unknown stage '4'"),
        (["configs/none.toml"], "no such config file"),
        (["configs/ci.toml", "--stage3.step", "1"], "did you mean 'steps'"),
        (["configs/ci.toml", "--verbose", "1"], "unknown key 'verbose'"),
        (["configs/ci.toml", "--device", "tpu"], "unknown device"),
        (["configs/ci.toml", "--stage", "2"], "needs stage stage1"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(tmp_path, arguments, said):
    done = train(*arguments, "--out", tmp_path / "nothing")
    assert done.returncode == 1 and said in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_config_that_does_not_fit_what_was_begun_is_refused_and_nothing_lost(out):
    stages(out, "text")
    before = (out / "text/model.safetensors").read_bytes()
    done = train("configs/ci.toml", "--out", out, "--stage", "text", "--text.lr", "1")
    assert done.returncode == 1 and "[text] lr" in done.stderr and "Traceback" not in done.stderr
    done = train("configs/ci.toml", "--out", out, "--stage", "text", "--llama.dim", "64")
    assert done.returncode == 1 and "[llama] dim" in done.stderr
    assert (out / "text/model.safetensors").read_bytes() == before


PARALLEL = """
import multiprocessing, sys, time, torch, config, train
from pathlib import Path
from run import Run
from training import stages

def main():
    c = config.read("configs/ci.toml", train.Config, sys.argv[2:])
    run = Run(Path(c.out), Path(c.out) / "corpus", c.seed, torch.device("cpu"))
    with stages.in_background(train.STAGES, ("vocoder",), train.run_some, run, c):
        pids = [child.pid for child in multiprocessing.active_children()]
        print("within", torch.get_num_threads(), *pids, flush=True)
        for _ in range(int(20 * float(sys.argv[1]))):
            time.sleep(0.05)
    print("after", torch.get_num_threads())

if __name__ == "__main__":
    config.command_line(main)
"""


def in_parallel(tmp_path: Path, out: Path, seconds: float, *flags) -> subprocess.Popen:
    (tmp_path / "parallel.py").write_text(PARALLEL)
    command = [sys.executable, tmp_path / "parallel.py", seconds, "--out", out, *flags]
    return subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def test_the_vocoder_learns_in_parallel_with_the_language_model_on_half_of_the_cores(out, tmp_path):
    said, complaint = in_parallel(tmp_path, out, 0).communicate()
    assert "within 1" in said and "after 2" in said, complaint
    assert (out / "model/vocoder/generator.safetensors").exists()
    assert "vocoder, step 7" in (out / "state/vocoder/log.txt").read_text()
    # Finished: nothing to do, but what goes on after a kill has as many threads as before it.
    said, complaint = in_parallel(tmp_path, out, 0).communicate()
    assert "finished before" in said and "within 1" in said and "after 2" in said, complaint


def test_what_goes_wrong_in_parallel_is_one_line_too(out, tmp_path):
    (out / "units.jsonl").write_text("{")
    process = in_parallel(tmp_path, out, 0)
    said, complaint = process.communicate()
    assert process.returncode == 1 and "after" not in said and "Traceback" not in complaint
    assert "units.jsonl, line 1" in complaint.splitlines()[-1] and len(complaint.splitlines()[-1]) <= 300


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_and_its_second_process_with_one_line(out, tmp_path, number, code):
    process = in_parallel(tmp_path, out, 600, "--vocoder.steps", 10_000)
    child = next(int(line.split()[-1]) for line in process.stdout if line.startswith("within"))
    began = time.time()
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(
        number
    )  # as Ctrl-C does
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == code and time.time() - began < 20
    end = config.INTERRUPTED if number == signal.SIGINT else config.TERMINATED
    assert complaint.splitlines() == [end] and "Traceback" not in (out / "state/vocoder/log.txt").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_two_runs_on_one_folder_are_one_too_many(tmp_path):
    with locked(tmp_path / "ci"):
        done = train("configs/ci.toml", "--out", tmp_path / "ci", "--stage", "corpus")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"another run is at work here (process {os.getpid()} on " in done.stderr


def test_a_mistake_is_told_before_the_first_stage(out):
    for flags, said in [
        (["--stage2.mix", "{ foo = 1 }"], "mix: foo = 1.0"),
        (
            ["--text.mix", "{ tts = 1 }"],
            "stage text comes before all units: its mix can only be { text = 1 }",
        ),
        (["--stage2.max_len", 600], "stage2.max_len is 600, but the LLaMA's own is 512"),
        (["--lora.targets", '["q"]'], "no linear layer is called 'q'"),
        (["--vocoder.msd_layers", "[[8, 15, 1, 3]]"], "[vocoder]"),
        (["--pretrained", "/no/such/folder"], "pretrained: /no/such/folder: no such folder"),
        (["--pretrained", "weights/tiny/llama"], "knows 1000 units, units.clusters is 20"),
        (["--pretrained", str(out)], "no LLaMA: no config.json"),
        (["--pretrained", "weights/tiny"], "is a whole SpeechGPT; its LLaMA is weights/tiny/llama"),
        (["--text.batch_size", 1, "--text.accumulate", 2], "text.batch_size is 1"),
        (["--seed", 5], "stage corpus was begun with seed = 0, now it is 5"),
        (["--hubert.lr", 1], "stage hubert was begun with [hubert] lr = 0.0002, now it is 1.0"),
    ]:
        with pytest.raises((ValueError, OSError)) as problem:
            c = config.read(ROOT / "configs/ci.toml", Config, [*map(str, ("--out", out, *flags))])
            run = Run(out, out / "corpus", c.seed, torch.device("cpu"))
            check_before(STAGES, tuple(STAGES), run, c)
        message = str(problem.value)
        assert said in message and "\n" not in message and len(message) <= 300


def test_a_mix_that_was_refused_can_be_corrected(grown):
    for mix, said in (("{ tts = 1, 't2t/nobody' = 1 }", "'t2t/nobody'"), ("{ tts = 1 }", "")):
        done = train("configs/ci.toml", "--out", grown, "--stage", "2", "--stage2.mix", mix)
        assert done.returncode == bool(said) and said in done.stderr and "Traceback" not in done.stderr


def test_a_changed_text_is_told_by_each_stage_that_reads_it(grown):
    """Also by one that is not begun itself, if what it begins from was made of the old text."""
    manifest = grown / "manifest.jsonl"
    before = manifest.read_text()
    manifest.write_text(before.replace('"text": "', '"text": "Well, ', 1))
    for stage in ("text", "1", "2"):
        done = train("configs/ci.toml", "--out", grown, "--stage", stage)
        assert "stage text was begun with other recordings or texts than" in done.stderr
        assert f"delete {grown / 'state/text'} to begin anew, and stage1 beside it" in done.stderr
    manifest.write_text(before)
    assert "finished before" in train("configs/ci.toml", "--out", grown, "--stage", "1").stdout


def test_the_advice_for_another_vocabulary_helps(grown):
    """Followed to the letter, until the run has what was asked for."""
    flags = ["--vocab_size", 610, "--units.clusters", 24, "--vocoder_model.num_embeddings", 24]
    advice = r"delete (\S+) to begin anew(?:, and (.*) beside it)?"
    for _ in range(5):
        done = train("configs/ci.toml", "--out", grown, "--stage", "1", *flags)
        if done.returncode == 0:
            break
        assert done.stderr.count("\n") == 1, done.stderr
        if missing := re.search(r"run --stage (\w+) first", done.stderr):
            stages(grown, missing[1], flags=flags)
            continue
        folder, later = re.search(advice, done.stderr).groups()
        for name in [Path(folder).name, *(later.split(", ") if later else [])]:
            shutil.rmtree(grown / "state" / name)
    tok = Tokenizer.from_pretrained(grown / "stage1")
    assert (tok.n_text, tok.n_units) == (610, 24)
    assert len(KMeans.from_pretrained(grown / "model/hubert").centers) == 24
    assert Llama.from_pretrained(grown / "stage1").config.vocab_size == len(tok)


def test_a_killed_run_takes_the_vocoder_in_its_second_process_along(out, tmp_path):
    process = in_parallel(tmp_path, out, 600, "--vocoder.steps", 10_000)
    child = next(int(line.split()[-1]) for line in process.stdout if line.startswith("within"))
    os.kill(child, 0)
    process.kill()
    process.communicate()
    deadline = time.time() + 30
    while time.time() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the vocoder outlived the run that it belongs to")

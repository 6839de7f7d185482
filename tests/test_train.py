"""train.py as its user meets it: processes that are started, killed and started again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import config
from checkpoint import read_tensors
from data import audio, units
from data.corpus import TARGET_SPEAKER
from data.tiny import prepare
from hubert import KMeans, UnitExtractor
from llama import Llama
from tokenizer import Tokenizer
from train import Config
from vocoder import UnitVocoder

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
pytest.importorskip("hibari", reason="the tiny world is spoken by the extra 'demo'")


def train(*arguments, launcher=(sys.executable,)):
    return subprocess.run(
        [*launcher, str(ROOT / "train.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
    )


def stages(out: Path, *names: str, flags=()):
    """One after the other, in one process: most of the time of a stage this small is importing torch."""
    arguments = ["train.py", "configs/ci.toml", "--out", *map(str, [out, *flags]), "--stage"]
    script = f"import sys, train\nfor name in {names}:\n    sys.argv = [*{arguments}, name]\n    train.main()"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-2000:]


def metrics(out: Path, name: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / f"metrics/{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """A run as far as its units: what every stage of the language model starts from."""
    out = tmp_path_factory.mktemp("run") / "ci"
    stages(out, "corpus", "hubert", "units")
    return out


@pytest.fixture
def out(spoken, tmp_path) -> Path:
    return Path(shutil.copytree(spoken, tmp_path / "ci"))


@pytest.fixture(scope="module")
def adapted(spoken, tmp_path_factory) -> Path:
    """The same as far as stage 1: a LLaMA that knows units."""
    out = Path(shutil.copytree(spoken, tmp_path_factory.mktemp("run") / "ci"))
    stages(out, "text", "1")
    return out


@pytest.fixture
def grown(adapted, tmp_path) -> Path:
    return Path(shutil.copytree(adapted, tmp_path / "ci"))


def test_all_stages_of_the_language_model_run_once_and_are_then_skipped(grown):
    stages(grown, "2", "3")
    for name in ("hubert1", "hubert2", "text", "stage1", "stage2", "stage3"):
        lines = metrics(grown, name)
        assert [line["step"] for line in lines] == [0, 1, 2] and all(line["loss"] > 0 for line in lines)
    assert (grown / "model/llama/model.safetensors").exists() and (
        grown / "model/lora/adapter_config.json"
    ).exists()
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


def test_embeddings_of_units_can_begin_as_the_centers_of_their_clusters(out):
    shutil.rmtree(out / "state/units")
    stages(out, "units", "text", "1", flags=["--units.embed_centers", 0.3, "--stage1.steps", 0])
    text, grown = (Llama.from_pretrained(out / name).state_dict() for name in ("text", "stage1"))
    places = KMeans.from_pretrained(out / "model/hubert").embeddings(32)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, units = len(text[name]), len(places)
        assert torch.equal(grown[name][:old], text[name])  # eq. 1-2
        torch.testing.assert_close(grown[name][old : old + units], places * 0.3)
        assert grown[name][old + units :].std() == pytest.approx(0.02, rel=0.2)  # markers: by chance as ever


def test_the_own_voice_is_also_heard_as_if_others_spoke(out):
    shutil.rmtree(out / "state/units")
    flags = ["--units.perturb", "[0.3, 0.2]"]
    stages(out, "units", flags=flags)
    own = {
        row["id"]: row
        for row in units.read_units(out / "corpus")
        if row["split"] == "train" and row["speaker"] == 0
    }
    rows = units.read_perturbed(out / "corpus")
    assert [row["id"] for row in rows] == list(own) and len({row["rate"] for row in rows}) == len(rows)
    for key, most in (("rate", 0.3), ("pitch", 0.2)):
        drawn = np.log([row[key] for row in rows])
        assert abs(drawn).max() <= most and np.ptp(drawn) > most
    extractor = UnitExtractor.from_pretrained(out / "model/hubert")
    for row in rows:
        assert sum(row["durations"]) == pytest.approx(sum(own[row["id"]]["durations"]) / row["rate"], abs=1.5)
        wav = audio.change_pace_and_pitch(audio.load(out / "corpus" / row["wav"]), row["rate"], row["pitch"])
        assert (row["units"], row["durations"]) == extractor(torch.from_numpy(wav))
    shutil.rmtree(out / "state/units")
    stages(out, "units")
    assert not (out / "corpus/perturbed.jsonl").exists()  # it would be of other units


def test_hubert_learns_to_give_a_sentence_the_units_of_the_own_voice_whoever_says_it(out):
    shutil.rmtree(out / "state/units")
    prepare.prepare(out / "corpus", sentences=20, renditions=len(prepare.SPEAKERS), workers=1, progress=False)
    flags = ["--normalizer.steps", 40, "--normalizer.lr", 2e-3, "--normalizer.save_every", 10]
    stages(out, "units", flags=flags)
    loss, same = ([line[key] for line in metrics(out, "normalize")] for key in ("loss", "same"))
    assert len(loss) == 40 and np.mean(loss[-8:]) < np.mean(loss[:8]) and 0 < min(same) and max(same) < 1
    found, normal = out / "state/units/found", out / "model/hubert"
    assert (found / "kmeans.safetensors").read_bytes() == (normal / "kmeans.safetensors").read_bytes()
    assert (found / "model.safetensors").read_bytes() != (normal / "model.safetensors").read_bytes()
    before, after = UnitExtractor.from_pretrained(found), UnitExtractor.from_pretrained(normal)
    rows = {row["id"]: row for row in units.read_units(out / "corpus")}
    for row in [*rows.values()][:3]:
        assert row["units"] == after(torch.from_numpy(audio.load(out / "corpus" / row["wav"])))[0]

    own = {
        row["text"] for row in rows.values() if row["split"] == "train" and row["speaker"] == TARGET_SPEAKER
    }
    with np.load(found / "targets.npz") as stored:
        targets = np.split(stored["flat"], stored["lengths"].cumsum()[:-1])
        apart = dict(zip(stored["ids"].tolist(), stored["distance"]))
        targets = dict(zip(stored["ids"].tolist(), targets))
    others = 0
    for id, target in targets.items():
        row = rows[id]
        wav = torch.from_numpy(audio.load(out / "corpus" / row["wav"]))
        assert row["split"] == "train" and row["text"] in own and len(target) == len(before.frame_units(wav))
        if row["speaker"] == TARGET_SPEAKER:
            assert target.tolist() == before.frame_units(wav).tolist() and apart[id] == 0
        else:
            assert set(target) <= set(range(20)) and apart[id] > 0
            others += 1
    train_rows = [row for row in rows.values() if row["split"] == "train" and row["text"] in own]
    assert others == sum(row["speaker"] != TARGET_SPEAKER for row in train_rows) > 50

    (out / "state/units/done.json").unlink()  # as if it had been interrupted
    manifest = out / "corpus/manifest.jsonl"
    manifest.write_text(manifest.read_text().replace(f'"{next(iter(targets))}"', '"another"'))
    done = train("configs/ci.toml", "--out", out, "--stage", "units", *flags)
    assert (
        done.returncode == 1
        and "is of other recordings than" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    "flag, value, said",
    [
        ("normalizer.others", 1.5, "must be 0 to 1, found 1.5"),
        ("normalizer.perturb", "[2, 0]", "must be 0 to 1, found 2"),
        ("normalizer.temperature", 0, "must be 0.001 to 1000, found 0"),
        ("units.perturb", "[0.1]", "expected 2 values, found"),
        ("units.embed_centers", -1, "must be 0 to 100, found -1"),
        ("units.smooth", 2, "must be odd"),
        ("units.layer", 0, "must be at least 1, found 0"),
        ("units.layer", 2, "hubert.model has layers 1 to 1"),
        ("hubert.layer", 2, "hubert.model has layers 1 to 1"),
        ("hubert.perturb", 800, "must be 0 to 1, found 800"),
        ("stage2.unit_weight", 0, "must be 0.001 to 1000, found 0"),
        ("stage3.accumulate", 0, "must be at least 1, found 0"),
        ("stage1.lr", "nan", "must be 0 to 1e.09, found nan"),
        ("stage1.clip", "inf", "must be 0 to 1e.09, found inf"),
        ("seed", -1, "must be at least 0, found -1"),
        ("vocoder.margin", -1, "must be at least 0, found -1"),
        ("vocoder.frame_steps", -1, "must be at least 0, found -1"),
        ("vocoder.frame_batch", 0, "must be at least 1, found 0"),
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


def test_model_hubert_has_no_layer_above_the_units(out):
    shutil.rmtree(out / "state/units")
    shutil.rmtree(out / "state/hubert")
    stages(out, "hubert", "units", flags=["--hubert.model.n_layers", 2, "--units.layer", 1])
    below = UnitExtractor.from_pretrained(out / "model/hubert")
    assert below.model.config.n_layers == 1 and below.layer == 1
    whole = read_tensors(out / "state/hubert/round2.safetensors")
    assert any(name.startswith("encoder.layers.1.") for name in whole)
    for name, tensor in read_tensors(out / "model/hubert/model.safetensors").items():
        assert not name.startswith("encoder.layers.1.") and torch.equal(tensor, whole[name])


def test_a_model_that_knows_other_units_is_translated(grown, tmp_path):
    stages(grown, "2", "vocoder")
    before = Path(shutil.copytree(grown / "model", tmp_path / "before"))
    old, known = Llama.from_pretrained(before / "llama"), Tokenizer.from_pretrained(before / "llama")
    centers = UnitExtractor.from_pretrained(before / "hubert").kmeans.centers
    # the units of this run: each of the old ones by another number, and one more that is never heard
    n = len(centers)
    other = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [json.loads(line) for line in (grown / "corpus/units.jsonl").read_text().splitlines()]
    frames = torch.zeros(n)
    train_ids = {
        row["id"]
        for row in map(json.loads, (grown / "corpus/manifest.jsonl").read_text().splitlines())
        if row["split"] == "train"
    }
    assert len(train_ids) <= 2000  # all of them are counted
    for row in rows:
        if row["id"] in train_ids:
            for unit, duration in zip(row["units"], row["durations"]):
                frames[unit] += duration
        row["units"] = [other[unit] for unit in row["units"]]
    (grown / "corpus/units.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(grown / "tokenizer")
    shutil.rmtree(grown / "state/stage1")
    flags = [
        "--pretrained",
        before,
        "--stage1.steps",
        0,
        "--units.clusters",
        n + 1,
        "--units.embed_centers",
        0.3,
    ]
    stages(grown, "1", flags=flags)

    new, tok = Llama.from_pretrained(grown / "stage1"), Tokenizer.from_pretrained(grown / "stage1")
    assert (
        tok.n_units == n + 1
        and tok.n_text == known.n_text
        and new.config.vocab_size == len(tok) == len(known) + 1
    )
    for name, table in old.state_dict().items():
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(new.state_dict()[name], table)
            continue
        now, units = new.state_dict()[name], table[known.unit_ids.start : known.unit_ids.stop]
        assert torch.equal(now[: tok.n_text], table[: tok.n_text])
        for marker in ("<sosp>", "<eosp>", "<eoh>", "<eoa>"):
            assert torch.equal(now[tok.added[marker]], table[known.added[marker]])
        anybody = frames @ units / frames.sum()
        of_units = (frames[:, None] * units + 0.5 * anybody) / (frames[:, None] + 0.5)
        torch.testing.assert_close(now[[tok.unit_id(u) for u in other]], of_units, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(now[tok.unit_id(n)], anybody, atol=1e-5, rtol=1e-4)

    old = UnitVocoder.from_pretrained(before / "vocoder").state_dict()
    room = "--vocoder_model.num_embeddings"
    flags_of = ["--vocoder.steps", 0, "--vocoder.frame_steps", 0, room, n + 1]
    for wider in (False, True):
        shutil.rmtree(grown / "state/vocoder")
        shape = ["--vocoder_model.context_dilations", "[3]"] if wider else []
        stages(grown, "vocoder", flags=[*flags, *flags_of, *shape])
        new = UnitVocoder.from_pretrained(grown / "model/vocoder").state_dict()
        of_units = (
            frames[:, None] * old["dict.weight"] + 0.5 * (frames @ old["dict.weight"] / frames.sum())
        ) / (frames[:, None] + 0.5)
        rest = [torch.equal(new[name], table) for name, table in old.items() if name != "dict.weight"]
        assert all(rest) != wider  # of another shape: anew
        assert torch.allclose(new["dict.weight"][other], of_units, atol=1e-5) != wider

    shutil.rmtree(grown / "state/vocoder")
    for clusters, message in (
        (centers, "num_embeddings to at least"),
        (torch.cat([centers] * 2), "vocoder knows"),
    ):
        KMeans(clusters).save(before / "hubert")
        done = train("configs/ci.toml", "--out", grown, "--stage", "vocoder", *flags, room, n)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr

    KMeans(centers[:-1]).save(before / "hubert")
    shutil.rmtree(grown / "state/stage1")
    done = train("configs/ci.toml", "--out", grown, "--stage", "1", *flags)
    assert done.returncode == 1 and "different models" in done.stderr and "Traceback" not in done.stderr


def test_units_can_count_less_than_text(grown):
    first = {}
    for weight in (1, 0.01):
        stages(grown, "2", flags=["--stage2.unit_weight", weight, "--stage2.steps", 1])
        first[weight] = metrics(grown, "stage2")[0]["loss"]
        shutil.rmtree(grown / "state/stage2")
    assert (
        first[1] > 0 and first[0.01] > 0 and abs(first[1] - first[0.01]) > 1e-3
    )  # another mean of the same losses


def test_hubert_learns_from_the_speaker_it_is_told_to(out):
    shutil.rmtree(out / "state/hubert")
    done = train("configs/ci.toml", "--out", out, "--stage", "hubert", "--hubert.speaker", 9)
    assert done.returncode == 1 and "speaker 9 has no training recording" in done.stderr
    assert "Traceback" not in done.stderr
    shutil.rmtree(out / "state/hubert")
    stages(out, "hubert", flags=["--hubert.speaker", 0, "--hubert.perturb", 0.2])
    rows = [json.loads(line) for line in (out / "corpus/manifest.jsonl").read_text().splitlines()]
    theirs = [row for row in rows if row["split"] == "train" and row["speaker"] == 0]
    assert 0 < len(theirs) < sum(row["split"] == "train" for row in rows)
    for number in (1, 2):
        with np.load(out / f"state/hubert/clusters{number}.npz") as labels:
            assert len(labels["lengths"]) == len(theirs)


LEARNED = {  # by each stage, in an order in which none changes what the next one begins with
    "stage3": "model/lora/adapter_model.safetensors",
    "stage2": "model/llama/model.safetensors",
    "stage1": "stage1/model.safetensors",
    "text": "text/model.safetensors",
    "units": "model/hubert/model.safetensors",
    "hubert": "state/hubert/round1.safetensors",
}
LANGUAGE = ("text", "stage1", "stage2", "stage3")


AGAIN = """
import os, time, torch, config, train
from pathlib import Path
from run import Run, destroy, init_distributed

c = config.read("configs/ci.toml", train.Config, {flags})
run = Run(Path({out!r}), Path({out!r}) / "corpus", c.seed, torch.device("cpu"))
init_distributed(run.device)
for name in {names}:
    if os.environ.get("RANK", "0") == "0":
        run.state(name).rename(run.state(name + "-before"))
    while (run.state(name) / "done.json").exists():
        time.sleep(0.01)
    train.run_some((name,), run, c)
destroy()
"""


def learn_again(out: Path, accumulate: int, ranks: int):
    """20 steps of 32 documents or crops in every stage, as so many micro-batches on so many processes."""
    flags = ["--normalizer.steps", 20, "--hubert.clusters", "[10]"]
    for section in ("hubert", "normalizer", *LANGUAGE):
        size = {"steps": 20, "batch_size": 32, "accumulate": accumulate, "bf16": "false", "eval_every": 1000}
        flags += [word for key, value in size.items() for word in (f"--{section}.{key}", value)]
    script = out / "again.py"
    script.write_text(AGAIN.format(flags=[*map(str, flags)], out=str(out), names=[*LEARNED]))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else ()), str(script)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def taught(adapted, tmp_path_factory) -> Path:
    """A run as far as stage 3."""
    out = Path(shutil.copytree(adapted, tmp_path_factory.mktemp("run") / "ci"))
    stages(out, "2", "3")
    return out


@pytest.fixture(scope="module")
def one_process(taught, tmp_path_factory) -> Path:
    out = Path(shutil.copytree(taught, tmp_path_factory.mktemp("run") / "ci"))
    learn_again(out, accumulate=1, ranks=1)
    return out


@pytest.mark.parametrize(
    "accumulate, ranks",
    [
        (1, 4),
        (3, 2),  # six pieces of 32: of unequal size
        pytest.param(4, 1, marks=pytest.mark.slow),
        pytest.param(1, 2, marks=pytest.mark.slow),
    ],
)
def test_many_processes_and_micro_batches_learn_what_one_learns(
    taught, one_process, tmp_path, accumulate, ranks
):
    out = Path(shutil.copytree(taught, tmp_path / "ci"))
    learn_again(out, accumulate, ranks)
    for stage, path in LEARNED.items():
        one, many = read_tensors(one_process / path), read_tensors(out / path)
        assert one.keys() == many.keys()
        far = max((one[name].float() - many[name].float()).abs().max().item() for name in one)
        assert far < 1e-6, f"{stage}: {far}"


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

def main():
    c = config.read("configs/ci.toml", train.Config, sys.argv[2:])
    run = Run(Path(c.out), Path(c.out) / "corpus", c.seed, torch.device("cpu"))
    with train.in_background(("vocoder",), run, c):
        pids = [child.pid for child in multiprocessing.active_children()]
        print("within", torch.get_num_threads(), *pids, flush=True)
        time.sleep(float(sys.argv[1]))
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
    )


def test_the_vocoder_learns_in_parallel_with_the_language_model_on_half_of_the_cores(out, tmp_path):
    said, complaint = in_parallel(tmp_path, out, 0).communicate()
    assert "within 1" in said and "after 2" in said, complaint
    assert (out / "model/vocoder/generator.safetensors").exists()
    assert "vocoder, step 7" in (out / "state/vocoder/log.txt").read_text()
    said, complaint = in_parallel(
        tmp_path, out, 0
    ).communicate()  # finished: nothing to do, and all cores stay
    assert "within 2" in said and "after 2" in said, complaint


def test_what_goes_wrong_in_parallel_is_one_line_too(out, tmp_path):
    process = in_parallel(tmp_path, out, 0, "--vocoder_model.num_embeddings", 2)
    said, complaint = process.communicate()
    assert process.returncode == 1 and "after" not in said and "Traceback" not in complaint
    assert "set vocoder_model.num_embeddings" in complaint.strip().splitlines()[-1]


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

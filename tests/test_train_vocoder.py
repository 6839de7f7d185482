"""Training the vocoder: it learns, an interrupted run continues to the last bit, mistakes are one line."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import stages
from runs import train as train_py
from tqdm import tqdm

import checkpoint
import config
import run
import train_vocoder
import vocoder
from data import audio
from data.codes import CodeDataset, datasets
from data.units import read_units
from hubert import KMeans
from run import Metrics
from train_vocoder import VocoderStage, train
from training import precision
from vocoder import UnitVocoder, VocoderConfig

ROOT = Path(__file__).resolve().parent.parent
STAGE = dict(
    steps=6,
    batch_size=4,
    segment=8,
    lr=1e-3,
    warmup=1,
    adversarial_start=3,
    spectral_weight=1.0,
    spectral_sizes=(512, 256),
    mel_weight=1.0,
    mpd_periods=(2, 3),
    mpd_channels=(4, 8),
    msd_scales=2,
    msd_layers=((4, 15, 1, 1), (8, 41, 4, 4)),
    eval_every=6,
    save_every=2,
)
MODEL = dict(
    num_embeddings=10,
    embedding_dim=8,
    model_in_dim=16,
    multispkr=True,
    num_speakers=2,
    resblock="2",
    upsample_rates=(5, 8, 8),
    upsample_kernel_sizes=(11, 16, 16),
    upsample_initial_channel=16,
    resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((1, 3),),
    dur_predictor_params={
        "encoder_embed_dim": 8,
        "var_pred_hidden_dim": 8,
        "var_pred_kernel_size": 3,
        "var_pred_dropout": 0.2,
    },
)


def make_corpus(folder: Path, rows: int = 6) -> Path:
    """A corpus of hums: each unit is a pitch."""
    rng = np.random.default_rng(0)
    (folder / "wav").mkdir(parents=True)
    manifest, units = [], []
    for i in range(rows):
        codes = rng.permutation(10)[:5]
        durations = rng.integers(1, 6, 5)
        pitch = np.repeat(100 + 50 * np.repeat(codes, durations), 320)
        wav = 0.3 * np.sin(np.cumsum(pitch) * 2 * np.pi / 16000) + 0.01 * rng.standard_normal(len(pitch))
        audio.save(
            folder / f"wav/{i}.wav", np.pad(wav, (0, 80)).astype(np.float32)
        )  # as HuBERT's frames: 80 over
        manifest.append(
            {
                "id": str(i),
                "wav": f"wav/{i}.wav",
                "text": "hum",
                "speaker": i % 2,
                "split": "heldout" if i == 0 else "train",
            }
        )
        units.append({"id": str(i), "units": codes.tolist(), "durations": durations.tolist()})
    for name, table in (("manifest", manifest), ("units", units)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return folder


@pytest.fixture
def corpus(tmp_path) -> Path:
    return make_corpus(tmp_path / "corpus")


def recordings(corpus: Path) -> dict[str, CodeDataset]:
    return datasets(corpus, read_units(corpus, corpus / "units.jsonl", 10))


def learn(corpus: Path, out: Path, stage: dict | None = None, model: dict | None = None, **options):
    train(
        VocoderStage(**STAGE | (stage or {})),
        VocoderConfig(**MODEL | (model or {})),
        recordings(corpus),
        out,
        Path(f"{out}.training"),
        partial(Metrics, Path(f"{out}.training/metrics.jsonl")),
        torch.device("cpu"),
        **options,
    )


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in Path(f"{out}.training/metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read_tensors(out / "generator.safetensors")


def state(out: Path) -> tuple[dict[str, torch.Tensor], dict]:
    return checkpoint.load_state(Path(f"{out}.training/state.safetensors"))


def test_training_writes_a_vocoder_that_speaks(corpus, tmp_path):
    out = tmp_path / "out"
    learn(corpus, out)
    steps = lines(out)
    assert [row["step"] for row in steps] == list(range(6))
    assert all(np.isfinite(value) for row in steps for value in row.values())
    losses = {"duration", "mel", "spectral", "grad_norm", "lr", "step"}
    assert steps[2].keys() == losses
    assert steps[3].keys() == losses | {"discriminator", "adversarial", "feature"}
    assert steps[5].keys() > {"held_out_mel"}
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "generator.safetensors"]
    vocoder = UnitVocoder.from_pretrained(out)
    assert len(vocoder([1, 2, 3], speaker=1, durations=[2, 2, 2])) == 6 * 320
    sample = audio.load(f"{out}.training/step-000006.wav")
    assert len(sample) % 320 == 0 and np.abs(sample).max() > 0


def test_there_are_discriminators_only_where_some_step_trains_them(corpus, tmp_path):
    sizes = {key: getattr(VocoderStage(), key) for key in STAGE if key.startswith(("mpd_", "msd_"))}
    learn(
        corpus, tmp_path / "out", sizes | dict(steps=1, adversarial_start=1)
    )  # 70 million parameters, if made
    names = checkpoint.load_state(tmp_path / "out.training/state.safetensors")[0]
    touched = [name for name in names if ".untouched." not in name]
    assert {name.split(".")[0] for name in touched} == {"generator", "spectrum", "optimizer_g"}
    assert lines(tmp_path / "out")[0].keys() >= {"spectral"}


def test_metrics_go_where_they_are_wanted_while_it_runs(corpus, tmp_path, monkeypatch):
    written = []
    save = checkpoint.save_training
    metrics = tmp_path / "metrics/vocoder.jsonl"
    monkeypatch.setattr(
        checkpoint,
        "save_training",
        lambda *arguments: (written.append(len(metrics.read_text().splitlines())), save(*arguments)),
    )
    train(
        VocoderStage(**STAGE | dict(steps=4)),
        VocoderConfig(**MODEL),
        recordings(corpus),
        tmp_path / "out",
        tmp_path / "state",
        partial(Metrics, metrics),
        torch.device("cpu"),
    )
    assert written == [2, 4]


def test_the_loss_falls(corpus, tmp_path):
    learn(corpus, tmp_path / "out", dict(steps=60, adversarial_start=100, lr=3e-3, save_every=100))
    spectral = [row["spectral"] for row in lines(tmp_path / "out")]
    assert np.mean(spectral[-5:]) < 0.8 * np.mean(spectral[:5])


def test_every_weight_of_both_sides_learns(corpus, tmp_path):
    learn(corpus, tmp_path / "out", dict(steps=1, adversarial_start=0))
    learn(corpus, tmp_path / "out2", dict(steps=3, adversarial_start=0))
    before, _ = checkpoint.load_state(tmp_path / "out.training/state.safetensors")
    after, _ = checkpoint.load_state(tmp_path / "out2.training/state.safetensors")
    for name in before:
        if name.startswith(("generator.", "discriminators.")) and not name.endswith(("._u", "._v")):
            assert not torch.equal(before[name], after[name]), f"{name} did not change"


def test_the_frame_rate_half_learns_first_and_then_stays_as_it_is(corpus, tmp_path):
    frames = dict(frame_steps=4, frame_batch=2, adversarial_start=100)
    learn(corpus, tmp_path / "short", frames | dict(steps=1))
    learn(corpus, tmp_path / "long", frames | dict(steps=3))
    learn(corpus, tmp_path / "none", dict(frame_steps=0, steps=1, adversarial_start=100))
    steps = lines(tmp_path / "long")
    assert [row["step"] for row in steps] == list(range(7))
    assert (
        all("frames" in row and "spectral" not in row for row in steps[:4]) and "held_out_frames" in steps[3]
    )
    assert all("spectral" in row and "frames" not in row for row in steps[4:])
    short, long, none = (weights(tmp_path / name) for name in ("short", "long", "none"))
    for name in short:
        first = name.startswith(("dict.", "spkr.", "conv_pre."))
        assert torch.equal(short[name], long[name]) == first, (
            name
        )  # two more steps move all but the first half
        assert not first or not torch.equal(short[name], none[name]), name


def test_the_frame_rate_half_learns(corpus, tmp_path):
    learn(corpus, tmp_path / "out", dict(frame_steps=60, frame_batch=3, frame_lr=1e-2, steps=0, bf16=True))
    errors = [row["frames"] for row in lines(tmp_path / "out")]
    assert np.mean(errors[-5:]) < 0.5 * np.mean(errors[:5])


def test_unit_embeddings_can_be_initialized_from_the_centers_of_their_clusters(corpus, tmp_path):
    torch.manual_seed(0)
    kmeans = KMeans(torch.randn(10, 12))
    learn(corpus, tmp_path / "out", dict(steps=0), kmeans=kmeans)
    assert torch.equal(weights(tmp_path / "out")["dict.weight"], kmeans.embeddings(8))
    learn(corpus, tmp_path / "random", dict(steps=0))
    assert not torch.equal(weights(tmp_path / "random")["dict.weight"], kmeans.embeddings(8))
    learn(corpus, tmp_path / "more", dict(steps=0), dict(num_embeddings=12), kmeans=kmeans)
    assert torch.equal(weights(tmp_path / "more")["dict.weight"][:10], kmeans.embeddings(8))
    with pytest.raises(ValueError, match="11 units; set vocoder_model.num_embeddings to at least 11"):
        learn(corpus, tmp_path / "fewer", kmeans=KMeans(torch.randn(11, 12)))


def test_the_centers_are_read_from_the_folder_that_the_config_names(corpus, tmp_path):
    kmeans = KMeans(torch.randn(1000, 12))
    kmeans.save(tmp_path)
    text = f'corpus = "{corpus}"\nout = "{tmp_path}/out"\nkmeans = "{tmp_path}"\ndevice = "cpu"\n'
    (tmp_path / "c.toml").write_text(
        text + "[vocoder]\nsteps = 0\n[vocoder_model]\nmultispkr = true\n"
        "model_in_dim = 256\nupsample_initial_channel = 32\n"
    )
    result = subprocess.run(
        [sys.executable, ROOT / "train_vocoder.py", "c.toml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert torch.equal(weights(tmp_path / "out")["dict.weight"], kmeans.embeddings(128))


def test_a_killed_run_continues_to_the_last_bit(corpus, tmp_path):
    frames = dict(steps=10, save_every=3, frame_steps=30, frame_batch=2)  # killed in the first part
    learn(corpus, tmp_path / "whole", frames)
    toml = [f'corpus = "{corpus}"', f'out = "{tmp_path}/killed"', 'device = "cpu"']
    for section, table in (("vocoder", STAGE | frames), ("vocoder_model", MODEL)):
        toml.append(f"[{section}]")
        toml += [
            f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)
        ]
    toml += [
        "[vocoder_model.dur_predictor_params]",
        *(f"{key} = {value}" for key, value in MODEL["dur_predictor_params"].items()),
    ]
    (tmp_path / "c.toml").write_text("\n".join(toml))
    command = [sys.executable, str(ROOT / "train_vocoder.py"), str(tmp_path / "c.toml")]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=threads)
    written = tmp_path / "killed.training/metrics.jsonl"
    deadline = time.time() + 120
    while (not written.exists() or len(written.read_bytes().splitlines()) < 8) and time.time() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists(), "it was finished before the kill"
    step = checkpoint.load_state(tmp_path / "killed.training/state.safetensors")[1]["step"]
    assert 0 < step < 40 and step % 3 == 0
    learn(corpus, tmp_path / "killed", frames)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "killed")[name]), name


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("last", [2, 5])  # of whole recordings, of crops
def test_a_warning_ends_it_after_a_step_that_is_saved(corpus, tmp_path, monkeypatch, last):
    steps = dict(frame_steps=3, frame_batch=2, steps=4, save_every=100)
    learn(corpus, tmp_path / "whole", steps)
    drawn = train_vocoder.random_numbers

    def warned(seed: int, step: int):
        if step + 1 == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return drawn(seed, step)

    with monkeypatch.context() as patch:
        patch.setattr(train_vocoder, "random_numbers", warned)
        with pytest.raises(SystemExit) as ended:
            learn(corpus, tmp_path / "out", steps)
    assert ended.value.code == 0 and state(tmp_path / "out")[1]["step"] == last
    learn(corpus, tmp_path / "out", steps)
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(tmp_path / "out").items())


def test_a_finished_run_is_not_trained_again_unless_its_state_is_deleted(corpus, tmp_path):
    learn(corpus, tmp_path / "out", dict(steps=2))
    first = weights(tmp_path / "out")["conv_pre.weight"].clone()
    learn(corpus, tmp_path / "out", dict(steps=2))
    assert len(lines(tmp_path / "out")) == 2
    assert torch.equal(weights(tmp_path / "out")["conv_pre.weight"], first)
    shutil.rmtree(tmp_path / "out.training")
    learn(corpus, tmp_path / "out", dict(steps=2, seed=1))
    assert not torch.equal(weights(tmp_path / "out")["conv_pre.weight"], first)


@pytest.mark.parametrize(
    "stage, model, message",
    [
        ({"lr": 2e-3}, {}, r"begun with \[vocoder\] lr = 0.001, now it is 0.002"),
        ({"mpd_channels": (4, 4)}, {}, r"begun with \[vocoder\] mpd_channels"),
        ({}, {"upsample_initial_channel": 32}, r"begun with \[vocoder_model\] upsample_initial_channel = 16"),
    ],
)
def test_another_config_than_the_interrupted_run_had_is_refused(corpus, tmp_path, stage, model, message):
    learn(corpus, tmp_path / "out", dict(steps=2))
    with pytest.raises(ValueError, match=message) as caught:
        learn(corpus, tmp_path / "out", dict(steps=2) | stage, model)
    assert "\n" not in str(caught.value) and "delete" in str(caught.value)
    learn(corpus, tmp_path / "out", dict(steps=2, eval_every=1))  # may change


@pytest.mark.parametrize(
    "stage, model, message",
    [
        ({}, {"num_embeddings": 5}, "num_embeddings to at least 10"),
        ({}, {"num_speakers": 1}, "num_speakers"),
        ({}, {"multispkr": None, "model_in_dim": 8}, "multispkr = true"),
        ({"segment": 1}, {}, "segment"),
    ],
)
def test_a_config_that_does_not_fit_the_corpus_is_refused(corpus, tmp_path, stage, model, message):
    with pytest.raises(ValueError, match=message):
        learn(corpus, tmp_path / "out", stage, model)
    assert not (tmp_path / "out").exists()


def test_a_vocoder_of_one_voice_learns_what_a_corpus_of_that_voice_teaches(corpus, tmp_path, monkeypatch):
    alone = Path(shutil.copytree(corpus, tmp_path / "alone"))
    rows = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text().splitlines()]
    theirs = [row for row in rows if row["speaker"] == 0]
    assert 0 < sum(row["split"] == "train" for row in theirs) < len(theirs) < len(rows)
    (alone / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in theirs))

    def learned(folder: Path, *flags: str) -> dict[str, torch.Tensor]:
        out = tmp_path / f"out-{folder.name}"
        settings = {"vocoder": STAGE, "vocoder_model": MODEL | {"num_speakers": 1}}
        table = {"corpus": str(folder), "out": str(out), "device": "cpu"} | settings
        monkeypatch.setattr(config, "parse", lambda path: json.loads(json.dumps(table)))
        monkeypatch.setattr(sys, "argv", ["train_vocoder.py", __file__, *flags])
        train_vocoder.main()
        return weights(out)

    few, all_of_it = learned(alone), learned(corpus, "--vocoder.speaker", "0")
    assert all(torch.equal(few[name], tensor) for name, tensor in all_of_it.items())
    with pytest.raises(ValueError, match="vocoder.speaker is 7, who has no training recording; .* 0, 1"):
        learned(corpus, "--vocoder.speaker", "7")


def test_a_mistake_on_the_command_line_is_one_line(corpus, tmp_path):
    (tmp_path / "c.toml").write_text(f'corpus = "{corpus}"\nout = "{tmp_path}/out"\n[vocoder]\nstep = 3\n')
    for arguments, message in (["c.toml"], "unknown key 'step'"), (["none.toml"], "no such"), ([], "usage"):
        result = subprocess.run(
            [sys.executable, ROOT / "train_vocoder.py", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1 and result.stderr.startswith("error: ") and message in result.stderr
        assert result.stderr.count("\n") == 1


def train_on_ranks(rank: int, world_size: int, corpus: Path, out: Path):
    """Twenty steps of each loop, as one of `world_size` processes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    if world_size > 1:
        store = (out.parent / f"{out.name}.store").as_uri()
        torch.distributed.init_process_group("gloo", store, rank=rank, world_size=world_size)
    model = dict(unit_dilations=(1, 2), context_dilations=(1,))
    model["dur_predictor_params"] = MODEL["dur_predictor_params"] | {"var_pred_dropout": 0.0}
    stage = dict(eval_every=100, save_every=100, clip=1.0, lr=2e-5, frame_lr=1e-3)
    learn(corpus, out / "frames", stage | dict(frame_steps=20, frame_batch=6, steps=0), model)
    gan = dict(steps=20, batch_size=3, segment=4, margin=2, adversarial_start=0)  # on four: 0, 1, 1, 1
    learn(corpus, out / "gan", stage | gan | dict(mpd_periods=(2,), msd_scales=1), model)
    run.destroy()


def test_one_process_and_many_learn_the_same(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", 12)
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["train_vocoder"])  # torch is imported once, not seven times
    runs = [
        context.Process(target=train_on_ranks, args=(rank, world_size, corpus, tmp_path / str(world_size)))
        for world_size in (1, 2, 4)
        for rank in range(world_size)
    ]
    for process in runs:
        process.start()
    for process in runs:
        process.join()
        assert process.exitcode == 0
    for name in ("frames", "gan"):
        one, *others = (tmp_path / str(world_size) / name for world_size in (1, 2, 4))
        expected = checkpoint.load_state(Path(f"{one}.training/state.safetensors"))[0]
        for many in others:
            found = checkpoint.load_state(Path(f"{many}.training/state.safetensors"))[0]
            assert found.keys() == expected.keys()
            for key in expected:
                if not key.startswith("optimizer"):
                    assert (found[key] - expected[key]).abs().max() < 1e-6, (many, key)
            for row, same in zip(lines(one), lines(many), strict=True):
                assert row == pytest.approx(same, rel=1e-3)


@pytest.mark.parametrize("loop", ["frames", "crops"])
def test_a_step_that_is_not_finite_changes_nothing_and_ten_end_the_run(corpus, tmp_path, monkeypatch, loop):
    bad = {3, 4}
    saved = []
    make = getattr(train_vocoder.CodeDataset, "recordings" if loop == "frames" else "crops")
    save = checkpoint.save_training

    def damaged(*arguments):
        batch = make(*arguments)
        return batch._replace(target=batch.target * float("nan")) if len(saved) in bad else batch

    def record(path, modules, optimizers, meta):
        save(path, modules, optimizers, meta)
        saved.append({name: t.clone() for name, t in checkpoint.load_state(path)[0].items()})

    monkeypatch.setattr(train_vocoder.CodeDataset, make.__name__, damaged)
    monkeypatch.setattr(checkpoint, "save_training", record)
    steps = dict(frame_steps=16, steps=0) if loop == "frames" else dict(steps=16, adversarial_start=0)
    learn(corpus, tmp_path / "out", steps | dict(save_every=1, eval_every=100, frame_batch=2))
    unlearned = ("._u", "._v")  # the power iteration of a spectral norm goes on
    learned = [name for name in saved[0] if not name.endswith(unlearned)]
    for step in range(1, 16):
        same = [torch.equal(saved[step - 1][name], saved[step][name]) for name in learned]
        assert all(same) if step in bad else not all(same), step
    assert {line["step"]: line["skipped"] for line in lines(tmp_path / "out") if "skipped" in line} == {
        3: 1,
        4: 2,
    }
    meta = state(tmp_path / "out")[1]
    assert meta["skipped"] == 2 and meta["skipped_in_a_row"] == 0

    saved.clear()
    bad = set(range(2, 16))
    with pytest.raises(
        ValueError, match="10 steps in a row, up to step 11; the sound of this step"
    ) as caught:
        learn(corpus, tmp_path / "again", steps | dict(save_every=1, eval_every=100, frame_batch=2))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    tensors, meta = state(tmp_path / "again")
    assert meta["step"] == 11 and meta["skipped_in_a_row"] == 9
    assert all(torch.equal(saved[1][name], tensors[name]) for name in learned)
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_discriminators_alone_that_are_not_finite_change_nothing_either(corpus, tmp_path, monkeypatch):
    loss = vocoder.discriminator_loss
    monkeypatch.setattr(vocoder, "discriminator_loss", lambda *scored: loss(*scored) * float("inf"))
    learn(corpus, tmp_path / "out", dict(steps=4, adversarial_start=2, save_every=1))
    assert [line.get("skipped") for line in lines(tmp_path / "out")] == [None, None, 1, 2]
    two, four = (
        checkpoint.load_state(tmp_path / f"out.training/state{name}.safetensors")[0]
        for name in (".previous", "")
    )
    assert all(t.isfinite().all() for t in four.values())
    assert all(name.startswith("optimizer_d.untouched.") for name in four if name.startswith("optimizer_d"))
    assert all(torch.equal(two[name], four[name]) for name in two if name.startswith("generator."))


def test_a_damaged_state_falls_back_to_the_one_before_and_ends_the_same(corpus, tmp_path, capsys):
    learn(corpus, tmp_path / "whole", dict(save_every=2))
    learn(corpus, tmp_path / "out", dict(save_every=2))
    file = tmp_path / "out.training/state.safetensors"
    data = bytearray(file.read_bytes())
    data[-30] ^= 1
    file.write_bytes(data)
    learn(corpus, tmp_path / "out", dict(save_every=2))
    assert "going on from the state before it, of step 4" in capsys.readouterr().out
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("step", [7, -1, 2.0, True, None, "2"])
def test_a_step_that_cannot_be_is_refused(corpus, tmp_path, step):
    learn(corpus, tmp_path / "out", dict(steps=2))
    tensors, meta = state(tmp_path / "out")
    tensors = {name: t.clone() for name, t in tensors.items()}
    file = tmp_path / "out.training/state.safetensors"
    checkpoint.save_state(file, tensors, meta | {"step": step})
    with pytest.raises(ValueError, match="step is .*, not a whole number of 0 to 2; delete") as caught:
        learn(corpus, tmp_path / "out", dict(steps=2))
    assert str(caught.value).startswith(f"{file}: ")


def test_each_loop_has_the_faster_format_and_a_resumed_run_goes_on_in_it(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    measured = iter([(1.0, 0.5), (1.0, 2.0)])
    monkeypatch.setattr(precision, "measure", lambda model, loss: next(measured))
    steps = dict(frame_steps=4, steps=2, adversarial_start=9, frame_batch=2, save_every=1, bf16=True)
    used = []
    features = UnitVocoder.frame_features

    def spy(*arguments):
        used.append(torch.is_autocast_enabled("cpu"))
        if len(used) == 3:
            raise KeyboardInterrupt
        return features(*arguments)

    monkeypatch.setattr(UnitVocoder, "frame_features", spy)
    with pytest.raises(KeyboardInterrupt):
        learn(corpus, tmp_path / "out", steps)
    assert state(tmp_path / "out")[1]["bf16"] == {"frames": True}
    learn(corpus, tmp_path / "out", steps)  # measures the other loop alone
    assert state(tmp_path / "out")[1]["bf16"] == {"frames": True, "crops": False}
    assert used[:5] == [True] * 5 and used[-1] is False and next(measured, None) is None


def test_measuring_a_step_of_either_loop_changes_nothing_of_the_run(corpus, tmp_path, monkeypatch):
    """Weights, buffers, random numbers: what is learned in float32 is the same, measured or not."""
    steps = dict(frame_steps=2, steps=3, frame_batch=2, adversarial_start=1, save_every=100)
    learn(corpus, tmp_path / "out", steps)
    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    monkeypatch.setattr(precision, "WORTH", 0.0)  # bfloat16 is never chosen
    measure, calls = precision.measure, []
    monkeypatch.setattr(precision, "measure", lambda *arguments: calls.append(1) or measure(*arguments))
    learn(corpus, tmp_path / "measured", steps | dict(bf16=True))
    one, other = state(tmp_path / "out")[0], state(tmp_path / "measured")[0]
    assert len(calls) == 2 and all(torch.equal(one[name], other[name]) for name in one)


def test_refused_memory_is_one_line_with_advice(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(vocoder, "mel_loss", lambda *wav: torch.empty(1 << 55))
    with pytest.raises(ValueError, match=r"vocoder: lower batch_size \(now 4\), segment \(8\)") as caught:
        learn(corpus, tmp_path / "out")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert not list(tqdm._instances)


def test_gradients_are_summed_over_the_ranks(monkeypatch):
    p = torch.nn.Parameter(torch.zeros(2, 2))
    q = torch.nn.Parameter(torch.zeros(3))
    unused = torch.nn.Parameter(torch.zeros(1))
    monkeypatch.setattr(train_vocoder.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train_vocoder.dist, "all_reduce", lambda flat: flat.add_(torch.arange(7.0)))
    (2 * p.sum() + q.sum()).backward()
    train_vocoder.sum_gradients(torch.nn.ParameterList([p, unused, q]))
    assert torch.equal(p.grad, torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
    assert torch.equal(q.grad, torch.tensor([5.0, 6.0, 7.0]))
    assert unused.grad is None


# ---- A vocoder that is given: pretrained_vocoder -----------------------------------------------------------


def test_a_given_vocoder_is_taken_as_it_is(spoken, tmp_path):
    out = Path(shutil.copytree(spoken, tmp_path / "ci"))
    torch.manual_seed(0)
    model = VocoderConfig(num_embeddings=30, upsample_initial_channel=32)
    given = UnitVocoder(model)
    given.save_pretrained(tmp_path / "given")
    flags = ("--pretrained_vocoder", tmp_path / "given")
    stages(out, "vocoder", flags=flags)
    ours = UnitVocoder.from_pretrained(out / "model/vocoder")
    assert ours.config == given.config
    assert all(torch.equal(p, given.state_dict()[name]) for name, p in ours.state_dict().items())
    assert not (out / "metrics/vocoder.jsonl").exists()


@pytest.mark.parametrize(
    "units, why", [(19, "knows 19 units, units.clusters is 20"), (None, "no such folder")]
)
def test_a_given_vocoder_that_does_not_fit_is_told_before_anything_begins(tmp_path, units, why):
    folder = tmp_path / "given"
    if units:
        small = dict(upsample_initial_channel=32)
        UnitVocoder(VocoderConfig(num_embeddings=units, **small)).save_pretrained(folder)
    done = train_py("configs/ci.toml", "--out", tmp_path / "out", "--pretrained_vocoder", folder)
    assert done.returncode == 1 and why in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out/state").exists()

"""train_vocoder.py - the one loop of another shape: a generator and its discriminators take turns (paper §4.1).

    python train_vocoder.py CONFIG.toml [--vocoder.steps 100 ...]           alone; train.py calls `train` below
    torchrun --nproc_per_node 8 train_vocoder.py CONFIG.toml                each rank takes its share of the batch

reads of CONFIG.toml the keys `corpus` (a folder with manifest.jsonl and units.jsonl), `kmeans` (optional: a folder
with the clusters of these units, to begin from), `out`, `device`, and the sections [vocoder] and [vocoder_model], both
below. The result is the folder `out`; state, metrics and samples of held-out speech are written beside it, into
`out`.training.

A step draws crops of (frames, wave) from the training rows of the manifest. The discriminators learn to tell
real speech from the generator's; then the generator learns to fool them and to match the spectrum. Everything drawn
in step n comes from (seed, n, rank), so that a killed run continues as if it had not been.

Defaults are the recipe of the released vocoder (HiFi-GAN V1 on units: Polyak et al. 2021, arXiv:2104.00355). A small
model on a CPU has no time for it: it first learns spectra alone, which costs a third, see configs/tiny.toml.
"""

import dataclasses
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import checkpoint
import config
import run
import vocoder as v
from config import Amount, Count, Share, Whole
from data import audio
from data.corpus import read_manifest
from files import read_jsonl
from hubert import KMeans
from vocoder import UnitVocoder, VocoderConfig


@dataclass
class VocoderStage:
    frame_steps: Whole = (
        0  # ours: before all others, so many for the frame-rate half alone, which then stays as it is
    )
    frame_batch: Count = 6  # whole recordings a step, over all ranks
    frame_lr: Amount = 4e-3
    steps: Whole = 400_000
    batch_size: Count = 16  # crops a step, over all ranks
    segment: Count = 28  # frames of a crop: 28 * 320 = 8960 samples
    margin: Whole = 0  # frames on either side of a crop that the generator sees and does not speak
    lr: Amount = 2e-4
    betas: tuple[Share, Share] = (0.8, 0.99)
    judge_lr: Amount | None = None  # of the discriminators; None: as the generator's
    weight_decay: Amount = 0.01
    warmup: Whole = 0  # steps
    floor: Share = 0.1  # the last learning rate, as a share of `lr`
    clip: Amount = 1000.0  # largest norm of the generator's gradient
    adversarial_start: Whole = 0  # step from which on there are discriminators
    mel_weight: Amount = 45.0
    spectral_weight: Amount = (
        0.0  # mel loss through several windows: ours, for the steps without discriminators
    )
    spectral_sizes: tuple[Count, ...] = (2048, 1024, 512, 256, 128)
    adversarial_weight: Amount = 1.0
    feature_weight: Amount = 2.0
    duration_weight: Amount = 1.0
    mpd_periods: tuple[Count, ...] = (2, 3, 5, 7, 11)
    mpd_channels: tuple[Count, ...] = (32, 128, 512, 1024, 1024)
    msd_scales: Whole = 3
    msd_layers: tuple[tuple[Count, Count, Count, Count], ...] = (  # (channels, kernel, stride, groups)
        (128, 15, 1, 1),
        (128, 41, 2, 4),
        (256, 41, 2, 16),
        (512, 41, 4, 16),
        (1024, 41, 4, 16),
        (1024, 41, 1, 16),
        (1024, 5, 1, 1),
    )
    bf16: bool = False  # convolutions in bfloat16 where that is faster
    eval_every: Count = 1000
    save_every: Count = 5000
    seed: Whole = 0


HARMLESS = {"eval_every", "save_every"}  # keys that may change while a run is interrupted


# ------------------------------------------------------------------------------------------------------ data


class Speech:
    """Rows of a manifest with their units, as random crops and as whole recordings."""

    def __init__(self, corpus: Path, units: Path, split: str):
        self.corpus = corpus
        found = {row["id"]: row for row in read_jsonl(units, ("id", "units", "durations"))}
        rows = read_manifest(corpus)
        self.rows = [row | found[row["id"]] for row in rows if row["split"] == split and row["id"] in found]
        if not self.rows and split == "train":
            raise ValueError(
                f"{corpus}: no training recording has units in {units}; run the stage 'units' first"
            )
        frames = np.array([sum(row["durations"]) for row in self.rows], dtype=np.float64)
        self.by_length = frames.argsort(kind="stable")
        self.share = frames / frames.sum()  # a long recording is drawn more often than a short one

    @lru_cache(maxsize=20_000)  # noqa: B019  (16-bit: 1.3 GB for 20,000 recordings of two seconds)
    def wave(self, i: int) -> np.ndarray:
        wav = audio.load(self.corpus / self.rows[i]["wav"])
        return np.int16(wav / max(np.abs(wav).max(), 1e-3) * 0.95 * 32767)  # units do not say how loud

    @lru_cache(maxsize=20_000)  # noqa: B019  (16-bit: 0.7 GB for as many; computed anew, it is a fifth of a step)
    def mel(self, i: int) -> Tensor:
        """What `FrameSpectrum` is to say of a recording, (80, 2 T), in half precision."""
        frames = sum(self.rows[i]["durations"])
        wave = torch.from_numpy(self.wave(i)[: frames * 320] / np.float32(32767))
        return v.FrameSpectrum.of(nn.functional.pad(wave, (0, frames * 320 - len(wave)))[None])[0].half()

    def codes(self, i: int) -> np.ndarray:
        """The unit of each frame of a recording, (T,)."""
        return np.repeat(self.rows[i]["units"], self.rows[i]["durations"])

    def crop(
        self, i: int, rng: np.random.Generator, frames: int, margin: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The wave (frames * 320,) of some frames, and their codes with those around them (margin + frames + margin,).
        Beyond the ends the first and the last code go on, silently."""
        codes = self.codes(i)
        start = rng.integers(max(1, len(codes) - frames + 1))
        wave = self.wave(i)[start * 320 : min(start + frames, len(codes)) * 320] / np.float32(32767)
        seen = np.arange(start - margin, start + frames + margin).clip(0, len(codes) - 1)
        return codes[seen], np.pad(wave, (0, frames * 320 - len(wave)))

    def alike(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Which `size` recordings go together: by chance, but neighbours in length."""
        near = min(len(self.rows), 16 * size)
        first = rng.integers(len(self.rows) - near + 1)
        return self.by_length[first + rng.choice(near, min(size, near), replace=False)]

    def recordings(self, chosen: np.ndarray) -> tuple[Tensor, ...]:
        """Whole ones: codes (B, T), log mels (B, 80, 2 T), speakers and frames (B,); and as `batch` for the duration
        predictor. After its end a recording's last code goes on; nobody looks at what is to be heard there."""
        lengths = torch.tensor([sum(self.rows[i]["durations"]) for i in chosen])
        codes = torch.zeros(len(chosen), lengths.max(), dtype=torch.long)
        mels = torch.zeros(len(chosen), v.FrameSpectrum.N_MELS, 2 * lengths.max())
        for b, (i, frames) in enumerate(zip(chosen, lengths.tolist())):
            codes[b] = self.rows[i]["units"][-1]
            codes[b, :frames] = torch.from_numpy(self.codes(i))
            mels[b, :, : 2 * frames] = self.mel(int(i))
        return codes, mels, self.speakers(chosen), lengths, *self.durations(chosen)

    def batch(self, rng: np.random.Generator, size: int, frames: int, margin: int = 0) -> tuple[Tensor, ...]:
        """Codes (B, frames + 2 * margin), waves (B, frames * 320), speakers (B,); and for the duration predictor the
        units of the whole recordings, their frames and which of them are no padding, each (B, U)."""
        chosen = rng.choice(len(self.rows), size, p=self.share)
        codes, waves = zip(*(self.crop(i, rng, frames, margin) for i in chosen))
        return (
            torch.tensor(np.stack(codes)),
            torch.tensor(np.stack(waves)),
            self.speakers(chosen),
            *self.durations(chosen),
        )

    def speakers(self, chosen: np.ndarray) -> Tensor:
        return torch.tensor([self.rows[i]["speaker"] for i in chosen])

    def durations(self, chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        rows, size = [self.rows[i] for i in chosen], len(chosen)
        units, lengths = torch.zeros(2, size, max(len(row["units"]) for row in rows), dtype=torch.long)
        for b, row in enumerate(rows):
            units[b, : len(row["units"])] = torch.tensor(row["units"])
            lengths[b, : len(row["units"])] = torch.tensor(row["durations"])
        return units, lengths, lengths > 0


# ------------------------------------------------------------------------------------------------------ loop


def train(
    stage: VocoderStage,
    model: VocoderConfig,
    corpus: Path,
    units: Path,
    out: Path,
    device: torch.device,
    resume: bool = True,
    work: Path | None = None,
    kmeans: KMeans | None = None,
    begin: UnitVocoder | None = None,
):
    """Writes the folder `out`: config.json and generator.safetensors. State, metrics and samples go to `work`.

    With `kmeans` the embeddings of the units begin as its centres; that is ours, and LOG.md says what it is worth.
    With `begin` all of the generator begins as that one."""
    out = Path(out)
    work = Path(work or f"{out}.training")
    speech, held_out = (Speech(Path(corpus), Path(units), split) for split in ("train", "heldout"))
    check(model, stage, speech)
    torch.manual_seed(stage.seed)
    generator = (begin or UnitVocoder(model)).to(device).train()
    if kmeans and not begin:
        if (k := len(kmeans.centers)) > model.num_embeddings:
            raise ValueError(f"there are {k} clusters; set vocoder_model.num_embeddings to at least {k}")
        generator.dict.weight.data[:k] = kmeans.embeddings(model.embedding_dim)
    spectrum = v.FrameSpectrum(model.channels[0]).to(device)
    judges = nn.ModuleList(
        [
            v.MultiPeriodDiscriminator(stage.mpd_periods, stage.mpd_channels),
            v.MultiScaleDiscriminator(stage.msd_scales, stage.msd_layers),
        ]
    ).to(device)
    optimizer_f, optimizer_g, optimizer_d = (
        torch.optim.AdamW(m.parameters(), stage.lr, stage.betas, weight_decay=stage.weight_decay)
        for m in (nn.ModuleList([generator, spectrum]), generator, judges)
    )
    parts = {
        "generator": generator,
        "spectrum": spectrum,
        "judges": judges,
        "optimizer_f": optimizer_f,
        "optimizer_g": optimizer_g,
        "optimizer_d": optimizer_d,
    }
    begun_with = {"stage": dataclasses.asdict(stage), "model": dataclasses.asdict(model)}
    state = work / "state.safetensors"
    first = load_state(state, parts, begun_with) if resume and state.exists() else 0
    metrics = run.Metrics(work / "metrics.jsonl", first)
    half = run.autocast(device, stage.bf16)
    total = stage.frame_steps + stage.steps
    bar = run.progress(total, first, "vocoder")

    for done in range(first + 1, total + 1):
        rng = np.random.default_rng([stage.seed, done - 1, run.rank()])
        torch.manual_seed(int(rng.integers(2**62)))
        step = done - 1 - stage.frame_steps  # of the waveform; below 0 the frame-rate half learns alone
        for p in generator.frame_parameters():
            p.requires_grad_(step < 0 or not stage.frame_steps)
        if step < 0:
            lr = run.cosine(done - 1, stage.warmup, stage.frame_steps, stage.frame_lr, stage.floor)
            chosen = speech.alike(rng, stage.frame_batch // run.world_size())
            batch = [t.to(device) for t in speech.recordings(chosen)]
            losses, numbers = frame_losses(generator, spectrum, batch, stage, half), {}
            norm = update(optimizer_f, lr, sum(losses.values()), stage.clip)
        else:
            lr = run.cosine(step, stage.warmup, stage.steps, stage.lr, stage.floor)
            batch = [
                t.to(device)
                for t in speech.batch(rng, stage.batch_size // run.world_size(), stage.segment, stage.margin)
            ]
            losses, numbers = wave_losses(generator, judges, optimizer_d, batch, stage, step, half)
            norm = update(optimizer_g, lr, sum(losses.values()), stage.clip)

        numbers = run.all_reduce_mean(numbers | {name: loss.item() for name, loss in losses.items()})
        if done % stage.eval_every == 0 or done in (stage.frame_steps, total):
            if step < 0 and held_out.rows:
                batch = [t.to(device) for t in held_out.recordings(np.arange(min(16, len(held_out.rows))))]
                with torch.no_grad():
                    numbers["held_out_frames"] = frame_losses(generator, spectrum, batch, stage, half)[
                        "frames"
                    ].item()
            elif step >= 0:
                numbers |= evaluate(generator, held_out, work / f"step-{done:06d}.wav")
            bar.write(f"vocoder, step {done}: " + ", ".join(f"{k} {x:.3f}" for k, x in numbers.items()))
        metrics.write(step=done - 1, lr=lr, grad_norm=norm, **numbers)
        if done % stage.save_every == 0 or done == total:
            save_state(state, parts, begun_with | {"step": done})
        bar.update()
        shown = next((f"{k} {numbers[k]:.3f}" for k in ("frames", "mel", "spectral") if k in numbers), "")
        bar.set_postfix_str(shown, refresh=False)
    bar.close()
    if run.rank() == 0:
        generator.requires_grad_(True).save_pretrained(out)
    run.barrier()


def frame_losses(
    generator: UnitVocoder,
    spectrum: v.FrameSpectrum,
    batch: list[Tensor],
    stage: VocoderStage,
    half: torch.autocast,
) -> dict[str, Tensor]:
    """What is to be heard in each frame, from whole recordings; and how long units last."""
    codes, mels, speakers, lengths, *durations = batch
    with half:
        x = generator.frames(codes, speakers)
    return {
        "frames": spectrum.loss(x, mels, lengths),
        "duration": generator.duration_loss(*durations) * stage.duration_weight,
    }


def wave_losses(
    generator: UnitVocoder,
    judges: nn.ModuleList,
    optimizer_d: torch.optim.Optimizer,
    batch: list[Tensor],
    stage: VocoderStage,
    step: int,
    half: torch.autocast,
):
    """A step of the discriminators, if it is their time; then (the generator's losses, what to log besides)."""
    codes, real, speakers, *durations = batch
    losses, numbers = {}, {}
    with half:
        fake = generator.generate(codes, speakers, stage.margin).float()
    if adversarial := step >= stage.adversarial_start:
        judges.requires_grad_(True)
        with half:
            loss = v.discriminator_loss(hear(judges, real), hear(judges, fake.detach()))
        peak = stage.lr if stage.judge_lr is None else stage.judge_lr
        update(optimizer_d, run.cosine(step, stage.warmup, stage.steps, peak, stage.floor), loss)
        numbers["discriminator"] = loss.item()

    losses["duration"] = generator.duration_loss(*durations) * stage.duration_weight
    if stage.mel_weight:
        losses["mel"] = v.mel_loss(fake, real) * stage.mel_weight
    if stage.spectral_weight:
        losses["spectral"] = v.spectral_loss(fake, real, stage.spectral_sizes) * stage.spectral_weight
    if adversarial:
        judges.requires_grad_(False)  # gradients pass through, and are not collected
        with half:
            heard_real, heard_fake = hear(judges, real), hear(judges, fake)
            losses["adversarial"] = v.adversarial_loss(heard_fake) * stage.adversarial_weight
            losses["feature"] = v.feature_loss(heard_real, heard_fake) * stage.feature_weight
    return losses, numbers


def hear(judges: nn.ModuleList, wav: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
    return [score_and_maps for judge in judges for score_and_maps in judge(wav)]


def update(optimizer: torch.optim.Optimizer, lr: float, loss: Tensor, clip: float = float("inf")) -> float:
    """One step of the optimiser down the gradient of `loss`, averaged over the ranks; returns its norm."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for p in parameters if p.grad is not None]
    if dist.is_initialized():
        flat = nn.utils.parameters_to_vector([p.grad for p in parameters])
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / run.world_size(), [p.grad for p in parameters])
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return norm.item()


@torch.no_grad()
def evaluate(generator: UnitVocoder, held_out: Speech, sample: Path) -> dict[str, float]:
    """Log-mel error on up to 16 held-out recordings; the first one is written as the model speaks it, `sample`."""
    if not held_out.rows or run.rank() > 0:
        return {}
    generator.eval()
    errors = []
    for i, row in enumerate(held_out.rows[:16]):
        fake = generator(row["units"], row["speaker"], row["durations"]).cpu()
        real = torch.from_numpy(held_out.wave(i)[: len(fake)] / np.float32(32767))
        errors.append(v.mel_loss(fake[None, : len(real)], real[None]).item())
    row = held_out.rows[0]
    audio.save(sample, generator(row["units"], row["speaker"]).cpu().numpy())  # its own durations here
    generator.train()
    return {"held_out_mel": float(np.mean(errors))}


# ----------------------------------------------------------------------------------------- state and mistakes


def check(model: VocoderConfig, stage: VocoderStage, speech: Speech):
    """One clear line for a config that does not fit the corpus or the ranks."""
    unit = max(max(row["units"]) for row in speech.rows)
    speaker = max(row["speaker"] for row in speech.rows)
    if unit >= model.num_embeddings:
        raise ValueError(
            f"the corpus has unit {unit}; set vocoder_model.num_embeddings to at least {unit + 1}"
        )
    if speaker >= (model.num_speakers if model.speakers else 1):
        raise ValueError(
            f"the corpus has speaker {speaker}; set vocoder_model.multispkr = true and "
            f"vocoder_model.num_speakers to at least {speaker + 1}"
        )
    for key in ("batch_size", "frame_batch") if stage.frame_steps else ("batch_size",):
        if (size := getattr(stage, key)) % run.world_size():
            raise ValueError(f"vocoder.{key} {size} does not divide among {run.world_size()} processes")
    if stage.segment * 320 <= max(stage.spectral_sizes):
        raise ValueError(
            f"vocoder.segment {stage.segment} is shorter than a window of vocoder.spectral_sizes"
        )


def save_state(path: Path, parts: dict, meta: dict):
    """All modules and optimisers as one file, written on rank 0 (`checkpoint.save_state` is atomic)."""
    if run.rank() > 0:
        return
    tensors = {}
    for name, part in parts.items():
        table = part.state_dict()
        for i, moments in table.pop("state", {}).items():  # of an optimiser
            table |= {f"{i}.{slot}": value for slot, value in moments.items()}
        tensors |= {f"{name}.{key}": value for key, value in table.items() if isinstance(value, Tensor)}
    checkpoint.save_state(path, tensors, meta)


def load_state(path: Path, parts: dict, now: dict) -> int:
    """Puts everything back; returns the step to go on with."""
    tensors, meta = checkpoint.load_state(path)
    for section, table in now.items():
        for key, value in table.items():
            if key not in HARMLESS and v.tuplify(meta[section].get(key)) != value:
                raise ValueError(
                    f"{path}: was begun with {key} = {meta[section].get(key)}, now it is {value}; "
                    f"set it back, or delete {path.parent} to begin anew"
                )
    for name, part in parts.items():
        own = {
            key.removeprefix(f"{name}."): value
            for key, value in tensors.items()
            if key.startswith(f"{name}.")
        }
        if isinstance(part, nn.Module):
            checkpoint.assign(part, own, str(path))
        else:
            moments = defaultdict(dict)
            for key, value in own.items():
                moments[int(key.split(".")[0])][key.split(".")[1]] = value.clone()
            part.load_state_dict({"state": dict(moments), "param_groups": part.state_dict()["param_groups"]})
    return meta["step"]


@dataclass
class Config:
    corpus: str
    out: str
    kmeans: str = ""
    device: str = "auto"
    vocoder: VocoderStage = field(default_factory=VocoderStage)
    vocoder_model: VocoderConfig = field(default_factory=VocoderConfig)


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise ValueError("usage: python train_vocoder.py CONFIG.toml [--vocoder.steps 100 ...]")
    c = config.read(sys.argv[1], Config, sys.argv[2:])
    device = run.device(c.device)
    run.init_distributed(device)
    corpus = Path(c.corpus)
    train(
        c.vocoder,
        c.vocoder_model,
        corpus,
        corpus / "units.jsonl",
        Path(c.out),
        device,
        kmeans=KMeans.from_pretrained(c.kmeans) if c.kmeans else None,
    )
    run.destroy()


if __name__ == "__main__":
    config.command_line(main)

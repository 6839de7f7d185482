"""train_vocoder.py - GAN training of the unit vocoder (paper §4.1, "Unit Vocoder").

    python train_vocoder.py CONFIG.toml [--vocoder.steps 100 ...]     alone; train.py calls `train_stage`
    torchrun --nproc_per_node 8 train_vocoder.py CONFIG.toml          the same on 8 GPUs

reads of CONFIG.toml the keys `corpus` (a folder with manifest.jsonl), `units` (the table of their units, by
default units.jsonl in that folder), `kmeans` (optional: a folder with the clusters of these units, to
initialize their embeddings), `out`, `device`, and the sections [vocoder] and [vocoder_model], which are
`VocoderStage` below and `VocoderConfig` of vocoder.py. It writes the vocoder to `out`, and training state,
metrics and samples of held-out speech to `out`.training.

There are two loops. The second is HiFi-GAN's: the discriminators learn to tell real speech from generated;
then the generator learns to fool them and to match the mel spectrogram. Its defaults are the recipe of the
released vocoder (HiFi-GAN V1 on units: Polyak et al. 2021, arXiv:2104.00355). The first loop is ours, and off
by default: with minutes on a CPU instead of days on GPUs, the frame-rate half of the generator first learns
alone, at a seventh of the cost for each second of speech. See configs/tiny.toml.

All random numbers of a step come from its number, so that an interrupted run continues to the last bit. On
several ranks each computes some rows of the same batch: its loss is a sum over these, divided by the count of
the whole step, and gradients are summed, so that one process and many learn the same.

A step whose losses or gradients are not finite changes nothing; if these are the generator's alone, the
discriminators have learned from it.
"""

from starting import starting

if __name__ == "__main__":
    starting()  # a Ctrl-C during the imports below is one line, too

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm, parameters_to_vector, vector_to_parameters
from torch.optim import AdamW

import checkpoint
import config
import run
import vocoder
from config import Amount, BatchSize, Count, Limits, Share, Whole, command_line, told_to_end
from data import audio
from data.audio import HOP
from data.codes import Batch, CodeDataset, datasets, rows_of_rank
from data.corpus import resolve
from data.units import join_units, read_units
from kmeans import KMeans
from run import Metrics, Run
from training import states
from training.before import check_speakers, rows_of
from training.loop import SkippedSteps, told_of_memory
from training.precision import choose_bf16
from training.stages import first_change, to_json
from vocoder import FrameSpectrum, UnitVocoder, VocoderConfig


@dataclass
class VocoderStage:
    speaker: int | str | None = None  # learn this speaker's voice alone; None: everybody's
    # ours: the frame-rate half alone, before all other steps; after them it is frozen
    frame_steps: Whole = 0
    frame_batch: BatchSize = 6  # whole recordings in a step, over all ranks
    frame_lr: Amount = 4e-3
    # the GAN
    steps: Whole = 400_000
    batch_size: BatchSize = 16  # crops in a step, over all ranks
    segment: Annotated[int, Limits(1, 10_000)] = 28  # frames of a crop: 28 * 320 = 8960 samples
    # frames of context on either side of a crop, for which no samples are generated
    margin: Annotated[int, Limits(0, 1000)] = 0
    lr: Amount = 2e-4
    disc_lr: Amount | None = None  # learning rate of the discriminators; None: that of the generator
    betas: tuple[Share, Share] = (0.8, 0.99)
    weight_decay: Amount = 0.01
    warmup: Whole = 0  # steps
    floor: Share = 0.1  # the last learning rate, as a fraction of the highest
    clip: Amount = 1000.0  # largest norm of the generator's gradient
    adversarial_start: Whole = 0  # first step with discriminators; there are none if not below `steps`
    mel_weight: Amount = 45.0
    spectral_weight: Amount = 0.0  # ours: mel loss over several windows
    spectral_sizes: tuple[Annotated[int, Limits(16, 65_536)], ...] = (2048, 1024, 512, 256, 128)
    adversarial_weight: Amount = 1.0
    feature_weight: Amount = 2.0
    duration_weight: Amount = 1.0
    mpd_periods: tuple[Count, ...] = vocoder.MPD_PERIODS
    mpd_channels: tuple[Count, ...] = vocoder.MPD_CHANNELS
    msd_scales: Whole = 3
    msd_layers: tuple[tuple[Count, Count, Count, Count], ...] = vocoder.MSD_LAYERS
    bf16: bool = False  # convolutions in bfloat16 where that is faster
    eval_every: Count = 1000
    save_every: Count = 5000
    seed: Whole = 0

    def __post_init__(self):
        if self.segment * HOP <= max(self.spectral_sizes, default=0):
            raise ValueError(
                f"vocoder.segment {self.segment} is shorter than a window of vocoder.spectral_sizes"
            )


# ---- Training ----------------------------------------------------------------------------------------------


def train(
    stage: VocoderStage,
    model: VocoderConfig,
    recordings: dict[str, CodeDataset],
    out: Path,
    work: Path,
    metrics: Callable[[int], run.Metrics],
    device: torch.device,
    kmeans: KMeans | None = None,
):
    """Trains on recordings["train"]; writes config.json and generator.safetensors to `out`.

    The folder `work` holds the training state, from which an interrupted run continues, and samples of
    held-out speech; losses go to metrics(first step). Ours: `kmeans` initializes the embeddings of
    the units from its centers (LOG.md has what it is worth)."""
    dataset = recordings["train"]
    held_out = recordings["heldout"]
    check(model, dataset, held_out)
    torch.manual_seed(stage.seed)
    generator = UnitVocoder(model).to(device).train()
    if kmeans:
        initialize_units(generator, kmeans)
    spectrum = FrameSpectrum(model.channels[0]).to(device)
    frame_half = nn.ModuleList([generator, spectrum])
    modules = {"generator": generator, "spectrum": spectrum}
    adamw = partial(AdamW, lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay)
    optimizer_f = adamw(frame_half.parameters())
    optimizer_g = adamw(generator.parameters())
    optimizers = {"optimizer_f": optimizer_f, "optimizer_g": optimizer_g}
    if stage.adversarial_start < stage.steps:
        mpd = vocoder.MultiPeriodDiscriminator(stage.mpd_periods, stage.mpd_channels)
        msd = vocoder.MultiScaleDiscriminator(stage.msd_scales, stage.msd_layers)
        discriminators = nn.ModuleList([mpd, msd]).to(device)
        optimizer_d = adamw(discriminators.parameters())
        modules["discriminators"] = discriminators
        optimizers["optimizer_d"] = optimizer_d

    settings = {"stage": to_json(stage), "model": to_json(model)}
    work.mkdir(parents=True, exist_ok=True)
    state = work / "state.safetensors"
    total = stage.frame_steps + stage.steps
    meta = resume(state, modules, optimizers, settings, total) if checkpoint.has_training(state) else {}
    done = meta.get("step", 0)
    log = metrics(done)
    skipped = SkippedSteps("vocoder", meta)
    formats = meta["bf16"] if isinstance(meta.get("bf16"), dict) else {}  # of each loop

    # ---- What a step of either loop computes

    def on_this_rank(size: int, make: Callable[[slice], Batch]) -> Batch:
        """Some rows of a batch of `size`; those of a process too many do not count."""
        part = rows_of_rank(size, run.rank(), run.world_size())
        if part.start == part.stop:
            return make(slice(0, 1))._replace(share=0.0).to(device)
        return make(part).to(device)

    def batch_of_recordings(step: int) -> Batch:
        chosen = dataset.similar_lengths(random_numbers(stage.seed, step), stage.frame_batch)
        return on_this_rank(len(chosen), lambda part: dataset.recordings(chosen, part))

    def batch_of_crops(step: int) -> Batch:
        def make(part: slice) -> Batch:
            rng = random_numbers(stage.seed, step)
            return dataset.crops(rng, stage.batch_size, stage.segment, stage.margin, part)

        return on_this_rank(stage.batch_size, make)

    def duration_loss(batch: Batch) -> Tensor:
        loss = generator.duration_loss(batch.units, batch.durations, batch.total_units)
        return loss * stage.duration_weight * (batch.share > 0)

    def frame_losses(batch: Batch, bf16: bool) -> dict[str, Tensor]:
        with run.autocast(device, bf16):
            features = generator.frame_features(batch.codes, batch.speakers, batch.n_units)
        frames = spectrum.loss(features, batch.target, batch.lengths, batch.total_frames)
        return {"frames": frames * (batch.share > 0), "duration": duration_loss(batch)}

    def generate(batch: Batch, bf16: bool) -> Tensor:
        with run.autocast(device, bf16):
            return generator.generate(batch.codes, batch.speakers, stage.margin, batch.n_units).float()

    def generator_losses(batch: Batch, fake: Tensor, adversarial: bool, bf16: bool) -> dict[str, Tensor]:
        losses = {"duration": duration_loss(batch)}
        real = batch.target
        if stage.mel_weight:
            losses["mel"] = vocoder.mel_loss(fake, real) * stage.mel_weight * batch.share
        if stage.spectral_weight:
            spectral = vocoder.spectral_loss(fake, real, stage.spectral_sizes)
            losses["spectral"] = spectral * stage.spectral_weight * batch.share
        if adversarial:
            with run.autocast(device, bf16):
                real_scored = discriminate(discriminators, real)
                fake_scored = discriminate(discriminators, fake)
                fooled = vocoder.adversarial_loss(fake_scored)
                matched = vocoder.feature_loss(real_scored, fake_scored)
            losses["adversarial"] = fooled * stage.adversarial_weight * batch.share
            losses["feature"] = matched * stage.feature_weight * batch.share
        return losses

    def is_evaluated(step: int) -> bool:
        return (step + 1) % stage.eval_every == 0 or step + 1 in (stage.frame_steps, total)

    def finish_step(step: int, lr: float, norm: float, numbers: dict[str, float], is_good: bool):
        if is_evaluated(step) and run.rank() == 0:
            shown = ", ".join(f"{key} {value:.3f}" for key, value in numbers.items())
            bar.write(f"vocoder, step {step + 1}: {shown}{skipped.shown}")
        shown = ", ".join(f"{key} {value:.3g}" for key, value in numbers.items())
        bar.set_postfix_str(shown + skipped.shown, refresh=False)
        if not is_good:
            numbers["skipped"] = skipped.total
        log.write(step=step, lr=lr, grad_norm=norm, **numbers)
        told = run.all_reduce_sum(torch.tensor(float(is_told()), device=device)).item() > 0  # any rank
        if ((step + 1) % stage.save_every == 0 or step + 1 == total or told) and run.rank() == 0:
            meta = settings | {"step": step + 1, "bf16": formats} | skipped.meta
            checkpoint.save_training(state, modules, optimizers, meta)
        bar.update()
        if told:
            states.end_after(step + 1)

    advice = (
        f"vocoder: lower batch_size (now {stage.batch_size}), segment ({stage.segment}) or, in the steps of "
        f"whole recordings, frame_batch ({stage.frame_batch})"
    )
    with run.progress(total, done, "vocoder") as bar, told_of_memory(advice), told_to_end() as is_told:
        # ---- Ours: the frame-rate half alone learns the log-mels of whole recordings.
        if done < stage.frame_steps:
            formats["frames"] = choose_bf16(
                "vocoder, whole recordings",
                stage.bf16,
                device,
                {"bf16": formats.get("frames")},
                frame_half,
                batch=lambda: batch_of_recordings(done),
                loss=lambda batch, bf16: sum(frame_losses(batch, bf16).values()),
            )
        for step in range(done, stage.frame_steps):
            batch = batch_of_recordings(step)
            lr = run.cosine(step, stage.warmup, stage.frame_steps, stage.frame_lr, stage.floor)
            optimizer_f.param_groups[0]["lr"] = lr

            losses = frame_losses(batch, formats["frames"])
            optimizer_f.zero_grad()
            sum(losses.values()).backward()
            sum_gradients(frame_half)
            norm = clip_grad_norm_(frame_half.parameters(), stage.clip).item()
            numbers = sum_over_ranks(losses)
            is_good = skipped.is_good(step, (norm, *numbers.values()), lr, generator.parameters(), batch)
            if is_good:
                optimizer_f.step()

            if is_evaluated(step):
                autocast = run.autocast(device, formats["frames"])
                numbers |= evaluate_frames(generator, spectrum, held_out, autocast)
            finish_step(step, lr, norm, numbers, is_good)

        for parameter in vocoder.frame_parameters(generator):
            parameter.requires_grad_(stage.frame_steps == 0)  # frozen if it was trained alone

        # ---- HiFi-GAN: the generator learns the waveforms of crops.
        first = max(done, stage.frame_steps)
        if first < total:
            with_discriminators = stage.adversarial_start < stage.steps
            formats["crops"] = choose_bf16(
                "vocoder, crops",
                stage.bf16,
                device,
                {"bf16": formats.get("crops")},
                nn.ModuleList([generator, *([discriminators] if with_discriminators else [])]),
                batch=lambda: batch_of_crops(first),
                loss=lambda batch, bf16: sum(
                    generator_losses(batch, generate(batch, bf16), with_discriminators, bf16).values()
                ),
            )
        for step in range(first, total):
            bf16 = formats["crops"]
            batch = batch_of_crops(step)
            gan_step = step - stage.frame_steps
            adversarial = gan_step >= stage.adversarial_start
            lr = run.cosine(gan_step, stage.warmup, stage.steps, stage.lr, stage.floor)
            optimizer_g.param_groups[0]["lr"] = lr
            fake = generate(batch, bf16)

            found_d: dict[str, float] = {}
            if adversarial:
                disc_lr = stage.lr if stage.disc_lr is None else stage.disc_lr
                disc_lr = run.cosine(gan_step, stage.warmup, stage.steps, disc_lr, stage.floor)
                optimizer_d.param_groups[0]["lr"] = disc_lr
                discriminators.requires_grad_(True)
                with run.autocast(device, bf16):
                    real_scored = discriminate(discriminators, batch.target)
                    fake_scored = discriminate(discriminators, fake.detach())
                    loss_d = vocoder.discriminator_loss(real_scored, fake_scored) * batch.share
                optimizer_d.zero_grad()
                loss_d.backward()
                sum_gradients(discriminators)
                found_d = sum_over_ranks({"discriminator": loss_d})
                norm_d = get_total_norm([p.grad for p in discriminators.parameters() if p.grad is not None])
                found_d["norm"] = norm_d.item()
                if all(math.isfinite(number) for number in found_d.values()):
                    optimizer_d.step()
                discriminators.requires_grad_(False)  # gradients will pass through them, uncollected

            losses = generator_losses(batch, fake, adversarial, bf16)
            optimizer_g.zero_grad()
            sum(losses.values()).backward()
            sum_gradients(generator)
            norm = clip_grad_norm_(generator.parameters(), stage.clip).item()
            numbers = sum_over_ranks(losses)
            found = (norm, *numbers.values(), *found_d.values())
            is_good = skipped.is_good(step, found, lr, generator.parameters(), batch)
            if is_good:
                optimizer_g.step()

            if adversarial:
                numbers["discriminator"] = found_d["discriminator"]
            if is_evaluated(step):
                numbers |= evaluate(generator, held_out, work / f"step-{step + 1:06d}.wav")
            finish_step(step, lr, norm, numbers, is_good)

    if run.rank() == 0:
        generator.save_pretrained(out)
    run.barrier()


def random_numbers(seed: int, step: int) -> np.random.Generator:
    """For the data of a step, the same on all ranks; seeds torch's (dropout) too, on each rank otherwise."""
    rng = np.random.default_rng([seed, step, 0])
    torch.manual_seed(int(rng.integers(2**62)) + run.rank())
    return rng


def need_embeddings(model: VocoderConfig, n_units: int):
    if n_units > model.num_embeddings:
        raise ValueError(f"there are {n_units} units; set vocoder_model.num_embeddings to at least {n_units}")


def initialize_units(generator: UnitVocoder, kmeans: KMeans):
    k = len(kmeans.centers)
    need_embeddings(generator.config, k)
    generator.dict.weight.data[:k] = kmeans.embeddings(generator.config.embedding_dim)


def discriminate(discriminators: nn.ModuleList, wav: Tensor) -> vocoder.Scored:
    return [result for discriminator in discriminators for result in discriminator(wav)]


def sum_gradients(module: nn.Module):
    """Over the ranks: the loss of each is its part of the loss of the step."""
    if dist.is_initialized():
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = parameters_to_vector(gradients)
        vector_to_parameters(run.all_reduce_sum(flat), gradients)


def sum_over_ranks(losses: dict[str, Tensor]) -> dict[str, float]:
    """The losses of the step as numbers."""
    values = torch.stack([loss.detach().float() for loss in losses.values()])
    return dict(zip(losses, run.all_reduce_sum(values).tolist()))


# ---- Evaluation on up to 16 held-out recordings ------------------------------------------------------------


@torch.no_grad()
def evaluate_frames(
    generator: UnitVocoder, spectrum: FrameSpectrum, held_out: CodeDataset, autocast: torch.autocast
) -> dict[str, float]:
    """The loss of the frame-rate half."""
    if not held_out.rows or run.rank() > 0:
        return {}
    batch = held_out.recordings(np.arange(min(16, len(held_out.rows)))).to(spectrum.proj.weight.device)
    with autocast:
        features = generator.frame_features(batch.codes, batch.speakers, batch.n_units)
    return {"held_out_frames": spectrum.loss(features, batch.target, batch.lengths).item()}


@torch.no_grad()
def evaluate(generator: UnitVocoder, held_out: CodeDataset, sample: Path) -> dict[str, float]:
    """The log-mel error; writes the first recording, with predicted durations, to the file `sample`."""
    if not held_out.rows or run.rank() > 0:
        return {}
    generator.eval()
    errors = []
    for i, row in enumerate(held_out.rows[:16]):
        fake = generator(row["units"], row["speaker"], row["durations"]).cpu()
        real = torch.from_numpy(held_out.wave(i)[: len(fake)] / np.float32(32767))
        errors.append(vocoder.mel_loss(fake[None, : len(real)], real[None]).item())
    row = held_out.rows[0]
    audio.save(sample, generator(row["units"], row["speaker"]).cpu().numpy())
    generator.train()
    return {"held_out_mel": float(np.mean(errors))}


# ---- Training state, checks, stage of a run, command line --------------------------------------------------


def check(model: VocoderConfig, dataset: CodeDataset, held_out: CodeDataset):
    """ValueError, one line, for a config that does not fit the corpus."""
    rows = dataset.rows + held_out.rows
    need_embeddings(model, 1 + max(max(row["units"]) for row in rows))
    check_speakers(model, rows)


def resume(path: Path, modules: dict, optimizers: dict, settings: dict, steps: int) -> dict:
    """Loads the training state at `path`, if it has these settings; returns what else was saved with it."""
    before = checkpoint.training_meta(path)
    for key, section in (("stage", "vocoder"), ("model", "vocoder_model")):
        if before and (change := first_change(before.get(key), settings[key])):
            where, was, value = change
            raise ValueError(
                f"{path}: was begun with [{section}] {where} = {was}, now it is {value}; "
                f"put the old value back, or delete {path.parent} to begin anew"
            )
    return checkpoint.load_training(path, modules, optimizers, steps)


def train_stage(run: Run, section: VocoderStage, model: VocoderConfig, n_units: int, centers: bool):
    """Stage vocoder of train.py: on the units of its corpus, into model/vocoder. centers: embeddings of units
    start as the k-means centers."""
    rows = read_units(run.manifest, run.units, n_units)
    rows = rows_of(rows, run.manifest, "vocoder.speaker", section.speaker)
    train(
        section,
        model,
        datasets(run.corpus, rows),
        out=run.model / "vocoder",
        work=run.state("vocoder"),
        metrics=partial(Metrics, run.metrics / "vocoder.jsonl", tensorboard=run.tensorboard),
        device=run.device,
        kmeans=KMeans.from_pretrained(run.model / "hubert") if centers else None,
    )


@dataclass
class Config:
    corpus: str
    out: str
    units: str = ""
    kmeans: str = ""
    device: str = "auto"
    vocoder: VocoderStage = field(default_factory=VocoderStage)
    vocoder_model: VocoderConfig = field(default_factory=VocoderConfig)


@run.together()
def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise ValueError("usage: python train_vocoder.py CONFIG.toml [--vocoder.steps 100 ...]")
    options = config.read(sys.argv[1], Config, sys.argv[2:])
    device = run.device(options.device)
    run.init_distributed(device)
    kmeans = KMeans.from_pretrained(config.folder(options.kmeans)) if options.kmeans else None
    corpus = config.folder(options.corpus)
    units = config.folder(options.units) if options.units else corpus / "units.jsonl"
    rows = join_units(resolve(corpus, units.parent), units, options.vocoder_model.num_embeddings)
    rows = rows_of(rows, corpus / "manifest.jsonl", "vocoder.speaker", options.vocoder.speaker)
    data = datasets(corpus, rows)
    out = config.folder(options.out)
    work = Path(f"{out}.training")
    metrics = partial(run.Metrics, work / "metrics.jsonl")
    train(options.vocoder, options.vocoder_model, data, out, work, metrics, device, kmeans)


if __name__ == "__main__":
    command_line(main)

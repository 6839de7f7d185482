"""About how long a run will take on this machine, and how much disk: said before the first step.

    time: about 16 min on these 2 cores if nothing else works on them: hubert 2 min, units 40 s ...
    disk: about 155 MB in out/tiny, where 69.3 GB are free

One step of every stage that is not finished is tried on random numbers: the stage's own model and optimizer,
batches as large as those that the corpus will give. That takes a second or two in all. What is not a step
(clusters, the report) is reckoned at rates measured on one machine; reading of files is not counted. Of
configs/tiny.toml it said 16 minutes on the machine that took 16.4, and 7.6 of the vocoder's 10.8.
"""

import dataclasses
import random
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data import documents
from data.audio import HOP, RATE
from hubert import HuBERT, span_mask
from llama import next_token_losses
from run import Run, autocast, world_size
from text_to_unit import TextToUnit
from training import plan
from training.before import LANGUAGE, open_hubert, rows_to_train, to_be_spoken
from training.loop import Optimization, make_optimizers
from training.precision import has_bf16
from training.stages import Stage, finished
from vocoder import (
    FrameSpectrum,
    MultiPeriodDiscriminator,
    MultiScaleDiscriminator,
    UnitVocoder,
    adversarial_loss,
    mel_loss,
    spectral_loss,
)

UNITS = 41  # a second of speech: in the tiny world with 1000 clusters; at most 50
PIECE = 4.0  # letters of a piece of text
TEMPLATE = 24  # tokens of a document that are neither text nor units
LARGEST = 300_000_000  # parameters of a model that is tried
SIDES = {"s2s": 2, "s2t": 1, "t2s": 1, "t2t": 0, "chain": 2, "standard": 1}  # recordings in a dialogue


class Stretch(NamedTuple):
    """What a stage does so many times, and the seconds that once takes."""

    times: float
    seconds: float


# ---- One step of each stage --------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    """Seconds. On a CPU those that this thread has worked: what else the machine does is not in them."""
    if device.type == "cpu":
        return time.thread_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def shortest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the faster of two tries after a first one, in which memory is asked for."""
    tries = []
    for _ in range(3):
        began = clock(device)
        work()
        tries.append(clock(device) - began)
    return min(tries[1:])


def step_seconds(model: nn.Module, loss: Callable[[], Tensor], section, device: torch.device) -> float:
    """Of a loss, its gradients and an update; in bfloat16 where that is wanted and faster here."""
    trained = {name: p for name, p in model.train().named_parameters() if p.requires_grad}
    formats = (
        [section.bf16] if device.type == "cuda" else [False, True] if section.bf16 and has_bf16() else [False]
    )

    def gradients(bf16: bool):
        with autocast(device, bf16):
            found = loss()
        torch.autograd.grad(found, [*trained.values()], allow_unused=True)

    seconds = {bf16: shortest(partial(gradients, bf16), device) for bf16 in formats}
    bf16 = min(seconds, key=seconds.get)
    for p in trained.values():
        p.grad = torch.zeros_like(p)
    optimizers = []
    if isinstance(section, Optimization):
        optimizers = make_optimizers(trained, section, device).values()

    def update():
        with autocast(device, bf16):
            for optimizer in optimizers:
                optimizer.step()

    return seconds[bf16] + shortest(update, device)


def hubert_step(config, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    section = config.hubert
    n_classes = section.clusters[-1]
    model = HuBERT(dataclasses.replace(section.model, n_classes=n_classes)).to(device)
    size = max(1, section.batch_size // section.accumulate)
    wav = torch.randn(size, section.frames * HOP + 80, device=device)
    labels = torch.randint(n_classes, (size, section.frames), device=device)
    mask = span_mask(size, section.frames, section.mask_prob, section.mask_span).to(device)
    return model, lambda: model.masked_losses(wav, labels, mask, section.unmasked_weight)[0]


def given_step(config, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A step of the normalizer, which is all that is left to train of a HuBERT that is given."""
    model = open_hubert(config.units).model.to(device).train()
    section = config.normalizer
    wav = torch.randn(section.batch_size, section.frames * HOP + 80, device=device)
    return model, lambda: model.features(wav, config.units.layer).square().sum()


def language_step(name: str, config, tokens: float, device: torch.device):
    section = getattr(config, name)
    model = plan.build(config, name).to_empty(device=device)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    size = max(1, section.batch_size // section.accumulate)
    ids = torch.randint(model.config.vocab_size, (size, max(2, round(tokens))), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if name in ("stage2", "stage3"):  # the loss is that of answers
        mask[:, : ids.shape[1] // 2] = False
    return model, lambda: next_token_losses(model, ids, mask)[0]


def t2u_step(config, units: float, letters: float, device: torch.device):
    section = config.t2u
    sizes = SimpleNamespace(text=range(config.vocab_size), units=range(config.units.clusters + 4))
    model = TextToUnit(section.model, sizes).to(device)
    size = max(1, section.batch_size // section.accumulate)
    text = torch.randint(4, config.vocab_size, (size, round(letters / PIECE) + 2), device=device)
    target = torch.randint(4, len(sizes.units), (size, round(units) + 1), device=device)
    return model, lambda: model.losses(text, target, section.smoothing, section.noise)[0]


def frames_step(config, seconds: float, device: torch.device):
    """Of the vocoder's first loop: whole recordings."""
    model = UnitVocoder(config.vocoder_model)
    spectrum = FrameSpectrum(config.vocoder_model.channels[0])
    both = nn.ModuleList([model, spectrum]).to(device)
    size, frames = config.vocoder.frame_batch, max(1, round(50 * seconds))
    codes = torch.randint(config.vocoder_model.num_embeddings, (size, frames), device=device)
    speakers = torch.zeros(size, dtype=torch.long, device=device)
    target = torch.randn(size, 80, 2 * frames, device=device)
    lengths = torch.full((size,), frames, device=device)

    def loss() -> Tensor:
        features = model.frame_features(codes, speakers).float()
        durations = model.duration_loss(codes, torch.ones_like(codes))
        return spectrum.loss(features, target, lengths) + durations

    return both, loss


def crops_step(config, device: torch.device):
    """Of its second loop: crops, with discriminators where there are some for most of the steps."""
    stage = config.vocoder
    model = UnitVocoder(config.vocoder_model)
    judges = nn.ModuleList()
    if stage.adversarial_start < stage.steps / 2:
        judges.append(MultiPeriodDiscriminator(stage.mpd_periods, stage.mpd_channels))
        judges.append(MultiScaleDiscriminator(stage.msd_scales, stage.msd_layers))
    both = nn.ModuleList([model, judges]).to(device)
    size = (stage.batch_size, stage.segment + 2 * stage.margin)
    codes = torch.randint(config.vocoder_model.num_embeddings, size, device=device)
    speakers = torch.zeros(stage.batch_size, dtype=torch.long, device=device)
    real = torch.randn(stage.batch_size, stage.segment * HOP, device=device).clamp(-1, 1)

    def loss() -> Tensor:
        fake = model.generate(codes, speakers, stage.margin).float()
        total = fake.mean()
        if stage.spectral_weight:
            total = total + spectral_loss(fake, real, stage.spectral_sizes)
        if stage.mel_weight:
            total = total + mel_loss(fake, real)
        for wav in (fake, real, fake.detach()):  # of the generator; and of the discriminators
            total = total + sum(adversarial_loss(judge(wav)) for judge in judges)
        return total

    return both, loss


# ---- What the corpus gives ---------------------------------------------------------------------------------


def mean_tokens(tables: documents.Tables, section) -> float:
    """Of the documents of a stage, before there are units: from seconds of speech and letters of text."""
    if section.tokens:
        return section.max_len / 2
    found = documents.sources_of(to_be_spoken(tables, section), "train", section.mix)
    lengths = {}
    for name, sources in found.items():
        kind = name.partition("/")[0]
        some = random.Random(0).sample(sources, min(200, len(sources)))
        lengths[name] = sum(tokens_of(kind, source) for source in some) / len(some)
    mean = sum(section.mix[name] * length for name, length in lengths.items()) / sum(section.mix.values())
    return min(mean, section.max_len)


def tokens_of(kind: str, source) -> float:
    """About: of a document of this kind."""
    if kind == "text":
        return len(source) / PIECE
    if kind == "speech":
        return len(source.units)
    if isinstance(source, documents.Pair):
        return TEMPLATE + len(source.text) / PIECE + len(source.units)
    letters = len(source.question) + len(source.answer)
    sides = (source.question_units, source.answer_units)
    units = sum(len(side[0]) or UNITS * len(source.answer) / 15 for side in sides if side)
    return TEMPLATE + letters / PIECE + units * SIDES[kind] / 2


# ---- The whole run -----------------------------------------------------------------------------------------

AN_ITEM = 0.9  # seconds of one of evaluate.items: everything that is asked about it, and the recognizer
# A stage also reads, probes, saves, and shares the memory with another: configs/tiny.toml took 17 min 45 s
# after stage corpus, where its steps by themselves make 13 (LOG.md, 2026-11-27).
OVERHEAD = 1.35
CLUSTERING = 1.2e-7  # seconds of a frame and a cluster, of fitting k-means
BESIDE = (("hubert", "units"), ("text",)), (("t2u", "vocoder"), ("stage1", "stage2", "stage3"))


def work(name: str, run: Run, config, tables: documents.Tables) -> list[Stretch]:
    """What a stage has to do."""
    device = run.device
    rows = tables.rows
    seconds = sum(row["seconds"] for row in rows)
    mean = seconds / len(rows)
    letters = sum(len(row["text"]) for row in rows) / len(rows)
    if name in LANGUAGE:
        section = getattr(config, name)
        step = language_step(name, config, mean_tokens(tables, section), device)
        return [Stretch(section.steps, step_seconds(*step, section, device) * section.accumulate)]
    if name == "t2u":
        step = t2u_step(config, UNITS * mean, letters, device)
        return [Stretch(config.t2u.steps, step_seconds(*step, config.t2u, device) * config.t2u.accumulate)]
    if name == "vocoder":
        if config.pretrained_vocoder:
            return []
        steps = [(config.vocoder.frame_steps, frames_step(config, mean, device))]
        steps += [(config.vocoder.steps, crops_step(config, device))]
        return [Stretch(n, step_seconds(*step, config.vocoder, device)) for n, step in steps if n]
    if name == "evaluate":
        return [Stretch(config.evaluate.items, AN_ITEM)]

    section = config.hubert
    model, loss = given_step(config, device) if config.units.hubert else hubert_step(config, device)
    wav = torch.randn(1, 10 * RATE, device=device)
    with torch.inference_mode():  # to a second of speech
        encoding = shortest(lambda: model.features(wav, model.config.n_layers), device) / 10
    if name == "units":
        frames = 0 if config.units.hubert else config.units.cluster_frames
        fitting = Stretch(frames * config.units.clusters, CLUSTERING)
        step = step_seconds(model, loss, section, device) if config.normalizer.steps else 0.0
        steps = Stretch(config.normalizer.steps * config.normalizer.rounds, step)
        return [Stretch(seconds, encoding), fitting, steps]
    fitting = Stretch(section.cluster_frames * sum(section.clusters), CLUSTERING)
    step = step_seconds(model, loss, section, device) * section.accumulate
    rounds = len(section.clusters)
    theirs = rows_to_train(tables.rows, run.manifest, "hubert.speaker", section.speaker)
    # the first round's targets are of MFCCs
    heard = section.sentences * sum(row["seconds"] for row in theirs)
    targets = Stretch((rounds - 1) * heard, encoding)
    return [Stretch(rounds * section.steps, step), targets, fitting]


@contextmanager
def on_half_the_cores(wanted: bool):
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, cores // 2) if wanted else cores)
    try:
        yield
    finally:
        torch.set_num_threads(cores)


def minutes(stages: dict[str, Stage], run: Run, config, tables: documents.Tables) -> dict[str, float]:
    """About, of each stage that is not finished. ValueError if one is too large to be tried."""
    beside = run.device.type == "cpu" and config.parallel_stages and torch.get_num_threads() > 1
    found = {}
    with torch.random.fork_rng(devices=[]), on_half_the_cores(beside):
        for name in stages:
            if name != "corpus" and finished(stages, name, run, config) is None:
                stretches = work(name, run, config, tables)
                found[name] = OVERHEAD * sum(stretch.times * stretch.seconds for stretch in stretches) / 60
    return found


def disk(run: Run, config, tables: documents.Tables) -> float:
    """About: bytes that the stages write."""
    sizes = {name: 4 * plan.parts(plan.build(config, name)).total() for name in LANGUAGE}
    with torch.device("meta"):
        parts = [HuBERT(config.hubert.model), UnitVocoder(config.vocoder_model)]
    weights = [4 * sum(p.numel() for p in part.parameters()) for part in parts]
    # Text, stage 1 and 2 stay; a stage at work has two averages beside its weights, and the state before.
    language = sizes["text"] + 2 * sizes["stage2"] + 6 * max(sizes.values())
    hubert = weights[0] * (1 + 2 * len(config.hubert.clusters)) + 6 * weights[0]
    table = sum(400 + 10 * UNITS * row["seconds"] for row in tables.rows)  # manifest.jsonl and units.jsonl
    return language + hubert + 7 * weights[1] + table


def tell(stages: dict[str, Stage], run: Run, config, tables: documents.Tables):
    """Prints the two lines; of several processes, which share the work, nobody tries."""
    if world_size() == 1:
        # As many units as there will be about; none of them is looked at.
        rows = [row | {"units": range(round(UNITS * row["seconds"]))} for row in tables.rows]
        print("\n".join(describe(stages, run, config, tables._replace(rows=rows))), flush=True)


def describe(stages: dict[str, Stage], run: Run, config, tables: documents.Tables) -> list[str]:
    free = shutil.disk_usage(run.out).free
    needed = disk(run, config, tables)
    line = f"disk: about {size(needed)} in {run.out}, where {size(free)} are free"
    lines = [line + ("; that is too little" if needed > free else "")]
    largest = max(plan.parts(plan.build(config, name)).total() for name in LANGUAGE)
    if largest > LARGEST:
        return [*lines, f"time: a model of {largest / 1e6:,.0f} million parameters is not tried; see --plan"]
    found = minutes(stages, run, config, tables)
    if not found:
        return lines
    rest = dict(found)
    total, said = 0.0, []
    for pair in BESIDE if run.device.type == "cpu" and config.parallel_stages else ():
        both = [{name: rest.pop(name) for name in names if name in rest} for names in pair]
        both = sorted((side for side in both if side), key=lambda side: sum(side.values()), reverse=True)
        total += sum(both[0].values()) if both else 0.0
        said += [" beside ".join(listed(side) for side in both)] if both else []
    total += sum(rest.values())
    said += [listed(rest)] if rest else []
    cores = torch.get_num_threads()
    where = f"these {cores} cores" if run.device.type == "cpu" else f"this {run.device.type}"
    return [
        f"time: about {amount(total)} on {where} if nothing else works on them: {'; '.join(said)}",
        *lines,
    ]


def listed(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {amount(value)}" for name, value in found.items())


def amount(n: float) -> str:
    """Minutes, in words that promise no more than they can keep."""
    if n < 1:
        return f"{max(1, round(60 * n))} s"
    return f"{n:.0f} min" if n < 120 else f"{n / 60:.0f} h" if n < 4320 else f"{n / 1440:.0f} days"


def size(n: float) -> str:
    return f"{n / 1e6:.0f} MB" if n < 1e9 else f"{n / 1e9:.1f} GB"

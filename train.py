"""train.py - where the concepts meet to learn: every stage of SpeechGPT, one process or many.

    python train.py configs/tiny.toml                        all stages; skips finished ones, resumes an interrupted one
    python train.py configs/tiny.toml --stage 2              one of them
    python train.py configs/tiny.toml --stage2.steps 100     any key of the config file as a flag
    torchrun --nproc_per_node 8 train.py configs/tiny.toml   the same on eight GPUs

    corpus   speech with its text                                     -> out/corpus
    hubert   masked prediction of MFCC clusters, then of its own      -> out/model/hubert        §4.1
    units    k-means on a layer; every recording as units             -> out/corpus/units.jsonl  §3.1
    text     a LLaMA on text, where Meta's is not given               -> out/text                §4.1
    1        next unit: modality-adaptation pre-training              -> out/stage1              §4.2, eq. 1-3
    2        cross-modal instructions                                 -> out/model/llama         §3.1, eq. 4
    3        chain-of-modality instructions, LoRA                     -> out/model/lora          §3.2, App. C
    vocoder  units back to speech (train_vocoder.py)                  -> out/model/vocoder       §4.1
    evaluate the judge (evaluate.py)                                  -> out/report

On a CPU some of them run beside each other, each on half of the cores (`run_all`).

All random numbers of a step come from (seed, stage, step, rank) and a batch is a function of its step: a killed run
needs only the weights, the optimiser and the step to go on with the same losses to the last bit.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import traceback
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import config
import llama
import lora
import run
import train_vocoder
from config import Amount, Count, Limits, Positive, Share, Whole
from data import batches, documents
from data import units as unit_files
from data.corpus import TARGET_SPEAKER, read_manifest
from data.corpus import check as check_corpus
from data.tiny import prepare
from evaluation.judge import need_extra
from generate import generate
from hubert import HuBERT, HuBERTConfig, KMeans, UnitExtractor, mfcc, smooth, span_mask, without_layers_above
from llama import Llama, LlamaConfig
from tokenizer import Tokenizer
from training.muon import Muon
from vocoder import UnitVocoder, VocoderConfig

# ---------------------------------------------------------------------------------------------------------------
# Configuration: one dataclass for each section of the file. Defaults are the paper's (Table 3) where it gives them.


@dataclass
class Optimisation:
    """AdamW with warm-up and cosine decay. Batch, peak rate, length and steps are the paper's, the rest LLaMA's."""

    steps: Whole = 2100
    batch_size: Count = 1536  # documents (or crops) a step, over all ranks and micro-batches
    accumulate: Count = 1  # micro-batches a step
    lr: Amount = 2e-4
    warmup: Whole = 60  # steps
    floor: Share = 0.1  # the last learning rate, as a share of `lr`
    weight_decay: Amount = 0.1  # on matrices only
    betas: tuple[Share, Share] = (0.9, 0.95)
    clip: Amount = 1.0
    muon: bool = False  # matrices of the layers learn by Muon (muon.py) instead of AdamW
    bf16: bool = True  # matrix products in bfloat16 where that is faster; weights and updates stay float32
    eval_every: Count = 200
    save_every: Count = 200


@dataclass
class Language(Optimisation):
    max_len: Count = 1024  # tokens in a packed row
    mix: dict = field(
        default_factory=lambda: {"text": 1.0}
    )  # kinds of documents (data/documents.py), their shares
    unit_weight: Positive = 1.0  # of a unit in the mean of the losses, where a piece of text has 1
    noise: Share = (
        0.0  # share of the units of speech to listen to that are lost, and as many that are misheard
    )


@dataclass
class Stage1(Language):
    steps: Whole = 900
    batch_size: Count = 768
    mix: dict = field(default_factory=lambda: {"speech": 1.0})


@dataclass
class Stage2(Language):
    max_len: Count = 512
    mix: dict = field(
        default_factory=lambda: {"asr": 0.4, "tts": 0.4, "t2t": 0.2}
    )  # p = 1/2 each; of text not said


@dataclass
class Stage3(Language):
    steps: Whole = 4200
    batch_size: Count = 128
    mix: dict = field(default_factory=lambda: {"chain": 1.0})


@dataclass
class CorpusSection:
    name: str = "tiny"  # "tiny" synthesises the small spoken world; or a folder with manifest.jsonl and dialogues.jsonl
    options: dict = field(default_factory=dict)  # of data/tiny/prepare.py


@dataclass
class HubertSection(Optimisation):
    """Two rounds (HuBERT paper §3): on clusters of MFCCs, then on clusters of the first round's `layer`."""

    recordings: Whole | None = None  # learn from so many of the training recordings; None or 0: from all
    speaker: int | None = (
        None  # learn from this speaker's recordings alone: units are then the sounds of one voice
    )
    perturb: Share = (
        0.0  # play every crop at a rate between exp(-perturb) and exp(perturb): as if others spoke
    )
    clusters: tuple[Count, ...] = (100, 500)  # of each round; the number of rounds is how many there are
    layer: Count = 6  # whose clusters teach the second round
    frames: Count = 99  # of 20 ms, in a crop
    mask_prob: Share = 0.08
    mask_span: Count = 10
    unmasked_weight: Amount = (
        0.0  # of the loss at frames that are not hidden (HuBERT paper eq. 2: (1 - alpha) / alpha)
    )
    cluster_frames: Count = 100_000  # k-means is fitted on so many
    model: HuBERTConfig = field(default_factory=HuBERTConfig)


@dataclass
class UnitsSection:
    clusters: Count = 1000
    layer: Count = 11
    smooth: Count = 1  # frames averaged before clustering (odd)
    cluster_frames: Count = 200_000
    # not 0: also the own voice at other rates and pitches, each between exp(-that) and exp(that); see data/units.py
    perturb: tuple[Share, Share] = (0.0, 0.0)
    # LLaMA's rows for units begin as cluster centres of this standard deviation, and the vocoder's as the same of 1:
    # units that sound alike begin alike. 0: all of them at random, as in the paper
    embed_centers: Annotated[float, Limits(0, 100)] = 0.0


@dataclass
class Normalize(Optimisation):
    """HuBERT, so far as units need it, after its clusters are found: see `normalize`."""

    steps: Whole = 0
    batch_size: Count = 8
    frames: Count = 99  # of 20 ms, in a crop
    others: Share = 0.6  # share of the crops in which somebody else speaks
    perturb: tuple[Share, Share] = (
        0.18,
        0.22,
    )  # pace and pitch at which the own voice is played, as units.perturb
    perturb_others: tuple[Share, Share] = (0.05, 0.05)  # and the others, who differ by themselves
    temperature: Positive = 8.0  # of squared distances to the clusters' centres


@dataclass
class LoraSection:
    r: Count = 8
    alpha: Amount = 16.0
    dropout: Share = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])


@dataclass
class EvaluateSection:
    items: Whole = 120  # in a row of the report; 0: all there are
    takes: Count | None = None  # of what is spoken, at most; None: as sample.py does


@dataclass
class Config:
    out: str = "out/tiny"
    seed: Whole = 0
    device: str = "auto"
    workers: Whole = (
        0  # processes that prepare batches beside the training one (not on Windows); for a GPU, 2 to 4
    )
    beside: bool = (
        True  # on a CPU two stages at a time, where they need nothing of each other, half of the cores each
    )
    pretrained: str = (
        ""  # a LLaMA folder to start from; then stage text is skipped. A SpeechGPT folder (llama/ beside
    )
    # hubert/) is one whose units were others: its rows for units are translated into this run's, its vocoder/ too
    vocab_size: Count = 600  # text pieces, where there is no pretrained LLaMA
    corpus: CorpusSection = field(default_factory=CorpusSection)
    hubert: HubertSection = field(default_factory=HubertSection)
    units: UnitsSection = field(default_factory=UnitsSection)
    normalize: Normalize = field(default_factory=Normalize)
    llama: dict = field(default_factory=dict)  # a LlamaConfig without vocab_size
    text: Language = field(default_factory=Language)
    stage1: Stage1 = field(default_factory=Stage1)
    stage2: Stage2 = field(default_factory=Stage2)
    stage3: Stage3 = field(default_factory=Stage3)
    lora: LoraSection = field(default_factory=LoraSection)
    vocoder: train_vocoder.VocoderStage = field(default_factory=train_vocoder.VocoderStage)
    vocoder_model: VocoderConfig = field(default_factory=VocoderConfig)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)

    def __post_init__(self):
        layers, most = {"units.layer": self.units.layer}, self.hubert.model.n_layers
        if len(self.hubert.clusters) > 1:  # otherwise it teaches nobody
            layers["hubert.layer"] = self.hubert.layer
        for key, layer in layers.items():
            if layer > most:
                raise ValueError(f"{key} is {layer}; hubert.model has layers 1 to {most}")
        if not self.units.smooth % 2:
            raise ValueError(
                f"units.smooth is {self.units.smooth}; it must be odd, as many frames before as after"
            )


# ---------------------------------------------------------------------------------------------------------------
# The loop


class Steps(torch.utils.data.Dataset):
    """The batches of steps first, first + 1, ...: what worker processes make ahead of time where a GPU would wait."""

    def __init__(self, batch_at: Callable, first: int, last: int):
        self.batch_at, self.first, self.last = batch_at, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, i: int):
        return self.batch_at(self.first + i)


class Objective(nn.Module):
    """A model together with its loss, so that data parallelism sees one forward."""

    def __init__(self, model: nn.Module, loss: Callable):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch):
        return self.loss(self.model, batch)


def optimise(
    name: str,
    folder: Path,
    model: nn.Module,
    loss: Callable,
    batch_at: Callable,
    o: Optimisation,
    c: Config,
    probe: Callable[[], tuple[dict, str]],
):
    """Trains `model` for o.steps steps, or the rest of them.

    loss(model, micro_batch) -> (mean loss, how many targets, {number to log}); batch_at(step) -> micro-batches;
    probe() -> ({held-out number}, a sample of what the model says now), called every o.eval_every steps.
    """
    device = next(model.parameters()).device
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(trained, o, device)
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / "state.safetensors"
    first = load_training(state_file, trained, optimizers) if state_file.exists() else 0
    objective = Objective(model, loss).train()
    if run.world_size() > 1:
        objective = DistributedDataParallel(objective, [device] if device.type == "cuda" else None)
    metrics = run.Metrics(Path(c.out) / "metrics" / f"{name}.jsonl", first)

    bar = run.progress(o.steps, first, name)
    ahead = torch.utils.data.DataLoader(
        Steps(batch_at, first, o.steps),
        batch_size=None,
        num_workers=c.workers,
        multiprocessing_context="fork" if c.workers else None,
    )
    began = time.perf_counter()
    for step, micro_batches in enumerate(ahead, first):
        lr = run.cosine(step, o.warmup, o.steps, o.lr, o.floor)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        torch.manual_seed(zlib.crc32(f"{c.seed} {name} {step} {run.rank()}".encode()))
        numbers = {"loss": 0.0, "tokens": 0.0}
        for i, batch in enumerate(micro_batches):
            # gradients are exchanged once a step, with the last micro-batch
            alone = run.world_size() > 1 and i + 1 < len(micro_batches)
            with objective.no_sync() if alone else contextlib.nullcontext(), run.autocast(device, o.bf16):
                value, tokens, logged = objective([t.to(device, non_blocking=True) for t in batch])
                (value / len(micro_batches)).backward()
            numbers["tokens"] += tokens
            for key, number in ({"loss": value} | logged).items():
                numbers[key] = numbers.get(key, 0.0) + number.item() / len(micro_batches)
        norm = nn.utils.clip_grad_norm_(trained.values(), o.clip)
        with run.autocast(device, o.bf16):  # Muon's matrix products
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        numbers = run.all_reduce_mean(numbers)
        speed = numbers.pop("tokens") * run.world_size() / (time.perf_counter() - began)
        began = time.perf_counter()
        bar.update()
        bar.set_postfix_str(f"loss {numbers['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)

        if (step + 1) % o.eval_every == 0 or step + 1 == o.steps:
            model.eval()
            held_out, said = probe()
            model.train()
            began = time.perf_counter()
            numbers |= held_out
            bar.write(
                f"{name}, step {step + 1}: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()) + said
            )
        metrics.write(step=step, lr=lr, grad_norm=norm.item(), tokens_per_s=speed, **numbers)
        if (step + 1) % o.save_every == 0 and run.rank() == 0:
            save_training(state_file, trained, optimizers, step + 1)
    bar.close()
    model.eval()


def make_optimizers(trained: dict[str, nn.Parameter], o: Optimisation, device: torch.device) -> list:
    """AdamW, and Muon beside it if asked for: each parameter belongs to one of them."""
    ends = ("embed_tokens.weight", "lm_head.weight", "label_embs")  # a row for each symbol: not for Muon
    inner = {name for name, p in trained.items() if o.muon and p.ndim == 2 and not name.endswith(ends)}
    rest = [p for name, p in trained.items() if name not in inner]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, o.lr, tuple(o.betas), fused=device.type != "mps")]
    if inner:
        optimizers.append(Muon([trained[name] for name in sorted(inner)], o.lr, weight_decay=o.weight_decay))
    return optimizers


SLOTS = ("step", "exp_avg", "exp_avg_sq", "momentum")  # what AdamW and Muon remember of a parameter


def save_training(path: Path, trained: dict[str, nn.Parameter], optimizers: list, step: int):
    tensors = {f"model.{name}": p.detach() for name, p in trained.items()}
    for name, p in trained.items():
        for optimizer in optimizers:
            tensors |= {f"{slot}.{name}": value for slot, value in optimizer.state.get(p, {}).items()}
    checkpoint.save_state(path, tensors, {"step": step})


def load_training(path: Path, trained: dict[str, nn.Parameter], optimizers: list) -> int:
    """Puts weights and moments back; returns the step to go on with."""
    tensors, meta = checkpoint.load_state(path)
    owner = {
        p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    for name, p in trained.items():
        saved = tensors.get(f"model.{name}")
        if saved is None or saved.shape != p.shape:
            raise ValueError(
                f"{path}: does not fit this config (at {name}); delete {path.parent} to begin anew"
            )
        p.data.copy_(saved)
        owner[p].state[p] = {
            slot: tensors[f"{slot}.{name}"].clone().to(p.device)
            for slot in SLOTS
            if f"{slot}.{name}" in tensors
        }
    return meta["step"]


# ---------------------------------------------------------------------------------------------------------------
# Speech: corpus, HuBERT, units


def corpus_folder(c: Config) -> Path:
    return Path(c.out) / "corpus" if c.corpus.name == "tiny" else Path(c.corpus.name)


def make_corpus(c: Config, folder: Path, device: torch.device):
    if run.rank() == 0:
        if c.corpus.name == "tiny":
            prepare.prepare(corpus_folder(c), seed=c.seed, **c.corpus.options)
        check_corpus(corpus_folder(c))  # whoever made it, it must be readable
    run.barrier()


def train_hubert(c: Config, folder: Path, device: torch.device):
    """Rounds of masked prediction, each on the clusters of the one before; the first on clusters of MFCCs."""
    teacher, model = mfcc_features, None
    for number, clusters in enumerate(c.hubert.clusters, 1):
        model = hubert_round(c, folder, device, number, clusters, teacher, model)
        teacher = partial(layer_features, model, c.hubert.layer, 1)


def mfcc_features(wav: Tensor) -> Tensor:
    """(N,) -> (T, 39). The mean of an utterance tells of the speaker and goes; the variances tell of the sounds."""
    x = mfcc(wav[None], normalize=False)[0]
    return x - x.mean(0)


def layer_features(model: HuBERT, layer: int, frames: int, wav: Tensor) -> Tensor:
    """(N,) -> (T, C), each frame averaged over `frames`."""
    return smooth(model.features(wav[None], layer), frames)[0]


def hubert_round(
    c: Config,
    folder: Path,
    device: torch.device,
    number: int,
    clusters: int,
    teacher: Callable,
    previous: HuBERT | None,
) -> HuBERT:
    h, corpus = c.hubert, corpus_folder(c)
    labels_file, weights = folder / f"clusters{number}.npz", folder / f"round{number}.safetensors"
    torch.manual_seed(c.seed)
    model = HuBERT(dataclasses.replace(h.model, n_classes=clusters)).to(device)
    if previous is not None:  # a round goes on from the weights of the last one; only its codewords are new
        model.load_state_dict(previous.state_dict() | {"label_embs": model.label_embs})
    if not weights.exists():
        rows = [
            row
            for row in read_manifest(corpus)
            if row["split"] == "train" and h.speaker in (None, row["speaker"])
        ]
        if not rows:
            raise ValueError(
                f"{corpus}: speaker {h.speaker} has no training recording; correct hubert.speaker"
            )
        rows = random.Random(c.seed).sample(rows, min(len(rows), h.recordings or len(rows)))
        if not labels_file.exists() and run.rank() == 0:
            kmeans = fit_clusters(corpus, rows, teacher, clusters, h.cluster_frames, c.seed, device)
            labels = unit_files.map_speech(
                corpus, rows, lambda wav: kmeans.predict(teacher(wav)), device, f"labels of round {number}"
            )
            save_labels(labels_file, [label.short().cpu().numpy() for label in labels])
        run.barrier()
        batch_at = batches.crops(
            [corpus / row["wav"] for row in rows],
            load_labels(labels_file),
            h.frames,
            c.seed,
            h.batch_size,
            h.accumulate,
            run.rank(),
            run.world_size(),
            h.perturb,
        )

        def loss(model: HuBERT, batch):
            wav, labels = batch
            mask = span_mask(*labels.shape, h.mask_prob, h.mask_span).to(labels.device)
            value, accuracy = model.masked_loss(wav, labels, mask, h.unmasked_weight)
            return value, labels.numel(), {"accuracy": accuracy}

        optimise(f"hubert{number}", folder / f"round{number}", model, loss, batch_at, h, c, lambda: ({}, ""))
        if run.rank() == 0:
            checkpoint.save_tensors(weights, model.state_dict())
            (folder / f"round{number}/state.safetensors").unlink(missing_ok=True)
        run.barrier()
    checkpoint.assign(model, checkpoint.read_tensors(weights), str(weights))
    return model.to(device).eval()


def fit_clusters(
    corpus: Path, rows: list[dict], features: Callable, k: int, n_frames: int, seed: int, device: torch.device
) -> KMeans:
    """k-means on some n_frames frames of randomly chosen recordings."""
    rows, chosen, frames = random.Random(seed).sample(rows, len(rows)), [], 0
    for row in rows:
        chosen.append(row)
        frames += 50 * row.get("seconds", 10)
        if frames > n_frames:
            break
    x = unit_files.map_speech(corpus, chosen, features, device, f"features for {k} clusters")
    return KMeans.fit(torch.cat(x), k, seed).to(device)


def save_labels(path: Path, labels: list[np.ndarray], **more: list):
    part = path.with_suffix(".part.npz")
    np.savez(part, flat=np.concatenate(labels), lengths=[len(label) for label in labels], **more)
    part.replace(path)


def load_labels(path: Path) -> list[np.ndarray]:
    with np.load(path) as stored:
        return np.split(stored["flat"], np.cumsum(stored["lengths"])[:-1])


def make_units(c: Config, folder: Path, device: torch.device):
    """model/hubert: as much of HuBERT as the units need, and their clusters; and the corpus as those units."""
    corpus = corpus_folder(c)
    if run.rank() == 0 and not (folder / "found/targets.npz").exists():  # which are of these clusters
        weights = Path(c.out) / "state/hubert" / f"round{len(c.hubert.clusters)}.safetensors"
        tensors = {
            n: t
            for n, t in without_layers_above(c.units.layer, checkpoint.read_tensors(weights)).items()
            if not n.startswith(("final_proj", "label_embs"))
        }
        model = HuBERT(dataclasses.replace(c.hubert.model, n_classes=0, n_layers=c.units.layer))
        checkpoint.assign(model, tensors, str(weights))
        model.to(device).eval()
        rows = [row for row in read_manifest(corpus) if row["split"] == "train"]
        features = partial(layer_features, model, c.units.layer, c.units.smooth)
        kmeans = fit_clusters(
            corpus, rows, features, c.units.clusters, c.units.cluster_frames, c.seed, device
        )
        UnitExtractor(model, kmeans, c.units.layer, c.units.smooth).save_pretrained(folder / "found")
    run.barrier()
    extractor = UnitExtractor.from_pretrained(folder / "found").to(device)
    if c.normalize.steps:
        normalize(c, folder, extractor, device)
    if run.rank() == 0:
        unit_files.extract(corpus, extractor, device, folder, c.units.perturb)
        extractor.save_pretrained(Path(c.out) / "model/hubert")
    run.barrier()


def normalize(c: Config, folder: Path, extractor: UnitExtractor, device: torch.device):
    """HuBERT learns to give to a sentence, whoever says it, the units that it has in the model's own voice: the speech
    normaliser of Lee et al. 2022 (arXiv:2112.08352 §3.2), for every frame instead of by CTC. The clusters stay."""
    o, target_file = c.normalize, folder / "found/targets.npz"
    rows = {row["id"]: row for row in read_manifest(corpus_folder(c)) if row["split"] == "train"}
    if not target_file.exists() and run.rank() == 0:
        found = own_units(corpus_folder(c), [*rows.values()], extractor, device)
        save_labels(
            target_file, [t.units for t in found], ids=[t.id for t in found], apart=[t.apart for t in found]
        )
    run.barrier()
    with np.load(target_file) as stored:
        ids, apart = stored["ids"].tolist(), stored["apart"]
    if not rows.keys() >= set(ids):
        raise ValueError(
            f"{target_file} is of other recordings than {corpus_folder(c)}; delete {folder} to begin anew"
        )
    other = np.array([rows[id]["speaker"] != TARGET_SPEAKER for id in ids])
    others = o.others if other.any() else 0.0  # who is further from the own voice is heard more often:
    share = np.where(other, others * apart / (apart.sum() or 1.0), (1 - others) / (~other).sum())
    perturb = [o.perturb_others if another else o.perturb for another in other]
    wavs = [corpus_folder(c) / rows[id]["wav"] for id in ids]
    labels = load_labels(target_file)
    batch_at = batches.weighted_crops(
        [batches.Recording(*fields) for fields in zip(wavs, labels, perturb, share)],
        o.frames,
        c.seed,
        o.batch_size,
        o.accumulate,
        run.rank(),
        run.world_size(),
    )

    def loss(model: HuBERT, batch):
        wav, labels = batch
        x = smooth(model.features(wav, extractor.layer), extractor.smooth)[labels >= 0]
        scores, labels = -extractor.kmeans.distances(x) / o.temperature, labels[labels >= 0]
        same = (scores.argmax(1) == labels).float().mean()
        return nn.functional.cross_entropy(scores, labels), len(labels), {"same": same}

    optimise("normalize", folder / "normalize", extractor.model, loss, batch_at, o, c, lambda: ({}, ""))


class Target(NamedTuple):
    """What HuBERT is to hear in a recording."""

    id: str
    units: np.ndarray  # (T,)
    apart: float  # of another speaker: mean squared distance to the own voice


def own_units(
    corpus: Path, rows: list[dict], extractor: UnitExtractor, device: torch.device, portion: int = 2000
) -> list[Target]:
    """Of the own voice its units; of another speaker those of the own voice's most similar recording of the sentence,
    frame for frame (`units.dtw_align`). What the own voice never says teaches nothing."""

    def hear(wav: Tensor) -> tuple[np.ndarray, np.ndarray]:
        x = layer_features(extractor.model, extractor.layer, extractor.smooth, wav)
        return x.half().cpu().numpy(), extractor.kmeans.predict(x).short().cpu().numpy()

    def heard(rows: list[dict], title: str):  # not all at once: features take more room than speech
        for first in range(0, len(rows), portion):
            some = rows[first : first + portion]
            yield from zip(some, unit_files.map_speech(corpus, some, hear, device, title))

    own = [row for row in rows if row["speaker"] == TARGET_SPEAKER]
    if not own:
        raise ValueError(
            f"{corpus}: normalize.steps needs training recordings of speaker {TARGET_SPEAKER}, "
            "the model's own voice; set it to 0"
        )
    others = [row for row in rows if row["speaker"] != TARGET_SPEAKER]
    echoed = {row["text"] for row in others}
    targets, said = [], defaultdict(list)
    for row, (x, units) in heard(own, "the own voice"):
        targets.append(Target(row["id"], units, 0.0))
        if row["text"] in echoed:
            said[row["text"]].append((x, units))
    for row, (x, _) in heard([row for row in others if row["text"] in said], "the others"):
        ways = [(*unit_files.dtw_align(x, mine), units) for mine, units in said[row["text"]]]
        way, apart, units = min(ways, key=lambda found: found[1])
        if apart < math.inf:
            targets.append(Target(row["id"], units[way], apart))
    return targets


# ---------------------------------------------------------------------------------------------------------------
# The language model: text, stage 1, 2, 3


class LanguageStage(NamedTuple):
    """What one stage of the language model is; the loop needs to know no more."""

    section: str  # of the config file, with its hyperparameters
    begin: Callable  # (config, tokenizer) -> the model it starts from; what requires a gradient is what it trains
    save: Callable  # (config, model, tokenizer)


def llama_folder(c: Config, name: str) -> Path:
    return Path(c.out) / {"2": "model/llama", "text": "text"}.get(name, f"stage{name}")


def new_llama(c: Config, tok: Tokenizer) -> Llama:
    return Llama(config.load(LlamaConfig, c.llama | {"vocab_size": tok.n_text}, "[llama]"))


def knows_other_units(c: Config) -> bool:
    return bool(c.pretrained) and all((Path(c.pretrained) / part).is_dir() for part in ("llama", "hubert"))


def first_llama(c: Config) -> Path:
    """The folder of the LLaMA that stage 1 begins with."""
    if not c.pretrained:
        return llama_folder(c, "text")
    return Path(c.pretrained) / "llama" if knows_other_units(c) else Path(c.pretrained)


def grown_llama(c: Config, tok: Tokenizer) -> Llama:
    """Eq. 1-2: the text model with rows for units and markers added to its vocabulary."""
    model = Llama.from_pretrained(first_llama(c))
    tables = model.model.embed_tokens, model.lm_head
    before = [table.weight.data for table in tables]
    model.resize_vocab(len(tok))
    if knows_other_units(c):
        known, extractor = (
            kind.from_pretrained(Path(c.pretrained) / part)
            for kind, part in ((Tokenizer, "llama"), (UnitExtractor, "hubert"))
        )
        if (k := len(extractor.kmeans.centers)) != known.n_units:
            raise ValueError(
                f"{c.pretrained}: its HuBERT makes {k} units, its LLaMA knows {known.n_units}; the two "
                "are of different models"
            )
        shares = unit_files.cooccurrence(corpus_folder(c), extractor, c.units.clusters)
        for old, table in zip(before, tables):
            translate_rows(old, table.weight.data, shares, known, tok)
    elif c.units.embed_centers:
        places = KMeans.from_pretrained(Path(c.out) / "model/hubert").embeddings(model.config.dim)
        for table in tables:
            table.weight.data[tok.unit_ids.start : tok.unit_ids.stop] = places * c.units.embed_centers
    return model


def translate_rows(old: Tensor, new: Tensor, shares: Tensor, known: Tokenizer, tok: Tokenizer):
    """A unit begins as the mean of the units heard in its place before, sum_u P(u | unit) old[u]; a marker as it was.
    So the model understands most of what it hears in the new units before it has seen any (LOG.md)."""
    new[tok.unit_ids.start : tok.unit_ids.stop] = shares @ old[known.unit_ids.start : known.unit_ids.stop]
    for token, i in tok.added.items():
        if i not in tok.unit_ids and token in known.added:
            new[i] = old[known.added[token]]


def adapted_llama(c: Config, tok: Tokenizer) -> Llama:
    model = Llama.from_pretrained(llama_folder(c, "2"))
    return lora.apply(model, c.lora.r, c.lora.alpha, c.lora.targets, c.lora.dropout)


def save_llama(name: str) -> Callable:
    def save(c: Config, model: Llama, tok: Tokenizer):
        model.save_pretrained(llama_folder(c, name))
        shutil.copytree(Path(c.out) / "tokenizer", llama_folder(c, name), dirs_exist_ok=True)

    return save


LANGUAGE = {
    "text": LanguageStage("text", new_llama, save_llama("text")),
    "1": LanguageStage("stage1", grown_llama, save_llama("1")),
    "2": LanguageStage("stage2", lambda c, tok: Llama.from_pretrained(llama_folder(c, "1")), save_llama("2")),
    "3": LanguageStage(
        "stage3", adapted_llama, lambda c, model, tok: lora.save(model, Path(c.out) / "model/lora")
    ),
}


def make_tokenizer(c: Config) -> Tokenizer:
    """The tokenizer of this run: sentencepiece trained on the text of the train split, or the pretrained LLaMA's."""
    folder = Path(c.out) / "tokenizer"
    if not (folder / "added_tokens.json").exists() and run.rank() == 0:
        if c.pretrained:
            Tokenizer.extend(first_llama(c), folder, c.units.clusters, anew=knows_other_units(c))
        else:
            Tokenizer.train(
                documents.sentences(corpus_folder(c), "train"), folder, c.vocab_size, c.units.clusters
            )
    run.barrier()
    return Tokenizer.from_pretrained(folder)


def train_language(name: str, c: Config, folder: Path, device: torch.device):
    stage = LANGUAGE[name]
    o: Language = getattr(c, stage.section)
    tok = make_tokenizer(c)
    torch.manual_seed(c.seed)
    model = stage.begin(c, tok).to(device)

    batch_at = batches.documents(
        partial(documents.render, tok, noise=o.noise),
        documents.examples(corpus_folder(c), "train", o.mix),
        c.seed,
        o.batch_size,
        o.max_len,
        o.accumulate,
        run.rank(),
        run.world_size(),
    )

    rows = model.config.vocab_size
    weight = torch.ones(max(rows, len(tok)), device=device)
    weight[tok.unit_ids.start : tok.unit_ids.stop] = o.unit_weight
    weight = weight[:rows]  # a model of text has no units yet

    def loss(model: Llama, batch):
        ids, mask, positions, docs = batch
        return llama.next_token_loss(model, ids, mask, positions, docs, weight), (docs >= 0).sum().item(), {}

    held_out = documents.examples(corpus_folder(c), "heldout", o.mix)
    held_out = random.Random(c.seed).sample(held_out, min(64, len(held_out)))
    shown = [documents.render(tok, example, random.Random(i)) for i, example in enumerate(held_out)]

    @torch.no_grad()
    def probe() -> tuple[dict, str]:
        if not shown:
            return {}, ""
        packed = batches.pack(shown, o.max_len)
        numbers = {"held_out_loss": loss(model, [t.to(device) for t in packed])[0].item()}
        said = ""
        for ids, mask in shown[:3]:
            given = mask.index(True) if not mask[1] else len(ids) // 2  # the prompt, or half of what has none
            reply = generate(model, [ids[:given]], tok, max_new=len(ids))[0]
            texts = {"given": ids[:given], "says": reply, "expected": ids[given:]}
            said += "".join(f"\n  {key:8} {tok.decode(value)}" for key, value in texts.items())
        return numbers, said

    optimise(f"stage{name}" if name.isdigit() else name, folder, model, loss, batch_at, o, c, probe)
    if run.rank() == 0:
        stage.save(c, model, tok)
    run.barrier()


def known_vocoder(c: Config) -> UnitVocoder | None:
    """The pretrained vocoder, if this run's is of the same shape; each unit sounds like those heard in its place."""
    folder = Path(c.pretrained) / "vocoder"
    if not (knows_other_units(c) and folder.is_dir()):
        return None
    before = UnitVocoder.from_pretrained(folder)
    if dataclasses.replace(before.config, num_embeddings=c.vocoder_model.num_embeddings) != c.vocoder_model:
        print(f"{folder} has another shape than [vocoder_model]: the vocoder begins from nothing")
        return None
    extractor = UnitExtractor.from_pretrained(Path(c.pretrained) / "hubert")
    if (k := len(extractor.kmeans.centers)) > before.config.num_embeddings:
        raise ValueError(
            f"{c.pretrained}: its HuBERT makes {k} units, its vocoder knows "
            f"{before.config.num_embeddings}; the two are of different models"
        )
    if (n := c.units.clusters) > c.vocoder_model.num_embeddings:
        raise ValueError(f"there are {n} clusters; set vocoder_model.num_embeddings to at least {n}")
    shares = unit_files.cooccurrence(corpus_folder(c), extractor, n)
    vocoder = UnitVocoder(c.vocoder_model)
    vocoder.load_state_dict(before.state_dict() | {"dict.weight": vocoder.dict.weight.data})
    vocoder.dict.weight.data[:n] = shares @ before.dict.weight.data[:k]
    return vocoder


def make_vocoder(c: Config, folder: Path, device: torch.device):
    kmeans = KMeans.from_pretrained(Path(c.out) / "model/hubert") if c.units.embed_centers else None
    begin = None if (folder / "state.safetensors").exists() else known_vocoder(c)
    train_vocoder.train(
        c.vocoder,
        c.vocoder_model,
        corpus_folder(c),
        corpus_folder(c) / "units.jsonl",
        Path(c.out) / "model/vocoder",
        device,
        work=folder,
        kmeans=kmeans,
        begin=begin,
    )
    if run.rank() == 0:
        (Path(c.out) / "metrics").mkdir(exist_ok=True)
        shutil.copyfile(folder / "metrics.jsonl", Path(c.out) / "metrics/vocoder.jsonl")


def judge(c: Config, folder: Path, device: torch.device):
    import evaluate  # its judges are an optional extra

    if run.rank() == 0:
        evaluate.evaluate(
            Path(c.out) / "model",
            corpus_folder(c),
            Path(c.out) / "report",
            items=c.evaluate.items,
            seed=c.seed,
            device=device,
            takes=c.evaluate.takes,
        )


# ---------------------------------------------------------------------------------------------------------------
# The stages, in order. `reads` names the sections of the config a stage's result depends on, besides those of the
# stages `after` which it comes.


class Stage(NamedTuple):
    work: Callable  # (config, folder for its state, device)
    after: tuple[str, ...]
    reads: tuple[str, ...]


STAGES = {
    "corpus": Stage(make_corpus, (), ("seed", "corpus")),
    "hubert": Stage(train_hubert, ("corpus",), ("hubert",)),
    "units": Stage(make_units, ("hubert",), ("units", "normalize")),
    "text": Stage(
        partial(train_language, "text"), ("corpus",), ("vocab_size", "llama", "text", "pretrained", "units")
    ),
    "1": Stage(partial(train_language, "1"), ("units", "text"), ("stage1",)),
    "2": Stage(partial(train_language, "2"), ("1",), ("stage2",)),
    "3": Stage(partial(train_language, "3"), ("2",), ("stage3", "lora")),
    "vocoder": Stage(make_vocoder, ("units",), ("vocoder", "vocoder_model", "pretrained")),
    "evaluate": Stage(judge, ("3", "vocoder"), ("evaluate",)),
}
HARMLESS = {"eval_every", "save_every"}  # keys that may change while a stage is interrupted


def run_stage(name: str, c: Config, device: torch.device):
    """One stage, unless it is finished. Its folder out/state/NAME keeps the config it was begun with."""
    stage, folder = STAGES[name], Path(c.out) / "state" / name
    folder.mkdir(parents=True, exist_ok=True)
    if name == "text" and c.pretrained:
        return
    record, done = folder / "config.json", folder / "done.json"
    now = {
        "reads": {key: plain(getattr(c, key)) for key in stage.reads},
        "after": {before: finished(c, before) for before in stage.after},
    }
    for before, when in now["after"].items():
        if when is None:
            raise ValueError(
                f"stage {name} needs stage {before}, which is not finished; run --stage {before} first"
            )
    if record.exists():
        compare(name, folder, checkpoint.read_json(record), now)
    elif run.rank() == 0:
        checkpoint.write_json(record, now)
    if done.exists():
        print(f"stage {name}: finished before, {folder} says so") if run.rank() == 0 else None
        return
    if run.rank() == 0:
        print(f"stage {name} on {device}, {run.world_size()} process(es), {torch.get_num_threads()} threads")
    began = time.perf_counter()
    stage.work(c, folder, device)
    if run.rank() == 0:
        checkpoint.write_json(done, {"finished": time.time(), "seconds": time.perf_counter() - began})
        (folder / "state.safetensors").unlink(missing_ok=True)
    run.barrier()


# Matrices this small hardly profit from a second core (LOG.md). HuBERT needs no text and the text stage no units; and
# the vocoder and the stages of the language model need nothing of each other.


def in_the_background(names: tuple[str, ...], c: Config, threads: int, log: Path):
    """Some stages as a process of its own: what they say goes to `log`, and it ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    Thread(target=lambda: multiprocessing.parent_process().join() or os._exit(1), daemon=True).start()
    with (
        log.open("w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        torch.set_num_threads(threads)
        try:
            config.command_line(lambda: [run_stage(name, c, torch.device("cpu")) for name in names])
        except Exception:
            traceback.print_exc()  # into the log
            sys.exit(1)


@contextlib.contextmanager
def beside(names: tuple[str, ...], c: Config, device: torch.device):
    """Within, stages `names` run on half of the cores, and half are left; at the end they are waited for. Gives a
    function that complains if they have failed. Where there are no cores to share they have run before."""
    cores, log = torch.get_num_threads(), Path(c.out) / "state" / names[-1] / "log.txt"
    if device.type != "cpu" or run.world_size() > 1 or cores < 2 or not c.beside or finished(c, names[-1]):
        for name in names:
            run_stage(name, c, device)
        yield lambda: None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("", encoding="utf-8")
    print(
        f"stage {' and '.join(names)} beside what follows, on {cores // 2} of {cores} threads: {log}",
        flush=True,
    )
    child = multiprocessing.get_context("spawn").Process(
        target=in_the_background, args=(names, c, cores // 2, log), daemon=True
    )
    child.start()
    torch.set_num_threads(cores - cores // 2)

    def check():
        if child.exitcode:
            said = log.read_text(encoding="utf-8").strip().splitlines() or ["it said nothing"]
            raise ValueError(f"stage {names[-1]} ended with code {child.exitcode}: {said[-1]} ({log})")

    yield check
    print(f"waiting for stage {names[-1]}", flush=True)
    shown = log.stat().st_size
    while child.is_alive():
        child.join(1)
        with log.open("rb") as file:  # its progress bar, as it goes on
            file.seek(shown)
            sys.stderr.write(file.read().decode(errors="replace"))
            shown = file.tell()
    torch.set_num_threads(cores)
    check()


def finished(c: Config, name: str) -> float | None:
    """When a stage was finished, or None."""
    done = Path(c.out) / "state" / name / "done.json"
    if name == "text" and c.pretrained:
        return 0.0
    return checkpoint.read_json(done)["finished"] if done.exists() else None


def compare(name: str, folder: Path, before: dict, now: dict):
    """A stage goes on only with the config and the inputs that it was begun with."""
    for section, value in now["reads"].items():
        old = before["reads"].get(section)
        if isinstance(value, dict) and isinstance(old, dict):
            changed = next((k for k in value if k not in HARMLESS and value[k] != old.get(k)), None)
            if changed:
                raise ValueError(
                    f"stage {name} was begun with [{section}] {changed} = {old.get(changed)}, now it is "
                    f"{value[changed]}; put the old value back, or delete {folder} to begin anew"
                )
        elif value != old:
            raise ValueError(
                f"stage {name} was begun with {section} = {old}, now it is {value}; put the old value "
                f"back, or delete {folder} to begin anew"
            )
    for stage, when in now["after"].items():
        if when != before["after"].get(stage):
            raise ValueError(
                f"stage {name} was begun before stage {stage} was made anew; delete {folder} to follow it"
            )


def run_all(c: Config, device: torch.device):
    run_stage("corpus", c, device)
    with beside(("hubert", "units"), c, device):
        run_stage("text", c, device)
    with beside(("vocoder",), c, device) as check:
        for name in ("1", "2", "3"):
            run_stage(name, c, device)
            check()
    run_stage("evaluate", c, device)


def plain(value):
    """A dataclass as JSON would give it back."""
    return json.loads(json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("config", help="a file of configs/, for example configs/tiny.toml")
    parser.add_argument("--stage", help=f"only this one of: {', '.join(STAGES)}")
    known, flags = parser.parse_known_args()
    if known.stage and known.stage not in STAGES:
        raise ValueError(f"unknown stage '{known.stage}'; the stages are {', '.join(STAGES)}")
    c = config.read(known.config, Config, flags)
    if known.stage in (None, "evaluate"):
        need_extra()  # said now, and not after half an hour
    device = run.device(c.device)
    run.init_distributed(device)
    try:
        if known.stage:
            run_stage(known.stage, c, device)
        else:
            run_all(c, device)
    finally:
        run.destroy()


if __name__ == "__main__":
    config.command_line(main)

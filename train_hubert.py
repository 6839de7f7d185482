"""Training of HuBERT (paper §3.1, §4.1): rounds of masked prediction, k-means, a corpus as units.

    round 1   targets: clusters of MFCCs                          (HuBERT paper §II.A)
    round 2   targets: clusters of a layer of round 1's HuBERT    ... and so on
    units     k-means on a layer of the last round's HuBERT: the alphabet of the language model
              ours, optional: a speech normalizer, so that all speakers get the units of the target speaker

train.py calls `pretrain` (its stage "hubert") and `make_units` (its stage "units").

References: Hsu et al. 2021, "HuBERT", arXiv:2106.07447; Lee et al. 2022, arXiv:2112.08352 §3.2 (speech
normalizer).
"""

import dataclasses
import math
import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
from config import Amount, BatchSize, Count, Limits, Positive, Share, Whole
from data import audio
from data import units as unit_files
from data.augment import Imitation, draw_of, imitate
from data.corpus import TARGET_SPEAKER, read_manifest
from data.crops import Recording, crops, imitated, weighted_crops
from files import one_line
from hubert import HuBERT, HuBERTConfig, Smooth, UnitExtractor, span_mask, without_layers_above
from kmeans import KMeans, mfcc, smooth
from run import Run, barrier, rank, world_size
from training import states
from training.before import open_hubert, some_sentences, training_rows
from training.loop import Loss, Optimization, optimize

Clusters = Annotated[int, Limits(1, 32_767)]  # their numbers are kept in 16 bits
Frames = Annotated[int, Limits(1, 10_000)]  # of 20 ms, in a crop


@dataclass
class HubertSection(Optimization):
    """Rounds of masked prediction: on clusters of MFCCs, then on clusters of the previous round's `layer`."""

    speaker: int | str | None = None  # train on this speaker's recordings alone; None: on everybody's
    sentences: Share = 1.0  # the share of them that is trained on: to find the targets of all takes time
    # speed perturbation: each crop is resampled by a factor in [e^-p, e^p], to imitate other speakers
    perturb: Share = 0.0
    imitation: Imitation = field(default_factory=Imitation)  # crops in other rooms; their targets stay
    clusters: tuple[Clusters, ...] = (100, 500)  # of each round; as many rounds as there are numbers
    layer: Count = 6  # whose clusters are the next round's targets
    frames: Frames = 99
    mask_prob: Share = 0.08
    mask_span: Count = 10
    unmasked_weight: Amount = 0.0  # of the loss at frames that are not masked (§II.B: (1 - alpha) / alpha)
    cluster_frames: Count = 100_000  # frames that k-means is fitted on
    model: HuBERTConfig = field(default_factory=HuBERTConfig)

    def __post_init__(self):
        if self.mask_prob * self.mask_span > 3:
            raise ValueError(
                f"hubert.mask_prob {self.mask_prob} x mask_span {self.mask_span} masks nearly all; "
                "mask_prob is the fraction of frames that begin a span, 0.08 in the paper"
            )


@dataclass
class UnitsSection:
    """The k-means whose cluster numbers are the units, and how embeddings of units are initialized."""

    # a folder with a trained HuBERT and its k-means, released (mHuBERT) or ours, instead of stage hubert;
    # clusters, layer and smooth must then be its own
    hubert: str = ""
    speaker: int | str | None = None  # the clusters are of this speaker's recordings; None: of everybody's
    clusters: Clusters = 1000
    layer: Count = 11
    smooth: Smooth = 1  # an odd number
    cluster_frames: Count = 200_000
    # training recordings that recognition hears once more, as if from other people in other rooms
    imitation: Imitation = field(default_factory=Imitation)
    # initialize unit embeddings from the k-means centers (PCA, scaled to this std); 0: random (the paper)
    embed_centers: Annotated[float, Limits(0, 100)] = 0.0


@dataclass
class NormalizerSection(Optimization):
    """Speech-normalizer fine-tuning of HuBERT (layers up to units.layer), after k-means; 0 steps: none."""

    steps: Whole = 0  # of each round
    # from the second on, recordings are aligned anew, by what HuBERT has learned of their speakers since
    rounds: Annotated[int, Limits(1, 20)] = 1
    batch_size: BatchSize = 8
    sentences: Share = 1.0  # the share of them that is aligned and trained on
    frames: Frames = 99
    others: Share = 0.6  # fraction of crops from other speakers
    perturb: tuple[Share, Share] = (0.18, 0.22)  # of the target speaker's speed and pitch (log-uniform)
    perturb_others: tuple[Share, Share] = (0.05, 0.05)  # and of the others, who differ by themselves
    imitation: Imitation = field(default_factory=Imitation)  # crops in other rooms
    temperature: Positive = 8.0  # of squared distances to the cluster centers


# ---- Stage hubert: rounds of masked prediction -------------------------------------------------------------


def pretrain(run: Run, section: HubertSection):
    """Each round's targets are clusters of the round before; the first round's are clusters of MFCCs."""
    features = mfcc_features
    model = None
    for number, n_clusters in enumerate(section.clusters, 1):
        model = pretrain_round(run, section, number, n_clusters, features, model)
        features = partial(layer_features, model, section.layer, 1)


def mfcc_features(wav: Tensor) -> Tensor:
    """(N,) -> (T, 39). The mean describes the speaker and is removed; variances describe the sounds."""
    x = mfcc(wav[None], cmvn=False)[0]
    return x - x.mean(0)


def layer_features(model: HuBERT, layer: int, n_smooth: int, wav: Tensor) -> Tensor:
    """(N,) -> (T, C), each frame averaged over `n_smooth`."""
    return smooth(model.features(wav[None], layer), n_smooth)[0]


def pretrain_round(
    run: Run,
    section: HubertSection,
    number: int,
    n_clusters: int,
    features: Callable,
    previous: HuBERT | None,
) -> HuBERT:
    """One round: clusters of `features`, then masked prediction of them from the previous weights."""
    folder = run.state("hubert")
    labels_file = folder / f"clusters{number}.safetensors"
    weights = folder / f"round{number}.safetensors"
    torch.manual_seed(run.seed)
    model = HuBERT(dataclasses.replace(section.model, n_classes=n_clusters)).to(run.device)
    if previous is not None:  # only the codewords are new
        model.load_state_dict(previous.state_dict() | {"label_embs": model.label_embs})
    if not weights.exists():
        rows = some_sentences(training_rows(run.manifest, section.speaker), section.sentences, run.seed)
        if not labels_file.exists() and rank() == 0:
            write_targets(run, section, rows, features, n_clusters, labels_file)
        barrier()
        train_round(run, section, number, rows, model)
        if checkpoint.takes_part(model):
            checkpoint.save_tensors(weights, model.state_dict())
        if rank() == 0:
            states.remove(folder / f"round{number}")
        barrier()
        if checkpoint.is_divided(model.parameters()):
            model = HuBERT(model.config).to(run.device)
    checkpoint.assign(model, checkpoint.read_tensors(weights), str(weights))
    return model.to(run.device).eval()


def write_targets(run: Run, section: HubertSection, rows: list, features: Callable, k: int, path: Path):
    """The cluster of each frame of each recording, as the file `path`."""
    kmeans = fit_kmeans(run, rows, features, k, section.cluster_frames)
    title = f"targets, {k} clusters"
    labels = unit_files.map_speech(
        run.corpus, rows, lambda wav: kmeans.predict(features(wav)), run.device, title
    )
    save_labels(path, [label.short().cpu().numpy() for label in labels])


def train_round(run: Run, section: HubertSection, number: int, rows: list[dict], model: HuBERT):
    folder = run.state("hubert")
    labels, _ = load_labels(folder / f"clusters{number}.safetensors", model.config.n_classes)
    if len(labels) != len(rows):
        raise ValueError(f"{folder} is of other recordings than {run.corpus}; delete it to begin anew")
    paths = [run.corpus / row["wav"] for row in rows]
    batch_at = crops(
        paths,
        labels,
        section.frames,
        run.seed,
        section.batch_size,
        section.accumulate,
        rank(),
        world_size(),
        section.perturb,
    )
    batch_at = imitated(batch_at, section.imitation, run.seed, paths)

    def with_masks(step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [(wav, labels, mask_spans(section, run.seed, draws)) for wav, labels, draws in batch_at(step)]

    def loss(model: HuBERT, batch) -> Loss:
        wav, labels, mask = batch
        total, weight, correct, n_masked = model.masked_losses(wav, labels, mask, section.unmasked_weight)
        frames = torch.tensor(labels.numel(), device=labels.device)
        return Loss(total, weight, frames, {"accuracy": (correct, n_masked)})

    optimize(run, f"hubert{number}", folder / f"round{number}", model, loss, with_masks, section)


def mask_spans(section: HubertSection, seed: int, draws: Tensor) -> Tensor:
    """(B, T) bool: the masked frames of each crop, a function of the crop's number and not of its rank."""
    masks = []
    for draw in draws.tolist():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} mask {draw}".encode()))
        masks.append(span_mask(1, section.frames, section.mask_prob, section.mask_span, generator))
    return torch.cat(masks)


def fit_kmeans(run: Run, rows: list[dict], features: Callable, k: int, n_frames: int) -> KMeans:
    """k-means on some n_frames frames of randomly chosen recordings."""
    chosen = []
    frames = 0
    for row in random.Random(run.seed).sample(rows, len(rows)):
        chosen.append(row)
        frames += 50 * row.get("seconds", 10)
        if frames > n_frames:
            break
    x = unit_files.map_speech(run.corpus, chosen, features, run.device, f"features for {k} clusters")
    return KMeans.fit(torch.cat(x), k, run.seed).to(run.device)


def save_labels(path: Path, labels: list[np.ndarray], **more: Tensor):
    """The labels of each recording end to end, how many each has, and `more`: a safetensors file."""
    lengths = torch.tensor([len(row) for row in labels])
    flat = torch.from_numpy(np.concatenate(labels))
    checkpoint.save_tensors(path, {"flat": flat, "lengths": lengths, **more})


def load_labels(path: Path, n_classes: int) -> tuple[list[np.ndarray], dict[str, Tensor]]:
    """(the labels of each recording, `more`); ValueError unless each label is one of 0..n_classes-1."""
    tensors = checkpoint.read_tensors(path)
    with one_line(path):
        flat, lengths = tensors.pop("flat"), tensors.pop("lengths")
        whole = [(t.ndim, t.is_floating_point()) for t in (flat, lengths)] == [(1, False)] * 2
        if not whole or min(lengths.tolist(), default=-1) < 0 or lengths.sum() != len(flat) or not len(flat):
            raise ValueError("not the labels of recordings; delete it to make them again")
        if not 0 <= flat.min() <= flat.max() < n_classes:
            raise ValueError(f"labels that are not of {n_classes} clusters; delete it to make them again")
        return [row.numpy() for row in flat.split(lengths.tolist())], tensors


# ---- Stage units: k-means on a layer, and every recording as units -----------------------------------------


def make_units(run: Run, section: UnitsSection, hubert: HubertSection, normalizer: NormalizerSection):
    """Writes model/hubert (HuBERT as far as the units need it, and the clusters) and units.jsonl."""
    folder = run.state("units")
    targets = folder / "found"
    # What a killed run has extracted was computed with these clusters: they are not refitted.
    if rank() == 0 and not (folder / "found/units.json").exists():
        find_units(run, section, hubert).save_pretrained(folder / "found")
    barrier()
    extractor = UnitExtractor.from_pretrained(folder / "found").to(run.device)
    if normalizer.steps:
        for number in range(1, normalizer.rounds + 1):
            normalize_speech(run, normalizer, extractor, targets, number)
            if checkpoint.is_divided(extractor.model.parameters()):
                extractor.save_pretrained(folder / "normalized")
                barrier()
                extractor = UnitExtractor.from_pretrained(folder / "normalized").to(run.device)
    rows = read_manifest(run.manifest)
    unit_files.extract(run.corpus, rows, run.units, extractor, run.device, folder)
    imitate_recordings(run, section.imitation, rows, extractor, folder / "imitated")
    if rank() == 0:
        extractor.save_pretrained(run.model / "hubert")
    barrier()


def imitate_recordings(run: Run, how: Imitation, rows: list[dict], extractor: UnitExtractor, work: Path):
    """Writes run.imitated, the units of a share of the training recordings as imitated: none, no file."""
    if not how.share:
        if rank() == 0:
            run.imitated.unlink(missing_ok=True)
        return
    rows = [row for row in rows if row["split"] == "train" and row["text"] and row["kind"] != "answer"]
    paths = [run.corpus / row["wav"] for row in rows]
    rows = [row for row in rows if draw_of(run.seed, "heard again", row["id"]).random() < how.share]

    def babble(draw: np.random.Generator) -> np.ndarray:
        return audio.load(paths[draw.integers(len(paths))])

    def encode(wav: Tensor) -> tuple[list[int], list[int]]:
        samples = wav.cpu().numpy()
        draw = draw_of(run.seed, "imitated", zlib.crc32(samples.tobytes()))
        return extractor(torch.from_numpy(imitate(samples, draw, how, babble).wav).to(run.device))

    work.mkdir(exist_ok=True)
    unit_files.extract(run.corpus, rows, run.imitated, encode, run.device, work)


def find_units(run: Run, section: UnitsSection, hubert: HubertSection) -> UnitExtractor:
    """The last round's HuBERT up to section.layer, with k-means on that layer; or the one that is given."""
    if section.hubert:
        return open_hubert(section)
    weights = run.state("hubert") / f"round{len(hubert.clusters)}.safetensors"
    tensors = without_layers_above(section.layer, checkpoint.read_tensors(weights))
    head = ("final_proj", "label_embs")  # of pre-training
    tensors = {name: t for name, t in tensors.items() if not name.startswith(head)}
    model = HuBERT(dataclasses.replace(hubert.model, n_classes=0, n_layers=section.layer))
    checkpoint.assign(model, tensors, str(weights))
    model.to(run.device).eval()
    features = partial(layer_features, model, section.layer, section.smooth)
    rows = training_rows(run.manifest, section.speaker, "units.speaker")
    kmeans = fit_kmeans(run, rows, features, section.clusters, section.cluster_frames)
    return UnitExtractor(model, kmeans, section.layer, section.smooth)


# ---- Ours: a speech normalizer -----------------------------------------------------------------------------
# Lee et al. 2022 fine-tune HuBERT with CTC so that any speaker's utterance gets the units of one target
# speaker. Here a small corpus has the same sentence from both, so every frame gets a target: the unit of
# the target speaker's frame that it is aligned with (dynamic time warping). The clusters stay as they are.


class Target(NamedTuple):
    """Target unit sequence of one recording."""

    id: str
    units: np.ndarray  # (T,)
    distance: float  # DTW cost to the target speaker's rendition (0 for the target speaker)


def normalize_speech(
    run: Run, section: NormalizerSection, extractor: UnitExtractor, targets: Path, number: int = 1
):
    """Fine-tunes HuBERT so that any speaker's utterance gets the units of the target speaker's rendition.

    Both are aligned by HuBERT as it is when round `number` begins: a file in the folder `targets`."""
    name = f"normalize{number}" if number > 1 else "normalize"
    target_file = targets / f"targets{number if number > 1 else ''}.safetensors"
    rows = {row["id"]: row for row in read_manifest(run.manifest) if row["split"] == "train"}
    if not target_file.exists() and rank() == 0:
        chosen = some_sentences([*rows.values()], section.sentences, run.seed)
        found = normalizer_targets(run, chosen, extractor)
        ids = bytearray("\n".join(target.id for target in found).encode())
        distance = torch.tensor([target.distance for target in found], dtype=torch.float64)
        ids = torch.frombuffer(ids, dtype=torch.uint8)
        save_labels(target_file, [target.units for target in found], ids=ids, distance=distance)
    barrier()
    labels, more = load_labels(target_file, len(extractor.kmeans.centers))
    with one_line(target_file):
        ids = bytes(more["ids"].numpy()).decode().split("\n")
        distance = more["distance"].numpy()
        if not len(ids) == len(distance) == len(labels) or not (distance >= 0).all():
            raise ValueError("not the targets of recordings; delete it to make them again")
    if not rows.keys() >= set(ids):
        folder = run.state("units")
        raise ValueError(
            f"{target_file} is of other recordings than {run.corpus}; delete {folder} to begin anew"
        )
    other = np.array([rows[id]["speaker"] != TARGET_SPEAKER for id in ids])
    others = section.others if other.any() else 0.0
    # Recordings further from the target speaker are sampled more often.
    weights = np.where(other, others * distance / (distance.sum() or 1.0), (1 - others) / (~other).sum())
    perturb = [section.perturb_others if is_other else section.perturb for is_other in other]
    paths = [run.corpus / rows[id]["wav"] for id in ids]
    recordings = [Recording(*fields) for fields in zip(paths, labels, perturb, weights)]
    batch_at = weighted_crops(
        recordings,
        section.frames,
        run.seed,
        section.batch_size,
        section.accumulate,
        rank(),
        world_size(),
    )
    batch_at = imitated(batch_at, section.imitation, run.seed, paths)

    def loss(model: HuBERT, batch) -> Loss:
        wav, labels, _ = batch
        there = labels >= 0  # not padding
        x = smooth(model.features(wav, extractor.layer), extractor.smooth)[there]
        scores = -extractor.kmeans.distances(x) / section.temperature
        same = (scores.argmax(1) == labels[there]).sum()
        total = nn.functional.cross_entropy(scores, labels[there], reduction="sum")
        n = there.sum()
        return Loss(total, n, n, {"same": (same, n)})

    # Nothing is masked: data parallelism would wait for the gradient of the mask's embedding.
    extractor.model.masked_spec_embed.requires_grad_(False)
    optimize(run, name, run.state("units") / name, extractor.model, loss, batch_at, section)


def normalizer_targets(run: Run, rows: list[dict], extractor: UnitExtractor) -> list[Target]:
    """Target speaker: its own units. Others: the units of the closest target-speaker rendition of the same
    sentence, aligned by DTW. Sentences without one are skipped."""
    own = [row for row in rows if row["speaker"] == TARGET_SPEAKER]
    if not own:
        raise ValueError(
            f"{run.corpus}: normalizer.steps needs training recordings of the target speaker, "
            f"{TARGET_SPEAKER}; set it to 0"
        )
    others = [row for row in rows if row["speaker"] != TARGET_SPEAKER]
    needed = {row["text"] for row in others} - {""}
    targets = []
    renditions = defaultdict(list)  # of a sentence by the target speaker: (features, units)
    for row, (x, units) in features_and_units(run, own, extractor, "target speaker"):
        targets.append(Target(row["id"], units, 0.0))
        if row["text"] in needed:
            renditions[row["text"]].append((x, units))
    others = [row for row in others if row["text"] in renditions]
    for row, (x, _) in features_and_units(run, others, extractor, "other speakers"):
        best = Target(row["id"], np.zeros(0), math.inf)
        for rendition, units in renditions[row["text"]]:
            path, distance = unit_files.dtw_align(x, rendition)
            if distance < best.distance:
                best = Target(row["id"], units[path], distance)
        if best.distance < math.inf:
            targets.append(best)
    return targets


def features_and_units(
    run: Run, rows: list[dict], extractor: UnitExtractor, title: str, portion: int = 2000
) -> Iterator[tuple[dict, tuple[np.ndarray, np.ndarray]]]:
    """(row, (features (T, C) in half precision, units (T,))) of each row; `portion` of them in memory at a
    time."""

    def encode(wav: Tensor) -> tuple[np.ndarray, np.ndarray]:
        x = layer_features(extractor.model, extractor.layer, extractor.smooth, wav)
        return x.half().cpu().numpy(), extractor.kmeans.predict(x).short().cpu().numpy()

    for first in range(0, len(rows), portion):
        some = rows[first : first + portion]
        yield from zip(some, unit_files.map_speech(run.corpus, some, encode, run.device, title))

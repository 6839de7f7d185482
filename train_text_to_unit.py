"""Trains the text-to-unit generator, and makes the speech of dialogues with it (SpeechGPT §3.2): stage t2u.

It learns from recordings in the voice of the model, pairs of text and units; with `other_voices` also from
those of everybody else, whose texts then begin with <s>. It writes the units of answers, and of questions
that nobody has recorded, to out/t2u.jsonl: of those that stage 3 will read ([stage3] speech = "t2u"). So
dialogues need no recordings; a question made so is asked in the voice of the model.

    {"text": "Three plus four is seven.", "units": [57, 5, 602, ...]}          (none: it came to no end)

References: text_to_unit.py for the network, its loss and its search; training/loop.py for the loop.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from config import Amount, Count, Share, Whole
from data import batches, documents
from files import write_jsonl
from generate import one_thread
from kmeans import KMeans
from run import Run, barrier, progress, rank, world_size
from text_to_unit import Search, TextToUnit, TextToUnitConfig, Vocabulary
from tokenizer import Tokenizer
from training import states
from training.loop import Loss, Optimization, optimize
from training.reading import texts_to_speak

Ids = tuple[list[int], list[int]]  # of a text and of its units, both with </s>


@dataclass
class TextToUnitSection(Optimization):
    """The paper gives no numbers. Defaults: those of Vaswani's base model, which is always whole."""

    steps: Whole = 100_000
    batch_size: Count = 256  # pairs of text and units
    lr: Amount = 7e-4
    warmup: Whole = 4000
    betas: tuple[Share, Share] = (0.9, 0.98)
    weight_decay: Amount = 0.0
    smoothing: Share = 0.1  # label smoothing
    noise: Share = 0.0  # fraction of the decoder's input units that are hidden in training
    # ours: the loss's weight of looking elsewhere in the text than a unit's place in the speech suggests
    guide: Amount = 0.0
    other_voices: bool = False  # learn from the recordings of other speakers, too
    beam: Count = 5  # hypotheses of the search; 1: greedy
    model: TextToUnitConfig = field(default_factory=TextToUnitConfig)
    # Layers of the decoder are called in two ways, and a call leaves its keys behind: neither divided nor
    # computed again.
    sharding: Literal["ddp"] = "ddp"
    checkpointing: Literal["none"] = "none"
    compile: Literal[False] = False


def train(run: Run, section: TextToUnitSection, n_units: int, centers: bool) -> None:
    """Writes model/text_to_unit. centers: embeddings of units start as the k-means centers."""
    vocabulary = Vocabulary.new((run.tokenizer / "tokenizer.model").read_bytes(), n_units)
    tables = documents.read_tables(run.out, n_units)
    torch.manual_seed(run.seed)
    model = TextToUnit(section.model, vocabulary)
    if centers:
        start = KMeans.from_pretrained(run.model / "hubert").embeddings(section.model.decoder.dim)
        model.decoder.embed_tokens.weight.data[-n_units:] = start * section.model.decoder.dim**-0.5
    model.to(run.device)
    ids = encode(model, documents.pairs(tables, "train"), "train", section.other_voices)
    batch_at = batches_of_similar_length(ids, run.seed, section.batch_size, section.accumulate)

    letters = letters_of(vocabulary).to(run.device)

    def loss(model: TextToUnit, batch: tuple[Tensor, Tensor]) -> Loss:
        guide = section.guide * off_the_diagonal(*batch, letters) if section.guide else None
        smoothed, plain, n = model.losses(*batch, section.smoothing, section.noise, guide)
        read = n + batch[0].ne(Vocabulary.pad).sum()
        return Loss(smoothed, n, read, {"nll": (plain, n)})

    search = search_of(model, section, tables)
    probe = held_out_probe(run, model, documents.pairs(tables, "heldout"), search)
    if rank() == 0 and not states.meta(run.state("t2u")):
        run.spoken.unlink(missing_ok=True)  # of another generator
    optimize(run, "t2u", run.state("t2u"), model, loss, batch_at, section, probe)
    if rank() == 0:
        model.save_pretrained(run.model / "text_to_unit")
    barrier()


def search_of(model: TextToUnit, section: TextToUnitSection, tables: documents.Tables) -> Search:
    """Nothing is spoken that is twice as long as the longest recording of that voice, or longer than the
    model can speak."""
    own = [pair for pair in documents.pairs(tables, "train") if documents.fits("tts", "", pair)]
    longest = max(len(pair.units) for pair in own)
    return Search(section.beam, max_len_b=min(2 * longest, model.config.max_target - 1))


def encode(
    model: TextToUnit, pairs: list[documents.Pair], split: str, other_voices: bool = False
) -> list[Ids]:
    """The recordings in the voice of the model, as ids; those of other voices after <s>. What is longer than
    the model reads or writes is left out, and counted."""
    found, n_own, longer = [], 0, 0
    for pair in pairs:
        own = documents.fits("tts", "", pair)
        if (own or other_voices) and pair.text.strip():
            text, units = model.vocabulary.encode(pair.text), model.vocabulary.from_units(pair.units)
            text = text if own else [Vocabulary.bos, *text]
            if len(text) > model.config.max_source or len(units) > model.config.max_target:
                longer += 1
            else:
                found.append((text, units))
                n_own += own
    if split == "train" and not n_own:
        raise ValueError(
            "t2u: no recording of the model's voice has a text to learn from; see docs/own-data.md"
        )
    if longer and rank() == 0:
        print(f"t2u: {longer} recordings of split {split} are longer than t2u.model allows, and left out")
    return found


# ---- Ours: speech follows its text -------------------------------------------------------------------------
# Where the decoder should look is learned late, from few recordings; but about where is known (Tachibana et
# al. 2018): at a third of the letters when a third of the units is spoken.

WIDTH = 0.1  # of the length: so far off it costs 0.4 of the most


def letters_of(vocabulary: Vocabulary) -> Tensor:
    """(V,): letters of each piece, the space before a word among them; special symbols have none."""
    special = Vocabulary.unk + 1
    return torch.tensor([0.0] * special + [float(len(piece)) for piece in [*vocabulary.text][special:]])


def off_the_diagonal(text: Tensor, target: Tensor, letters: Tensor) -> Tensor:
    """text (B, S), target (B, T), padded -> (B, T, S): 0 where piece and unit are at the same fraction of
    their sentence, up to 1 where they are not; 0 in the padding of target."""
    lengths = letters[text]
    ends = lengths.cumsum(1)
    pieces = (ends - lengths / 2) / ends[:, -1:].clamp(min=1)  # (B, S), the middle of each
    real = target.ne(Vocabulary.pad)
    units = (torch.arange(target.shape[1], device=target.device) + 0.5) / real.sum(1, keepdim=True)  # (B, T)
    distance = units[:, :, None] - pieces[:, None]  # (B, T, S)
    return (1 - torch.exp(-distance.square() / (2 * WIDTH**2))) * real[:, :, None]


# ---- Batches: pairs of similar length ----------------------------------------------------------------------

SORTED_STEPS = 16  # steps whose pairs are divided among them by length


def batches_of_similar_length(ids: list[Ids], seed: int, batch_size: int, accumulate: int) -> Callable:
    """step -> [(texts (B, S), units (B, T)) of each micro-batch], padded. The pairs of a few steps are drawn
    together, sorted by length, cut into steps, and the steps shuffled: less padding, and still random."""
    size = SORTED_STEPS * batch_size

    @lru_cache(2)
    def window(number: int) -> list[int]:
        items = [batches.order(i, len(ids), seed)[0] for i in range(number * size, (number + 1) * size)]
        items.sort(key=lambda item: len(ids[item][1]))
        steps = [items[start : start + batch_size] for start in range(0, size, batch_size)]
        random.Random(f"{seed} {number}").shuffle(steps)
        return [item for step in steps for item in step]

    def make(indices: range) -> tuple[Tensor, Tensor]:
        return pad([ids[window(index // size)[index % size]] for index in indices])

    return batches.split_batch(make, batch_size, accumulate, rank(), world_size())


def pad(rows: list[Ids]) -> tuple[Tensor, Tensor]:
    texts, units = ([torch.tensor(ids) for ids in side] for side in zip(*rows))
    shape = {"batch_first": True, "padding_value": Vocabulary.pad}
    return pad_sequence(texts, **shape), pad_sequence(units, **shape)


def held_out_probe(
    run: Run, model: TextToUnit, pairs: list[documents.Pair], search: Search
) -> Callable[[], tuple[dict[str, float], str]]:
    """-log p of a held-out unit, on up to 64 recordings; and what the model writes for two of their texts."""
    pairs = [pair for pair in pairs if documents.fits("tts", "", pair)]
    pairs = random.Random(run.seed).sample(pairs, min(64, len(pairs)))
    ids = encode(model, pairs, "heldout")

    @torch.no_grad()
    def probe() -> tuple[dict[str, float], str]:
        if not ids:
            return {}, ""
        _, plain, n = model.losses(*(side.to(run.device) for side in pad(ids)))
        lines = ""
        for pair, made in zip(pairs[:2], model.generate([pair.text for pair in pairs[:2]], search)):
            lines += f"\n  text     {pair.text}\n  units    {made}\n  expected {pair.units}"
        return {"held_out_nll": (plain / n).item()}, lines

    return probe


# ---- The speech of dialogues -------------------------------------------------------------------------------

SAVE_EVERY = 60.0  # seconds


def speak_dialogues(run: Run, section: TextToUnitSection, stage3) -> None:
    """Writes to t2u.jsonl what it lacks of the speech that stage 3 reads with its settings of now."""
    if rank() == 0:
        tok = Tokenizer.from_pretrained(run.tokenizer)
        spoken = documents.read_spoken(run.spoken, tok.n_units) if run.spoken.exists() else {}
        tables = documents.read_tables(run.out, tok.n_units)
        texts = [text for text in texts_to_speak("stage3", run, stage3, tok, tables) if text not in spoken]
        if texts or not spoken:
            model = TextToUnit.from_pretrained(run.model / "text_to_unit", run.device)
            search = search_of(model, section, tables)
            rows = [{"text": text, "units": units} for text, units in spoken.items()]
            saved = time.monotonic()
            for more in speak(model, texts, search):
                rows += more
                if time.monotonic() - saved > SAVE_EVERY:  # a killed run goes on from there
                    write_jsonl(run.spoken, rows)
                    saved = time.monotonic()
            write_jsonl(run.spoken, rows)
    barrier()


def speak(model: TextToUnit, texts: list[str], search: Search, portion: int = 64) -> Iterator[list[dict]]:
    """Rows of t2u.jsonl, some at a time, the shortest texts first. A text that the model cannot read, or does
    not end to speak, has no units."""
    longer, endless = 0, 0
    order = sorted(texts, key=len)
    with progress(len(texts), title="t2u: speech of dialogues", unit="text") as bar, one_thread(model):
        for start in range(0, len(order), portion):
            chosen = order[start : start + portion]
            fit = [text for text in chosen if len(model.vocabulary.encode(text)) <= model.config.max_source]
            longer += len(chosen) - len(fit)
            found = dict.fromkeys(chosen, []) | dict(zip(fit, model.generate(fit, search, portion)))
            for text, units in found.items():
                if len(units) > 0.9 * search.max_len_b:
                    endless += 1
                    found[text] = []
            bar.update(len(chosen))
            yield [{"text": text, "units": units} for text, units in found.items()]
    if longer or endless:
        print(
            f"t2u: of {len(texts)} texts {longer} are longer than t2u.model.max_source, {endless} came to no "
            "end; they are read as text",
            flush=True,
        )

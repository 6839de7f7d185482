"""What a stage of the language model reads: its documents as ids, written once, in the order of its steps.

    out/tokens/stage2/train      the documents of all steps: step i reads those from i * batch_size on
    out/tokens/stage2/heldout    up to 64 documents for the loss on held-out data

A document is drawn anew each time it is read: its task description, its format, which recording, its noise
(data/documents.py). All of that is a function of (seed, epoch, item) alone, and so is which item comes when.
So every reading can be written before the first step, in the order of the steps, and nothing is lost by it:
the tenth epoch has other instructions than the first. It costs 2 1/8 bytes for each token that training will
read (for the four stages of configs/tiny.toml 23 MB, and 32 s of one core that the steps no longer take), is
done by --workers processes, and makes each step a matter of reading: no rank but the first ever holds the
corpus, and none while it trains.

The maps are made anew when what they were made of has changed: seed, mix, max_len, noise, number of
documents, tokenizer, texts, units, or the code that renders. A killed run makes the parts that are missing.

A corpus whose texts and units do not even once fit in the memory of one process (some millions of
recordings) is written by data/speechinstruct/prepare.py and data/tokens.py, row by row, each document once as
in the paper. Its maps are named with their shares in `tokens` of a stage and read in shuffled epochs:

    [stage2]
    tokens = { "out/instruct/cross_modal" = 0.8, "out/instruct/text" = 0.2 }
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tokenizer
from data import documents, tokens
from data.batches import Document
from data.units import clusters_of
from files import fingerprint, read_json
from run import Run, barrier, rank
from tokenizer import Tokenizer

HELD_OUT = 64  # documents of the loss on held-out data
PART = 10_000  # documents


def stage_documents(
    name: str, run: Run, section, tok: Tokenizer
) -> tuple[Callable[[int], Document], list[Document]]:
    """(index -> the index-th document that the stage reads; up to HELD_OUT held-out documents)."""
    if section.tokens:
        return of_maps(name, run, section, tok)
    maps = []
    for source in splits_of(name, run, section):
        folder = run.out / "tokens" / name / source.split
        if rank() == 0:
            make(folder, source, len(tok), run.workers or 1)
        barrier()
        maps.append(tokens.TokenMap(folder, len(tok)))
        _opened.clear()
    train, held_out = maps
    return train.__getitem__, [held_out[i] for i in range(len(held_out))]


# ---- Documents that a stage makes --------------------------------------------------------------------------


class Source(NamedTuple):
    """What the documents of a stage are made from, as another process can be told."""

    out: Path  # the folder of the run
    name: str
    split: str
    size: int | None  # documents; None: HELD_OUT, or fewer
    mix: dict[str, float]
    max_len: int
    noise: float
    seed: int
    has_units: bool  # the text model comes before them
    spoken: Path | None  # speech by the text-to-unit generator, if it is read

    @property
    def origin(self) -> dict:
        """What a map is made of; if that is the same, so is the map."""
        units = [self.out / "units.jsonl", self.out / "imitated.jsonl"] if self.has_units else []
        return {
            "mix": [[kind, share] for kind, share in self.mix.items()],
            "max_len": self.max_len,
            "noise": self.noise,
            "seed": self.seed,
            "tokenizer": tokens.fingerprint_of(self.out / "tokenizer"),
            "texts": fingerprint(self.out / "manifest.jsonl", self.out / "dialogues.jsonl"),
            "units": fingerprint(*units, *([self.spoken] if self.spoken else [])),
            "code": fingerprint(tokenizer.__file__, documents.__file__),
        }

    def examples(self, tok: Tokenizer, quiet: bool) -> list[documents.Example]:
        tables = documents.read_tables(self.out, tok.n_units if self.has_units else None)
        if not self.spoken:
            return fitting_examples(tables, self.split, self.name, self, tok, quiet)
        spoken = documents.read_spoken(self.spoken, tok.n_units)
        tables = tables._replace(generated=True)
        return fitting_examples(tables, self.split, self.name, self, tok, quiet, spoken)


def splits_of(name: str, run: Run, section) -> list[Source]:
    """Of the documents that a stage reads in training, and of those held out."""
    spoken = run.spoken if reads_generated(section) else None
    has_units = name != "text"
    rest = (section.mix, section.max_len, section.noise, run.seed, has_units, spoken)
    size = max(1, section.steps * section.batch_size)
    return [Source(run.out, name, "train", size, *rest), Source(run.out, name, "heldout", None, *rest)]


_opened: list[tuple[Source, Tokenizer, list[documents.Example]]] = []  # the last one, in each process


def opened(source: Source, quiet: bool = True) -> tuple[Tokenizer, list[documents.Example]]:
    if not _opened or _opened[0][0] != source:
        tok = Tokenizer.from_pretrained(source.out / "tokenizer")
        _opened[:] = [(source, tok, source.examples(tok, quiet))]
    return _opened[0][1:]


def drawn(
    source: Source, examples: list[documents.Example], start: int = 0, end: int | None = None
) -> Iterator[tuple[documents.Example, random.Random]]:
    """The examples number `start` to `end` that the stage reads, each with its random numbers."""
    if source.split == "train":
        for index in range(start, source.size if end is None else end):
            yield documents.draw_example(examples, index, source.seed)
    else:
        chosen = random.Random(source.seed).sample(examples, min(HELD_OUT, len(examples)))
        for i, example in enumerate(chosen[start:end], start):
            yield example, random.Random(i)


def rendered(source: Source, start: int, end: int) -> Iterator[Document]:
    """Documents number `start` to `end` of those that the stage reads."""
    tok, examples = opened(source)
    noise = source.noise if source.split == "train" else 0.0
    for example, draw in drawn(source, examples, start, end):
        yield documents.render(tok, example, draw, noise)


def make(folder: Path, source: Source, vocab_size: int, workers: int):
    """Writes the map `folder`, unless it is there."""
    origin, size = source.origin, source.size
    record = folder / "tokens.json"
    if record.is_file():
        table = read_json(record)
        if isinstance(table, dict) and origin.items() <= table.items() and size in (None, table.get("size")):
            return
    _, examples = opened(source, quiet=False)  # here, where it can be told what is left out
    if size is None:
        size = min(HELD_OUT, len(examples))
    tokens.make(
        folder,
        size,
        PART,
        vocab_size,
        origin | {"size": size},
        partial(rendered, source),
        workers,
        title=f"{source.name}, {source.split}",
        unit=" documents",
    )


# ---- Speech that is generated ------------------------------------------------------------------------------


def reads_generated(section) -> bool:
    """Whether a stage of the language model reads speech of the text-to-unit generator."""
    return getattr(section, "speech", "recorded") == "t2u" and section.steps > 0 and not section.tokens


def texts_to_speak(name: str, run: Run, section, tok: Tokenizer, tables: documents.Tables) -> list[str]:
    """The texts whose speech the stage will read, once each: answers, and questions without a recording.

    A stage that reads few of the dialogues needs few of them spoken; one that reads long enough, all."""
    tables = tables._replace(generated=True)
    texts = []
    for source in splits_of(name, run, section):
        examples = fitting_examples(tables, source.split, name, section, tok, quiet=True)
        for example, draw in drawn(source, examples):
            if example.kind in documents.DIALOGUE_KINDS:
                exchange = example.source
                mode = documents.draw_mode(example, draw)
                if mode[0] == "s" and exchange.question_units == documents.TO_COME:
                    texts.append(exchange.question)
                if mode[2] == "s":
                    texts.append(exchange.answer)
    return list(dict.fromkeys(texts))


# ---- Documents that are not too long -----------------------------------------------------------------------


def fitting_examples(
    tables: documents.Tables,
    split: str,
    name: str,
    section,
    tok: Tokenizer,
    quiet: bool = False,
    spoken: dict[str, list[int]] | None = None,
) -> list[documents.Example]:
    """The documents of a stage that are not longer than its max_len. How many are longer is said, before the
    first step; it is an error if nothing of a kind is left to train on.

    `spoken`: speech of the text-to-unit generator. A document that it would make longer goes without, as
    text: leaving it out would change which others are read, and thereby which speech was needed."""

    def report(longer: str, n_left: int):
        line = f"{name}, {split}: {longer}, are longer than {name}.max_len = {section.max_len}"
        if split == "train" and not n_left:
            raise ValueError(f"{line}, and nothing is left of them: raise it, or cut long recordings")
        if rank() == 0 and not quiet:
            print(f"{line}: they are left out; raise it to use them", flush=True)

    def shorten(kind: str, sources: list) -> list:
        sources = documents.short_enough(tok, section.max_len, report, kind, sources)
        if spoken is None or kind not in documents.DIALOGUE_KINDS:
            return sources
        voiced = [documents.with_speech(exchange, spoken) for exchange in sources]
        lengths = documents.lengths_of(tok, section.max_len, kind, voiced)
        longer = sum(length > section.max_len for length in lengths)
        if longer and rank() == 0 and not quiet:
            print(
                f"{name}, {split}: with the speech of the text-to-unit generator {longer} documents of kind "
                f"'{kind}' are longer than {name}.max_len = {section.max_len}: they are read as text; raise "
                "it to use their speech",
                flush=True,
            )
        rows = zip(lengths, voiced, sources)
        return [voice if length <= section.max_len else mute for length, voice, mute in rows]

    return documents.examples(tables, split, section.mix, shorten)


# ---- Documents that are there as maps ----------------------------------------------------------------------


def open_maps(run: Run, section) -> dict[tokens.TokenMap, float]:
    """The maps in `tokens` of a stage, with their shares. ValueError if one was made with another tokenizer
    or of other units than the run's, as far as it has them yet."""
    clusters = clusters_of(run.model / "hubert")
    maps = {}
    for folder, share in section.tokens.items():
        found = tokens.TokenMap(folder)
        if (run.tokenizer / "added_tokens.json").is_file():
            tokens.check_map(found, run.tokenizer, clusters)
        maps[found] = share
    return maps


def of_maps(name: str, run: Run, section, tok: Tokenizer) -> tuple[Callable[[int], Document], list[Document]]:
    """stage_documents of maps."""
    maps = open_maps(run, section)
    train = tokens.Mixture(maps, section.max_len)
    if train.too_long and rank() == 0:
        print(
            f"{name}: {train.too_long:,} documents are longer than {name}.max_len = {section.max_len}: they "
            "are left out; raise it to use them",
            flush=True,
        )
    held_out = tokens.Mixture(maps, section.max_len, held_out=True)
    some = random.Random(run.seed).sample(held_out, min(HELD_OUT, len(held_out)))
    return tokens.shuffled(train, run.seed, section.noise, tok.unit_ids), some

"""SpeechInstruct and its neighbors: the documents that the language model reads (paper §3, §4.2).

    text      What is three plus four? Three plus four is seven.                     (every token is a target)
    stage 1   <sosp><17><4><93>...<eosp>                                             (every token, eq. 3)
    stage 2   [Human]: {D} This is input: {U}<eoh>. [SpeechGPT]: {T}<eoa>.           (the answer, eq. 4)
              [Human]: {D} This is input: {T}<eoh>. [SpeechGPT]: {U}<eoa>.
    stage 3   [Human]: This is a speech instruction: {SpeechI}. ... <eoh>. [SpeechGPT]:
              [tq] {TextI}; [ta] {TextR}; [ua] {SpeechR}<eoa>.                       (the answer)

What a stage reads is a mix of kinds of documents, such as {"asr": 0.5, "tts": 0.5}:

    text             a sentence, or a question with its answer
    speech           units alone
    asr, tts         §3.1: recognition of every speaker, synthesis in the voice of the target speaker
    s2s s2t t2s t2t  Appendix C, speech or text in, speech or text out; "chain" draws one of the four
    standard         Appendix E, one of the four
    t2t/minus        of any kind above with questions, one family alone, here "minus" of the tiny world;
                     "reading", sentences to read aloud, is not in "t2t" unless it is named so

An Example is what a document is made from; `render` makes the document, with instructions, formats and
renditions drawn anew in every epoch. To see some, with their targets, and how they are packed:

    python -m data.documents --show 3
    python -m data.documents --show 5 --run out/tiny --mix '{ asr = 0.5, "t2t/minus" = 0.5 }'
"""

from starting import starting

if __name__ == "__main__":
    starting()  # a Ctrl-C during the imports below is one line, too

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import config
import tokenizer
from data import batches
from data.batches import Document
from data.corpus import SPLITS, TARGET_SPEAKER, read_dialogues, read_manifest, text_key
from data.units import read_table, read_units
from files import read_jsonl, show

READING = "reading"  # the family of sentences to read aloud
RECOGNIZED = ("units", "imitated")  # of a row: what there is of it to be recognized
MODES = ("s2s", "s2t", "t2s", "t2t")  # Appendix C
DIALOGUE_KINDS = (*MODES, "chain", "standard")
KINDS = ("text", "speech", "asr", "tts", *DIALOGUE_KINDS)


# ---- What documents are made from --------------------------------------------------------------------------


class Pair(NamedTuple):
    """A recording and its transcript."""

    units: list[int]
    text: str
    speaker: int
    imitated: bool = False  # to be recognized alone


class Exchange(NamedTuple):
    """(SpeechI, TextI, TextR, SpeechR) of §3.2, with all recordings of either side (possibly none)."""

    question: str
    answer: str
    family: str
    question_units: list[list[int]]
    answer_units: list[list[int]]


class Example(NamedTuple):
    """A document to be rendered."""

    kind: str  # of KINDS
    source: str | Pair | Exchange


class Tables(NamedTuple):
    """What the documents of a run are made from."""

    folder: Path  # of the run, for messages
    rows: list[dict]  # of the manifest, with their units
    dialogues: list[dict]
    generated: bool = False  # the text-to-unit generator speaks the dialogues (§3.2); else as recorded


def read_tables(folder: str | Path, n_units: int | None) -> Tables:
    """The tables in the folder of a run: manifest.jsonl, dialogues.jsonl and units.jsonl. If n_units is None
    there are no units yet: the documents can be counted, and those of text alone can be read."""
    folder = Path(folder)
    dialogues = read_dialogues(folder)
    if n_units is None:
        rows = [row | {"units": []} for row in read_manifest(folder)]
        return Tables(folder, rows, dialogues)
    rows = read_units(folder / "manifest.jsonl", folder / "units.jsonl", n_units)
    by_id = {row["id"]: row for row in rows}
    imitated = folder / "imitated.jsonl"
    for found in read_table(imitated, n_units) if imitated.exists() else ():
        if found["id"] in by_id:
            by_id[found["id"]]["imitated"] = found["units"]
    return Tables(folder, rows, dialogues)


def read_spoken(path: str | Path, n_units: int) -> dict[str, list[int]]:
    """t2u.jsonl: text -> units, none if it could not be spoken (train_text_to_unit.py)."""
    spoken = {}
    for number, row in enumerate(read_jsonl(path, ("text", "units")), 1):
        text, units = row["text"], row["units"]
        numbers = isinstance(units, list) and all(type(unit) is int for unit in units)
        if not isinstance(text, str) or not numbers or not all(0 <= unit < n_units for unit in units):
            raise ValueError(
                f"{path}, row {number}: must be a text and its units of 0 to {n_units - 1}; delete the file: "
                "the next run makes it again"
            )
        spoken[text] = units
    return spoken


def sentences(tables: Tables, split: str) -> list[str]:
    """The text of one split: every dialogue as question and answer; of what else was recorded every
    statement, and whatever its kind every text that no dialogue has."""
    dialogues = [row for row in tables.dialogues if row["split"] == split]
    in_dialogues = {row[side] for row in dialogues for side in ("question", "answer")}
    statements = set()
    for row in tables.rows:
        if row["split"] == split and (row["kind"] == "statement" or row["text"] not in in_dialogues):
            statements.add(row["text"])
    statements.discard("")
    texts = [f"{row['question']} {row['answer']}" for row in dialogues]
    texts += sorted(statements)
    # This second form shows the text model the markers of Appendix C, which to LLaMA are ordinary text: stage
    # 3 trains nothing but adapters, too late to learn an embedding.
    texts += [f"[tq] {row['question']}; [ta] {row['answer']}; [ua]" for row in dialogues]
    return texts


def pairs(tables: Tables, split: str) -> list[Pair]:
    """All recordings of a split."""
    rows = [row for row in tables.rows if row["split"] == split]
    return [Pair(row["units"], row["text"], row["speaker"]) for row in rows]


def to_recognize(tables: Tables, split: str) -> list[Pair]:
    """`pairs`, and those of them that were imitated, which are to be recognized alone."""
    again = [row for row in tables.rows if row["split"] == split and "imitated" in row]
    more = [Pair(row["imitated"], row["text"], row["speaker"], imitated=True) for row in again]
    return pairs(tables, split) + more


def exchanges(tables: Tables, split: str) -> list[Exchange]:
    """All dialogues of a split. `rendition`: training dialogues, with other recordings of their questions.

    Where the text-to-unit generator speaks, all answers are its, and questions without a recording: TO_COME
    stands for their speech."""
    questions: dict[str, list[list[int]]] = {}  # text -> units of each recording
    answers: dict[str, list[list[int]]] = {}
    for row in tables.rows:
        if row["split"] == split:
            questions.setdefault(row["text"], []).extend([row[key] for key in RECOGNIZED if key in row])
        if row["split"] == "train" and row["speaker"] == TARGET_SPEAKER:
            answers.setdefault(row["text"], []).append(row["units"])
    questions_by_key, answers_by_key = by_key(questions), by_key(answers)

    found = []
    for row in tables.dialogues:
        if row["split"] == ("heldout" if split == "heldout" else "train"):
            question, answer = row["question"], row["answer"]
            question_units = questions.get(question) or questions_by_key.get(text_key(question), [])
            answer_units = answers.get(answer) or answers_by_key.get(text_key(answer), [])
            if tables.generated:
                answer_units = TO_COME
                if not question_units and split != "rendition":
                    question_units = TO_COME
            found.append(Exchange(question, answer, row["family"], question_units, answer_units))
    return found


# What is read must not depend on what the generator makes: which texts it speaks depends on what is read. So
# dialogues are counted and drawn with this in place of its speech.
TO_COME: list[list[int]] = [[]]


def with_speech(exchange: Exchange, spoken: dict[str, list[int]]) -> Exchange:
    """The exchange with speech in place of TO_COME, as far as `spoken` has the text."""
    question_units, answer_units = exchange.question_units, exchange.answer_units
    if question_units == TO_COME:
        question_units = [spoken.get(exchange.question, [])]
    if answer_units == TO_COME:
        answer_units = [spoken.get(exchange.answer, [])]
    return exchange._replace(question_units=question_units, answer_units=answer_units)


def describe_dialogues(tables: Tables) -> list[str]:
    """How many of the training dialogues are spoken, for people to read."""
    found = exchanges(tables, "train")
    if not found:
        return []
    mute = [exchange.question for exchange in found if not exchange.question_units]
    answered = sum(bool(exchange.answer_units) for exchange in found)
    line = (
        f"dialogues: {len(found)} to train on; recordings speak {len(found) - len(mute)} of their questions"
    )
    line += f" and, in the model's voice, {answered} of their answers"
    return [f"{line} (not the question {show(mute[0])})" if mute else line]


def by_key(recordings: dict[str, list]) -> dict[str, list]:
    """Text -> recordings, with texts that differ in case, spaces or punctuation together."""
    together: dict[str, list] = {}
    for text, found in recordings.items():
        together.setdefault(text_key(text), []).extend(found)
    together.pop("", None)  # of recordings without text
    return together


# ---- The mix of a stage ------------------------------------------------------------------------------------


NEEDS = {  # what a kind lacks where there is nothing of it
    "asr": ", or give the recordings their text",
    "tts": ", or name a speaker with training recordings and text as corpus.voice",
} | dict.fromkeys(
    DIALOGUE_KINDS, ", or write dialogues.jsonl, with recordings of its questions (docs/own-data.md)"
)
READERS: dict[Callable, tuple[str, ...]] = {
    sentences: ("text",),
    to_recognize: ("speech", "asr", "tts"),
    exchanges: DIALOGUE_KINDS,
}


def examples(
    tables: Tables, split: str, mix: dict[str, float], shorten: Callable[[str, list], list] | None = None
) -> list[Example]:
    """One epoch: every example of every kind at least once; small kinds are repeated up to their share.

    Only rows of `split` are in it: what is held out never reaches a render of training. `shorten`, of
    (kind, sources), gives the sources whose documents are used, as `short_enough` does."""
    sources = sources_of(tables, split, mix)
    if shorten:
        sources = {name: shorten(name.split("/")[0], found) for name, found in sources.items()}
    mix = {name: share for name, share in mix.items() if sources[name]}
    size = max((len(sources[name]) / share for name, share in mix.items()), default=0)  # of the epoch
    found = []
    for name, share in mix.items():
        kind = name.split("/")[0]
        for i in range(round(share * size)):
            found.append(Example(kind, sources[name][i % len(sources[name])]))
    return found


def sources_of(tables: Tables, split: str, mix: dict[str, float]) -> dict[str, list]:
    """What documents of each kind of a mix can be made from; ValueError if of some there is nothing to train
    on."""
    check_mix(mix)
    sources = {}
    for reader, kinds in READERS.items():  # each read once, and only if the mix needs it
        wanted = [name for name in mix if name.split("/")[0] in kinds]
        table = reader(tables, split) if wanted else []
        for name in wanted:
            kind, _, family = name.partition("/")
            sources[name] = [source for source in table if fits(kind, family, source)]
    empty = [name for name in mix if not sources[name]]
    if empty and split == "train":
        kinds = "' or '".join(empty)
        raise ValueError(
            f"{tables.folder}: there is nothing of kind '{kinds}' to train on; take it out of the mix"
            f"{NEEDS.get(empty[0].split('/')[0], '')}"
        )
    return {name: sources[name] for name in mix}


def check_mix(mix: dict[str, float]) -> None:
    """ValueError, one line, for a mix that cannot be."""
    if not mix:
        raise ValueError(f"mix: it is empty; give some of {', '.join(KINDS)} a share")
    for name, share in mix.items():
        known = name.split("/")[0] in KINDS
        if not known or not isinstance(share, int | float) or not 0.001 <= share <= 1000:
            raise ValueError(
                f"mix: {name} = {share!r}; give some of {', '.join(KINDS)} a share of 0.001 to 1000"
            )


def fits(kind: str, family: str, source: str | Pair | Exchange) -> bool:
    """Whether a document of this kind, and of this family if there is a name, can be made from `source`."""
    if isinstance(source, Exchange):
        if source.family == READING and kind == "t2t" and not family:
            return False  # it is there to be spoken
        has_question = bool(source.question_units) or kind in ("t2t", "t2s")
        has_answer = bool(source.answer_units) or kind not in ("s2s", "t2s")
        return has_question and has_answer and family in ("", source.family)
    if isinstance(source, Pair) and kind in ("asr", "tts") and not source.text:
        return False
    if isinstance(source, Pair) and source.imitated and kind != "asr":
        return False
    return not family and (kind != "tts" or source.speaker == TARGET_SPEAKER)


# ---- Documents ---------------------------------------------------------------------------------------------


def render(tok: tokenizer.Tokenizer, example: Example, draw: random.Random, noise: float = 0.0) -> Document:
    """(ids, which of them are targets). `noise`: fraction of input speech units dropped, and the same
    fraction replaced at random; without this augmentation a small corpus is memorized. Speech without units,
    which the text-to-unit generator could not make, is read as its text."""
    kind, source = example

    def input_speech(units: list[int]) -> str:
        if noise:
            units = drop_and_replace(units, noise, tok.n_units, draw)
        return tokenizer.units_to_text(units)

    if kind == "text":
        ids = tok.encode(source) + [tok.eos]
        return ids, [True] * len(ids)
    if kind == "speech":
        ids = tok.encode(tokenizer.units_to_text(source.units))
        return ids, [True] * len(ids)
    if kind == "asr":
        instruction = draw.choice(tokenizer.ASR_INSTRUCTIONS)
        speech = input_speech(source.units)
        return tok.document(*tokenizer.cross_modal(instruction, speech, source.text))
    if kind == "tts":
        instruction = draw.choice(tokenizer.TTS_INSTRUCTIONS)
        speech = tokenizer.units_to_text(source.units)
        return tok.document(*tokenizer.cross_modal(instruction, source.text, speech))

    template = tokenizer.standard if kind == "standard" else tokenizer.chain_of_modality
    mode = draw_mode(example, draw)
    units_i = draw.choice(source.question_units) if source.question_units else []
    speech_i = input_speech(units_i) if units_i else ""
    units_r = draw.choice(source.answer_units) if source.answer_units else []
    speech_r = tokenizer.units_to_text(units_r) if units_r else ""
    mode = f"{mode[0] if units_i else 't'}2{mode[2] if units_r else 't'}"
    prompt, answer = template(
        mode, text_i=source.question, text_r=source.answer, speech_i=speech_i, speech_r=speech_r
    )
    return tok.document(prompt, answer)


def draw_mode(example: Example, draw: random.Random) -> str:
    """In which of the MODES a dialogue is read: the first of its random numbers."""
    if example.kind in MODES:
        return example.kind
    return draw.choice(MODES if example.source.answer_units else ("s2t", "t2t"))


def draw_example(found: list[Example], index: int, seed: int) -> tuple[Example, random.Random]:
    """(example, its random numbers) that training with this seed reads as its `index`-th."""
    item, epoch = batches.order(index, len(found), seed)
    return found[item], random.Random(f"{seed} {epoch} {item}")


class Longest:
    """Draws, for `render`, whatever makes the longest document, in one of the MODES."""

    def __init__(self, tok: tokenizer.Tokenizer, mode: str = ""):
        self.tok = tok
        self.mode = mode

    def choice(self, options):
        if self.mode in options:
            return self.mode
        return max(
            options, key=lambda found: len(self.tok.encode(found) if isinstance(found, str) else found)
        )


NOTHING = (Pair([], "", TARGET_SPEAKER), Exchange("", "", "", [[0]], [[0]]))


def at_most(source: str | Pair | Exchange) -> int:
    """More tokens than `source` can add to a document: no piece is shorter than a byte."""
    if isinstance(source, str):
        return len(source.encode()) + 8
    if isinstance(source, Pair):
        return len(source.units) + len(source.text.encode()) + 8
    units = [max(map(len, side), default=0) for side in (source.question_units, source.answer_units)]
    return sum(units) + len(source.question.encode()) + len(source.answer.encode()) + 8


def longest(tok: tokenizer.Tokenizer, example: Example) -> int:
    """Tokens of the longest document that `render` can make of an example."""
    modes = ("",)
    if example.kind in ("chain", "standard"):
        modes = MODES if example.source.answer_units else ("s2t", "t2t")
    return max(len(render(tok, example, Longest(tok, mode))[0]) for mode in modes)


def lengths_of(tok: tokenizer.Tokenizer, max_len: int, kind: str, sources: list) -> list[int]:
    """`longest` of each source's documents of this kind; where that is at most `max_len`, a bound of it."""
    empty = "" if kind == "text" else NOTHING[kind in DIALOGUE_KINDS]
    fixed = longest(tok, Example(kind, empty))
    lengths = []
    for source in sources:
        length = fixed + at_most(source)
        lengths.append(length if length <= max_len else longest(tok, Example(kind, source)))
    return lengths


def short_enough(
    tok: tokenizer.Tokenizer, max_len: int, report: Callable[[str, int], object], kind: str, sources: list
) -> list:
    """The sources whose documents of this kind have at most `max_len` tokens, however they are rendered. If
    there are others, report(what to say of them, number of those that are left) is called."""
    lengths = lengths_of(tok, max_len, kind, sources)
    kept = [source for source, length in zip(sources, lengths) if length <= max_len]
    lost = len(sources) - len(kept)
    if lost:
        report(
            f"{lost} of {len(sources)} documents of kind '{kind}', of up to {max(lengths)} tokens", len(kept)
        )
    return kept


def drop_and_replace(units: list[int], fraction: float, n_units: int, draw: random.Random) -> list[int]:
    """Drops a `fraction` of the units and replaces as many at random; still no unit twice in a row."""
    out: list[int] = []
    for unit in units:
        chance = draw.random()
        if chance < fraction:
            continue
        if chance < 2 * fraction:
            unit = draw.randrange(n_units)
        if not out or out[-1] != unit:
            out.append(unit)
    return out or units


# ---- To look at: python -m data.documents --show 3 ---------------------------------------------------------


BUILT_IN = (  # for a clone in which nothing has been trained yet
    Example("asr", Pair([7, 3, 19, 4, 11, 8], "Tom is in the garden.", 1)),
    Example("tts", Pair([5, 12, 2, 17], "Good morning.", TARGET_SPEAKER)),
    Example(
        "s2s",
        Exchange(
            "What is three plus four?",
            "Three plus four is seven.",
            "plus",
            [[14, 6, 1, 9, 16]],
            [[9, 1, 13, 6, 10, 2, 18]],
        ),
    ),
    Example("speech", Pair([3, 15, 0, 8, 1], "", 2)),
    Example("text", "What is three plus four? Three plus four is seven."),
)


class Marks(NamedTuple):
    """What stands before and after a run of targets, and of what else is to stand out."""

    target: tuple[str, str]
    title: tuple[str, str]

    @classmethod
    def choose(cls) -> "Marks":
        """Colors on a terminal, unless NO_COLOR is set (https://no-color.org); brackets elsewhere."""
        if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            return cls(("\x1b[1;32m", "\x1b[0m"), ("\x1b[1m", "\x1b[0m"))
        return cls(("[[", "]]"), ("", ""))


def show_document(tok: tokenizer.Tokenizer, document: Document, marks: Marks) -> str:
    """The text of a document, token by token, with its targets marked."""
    ids, mask = document
    out = ""
    previous = False
    for i, target in zip(ids, mask):
        if target != previous:
            out += marks.target[0] if target else marks.target[1]
            previous = target
        out += tok.name[i] if i in tok.name else tok.sp.id_to_piece(i).replace("▁", " ")
    return out + (marks.target[1] if previous else "")


def show_rows(documents: list[Document], packed: batches.Packed, width: int = 72) -> list[str]:
    """Two lines of text for each row of a packed batch: which document is in which columns.

    A character of the first is some columns: the last digit of a document's number, or a dot for padding."""
    numbers = {}  # ids -> numbers of the documents that have these ids
    for number, (ids, _) in enumerate(documents):
        numbers.setdefault(tuple(ids), []).append(number)
    lines = []
    for r in range(len(packed.ids)):
        columns = ["."] * packed.ids.shape[1]
        parts = []
        for d in range(int(packed.docs[r].max()) + 1):
            here = (packed.docs[r] == d).nonzero().flatten().tolist()
            number = numbers[tuple(packed.ids[r, here].tolist())].pop(0)
            columns[here[0] : here[-1] + 1] = str(number % 10) * len(here)
            parts.append(f"columns {here[0]}-{here[-1]}: document {number}")
        left = columns.count(".")
        if left:
            parts.append(f"columns {len(columns) - left}-{len(columns) - 1}: padding")
        step = max(1, -(-len(columns) // width))
        lines.append(f"row {r}  {''.join(columns[::step])}")
        lines.append(f"       {', '.join(parts)}")
    return lines


def main() -> None:
    parser = config.Parser(
        "Shows documents as the language model is trained on them: the targets and the packed rows.",
        prog="python -m data.documents",
    )
    parser.add_argument("--show", type=int, default=3, help="number of documents")
    parser.add_argument(
        "--run", type=Path, help="folder of a run, with manifest.jsonl and units.jsonl (default: out/tiny)"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="folder with tokenizer.model (default: that of --run, or weights/tiny/llama)",
    )
    parser.add_argument(
        "--mix", default="{ asr = 1, tts = 1, chain = 1 }", help="kinds and shares, as in configs/*.toml"
    )
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument(
        "--noise", type=float, default=0.0, help="fraction of input units dropped and replaced"
    )
    parser.add_argument("--max-len", type=int, default=512, help="tokens in a packed row, at most")
    parser.add_argument("--seed", type=int, default=0, help="as of training")
    options = parser.parse_args()
    if options.show < 1 or options.max_len < 2:
        raise ValueError("--show must be at least 1, and --max-len at least 2")
    if not 0 <= options.noise <= 0.5:
        raise ValueError(f"--noise is {options.noise}: it must be a fraction of 0 to 0.5")
    mix = config.toml_value(options.mix)
    if not isinstance(mix, dict):
        raise ValueError(f"--mix is {options.mix!r}: write it as in '{{ asr = 0.5, tts = 0.5 }}'")
    check_mix(mix)

    run = Path(options.run or "out/tiny")
    own = run / "tokenizer"
    tok = tokenizer.Tokenizer.from_pretrained(
        options.tokenizer or (own if own.is_dir() else "weights/tiny/llama")
    )
    if options.run or (run / "units.jsonl").is_file():
        found = examples(read_tables(run, tok.n_units), options.split, mix)
        if not found:
            raise ValueError(f"{run}: split '{options.split}' has nothing of the kinds {', '.join(mix)}")
        chosen = [draw_example(found, index, options.seed) for index in range(options.show)]
    else:
        print(f"built-in examples: {run} has no units yet (`python train.py configs/tiny.toml` makes them)")
        chosen = [(BUILT_IN[i % len(BUILT_IN)], random.Random(i)) for i in range(options.show)]
    rendered = [render(tok, example, draw, options.noise) for example, draw in chosen]

    marks = Marks.choose()
    print(f"targets of the loss are marked {'like this'.join(marks.target)}\n")
    for number, ((example, _), document) in enumerate(zip(chosen, rendered)):
        ids, mask = document
        title = f"document {number}: {example.kind}, {len(ids)} tokens, {sum(mask[1:])} of them targets"
        if len(ids) > options.max_len:
            title += f"; longer than --max-len {options.max_len}: training leaves it out"
        print(title.join(marks.title))
        print(show_document(tok, (ids, [False, *mask[1:]]), marks), end="\n\n")
    short = [document for document in rendered if len(document[0]) <= options.max_len]
    if short:
        packed = batches.pack(short, options.max_len)
        rows, columns = packed.ids.shape
        title = f"packed (--max-len {options.max_len}): {rows} rows of {columns} columns"
        print(title.join(marks.title))
        print("\n".join(show_rows(short, packed)))


if __name__ == "__main__":
    config.command_line(main)

"""SpeechInstruct and its neighbours: what each stage of the language model reads (paper §3, §4.2).

    text      What is three plus four? Three plus four is seven.                              (every token is a target)
    stage 1   <sosp><17><4><93>...<eosp>                                                      (every token, eq. 3)
    stage 2   [Human]: {D}. This is input: {U}<eoh>. [SpeechGPT]: {T}<eoa>   and back         (the answer, eq. 4)
    stage 3   [Human]: This is a speech instruction: {SpeechI}. ... [tq] {TextI}; [ta] {TextR}; [ua] {SpeechR}<eoa>

What a stage reads is a mix of kinds of documents, such as {"asr": 0.5, "tts": 0.5}:

    text             a sentence, or a question with its answer
    speech           units alone
    asr, tts         §3.1: recognition of everybody, synthesis in the model's own voice
    s2s s2t t2s t2t  Appendix C, speech or text in, speech or text out; "chain" draws one of the four
    standard         Appendix E, one of the four
    t2t/minus        of any kind above with questions, one family alone, here "minus" of the tiny world; "reading",
                     sentences to read aloud, is not in "t2t" unless it is named so

An example is what a document is made from; `render` makes the document, drawing instructions, formats and renditions
anew in every epoch. Held-out rows never reach a render of training: the caller says which split.
"""

import random
from pathlib import Path
from typing import NamedTuple

import tokenizer
from data.units import OWN_VOICE, read_perturbed, read_units
from files import read_jsonl

Document = tuple[list[int], list[bool]]
SOMEBODY = -1  # a speaker without a number, who never talks for the model
READING = "reading"  # the family of sentences to read aloud
MODES = ("s2s", "s2t", "t2s", "t2t")  # Appendix C
KINDS = ("text", "speech", "asr", "tts", *MODES, "chain", "standard")


class Pair(NamedTuple):
    """A recording and its transcription."""

    units: list[int]
    text: str
    speaker: int


class Exchange(NamedTuple):
    """(SpeechI, TextI, TextR, SpeechR) of §3.2, with every recording there is of each side: of some, none."""

    question: str
    answer: str
    family: str
    question_units: list[list[int]]
    answer_units: list[list[int]]


class Example(NamedTuple):
    kind: str  # of KINDS
    of: str | Pair | Exchange


def sentences(corpus: Path, split: str) -> list[str]:
    """The text of one split: every dialogue as question and answer, every statement."""
    dialogues = [
        row
        for row in read_jsonl(corpus / "dialogues.jsonl", ("question", "answer", "split"))
        if row["split"] == split
    ]
    alone = {
        row["text"]
        for row in read_jsonl(corpus / "manifest.jsonl", ("text", "split"))
        if row["split"] == split and row.get("kind") == "statement"
    }
    # The second form shows the text model the markers of Appendix C, which to LLaMA are ordinary text: stage 3 trains
    # nothing but adapters, too late to learn an embedding.
    return (
        [f"{d['question']} {d['answer']}" for d in dialogues]
        + sorted(alone)
        + [f"[tq] {d['question']}; [ta] {d['answer']}; [ua]" for d in dialogues]
    )


def pairs(corpus: Path, split: str) -> list[Pair]:
    rows = read_units(corpus) + [row | {"speaker": SOMEBODY} for row in read_perturbed(corpus)]
    return [Pair(row["units"], row["text"], row["speaker"]) for row in rows if row["split"] == split]


def exchanges(corpus: Path, split: str) -> list[Exchange]:
    """All dialogues of a split. `rendition`: training dialogues with the recordings of their questions made anew."""
    spoken: dict[tuple[str, str], list[list[int]]] = {}
    answers: dict[str, list[list[int]]] = {}
    for row in read_units(corpus):
        spoken.setdefault((row["split"], row["text"]), []).append(row["units"])
        if row["split"] == "train" and row["speaker"] == OWN_VOICE:
            answers.setdefault(row["text"], []).append(row["units"])
    for row in read_perturbed(corpus):
        spoken.setdefault((row["split"], row["text"]), []).append(row["units"])
    texts = "heldout" if split == "heldout" else "train"
    return [
        Exchange(
            d["question"],
            d["answer"],
            d.get("family", ""),
            spoken.get((split, d["question"]), []),
            answers.get(d["answer"], []),
        )
        for d in read_jsonl(corpus / "dialogues.jsonl", ("question", "answer", "split"))
        if d["split"] == texts
    ]


def examples(corpus: Path, split: str, mix: dict[str, float]) -> list[Example]:
    """One epoch: every example of every kind at least once, those of small kinds again until all have their share."""
    if not mix:
        raise ValueError(f"mix: it is empty; give some of {', '.join(KINDS)} a share")
    for kind, share in mix.items():
        if (
            kind.split("/")[0] not in KINDS
            or not isinstance(share, int | float)
            or not 0.001 <= share <= 1000
        ):
            raise ValueError(
                f"mix: {kind} = {share!r}; give some of {', '.join(KINDS)} a share of 0.001 to 1000"
            )
    sources = {
        sentences: ("text",),
        pairs: ("speech", "asr", "tts"),
        exchanges: (*MODES, "chain", "standard"),
    }
    read = {
        source: source(corpus, split)
        for source, kinds in sources.items()  # each once, and only if it is needed
        if not {kind.split("/")[0] for kind in mix}.isdisjoint(kinds)
    }
    of = {}
    for kind in mix:
        name, _, family = kind.partition("/")
        of[kind] = [
            e for source in read if name in sources[source] for e in read[source] if fits(name, family, e)
        ]
    if lost := [kind for kind in mix if not of[kind]]:
        if split == "train":
            raise ValueError(
                f"{corpus}: there is nothing of kind '{lost[0]}' to train on; take it out of the mix"
            )
        mix = {kind: share for kind, share in mix.items() if kind not in lost}
    size = max((len(of[kind]) / share for kind, share in mix.items()), default=0)
    return [
        Example(kind.split("/")[0], of[kind][i % len(of[kind])])
        for kind, share in mix.items()
        for i in range(round(share * size))
    ]


def fits(kind: str, family: str, of: str | Pair | Exchange) -> bool:
    """Whether a document of this kind, and of this family if there is a name, can be made from it."""
    if isinstance(of, Exchange):
        asked = bool(of.question_units) or kind in ("t2t", "t2s")
        answered = bool(of.answer_units) or kind not in ("s2s", "t2s")
        if of.family == READING and kind == "t2t" and not family:
            return False  # it is there to be spoken
        return asked and answered and family in ("", of.family)
    return not family and (kind != "tts" or of.speaker == OWN_VOICE)


def render(tok: tokenizer.Tokenizer, example: Example, draw: random.Random, noise: float = 0.0) -> Document:
    """(ids, which of them are targets). `noise`: share of the units of speech to listen to that are lost, and as many
    again that are misheard; a small corpus is learned by heart without it."""
    kind, e = example

    def heard(units: list[int]) -> str:
        return tokenizer.units_to_text(mishear(units, noise, tok.n_units, draw) if noise else units)

    if kind in ("text", "speech"):
        ids = tok.encode(e) + [tok.eos] if kind == "text" else tok.encode(tokenizer.units_to_text(e.units))
        return ids, [True] * len(ids)
    if kind == "asr":
        return tok.document(
            *tokenizer.cross_modal(draw.choice(tokenizer.ASR_INSTRUCTIONS), heard(e.units), e.text)
        )
    if kind == "tts":
        speech = tokenizer.units_to_text(e.units)
        return tok.document(*tokenizer.cross_modal(draw.choice(tokenizer.TTS_INSTRUCTIONS), e.text, speech))
    template = tokenizer.standard if kind == "standard" else tokenizer.chain_of_modality
    mode = kind if kind in MODES else draw.choice(MODES if e.answer_units else ("s2t", "t2t"))
    return tok.document(
        *template(
            mode,
            text_i=e.question,
            text_r=e.answer,
            speech_i=heard(draw.choice(e.question_units)) if e.question_units else "",
            speech_r=tokenizer.units_to_text(draw.choice(e.answer_units)) if e.answer_units else "",
        )
    )


def mishear(units: list[int], share: float, n_units: int, draw: random.Random) -> list[int]:
    """Drops `share` of the units and replaces as many; still no unit twice in a row."""
    out: list[int] = []
    for unit in units:
        chance = draw.random()
        if chance >= share:
            unit = draw.randrange(n_units) if chance < 2 * share else unit
            if unit not in out[-1:]:
                out.append(unit)
    return out or units

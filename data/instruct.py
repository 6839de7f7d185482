"""SpeechInstruct and its neighbours: what each stage of the language model reads (paper §3, §4.2).

    text      What is three plus four? Three plus four is seven.                              (every token is a target)
    stage 1   <sosp><17><4><93>...<eosp>                                                      (every token, eq. 3)
    stage 2   [Human]: {D}. This is input: {U}<eoh>. [SpeechGPT]: {T}<eoa>   and back         (the answer, eq. 4)
    stage 3   [Human]: This is a speech instruction: {SpeechI}. ... [tq] {TextI}; [ta] {TextR}; [ua] {SpeechR}<eoa>

An example is what a document is made from; `render` makes the document, drawing instructions, tasks, formats and
renditions anew in every epoch. Held-out rows never reach a render of training: the caller says which split.
"""

import random
from pathlib import Path
from typing import NamedTuple

import tokenizer
from data.units import read_jsonl, read_units

Document = tuple[list[int], list[bool]]
OWN_VOICE = 0  # the speaker in whose voice the model answers
MODES = ("s2s", "s2t", "t2s", "t2t")  # Appendix C


class Pair(NamedTuple):
    """A recording and its transcription."""

    units: list[int]
    text: str
    speaker: int


class Exchange(NamedTuple):
    """(SpeechI, TextI, TextR, SpeechR) of §3.2, with every recording there is of each side."""

    question: str
    answer: str
    question_units: list[list[int]]
    answer_units: list[list[int]]


def sentences(corpus: Path, split: str) -> list[str]:
    """The text of one split: every dialogue as question and answer, every statement."""
    dialogues = [row for row in read_jsonl(corpus / "dialogues.jsonl", ("question", "answer", "split"))
                 if row["split"] == split]
    alone = {row["text"] for row in read_jsonl(corpus / "manifest.jsonl", ("text", "split"))
             if row["split"] == split and row.get("kind") == "statement"}
    # The second form shows the text model the markers of Appendix C, which to LLaMA are ordinary text: stage 3 trains
    # nothing but adapters, too late to learn an embedding.
    return ([f"{d['question']} {d['answer']}" for d in dialogues] + sorted(alone)
            + [f"[tq] {d['question']}; [ta] {d['answer']}; [ua]" for d in dialogues])


def pairs(corpus: Path, split: str) -> list[Pair]:
    return [Pair(row["units"], row["text"], row["speaker"]) for row in read_units(corpus) if row["split"] == split]


def cross_modal(corpus: Path, split: str) -> list[Pair | tuple[str, str]]:
    """Recordings with their text, mixed with text dialogues (§4.2: the paper mixes in moss-002-sft)."""
    dialogues = read_jsonl(corpus / "dialogues.jsonl", ("question", "answer", "split"))
    return pairs(corpus, split) + [(d["question"], d["answer"]) for d in dialogues if d["split"] == split]


def exchanges(corpus: Path, split: str) -> list[Exchange]:
    """Dialogues with a spoken question in this split. `rendition`: training dialogues heard anew."""
    rows = read_units(corpus)
    spoken: dict[tuple[str, str], list[list[int]]] = {}
    answers: dict[str, list[list[int]]] = {}
    for row in rows:
        spoken.setdefault((row["split"], row["text"]), []).append(row["units"])
        if row["split"] == "train" and row["speaker"] == OWN_VOICE:
            answers.setdefault(row["text"], []).append(row["units"])
    texts = "heldout" if split == "heldout" else "train"
    return [Exchange(d["question"], d["answer"], spoken[split, d["question"]], answers.get(d["answer"], []))
            for d in read_jsonl(corpus / "dialogues.jsonl", ("question", "answer", "split"))
            if d["split"] == texts and (split, d["question"]) in spoken]


def render_text(tok: tokenizer.Tokenizer, sentence: str, draw: random.Random) -> Document:
    ids = tok.encode(sentence) + [tok.eos]
    return ids, [True] * len(ids)


def render_speech(tok: tokenizer.Tokenizer, pair: Pair, draw: random.Random) -> Document:
    ids = tok.encode(tokenizer.units_to_text(pair.units))
    return ids, [True] * len(ids)


def render_cross_modal(tok: tokenizer.Tokenizer, example: Pair | tuple[str, str], draw: random.Random) -> Document:
    """§3.1: recognition or synthesis with probability p = 1/2 each; or a text instruction and its answer."""
    if not isinstance(example, Pair):
        return tok.document(*tokenizer.chain_of_modality("t2t", text_i=example[0], text_r=example[1]))
    speech = tokenizer.units_to_text(example.units)
    # the model learns to listen to everybody and to speak in its own voice
    if example.speaker != OWN_VOICE or draw.random() < 0.5:
        return tok.document(*tokenizer.cross_modal(draw.choice(tokenizer.ASR_INSTRUCTIONS), speech, example.text))
    return tok.document(*tokenizer.cross_modal(draw.choice(tokenizer.TTS_INSTRUCTIONS), example.text, speech))


def render_chain(tok: tokenizer.Tokenizer, e: Exchange, draw: random.Random, standard: float = 0.0) -> Document:
    """Appendix C in one of its four formats, or Appendix E with probability `standard`."""
    template = tokenizer.standard if draw.random() < standard else tokenizer.chain_of_modality
    return tok.document(*template(
        draw.choice(MODES if e.answer_units else ("s2t", "t2t")), text_i=e.question, text_r=e.answer,
        speech_i=tokenizer.units_to_text(draw.choice(e.question_units)),
        speech_r=tokenizer.units_to_text(draw.choice(e.answer_units)) if e.answer_units else ""))

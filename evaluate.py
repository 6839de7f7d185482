"""Evaluation: word error rates, exact answers, bits per unit, seconds to a reply; each with its baselines.

    python evaluate.py --model out/tiny/model --corpus out/tiny/corpus --out out/tiny/report --items 120

The paper (§5.3, §6) transcribes spoken answers with a speech recognizer and has ChatGPT and people score
them. Here the recognizer stays; as every question of the tiny world has one right answer, an exact match
replaces the scores.

    source, resynthesis      errors of the recognizer itself, and what units and vocoder add to them
    asr, tts                 §3.1's cross-modal tasks, on new renditions of training sentences and on held-out
                             ones; asr also before stage 3 (no adapter) and inside the chain (transcript)
    answer, text, standard   answers to the spoken question (chain-of-modality), to the same as text, and to
                             the spoken one by standard prompting (Table 2)
    spoken                   the spoken reply against its own text, and against the right answer
    bits                     -log2 p of the next unit of held-out speech (eq. 3), after all stages and stage 1
    first                    seconds from typing `python sample.py question.wav` to the reply's waveform

evaluation/judge.py is the recognizer, evaluation/measures.py has the measures with intervals and baselines,
and evaluation/report.py writes the files: report.md, report.json, items.jsonl, examples/, curve-*.png.
"""

import functools
import os
import random
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import run
from config import Parser, command_line
from data import audio
from data.corpus import read_dialogues, resolve
from evaluation import measures, report
from evaluation.judge import Recognizer, need_extra, normalize_text
from evaluation.measures import SPLITS, Item, LookupBaselines, Row
from generate import one_thread
from llama import Llama
from sample import Reply, SpeechGPT

# ---- What is asked of the model ----------------------------------------------------------------------------

MAX_NEW = {"t": 96, "s": 320}  # tokens of an answer in text, in speech; longer ones are cut off and scored so
BATCH = 32  # prompts answered at the same time
Encoded = tuple[list[int], list[int]]  # units, durations
Spoken = tuple[dict, Reply, str]  # row of the manifest, spoken reply, its recognized text


@dataclass
class Session:
    """One model under evaluation. Its speech is transcribed in the background while it goes on."""

    model: SpeechGPT
    recognizer: Recognizer
    seed: int  # of sampled speech
    takes: int | None
    bar: tqdm
    background: ThreadPoolExecutor
    outputs: list[tuple[str, list[dict], list[str], Future]] = field(default_factory=list)  # see add

    def add(self, measure: str, rows: list[dict], references: list[str], texts: Future):
        """What came out for rows of the manifest, and what should have."""
        self.outputs.append((measure, rows, references, texts))

    def add_texts(self, measure: str, rows: list[dict], column: str, texts: list[str]):
        """column: of the manifest, with the references."""
        done = Future()
        done.set_result(texts)
        self.add(measure, rows, values(rows, column), done)

    def add_speech(self, measure: str, rows: list[dict], column: str, wavs: list) -> Future:
        """wavs: (N,) each, None where there is no speech. Returns their recognized texts to come."""
        texts = self.background.submit(self.recognizer.transcribe, wavs, self.bar.update)
        self.add(measure, rows, values(rows, column), texts)
        return texts

    def items(self) -> list[Item]:
        """All outputs, one by one; waits for the recognizer."""
        items = []
        for measure, rows, references, texts in self.outputs:
            for row, reference, text in zip(rows, references, texts.result()):
                about = (row["id"], row["split"], row["speaker"], row["family"], row["text"])
                items.append(Item(measure, *about, reference, text))
        return items


def values(rows: list[dict], column: str) -> list:
    return [row[column] for row in rows]


def ask(model: SpeechGPT, prompts: list, mode: str, bar: tqdm, **options) -> list[Reply]:
    """model.reply_batch, in batches of prompts of similar size."""
    size = os.path.getsize if mode[0] == "s" else len
    order = sorted(range(len(prompts)), key=lambda i: size(prompts[i]))
    replies = [None] * len(prompts)
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        answers = model.reply_batch([prompts[i] for i in batch], mode, max_new=MAX_NEW[mode[2]], **options)
        for i, reply in zip(batch, answers):
            replies[i] = reply
        bar.update(len(batch))
    return replies


def transcribe(session: Session, before: SpeechGPT | None, rows: list[dict], half: int) -> list[Encoded]:
    """Recordings -> text, by recognizer, model, and model without its adapter; returns their units."""
    paths = values(rows, "path")
    wavs = [audio.load(path) for path in paths]
    session.add_speech("source", rows, "text", wavs)
    encoded = [session.model.extractor(wav) for wav in wavs]
    replies = ask(session.model, paths, "s2t", session.bar, task="asr")
    session.add_texts("asr", rows, "text", [reply.text for reply in replies])
    if before:
        replies = ask(before, paths[:half], "s2t", session.bar, task="asr")
        session.add_texts("asr.before", rows[:half], "text", [reply.text for reply in replies])
    return encoded


def resynthesize(session: Session, rows: list[dict], encoded: list[Encoded]):
    """Units -> speech: of the target speaker, then of the recording's own speaker with its durations."""
    vocoder = session.model.vocoder
    wavs = [samples(vocoder(units)) for units, _ in encoded]
    session.add_speech("resynthesis", rows, "text", wavs)
    n_speakers = getattr(session.model, "n_speakers", 1)
    wavs = []
    for row, (units, durations) in zip(rows, encoded):
        speaker = row["speaker"] if row["speaker"] in range(n_speakers) else None
        wavs.append(samples(vocoder(units, speaker, durations)))
    session.add_speech("resynthesis.own", rows, "text", wavs)


def samples(wav: torch.Tensor) -> np.ndarray:
    return wav.float().cpu().numpy()


def read_aloud(session: Session, rows: list[dict]):
    """Text -> speech."""
    sampled = {"seed": session.seed, "takes": session.takes}
    replies = ask(session.model, values(rows, "text"), "t2s", session.bar, task="tts", **sampled)
    session.add_speech("tts", rows, "text", [reply.wav for reply in replies])


def answer_in_text(session: Session, rows: list[dict], half: int):
    """Questions -> answers in text: spoken questions, the same as text, and spoken ones without the chain."""
    replies = ask(session.model, values(rows, "path"), "s2t", session.bar)
    session.add_texts("transcript", rows, "text", [reply.transcript for reply in replies])
    session.add_texts("answer", rows, "answer", [reply.text for reply in replies])
    replies = ask(session.model, values(rows, "text"), "t2t", session.bar)
    session.add_texts("text", rows, "answer", [reply.text for reply in replies])
    rows = rows[:half]
    replies = ask(session.model, values(rows, "path"), "s2t", session.bar, chain=False)
    session.add_texts("standard", rows, "answer", [reply.text for reply in replies])


def answer_in_speech(session: Session, rows: list[dict]) -> tuple[list[Reply], Future]:
    """Spoken questions -> spoken replies; returns them and their recognized texts to come."""
    sampled = {"seed": session.seed, "takes": session.takes}
    replies = ask(session.model, values(rows, "path"), "s2s", session.bar, **sampled)
    session.add_texts("spoken.text", rows, "answer", [reply.text for reply in replies])
    recognized = session.add_speech("spoken.answer", rows, "answer", [reply.wav for reply in replies])
    own_texts = []  # a reply without text is compared with the right answer
    for row, reply in zip(rows, replies):
        own_texts.append(reply.text if normalize_text(reply.text) else row["answer"])
    session.add("spoken", rows, own_texts, recognized)
    return replies, recognized


def draw(manifest: list[dict], split: str, kind: str, n: int, seed: int) -> list[dict]:
    """At most n random rows of a split: of "speech" (all but answers) or of "questions" with answers."""
    rows = [row for row in manifest if row["split"] == split]
    if kind == "questions":
        rows = [row for row in rows if "answer" in row]
    else:
        rows = [row for row in rows if row["kind"] != "answer"]
    return random.Random(f"{seed} {split}").sample(rows, min(n, len(rows)))


def ask_all(
    model: SpeechGPT, before: SpeechGPT | None, manifest: list[dict], n: int, seed: int, takes: int | None
) -> tuple[list[Item], list[list[int]], list[Spoken]]:
    """Returns every scored output, the held-out speech as units, and all spoken replies.

    Of each split, n recordings are transcribed and n questions answered in text; half as many are
    resynthesized, read aloud, answered in speech and by standard prompting, since transcribing speech output
    takes longest. `before` is the model without its adapter, if it has one."""
    half = -(-n // 2)
    speech = {split: draw(manifest, split, "speech", n, seed) for split in SPLITS}
    questions = {split: draw(manifest, split, "questions", n, seed) for split in SPLITS}
    steps = 0
    for rows in speech.values():
        steps += 2 * len(rows) + (5 if before else 4) * len(rows[:half])
    for rows in questions.values():
        steps += 2 * len(rows) + 3 * len(rows[:half])
    recognizer = Recognizer()
    encoded = {}
    talks = []
    with ThreadPoolExecutor(1) as background, run.progress(steps, title="evaluate", unit="item") as bar:
        session = Session(model, recognizer, seed, takes, bar, background)
        for split, rows in speech.items():
            encoded[split] = transcribe(session, before, rows, half)
            resynthesize(session, rows[:half], encoded[split][:half])
            read_aloud(session, rows[:half])
        for rows in questions.values():
            answer_in_text(session, rows, half)
            talks.append((rows[:half], *answer_in_speech(session, rows[:half])))
        items = session.items()
    spoken = []
    for rows, replies, recognized in talks:
        spoken += zip(rows, replies, recognized.result())
    return items, [units for units, _ in encoded["heldout"]], spoken


# ---- The whole evaluation ----------------------------------------------------------------------------------


def load_models(folder: Path, device: torch.device) -> tuple[SpeechGPT, SpeechGPT | None]:
    """The model and, if it has an adapter, the same without. Each recording is encoded once."""
    model = SpeechGPT.from_pretrained(folder, str(device))
    for part, name in (("extractor", "hubert"), ("vocoder", "vocoder")):
        if getattr(model, part) is None:
            raise ValueError(f"{folder} has no {name}/: train that stage first")
    model.to_units = functools.cache(model.to_units)
    if not (folder / "lora").is_dir():
        return model, None
    before = SpeechGPT(Llama.from_pretrained(folder / "llama", device=device), model.tok, model.extractor)
    before.to_units = model.to_units
    return model, before


def evaluate(
    folder: str | Path,
    corpus: str | Path,
    out: str | Path,
    items: int = 120,
    seed: int = 0,
    device: str | torch.device = "auto",
    metrics: str | Path | None = None,
    takes: int | None = None,
    targets: dict[str, float] | None = None,
) -> dict[str, float | None]:
    """Evaluates the model in `folder` on `corpus`, writes the report to `out`, returns the rows' values.

    items: at most so many in a row (0: all there are); metrics: the folder of training curves (None: the one
    next to `folder`); takes: as in `SpeechGPT.reply_batch`; targets: row's key -> what it should reach."""
    need_extra()
    targets = targets or {}
    measures.check_targets(targets)
    if items < 0:
        raise ValueError(f"items is {items}: give the number of items in a row, or 0 for all there are")
    folder = Path(folder)
    corpus = Path(corpus)
    out = Path(out)
    device = run.device(str(device))
    start = time.perf_counter()
    model, before = load_models(folder, device)
    dialogues = read_dialogues(corpus)
    lookup = LookupBaselines([row for row in dialogues if row["split"] == "train"])
    manifest = [row | {"path": corpus / row["wav"]} for row in resolve(corpus)]
    out.mkdir(parents=True, exist_ok=True)

    with one_thread(model.llama):  # the recognizer has the other cores
        scored, speech, spoken = ask_all(model, before, manifest, items or sys.maxsize, seed, takes)
    examples = report.write_examples(out, spoken)

    rows = measures.score_all(scored, lookup)
    measured = {"bits": model}
    if (folder.parent / "stage1").is_dir():
        measured["bits.1"] = SpeechGPT(Llama.from_pretrained(folder.parent / "stage1"), model.tok)
    train = measures.train_units(model.extractor, manifest, folder.parent / "units.jsonl", 400)
    rows += measures.bits_rows(measured, speech, train)
    if examples:
        seconds, factor = measures.first_reply(folder, out / examples[0]["question"], str(device))
        rows.append(Row("first", "time to a spoken reply, fresh process", seconds, None, None, 2, "s"))
        rows.append(Row("first.factor", "the same per second of speech", factor, None, None, 2, "s"))
    for row in rows:
        row.target = targets.get(row.key)

    curves = report.plot_curves(Path(metrics or folder.parent / "metrics"), out)
    facts = {
        "model": str(folder),
        "corpus": str(corpus),
        "seed": seed,
        "items": f"up to {items} a row" if items else "all",
        "takes": f"up to {takes or model.takes} of what is spoken",
        "seconds": round(time.perf_counter() - start, 1),
    }
    if targets:
        facts["targets"] = measures.count_reached(rows, targets)
    report.write_report(out, facts | report.about(device), rows, scored, examples, curves)
    for row in rows:
        print(f"{row.name:56} {row.show(row.value):>10}   {row.show_target()}")
    print(f"the whole report: {out}/report.md", flush=True)
    return {row.key: row.value for row in rows}


def main():
    parser = Parser(__doc__.split("\n")[0], prog="python evaluate.py")
    add = parser.add_argument
    add("--model", default="weights/tiny", help="folder with llama/, lora/, hubert/, vocoder/")
    add("--corpus", default="out/tiny/corpus", help="folder with manifest.jsonl and dialogues.jsonl")
    add("--out", default="out/report", help="folder for the report")
    add("--items", type=int, default=120, help="items in a row; 0: all there are")
    add("--seed", type=int, default=0, help="of the choice of items, and of sampled speech")
    add("--takes", type=int, help="as of sample.py: draw speech again, at most so many times in all")
    add("--device", default="auto", help="cpu, cuda or mps")
    add("--metrics", help="folder of training curves (default: metrics/ next to the model)")
    add("--targets", metavar="CONFIG.toml", help="config file with [evaluate.targets] to compare with")
    args = parser.parse_args()
    targets = measures.read_targets(args.targets) if args.targets else None
    options = {"metrics": args.metrics, "takes": args.takes, "targets": targets}
    evaluate(args.model, args.corpus, args.out, args.items, args.seed, args.device, **options)


if __name__ == "__main__":
    command_line(main)

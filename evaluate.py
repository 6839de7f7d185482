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
    t2u                      the text-to-unit generator and the vocoder (§3.2), if the model has a generator
    bits                     -log2 p of the next unit of held-out speech (eq. 3), after all stages and
                             after stage 1; and of a second of that speech
    first                    seconds from typing `python sample.py question.wav` to the reply's waveform
    asr, answer .unseen      of unseen voices, the worst of them, in noise and by telephone:
                             of a --corpus of voices, or of voices/ next to the model (evaluation/voices.py)

evaluation/judge.py is the recognizer, evaluation/measures.py has the measures with intervals and baselines,
and evaluation/report.py writes the files: report.md, report.json, items.jsonl, examples/, curve-*.png. One
that is killed goes on where it was (evaluation/kept.py). A corpus without dialogues or splits has the rows
that it allows.
"""

from starting import starting

if __name__ == "__main__":
    starting()

import functools
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from tqdm import tqdm

import config
import run
from data import audio
from data.corpus import read_dialogues, resolve
from evaluation import measures, report, voices
from evaluation.judge import Recognizer, need_extra, normalize_text
from evaluation.kept import Kept, stamps
from evaluation.measures import Item, LookupBaselines, Row
from files import harmless
from generate import one_thread
from llama import Llama
from request import Reply, Request
from sample import SpeechGPT, default_model
from text_to_unit import Search, TextToUnit


@dataclass
class EvaluateSection:
    """Settings of stage evaluate of train.py."""

    items: config.Whole = 120  # at most so many items for a row of the report; 0: all there are
    takes: config.Count | None = None  # spoken answers drawn at most; None: as sample.py does
    # of the tiny world: so many questions in each unseen voice, as far as any is installed
    voices: Annotated[int, config.Limits(0, 1000)] = 0
    # a row's key: what it should reach, as in configs/tiny.toml
    targets: dict[str, config.Amount] = field(default_factory=dict)

    def __post_init__(self):
        measures.check_targets(self.targets)


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
    kept: Kept  # of an evaluation that was killed
    problems: list[str]  # what could not be measured, a line each
    generator: TextToUnit | None = None
    asked: int = 0  # how often
    outputs: list[tuple[str, list[dict], list[str], Future]] = field(default_factory=list)  # see add

    def add(self, measure: str, rows: list[dict], references: list[str], texts: Future):
        """Outputs of the model for rows of the manifest, and their references."""
        self.outputs.append((measure, rows, references, texts))

    def add_texts(self, measure: str, rows: list[dict], column: str, texts: list[str]):
        """column: of the manifest, with the references."""
        done = Future()
        done.set_result(texts)
        self.add(measure, rows, values(rows, column), done)

    def add_speech(self, measure: str, rows: list[dict], column: str, wavs: list) -> Future:
        """wavs: (N,) each, None where there is no speech. Returns their recognized texts to come."""
        work = functools.partial(self.recognizer.transcribe, wavs, self.bar.update)
        texts = self.background.submit(self.kept.texts, f"recognized-{len(self.outputs)}", work)
        self.add(measure, rows, values(rows, column), texts)
        return texts

    def ask(self, prompts: list, mode: str, model: SpeechGPT | None = None, **options) -> list[Reply]:
        """Replies of the model, or of another, in batches of prompts of similar size. A prompt that it cannot
        answer has an empty reply, and is noted; if it cannot answer any batch, that is a ValueError."""
        request = Request(mode, max_new=MAX_NEW[mode[2]], **options)
        self.asked += 1
        work = functools.partial(self.ask_now, prompts, model or self.model, request)
        replies = self.kept.replies(f"asked-{self.asked}", work)
        self.problems += [f"not answered: {reply.note}" for reply in replies if "failed" in reply.stats]
        self.bar.update(len(prompts))
        return replies

    def ask_now(self, prompts: list, model: SpeechGPT, request: Request) -> list[Reply]:
        order = sorted(range(len(prompts)), key=lambda i: size(prompts[i]))
        replies: list[Reply] = [None] * len(prompts)
        failed = 0
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            try:
                answers = model.answer_each([prompts[i] for i in batch], request)
            except (ValueError, OSError) as problem:  # not of a prompt
                failed += len(batch)
                if failed == len(prompts):
                    raise
                answers = [problem] * len(batch)
            for i, answer in zip(batch, answers):
                if isinstance(answer, Exception):
                    answer = Reply("", "", [], None, str(answer), {"failed": True})
                replies[i] = answer
        return replies

    def speak(self, units: list[int], speaker: int | None = None, durations: list[int] | None = None):
        """Units -> samples (N,), or None, noted, if the vocoder cannot."""
        try:
            return self.model.vocoder(units, speaker, durations).float().cpu().numpy()
        except ValueError as problem:
            self.problems.append(f"not resynthesized: {problem}")
            return None

    def items(self) -> list[Item]:
        """All outputs, one by one; waits for the recognizer."""
        items = []
        for measure, rows, references, future in self.outputs:
            try:
                texts = future.result()
            except Exception as problem:  # whatever the recognizer failed at: the others count
                self.problems.append(f"{measure} not recognized: {problem}")
                continue
            for row, reference, text in zip(rows, references, texts):
                about = (row["id"], row["split"], row["speaker"], row["family"], row["text"])
                items.append(Item(measure, *about, reference, text))
        return items


def values(rows: list[dict], column: str) -> list:
    return [row[column] for row in rows]


def size(prompt: str | Path) -> int:
    """What prompts are sorted by, so that those of one batch are of similar size."""
    return prompt.stat().st_size if isinstance(prompt, Path) and prompt.exists() else len(str(prompt))


def transcribe(session: Session, before: SpeechGPT | None, rows: list[dict], half: int) -> list[Encoded]:
    """Recordings -> text, by recognizer, model, and model without its adapter; returns their units."""
    paths = values(rows, "path")
    wavs = [audio.load(path) for path in paths]
    session.add_speech("source", rows, "text", wavs)
    encoded = [session.model.extractor(wav) for wav in wavs]
    replies = session.ask(paths, "s2t", task="asr")
    session.add_texts("asr", rows, "text", [reply.text for reply in replies])
    if before:
        replies = session.ask(paths[:half], "s2t", before, task="asr")
        session.add_texts("asr.before", rows[:half], "text", [reply.text for reply in replies])
    return encoded


def resynthesize(session: Session, rows: list[dict], encoded: list[Encoded]):
    """Units -> speech: of the target speaker, then of the recording's own speaker with its durations."""
    wavs = [session.speak(units) for units, _ in encoded]
    session.add_speech("resynthesis", rows, "text", wavs)
    n_speakers = getattr(session.model, "n_speakers", 1)
    wavs = []
    for row, (units, durations) in zip(rows, encoded):
        speaker = row["speaker"] if row["speaker"] in range(n_speakers) else None
        wavs.append(session.speak(units, speaker, durations))
    session.add_speech("resynthesis.own", rows, "text", wavs)


def read_aloud(session: Session, rows: list[dict]):
    """Text -> speech."""
    sampled = {"seed": session.seed, "takes": session.takes}
    replies = session.ask(values(rows, "text"), "t2s", task="tts", **sampled)
    session.add_speech("tts", rows, "text", [reply.wav for reply in replies])


def generate_units(session: Session, rows: list[dict]):
    """Text -> units of the text-to-unit generator -> speech."""
    try:
        found = session.generator.generate(values(rows, "text"), Search(max_len_b=MAX_NEW["s"]))
    except ValueError as problem:  # a text that is too long, weights that are no numbers
        session.problems.append(f"not generated: {problem}")
        return
    session.add_speech("t2u", rows, "text", [session.speak(units) for units in found])


def answer_in_text(session: Session, rows: list[dict], half: int):
    """Questions -> answers in text: spoken questions, the same as text, and spoken ones without the chain."""
    replies = session.ask(values(rows, "path"), "s2t")
    session.add_texts("transcript", rows, "text", [reply.transcript for reply in replies])
    session.add_texts("answer", rows, "answer", [reply.text for reply in replies])
    replies = session.ask(values(rows, "text"), "t2t")
    session.add_texts("text", rows, "answer", [reply.text for reply in replies])
    rows = rows[:half]
    replies = session.ask(values(rows, "path"), "s2t", chain=False)
    session.add_texts("standard", rows, "answer", [reply.text for reply in replies])


def answer_in_speech(session: Session, rows: list[dict]) -> tuple[list[Reply], Future]:
    """Spoken questions -> spoken replies; returns them and their recognized texts to come."""
    sampled = {"seed": session.seed, "takes": session.takes}
    replies = session.ask(values(rows, "path"), "s2s", **sampled)
    session.add_texts("spoken.text", rows, "answer", [reply.text for reply in replies])
    recognized = session.add_speech("spoken.answer", rows, "answer", [reply.wav for reply in replies])
    own_texts = []  # a reply without text is compared with the right answer
    for row, reply in zip(rows, replies):
        own_texts.append(reply.text if normalize_text(reply.text) else row["answer"])
    session.add("spoken", rows, own_texts, recognized)
    return replies, recognized


def understand(session: Session, rows: list[dict], paths: list[Path], kind: str):
    """Recordings of many voices -> text, and answers in text; paths: of the rows, as they are or changed."""
    replies = session.ask(paths, "s2t", task="asr")
    session.add_texts(f"asr.{kind}", rows, "text", [reply.text for reply in replies])
    asked = [i for i, row in enumerate(rows) if row.get("answer")]
    replies = session.ask([paths[i] for i in asked], "s2t")
    session.add_texts(f"answer.{kind}", [rows[i] for i in asked], "answer", [reply.text for reply in replies])


def listen(session: Session, group: str, rows: list[dict]):
    """Recordings of the voices of one group -> text and answers; of unseen voices in noise, too."""
    paths = values(rows, "path")
    session.add_speech(f"source.{group}", rows, "text", [audio.load(path) for path in paths])
    understand(session, rows, paths, group)
    for condition in measures.VOICE_CONDITIONS if group == "unseen" else ():
        with tempfile.TemporaryDirectory() as folder:
            changed = [Path(folder) / f"{i}.wav" for i in range(len(rows))]
            for row, path in zip(rows, changed):
                audio.save(path, voices.disguise(audio.load(row["path"]), condition, row["id"]))
            understand(session, rows, changed, f"{group}.{condition}")


class Drawn(NamedTuple):
    """The rows of the manifest that are measured, by split; of many voices, by group."""

    speech: dict[str, list[dict]]  # all but answers
    questions: dict[str, list[dict]]  # those with an answer to compare with
    voices: dict[str, list[dict]]

    def paths(self) -> list[Path]:
        return [row["path"] for table in self for rows in table.values() for row in rows]


def draw(manifest: list[dict], n: int, seed: int, problems: list[str]) -> Drawn:
    """At most n random rows of each split and kind, without what cannot be decoded. A corpus without new
    renditions is measured on recordings of its train split, in rows of that name."""
    there = {row["split"] for row in manifest}
    first = "rendition" if "rendition" in there else "train"
    drawn = Drawn({}, {}, {})
    for split in (first, "heldout"):
        rows = [row for row in manifest if row["split"] == split and row["text"]]
        kinds = (
            (drawn.speech, [row for row in rows if row["kind"] != "answer"]),
            (drawn.questions, [row for row in rows if row.get("answer")]),
        )
        for table, rows in kinds:
            rows = random.Random(f"{seed} {split}").sample(rows, min(n, len(rows)))
            table[split] = [row for row in rows if is_readable(row, problems)]
    return drawn


def draw_voices(
    groups: dict[str, list[dict]], n: int, seed: int, problems: list[str]
) -> dict[str, list[dict]]:
    """At most n random rows of each voice of each group, without what cannot be decoded."""
    drawn = {}
    for group, rows in groups.items():
        found = []
        for voice in sorted(set(values(rows, "speaker"))):
            said = [row for row in rows if row["speaker"] == voice]
            found += random.Random(f"{seed} {voice}").sample(said, min(n, len(said)))
        drawn[group] = [row for row in found if is_readable(row, problems)]
    return drawn


def is_readable(row: dict, problems: list[str]) -> bool:
    try:
        length = len(audio.load(row["path"])) / audio.RATE
    except (ValueError, OSError) as problem:
        problems.append(f"left out: {problem}")
        return False
    if length + 2 * Recognizer.SILENCE > Recognizer.FULL:
        problems.append(
            f"left out: {row['path']} lasts {length:.0f} s, the recognizer takes {Recognizer.FULL}"
        )
        return False
    return True


def ask_all(
    models: tuple[SpeechGPT, SpeechGPT | None, TextToUnit | None],
    drawn: Drawn,
    n: int,
    seed: int,
    takes: int | None,
    kept: Kept,
    problems: list[str],
) -> tuple[list[Item], list[tuple[list[int], list[int]]], list[Spoken]]:
    """Returns every scored output, the held-out speech as (units, durations), and all spoken replies.

    Of each split, n recordings are transcribed and n questions answered in text; half as many are
    resynthesized, read aloud, answered in speech and by standard prompting, since transcribing speech output
    takes longest. models: the model; the same without its adapter, and its text-to-unit generator, if it has
    them."""
    model, before, generator = models
    half = -(-n // 2)
    steps = 0
    for rows in drawn.speech.values():
        steps += 2 * len(rows) + (4 + bool(before) + bool(generator)) * len(rows[:half])
    for rows in drawn.questions.values():
        steps += 2 * len(rows) + 3 * len(rows[:half])
    for group, rows in drawn.voices.items():
        steps += len(rows) + 2 * len(rows) * (3 if group == "unseen" else 1)
    recognizer = Recognizer()
    background = ThreadPoolExecutor(1)
    encoded = {}
    talks = []
    try:
        with run.progress(steps, title="evaluate", unit="item") as bar:
            session = Session(model, recognizer, seed, takes, bar, background, kept, problems, generator)
            for split, rows in drawn.speech.items():
                encoded[split] = transcribe(session, before, rows, half)
                resynthesize(session, rows[:half], encoded[split][:half])
                read_aloud(session, rows[:half])
                if generator:
                    generate_units(session, rows[:half])
            for rows in drawn.questions.values():
                answer_in_text(session, rows, half)
                talks.append((rows[:half], *answer_in_speech(session, rows[:half])))
            for group, rows in drawn.voices.items():
                listen(session, group, rows)
            items = session.items()
    finally:  # Ctrl-C does not wait for what is in the queue
        background.shutdown(wait=False, cancel_futures=True)
        recognizer.close()
    spoken = []
    for rows, replies, recognized in talks:
        texts = [""] * len(rows) if recognized.exception() else recognized.result()
        spoken += zip(rows, replies, texts)
    return items, encoded["heldout"], spoken


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

    items: at most so many in a row, or of a voice (0: all there are); metrics: the folder of training curves
    (None: the one next to `folder`); takes: as in `SpeechGPT.reply_batch`; targets: row's key -> what it
    should reach. `corpus` may be one of voices (evaluation/voices.py); else that in `voices`, next to the
    model's `folder`, is evaluated, too, if there is one."""
    need_extra()
    targets = targets or {}
    measures.check_targets(targets)
    if items < 0:
        raise ValueError(f"items is {items}: give the number of items in a row, or 0 for all there are")
    Request(seed=seed, takes=takes)  # ValueError now
    folder = Path(folder)
    corpus = Path(corpus)
    out = Path(out)
    device = run.device(str(device))
    start = time.perf_counter()
    problems: list[str] = []

    # ---- all that is read, the tables first
    lookup = LookupBaselines([row for row in read_dialogues(corpus) if row["split"] == "train"])
    manifest, of_voices = [], corpus
    if not voices.is_of_voices(corpus):
        of_voices = folder.parent / "voices"
        manifest = [row | {"path": corpus / row["wav"]} for row in resolve(corpus, folder.parent)]
    drawn = draw(manifest, items or sys.maxsize, seed, problems)
    if voices.is_of_voices(of_voices):
        groups = voices.read_rows(of_voices)
        drawn.voices.update(draw_voices(groups, items or sys.maxsize, seed, problems))
    if not drawn.paths():
        raise ValueError(f"{corpus} has no recording that can be measured; {report.summary(problems)}")
    model, before = load_models(folder, device)
    generator = folder / "text_to_unit"
    generator = TextToUnit.from_pretrained(generator, device) if generator.is_dir() else None
    measured = {"bits": model}
    if (folder.parent / "stage1").is_dir():
        measured["bits.1"] = SpeechGPT(Llama.from_pretrained(folder.parent / "stage1"), model.tok)
    train = measures.train_units(model, manifest, folder.parent / "units.jsonl", 400)
    report.claim(out)
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in drawn.paths()]
    kept = Kept(out / "kept", [stamps(folder), files, drawn, items, seed, takes, str(device)])

    # ---- the numbers, written as soon as they are there
    with one_thread(model.llama):  # the recognizer has the other cores
        models = (model, before, generator)
        scored, speech, spoken = ask_all(models, drawn, items or sys.maxsize, seed, takes, kept, problems)
    rows = measures.score_all(scored, lookup) + voices.rows_of_voices(scored)
    rows += measures.bits_rows(measured, speech, train)
    rows = [row for row in rows if row.n]
    facts = {
        "model": str(folder),
        "corpus": str(corpus),
        "speakers": voices.count_speakers(folder.parent) or "",
        "voices": voices.describe(of_voices) if drawn.voices else "",
        "seed": seed,
        "items": f"up to {items} a row" if items else "all",
        "takes": f"up to {takes or model.takes} of what is spoken",
    } | report.about(device)

    def write(examples: list[dict], curves: list[str]):
        for row in rows:
            row.target = targets.get(row.key)
        facts["seconds"] = round(time.perf_counter() - start, 1)
        facts["targets"] = measures.count_reached(rows, targets)
        facts["problems"] = report.summary(problems)
        report.write_report(out, facts, rows, scored, examples, curves)

    write([], [])

    # ---- the rest: a fault in it does not lose them
    examples = attempt(problems, "examples", report.write_examples, out, spoken) or []
    first = None
    if manifest:  # not of voices alone
        question = out / examples[0]["question"] if examples else drawn.paths()[0]
        first = attempt(problems, "first reply", measures.first_reply, folder, question, str(device))
    if first:
        rows.append(Row("first", "time to a spoken reply, fresh process", first[0], None, None, 2, "s"))
        rows.append(Row("first.factor", "the same per second of speech", first[1], None, None, 2, "s"))
    metrics = Path(metrics or folder.parent / "metrics")
    curves = attempt(problems, "curves", report.plot_curves, metrics, out) or []
    write(examples, curves)
    kept.forget()
    for row in rows:
        print(f"{row.name:56} {row.show(row.value):>10}   {row.show_target()}")
    if problems:
        print(harmless(f"not everything could be measured: {report.summary(problems)}"))
    print(f"the whole report: {out}/report.md", flush=True)
    return {row.key: row.value for row in rows}


def attempt(problems: list[str], what: str, work: Callable, *arguments):
    """What `work` returns; None, and a line in `problems`, if it fails, in whatever way."""
    try:
        return work(*arguments)
    except Exception as problem:
        problems.append(f"{what}: {problem or type(problem).__name__}")
        return None


def main():
    parser = config.Parser(__doc__.split("\n")[0], prog="python evaluate.py")
    add = parser.add_argument
    add("--model", type=config.folder, default=default_model(), help="folder with llama/, hubert/, vocoder/")
    add("--corpus", type=config.folder, default="out/tiny/corpus", help="folder with manifest.jsonl")
    add("--out", type=config.folder, default="out/report", help="folder for the report")
    add("--items", type=int, default=120, help="items in a row; 0: all there are")
    add("--seed", type=int, default=0, help="of the choice of items, and of sampled speech")
    add("--takes", type=int, help="as of sample.py: draw speech again, at most so many times in all")
    add("--device", default="auto", help="cpu, cuda or mps")
    add(
        "--metrics",
        type=config.folder,
        help="folder of training curves (default: metrics/ next to the model)",
    )
    add("--targets", type=config.folder, metavar="CONFIG.toml", help="has [evaluate.targets] to compare with")
    args = parser.parse_args()
    targets = measures.read_targets(args.targets) if args.targets else None
    options = {"metrics": args.metrics, "takes": args.takes, "targets": targets}
    evaluate(args.model, args.corpus, args.out, args.items, args.seed, args.device, **options)


if __name__ == "__main__":
    config.command_line(main)

"""How good is it? Word error rates, right answers, bits per unit, seconds to a reply; each beside its baseline.

    python evaluate.py --model out/tiny/model --corpus out/tiny/corpus --out out/tiny/report --items 120

The paper (§5.3, §6) transcribes spoken answers with a recogniser and has ChatGPT and people score them. Here the
recogniser stays (judge.py), and as every question of the tiny world has one right answer, equality replaces the scores.

    source, resynthesis      what the judge itself gets wrong, and what units and vocoder cost on top of it
    asr, tts                 §3.1's two cross-modal tasks, on new renditions of train sentences and on held-out ones;
                             asr before stage 3 (no adapter) and inside the chain too
    answer, text, standard   the question heard (chain-of-modality), read, heard without chain (the paper's Table 2)
    spoken                   the spoken reply against its own text, and against the right answer
    bits                     -log2 p of the next unit in held-out speech (eq. 3), after all stages and after stage 1
    first                    seconds from typing `python sample.py question.wav` to the reply's wav

A word error rate is the edits of all items over the words of all items; a reply without speech or text is all wrong.
Intervals are 95 %: a bootstrap over items for rates, Wilson's for shares. OUT/report.md has the tables, report.json
the same for programs, items.jsonl every single item, examples/ what it sounds like, curve-*.png how it was trained.

References: Bisani & Ney 2004 (bootstrap of word error rates); Wilson 1927 (intervals of shares).
"""

import argparse
import functools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import checkpoint
import run
from checkpoint import read_jsonl
from config import command_line
from data import audio
from data.corpus import read_dialogues, read_manifest
from evaluation.judge import Recognizer, errors, need_extra, normalize_text, same
from generate import one_thread
from llama import Llama
from sample import Reply, SpeechGPT
from tokenizer import units_to_text

# ---- What is measured ------------------------------------------------------------------------------------------

SPLITS = ("rendition", "heldout")  # new recordings of sentences of train; sentences in no training example


class Measure(NamedTuple):
    """A row of the report, or one for each split: the share of words that are wrong, or of items that are right."""

    key: str
    name: str
    wer: bool = True
    split: bool = True  # a row for each split, called:
    names: tuple[str, str] = ("new renditions", "held out")
    beside: dict[str, str] = {}  # baselines that are measures: on the same recordings if it has them all
    target: tuple[str, ...] = ()  # of each row: the 25-minute run / weights/tiny


MEASURES = (
    Measure("source", "judge, on the source audio"),
    Measure("resynthesis", "resynthesis: the model's voice, predicted durations", split=False,
            beside={"source audio": "source"}, target=("≤ 15 % / ≤ 3 %",)),
    Measure("resynthesis.own", "resynthesis: the source's voice and durations", split=False,
            beside={"source audio": "source"}),
    Measure("asr", "speech to text (ASR)", beside={"judge": "source"}, target=("≤ 5 % / ≤ 1 %", "≤ 10 % / ≤ 3 %")),
    Measure("asr.before", "speech to text before stage 3 (no adapter)", beside={"with it": "asr"}),
    Measure("transcript", "spoken question, as transcribed in the chain", beside={"judge": "source"}),
    Measure("tts", "text to speech (TTS)", names=("train sentences", "held out"), beside={"source audio": "source"}),
    Measure("answer", "spoken question, exact answer", wer=False, beside={"read": "text"},
            target=("≥ 90 % / ≥ 98 %", "≥ 60 % / ≥ 90 %")),
    Measure("text", "text question, exact answer", wer=False, names=("train sentences", "held out")),
    Measure("standard", "spoken question, standard prompting", wer=False, beside={"by chain": "answer"}),
    Measure("spoken", "spoken reply against its own text", split=False, beside={"source audio": "source"},
            target=("≤ 20 % / ≤ 5 %",)),
    Measure("spoken.answer", "spoken question, right spoken answer", wer=False, beside={"its text": "spoken.text"}),
)  # fmt: skip


class Item(NamedTuple):
    """One thing that was said or written, and what it should have been."""

    measure: str
    id: str  # of the recording that it began with
    split: str
    speaker: int
    family: str
    question: str
    expected: str
    got: str


@dataclass
class Row:
    key: str
    name: str
    value: float | None  # None: the corpus has no such items
    low: float | None
    high: float | None
    n: int
    unit: str = "%"
    baseline: dict[str, float | None] = field(default_factory=dict)
    target: str = ""

    def show(self, value: float | None) -> str:
        if value is None:
            return "-"
        return f"{100 * value:.1f} %" if self.unit == "%" else f"{value:.2f} {self.unit}"


def ratio(counts: list[tuple[float, float]]) -> tuple[float | None, float | None, float | None]:
    """(over, under) of each item -> sum of over / sum of under, and the interval by bootstrap over items."""
    table = np.array(counts, float).reshape(-1, 2)
    over, under = table.sum(0).tolist()
    if not under:
        return None, None, None
    drawn = table[np.random.default_rng(0).integers(len(table), size=(2000, len(table)))].sum(1)  # (2000, 2)
    low, high = np.percentile(drawn[:, 0] / np.maximum(1, drawn[:, 1]), [2.5, 97.5]).tolist()
    if not over:
        high = min(1.0, 3 / under)  # the rule of three: no error in n words is not a rate of 0
    return over / under, low, high


def wilson(right: list[bool], z: float = 1.96) -> tuple[float | None, float | None, float | None]:
    """The share of True, and its interval."""
    if not right:
        return None, None, None
    n, p = len(right), sum(right) / len(right)
    middle, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return p, max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def score(m: Measure, items: list[Item]) -> tuple[float | None, float | None, float | None]:
    """Value and interval of some items of one measure."""
    if m.wer:
        return ratio([errors(item.expected, item.got) for item in items])
    return wilson([same(item.expected, item.got) for item in items])


def score_all(items: list[Item], memory: "Memory") -> list[Row]:
    rows, of = [], {}
    for item in items:
        of.setdefault(item.measure, []).append(item)
    for m in MEASURES:
        for i, split in enumerate(SPLITS if m.split else [""]):
            mine = [item for item in of.get(m.key, []) if item.split == split or not m.split]
            ids = {item.id for item in mine}
            row = Row(
                f"{m.key}.{split}" if split else m.key,
                m.name + (f", {m.names[i]}" if split else ""),
                *score(m, mine),
                len(mine),
                target=m.target[i] if m.target else "",
            )
            for label, key in m.beside.items():
                others = [item for item in of.get(key, []) if item.split == split or not m.split]
                equal = [item for item in others if item.id in ids]
                row.baseline[label] = score(m, equal if len(equal) == len(ids) else others)[0]
            if not m.wer:
                row.baseline |= memory.score(mine)
            rows.append(row)
    return rows


# ---- Baselines -------------------------------------------------------------------------------------------------


class Memory:
    """What can be answered without understanding: the train dialogues by heart."""

    def __init__(self, dialogues: list[dict]):
        self.dialogues = [(set(normalize_text(d["question"]).split()), d["answer"]) for d in dialogues]
        self.answers = {"": Counter(d["answer"] for d in dialogues)}  # of each family, and of all
        for d in dialogues:
            self.answers.setdefault(d["family"], Counter())[d["answer"]] += 1
        self.asked: dict[str, str] = {}

    def majority(self, family: str = "") -> str:
        """The most frequent answer, of a family or of all."""
        return next((answer for answer, _ in self.answers.get(family, Counter()).most_common(1)), "")

    def nearest(self, question: str) -> str:
        """The answer to the train question that shares most of its words (Jaccard)."""
        if question not in self.asked:
            words = set(normalize_text(question).split())
            found = max(
                self.dialogues, key=lambda d: len(d[0] & words) / len(d[0] | words), default=(None, "")
            )
            self.asked[question] = found[1]
        return self.asked[question]

    def score(self, items: list[Item]) -> dict[str, float | None]:
        guess = {
            "majority": lambda item: self.majority(),
            "majority of its family": lambda item: self.majority(item.family),
            "nearest train question": lambda item: self.nearest(item.question),
        }
        return {
            name: wilson([same(item.expected, say(item)) for item in items])[0] for name, say in guess.items()
        }


def ngram_bits(train: list[list[int]], test: list[list[int]], n_units: int) -> dict[str, float]:
    """Bits per unit of `test` from counts in `train`. p(b) = (c(b) + 1) / (N + K) and, backing off to it,
    p(b | a) = (c(a, b) + 10 p(b)) / (c(a) + 10); a is None before the first unit."""
    one, two, left = Counter(), Counter(), Counter()
    for units in train:
        one.update(units)
        two.update(zip([None, *units], units))
        left.update([None, *units[:-1]])
    pairs = [pair for units in test for pair in zip([None, *units], units)]
    uni = np.array([(one[b] + 1) / (one.total() + n_units) for _, b in pairs])
    bi = np.array([(two[pair] + 10 * p) / (left[pair[0]] + 10) for pair, p in zip(pairs, uni)])
    return {"unigram": -np.log2(uni).mean().item(), "bigram": -np.log2(bi).mean().item()} if pairs else {}


def unit_bits(model: SpeechGPT, speech: list[list[int]]) -> list[tuple[float, int]]:
    """(bits, units) of each: the sum of -log2 p of every unit, given <s> <sosp> and the units before it."""
    out = []
    for units in speech:
        ids = model.tok.encode(units_to_text(units))
        first = ids.index(model.tok.sosp) + 1
        log_p = model.logits(ids)[first - 1 : -2].log_softmax(
            -1
        )  # (U, V): what follows <sosp>, ..., the last but one
        target = torch.tensor(ids[first:-1], device=log_p.device)  # (U,): the units, without <eosp>
        out.append((-log_p.gather(1, target[:, None]).sum().item() / np.log(2), len(units)))
    return out


def train_units(extractor, manifest: list[dict], corpus: Path, limit: int) -> list[list[int]]:
    """The train split as units: from units.jsonl if this extractor wrote it, else of `limit` recordings."""
    train = [row for row in manifest if row["split"] == "train"]
    if (corpus / "units.jsonl").exists():
        stored = {row["id"]: row["units"] for row in read_jsonl(corpus / "units.jsonl", ("id", "units"))}
        if all(stored.get(row["id"]) == extractor(audio.load(corpus / row["wav"]))[0] for row in train[:3]):
            return [stored[row["id"]] for row in train if row["id"] in stored]
    train = random.Random(0).sample(train, min(limit, len(train)))
    return [extractor(audio.load(corpus / row["wav"]))[0] for row in train]


# ---- Listening and asking --------------------------------------------------------------------------------------

MAX_NEW = {
    "t": 96,
    "s": 320,
}  # tokens of an answer in text, in speech; a longer one is cut off, and judged like that


def ask(model: SpeechGPT, prompts: list, mode: str, bar, **options) -> list[Reply]:
    """model.reply_batch, in batches of prompts of similar size."""
    size = os.path.getsize if mode[0] == "s" else len
    order = sorted(range(len(prompts)), key=lambda i: size(prompts[i]))
    replies = [None] * len(prompts)
    for first in range(0, len(order), 32):
        batch = order[first : first + 32]
        found = model.reply_batch([prompts[i] for i in batch], mode, max_new=MAX_NEW[mode[2]], **options)
        for i, reply in zip(batch, found):
            replies[i] = reply
        bar.update(len(batch))
    return replies


def measure(
    model: SpeechGPT,
    before: SpeechGPT | None,
    recogniser: Recognizer,
    corpus: Path,
    items: int,
    seed: int,
    out: Path,
    takes: int | None,
) -> tuple[list[Item], list[list[int]], list[dict]]:
    """Every item of every measure; the held-out speech as units; the examples written to out/examples.

    Of each split, `items` recordings are transcribed and `items` questions answered in text; half as many are
    resynthesised, read aloud, answered in speech and by standard prompting: what is spoken the judge has to hear,
    which takes longest. `before` is the model without its adapter, if it has one; it transcribes half as many."""
    manifest = read_manifest(corpus)

    def draw(split: str, wanted) -> list[dict]:
        rows = [row for row in manifest if row["split"] == split and wanted(row)]
        return random.Random(f"{seed} {split}").sample(rows, min(items, len(rows)))

    speech = {split: draw(split, lambda row: row["kind"] != "answer") for split in SPLITS}
    questions = {split: draw(split, lambda row: "answer" in row) for split in SPLITS}
    half = -(-items // 2)
    bar = run.progress(
        sum(2 * len(s) + (4 + bool(before)) * len(s[:half]) for s in speech.values())
        + sum(2 * len(q) + 3 * len(q[:half]) for q in questions.values()),
        title="evaluate",
        unit="item",
    )
    voices = range(getattr(model, "n_speakers", 1))
    found, talks, units = [], [], {}
    with (
        ThreadPoolExecutor(1) as background,
        bar,
    ):  # the judge listens in the background while the model goes on

        def note(measure: str, split: str, rows: list[dict], expected: list[str], got: list):
            """got: texts, or recordings (None where there is none) for the judge to hear."""
            if all(isinstance(text, str) for text in got):
                texts = Future()
                texts.set_result(got)
            else:
                texts = background.submit(recogniser.hear, got, bar.update)
            found.append((measure, split, rows, expected, texts))
            return texts

        for split, rows in speech.items():
            texts, wavs = [row["text"] for row in rows], [audio.load(corpus / row["wav"]) for row in rows]
            note("source", split, rows, texts, wavs)
            units[split] = [model.extractor(wav) for wav in wavs]
            replies = ask(model, [corpus / row["wav"] for row in rows], "s2t", bar, task="asr")
            note("asr", split, rows, texts, [reply.text for reply in replies])
            rows, texts = rows[:half], texts[:half]
            if before:
                replies = ask(before, [corpus / row["wav"] for row in rows], "s2t", bar, task="asr")
                note("asr.before", split, rows, texts, [reply.text for reply in replies])
            note("resynthesis", split, rows, texts, [wave(model.vocoder(u)) for u, _ in units[split][:half]])
            note(
                "resynthesis.own",
                split,
                rows,
                texts,
                [
                    wave(model.vocoder(u, row["speaker"] if row["speaker"] in voices else None, durations))
                    for row, (u, durations) in zip(rows, units[split])
                ],
            )
            replies = ask(model, texts, "t2s", bar, task="tts", seed=seed, takes=takes)
            note("tts", split, rows, texts, [reply.wav for reply in replies])
        for split, rows in questions.items():
            wavs, answers = [corpus / row["wav"] for row in rows], [row["answer"] for row in rows]
            replies = ask(model, wavs, "s2t", bar)
            note(
                "transcript",
                split,
                rows,
                [row["text"] for row in rows],
                [reply.transcript for reply in replies],
            )
            note("answer", split, rows, answers, [reply.text for reply in replies])
            replies = ask(model, [row["text"] for row in rows], "t2t", bar)
            note("text", split, rows, answers, [reply.text for reply in replies])
            rows, wavs, answers = rows[:half], wavs[:half], answers[:half]
            replies = ask(model, wavs, "s2t", bar, chain=False)
            note("standard", split, rows, answers, [reply.text for reply in replies])
            replies = ask(model, wavs, "s2s", bar, seed=seed, takes=takes)
            note("spoken.text", split, rows, answers, [reply.text for reply in replies])
            heard = note("spoken.answer", split, rows, answers, [reply.wav for reply in replies])
            own = [
                reply.text if normalize_text(reply.text) else row["answer"]
                for row, reply in zip(rows, replies)
            ]
            found.append(("spoken", split, rows, own, heard))
            talks.append((rows, replies, heard))
        done = [
            Item(key, row["id"], split, row["speaker"], row["family"], row["text"], text, said)
            for key, split, rows, expected, texts in found
            for row, text, said in zip(rows, expected, texts.result())
        ]
    examples = [talk for rows, replies, heard in talks for talk in zip(rows, replies, heard.result())]
    five = [examples[i * len(examples) // 5] for i in range(5)] if len(examples) > 5 else examples
    return (
        done,
        [u for u, _ in units["heldout"]],
        [write_example(out, corpus, *e) for e in enumerate(five, 1)],
    )


def wave(samples: torch.Tensor) -> np.ndarray:
    return samples.float().cpu().numpy()


def write_example(out: Path, corpus: Path, n: int, talk: tuple[dict, Reply, str]) -> dict:
    """A spoken dialogue (recording, reply, what the judge heard of it) as wavs, and as a row of the report's table."""
    row, reply, judged = talk
    files = {"question": f"examples/{n}-question.wav", "reply": f"examples/{n}-reply.wav"}
    audio.save(out / files["question"], audio.load(corpus / row["wav"]))
    if reply.wav is None:
        files["reply"] = ""
    else:
        audio.save(out / files["reply"], reply.wav)
    return {
        "split": row["split"],
        "asked": row["text"],
        "heard": reply.transcript,
        "answered": reply.text,
        "right": row["answer"],
        "judge": judged,
        "note": reply.note,
    } | files


def first_reply(folder: Path, wav: Path, device: str) -> tuple[float, float | None]:
    """Seconds of `python sample.py WAV` in a new process, the slower of two; and those by second of speech spoken."""
    worst = (0.0, None)
    for _ in range(2):
        with tempfile.TemporaryDirectory() as scratch:
            command = [
                sys.executable,
                Path(__file__).with_name("sample.py"),
                wav,
                "--model",
                folder,
                "--device",
                device,
                "--out",
                f"{scratch}/reply.wav",
            ]
            began = time.perf_counter()
            ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            took = time.perf_counter() - began
            if ended.returncode:
                raise ValueError(f"sample.py failed on {wav}: {ended.stderr.strip() or ended.returncode}")
            spoken = Path(scratch, "reply.wav")
            factor = took * audio.RATE / len(audio.load(spoken)) if spoken.exists() else None
            worst = max(worst, (took, factor), key=lambda pair: pair[0])
    return worst


# ---- The report ------------------------------------------------------------------------------------------------


def about(folder: Path, corpus: Path, items: int, seed: int, device: torch.device, seconds: float) -> dict:
    """Where, when and with what the numbers were made."""
    try:
        cpu = next(
            line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")
        )
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            text=True,
            capture_output=True,
        ).stdout.strip()
    except OSError:
        commit = ""
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return {
        "model": str(folder),
        "corpus": str(corpus),
        "seed": seed,
        "commit": commit or "unknown",
        "items": "all" if items == sys.maxsize else f"up to {items} a row",
        "hardware": f"{cpu}, {os.cpu_count()} cores{gpu}",
        "seconds": round(seconds, 1),
        "versions": ", ".join(
            f"{name} {version(name)}" for name in ("torch", "numpy", "faster-whisper", "jiwer")
        )
        + f", Python {platform.python_version()}",
    }


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    clean = [[" ".join(str(cell).replace("|", "/").split())[:240] for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in clean) + "\n"


def by_group(items: list[Item], group: str, columns: dict[str, tuple[str, str]]) -> str:
    """A table with a row for each speaker or family; columns: title -> (measure, split or "")."""
    measures = {m.key: m for m in MEASURES}
    lines = []
    for value in sorted({getattr(item, group) for item in items}):
        line = [value]
        for key, split in columns.values():
            mine = [
                i for i in items if (i.measure, getattr(i, group)) == (key, value) and split in ("", i.split)
            ]
            number = score(measures[key], mine)[0]
            line.append(f"{100 * number:.0f} % of {len(mine)}" if mine else "-")
        lines.append(line)
    return table([group, *columns], lines)


def write_report(
    out: Path, facts: dict, rows: list[Row], items: list[Item], examples: list[dict], curves: list[str]
):
    text = "# Evaluation\n\n" + "".join(f"- {name}: {value}\n" for name, value in facts.items()) + "\n"
    text += table(
        ["", "value", "95 % interval", "n", "baseline", "target: 25-minute run / weights/tiny"],
        [
            [
                row.name,
                row.show(row.value),
                f"{row.show(row.low)} to {row.show(row.high)}" if row.low is not None else "",
                row.n,
                "; ".join(f"{name} {row.show(value)}" for name, value in row.baseline.items()),
                row.target,
            ]
            for row in rows
        ],
    )
    text += (
        "Speech is scored by its word error rate, answers by the share that is exactly right; both after "
        "`judge.normalize_text`.\nEvery item: items.jsonl.\n\n## By speaker\n\nWord error rates.\n\n"
    )
    text += by_group(
        items,
        "speaker",
        {
            "judge on the source": ("source", ""),
            "resynthesis": ("resynthesis", ""),
            "speech to text": ("asr", ""),
        },
    )
    text += "## By family\n\nShare of exact answers.\n\n"
    text += by_group(
        [i for i in items if i.measure in ("answer", "text")],
        "family",
        {
            "heard, new renditions": ("answer", "rendition"),
            "heard, held out": ("answer", "heldout"),
            "read, train": ("text", "rendition"),
            "read, held out": ("text", "heldout"),
        },
    )
    text += "## Examples\n\n" + table(
        ["asked", "heard", "answered", "the judge heard", "right answer", ""],
        [
            [
                f"[{e['asked']}]({e['question']})",
                e["heard"],
                e["answered"],
                f"[{e['judge'] or '(nothing)'}]({e['reply']})" if e["reply"] else e["note"],
                e["right"],
                e["split"],
            ]
            for e in examples
        ],
    )
    text += "## Training\n\n" + "".join(f"![{curve}]({curve})\n" for curve in curves)
    checkpoint.write_atomic(out / "report.md", text.encode())
    checkpoint.write_json(
        out / "report.json", {"about": facts, "rows": [asdict(row) for row in rows], "examples": examples}
    )
    checkpoint.write_atomic(
        out / "items.jsonl", "".join(json.dumps(i._asdict()) + "\n" for i in items).encode()
    )


def plot_curves(metrics: Path, out: Path) -> list[str]:
    """A PNG for each metrics/STAGE.jsonl: every logged number over the steps. What is no JSON is passed over."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = []
    for path in sorted(metrics.glob("*.jsonl")):
        curves: dict[str, list[tuple[float, float]]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                for key, value in entry.items():
                    if key not in ("step", "lr", "grad_norm", "tokens_per_s") and isinstance(
                        value, int | float
                    ):
                        curves.setdefault(key, []).append((entry["step"], value))
            except (ValueError, KeyError, AttributeError):
                continue
        if not curves:
            continue
        figure, axes = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3), squeeze=False)
        for axis, (key, points) in zip(axes[0], curves.items()):
            axis.plot(*zip(*points), linewidth=0.8, marker="." if len(points) < 30 else None)
            axis.set(title=f"{path.stem}: {key}", xlabel="step")
            axis.grid(alpha=0.3)
        names.append(f"curve-{path.stem}.png")
        figure.savefig(out / names[-1], dpi=80, bbox_inches="tight")
        pyplot.close(figure)
    return names


def evaluate(
    folder: str | Path,
    corpus: str | Path,
    out: str | Path,
    items: int = 120,
    seed: int = 0,
    device: str | torch.device = "auto",
    metrics: str | Path | None = None,
    takes: int | None = None,
) -> dict[str, float | None]:
    """Judges the model in `folder` on `corpus` and writes the report to `out`; returns the value of each row.

    `items` is the size of a row (0: all there are); metrics, a folder of JSONL files, is by default beside `folder`;
    takes of what is spoken as in `SpeechGPT.reply_batch`."""
    need_extra()
    folder, corpus, out, device = Path(folder), Path(corpus), Path(out), run.device(str(device))
    if items < 0:
        raise ValueError(f"items is {items}: give the number of items in a row, or 0 for all there are")
    began, items = time.perf_counter(), items or sys.maxsize
    model = SpeechGPT.from_pretrained(folder, str(device))
    for part in ("extractor", "vocoder"):
        if getattr(model, part) is None:
            raise ValueError(
                f"{folder} has no {'hubert' if part == 'extractor' else part}/: train that stage first"
            )
    read_manifest(corpus)  # what is wrong with it is told before any work
    dialogues = read_dialogues(corpus)
    out.mkdir(parents=True, exist_ok=True)
    model.hear = functools.cache(model.hear)  # one recording is asked about in several ways: encode it once
    before = None
    if (folder / "lora").is_dir():
        before = SpeechGPT(Llama.from_pretrained(folder / "llama", device=device), model.tok, model.extractor)
        before.hear = model.hear
    with one_thread(model.llama):  # the judge has the others
        found, speech, examples = measure(model, before, Recognizer(), corpus, items, seed, out, takes)
    rows = score_all(found, Memory([d for d in dialogues if d["split"] == "train"]))
    train = train_units(model.extractor, read_manifest(corpus), corpus, 400)
    bits = {"bits": ("bits per unit of held-out speech", model)}
    if (folder.parent / "stage1").is_dir():
        bits["bits.1"] = (
            "the same after stage 1",
            SpeechGPT(Llama.from_pretrained(folder.parent / "stage1"), model.tok),
        )
    for key, (name, speaker) in bits.items():
        rows.append(
            Row(
                key,
                name,
                *ratio(unit_bits(speaker, speech)),
                len(speech),
                "bits",
                ngram_bits(train, speech, model.tok.n_units),
            )
        )
    if examples:
        took, factor = first_reply(folder, out / examples[0]["question"], str(device))
        rows.append(
            Row("first", "time to a spoken reply, fresh process", took, None, None, 2, "s", target="≤ 10 s")
        )
        rows.append(Row("first.factor", "the same, by second of speech", factor, None, None, 2, "s"))
    curves = plot_curves(Path(metrics or folder.parent / "metrics"), out)
    facts = about(folder, corpus, items, seed, device, time.perf_counter() - began)
    facts["takes"] = f"up to {takes or model.takes} of what is spoken"
    write_report(out, facts, rows, found, examples, curves)
    for row in rows:
        print(f"{row.name:56} {row.show(row.value):>10}   {row.target}")
    print(f"the whole report: {out}/report.md", flush=True)
    return {row.key: row.value for row in rows}


def complain(message: str):
    raise ValueError(f"{message}; see python evaluate.py --help")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--model", default="weights/tiny", help="folder with llama/, lora/, hubert/, vocoder/")
    p.add_argument(
        "--corpus", default="out/tiny/corpus", help="folder with manifest.jsonl and dialogues.jsonl"
    )
    p.add_argument("--out", default="out/report", help="folder for the report")
    p.add_argument("--items", type=int, default=120, help="items in a row; 0: all there are")
    p.add_argument("--seed", type=int, default=0, help="of the choice of items, and of sampled speech")
    p.add_argument("--takes", type=int, help="as of sample.py: speak again, up to so many times in all")
    p.add_argument("--device", default="auto", help="cpu, cuda or mps")
    p.add_argument("--metrics", help="folder of training curves (default: beside the model's)")
    p.error = complain
    a = p.parse_args()
    evaluate(a.model, a.corpus, a.out, a.items, a.seed, a.device, a.metrics, a.takes)


if __name__ == "__main__":
    command_line(main)

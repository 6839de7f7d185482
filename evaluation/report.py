"""The report: rows, items and examples of an evaluation as files.

    report.md          tables of all rows, by speaker, by family, and of examples; training curves
    report.json        rows, examples, and with what the numbers were made, for programs
    items.jsonl        every scored output with its reference: enough to compute rates and shares again
    examples/          the spoken questions and replies that report.md links to
    curve-STAGE.png    every number logged in metrics/STAGE.jsonl, over the steps

Nothing is measured here: evaluate.py asks the model, evaluation/measures.py makes rows of its outputs.
"""

import contextlib
import json
import math
import os
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from data import audio
from evaluation.measures import MEASURES, VOICE_GROUPS, VOICE_MEASURES, Item, Row, score, select
from files import harmless, read_json, write_atomic, write_json, write_jsonl
from request import Reply
from training.meters import COSTS

# ---- Files -------------------------------------------------------------------------------------------------


MADE = ("report.md", "report.json", "items.jsonl", "examples")


def claim(out: Path):
    """Makes the folder of a report, and marks it. ValueError if it has files of these names of another kind:
    what no report has made is not replaced."""
    found = [name for name in MADE if os.path.lexists(out / name)]
    path = out / "report.json"
    if not found:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, {"about": {}, "rows": [], "examples": []})
        return
    with contextlib.suppress(OSError, ValueError):
        mark = read_json(path)
        if isinstance(mark, dict) and {"about", "rows", "examples"} <= mark.keys():
            return
    raise ValueError(f"{out / found[0]} is there and no report of this program: choose another --out")


def summary(problems: list[str], most: int = 20) -> str:
    """What could not be measured; "" if nothing."""
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "; ".join([*map(harmless, problems[:most]), *more])


def about(device: torch.device) -> dict[str, str]:
    """Commit, hardware and versions."""
    packages = [f"{name} {version_of(name)}" for name in ("torch", "numpy", "faster-whisper", "jiwer")]
    commit = output_of("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    gpu = {"mps": ", its GPU (mps)"}.get(device.type, "")
    if device.type == "cuda":
        gpu = f", {torch.cuda.get_device_name(device)}"
    return {
        "commit": commit or "unknown",
        "hardware": f"{processor()}, {os.cpu_count()} cores{gpu}",
        "versions": f"{', '.join(packages)}, Python {platform.python_version()} on {platform.system()}",
    }


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # it came in another way than as a package
        return "of unknown version"


def processor() -> str:
    """The processor's name, as far as this system tells it."""
    if platform.system() == "Darwin":
        return output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")  # of Linux, which names the processor only on x86
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def output_of(*command: str) -> str:
    """What a command prints; "" if it fails or there is no such command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def write_examples(out: Path, spoken: list[tuple[dict, Reply, str]], n: int = 5) -> list[dict]:
    """Writes n spoken questions and their replies to `out`/examples; returns what the report shows of them.

    spoken: rows of the manifest with their "path", each with the reply and the recognized text of the reply.
    """
    if len(spoken) > n:
        spoken = [spoken[i * len(spoken) // n] for i in range(n)]
    examples = []
    for number, (row, reply, recognized) in enumerate(spoken, 1):
        question_wav = f"examples/{number}-question.wav"
        reply_wav = ""
        audio.save(out / question_wav, audio.load(row["path"]))
        if reply.wav is not None:
            reply_wav = f"examples/{number}-reply.wav"
            audio.save(out / reply_wav, reply.wav)
        example = {
            "split": row["split"],
            "asked": row["text"],
            "heard": reply.transcript,
            "answered": reply.text,
            "right": row["answer"],
            "judge": recognized,
            "note": reply.note,
            "question": question_wav,
            "reply": reply_wav,
        }
        examples.append(example)
    return examples


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table; cells are cut at 240 characters."""
    lines = [head, ["---"] * len(head), *rows]
    text = ""
    for line in lines:
        cells = [" ".join(str(cell).replace("|", "/").split())[:240] for cell in line]
        text += f"| {' | '.join(cells)} |\n"
    return text + "\n"


def row_table(rows: list[Row]) -> str:
    """One line for each row; a column of targets if there is a target."""
    has_targets = any(row.target is not None for row in rows)
    lines = []
    for row in rows:
        interval = f"{row.show(row.low)} to {row.show(row.high)}" if row.low is not None else ""
        baselines = "; ".join(f"{label} {row.show(value)}" for label, value in row.baseline.items())
        line = [row.name, row.show(row.value), interval, row.n, baselines]
        lines.append([*line, row.show_target()] if has_targets else line)
    head = ["", "value", "95 % interval", "n", "baseline"]
    return table([*head, "target"] if has_targets else head, lines)


def group_table(items: list[Item], group: str, columns: dict[str, tuple[str, str]]) -> str:
    """One line for each speaker or family; columns: title -> (measure, split or "" for both)."""
    measures = {measure.key: measure for measure in (*MEASURES, *VOICE_MEASURES)}
    columns = {title: column for title, column in columns.items() if select(items, *column)}
    lines = []
    for value in sorted({getattr(item, group) for item in items}):
        mine = [item for item in items if getattr(item, group) == value]
        line = [value]
        for key, split in columns.values():
            found = select(mine, key, split)
            line.append(f"{100 * score(measures[key], found)[0]:.0f} % of {len(found)}" if found else "-")
        lines.append(line)
    return table([group, *columns], lines)


SPEAKER_COLUMNS = {
    "recognizer on the source": ("source", ""),
    "resynthesis": ("resynthesis", ""),
    "speech to text": ("asr", ""),
    "spoken question answered right": ("answer", ""),
}
VOICE_COLUMNS = {  # of a corpus of voices: measure of a group -> split
    "recognizer": ("source.{}", ""),
    "words wrong, new": ("asr.{}", "rendition"),
    "held out": ("asr.{}", "heldout"),
    "in noise": ("asr.{}.noise", ""),
    "by telephone": ("asr.{}.telephone", ""),
    "answers right, new": ("answer.{}", "rendition"),
    "held out ": ("answer.{}", "heldout"),
    "in noise ": ("answer.{}.noise", ""),
    "by telephone ": ("answer.{}.telephone", ""),
}
FAMILY_COLUMNS = {
    "spoken, new renditions": ("answer", "rendition"),
    "spoken, training recordings": ("answer", "train"),
    "spoken, held out": ("answer", "heldout"),
    "text, train sentences": ("text", "rendition"),
    "text, training recordings": ("text", "train"),
    "text, held out": ("text", "heldout"),
}


def example_table(examples: list[dict]) -> str:
    lines = []
    for example in examples:
        spoken = example["note"]
        if example["reply"]:
            spoken = f"[{example['judge'] or '(nothing)'}]({example['reply']})"
        question = f"[{example['asked']}]({example['question']})"
        texts = [question, example["heard"], example["answered"], spoken, example["right"]]
        lines.append([*texts, example["split"]])
    return table(
        ["question", "transcript", "answer", "spoken reply as recognized", "right answer", "split"], lines
    )


def markdown(facts: dict, rows: list[Row], items: list[Item], examples: list[dict], curves: list[str]) -> str:
    text = "# Evaluation\n\n"
    text += "".join(f"- {name}: {value}\n" for name, value in facts.items()) + "\n"
    text += row_table(rows)
    text += "Speech is scored by its word error rate, answers by the share that is exactly right; both after "
    text += "`normalize_text` of evaluation/judge.py.\nEvery item: items.jsonl.\n\n"
    for group, name in VOICE_GROUPS.items():
        columns = {title: (key.format(group), split) for title, (key, split) in VOICE_COLUMNS.items()}
        found = [item for item in items if item.measure in {key for key, _ in columns.values()}]
        if found:
            text += f"## By voice: {name}\n\n"
            text += group_table(found, "speaker", columns)
    numbered = [item for item in items if isinstance(item.speaker, int)]
    if numbered:
        text += "## By speaker\n\nWord error rates; of answers, the share that is exactly right.\n\n"
        text += group_table(numbered, "speaker", SPEAKER_COLUMNS)
    answers = [item for item in items if item.measure in ("answer", "text")]
    if answers:
        text += "## By family\n\nShares of exact answers.\n\n"
        text += group_table(answers, "family", FAMILY_COLUMNS)
    if examples:
        text += "## Examples\n\n"
        text += example_table(examples)
    if curves:
        text += "## Training\n\n"
    return text + "".join(f"![{curve}]({curve})\n" for curve in curves)


def write_report(
    out: Path, facts: dict, rows: list[Row], items: list[Item], examples: list[dict], curves: list[str]
):
    """report.md, report.json and items.jsonl in `out`; facts that are "" are left out."""
    facts = {name: fact for name, fact in facts.items() if fact != ""}
    text = markdown(facts, rows, items, examples, curves)
    table_rows = [asdict(row) | {"reached": row.reached} for row in rows]
    write_atomic(out / "report.md", text.encode(errors="replace"))
    write_json(out / "report.json", {"about": facts, "rows": table_rows, "examples": examples})
    write_jsonl(out / "items.jsonl", [item._asdict() for item in items])


# ---- Training curves ---------------------------------------------------------------------------------------

NOT_DRAWN = ("step", "lr", "grad_norm", "padding", "length", *COSTS)
Curves = dict[str, list[tuple[float, float]]]  # name of a number -> (step, value)


def read_curves(path: Path) -> Curves:
    """The numbers of one metrics file. Lines that are no JSON, as a killed run leaves them, are skipped."""
    curves: Curves = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            for key, value in entry.items():
                if key not in NOT_DRAWN and isinstance(value, int | float) and math.isfinite(value):
                    curves.setdefault(key, []).append((float(entry["step"]), value))
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError):
            continue
    return curves


def plot_curves(metrics: Path, out: Path) -> list[str]:
    """Draws a PNG for each metrics/STAGE.jsonl that has numbers; returns the names of the files."""
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    names = []
    for path in sorted(metrics.glob("*.jsonl")):
        curves = read_curves(path)
        if not curves:
            continue
        figure, axes = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3), squeeze=False)
        for axis, (key, points) in zip(axes[0], curves.items()):
            axis.plot(*zip(*points), linewidth=0.8, marker="." if len(points) < 30 else None)
            axis.set(title=f"{path.stem}: {key}", xlabel="step")
            axis.grid(alpha=0.3)
        name = f"curve-{path.stem}.png"
        figure.savefig(out / name, dpi=80, bbox_inches="tight")
        pyplot.close(figure)
        names.append(name)
    return names

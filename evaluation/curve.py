"""Words wrong in unseen voices against the number of training speakers: a curve from several runs' reports.

    python -m evaluation.curve out/one/report out/four/report out/tiny/report --out out/curve

Each is a report of a model that was evaluated on the same corpus of voices (evaluation/voices.py), trained
with --corpus.options.voices 0, 3, ... and nothing else changed. Writes OUT.md, a table, and OUT.png.
"""

from starting import starting

if __name__ == "__main__":
    starting()

from pathlib import Path
from typing import NamedTuple

from config import Parser, command_line, folder
from evaluation.report import table
from files import read_json, write_atomic

ROWS = {
    "asr.unseen": "words wrong",
    "asr.unseen.worst": "the worst voice",
    "answer.unseen": "answers right",
}


class Point(NamedTuple):
    speakers: int  # that the run had to train on
    rows: dict[str, dict]  # those of ROWS, by key
    report: Path


def read_point(report: Path) -> Point:
    """ValueError, one line, if the report lacks these rows, or the number of training speakers."""
    path = report / "report.json"
    found = read_json(path)
    try:
        rows = {row["key"]: row for row in found["rows"] if row["key"] in ROWS}
        speakers = found["about"].get("speakers")
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no report of evaluate.py") from None
    if type(speakers) is not int:
        raise ValueError(f"{path} has no number of speakers: its model must be in the folder of its run")
    if not rows.keys() >= ROWS.keys():
        raise ValueError(f"{path} has no unseen voices; evaluate with a corpus of them")
    return Point(speakers, rows, report)


def show(points: list[Point]) -> str:
    """A table of Markdown."""
    lines = []
    for point in points:
        cells = []
        for key in ROWS:
            value, low, high = (point.rows[key][name] for name in ("value", "low", "high"))
            cells.append(f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})")
        lines.append([point.speakers, *cells])
    return table(["training speakers", *ROWS.values()], lines)


def draw(points: list[Point], path: Path):
    """A PNG: one line for each of ROWS, with its interval as bars."""
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 3.5))
    speakers = [point.speakers for point in points]
    for key, name in ROWS.items():
        values = [100 * point.rows[key]["value"] for point in points]
        below = [value - 100 * point.rows[key]["low"] for value, point in zip(values, points)]
        above = [100 * point.rows[key]["high"] - value for value, point in zip(values, points)]
        axis.errorbar(speakers, values, (below, above), marker="o", capsize=3, label=name)
    axis.set(xlabel="training speakers", ylabel="%", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    parser = Parser("Words wrong in unseen voices against the number of training speakers.")
    parser.add_argument("reports", type=folder, nargs="+", help="folders of evaluate.py's reports")
    parser.add_argument("--out", type=folder, default="out/curve", help="OUT.md and OUT.png are written")
    known = parser.parse_args()
    points = sorted((read_point(report) for report in known.reports), key=lambda point: point.speakers)
    known.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(known.out.with_suffix(".md"), show(points).encode())
    draw(points, known.out.with_suffix(".png"))
    print(show(points))


if __name__ == "__main__":
    command_line(main)

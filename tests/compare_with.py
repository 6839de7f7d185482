"""Does this tree still compute what another revision computed, to the last bit?

    python tests/compare_with.py REVISION      for example HEAD~3; exit code 1 and the differences, if any

Checks REVISION out beside this tree, runs `python train.py configs/ci.toml` in both from empty folders on
this machine, and compares every tensor, metric and report number; then the ids and the waveforms that
weights/tiny gives to ten fixed prompts (four modes, recognition, synthesis, continuation). Bits differ from
one processor to another, so nothing is compared with a stored hash. What the other revision gave is kept in
the temporary folder, to compare with it again.
"""

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(tempfile.gettempdir()) / "speechgpt-compare"
TIMES = {"tokens_per_s", "seconds", "finished"}  # keys of metrics and tables that no two runs share
TIMES |= {"tokens_per_s_each", "wait", "peak_gib", "mfu", "padding", "length"}
TIMED_ROWS = {"first", "first.factor"}  # of the report
FILES_RENAMED = {r"^ci/corpus/units\.jsonl$": "ci/units.jsonl"}  # a path under out/ then: path now
FILES_ADDED = {"ci/manifest.jsonl", "ci/dialogues.jsonl", "ci/skipped.jsonl"}  # that were not there then
FOLDERS_ADDED = ("ci/tokens/",)
KEYS_RENAMED: dict[str, str] = {}  # of metrics and of items

TALK = """
import json, sys
import numpy as np
from sample import SpeechGPT
gpt, out = SpeechGPT.from_pretrained("weights/tiny", device="cpu"), sys.argv[1]
wav = sys.argv[2:]
replies = [
    gpt.reply(wav[0], mode="s2s"), gpt.reply(wav[1], mode="s2t"),
    gpt.reply("What is three plus four?", mode="t2s"),
    gpt.reply("Which city is the capital of Peru?", mode="t2t"),
    gpt.transcribe(wav[0]), gpt.transcribe(wav[2]),
    gpt.speak("Tom has four coins."), gpt.continue_speech(wav[1]),
    gpt.reply(wav[2], mode="s2s", chain=False), *gpt.reply_batch([wav[0], "Hello!"], "*2s", seed=5),
]
table = {"prompts": [gpt.ids(w) for w in wav], "logits": gpt.logits(gpt.ids(wav[0])).flatten().tolist()}
table["replies"] = [[r.transcript, r.text, r.units, r.note] for r in replies]
json.dump(table, open(out + "/talk.json", "w"))
np.savez(out + "/talk.npz", **{str(i): r.wav for i, r in enumerate(replies) if r.wav is not None})
"""


def check_out(revision: str, folder: Path):
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


def compute(tree: Path, out: Path):
    """Trains configs/ci.toml and talks with weights/tiny, with the code of `tree`; everything goes to
    `out`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    run = [sys.executable, "train.py", "configs/ci.toml", "--out", str(out / "ci")]
    subprocess.run(run, cwd=tree, check=True)
    wavs = sorted((out / "ci/corpus/wav").glob("plus-*.wav"))[:3]
    subprocess.run([sys.executable, "-c", TALK, str(out), *map(str, wavs)], cwd=tree, check=True)


def read(path: Path):
    """A file as something that == compares bit for bit; None: not compared."""
    if path.suffix == ".safetensors":
        return {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in load_file(path).items()}
    if path.suffix == ".npz":
        with np.load(path) as stored:
            return {name: stored[name].tobytes() for name in stored.files}
    if path.suffix == ".jsonl":
        return [known(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.name == "report.json":
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {
            row["key"]: [row[key] for key in ("value", "low", "high", "n")]
            for row in rows
            if row["key"] not in TIMED_ROWS
        }
    return path.read_bytes() if path.suffix in (".wav", ".json", ".model") else None


def known(row: dict) -> dict:
    return {KEYS_RENAMED.get(key, key): value for key, value in row.items() if key not in TIMES}


def results(out: Path) -> dict[str, object]:
    """Every compared file, without the state of unfinished stages."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and not name.startswith("ci/state/"):
            for old, new in FILES_RENAMED.items():
                name = re.sub(old, new, name)
            found[name] = read(path)
    return {name: value for name, value in found.items() if value is not None}


def differences(then: dict, now: dict) -> list[str]:
    alone = sorted((then.keys() ^ now.keys()) - FILES_ADDED)
    alone = [name for name in alone if not name.startswith(FOLDERS_ADDED)]
    lines = [f"{name}: only {'then' if name in then else 'now'}" for name in alone]
    for name in sorted(then.keys() & now.keys()):
        if then[name] != now[name]:
            lines.append(f"{name}: differs{where(then[name], now[name])}")
    return lines


def where(then, now) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [str(key) for key in {**then, **now} if then.get(key) != now.get(key)]
        return f" at {len(keys)} of {len(now)} keys: {', '.join(keys[:4])}"
    if isinstance(then, list) and isinstance(now, list):
        rows = [i for i, pair in enumerate(zip(then, now)) if pair[0] != pair[1]]
        return (
            f" ({len(then)} and {len(now)} rows; the first: {then[rows[0]]!s:.200} / {now[rows[0]]!s:.200})"
            if rows
            else ""
        )
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("revision")
    revision = parser.parse_args().revision
    sha = subprocess.run(
        ["git", "rev-parse", revision], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    then = CACHE / sha
    if not (then / "talk.npz").exists():
        with tempfile.TemporaryDirectory() as tree:
            check_out(sha, Path(tree))
            compute(Path(tree), then)
    with tempfile.TemporaryDirectory() as folder:
        now = Path(folder) / "now"
        compute(ROOT, now)
        before, after = results(then), results(now)
    lines = differences(before, after)
    print("\n".join(lines) or f"equal to {revision}: {len(after)} files, every bit")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()

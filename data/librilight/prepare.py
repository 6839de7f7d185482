"""LibriLight: 60,000 hours of audiobooks without transcripts, what stage 1 of the paper is trained on (§5.1).

    python data/librilight/prepare.py small out/librilight
    python data/librilight/prepare.py small.tar out/librilight

    small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb.flac      ten minutes, say
    small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb.json
        {"speaker": "100", "book_meta": {...}, "snr": 7.1, "voice_activity": [[0.4, 12.3], [12.8, 19.2], ...]}

Utterances are made of the stretches of speech in voice_activity, joined while they and the pauses between
them take no more than --target seconds; pauses longer than --pause are never inside. A longer stretch is cut
into equal parts. They are written to OUT/cut/ as flac, with an empty text. A share of the speakers is held
out (--heldout).

Reference: Kahn et al. 2020 (https://arxiv.org/abs/1912.07875), https://github.com/facebookresearch/libri-light
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: let it find `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import command_line
from data import recipe
from data.recordings import Job, Settings, Skipped, Utterance
from files import read_json


def jobs(settings: Settings, target: float, pause: float, least_snr: float) -> Iterator[Job | Skipped]:
    for folder, files in recipe.walk(settings, leave=("cut",)):
        names = set(files)
        for name in files:
            if not name.endswith(".flac"):
                continue
            path, table = recipe.join(folder, name), f"{recipe.stem(name)}.json"
            if table not in names:
                yield Skipped(path, "no segments: its json is missing", work=1)
                continue
            try:
                segments = read_json(Path(settings.source, folder, table))
                speaker, snr = recipe.string(segments, "speaker"), float(segments.get("snr") or 0)
                spans = join_speech(
                    [(float(b), float(e)) for b, e in segments["voice_activity"]], target, pause
                )
            except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
                yield Skipped(path, "damaged segments: its json cannot be read", table, work=1)
                continue
            if snr < least_snr:
                yield Skipped(path, f"noisy: snr {snr:.1f}", work=1)
            elif not spans:
                yield Skipped(path, "no speech", work=1)
            else:
                start = recipe.stem(path)
                numbered = enumerate(spans)
                yield Job(
                    path, [Utterance(f"{start}-{n:04}", "", speaker, "", b, e) for n, (b, e) in numbered]
                )


def join_speech(
    stretches: list[tuple[float, float]], target: float, pause: float
) -> list[tuple[float, float]]:
    """[(begin, end)] of stretches of speech -> of utterances of at most `target` seconds.

    >>> join_speech([(0, 4), (4.5, 9), (20, 21), (30, 54)], target=10, pause=1)
    [(0, 9), (20, 21), (30.0, 38.0), (38.0, 46.0), (46.0, 54.0)]"""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(stretches):
        if not 0 <= begin < end < 1e6:
            raise ValueError("times make no sense")
        if joined and begin - joined[-1][1] <= pause and end - joined[-1][0] <= target:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            continue
        parts = math.ceil((end - begin) / target)
        step = (end - begin) / parts
        joined += (
            [(begin + n * step, begin + (n + 1) * step) for n in range(parts)]
            if parts > 1
            else [(begin, end)]
        )
    return joined


def main() -> None:
    parser = recipe.parser(
        "Makes a corpus of LibriLight, or of other speech in its layout.", split_by="speaker"
    )
    parser.add_argument("--target", type=float, default=15.0, help="seconds of an utterance, at most")
    parser.add_argument(
        "--pause", type=float, default=1.0, help="longest silence inside an utterance, seconds"
    )
    parser.add_argument("--snr", type=float, default=-math.inf, help="leave out recordings noisier than this")
    options = vars(parser.parse_args())
    if not 1 <= options["target"] < math.inf:
        raise ValueError(f"--target is {options['target']}: it must be at least 1 second")
    settings, refused = recipe.settings_of(options, (".flac", ".json"), texts=False)
    total = sum(name.endswith(".flac") for _, files in recipe.walk(settings, ("cut",)) for name in files)
    found = jobs(settings, options["target"], options["pause"], options["snr"])
    recipe.prepare("librilight", found, total, settings, options["workers"], refused)


if __name__ == "__main__":
    command_line(main)

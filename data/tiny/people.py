"""Real people saying words of the tiny world, as Debian's packages have them; none of it is trained on.

    sudo apt install asterisk-core-sounds-en-wav ktuberling-data tuxpaint-stamps-default      # 230 MB
    python data/tiny/people.py out/people
    python evaluate.py --model weights/tiny --corpus out/people --out out/report-people

Three speakers say single words: numbers, days and months for a telephone exchange (asterisk: Allison Smith,
8 kHz, CC BY-SA 3.0), and animals and things in two games for children (ktuberling, tuxpaint; GPL). The first
also says sums, spliced from her words. That is little, and single words are harder than sentences: it tells
whether units that were learned from synthetic voices mean anything in real ones. The result is a corpus of
voices (evaluation/voices.py).
"""

import sys
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run as a script: let it find `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import Parser, command_line
from data import audio
from data.corpus import write_manifest
from data.tiny.prepare import trim
from data.tiny.world import DAYS, MONTHS, NUMBERS
from files import write_json

ALLISON = "asterisk/sounds/en_US_f_Allison"
GAME = "ktuberling/sounds/en"
ANIMALS = "tuxpaint/stamps/animals"
THINGS = {"ball": "ball", "egypt_camel": "camel", "egypt_grass": "grass", "flower": "flower", "hat": "hat"}
THINGS |= {"moon_hotel": "hotel", "pizzeria_tomato": "tomato", "tv_tree": "tree"}
KINDS = "insects/bee amphibians/frog mammals/camel/camel mammals/bears/bear mammals/equines/horse mammals/pig"
KINDS += " mammals/cats/lion mammals/bovines/cow mammals/dogs/dog birds/duck birds/turkey"
WORDS = {  # speaker -> {word: file below /usr/share}
    "Allison": {
        **{word: f"{ALLISON}/digits/{n}.wav" for n, word in enumerate(NUMBERS)},
        **{day: f"{ALLISON}/digits/day-{n % 7}.wav" for n, day in enumerate(DAYS, 1)},
        **{month: f"{ALLISON}/digits/mon-{n}.wav" for n, month in enumerate(MONTHS)},
        **{word: f"{ALLISON}/digits/{word}.wav" for word in ("minus", "today")},
        **{"first": f"{ALLISON}/digits/h-1.wav", "plus": f"{ALLISON}/letters/plus.wav"},
        **{"is": f"{ALLISON}/is.wav", "hello": f"{ALLISON}/hello.wav"},
        **{"goodbye": f"{ALLISON}/vm-goodbye.wav"},
    },
    "ktuberling": {word: f"{GAME}/{name}.ogg" for name, word in THINGS.items()},
    "tuxpaint": {path.split("/")[-1]: f"{ANIMALS}/{path}_desc.ogg" for path in KINDS.split()},
}
GAP = 0.04  # seconds of silence before and after a spliced word


def sums() -> list[str]:
    """A third of those up to twenty, both ways: "three plus four is seven"."""
    pairs = [(a, b) for a in range(1, 11) for b in range(1, 11) if (a + 2 * b) % 3 == 0]
    plus = [f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}" for a, b in pairs]
    return plus + [f"{NUMBERS[a + b]} minus {NUMBERS[b]} is {NUMBERS[a]}" for a, b in pairs]


def prepare(out: Path, share: Path = Path("/usr/share")) -> None:
    """Makes the corpus in the folder `out` of what is there below `share`. ValueError if nothing is."""
    rows, missing, said = [], {}, {}

    def add(speaker: str, text: str, wav: np.ndarray):
        name = f"{speaker}-{text.replace(' ', '-')}".lower()
        audio.save(out / f"{name}.wav", wav)
        rows.append({"wav": f"{name}.wav", "text": text, "speaker": speaker, "split": "rendition"})

    for speaker, files in WORDS.items():
        for word, file in files.items():
            try:
                said[speaker, word] = audio.load(share / file)
            except (OSError, ValueError) as problem:
                missing[f"{speaker}: {word}"] = str(problem)
            else:
                add(speaker, word, trim(said[speaker, word], 0.1, 0.1))
    for text in sums():
        words = [said.get(("Allison", word)) for word in text.split()]
        if all(word is not None for word in words):
            parts = [trim(word, GAP, GAP) for word in words]
            add("Allison, spliced", text, np.pad(np.concatenate(parts), audio.RATE // 20))
    if not rows:
        raise ValueError(
            f"{share} has no such recordings; install the packages that data/tiny/people.py names"
        )
    speakers = sorted({row["speaker"] for row in rows})
    write_json(out / "voices.json", {"unseen": speakers, "missing": missing})
    write_manifest(out, rows)  # last: a folder with a manifest is complete
    for speaker in speakers:
        print(f"{speaker:20} {sum(row['speaker'] == speaker for row in rows):4} recordings")
    if missing:
        print(f"without {len(missing)} words; the first is {next(iter(missing.values()))}")


def main() -> None:
    parser = Parser("Real people saying words of the tiny world, to evaluate with.")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--share", type=Path, default="/usr/share", help="where the packages' files are")
    prepare(**vars(parser.parse_args()))


if __name__ == "__main__":
    command_line(main)

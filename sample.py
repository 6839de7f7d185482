"""Talking with a model: speech or text in, speech or text out (SpeechGPT §3.2, §5.1, Appendices C and E).

    speech --HuBERT--> units --template--> ids --LLaMA--> ids --parse--> text and units --vocoder--> speech

    python sample.py question.wav                        chain of modality: transcript, answer, spoken answer
    python sample.py "What is two plus three?"           a prompt that is no file is text
    python sample.py a.wav b.wav --to text               several prompts are answered in batches
    python sample.py a.wav --task asr                    or tts, continue; --standard skips the intermediate text
    python sample.py a.wav --takes 1                     speak once; a small model listens to itself and tries again
    python sample.py                                     a conversation in the terminal

From Python:  reply = SpeechGPT.from_pretrained("weights/tiny").reply("question.wav"); reply.text, reply.wav

The engine is three small functions: `prefill` reads the prompts, `decode_one_token` feeds the last token back through
the static key-value cache, `sample_token` draws the next one. Between the last two stands the `Grammar`: a token says
by itself whether it is inside speech (<sosp> or a unit) or outside, so what may follow it is two rows of a table:

    ... [ta] five ; [ua] <sosp> <7> <12> <7> <eosp> <eoa>
        ^ text pieces, <sosp>, end  ^ units other than the last one, or <eosp>

References: the paper's decoding (§5.1); Holtzman et al. 2020, arXiv:1904.09751 (top-p); pytorch-labs/gpt-fast (form).
"""

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import lora
import run
import tokenizer
from config import command_line
from data import audio
from files import write_json
from generate import GREEDY, OFFICIAL, PAPER, SMALL, Sampling, generate, one_thread, weight_bytes
from hubert import UnitExtractor
from llama import Llama
from tokenizer import Tokenizer
from vocoder import UnitVocoder

# ---- A model that talks --------------------------------------------------------------------------------------

SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
TASKS = ("chat", "asr", "tts", "continue")
MODES = ("s2s", "s2t", "t2s", "t2t", "*2s", "*2t")  # speech or text in, out; "*": whatever the prompt is
TAKES = 8  # of a small model, at most
UNDERSTOOD = math.log(0.5)  # log probability of its text from which on a take is good
MIN_ANSWER = 64  # tokens of the context that a prompt must leave for the answer

Prompt = str | Path | np.ndarray  # a text or the name of a sound file; samples (N,) at 16 kHz


@dataclass
class Reply:
    """What the model said. wav (N,) float32 at 16 kHz is None where it did not speak; `note` then says so."""

    transcript: str  # the question as the model heard it
    text: str  # its answer
    units: list[int]  # the spoken answer
    wav: np.ndarray | None
    note: str = ""  # what is missing or cut off; empty if all went well
    stats: dict = field(default_factory=dict)


class Question(NamedTuple):
    ids: list[int]  # the prompt in its template
    target: str  # what is asked for, "s" or "t"
    seconds: float  # of speech in the prompt


def is_sound(prompt: Prompt) -> bool:
    """Samples, a path, or a string that names a file or ends as the name of a sound file does."""
    return not isinstance(prompt, str) or os.path.isfile(prompt) or prompt.lower().endswith(SOUNDS)


@dataclass
class SpeechGPT:
    """The parts of a folder, put together. Without extractor it cannot hear, without vocoder it cannot speak."""

    llama: Llama
    tok: Tokenizer
    extractor: UnitExtractor | None = None
    vocoder: UnitVocoder | None = None

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str = "auto", dtype: str = "auto", int8: bool = False
    ) -> "SpeechGPT":
        """Reads folder/llama and, where they are, folder/{lora,hubert,vocoder}. device "cuda:0,cuda:1" spreads the
        LLaMA over two GPUs. The adapter is merged into its matrices, or stays beside them if those are int8. dtype
        "auto" is float32 on a CPU for files of up to 4 GB, else bfloat16 (float16 on Apple's GPUs); HuBERT and the
        vocoder are always float32."""
        folder, dtype = Path(folder), str(dtype).removeprefix("torch.")
        devices = [run.device(name) for name in str(device).split(",")]
        device = devices[0]
        if not (folder / "llama").is_dir():
            raise FileNotFoundError(
                f"{folder} is no model: there is no {folder}/llama; make one with "
                "`python train.py configs/tiny.toml`, or name another folder"
            )
        if dtype == "auto":
            small = sum(file.stat().st_size for file in (folder / "llama").iterdir()) < 4e9
            dtype = {"cpu": "float32" if small else "bfloat16", "mps": "float16"}.get(device.type, "bfloat16")
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"unknown dtype '{dtype}'; choose auto, float32, float16 or bfloat16")
        tok = Tokenizer.from_pretrained(folder / "llama")
        llama = Llama.from_pretrained(folder / "llama", getattr(torch, dtype), devices, int8)
        tok.check_vocab(llama.config.vocab_size, f"{folder}/llama")
        if (folder / "lora").is_dir():
            lora.load(llama, folder / "lora")
            llama = llama.eval() if int8 else lora.merge(llama)
        model = cls(llama, tok)
        if (folder / "hubert").is_dir():
            model.extractor = UnitExtractor.from_pretrained(folder / "hubert").to(device).eval()
            if (k := len(model.extractor.kmeans.centers)) != tok.n_units:
                raise ValueError(
                    f"{folder}: hubert has {k} units but llama {tok.n_units}; they are of two models"
                )
        if (folder / "vocoder").is_dir():
            model.vocoder = UnitVocoder.from_pretrained(folder / "vocoder").to(device).eval()
        return model

    @property
    def n_speakers(self) -> int:
        voices = getattr(self.vocoder, "spkr", None)
        return voices.num_embeddings if isinstance(voices, nn.Embedding) else 1

    # -- what each step gives

    def hear(self, prompt: Prompt) -> tuple[list[int], float]:
        """A sound file or samples -> its units and its seconds."""
        if self.extractor is None:
            raise ValueError("this model has no hubert/ in its folder and cannot hear; ask it in text")
        name = str(prompt) if isinstance(prompt, str | Path) else "the recording"
        wav = audio.load(prompt) if isinstance(prompt, str | Path) else np.asarray(prompt, np.float32)
        audio.check_speech(wav, name)
        seconds, context = len(wav) / audio.RATE, self.llama.config.max_len
        if 5 * seconds > context:  # speech has 15 to 40 units a second: no need to encode half an hour of it
            raise ValueError(
                f"{name} lasts {seconds:.0f} s; about {context / 25:.0f} s of speech fit in the model's "
                f"context of {context} tokens: cut it into shorter pieces"
            )
        return self.extractor(wav)[0], seconds

    def units(self, wav: Prompt) -> list[int]:
        return self.hear(wav)[0]

    def ids(self, prompt: Prompt, **form) -> list[int]:
        return self.question(prompt, **form).ids

    @torch.no_grad()
    def embeddings(self, ids: list[int]) -> Tensor:
        """ids (T,) -> what the model makes of each, (T, C), after its last layer and norm."""
        return self.llama.hidden(torch.tensor([ids], device=self.llama.lm_head.weight.device))[0].float()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """ids (T,) -> logits (T, V) of the token after each."""
        return self.llama(torch.tensor([ids], device=self.llama.lm_head.weight.device))[0].float()

    def style(self, style: str = "auto") -> str:
        if style != "auto":
            return style
        return "released" if self.tok.sp.piece_to_id("▁[tq]") == self.tok.unk else "paper"

    def question(
        self, prompt: Prompt, mode: str = "*2s", task: str = "chat", chain: bool = True, style: str = "auto"
    ) -> Question:
        """Puts the prompt in its template (tokenizer.py). style "paper" is Appendix C, "released" the form of the
        released weights; "auto" is "paper" for a tokenizer with a piece "[tq]", as Tokenizer.train makes it."""
        assert task in TASKS and mode in MODES, f"task {task!r} of {TASKS}, mode {mode!r} of {MODES}"
        style = self.style(style)
        source, target = {"asr": "s2t", "tts": "t2s"}.get(task, mode).split("2")
        if source == "*":
            source = "s" if is_sound(prompt) else "t"
        if task == "continue":
            target = source
        if source == "t" and (not isinstance(prompt, str) or task == "tts" and is_sound(prompt)):
            raise ValueError(
                "a text is needed here, not " + (prompt if isinstance(prompt, str) else "a recording")
            )
        if target == "s" and self.vocoder is None:
            raise ValueError("this model has no vocoder/ in its folder and cannot speak; ask for text")
        units, seconds = self.hear(prompt) if source == "s" else ([], 0.0)
        said = tokenizer.units_to_text(units) if source == "s" else prompt.strip()
        if not said:
            raise ValueError("the prompt is empty: write a question or name a sound file")
        if task == "continue":
            ids = self.tok.encode(said.removesuffix("<eosp>"))
        else:
            form = partial(tokenizer.chain_of_modality, style=style) if chain else tokenizer.standard
            if task == "chat" and source == "s":
                text, _ = form(f"s2{target}", speech_i=said)
            elif task == "chat":
                text, _ = form(f"t2{target}", text_i=said)
            else:
                instructions = tokenizer.ASR_INSTRUCTIONS if task == "asr" else tokenizer.TTS_INSTRUCTIONS
                text, _ = tokenizer.cross_modal(instructions[0], said, style=style)
            ids = self.tok.prompt(text, official=style == "released")
        room = self.llama.config.max_len - MIN_ANSWER - len(ids)
        if room < 0:
            fit = seconds * max(0, 1 + room / max(1, len(units)))
            advice = f"about {fit:.1f} of its {seconds:.1f} s do" if units else "shorten it"
            raise ValueError(
                f"the prompt is too long: its {len(ids)} tokens and an answer do not fit in the model's "
                f"context of {self.llama.config.max_len}; {advice}"
            )
        return Question(ids, target, seconds)

    # -- answers

    def reply(self, prompt: Prompt, mode: str = "*2s", **options) -> Reply:
        """Answers one prompt; options as in `reply_batch`."""
        return self.reply_batch([prompt], mode, **options)[0]

    def transcribe(self, wav: Prompt, **options) -> Reply:
        """Speech -> reply.text."""
        return self.reply_batch([wav], "s2t", "asr", **options)[0]

    def speak(self, text: str, **options) -> Reply:
        """Text -> reply.wav."""
        return self.reply_batch([text], "t2s", "tts", **options)[0]

    def continue_speech(self, wav: Prompt, **options) -> Reply:
        """Speech -> reply.wav: the same units, and on until the model ends it."""
        return self.reply_batch([wav], "s2s", "continue", **options)[0]

    def reply_batch(
        self,
        prompts: list[Prompt],
        mode: str = "*2s",
        task: str = "chat",
        chain: bool = True,
        style: str = "auto",
        text: Sampling = GREEDY,
        speech: Sampling = PAPER,
        max_new: int | None = None,
        seed: int = 0,
        speaker: int | None = None,
        free: bool = False,
        show: bool = False,
        takes: int | None = None,
    ) -> list[Reply]:
        """Answers several prompts at once. task: chat (by chain of modality, or with chain=False by standard
        prompting), asr, tts or continue; seed: of every draw; takes: see `speak_again` (None: TAKES if the model is
        small, else 1); the rest as in `question` and `generate`."""
        written = task == "tts" or task == "chat" and chain  # there is a text to be spoken
        if takes is None:
            takes = self.takes if written else 1
        if takes < 1:
            raise ValueError(f"takes is {takes}; an answer is spoken at least once")
        if takes > 1 and not written:
            raise ValueError(
                "to speak again needs a text to compare with: not asr, continue or standard prompting"
            )
        if speaker is not None and not 0 <= speaker < self.n_speakers:
            raise ValueError(
                f"there is no speaker {speaker}: this vocoder has {self.n_speakers}, counted from 0"
            )
        clock = [time.perf_counter()]
        questions = [self.question(prompt, mode, task, chain, style) for prompt in prompts]
        clock.append(time.perf_counter())
        drawn = []  # tokens of each answer in each round

        def draw(ids: list[list[int]], limit: int | None) -> list[list[int]]:
            new = generate(
                self.llama,
                ids,
                self.tok,
                text,
                speech,
                limit,
                generator,
                free,
                (self.tok.eosp,) if task == "continue" else (),
                show,
            )
            drawn.append([len(answer) for answer in new])
            return new

        generator = torch.Generator().manual_seed(seed)
        answers = draw([q.ids for q in questions], max_new)
        if takes > 1 and speech.temperature > 0:
            texts = [
                text.strip() if task == "tts" else self.tok.parse(ids).ta
                for text, ids in zip(prompts, answers)
            ]
            self.speak_again(questions, answers, texts, self.style(style), takes, draw, max_new)
        clock.append(time.perf_counter())
        replies = [self.compose(question, ids, task, speaker) for question, ids in zip(questions, answers)]
        clock.append(time.perf_counter())

        hear, think, speak = (after - before for before, after in zip(clock, clock[1:]))
        spoken = sum(len(r.wav) / audio.RATE for r in replies if r.wav is not None) or sum(
            q.seconds for q in questions
        )
        for question, ids, reply in zip(questions, answers, replies):
            reply.stats = {
                "prompt_tokens": len(question.ids),
                "new_tokens": len(ids),
                "batch": len(prompts),
                "hear_seconds": hear,
                "think_seconds": think,
                "speak_seconds": speak,
                "tokens_per_second": sum(map(sum, drawn)) / think,
                "takes": len(drawn),
                "gigabytes_per_second": sum(map(max, drawn)) * weight_bytes(self.llama) / think / 1e9,
                # waiting time for each second of speech: of what was said, or else of what was heard
                "real_time_factor": (hear + think + speak) / spoken if spoken else None,
            }
        return replies

    @property
    def takes(self) -> int:
        """How often an answer is spoken at most, where nobody says it."""
        return TAKES if weight_bytes(self.llama) < SMALL else 1

    def speak_again(
        self,
        questions: list[Question],
        answers: list[list[int]],
        texts: list[str],
        style: str,
        takes: int,
        draw: Callable,
        max_new: int | None,
    ) -> None:
        """Puts better takes into `answers`: what is spoken so that the model itself would hardly recognise its text is
        spoken again, and of up to `takes` the best understood stays. Ours: a small model writes one thing and says
        another, and hears the difference (LOG.md)."""
        speaking = [
            i for i, q in enumerate(questions) if q.target == "s" and texts[i] and self.tok.sosp in answers[i]
        ]
        scores = {i: self.understood(answers[i], texts[i], style) for i in speaking}
        for _ in range(takes - 1):
            again = [i for i in speaking if scores[i] < UNDERSTOOD]
            if not again:
                break
            heads = [
                answers[i][: answers[i].index(self.tok.sosp) + 1] for i in again
            ]  # what was written stays
            limit = max_new and max(1, max_new - max(map(len, heads)))
            tails = draw([questions[i].ids + head for i, head in zip(again, heads)], limit)
            for i, head, tail in zip(again, heads, tails):
                score = self.understood(head + tail, texts[i], style)
                if score > scores[i]:
                    answers[i], scores[i] = head + tail, score

    def understood(self, answer: list[int], text: str, style: str = "paper") -> float:
        """log P(text | the units in `answer`) by this model as a recogniser (§3.1): 0 if it is sure to hear that."""
        units = self.tok.parse(answer).ua
        if not units:
            return -math.inf
        recognise = tokenizer.cross_modal(
            tokenizer.ASR_INSTRUCTIONS[0], tokenizer.units_to_text(units), text, style
        )
        ids, mask = (torch.tensor(x) for x in self.tok.document(*recognise))
        if len(ids) > self.llama.config.max_len:
            return 0.0  # too long to listen to
        chances = self.logits(ids[:-1].tolist()).log_softmax(-1).cpu()
        return chances.gather(1, ids[1:, None])[mask[1:]].sum().item()

    def compose(self, question: Question, ids: list[int], task: str, speaker: int | None) -> Reply:
        """The generated ids as a reply, with its speech synthesised and a note of whatever is missing."""
        parts = self.tok.parse(question.ids[1:] + ids if task == "continue" else ids)
        wav, notes = None, []
        if not parts.complete and not (task == "continue" and ids[-1] == self.tok.eosp):
            notes.append("the answer was cut off: it came to the limit on its length before its end")
        if question.target == "s" and parts.ua:
            wav = self.vocoder(parts.ua, speaker=speaker).float().cpu().numpy()
        elif question.target == "s":
            notes.append(
                "the model answered in text only, it did not speak" if parts.ta else "the model said nothing"
            )
        elif not parts.ta:
            notes.append("the model gave no text" + (", only speech" if parts.ua else ""))
        return Reply(parts.ta if task == "asr" else parts.tq, parts.ta, parts.ua, wav, "; ".join(notes))


# ---- The command line ----------------------------------------------------------------------------------------

HELP = (
    "Type a question, or the path of a sound file (wav, flac, ogg). /help shows this, /quit or Ctrl-D leaves."
)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message}; see python sample.py --help")


def arguments() -> argparse.Namespace:
    p = Parser(
        description="Talk with a SpeechGPT: speech or text in, speech or text out.", allow_abbrev=False
    )
    p.add_argument("prompts", nargs="*", metavar="PROMPT", help="sound files or texts; none: a conversation")
    p.add_argument("--model", default="weights/tiny", help="folder with llama/, lora/, hubert/, vocoder/")
    p.add_argument(
        "--in", dest="source", choices=("auto", "speech", "text"), default="auto", help="what prompts are"
    )
    p.add_argument("--to", choices=("speech", "text"), default="speech", help="what answers are")
    p.add_argument("--task", choices=TASKS, default="chat")
    p.add_argument(
        "--standard", action="store_true", help="answer at once, without chain of modality (Appendix E)"
    )
    p.add_argument(
        "--style", choices=("auto", "paper", "released"), default="auto", help="form of the templates"
    )
    p.add_argument(
        "--preset", choices=("paper", "official"), help="sample text and speech: 0.8/60/0.8 or 0.7/50/0.8"
    )
    p.add_argument("--greedy", action="store_true", help="always take the likeliest token, in speech too")
    p.add_argument(
        "--temperature", type=float, help="this and the next two change what is sampled (default: speech)"
    )
    p.add_argument("--top-k", type=int, help="0: no limit")
    p.add_argument("--top-p", type=float)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max-new", type=int, help="tokens in an answer (default: what the context holds)")
    p.add_argument(
        "--takes",
        type=int,
        help=f"speak again, up to so many times in all, until it understands itself "
        f"(default: {TAKES} for a small model, else 1)",
    )
    p.add_argument("--speaker", type=int, help="number of the voice, for a vocoder with several")
    p.add_argument("--batch", type=int, default=8, help="prompts answered at the same time")
    p.add_argument("--device", default="auto", help="cpu, cuda, mps, or several: cuda:0,cuda:1")
    p.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16")
    p.add_argument(
        "--int8", action="store_true", help="keep the matrices of the language model in eight bits"
    )
    p.add_argument(
        "--out", type=Path, default="out/replies", help="folder for replies, or a .wav for the only one"
    )
    return p.parse_args()


def sampling(a: argparse.Namespace) -> dict[str, Sampling]:
    """The flags as Sampling of text and of speech."""
    changes = {
        key: getattr(a, key) for key in ("temperature", "top_k", "top_p") if getattr(a, key) is not None
    }
    if a.greedy and (changes or a.preset):
        raise ValueError("--greedy samples nothing: leave out --preset, --temperature, --top-k and --top-p")
    if a.preset is None:
        return {"text": GREEDY, "speech": GREEDY if a.greedy else replace(PAPER, **changes)}
    preset = replace({"paper": PAPER, "official": OFFICIAL}[a.preset], **changes)
    return {"text": preset, "speech": preset}


def reply_paths(prompts: list[str], out: Path) -> list[Path]:
    """Where the wav of each reply goes; its json lies beside it."""
    paths: list[Path] = []
    for prompt in prompts:
        name = (
            Path(prompt).stem
            if is_sound(prompt)
            else re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40] or "reply"
        )
        again = sum(path.stem == name for path in paths)  # a name that came before gets a number
        paths.append(
            out if out.suffix == ".wav" else out / f"{name}{f'-{len(paths) + 1}' if again else ''}.wav"
        )
        if paths[-1].resolve() == Path(prompt).resolve():
            raise ValueError(f"the reply would overwrite the question {prompt}: choose another --out")
    return paths


def answer(model: SpeechGPT, prompts: list[str], paths: list[Path], **options) -> None:
    """Answers a batch, writes it to disk and prints it."""
    with one_thread(model.llama):
        replies = model.reply_batch(prompts, show=sys.stderr.isatty(), **options)
    for prompt, path, reply in zip(prompts, paths, replies):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = {"heard": reply.transcript, "answer": reply.text, "note": reply.note, "spoken": ""}
        if reply.wav is not None:
            audio.save(path, reply.wav)
            lines["spoken"] = f"{path} ({len(reply.wav) / audio.RATE:.1f} s)"
        wav = path.name if reply.wav is not None else None
        write_json(path.with_suffix(".json"), {"prompt": prompt, **asdict(reply), "wav": wav})
        print(f"\n{prompt}", *(f"  {title:7} {line}" for title, line in lines.items() if line), sep="\n")
    s, weight = replies[0].stats, model.llama.lm_head.weight
    factor = f"real-time factor {s['real_time_factor']:.2f}, " if s["real_time_factor"] else ""
    factor += f"spoken {s['takes']} times, " if s["takes"] > 1 else ""
    print(
        f"  [{s['hear_seconds']:.2f} s to hear, {s['think_seconds']:.2f} s to think, {s['speak_seconds']:.2f} s to "
        f"speak: {factor}{s['tokens_per_second']:.0f} tokens/s, {s['gigabytes_per_second']:.1f} GB/s of weights, on "
        f"{weight.device} in {str(weight.dtype).removeprefix('torch.')}]",
        flush=True,
    )


def converse(model: SpeechGPT, out: Path, seed: int, **options) -> None:
    """Reads prompts from the terminal, or from a pipe, until there are no more. A mistake does not end it."""
    print(HELP, flush=True)
    sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/") and not is_sound(line):
                print(HELP, flush=True)
            elif line:
                answer(model, [line], reply_paths([line], out), seed=seed, **options)
                seed += 1  # the same question again may sound different
        except (EOFError, KeyboardInterrupt):
            return print()
        except (ValueError, OSError) as mistake:
            print(f"error: {mistake}", flush=True)


def main() -> None:
    a = arguments()
    if a.out.suffix == ".wav" and len(a.prompts) != 1:
        raise ValueError(
            f"--out {a.out} names one file, but there are {len(a.prompts)} prompts: name a folder"
        )
    if a.batch < 1 or (a.max_new is not None and a.max_new < 1):
        raise ValueError("--batch and --max-new must be at least 1")
    options = {
        "mode": {"auto": "*", "speech": "s", "text": "t"}[a.source] + "2" + a.to[0],
        "task": a.task,
        "chain": not a.standard,
        "style": a.style,
        "max_new": a.max_new,
        "speaker": a.speaker,
        "takes": a.takes,
        **sampling(a),
    }
    paths, start = reply_paths(a.prompts, a.out), time.perf_counter()
    model = SpeechGPT.from_pretrained(a.model, a.device, a.dtype, a.int8)
    print(f"{a.model} loaded in {time.perf_counter() - start:.1f} s", flush=True)
    if not a.prompts:
        return converse(model, a.out, a.seed, **options)
    for i in range(0, len(a.prompts), a.batch):
        answer(model, a.prompts[i : i + a.batch], paths[i : i + a.batch], seed=a.seed + i, **options)


if __name__ == "__main__":
    command_line(main)

"""Talking with a model: speech or text in, speech or text out (SpeechGPT §3.2, §5.1, Appendices C and E).

    speech --HuBERT--> units --template--> ids --LLaMA--> ids --parse--> text and units --vocoder--> speech

    python sample.py question.wav                        chain of modality: transcript, answer, spoken answer
    python sample.py "What is two plus three?"           a prompt that is no file is text
    python sample.py a.wav b.wav --to text               several prompts are answered in batches
    python sample.py a.wav --task asr                    or tts, continue; --standard: no chain of modality
    python sample.py a.wav --takes 1                     speech is drawn once: no rejection sampling
    python sample.py                                     a conversation in the terminal

From Python:  reply = SpeechGPT.from_pretrained("weights/tiny").reply("question.wav"); reply.text, reply.wav

The templates of prompts are in tokenizer.py, the loop that generates ids in generate.py, what may be asked in
request.py. Here the parts become one model (`SpeechGPT`), which answers a `Request`. Ours: a small model
draws its speech up to eight times (`SpeechGPT.redraw`).

References: SpeechGPT, https://arxiv.org/abs/2305.11000; official code, https://github.com/0nutation/SpeechGPT
"""

from starting import starting

if __name__ == "__main__":
    starting()

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lora
import run
import tokenizer
from config import Parser, command_line, folder
from data import audio
from files import harmless, write_json
from generate import (
    GREEDY,
    OFFICIAL,
    PAPER,
    TAKES,
    Decoding,
    Sampling,
    asr_log_prob,
    generate,
    is_small,
    one_thread,
    redraw_speech,
    weight_bytes,
)
from hubert import UnitExtractor
from llama import Llama
from request import (
    STYLES,
    TASKS,
    Prompt,
    RenderedPrompt,
    Reply,
    Request,
    is_missing,
    is_sound,
    is_wav,
    modalities,
    no_file,
    reply_paths,
)
from tokenizer import Tokenizer
from vocoder import UnitVocoder

MIN_ANSWER = 64  # tokens of the context that a prompt must leave for the answer


# ---- A model that talks ------------------------------------------------------------------------------------


@dataclass
class SpeechGPT:
    """All parts of a model folder. Without extractor it takes no speech, without vocoder it gives none."""

    llama: Llama
    tok: Tokenizer
    extractor: UnitExtractor | None = None
    vocoder: UnitVocoder | None = None

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str = "auto", dtype: str = "auto", int8: bool = False
    ) -> "SpeechGPT":
        """Reads folder/llama and, where they exist, folder/{lora,hubert,vocoder}.

        device "cuda:0,cuda:1" spreads the LLaMA over two GPUs. The adapter is merged into the LLaMA, or kept
        separate if int8 asks for matrices of eight bits. dtype "auto" is float32 on a CPU for files of up to
        4 GB, else bfloat16 (float16 on Apple's GPUs); HuBERT and the vocoder are always float32.
        """
        folder = Path(folder)
        devices = [run.device(name) for name in str(device).split(",")]
        if not (folder / "llama").is_dir():
            raise FileNotFoundError(
                f"{folder} is no model: there is no {folder}/llama; make one with "
                "`python train.py configs/tiny.toml`, or name another folder"
            )
        dtype = choose_dtype(dtype, folder / "llama", devices[0])
        tok = Tokenizer.from_pretrained(folder / "llama")
        llama = Llama.from_pretrained(folder / "llama", dtype, devices, int8)
        tok.check_vocab(llama.config.vocab_size, f"{folder}/llama")
        if (folder / "lora").is_dir():
            lora.load(llama, folder / "lora")
            llama = llama.eval() if int8 else lora.merge(llama)
        model = cls(llama, tok)

        if (folder / "hubert").is_dir():
            model.extractor = UnitExtractor.from_pretrained(folder / "hubert").to(devices[0]).eval()
            n_units = len(model.extractor.kmeans.centers)
            if n_units != tok.n_units:
                raise ValueError(
                    f"{folder}: hubert has {n_units} units but llama {tok.n_units}; they are of two models"
                )
        if (folder / "vocoder").is_dir():
            model.vocoder = UnitVocoder.from_pretrained(folder / "vocoder").to(devices[0]).eval()
        return model

    @property
    def n_speakers(self) -> int:
        embedding = getattr(self.vocoder, "spkr", None)
        return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else 1

    @property
    def takes(self) -> int:
        """Default maximum number of takes (`redraw`)."""
        return TAKES if is_small(self.llama) else 1

    # -- single steps

    def to_units(self, prompt: Prompt) -> tuple[list[int], float]:
        """A sound file or samples -> its deduplicated units, its seconds."""
        if self.extractor is None:
            raise ValueError("this model has no hubert/ in its folder and cannot hear; ask it in text")
        if is_missing(prompt):
            raise no_file(prompt)
        if isinstance(prompt, str | Path):
            name = str(prompt)
            wav = audio.load(prompt)
        else:
            name = "the recording"
            wav = np.asarray(prompt, np.float32)
        audio.check_speech(wav, name)
        seconds = len(wav) / audio.RATE
        context = self.llama.config.max_len
        if 5 * seconds > context:  # speech has 15 to 40 units a second: no need to encode half an hour of it
            raise ValueError(
                f"{name} lasts {seconds:.0f} s; about {context / 25:.0f} s of speech fit in the model's "
                f"context of {context} tokens: cut it into shorter pieces"
            )
        units, _ = self.extractor(wav)
        return units, seconds

    def units(self, wav: Prompt) -> list[int]:
        return self.to_units(wav)[0]

    def ids(self, prompt: Prompt, **options) -> list[int]:
        """A prompt in its template, as ids; options are the fields of `Request`."""
        return self.render(prompt, Request(**options)).ids

    @torch.no_grad()
    def embeddings(self, ids: list[int]) -> Tensor:
        """ids (T,) -> states (T, C) after the last layer and its norm."""
        return self.llama.hidden(torch.tensor([ids], device=self.llama.device))[0].float()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """ids (T,) -> logits (T, V) of the token after each."""
        return self.llama(torch.tensor([ids], device=self.llama.device))[0].float()

    # -- a prompt in its template

    def style(self, style: str = "auto") -> str:
        """Resolves "auto": what training has noted; else "paper" for a tokenizer with a piece "[tq]"."""
        if style != "auto":
            return style
        if self.tok.trained_style is not None:
            return self.tok.trained_style
        return "released" if self.tok.sp.piece_to_id("▁[tq]") == self.tok.unk else "paper"

    def render(self, prompt: Prompt, request: Request) -> RenderedPrompt:
        """Puts a prompt in its template. ValueError if it does not suit the request, or is too long."""
        source, target = modalities(prompt, request)
        claimed = request.mode[0] == "t"  # whatever its shape is
        if source == "t" and not (isinstance(prompt, str) and (claimed or not is_sound(prompt))):
            found = prompt if isinstance(prompt, str) else "a recording"
            raise ValueError(f"a text is needed here, not {found}")
        if target == "s" and self.vocoder is None:
            raise ValueError("this model has no vocoder/ in its folder and cannot speak; ask for text")

        if source == "s":
            units, seconds = self.to_units(prompt)
            content = tokenizer.units_to_text(units)
        else:
            units, seconds = [], 0.0
            content = prompt.strip().encode(errors="replace").decode()  # a terminal may give half characters
        if not content:
            raise ValueError("the prompt is empty: write a question or name a sound file")
        if len(content) > 100 * self.llama.config.max_len:
            raise ValueError(f"the prompt is too long: {len(content):,} characters; shorten it")
        ids = self.fill_template(content, source, target, request)

        room = self.llama.config.max_len - MIN_ANSWER - len(ids)
        if room < 0:
            fit = seconds * max(0, 1 + room / max(1, len(units)))
            advice = f"about {fit:.1f} of its {seconds:.1f} s do" if units else "shorten it"
            raise ValueError(
                f"the prompt is too long: its {len(ids)} tokens and an answer do not fit in the model's "
                f"context of {self.llama.config.max_len}; {advice}"
            )
        return RenderedPrompt(ids, target, seconds, content if source == "t" else "")

    def fill_template(self, content: str, source: str, target: str, request: Request) -> list[int]:
        """The prompt's text, or its units as "<sosp><1>...<eosp>" -> ids to start generation from."""
        style = self.style(request.style)
        if request.task == "continue":
            return self.tok.encode(content.removesuffix("<eosp>"))
        if request.task == "asr":
            text, _ = tokenizer.cross_modal(tokenizer.ASR_INSTRUCTIONS[0], content, style=style)
        elif request.task == "tts":
            text, _ = tokenizer.cross_modal(tokenizer.TTS_INSTRUCTIONS[0], content, style=style)
        else:
            mode = f"{source}2{target}"
            slot = {"speech_i" if source == "s" else "text_i": content}
            if request.chain:
                text, _ = tokenizer.chain_of_modality(mode, **slot, style=style)
            else:
                text, _ = tokenizer.standard(mode, **slot)
        return self.tok.prompt(text, official=style == "released")

    # -- answers

    def reply(self, prompt: Prompt, mode: str = "*2s", **options) -> Reply:
        """Answers one prompt; options are the fields of `Request`, here and below."""
        return self.reply_batch([prompt], mode, **options)[0]

    def transcribe(self, wav: Prompt, **options) -> Reply:
        """Speech -> reply.text."""
        return self.reply_batch([wav], "s2t", "asr", **options)[0]

    def speak(self, text: str, **options) -> Reply:
        """Text -> reply.wav."""
        return self.reply_batch([text], "*2s", "tts", **options)[0]

    def continue_speech(self, wav: Prompt, **options) -> Reply:
        """Speech -> reply.wav: the same units and the model's continuation."""
        return self.reply_batch([wav], "s2s", "continue", **options)[0]

    def reply_batch(
        self, prompts: list[Prompt], mode: str = "*2s", task: str = "chat", **options
    ) -> list[Reply]:
        """Answers several prompts at once."""
        return self.answer(prompts, Request(mode, task, **options))

    def answer_each(self, prompts: list[Prompt], request: Request) -> list[Reply | Exception]:
        """As `answer`, with the mistake of a prompt that cannot be answered in the place of its reply."""
        try:
            return self.answer(prompts, request)
        except (ValueError, OSError):
            mistakes = {}
            for i, prompt in enumerate(prompts):
                try:
                    self.render(prompt, request)
                except (ValueError, OSError) as mistake:
                    mistakes[i] = mistake
            if not mistakes:
                raise  # it is not a prompt's
        usable = [prompt for i, prompt in enumerate(prompts) if i not in mistakes]
        replies = iter(self.answer(usable, request) if usable else [])
        return [mistakes[i] if i in mistakes else next(replies) for i in range(len(prompts))]

    def answer(self, prompts: list[Prompt], request: Request) -> list[Reply]:
        """Answers several prompts at once, and measures how long each step takes."""
        if request.speaker is not None and not 0 <= request.speaker < self.n_speakers:
            raise ValueError(f"there is no speaker {request.speaker}: choose 0 to {self.n_speakers - 1}")
        began = time.perf_counter()
        rendered = [self.render(prompt, request) for prompt in prompts]
        encoded = time.perf_counter()

        stop = (self.tok.eosp,) if request.task == "continue" else ()
        decoding = Decoding(request.text, request.speech, stop=stop, free=request.free)
        generator = torch.Generator().manual_seed(request.seed)
        rounds = []  # all that was generated: the first answers, then those drawn again

        def draw(ids: list[list[int]], max_new: int | None) -> list[list[int]]:
            settings = replace(decoding, max_new=max_new)
            rounds.append(generate(self.llama, ids, self.tok, settings, generator, request.show))
            return rounds[-1]

        answers = draw([prompt.ids for prompt in rendered], request.max_new)
        takes = request.takes or (self.takes if request.speaks_text else 1)
        if takes > 1 and request.speech.temperature > 0:  # greedy speech would be the same again
            answers = self.redraw(rendered, answers, takes, request, draw)
        generated = time.perf_counter()
        replies = [self.to_reply(prompt, ids, request) for prompt, ids in zip(rendered, answers)]
        synthesized = time.perf_counter()

        spoken = sum(len(reply.wav) / audio.RATE for reply in replies if reply.wav is not None)
        spoken = spoken or sum(prompt.seconds for prompt in rendered)  # no answer is spoken: of the prompts
        took = generated - encoded
        tokens = sum(len(ids) for new in rounds for ids in new)
        steps = sum(max(map(len, new)) for new in rounds)
        for prompt, ids, reply in zip(rendered, answers, replies):
            reply.stats = {
                "prompt_tokens": len(prompt.ids),
                "new_tokens": len(ids),
                "batch": len(prompts),
                "encode_seconds": encoded - began,
                "generate_seconds": took,
                "synthesize_seconds": synthesized - generated,
                "tokens_per_second": tokens / took,
                "takes": len(rounds),
                "gigabytes_per_second": steps * weight_bytes(self.llama) / took / 1e9,
                "real_time_factor": (synthesized - began) / spoken if spoken else None,
            }
        return replies

    def redraw(
        self,
        prompts: list[RenderedPrompt],
        answers: list[list[int]],
        takes: int,
        request: Request,
        draw: Callable[[list[list[int]], int | None], list[list[int]]],
    ) -> list[list[int]]:
        """The answers with the best of up to `takes` takes of their speech (`generate.redraw_speech`), where
        they have a text to compare it with. draw(prompts, max_new) generates."""
        texts = {}  # by index of the answer
        for i, (prompt, answer) in enumerate(zip(prompts, answers)):
            text = prompt.text if request.task == "tts" else self.tok.parse(answer).ta
            room = self.llama.config.max_len - len(prompt.ids) - 1  # for a head, and one unit
            if prompt.target == "s" and text and self.tok.sosp in answer[:room]:
                texts[i] = text

        def draw_tails(heads: dict[int, list[int]]) -> list[list[int]]:
            max_new = request.max_new and max(1, request.max_new - max(map(len, heads.values())))
            return draw([prompts[i].ids + head for i, head in heads.items()], max_new)

        def score(answer: list[int], text: str) -> float:
            return asr_log_prob(self, answer, text, self.style(request.style))

        return redraw_speech(answers, texts, self.tok.sosp, takes, score, draw_tails)

    def to_reply(self, prompt: RenderedPrompt, ids: list[int], request: Request) -> Reply:
        """The generated ids as a reply: its speech synthesized, and a note of whatever is missing."""
        continued = request.task == "continue"
        parts = self.tok.parse(prompt.ids[1:] + ids if continued else ids)
        notes = []
        if not parts.complete and not (continued and ids[-1] == self.tok.eosp):
            notes.append("the answer was cut off: it came to the limit on its length before its end")

        wav = None
        if prompt.target == "s" and parts.ua:
            wav = self.vocoder(parts.ua, speaker=request.speaker).float().cpu().numpy()
        elif prompt.target == "s" and parts.ta:
            notes.append("the model answered in text only, it did not speak")
        elif prompt.target == "s":
            notes.append("the model said nothing")
        elif not parts.ta:
            notes.append("the model gave no text" + (", only speech" if parts.ua else ""))
        transcript = parts.ta if request.task == "asr" else parts.tq
        return Reply(transcript, parts.ta, parts.ua, wav, "; ".join(notes))


def choose_dtype(dtype: str | torch.dtype, llama: Path, device: torch.device) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        small = sum(file.stat().st_size for file in llama.iterdir()) < 4e9
        name = {"cpu": "float32" if small else "bfloat16", "mps": "float16"}.get(device.type, "bfloat16")
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"unknown dtype '{name}'; choose auto, float32, float16 or bfloat16")
    return getattr(torch, name)


# ---- The command line --------------------------------------------------------------------------------------

HELP = (
    "Type a question, or the path of a sound file (wav, flac, mp3). /help: this text. /quit or Ctrl-D: leave."
)
SOURCES = {"auto": "*", "speech": "s", "text": "t"}
PRESETS = {"paper": PAPER, "official": OFFICIAL}


def default_model() -> str:
    """The folder of the model that comes with this project: here, or beside this file."""
    here = Path("weights/tiny")
    beside = Path(__file__).parent / here
    return str(beside if beside.is_dir() and not here.is_dir() else here)


def arguments() -> argparse.Namespace:
    p = Parser("Talk with a SpeechGPT: speech or text in, speech or text out.")
    add = p.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="sound files or texts; none: a conversation")
    add("--model", type=folder, default=default_model(), help="folder with llama/, lora/, hubert/, vocoder/")
    add("--in", dest="source", choices=SOURCES, default="auto", help="what prompts are")
    add("--to", choices=("speech", "text"), default="speech", help="what answers are")
    add("--task", choices=TASKS, default="chat")
    add("--standard", action="store_true", help="answer without chain of modality (Appendix E)")
    add("--style", choices=STYLES, default="auto", help="form of the templates")
    add("--preset", choices=PRESETS, help="sample text and speech: 0.8/60/0.8 or 0.7/50/0.8")
    add("--greedy", action="store_true", help="always take the likeliest token, in speech too")
    add("--temperature", type=float, help="this and the next two change what is sampled (default: speech)")
    add("--top-k", type=int, help="0: no limit")
    add("--top-p", type=float)
    add("--seed", type=int, default=0)
    add("--max-new", type=int, help="tokens in an answer (default: what the context holds)")
    add("--takes", type=int, help=f"most takes of speech that scores badly (small models: {TAKES}, else 1)")
    add("--speaker", type=int, help="number of the speaker, for a vocoder with several")
    add("--batch", type=int, default=8, help="prompts answered at the same time")
    add("--device", default="auto", help="cpu, cuda, mps, or several: cuda:0,cuda:1")
    add("--dtype", default="auto", help="float32, bfloat16 or float16")
    add("--int8", action="store_true", help="keep the language model's matrices in eight bits")
    add("--out", type=folder, default="out/replies", help="folder for replies, or a .wav for the only one")
    return p.parse_args()


def sampling(a: argparse.Namespace) -> tuple[Sampling, Sampling]:
    """The flags as Sampling of text and of speech."""
    changes = {}
    for key in ("temperature", "top_k", "top_p"):
        if getattr(a, key) is not None:
            changes[key] = getattr(a, key)
    if a.greedy and (changes or a.preset):
        raise ValueError("--greedy samples nothing: leave out --preset, --temperature, --top-k and --top-p")
    if a.greedy:
        return GREEDY, GREEDY
    if a.preset is None:
        return GREEDY, replace(PAPER, **changes)
    preset = replace(PRESETS[a.preset], **changes)
    return preset, preset


def to_request(a: argparse.Namespace) -> Request:
    """The flags as a request."""
    text, speech = sampling(a)
    return Request(
        mode=f"{SOURCES[a.source]}2{a.to[0]}",
        task=a.task,
        chain=not a.standard,
        style=a.style,
        text=text,
        speech=speech,
        max_new=a.max_new,
        seed=a.seed,
        speaker=a.speaker,
        show=sys.stderr.isatty(),
        takes=a.takes,
    )


def write_replies(
    model: SpeechGPT, prompts: list[str], paths: list[Path], request: Request
) -> list[Exception]:
    """Answers a batch, writes it to disk and prints it; returns what was wrong with prompts."""
    with one_thread(model.llama):
        replies = model.answer_each(prompts, request)
    mistakes = []
    for prompt, path, reply in zip(prompts, paths, replies):
        print(f"\n{harmless(prompt)}")
        if isinstance(reply, Exception):
            mistakes.append(reply)
            print(f"  error      {harmless(str(reply))}", flush=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = {"transcript": reply.transcript, "answer": reply.text, "note": reply.note}
        row = {"prompt": prompt, **asdict(reply), "wav": None}
        if reply.wav is not None:
            audio.save(path, reply.wav)
            lines["speech"] = f"{path} ({len(reply.wav) / audio.RATE:.1f} s)"
            row["wav"] = path.name
        else:
            path.unlink(missing_ok=True)  # of an earlier reply
        write_json(path.with_suffix(".json"), row)
        for title, line in lines.items():
            if line:
                print(f"  {title:10} {line}")
    answered = [reply for reply in replies if isinstance(reply, Reply)]
    if answered:
        print(f"  [{speed(answered[0].stats, model.llama.model.embed_tokens.weight)}]", flush=True)
    return mistakes


def speed(stats: dict, weight: Tensor) -> str:
    """The time that a batch took, in one line."""
    times = [f"{stats[f'{step}_seconds']:.2f} s to {step}" for step in ("encode", "generate", "synthesize")]
    facts = []
    if stats["real_time_factor"]:
        facts.append(f"real-time factor {stats['real_time_factor']:.2f}")
    if stats["takes"] > 1:
        facts.append(f"{stats['takes']} takes")
    facts.append(f"{stats['tokens_per_second']:.0f} tokens/s")
    facts.append(f"{stats['gigabytes_per_second']:.1f} GB/s of weights")
    facts.append(f"on {weight.device} in {str(weight.dtype).removeprefix('torch.')}")
    return f"{', '.join(times)}: {', '.join(facts)}"


def converse(model: SpeechGPT, out: Path, request: Request) -> None:
    """Reads prompts from the terminal, or from a pipe, until there are no more. A mistake does not end it."""
    print(HELP, flush=True)
    sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line in ("/quit", "/exit"):
                return
            prompt = os.path.expanduser(line) if is_sound(line) else line  # no shell has done that
            if re.match(r"/\w*(\s|$)", line) and is_missing(prompt):
                print(HELP, flush=True)
            elif line:
                write_replies(model, [prompt], reply_paths([prompt], out), request)
                request = replace(request, seed=request.seed + 1)  # the same question may sound different
        except (EOFError, KeyboardInterrupt):
            return print()
        except (ValueError, OSError) as mistake:
            print(f"error: {harmless(str(mistake))}", flush=True)


def main() -> None:
    a = arguments()
    if is_wav(a.out) and len(a.prompts) != 1:
        raise ValueError(f"--out {a.out} is one file, but there are {len(a.prompts)} prompts: name a folder")
    if a.out.suffix and not is_wav(a.out) and audio.is_file_name(a.out.name) and not a.out.is_dir():
        raise ValueError(f"--out {a.out}: replies are wav files; name one, or a folder")
    if a.batch < 1:
        raise ValueError("--batch must be at least 1")
    if not a.prompts and sys.stdin is None:
        raise ValueError("there is no input to read questions from: give a sound file or a text")
    request = to_request(a)
    paths = reply_paths(a.prompts, a.out)
    missing = [prompt for prompt in a.prompts if is_missing(prompt) and a.source != "text"]
    if missing and len(missing) == len(a.prompts):  # before minutes of loading
        raise not_answered([no_file(prompt) for prompt in missing], len(missing))
    began = time.perf_counter()
    model = SpeechGPT.from_pretrained(a.model, a.device, a.dtype, a.int8)
    print(f"{a.model} loaded in {time.perf_counter() - began:.1f} s", flush=True)
    if not a.prompts:
        return converse(model, a.out, request)
    mistakes = []
    for i in range(0, len(a.prompts), a.batch):
        batch = slice(i, i + a.batch)
        mistakes += write_replies(model, a.prompts[batch], paths[batch], replace(request, seed=a.seed + i))
    if mistakes:
        raise not_answered(mistakes, len(a.prompts))


def not_answered(mistakes: list[Exception], n: int) -> Exception:
    """The end of a run in which some of n prompts were not answered."""
    if n == 1:
        return mistakes[0]
    shown = "; ".join(str(mistake)[:90] for mistake in mistakes[:2])
    more = f"; and {len(mistakes) - 2} more" if len(mistakes) > 2 else ""
    return ValueError(f"{len(mistakes)} of {n} prompts were not answered: {shown}{more}")


if __name__ == "__main__":
    command_line(main)

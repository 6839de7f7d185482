"""Text and speech as one sequence of ids: text pieces, unit tokens, every prompt template, and the loss mask.

An id is a row of the embedding. The paper adds one for each speech unit to those of a text model (§4.2,
eq. 1), and writes dialogues with six more markers (§3.1, §3.2, Appendices B, C and E). All ids:

    0 <unk>   1 <s>   2 </s>   ... pieces of sentencepiece ...     V, n_text of them (LLaMA: 32000)
    <0> <1> ... <K-1>                                              V', unit u is id n_text + u
    <sosp> <eosp> [Human] [SpeechGPT] <eoh> <eoa>                  a released folder may hold <eos> for <eoa>

A dialogue is written as text first, then cut into ids, of which those of the answer are the targets of eq. 4:

    units_to_text([1, 7])                      "<sosp><1><7><eosp>"
    cross_modal("Write it.", speech, "hi")     ("[Human]: Write it. This is input: <sosp><1><7><eosp><eoh>. "
                                                "[SpeechGPT]: ", "hi<eoa>.")
    Tokenizer.document(prompt, answer)         <s> [Human] ▁: ▁Write ... <eoh> ▁. [SpeechGPT] ▁:   mask False
                                               ▁hi <eoa> ▁. </s>                                   mask True

Added tokens are cut out of the text before sentencepiece reads it, as in the slow LlamaTokenizer of
transformers 4.33 (its "legacy" behavior): the released weights were trained on those ids. White space on both
sides of an added token is dropped, and each stretch of text in between gets its own leading "▁".

References: SpeechGPT, arXiv:2305.11000; SentencePiece, arXiv:1808.06226; LLaMA, arXiv:2302.13971;
the released data, https://huggingface.co/datasets/fnlp/SpeechInstruct
"""

import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import sentencepiece

from files import write_atomic
from foreign import Keys, read_table, settings
from starting import signals_held

# ---- Speech as text ----------------------------------------------------------------------------------------


def units_to_text(units: Iterable[int]) -> str:
    """[1, 7] -> "<sosp><1><7><eosp>"."""
    inside = "><".join(map(str, units))
    return f"<sosp><{inside}><eosp>" if inside else "<sosp><eosp>"


def text_to_units(text: str) -> list[int]:
    """Every <number> in `text`, in order; the rest is ignored."""
    return [int(u) for u in re.findall("<([0-9]{1,9})>", text)]


# ---- Templates ---------------------------------------------------------------------------------------------

# What follows "[SpeechGPT]: " is the answer. {SpeechI} {TextI} {TextR} {SpeechR} are the paper's quadruplet:
# instruction and response, as speech and as text; {D} {U} {T} a task description, speech and its text.
PAPER = {  # §3.1 and Appendix C, word for word, slips included (no <eoh> in text-to-text)
    # Without §3.1's full stop after {D}: a description ends with its own, often a question mark. Its <eos> is
    # <eoa> in the appendices; one end marker serves here.
    "cross_modal": "[Human]: {D} This is input: {U}<eoh>. [SpeechGPT]: {T}<eoa>.",
    "plain": "[Human]: {TextI}<eoh>. [SpeechGPT]: {TextR}<eoa>.",  # text dialogues of stage 2 (§4.2)
    "s2s": "[Human]: This is a speech instruction: {SpeechI}. And your response should be speech. You can do "
    "it step by step. You can first transcribe the instruction and get the text Instruction. Then you can "
    "think about the instruction and get the text response. Last, you should speak the response aloud <eoh>. "
    "[SpeechGPT]: [tq] {TextI}; [ta] {TextR}; [ua] {SpeechR}<eoa>.",
    "s2t": "[Human]: This is a speech instruction: {SpeechI}. And your response should be text. You can do "
    "it step by step. You can first transcribe the instruction and get the text instruction. Then you can "
    "think about the instruction and get the text response. <eoh>. "
    "[SpeechGPT]: [tq] {TextI}; [ta] {TextR}<eoa>.",
    "t2s": "[Human]: This is a text instruction: {TextI}. And your response should be speech. You can do it "
    "step by step. You can think about the instruction and get the text response. Then you should speak the "
    "response aloud <eoh>. [SpeechGPT]: [ta] {TextR}; [ua] {SpeechR}<eoa>.",
    "t2t": "[Human]: This is a text instruction: {TextI}. And your response should be text. You can think "
    "about the instruction and get the text response. [SpeechGPT]: [ta] {TextR}<eoa>.",
}
STANDARD = {  # Appendix E: the answer at once, without the steps in text
    "s2s": "[Human]: This is a speech instruction: {SpeechI}. And your response should be speech <eoh>. "
    "[SpeechGPT]: [ua] {SpeechR}<eoa>.",
    "s2t": "[Human]: This is a speech instruction: {SpeechI}. And your response should be text. <eoh>. "
    "[SpeechGPT]: [ta] {TextR}<eoa>.",
    "t2s": "[Human]: This is a text instruction: {TextI}. And your response should be speech <eoh>. "
    "[SpeechGPT]: [ua] {SpeechR}<eoa>.",
    "t2t": "[Human]: This is a text instruction: {TextI}. And your response should be text. "
    "[SpeechGPT]: [ta] {TextR}<eoa>.",
}
META = (
    "You are an AI assistant whose name is SpeechGPT.\n- SpeechGPT is a intrinsic cross-modal conversational "
    "language model that is developed by Fudan University.  SpeechGPT can understand and communicate "
    "fluently with human through speech or text chosen by the user.\n- It can perceive cross-modal inputs "
    "and generate cross-modal outputs.\n"
)
RELEASED = {  # the published data: META first, no [tq], no sentence about steps
    "cross_modal": META + "[Human]: {D} This is input: {U}<eoh> [SpeechGPT]: {T}<eoa> ",
    "plain": META + "[Human]: {TextI}<eoh>. [SpeechGPT]: {TextR}<eoa>.",
    "s2s": META + "[Human]: {SpeechI}<eoh>. [SpeechGPT]: {TextI}; [ta] {TextR}; [ua] {SpeechR}<eoa>.",
    # These three are shown nowhere: by analogy, without [ta] where the published replies have none.
    "s2t": META + "[Human]: {SpeechI}<eoh>. [SpeechGPT]: {TextI}; [ta] {TextR}<eoa>.",
    "t2s": META + "[Human]: {TextI}<eoh>. [SpeechGPT]: [ta] {TextR}; [ua] {SpeechR}<eoa>.",
    "t2t": META + "[Human]: {TextI}<eoh>. [SpeechGPT]: {TextR}<eoa>.",
}
STYLES = {"paper": PAPER, "released": RELEASED, "standard": STANDARD}

ASR_INSTRUCTIONS = (  # the ten of Appendix B, then our own
    "Begin by converting the spoken words into written text.",
    "Can you transcribe the speech into a written format?",
    "Focus on translating the audible content into text.",
    "Transcribe the speech by carefully listening to it.",
    "Would you kindly write down the content of the speech?",
    "Analyze the speech and create a written transcription.",
    "Engage with the speech to produce a text-based version.",
    "Can you document the speech in written form?",
    "Transform the spoken words into text accurately.",
    "How about putting the speech's content into writing?",
    "Listen to the speech and write down its content.",
    "Please put what you hear on paper.",
    "Recognize this speech.",
    "Type out every word of this recording.",
    "Could you take dictation for me?",
    "What does the speaker say?",
    "Spell out in text what is being said here.",
    "Turn this utterance into a sentence I can read.",
    "Which words were spoken?",
    "Give me the words behind these sounds.",
    "Jot down what the voice tells you.",
    "Note the message that you hear.",
)
TTS_INSTRUCTIONS = (  # eight of Appendix B (not "Whisper ..." and "Sing ..."), then our own
    "Can you please read this sentence out loud?",
    "Recite the following words as if you were speaking normally.",
    "Could you please relay the message below verbally?",
    "Would you mind speaking these words as naturally as possible?",
    "Enunciate each word in this sentence with precision.",
    "Project your voice to clearly articulate this statement.",
    "Emphasize the key points while reading the sentence.",
    "How would you express this sentence in a conversational tone?",
    "Read this sentence aloud.",
    "Say the following for me.",
    "Give voice to this line.",
    "Turn these words into speech.",
    "Please pronounce what is written here.",
    "How does this text sound when spoken?",
    "Announce this to the room.",
    "Let me hear this sentence.",
    "Will you narrate the text that follows?",
    "Utter this statement clearly.",
    "Tell me this with your own voice.",
    "Speak the words that you see.",
    "Convert the written words to sound.",
    "Try to speak out this sentence, please.",
)


# These return (prompt, answer). Speech is written by units_to_text; what is to be generated stays empty.


def cross_modal(description: str, source: str, target: str = "", style: str = "paper") -> tuple[str, str]:
    """§3.1: speech -> text with one of ASR_INSTRUCTIONS, text -> speech with one of TTS_INSTRUCTIONS."""
    return _render(style, "cross_modal", D=description, U=source, T=target)


def plain(instruction: str, response: str = "", style: str = "paper") -> tuple[str, str]:
    """A dialogue without template sentences. In the released style it is also what the official command line
    asks, whatever the task: "Recognize this speech, this is input: <sosp>...<eosp>", for example."""
    return _render(style, "plain", TextI=instruction, TextR=response)


def chain_of_modality(
    mode: str,
    speech_i: str = "",
    text_i: str = "",
    text_r: str = "",
    speech_r: str = "",
    style: str = "paper",
) -> tuple[str, str]:
    """§3.2, Appendix C. mode: "s2s", "s2t", "t2s" or "t2t", speech or text in, speech or text out."""
    return _render(style, mode, SpeechI=speech_i, TextI=text_i, TextR=text_r, SpeechR=speech_r)


def standard(
    mode: str, speech_i: str = "", text_i: str = "", text_r: str = "", speech_r: str = ""
) -> tuple[str, str]:
    """Appendix E, with the modes of chain_of_modality."""
    return _render("standard", mode, SpeechI=speech_i, TextI=text_i, TextR=text_r, SpeechR=speech_r)


def _render(style: str, name: str, **slots: str) -> tuple[str, str]:
    assert style in STYLES and name in STYLES[style], f"no template {name!r} in style {style!r}"
    prompt, marker, answer = STYLES[style][name].partition("[SpeechGPT]: ")
    return (prompt + marker).format(**slots), answer.format(**slots)


def template_pieces() -> list[str]:
    """The fixed sentences of the paper's templates and the task descriptions, as sentencepiece spells them.
    For a tiny model they would be a third of a dialogue; Tokenizer.train makes each of them one piece."""
    text = " ".join([*PAPER.values(), *STANDARD.values()])
    fixed = re.split(r"\{\w+\}|\[\w+\]|<eo[ha]>", text)
    sentences = sorted({sentence.lstrip(" .:;").rstrip(" ;") for sentence in fixed} - {""})
    words = [*sentences, *ASR_INSTRUCTIONS, *TTS_INSTRUCTIONS, "[tq]", "[ta]", "[ua]", ":", "."]
    return ["▁" + word.replace(" ", "▁") for word in words] + [".", ";"]


# ---- Text to ids and back ----------------------------------------------------------------------------------


@dataclass
class Parts:
    """A reply taken apart."""

    tq: str  # transcript of the question
    ta: str  # text answer
    ua: list[int]  # units of the spoken answer
    complete: bool  # it came to the end marker or </s>


class Tokenizer:
    """sentencepiece for text, a table for the added tokens. len(tokenizer) is the size of V'' in eq. 1."""

    unk, bos, eos = 0, 1, 2

    def __init__(self, model: bytes, added: dict[str, int], source: str = "tokenizer"):
        """model: the bytes of tokenizer.model; added: token -> id. ValueError if they do not fit."""
        self.sp = open_model(model, f"{source}/tokenizer.model")
        self.n_text = len(self.sp)
        self.trained_style: str | None = None  # of the templates that its model has read, if that was noted
        self.added = check_added(added, self.n_text, f"{source}/added_tokens.json")
        self.name = {i: token for token, i in added.items()}
        self.n_units = 0
        while f"<{self.n_units}>" in added:
            self.n_units += 1
        self.unit_ids = range(self.n_text, self.n_text + self.n_units)
        self.sosp = added["<sosp>"]
        self.eosp = added["<eosp>"]
        self.human = added.get("[Human]")  # None: the released stage 1 has no markers of dialogues
        self.speechgpt = added.get("[SpeechGPT]")
        self.eoh = added.get("<eoh>")
        self.eoa = added.get("<eoa>", added.get("<eos>"))  # the end of an answer, under either name
        # Leftmost-longest match of a token. Units are looked up after the match: 1000 alternatives are slow.
        self.tokens = {"<unk>": self.unk, "<s>": self.bos, "</s>": self.eos} | added
        words = [token for token in self.tokens if not re.fullmatch("<[0-9]+>", token)]
        words.sort(key=len, reverse=True)
        self.pattern = re.compile("|".join(["<[0-9]+>", *map(re.escape, words)]))

    def __len__(self) -> int:
        return self.n_text + len(self.added)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of `text`, <s> first unless bos=False; </s> only where the text spells it."""
        text.encode()  # half a surrogate pair (from a command line) is a ValueError here, not deep in C++
        ids = [self.bos] if bos else []
        start = 0
        after_added = False
        for match in self.pattern.finditer(text):
            token = self.tokens.get(match[0])
            if token is None:  # "<1000>" of 1000 units: ordinary text
                continue
            is_added = token >= self.n_text  # <s> </s> <unk> keep the white space around them
            if match.start() > start:
                ids += self._encode_text(text[start : match.start()], after_added, is_added)
            ids.append(token)
            start = match.end()
            after_added = is_added
        return ids + self._encode_text(text[start:], after_added, False)

    def _encode_text(self, text: str, after_added: bool, before_added: bool) -> list[int]:
        if after_added:
            text = text.lstrip()
        if before_added:
            text = text.rstrip()
        return self.sp.encode(text) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`: added tokens, and the runs of text between them, joined by single spaces."""
        unknown = [i for i in ids if not 0 <= i < len(self)]
        assert not unknown, f"ids {unknown} of {len(self)}"
        parts = []
        for is_added, run in groupby(ids, lambda i: i >= self.n_text):
            if is_added:
                parts += [self.name[i] for i in run]
            else:
                parts.append(self._decode_text(list(run)))
        return " ".join(parts)

    def _decode_text(self, run: list[int]) -> str:
        """A run of text ids without its leading "▁"; <s> </s> <unk> stand between its stretches of text."""
        text = ""
        stretch = []  # pieces since the last of <s> </s> <unk>
        for n, i in enumerate(run):
            piece = self.sp.id_to_piece(i)
            if n == 0:
                piece = piece.removeprefix("▁")
            if i > self.eos:
                stretch.append(piece)
                continue
            # The original puts its space before the stretch that precedes <s>, not between the two.
            space = " " if n > 0 and run[n - 1] > self.eos else ""
            text += space + self.sp.decode(stretch) + piece
            stretch = []
        return text + self.sp.decode(stretch)

    def prompt(self, prompt: str, official: bool = False) -> list[int]:
        """Ids to start generation from: what document() puts before its first target. official=True keeps
        the space at the end, as the official command line does: a lone "▁" that training never had there."""
        return self.encode(prompt if official else prompt.rstrip())

    def document(self, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
        """(ids, mask) of a whole dialogue. The mask is True for the answer, its end marker and </s>: the
        targets of eq. 4. With an empty prompt every token but <s> is a target, as in eq. 3."""
        prompt_ids = self.prompt(prompt)
        text = f"{prompt.rstrip()} {answer}" if prompt else answer
        ids = [*self.encode(text), self.eos]
        # The prompt's ids do not depend on the answer: pieces do not reach across a space, and those of
        # template_pieces, which do, begin after the ":". A foreign tokenizer.model that joins the two is
        # refused, for generation could never start from the ids that it would train on.
        n = len(prompt_ids)
        if ids[:n] != prompt_ids:
            raise ValueError(
                f"tokenizer.model joins the end of the prompt {prompt[-20:]!r} to the start of the answer "
                f"{answer[:20]!r}; use a model whose pieces do not cross spaces"
            )
        return ids, [False] * n + [True] * (len(ids) - n)

    def parse(self, ids: Sequence[int]) -> Parts:
        """The parts of a generated reply (ids after the prompt), whatever was generated, without markers."""
        ends = (self.eos, self.eoa)
        stops = (*ends, self.human, self.speechgpt, self.eoh)
        length = next((n for n, i in enumerate(ids) if i in stops), len(ids))
        complete = length < len(ids) and ids[length] in ends
        text = ""
        units = []
        in_speech = False
        for is_text, run in groupby(ids[:length], lambda i: self.eos < i < self.n_text):
            if is_text:
                text += " " + self.sp.decode(list(run))
                end = re.search("<eo[as]>", text)  # plain text where the folder has the other spelling
                if end:
                    text = text[: end.start()]
                    complete = True
                    break
                continue
            for i in run:
                in_speech = i == self.sosp or (in_speech and i != self.eosp)
                if in_speech and i in self.unit_ids:
                    units.append(i - self.n_text)
        text = self.pattern.sub(lambda match: " " if match[0] in self.tokens else match[0], text)
        before, *rest = re.split(r"\[(tq|ta|ua)\]", text)
        found = {}
        for marker, content in zip(rest[::2], rest[1::2]):
            found.setdefault(marker, content)  # of two [ta] the first counts
        # Released replies open with a transcript that has no marker.
        found.setdefault("tq" if "ta" in found else "ta", before)
        # The templates' "; " belongs to the marker after it.
        tq = found.get("tq", "").strip().removesuffix(";").rstrip()
        ta = found["ta"].strip().removesuffix(";" if "ua" in found else "").rstrip()
        return Parts(tq, ta, units, complete)

    def unit_id(self, unit: int) -> int:
        assert 0 <= unit < self.n_units, f"unit {unit} is not one of 0..{self.n_units - 1}"
        return self.n_text + unit

    def unit_of(self, token: int) -> int | None:
        return token - self.n_text if token in self.unit_ids else None

    def check_vocab(self, vocab_size: int, source: str = "the model") -> None:
        """ValueError unless `source` has a row for each token, no fewer and no more."""
        if vocab_size != len(self):
            raise ValueError(
                f"{source} has {vocab_size} tokens but its tokenizer {len(self)}, {len(self.added)} of "
                "them added; tokenizer.model or added_tokens.json is another model's"
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.model and added_tokens.json, ours or the released ones; ValueError or OSError if
        they are malformed."""
        folder = Path(folder)
        model = _read(folder / "tokenizer.model", 16 << 20)
        table = _read(folder / "added_tokens.json", 4 << 20)
        try:
            added = json.loads(table)
        except (ValueError, RecursionError) as error:
            why = str(error)[:60]
            raise ValueError(f"{folder}/added_tokens.json is not JSON; fetch it again ({why})") from error
        tokenizer = cls(model, added, str(folder))
        tokenizer.trained_style = read_written(folder / "tokenizer_config.json").template_style
        read_written(folder / "special_tokens_map.json")
        return tokenizer

    @classmethod
    def extend(cls, llama: str | Path, folder: str | Path, n_units: int = 1000) -> "Tokenizer":
        """Writes to `folder` the tokenizer of a LLaMA folder with the missing units and markers added: all
        for Meta's LLaMA, the markers of dialogues for the released stage 1, none for the released stage 2."""
        llama = Path(llama)
        added = cls.from_pretrained(llama).added if (llama / "added_tokens.json").exists() else {}
        model = _read(llama / "tokenizer.model", 16 << 20)
        return write(Path(folder), model, added, n_units, str(llama))

    @classmethod
    def train(cls, texts: Iterable[str], folder: str | Path, vocab_size: int, n_units: int) -> "Tokenizer":
        """Fits a sentencepiece model of LLaMA's kind to `texts` and writes a tokenizer folder; same texts,
        same bytes. vocab_size counts text pieces: 3 + 256 bytes + template_pieces() + characters + merges. A
        corpus too small to fill it gives fewer; one with more characters than fit is a ValueError."""
        model = io.BytesIO()
        lines = (line for text in texts for line in text.splitlines() if line.strip())
        try:
            with signals_held():
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=lines,
                    model_writer=model,
                    vocab_size=vocab_size,
                    user_defined_symbols=template_pieces(),
                    **LLAMA_MODEL,
                )
        except RuntimeError as error:
            why = " ".join(str(error).split())
            raise ValueError(f"no tokenizer of {vocab_size} pieces: {why}") from error
        return write(Path(folder), model.getvalue(), {}, n_units, str(folder))


# ---- Files -------------------------------------------------------------------------------------------------

# sentencepiece's settings for a model like LLaMA's. Bytes stand in for rare characters: no text is unknown.
PIECES = dict(model_type="bpe", byte_fallback=True, split_digits=True, character_coverage=1.0)
SPACES = dict(add_dummy_prefix=True, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True)
IDS = dict(unk_id=Tokenizer.unk, bos_id=Tokenizer.bos, eos_id=Tokenizer.eos, pad_id=-1)
LIMITS = dict(hard_vocab_limit=False, max_sentence_length=1 << 20, num_threads=1, minloglevel=2)
LLAMA_MODEL = dict(normalization_rule_name="identity", **PIECES, **SPACES, **IDS, **LIMITS)

# What transformers needs to make the same ids.
CONFIG = dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False, legacy=True)
CONFIG |= dict(clean_up_tokenization_spaces=False, model_max_length=2048, padding_side="left")
CONFIG |= dict(template_style="paper")  # ours: what train.py's documents are rendered in
FLAGS = dict(lstrip=False, normalized=True, rstrip=False, single_word=False)
SPECIAL_TOKENS = {
    "bos_token": {"content": "<s>", **FLAGS},
    "eos_token": {"content": "</s>", **FLAGS},
    "unk_token": {"content": "<unk>", **FLAGS},
    "pad_token": "<unk>",
}


@dataclass
class Written:
    """What `write` notes for others in tokenizer_config.json."""

    template_style: str | None = None  # None: other people's files do not say

    def __post_init__(self):
        if self.template_style not in (None, "paper", "released"):
            raise ValueError(f"template_style is {self.template_style!r:.50}, not 'paper' or 'released'")


# Of tokenizer_config.json and special_tokens_map.json: what this file implements, and what changes no id.
KEYS = Keys(
    {"template_style": "template_style"},
    {
        "tokenizer_class": ("LlamaTokenizer", "LlamaTokenizerFast"),
        **{name: (token["content"],) for name, token in SPECIAL_TOKENS.items() if name != "pad_token"},
        **dict.fromkeys(["add_bos_token", "legacy", "add_prefix_space"], (True,)),
        **dict.fromkeys(["add_eos_token", "clean_up_tokenization_spaces"], (False,)),
        **dict.fromkeys(["spaces_between_special_tokens", "split_special_tokens"], (False,)),
        **dict.fromkeys(["additional_special_tokens", "extra_special_tokens"], ([],)),
    },
    "model_max_length padding_side truncation_side pad_token use_fast name_or_path special_tokens_map_file "
    "tokenizer_file processor_class chat_template use_default_system_prompt model_input_names backend "
    "is_local",
)


def read_written(path: Path) -> Written:
    """ValueError if a tokenizer with this table makes other ids than this file."""
    table = read_table(path) if path.is_file() else {}
    for name in ("bos_token", "eos_token", "unk_token"):
        token = table.get(name)
        if isinstance(token, dict) and not any(token.get(key) for key in ("lstrip", "rstrip", "single_word")):
            table[name] = token.get("content")
    return settings(Written, KEYS, table, path)


def write(folder: Path, model: bytes, added: dict[str, int], n_units: int, source: str) -> Tokenizer:
    """Writes a tokenizer folder: the model, and `added` with what it lacks of the units and markers."""
    end = "<eos>" if "<eos>" in added else "<eoa>"
    tokens = [f"<{u}>" for u in range(n_units)]
    tokens += ["<sosp>", "<eosp>", "[Human]", "[SpeechGPT]", "<eoh>", end]
    added = dict(added)
    n_text = len(open_model(model, f"{source}/tokenizer.model"))
    for token in tokens:
        added.setdefault(token, n_text + len(added))
    tokenizer = Tokenizer(model, added, source)
    tokenizer.trained_style = CONFIG["template_style"]
    folder.mkdir(parents=True, exist_ok=True)
    files = {"tokenizer.model": model}
    tables = {"special_tokens_map": SPECIAL_TOKENS, "tokenizer_config": CONFIG, "added_tokens": added}
    for name, table in tables.items():
        files[f"{name}.json"] = json.dumps(table, indent=2).encode() + b"\n"
    for name, data in files.items():  # each is whole or absent after a kill
        write_atomic(folder / name, data)
    return tokenizer


def open_model(model: bytes, source: str) -> sentencepiece.SentencePieceProcessor:
    """The bytes of a tokenizer.model, ready to use; ValueError unless its first ids are LLaMA's."""
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        first = [sp.id_to_piece(i) for i in range(3)]
    except (RuntimeError, OSError, IndexError) as error:
        raise ValueError(f"{source} is not a sentencepiece model; fetch it again") from error
    if first != ["<unk>", "<s>", "</s>"]:
        raise ValueError(f"{source} starts with {first!r:.100}, not <unk> <s> </s> as LLaMA's does")
    return sp


def check_added(added: object, n_text: int, source: str) -> dict[str, int]:
    """The table {token: id}; ValueError unless its ids go on from n_text without a gap, units first."""
    pairs = added.items() if isinstance(added, dict) else [("", None)]
    if any(type(i) is not int or not token or token != token.strip() for token, i in pairs):
        raise ValueError(f"{source} is not a table of tokens (without white space at their ends) and ids")
    if sorted(added.values()) != list(range(n_text, n_text + len(added))):
        raise ValueError(
            f"{source} does not number its {len(added)} tokens from {n_text} on, after the pieces of "
            "tokenizer.model; the two are of different models"
        )
    units = {int(t[1:-1]): i for t, i in added.items() if re.fullmatch("<(0|[1-9][0-9]{0,8})>", t)}
    in_order = units and all(i == n_text + u for u, i in units.items())
    if not in_order or "<sosp>" not in added or "<eosp>" not in added:
        raise ValueError(f"{source} does not hold <0> <1> ... in order from id {n_text}, and <sosp> <eosp>")
    return added


def _read(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; get both tokenizer.model and added_tokens.json (the second, with "
            "the speech units, Tokenizer.extend makes for a plain LLaMA)"
        )
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} is over {limit >> 20} MiB, too large for such a file")
    return data

"""Training of the language model (paper §4.2): a LLaMA on text, then stages 1, 2 and 3.

    text      next token of text                         a new LLaMA; it stands in for Meta's
    stage1    next unit (eq. 3)                          the same with units in its vocabulary (eq. 1-2)
    stage2    the answer to an instruction (eq. 4)       stage 1's
    stage3    the answer, by chain of modality (eq. 4)   stage 2's, frozen, with low-rank adapters

train.py calls `train` for each of them. They differ in their settings, in the model that they begin with
(training/bases.py) and in the documents that they read (training/reading.py); the loop is training/loop.py.

References: Zhang et al. 2023, "SpeechGPT", arXiv:2305.11000; Hu et al. 2021, "LoRA", arXiv:2106.09685.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

import checkpoint
import lora
from config import BatchSize, Limits, Positive, Share, Whole
from data import batches, documents
from data.batches import Document
from generate import Decoding, generate
from llama import Llama, LlamaConfig, next_token_losses
from run import Run, barrier, rank, world_size
from tokenizer import Tokenizer
from training import bases, reading, shard
from training.loop import Loss, Optimization, optimize
from training.stages import begun

# ---- Sections of the config --------------------------------------------------------------------------------
# Defaults are the paper's where it gives them (Table 3, §5.1).

Mix = dict[str, Annotated[float, Limits(0.001, 1000)]]  # kinds of documents (data/documents.py): their shares


@dataclass
class Language(Optimization):
    max_len: Annotated[int, Limits(2, 2**20)] = 1024  # tokens in a packed row
    mix: Mix = field(default_factory=lambda: {"text": 1.0})
    # folders of SpeechInstruct as ids (data/tokens.py), instead of mix
    tokens: Mix = field(default_factory=dict)
    unit_weight: Positive = 1.0  # loss weight of a unit (a piece of text: 1)
    # augmentation: fraction of input units dropped, and the same fraction replaced at random
    noise: Share = 0.0

    def __post_init__(self):
        documents.check_mix(self.mix)


@dataclass
class Stage1(Language):
    steps: Whole = 900
    batch_size: BatchSize = 768
    mix: Mix = field(default_factory=lambda: {"speech": 1.0})


@dataclass
class Stage2(Language):
    max_len: Annotated[int, Limits(2, 2**20)] = 512
    # ASR or TTS "with probability p" (§3.1), and text: the paper gives neither number
    mix: Mix = field(default_factory=lambda: {"asr": 0.4, "tts": 0.4, "t2t": 0.2})


@dataclass
class Stage3(Language):
    steps: Whole = 4200  # 0: the stage is left out, for a corpus without dialogues
    batch_size: BatchSize = 128
    mix: Mix = field(default_factory=lambda: {"chain": 1.0})
    speech: Literal["t2u", "recorded"] = "t2u"  # answers by the text-to-unit generator (§3.2), or recordings


@dataclass
class LlamaSection(LlamaConfig):
    """LlamaConfig without the size of the vocabulary, which the tokenizer decides."""

    vocab_size: int = field(init=False, default=1)


@dataclass
class LoraSection:
    r: lora.Rank = 8
    alpha: Annotated[float, Limits(0, 1e6)] = 16.0
    dropout: Share = 0.0
    int8: bool = False  # the frozen model's matrices take a byte per weight
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])


# ---- Training ----------------------------------------------------------------------------------------------


class LanguageStage(NamedTuple):
    """How the model of one stage is made and saved. What requires a gradient is what the stage trains."""

    base: Callable[[Run, object, Tokenizer], bases.Base]
    save: Callable[[Run, object, Llama, Tokenizer], None]


def train(name: str, run: Run, config):
    """Stage text, stage1, stage2 or stage3."""
    section: Language = getattr(config, name)
    tok = make_tokenizer(name, run, config)
    document_at, held_out = reading.stage_documents(name, run, section, tok)
    torch.manual_seed(run.seed)
    base = LANGUAGE[name].base(run, config, tok)
    is_sharded = shard.is_sharded(name, base.model, section, run.device)
    model = base.model if is_sharded else base.load(run.device)
    batch_at = batches.documents(
        document_at, section.batch_size, section.max_len, section.accumulate, rank(), world_size()
    )
    loss = language_loss(token_weights(model, tok, section.unit_weight).to(run.device))
    probe = held_out_probe(run, section, tok, model, loss, held_out)
    optimize(run, name, run.state(name), model, loss, batch_at, section, probe, base.fill)
    if checkpoint.takes_part(model):
        LANGUAGE[name].save(run, config, model, tok)
    barrier()


def language_loss(weight: Tensor) -> Callable:
    """weight (V,): how much each token counts. Besides the loss: which share of what was read is padding, and
    how long the document is that a token is in, on average."""

    def loss(model: Llama, batch) -> Loss:
        ids, mask, positions, docs = batch
        total, weights = next_token_losses(model, ids, mask, positions, docs, weight)  # eq. 3 and 4
        read = docs >= 0
        tokens = read.sum()
        squares = ((2 * positions + 1) * read).sum()  # 1 + 3 + 5 + ...: of each document its length squared
        places = torch.full_like(tokens, docs.numel())
        shares = {"padding": (places - tokens, places), "length": (squares, tokens)}
        return Loss(total, weights, tokens, shares)

    return loss


def token_weights(model: Llama, tok: Tokenizer, unit_weight: float) -> Tensor:
    """(V,): how much each token counts in the loss."""
    rows = model.config.vocab_size
    weight = torch.ones(max(rows, len(tok)))
    weight[tok.unit_ids.start : tok.unit_ids.stop] = unit_weight
    return weight[:rows]  # a model of text has no units yet


def held_out_probe(
    run: Run, section: Language, tok: Tokenizer, model: Llama, loss: Callable, held_out: list[Document]
) -> Callable:
    """The loss on held-out documents; and what the model answers to three of them."""

    @torch.no_grad()
    def probe() -> tuple[dict, str]:
        if not held_out:
            return {}, ""
        packed = batches.pack(held_out, section.max_len)
        found = loss(model, [t.to(run.device) for t in packed])
        lines = ""
        for ids, mask in held_out[:3]:
            prompt = mask.index(True) if not mask[1] else len(ids) // 2  # half of a document without a prompt
            draws = torch.Generator().manual_seed(run.seed)  # the same on all ranks
            answer = generate(model, [ids[:prompt]], tok, Decoding(max_new=len(ids)), draws)[0]
            lines += f"\n  prompt   {tok.decode(ids[:prompt])}"
            lines += f"\n  answer   {tok.decode(answer)}"
            lines += f"\n  expected {tok.decode(ids[prompt:])}"
        return {"held_out_loss": (found.total / found.weight).item()}, lines

    return probe


def make_tokenizer(name: str, run: Run, config) -> Tokenizer:
    """The run's own: sentencepiece trained on the text of the train split, or the pretrained LLaMA's. It may
    be written again, to the same bytes, while stage t2u reads it."""
    # The first stage that needs it makes it, whatever a run with other settings has left.
    first = "stage1" if config.pretrained else "text"
    anew = name == first and not begun(run.state(name))
    n_units = config.units.clusters
    if rank() == 0 and (anew or not (run.tokenizer / "added_tokens.json").exists()):
        if config.pretrained:
            Tokenizer.extend(config.pretrained, run.tokenizer, n_units)
        else:
            text = documents.sentences(documents.read_tables(run.out, None), "train")
            Tokenizer.train(text, run.tokenizer, config.vocab_size, n_units)
    barrier()
    return Tokenizer.from_pretrained(run.tokenizer)


LANGUAGE = {
    "text": LanguageStage(bases.new_llama, partial(bases.save_llama, "text")),
    "stage1": LanguageStage(bases.grown_llama, partial(bases.save_llama, "stage1")),
    "stage2": LanguageStage(bases.stage1_llama, partial(bases.save_llama, "model/llama")),
    "stage3": LanguageStage(bases.adapted_llama, bases.save_adapters),
}

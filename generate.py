"""Generation: a prompt's ids in, the ids of the answer out (SpeechGPT §5.1).

Three small functions: `prefill` reads the prompts, `decode_one_token` feeds the last token back through the static
key-value cache, `sample_token` draws the next one. Between the last two stands the `Grammar`: a token says by itself
whether it is inside speech (<sosp> or a unit) or outside, so what may follow it is two rows of a table:

    ... [ta] five ; [ua] <sosp> <7> <12> <7> <eosp> <eoa>
        ^ text pieces, <sosp>, end  ^ units other than the last one, or <eosp>

References: the paper's decoding (§5.1); Holtzman et al. 2020, arXiv:1904.09751 (top-p); pytorch-labs/gpt-fast (form).
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llama import Cache, Llama
from tokenizer import Tokenizer

SMALL = 1e8  # bytes of weights: time goes into Python, not into memory


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the likeliest; top_k 0 and top_p 1 cut nothing off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"{self}: needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1")


GREEDY = Sampling()
PAPER = Sampling(temperature=0.8, top_k=60, top_p=0.8)  # §5.1
OFFICIAL = Sampling(temperature=0.7, top_k=50, top_p=0.8)  # what the released command line does


class Grammar:
    """Adds -inf to the logits of tokens that cannot follow the last one. `free` only tells speech from text."""

    def __init__(self, tok: Tokenizer, vocab_size: int, device: torch.device, free: bool = False):
        rows, vocab_size = vocab_size, max(vocab_size, len(tok))  # a model of text has no rows for units yet
        unit = torch.zeros(vocab_size, dtype=torch.bool)
        unit[torch.tensor(list(tok.unit_ids))] = True
        outside = torch.zeros(vocab_size).masked_fill(unit, -torch.inf)
        never = (tok.unk, tok.bos, tok.eosp, tok.human, tok.speechgpt, tok.eoh)  # what no answer holds
        outside[[i for i in never if i is not None]] = -torch.inf
        outside[len(tok) :] = -torch.inf  # rows of the embedding beyond the vocabulary, if any
        inside = torch.full((vocab_size,), -torch.inf).masked_fill(unit, 0.0)
        inside[tok.eosp] = 0.0
        repeat = torch.zeros(vocab_size).masked_fill(
            unit, -torch.inf
        )  # units are deduplicated: none comes twice
        self.in_speech = unit.index_fill(0, torch.tensor([tok.sosp]), True)[:rows].to(device)  # (V,)
        self.bias = torch.stack([outside, inside])[:, :rows].to(device)  # (2, V)
        self.repeat = repeat[:rows].to(device)  # (V,)
        self.free = free

    def __call__(self, logits: Tensor, last: Tensor) -> Tensor:
        """logits (B, V) after the tokens last (B,) -> the same, with what is not allowed at -inf."""
        if self.free:
            return logits
        logits = logits + self.bias[self.in_speech[last].long()]
        return logits.scatter_add_(1, last[:, None], self.repeat[last][:, None])


def sample_token(logits: Tensor, how: Sampling, uniform: Tensor) -> Tensor:
    """logits (B, V) fp32 -> tokens (B,). uniform (B,) in [0, 1) is all the chance there is: temperature, then top-k,
    then top-p, then the inverse of the cumulative distribution. Only k values are sorted, not the vocabulary."""
    if how.temperature == 0:
        return logits.argmax(-1)
    values, ids = (logits / how.temperature).topk(min(how.top_k or logits.shape[-1], logits.shape[-1]))
    probs = values.softmax(-1)
    mass = probs.cumsum(-1)
    # The nucleus: a token stays while those likelier than it hold less than top_p. What has no chance at all goes too,
    # so that rounding can never land on a forbidden token.
    last = ((mass - probs < how.top_p) & (probs > 0)).sum(-1, keepdim=True) - 1
    rank = (mass <= uniform[:, None] * mass.gather(1, last)).sum(-1, keepdim=True)
    return ids.gather(1, rank.minimum(last)).squeeze(1)


def prefill(model: Llama, ids: Tensor, cache: Cache) -> Tensor:
    """ids (B, T), left padded -> logits (B, V) of the first new token."""
    return model.lm_head(model.hidden(ids, cache=cache)[:, -1]).float()


def decode_one_token(model: Llama, last: Tensor, cache: Cache) -> Tensor:
    """last (B,) -> logits (B, V) of the token after it."""
    return model(last[:, None], cache=cache)[:, -1].float()


@contextmanager
def one_thread(model: Llama):
    """For a small model on a CPU: its operations are shorter than it takes to wake a second thread, and on a busy
    machine waiting for one made decoding 20 times slower."""
    threads = torch.get_num_threads()
    if model.lm_head.weight.device.type == "cpu" and weight_bytes(model) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: list[list[int]],
    tok: Tokenizer,
    text: Sampling = GREEDY,
    speech: Sampling = PAPER,
    max_new: int | None = None,
    generator: torch.Generator | None = None,
    free: bool = False,
    stop: tuple[int, ...] = (),
    show: bool = False,
) -> list[list[int]]:
    """New ids of each prompt, up to and with its end (</s>, <eoa> or <eos>, or one of `stop`) or the context's end.

    `text` and `speech` say how tokens outside and inside speech are drawn; `free` lifts the grammar. Chance comes from
    `generator` (on the CPU, so that every device draws alike), a row of numbers for each prompt in turn: a batch draws
    what its prompts would draw one by one. The context's end is that of the longest prompt."""
    context, longest = model.config.max_len, max(map(len, prompts))
    assert min(map(len, prompts)) > 0 and longest < context, (
        f"prompts of 1 to {context - 1} ids, got {longest}"
    )
    steps, device = min(max_new or context, context - longest), model.lm_head.weight.device
    pad = torch.tensor([longest - len(p) for p in prompts], device=device)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # (B, longest)
    uniform = torch.rand(len(prompts), context, generator=generator).to(device)
    grammar = Grammar(tok, model.config.vocab_size, device, free)
    cache = model.new_cache(len(prompts), longest + steps, pad)
    ends, out, running = {tok.eos, tok.eoa, *stop}, [[] for _ in prompts], set(range(len(prompts)))
    logits, last = prefill(model, ids, cache), ids[:, -1]
    if not torch.isfinite(logits).all():
        raise ValueError("the model computes NaN: its weights are damaged, or it needs --dtype float32")
    with one_thread(model):
        for step in tqdm(range(steps), "thinking", unit=" tokens", leave=False, disable=not show):
            if step:
                logits = decode_one_token(model, last, cache)
            logits, chance = grammar(logits, last), uniform[:, step]
            drawn = sample_token(logits, text, chance)
            if speech != text:
                drawn = torch.where(grammar.in_speech[last], sample_token(logits, speech, chance), drawn)
            last = drawn
            for row, token in enumerate(last.tolist()):
                if row in running:
                    out[row].append(token)
                    if token in ends:
                        running.remove(row)
            if not running:
                break
    return out


def weight_bytes(model: nn.Module) -> int:
    """Bytes that one step of decoding reads: all weights but the embedding, of which it needs a row."""
    return sum(t.nbytes for name, t in model.state_dict().items() if "embed_tokens" not in name)

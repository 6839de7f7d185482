"""Generation: the ids of a prompt in, the ids of the answer out (SpeechGPT §5.1).

Three small functions: `prefill` reads the prompts, `decode_one_token` feeds the last token back through the
static key-value cache, `sample_token` draws the next one. `stream` puts them in a loop and yields the tokens
of each step; `generate` collects them.

A `Grammar` keeps the answer well formed. Its state is the last token alone: after <sosp> or a unit we are
inside speech, after anything else outside, so the tokens that may come next are one of two rows of a table:

    ... [ta] five ; [ua] <sosp> <7> <12> <7> <eosp> <eoa>
        ^ outside: text, <sosp>, end  ^ inside: <eosp>, or any unit but the last one (units are deduplicated)

References: SpeechGPT, https://arxiv.org/abs/2305.11000, §5.1; top-p: Holtzman et al. 2020, arXiv:1904.09751;
the form of the loop: pytorch-labs/gpt-fast.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llama import Cache, Llama
from tokenizer import ASR_INSTRUCTIONS, Tokenizer, cross_modal, units_to_text

# ---- How tokens are drawn ----------------------------------------------------------------------------------


LIMITS = (0.001, 1000)  # of a temperature


@dataclass(frozen=True)
class Sampling:
    """How one token is drawn. Temperature 0 is greedy; top_k 0 and top_p 1 cut nothing off."""

    temperature: float = 0.0  # 0, or within LIMITS: beyond them logits / temperature are no float32
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        least, most = LIMITS
        possible = self.temperature == 0 or least <= self.temperature <= most
        if not possible or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"{self}: needs temperature 0 or {least} to {most}, top_k >= 0 and 0 < top_p <= 1"
            )


GREEDY = Sampling()
PAPER = Sampling(temperature=0.8, top_k=60, top_p=0.8)  # §5.1
OFFICIAL = Sampling(temperature=0.7, top_k=50, top_p=0.8)  # the default of the official command line


@dataclass(frozen=True)
class Decoding:
    """How a whole answer is generated."""

    text: Sampling = GREEDY  # for tokens outside speech
    speech: Sampling = PAPER  # for tokens inside speech
    max_new: int | None = None  # most tokens of an answer; None: what the context holds
    stop: tuple[int, ...] = ()  # ids that end an answer, besides </s> and <eoa>
    free: bool = False  # without the grammar


GREEDY_TEXT = Decoding()  # the likeliest text, and speech drawn as in the paper


class Grammar:
    """Sets the logits of tokens that cannot follow the last one to -inf, by table lookup.

    free: apply no mask; only track whether the last token is speech.
    """

    def __init__(self, tok: Tokenizer, vocab_size: int, device: torch.device, free: bool = False):
        size = max(vocab_size, len(tok))  # a model of text has no rows for units yet: cut off below
        is_unit = torch.zeros(size, dtype=torch.bool)
        is_unit[torch.tensor(list(tok.unit_ids))] = True

        outside = torch.zeros(size).masked_fill(is_unit, -torch.inf)
        for token in (tok.unk, tok.bos, tok.eosp, tok.human, tok.speechgpt, tok.eoh):  # never in an answer
            if token is not None:
                outside[token] = -torch.inf
        outside[len(tok) :] = -torch.inf  # rows of the embedding beyond the vocabulary, if any

        inside = torch.full((size,), -torch.inf).masked_fill(is_unit, 0.0)
        inside[tok.eosp] = 0.0

        opens_speech = is_unit.clone()
        opens_speech[tok.sosp] = True
        repeat = torch.zeros(size).masked_fill(is_unit, -torch.inf)

        self.free = free
        self.in_speech = opens_speech[:vocab_size].to(device)  # (V,) are we inside speech after this token?
        self.bias = torch.stack([outside, inside])[:, :vocab_size].to(device)  # (2, V)
        self.repeat = repeat[:vocab_size].to(device)  # (V,) added to the last token's own logit

    def __call__(self, logits: Tensor, last: Tensor) -> Tensor:
        """logits (B, V) after the tokens last (B,) -> the same, with what is not allowed at -inf."""
        if self.free:
            return logits
        logits = logits + self.bias[self.in_speech[last].long()]
        return logits.scatter_add_(1, last[:, None], self.repeat[last][:, None])


def sample_token(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """logits (B, V) fp32 -> tokens (B,). uniform (B,) in [0, 1): the only source of randomness.

    Temperature, then top-k, then top-p, then the inverse of the cumulative distribution. Only the k kept
    values are sorted, not the vocabulary.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    vocab_size = logits.shape[-1]
    k = min(sampling.top_k or vocab_size, vocab_size)
    values, ids = (logits / sampling.temperature).topk(k)  # (B, k), in descending order
    probs = values.softmax(-1)
    mass = probs.cumsum(-1)
    # The nucleus: a token stays while the likelier ones hold less than top_p. Tokens of probability 0 are cut
    # off as well, so that rounding can never land on a forbidden one.
    kept = (mass - probs < sampling.top_p) & (probs > 0)
    last = kept.sum(-1, keepdim=True) - 1  # (B, 1) index of the least likely token kept
    rank = (mass <= uniform[:, None] * mass.gather(1, last)).sum(-1, keepdim=True)
    return ids.gather(1, rank.minimum(last)).squeeze(1)


def sample_text_or_speech(logits: Tensor, in_speech: Tensor, decoding: Decoding, uniform: Tensor) -> Tensor:
    """logits (B, V) -> tokens (B,): decoding.speech draws where in_speech (B,), decoding.text elsewhere."""
    tokens = sample_token(logits, decoding.text, uniform)
    if decoding.speech == decoding.text:
        return tokens
    return torch.where(in_speech, sample_token(logits, decoding.speech, uniform), tokens)


NOT_FINITE = "the model computes NaN: its weights are damaged, or it needs --dtype float32"


# ---- The loop ----------------------------------------------------------------------------------------------


def prefill(model: Llama, ids: Tensor, cache: Cache) -> Tensor:
    """ids (B, T), left padded -> logits (B, V) of the first new token."""
    return model.lm_head(model.hidden(ids, cache=cache)[:, -1]).float()


def decode_one_token(model: Llama, last: Tensor, cache: Cache) -> Tensor:
    """last (B,) -> logits (B, V) of the token after it."""
    return model(last[:, None], cache=cache)[:, -1].float()


@torch.inference_mode()
def stream(
    model: Llama,
    prompts: list[list[int]],
    tok: Tokenizer,
    decoding: Decoding = GREEDY_TEXT,
    generator: torch.Generator | None = None,
) -> Iterator[list[int | None]]:
    """Yields the new tokens of each step: one for each prompt, None where the answer has ended.

    An answer ends with </s>, <eoa> (or <eos>) or an id of decoding.stop, after decoding.max_new tokens, or
    when the longest prompt and its answer fill the context. Random numbers are drawn on the CPU, so that all
    devices draw alike, and by prompt, so that a batch draws what its prompts would one by one. ValueError if
    a prompt is empty or leaves no room in the context, or if the model computes NaN.
    """
    if not prompts:
        return
    context = model.config.max_len
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    if min(lengths) == 0 or longest >= context:
        found = longest if min(lengths) else 0
        raise ValueError(f"a prompt has 1 to {context - 1} ids in this model's context; this one has {found}")
    steps = min(decoding.max_new or context, context - longest)
    ends = {tok.eos, tok.eoa, *decoding.stop}

    device = model.device
    padding = [longest - length for length in lengths]
    padded = [[0] * pad + prompt for pad, prompt in zip(padding, prompts)]
    ids = torch.tensor(padded, device=device)  # (B, longest)
    uniform = torch.rand(len(prompts), context, generator=generator).to(device)
    grammar = Grammar(tok, model.config.vocab_size, device, decoding.free)
    cache = model.new_cache(len(prompts), longest + steps, torch.tensor(padding, device=device))

    logits = prefill(model, ids, cache)
    last = ids[:, -1]
    running = set(range(len(prompts)))
    single = one_thread(model)
    for step in range(steps):
        with single:  # for this step, not for what the caller does between two
            if step > 0:
                logits = decode_one_token(model, last, cache)
            logits = grammar(logits, last)
            if not torch.isfinite(logits.amax(-1)).all():  # NaN, or nothing that may follow is possible
                raise ValueError(NOT_FINITE)
            last = sample_text_or_speech(logits, grammar.in_speech[last], decoding, uniform[:, step])
        tokens = last.tolist()
        yield [token if row in running else None for row, token in enumerate(tokens)]
        running -= {row for row, token in enumerate(tokens) if token in ends}
        if not running:
            return


def generate(
    model: Llama,
    prompts: list[list[int]],
    tok: Tokenizer,
    decoding: Decoding = GREEDY_TEXT,
    generator: torch.Generator | None = None,
    show: bool = False,
) -> list[list[int]]:
    """The new ids of each prompt, with the one that ends it: see `stream`. show: a progress bar."""
    answers = [[] for _ in prompts]
    steps = stream(model, prompts, tok, decoding, generator)
    for tokens in tqdm(steps, "generating", unit=" tokens", leave=False, disable=not show):
        for answer, token in zip(answers, tokens):
            if token is not None:
                answer.append(token)
    return answers


# ---- Ours, for small models: rejection sampling of speech --------------------------------------------------
#
# A small model writes the right answer more often than it speaks it, and its own recognition can tell
# (LOG.md). So speech that scores badly is drawn again, and the best take is kept.

TAKES = 8  # of a small model, by default
ACCEPT = math.log(0.5)  # accept a take when log P(text | its units) exceeds this


def asr_log_prob(model, answer: list[int], text: str, style: str = "paper") -> float:
    """log P(text | the units in `answer`), by the model's own recognition (§3.1); -inf without units.

    model: a `sample.SpeechGPT`, or whatever has its `tok`, `llama` and `logits`."""
    units = model.tok.parse(answer).ua
    if not units:
        return -math.inf
    dialogue = cross_modal(ASR_INSTRUCTIONS[0], units_to_text(units), text, style)
    ids, mask = model.tok.document(*dialogue)
    if len(ids) > model.llama.config.max_len:
        return 0.0  # too long to be recognized: accept it
    log_probs = model.logits(ids[:-1]).log_softmax(-1).cpu()  # (T - 1, V)
    targets = torch.tensor(ids[1:])[:, None]
    return log_probs.gather(1, targets)[torch.tensor(mask[1:])].sum().item()


def redraw_speech(
    answers: list[list[int]],
    texts: dict[int, str],
    sosp: int,
    takes: int,
    score: Callable[[list[int], str], float],
    draw: Callable[[dict[int, list[int]]], list[list[int]]],
) -> list[list[int]]:
    """Rejection sampling: each answer with the best of up to `takes` takes of its speech; its text stays.

    texts: what should be spoken, by index of the answer; the others stay as they are. score(answer, text) ->
    log probability. draw(heads) generates the rest of each answer that begins as these, up to <sosp>."""
    answers = list(answers)
    scores = {i: score(answers[i], text) for i, text in texts.items()}
    for _ in range(takes - 1):
        rejected = [i for i in scores if scores[i] < ACCEPT]
        if not rejected:
            break
        heads = {i: answers[i][: answers[i].index(sosp) + 1] for i in rejected}  # ... [ua] <sosp>
        for i, tail in zip(rejected, draw(heads)):
            take = heads[i] + tail
            found = score(take, texts[i])
            if found > scores[i]:
                scores[i] = found
                answers[i] = take
    return answers


# ---- Small models ------------------------------------------------------------------------------------------

SMALL = 1e8  # bytes of weights under which decoding waits for Python, not for memory


def weight_bytes(model: nn.Module) -> int:
    """Bytes that one step of decoding reads: all weights but the embedding, of which it needs one row."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return sum(tensor.nbytes for name, tensor in tensors if "embed_tokens" not in name)


def is_small(model: nn.Module) -> bool:
    return weight_bytes(model) < SMALL


class one_thread:
    """`with one_thread(model):` a small model on a CPU uses one thread; any other model is left as it is.

    Its operations take less time than waking a second thread; on a busy machine, waiting for one made
    decoding 20 times slower.
    """

    def __init__(self, model: nn.Module):
        self.single = next(model.parameters()).device.type == "cpu" and is_small(model)

    def __enter__(self):
        self.before = torch.get_num_threads()
        if self.single:
            torch.set_num_threads(1)

    def __exit__(self, *_):
        torch.set_num_threads(self.before)

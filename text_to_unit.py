"""Text-to-unit generator: text -> the units of its speech (SpeechGPT paper §3.2).

Instructions come as text, without recordings. A Transformer encoder-decoder, trained on pairs of text and
units, writes the units that a recording would have; that makes them (SpeechI, TextI, TextR, SpeechR):

    "Tom is in." --sentencepiece--> ▁Tom ▁is ▁in . </s> --encoder--> one vector a piece
    </s> <63> <991> --decoder, attending to those vectors--> <63> <991> <162>      predicts what comes next
    beam search from </s> on, until it writes </s> --> 63 991 162 ..., no unit twice in a row

    >>> TextToUnit.from_pretrained("out/tiny/model/text_to_unit").generate(["Tom is in."])
    [[63, 991, 162, ...]]

The network is Vaswani's, with those variants of fairseq that the released text2unit.pt may have. A folder
holds sentencepiece's model (spm.model), the symbols of either side (dict.en.txt and dict.unit.txt: the ids 0
to 3 are <s> <pad> </s> <unk>, then follow those of the file), and the weights, ours or fairseq's.

References: Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762
            Szegedy et al. 2016, arXiv:1512.00567 (label smoothing); Xiong et al. 2020, arXiv:2002.04745
            (norms before the branches); Ott et al. 2019, "fairseq", arXiv:1904.01038
            Tachibana et al. 2018, arXiv:1710.08969 (§4: guided attention)
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Annotated, NamedTuple

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from config import Limits, Share, Size, load
from files import one_line, read_json, show, write_atomic, write_json
from run import rank

Length = Annotated[int, Limits(2, 65536)]
KeysValues = tuple[Tensor, Tensor]  # (B, heads, T, C / heads) each


@dataclass
class Stack:
    """Encoder or decoder. Defaults: Vaswani's base model."""

    dim: Size = 512
    ffn_dim: Size = 2048
    n_layers: Annotated[int, Limits(1, 1000)] = 6
    n_heads: Annotated[int, Limits(1, 1000)] = 8
    pre_norm: bool = False  # norms before the branches, and one at the end; else after the sums

    def __post_init__(self):
        if self.dim % 2 or self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} must be even and a multiple of n_heads {self.n_heads}")


@dataclass
class TextToUnitConfig:
    encoder: Stack = field(default_factory=Stack)
    decoder: Stack = field(default_factory=Stack)
    share_embeddings: bool = False  # one matrix for text and units, which then have one dictionary
    share_output: bool = True  # the decoder's embeddings are its output layer, too (Vaswani §3.4)
    scale_embeddings: bool = True  # embeddings times sqrt(dim) (§3.4)
    norm_embeddings: bool = False  # a norm after the positions are added
    activation: str = "relu"  # or "gelu"
    dropout: Share = 0.1  # of embeddings, and of each branch before it is added (§5.4)
    max_source: Length = 1024  # pieces of a text, </s> included
    max_target: Length = 1024  # units, </s> included

    def __post_init__(self):
        if self.share_embeddings and self.encoder.dim != self.decoder.dim:
            raise ValueError(f"share_embeddings needs one dim, not {self.encoder.dim} and {self.decoder.dim}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be relu or gelu, not {show(self.activation)}")


# ---- The Transformer ---------------------------------------------------------------------------------------
# Attributes carry fairseq's names, so that its weights need hardly a table.

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def positions(first: int, n: int, dim: int, device: torch.device) -> Tensor:
    """(n, dim): sines, then cosines, of the positions first, first + 1, ... at dim / 2 wavelengths from 2 pi
    to 20,000 pi (§3.5; there they alternate). As in fairseq position 0 is numbered after the padding's id."""
    rates = torch.exp(torch.arange(dim // 2, device=device) * -(math.log(1e4) / max(1, dim // 2 - 1)))
    numbers = torch.arange(first, first + n, device=device) + Vocabulary.pad + 1
    angles = numbers[:, None] * rates  # (n, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Attention(nn.Module):
    def __init__(self, dim: int, source_dim: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(source_dim, dim)
        self.v_proj = nn.Linear(source_dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def keys_values(self, x: Tensor) -> KeysValues:
        return self.heads(self.k_proj(x)), self.heads(self.v_proj(x))

    def heads(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, heads, T, C / heads)
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)

    def forward(
        self, x: Tensor, kv: KeysValues, mask: Tensor | None, seen: list[Tensor] | None = None
    ) -> Tensor:
        """x (B, T, C) -> the same; mask: True where to look. The weights (B, heads, T, S) are appended to
        `seen`, if there is such a list."""
        q = self.heads(self.q_proj(x))
        k, v = kv
        if seen is not None or x.device.type == "cpu" and torch.is_grad_enabled():
            # Written out: in bfloat16 a step on a CPU takes half as long as with torch's own (2.13).
            weights = q @ k.mT * q.shape[3] ** -0.5  # (B, heads, T, S)
            weights = weights if mask is None else weights.masked_fill(~mask, -math.inf)
            weights = weights.softmax(-1)
            if seen is not None:
                seen.append(weights)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, heads, T, C / heads) -> (B, T, C)


class EncoderLayer(nn.Module):
    def __init__(self, stack: Stack, config: TextToUnitConfig):
        super().__init__()
        self.pre_norm = stack.pre_norm
        self.activation = ACTIVATIONS[config.activation]
        self.self_attn = Attention(stack.dim, stack.dim, stack.n_heads)
        self.self_attn_layer_norm = nn.LayerNorm(stack.dim)
        self.fc1 = nn.Linear(stack.dim, stack.ffn_dim)
        self.fc2 = nn.Linear(stack.ffn_dim, stack.dim)
        self.final_layer_norm = nn.LayerNorm(stack.dim)
        self.dropout = nn.Dropout(config.dropout)

    def add(self, x: Tensor, norm: nn.LayerNorm, branch) -> Tensor:
        if self.pre_norm:
            return x + self.dropout(branch(norm(x)))
        return norm(x + self.dropout(branch(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (B, S, C); mask (B, 1, 1, S): False in padding
        def attend(x: Tensor) -> Tensor:
            return self.self_attn(x, self.self_attn.keys_values(x), mask)

        x = self.add(x, self.self_attn_layer_norm, attend)
        return self.add(x, self.final_layer_norm, self.feed_forward)


class LayerCache:
    """Keys and values of one decoder layer: of the text, computed once, and of the units so far."""

    def __init__(self, text: KeysValues):
        self.text = text  # of B texts
        self.units: KeysValues | None = None  # of B * beam rows of units
        self.seen: list[Tensor] | None = None  # collects where the decoder looks in the text

    def append(self, new: KeysValues) -> KeysValues:
        self.units = new if self.units is None else tuple(torch.cat(pair, 2) for pair in zip(self.units, new))
        return self.units

    def select(self, texts: Tensor, rows: Tensor) -> None:
        """Goes on with some of the texts, and with some of the rows of units, in their order."""
        self.units = tuple(x[rows] for x in self.units)
        if len(texts) < len(self.text[0]):
            self.text = tuple(x[texts] for x in self.text)


class DecoderLayer(EncoderLayer):
    """An encoder layer whose self-attention is causal, with attention to the text in between."""

    def __init__(self, stack: Stack, config: TextToUnitConfig):
        super().__init__(stack, config)
        self.encoder_attn = Attention(stack.dim, config.encoder.dim, stack.n_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(stack.dim)

    def forward(self, x: Tensor, mask: Tensor, causal: Tensor | None, cache: LayerCache) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.self_attn(x, cache.append(self.self_attn.keys_values(x)), causal)

        def attend_to_text(x: Tensor) -> Tensor:
            # The beams of one text in a row, (B * beam, T, C) -> (B, beam * T, C), read it without copies.
            rows = x.reshape(len(cache.text[0]), -1, x.shape[2])
            return self.encoder_attn(rows, cache.text, mask, cache.seen).view_as(x)

        x = self.add(x, self.self_attn_layer_norm, attend)
        x = self.add(x, self.encoder_attn_layer_norm, attend_to_text)
        return self.add(x, self.final_layer_norm, self.feed_forward)


class Side(nn.Module):
    """Encoder or decoder: embeddings with positions, layers, and the norm at the end, if there is one."""

    def __init__(self, stack: Stack, config: TextToUnitConfig, n_symbols: int, layer: type[EncoderLayer]):
        super().__init__()
        self.scale = math.sqrt(stack.dim) if config.scale_embeddings else 1.0
        self.embed_tokens = nn.Embedding(n_symbols, stack.dim)
        self.layernorm_embedding = nn.LayerNorm(stack.dim) if config.norm_embeddings else nn.Identity()
        self.layers = nn.ModuleList(layer(stack, config) for _ in range(stack.n_layers))
        self.layer_norm = nn.LayerNorm(stack.dim) if stack.pre_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, ids: Tensor, first: int = 0) -> Tensor:  # (B, T) -> (B, T, C)
        x = self.scale * self.embed_tokens(ids)
        x = x + positions(first, ids.shape[1], x.shape[2], ids.device).to(x.dtype)
        return self.dropout(self.layernorm_embedding(x))


class TextToUnit(nn.Module):
    """Encoder and decoder, and the vocabulary that makes ids of text, and units of ids."""

    def __init__(self, config: TextToUnitConfig, vocabulary: "Vocabulary"):
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        n_text, n_units = len(vocabulary.text), len(vocabulary.units)
        self.encoder = Side(config.encoder, config, n_text, EncoderLayer)
        self.decoder = Side(config.decoder, config, n_units, DecoderLayer)
        self.decoder.output_projection = nn.Linear(config.decoder.dim, n_units, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("bias") and not p.is_meta:
                nn.init.zeros_(p)
            elif p.ndim == 2 and not p.is_meta:
                table = name.endswith(("embed_tokens.weight", "output_projection.weight"))
                nn.init.normal_(p, std=p.shape[1] ** -0.5) if table else nn.init.xavier_uniform_(p)
        if config.share_embeddings:
            if vocabulary.text != vocabulary.units:
                raise ValueError("share_embeddings needs one dictionary for text and units")
            self.decoder.embed_tokens = self.encoder.embed_tokens
        if config.share_output:
            self.decoder.output_projection.weight = self.decoder.embed_tokens.weight

    def encode(self, text: Tensor) -> tuple[Tensor, list[LayerCache]]:
        """text (B, S), padded at the end -> its mask (B, 1, 1, S), and the cache of each decoder layer."""
        mask = text.ne(Vocabulary.pad)[:, None, None]
        x = self.encoder.embed(text)
        for layer in self.encoder.layers:
            x = layer(x, mask)
        x = self.encoder.layer_norm(x)
        return mask, [LayerCache(layer.encoder_attn.keys_values(x)) for layer in self.decoder.layers]

    def decode(self, ids: Tensor, mask: Tensor, caches: list[LayerCache], first: int = 0) -> Tensor:
        """ids (B * beam, T) at positions first, first + 1, ... -> states (B * beam, T, C)."""
        T = ids.shape[1]  # one of them attends to all before it; of several each to itself and those before
        causal = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril() if T > 1 else None
        x = self.decoder.embed(ids, first)
        for layer, cache in zip(self.decoder.layers, caches):
            x = layer(x, mask, causal, cache)
        return self.decoder.layer_norm(x)

    def forward(self, text: Tensor, previous: Tensor) -> Tensor:
        """text (B, S); </s> and the units so far (B, T) -> logits (B, T, V) of what comes after each."""
        return self.decoder.output_projection(self.decode(previous, *self.encode(text)))

    def losses(
        self,
        text: Tensor,
        target: Tensor,
        smoothing: float = 0.1,
        noise: float = 0.0,
        guide: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(sum of the label-smoothed losses, sum of -log p, number of targets) for target (B, T): units,
        </s>, padding. The wanted distribution has 1 - smoothing on the target and the rest on all others in
        equal parts, as fairseq's (torch's own gives a part of the rest to the target, too). `noise`: fraction
        of the units before that are hidden (as <unk>), so that the text must be read to guess the next.
        `guide` (B, T, S): what it costs to look from a unit at a piece, for half of the heads."""
        previous = F.pad(target[:, :-1], (1, 0), value=Vocabulary.eos)
        if noise:
            previous = previous.masked_fill(
                torch.rand(previous.shape, device=text.device) < noise, Vocabulary.unk
            )
        real = target.ne(Vocabulary.pad)
        mask, caches = self.encode(text)
        for cache in caches if guide is not None else ():
            cache.seen = []
        states = self.decode(previous, mask, caches)[real]  # (n, C)
        log_p = self.decoder.output_projection(states).float().log_softmax(1)  # (n, V)
        plain = F.nll_loss(log_p, target[real], reduction="sum")
        others = -log_p.sum() - plain
        smoothed = (1 - smoothing) * plain + smoothing / (log_p.shape[1] - 1) * others
        if guide is not None:
            for weights in (cache.seen[0] for cache in caches):
                half = weights[:, : -(-weights.shape[1] // 2)].float()
                smoothed = smoothed + (half.mean(1) * guide).sum() / len(caches)
        return smoothed, plain.detach(), real.sum()

    @torch.inference_mode()
    def generate(self, texts: list[str], search: "Search | None" = None, batch: int = 32) -> list[list[int]]:
        """The units of each text, none twice in a row, `batch` texts at a time; an empty text has none.
        ValueError for one of more than max_source pieces. The model should be in eval mode."""
        ids = [self.vocabulary.encode(text) for text in texts]
        for text, row in zip(texts, ids):
            if len(row) > self.config.max_source:
                most = self.config.max_source
                raise ValueError(f"a text of {len(row)} pieces, at most {most} fit; split {show(text[:40])}")
        units: list[list[int]] = [[] for _ in texts]
        order = [i for i in sorted(range(len(ids)), key=lambda i: len(ids[i])) if len(ids[i]) > 1]
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]  # of similar lengths
            found = beam_search(self, [ids[i] for i in chosen], search or Search())
            for i, row in zip(chosen, found):
                units[i] = self.vocabulary.to_units(row)
        return units

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_model(folder, dict(self.named_parameters()))
        if rank() == 0:
            self.vocabulary.save(folder)
            write_json(folder / "config.json", {"model_type": MODEL_TYPE, **dataclasses.asdict(self.config)})

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str | None = None) -> "TextToUnit":
        """Our folder, or one with fairseq's text2unit.pt, as released, spm.model and the dictionaries.
        ValueError or OSError, one line, for anything else."""
        folder = Path(folder)
        ours = (folder / "config.json").exists()
        path = folder / ("config.json" if ours else "text2unit.pt")
        config, tensors = read_ours(path) if ours else read_fairseq(path)
        vocabulary = Vocabulary.from_pretrained(folder)
        with one_line(path), torch.device("meta"):  # takes neither time nor memory
            model = cls(config, vocabulary)
        for side, symbols in (("encoder", vocabulary.text), ("decoder", vocabulary.units)):
            rows = len(tensors.get(f"{side}.embed_tokens.weight", symbols))
            if rows != len(symbols):
                raise ValueError(
                    f"{folder}: {side}.embed_tokens has {rows} rows, its dictionary {len(symbols)} symbols; "
                    "one of the two is another model's"
                )
        checkpoint.assign(model, tensors, path, torch.float32, device)
        return model.eval()


# ---- Beam search -------------------------------------------------------------------------------------------


class Search(NamedTuple):
    """Defaults: what the released generator is run with. A beam of 1 is greedy search."""

    beam: int = 5
    max_len_a: float = 0.0  # at most max_len_a * pieces + max_len_b units
    max_len_b: int = 1000
    penalty: float = 1.0  # hypotheses are compared by log p / length ** penalty


def beam_search(model: TextToUnit, texts: list[list[int]], search: Search) -> list[list[int]]:
    """Texts as ids -> the best row of ids for each, without </s>.

    A step extends the `beam` hypotheses of each text by every symbol, and looks at the 2 * beam best; at most
    `beam` of them end. Those that end and are among the first `beam` are finished; the first `beam` of the
    others go on. A text is done when it has `beam` finished ones, or at its limit, where all must end. None
    is empty. A text that is done leaves the batch; what else is in it changes nothing."""
    beam, pad, eos = search.beam, Vocabulary.pad, Vocabulary.eos
    assert beam >= 1 and search.max_len_b >= 1, f"{search}: a beam and a limit of at least 1"
    device = model.decoder.embed_tokens.weight.device
    limits = [int(search.max_len_a * len(text)) + search.max_len_b for text in texts]
    limit = torch.tensor(limits, device=device).clamp(max=model.config.max_target - 1)  # (B,)
    rows = [torch.tensor(text, device=device) for text in texts]
    mask, caches = model.encode(nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad))
    ids = torch.full((len(texts) * beam, 1), eos, device=device)  # what the decoder begins with
    scores = torch.full((len(texts), beam), -math.inf, device=device)  # log p of each hypothesis
    scores[:, 0] = 0  # at first all are the same, and only one counts
    ranks = torch.arange(2 * beam, device=device)
    left = list(range(len(texts)))  # texts that are not done
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in texts]

    step = 0
    while left:
        states = model.decode(ids[:, -1:], mask, caches, step)[:, 0]  # (B * beam, C)
        log_p = model.decoder.output_projection(states).float().log_softmax(1).unflatten(0, (-1, beam))
        log_p[:, :, pad] = -math.inf
        if step == 0:
            log_p[:, :, eos] = -math.inf
        log_p[limit <= step, :, :eos] = -math.inf
        log_p[limit <= step, :, eos + 1 :] = -math.inf

        V = log_p.shape[2]
        best, index = (scores[:, :, None] + log_p).flatten(1).topk(2 * beam)  # (B, 2 * beam), best first
        row = index // V + beam * torch.arange(len(left), device=device)[:, None]
        symbol = index % V
        ends = symbol == eos
        for i, j in (ends & best.isfinite())[:, :beam].nonzero().tolist():
            if len(finished[left[i]]) < beam:
                score = best[i, j].item() / (step + 1) ** search.penalty  # </s> counts
                finished[left[i]].append((score, ids[row[i, j], 1:].tolist()))

        full = torch.tensor([len(finished[text]) == beam for text in left], device=device)
        going = (~full & (limit > step)).nonzero()[:, 0]
        kept = (2 * beam * ends + ranks).argsort(1)[going, :beam]  # those that do not end, in their order
        scores = best[going].gather(1, kept)
        row = row[going].gather(1, kept).flatten()
        symbol = symbol[going].gather(1, kept).flatten()
        ids = torch.cat([ids[row], symbol[:, None]], dim=1)
        for cache in caches:
            cache.select(going, row)
        mask = mask[going]
        limit = limit[going]
        left = [left[i] for i in going.tolist()]
        step += 1
    if not all(finished):
        raise ValueError(
            "the text-to-unit generator computes no numbers; its weights contain NaN or infinity"
        )
    return [max(hypotheses, key=lambda one: one[0])[1] for hypotheses in finished]


# ---- Vocabulary --------------------------------------------------------------------------------------------

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
FILES = ("spm.model", "dict.en.txt", "dict.unit.txt")
MAX_BYTES = 16 << 20  # of each; the released ones have 0.4 and 0.1 MB


class Vocabulary:
    """Text -> ids of the encoder; units <-> ids of the decoder."""

    bos, pad, eos, unk = range(4)

    def __init__(self, spm: bytes, text: list[str], units: list[str]):
        """spm: sentencepiece's model; text, units: the symbols of both sides, from id 4 on."""
        self.spm = spm
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=spm)
        self.text = {symbol: i for i, symbol in enumerate((*SPECIAL, *text))}
        self.units = {symbol: i for i, symbol in enumerate((*SPECIAL, *units))}
        numbers = {i: re.fullmatch("<(0|[1-9][0-9]{0,8})>", symbol) for symbol, i in self.units.items()}
        self.unit_of = {i: int(number[1]) for i, number in numbers.items() if number}
        self.id_of = {unit: i for i, unit in self.unit_of.items()}
        if not self.unit_of:
            raise ValueError(f"{FILES[2]} has no units <0> <1> ...")

    @classmethod
    def new(cls, spm: bytes, n_units: int) -> "Vocabulary":
        """All pieces of a sentencepiece model on one side, n_units units on the other."""
        sp = sentencepiece.SentencePieceProcessor(model_proto=spm)
        pieces = [sp.id_to_piece(i) for i in range(len(sp)) if not sp.is_control(i) and not sp.is_unknown(i)]
        return cls(spm, pieces, [f"<{unit}>" for unit in range(n_units)])

    def encode(self, text: str) -> list[int]:
        """Ids of the pieces of `text`, and </s>."""
        text.encode()  # half a surrogate pair (from a command line) is a ValueError here, not deep in C++
        return [self.text.get(piece, self.unk) for piece in self.sp.encode(text, out_type=str)] + [self.eos]

    def from_units(self, units: list[int]) -> list[int]:
        """Ids of `units`, and </s>."""
        return [self.id_of[unit] for unit in units] + [self.eos]

    def to_units(self, ids: list[int]) -> list[int]:
        """Units of `ids`, none twice in a row. A joint dictionary has pieces of text, too: left out."""
        return [unit for unit, _ in groupby(self.unit_of[i] for i in ids if i in self.unit_of)]

    def save(self, folder: Path) -> None:
        write_atomic(folder / FILES[0], self.spm)
        for name, symbols in zip(FILES[1:], (self.text, self.units)):
            lines = [f"{symbol} 1\n" for symbol in list(symbols)[len(SPECIAL) :]]
            write_atomic(folder / name, "".join(lines).encode())

    @classmethod
    def from_pretrained(cls, folder: Path) -> "Vocabulary":
        contents = []
        for name in FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is missing; {', '.join(FILES)} belong to the weights"
                )
            with open(folder / name, "rb") as file:
                contents.append(file.read(MAX_BYTES + 1))
            if len(contents[-1]) > MAX_BYTES:
                raise ValueError(f"{folder / name} is over {MAX_BYTES >> 20} MiB, too large for such a file")
        with one_line(folder / FILES[1]):
            text = read_dictionary(contents[1])
        with one_line(folder / FILES[2]):
            units = read_dictionary(contents[2])
        with one_line(folder):
            return cls(contents[0], text, units)


def read_dictionary(data: bytes) -> list[str]:
    """The symbols of a fairseq dictionary, "symbol count" in each line."""
    symbols = dict.fromkeys(SPECIAL)
    for number, line in enumerate(data.decode("utf-8").removesuffix("\n").split("\n"), 1):
        symbol, _, count = line.removesuffix("\r").rpartition(" ")
        if not symbol or not re.fullmatch("[0-9]{1,18}", count) or symbol in symbols:
            raise ValueError(f'line {number} is not "symbol count", or the symbol was there before')
        symbols[symbol] = None
    return list(symbols)[len(SPECIAL) :]


# ---- Weights and settings: ours, and fairseq's -------------------------------------------------------------

MODEL_TYPE = "text_to_unit"

NAMES = {  # fairseq's tensors, as patterns, that are called otherwise here; "": these are no weights
    r"(encoder|decoder)\.version": "",
    r"(encoder|decoder)\.embed_positions\._float_tensor": "",
    r"decoder\.embed_out": "decoder.output_projection.weight",  # in older versions
}
STACK = {  # fairseq's setting, after encoder_ and decoder_: ours
    "embed_dim": "dim",
    "ffn_embed_dim": "ffn_dim",
    "layers": "n_layers",
    "attention_heads": "n_heads",
    "normalize_before": "pre_norm",
}
SETTINGS = {
    "share_all_embeddings": "share_embeddings",
    "share_decoder_input_output_embed": "share_output",
    "layernorm_embedding": "norm_embeddings",
    "activation_fn": "activation",
    "dropout": "dropout",
    "max_source_positions": "max_source",
    "max_target_positions": "max_target",
}
# Settings of fairseq's transformers begin so. One that is on, and is neither above nor without effect on what
# a trained model computes, is refused: it asks for something that is not here.
OF_MODELS = (
    r"(encoder|decoder|share|layernorm|activation|adaptive|cross|tie|scale|char|no_(token|cross|decoder))_"
)
WITHOUT_EFFECT = (
    r"(encoder|decoder)_(layerdrop|embed_path)|activation_dropout|adaptive_softmax_(dropout|factor)"
)


def read_ours(path: Path) -> tuple[TextToUnitConfig, dict[str, Tensor]]:
    table = read_json(path)
    if not isinstance(table, dict) or table.pop("model_type", None) != MODEL_TYPE:
        raise ValueError(f'{path}: not a text-to-unit generator; its "model_type" is not "{MODEL_TYPE}"')
    return load(TextToUnitConfig, table, str(path)), checkpoint.read_tensors(path.parent)


def read_fairseq(path: Path) -> tuple[TextToUnitConfig, dict[str, Tensor]]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} holds neither config.json nor fairseq's {path.name}")
    tensors = {}
    for name, tensor in checkpoint.read_tensors(path).items():
        for pattern, ours in NAMES.items():
            if re.fullmatch(pattern, name):
                name = ours
        if name:
            tensors[name] = tensor
    saved = checkpoint.read_checkpoint(path)
    with one_line(path):
        tables = [saved.get("args"), saved.get("cfg")]  # older versions of fairseq, newer ones
        tables += [table.get("model") for table in tables if isinstance(table, dict)]
        settings = next((t for t in tables if isinstance(t, dict) and "encoder_layers" in t), None)
        if settings is None:
            raise ValueError(
                'neither "args" nor "cfg" has the settings of a Transformer (encoder_layers, ...)'
            )
        return load(TextToUnitConfig, translate(settings), "settings"), tensors


def translate(settings: dict) -> dict:
    """fairseq's settings -> the table of a TextToUnitConfig."""
    table: dict = {ours: settings[theirs] for theirs, ours in SETTINGS.items() if theirs in settings}
    table["share_output"] = table.get("share_output", False) or table.get("share_embeddings", False)
    table["scale_embeddings"] = not settings.get("no_scale_embedding", False)
    read = set(SETTINGS)
    for side in ("encoder", "decoder"):
        names = {f"{side}_{theirs}": ours for theirs, ours in STACK.items()}
        if missing := names.keys() - settings.keys():
            raise ValueError(f"its setting {min(missing)} is missing")
        table[side] = {ours: settings[theirs] for theirs, ours in names.items()}
        read |= names.keys()
    for name in ("decoder_input_dim", "decoder_output_dim"):  # else there are matrices in between
        if settings.get(name) == settings["decoder_embed_dim"]:
            read.add(name)
    for name, value in settings.items():
        if (
            re.match(OF_MODELS, name)
            and name not in read
            and not re.fullmatch(WITHOUT_EFFECT, name)
            and value
        ):
            raise ValueError(f"its setting {show(name)} = {show(value)} asks for what is not implemented")
    return table

"""The language model: a LLaMA decoder over text pieces and speech units (SpeechGPT §4.1-4.2, eq. 1-4).

To the decoder a discrete speech unit is one more token. Expanding the vocabulary V of the text model by the
unit tokens V' (eq. 1) adds rows to the embedding and to the output layer and keeps the old ones (eq. 2). All
else is LLaMA unchanged: the released LLaMA and SpeechGPT weights load here, ours load in `transformers`.

    ids (B, T) -> embed_tokens -> n_layers x [ x + attention(norm(x)) ; x + mlp(norm(x)) ] -> norm -> lm_head

References: Touvron et al. 2023, arXiv:2302.13971 (LLaMA); Su et al. 2021, arXiv:2104.09864 (RoPE);
Shazeer 2020, arXiv:2002.05202 (SwiGLU); Zhang & Sennrich 2019, arXiv:1910.07467 (RMSNorm).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from config import Limits, Size
from files import write_json
from llama_formats import Matrix, read_folder, to_hugging_face
from packed import Mask, PackedRows, within_documents
from run import rank

Maybe = Tensor | None  # an argument that may be left out


@dataclass
class LlamaConfig:
    vocab_size: Annotated[int, Limits(1, 2**24)]
    dim: Size
    n_layers: Annotated[int, Limits(1, 1000)]
    n_heads: Size
    hidden_dim: Annotated[int, Limits(1, 2**20)]  # inner width of the SwiGLU
    n_kv_heads: Size | None = None  # fewer than n_heads: grouped-query attention; None: as many
    norm_eps: Annotated[float, Limits(1e-12, 1)] = 1e-6
    rope_theta: Annotated[float, Limits(1, 1e12)] = 1e4
    max_len: Annotated[int, Limits(1, 2**22)] = 2048  # longest row trained on; longer ones run less well
    tie_embeddings: bool = False  # lm_head shares the matrix of embed_tokens

    def __post_init__(self):
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} must be an even multiple of n_heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


# ---- The decoder -------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # LLaMA's order: normalize in fp32, cast back, then multiply. It matters in half precision.
        x32 = x.float()
        mean_square = x32.square().mean(-1, keepdim=True)
        return (x32 * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight


Rope = tuple[Tensor, Tensor]  # cos and sin of the angles, each (B or 1, T, 1, head_dim)


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
    """cos and sin (B, T, 1, head_dim) for integer positions (B, T); sin carries the signs of `rotate`."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    inv_freq = 1.0 / theta**exponent  # (head_dim / 2,)
    angles = positions[:, :, None, None].float() * inv_freq  # (B, T, 1, head_dim / 2)
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turns each pair (a, b) = (x[j], x[j + head_dim / 2]) of x (B, T, heads, head_dim) by its position's
    angle: (a cos - b sin, b cos + a sin), RoPE in halves. Rolling by half the width swaps a and b."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.n_kv_heads != config.n_heads
        kv_dim = config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Rope, mask: Mask, cache: "LayerCache | None") -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q = rotate(q, rope).transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = rotate(k, rope).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = v.transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        if cache is not None:
            k, v = cache.append(k, v)  # all keys and values so far
        if isinstance(mask, PackedRows):
            y = mask.attend(q, k, v)
        else:
            # softmax(q k^T / sqrt(head_dim)) v. Without a mask a whole row is causal, and a single new token
            # attends to all that the cache holds.
            causal = mask is None and T > 1
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=self.grouped)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, n_heads * head_dim)
        return self.o_proj(y)


class SwiGLU(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rope: Rope, mask: Mask, cache: "LayerCache | None") -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        rows = torch.empty(config.vocab_size, config.dim)  # E, initialized by Llama
        self.embed_tokens = nn.Embedding.from_pretrained(rows, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)


class LayerCache:
    """Keys and values of one layer; the first `used` slots are filled."""

    def __init__(self, batch: int, n_kv_heads: int, head_dim: int, like: Tensor):
        self.k, self.v = like.new_zeros(2, batch, n_kv_heads, 0, head_dim).unbind(0)
        self.used = 0

    def reserve(self, slots: int) -> None:
        more = (0, 0, 0, slots - self.k.shape[2])
        self.k, self.v = F.pad(self.k, more), F.pad(self.v, more)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start = self.used
        self.used = start + k.shape[2]
        self.k[:, :, start : self.used] = k
        self.v[:, :, start : self.used] = v
        return self.k[:, :, : self.used], self.v[:, :, : self.used]


class Cache:
    """Static KV cache of a batch: memory for `length` tokens is reserved once, or for the first ROOM of them,
    and twice as much whenever these are full. Prompts of different lengths are padded on the left: row b has
    pad[b] slots first that no token may attend to, and its positions count from its first real token."""

    ROOM = 4096

    def __init__(self, config: LlamaConfig, batch: int, length: int, pad: Tensor | None, likes: list[Tensor]):
        self.length = length
        self.pad = pad if pad is not None and pad.any() else None  # None: no mask is needed
        self.layers = [LayerCache(batch, config.n_kv_heads, config.head_dim, like) for like in likes]
        self.device = likes[0].device
        self.angles = (config.head_dim, config.rope_theta, likes[0].dtype)
        self.reserve(min(length, self.ROOM))

    def reserve(self, slots: int) -> None:
        for layer in self.layers:
            layer.reserve(slots)
        positions = torch.arange(slots, device=self.device)[None]  # (1, slots)
        if self.pad is not None:
            positions = (positions - self.pad[:, None]).clamp(min=0)  # (B, slots)
        self.cos, self.sin = rope_table(positions, *self.angles)

    @property
    def used(self) -> int:
        return self.layers[0].used

    def rope(self, T: int) -> Rope:
        """The angles of the next T tokens."""
        end = self.used + T
        assert end <= self.length, f"{self.used} + {T} tokens in a cache of {self.length}"
        if end > self.cos.shape[1]:
            self.reserve(min(self.length, max(end, 2 * self.cos.shape[1])))
        return self.cos[:, self.used : end], self.sin[:, self.used : end]

    def mask(self, T: int, device: torch.device) -> Tensor | None:
        """(B or 1, 1, T, used + T), True where one of the next T tokens may attend; None: causal suffices."""
        if self.pad is None and (T == 1 or self.used == 0):
            return None
        queries = torch.arange(self.used, self.used + T, device=device)[:, None]
        keys = torch.arange(self.used + T, device=device)[None, :]
        allowed = (keys <= queries)[None]  # (1, T, used + T)
        if self.pad is not None:
            # A pad may attend to itself: a softmax over nothing is NaN, and NaN * 0 reaches the real tokens.
            allowed = allowed & ((keys >= self.pad[:, None, None]) | (keys == queries))
        return allowed[:, None]


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        # N(0, 0.02); matrices that write into the residual stream are scaled down as in GPT-2, so that its
        # variance at the start of training does not grow with depth.
        for name, p in self.named_parameters():
            if p.dim() == 2 and not p.is_meta:  # on meta there is nothing to draw, and 1.7 s to import
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layers) if into_residual else 0.02)
        self.tie()

    @property
    def device(self) -> torch.device:
        """Where ids are to be, and logits are; the layers may be elsewhere."""
        return self.model.embed_tokens.weight.device

    def tie(self) -> None:
        """With config.tie_embeddings lm_head and embed_tokens have one matrix: the latter's."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(
        self, ids: Tensor, positions: Maybe = None, docs: Maybe = None, cache: Cache | None = None
    ) -> Tensor:
        """ids (B, T) -> states after the final norm (B, T, C).

        docs (B, T): number of the document each token belongs to, for rows into which several were packed;
        attention is then causal and stays inside a document. With a cache the tokens are appended to it."""
        T = ids.shape[1]
        x = self.model.embed_tokens(ids)  # (B, T, C)
        # The angles and the mask are the same in every layer: computed once.
        if cache is None:
            if positions is None:
                # Also right for packed rows: RoPE depends only on differences of positions inside a document.
                positions = torch.arange(T, device=ids.device)[None]
            rope = rope_table(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
            mask = None if docs is None else within_documents(docs, x)
        else:
            assert positions is None and docs is None, "a cache counts positions itself, and has no documents"
            rope = cache.rope(T)
            mask = cache.mask(T, ids.device)
        for i, layer in enumerate(self.model.layers):
            device = layer.input_layernorm.weight.device
            if device != x.device:  # the layers may be spread over GPUs
                x = x.to(device)
                rope = (rope[0].to(device), rope[1].to(device))
                mask = None if mask is None else mask.to(device)
            x = layer(x, rope, mask, None if cache is None else cache.layers[i])
        return self.model.norm(x.to(ids.device))

    def forward(
        self, ids: Tensor, positions: Maybe = None, docs: Maybe = None, cache: Cache | None = None
    ) -> Tensor:
        """ids (B, T) -> logits (B, T, V) of the token that follows each one."""
        return self.lm_head(self.hidden(ids, positions, docs, cache))

    def new_cache(self, batch: int, length: int, pad: Tensor | None = None) -> Cache:
        """Room for `length` tokens of each of `batch` rows; pad (B,): how many of them are left padding."""
        E = self.model.embed_tokens.weight  # not of the layers: they may be divided among processes
        likes = [E.new_empty(0, device=layer.input_layernorm.weight.device) for layer in self.model.layers]
        return Cache(self.config, batch, length, pad, likes)

    @torch.no_grad()
    def resize_vocab(self, n: int) -> None:
        """Expands (or cuts) the vocabulary to n tokens, eq. 1: old rows stay, new ones ~ N(0, 0.02)."""
        for module in (self.model.embed_tokens, self.lm_head):
            old = module.weight  # E (|V|, d)
            keep = min(n, len(old))
            new = torch.empty(n, old.shape[1], dtype=old.dtype, device=old.device).normal_(std=0.02)
            new[:keep] = old[:keep]  # eq. 2: E'[0:|V|, :] = E
            module.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        self.model.embed_tokens.num_embeddings = n
        self.lm_head.out_features = n
        self.config.vocab_size = n
        self.tie()

    def save_pretrained(self, folder: str | Path, max_shard_size: int = 5_000_000_000) -> None:
        """Writes folder/config.json and folder/model.safetensors (with more bytes: several, and an index) in
        Hugging Face's layout. Called by all ranks if the model is divided among them."""
        write_hf(self, Path(folder), max_shard_size)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = None, device=None, int8: bool = False
    ) -> "Llama":
        """Reads a LLaMA folder in Hugging Face's layout (safetensors or .bin, sharded or not) or in Meta's.

        dtype: None is float32, whatever the file has. device: a torch.device or its name; over a list of them
        the layers are spread, all else is on the first. int8: the layers' matrices take a byte per weight.
        Works tensor by tensor: the peak of memory is the model and one matrix."""
        return load(Path(folder), dtype, device, int8)


def next_token_losses(
    model: Llama, ids: Tensor, mask: Tensor, positions: Maybe = None, docs: Maybe = None, weight: Maybe = None
) -> tuple[Tensor, Tensor]:
    """(sum of -w(token) log p(token | the tokens before it), sum of w(token)) over the targets, fp32 scalars.

    Targets are the tokens where mask (B, T) is True: all of them in eq. 3, those of the answer in eq. 4. The
    first token of a document is never one. weight (V,) is w, 1 without it. Logits are computed at the targets
    alone: with a vocabulary of 33,000 they would be the largest tensor of the step."""
    target = mask[:, 1:]
    if docs is not None:
        target = target & (docs[:, 1:] == docs[:, :-1])
    row, column = target.nonzero(as_tuple=True)  # (n targets,) each
    x = model.hidden(ids, positions, docs)[row, column]  # (n targets, C)
    logits = all_logits(model.lm_head, x).float()  # (n targets, V)
    tokens = ids[row, column + 1]
    loss_sum = F.cross_entropy(logits, tokens, weight, reduction="sum")  # eq. 3, eq. 4
    total = loss_sum.new_full((), len(row)) if weight is None else weight[tokens].sum()
    return loss_sum, total


def all_logits(lm_head: nn.Module, x: Tensor) -> Tensor:
    """x (n, C) -> logits (n, V). A GPU's fast kernels want rows of a multiple of 16 bytes: with 33,006 logits
    in bfloat16 an H200 multiplied at a third of its speed (LOG.md, 2026-11-27). So rows of zeros are added,
    and their logits left out."""
    rows = lm_head.out_features if isinstance(lm_head, nn.Linear) else 0  # 0: it has an adapter
    missing = -rows % 8
    if x.device.type != "cuda" or not missing:
        return lm_head(x)
    weight = F.pad(lm_head.weight, (0, 0, 0, missing))
    return F.linear(x, weight)[:, :rows]


def next_token_loss(
    model: Llama, ids: Tensor, mask: Tensor, positions: Maybe = None, docs: Maybe = None, weight: Maybe = None
) -> Tensor:
    """The weighted mean of `next_token_losses`."""
    loss_sum, total = next_token_losses(model, ids, mask, positions, docs, weight)
    return loss_sum / total.clamp(min=1e-9)  # no target: 0, with zero gradients


# ---- Weights on disk (llama_formats.py) --------------------------------------------------------------------


def write_hf(model: Llama, folder: Path, max_shard_size: int) -> None:
    """See Llama.save_pretrained."""
    tensors = model.state_dict()
    if model.config.tie_embeddings:
        del tensors["lm_head.weight"]
    for name in tensors:
        if "lora_" in name or name.endswith(".scale"):
            raise ValueError(f"{name}: only plain weights can be saved: lora.merge first, load without int8")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_model(folder, tensors, max_shard_size)
    if rank() == 0:
        write_json(folder / "config.json", to_hugging_face(model.config, model.model.norm.weight.dtype))


def open_folder(folder: Path) -> tuple[LlamaConfig, dict[str, Matrix]]:
    """The config of a LLaMA in `folder`, and the matrix of each of its parameters, none missing and none left
    over; numbers are not read yet."""
    config, matrices = read_folder(LlamaConfig, folder)
    with torch.device("meta"):  # takes neither time nor memory
        wanted = {name for name, _ in Llama(config).named_parameters()}  # a tied matrix once
    tied = matrices.pop("lm_head.weight", None) if config.tie_embeddings else None
    for name in sorted(wanted ^ matrices.keys()):
        raise ValueError(f"{folder}: {name} is {'missing' if name in wanted else 'no part of this LLaMA'}")
    if tied and not same(tied, matrices["model.embed_tokens.weight"]):
        raise ValueError(f"{folder}: lm_head.weight differs from the embedding that it is tied to")
    return config, matrices


def same(a: Matrix, b: Matrix) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a.parts, b.parts))


def load(folder: Path, dtype: torch.dtype | None, device, int8: bool) -> Llama:
    """See Llama.from_pretrained."""
    config, matrices = open_folder(folder)
    with torch.device("meta"):
        model = Llama(config)
    leaves = {f"{name}.weight": m for name, m in model.named_modules() if hasattr(m, "weight")}
    devices = device if isinstance(device, list) else [device]
    for name, matrix in matrices.items():
        leaf = leaves[name]
        in_layer = name.startswith("model.layers.")
        layer = int(name.split(".")[2]) if in_layer else 0
        where = devices[layer * len(devices) // config.n_layers]
        try:
            weight = matrix.whole()
        except (RuntimeError, IndexError):
            raise ValueError(f"{folder}: the pieces of {name} do not fit together") from None
        if not (int8 and in_layer and isinstance(leaf, nn.Linear)):
            checkpoint.assign(leaf, {"weight": weight}, f"{folder}: {name}", dtype, where)
            continue
        checkpoint.check_weight(f"{folder}: {name}", weight, leaf.weight)
        model.set_submodule(name.removesuffix(".weight"), Int8Linear(weight).to(where or "cpu"))
    return model.eval()


# ---- Ours: int8 -------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A frozen linear layer with one byte per weight: W[i, j] = scale[i] * weight[i, j]."""

    def __init__(self, W: Tensor):
        super().__init__()
        self.out_features, self.in_features = W.shape
        weight, scale = to_bytes(W)
        self.weight = nn.Parameter(weight, requires_grad=False)  # int8 (out_features, in_features)
        self.scale = nn.Parameter(scale, requires_grad=False)  # fp32 (out_features,)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:  # adapters before it learn
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            return Int8Product.apply(x, self.weight, self.scale)
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() <= 32 * self.in_features:
            # For a few rows torch has a kernel that multiplies the bytes as they are: 15 times faster than
            # first converting them, and twice as fast as a bf16 matrix. In a long prompt that hardly counts.
            flat = x.reshape(-1, self.in_features)
            y = torch._weight_int8pack_mm(flat, self.weight, self.scale.bfloat16())
            return y.view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)


def to_bytes(W: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, scale) of a matrix, or of some of its rows alone."""
    weight = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    scale = torch.empty(len(W), device=W.device)
    if W.is_meta:  # nothing to round: of 7B it would take ten seconds
        return weight, scale
    for rows, bytes_, steps in zip(W.split(64), weight.split(64), scale.split(64)):
        rows = rows.float()  # a few at a time: W stays in its file
        steps.copy_(rows.abs().amax(1).clamp(min=1e-12) / 127)
        bytes_.copy_((rows / steps[:, None]).round())
    return weight, scale


def to_int8(model: Llama) -> Llama:
    """Replaces the linear layers of the blocks by Int8Linear, in place; returns the model."""
    for name, layer in [*model.model.layers.named_modules()]:
        if isinstance(layer, nn.Linear):
            model.model.layers.set_submodule(name, Int8Linear(layer.weight.detach()))
    return model


class Int8Product(torch.autograd.Function):
    """The same, where x has a gradient: what is kept for it are the bytes, not the matrix made of them."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, scale = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype)) @ weight.to(gradient.dtype), None, None

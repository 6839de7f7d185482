"""The language model: a LLaMA decoder over text pieces and speech units (SpeechGPT §3.2, §4.2, eq. 1-4).

To the decoder a discrete speech unit is one more token. Growing the vocabulary from |V| text pieces to |V'|
adds rows to the embedding and to the output layer and keeps the old ones (eq. 1-2); everything else is LLaMA
untouched, so the released LLaMA and SpeechGPT weights load here and ours load in `transformers`.

    ids (B, T) -> embed_tokens -> n_layers x [ x + attention(norm(x)) ; x + mlp(norm(x)) ] -> norm -> lm_head

References: Touvron et al. 2023, arXiv:2302.13971 (LLaMA); Su et al. 2021, arXiv:2104.09864 (RoPE);
Shazeer 2020, arXiv:2002.05202 (SwiGLU); Zhang & Sennrich 2019, arXiv:1910.07467 (RMSNorm).

Modules bear the names of the released files (`model.layers.0.self_attn.q_proj.weight`): a Hugging Face folder
needs no key table. Meta's own layout does, see META_KEYS.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from files import read_json, write_json


@dataclass
class LlamaConfig:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    hidden_dim: int  # inner width of the SwiGLU
    n_kv_heads: int | None = None  # fewer than n_heads: grouped-query attention; None: as many
    norm_eps: float = 1e-6
    rope_theta: float = 1e4
    max_len: int = 2048  # longest row trained on; nothing but quality breaks beyond it
    tie_embeddings: bool = False  # lm_head shares the matrix of embed_tokens

    def __post_init__(self):
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        for name, value in vars(self).items():
            kind = {"norm_eps": int | float, "rope_theta": int | float, "tie_embeddings": bool}.get(name, int)
            most = 1000 if name == "n_layers" else 2**24
            if not isinstance(value, kind) or not (kind is bool or 0 < value <= most):
                raise ValueError(f"{name} = {value!r:.50} is impossible")
        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} must be an even multiple of n_heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # LLaMA's order: normalise in fp32, cast back, then multiply. It matters in half precision.
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B, T, 1, head_dim) for integer positions (B, T); sin carries the signs of `rotate`."""
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions[:, :, None, None].float() * inv_freq  # (B, T, 1, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[j], x[j + head_dim / 2]) by its position's angle: the half-split form of RoPE.
    Rolling by half the width swaps the halves: (a, b) -> (a cos - b sin, b cos + a sin)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.head_dim, self.grouped = c.head_dim, c.n_kv_heads != c.n_heads
        self.q_proj = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: "Tensor | Documents | None", kv: "LayerCache | None"
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, n_heads, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, n_kv_heads, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        if kv is not None:
            k, v = kv.append(k, v)  # all keys so far
        if isinstance(mask, Documents):
            y = mask.attend(q, k, v)
        else:
            # softmax(q k / sqrt(head_dim)) v. Without a mask: a whole row is causal, a single cached token sees all
            # that went before it.
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=self.grouped
            )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.up_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.down_proj = nn.Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU


class Block(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: "Tensor | Documents | None", kv: "LayerCache | None"
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, kv)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(c.vocab_size, c.dim), freeze=False)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(head_dim)) v, each token over itself and those before it; q (B, n_heads, T, head_dim), k and
    v (B, n_kv_heads, T, head_dim) -> as q.

    On a CPU it is spelled out: the gradient of torch's own takes six times as long in bfloat16 at 70 tokens, and
    three times at 190 (torch 2.13)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    heads, T = q.shape[1], q.shape[2]
    k, v = (
        x.repeat_interleave(heads // x.shape[1], 1).flatten(0, 1) for x in (k, v)
    )  # (B n_heads, T, head_dim)
    unseen = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(unseen, q.flatten(0, 1), k.mT, alpha=q.shape[3] ** -0.5)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, heads))


class Documents:
    """Attention inside each of the documents that were packed into rows, and nowhere else.

    Documents of about the same length are taken out of their rows and laid side by side, and put back afterwards.
    Scores of whole rows under a mask would cost as many times more as there are documents in a row (LOG.md)."""

    def __init__(
        self, docs: Tensor
    ):  # (B, T): neighbours with the same number are one document; below 0 is padding
        T, docs = docs.shape[1], docs.flatten()
        first = torch.ones_like(docs, dtype=torch.bool)  # (B T,): here begins something
        first[1:] = docs[1:] != docs[:-1]
        first[::T] = True
        starts = first.nonzero()[:, 0]
        lengths = torch.diff(starts, append=starts.new_tensor([len(docs)]))
        starts, lengths = starts[docs[starts] >= 0], lengths[docs[starts] >= 0]
        lengths, order = lengths.sort(descending=True)
        starts, sizes = starts[order], lengths.tolist()
        self.groups: list[Tensor] = []  # (documents, length): places in (B T)
        self.back, used, laid = torch.zeros_like(docs), 0, 0  # (B T,): and where each one went
        while used < len(sizes):
            end = next((i for i in range(used, len(sizes)) if sizes[i] < 0.7 * sizes[used]), len(sizes))
            ahead = torch.arange(sizes[used], device=docs.device)
            places = (
                starts[used:end, None] + ahead
            )  # beyond a document's end: all too late to be seen from within
            inside = ahead < lengths[used:end, None]
            self.back[places[inside]] = laid + inside.flatten().nonzero()[:, 0]
            self.groups.append(places.clamp(max=len(docs) - 1))
            used, laid = end, laid + inside.numel()

    def to(self, device: torch.device) -> "Documents":
        moved = object.__new__(Documents)
        moved.groups, moved.back = [places.to(device) for places in self.groups], self.back.to(device)
        return moved

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, n_heads, T, head_dim), k and v (B, n_kv_heads, T, head_dim) -> as q."""
        flat, out = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)], []  # (B T, heads, head_dim)
        for places in self.groups:
            rows = [
                x.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2) for x in flat
            ]
            out.append(causal_attention(*rows).transpose(1, 2).flatten(0, 1))
        return torch.cat(out).index_select(0, self.back).unflatten(0, (q.shape[0], -1)).transpose(1, 2)


class LayerCache:
    """Keys and values of one layer, in memory reserved once; `used` slots are filled."""

    def __init__(self, batch: int, n_kv_heads: int, length: int, head_dim: int, like: Tensor):
        self.k, self.v = like.new_zeros(2, batch, n_kv_heads, length, head_dim).unbind(0)
        self.used = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start, self.used = self.used, self.used + k.shape[2]
        self.k[:, :, start : self.used] = k
        self.v[:, :, start : self.used] = v
        return self.k[:, :, : self.used], self.v[:, :, : self.used]


class Cache:
    """Static KV cache of a batch. Prompts of different lengths are padded on the left: row b starts with
    pad[b] slots that no token may attend to, and its positions count from its first real token."""

    def __init__(self, c: LlamaConfig, batch: int, length: int, pad: Tensor | None, likes: list[Tensor]):
        self.length, self.pad = (
            length,
            pad if pad is not None and bool(pad.any()) else None,
        )  # None: the fast path
        self.layers = [LayerCache(batch, c.n_kv_heads, length, c.head_dim, like) for like in likes]
        slots = torch.arange(length, device=likes[0].device)[None]  # (1, length)
        positions = slots if self.pad is None else (slots - self.pad[:, None]).clamp(min=0)
        self.cos, self.sin = rope_table(positions, c.head_dim, c.rope_theta, likes[0].dtype)

    @property
    def used(self) -> int:
        return self.layers[0].used

    def mask(self, T: int, device: torch.device) -> Tensor | None:
        """(B or 1, 1, T, used + T), True where a new token may look; None: causal suffices."""
        if self.pad is None and (T == 1 or self.used == 0):
            return None
        queries = torch.arange(self.used, self.used + T, device=device)[:, None]
        keys = torch.arange(self.used + T, device=device)[None, :]
        seen = (keys <= queries)[None]  # (1, T, used + T)
        if self.pad is not None:
            # A pad may see itself: a softmax over nothing is NaN, and NaN * 0 would reach the real tokens.
            seen = seen & ((keys >= self.pad[:, None, None]) | (keys == queries))
        return seen[:, None]


class Int8Linear(nn.Module):
    """A linear layer for inference whose matrix takes a byte a number: W[i, j] = scale[i] * weight[i, j]."""

    def __init__(self, W: Tensor):
        super().__init__()
        self.out_features, self.in_features = W.shape
        self.register_buffer("weight", torch.empty(W.shape, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(len(W)))  # fp32 (out_features,)
        for rows, weight, scale in zip(W.split(64), self.weight.split(64), self.scale.split(64)):
            rows = rows.float()  # a few at a time: W stays in its file
            scale.copy_(rows.abs().amax(1).clamp(min=1e-12) / 127)
            weight.copy_((rows / scale[:, None]).round())

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() <= 32 * self.in_features:
            # For a few rows torch has a kernel that multiplies the bytes as they are: 15 times faster than first
            # converting them, and twice as fast as a bf16 matrix. For a long prompt the conversion no longer counts.
            y = torch._weight_int8pack_mm(x.reshape(-1, self.in_features), self.weight, self.scale.bfloat16())
            return y.view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)


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
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        docs: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """ids (B, T) -> states after the final norm (B, T, C).

        docs (B, T): number of the document each token belongs to, for rows into which several were packed;
        attention is then causal and stays inside a document. With a cache the tokens are appended to it."""
        T, c = ids.shape[1], self.config
        assert cache is None or positions is docs is None, (
            "a cache keeps its own positions, and has no documents"
        )
        x = self.model.embed_tokens(ids)
        # Cosines, sines and mask are the same in every layer: computed once.
        mask = None  # plain causal attention
        if docs is not None:
            mask = Documents(docs)
        if cache is not None:
            new = slice(cache.used, cache.used + T)
            assert new.stop <= cache.length, f"{cache.used} + {T} tokens in a cache of {cache.length}"
            mask, cos, sin = cache.mask(T, ids.device), cache.cos[:, new], cache.sin[:, new]
        else:
            if positions is None:
                # Also right for packed rows: RoPE sees only differences of positions inside a document.
                positions = torch.arange(T, device=ids.device)[None]
            cos, sin = rope_table(positions, c.head_dim, c.rope_theta, x.dtype)
        for i, layer in enumerate(self.model.layers):
            device = layer.input_layernorm.weight.device
            if device != x.device:  # the layers may be spread over GPUs
                x, cos, sin, mask = (t if t is None else t.to(device) for t in (x, cos, sin, mask))
            x = layer(x, cos, sin, mask, cache.layers[i] if cache is not None else None)
        return self.model.norm(x.to(ids.device))

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        docs: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """ids (B, T) -> logits (B, T, V) of the token that follows each one."""
        return self.lm_head(self.hidden(ids, positions, docs, cache))

    def new_cache(self, batch: int, length: int, pad: Tensor | None = None) -> Cache:
        """Room for `length` tokens of each of `batch` rows; pad (B,): how many of them are left padding."""
        return Cache(
            self.config, batch, length, pad, [layer.input_layernorm.weight for layer in self.model.layers]
        )

    @torch.no_grad()
    def resize_vocab(self, n: int) -> None:
        """Grows (or cuts) the vocabulary to n: the old rows of E stay (eq. 1-2), new ones ~ N(0, 0.02)."""
        for module in (self.model.embed_tokens, self.lm_head):
            old, keep = module.weight, min(n, module.weight.shape[0])
            weight = torch.empty(n, old.shape[1], dtype=old.dtype, device=old.device).normal_(std=0.02)
            weight[:keep] = old[:keep]
            module.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        self.model.embed_tokens.num_embeddings = self.lm_head.out_features = self.config.vocab_size = n
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes folder/config.json and folder/model.safetensors in Hugging Face's layout."""
        folder, dtype = Path(folder), self.model.norm.weight.dtype
        tensors = self.state_dict()
        if self.config.tie_embeddings:
            del tensors["lm_head.weight"]
        for name in tensors:
            if "lora_" in name or name.endswith(".scale"):
                raise ValueError(
                    f"{name}: only plain weights can be saved; lora.merge an adapter (or lora.save it), "
                    "and load without int8"
                )
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_tensors(folder / "model.safetensors", tensors)
        write_json(folder / "config.json", config_to_json(self.config, dtype))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | list | None = None,
        int8: bool = False,
    ) -> "Llama":
        """Reads a LLaMA folder in Hugging Face's layout (safetensors or .bin, single or sharded) or in Meta's.

        dtype: None is float32, whatever the file has. device: a list spreads the layers over several, and all else
        is on the first. int8: the layers' matrices become Int8Linear. Works tensor by tensor: the peak is the model
        and one matrix."""
        folder = Path(folder)
        config, tensors = read_hf(folder) if (folder / "config.json").exists() else read_meta(folder)
        with torch.device("meta"):  # takes neither time nor memory
            model = cls(config)
        leaves = {f"{name}.weight": m for name, m in model.named_modules() if hasattr(m, "weight")}
        if config.tie_embeddings:
            del leaves["lm_head.weight"]
            tensors.pop("lm_head.weight", None)
        for name in sorted(leaves.keys() ^ tensors.keys()):
            raise ValueError(
                f"{folder}: {name} is {'missing' if name in leaves else 'no part of this LLaMA'}"
            )
        devices = device if isinstance(device, list) else [device]
        for name, leaf in leaves.items():
            layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
            on = devices[0 if layer is None else layer * len(devices) // config.n_layers]
            try:
                weight = join(*tensors[name])
            except (RuntimeError, IndexError):
                raise ValueError(f"{folder}: the pieces of {name} do not fit together") from None
            if int8 and layer is not None and isinstance(leaf, nn.Linear):
                if weight.shape != leaf.weight.shape or not weight.is_floating_point():
                    raise ValueError(
                        f"{folder}: {name} is {list(weight.shape)}, {weight.dtype}; expected "
                        f"{list(leaf.weight.shape)}, of floating point"
                    )
                model.set_submodule(name.removesuffix(".weight"), Int8Linear(weight).to(on or "cpu"))
            else:
                checkpoint.assign(leaf, {"weight": weight}, f"{folder}: {name}", dtype, on)
        return model.eval()


def next_token_loss(
    model: Llama,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor | None = None,
    docs: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean -log p(token | the tokens before it) over the tokens where mask (B, T) is True: eq. 3 with all of
    them, eq. 4 with the answer's. The first token of a document is never a target. Logits are computed at the
    targets alone: with a 33,000-token vocabulary they would be the largest tensor of the step.

    `weight` (V,) is how much each token counts in the mean, 1 without it."""
    target = mask[:, 1:]
    if docs is not None:
        target = target & (docs[:, 1:] == docs[:, :-1])
    row, column = target.nonzero(as_tuple=True)
    h = model.hidden(ids, positions, docs)[row, column]  # (n targets, C)
    wanted = ids[row, column + 1]
    loss = F.cross_entropy(model.lm_head(h).float(), wanted, weight, reduction="sum")
    counted = len(row) if weight is None else weight[wanted].sum()
    return loss / counted if len(row) else loss  # no target: 0, with zero gradients


# ---- Hugging Face's folder -----------------------------------------------------------------------------------

CONFIG_KEYS = {  # theirs -> ours; the first five must be there
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "max_position_embeddings": "max_len",
    "tie_word_embeddings": "tie_embeddings",
}
ONLY = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_type": "default",
}  # what this file implements; other values are refused


def config_to_json(config: LlamaConfig, dtype: torch.dtype) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.02,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{theirs: getattr(config, ours) for theirs, ours in CONFIG_KEYS.items()},
    }


def config_from_json(table: dict, path: Path) -> LlamaConfig:
    """The config of a Hugging Face folder; a LLaMA of another kind than this file's is refused."""
    try:
        rope = table.get("rope_parameters") or table.get("rope_scaling") or {}  # transformers 5; before
        table = {"rope_type": rope.get("type"), **rope, **table}
        table = {key: value for key, value in table.items() if value is not None}
        for key, value in ONLY.items():
            if table.get(key, value) != value:
                raise ValueError(f"{key} is {table[key]!r:.50}; only {value!r} is supported")
        for theirs in list(CONFIG_KEYS)[:5]:
            if theirs not in table:
                raise ValueError(f"{theirs} is missing; is this the config of a LLaMA?")
        config = LlamaConfig(
            **{ours: table[theirs] for theirs, ours in CONFIG_KEYS.items() if theirs in table}
        )
        if table.get("head_dim", config.head_dim) != config.head_dim:
            raise ValueError(
                f"head_dim is {table['head_dim']!r:.50}; only hidden_size / num_attention_heads is supported"
            )
        return config
    except (AttributeError, TypeError) as e:  # no dict where one should be
        raise ValueError(f"{path}: not the config of a LLaMA ({e})") from None
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


Pieces = tuple[list[Tensor], int | None, int | None]  # the arguments of `join`


def read_hf(folder: Path) -> tuple[LlamaConfig, dict[str, Pieces]]:
    """Old files also hold the angles of RoPE, `rotary_emb.inv_freq`, at times rounded to bf16: left out, as
    rope_table computes them."""
    config = config_from_json(read_json(folder / "config.json"), folder / "config.json")
    return config, {
        name: ([tensor], None, None)
        for name, tensor in checkpoint.read_tensors(folder).items()
        if not name.endswith("rotary_emb.inv_freq")
    }


# ---- Meta's folder: params.json and consolidated.00.pth, consolidated.01.pth, ... ----------------------------

META_KEYS = {  # theirs -> ours, and the dimension along which the files share a matrix
    "tok_embeddings": ("model.embed_tokens", 1),
    "layers.*.attention_norm": ("model.layers.*.input_layernorm", None),  # None: each file has all of it
    "layers.*.attention.wq": ("model.layers.*.self_attn.q_proj", 0),
    "layers.*.attention.wk": ("model.layers.*.self_attn.k_proj", 0),
    "layers.*.attention.wv": ("model.layers.*.self_attn.v_proj", 0),
    "layers.*.attention.wo": ("model.layers.*.self_attn.o_proj", 1),
    "layers.*.ffn_norm": ("model.layers.*.post_attention_layernorm", None),
    "layers.*.feed_forward.w1": ("model.layers.*.mlp.gate_proj", 0),
    "layers.*.feed_forward.w2": ("model.layers.*.mlp.down_proj", 1),
    "layers.*.feed_forward.w3": ("model.layers.*.mlp.up_proj", 0),
    "norm": ("model.norm", None),
    "output": ("lm_head", 0),
}


def read_meta(folder: Path) -> tuple[LlamaConfig, dict[str, Pieces]]:
    """7B is one file, 13B two, 30B four, 65B eight: each belonged to a GPU that computed a slice of every product,
    some of its outputs (dimension 0 of the matrix is split) or of its inputs (dimension 1)."""
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files or not (folder / "params.json").exists():
        raise FileNotFoundError(
            f"{folder}: no LLaMA here: neither config.json nor params.json with consolidated.*.pth"
        )
    params, shards = (
        read_json(folder / "params.json"),
        [checkpoint.read_tensors(file) for file in files],
    )
    try:
        config = LlamaConfig(
            dim=params["dim"],
            n_layers=params["n_layers"],
            n_heads=params["n_heads"],
            n_kv_heads=params.get("n_kv_heads"),
            norm_eps=params["norm_eps"],
            rope_theta=params.get("rope_theta", 1e4),
            vocab_size=sum(len(shard["output.weight"]) for shard in shards),  # params.json says -1
            hidden_dim=sum(len(shard["layers.0.feed_forward.w1.weight"]) for shard in shards),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{folder}: not a LLaMA in Meta's layout ({type(e).__name__}: {e})") from None
    tensors = {}
    for theirs, (ours, dim) in META_KEYS.items():
        heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(theirs[-2:])
        for i in range(config.n_layers) if "*" in theirs else [0]:
            name = theirs.replace("*", str(i)) + ".weight"
            if lacking := [file for file, shard in zip(files, shards) if name not in shard]:
                raise ValueError(f"{lacking[0]}: {name} is missing")
            tensors[ours.replace("*", str(i)) + ".weight"] = [shard.pop(name) for shard in shards], dim, heads
    for file, shard in zip(files, shards):
        for name in shard.keys() - {"rope.freqs"}:  # angles, as above
            raise ValueError(f"{file}: {name!r:.100} is no part of a LLaMA")
    return config, tensors


def join(pieces: list[Tensor], dim: int | None, heads: int | None) -> Tensor:
    """One matrix in Hugging Face's layout. Meta's RoPE turns neighbouring rows (2j, 2j + 1) of a head, `rotate`
    turns (j, j + head_dim / 2): W_q and W_k with their rows in that order give the same scores, and adapters trained
    on the Hugging Face layout fit."""
    W = pieces[0] if dim is None else torch.cat(pieces, dim)
    if heads:
        W = W.view(heads, -1, 2, W.shape[1]).transpose(1, 2).reshape(W.shape)  # (2j, 2j + 1) -> (j, .. )
    return W

"""The language model: a LLaMA decoder over text pieces and speech units (SpeechGPT §3.2, §4.2, eq. 1-4).

To the decoder a discrete speech unit is one more token. Growing the vocabulary from |V| text pieces to |V'| adds
rows to the embedding and to the output layer and keeps the old ones (eq. 1-2); everything else is LLaMA
untouched, so the released LLaMA and SpeechGPT weights load here and ours load in `transformers`.

    ids (B, T) -> embed_tokens -> n_layers x [ x + attention(norm(x)) ; x + mlp(norm(x)) ] -> norm -> lm_head

References: Touvron et al. 2023, arXiv:2302.13971 (LLaMA); Su et al. 2021, arXiv:2104.09864 (RoPE);
Shazeer 2020, arXiv:2002.05202 (SwiGLU); Zhang & Sennrich 2019, arXiv:1910.07467 (RMSNorm).

Modules bear the names of the released files (`model.layers.0.self_attn.q_proj.weight`), so no key table is
needed for a Hugging Face folder.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint


@dataclass
class LlamaConfig:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    hidden_dim: int                 # inner width of the SwiGLU
    n_kv_heads: int | None = None   # fewer than n_heads: grouped-query attention; None: as many
    norm_eps: float = 1e-6
    rope_theta: float = 1e4
    max_len: int = 2048             # longest row trained on; nothing but quality breaks beyond it
    tie_embeddings: bool = False    # lm_head shares the matrix of embed_tokens

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
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
    """cos and sin (B, 1, T, head_dim) for integer positions (B, T); sin carries the signs of `rotate`."""
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions[:, None, :, None].float() * inv_freq             # (B, 1, T, head_dim / 2)
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None,
                kv: "LayerCache | None") -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)     # (B, n_heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)     # (B, n_kv_heads, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if kv is not None:
            k, v = kv.append(k, v)                                           # all keys so far
        # Without a mask: a whole row is causal, a single cached token sees all that went before it.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                           enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.up_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.down_proj = nn.Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))   # SwiGLU


class Block(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None,
                kv: "LayerCache | None") -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, kv)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)


class LayerCache:
    """Keys and values of one layer, in memory reserved once; `used` slots are filled."""

    def __init__(self, batch: int, n_kv_heads: int, length: int, head_dim: int, like: Tensor):
        self.k, self.v = like.new_zeros(2, batch, n_kv_heads, length, head_dim).unbind(0)
        self.used = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start, self.used = self.used, self.used + k.shape[2]
        self.k[:, :, start:self.used] = k
        self.v[:, :, start:self.used] = v
        return self.k[:, :, :self.used], self.v[:, :, :self.used]


class Cache:
    """Static KV cache of a batch. Prompts of different lengths are padded on the left: row b starts with
    pad[b] slots that no token may attend to, and its positions count from its first real token."""

    def __init__(self, layers: list[LayerCache], length: int, pad: Tensor | None):
        self.layers, self.length = layers, length
        self.pad = pad if pad is not None and bool(pad.any()) else None      # None: the fast path

    @property
    def used(self) -> int:
        return self.layers[0].used

    def positions(self, T: int, device: torch.device) -> Tensor:
        slots = torch.arange(self.used, self.used + T, device=device)[None]  # (1, T)
        return slots if self.pad is None else (slots - self.pad[:, None]).clamp(min=0)

    def mask(self, T: int, device: torch.device) -> Tensor | None:
        """(B or 1, 1, T, used + T), True where a new token may look; None: causal suffices."""
        if self.pad is None and (T == 1 or self.used == 0):
            return None
        queries = torch.arange(self.used, self.used + T, device=device)[:, None]
        keys = torch.arange(self.used + T, device=device)[None, :]
        seen = (keys <= queries)[None]                                       # (1, T, used + T)
        if self.pad is not None:
            # A pad may see itself: a softmax over nothing is NaN, and NaN * 0 would reach the real tokens.
            seen = seen & ((keys >= self.pad[:, None, None]) | (keys == queries))
        return seen[:, None]


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        # N(0, 0.02); matrices that write into the residual stream are scaled down as in GPT-2, so that its
        # variance at the start of training does not grow with depth.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layers) if into_residual else 0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, ids: Tensor, positions: Tensor | None = None, docs: Tensor | None = None,
               cache: Cache | None = None) -> Tensor:
        """ids (B, T) -> states after the final norm (B, T, C).

        docs (B, T): number of the document each token belongs to, for rows into which several were packed;
        attention is then causal and stays inside a document. With a cache the tokens are appended to it."""
        T, c = ids.shape[1], self.config
        assert cache is None or docs is None, "packed documents are for training, a cache for generation"
        x = self.model.embed_tokens(ids)
        # Positions, cosines and mask are the same in every layer: computed once.
        mask = None                                                          # plain causal attention
        if docs is not None:
            causal = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
            mask = ((docs[:, :, None] == docs[:, None, :]) & causal)[:, None]    # (B, 1, T, T)
        elif cache is not None:
            assert cache.used + T <= cache.length, f"{cache.used} + {T} tokens in a cache of {cache.length}"
            mask = cache.mask(T, ids.device)
            positions = cache.positions(T, ids.device) if positions is None else positions
        if positions is None:
            # Also right for packed rows: RoPE sees only differences of positions inside a document.
            positions = torch.arange(T, device=ids.device)[None]
        cos, sin = rope_table(positions, c.head_dim, c.rope_theta, x.dtype)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, mask, cache.layers[i] if cache is not None else None)
        return self.model.norm(x)

    def forward(self, ids: Tensor, positions: Tensor | None = None, docs: Tensor | None = None,
                cache: Cache | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V) of the token that follows each one."""
        return self.lm_head(self.hidden(ids, positions, docs, cache))

    def new_cache(self, batch: int, length: int, pad: Tensor | None = None) -> Cache:
        """Room for `length` tokens of each of `batch` rows; pad (B,): how many of them are left padding."""
        c, like = self.config, self.model.norm.weight
        layers = [LayerCache(batch, c.n_kv_heads, length, c.head_dim, like) for _ in self.model.layers]
        return Cache(layers, length, pad)

    @torch.no_grad()
    def resize_vocab(self, n: int) -> None:
        """Grows (or cuts) the vocabulary to n tokens: the old rows of E stay (eq. 1-2), new ones ~ N(0, 0.02)."""
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
        folder = Path(folder)
        tensors = {name: t for name, t in self.state_dict().items() if not is_tied(name, self.config)}
        foreign = [name for name in tensors if "lora_" in name]
        if foreign:
            raise ValueError(f"{foreign[0]}: the model carries an adapter: lora.merge or lora.save it")
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        dtype = self.model.norm.weight.dtype
        checkpoint.write_json(folder / "config.json", config_to_json(self.config, dtype))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None,
                        device: torch.device | str | None = None) -> "Llama":
        """Reads a Hugging Face LLaMA folder (single or sharded, safetensors or .bin)."""
        folder = Path(folder)
        path = folder / "config.json"
        config = config_from_json(checkpoint.read_json(path), path)
        with torch.device("meta"):                                          # no memory yet, no random numbers
            model = cls(config)
        tensors = {name: t for name, t in checkpoint.read_tensors(folder).items()
                   if not name.endswith("rotary_emb.inv_freq") and not is_tied(name, config)}
        if config.tie_embeddings:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        checkpoint.assign(model, tensors, str(folder), dtype, device)
        if config.tie_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.eval()


def next_token_loss(model: Llama, ids: Tensor, mask: Tensor, positions: Tensor | None = None,
                    docs: Tensor | None = None) -> Tensor:
    """Mean -log p(token | the tokens before it) over the tokens where mask (B, T) is True: eq. 3 with all of
    them, eq. 4 with the answer's. The first token of a document is never a target. Logits are computed at the
    targets alone: with a 33,000-token vocabulary they would be the largest tensor of the step."""
    target = mask[:, 1:]
    if docs is not None:
        target = target & (docs[:, 1:] == docs[:, :-1])
    h = model.hidden(ids, positions, docs)
    row, column = target.nonzero(as_tuple=True)
    logits = model.lm_head(h[row, column])                                   # (n targets, V)
    loss = F.cross_entropy(logits.float(), ids[row, column + 1], reduction="sum")
    return loss / max(len(row), 1)


# ---- Hugging Face's config.json ----------------------------------------------------------------------------

CONFIG_KEYS = {                     # theirs -> ours
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "hidden_dim",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "max_position_embeddings": "max_len",
    "tie_word_embeddings": "tie_embeddings",
}


def is_tied(name: str, config: LlamaConfig) -> bool:
    return config.tie_embeddings and name == "lm_head.weight"


def config_to_json(config: LlamaConfig, dtype: torch.dtype) -> dict:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.02,
            "torch_dtype": str(dtype).removeprefix("torch."),
            **{theirs: getattr(config, ours) for theirs, ours in CONFIG_KEYS.items()}}


def config_from_json(table: dict, path: Path) -> LlamaConfig:
    """The config of a Hugging Face folder; a LLaMA of another kind than this file's is refused."""
    rope = table.get("rope_parameters") or table.get("rope_scaling") or {}  # transformers >= 5, and before
    found = {
        "model_type": table.get("model_type", "llama"),
        "hidden_act": table.get("hidden_act", "silu"),
        "attention_bias": table.get("attention_bias", False),
        "mlp_bias": table.get("mlp_bias", False),
        "rope type": rope.get("rope_type", rope.get("type", "default")),
    }
    expected_values = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
                       "rope type": "default"}
    for key, expected in expected_values.items():
        if found[key] != expected:
            raise ValueError(f"{path}: {key} is {found[key]!r}; only {expected!r} is supported")
    values = {**rope, **table}
    missing = [k for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                           "intermediate_size") if k not in values]
    if missing:
        raise ValueError(f"{path}: no {missing[0]!r}; is this the config of a LLaMA?")
    config = LlamaConfig(**{ours: values[theirs] for theirs, ours in CONFIG_KEYS.items() if theirs in values})
    if table.get("head_dim") not in (None, config.head_dim):
        raise ValueError(f"{path}: head_dim is {table['head_dim']}; only hidden_size / num_attention_heads "
                         f"= {config.head_dim} is supported")
    return config

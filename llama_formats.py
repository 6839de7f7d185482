"""A LLaMA's weights in other people's formats: Hugging Face's folder and Meta's, by our names.

    Hugging Face   config.json, model.safetensors or pytorch_model.bin, one or several with an index
    Meta           params.json, consolidated.00.pth, consolidated.01.pth, ...: each a slice of every matrix

llama.py names its modules as Hugging Face does (`model.layers.0.self_attn.q_proj.weight`) and writes such
folders: of theirs only the config needs a table. A reader gets the class of config that it is to fill,
llama.LlamaConfig.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import checkpoint
from foreign import NO_DECODER, TRANSFORMERS, Keys, read_table, settings


class Matrix(NamedTuple):
    """A tensor of a checkpoint: views of memory maps, put together when it is asked for, whole or some rows.

    parts: the slices that the files have; dim: along which of its dimensions (None: the first is all of it);
    heads: of W_q and W_k in Meta's order, else 0. Meta's RoPE turns neighboring rows (2j, 2j + 1) of a head,
    ours (j, j + head_dim / 2): these matrices with their rows in that order give the same scores."""

    parts: list[Tensor]
    dim: int | None = None
    heads: int = 0

    @property
    def shape(self) -> torch.Size:
        shape = list(self.parts[0].shape)
        if self.dim is not None:
            shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return torch.Size(shape)

    def whole(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end) in Hugging Face's order: a view of one file, or as many numbers as there are.
        RuntimeError or IndexError if the parts do not fit together."""
        if self.dim is None or len(self.parts) == 1 and not self.heads:
            return self.parts[0][begin:end]
        if self.dim == 1:
            return torch.cat([part[begin:end] for part in self.parts], 1)
        theirs = torch.arange(self.shape[0])
        if self.heads:
            pairs = theirs.view(self.heads, -1, 2)  # (heads, head_dim / 2, 2)
            theirs = pairs.transpose(1, 2).flatten()
        theirs = theirs[begin:end]  # of our row begin + i: its number in the files
        found = self.parts[0].new_empty(end - begin, *self.parts[0].shape[1:])
        first = 0
        for part in self.parts:
            last = first + len(part)
            here = (theirs >= first) & (theirs < last)
            found[here] = part[theirs[here] - first]
            first = last
        return found


def read_folder(cls, folder: Path) -> tuple:
    """(a `cls`, {our name: a Matrix})."""
    read = read_hugging_face if (folder / "config.json").exists() else read_meta
    return read(cls, folder)


# ---- Hugging Face's folder ---------------------------------------------------------------------------------

CONFIG_KEYS = {  # theirs: ours
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
KIND = {"model_type": ("llama",), "hidden_act": ("silu", "swish")}  # what llama.py implements
FIXED = NO_DECODER | KIND | {"attention_bias": (False,), "mlp_bias": (False,)}
ROPE_TABLES = ("rope_scaling", "rope_parameters")  # before transformers 5, since
ROPE = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0,)}
KEYS = Keys(
    CONFIG_KEYS | {f"{table}.rope_theta": "rope_theta" for table in ROPE_TABLES},
    FIXED | {f"{table}.{key}": values for table in ROPE_TABLES for key, values in ROPE.items()},
    TRANSFORMERS + "pretraining_tp max_sequence_length max_length",
)


def to_hugging_face(config, dtype: torch.dtype) -> dict:
    kind = {"architectures": ["LlamaForCausalLM"]} | {key: values[0] for key, values in KIND.items()}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    weights = {"initializer_range": 0.02, "torch_dtype": str(dtype).removeprefix("torch.")}
    sizes = {theirs: getattr(config, ours) for theirs, ours in CONFIG_KEYS.items()}
    return kind | tokens | weights | sizes


def read_config(cls, path: Path):
    """The `cls` of a config.json; a LLaMA of another kind than llama.py's is refused."""
    table = read_table(path)
    head_dim = table.pop("head_dim", None)
    for name in ROPE_TABLES:
        if isinstance(table.get(name), dict):
            table |= {f"{name}.{key}": value for key, value in table.pop(name).items()}
    config = settings(cls, KEYS, table, path)
    if head_dim not in (None, config.head_dim):
        raise ValueError(f"{path}: head_dim is {head_dim!r:.50}, not hidden_size / num_attention_heads")
    return config


def read_hugging_face(cls, folder: Path) -> tuple:
    config = read_config(cls, folder / "config.json")
    matrices = {}
    for name, tensor in checkpoint.read_tensors(folder).items():
        if not name.endswith("rotary_emb.inv_freq"):  # angles of RoPE in old files: rope_table computes them
            matrices[name] = Matrix([tensor])
    return config, matrices


# ---- Meta's folder: params.json and consolidated.00.pth, consolidated.01.pth, ... --------------------------

META_KEYS = {  # theirs -> ours, and the dimension along which the files share a matrix; None: each has all
    "tok_embeddings": ("model.embed_tokens", 1),
    "layers.*.attention_norm": ("model.layers.*.input_layernorm", None),
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
META = Keys(
    {name: name for name in "dim n_layers n_heads n_kv_heads norm_eps rope_theta vocab_size".split()},
    {"use_scaled_rope": (False,)},
    "multiple_of ffn_dim_multiplier max_seq_len max_batch_size",  # the first two give hidden_dim: it is in W
)


def read_meta(cls, folder: Path) -> tuple:
    """7B is one file, 13B two, 30B four, 65B eight: each belonged to a GPU that computed a slice of every
    product, some of its outputs (dimension 0 of the matrix is split) or of its inputs (dimension 1)."""
    files = sorted(folder.glob("consolidated.*.pth"))
    path = folder / "params.json"
    if not files or not path.exists():
        raise FileNotFoundError(f"{folder}: no LLaMA: no config.json, nor params.json and consolidated.*.pth")
    shards = [checkpoint.read_tensors(file) for file in files]
    try:
        vocab_size = sum(len(shard["output.weight"]) for shard in shards)
        hidden_dim = sum(len(shard["layers.0.feed_forward.w1.weight"]) for shard in shards)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not a LLaMA in Meta's layout ({error!r:.100})") from None
    table = read_table(path)
    table = {key: value for key, value in table.items() if (key, value) != ("vocab_size", -1)}
    if "norm_eps" not in table:  # Meta's default is not ours
        raise ValueError(f"{path}: norm_eps is missing; is this a LLaMA in Meta's layout?")
    config = settings(cls, META, table, path, vocab_size=vocab_size, hidden_dim=hidden_dim)
    matrices = {}
    for theirs, (ours, dim) in META_KEYS.items():
        heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(theirs[-2:], 0)
        for i in range(config.n_layers) if "*" in theirs else [0]:
            name = theirs.replace("*", str(i)) + ".weight"
            for file, shard in zip(files, shards):
                if name not in shard:
                    raise ValueError(f"{file}: {name} is missing")
            parts = [shard.pop(name) for shard in shards]
            matrices[ours.replace("*", str(i)) + ".weight"] = Matrix(parts, dim, heads)
    for file, shard in zip(files, shards):
        for name in shard.keys() - {"rope.freqs"}:  # angles of RoPE, as in read_hugging_face
            raise ValueError(f"{file}: {name!r:.100} is no part of a LLaMA")
    return config, matrices

"""HuBERT's weights in other people's formats: fairseq's .pt and Hugging Face's folder, by our names.

    fairseq        one pickle of everything: "model" has the tensors, "args" or "cfg" the settings of training
    Hugging Face   config.json, model.safetensors or pytorch_model.bin, perhaps preprocessor_config.json

hubert.py names its modules as Hugging Face does and writes such folders. A reader gets the class of config
that it is to fill, hubert.HuBERTConfig.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import checkpoint
from config import load
from data.audio import RATE
from foreign import HUBERT_TRAINING, NO_DECODER, TRANSFORMERS, Keys, read_table, settings
from pickles import Inert

HEAD = r"final_proj\.|label_embs|target_glu\."  # of pre-training; not part of the encoder

FAIRSEQ = {  # fairseq's name, as a pattern: ours (the group norm is conv_layers.0.2, a layer norm .N.2.1)
    r"feature_extractor\.conv_layers\.(\d+)\.0\.": r"feature_extractor.conv_layers.\1.conv.",
    r"feature_extractor\.conv_layers\.(\d+)\.2\.(1\.)?": r"feature_extractor.conv_layers.\1.layer_norm.",
    r"layer_norm\.": "feature_projection.layer_norm.",
    r"post_extract_proj\.": "feature_projection.projection.",
    r"mask_emb$": "masked_spec_embed",
    r"encoder\.pos_conv\.0\.": "encoder.pos_conv_embed.conv.",
    r"encoder\.layers\.(\d+)\.self_attn\.": r"encoder.layers.\1.attention.",
    r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.": r"encoder.layers.\1.layer_norm.",
    r"encoder\.layers\.(\d+)\.fc1\.": r"encoder.layers.\1.feed_forward.intermediate_dense.",
    r"encoder\.layers\.(\d+)\.fc2\.": r"encoder.layers.\1.feed_forward.output_dense.",
}
HUGGING_FACE = {  # transformers' names are ours, but for weight norm as torch >= 2 spells it
    r"(encoder\.pos_conv_embed\.conv)\.parametrizations\.weight\.original0$": r"\1.weight_g",
    r"(encoder\.pos_conv_embed\.conv)\.parametrizations\.weight\.original1$": r"\1.weight_v",
}


def rename(tensors: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """Replaces the first pattern of the table that a name begins with; leaves out the prediction head."""
    renamed = {}
    for name, tensor in tensors.items():
        if not re.match(HEAD, name):
            pattern = next((p for p in table if re.match(p, name)), "")
            renamed[re.sub("^" + pattern, table.get(pattern, ""), name)] = tensor
    return renamed


# ---- Hugging Face ------------------------------------------------------------------------------------------

CONFIG_KEYS = {  # theirs: ours
    **{name: name for name in ("conv_dim", "conv_kernel", "conv_stride", "conv_bias")},
    "feat_extract_norm": "extractor_norm",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "ffn_dim",
    "do_stable_layer_norm": "pre_norm",
    "num_conv_pos_embeddings": "pos_kernel",
    "num_conv_pos_embedding_groups": "pos_groups",
    "normalize": "standardize_wav",  # ours alone: theirs is in preprocessor_config.json
}
FIXED = {  # what hubert.py implements
    "model_type": ("hubert",),
    "hidden_act": ("gelu",),
    "feat_extract_activation": ("gelu",),
    "layer_norm_eps": (1e-5,),
    "feat_proj_layer_norm": (True,),
    "conv_pos_batch_norm": (False,),
}
KEYS = Keys(CONFIG_KEYS, NO_DECODER | FIXED, TRANSFORMERS + HUBERT_TRAINING)
PREPROCESSOR_KEYS = Keys(
    {"do_normalize": "do_normalize"},
    {"sampling_rate": (RATE,), "feature_size": (1,)},
    "feature_extractor_type processor_class padding_side padding_value return_attention_mask",
)


@dataclass
class Preprocessor:
    """preprocessor_config.json."""

    do_normalize: bool = True


def to_hugging_face(config) -> dict:
    table = {"architectures": ["HubertModel"], "num_feat_extract_layers": len(config.conv_dim)}
    table |= {key: values[0] for key, values in FIXED.items()}
    return table | {theirs: getattr(config, ours) for theirs, ours in CONFIG_KEYS.items()}


def read_hugging_face(cls, folder: Path) -> tuple:
    """(a `cls`, tensors by our names)."""
    table = read_table(folder / "config.json")
    config = settings(cls, KEYS, table, folder / "config.json")
    path = folder / "preprocessor_config.json"
    if path.exists():
        asked = settings(Preprocessor, PREPROCESSOR_KEYS, read_table(path), path).do_normalize
        # A base model, with its group norm, is nearly indifferent, and what mHuBERT's file asks for is wrong.
        if "normalize" not in table and config.extractor_norm == "layer":
            config.standardize_wav = asked
    return config, rename(checkpoint.read_tensors(folder), HUGGING_FACE)


# ---- fairseq -----------------------------------------------------------------------------------------------

# Of the hundreds of settings that it stores: those that change the encoder and do not show in its tensors.
ONLY = {
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "pos_conv_depth": 1,
    "conv_pos_batch_norm": False,
}
ONLY |= {"pos_enc_type": "abs", "sample_rate": RATE}


def read_fairseq(cls, path: Path) -> tuple:
    """(a `cls`, tensors by our names). Sizes come from the tensors, the rest from the settings that fairseq
    stored with them; without any from the recipes of base (group norm) and large (layer norms), whose heads
    are 64 wide."""
    tensors = rename(checkpoint.read_tensors(path), FAIRSEQ)
    saved = checkpoint.read_checkpoint(path)
    stored = saved.get("cfg") if isinstance(saved.get("cfg"), dict) else {}
    found = {}
    for table in (saved.get("args"), stored.get("model"), stored.get("task")):
        found |= table if isinstance(table, dict) else {}
    large = "feature_extractor.conv_layers.1.layer_norm.weight" in tensors
    try:
        for key, value in ONLY.items():
            known = found.get(key, value)
            if (known.args or (None,))[0] != value if isinstance(known, Inert) else known != value:
                raise ValueError(f"{key} is {known!r:.50}; only {value!r} is implemented")
        convs = [tensors[f"feature_extractor.conv_layers.{i}.conv.weight"].shape for i in range(7)]
        dim, per_group, kernel = tensors["encoder.pos_conv_embed.conv.weight_v"].shape
        sizes = {
            "conv_dim": [c[0] for c in convs],
            "conv_kernel": [c[2] for c in convs],
            "conv_stride": strides(found.get("conv_feature_layers", DEFAULT_CONVS)),
            "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in tensors,
            "extractor_norm": "layer" if large else "group",
            "dim": dim,
            "n_layers": len({name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")}),
            "n_heads": found.get("encoder_attention_heads", dim // 64),
            "ffn_dim": tensors["encoder.layers.0.feed_forward.intermediate_dense.weight"].shape[0],
            "pre_norm": found.get("layer_norm_first", large),
            "pos_kernel": kernel,
            "pos_groups": dim // per_group,
            "standardize_wav": found.get("normalize", large),
        }
        config = load(cls, sizes, "its settings")
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as problem:
        raise ValueError(f"{path}: not a HuBERT of fairseq ({problem})") from None
    return config, tensors


DEFAULT_CONVS = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"


def strides(convs: str) -> list[int]:
    """The third number of each layer in fairseq's conv_feature_layers, lists like DEFAULT_CONVS."""
    found = []
    for part in str(convs).replace(" ", "").split("+"):
        match = re.fullmatch(r"\[((?:\(\d+,\d+,\d+\),?)+)\](?:\*(\d))?", part)
        if not match:
            raise ValueError(f"conv_feature_layers cannot be {convs!r:.50}")
        found += [int(n) for n in re.findall(r"(\d+)\)", match[1])] * int(match[2] or 1)
    return found

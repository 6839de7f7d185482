"""Other people's settings: a JSON table whose every key is known, of its type and within its limits.

A config.json says what the weights beside it mean. A key that changes what is computed, read as if it did
not, gives a model that runs and is wrong; so a reader lists the keys that it knows, and all others are
refused by name:

    keys = Keys({"hidden_size": "dim"}, {"hidden_act": ("silu",)}, "torch_dtype use_cache")
    settings(LlamaConfig, keys, read_table(path), path)

A value goes into a field of a dataclass, whose type and limits (config.py) are checked before anything is
built from it. null and {} count as absent, as in transformers and peft.
"""

import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import NamedTuple

from config import coerce
from files import one_line, read_json, show


class Keys(NamedTuple):
    """What is known of a table. A key of another name, or a fixed one of another value, is refused."""

    read: dict[str, str]  # their name: our field
    fixed: dict[str, tuple]  # their name: the values that mean what is implemented here, the usual one first
    ignored: str  # names of keys that change nothing that is computed here


# Of any config.json of transformers. Dropout acts in training only, where it is this project's own; the ids
# of special tokens are those of tokenizer.model.
TRANSFORMERS = (
    "_name_or_path _commit_hash architectures transformers_version torch_dtype dtype initializer_range "
    "use_cache output_attentions output_hidden_states return_dict bos_token_id eos_token_id pad_token_id "
    "gradient_checkpointing attention_dropout id2label label2id num_labels problem_type finetuning_task "
    "tokenizer_class task_specific_params attn_implementation _attn_implementation torchscript use_bfloat16 "
    "chunk_size_feed_forward "
)
HUBERT_TRAINING = (
    "num_feat_extract_layers activation_dropout feat_extract_dropout feat_proj_dropout final_dropout "
    "feat_quantizer_dropout hidden_dropout hidden_dropout_prob layerdrop apply_spec_augment vocab_size "
    "mask_time_length mask_time_min_masks mask_time_min_space mask_time_other mask_time_prob "
    "mask_time_selection mask_channel_length mask_channel_min_space mask_channel_other mask_channel_prob "
    "mask_channel_selection mask_feature_length mask_feature_min_masks mask_feature_prob "
    "no_mask_time_overlap no_mask_channel_overlap freeze_feat_extract_train codevector_dim num_negatives "
    "contrastive_logits_temperature diversity_loss_weight num_codevector_groups num_codevectors_per_group "
    "proj_codevector_dim ctc_loss_reduction ctc_zero_infinity use_weighted_layer_sum classifier_proj_size "
)
VOCODER_TRAINING = (
    "num_gpus batch_size learning_rate adam_b1 adam_b2 lr_decay seed segment_size num_mels num_freq n_fft "
    "hop_size win_size dur_prediction_weight fmin fmax fmax_for_loss num_workers dist_config input_wavs_dir "
    "input_training_file input_validation_file"
)
NO_DECODER = {"is_decoder": (False,), "is_encoder_decoder": (False,), "add_cross_attention": (False,)}


def read_table(path: Path) -> dict:
    table = read_json(path)
    if not isinstance(table, dict):
        raise ValueError(f"{path}: not a table of settings")
    return table


def settings(cls, keys: Keys, table: dict, path: Path, **known):
    """A `cls` from their `table`; `known`: fields that come from elsewhere. ValueError, one line, that begins
    with `path` and names the key."""
    with one_line(path):
        hints = typing.get_type_hints(cls, include_extras=True)
        ignored = set(keys.ignored.split())
        for key, value in table.items():
            if value is None or value == {} or key in ignored:
                continue
            if key in keys.read:
                name = keys.read[key]
                value = coerce(value, hints[name], key)
                if known.setdefault(name, value) != value:
                    raise ValueError(f"{key} is {value!r:.60}, which contradicts {known[name]!r:.60}")
            elif key not in keys.fixed:
                raise ValueError(
                    f"unknown key {show(key)}: it may change what is computed; remove it if it does not"
                )
            elif value not in keys.fixed[key]:
                usual = keys.fixed[key][0]
                raise ValueError(f"{key} is {value!r:.60}; only {usual!r} is implemented")
        for field in fields(cls):
            if field.name not in known and field.default is field.default_factory is MISSING:
                missing = [key for key, name in keys.read.items() if name == field.name]
                raise ValueError(f"key {missing[0]!r} is missing; is this the right file?")
        return cls(**known)

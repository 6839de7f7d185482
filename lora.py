"""Low-rank adaptation: a frozen matrix plus the product of two thin trained ones (SpeechGPT §4.2, stage 3).

    y = W x + (alpha / r) B A dropout(x)        A (r, in) random, B (out, r) zero: at first nothing changes

With use_rslora the factor is alpha / sqrt(r), so that a higher rank does not learn less (rank-stabilized).
The paper adapts the matrices of attention; `apply` works on the linear layers of any module.

References: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732 (use_rslora). On disk the
layout is that of the `peft` library:

    folder/adapter_config.json        {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": [..]}
    folder/adapter_model.safetensors  base_model.model.<name of a linear layer>.lora_A.weight, .lora_B.weight
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

import checkpoint
from config import Limits, Share
from files import one_line, show, write_json
from foreign import Keys, read_table, settings
from run import rank

Rank = Annotated[int, Limits(1, 4096)]
Alpha = Annotated[float, Limits(-1e6, 1e6)]


@dataclass
class AdapterConfig:
    """peft's settings, under its names."""

    r: Rank
    lora_alpha: Alpha
    target_modules: tuple[str, ...]
    lora_dropout: Share = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] = field(default_factory=dict)  # end of a layer's name: its r
    alpha_pattern: dict[str, Alpha] = field(default_factory=dict)

    def __post_init__(self):
        if not 1 <= len(self.target_modules) <= 1000:
            raise ValueError(f"target_modules are {len(self.target_modules)} names; it must be 1 to 1000")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):  # peft takes regular expressions
            if not re.fullmatch(r"[\w.]{1,200}", pattern):
                raise ValueError(f"a pattern must be the end of a layer's name, not {show(pattern)}")

    def of(self, layer: str) -> tuple[int, float]:
        """r and alpha of the layer called so: of the first pattern that fits, as in peft."""

        def value(patterns: dict, usual: float) -> float:
            return next((n for end, n in patterns.items() if f".{layer}".endswith(f".{end}")), usual)

        return value(self.rank_pattern, self.r), value(self.alpha_pattern, self.lora_alpha)


class LoRALinear(nn.Module):
    """A linear layer (plain or int8) with its adapter. A and B are fp32 whatever the base is stored in. It is
    in training mode, in which dropout acts, if the base is."""

    def __init__(
        self, base: nn.Module, name: str, target: str, config: AdapterConfig, device: str | None = None
    ):
        super().__init__()
        device = device or base.weight.device
        r, alpha = config.of(name)
        self.base_layer = base
        self.target = target  # the name by which it was chosen
        self.r = r
        self.alpha = alpha
        self.stable = config.use_rslora
        self.scale = alpha / (math.sqrt(r) if self.stable else r)
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=device)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=device)
        self.dropout = nn.Dropout(config.lora_dropout)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        delta = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        return y + (self.scale * delta).to(y.dtype)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer should train: every A and B."""
    return [half.weight for m in adapters(model).values() for half in (m.lora_A, m.lora_B)]


def apply(model: nn.Module, r: int, alpha: float, targets: list[str], dropout: float = 0.0) -> nn.Module:
    """Freezes the model and puts a new adapter on each linear layer whose name ends with one of `targets`
    ("q_proj", "self_attn.q_proj"). Changes the model in place, returns it. ValueError if there is no such
    layer, or if it shares its matrix with another (tied embeddings)."""
    return attach(model, new_adapters(model, AdapterConfig(r, alpha, tuple(targets), dropout)))


def new_adapters(model: nn.Module, config: AdapterConfig, device: str | None = None) -> dict[str, LoRALinear]:
    """Adapters, not attached yet, for the layers called so; on their layers' devices, or all on `device`."""
    assert config.r > 0 and not adapters(model), f"{config}, {len(adapters(model))} adapters already there"
    targets = config.target_modules
    linear = {name: m for name, m in model.named_modules() if hasattr(m, "in_features")}
    found = {name: target for target in targets for name in linear if f".{name}".endswith(f".{target}")}
    for target in targets:
        if target not in found.values():
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(f"no linear layer is called {target!r:.50}; there are {known}")
    weights = [p for _, p in model.named_parameters(remove_duplicate=False)]
    for name in found:
        if sum(p is linear[name].weight for p in weights) > 1:
            raise ValueError(
                f"{name} shares its matrix with another layer, which an adapter would change too; take it "
                "out of the targets"
            )
    return {name: LoRALinear(linear[name], name, target, config, device) for name, target in found.items()}


def attach(model: nn.Module, layers: dict[str, LoRALinear]) -> nn.Module:
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)  # its A and B are new, hence not frozen
    return model


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Folds each adapter into its layer, W' = W + scale B A, and removes it: equal output, no cost."""
    for name, m in adapters(model).items():
        if not isinstance(m.base_layer, nn.Linear):
            raise ValueError(f"{name} is int8, too coarse to merge an adapter into: load it without int8")
        W = m.base_layer.weight
        W.copy_(W.float() + m.scale * (m.lora_B.weight @ m.lora_A.weight))
        model.set_submodule(name, m.base_layer)
    return model


# ---- peft's folder -----------------------------------------------------------------------------------------


# Initial values of A and B that leave the base as it is; and those that take something out of it, which the
# weights of the adapter alone do not tell.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
KEYS = Keys(
    {field.name: field.name for field in fields(AdapterConfig)},
    {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": PLAIN_STARTS}
    | dict.fromkeys("fan_in_fan_out use_dora use_qalora lora_bias ensure_weight_tying".split(), (False,))
    | dict.fromkeys(
        "modules_to_save exclude_modules layers_to_transform layers_pattern layer_replication "
        "trainable_token_indices target_parameters alora_invocation_tokens use_bdlora "
        "velora_config arrow_config kasa_config monteclora_config megatron_config enable_lora".split(),
        (None, []),  # {} counts as absent
    ),
    "task_type base_model_name_or_path revision inference_mode auto_mapping peft_version runtime_config "
    "megatron_core loftq_config eva_config corda_config lora_ga_config qalora_group_size merge_weights",
)


def named(layers: dict[str, LoRALinear]) -> dict[str, nn.Parameter]:
    """The parameters of adapted layers under peft's names."""
    parameters = {}
    for name, m in layers.items():
        parameters[f"base_model.model.{name}.lora_A.weight"] = m.lora_A.weight
        parameters[f"base_model.model.{name}.lora_B.weight"] = m.lora_B.weight
    return parameters


def save(model: nn.Module, folder: str | Path) -> None:
    """Writes the adapter alone, as peft does. Called by all ranks if the model is divided among them."""
    folder = Path(folder)
    layers = adapters(model)
    assert layers, "the model has no adapter to save"
    m = next(iter(layers.values()))  # all have the same dropout, and are all rank-stabilized or none
    r = Counter(m.r for m in layers.values()).most_common(1)[0][0]
    alpha = Counter(m.alpha for m in layers.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": m.stable,
        "rank_pattern": {name: m.r for name, m in layers.items() if m.r != r},
        "alpha_pattern": {name: m.alpha for name, m in layers.items() if m.alpha != alpha},
        "lora_dropout": m.dropout.p,
        "target_modules": sorted({m.target for m in layers.values()}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_tensors(folder / "adapter_model.safetensors", named(layers))
    if rank() == 0:
        write_json(folder / "adapter_config.json", config)


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Applies the adapter that peft or `save` wrote; rank, alpha and targets come from its config. One that
    does not fit is refused, and the model then unchanged."""
    folder = Path(folder)
    path = folder / "adapter_config.json"
    table = read_table(path)
    if str(start := table.get("init_lora_weights")).startswith(OTHER_BASE):
        raise ValueError(
            f"{path}: init_lora_weights is {start!r:.20}, which changes the base too; save the adapter "
            "again in peft with save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )
    config = settings(AdapterConfig, KEYS, table, path)
    weights = folder / "adapter_model.safetensors"
    tensors = checkpoint.read_tensors(weights if weights.exists() else weights.with_suffix(".bin"))
    with one_line(folder):
        # On meta: no memory before the shapes of config and file have been compared.
        layers = new_adapters(model, config, "meta")
        for name in sorted(named(layers).keys() ^ tensors.keys()):
            why = "has no place in this model" if name in tensors else "is missing"
            raise ValueError(f"{name:.200} {why}")
        for name, m in layers.items():
            for half in ("lora_A", "lora_B"):
                key = f"base_model.model.{name}.{half}"
                weight = {"weight": tensors[f"{key}.weight"]}
                checkpoint.assign(getattr(m, half), weight, key, device=m.base_layer.weight.device)
    return attach(model, layers)

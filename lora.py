"""Low-rank adaptation: a frozen matrix plus the product of two thin trained ones (SpeechGPT §4.2, stage 3).

    y = W x + (alpha / r) B A dropout(x)        A (r, in) random, B (out, r) zero: at first nothing changes

The paper adapts the matrices of attention; `apply` works on the linear layers of any module.

Reference: Hu et al. 2021, arXiv:2106.09685. On disk the layout is that of the `peft` library:

    folder/adapter_config.json        {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": [..]}
    folder/adapter_model.safetensors  base_model.model.<name of a linear layer>.lora_A.weight, .lora_B.weight
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
from files import read_json, write_json


class LoRALinear(nn.Module):
    """A linear layer (plain or int8) with its adapter. A and B are fp32 whatever the base is stored in."""

    def __init__(self, base: nn.Module, target: str, r: int, alpha: float, dropout: float):
        super().__init__()
        device = base.weight.device
        self.base_layer = base
        self.target = target  # the name by which it was chosen
        self.r = r
        self.alpha = alpha
        self.scale = alpha / r
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=device)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=device)
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        delta = self.lora_B(self.lora_A(self.dropout(x.float())))
        return y + (self.scale * delta).to(y.dtype)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer should train: every A and B."""
    return [half.weight for m in adapters(model).values() for half in (m.lora_A, m.lora_B)]


def apply(model: nn.Module, r: int, alpha: float, targets: list[str], dropout: float = 0.0) -> nn.Module:
    """Freezes the model and puts a new adapter on each linear layer whose name ends with one of `targets`
    ("q_proj", "self_attn.q_proj"). Changes the model in place, returns it."""
    return attach(model, new_adapters(model, r, alpha, targets, dropout))


def new_adapters(model: nn.Module, r: int, alpha: float, targets: list[str], dropout: float) -> dict:
    assert r > 0 and not adapters(model), f"rank {r}, {len(adapters(model))} adapters already there"
    linear = {name: m for name, m in model.named_modules() if hasattr(m, "in_features")}
    found = {name: target for target in targets for name in linear if f".{name}".endswith(f".{target}")}
    for target in targets:
        if target not in found.values():
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(f"no linear layer is called {target!r:.50}; there are {known}")
    return {name: LoRALinear(linear[name], target, r, alpha, dropout) for name, target in found.items()}


def attach(model: nn.Module, layers: dict[str, LoRALinear]) -> nn.Module:
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)  # its A and B are new, hence not frozen
    return model


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Folds each adapter into its layer, W' = W + (alpha / r) B A, and removes it: equal output, no cost."""
    for name, m in adapters(model).items():
        if not isinstance(m.base_layer, nn.Linear):
            raise ValueError(f"{name} is int8, too coarse to merge an adapter into: load it without int8")
        W = m.base_layer.weight
        W.copy_(W.float() + m.scale * (m.lora_B.weight @ m.lora_A.weight))
        model.set_submodule(name, m.base_layer)
    return model


# ---- peft's folder -----------------------------------------------------------------------------------------


# What changes the function that a layer computes and is not implemented here.
UNSUPPORTED = (
    "fan_in_fan_out use_rslora use_dora rank_pattern alpha_pattern modules_to_save layers_to_transform "
    "layer_replication alora_invocation_tokens"
).split()


def named(layers: dict[str, LoRALinear]) -> dict[str, nn.Parameter]:
    """The parameters of adapted layers under peft's names."""
    parameters = {}
    for name, m in layers.items():
        parameters[f"base_model.model.{name}.lora_A.weight"] = m.lora_A.weight
        parameters[f"base_model.model.{name}.lora_B.weight"] = m.lora_B.weight
    return parameters


def save(model: nn.Module, folder: str | Path) -> None:
    """Writes the adapter alone, as peft does."""
    folder = Path(folder)
    layers = adapters(model)
    assert layers, "the model has no adapter to save"
    m = next(iter(layers.values()))  # all have the same settings
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": m.r,
        "lora_alpha": m.alpha,
        "lora_dropout": m.dropout.p,
        "target_modules": sorted({m.target for m in layers.values()}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_tensors(folder / "adapter_model.safetensors", named(layers))
    write_json(folder / "adapter_config.json", config)


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Applies the adapter that peft or `save` wrote; rank, alpha and targets come from its config. One that
    does not fit is refused, and the model then unchanged."""
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    weights = folder / "adapter_model.safetensors"
    tensors = checkpoint.read_tensors(weights if weights.exists() else weights.with_suffix(".bin"))
    try:
        layers = new_adapters(model, *read_config(config))
        parameters = named(layers)
        for name in sorted(parameters.keys() ^ tensors.keys()):
            why = "has no place in this model" if name in tensors else "is missing"
            raise ValueError(f"{name:.200} {why}")
        for name, p in parameters.items():
            if tensors[name].shape != p.shape:
                raise ValueError(f"{name} is {list(tensors[name].shape)}, the model needs {list(p.shape)}")
            p.data.copy_(tensors[name])
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return attach(model, layers)


def read_config(config: dict) -> tuple[int, float, list[str], float]:
    """(r, alpha, targets, dropout) of peft's config; what this file does not implement is refused."""
    is_lora = isinstance(config, dict) and config.get("peft_type") == "LORA"
    if not is_lora or config.get("bias", "none") != "none":
        raise ValueError("not the config of a LORA adapter with bias 'none'")
    for key in UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{key} = {config[key]!r:.50} is not supported")
    r = config.get("r")
    alpha = config.get("lora_alpha")
    targets = config.get("target_modules")
    dropout = config.get("lora_dropout")
    if not isinstance(r, int) or not 0 < r <= 4096 or not isinstance(alpha, int | float):
        raise ValueError(f"r = {r!r:.50}, lora_alpha = {alpha!r:.50} is impossible")
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"target_modules = {targets!r:.50}: only a list of names is supported")
    if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise ValueError(f"lora_dropout = {dropout!r:.50} is impossible")
    return r, alpha, targets, dropout

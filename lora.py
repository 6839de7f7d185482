"""Low-rank adaptation: train two thin matrices beside a frozen one (SpeechGPT §4.2, chain-of-modality stage).

    y = W x + (alpha / r) B A dropout(x)        A (r, in) random, B (out, r) zero: at first nothing changes

Reference: Hu et al. 2021, arXiv:2106.09685. On disk the layout is that of the `peft` library:

    folder/adapter_config.json        {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": [..], ..}
    folder/adapter_model.safetensors  base_model.model.<name of the linear layer>.lora_A.weight and .lora_B.weight
"""
import math
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint


class LoRALinear(nn.Module):
    """A linear layer (of any kind) with its adapter. A and B stay in fp32 whatever the base is stored in."""

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        device = next(iter(base.state_dict().values())).device
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=device)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=device)
        self.dropout = nn.Dropout(dropout)
        self.r, self.alpha, self.scale = r, alpha, alpha / r
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        delta = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        return y + (self.scale * delta).to(y.dtype)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimiser should train: every A and B."""
    return [p for m in adapters(model).values() for p in (m.lora_A.weight, m.lora_B.weight)]


def apply(model: nn.Module, r: int, alpha: float, targets: list[str], dropout: float = 0.0) -> nn.Module:
    """Freezes the model and puts an adapter on each linear layer whose name ends with one of `targets`,
    e.g. ["q_proj", "v_proj"]. Changes the model in place and returns it."""
    assert r > 0 and not adapters(model), f"rank {r}; a model takes one adapter"
    model.requires_grad_(False)
    for target in targets:
        names = [n for n, m in model.named_modules()
                 if f".{n}".endswith(f".{target}") and hasattr(m, "in_features")]
        if not names:
            raise ValueError(f"no linear layer is called {target!r}: LoRA targets are names such as 'q_proj'")
        for name in names:
            parent, _, leaf = name.rpartition(".")
            parent = model.get_submodule(parent)
            setattr(parent, leaf, LoRALinear(getattr(parent, leaf), r, alpha, dropout))
    return model


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Folds each adapter into its layer, W' = W + (alpha / r) B A, and removes it: same output, no cost."""
    for name, m in adapters(model).items():
        assert isinstance(m.base_layer, nn.Linear), f"{name} is {type(m.base_layer).__name__}"
        W = m.base_layer.weight
        W.copy_(W.float() + m.scale * (m.lora_B.weight.float() @ m.lora_A.weight.float()))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, m.base_layer)
    return model


# ---- peft's folder -----------------------------------------------------------------------------------------

def tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters under peft's names."""
    return {f"base_model.model.{name}.{half}.weight": getattr(m, half).weight
            for name, m in adapters(model).items() for half in ("lora_A", "lora_B")}


def save(model: nn.Module, folder: str | Path) -> None:
    folder, found = Path(folder), adapters(model)
    assert found, "the model has no adapter to save"
    m = next(iter(found.values()))
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_tensors(folder / "adapter_model.safetensors", dict(tensors(model)), {"format": "pt"})
    checkpoint.write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None,
        "inference_mode": True, "r": m.r, "lora_alpha": m.alpha, "lora_dropout": m.dropout.p,
        "target_modules": sorted({name.rpartition(".")[2] for name in found}),
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None})


UNSUPPORTED = ("fan_in_fan_out", "modules_to_save", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
               "layers_to_transform", "layers_pattern")


@torch.no_grad()
def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Applies the adapter that peft (or `save`) wrote; rank, alpha and targets come from its config."""
    folder = Path(folder)
    path = folder / "adapter_config.json"
    config = checkpoint.read_json(path)
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise ValueError(f"{path}: peft_type {config.get('peft_type')!r}, bias {config.get('bias')!r}; "
                         "only a LORA adapter with bias 'none' is supported")
    odd = [key for key in UNSUPPORTED if config.get(key)]
    if odd or not isinstance(config.get("target_modules"), list):
        key = odd[0] if odd else "target_modules"
        raise ValueError(f"{path}: {key} = {config.get(key)!r} is not supported")
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        weights = folder / "adapter_model.bin"
    stored = checkpoint.read_tensors(weights)
    apply(model, config["r"], config["lora_alpha"], config["target_modules"], config.get("lora_dropout", 0.0))
    wanted = tensors(model)
    for name in wanted.keys() ^ stored.keys():
        raise ValueError(f"{weights}: {name} is {'missing' if name in wanted else 'not used by the model'}")
    for name, p in wanted.items():
        if (found := stored[name].shape) != p.shape:
            raise ValueError(f"{weights}: {name} is {tuple(found)}, the model needs {tuple(p.shape)}")
        p.copy_(stored[name])
    return model

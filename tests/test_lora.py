"""lora.py: starts as the identity, trains alone, merges exactly, and shares folders with peft."""

import json

import pytest
import torch

import checkpoint
import lora
from llama import Int8Linear, Llama, LlamaConfig, next_token_loss

TARGETS = ["q_proj", "v_proj"]


def base() -> Llama:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=61, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2).add_(1 if p.dim() == 1 else 0)
    return model.eval()


def adapted(targets=TARGETS, r=4, alpha=6.0) -> Llama:
    """With a B that is not zero, as after training."""
    model = lora.apply(base(), r, alpha, targets).eval()
    torch.manual_seed(1)
    for p in lora.parameters(model):
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(2))


def test_a_fresh_adapter_changes_nothing(ids):
    model = lora.apply(base(), 4, 8, TARGETS, dropout=0.5).train()
    assert torch.equal(model(ids), base()(ids))
    assert lora.adapters(model)["model.layers.0.self_attn.q_proj"].lora_A.weight.abs().max() > 0


def test_the_equation():
    model = adapted()
    m = lora.adapters(model)["model.layers.1.self_attn.v_proj"]
    x = torch.randn(3, 32)
    W, A, B = m.base_layer.weight, m.lora_A.weight, m.lora_B.weight
    assert A.shape == (4, 32) and B.shape == (16, 4)
    assert torch.allclose(m(x), x @ W.T + 6 / 4 * x @ A.T @ B.T, atol=1e-5)


def test_dropout_is_on_the_adapter_alone(ids):
    model = lora.apply(base(), 4, 8, ["o_proj"], dropout=1.0).train()
    for p in lora.parameters(model):
        torch.nn.init.ones_(p)
    assert torch.equal(model(ids), base()(ids))
    assert not torch.equal(model.eval()(ids), base()(ids))


@pytest.mark.parametrize("output_layer", [[], ["lm_head"]])
def test_only_the_adapter_trains(ids, output_layer):
    model = lora.apply(base(), 4, 8, TARGETS + output_layer)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = [f"model.layers.{i}.self_attn.{target}" for i in (0, 1) for target in TARGETS] + output_layer
    assert trainable == {f"{layer}.lora_{half}.weight" for layer in layers for half in "AB"}
    assert {id(p) for p in lora.parameters(model)} == {id(model.get_parameter(name)) for name in trainable}
    frozen = {name: p.clone() for name, p in model.named_parameters() if name not in trainable}
    optimizer = torch.optim.AdamW(lora.parameters(model), lr=0.05)
    losses = []
    for _ in range(30):
        loss = next_token_loss(model, ids, torch.ones_like(ids, dtype=torch.bool))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert all(torch.equal(model.get_parameter(name), p) for name, p in frozen.items())


@pytest.mark.parametrize("targets", [TARGETS, ["self_attn.k_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_merged_equals_unmerged(targets, ids):
    model = adapted(targets)
    before = model(ids)
    assert not torch.allclose(before, base()(ids), atol=1e-2)
    names = [name for name, _ in base().named_parameters()]
    merged = lora.merge(model)
    assert torch.allclose(merged(ids), before, atol=1e-4)
    assert [name for name, _ in merged.named_parameters()] == names and not lora.parameters(merged)


def test_an_adapter_on_int8_and_on_bfloat16(ids, tmp_path):
    base().save_pretrained(tmp_path)
    exact = adapted()(ids)
    for options in ({"int8": True}, {"dtype": torch.bfloat16}):
        model = Llama.from_pretrained(tmp_path, **options)
        plain = model(ids).float()
        lora.apply(model, 4, 6.0, TARGETS).eval()
        for p, q in zip(lora.parameters(model), lora.parameters(adapted())):
            assert p.dtype == torch.float32
            p.data.copy_(q)
        assert (model(ids).float() - exact).std() < 0.2 * (plain - exact).std()
    int8 = lora.apply(Llama.from_pretrained(tmp_path, int8=True), 4, 6.0, TARGETS)
    assert isinstance(lora.adapters(int8)["model.layers.0.self_attn.q_proj"].base_layer, Int8Linear)
    with pytest.raises(ValueError, match="int8"):
        lora.merge(int8)


def test_a_matrix_that_two_layers_share_gets_no_adapter():
    """Merged into the output layer, it would change the embedding, too."""
    sizes = dict(vocab_size=61, dim=32, n_layers=1, n_heads=4, hidden_dim=48)
    tied = Llama(LlamaConfig(**sizes, tie_embeddings=True))
    with pytest.raises(ValueError, match="lm_head shares its matrix with another layer"):
        lora.apply(tied, 4, 8, ["q_proj", "lm_head"])
    assert all(p.requires_grad for p in tied.parameters()) and not lora.adapters(tied)
    lora.apply(tied, 4, 8, ["q_proj"])


# ---- Folders -----------------------------------------------------------------------------------------------


def test_save_then_load(tmp_path, ids):
    model = adapted(["q_proj", "mlp.up_proj"])
    lora.save(model, tmp_path)
    assert torch.equal(lora.load(base(), tmp_path).eval()(ids), model(ids))


def their_base(tmp_path):
    from transformers import LlamaForCausalLM

    base().save_pretrained(tmp_path / "base")
    return LlamaForCausalLM.from_pretrained(tmp_path / "base")


def test_ours_loads_in_peft(tmp_path, ids):
    from peft import PeftModel

    model = adapted()
    lora.save(model, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(their_base(tmp_path), tmp_path / "lora").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, model(ids), atol=1e-4)
        assert torch.allclose(theirs.merge_and_unload()(ids).logits, lora.merge(model)(ids), atol=1e-4)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_pefts_loads_here(safe, tmp_path, ids):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["k_proj", "v_proj", "gate_proj"],
        lora_dropout=0.1,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(their_base(tmp_path), config).eval()
    theirs.save_pretrained(tmp_path / "lora")
    if not safe:  # what peft 0.3 wrote: SpeechGPT-7B-com
        state = checkpoint.read_tensors(tmp_path / "lora/adapter_model.safetensors")
        torch.save({k: t.clone() for k, t in state.items()}, tmp_path / "lora/adapter_model.bin")
        (tmp_path / "lora/adapter_model.safetensors").unlink()
    ours = lora.load(base(), tmp_path / "lora").eval()
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.allclose(ours(ids), expected, atol=1e-4)
        assert torch.allclose(lora.merge(ours)(ids), expected, atol=1e-4)
        assert not torch.allclose(base()(ids), expected, atol=1e-2)


@pytest.mark.parametrize(
    "changes, refused",
    [
        ({}, None),
        ({"init_lora_weights": "gaussian"}, None),
        ({"init_lora_weights": "orthogonal"}, None),
        ({"lora_alpha": -3, "lora_dropout": 0.5}, None),
        ({"target_modules": "all-linear"}, None),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        (
            {"init_lora_weights": "pissa_niter_2"},
            "init_lora_weights is 'pissa_niter_2', which changes the base",
        ),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changes the base"),
        ({"init_lora_weights": "mica"}, "init_lora_weights is 'mica'"),
        ({"use_rslora": True}, None),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"rank_pattern": {"q_proj": 2}}, None),
        ({"alpha_pattern": {"q_proj": 32}}, None),
        ({"rank_pattern": {"layers.1.self_attn.v_proj": 3}, "use_rslora": True}, None),
        ({"rank_pattern": {"1.self_attn.q_proj": 3, "q_proj": 7}}, None),
        ({"alpha_pattern": {"_proj": 2, "v_proj": 9}}, None),
        ({"rank_pattern": {".*q_proj": 2}}, "end of a layer's name"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layers_to_transform": 1}, "layers_to_transform"),
        ({"exclude_modules": ["model.layers.0.self_attn.q_proj"]}, "exclude_modules"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
        ({"target_parameters": ["self_attn.k_proj.weight"]}, "target_parameters"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_peft_compute_the_same_here_or_are_refused(changes, refused, tmp_path, ids):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(3)
    settings = dict(r=4, lora_alpha=5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trained = get_peft_model(their_base(tmp_path), LoraConfig(**settings | changes))
    for name, p in trained.named_parameters():
        if "lora_" in name:
            p.data.add_(0.2 * torch.randn_like(p))
    trained.save_pretrained(tmp_path / "lora")
    if refused:
        with pytest.raises(ValueError, match=refused) as error:
            lora.load(base(), tmp_path / "lora")
        assert len(str(error.value)) - len(str(tmp_path)) < 300
        return
    theirs = PeftModel.from_pretrained(their_base(tmp_path), tmp_path / "lora").eval()
    with torch.no_grad():
        ours = lora.load(base(), tmp_path / "lora")
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)
        lora.save(ours, tmp_path / "again")
        again = PeftModel.from_pretrained(their_base(tmp_path), tmp_path / "again").eval()
        assert torch.allclose(ours(ids), again(ids).logits, atol=1e-4)


def test_an_adapter_is_in_the_mode_of_its_model(tmp_path, ids):
    """An eval() model stays one: its new dropout does not act."""
    model = lora.apply(base().train(), 4, 6.0, TARGETS, dropout=0.9)
    assert all(m.training and m.dropout.training for m in lora.adapters(model).values())
    for p in lora.parameters(model):
        torch.nn.init.normal_(p)
    lora.save(model, tmp_path)
    loaded = lora.load(base(), tmp_path)
    assert not any(m.training for m in loaded.modules())
    assert torch.equal(loaded(ids), loaded(ids)) and torch.equal(loaded(ids), model.eval()(ids))
    assert all(m.dropout.p == 0.9 for m in lora.adapters(loaded).values())


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"peft_type": "IA3"}, "LORA"),
        ({"bias": "all"}, "bias"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ".*q_proj"}, "target_modules"),
        ({"target_modules": ["query"]}, "query"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj"),
        ({"target_modules": ["q_proj"]}, "v_proj"),
        ({"r": 8}, r"\[4, 32\]"),
        ({"r": 0}, "r: must be 1 to 4096"),
        ({"r": "4"}, "r: expected int"),
        ({"r": 10**12}, "r: must be 1 to 4096"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_dropout": 7}, "lora_dropout"),
        ({"rank_pattern": {"q_proj": 2}}, r"\[4, 32\]"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern, key 'q_proj': must be 1 to 4096"),
        ({"rank_pattern": {"(a+)+": 2}}, "end of a layer's name"),
        ({"alpha_pattern": {"q_proj": "2"}}, "alpha_pattern"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"target_modules": [7]}, "target_modules"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_in_one_line(changes, why, tmp_path):
    lora.save(adapted(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    model = base()
    with pytest.raises(ValueError, match=why) as error:
        lora.load(model, tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert not lora.adapters(model), "a refused adapter must leave the model as it was"


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        lora.load(base(), tmp_path)
    lora.save(adapted(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        lora.load(base(), tmp_path)


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match="'wq'"):
        lora.apply(base(), 4, 8, ["wq"])

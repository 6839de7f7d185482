"""llama.py: equal to transformers, cached equals uncached, packed equals padded, folders of both layouts."""

import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from build_7b import build
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import llama
import packed
from files import read_json, write_json
from llama import (
    Int8Linear,
    Llama,
    LlamaConfig,
    next_token_loss,
    next_token_losses,
    rope_table,
    rotate,
)
from llama_formats import Matrix
from packed import PackedAttention, VarlenAttention, packed_attention

CONFIG = dict(vocab_size=101, dim=48, n_layers=3, n_heads=6, hidden_dim=80, max_len=96)
GROUPED = CONFIG | dict(n_kv_heads=2, rope_theta=5000.0, norm_eps=1e-5)


def randomized(model: Llama, seed: int = 0) -> Llama:
    """Large random weights, norms included: what an initialization hides, these show."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2).add_(1 if p.dim() == 1 else 0)
    return model.eval()


def make(**changes) -> Llama:
    return randomized(Llama(LlamaConfig(**GROUPED | changes)))


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, CONFIG["vocab_size"], (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


# ---- The same function as transformers' --------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [CONFIG, GROUPED, GROUPED | {"tie_embeddings": True}], ids=["plain", "grouped", "tied"]
)
def test_our_folder_gives_equal_logits_in_transformers(changes, ids, tmp_path):
    from transformers import LlamaForCausalLM

    ours = randomized(Llama(LlamaConfig(**changes)))
    ours.save_pretrained(tmp_path)
    theirs, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)
        theirs.generation_config.eos_token_id = None  # never stop
        greedy = theirs.generate(ids[:, :8], max_new_tokens=64, do_sample=False)
        ours_greedy = ids[:, :8]
        for _ in range(64):
            ours_greedy = torch.cat([ours_greedy, ours(ours_greedy)[:, -1:].argmax(-1)], 1)
    assert torch.equal(ours_greedy, greedy)


@pytest.mark.parametrize("safe, shard", [(True, "10GB"), (True, "40KB"), (False, "10GB"), (False, "40KB")])
def test_a_folder_of_transformers_loads(safe, shard, ids, tmp_path):
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        TheirConfig(
            vocab_size=101,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            intermediate_size=80,
            initializer_range=0.2,
            rope_parameters={"rope_type": "default", "rope_theta": 700.0},
        )
    )
    if safe:
        theirs.save_pretrained(tmp_path, max_shard_size=shard)
    else:  # what transformers wrote before version 5
        theirs.config.save_pretrained(tmp_path)
        state = theirs.state_dict() | {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4).bfloat16()
        }
        halves = [dict(list(state.items())[i::2]) for i in range(2)] if shard == "40KB" else [state]
        names = (
            [f"pytorch_model-{i + 1:05}-of-00002.bin" for i in range(2)]
            if shard == "40KB"
            else ["pytorch_model.bin"]
        )
        for name, half in zip(names, halves):
            torch.save(half, tmp_path / name)
        if shard == "40KB":
            where = {key: name for name, half in zip(names, halves) for key in half}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    ours = Llama.from_pretrained(tmp_path)
    assert ours.config.rope_theta == 700 and ours.config.n_kv_heads == 3
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)


def test_bfloat16_follows_transformers_order_of_rounding(saved, ids):
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    ours = Llama.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        exact = Llama.from_pretrained(saved)(ids)
        a, b = (ours(ids).float() - exact).std(), (theirs(ids).logits.float() - exact).std()
    assert a < 1.3 * b, "our half precision loses more than theirs"


# ---- Decoding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[24], [1] * 24, [10, 1, 1, 12], [9, 14, 1]])
def test_cached_equals_full(model, ids, chunks):
    cache, out = model.new_cache(3, 24), []
    with torch.no_grad():
        for part in ids.split(chunks, dim=1):
            out.append(model(part, cache=cache))
        assert torch.allclose(torch.cat(out, 1), model(ids), atol=1e-4)
    assert cache.used == 24


@pytest.mark.parametrize("chunks", [[24], [12] + [1] * 12, [3, 12, 1, 8]])
def test_left_padding_changes_nothing(model, ids, chunks):
    pad = torch.tensor([0, 7, 15])
    padded = torch.stack([torch.cat([torch.full((n,), 13), row[n:]]) for n, row in zip(pad.tolist(), ids)])
    cache = model.new_cache(3, 24, pad)
    with torch.no_grad():
        out = torch.cat([model(part, cache=cache) for part in padded.split(chunks, dim=1)], 1)
        for row, n in enumerate(pad.tolist()):
            assert torch.allclose(out[row, n:], model(ids[row : row + 1, n:])[0], atol=1e-4)
    assert torch.isfinite(out).all()


def test_a_full_cache_says_so(model, ids):
    with pytest.raises(AssertionError, match="20"):
        model(ids, cache=model.new_cache(3, 20))


# ---- Causality, documents, loss ----------------------------------------------------------------------------


def test_causal(model, ids):
    changed = ids.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 101
    with torch.no_grad():
        difference = (model(ids) - model(changed)).abs().amax(-1)
    assert difference[:, :10].max() == 0 and difference[:, 10:].min() > 1e-4


def pack(documents: list[torch.Tensor], length: int):
    """Documents one after another in a row; what remains is padding, a document of its own."""
    rest = length - sum(map(len, documents))
    pieces = [*documents, torch.zeros(rest, dtype=torch.long)]
    return (
        torch.cat(pieces)[None],
        torch.cat([torch.arange(len(d)) for d in pieces])[None],
        torch.cat([torch.full((len(d),), i) for i, d in enumerate(pieces)])[None],
    )


def test_documents_of_a_row_never_see_each_other(model, ids):
    documents = [ids[0, :9], ids[1, :4], ids[2, :8]]
    row, positions, docs = pack(documents, 24)
    with torch.no_grad():
        packed = model(row, positions, docs)[0]
        alone = [model(d[None])[0] for d in documents]
    assert torch.allclose(packed[:21], torch.cat(alone), atol=1e-4)
    inputs = model.model.embed_tokens(row).detach().requires_grad_()
    model.model.embed_tokens.register_forward_hook(hook := lambda *_: inputs)  # the gradient: an exact zero
    try:
        model(row, positions, docs)[0, 11].sum().backward()
    finally:
        model.model.embed_tokens._forward_hooks.clear()
    assert hook and [i for i in range(24) if inputs.grad[0, i].abs().max() > 0] == [9, 10, 11]


def numbered(lengths: list[list[int]], T: int) -> torch.Tensor:
    """docs (B, T) of rows of documents with these lengths, padded with -1 at their ends."""
    docs = torch.full((len(lengths), T), -1)
    for row, parts in zip(docs, lengths):
        row[: sum(parts)] = torch.arange(len(parts)).repeat_interleave(torch.tensor(parts).long())
    return docs


def both_forms(docs: torch.Tensor, kv_heads: int):
    """(fast, plain): output and gradients of q, k and v where there is no padding."""
    B, T = docs.shape
    q, k, v = (torch.randn(B, heads, T, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    inside = (docs >= 0)[:, None, :, None]
    weight = torch.randn(B, 4, T, 8)
    results = []
    for y in (PackedAttention(docs).attend(q, k, v), packed_attention(q, k, v, docs)):
        assert torch.isfinite(y).all()
        y = y * inside
        results.append((y, *torch.autograd.grad((y * weight).sum(), (q, k, v))))
    return results


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_attention_fast_equals_plain(kv_heads):
    """Documents of one to thirty tokens, in rows with and without padding at their ends, and their
    gradients."""
    torch.manual_seed(0)
    docs = numbered([[30, 9, 1], [12, 13, 8, 2], [1, 1, 22]], 40)
    groups = PackedAttention(docs).groups
    assert sum(len(places) for places in groups) == 10 and len(groups) < 10
    for fast, plain in zip(*both_forms(docs, kv_heads)):
        assert torch.allclose(fast, plain, atol=1e-5)


@pytest.mark.parametrize(
    "docs",
    [
        numbered([[7], [7], [7]], 7),  # the same number in every row: still a document of each
        numbered([[1] * 7, [7]], 7),
        numbered([[3, 4], [], [2]], 7),  # a row of padding alone
        torch.tensor(
            [[-1, -1, 0, 0, 0, 1, -1], [5, 5, 5, 2, 2, -1, -1]]
        ),  # padding first, numbers out of order
        torch.tensor(
            [[0, 0, 1, 1, 1, 0, 0]]
        ),  # a number that comes again, as the plain form does not have it
    ],
    ids=["one a row", "single tokens", "empty row", "padding first", "again"],
)
def test_packed_attention_of_unusual_rows(docs):
    torch.manual_seed(0)
    if len(docs) == 1:  # neighbors make a document: the two runs of 0 are two
        fast = PackedAttention(docs)
        docs = torch.tensor([[0, 0, 1, 1, 1, 2, 2]])
        q, k, v = (torch.randn(1, 4, 7, 8) for _ in range(3))
        assert torch.allclose(fast.attend(q, k, v), packed_attention(q, k, v, docs), atol=1e-5)
    for fast, plain in zip(*both_forms(docs, 2)):
        assert torch.allclose(fast, plain, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 4)
)
def test_packed_attention_of_any_rows(lengths, padding):
    torch.manual_seed(0)
    docs = numbered(lengths, max(map(sum, lengths)) + padding)
    for fast, plain in zip(*both_forms(docs, 2)):
        assert torch.allclose(fast, plain, atol=1e-5)


def test_packed_attention_moves_to_another_device():
    docs = numbered([[3, 4], [2]], 7)
    packed = PackedAttention(docs)
    assert all(places.is_meta for places in packed.to("meta").groups) and packed.to("meta").back.is_meta
    moved = packed.to("cpu")
    assert torch.equal(moved.back, packed.back)
    assert all(torch.equal(a, b) for a, b in zip(moved.groups, packed.groups))


def test_the_device_and_the_length_choose_the_form():
    docs, x = numbered([[3, 4], [2]], 7), torch.zeros(2, 7, 8)
    assert isinstance(packed.within_documents(docs, x), PackedAttention)
    elsewhere = packed.within_documents(docs.to("meta"), x)
    assert isinstance(elsewhere, torch.Tensor) and elsewhere.is_meta and elsewhere.shape == (2, 1, 7, 7)


def test_a_model_that_gets_the_matrix_of_a_gpu_learns_the_same(model, monkeypatch):
    row, positions, docs = pack([torch.arange(1, 10), torch.arange(3, 7), torch.arange(2, 12)], 24)
    mask = torch.ones(1, 24, dtype=torch.bool)
    found = []
    for form in (packed.within_documents, lambda docs, x: packed.document_mask(docs)):
        monkeypatch.setattr(llama, "within_documents", form)
        model.zero_grad()
        loss = next_token_loss(model, row, mask, positions, docs)
        loss.backward()
        found.append([loss, *(p.grad.clone() for p in model.parameters())])
    model.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found))


# ---- torch's kernel for documents of any lengths, which no CPU has: its contract, written out in torch -----


def old_kernel(q, k, v, starts_q, starts_k, longest_q, longest_k, is_causal=False):
    """As in torch 2.10: (tokens, heads, head_dim)."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert starts_q.dtype == torch.int32 and q.shape == k.shape == v.shape
    assert int(starts_q.diff().max()) <= longest_q and int(starts_q[-1]) == len(q) == int(starts_k[-1])
    outputs = []
    for begin, end in zip(starts_q.tolist(), starts_q.tolist()[1:]):
        piece = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
        y = torch.nn.functional.scaled_dot_product_attention(*piece, is_causal=is_causal)
        outputs.append(y[0].transpose(0, 1))
    return torch.cat(outputs)


def new_kernel(*arguments, window_size=(-1, -1)):
    """As from torch 2.11 on."""
    return old_kernel(*arguments, is_causal=window_size == (-1, 0))


def broken_kernel(*arguments, window_size=(-1, -1)):
    return old_kernel(*arguments)  # every token attends to its whole document


def missing_kernel(*arguments, window_size=(-1, -1)):
    raise NotImplementedError("no kernel for this device")


@pytest.fixture
def varlen_module(monkeypatch):
    def use(kernel):
        module = types.ModuleType("torch.nn.attention.varlen")
        module.varlen_attn = kernel
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
        packed.varlen_kernel.cache_clear()
        return packed.varlen_kernel(torch.device("cpu"))

    yield use
    packed.varlen_kernel.cache_clear()


@pytest.mark.parametrize("kernel", [old_kernel, new_kernel])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernel_gives_what_the_plain_form_gives(varlen_module, kernel, kv_heads):
    kernel = varlen_module(kernel)
    torch.manual_seed(0)
    docs = numbered([[30, 9, 1], [12, 13, 8, 2], [1, 1, 22], []], 40)
    q, k, v = (torch.randn(4, heads, 40, 8).half().requires_grad_() for heads in (4, kv_heads, kv_heads))
    inside = (docs >= 0)[:, None, :, None]
    rows = VarlenAttention(docs, kernel, torch.float16).to(torch.device("cpu"))
    found = []
    for y in (rows.attend(q, k, v), packed_attention(q, k, v, docs)):
        found.append([y * inside, *torch.autograd.grad((y * inside).square().sum(), (q, k, v))])
    assert all(torch.allclose(a, b, atol=2e-2) for a, b in zip(*found))


@pytest.mark.parametrize("kernel", [broken_kernel, missing_kernel])
def test_a_kernel_that_is_wrong_or_missing_is_not_used(varlen_module, kernel):
    assert varlen_module(kernel) is None


def test_looking_at_the_kernel_draws_no_random_numbers(varlen_module):
    before = torch.get_rng_state()
    assert varlen_module(new_kernel) and torch.equal(torch.get_rng_state(), before)


def test_packed_loss_equals_padded_loss(model, ids):
    documents = [ids[0, :9], ids[1, :4], ids[2, :8]]
    answer = [torch.arange(len(d)) >= 2 for d in documents]
    row, positions, docs = pack(documents, 24)
    mask = torch.cat([*answer, torch.zeros(3, dtype=torch.bool)])[None]
    padded = torch.stack([torch.cat([d, torch.zeros(9 - len(d), dtype=torch.long)]) for d in documents])
    padded_mask = torch.stack([torch.cat([a, torch.zeros(9 - len(a), dtype=torch.bool)]) for a in answer])
    gradients = []
    for arguments in ((row, mask, positions, docs), (padded, padded_mask)):
        model.zero_grad()
        loss = next_token_loss(model, *arguments)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()] + [loss[None]]))
    model.zero_grad()
    assert torch.allclose(*gradients, atol=1e-5)


def test_packed_loss_under_autocast(model, ids):
    docs, mask = torch.arange(24).expand(3, 24) // 8, torch.ones_like(ids, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        half = next_token_loss(model, ids, mask, docs=docs)
    half.backward()
    assert half.dtype == torch.float32 and all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.zero_grad()
    with torch.no_grad():
        assert half.item() == pytest.approx(next_token_loss(model, ids, mask, docs=docs).item(), rel=0.05)


def test_loss_is_the_mean_over_the_mask(model, ids):
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 5] = mask[2, 9] = True
    with torch.no_grad():
        logp = model(ids).log_softmax(-1)
        expected = -(logp[0, 4, ids[0, 5]] + logp[2, 8, ids[2, 9]]) / 2
        assert torch.allclose(next_token_loss(model, ids, mask), expected, atol=1e-5)


def test_a_weight_is_how_much_a_token_counts(model, ids):
    mask = torch.ones_like(ids, dtype=torch.bool)
    weight = torch.ones(model.config.vocab_size)
    with torch.no_grad():
        assert torch.allclose(
            next_token_loss(model, ids, mask, weight=weight), next_token_loss(model, ids, mask)
        )
        heavy = ids[0, 5].item()
        weight[heavy] = 3.0
        loss = -model(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        counts = torch.where(ids[:, 1:] == heavy, 3.0, 1.0)
        expected = (loss * counts).sum() / counts.sum()
        assert torch.allclose(next_token_loss(model, ids, mask, weight=weight), expected, atol=1e-5)
        assert next_token_loss(model, ids, torch.zeros_like(mask), weight=weight) == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_and_totals_of_parts_give_the_loss_of_the_whole(model, ids, weighted):
    """What micro-batches and ranks add up: sums over targets and totals, of unequal parts."""
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[0] = False
    docs = torch.arange(24).expand(3, 24) // 8
    weight = torch.rand(model.config.vocab_size) if weighted else None
    with torch.no_grad():
        whole = next_token_loss(model, ids, mask, docs=docs, weight=weight)
        parts = [
            next_token_losses(model, ids[i : i + 1], mask[i : i + 1], docs=docs[i : i + 1], weight=weight)
            for i in range(3)
        ]
    loss_sum, total = (torch.stack(column) for column in zip(*parts))
    assert loss_sum[0] == total[0] == 0 and total.dtype == loss_sum.dtype == torch.float32
    assert torch.allclose(loss_sum.sum() / total.sum(), whole, atol=1e-6)
    if not weighted:
        targets = mask[:, 1:] & (docs[:, 1:] == docs[:, :-1])
        assert total.tolist() == targets.sum(1).tolist()


def test_without_targets_the_loss_and_its_gradients_are_zero(model, ids):
    model.zero_grad()
    loss = next_token_loss(model, ids, torch.zeros_like(ids, dtype=torch.bool))
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss == 0 and gradients and all((g == 0).all() for g in gradients)
    model.zero_grad()


def test_first_tokens_are_no_targets(model, ids):
    docs = torch.arange(24).expand(3, 24) // 8
    mask = torch.ones_like(ids, dtype=torch.bool)
    inner = mask & (torch.arange(24) % 8 > 0)
    with torch.no_grad():
        assert torch.equal(
            next_token_loss(model, ids, mask, docs=docs), next_token_loss(model, ids, inner, docs=docs)
        )
        assert next_token_loss(model, ids, torch.zeros_like(mask)) == 0


def test_a_model_learns():
    torch.manual_seed(0)
    small = Llama(LlamaConfig(**CONFIG | {"n_layers": 1}))
    line = torch.randint(0, 101, (2, 20))
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = next_token_loss(small, line, torch.ones_like(line, dtype=torch.bool))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - torch.tensor(101.0).log()) < 0.2 and losses[-1] < 0.1


@pytest.mark.parametrize("pad", [None, torch.tensor([3, 0, 1])], ids=["equal", "padded"])
def test_a_cache_that_grows_is_the_cache_that_was_reserved_at_once(pad, model, ids, monkeypatch):
    def logits(room: int) -> tuple[torch.Tensor, list[int]]:
        monkeypatch.setattr(llama.Cache, "ROOM", room)
        cache = model.new_cache(3, 24, pad)
        found, slots = [model(ids[:, :6], cache=cache)], [cache.layers[0].k.shape[2]]
        for i in range(6, 24):
            found.append(model(ids[:, i : i + 1], cache=cache))
            slots.append(cache.layers[2].v.shape[2])
        return torch.cat(found, 1), sorted(set(slots))

    with torch.no_grad():
        whole, grown = logits(4096), logits(4)
    assert torch.equal(whole[0], grown[0])
    assert whole[1] == [24] and grown[1] == [8, 16, 24]


def test_a_context_of_millions_costs_nothing_until_it_is_used():
    small = make(max_len=2**22)
    cache = small.new_cache(1, small.config.max_len)
    assert cache.layers[0].k.shape[2] == cache.cos.shape[1] == cache.ROOM
    with torch.no_grad():
        assert small(torch.tensor([[1, 2]]), cache=cache).isfinite().all()


# ---- Vocabulary --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_growing_the_vocabulary_keeps_the_rows(tied, ids):
    m = make(tie_embeddings=tied)
    before = m(ids).detach()
    embedding = m.model.embed_tokens.weight.detach().clone()
    m.resize_vocab(140)
    after = m(ids)
    assert after.shape[-1] == m.config.vocab_size == 140
    assert torch.equal(m.model.embed_tokens.weight[:101], embedding)  # eq. 1-2
    assert torch.allclose(after[..., :101], before, atol=1e-5)
    assert 0.015 < m.model.embed_tokens.weight[101:].std() < 0.025
    assert (m.lm_head.weight is m.model.embed_tokens.weight) == tied
    m.resize_vocab(50)
    assert torch.equal(m.model.embed_tokens.weight, embedding[:50])


def test_a_grown_model_survives_its_folder(tmp_path, ids):
    m = make()
    m.resize_vocab(140)
    m.save_pretrained(tmp_path)
    assert torch.equal(Llama.from_pretrained(tmp_path)(ids), m(ids))


# ---- Folders -----------------------------------------------------------------------------------------------


def write_meta(m: Llama, folder, n_files: int) -> None:
    """The model as Meta would have released it: other names, other order of rows, split over n_files."""
    c, state = m.config, m.state_dict()

    def interleave(W, heads):  # (j, j + half) -> (2j, 2j + 1)
        return W.view(heads, 2, -1, W.shape[1]).transpose(1, 2).reshape(W.shape)

    meta = {
        "tok_embeddings.weight": (state["model.embed_tokens.weight"], 1),
        "norm.weight": (state["model.norm.weight"], None),
        "output.weight": (state["lm_head.weight"], 0),
    }
    for i in range(c.n_layers):
        s = {k.removeprefix(f"model.layers.{i}."): v for k, v in state.items()}
        for name, W, dim in (
            ("attention.wq", interleave(s["self_attn.q_proj.weight"], c.n_heads), 0),
            ("attention.wk", interleave(s["self_attn.k_proj.weight"], c.n_kv_heads), 0),
            ("attention.wv", s["self_attn.v_proj.weight"], 0),
            ("attention.wo", s["self_attn.o_proj.weight"], 1),
            ("feed_forward.w1", s["mlp.gate_proj.weight"], 0),
            ("feed_forward.w2", s["mlp.down_proj.weight"], 1),
            ("feed_forward.w3", s["mlp.up_proj.weight"], 0),
            ("attention_norm", s["input_layernorm.weight"], None),
            ("ffn_norm", s["post_attention_layernorm.weight"], None),
        ):
            meta[f"layers.{i}.{name}.weight"] = (W, dim)
    for i in range(n_files):
        part = {k: (W if dim is None else W.chunk(n_files, dim)[i]).clone() for k, (W, dim) in meta.items()}
        torch.save(part | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(
        json.dumps(
            {
                "dim": c.dim,
                "multiple_of": 16,
                "n_heads": c.n_heads,
                "n_kv_heads": c.n_kv_heads,
                "n_layers": c.n_layers,
                "norm_eps": c.norm_eps,
                "vocab_size": -1,
                "rope_theta": c.rope_theta,
            }
        )
    )


@pytest.mark.parametrize("n_files", [1, 2, 4])
def test_metas_layout_round_trip(n_files, tmp_path, ids):
    m = make(vocab_size=104, n_heads=8, n_kv_heads=4)
    write_meta(m, tmp_path, n_files)
    loaded = Llama.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), loaded.parameters()))
    assert torch.equal(loaded(ids), m(ids))


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"vocab_size": 104}, None),
        ({"vocab_size": 32000}, "vocab_size is 32000, which contradicts 104"),
        ({"ffn_dim_multiplier": 1.3, "max_seq_len": 4096, "max_batch_size": 32}, None),
        ({"use_scaled_rope": False}, None),
        ({"use_scaled_rope": True}, "use_scaled_rope is True"),
        ({"norm_eps": None}, "norm_eps is missing"),
        ({"quantization_args": {"group_size": 32}}, "unknown key 'quantization_args'"),
        ({"n_layers": 10**9}, "n_layers: must be"),
    ],
)
def test_metas_settings_are_honored_or_refused(changes, why, tmp_path):
    write_meta(make(vocab_size=104), tmp_path, 1)
    table = read_json(tmp_path / "params.json") | changes
    write_json(tmp_path / "params.json", {key: value for key, value in table.items() if value is not None})
    if why is None:
        assert Llama.from_pretrained(tmp_path).config.norm_eps == 1e-5
        return
    with pytest.raises(ValueError, match=why):
        Llama.from_pretrained(tmp_path)


def test_metas_rotation_of_neighbors_is_ours_after_the_permutation():
    """Scores with RoPE as Meta writes it (complex numbers from neighboring channels) against ours."""
    heads, dim, T, generator = 3, 8, 7, torch.Generator().manual_seed(0)
    x = torch.randn(1, T, heads * dim, generator=generator)
    Wq, Wk = (torch.randn(heads * dim, heads * dim, generator=generator) for _ in range(2))
    angles = torch.outer(torch.arange(T).float(), 1e4 ** (-torch.arange(0, dim, 2) / dim))
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    q, k = (
        torch.view_as_real(torch.view_as_complex((x @ W.T).view(1, T, heads, -1, 2)) * turn).flatten(3)
        for W in (Wq, Wk)
    )
    rope = rope_table(torch.arange(T)[None], dim, 1e4, torch.float32)
    q2, k2 = (rotate((x @ Matrix([W], 0, heads).whole().T).view(1, T, heads, dim), rope) for W in (Wq, Wk))
    scores, scores2 = (torch.einsum("bthd,bshd->bhts", a, b) for a, b in ((q, k), (q2, k2)))
    assert torch.allclose(scores, scores2, atol=1e-4)


@pytest.mark.parametrize(
    "name, hidden, shapes",
    [
        ("7B", 11008, (4096, 32, 32)),
        ("13B", 13824, (5120, 40, 40)),
        ("30B", 17920, (6656, 60, 52)),
        ("65B", 22016, (8192, 80, 64)),
    ],
)
def test_released_sizes(name, hidden, shapes):
    dim, n_layers, n_heads = shapes
    with torch.device("meta"):
        m = Llama(LlamaConfig(32000, dim, n_layers, n_heads, hidden))
    billions = sum(p.numel() for p in m.parameters()) / 1e9
    assert {"7B": 6.738, "13B": 13.016, "30B": 32.529, "65B": 65.286}[name] == pytest.approx(
        billions, abs=1e-3
    )


def rewrite(folder, tmp_path, **changes):
    """A copy of a folder whose config.json differs; None removes a key."""
    checkpoint.save_tensors(tmp_path / "model.safetensors", checkpoint.read_tensors(folder))
    table = read_json(folder / "config.json") | changes
    write_json(tmp_path / "config.json", {k: v for k, v in table.items() if v is not None})
    return tmp_path


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type is 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
        ({"rope_scaling": "yes"}, "unknown key 'rope_scaling'"),
        ({"head_dim": 12}, "head_dim"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "48"}, "hidden_size: expected int, found '48'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: must be 1 to 1000"),
        ({"vocab_size": -1}, "vocab"),
        ({"num_attention_heads": 7}, "n_heads"),
        ({"num_key_value_heads": 4}, "n_kv_heads"),
        ({"rms_norm_eps": 0}, "eps"),
        ({"intermediate_size": 81}, "gate_proj"),
        ({"num_hidden_layers": 2}, "layers.2"),
        ({"vocab_size": 102}, "embed"),
        ({"num_hidden_layers": 4}, "layers.3.*missing"),
        ({"rope_scaling": {"rope_theta": 9.0}}, "rope_scaling.rope_theta is 9.0, which contradicts 5000.0"),
        ({"rope_parameters": {"rope_type": "default", "factor": 4}}, "unknown key 'rope_parameters.factor'"),
        ({"max_position_embeddings": 2**24}, "max_position_embeddings: must be 1 to"),
        ({"sliding_window": 4096}, "unknown key 'sliding_window'"),
        ({"quantization_config": {"bits": 4}}, "unknown key 'quantization_config'"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "unknown key 'auto_map'"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from the embedding that it is tied to"),
        ({"tie_word_embeddings": 3}, "tie_word_embeddings: expected bool"),
    ],
)
def test_configs_that_do_not_fit_are_refused_in_one_line(saved, tmp_path, changes, why):
    with pytest.raises(ValueError, match=why) as error:
        Llama.from_pretrained(rewrite(saved, tmp_path, **changes))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_folders_that_hold_no_llama_are_refused_in_one_line(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="no LLaMA"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a table"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="no weights"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda part: part.pop("norm.weight"), "norm.weight is missing"),
        (lambda part: part.update(extra=torch.ones(1)), "extra"),
        (lambda part: part.pop("output.weight"), "not a LLaMA"),
        (
            lambda part: part.update({"layers.1.attention.wo.weight": torch.ones(3, 5)}),
            "layers.1.self_attn.o_proj",
        ),
        (
            lambda part: part.update({"layers.1.attention.wq.weight": torch.ones(7, 5)}),
            "layers.1.self_attn.q_proj",
        ),
        (
            lambda part: part.update({"layers.1.feed_forward.w3.weight": torch.ones(7)}),
            "layers.1.mlp.up_proj",
        ),
    ],
)
def test_damaged_meta_folders_are_refused_in_one_line(damage, why, tmp_path):
    write_meta(make(vocab_size=104, n_heads=8, n_kv_heads=4), tmp_path, 2)
    part = torch.load(tmp_path / "consolidated.01.pth", weights_only=True)
    damage(part)
    torch.save(part, tmp_path / "consolidated.01.pth")
    with pytest.raises(ValueError, match=re.escape(why)) as error:
        Llama.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_list_of_devices_spreads_the_layers(saved, ids, model):
    """With one real device the arithmetic can be checked; where each layer went, with the meta device."""
    both = Llama.from_pretrained(saved, device=["cpu", "cpu"])
    assert torch.equal(both(ids), model(ids))
    split = Llama.from_pretrained(saved, device=["cpu", "meta"])
    where = [layer.self_attn.q_proj.weight.device.type for layer in split.model.layers]
    assert where == ["cpu", "cpu", "meta"] and split.lm_head.weight.device.type == "cpu"
    cache = split.new_cache(3, 24)
    assert [layer.k.device.type for layer in cache.layers] == where


# ---- Eight bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_int8_error_is_at_most_half_a_step(dtype, tolerance):
    torch.manual_seed(0)
    W = torch.randn(32, 64) * torch.logspace(-3, 2, 32)[:, None]  # rows of very different size
    layer, few = Int8Linear(W), torch.randn(2, 5, 64)
    step = W.abs().amax(1) / 127
    back = layer.weight.float() * layer.scale[:, None]
    assert ((back - W).abs() <= step[:, None] * 0.501).all() and layer.weight.dtype == torch.int8
    for x in (few, few.repeat(1, 9, 1)):  # few rows and many take different branches
        y, exact = layer(x.to(dtype)), x.to(dtype).float() @ back.T
        assert y.dtype == dtype and y.shape == (*x.shape[:2], 32)
        assert ((y.float() - exact).abs() <= tolerance * exact.abs().amax((0, 1))).all()
    assert torch.isfinite(Int8Linear(torch.zeros(4, 8))(torch.ones(1, 8))).all()  # a row of zeros


@pytest.mark.parametrize("bf16", [False, True])
def test_a_gradient_goes_through_int8_and_keeps_the_bytes_alone(bf16):
    torch.manual_seed(0)
    layer = Int8Linear(torch.randn(32, 64))
    W = layer.weight.float() * layer.scale[:, None]
    x = torch.randn(2, 5, 64, requires_grad=True)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), hooks:
        y = layer(x)
    assert y.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert {(t.dtype, t.numel()) for t in saved} == {(torch.int8, 32 * 64), (torch.float32, 32)}
    weight = torch.randn(2, 5, 32)
    (found,) = torch.autograd.grad((y.float() * weight).sum(), x)
    expected = weight @ W
    assert (found - expected).abs().max() <= (0.03 if bf16 else 1e-5) * expected.abs().max()


def test_int8_model_is_close_and_small(saved, model, ids):
    rounded = Llama.from_pretrained(saved, int8=True)
    kinds = {name for name, m in rounded.named_modules() if isinstance(m, Int8Linear)}
    assert len(kinds) == 3 * 7 and "lm_head" not in kinds
    with torch.no_grad():
        exact, near = model(ids), rounded(ids)
    assert 1e-4 < (near - exact).std() / exact.std() < 0.05
    with pytest.raises(ValueError, match="int8"):
        rounded.save_pretrained(saved / "rounded")


# ---- Memory ------------------------------------------------------------------------------------------------

BUILD = Path(__file__).with_name("build_7b.py")


def peak_ratio(folder, kind: str) -> float:
    """Peak of anonymous memory while loading, in a process of its own, over the size of the weights in
    bf16."""
    out = subprocess.run(
        [sys.executable, BUILD, folder, "--load", kind], capture_output=True, text=True, check=True
    )
    result = json.loads(out.stdout)
    assert result["finite"]
    return result["peak_ratio"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "size, limits",
    [
        pytest.param(
            {"layers": 8, "dim": 1024, "hidden": 2752, "vocab": 1000}, {"bf16": 1.15, "int8": 0.7}, id="0.1B"
        ),
        pytest.param(
            {}, {"bf16": 1.15, "int8": 0.65}, id="7B", marks=pytest.mark.slow
        ),  # 14 GB disk, 16 GB memory
    ],
)
def test_loading_needs_little_more_than_the_model(size, limits, tmp_path):
    build(tmp_path, **size)
    try:
        for kind, limit in limits.items():
            assert 0.5 < peak_ratio(tmp_path, kind) < limit, kind
    finally:
        shutil.rmtree(tmp_path)

"""Generation against slow and simple versions of itself, and against transformers."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import generate
import llama
import lora
import tokenizer
from generate import GREEDY, PAPER, Decoding, Sampling

pytestmark = pytest.mark.usefixtures("one_thread")
K = 20


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> tokenizer.Tokenizer:
    lines = ["what is two plus two", "two plus two is four"] * 5
    return tokenizer.Tokenizer.train(lines, tmp_path_factory.mktemp("tokenizer"), 420, K)


@pytest.fixture(scope="module")
def wild(tok) -> llama.Llama:
    """Random weights, larger than usual so that no two logits are close."""
    torch.manual_seed(1)
    c = llama.LlamaConfig(len(tok), dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, max_len=512)
    model = llama.Llama(c).eval()
    for p in model.parameters():
        p.data *= 8 if p.dim() == 2 else 1
    return model


def allowed(tok, ids: list[int]) -> set[int]:
    """The tokens that the grammar lets follow, found by walking through all that came before."""
    speaking, last = False, None
    for i in ids:
        speaking = i == tok.sosp or (speaking and i != tok.eosp)
        last = i
    if speaking:
        return {*tok.unit_ids, tok.eosp} - {last}
    return set(range(len(tok))) - {
        *tok.unit_ids,
        tok.eosp,
        tok.unk,
        tok.bos,
        tok.human,
        tok.speechgpt,
        tok.eoh,
    }


@pytest.mark.parametrize("seed", range(4))
def test_grammar_holds_for_thousands_of_tokens(tok, wild, seed):
    prompts = [
        [tok.bos, tok.sosp],
        [tok.bos, 300, 301],
        [tok.bos, tok.sosp, tok.unit_id(3)],
        [tok.bos, tok.eosp],
    ] * 2
    hot = Sampling(temperature=20.0)  # nearly uniform: markers and units all have a chance
    how = Decoding(hot, hot, max_new=400)
    out = generate.generate(wild, prompts, tok, how, torch.Generator().manual_seed(seed))
    assert sum(map(len, out)) > 400
    for prompt, new in zip(prompts, out):
        for n, token in enumerate(new):
            assert token in allowed(tok, prompt + new[:n]), (n, token)
        assert not {tok.eos, tok.eoa} & set(new[:-1])
        assert new[-1] in (tok.eos, tok.eoa) or len(new) == 400
        units = [i for i in new if i in tok.unit_ids]
        assert len(tok.parse(prompt[1:] + new).ua) >= len(units) - len(new)


def test_free_generation_breaks_the_grammar(tok, wild):
    hot = Sampling(temperature=20.0)
    how = Decoding(hot, hot, max_new=200, free=True)
    (new,) = generate.generate(wild, [[tok.bos, 300]], tok, how, torch.Generator().manual_seed(0))
    assert any(token not in allowed(tok, [tok.bos, 300, *new[:n]]) for n, token in enumerate(new))


def slow_greedy(model, tok, prompt: list[int], n: int) -> list[int]:
    """No cache, no batch, no tables."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        ids.append(max(allowed(tok, ids), key=lambda i: logits[i].item()))
        if ids[-1] in (tok.eos, tok.eoa):
            break
    return ids[len(prompt) :]


def test_batched_greedy_equals_one_by_one_equals_slow(tok, wild):
    prompts = [[tok.bos, *range(300, 300 + n)] for n in (1, 7, 30)]
    prompts += [[tok.bos, tok.sosp], [tok.bos, tok.sosp, tok.unit_id(4)]]
    how = Decoding(GREEDY, GREEDY, max_new=40)
    batch = generate.generate(wild, prompts, tok, how)
    assert batch == [generate.generate(wild, [p], tok, how)[0] for p in prompts]
    assert batch == [slow_greedy(wild, tok, p, 40) for p in prompts]
    assert len({tuple(new) for new in batch}) > 1


def test_an_output_layer_with_an_adapter_generates(tok, wild):
    model = lora.apply(copy.deepcopy(wild), 2, 4.0, ["lm_head"]).eval()
    prompts = [[tok.bos, tok.sosp], [tok.bos, 300, 301]]
    how = Decoding(GREEDY, GREEDY, max_new=10)
    assert generate.generate(model, prompts, tok, how) == generate.generate(wild, prompts, tok, how)


def test_batch_draws_what_single_prompts_would_draw_in_turn(tok, wild):
    how = Decoding(Sampling(2.0, 30, 0.9), Sampling(2.0, 30, 0.9), 40)
    prompts = [[tok.bos, tok.sosp], [tok.bos, 300, 301, 302], [tok.bos, tok.sosp, tok.unit_id(4)]]
    batch = generate.generate(wild, prompts, tok, how, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    assert batch == [generate.generate(wild, [p], tok, how, generator)[0] for p in prompts]
    assert batch != generate.generate(wild, prompts, tok, how, torch.Generator().manual_seed(4))


def test_text_is_greedy_and_speech_is_drawn(tok, wild):
    drawn = Decoding(GREEDY, Sampling(5.0), 100)
    outs = [
        generate.generate(wild, [[tok.bos, tok.sosp]], tok, drawn, torch.Generator().manual_seed(s))[0]
        for s in range(6)
    ]
    assert len({tuple(new) for new in outs}) == 6
    for new in outs:
        if tok.eosp in new:  # all that follows is the likeliest text
            n = new.index(tok.eosp) + 1
            text = [i for i in new[n : n + 10]]
            assert (
                text == slow_greedy(wild, tok, [tok.bos, tok.sosp, *new[:n]], 10)[: len(text)]
                or tok.sosp in text
            )


def test_the_context_is_the_limit(tok, wild):
    prompt = [tok.bos] + [300] * 500
    (new,) = generate.generate(wild, [prompt], tok, Decoding(max_new=1000))
    assert len(new) <= wild.config.max_len - len(prompt)
    for prompts, says in (([[300] * 512], "this one has 512"), ([[300], []], "this one has 0")):
        with pytest.raises(ValueError, match=f"1 to 511 ids in this model's context; {says}"):
            generate.generate(wild, prompts, tok)
    assert generate.generate(wild, [], tok) == []


def test_a_model_of_text_alone_generates(tok, wild):
    text = llama.Llama(replace(wild.config, vocab_size=tok.n_text)).eval()
    how = Decoding(Sampling(20.0), Sampling(20.0), 50)
    (new,) = generate.generate(text, [[1, 300]], tok, how, torch.Generator().manual_seed(0))
    assert 0 < len(new) <= 50 and max(new) < tok.n_text and tok.bos not in new


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("how", [Decoding(), Decoding(PAPER, PAPER), Decoding(PAPER, PAPER, free=True)])
def test_logits_that_leave_nothing_to_choose_are_one_line(tok, wild, monkeypatch, value, after, how):
    """NaN anywhere, or -inf for all that the grammar allows; at once or after some tokens."""
    steps = []
    real = generate.decode_one_token

    def decode_one_token(model, last, cache):
        steps.append(1)
        logits = real(model, last, cache)
        return logits if len(steps) < after else torch.full_like(logits, value)

    monkeypatch.setattr(generate, "decode_one_token", decode_one_token)
    if not after:
        prefill = generate.prefill
        monkeypatch.setattr(generate, "prefill", lambda *a: torch.full_like(prefill(*a), value))
    with pytest.raises(ValueError, match="float32"):
        generate.generate(wild, [[1, 300], [1, tok.sosp]], tok, how, torch.Generator().manual_seed(0))
    assert len(steps) == after


def reference(logits: torch.Tensor, how: Sampling) -> torch.Tensor:
    """The distribution by definition, with a sort of everything and loops."""
    p = (logits.double() / how.temperature).softmax(0)
    order = sorted(range(len(p)), key=lambda i: -p[i])[: how.top_k or len(p)]
    p = {i: p[i].item() / sum(p[j].item() for j in order) for i in order}
    kept, mass = [], 0.0
    for i in order:  # the smallest set that holds top_p: the token that crosses is in
        if mass >= how.top_p:
            break
        kept.append(i)
        mass += p[i]
    out = torch.zeros(len(logits), dtype=torch.double)
    for i in kept:
        out[i] = p[i] / mass
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 3), st.integers(0, 40), st.floats(0.05, 1))
def test_sample_token_has_the_right_distribution(seed, temperature, top_k, top_p):
    how = Sampling(temperature, top_k, top_p)
    logits = 3 * torch.randn(30, generator=torch.Generator().manual_seed(seed))
    grid = (torch.arange(4000) + 0.5) / 4000  # every draw once: frequencies are the distribution up to 1/4000
    tokens = generate.sample_token(logits.expand(4000, -1), how, grid)
    found = torch.bincount(tokens, minlength=30) / 4000
    expected = reference(logits, how)
    if (found - expected).abs().max() > 2 / 4000:
        # a token on the very edge of top_p may fall to either side of it by rounding
        nudged = [reference(logits, Sampling(temperature, top_k, min(1.0, top_p + d))) for d in (-1e-5, 1e-5)]
        assert min((found - e).abs().max() for e in nudged) <= 2 / 4000


@pytest.mark.parametrize(
    "how", [PAPER, generate.OFFICIAL, Sampling(1.0), Sampling(0.5, top_p=0.3), Sampling(2.0, 3)]
)
def test_sample_token_agrees_with_transformers(how):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = 4 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    chain = [warpers.TemperatureLogitsWarper(how.temperature)]
    chain += [warpers.TopKLogitsWarper(how.top_k)] if how.top_k else []
    chain += [warpers.TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
    warped = logits
    for warper in chain:
        warped = warper(None, warped)
    kept = warped.isfinite()
    grid = torch.linspace(0, 1 - 1e-7, 500)
    tokens = generate.sample_token(logits.repeat_interleave(500, 0), how, grid.repeat(50)).view(50, 500)
    drawn = torch.zeros_like(kept).scatter_(1, tokens, True)
    assert not (drawn & ~kept).any()
    assert drawn[warped.softmax(-1) > 4e-3].all()


def test_what_is_forbidden_is_never_drawn_whatever_the_chance():
    logits = torch.full((1, 50), -torch.inf)
    logits[0, [3, 4, 5]] = torch.tensor([1.0, 0.0, -30.0])
    for how in (Sampling(1.0), Sampling(1.0, top_k=20), Sampling(0.1, 20, 1.0), PAPER):
        for u in (0.0, 0.5, 1 - 2**-24):
            assert generate.sample_token(logits, how, torch.tensor([u])).item() in (3, 4, 5)


@pytest.mark.parametrize(
    "bad",
    [
        dict(temperature=-1),
        dict(temperature=1e-40),  # logits / temperature would be infinite
        dict(temperature=float("inf")),  # and here NaN, of what is forbidden
        dict(temperature=float("nan")),
        dict(top_k=-1),
        dict(top_p=0),
        dict(top_p=1.5),
    ],
)
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(ValueError, match="needs temperature"):
        Sampling(**bad)


def test_greedy_continuation_is_that_of_transformers(tok, wild, tmp_path):
    transformers = pytest.importorskip("transformers")
    wild.save_pretrained(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    prompt = [1, 300, 301, 302]
    theirs = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=[tok.eos, tok.eoa]
    )
    how = Decoding(GREEDY, GREEDY, 64, free=True)
    assert generate.generate(wild, [prompt], tok, how)[0] == theirs[0, 4:].tolist()


def test_a_stream_gives_the_same_tokens_step_by_step(tok, wild):
    how = Decoding(Sampling(20.0), Sampling(20.0), 200, stop=(tok.eosp,))
    prompts = [[tok.bos, tok.sosp], [tok.bos, 300, 301, 302], [tok.bos, 300]]
    whole = generate.generate(wild, prompts, tok, how, torch.Generator().manual_seed(2))
    assert len({len(new) for new in whole}) > 1  # some end before others
    steps = list(generate.stream(wild, prompts, tok, how, torch.Generator().manual_seed(2)))
    assert len(steps) == max(map(len, whole))
    for row, new in enumerate(whole):
        assert [tokens[row] for tokens in steps] == new + [None] * (len(steps) - len(new))


def test_between_two_steps_of_a_stream_the_caller_is_undisturbed(tok, wild):
    torch.set_num_threads(2)
    try:
        for tokens in generate.stream(wild, [[tok.bos, 300]], tok, Decoding(GREEDY, GREEDY, 3)):
            assert torch.get_num_threads() == 2 and not torch.is_inference_mode_enabled()
            assert len(tokens) == 1
    finally:
        torch.set_num_threads(1)


def test_an_answer_ends_at_a_stop_token(tok, wild):
    hot = Sampling(20.0)
    prompt = [tok.bos, tok.sosp]
    endless = Decoding(hot, hot, 200)
    (new,) = generate.generate(wild, [prompt], tok, endless, torch.Generator().manual_seed(1))
    assert tok.eosp in new[:-1]
    stopped = replace(endless, stop=(tok.eosp,))
    (cut,) = generate.generate(wild, [prompt], tok, stopped, torch.Generator().manual_seed(1))
    assert cut == new[: new.index(tok.eosp) + 1]

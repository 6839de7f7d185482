"""training/plan.py: its arithmetic against known numbers, its memory against what a step allocates."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.profiler import ProfilerActivity, profile

import config
import llama
import lora
import packed
import train
from data import batches
from llama import Llama, LlamaConfig, rope_table
from packed import PackedAttention
from run import Run
from tokenizer import Tokenizer
from training import before, loop, meters, plan, shard

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


def read(name: str, *flags: str) -> train.Config:
    return config.read(ROOT / f"configs/{name}.toml", train.Config, [*flags])


# ---- The configs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, ranks", [("small", 1), ("small", 16), ("paper-7b", 96), ("paper-13b", 96)])
def test_the_configs_pass_what_is_checked_before_the_first_stage(name, ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setattr(shard, "memory", lambda device: 80 * 2**30)  # of an A100
    monkeypatch.setattr(before, "open_hubert", lambda section: None)  # there is no folder
    c = read(name, "--pretrained", "", "--out", str(tmp_path))  # without weights the shape is [llama]
    run = Run(tmp_path, tmp_path / "corpus", 0, torch.device("cpu"))
    before.check_before(train.STAGES, tuple(train.STAGES), run, c)
    assert c.vocoder.adversarial_start < c.vocoder.steps, "no discriminators"
    assert c.units.clusters == c.vocoder_model.num_embeddings == 1000


@pytest.mark.parametrize("name", ["paper-7b", "paper-13b"])
def test_the_papers_configs_have_its_table_3(name):
    c = read(name)
    table = {  # batch size, peak rate, length, steps
        "stage1": (768, 2e-4, 1024, 900),
        "stage2": (1536, 2e-4, 512, 2100),  # §5.1; Table 3: 4000
        "stage3": (128, 2e-4, 1024, 4200),
    }
    for stage, row in table.items():
        section = getattr(c, stage)
        assert (section.batch_size, section.lr, section.max_len, section.steps) == row
    assert (c.lora.r, c.lora.alpha) == (8, 16)
    text = (ROOT / f"configs/{name}.toml").read_text(encoding="utf-8")
    assert "--stage2.steps 4000" in text


# ---- Counting ----------------------------------------------------------------------------------------------


def test_parameters_are_those_known():
    """Meta's LLaMAs have 6,738,415,616 and 13,015,864,320; the released adapter 16.8 MB of float32; the paper
    says 6 M for 13B."""
    new = 1006
    for name, known, dim, adapters in (
        ("paper-7b", 6_738_415_616, 4096, 4_194_304),
        ("paper-13b", 13_015_864_320, 5120, 6_553_600),
    ):
        c = read(name)
        model = plan.build(c, "stage2")
        assert plan.parts(model).total() == plan.trained(model) == known + 2 * new * dim
        adapted = plan.build(c, "stage3")
        assert plan.trained(adapted) == plan.parts(adapted)["adapters"] == adapters
        assert {p.device.type for p in model.parameters()} == {"meta"}
    assert 100e6 < plan.parts(plan.build(read("small"), "stage2")).total() < 150e6
    tok = Tokenizer.from_pretrained(ROOT / "weights/tiny/llama")
    assert len(tok) - tok.n_text - tok.n_units == plan.MARKERS


def test_flops_are_those_of_the_matrices_and_of_attention():
    c = LlamaConfig(vocab_size=100, dim=16, n_layers=2, n_heads=4, hidden_dim=40, n_kv_heads=2)
    model = Llama(c)
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 40
    attention = 12 * 2 * 16 * 50
    assert meters.flops(model, 50) == 6 * (2 * layer + 1600) + attention
    assert meters.matrices(model) == sum(p.numel() for p in model.parameters() if p.ndim == 2) - 1600
    lora.apply(model, 3, 1, ["q_proj"])
    assert meters.flops(model, 50) == 4 * (2 * layer + 1600) + 6 * 2 * 2 * 3 * 16 + attention


# ---- Memory: counted against measured ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets", [[], ["q_proj", "v_proj"], ["k_proj", "o_proj", "gate_proj", "down_proj"]]
)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_what_a_layer_keeps_is_what_autograd_saves(targets, bf16, kv_heads, monkeypatch):
    """To the byte, with attention as on GPUs."""

    def on_gpu(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    monkeypatch.setattr(packed, "causal_attention", on_gpu)
    model = Llama(LlamaConfig(50, 64, 1, 4, 160, kv_heads))
    if targets:
        lora.apply(model, 8, 16, targets)
    T = 24
    docs = torch.zeros(2, T, dtype=torch.long)
    rope = rope_table(torch.arange(T)[None], 16, 1e4, torch.float32)
    x = torch.randn(2, T, 64, requires_grad=True)
    rows = PackedAttention(docs)
    others = [*model.parameters(), *rope, *rows.groups, rows.back]
    known = {t.untyped_storage().data_ptr() for t in others}
    saved = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        whole = t.untyped_storage()
        is_weight = t.ndim == 2 and t.shape[0] != 2 * T  # copies of weights in bfloat16 count elsewhere
        if whole.data_ptr() not in known and t.is_floating_point() and not is_weight:
            saved[whole.data_ptr()] = (whole.nbytes(), t)  # kept, so that no other gets its place
        return t

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), saved_tensors_hooks(pack, lambda t: t):
        y = model.model.layers[0](x, rope, rows, None)
    section = train.Language(bf16=bf16, max_len=T)
    assert y.shape == x.shape
    assert sum(n for n, _ in saved.values()) == 2 * T * plan.kept_in_layer(model, section, fused=True)


def measured(shape: dict, section: train.Language, targets: list[str], out: Path) -> tuple[Llama, int]:
    """Bytes that building a model and training it by training/loop.py have allocated at once, on this CPU."""
    c = LlamaConfig(**shape)
    n = section.batch_size // section.accumulate
    mask = [True] * section.max_len

    def batch_at(step: int) -> list:
        ids = torch.randint(c.vocab_size, (section.batch_size, section.max_len)).tolist()
        return [
            batches.pack([(row, mask) for row in ids[i : i + n]], section.max_len)
            for i in range(0, len(ids), n)
        ]

    def loss(model: Llama, batch) -> loop.Loss:
        total, weight = llama.next_token_losses(model, *batch)
        return loop.Loss(total, weight, weight, {})

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = Llama(c)
        if targets:
            lora.apply(model, 8, 16, targets)
        run = Run(out, out, 0, torch.device("cpu"))
        loop.optimize(run, "measured", out / "state", model, loss, batch_at, section)
    profiler.export_chrome_trace(str(out / "trace.json"))
    trace = json.loads((out / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in trace if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    return model, max(totals) - (totals[0] - events[0]["args"]["Bytes"])


SHAPE = {"dim": 256, "n_layers": 6, "n_heads": 4, "hidden_dim": 688}
LARGE = {"dim": 768, "n_layers": 12, "n_heads": 12, "hidden_dim": 2048, "vocab_size": 16_000}  # 110 M


@pytest.mark.parametrize(
    "shape, targets, changes",
    [
        (SHAPE | {"vocab_size": 500}, [], {}),
        (SHAPE | {"vocab_size": 8000}, [], {"accumulate": 2}),
        (SHAPE | {"vocab_size": 500, "n_kv_heads": 2}, ["q_proj", "v_proj"], {}),
        (SHAPE | {"vocab_size": 500}, [], {"muon": True, "batch_size": 2}),
        (LARGE, [], {"batch_size": 2, "max_len": 32}),
        (SHAPE | {"vocab_size": 500}, [], {"checkpointing": "block"}),
        (SHAPE | {"vocab_size": 500}, [], {"checkpointing": "selective"}),
        (SHAPE | {"vocab_size": 500}, [], {"state_dtype": "bfloat16"}),
    ],
    ids=["5M", "9M accumulate", "5M adapters", "5M muon", "110M", "5M block", "5M selective", "5M bfloat16"],
)
def test_a_step_takes_the_memory_that_the_plan_says(shape, targets, changes, tmp_path, one_thread):
    settings = {"steps": 2, "batch_size": 4, "max_len": 96, "bf16": False, "warmup": 0}
    section = train.Language(**settings | changes)
    model, found = measured(shape, section, targets, tmp_path)
    said = plan.memory(model, section, 1, fused=False).peak
    assert abs(said - found) < 0.05 * found, f"planned {said / MIB:.1f} MiB, measured {found / MIB:.1f}"


def test_several_gpus_exchange_gradients_through_buffers(tmp_path, monkeypatch, one_thread):
    section = train.Language(steps=2, batch_size=2, max_len=32, bf16=False, warmup=0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        # Without the first broadcast, whose memory another thread frees, which the profiler does not see.
        monkeypatch.setattr(loop.shard, "distribute", lambda name, model, *_: DDP(model, init_sync=False))
        model, found = measured(SHAPE | {"vocab_size": 500}, section, [], tmp_path)
    finally:
        dist.destroy_process_group()
    said = plan.memory(model, dataclasses.replace(section, batch_size=4), 2, fused=False).peak
    assert abs(said - found) < 0.05 * found, f"planned {said / MIB:.1f} MiB, measured {found / MIB:.1f}"


def test_copies_in_bfloat16_are_counted(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(loop, "choose_bf16", lambda *a, **k: True)
    section = train.Language(steps=2, batch_size=2, max_len=32, warmup=0)
    model, found = measured(SHAPE | {"vocab_size": 500}, section, [], tmp_path)
    said = plan.memory(model, section, 1, fused=False)
    assert abs(said.peak - found) < 0.05 * found and said.copies > 0.07 * found


# ---- The report --------------------------------------------------------------------------------------------


def plan_of(name: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "train.py", f"configs/{name}.toml", "--plan", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_plan_needs_no_weights_and_starts_nothing(tmp_path):
    began = time.perf_counter()
    done = plan_of("paper-13b", "--gpus", "96", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists() and time.perf_counter() - began < 30
    lines = done.stdout.splitlines()
    (stage1, memory) = (line.split() for line in lines if line.startswith("stage1") and "fits on" not in line)
    N = 13_026_165_760 - 33_006 * 5120 - 81 * 5120
    total = 786_432 * 900 * (6 * N + 12 * 40 * 5120 * 1024)
    assert stage1[1:6] == ["13,026,165,760", "13,026,165,760", "786,432", "900", "7.08e+08"]
    assert stage1[6:] == [f"{total:.2e}", f"{total / (96 * 312e12 * 0.4 * 3600):.2f}"]
    assert memory[:2] == ["stage1,", "divided"] and memory[-1] == "fits"
    assert memory[2] == f"{13_026_165_760 * 4 / 96 / 2**30:.2f}"
    assert "stage1  fits on 96 of: A100-80GB, H100, " in done.stdout and max(map(len, lines)) <= 125


def test_what_a_plan_says_follows_the_flags():
    c = read("paper-7b", "--stage2.steps", "4000")
    said = plan.describe("it", c, 8, "H200", 0.5)
    assert "it on 8 x H200 (989 TFLOPS, 140 GiB each)" in said and "hours at 50 % of peak" in said
    assert " 4,000 " in said and "stage1, divided" in said and "stage3, whole" in said
    whole = plan.describe("it", read("paper-7b", "--stage1.sharding", "ddp"), 8, "H200", 0.5)
    assert re.search(r"stage1, whole .* does not fit\n", whole)
    assert "text " not in said and "stage3" not in plan.describe("it", read("own"), 1, "H100", 0.4)


def test_a_plan_says_what_would_make_it_fit():
    """Where it says nothing, nothing would: and with the flags that it names the stage does fit."""
    c = read("paper-7b", "--stage1.checkpointing", "none")
    said = plan.describe("it", c, 8, "A100-80GB", 0.4).split("GiB on each GPU")[1].splitlines()
    flags = next(said[i + 2] for i, line in enumerate(said) if line.startswith("stage1"))
    assert flags.split()[0] == "--stage1.checkpointing"
    changed = plan.describe("it", read("paper-7b", *flags.split()), 8, "A100-80GB", 0.4)
    assert re.search(r"stage1, divided .*  fits\n", changed)
    lost = plan.describe("it", c, 1, "RTX-4090", 0.4)
    assert "--stage1" not in lost and "stage1  fits on 1 of: no GPU of this table" in lost


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gpu", "Abacus"], "--gpu Abacus is unknown; choose one of A100-40GB"),
        (["--gpus", "0"], "--gpus must be 1 to 100000"),
        (["--gpus", "many"], "--gpus: invalid int value: 'many'"),
        (["--mfu", "nan"], "--mfu above 0 and at most 1"),
        (["--gpus", "4096"], "stage1.batch_size is 768: less than one for each of 4096"),
        (["--stage1.steps", "0", "--stage2.steps", "0", "--stage3.steps", "0"], "there is nothing to plan"),
    ],
)
def test_mistakes_are_one_line(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "configs/paper-7b.toml", "--plan", *flags])
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError) as problem:
        train.main()
    assert words in str(problem.value) and len(str(problem.value)) < 300 and "\n" not in str(problem.value)
    assert not capsys.readouterr().out


def test_flags_of_a_plan_start_no_training(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", str(ROOT / "configs/ci.toml"), "--gpus", "8"])
    with pytest.raises(ValueError, match="unknown key 'gpus'"):
        train.main()


def test_the_plans_in_the_docs_are_those_that_are_printed(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    pasted = re.findall(
        r"^```bash\npython train.py (\S+) --plan([^\n]*)\n```\n+```text\n(.*?)\n```", page, re.M | re.S
    )
    assert len(pasted) == 5
    for file, words, text in pasted:
        gpus, flags = plan.parse_flags(words.split())
        assert plan.describe(file, config.read(file, train.Config, flags), **vars(gpus)) == text


def test_a_model_in_int8_is_as_large_and_takes_a_byte_for_a_weight():
    c = read("paper-7b")
    plain = plan.build(c, "stage3")
    c.lora.int8 = True
    small = plan.build(c, "stage3")
    assert plan.parts(small) == plan.parts(plain) and plan.trained(small) == plan.trained(plain)
    assert meters.flops(small, 100) == meters.flops(plain, 100)
    section = c.stage3
    layers = meters.matrices(plain) - 4096 * plain.config.vocab_size
    for divided, saved in ((False, 3), (True, 1 / 8)):  # bytes of float32; of bfloat16 divided by eight
        was, now = (plan.memory(model, section, 8, divided=divided) for model in (plain, small))
        assert (was.weights - now.weights) / layers == pytest.approx(saved, abs=0.01)
    assert now.peak < was.peak + layers


def test_a_pretrained_folder_has_its_own_shape(tmp_path):
    c = read("ci", "--pretrained", str(tmp_path))
    c.llama = None
    with pytest.raises(ValueError, match=r"config.json is not there to plan with; add a section \[llama\]"):
        plan.build(c, "stage1")
    model = Llama(LlamaConfig(vocab_size=100, dim=16, n_layers=2, n_heads=4, hidden_dim=40))
    model.save_pretrained(tmp_path)
    assert plan.build(c, "stage1").config.vocab_size == 100 + 20 + plan.MARKERS
    c.pretrained = str(ROOT / "weights/tiny/llama")  # which has grown already
    assert plan.build(c, "stage1").config.vocab_size == 1646

"""What a step cost: meters against clocks and sums of their own."""

import json
import sys
import time

import pytest
import torch
from runs import ROOT

import config
import train
import train_language
from data import batches
from llama import Llama, LlamaConfig
from run import Metrics
from training import meters
from training.meters import GPUS, Meters, flops, gpu_of

CPU = torch.device("cpu")
MODEL = LlamaConfig(vocab_size=100, dim=16, n_layers=2, n_heads=4, hidden_dim=40)


@pytest.mark.parametrize(
    "driver, row",
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 3090", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_gpu_is_known_by_what_its_driver_calls_it(driver, row):
    assert gpu_of(driver) == (GPUS[row] if row else None)


def slow(batches):
    for batch in batches:
        time.sleep(0.05)
        yield batch


def test_the_clock_has_work_and_waiting_and_nothing_of_an_evaluation():
    found = []
    meter = Meters(CPU, torch.nn.Linear(1, 1))
    for batch in meter.waiting(slow(range(3))):
        time.sleep(0.05)
        found.append(meter.read(100))
        if batch == 1:
            time.sleep(0.3)  # an evaluation
            meter.begin()
    for cost in found:
        assert 0.3 < cost["wait"] < 0.65
        assert 500 < cost["tokens_per_s"] == cost["tokens_per_s_each"] < 1000
        assert "mfu" not in cost


def test_each_of_many_processes_has_its_part(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    cost = Meters(CPU, torch.nn.Linear(1, 1)).read(100)
    assert cost["tokens_per_s"] == pytest.approx(4 * cost["tokens_per_s_each"])


def test_utilization_is_the_models_flops_of_those_of_the_gpu(monkeypatch):
    model = Llama(MODEL)
    meter = Meters(CPU, model)
    meter.gpu = GPUS["H100"]
    clock = iter([10.0, 12.0, 12.0])
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(clock))
    meter.begin()
    assert meter.read(1000, 50.0)["mfu"] == pytest.approx(500 * flops(model, 50) / 989e12)


@pytest.mark.skipif(sys.platform == "win32", reason="not known there")
def test_peak_memory_has_what_was_there_once():
    before = meters.peak_memory(CPU)
    x = torch.ones(100 * 2**20)  # 400 MB
    del x
    now = meters.peak_memory(CPU)
    assert 50e6 < before and now - before < 500e6
    assert now >= 400e6


def test_padding_and_length_are_those_of_the_documents():
    documents = [(list(range(1, 8)), [True] * 7), (list(range(1, 5)), [True] * 4)]
    ids, mask, positions, docs = batches.pack(documents, 8)
    loss = train_language.language_loss(torch.ones(100))
    found = loss(Llama(MODEL), (ids, mask, positions, docs))
    total, count = found.metrics["length"]
    assert (total.item(), count.item()) == (7 * 7 + 4 * 4, 11)
    empty, all_of_it = found.metrics["padding"]
    assert (empty.item(), all_of_it.item()) == (ids.numel() - 11, ids.numel())


def test_tensorboard_is_asked_for_before_anything_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("run.find_spec", lambda name: None)
    arguments = [ROOT / "configs/ci.toml", "--out", tmp_path / "ci", "--tensorboard=true"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        config.command_line(train.main)
    assert ended.value.code == 1 and not (tmp_path / "ci").exists()
    assert capsys.readouterr().err == (
        "error: --tensorboard true needs the package tensorboard: pip install tensorboard\n"
    )


def test_tensorboard_gets_the_numbers_that_the_lines_have(tmp_path, monkeypatch):
    scalars = []

    class Writer:
        def __init__(self, folder, purge_step):
            scalars.append((folder, purge_step))

        def add_scalar(self, key, value, step):
            scalars.append((key, value, step))

        def flush(self):
            scalars.append("flushed")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = Metrics(tmp_path / "stage1.jsonl", tensorboard=True)
    log.write(step=3, loss=0.5, note="text")
    assert scalars == [(tmp_path / "tensorboard/stage1", None), ("loss", 0.5, 3), "flushed"]
    assert json.loads((tmp_path / "stage1.jsonl").read_text()) == {"step": 3, "loss": 0.5, "note": "text"}

"""Speed and memory of training the language model on one GPU, up to 7B, with random weights and documents.

    python tests/speed_gpu.py                       every row of ROWS
    python tests/speed_gpu.py 7b 7b-lora            some of them
    python tests/speed_gpu.py 7b --profile          and the kernels that took longest

Each row trains by training/loop.py as a stage does; its numbers are the medians of the last steps in the
metrics of the run. `planned` is what `--plan` counts for it (training/plan.py), without the 2 GiB that it
leaves for CUDA. "divided" is FSDP2 over NCCL in a group of one process: what dividing costs, without what a
network costs.
"""

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lora  # noqa: E402
from data import batches  # noqa: E402
from llama import Llama, LlamaConfig, to_int8  # noqa: E402
from run import Run  # noqa: E402
from train_language import Language, language_loss  # noqa: E402
from training import plan, shard  # noqa: E402
from training.loop import optimize  # noqa: E402

GPU = torch.device("cuda", 0)
SIZES = {
    "111m": LlamaConfig(17_006, 768, 12, 12, 2048),
    "1.3b": LlamaConfig(33_006, 2048, 24, 16, 5504),
    "7b": LlamaConfig(33_006, 4096, 32, 32, 11_008),
}


@dataclass
class Row:
    size: str
    rows: int = 8  # of a micro-batch
    max_len: int = 2048
    accumulate: int = 1
    checkpointing: str = "none"
    state_dtype: str = "bfloat16"
    compile: bool = True
    lengths: tuple[int, int] = (1, 1)  # of documents, from and to, as shares of max_len
    adapters: bool = False
    int8: bool = False
    divided: bool = False
    steps: int = 10
    config: LlamaConfig = field(init=False)

    def __post_init__(self):
        self.config = SIZES[self.size]


ROWS = {
    "7b": Row("7b", rows=6),
    "7b-4096": Row("7b", rows=3, max_len=4096),
    "7b-selective": Row("7b", checkpointing="selective"),
    "7b-block": Row("7b", checkpointing="block"),
    "7b-packed": Row("7b", rows=6, lengths=(0.05, 0.5)),
    "7b-divided": Row("7b", rows=6, divided=True),
    "7b-eager": Row("7b", rows=4, compile=False),
    "7b-float32": Row("7b", rows=2, accumulate=8, state_dtype="float32", steps=6),
    "7b-float32-selective": Row(
        "7b", rows=2, accumulate=8, state_dtype="float32", checkpointing="selective", steps=6
    ),
    "7b-float32-block": Row(
        "7b", rows=4, accumulate=4, state_dtype="float32", checkpointing="block", steps=6
    ),
    "7b-lora": Row("7b", adapters=True),
    "7b-lora-float32": Row("7b", adapters=True, state_dtype="float32"),
    "7b-lora-int8": Row("7b", adapters=True, int8=True),
    "1.3b-float32": Row("1.3b", state_dtype="float32"),
    "111m-packed": Row("111m", rows=32, state_dtype="float32", lengths=(0.05, 0.5)),
    "111m-float32": Row("111m", rows=32, state_dtype="float32"),
}


def build(row: Row) -> Llama:
    torch.manual_seed(0)
    if row.state_dtype == "bfloat16":
        torch.set_default_dtype(torch.bfloat16)
    with GPU:
        model = Llama(row.config)
    torch.set_default_dtype(torch.float32)
    if row.int8:
        to_int8(model)
    if row.adapters:
        lora.apply(model, 8, 16.0, ["q_proj", "v_proj"])
    return model


def document(row: Row, index: int) -> batches.Document:
    draw = random.Random(index)
    least, most = (round(share * row.max_len) for share in row.lengths)
    length = draw.randint(least, most)
    first = draw.randrange(row.config.vocab_size)
    ids = [(first + i * i * 7919) % row.config.vocab_size for i in range(length)]
    return ids, [True] * length


def measure(name: str, row: Row, profile: bool) -> str:
    mean = sum(row.lengths) / 2
    size = round(row.rows * row.accumulate / mean)
    section = Language(
        steps=row.steps,
        batch_size=size,
        accumulate=row.accumulate,
        max_len=row.max_len,
        checkpointing=row.checkpointing,
        state_dtype=row.state_dtype,
        compile=row.compile,
        lr=1e-5,
        warmup=2,
        eval_every=1000,
        save_every=1000,
    )
    batch_at = batches.documents(lambda index: document(row, index), size, row.max_len, row.accumulate)
    began = time.perf_counter()
    model = build(row)
    planned = plan.memory(model, section, 1).peak / 2**30
    with tempfile.TemporaryDirectory() as out:
        run = Run(Path(out), Path(out), 0, GPU, workers=4)
        loss = language_loss(torch.ones(row.config.vocab_size, device=GPU))
        train = partial(optimize, run, "name", Path(out) / "state", model, loss, batch_at, section)
        if profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as kernels:
                train()
            print(
                kernels.key_averages().table(
                    sort_by="cuda_time_total", row_limit=30, max_name_column_width=60
                )
            )
        else:
            train()
        lines = [json.loads(line) for line in (run.metrics / "name.jsonl").read_text().splitlines()]
    lines = lines[len(lines) // 2 :]
    found = {key: statistics.median(line.get(key) or 0 for line in lines) for key in lines[0]}
    return (
        f"{name:22}{found['tokens_per_s']:>10,.0f} tokens/s  mfu {100 * found['mfu']:5.1f} %  "
        f"peak {found['peak_gib']:6.1f} GiB (planned {planned:6.1f})  wait {found['wait']:.3f}  "
        f"padding {found['padding']:.3f}  length {found['length']:6.0f}  loss {found['loss']:.2f}  "
        f"{time.perf_counter() - began:4.0f} s in all"
    )


def divide_in_a_group_of_one():
    if not torch.distributed.is_initialized():
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29517"}
        torch.distributed.init_process_group("nccl", rank=0, world_size=1, device_id=GPU)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=[*ROWS], help=f"of {', '.join(ROWS)}")
    parser.add_argument("--profile", action="store_true")
    known = parser.parse_args()
    torch.cuda.set_device(GPU)
    print(f"{torch.cuda.get_device_name(GPU)}, torch {torch.__version__}", flush=True)
    undivided = shard.is_sharded
    report = []
    for name in known.names:
        row = ROWS[name]
        if row.divided:
            divide_in_a_group_of_one()
        shard.is_sharded = (lambda *arguments: True) if row.divided else undivided
        try:
            report.append(measure(name, row, known.profile))
        except (ValueError, RuntimeError) as problem:
            report.append(f"{name:22}{type(problem).__name__}: {str(problem)[:300]}")
        print(report[-1], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        left = torch.cuda.memory_allocated(GPU) / 2**30
        if left > 1:
            print(f"{left:.1f} GiB are still there", flush=True)
    print("\n".join(report))


if __name__ == "__main__":
    main()

"""A folder with the names and shapes of SpeechGPT-7B-cm and meaningless weights, to measure memory and speed
with.

    python tests/build_7b.py FOLDER                 builds it: 13.5 GB in float16, four safetensors files
    python tests/build_7b.py FOLDER --load bf16     loads it (or --load int8), prints peak memory and seconds
    torchrun --nproc_per_node 2 tests/build_7b.py FOLDER --load divided     a part in each process, bfloat16

A smaller one: --layers 8 --dim 1024 --hidden 2752.
"""

import argparse
import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint  # noqa: E402
import run  # noqa: E402
from files import write_json  # noqa: E402
from llama import Int8Linear, Llama, LlamaConfig  # noqa: E402
from llama_formats import to_hugging_face  # noqa: E402
from training import bases, shard  # noqa: E402


def build(
    folder: Path, layers: int = 32, dim: int = 4096, hidden: int = 11008, vocab: int = 33006, shards: int = 4
) -> None:
    """Every tensor is a slice of one pool of random numbers: drawing 6.7 billion would take minutes more."""
    config = LlamaConfig(vocab, dim, layers, dim // 128, hidden)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(config).named_parameters()}
    torch.manual_seed(0)
    pool = (torch.randn(max(vocab, hidden) * dim + 4096) * 0.02).half()
    names, folder = list(shapes), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        tensors = {}
        for name in names[i * len(names) // shards : (i + 1) * len(names) // shards]:
            start = len(where) % 4096
            tensors[name] = pool[start : start + shapes[name].numel()].view(shapes[name])
            if len(shapes[name]) == 1:
                tensors[name] = torch.ones(shapes[name], dtype=torch.float16)
            where[name] = file
        checkpoint.save_tensors(folder / file, tensors)
    write_json(folder / "model.safetensors.index.json", {"weight_map": where})
    write_json(folder / "config.json", to_hugging_face(config, torch.float16))


def anonymous() -> int:
    """Bytes of this process that are backed by no file, and so cannot be dropped when memory is short."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@contextlib.contextmanager
def watched() -> Iterator[dict]:
    """What is done inside: its seconds, its peak of anonymous memory, and what of it stays."""
    before, peak, done = anonymous(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    found = {}
    yield found
    found["load_seconds"] = time.perf_counter() - start
    done.set()
    watcher.join()
    after = anonymous()
    found |= {"peak": max(peak, after) - before, "after": after - before}


def measure_divided(folder: Path) -> dict:
    """As training does it: built as shapes, divided, then each process reads its own rows."""
    run.init_distributed(torch.device("cpu"))
    small = torch.nn.Sequential(torch.nn.Linear(8, 8))
    shard.divided(small, torch.device("cpu"), True, None)(torch.ones(8, 8).bfloat16())  # wakes the libraries
    with watched() as found:
        base = bases.read_llama(folder)
        for p in base.model.parameters():
            p.data = p.data.bfloat16()
        model = shard.divided(base.model, torch.device("cpu"), True, partial(base.fill, base.model))
    sums = torch.tensor([p.to_local().double().sum() for p in model.parameters()]).sum()
    whole = sum(t.double().sum() for t in checkpoint.read_tensors(folder).values()).item()
    numbers = sum(p.numel() for p in model.parameters())
    same = abs(run.all_reduce_sum(sums).item() - whole) < 1e-6 * numbers
    run.destroy()
    return found | {"bf16_bytes": 2 * numbers, "rank": run.rank(), "same_sum": same}


def measure(folder: Path, int8: bool) -> dict:
    Llama(LlamaConfig(32, 128, 1, 1, 128)).bfloat16()(torch.zeros(1, 1, dtype=torch.long))
    Int8Linear(torch.ones(8, 8).bfloat16())  # wakes the libraries: their memory is not the model's
    with watched() as found:
        model = Llama.from_pretrained(folder, dtype=torch.bfloat16, int8=int8)
    bf16 = sum(2 * t.numel() for t in checkpoint.read_tensors(folder).values())
    with torch.inference_mode():
        cache, ids = model.new_cache(1, 16), torch.ones(1, 8, dtype=torch.long)
        finite = bool(torch.isfinite(model(ids, cache=cache)).all())
        times = []
        for _ in range(3):
            start = time.perf_counter()
            model(ids[:, :1], cache=cache)
            times.append(time.perf_counter() - start)
    return found | {
        "bf16_bytes": bf16,
        "peak_ratio": found["peak"] / bf16,
        "seconds_per_token": min(times),
        "finite": finite,
    }


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path)
    p.add_argument("--load", choices=("bf16", "int8", "divided"))
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--dim", type=int, default=4096)
    p.add_argument("--hidden", type=int, default=11008)
    a = p.parse_args()
    if a.load == "divided":
        print(json.dumps(measure_divided(a.folder)))
    elif a.load:
        print(json.dumps(measure(a.folder, a.load == "int8")))
    else:
        build(a.folder, a.layers, a.dim, a.hidden)

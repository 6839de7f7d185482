"""Converts a trained model to half precision, the form of weights/tiny.

    python weights/halve.py out/long/model weights/tiny

Copies the parts that sample.py needs: llama/, lora/, hubert/ and vocoder/. Replaces files of the same names
in the second folder.
"""

import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import read_tensors, save_tensors  # noqa: E402
from config import Parser, command_line, folder  # noqa: E402
from files import read_json, write_json  # noqa: E402

PARTS = ("llama", "lora", "hubert", "vocoder")


def halve(model: Path, out: Path):
    """Writes the parts of the folder `model` to the folder `out`, float32 as float16. ValueError or OSError,
    one line, if `model` has no LLaMA, or a file is damaged."""
    if not (model / "llama").is_dir():
        raise ValueError(f"{model} is no trained model: it has no llama/")
    if out.exists() and out.samefile(model):
        raise ValueError(f"{out} is the model itself: choose another folder")
    for source in sorted(path for part in PARTS for path in (model / part).rglob("*") if path.is_file()):
        path = out / source.relative_to(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".safetensors":
            save_tensors(path, read_tensors(source), dtype=torch.float16)
        elif source.parts[-2:] == ("llama", "config.json"):
            write_json(path, read_json(source) | {"torch_dtype": "float16"})
        else:
            shutil.copyfile(source, path)


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("model", type=folder)
    parser.add_argument("out", type=folder)
    options = parser.parse_args()
    halve(options.model, options.out)


if __name__ == "__main__":
    command_line(main)

"""What the LLaMA of each stage begins as: new, grown (eq. 1-2), read, frozen with adapters; how it is saved.

    text     random weights
    stage1   the text model, or a pretrained one, with rows for units and markers
    stage2   stage 1's
    stage3   stage 2's, frozen, with low-rank adapters

A base is a model on meta, shapes alone, and where the numbers of each parameter are: in a memory map, mostly.
`fill` puts them into a model that has memory by then, whole or divided over many processes; each reads the
rows that are its own, of one parameter after the other:

    file on disk, mapped     rank 0 of 2          its memory
    q_proj  [ rows ]   ---   rows 0 - 2047   -->  1/2 of the model, and what one tensor takes to be converted

So a model that is larger than the memory of a machine can begin on several; what a safetensors file of ours
has as checksums is looked at by each of them.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import checkpoint
import lora
from files import one_line
from kmeans import KMeans
from llama import Llama, LlamaConfig, open_folder, to_bytes, to_int8
from llama_formats import Matrix
from run import Run, rank
from tokenizer import Tokenizer
from training import shard


class Grown(NamedTuple):
    """The matrix of a vocabulary that has grown: rows of the old one, and from row `first` on new ones."""

    old: Matrix
    first: int
    new: Tensor  # (rows - first, d)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.first + len(self.new), *self.new.shape[1:]))

    def rows(self, begin: int, end: int) -> Tensor:
        old = self.old.rows(min(begin, self.first), min(end, self.first))
        new = self.new[max(begin - self.first, 0) : max(end - self.first, 0)]
        return torch.cat([old, new]) if len(old) and len(new) else new if len(new) else old


class Rounded(NamedTuple):
    """What llama.py's Int8Linear keeps of a matrix: its bytes (part 0) or the scales of its rows (part 1)."""

    matrix: Matrix
    part: int

    @property
    def shape(self) -> torch.Size:
        return self.matrix.shape[: 2 - self.part]

    def rows(self, begin: int, end: int) -> Tensor:
        return to_bytes(self.matrix.rows(begin, end))[self.part]


class Base(NamedTuple):
    model: Llama  # on meta
    source: dict[str, Matrix | Grown | Rounded]  # the numbers of each of its parameters
    place: Path | str  # where they come from, for messages

    def load(self, device: torch.device) -> Llama:
        """The whole model, float32, on `device`."""
        self.model.to_empty(device=device)
        self.model.tie()
        self.fill(self.model)
        return self.model

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Gives each parameter of `model`, a plain tensor or a DTensor, the numbers of its own rows, which
        become of its dtype. ValueError, one line, if a tensor is missing, misshapen or not finite."""
        assert not list(model.buffers()), "buffers would be left as they are"
        for name, weight in model.named_parameters():
            with one_line(f"{self.place}: {name}"):
                if self.source[name].shape != weight.shape:
                    raise ValueError(f"is {(*self.source[name].shape,)}, expected {(*weight.shape,)}")
                mine, start = weight, [0] * weight.ndim
                if shard.is_divided(weight):
                    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

                    mine = weight.to_local()
                    mesh, placements = weight.device_mesh, weight.placements
                    _, start = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
                if not mine.numel():  # more ranks than rows
                    continue
                rows = self.source[name].rows(start[0], start[0] + len(mine))
                for dim in range(1, rows.ndim):
                    rows = rows.narrow(dim, start[dim], mine.shape[dim])
            checkpoint.check_weight(f"{self.place}: {name}", rows, mine)
            mine.copy_(rows)


def shapes(config: LlamaConfig) -> Llama:
    with torch.device("meta"):  # takes neither time nor memory
        return Llama(config)


def drawn(model: nn.Module) -> dict[str, Matrix]:
    """The numbers of a model that is there already."""
    return {name: Matrix([p.data]) for name, p in model.named_parameters()}


# ---- One for each stage ------------------------------------------------------------------------------------
# Random numbers are drawn on the CPU, whole and by every process alike: any number of them begins the same.


def new_llama(run: Run, config, tok: Tokenizer) -> Base:
    shape = LlamaConfig(**vars(config.llama) | {"vocab_size": tok.n_text})
    return Base(shapes(shape), drawn(Llama(shape)), "[llama]")


def base_llama_folder(run: Run, config) -> Path:
    """The LLaMA that stage 1 starts from."""
    return Path(config.pretrained) if config.pretrained else run.out / "text"


def grown_llama(run: Run, config, tok: Tokenizer) -> Base:
    """Eq. 1-2: the text model with rows for units and markers added to its vocabulary."""
    folder = base_llama_folder(run, config)
    shape, source = open_folder(folder)
    n = len(tok)
    keep = min(n, shape.vocab_size)
    first = min(tok.n_text, keep)  # an older SpeechGPT has rows for units already
    shape.vocab_size = n
    tables = []
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        new = torch.empty(n, shape.dim).normal_(std=0.02)[first:].clone()  # as Llama.resize_vocab draws them
        if name in source:  # else it is the same as the first
            old = source[name]
            new[: keep - first] = old.rows(first, keep)
            source[name] = Grown(old, first, new)
            tables.append(source[name])
    if config.units.embed_centers:
        centers = KMeans.from_pretrained(run.model / "hubert").embeddings(shape.dim)
        for table in tables:
            units = slice(tok.unit_ids.start - first, tok.unit_ids.stop - first)
            table.new[units] = centers * config.units.embed_centers
    return Base(shapes(shape), source, folder)


def read_llama(folder: Path) -> Base:
    shape, source = open_folder(folder)
    return Base(shapes(shape), source, folder)


def stage1_llama(run: Run, config, tok: Tokenizer) -> Base:
    return read_llama(run.out / "stage1")


def adapted_llama(run: Run, config, tok: Tokenizer) -> Base:
    """Stage 2's model, frozen, with new low-rank adapters."""
    c = config.lora
    adapter = lora.AdapterConfig(c.r, c.alpha, tuple(c.targets), c.dropout)
    base = read_llama(run.model / "llama")
    if c.int8:
        base = in_int8(base)
    layers = lora.new_adapters(base.model, adapter, "cpu")  # drawn
    lora.attach(base.model, layers)
    source = {}
    for name, p in base.model.named_parameters():
        source[name] = base.source[name.replace("base_layer.", "")] if p.is_meta else Matrix([p.data])
    return base._replace(model=base.model.to("meta"), source=source)


def in_int8(base: Base) -> Base:
    model = to_int8(base.model)
    source = dict(base.source)
    for name, _ in model.named_parameters():
        if name.endswith(".scale"):
            weight = name.removesuffix("scale") + "weight"
            source[name] = Rounded(base.source[weight], 1)
            source[weight] = Rounded(base.source[weight], 0)
    return Base(model, source, base.place)


# ---- How they are saved ------------------------------------------------------------------------------------


def save_llama(folder: str, run: Run, config, model: Llama, tok: Tokenizer):
    model.save_pretrained(run.out / folder)
    if rank() == 0:
        shutil.copytree(run.tokenizer, run.out / folder, dirs_exist_ok=True)


def save_adapters(run: Run, config, model: Llama, tok: Tokenizer):
    lora.save(model, run.model / "lora")

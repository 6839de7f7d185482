"""Another model's units: starting from a SpeechGPT whose HuBERT has other clusters (ours; the paper has one
HuBERT).

A LLaMA or a vocoder that knows the units of one HuBERT need not learn those of another from nothing. Over
some recordings both sets of units are counted frame by frame; a new unit's embedding is then the average of
the old units' embeddings, weighted by how often each was there at the same time (LOG.md has what that is
worth):

    new[u] = sum over v of P(old unit v | new unit u) old[v]
"""

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from data import units as unit_files
from hubert import UnitExtractor
from kmeans import KMeans
from llama import LlamaConfig
from llama_formats import read_folder
from run import Run, rank
from tokenizer import Tokenizer
from vocoder import UnitVocoder, VocoderConfig


def has_foreign_units(folder: str) -> bool:
    """Is `folder` a SpeechGPT folder, with units of its own? (Else it is a LLaMA that knows text alone, or
    "".)"""
    return bool(folder) and all((Path(folder) / part).is_dir() for part in ("llama", "hubert"))


def llama_folder(folder: str) -> Path:
    """The LLaMA of a SpeechGPT folder, or the folder itself."""
    return Path(folder) / "llama" if has_foreign_units(folder) else Path(folder)


def extend_tokenizer(folder: str, out: Path, n_units: int) -> Tokenizer:
    """Writes the tokenizer of the LLaMA in `folder`, with this run's units, to the folder `out`."""
    return Tokenizer.extend(llama_folder(folder), out, n_units, anew=has_foreign_units(folder))


def check_pretrained(folder: str, config: VocoderConfig, n_units: int) -> LlamaConfig:
    """The shape of the LLaMA in `folder`. ValueError or OSError, one line, if a run with `n_units` units
    cannot start from it; the numbers of its weights are not looked at."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"pretrained: {folder}: no such folder")
    base = llama_folder(folder)
    shape, _ = read_folder(LlamaConfig, base)
    with TemporaryDirectory() as temporary:
        found = extend_tokenizer(folder, Path(temporary), n_units).n_units
    if found != n_units:
        raise ValueError(f"{base} knows {found} units, units.clusters is {n_units}; make the two equal")
    if has_foreign_units(folder):
        read_foreign(folder)
        foreign_vocoder(folder, config)
    return shape


def read_foreign(folder: str) -> tuple[Tokenizer, UnitExtractor]:
    known = Tokenizer.from_pretrained(Path(folder) / "llama")
    extractor = UnitExtractor.from_pretrained(Path(folder) / "hubert")
    k = len(extractor.kmeans.centers)
    if k != known.n_units:
        raise ValueError(unlike(folder, k, f"LLaMA knows {known.n_units}"))
    return known, extractor


def translate_embeddings(tables: list, run: Run, folder: str, tok: Tokenizer, n_units: int):
    """Fills in the new rows, of units and markers, of embedding tables (training/bases.py: Grown)."""
    known, extractor = read_foreign(folder)
    rows = unit_files.read_units(run.manifest, run.units, n_units)
    p_old = unit_files.cooccurrence(run.corpus, rows, extractor, n_units)  # (n_units, K)
    for old, first, new in tables:
        old_units = old.rows(known.unit_ids.start, known.unit_ids.stop).to(torch.float32, copy=True)
        new[tok.unit_ids.start - first : tok.unit_ids.stop - first] = p_old @ old_units
        for token, i in tok.added.items():
            if i not in tok.unit_ids and token in known.added:
                new[i - first] = old.rows(known.added[token], known.added[token] + 1)[0]


def unlike(folder: str, k: int, other: str) -> str:
    return f"{folder}: its HuBERT makes {k} units, its {other}; the two are of different models"


def foreign_vocoder(folder: str, config: VocoderConfig) -> UnitVocoder | None:
    """The vocoder of the model in `folder`; None if it has none of this shape."""
    path = Path(folder) / "vocoder"
    if not (has_foreign_units(folder) and path.is_dir()):
        return None
    before = UnitVocoder.from_pretrained(path)
    if dataclasses.replace(before.config, num_embeddings=config.num_embeddings) != config:
        return None
    k = len(KMeans.from_pretrained(Path(folder) / "hubert").centers)
    if k > before.config.num_embeddings:
        raise ValueError(unlike(folder, k, f"vocoder knows {before.config.num_embeddings}"))
    return before


def initial_vocoder(run: Run, folder: str, config: VocoderConfig, n_units: int) -> UnitVocoder | None:
    """The vocoder of the model in `folder`, translated to this run's units; None if it has none of this
    shape."""
    before = foreign_vocoder(folder, config)
    if before is None:
        if has_foreign_units(folder) and rank() == 0:
            print(f"{folder} has no vocoder of the shape of [vocoder_model]: it is initialized at random")
        return None
    extractor = UnitExtractor.from_pretrained(Path(folder) / "hubert")
    rows = unit_files.read_units(run.manifest, run.units, n_units)
    p_old = unit_files.cooccurrence(run.corpus, rows, extractor, n_units)  # (n_units, K)
    vocoder = UnitVocoder(config)
    vocoder.load_state_dict(before.state_dict() | {"dict.weight": vocoder.dict.weight.data})
    vocoder.dict.weight.data[:n_units] = p_old @ before.dict.weight.data[: p_old.shape[1]]
    return vocoder

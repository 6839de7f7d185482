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

from torch import Tensor

from data import units as unit_files
from hubert import UnitExtractor
from run import Run
from tokenizer import Tokenizer
from vocoder import UnitVocoder, VocoderConfig


def has_foreign_units(folder: str) -> bool:
    """Is `folder` a SpeechGPT folder, with units of its own? (Else it is a LLaMA that knows text alone, or
    "".)"""
    return bool(folder) and all((Path(folder) / part).is_dir() for part in ("llama", "hubert"))


def translate_embeddings(
    tables: list[tuple[Tensor, Tensor]], run: Run, folder: str, tok: Tokenizer, n_units: int
):
    """Fills in the rows of units and markers in each (old, new) pair of embedding tables (V, C), (V', C)."""
    known = Tokenizer.from_pretrained(Path(folder) / "llama")
    extractor = UnitExtractor.from_pretrained(Path(folder) / "hubert")
    k = len(extractor.kmeans.centers)
    if k != known.n_units:
        raise ValueError(unlike(folder, k, f"LLaMA knows {known.n_units}"))
    rows = unit_files.read_units(run.manifest, run.units, n_units)
    p_old = unit_files.cooccurrence(run.corpus, rows, extractor, n_units)  # (n_units, K)
    for old, new in tables:
        old_units = old[known.unit_ids.start : known.unit_ids.stop]
        new[tok.unit_ids.start : tok.unit_ids.stop] = p_old @ old_units
        for token, i in tok.added.items():
            if i not in tok.unit_ids and token in known.added:
                new[i] = old[known.added[token]]


def unlike(folder: str, k: int, other: str) -> str:
    return f"{folder}: its HuBERT makes {k} units, its {other}; the two are of different models"


def initial_vocoder(run: Run, folder: str, config: VocoderConfig, n_units: int) -> UnitVocoder | None:
    """The vocoder of the model in `folder`, translated to this run's units; None if it has none of this
    shape."""
    path = Path(folder) / "vocoder"
    if not (has_foreign_units(folder) and path.is_dir()):
        return None
    before = UnitVocoder.from_pretrained(path)
    if dataclasses.replace(before.config, num_embeddings=config.num_embeddings) != config:
        print(f"{path} has another shape than [vocoder_model]: the vocoder is initialized at random")
        return None
    extractor = UnitExtractor.from_pretrained(Path(folder) / "hubert")
    k = len(extractor.kmeans.centers)
    if k > before.config.num_embeddings:
        raise ValueError(unlike(folder, k, f"vocoder knows {before.config.num_embeddings}"))
    if n_units > config.num_embeddings:
        raise ValueError(
            f"there are {n_units} clusters; set vocoder_model.num_embeddings to at least {n_units}"
        )
    rows = unit_files.read_units(run.manifest, run.units, n_units)
    p_old = unit_files.cooccurrence(run.corpus, rows, extractor, n_units)  # (n_units, K)
    vocoder = UnitVocoder(config)
    vocoder.load_state_dict(before.state_dict() | {"dict.weight": vocoder.dict.weight.data})
    vocoder.dict.weight.data[:n_units] = p_old @ before.dict.weight.data[:k]
    return vocoder

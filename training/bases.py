"""How the LLaMA of each stage is made and saved: new, grown (eq. 1-2), read, or frozen with adapters.

text     random weights
stage1   the text model, or a pretrained one, with rows for units and markers
stage2   stage 1's
stage3   stage 2's, frozen, with low-rank adapters
"""

import shutil
from pathlib import Path

import lora
from kmeans import KMeans
from llama import Llama, LlamaConfig
from run import Run, rank
from tokenizer import Tokenizer
from training import foreign_units


def base_llama_folder(run: Run, config) -> Path:
    """The LLaMA that stage 1 starts from."""
    return foreign_units.llama_folder(config.pretrained) if config.pretrained else run.out / "text"


def new_llama(run: Run, config, tok: Tokenizer) -> Llama:
    return Llama(LlamaConfig(**vars(config.llama) | {"vocab_size": tok.n_text}))


def grown_llama(run: Run, config, tok: Tokenizer) -> Llama:
    """Eq. 1-2: the text model with rows for units and markers added to its vocabulary."""
    model = Llama.from_pretrained(base_llama_folder(run, config))
    tables = model.model.embed_tokens, model.lm_head
    before = [table.weight.data for table in tables]
    model.resize_vocab(len(tok))
    if foreign_units.has_foreign_units(config.pretrained):
        pairs = [(old, table.weight.data) for old, table in zip(before, tables)]
        foreign_units.translate_embeddings(pairs, run, config.pretrained, tok, config.units.clusters)
    elif config.units.embed_centers:
        centers = KMeans.from_pretrained(run.model / "hubert").embeddings(model.config.dim)
        for table in tables:
            units = slice(tok.unit_ids.start, tok.unit_ids.stop)
            table.weight.data[units] = centers * config.units.embed_centers
    return model


def stage1_llama(run: Run, config, tok: Tokenizer) -> Llama:
    return Llama.from_pretrained(run.out / "stage1")


def adapted_llama(run: Run, config, tok: Tokenizer) -> Llama:
    """Stage 2's model, frozen, with new low-rank adapters."""
    model = Llama.from_pretrained(run.model / "llama")
    section = config.lora
    return lora.apply(model, section.r, section.alpha, section.targets, section.dropout)


def save_llama(folder: str, run: Run, config, model: Llama, tok: Tokenizer):
    model.save_pretrained(run.out / folder)
    if rank() == 0:
        shutil.copytree(run.tokenizer, run.out / folder, dirs_exist_ok=True)


def save_adapters(run: Run, config, model: Llama, tok: Tokenizer):
    lora.save(model, run.model / "lora")

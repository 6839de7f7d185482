"""All that can be known before the first stage begins: a mistake is told now, and not hours later.

What the config says by itself is checked as it is read (`Config` in train.py). Here it is compared with what
the stages before were begun with, with the model that the run starts from, and with what torch can build.
"""

from collections.abc import Iterable

import torch

import lora
from data.tiny import prepare
from files import one_line
from hubert import HuBERT
from llama import Llama
from run import Run, world_size
from training import foreign_units
from training.loop import Optimization, check_ranks
from training.stages import Stage, check_unchanged, finished, followers
from vocoder import MultiPeriodDiscriminator, MultiScaleDiscriminator, UnitVocoder


def check_before(stages: dict[str, Stage], names: tuple[str, ...], run: Run, config):
    """ValueError or OSError, one line, for what can be known before the first of the stages `names`."""
    for name in stages:
        if {name, *followers(stages, name)} & {*names}:
            check_unchanged(stages, name, run, config, settings_alone=True)
    check_divisions(stages, names, config, world_size())
    check_shapes(config)
    if "corpus" in names and config.corpus.name == "tiny" and finished(stages, "corpus", run, config) is None:
        prepare.need_voice()


def check_shapes(config):
    """ValueError if a model cannot be built, or what it is trained on does not fit it."""
    shape = config.llama
    if config.pretrained:
        shape = foreign_units.check_pretrained(config.pretrained, config.vocoder_model, config.units.clusters)
    with torch.device("meta"):  # shapes without numbers: this takes neither time nor memory
        with one_line("[lora]"):
            lora.apply(Llama(shape), config.lora.r, config.lora.alpha, config.lora.targets)
        with one_line("[hubert.model]"):
            HuBERT(config.hubert.model)
        with one_line("[vocoder_model]"):
            UnitVocoder(config.vocoder_model)
        with one_line("[vocoder]"):
            MultiPeriodDiscriminator(config.vocoder.mpd_periods, config.vocoder.mpd_channels)
            MultiScaleDiscriminator(config.vocoder.msd_scales, config.vocoder.msd_layers)
    for name, section in vars(config).items():
        if hasattr(section, "mix") and section.max_len > shape.max_len:
            raise ValueError(
                f"{name}.max_len is {section.max_len}, but the LLaMA's own is {shape.max_len}; "
                "make it smaller, or llama.max_len larger"
            )


def check_divisions(stages: dict[str, Stage], names: Iterable[str], config, ranks: int):
    """ValueError if a step of these stages cannot be divided among so many processes."""
    for name in names:
        for key in stages[name].sections:
            section = getattr(config, key)
            if isinstance(section, Optimization) and not stages[name].skip(config):
                check_ranks(key, section, ranks)

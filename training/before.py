"""All that can be known before the first stage begins: a mistake is reported then, and not hours later.

What the config says by itself is checked as it is read (`Config` in train.py). Here it is compared with what
the stages before were begun with, with the model that the run starts from, and with what torch can build;
and, as soon as there is a corpus, with the corpus.
"""

import os
import shutil
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import lora
from data import documents
from data.augment import draw_of
from data.corpus import read_manifest
from data.tiny import prepare
from files import one_line, read_json, show
from hubert import HuBERT, UnitExtractor
from llama import Llama, LlamaConfig, to_int8
from llama_formats import read_folder
from run import Run, rank, world_size
from tokenizer import Tokenizer
from training import reading, shard
from training.loop import Optimization, check_ranks
from training.reading import fitting_examples, reads_generated
from training.stages import Stage, check_unchanged, finished, followers
from vocoder import MultiPeriodDiscriminator, MultiScaleDiscriminator, UnitVocoder, VocoderConfig


def check_before(stages: dict[str, Stage], names: tuple[str, ...], run: Run, config):
    """ValueError or OSError, one line, for what can be known before the first of the stages `names`."""
    for name in stages:
        if {name, *followers(stages, name)} & {*names}:
            check_unchanged(stages, name, run, config, settings_alone="corpus" in names)
    check_divisions(stages, names, config, world_size())
    check_compiler(stages, names, config, run.device)
    check_memory(names, config, check_shapes(config), run.device)
    if "corpus" in names and config.corpus.name == "tiny" and finished(stages, "corpus", run, config) is None:
        prepare.need_voice()


def check_shapes(config) -> Llama:
    """The LLaMA, on meta. ValueError if a model cannot be built, or what it is trained on does not fit it."""
    shape = config.llama
    if config.pretrained:
        shape = check_pretrained(config.pretrained, config.units.clusters)
    if config.units.hubert:
        open_hubert(config.units)
    if config.pretrained_vocoder:
        open_vocoder(config)
    with torch.device("meta"):  # shapes without numbers: this takes neither time nor memory
        model = Llama(shape)
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
    return model


def check_pretrained(folder: str, n_units: int) -> LlamaConfig:
    """The shape of the LLaMA in `folder`. ValueError or OSError, one line, if a run with `n_units` units
    cannot start from it; the numbers of its weights are not looked at."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"pretrained: {folder}: no such folder")
    if (Path(folder) / "llama").is_dir():
        raise ValueError(f"pretrained: {folder} is a whole SpeechGPT; its LLaMA is {folder}/llama")
    shape, _ = read_folder(LlamaConfig, Path(folder))
    with TemporaryDirectory() as temporary:
        found = Tokenizer.extend(folder, Path(temporary), n_units).n_units
    if found != n_units:
        raise ValueError(f"{folder} knows {found} units, units.clusters is {n_units}; make the two equal")
    return shape


def open_hubert(section) -> UnitExtractor:
    """HuBERT and k-means of the folder `hubert` of the section [units]. ValueError or OSError, one line, if
    there are none, or others than the section says."""
    if not Path(section.hubert).is_dir():
        raise FileNotFoundError(f"units.hubert: {section.hubert}: no such folder")
    extractor = UnitExtractor.from_pretrained(section.hubert)
    found = {
        "clusters": len(extractor.kmeans.centers),
        "layer": extractor.layer,
        "smooth": extractor.smooth,
    }
    for key, its in found.items():
        wanted = getattr(section, key)
        if its != wanted:
            raise ValueError(f"units.{key} is {wanted}, that of {section.hubert} is {its}: make them equal")
    return extractor


def open_vocoder(config) -> UnitVocoder:
    """The vocoder of the folder `pretrained_vocoder`. ValueError or OSError, one line, if there is none, or
    it knows fewer units than the run has."""
    folder = config.pretrained_vocoder
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"pretrained_vocoder: {folder}: no such folder")
    vocoder = UnitVocoder.from_pretrained(folder)
    known, wanted = vocoder.config.num_embeddings, config.units.clusters
    if known < wanted:
        raise ValueError(f"{folder} knows {known} units, units.clusters is {wanted}; name another vocoder")
    return vocoder


def check_memory(names: Iterable[str], config, model: Llama, device: torch.device):
    """ValueError if the LLaMA cannot be trained in the memory of this process: on meta, its rows for units
    are missing. Of stage 3, which takes less, only whether a base in int8 can be divided here."""
    for name in LANGUAGE[:3]:
        if name in names and getattr(config, name).steps and not (name == "text" and config.pretrained):
            shard.is_sharded(name, model, getattr(config, name), device)
    if "stage3" in names and config.stage3.steps and config.lora.int8:
        with torch.device("meta"):
            lora.apply(to_int8(model), config.lora.r, config.lora.alpha, config.lora.targets)
        shard.is_sharded("stage3", model, config.stage3, device)


def check_divisions(stages: dict[str, Stage], names: Iterable[str], config, ranks: int):
    """ValueError if a step of these stages cannot be divided among so many processes."""
    for key, section in trained_sections(stages, names, config):
        check_ranks(key, section, ranks)


def check_compiler(stages: dict[str, Stage], names: Iterable[str], config, device: torch.device):
    """ValueError if a stage is to be compiled on a GPU, and what torch.compile needs for that is not here."""
    trained = trained_sections(stages, names, config)
    keys = [key for key, section in trained if section.compile and section.steps]
    if device.type != "cuda" or not keys:
        return
    compilers = [os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")]
    missing = ""
    if find_spec("triton") is None:
        missing = "the package triton"
    elif sys.platform != "win32" and not any(compilers):  # on Windows triton brings one
        missing = "gcc or clang"
    if missing:
        raise ValueError(f"{keys[0]}.compile needs {missing}; install it, or set {keys[0]}.compile = false")


def trained_sections(
    stages: dict[str, Stage], names: Iterable[str], config
) -> list[tuple[str, Optimization]]:
    """(key, section) of what training/loop.py trains in these stages."""
    found = []
    for name in names:
        for key in stages[name].sections:
            section = attrgetter(key)(config)
            if isinstance(section, Optimization) and not stages[name].skip(config):
                found.append((key, section))
    return found


# ---- When the corpus is there: what each stage will read of it ---------------------------------------------

LANGUAGE = ("text", "stage1", "stage2", "stage3")


def check_corpus(stages: dict[str, Stage], run: Run, config) -> documents.Tables:
    """Says how many documents each stage of the language model will read; ValueError if one of them, HuBERT
    or the vocoder asks for what the corpus does not have. Returns its tables, as yet without units."""
    for name in stages:  # all of them: a later stage need not wait to tell that the corpus has changed
        check_unchanged(stages, name, run, config)
    tables = documents.read_tables(run.out, None)
    if not config.units.hubert:
        for key, section in (("hubert.speaker", config.hubert), ("units.speaker", config.units)):
            rows_to_train(tables.rows, run.manifest, key, section.speaker)
    if not config.pretrained_vocoder:
        theirs = rows_of(tables.rows, run.manifest, "vocoder.speaker", config.vocoder.speaker)
        check_speakers(config.vocoder_model, theirs)
    lines = documents.describe_dialogues(tables)
    for name in LANGUAGE:
        section = getattr(config, name)
        if section.tokens:
            read = ", ".join(f"{len(found):,} of {found.folder}" for found in reading.open_maps(run, section))
            lines.append(f"{name}: documents to train on: {read}")
        elif not stages[name].skip(config):
            with one_line(f"{name}.mix"):
                found = documents.sources_of(to_be_spoken(tables, section), "train", section.mix)
            counts = ", ".join(f"{len(sources)} {kind}" for kind, sources in found.items())
            lines.append(f"{name}: documents to train on: {counts}")
    print("\n".join(lines), flush=True)
    return tables


def training_rows(
    manifest: Path, speaker: int | str | None = None, key: str = "hubert.speaker"
) -> list[dict]:
    """Rows of the manifest to train on: of all, or of one speaker (a name, or a number, 0 the target
    speaker's)."""
    return rows_to_train(read_manifest(manifest), manifest, key, speaker)


def some_sentences(rows: list[dict], share: float, seed: int) -> list[dict]:
    """The rows of a share of all sentences, by everybody who says them; a recording without text is one of
    its own. All of them, if none is drawn."""
    if share == 1:
        return rows
    chosen = [row for row in rows if draw_of(seed, "sentence", row["text"] or row["id"]).random() < share]
    return chosen or rows


def rows_to_train(rows: list[dict], manifest: Path, key: str, speaker: int | str | None) -> list[dict]:
    """training_rows of all rows of a manifest; the `key` of the config asks for the speaker."""
    rows = [row for row in rows if row["split"] == "train"]
    if not rows:
        raise ValueError(f"{manifest}: no recording is to be trained on; give some the split 'train'")
    return rows_of(rows, manifest, key, speaker)


def rows_of(rows: list[dict], manifest: Path, key: str, speaker: int | str | None) -> list[dict]:
    """Those of `rows` that are the speaker's whom the `key` of the config asks for; None: all."""
    if speaker is None:
        return rows
    record = manifest.with_name("corpus.json")
    names = read_json(record)["speakers"] if record.exists() else {}  # name: number
    theirs = [row for row in rows if row["speaker"] == names.get(speaker, speaker)]
    if not any(row["split"] == "train" for row in theirs):
        recorded = {row["speaker"] for row in rows if row["split"] == "train"}
        known = [show(name) for name in names if names[name] in recorded] or map(str, sorted(recorded))
        raise ValueError(
            f"{key} is {show(speaker)}, who has no training recording; choose one of "
            f"{', '.join([*known][:9])}, or take the key out to train on all"
        )
    return theirs


def check_speakers(model: VocoderConfig, rows: list[dict]):
    """ValueError if the vocoder has too few voices for the speakers of a manifest."""
    speaker = max((row["speaker"] for row in rows if row["split"] != "rendition"), default=0)
    if speaker >= (model.num_speakers if model.speakers else 1):
        raise ValueError(
            f"the corpus has speaker {speaker}; set vocoder_model.multispkr = true and "
            f"vocoder_model.num_speakers to at least {speaker + 1}"
        )


def check_lengths(run: Run, config, tok: Tokenizer):
    """ValueError, before stage 1 and when there are units, if a later stage has no document that is short
    enough. One of several processes looks."""
    if rank() > 0:
        return
    sections = {name: getattr(config, name) for name in LANGUAGE[1:]}
    sections = {name: section for name, section in sections.items() if not section.tokens}
    tables = documents.read_tables(run.out, tok.n_units) if sections else None
    for name, section in sections.items():
        if name != "stage3" or section.steps:
            fitting_examples(to_be_spoken(tables, section), "train", name, section, tok, quiet=True)


def to_be_spoken(tables: documents.Tables, section) -> documents.Tables:
    """The tables with speech for every dialogue, but without units yet, if it is to be generated."""
    return tables._replace(generated=reads_generated(section))

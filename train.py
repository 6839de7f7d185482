"""train.py - where the concepts meet to learn: every stage of SpeechGPT, on one process or many.

    python train.py configs/tiny.toml                        all stages; finished ones are skipped
    python train.py configs/tiny.toml --stage stage2         one of them (2 is understood, too)
    python train.py configs/tiny.toml --stage2.steps 100     any key of the config file as a flag
    python train.py configs/tiny.toml --check                what the corpus has for each stage
    python train.py configs/paper-7b.toml --plan --gpus 96   what that would need (training/plan.py)
    python train.py --stages                                 the table of stages, below
    torchrun --nproc_per_node 8 train.py configs/tiny.toml   the same on eight GPUs

    stage                         writes
    corpus                        out/corpus            speech with its text; out/manifest.jsonl
    hubert     train_hubert.py    out/state/hubert      one HuBERT a round
    units      train_hubert.py    out/model/hubert      HuBERT as far as needed, k-means; out/units.jsonl
    text       here               out/text              a LLaMA on text
    stage1     here               out/stage1            the same with units in its vocabulary
    stage2     here               out/model/llama
    t2u        train_text_to_unit.py    out/model/text_to_unit; out/t2u.jsonl, speech of dialogues
    stage3     here               out/model/lora
    vocoder    train_vocoder.py   out/model/vocoder
    evaluate   evaluate.py        out/report

Here are the stages of the language model (paper §4.2), the table of all stages, and the command line. The
loop that they share is training/loop.py; what is skipped, resumed and run in parallel, training/stages.py.
"""

from starting import starting

if __name__ == "__main__":
    starting()

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch

import checkpoint
import llama
import lora
import train_hubert
import train_text_to_unit
import train_vocoder
from config import Amount, BatchSize, Count, Limits, Parser, Positive, Share, Whole, command_line, read
from data import batches, corpus, documents
from data.batches import Document
from data.codes import datasets
from data.tiny import prepare
from data.units import read_units
from evaluation.judge import need_extra
from evaluation.measures import check_targets
from files import locked
from generate import Decoding, generate
from kmeans import KMeans
from llama import Llama, LlamaConfig
from run import Metrics, Run, barrier, init_distributed, need_tensorboard, rank, together, world_size
from run import device as find_device
from tokenizer import Tokenizer
from training import bases, forecast, plan, reading, shard
from training.before import check_before, check_corpus, check_lengths, open_vocoder, rows_of
from training.loop import Loss, Optimization, optimize
from training.stages import (
    Stage,
    begun,
    finished,
    in_parallel,
    on_half_of_the_cores,
    run_stage,
    sound_alone,
)
from vocoder import VocoderConfig

# ---- Configuration -----------------------------------------------------------------------------------------
# One dataclass for each section of the file. Defaults are the paper's where it gives them (Table 3, §5.1).


Mix = dict[str, Annotated[float, Limits(0.001, 1000)]]  # kinds of documents (data/documents.py): their shares


@dataclass
class Language(Optimization):
    max_len: Annotated[int, Limits(2, 2**20)] = 1024  # tokens in a packed row
    mix: Mix = field(default_factory=lambda: {"text": 1.0})
    # folders of SpeechInstruct as ids (data/tokens.py), instead of mix
    tokens: Mix = field(default_factory=dict)
    unit_weight: Positive = 1.0  # loss weight of a unit (a piece of text: 1)
    # augmentation: fraction of input units dropped, and the same fraction replaced at random
    noise: Share = 0.0

    def __post_init__(self):
        documents.check_mix(self.mix)


@dataclass
class Stage1(Language):
    steps: Whole = 900
    batch_size: BatchSize = 768
    mix: Mix = field(default_factory=lambda: {"speech": 1.0})


@dataclass
class Stage2(Language):
    max_len: Annotated[int, Limits(2, 2**20)] = 512
    # ASR or TTS "with probability p" (§3.1), and text: the paper gives neither number
    mix: Mix = field(default_factory=lambda: {"asr": 0.4, "tts": 0.4, "t2t": 0.2})


@dataclass
class Stage3(Language):
    steps: Whole = 4200  # 0: the stage is left out, for a corpus without dialogues
    batch_size: BatchSize = 128
    mix: Mix = field(default_factory=lambda: {"chain": 1.0})
    speech: Literal["t2u", "recorded"] = "t2u"  # answers by the text-to-unit generator (§3.2), or recordings


@dataclass
class LlamaSection(LlamaConfig):
    """LlamaConfig without the size of the vocabulary, which the tokenizer decides."""

    vocab_size: int = field(init=False, default=1)


@dataclass
class LoraSection:
    r: lora.Rank = 8
    alpha: Annotated[float, Limits(0, 1e6)] = 16.0
    dropout: Share = 0.0
    int8: bool = False  # the frozen model's matrices take a byte per weight
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])


@dataclass
class CorpusSection:
    # "tiny" synthesizes the small spoken world; or a folder with manifest.jsonl (data/corpus.py)
    name: str = "tiny"
    options: prepare.Options = field(default_factory=prepare.Options)  # of the tiny world
    # the speaker in whose voice the model answers, as in the manifest; "": who has most seconds to train on
    # (in the tiny world speaker 0)
    voice: int | str = ""


@dataclass
class EvaluateSection:
    items: Whole = 120  # at most so many items for a row of the report; 0: all there are
    takes: Count | None = None  # spoken answers drawn at most; None: as sample.py does
    # of the tiny world: so many questions in each unseen voice, as far as any is installed
    voices: Annotated[int, Limits(0, 1000)] = 0
    # a row's key: what it should reach, as in configs/tiny.toml
    targets: dict[str, Amount] = field(default_factory=dict)

    def __post_init__(self):
        check_targets(self.targets)


@dataclass
class Config:
    out: str = "out/tiny"
    seed: Whole = 0
    device: str = "auto"
    workers: Whole = 0  # processes that prepare batches (not on Windows); for a GPU, 2 to 4
    tensorboard: bool = False  # metrics for TensorBoard, too, in out/metrics/tensorboard
    parallel_stages: bool = True  # on a CPU, run independent stages in pairs, half of the cores each
    # A LLaMA folder to start from: stage text is then skipped. If it knows units, they are taken for this
    # run's own.
    pretrained: str = ""
    # A folder with a vocoder of this run's units, released or trained here: stage vocoder takes it as it is.
    pretrained_vocoder: str = ""
    vocab_size: Count = 600  # text pieces, where there is no pretrained LLaMA
    corpus: CorpusSection = field(default_factory=CorpusSection)
    hubert: train_hubert.HubertSection = field(default_factory=train_hubert.HubertSection)
    units: train_hubert.UnitsSection = field(default_factory=train_hubert.UnitsSection)
    normalizer: train_hubert.NormalizerSection = field(default_factory=train_hubert.NormalizerSection)
    llama: LlamaSection | None = None  # needed where there is no pretrained LLaMA
    text: Language = field(default_factory=Language)
    stage1: Stage1 = field(default_factory=Stage1)
    stage2: Stage2 = field(default_factory=Stage2)
    t2u: train_text_to_unit.TextToUnitSection = field(default_factory=train_text_to_unit.TextToUnitSection)
    stage3: Stage3 = field(default_factory=Stage3)
    lora: LoraSection = field(default_factory=LoraSection)
    vocoder: train_vocoder.VocoderStage = field(default_factory=train_vocoder.VocoderStage)
    vocoder_model: VocoderConfig = field(default_factory=VocoderConfig)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)

    def __post_init__(self):
        for section, key in (
            (self, "out"),
            (self, "pretrained"),
            (self, "pretrained_vocoder"),
            (self.corpus, "name"),
            (self.units, "hubert"),
        ):
            setattr(section, key, os.path.expanduser(getattr(section, key)))
        if not self.out or not self.corpus.name:
            raise ValueError("out and corpus.name must not be empty")
        if not self.pretrained and self.llama is None:
            raise ValueError("[llama] is missing; give it dim, n_layers, n_heads and hidden_dim")
        if set(self.text.mix) != {"text"}:
            raise ValueError("stage text comes before all units: its mix can only be { text = 1 }")
        layers = {} if self.units.hubert else {"units.layer": self.units.layer}
        if len(self.hubert.clusters) > 1:  # otherwise it teaches no further round
            layers["hubert.layer"] = self.hubert.layer
        for key, layer in layers.items():
            if layer > self.hubert.model.n_layers:
                raise ValueError(
                    f"{key} is {layer}; hubert.model has layers 1 to {self.hubert.model.n_layers}"
                )
        if not self.pretrained_vocoder:
            train_vocoder.need_embeddings(self.vocoder_model, self.units.clusters)
        if not self.units.smooth % 2:
            raise ValueError(f"units.smooth is {self.units.smooth}; it must be odd: as many before as after")


# ---- The language model: text, stage 1, 2, 3 ---------------------------------------------------------------


class LanguageStage(NamedTuple):
    """How the model of one stage is made and saved. What requires a gradient is what the stage trains."""

    base: Callable[[Run, Config, Tokenizer], bases.Base]
    save: Callable[[Run, Config, Llama, Tokenizer], None]


def train_language(name: str, run: Run, config: Config):
    """Stage text, stage1, stage2 or stage3: they differ in model, documents and settings alone."""
    section: Language = getattr(config, name)
    tok = make_tokenizer(name, run, config)
    document_at, held_out = reading.stage_documents(name, run, section, tok)
    torch.manual_seed(run.seed)
    base = LANGUAGE[name].base(run, config, tok)
    is_sharded = shard.is_sharded(name, base.model, section, run.device)
    model = base.model if is_sharded else base.load(run.device)
    batch_at = batches.documents(
        document_at, section.batch_size, section.max_len, section.accumulate, rank(), world_size()
    )
    loss = language_loss(token_weights(model, tok, section.unit_weight).to(run.device))
    probe = held_out_probe(run, section, tok, model, loss, held_out)
    optimize(run, name, run.state(name), model, loss, batch_at, section, probe, base.fill)
    if checkpoint.takes_part(model):
        LANGUAGE[name].save(run, config, model, tok)
    barrier()


def language_loss(weight: torch.Tensor) -> Callable:
    """weight (V,): how much each token counts. Besides the loss: which share of what was read is padding, and
    how long the document is that a token is in, on average."""

    def loss(model: Llama, batch) -> Loss:
        ids, mask, positions, docs = batch
        total, weights = llama.next_token_losses(model, ids, mask, positions, docs, weight)  # eq. 3 and 4
        read = docs >= 0
        tokens = read.sum()
        squares = ((2 * positions + 1) * read).sum()  # 1 + 3 + 5 + ...: of each document its length squared
        places = torch.full_like(tokens, docs.numel())
        shares = {"padding": (places - tokens, places), "length": (squares, tokens)}
        return Loss(total, weights, tokens, shares)

    return loss


def token_weights(model: Llama, tok: Tokenizer, unit_weight: float) -> torch.Tensor:
    """(V,): how much each token counts in the loss."""
    rows = model.config.vocab_size
    weight = torch.ones(max(rows, len(tok)))
    weight[tok.unit_ids.start : tok.unit_ids.stop] = unit_weight
    return weight[:rows]  # a model of text has no units yet


def held_out_probe(
    run: Run, section: Language, tok: Tokenizer, model: Llama, loss: Callable, held_out: list[Document]
) -> Callable:
    """The loss on held-out documents; and what the model answers to three of them."""

    @torch.no_grad()
    def probe() -> tuple[dict, str]:
        if not held_out:
            return {}, ""
        packed = batches.pack(held_out, section.max_len)
        found = loss(model, [t.to(run.device) for t in packed])
        lines = ""
        for ids, mask in held_out[:3]:
            prompt = mask.index(True) if not mask[1] else len(ids) // 2  # half of a document without a prompt
            draws = torch.Generator().manual_seed(run.seed)  # the same on all ranks
            answer = generate(model, [ids[:prompt]], tok, Decoding(max_new=len(ids)), draws)[0]
            lines += f"\n  prompt   {tok.decode(ids[:prompt])}"
            lines += f"\n  answer   {tok.decode(answer)}"
            lines += f"\n  expected {tok.decode(ids[prompt:])}"
        return {"held_out_loss": (found.total / found.weight).item()}, lines

    return probe


def make_tokenizer(name: str, run: Run, config: Config) -> Tokenizer:
    """The run's own: sentencepiece trained on the text of the train split, or the pretrained LLaMA's. It may
    be written again, to the same bytes, while stage t2u reads it."""
    # The first stage that needs it makes it, whatever a run with other settings has left.
    first = "stage1" if config.pretrained else "text"
    anew = name == first and not begun(run.state(name))
    n_units = config.units.clusters
    if rank() == 0 and (anew or not (run.tokenizer / "added_tokens.json").exists()):
        if config.pretrained:
            Tokenizer.extend(config.pretrained, run.tokenizer, n_units)
        else:
            text = documents.sentences(documents.read_tables(run.out, None), "train")
            Tokenizer.train(text, run.tokenizer, config.vocab_size, n_units)
    barrier()
    return Tokenizer.from_pretrained(run.tokenizer)


LANGUAGE = {
    "text": LanguageStage(bases.new_llama, partial(bases.save_llama, "text")),
    "stage1": LanguageStage(bases.grown_llama, partial(bases.save_llama, "stage1")),
    "stage2": LanguageStage(bases.stage1_llama, partial(bases.save_llama, "model/llama")),
    "stage3": LanguageStage(bases.adapted_llama, bases.save_adapters),
}

# ---- The other stages: what they need of the config --------------------------------------------------------


def make_corpus(run: Run, config: Config):
    if rank() == 0:
        if config.corpus.name == "tiny":
            prepare.prepare(run.corpus, seed=run.seed, **vars(config.corpus.options))
        corpus.check(run.corpus, run.out, config.corpus.voice)  # whoever made it, it must be readable
    barrier()


def t2u_stage(run: Run, config: Config):
    make_tokenizer("t2u", run, config)
    train_text_to_unit.train(run, config.t2u, config.units.clusters, bool(config.units.embed_centers))
    train_text_to_unit.speak_dialogues(run, config.t2u, config.stage3)


def train_stage3(run: Run, config: Config):
    if reading.reads_generated(config.stage3):  # more of it, if the settings have changed since stage t2u
        train_text_to_unit.speak_dialogues(run, config.t2u, config.stage3)
    train_language("stage3", run, config)


def vocoder_stage(run: Run, config: Config):
    if config.pretrained_vocoder:
        if rank() == 0:
            open_vocoder(config).save_pretrained(run.model / "vocoder")
        barrier()
        return
    work = run.state("vocoder")
    kmeans = KMeans.from_pretrained(run.model / "hubert") if config.units.embed_centers else None
    rows = read_units(run.manifest, run.units, config.units.clusters)
    rows = rows_of(rows, run.manifest, "vocoder.speaker", config.vocoder.speaker)
    train_vocoder.train(
        config.vocoder,
        config.vocoder_model,
        datasets(run.corpus, rows),
        out=run.model / "vocoder",
        work=work,
        metrics=partial(Metrics, run.metrics / "vocoder.jsonl", tensorboard=run.tensorboard),
        device=run.device,
        kmeans=kmeans,
    )


def evaluate_stage(run: Run, config: Config):
    import evaluate  # its recognizer is an optional extra

    if rank() == 0:
        if config.evaluate.voices and config.corpus.name == "tiny":
            options = {"voices": config.corpus.options.voices, "workers": config.corpus.options.workers}
            prepare.make_voices(run.out / "voices", config.evaluate.voices, run.seed, **options)
        evaluate.evaluate(
            run.model,
            run.corpus,
            run.out / "report",
            items=config.evaluate.items,
            seed=run.seed,
            device=run.device,
            takes=config.evaluate.takes,
            targets=config.evaluate.targets,
        )


# ---- All stages, in order ----------------------------------------------------------------------------------


def has_pretrained(config: Config) -> bool:
    return bool(config.pretrained)


def has_hubert(config: Config) -> bool:
    return bool(config.units.hubert)


STAGES = {
    "corpus": Stage(
        starts_from="an empty folder, or one's own recordings",
        trains="nothing",
        reads="data/tiny/world.py, or a manifest",
        loss="-",
        paper="LibriLight, GigaSpeech, Common Voice, LibriSpeech (§5.1)",
        work=make_corpus,
        after=(),
        sections=("corpus",),
    ),
    "hubert": Stage(
        starts_from="random weights",
        trains="all of HuBERT, in rounds",
        reads="raw speech",
        loss="the cluster of each masked frame (HuBERT eq. 1, 3)",
        paper="mHuBERT, as released",
        work=lambda run, config: train_hubert.pretrain(run, config.hubert),
        after=("corpus",),
        sections=("hubert",),
        skip=has_hubert,
        fields=sound_alone,
    ),
    "units": Stage(
        starts_from="the last round's HuBERT, or a released one",
        trains="k-means on one of its layers",
        reads="raw speech",
        loss="distance to the nearest center",
        paper="K clusters (§4.1); released: k = 1000, layer 11",
        work=lambda run, c: train_hubert.make_units(run, c.units, c.hubert, c.normalizer),
        after=("hubert",),
        sections=("units", "normalizer"),
        fields=lambda config: (*sound_alone(config), *["text"] * bool(config.normalizer.steps)),
    ),
    "text": Stage(
        starts_from="random weights",
        trains="all of the LLaMA",
        reads="text",
        loss="every token",
        paper="LLaMA-13B, as released",
        work=partial(train_language, "text"),
        after=("corpus",),
        sections=("vocab_size", "llama", "text", "pretrained", "units.clusters"),
        skip=has_pretrained,
    ),
    "stage1": Stage(
        starts_from="the text model, its vocabulary grown (eq. 1-2)",
        trains="all of the LLaMA",
        reads="unlabeled speech as units",
        loss="every unit and marker (eq. 3)",
        paper="900 steps of 768, lr 2e-4, length 1024",
        work=partial(train_language, "stage1"),
        after=("units", "text"),
        sections=("stage1", "pretrained"),
    ),
    "stage2": Stage(
        starts_from="stage 1's model",
        trains="all of the LLaMA",
        reads="ASR, TTS and text instructions (§3.1)",
        loss="the answer's tokens (eq. 4)",
        paper="2100 steps (§5.1; Table 3: 4000) of 1536, lr 2e-4, length 512",
        work=partial(train_language, "stage2"),
        after=("stage1",),
        sections=("stage2",),
    ),
    "t2u": Stage(
        starts_from="random weights",
        trains="all of the text-to-unit generator",
        reads="text and units of the recordings in the model's voice",
        loss="each unit, labels smoothed",
        paper="a Transformer encoder-decoder on LibriSpeech (§3.2)",
        work=t2u_stage,
        after=("units", "text"),
        sections=("t2u", "pretrained"),
        skip=lambda config: not reading.reads_generated(config.stage3),
    ),
    "stage3": Stage(
        starts_from="stage 2's model, frozen",
        trains="low-rank adapters of its attention",
        reads="chain-of-modality instructions (§3.2)",
        loss="the answer's tokens (eq. 4)",
        paper="4200 steps of 128, lr 2e-4, length 1024, r 8, alpha 16",
        work=train_stage3,
        after=("stage2", "t2u"),
        sections=("stage3", "lora"),
        skip=lambda config: config.stage3.steps == 0,
    ),
    "vocoder": Stage(
        starts_from="random weights; a given one stays as it is",
        trains="generator, duration predictor, discriminators",
        reads="units and waveforms",
        loss="LSGAN, features, mel spectra, durations",
        paper="multi-speaker unit HiFi-GAN (§4.1)",
        work=vocoder_stage,
        after=("units",),
        sections=("vocoder", "vocoder_model", "pretrained", "pretrained_vocoder"),
        fields=sound_alone,
    ),
    "evaluate": Stage(
        starts_from="the finished model",
        trains="nothing",
        reads="held-out questions and recordings",
        loss="-",
        paper="§5.3, §6",
        work=evaluate_stage,
        after=("stage3", "vocoder"),
        sections=("evaluate",),
    ),
}


def run_some(names: tuple[str, ...], run: Run, config: Config):
    for name in names:
        run_stage(STAGES, name, run, config)


def in_background(names: tuple[str, ...], run: Run, config: Config) -> contextlib.AbstractContextManager:
    """Context manager: runs `names` in a second process on half of the cores and joins it on exit; yields a
    function that raises ValueError if it failed. Without cores to share it runs them first."""
    names = tuple(name for name in names if not STAGES[name].skip(config))
    work = partial(run_some, names, run, config)
    able = run.device.type == "cpu" and world_size() == 1 and torch.get_num_threads() > 1
    is_shared = able and config.parallel_stages
    if is_shared and any(finished(STAGES, name, run, config) is None for name in names):
        alone = dataclasses.replace(run, workers=0)  # a background process may have none of its own
        work = partial(run_some, names, alone, config)
        return in_parallel(work, f"stage {' and '.join(names)}", run.state(names[-1]) / "log.txt")
    work()
    return on_half_of_the_cores() if is_shared else contextlib.nullcontext(lambda: None)


def run_all(run: Run, config: Config):
    """Every stage. HuBERT and its units need no text; the text-to-unit generator, which stage 3 may wait for,
    and the vocoder need nothing of stages 1 and 2."""
    run_some(("corpus",), run, config)
    tables = check_corpus(STAGES, run, config)
    forecast.tell(STAGES, run, config, tables)
    del tables  # of a large corpus much memory
    with in_background(("hubert", "units"), run, config):
        run_some(("text",), run, config)
    if finished(STAGES, "stage3", run, config) is None:
        check_lengths(run, config, make_tokenizer("stage1", run, config))
    with in_background(("t2u", "vocoder"), run, config) as check:
        for name in ("stage1", "stage2"):
            run_some((name,), run, config)
            check()
        if finished(STAGES, "t2u", run, config) is None:
            print("waiting for stage t2u", flush=True)
        while finished(STAGES, "t2u", run, config) is None:
            check()
            time.sleep(1)
        run_some(("stage3",), run, config)
    run_some(("evaluate",), run, config)


def table_of_stages() -> str:
    lines = []
    for name, stage in STAGES.items():
        lines.append(name)
        for question in ("starts_from", "trains", "reads", "loss", "paper"):
            lines.append(f"    {question.replace('_', ' '):11} {getattr(stage, question)}")
    return "\n".join(lines)


@together()
def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("config", nargs="?", help="a file of configs/, for example configs/tiny.toml")
    parser.add_argument("--stage", help=f"only this one of: {', '.join(STAGES)}")
    parser.add_argument(
        "--check", action="store_true", help="look at the corpus, say what is there, and exit"
    )
    parser.add_argument("--stages", action="store_true", help="print the table of stages and exit")
    parser.add_argument(
        "--plan", action="store_true", help="print what --gpus 96 of --gpu A100-80GB would need, and exit"
    )
    known, flags = parser.parse_known_args()
    if known.stages:
        print(table_of_stages())
        return
    if known.config is None:
        raise ValueError("name a config file, for example: python train.py configs/tiny.toml")
    stage = f"stage{known.stage}" if known.stage in ("1", "2", "3") else known.stage
    if stage and stage not in STAGES:
        raise ValueError(f"unknown stage '{stage}'; the stages are {', '.join(STAGES)}")
    # --beside was the name of --parallel_stages until November 2026.
    flags = [re.sub(r"^--beside(?==|$)", "--parallel_stages", flag) for flag in flags]
    if known.plan:
        gpus, flags = plan.parse_flags(flags)
        print(plan.describe(known.config, read(known.config, Config, flags), **vars(gpus)))
        return
    config = read(known.config, Config, flags)
    out = Path(config.out)
    corpus = out / "corpus" if config.corpus.name == "tiny" else Path(config.corpus.name)
    if config.tensorboard:
        need_tensorboard()
    run = Run(out, corpus, config.seed, find_device(config.device), config.workers, config.tensorboard)
    names = (stage,) if stage else tuple(STAGES)
    with locked(out) if rank() == 0 else contextlib.nullcontext():
        if "evaluate" in names and not known.check:
            need_extra()
        check_before(STAGES, names, run, config)
        init_distributed(run.device)
        if known.check:
            run_some(("corpus",), run, config)
            forecast.tell(STAGES, run, config, check_corpus(STAGES, run, config))
        elif stage:
            run_some(names, run, config)
        else:
            run_all(run, config)


if __name__ == "__main__":
    command_line(main)

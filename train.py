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
    text       train_language.py  out/text              a LLaMA on text
    stage1     train_language.py  out/stage1            the same with units in its vocabulary
    stage2     train_language.py  out/model/llama
    t2u        train_text_to_unit.py    out/model/text_to_unit; out/t2u.jsonl, speech of dialogues
    stage3     train_language.py  out/model/lora
    vocoder    train_vocoder.py   out/model/vocoder
    evaluate   evaluate.py        out/report

Here are the whole config, the table of all stages, their order, and the command line. The loop that they
share is training/loop.py; what is skipped, resumed and run in parallel, training/stages.py.
"""

from starting import starting

if __name__ == "__main__":
    starting()

import contextlib
import os
import re
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import evaluate
import train_hubert
import train_language
import train_text_to_unit
import train_vocoder
from config import Count, Parser, Whole, command_line, read
from data import corpus
from data.tiny import prepare
from evaluate import EvaluateSection
from evaluation.judge import need_extra
from files import locked
from run import Run, barrier, init_distributed, rank, together
from run import device as find_device
from train_language import Language, LlamaSection, LoraSection, Stage1, Stage2, Stage3
from training import forecast, plan, reading
from training.before import check_before, check_corpus, check_lengths, open_vocoder
from training.stages import Stage, finished, in_background, run_stage, sound_alone, table_of
from vocoder import VocoderConfig

# ---- Configuration -----------------------------------------------------------------------------------------
# One dataclass for each section of the file, where its stage is. Defaults are the paper's where it gives them
# (Table 3, §5.1).


@dataclass
class CorpusSection:
    # "tiny" synthesizes the small spoken world; or a folder with manifest.jsonl (data/corpus.py)
    name: str = "tiny"
    options: prepare.Options = field(default_factory=prepare.Options)  # of the tiny world
    # the speaker in whose voice the model answers, as in the manifest; "": who has most seconds to train on
    # (in the tiny world speaker 0)
    voice: int | str = ""


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
        n_layers = self.hubert.model.n_layers
        for key, layer in layers.items():
            if layer > n_layers:
                raise ValueError(f"{key} is {layer}; hubert.model has layers 1 to {n_layers}")
        if not self.pretrained_vocoder:
            train_vocoder.need_embeddings(self.vocoder_model, self.units.clusters)
        if not self.units.smooth % 2:
            raise ValueError(f"units.smooth is {self.units.smooth}; it must be odd: as many before as after")


# ---- What the stages need of the config --------------------------------------------------------------------


def make_corpus(run: Run, config: Config):
    if rank() == 0:
        if config.corpus.name == "tiny":
            prepare.prepare(run.corpus, seed=run.seed, **vars(config.corpus.options))
        corpus.check(run.corpus, run.out, config.corpus.voice)  # whoever made it, it must be readable
    barrier()


def t2u_stage(run: Run, config: Config):
    train_language.make_tokenizer("t2u", run, config)
    train_text_to_unit.train(run, config.t2u, config.units.clusters, bool(config.units.embed_centers))
    train_text_to_unit.speak_dialogues(run, config.t2u, config.stage3)


def train_stage3(run: Run, config: Config):
    if reading.reads_generated(config.stage3):  # more of it, if the settings have changed since stage t2u
        train_text_to_unit.speak_dialogues(run, config.t2u, config.stage3)
    train_language.train("stage3", run, config)


def vocoder_stage(run: Run, config: Config):
    if config.pretrained_vocoder:
        if rank() == 0:
            open_vocoder(config).save_pretrained(run.model / "vocoder")
        barrier()
    else:
        centers = bool(config.units.embed_centers)
        train_vocoder.train_stage(run, config.vocoder, config.vocoder_model, config.units.clusters, centers)


def evaluate_stage(run: Run, config: Config):
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
        skip=lambda config: bool(config.units.hubert),
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
        work=partial(train_language.train, "text"),
        after=("corpus",),
        sections=("vocab_size", "llama", "text", "pretrained", "units.clusters"),
        skip=lambda config: bool(config.pretrained),
    ),
    "stage1": Stage(
        starts_from="the text model, its vocabulary grown (eq. 1-2)",
        trains="all of the LLaMA",
        reads="unlabeled speech as units",
        loss="every unit and marker (eq. 3)",
        paper="900 steps of 768, lr 2e-4, length 1024",
        work=partial(train_language.train, "stage1"),
        after=("units", "text"),
        sections=("stage1", "pretrained"),
    ),
    "stage2": Stage(
        starts_from="stage 1's model",
        trains="all of the LLaMA",
        reads="ASR, TTS and text instructions (§3.1)",
        loss="the answer's tokens (eq. 4)",
        paper="2100 steps (§5.1; Table 3: 4000) of 1536, lr 2e-4, length 512",
        work=partial(train_language.train, "stage2"),
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


def look_at_corpus(run: Run, config: Config):
    """Says what there is for each stage. One process does it, whose memory then holds all of the tables."""
    run_some(("corpus",), run, config)
    if rank() == 0:
        forecast.tell(STAGES, run, config, check_corpus(STAGES, run, config))
    barrier()


def run_all(run: Run, config: Config):
    """Every stage. HuBERT and its units need no text; the text-to-unit generator, which stage 3 may wait for,
    and the vocoder need nothing of stages 1 and 2."""
    look_at_corpus(run, config)
    with in_background(STAGES, ("hubert", "units"), run_some, run, config):
        run_some(("text",), run, config)
    if finished(STAGES, "stage3", run, config) is None:
        check_lengths(run, config, train_language.make_tokenizer("stage1", run, config))
    with in_background(STAGES, ("t2u", "vocoder"), run_some, run, config) as check:
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


@together()
def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("config", nargs="?", help="a file of configs/, for example configs/tiny.toml")
    parser.add_argument("--stage", help=f"only this one of: {', '.join(STAGES)}")
    switch = partial(parser.add_argument, action="store_true")
    switch("--check", help="look at the corpus, say what is there, and exit")
    switch("--stages", help="print the table of stages and exit")
    switch("--plan", help="print what --gpus 96 of --gpu A100-80GB would need, and exit")
    known, flags = parser.parse_known_args()
    if known.stages:
        print(table_of(STAGES))
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
    run = Run(out, corpus, config.seed, find_device(config.device), config.workers, config.tensorboard)
    names = (stage,) if stage else tuple(STAGES)
    with locked(out) if rank() == 0 else contextlib.nullcontext():
        if "evaluate" in names and not known.check:
            need_extra()
        check_before(STAGES, names, run, config)
        init_distributed(run.device)
        if known.check:
            look_at_corpus(run, config)
        elif stage:
            run_some(names, run, config)
        else:
            run_all(run, config)


if __name__ == "__main__":
    command_line(main)

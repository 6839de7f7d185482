"""A tiny trained model that answers, from Python and from the command line."""

import errno
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import generate
import hubert
import llama
import lora
import sample
import tokenizer
import vocoder
from config import command_line
from sample import GREEDY, RenderedPrompt, Request, Sampling, SpeechGPT

pytestmark = pytest.mark.usefixtures("one_thread")
K = 20
ASKED, ANSWERED, SPOKEN = "what is two plus two", "two plus two is four", [3, 7, 1, 7, 2, 19, 0, 5]
ROOT = Path(sample.__file__).parent


def chirp(seconds: float = 1.0, rate: int = 16000) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (200 + 700 * t) * t)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of random parts whose LLaMA has learned one dialogue by heart, in every form."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tok = tokenizer.Tokenizer.train([ASKED, ANSWERED] * 5, folder / "llama", 420, K)
    ear = hubert.HuBERT(
        hubert.HuBERTConfig((16,) * 7, dim=32, n_layers=1, n_heads=2, ffn_dim=64, pos_groups=2)
    )
    with torch.no_grad():
        frames = ear.eval().features(torch.from_numpy(chirp())[None], 1)[0]
    extractor = hubert.UnitExtractor(
        ear, hubert.KMeans(frames[torch.linspace(0, len(frames) - 1, K).long()]), 1
    )
    extractor.save_pretrained(folder / "hubert")
    small = {
        "encoder_embed_dim": 8,
        "var_pred_hidden_dim": 8,
        "var_pred_kernel_size": 3,
        "var_pred_dropout": 0.0,
    }
    vocoder.UnitVocoder(
        vocoder.VocoderConfig(
            num_embeddings=K,
            embedding_dim=8,
            model_in_dim=16,
            multispkr="from_input_file",
            num_speakers=2,
            upsample_initial_channel=32,
            dur_predictor_params=small,
        )
    ).save_pretrained(folder / "vocoder")

    question = tokenizer.units_to_text(extractor(chirp())[0])
    answer = tokenizer.units_to_text(SPOKEN)
    quadruplet = {"speech_i": question, "text_i": ASKED, "text_r": ANSWERED, "speech_r": answer}
    dialogues = [
        form(mode, **quadruplet)
        for form in (tokenizer.chain_of_modality, tokenizer.standard)
        for mode in ("s2s", "s2t", "t2s", "t2t")
    ]
    dialogues.append(tokenizer.cross_modal(tokenizer.ASR_INSTRUCTIONS[0], question, ASKED))
    dialogues.append(tokenizer.cross_modal(tokenizer.TTS_INSTRUCTIONS[0], ANSWERED, answer))
    documents = [tok.document(*dialogue)[0] for dialogue in dialogues] + [tok.encode(question)]
    width = max(map(len, documents))
    ids = torch.tensor([d + [0] * (width - len(d)) for d in documents])
    mask = torch.tensor([[True] * len(d) + [False] * (width - len(d)) for d in documents])
    model = llama.Llama(
        llama.LlamaConfig(len(tok), dim=64, n_layers=2, n_heads=4, hidden_dim=128, max_len=384)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 6e-3)
    for _ in range(120):
        loss = llama.next_token_loss(model, ids, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    model.save_pretrained(folder / "llama")
    return folder


@pytest.fixture(scope="module")
def gpt(folder) -> SpeechGPT:
    return SpeechGPT.from_pretrained(folder, device="cpu")


# ---- loading


def test_int8_is_close_and_small(folder, gpt):
    small = SpeechGPT.from_pretrained(folder, device="cpu", int8=True)
    ids = gpt.ids(ASKED)
    exact, rounded = gpt.logits(ids), small.logits(ids)
    assert (exact - rounded).std() < 0.05 * exact.std()
    blocks = small.llama.model.layers.state_dict()
    assert all(t.dtype == torch.int8 for name, t in blocks.items() if name.endswith("proj.weight"))
    assert small.reply(ASKED, "t2t").text == ANSWERED


@pytest.mark.parametrize(
    "how",
    [
        dict(device="cpu,cpu"),
        dict(dtype="bfloat16"),
        dict(dtype=torch.float16),
        dict(dtype="bfloat16", int8=True),
    ],
)
def test_other_places_and_precisions_answer_alike(folder, how):
    gpt = SpeechGPT.from_pretrained(folder, **{"device": "cpu", **how})
    assert str(gpt.llama.lm_head.weight.dtype).removeprefix("torch.") in str(how.get("dtype", "float32"))
    assert [reply.text for reply in gpt.reply_batch([ASKED, chirp()], "*2t")] == [ANSWERED] * 2


def test_adapter_is_merged_or_stays_separate_with_int8(folder, gpt, tmp_path):
    (tmp_path / "llama").symlink_to(folder / "llama")
    model = lora.apply(llama.Llama.from_pretrained(folder / "llama"), 4, 8, ["q_proj", "v_proj"])
    for p in lora.parameters(model):
        torch.nn.init.normal_(p, std=0.3)
    lora.save(model, tmp_path / "lora")
    ids = gpt.ids(ASKED, mode="t2t")
    expected = model.eval()(torch.tensor([ids]))[0]
    merged = SpeechGPT.from_pretrained(tmp_path, device="cpu")
    assert not lora.adapters(merged.llama)
    torch.testing.assert_close(merged.logits(ids), expected, atol=1e-3, rtol=1e-3)
    rounded = SpeechGPT.from_pretrained(tmp_path, device="cpu", int8=True).logits(ids)
    assert (rounded - expected).std() < 0.1 * expected.std() < (gpt.logits(ids) - expected).std()


# ---- answers


@pytest.mark.parametrize("chain", [True, False])
@pytest.mark.parametrize("mode", ["s2s", "s2t", "t2s", "t2t", "*2s"])
def test_replies_in_four_directions(gpt, mode, chain):
    prompt = chirp() if mode[0] in "s*" else ASKED
    reply = gpt.reply(prompt, mode, chain=chain, speech=GREEDY)
    assert reply.transcript == (ASKED if mode[0] in "s*" and chain else "")
    assert reply.text == (ANSWERED if chain or mode[-1] == "t" else "")
    assert reply.units == (SPOKEN if mode[-1] == "s" else [])
    assert reply.note == "" and (reply.wav is not None) == (mode[-1] == "s")
    if reply.wav is not None:
        assert reply.wav.dtype == np.float32 and reply.wav.ndim == 1 and len(reply.wav) >= 320 * len(SPOKEN)
        assert np.isfinite(reply.wav).all()
    assert reply.stats["tokens_per_second"] > 0


def test_tasks(gpt):
    assert gpt.transcribe(chirp()).text == gpt.transcribe(chirp()).transcript == ASKED
    assert gpt.speak(ANSWERED, speech=GREEDY).units == SPOKEN
    assert gpt.answer([ASKED], Request("t2t"))[0].text == gpt.reply(ASKED, "t2t").text == ANSWERED
    units = gpt.units(chirp())
    assert len(units) > 4
    middle = gpt.ids(chirp(), task="continue")
    assert middle == [gpt.tok.bos, gpt.tok.sosp] + [gpt.tok.unit_id(u) for u in units]
    reply = gpt.continue_speech(chirp(), speech=GREEDY)
    assert reply.units[: len(units)] == units and reply.wav is not None and reply.note == ""
    text = gpt.reply(ASKED, task="continue", max_new=1)
    assert text.text.startswith(ASKED) and "cut off" in text.note


def test_a_batch_mixes_speech_and_text_and_answers_as_one_by_one(gpt):
    together = gpt.reply_batch([chirp(), ASKED, chirp()], speech=GREEDY)
    for prompt, reply in zip([chirp(), ASKED, chirp()], together):
        alone = gpt.reply(prompt, speech=GREEDY)
        assert (reply.transcript, reply.text, reply.units) == (alone.transcript, alone.text, alone.units)
        np.testing.assert_allclose(reply.wav, alone.wav)


def test_a_seed_decides_everything(gpt):
    hot = Sampling(3.0)
    one, same, other = (gpt.reply(chirp(), speech=hot, seed=seed).units for seed in (1, 1, 2))
    assert one == same != other


def test_the_asr_score_is_the_log_probability_of_the_text(gpt):
    spoken = [gpt.tok.sosp, *map(gpt.tok.unit_id, gpt.units(chirp())), gpt.tok.eosp]
    right, wrong = (sample.asr_log_prob(gpt, spoken, text) for text in (ASKED, ANSWERED))
    assert wrong < generate.ACCEPT < right < 0
    assert sample.asr_log_prob(gpt, [gpt.tok.eoa], ASKED) == -np.inf

    dialogue = tokenizer.cross_modal(tokenizer.ASR_INSTRUCTIONS[0], gpt.tok.decode(spoken), ASKED)
    ids, mask = gpt.tok.document(*dialogue)
    steps = [gpt.logits(ids[:n])[-1].log_softmax(-1)[ids[n]] for n in range(1, len(ids)) if mask[n]]
    assert right == pytest.approx(sum(steps).item(), abs=1e-3)


def test_speech_is_drawn_again_and_the_take_of_the_best_score_stays(gpt, monkeypatch):
    hot, lengths = Sampling(3.0), []

    def asr_log_prob(model, answer, text, style):
        assert text == ANSWERED and style == "paper"
        lengths.append(len(model.tok.parse(answer).ua))
        return -float(lengths[-1])  # as if it recognized the shortest best

    monkeypatch.setattr(sample, "asr_log_prob", asr_log_prob)
    for prompt, options in ((chirp(), {}), (ANSWERED, {"task": "tts"})):
        first, best = (gpt.reply(prompt, speech=hot, takes=takes, **options) for takes in (1, 6))
        assert len(lengths) == best.stats["takes"] == 6 and first.stats["takes"] == 1
        assert len(first.units) == lengths[0] and len(best.units) == min(lengths) < max(lengths)
        assert (best.transcript, best.text) == (first.transcript, first.text) and best.note == ""
        assert best.stats["new_tokens"] < sum(lengths)
        lengths.clear()
    assert (
        gpt.reply(chirp(), speech=GREEDY, takes=6).stats["takes"] == 1 and not lengths
    )  # it would be the same again


def test_only_what_is_not_recognized_is_drawn_again(gpt, monkeypatch):
    scores, sizes = iter([-5.0, 0.0, -5.0, -3.0, -0.1, -0.2]), []
    monkeypatch.setattr(sample, "asr_log_prob", lambda *_: next(scores))
    real = sample.generate
    monkeypatch.setattr(
        sample, "generate", lambda model, ids, *a: sizes.append(len(ids)) or real(model, ids, *a)
    )
    gpt.reply_batch([chirp(), ASKED, chirp()], speech=Sampling(3.0))
    assert sizes == [3, 2, 1] and next(scores, None) is None


def test_speakers(gpt):
    first, second = (gpt.speak(ANSWERED, speech=GREEDY, speaker=s).wav for s in (0, 1))
    assert first.shape == second.shape and not np.allclose(first, second)
    with pytest.raises(ValueError, match="no speaker 2"):
        gpt.speak(ANSWERED, speaker=2)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_no_marker_leaks_whatever_is_generated(gpt, data):
    tok = gpt.tok
    pool = st.sampled_from(
        [
            tok.sosp,
            tok.eosp,
            tok.human,
            tok.eoh,
            tok.eoa,
            tok.eos,
            tok.bos,
            tok.unit_id(3),
            *tok.sp.encode("[tq] a; [ta] b; [ua] <eoa>. [Human] <sosp><1>"),
        ]
    )
    ids = data.draw(st.lists(pool, min_size=1, max_size=30))
    reply = gpt.to_reply(RenderedPrompt([tok.bos], "s"), ids, Request())
    for marker in (
        "[tq]",
        "[ta]",
        "[ua]",
        "<sosp>",
        "<eosp>",
        "<eoa>",
        "<eos>",
        "<eoh>",
        "[Human]",
        "<s>",
        "</s>",
    ):
        assert marker not in reply.transcript + reply.text
    assert reply.wav is not None or reply.note  # never silent without saying so


@pytest.mark.parametrize(
    "written, target, note",
    [
        ("[ta] four; [ua] <eoa>", "s", "text only"),
        ("<eoa>", "s", "said nothing"),
        ("<sosp><eosp><eoa>", "s", "nothing"),
        ("<sosp><1><2>", "s", "cut off"),
        ("[ta] four", "t", "cut off"),
        ("<sosp><1><eosp><eoa>", "t", "only speech"),
        ("[ta] four<eoa>", "t", ""),
        ("[ua] <sosp><1><eosp><eoa>", "s", ""),
    ],
)
def test_notes(gpt, written, target, note):
    ids = gpt.tok.encode(written, bos=False)
    reply = gpt.to_reply(RenderedPrompt([1], target), ids, Request())
    assert note in reply.note and bool(note) == bool(reply.note)


def test_released_style_has_no_tq_and_keeps_the_lone_space(gpt):
    tok = gpt.tok
    ids = gpt.ids(ASKED, style="released")
    text = tok.decode(ids)
    assert "Fudan" in text and "step by step" not in text
    assert ids == tok.prompt(
        tokenizer.chain_of_modality("t2s", text_i=ASKED, style="released")[0], official=True
    )
    assert "step" in tok.decode(gpt.ids(ASKED)) and gpt.ids(ASKED) == gpt.ids(ASKED, style="paper")


def test_missing_parts_are_named(gpt):
    mute = SpeechGPT(gpt.llama, gpt.tok)
    assert mute.reply(ASKED, "t2t").text == ANSWERED
    with pytest.raises(ValueError, match="cannot speak"):
        mute.reply(ASKED)
    with pytest.raises(ValueError, match="cannot hear"):
        mute.reply(chirp(), "s2t")
    for sound in (chirp(), Path("a.wav"), "a.wav"):
        with pytest.raises(ValueError, match="a text is needed"):
            gpt.speak(sound)
    assert gpt.ids("either/or", mode="t2s", task="tts"), "whoever says that it is a text is right"


def test_long_prompts_say_what_fits(gpt):
    with pytest.raises(ValueError, match=r"lasts 120 s; about 15 s"):
        gpt.reply(chirp(120))
    noise = np.random.default_rng(0).normal(0, 0.1, 16000 * 12).astype(np.float32)
    with pytest.raises(ValueError, match=r"about \d+\.\d of its 12\.0 s"):
        gpt.reply(noise)
    for words in (300, 100_000):
        with pytest.raises(ValueError, match="shorten it"):
            gpt.reply("word " * words)


def test_an_answer_whose_speech_begins_at_the_end_of_the_context_is_not_drawn_again(gpt, monkeypatch):
    monkeypatch.setattr(sample, "asr_log_prob", lambda *_: -5.0)
    monkeypatch.setattr(sample, "MIN_ANSWER", 1)
    ids = gpt.ids(ANSWERED, task="tts")
    ends = gpt.llama.config.max_len - len(ids)
    draws = []

    def generate_silence(model, prompts, *_):
        draws.append(prompts)
        return [[gpt.tok.unk] * (ends - 1) + [gpt.tok.sosp] for _ in prompts]

    monkeypatch.setattr(sample, "generate", generate_silence)
    assert gpt.speak(ANSWERED, takes=3).stats["takes"] == 1 and len(draws) == 1


def test_one_prompt_that_cannot_be_answered_leaves_the_others_their_replies(gpt):
    prompts = [chirp(), "missing.wav", ASKED, "", chirp(120)]
    replies = gpt.answer_each(prompts, Request(speech=GREEDY))
    assert [reply.units for reply in (replies[0], replies[2])] == [SPOKEN, SPOKEN]
    for reply, says in ((replies[1], "no such file; if it is a text, add --in text"), (replies[3], "empty")):
        assert isinstance(reply, Exception) and says in str(reply)
    assert "cut it into shorter" in str(replies[4])
    assert [type(reply) for reply in gpt.answer_each(["missing.wav"], Request())] == [FileNotFoundError]
    with pytest.raises(ValueError, match="no speaker 9"):
        gpt.answer_each([ASKED], Request(speaker=9))


def test_half_characters_are_a_text_too(gpt):
    assert gpt.ids("what is \udcff two") == gpt.ids("what is ? two")


def test_looking_inside(gpt):
    ids = gpt.ids(ASKED)
    logits, states = gpt.logits(ids), gpt.embeddings(ids)
    assert logits.shape == (len(ids), len(gpt.tok)) and states.shape == (len(ids), 64)
    torch.testing.assert_close(gpt.llama.lm_head(states), logits)


# ---- the command line


@pytest.fixture
def cli(folder, tmp_path, monkeypatch, capsys):
    """Runs sample.py's main in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("q.wav", chirp(), 16000)

    def run(*flags: str):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(folder), "--device", "cpu", *flags])
        code = 0
        try:
            command_line(sample.main)
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_command_line_writes_wav_and_json(cli):
    code, out, err = cli("q.wav", ASKED, "--greedy")
    assert code == 0 and err == ""
    for line in (
        f"transcript {ASKED}",
        f"answer     {ANSWERED}",
        "speech     out/replies/q.wav (",
        "real-time factor",
        "tokens/s",
        "GB/s",
        "cpu",
    ):
        assert line in out
    assert sorted(p.name for p in Path("out/replies").iterdir()) == [
        "q.json",
        "q.wav",
        "what-is-two-plus-two.json",
        "what-is-two-plus-two.wav",
    ]
    row = json.loads(Path("out/replies/q.json").read_text())
    assert (row["prompt"], row["transcript"], row["text"], row["units"], row["wav"]) == (
        "q.wav",
        ASKED,
        ANSWERED,
        SPOKEN,
        "q.wav",
    )
    wav, rate = soundfile.read("out/replies/q.wav")
    assert rate == 16000 and len(wav) >= 320 * len(SPOKEN)


def test_command_line_forms(cli):
    assert ANSWERED in cli("q.wav", "--to", "text", "--out", "t")[1] and not Path("t/q.wav").exists()
    assert ANSWERED in cli("q.wav", "--to", "text", "--standard")[1]
    assert ASKED in cli("q.wav", "--task", "asr")[1]
    assert "named.wav" in cli(ANSWERED, "--task", "tts", "--out", "named.wav", "--speaker", "1")[1]
    assert soundfile.info("named.wav").frames > 0
    flags = "--batch 2 --preset paper --temperature 0.1 --out d".split()
    code, out, _ = cli("q.wav", "q.wav", "q.wav", *flags)
    assert code == 0 and sorted(p.name for p in Path("d").glob("*.wav")) == ["q-2.wav", "q-3.wav", "q.wav"]


@pytest.mark.parametrize(
    "name, rate, channels", [("a.flac", 22050, 2), ("b.ogg", 44100, 1), ("c.wav", 8000, 1)]
)
def test_any_rate_and_format(cli, name, rate, channels):
    soundfile.write(name, np.stack([chirp(1.0, rate)] * channels, 1), rate)
    code, out, err = cli(name, "--to", "text", "--max-new", "5")
    assert code == 0 and name in out, err


BAD_FILES = {
    "silent.wav": lambda path: soundfile.write(path, np.zeros(16000), 16000),
    "one.wav": lambda path: soundfile.write(path, np.ones(1), 16000),
    "nan.wav": lambda path: soundfile.write(path, np.full(16000, np.nan), 16000, "FLOAT"),
    "long.wav": lambda path: soundfile.write(path, np.tile(chirp(60), 5), 16000),
    "empty.wav": lambda path: Path(path).touch(),
    "text.wav": lambda path: Path(path).write_text("not a sound"),
    "cut.wav": lambda path: Path(path).write_bytes(Path("q.wav").read_bytes()[:5000]),
}


@pytest.mark.parametrize(
    "flags, says",
    [
        (["missing.wav"], "missing.wav: no such file"),
        (["q.m4a"], "q.m4a: no such file; if it is a text, add --in text"),
        (["my answer.opus"], "no such file"),
        (["nowhere/q"], "no such file"),
        (["a.wav", "b.wav", "c.wav"], "3 of 3 prompts were not answered: a.wav: no such file"),
        (["q.wav", "--seed", "-1"], "seed is -1"),
        (["q.wav", "--temperature", "1e-40"], "temperature 0 or 0.001 to 1000"),
        (["q.wav", "--out", "reply.mp3"], "replies are wav files"),
        (["."], "folder"),
        (["empty.wav"], "empty"),
        (["silent.wav"], "silent"),
        (["one.wav"], "25 ms"),
        (["nan.wav"], "NaN"),
        (["long.wav"], "cut it into shorter"),
        (["text.wav"], "not a sound"),
        (["cut.wav"], "cut short"),
        ([".", "--in", "speech"], "folder"),
        ([""], "empty"),
        (["word " * 300], "shorten"),
        (["q.wav", "--frobnicate"], "frobnicate"),
        (["q.wav", "--task", "sing"], "sing"),
        (["q.wav", "--top-k", "x"], "top-k"),
        (["q.wav", "--top-p", "2"], "top_p"),
        (["q.wav", "--batch", "0"], "--batch"),
        (["q.wav", "--max-new", "0"], "max_new is 0"),
        (["q.wav", "--takes", "0"], "at least once"),
        (["q.wav", "--takes", "2", "--task", "asr"], "text to compare"),
        (["q.wav", "--model", "nowhere"], "nowhere"),
        (["q.wav", "--dtype", "int4"], "int4"),
        (["q.wav", "--device", "abacus"], "abacus"),
        (["q.wav", "--greedy", "--top-k", "3"], "--greedy"),
        (["q.wav", "--speaker", "9"], "speaker 9"),
        (["q.wav", ASKED, "--out", "x.wav"], "2 prompts"),
        (["q.wav", "--out", "q.wav"], "is no reply of this program: choose another --out"),
        (["q.wav", "--out", "q.wav/deep"], "q.wav"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(cli, flags, says):
    if flags[0] in BAD_FILES:
        BAD_FILES[flags[0]](flags[0])
    before = {p for p in Path().rglob("*") if p.is_file()}
    code, out, err = cli(*flags)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    assert says in err, err
    assert {p for p in Path().rglob("*") if p.is_file()} == before


def test_the_others_are_answered_and_the_exit_code_tells(cli):
    Path("folder").mkdir()
    code, out, err = cli("q.wav", "q.m4a", ASKED, "folder", "--greedy", "--batch", "2")
    assert code == 1 and out.count(ANSWERED) == 2
    assert "q.m4a\n  error      q.m4a: no such file" in out
    assert err.startswith("error: 2 of 4 prompts were not answered: q.m4a: no such file") and "folder" in err
    assert err.count("\n") == 1 and len(err) < 310
    assert {p.name for p in Path("out/replies").glob("*.wav")} == {"q.wav", "what-is-two-plus-two.wav"}


def test_replies_replace_replies_alone(cli):
    soundfile.write("q.flac", chirp(), 16000)
    before = Path("q.wav").read_bytes()
    Path("q.json").write_text("my notes")
    for _ in range(2):
        assert "speech     q-2.wav (" in cli("q.flac", "--greedy", "--out", ".")[1]
    assert Path("q.json").read_text() == "my notes" and Path("q.wav").read_bytes() == before
    assert {p.name for p in Path().iterdir()} == {"q.flac", "q.wav", "q.json", "q-2.wav", "q-2.json"}
    assert cli("q.flac", "--greedy", "--out", ".", "--to", "text")[0] == 0
    assert not Path("q-2.wav").exists(), "the reply is text now"


def test_the_model_that_comes_along_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sample.default_model() == str(ROOT / "weights/tiny")
    Path("weights/tiny").mkdir(parents=True)
    assert sample.default_model() == "weights/tiny"


def test_a_full_disk_leaves_the_old_reply(cli, monkeypatch):
    assert cli("q.wav", "--greedy")[0] == 0
    old = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "out/replies/q.wav")

    for name in ("os.replace", "soundfile.write"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            code, _, err = cli("q.wav", "--preset", "paper")
        assert code == 1 and err.count("\n") == 1 and "No space left" in err
        assert {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == old


def program(folder: Path, *flags: str, **how) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "sample.py"), "--model", str(folder), "--device", "cpu", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **how)


def test_a_mistake_ends_the_program_with_one_line(folder, tmp_path):
    done = program(folder, "missing.wav", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        1,
        "error: missing.wav: no such file; if it is a text, add --in text\n",
    )


def test_conversation_from_a_pipe(folder, tmp_path):
    soundfile.write(tmp_path / "q.wav", chirp(), 16000)
    lines = ["/help", "", "nothere.wav", ASKED, "q.wav", str(tmp_path / "q.wav"), "/nonsense"]
    done = program(folder, "--greedy", cwd=tmp_path, input="\n".join(lines) + "\n")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("Type a question") == 3 and done.stdout.count(f"answer     {ANSWERED}") == 3
    assert "error      nothere.wav: no such file" in done.stdout
    assert soundfile.info(tmp_path / "out/replies/q.wav").frames > 0


def test_nothing_that_is_typed_ends_a_conversation(cli, monkeypatch):
    lines = [b"\xff\xfe what", b"word " * 200_000, b"\x1b[31m \x00 \x07", b"a\0.wav", b"/x/y", ASKED.encode()]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), "utf-8"))
    code, out, err = cli("--greedy")
    assert (code, err) == (0, "") and out.rstrip().splitlines()[-3].endswith(ANSWERED)
    for says in ("the prompt is too long: 999,999 characters", "/x/y: no such file", "a\\x00.wav"):
        assert says in out
    assert "\x1b" not in out and "\x07" not in out
    assert max(map(len, out.splitlines())) < 350


@pytest.mark.parametrize("stdin, code, says", [(io.StringIO(""), 0, ""), (None, 1, "there is no input to")])
def test_a_conversation_without_input_ends(cli, monkeypatch, stdin, code, says):
    if stdin:
        monkeypatch.setattr(stdin, "reconfigure", lambda **_: None, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)
    ended, _, err = cli()
    assert ended == code and says in err and err.count("\n") == code


def test_conversation_leaves_quietly(cli, monkeypatch):
    for leave in (EOFError, KeyboardInterrupt):

        def hang_up(_, leave=leave):
            raise leave

        monkeypatch.setattr("builtins.input", hang_up)
        monkeypatch.setattr(sys.stdin, "reconfigure", lambda **_: None, raising=False)
        assert cli()[0] == 0


@pytest.mark.parametrize(
    "question, answer",
    [
        ("What is the capital of Peru?", "The capital of Peru is Lima."),
        ("How much is two plus three?", "Two plus three is five."),
    ],
)
def test_the_shipped_model_answers_a_spoken_question_aloud(tmp_path, question, answer):
    """The README's third command, as typed on a fresh clone; the question is spoken here and now."""
    pytest.importorskip("hibari", reason="somebody has to ask: the extra 'demo'")
    from data.tiny import prepare

    prepare.load_voice()
    u = prepare.render(question, "test", "question", "test", take=0, seed=1234)
    soundfile.write(tmp_path / "question.wav", prepare.speak(u), 16000)
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", tmp_path / "question.wav", "--out", tmp_path / "reply.wav"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert question in done.stdout and answer in done.stdout
    spoken, rate = soundfile.read(tmp_path / "reply.wav")
    assert rate == 16000 and 0.8 < len(spoken) / rate < 4 and np.abs(spoken).max() > 0.1

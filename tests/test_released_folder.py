"""A small copy of the folder that data/released/prepare.py fills: every file in its released format, written
by the original libraries (fairseq's by hand), and SpeechGPT on top of it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import joblib
import pytest
import soundfile
import test_hubert
import test_tokenizer
import test_vocoder
import torch
from sklearn.cluster import KMeans

from sample import SpeechGPT

ROOT = Path(__file__).resolve().parent.parent
UNITS = 1000


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(folder, the language model in transformers and peft, HuBERT and k-means before they were written)."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    folder, patch = tmp_path_factory.mktemp("speechgpt-7b"), pytest.MonkeyPatch()
    for part in ("hubert", "lora", "vocoder"):
        (folder / part).mkdir()
    test_tokenizer.released_folder(folder / "llama", "<eos>")

    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=2006,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    base = transformers.LlamaForCausalLM(shape).eval()
    shape.save_pretrained(folder / "llama")
    torch.save(base.state_dict(), folder / "llama/pytorch_model.bin")
    adapted = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
        ),
    ).eval()
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            p.data.normal_(std=0.1)
    adapted.save_pretrained(folder / "lora", safe_serialization=True)
    file = folder / "lora/adapter_model.safetensors"
    torch.save(peft.get_peft_model_state_dict(adapted), file.with_suffix(".bin"))
    file.unlink()

    hubert = test_hubert.randomized(replace(test_hubert.TINY, n_layers=12))
    frames = hubert.features(test_hubert.speech(30)[None], 11)[0].detach().numpy()
    kmeans = KMeans(UNITS, init="random", n_init=1, max_iter=2, random_state=0).fit(frames)
    joblib.dump(kmeans, folder / "hubert/mhubert_base_vp_en_es_fr_it3_L11_km1000.bin")
    test_hubert.fairseq_file(hubert, folder / "hubert/mhubert_base_vp_en_es_fr_it3.pt", patch)
    with pytest.warns((FutureWarning, DeprecationWarning)):
        test_vocoder.released(folder / "vocoder", num_embeddings=UNITS)
    return folder, adapted, (hubert, kmeans)


def test_units_and_logits_are_those_of_the_original_libraries(released):
    folder, original, (hubert, kmeans) = released
    gpt, wav = SpeechGPT.from_pretrained(folder, "cpu"), test_hubert.speech(2, seed=3)
    frames = kmeans.predict(hubert.features(wav[None], 11)[0].detach().numpy())
    expected = [int(u) for u, before in zip(frames, [-1, *frames]) if u != before]
    assert gpt.units(wav.numpy()) == expected and len(set(expected)) > 3
    ids = gpt.ids(wav.numpy(), mode="s2s")
    assert [i - 1000 for i in ids if 1000 <= i < 2000] == expected and "Fudan" in gpt.tok.decode(ids)
    with torch.inference_mode():
        logits = original(torch.tensor([ids])).logits[0]
    assert (gpt.logits(ids) - logits).abs().max() < 1e-4
    assert len(gpt.vocoder(expected)) % 320 == 0


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--int8"],
        ["--task", "asr"],
        ["--to", "text", "--greedy"],
        ["--preset", "official", "--dtype", "bfloat16"],
    ],
)
def test_the_readmes_command_runs_on_it(released, tmp_path, flags):
    soundfile.write(tmp_path / "question.wav", test_hubert.speech(2, seed=3).numpy(), 16000)
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "sample.py",
            "--model",
            released[0],
            tmp_path / "question.wav",
            "--max-new",
            "12",
            "--device",
            "cpu",
            "--out",
            tmp_path / "reply",
            *flags,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    # random weights give random text; but no flag, format or marker may get in the way
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "loaded in" in done.stdout + done.stderr
    assert "<sosp>" not in done.stdout and "[SpeechGPT]" not in done.stdout

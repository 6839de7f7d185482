"""train_hubert.py: rounds, units, the normalizer."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pytest
import test_hubert
import torch
from runs import metrics, stages, train
from sklearn.cluster import KMeans as SklearnKMeans

import checkpoint
from checkpoint import read_tensors
from config import load
from data import audio, corpus, documents, units
from data.corpus import TARGET_SPEAKER
from data.tiny import prepare
from files import write_json, write_jsonl
from hubert import KMeans, UnitExtractor
from llama import Llama
from train_hubert import HubertSection, UnitsSection, load_labels, save_labels, training_rows
from training.before import open_hubert, some_sentences

pytest.importorskip("hibari", reason="the tiny world is spoken by the extra 'demo'")


def test_embeddings_of_units_can_begin_as_the_centers_of_their_clusters(out):
    shutil.rmtree(out / "state/units")
    stages(out, "units", "text", "1", flags=["--units.embed_centers", 0.3, "--stage1.steps", 0])
    text, grown = (Llama.from_pretrained(out / name).state_dict() for name in ("text", "stage1"))
    places = KMeans.from_pretrained(out / "model/hubert").embeddings(32)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, units = len(text[name]), len(places)
        assert torch.equal(grown[name][:old], text[name])  # eq. 1-2
        torch.testing.assert_close(grown[name][old : old + units], places * 0.3)
        assert grown[name][old + units :].std() == pytest.approx(0.02, rel=0.2)  # markers: by chance as ever


def test_hubert_learns_to_give_a_sentence_the_units_of_the_own_voice_whoever_says_it(out):
    shutil.rmtree(out / "state/hubert")
    shutil.rmtree(out / "state/units")
    prepare.prepare(out / "corpus", sentences=20, renditions=len(prepare.SPEAKERS), workers=1, progress=False)
    corpus.check(out / "corpus", out)
    flags = ["--normalizer.steps", 40, "--normalizer.lr", 2e-3, "--normalizer.save_every", 10]
    stages(out, "hubert", "units", flags=flags)
    loss, same = ([line[key] for line in metrics(out, "normalize")] for key in ("loss", "same"))
    assert len(loss) == 40 and np.mean(loss[-8:]) < np.mean(loss[:8]) and 0 < min(same) and max(same) < 1
    found, normal = out / "state/units/found", out / "model/hubert"
    assert (found / "kmeans.safetensors").read_bytes() == (normal / "kmeans.safetensors").read_bytes()
    assert (found / "model.safetensors").read_bytes() != (normal / "model.safetensors").read_bytes()
    before, after = UnitExtractor.from_pretrained(found), UnitExtractor.from_pretrained(normal)
    rows = {row["id"]: row for row in units.read_units(out / "manifest.jsonl", out / "units.jsonl", 20)}
    for row in [*rows.values()][:3]:
        assert row["units"] == after(torch.from_numpy(audio.load(out / "corpus" / row["wav"])))[0]

    own = {
        row["text"] for row in rows.values() if row["split"] == "train" and row["speaker"] == TARGET_SPEAKER
    }
    labels, more = load_labels(found / "targets.safetensors", 20)
    ids = bytes(more["ids"].numpy()).decode().split("\n")
    targets, apart = dict(zip(ids, labels)), dict(zip(ids, more["distance"].tolist()))
    others = 0
    for id, target in targets.items():
        row = rows[id]
        wav = torch.from_numpy(audio.load(out / "corpus" / row["wav"]))
        assert row["split"] == "train" and row["text"] in own and len(target) == len(before.frame_units(wav))
        if row["speaker"] == TARGET_SPEAKER:
            assert target.tolist() == before.frame_units(wav).tolist() and apart[id] == 0
        else:
            assert set(target) <= set(range(20)) and apart[id] > 0
            others += 1
    train_rows = [row for row in rows.values() if row["split"] == "train" and row["text"] in own]
    assert others == sum(row["speaker"] != TARGET_SPEAKER for row in train_rows) > 50

    rounds = ["--normalizer.steps", 6, "--normalizer.rounds", 2, "--normalizer.lr", 2e-3]
    shutil.rmtree(out / "state/units")
    stages(out, "units", flags=rounds)
    assert len(metrics(out, "normalize2")) == 6
    anew, _ = load_labels(found / "targets2.safetensors", 20)  # aligned by what the first round has learned
    assert [len(row) for row in anew] == [len(row) for row in labels]
    assert any((a != b).any() for a, b in zip(anew, labels))

    shutil.rmtree(out / "state/units")
    stages(out, "units", flags=flags)
    (out / "state/units/done.json").unlink()  # as if it had been interrupted
    manifest = out / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace(f'"{next(iter(targets))}"', '"another"'))
    done = train("configs/ci.toml", "--out", out, "--stage", "units", *flags)
    assert done.returncode == 1 and "was begun with other recordings" in done.stderr
    assert "Traceback" not in done.stderr


def test_recognition_hears_a_share_of_the_recordings_again_from_other_rooms(out):
    flags = ["--units.imitation.share", 0.5]
    shutil.rmtree(out / "state/units")
    stages(out, "units", flags=flags)
    rows = units.read_units(out / "manifest.jsonl", out / "units.jsonl", 20)
    again = {row["id"]: row["units"] for row in units.read_table(out / "imitated.jsonl", 20)}
    could = {row["id"]: row for row in rows if row["split"] == "train" and row["kind"] != "answer"}
    assert again.keys() < could.keys() and 0.3 < len(again) / len(could) < 0.7
    assert sum(again[id] != could[id]["units"] for id in again) > 0.8 * len(again)

    tables = documents.read_tables(out, 20)
    sources = documents.sources_of(tables, "train", {"asr": 1.0, "tts": 1.0, "speech": 1.0, "s2t": 1.0})
    more = [pair for pair in sources["asr"] if pair.imitated]
    assert len(more) == len(again) and all(pair.units in again.values() and pair.text for pair in more)
    assert not any(pair.imitated for kind in ("tts", "speech") for pair in sources[kind])
    asked = {exchange.question: exchange.question_units for exchange in sources["s2t"]}
    questions = [row for id, row in could.items() if id in again and row["text"] in asked]
    assert questions and all(again[row["id"]] in asked[row["text"]] for row in questions)
    assert not any(pair.imitated for pair in documents.pairs(tables, "train"))

    before = (out / "imitated.jsonl").read_bytes()
    shutil.rmtree(out / "state/units")
    stages(out, "units", flags=flags)
    assert (out / "imitated.jsonl").read_bytes() == before
    shutil.rmtree(out / "state/units")
    stages(out, "units")
    assert not (out / "imitated.jsonl").exists()


def test_a_run_with_other_clusters_beside_the_first_disturbs_nothing(spoken, tmp_path):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in spoken.rglob("*")}

    before = times()
    flags = ["--corpus.name", spoken / "corpus", "--units.clusters", 10]
    stages(tmp_path / "out", "corpus", "hubert", "units", flags=flags)
    assert times() == before  # the corpus is only read
    here, there = ([run / "manifest.jsonl", run / "units.jsonl"] for run in (tmp_path / "out", spoken))
    assert len(units.read_units(*here, 10)) == len(units.read_units(*there, 20)) > 20
    with pytest.raises(ValueError, match="is not one of 0 to 9"):
        units.read_units(*there, 10)


def test_model_hubert_has_no_layer_above_the_units(out):
    shutil.rmtree(out / "state/units")
    shutil.rmtree(out / "state/hubert")
    stages(out, "hubert", "units", flags=["--hubert.model.n_layers", 2, "--units.layer", 1])
    below = UnitExtractor.from_pretrained(out / "model/hubert")
    assert below.model.config.n_layers == 1 and below.layer == 1
    whole = read_tensors(out / "state/hubert/round2.safetensors")
    assert any(name.startswith("encoder.layers.1.") for name in whole)
    for name, tensor in read_tensors(out / "model/hubert/model.safetensors").items():
        assert not name.startswith("encoder.layers.1.") and torch.equal(tensor, whole[name])


def test_a_speaker_is_chosen_by_number_or_name(tmp_path):
    rows = [{"wav": f"{n}.wav", "text": "Hi.", "speaker": n, "split": "train"} for n in (0, 1)]
    rows.append({"wav": "2.wav", "text": "Hi.", "speaker": 2, "split": "heldout"})
    manifest = tmp_path / "manifest.jsonl"
    write_jsonl(manifest, rows)
    assert len(training_rows(manifest)) == 2
    with pytest.raises(ValueError, match="speaker is 'Bob', who .* choose one of 0, 1, or take the key out"):
        training_rows(manifest, "Bob")
    write_json(tmp_path / "corpus.json", {"speakers": {"Anna": 0, "Bob": 1, "Eve": 2}})
    assert [row["id"] for speaker in ("Bob", 0) for row in training_rows(manifest, speaker)] == ["1", "0"]
    for speaker in ("Eve", 2, 9, "anna"):
        with pytest.raises(ValueError, match="no training recording; choose one of 'Anna', 'Bob', or take"):
            training_rows(manifest, speaker)
    write_jsonl(manifest, rows[2:])
    with pytest.raises(ValueError, match="no recording is to be trained on; give some the split 'train'"):
        training_rows(manifest)


def test_a_share_of_the_sentences_is_the_same_whoever_says_them():
    rows = [{"id": f"{speaker}-{n}", "text": f"Sentence {n}."} for speaker in range(3) for n in range(1000)]
    chosen = Counter(row["text"] for row in some_sentences(rows, 0.3, 0))
    assert 250 < len(chosen) < 350 and set(chosen.values()) == {3}
    assert chosen != Counter(row["text"] for row in some_sentences(rows, 0.3, 1))
    silent = [row | {"text": ""} for row in rows]  # each is a sentence of its own
    assert 800 < len(some_sentences(silent, 0.3, 0)) < 1000
    assert some_sentences(rows, 1.0, 0) == some_sentences(rows, 0.0, 0) == rows


def test_hubert_learns_from_the_speaker_it_is_told_to(out):
    shutil.rmtree(out / "state/hubert")
    done = train("configs/ci.toml", "--out", out, "--stage", "hubert", "--hubert.speaker", 9)
    said = "hubert.speaker is 9, who has no training recording; choose one of "
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    flags = ["--hubert.speaker", 0, "--hubert.perturb", 0.2, "--hubert.sentences", 0.5]
    stages(out, "hubert", flags=flags)
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    theirs = [row for row in rows if row["split"] == "train" and row["speaker"] == 0]
    assert 0 < len(theirs) < sum(row["split"] == "train" for row in rows)
    for number in (1, 2):
        labels, _ = load_labels(out / f"state/hubert/clusters{number}.safetensors", 1000)
        assert 0 < len(labels) == len(some_sentences(theirs, 0.5, 0)) < len(theirs)


def test_labels_come_back_and_damaged_ones_are_one_line(tmp_path):
    path = tmp_path / "clusters1.safetensors"
    rows = [np.array([1, 4, 2], np.int16), np.array([], np.int16), np.array([0], np.int16)]
    save_labels(path, rows, distance=torch.tensor([0.5, 2.0, 1.0]))
    labels, more = load_labels(path, 5)
    assert [row.tolist() for row in labels] == [[1, 4, 2], [], [0]] and more["distance"].tolist() == [
        0.5,
        2,
        1,
    ]
    whole = path.read_bytes()
    bad = {
        "labels that are not of 4 clusters": lambda: None,
        "not the labels": lambda: checkpoint.save_tensors(
            path, {"flat": torch.zeros(3, dtype=torch.int16), "lengths": torch.tensor([2, 2])}
        ),
        "not the labels of": lambda: checkpoint.save_tensors(
            path, {"flat": torch.zeros(3), "lengths": torch.tensor([3])}
        ),
        "KeyError": lambda: checkpoint.save_tensors(path, {"flat": torch.zeros(3)}),
        "checksum": lambda: path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])),
        "truncated|accounts for": lambda: path.write_bytes(whole[:-2]),
    }
    for why, damage in bad.items():
        damage()
        with pytest.raises(ValueError, match=why) as error:
            load_labels(path, 4)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_more_clusters_than_labels_of_16_bits_can_name_are_refused():
    assert load(HubertSection, {"clusters": [32_767]}, "[hubert]").clusters == (32_767,)
    with pytest.raises(ValueError, match="must be 1 to 32767, found 32768"):
        load(HubertSection, {"clusters": [100, 32_768]}, "[hubert]")


# ---- A HuBERT that is given: [units] hubert ----------------------------------------------------------------


def given(folder: Path, **settings) -> UnitsSection:
    return UnitsSection(**({"clusters": 20, "layer": 1, "smooth": 3} | settings), hubert=str(folder))


def test_a_given_hubert_makes_the_units_and_none_is_trained(spoken, tmp_path):
    out = Path(shutil.copytree(spoken, tmp_path / "ci"))
    for path in (out / "state/hubert", out / "state/units", out / "model"):
        shutil.rmtree(path)
    (out / "units.jsonl").unlink()
    flags = ("configs/ci.toml", "--out", out, "--units.hubert", spoken / "model/hubert")
    done = train(*flags, "--stage", "hubert")
    assert done.returncode == 0 and "stage hubert: nothing to do with these settings" in done.stdout
    done = train(*flags, "--stage", "units")
    assert done.returncode == 0, done.stderr
    assert not (out / "state/hubert").exists()
    assert (out / "units.jsonl").read_bytes() == (spoken / "units.jsonl").read_bytes()
    for name in ("model.safetensors", "kmeans.safetensors"):
        theirs, ours = (read_tensors(folder / "model/hubert" / name) for folder in (spoken, out))
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert "hubert" not in train(*flags, "--check").stdout.split("time:")[1].split("\n")[0]


def test_a_given_hubert_may_be_in_fairseqs_layout(tmp_path, monkeypatch):
    model = test_hubert.randomized(replace(test_hubert.TINY, n_layers=12))
    test_hubert.fairseq_file(model, tmp_path / "mhubert_base.pt", monkeypatch)
    kmeans = SklearnKMeans(10, n_init=1, random_state=0).fit(
        np.random.default_rng(0).random((50, model.config.dim))
    )
    joblib.dump(kmeans, tmp_path / "mhubert_base_L11_km10.bin")
    extractor = open_hubert(given(tmp_path, clusters=10, layer=11, smooth=1))
    extractor.save_pretrained(tmp_path / "ours")  # as stage units does
    wav = test_hubert.speech(1.5)
    again = open_hubert(given(tmp_path / "ours", clusters=10, layer=11, smooth=1))
    assert torch.equal(again.frame_units(wav), extractor.frame_units(wav))


@pytest.mark.parametrize("key, wanted, its", [("clusters", 21, 20), ("layer", 2, 1), ("smooth", 1, 3)])
def test_settings_that_are_not_those_of_the_given_hubert_are_refused(spoken, key, wanted, its):
    folder = spoken / "model/hubert"
    with pytest.raises(ValueError, match=f"^units.{key} is {wanted}, that of .*hubert is {its}: make them"):
        open_hubert(given(folder, **{key: wanted}))


def test_a_given_hubert_that_is_not_there_is_told_before_anything_begins(spoken, tmp_path):
    shutil.copytree(spoken / "model/hubert", tmp_path / "half", ignore=shutil.ignore_patterns("kmeans*"))
    for folder in ("nowhere", "half"):
        done = train("configs/ci.toml", "--out", tmp_path / "out", "--units.hubert", tmp_path / folder)
        assert done.returncode == 1 and folder in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "out/state").exists()

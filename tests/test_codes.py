"""Batches of crops and of whole recordings: the codes, waveforms and spectra of one place belong together."""

import json

import numpy as np
import pytest
import torch
from test_train_vocoder import make_corpus, recordings

from vocoder import FrameSpectrum


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path / "corpus")


def test_whole_recordings_of_similar_lengths(corpus):
    dataset = recordings(corpus)["train"]
    chosen = dataset.similar_lengths(np.random.default_rng(0), 3)
    assert len(set(chosen.tolist())) == 3
    codes, mels, lengths, speakers, units, durations, *_ = dataset.recordings(chosen)
    mask = durations > 0
    for b, i in enumerate(chosen):
        row, n = dataset.rows[i], int(lengths[b])
        assert n == sum(row["durations"]) and speakers[b] == row["speaker"]
        assert codes[b, :n].tolist() == np.repeat(row["units"], row["durations"]).tolist()
        wave = np.zeros(n * 320, np.float32)
        wave[: len(dataset.wave(i))] = dataset.wave(i)[: n * 320] / np.float32(32767)
        target = FrameSpectrum.target(torch.from_numpy(wave)[None])[0].half().float()
        assert torch.equal(mels[b, :, : 2 * n], target)
        assert units[b][mask[b]].tolist() == row["units"]
        assert durations[b][mask[b]].tolist() == row["durations"]
    many = recordings(corpus)["train"]
    many.rows = [row | {"durations": [1 + i]} for i in range(100) for row in many.rows[:1]]
    many.by_length = np.arange(100)
    assert all(np.ptp(many.similar_lengths(np.random.default_rng(seed), 2)) < 32 for seed in range(20))


def test_crops_are_the_waveforms_of_their_codes(corpus):
    dataset = recordings(corpus)["train"]
    batch = dataset.crops(np.random.default_rng(0), 20, 4)
    for codes, crop, speaker in zip(batch.codes.tolist(), batch.target.numpy(), batch.speakers.tolist()):
        found = []
        for i, row in enumerate(dataset.rows):
            whole = dataset.codes(i).tolist()
            assert whole == np.repeat(row["units"], row["durations"]).tolist()
            for start in range(len(whole) - 3):
                wave = dataset.wave(i)[start * 320 : (start + 4) * 320] / np.float32(32767)
                same = len(wave) == len(crop) and np.array_equal(wave, crop)
                found.append(whole[start : start + 4] == codes and same and row["speaker"] == speaker)
        assert sum(found) == 1
    assert np.abs(dataset.wave(2)).max() == pytest.approx(0.95 * 32767, abs=1)  # the same level for all


def test_after_the_end_of_a_recording_come_its_last_code_and_silence(corpus):
    dataset = recordings(corpus)["train"]
    longest = int(dataset.n_frames.max())
    batch = dataset.crops(np.random.default_rng(0), 4, longest + 3)
    for codes, wav in zip(batch.codes, batch.target):
        assert len(set(codes[-4:].tolist())) == 1 and not wav[longest * 320 :].any()
        assert wav.shape == ((longest + 3) * 320,)


def test_a_margin_is_context_around_a_crop_whose_waveform_stays_the_same(corpus):
    dataset = recordings(corpus)["train"]
    narrow = dataset.crops(np.random.default_rng(1), 20, 4)
    wide = dataset.crops(np.random.default_rng(1), 20, 4, margin=3)
    assert torch.equal(wide.codes[:, 3:-3], narrow.codes) and torch.equal(wide.target, narrow.target)
    padded = [np.pad(dataset.codes(i), 3, "edge") for i in range(len(dataset.rows))]
    for codes in wide.codes.numpy():
        places = [whole[s : s + 10] for whole in padded for s in range(len(whole) - 9)]
        assert any(np.array_equal(place, codes) for place in places)


def test_a_batch_is_a_function_of_its_random_numbers(corpus):
    dataset = recordings(corpus)["train"]
    a, b, c = (dataset.crops(np.random.default_rng([0, step]), 4, 8) for step in (5, 5, 6))
    assert (
        all(torch.equal(x, y) for x, y in zip(a[:6], b[:6]))
        and a[6:] == b[6:]
        and not torch.equal(a.target, c.target)
    )
    assert a.codes.shape == (4, 8) and a.target.shape == (4, 8 * 320) and a.speakers.shape == (4,)
    assert a.units.shape == a.durations.shape and a.lengths.tolist() == [8] * 4
    assert all(row["split"] == "train" for row in dataset.rows)


def test_a_manifest_may_leave_out_what_has_a_default(corpus):
    whole = recordings(corpus)["train"]
    path = corpus / "manifest.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["id"]  # then it is the name of the file
        if row["speaker"] == 0:
            del row["speaker"]
        if row["split"] == "train":
            del row["split"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bare = recordings(corpus)["train"]
    assert [row["id"] for row in bare.rows] == [row["id"] for row in whole.rows]
    assert [row["speaker"] for row in bare.rows] == [row["speaker"] for row in whole.rows]

"""data/batches.py: order, shares of a batch, packing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import batches
from data.crops import Recording, crops, weighted_crops
from llama import Llama, LlamaConfig, next_token_loss


@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 3))
def test_every_epoch_draws_every_item_once(n, epoch, seed):
    drawn = [batches.order(i, n, seed) for i in range(epoch * n, (epoch + 1) * n)]
    assert sorted(item for item, _ in drawn) == list(range(n))
    assert {number for _, number in drawn} == {epoch}


def test_epochs_and_seeds_differ():
    def epoch(number, seed):
        return [batches.order(i, 40, seed)[0] for i in range(40 * number, 40 * number + 40)]

    assert epoch(0, 0) != epoch(1, 0) and epoch(0, 0) != epoch(0, 1)


@given(st.integers(1, 3000), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_a_permutation_without_a_table_has_every_item_once(n, epoch):
    assert sorted(batches.permute(i, n, f"0 {epoch}") for i in range(n)) == list(range(n))


def test_a_permutation_without_a_table_is_well_mixed():
    n = 10_000
    drawn = np.array([batches.permute(i, n, "0 0") for i in range(n)])
    places = np.arange(n)
    # where an item goes says nothing of where it was, nor of where its neighbor goes; 3 standard deviations
    assert abs(np.corrcoef(places, drawn)[0, 1]) < 3 / n**0.5
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 3 / n**0.5
    steps = np.diff(np.sort(drawn[:100]))  # the first hundred are spread over all
    assert steps.max() < 800 and len(set((drawn[:1000] // 100).tolist())) == 100
    assert (drawn == places).sum() < 8  # of which a random one has one, on average
    # the cells of a 10 x 10 table of (before, after), of 100 each: chi-squared with 81 degrees of freedom
    cells = np.bincount(places // 1000 * 10 + drawn // 1000, minlength=100)
    assert 40 < ((cells - 100) ** 2 / 100).sum() < 140
    others = np.array([batches.permute(i, n, "0 1") for i in range(n)])
    assert (drawn == others).sum() < 8


def test_a_large_epoch_has_no_table():
    n = batches.SMALL + 1
    drawn = [batches.order(index, n, 3) for index in range(n - 500, n + 500)]
    assert [epoch for _, epoch in drawn] == [0] * 500 + [1] * 500
    assert all(len({item for item, epoch in drawn if epoch == wanted}) == 500 for wanted in (0, 1))
    assert not any(key[1] == n for key in batches._epochs)
    assert batches.order(5, 10**12, 0)[0] < 10**12  # of any size


document_lists = st.lists(
    st.integers(2, 30).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(3, 99), min_size=n, max_size=n),
            st.lists(st.booleans(), min_size=n, max_size=n),
        )
    ),
    min_size=1,
    max_size=12,
)


def test_a_document_is_never_cut():
    with pytest.raises(AssertionError, match="a document of 9 tokens, max_len is 8"):
        batches.pack([([3] * 9, [True] * 9)], 8)


@given(document_lists)
def test_packing_keeps_every_document_whole(docs):
    packed = batches.pack(docs, 30)
    found = []
    for r in range(len(packed.ids)):
        for d in range(int(packed.docs[r].max()) + 1):
            here = packed.docs[r] == d
            assert packed.positions[r][here].tolist() == list(range(int(here.sum())))
            found.append((packed.ids[r][here].tolist(), packed.mask[r][here].tolist()))
    assert sorted(found) == sorted((ids, [False] + mask[1:]) for ids, mask in docs)
    assert not packed.mask[packed.docs < 0].any()


@settings(deadline=None, max_examples=10)
@given(document_lists)
def test_packed_loss_equals_padded_loss(docs):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=100, dim=16, n_layers=2, n_heads=2, hidden_dim=32)).double()
    packed = batches.pack(docs, 64)
    total, count = 0.0, 0
    for ids, mask in docs:  # one document at a time, nothing packed
        n = sum(mask[1:])
        total += next_token_loss(model, torch.tensor([ids]), torch.tensor([mask])).item() * n
        count += n
    assert next_token_loss(model, *packed).item() == pytest.approx(total / max(count, 1), rel=1e-5)


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_a_batch_is_split_exactly(batch_size, accumulate, world_size, step):
    pieces = world_size * accumulate
    if batch_size < pieces:
        with pytest.raises(ValueError, match=f"batch_size is {batch_size}: .* at least {pieces}"):
            batches.split_batch(list, batch_size, accumulate, 0, world_size)
        return
    found = [
        batches.split_batch(list, batch_size, accumulate, rank, world_size)(step)
        for rank in range(world_size)
    ]
    in_turn = [found[rank][micro] for micro in range(accumulate) for rank in range(world_size)]
    assert sum(in_turn, []) == list(range(step * batch_size, (step + 1) * batch_size))
    assert max(map(len, in_turn)) - min(map(len, in_turn)) <= 1
    assert [len(piece) for piece in in_turn] == [len(x) for x in np.array_split(range(batch_size), pieces)]


def test_too_small_a_batch_is_told_when_the_batch_function_is_made(tmp_path):
    recording = Recording(tmp_path / "x.wav", np.zeros(9), (0.0, 0.0), 1.0)
    for make in (
        lambda: batches.documents(None, 3, 16, 2, rank=0, world_size=2),
        lambda: crops([tmp_path / "x.wav"], [np.zeros(9)], 4, 0, 3, 2, rank=1, world_size=2),
        lambda: weighted_crops([recording], 4, 0, 3, 4),
    ):
        with pytest.raises(ValueError, match="batch_size is 3: .* at least 4") as error:
            make()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "batch_size", [8, 10, 11]
)  # the last two are divided by neither ranks nor accumulate
def test_ranks_share_the_documents_of_a_step(batch_size):
    def read(index):
        return [batches.order(index, 20, 0)[0] + 3, 1], [False, True]

    def drawn(world_size, rank, step):
        packs = batches.documents(read, batch_size, 16, 2, rank, world_size)(step)
        return sorted(
            i - 3 for p in packs for i in p.ids[p.positions == 0][p.docs[p.positions == 0] >= 0].tolist()
        )

    for step in (0, 3):
        alone = drawn(1, 0, step)
        assert sorted(drawn(2, 0, step) + drawn(2, 1, step)) == alone and len(alone) == batch_size

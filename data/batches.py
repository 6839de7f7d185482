"""Batches as pure functions of the step: an interrupted run goes on with the very data it would have had.

`order` walks endless shuffled epochs without keeping any state, over any number of items in constant memory.
`split_batch` divides the items of a step among micro-batches and ranks. `pack` puts documents one after
another into rows, each token labeled with its document and its position in it, so that attention never
crosses from one document to the next:

    documents   <s> w h o <sosp> ...   <s> a b c ...
    ids         s  w  h  o  S  .  .  s  a  b  c  .
    positions   0  1  2  3  4  5  6  0  1  2  3  4
    docs        0  0  0  0  0  0  0  1  1  1  1  1        (-1 in the padding at a row's end)
    mask        0  0  0  1  1  1  1  0  0  1  1  1        tokens that are targets of the loss (eq. 4)

References: packing, Krell et al. 2021 (https://arxiv.org/abs/2107.02027); permutations of Feistel rounds,
Luby & Rackoff 1988; cycle walking, Black & Rogaway 2002 (https://eprint.iacr.org/2001/012).
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# ---- Which items, in which order ---------------------------------------------------------------------------


SMALL = 1 << 20  # items; a table of so many (8 MB) is faster than `permute`
_epochs: dict[tuple[int, int, int], np.ndarray] = {}


def order(index: int, n: int, seed: int) -> tuple[int, int]:
    """The `index`-th draw of an endless stream of shuffled epochs over n items, as (item, epoch)."""
    epoch, place = divmod(index, n)
    if n > SMALL:
        return permute(place, n, f"{seed} {epoch}"), epoch
    key = (epoch, n, seed)
    if key not in _epochs:
        if len(_epochs) > 8:
            _epochs.clear()
        _epochs[key] = np.random.default_rng([seed, epoch]).permutation(n)
    return int(_epochs[key][place]), epoch


def permute(place: int, n: int, key: str, rounds: int = 4) -> int:
    """Where a pseudo-random permutation of 0..n-1 takes `place`, without a table.

    The bits of a number are cut in two halves; a round adds to one half a hash of the other and swaps them,
    which can be undone whatever the hash: a permutation of all numbers with so many bits. What falls outside
    0..n-1 is permuted again until it falls inside (cycle walking): fewer than four times, on average."""
    half = max(1, -(-(n - 1).bit_length() // 2))  # bits
    while True:
        left, right = place >> half, place & ((1 << half) - 1)
        for number in range(rounds):
            hashed = hashlib.blake2b(b"%d %d" % (number, right), digest_size=8, key=key.encode()).digest()
            left, right = right, left ^ (int.from_bytes(hashed) & ((1 << half) - 1))
        place = left << half | right
        if place < n:
            return place


def split_batch(
    make: Callable[[range], tuple], batch_size: int, accumulate: int, rank: int = 0, world_size: int = 1
) -> Callable[[int], list]:
    """step -> [make(indices) for each of this rank's `accumulate` micro-batches].

    A step has the draws step * batch_size, step * batch_size + 1, ... of `order`, over all ranks, as the
    paper's Table 3 counts. They are cut into world_size * accumulate pieces of consecutive draws, whose sizes
    differ by at most one; micro-batch m of rank r is piece m * world_size + r. For batch_size 10, two ranks,
    accumulate 2:

        piece           0      1      2    3
        draws           0 1 2  3 4 5  6 7  8 9
        rank            0      1      0    1
        micro-batch     0      0      1    1
    """
    pieces = world_size * accumulate
    if batch_size < pieces:
        raise ValueError(
            f"batch_size is {batch_size}: that is less than one item for each of {world_size} process(es) x "
            f"accumulate {accumulate}; make it at least {pieces}, or accumulate smaller"
        )
    least, larger = divmod(batch_size, pieces)  # the first `larger` pieces have one item more than `least`

    def batch(step: int) -> list:
        micro_batches = []
        for micro in range(accumulate):
            piece = micro * world_size + rank
            first = step * batch_size + piece * least + min(piece, larger)
            size = least + (piece < larger)
            micro_batches.append(make(range(first, first + size)))
        return micro_batches

    return batch


# ---- Documents, packed -------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """R rows of L tokens, documents one after another in each."""

    ids: Tensor  # (R, L) long
    mask: Tensor  # (R, L) bool
    positions: Tensor  # (R, L) long
    docs: Tensor  # (R, L) long


Document = tuple[Sequence[int], Sequence[bool]]  # (ids, which of them are targets)


def pack(documents: list[Document], max_len: int) -> Packed:
    """Documents of at most max_len tokens -> rows: the longest first, each into the first row with room."""
    rows: list[list[Document]] = []
    room: list[int] = []
    for ids, mask in sorted(documents, key=lambda document: -len(document[0])):
        assert len(ids) <= max_len, f"a document of {len(ids)} tokens, max_len is {max_len}"
        place = next((i for i, left in enumerate(room) if left >= len(ids)), None)
        if place is None:
            rows.append([])
            room.append(max_len)
            place = -1
        rows[place].append((ids, mask))
        room[place] -= len(ids)

    shape = len(rows), max_len - min(room)
    packed = Packed(
        ids=torch.zeros(shape, dtype=torch.long),
        mask=torch.zeros(shape, dtype=torch.bool),
        positions=torch.zeros(shape, dtype=torch.long),
        docs=torch.full(shape, -1),
    )
    arrays = Packed(*(tensor.numpy() for tensor in packed))  # the same memory; numpy is faster at short lists
    for r, row in enumerate(rows):
        start = 0
        for number, (ids, mask) in enumerate(row):
            here = slice(start, start + len(ids))
            arrays.ids[r, here] = ids
            arrays.mask[r, here] = mask
            arrays.mask[r, start] = False  # the first token of a document has nothing before it
            arrays.positions[r, here] = np.arange(len(ids))
            arrays.docs[r, here] = number
            start += len(ids)
    return packed


def documents(
    read: Callable[[int], Document],
    batch_size: int,
    max_len: int,
    accumulate: int,
    rank: int = 0,
    world_size: int = 1,
) -> Callable[[int], list[Packed]]:
    """step -> list of `accumulate` Packed micro-batches. read(index): the index-th document of the training.

    `batch_size` counts documents per optimizer step over all ranks, as in the paper's Table 3."""

    def make(indices: range) -> Packed:
        return pack([read(index) for index in indices], max_len)

    return split_batch(make, batch_size, accumulate, rank, world_size)

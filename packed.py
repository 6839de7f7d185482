"""Attention for packed rows: several documents in a row, each of which attends to itself alone.

    docs (B, T)          number of the document that each token belongs to; below 0: padding

    packed_attention     written plainly, with a matrix of all pairs of a row's tokens
    PackedAttention      the same, on a CPU and wherever there is nothing else: documents in groups
    VarlenAttention      the same by one kernel of torch's a layer, on a CUDA GPU in half precision
    within_documents     chooses one of them, once for all layers

References: Dao et al. 2022, arXiv:2205.14135 (FlashAttention, whose kernel takes documents of any lengths);
Krell et al. 2021, arXiv:2107.02027 (packing).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, partial
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE = 512  # tokens in a row, up to which a GPU gets the matrix


def packed_attention(q: Tensor, k: Tensor, v: Tensor, docs: Tensor) -> Tensor:
    """Attention for rows into which several documents were packed, written plainly: causal, and inside the
    document. q (B, n_heads, T, head_dim), k and v (B, n_kv_heads, T, head_dim), docs (B, T) -> as q."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=document_mask(docs), enable_gqa=True)


def document_mask(docs: Tensor) -> Tensor:
    """docs (B, T) -> which tokens (of the last dimension) each token attends to, (B, 1, T, T)."""
    T = docs.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=docs.device).tril()
    same_document = docs[:, :, None] == docs[:, None, :]  # (B, T, T)
    return (causal & same_document)[:, None]


class PackedRows(ABC):
    """Attention that stays inside a document, without the matrix."""

    @abstractmethod
    def to(self, device: torch.device) -> "PackedRows": ...

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, n_heads, T, head_dim), k and v (B, n_kv_heads, T, head_dim) -> as q."""


Mask = Tensor | PackedRows | None  # what a layer is given; None: causal


def within_documents(docs: Tensor, x: Tensor) -> Mask:
    """docs (B, T), x (B, T, C) of the dtype of the layers -> what keeps attention inside a document.

    A GPU is faster with the matrix than with a dozen small products a layer, until rows are long (LOG.md,
    2026-11-26)."""
    device = docs.device
    if device.type == "cpu":
        return PackedAttention(docs)
    if docs.shape[1] <= DENSE:
        return document_mask(docs)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    docs = docs.cpu()  # there it would wait for the GPU at each document
    if (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and (kernel := varlen_kernel(device))
    ):
        return VarlenAttention(docs, kernel, dtype).to(device)
    return PackedAttention(docs).to(device)


class PackedAttention(PackedRows):
    """The same, fast on a CPU. Most scores of the matrix are of two documents, masked (LOG.md). Here
    documents of similar length are gathered from the rows into groups, causal attention is computed in each
    group, and every token goes back to its place:

        docs (2, 8)             groups (documents, longest)                 output (2, 8)

        a a a a b b - -         a a a a                                     a a a a b b - -
        c c c c d d d e   -->   c c c c    b b    e    --> attention -->    c c c c d d d e
                                d d d *

    - is padding, a number below 0: its output means nothing. * is whatever follows d in its row: being later,
    no token of d attends to it, and it is not put back."""

    def __init__(self, docs: Tensor):
        B, T = docs.shape
        rows = torch.arange(B, device=docs.device)[:, None]
        # docs * B + rows: neighbors have the same number if they are of one document and in one row.
        numbers, lengths = torch.unique_consecutive(docs * B + rows, return_counts=True)
        starts = lengths.cumsum(0) - lengths  # in (B T)
        lengths, order = lengths[numbers >= 0].sort(descending=True)
        starts = starts[numbers >= 0][order]
        sizes = lengths.tolist()

        self.groups: list[Tensor] = []  # (documents, longest): the place in (B T) of each token
        self.back = torch.zeros_like(docs).flatten()  # (B T,): where in the concatenated groups each token is
        gathered = 0
        begin = 0
        while begin < len(sizes):
            end = begin
            while end < len(sizes) and sizes[end] >= 0.7 * sizes[begin]:
                end += 1
            offsets = torch.arange(sizes[begin], device=docs.device)
            places = starts[begin:end, None] + offsets  # (documents, longest)
            inside = offsets < lengths[begin:end, None]  # False: past the end of a shorter document
            self.back[places[inside]] = gathered + inside.flatten().nonzero()[:, 0]
            self.groups.append(places.clamp(max=B * T - 1))
            gathered += inside.numel()
            begin = end

    def to(self, device: torch.device) -> "PackedAttention":
        moved = object.__new__(PackedAttention)
        moved.groups = [places.to(device) for places in self.groups]
        moved.back = self.back.to(device)
        return moved

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B = q.shape[0]
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # (B T, heads, head_dim)
        outputs = []
        for places in self.groups:
            group = [x.index_select(0, places.flatten()).unflatten(0, places.shape) for x in flat]
            y = causal_attention(*(x.transpose(1, 2) for x in group))
            outputs.append(y.transpose(1, 2).flatten(0, 1))  # (documents * longest, heads, head_dim)
        y = torch.cat(outputs).index_select(0, self.back)  # (B T, heads, head_dim)
        return y.unflatten(0, (B, -1)).transpose(1, 2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, each token over itself and those before it; q, k and v as above.
    On a CPU it is written out: the gradient of torch's function takes six times as long in bfloat16 at 70
    tokens, three times at 190 (torch 2.13)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    heads, T = q.shape[1], q.shape[2]
    q = q.flatten(0, 1)  # (B n_heads, T, head_dim)
    k = k.repeat_interleave(heads // k.shape[1], 1).flatten(0, 1)
    v = v.repeat_interleave(heads // v.shape[1], 1).flatten(0, 1)
    future = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(future, q, k.mT, alpha=q.shape[2] ** -0.5)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, heads))


class VarlenAttention(PackedRows):
    """The same by one kernel: the rows end to end, document n from starts[n] up to starts[n + 1]."""

    def __init__(self, docs: Tensor, kernel: Callable, dtype: torch.dtype):
        B, T = docs.shape
        numbers = (docs * B + torch.arange(B)[:, None]).flatten()  # as in PackedAttention
        changes = (numbers[1:] != numbers[:-1]).nonzero()[:, 0] + 1
        self.starts = F.pad(changes, (1, 0)).int()  # (documents + 1,), the first is 0
        self.starts = F.pad(self.starts, (0, 1), value=B * T)
        self.kernel = kernel
        self.dtype = dtype

    def to(self, device: torch.device) -> "VarlenAttention":
        moved = object.__new__(VarlenAttention)
        moved.starts = self.starts.to(device)
        moved.kernel = self.kernel
        moved.dtype = self.dtype
        return moved

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, heads, T, _ = q.shape
        # Not every version of the kernel knows grouped queries.
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        # (B T, heads, head_dim) each
        q, k, v = (x.transpose(1, 2).flatten(0, 1).to(self.dtype) for x in (q, k, v))
        return self.kernel(q, k, v, self.starts, self.starts, T, T).unflatten(0, (B, T)).transpose(1, 2)


@cache
def varlen_kernel(device: torch.device) -> Callable | None:
    """torch's causal attention of documents of any lengths; None where it is missing (before torch 2.10, on a
    CPU, on some GPUs), or where its output or gradients are not those of `packed_attention`."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        has_window = "window_size" in signature(varlen_attn).parameters  # from torch 2.11 on
        kernel = partial(varlen_attn, **({"window_size": (-1, 0)} if has_window else {"is_causal": True}))

        docs = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [2, 3, 3, 3, 3, 3, -1, -1]])
        inside = (docs >= 0)[:, None, :, None].to(device)
        # No random numbers are drawn: those of training stay as they are.
        wave = torch.arange(3 * 2 * 2 * 8 * 64, device=device).mul(0.7).sin().view(3, 2, 2, 8, 64)
        found = []
        for attend in (
            VarlenAttention(docs, kernel, torch.bfloat16).to(device).attend,
            lambda q, k, v: packed_attention(q, k, v, docs.to(device)),
        ):
            inputs = [x.bfloat16().requires_grad_() for x in wave]
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                y = attend(*inputs) * inside
                found.append([y, *torch.autograd.grad((y * inputs[0].detach()).sum(), inputs)])
        same = all(torch.allclose(a.float(), b.float(), atol=0.05) for a, b in zip(*found))
        return kernel if same else None
    except (ImportError, RuntimeError, TypeError, ValueError):  # NotImplementedError is a RuntimeError
        return None

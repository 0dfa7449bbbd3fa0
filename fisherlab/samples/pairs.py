r"""Sums over shared samples through pairs of positions, and what they count.

A quadratic form of per-example matrices is a sum over pairs of positions,
:math:`D M D^T = \sum_{ts} g_t (a_t^T M a_s) g_s^T`, in which no matrix is formed: cheaper
for few positions, dearer for many. The dense sum is

.. math:: S = \sum_{n,t,s} \Big(\sum_v g_{vnt} g_{vns}^T\Big) \otimes a_{nt} a_{ns}^T

The columns never enter the large product, whose cost is N·T²·p². It beats the sum of
per-example gradients, V·N·p²/2, for few positions and many columns.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.memory import chunks

CHUNK_BYTES = 64 * 2**20  # pair factors formed at once


def pair_flops(examples: int, columns: int, positions: int, o: int, i: int) -> int:
    """Count the multiply-adds of the pair form."""
    pairs = examples * positions**2
    return pairs * (columns * o * o + i * i + (o * i) ** 2)


def form_flops(
    examples: int, columns: int, positions: int, o: int, i: int
) -> tuple[int, int]:
    """Count a quadratic form of all matrices: by pairs of positions, and by matrices."""
    t = positions
    by_pairs = examples * t * (columns * o * (o + t) + i * (i + t))
    return by_pairs, examples * columns * o * i * (t + o + i)


def table_flops(
    samples: int, examples: int, columns: int, positions: int, o: int, i: int
) -> tuple[int, int]:
    """Count all inner products: by pairs of positions, and by matrices."""
    by_pairs = (examples * positions) ** 2 * (i + columns**2 * (o + 1))
    return by_pairs, samples * o * i * (positions + samples)


def input_tables(
    inputs: Float[Tensor, "n t i"], middle: Float[Tensor, "i i"]
) -> Float[Tensor, "n t t"]:
    """Return a_ntᵀ M a_ns."""
    return (inputs @ middle) @ inputs.mT


def output_tables(
    gradients: Float[Tensor, "v n t o"], middle: Float[Tensor, "o o"]
) -> Float[Tensor, "n t t"]:
    """Return Σ_v g_vntᵀ M g_vns."""
    beside = gradients.permute(1, 2, 0, 3).contiguous()
    turned = (beside.flatten(0, 2) @ middle).view_as(beside)
    return turned.flatten(2) @ beside.flatten(2).mT


def position_table(
    first: tuple[Float[Tensor, "n t i"], Float[Tensor, "v n t o"]],
    second: tuple[Float[Tensor, "k s i"], Float[Tensor, "w k s o"]],
) -> Float[Tensor, "m l"]:
    """Return ⟨D_a, E_b⟩ = Σ_ts (g_at·h_bs)(a_at·b_bs), both v-major."""
    (a, g), (b, h) = first, second
    (v, n, t, _), (w, k, s, _) = g.shape, h.shape
    out = g.new_empty(v, n, w, k)
    right = (b.flatten(0, 1).mT, h.flatten(0, 2).mT)
    each = w * t * k * s * g.element_size()
    for part in chunks(n, CHUNK_BYTES // max(each, 1)):
        inputs = (a[part].flatten(0, 1) @ right[0]).view(-1, t, k, s)
        width = CHUNK_BYTES // max(each * len(inputs), 1)
        for columns in chunks(v, width):  # of 1,000 classes one example fills gigabytes
            outputs = g[columns, part].flatten(0, 2) @ right[1]
            outputs = outputs.view(-1, len(inputs), t, w, k, s).mul_(inputs[:, :, None])
            out[columns, part] = outputs.sum((2, 5))
    return out.view(v * n, w * k)


def add_pairs_(
    out: Float[Tensor, "p p"],
    inputs: Float[Tensor, "n t i"],
    gradients: Float[Tensor, "v n t o"],
    scale: float,
) -> Float[Tensor, "p p"]:
    """Write scale · Σ vec(D) vec(D)ᵀ into `out`, panel of rows by panel of rows."""
    (n, t, i), o = inputs.shape, gradients.shape[3]
    folded = out.zero_().view(o, i, o, i)
    each = t * t * (o * o + i * i) * inputs.element_size()
    for part in chunks(n, CHUNK_BYTES // max(each, 1)):
        g, a = gradients[:, part], inputs[part]
        left = torch.einsum("vnto,vnsp->ntsop", g, g).reshape(-1, o, o)
        right = torch.einsum("nti,nsj->ntsij", a, a).reshape(-1, i * i)
        for row in range(o):
            panel = (left[:, row].T @ right).view(o, i, i)
            folded[row].add_(panel.transpose(0, 1), alpha=scale)
    return out


def table_matrix(
    rows: Float[Tensor, "v n t d"], tables: Float[Tensor, " k"]
) -> Float[Tensor, "d d"]:
    """Return Σ_vn X_vnᵀ Y_n X_vn for T × T tables Y_n of the examples."""
    _, n, t, _ = rows.shape
    return rows.flatten(0, 2).T @ (tables.view(n, t, t) @ rows).flatten(0, 2)

r"""The dense sum of shared samples through pairs of positions.

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

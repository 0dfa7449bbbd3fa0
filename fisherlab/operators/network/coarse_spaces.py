"""A few directions per layer, along which layers are coupled."""

from typing import Final, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import Label, eigh, factorised
from fisherlab.operators.base import Operator
from fisherlab.operators.kronecker import KroneckerSum
from fisherlab.operators.network.base import NetworkOperator, Weights
from fisherlab.operators.network.block_diagonal import BlockDiagonal

Coarse = Literal["nicolaides", "residual", "spectral", "krylov"]
FOLLOWING: Final = ("residual", "krylov")
ONE_VECTOR: Final = ("nicolaides", "residual")


def fixed_space(coarse: Coarse, local: BlockDiagonal, vectors: int) -> dict[str, Tensor]:
    """Return orthonormal directions (m, d_out, d_in) that depend on the matrix alone.

    "nicolaides": the constant; "spectral": the eigenvectors of the smallest eigenvalues
    of the layer's own block.
    """
    if coarse == "nicolaides":
        return {
            name: torch.full(
                (1, o, i), (o * i) ** -0.5, dtype=local.dtype, device=local.device
            )
            for name, (o, i) in local.weight_shapes.items()
        }
    return {name: _smallest(op, vectors) for name, op in local.blocks.items()}


def right_side_space(
    coarse: Coarse, fine: NetworkOperator, rest: Weights, vectors: int
) -> dict[str, Tensor]:
    """Return orthonormal directions that follow the residual r of the fine level.

    "residual": K⁻¹ r; "krylov": K⁻¹ r, K⁻² r, …, with K⁻¹ the fine level.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in rest}
    now = {name: w[None] for name, w in rest.items()}
    for _ in range(vectors if coarse == "krylov" else 1):
        now = fine._apply_blocks(now)
        for name, w in now.items():
            found[name].append(w[0] / w.norm().clamp_min(torch.finfo(w.dtype).tiny))
    return {name: _orthonormal(torch.stack(ws)) for name, ws in found.items()}


def _orthonormal(ws: Float[Tensor, "m o i"]) -> Float[Tensor, "k o i"]:
    """Return an orthonormal basis of the span; nothing for the zero vector."""
    flat, what = ws.flatten(1), "the residuals of a coarse space"
    _, values, right = factorised("svd", flat, what, full_matrices=False)
    kept = values > 1e-8 * values.max().clamp_min(torch.finfo(ws.dtype).tiny)
    kept &= values > 0
    basis: Tensor = right[kept].unflatten(1, ws.shape[1:])
    return basis


def _smallest(op: Operator, vectors: int) -> Float[Tensor, "m o i"]:
    o, i = op.weight_shape
    count = min(vectors, o * i)
    if not isinstance(op, KroneckerSum) or len(op.terms) != 1:
        _, basis = eigh(op.to_dense(), repr(op))
        return basis[:, :count].T.reshape(count, o, i)
    rows, cols = op.terms[0]
    row_values, row_basis = eigh(rows, Label("the row factor of {}", op))
    col_values, col_basis = eigh(cols, Label("the column factor of {}", op))
    at = torch.outer(row_values, col_values).flatten().argsort()[:count]
    left, right = row_basis[:, at // i], col_basis[:, at % i]
    return left.T[:, :, None] * right.T[:, None, :]

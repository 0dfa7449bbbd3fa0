"""An operator on the long vector of all weights that knows the names of its blocks."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.operators.base import Operator, Provenance, inner_product
from fisherlab.operators.dampings import Damping, tikhonov
from fisherlab.operators.dense import Dense
from fisherlab.operators.factored import FactoredFisher
from fisherlab.operators.iterative import IterativeInverse
from fisherlab.operators.network.base import NetworkOperator, Shapes, Weights, block_of
from fisherlab.samples import StackedSamples

DENSE_ROWS = 2000  # matrices up to this size are inverted densely, others iteratively


@final
@dataclass(frozen=True, eq=False, repr=False)
class WholeNetwork(NetworkOperator):
    """Any operator on (p, 1) with the names and shapes of the blocks it covers.

    The full exact Fisher is ``WholeNetwork(FactoredFisher(StackedSamples(...), N),
    shapes)``: products, norms and damped solves go through the samples or the summed
    Gram matrix, and the p × p matrix is formed only if asked for.

    Parameters
    ----------
    whole
        The matrix, an operator on weights of shape (p, 1).
    shapes
        Block name to (d_out, d_in), in the order of the matrix.

    Examples
    --------
    >>> op = WholeNetwork(Dense(2 * torch.eye(10), (10, 1)), {"a": (2, 3), "b": (4, 1)})
    >>> (op @ {"a": torch.ones(2, 3), "b": torch.ones(4, 1)})["b"].flatten().tolist()
    [2.0, 2.0, 2.0, 2.0]
    """

    whole: Operator
    shapes: Shapes
    provenance: Provenance = Provenance()

    @property
    def weight_shapes(self) -> Shapes:
        """Block name to (d_out, d_in)."""
        return self.shapes

    @property
    def dtype(self) -> torch.dtype:
        """The precision."""
        return self.whole.dtype

    @property
    def device(self) -> torch.device:
        """The device."""
        return self.whole.device

    @property
    def stored_numbers(self) -> int:
        """Those of the matrix."""
        return self.whole.stored_numbers

    @property
    def product_flops(self) -> int:
        """Those of the matrix."""
        return self.whole.product_flops

    def _apply(self, w: Float[Tensor, "k p 1"]) -> Float[Tensor, "k p 1"]:
        return self.whole._apply(w)

    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        return self.split(self.whole._apply(self.join(ws)))

    def diagonal_block(self, name: str) -> Operator:
        """Return the block of one weight: exact in factored form, else dense."""
        if self.pieces is not None:
            return self.pieces[name]
        if isinstance(self.whole, Dense):
            at, made = self.offsets[name], replace(self.provenance, layer=name)
            return Dense(self.whole.matrix[at, at], self.shapes[name], made)
        return block_of(self, name)

    @cached_property
    def pieces(self) -> dict[str, FactoredFisher] | None:
        """The exact blocks of the diagonal where the matrix is held as samples."""
        whole = self.whole
        if not isinstance(whole, FactoredFisher):
            return None
        if not isinstance(whole.samples, StackedSamples):
            return None
        return {
            name: FactoredFisher(
                piece, whole.count, replace(self.provenance, layer=name), whole.form
            )
            for name, piece in zip(self.shapes, whole.samples.pieces, strict=True)
        }

    def _solve_blocks(self, ws: Weights, damping: Damping) -> dict[str, Tensor]:
        shift = tikhonov(damping, self)
        return self.split(self.whole.solve(self.join(ws), shift))

    def congruence(self, space: Weights) -> Float[Tensor, "m m"]:
        """Return R M Rᵀ for directions inside one block each, from the samples' sums."""
        pieces = self.pieces
        if pieces is None:
            return super().congruence(space)
        found = [pieces[name].samples.project(vectors) for name, vectors in space.items()]
        rows = torch.cat([one.flatten(1) for one in found])
        return rows @ rows.T / next(iter(pieces.values())).count

    def _dense(self) -> Float[Tensor, "p p"]:
        return self.whole._dense()

    def diagonal(self) -> Float[Tensor, "p 1"]:
        """Return the diagonal; `split` cuts it into blocks."""
        return self.whole.diagonal()

    def trace(self) -> float:
        """Return the trace."""
        return self.whole.trace()

    def frobenius_norm(self) -> float:
        """Return √ΣM²."""
        return self.whole.frobenius_norm()

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return all eigenvalues, descending."""
        return self.whole.eigenvalues()

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return log det(M + damping·I).

        Raises
        ------
        IndefiniteError
            If the damped matrix is not positive definite.
        """
        return self.whole.logdet(tikhonov(damping, self))

    def inverse(self, damping: Damping) -> "WholeNetwork":
        """Return (M + damping·I)⁻¹, by the matrix's own means.

        Raises
        ------
        IndefiniteError
            If the damped matrix is not positive definite.
        """
        inverse = self.whole.inverse(tikhonov(damping, self))
        return replace(self, whole=inverse, provenance=inverse.provenance)

    def to(self, dtype: torch.dtype) -> "WholeNetwork":
        """Return the matrix in another precision."""
        return replace(self, whole=self.whole.to(dtype))


def tikhonov_inverse(
    forward: NetworkOperator, shift: float, preconditioner: Operator | None
) -> WholeNetwork:
    """Invert forward + shift·I: densely if small, else by conjugate gradients.

    Raises
    ------
    IndefiniteError
        If the damped matrix is small and not positive definite.
    """
    made = forward.provenance.by(f"inverse of {forward.provenance.method}")
    if forward.shape[0] <= DENSE_ROWS:
        whole: Operator = forward._whole().inverse(shift)
    else:
        whole = IterativeInverse(forward, shift, preconditioner, provenance=made)
    return WholeNetwork(whole, forward.weight_shapes, made)


@inner_product(WholeNetwork, Operator)
def _whole_any(a: WholeNetwork, b: Operator) -> float:
    other = b.whole if isinstance(b, WholeNetwork) else b
    return a.whole.inner(other)

"""An operator on the long vector of all weights that knows the names of its blocks."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.operators.base import Operator, Provenance
from fisherlab.operators.dampings import Damping, tikhonov
from fisherlab.operators.dense import Dense
from fisherlab.operators.factored import FactoredFisher
from fisherlab.operators.iterative import IterativeInverse
from fisherlab.operators.network.base import NetworkOperator, Shapes, Weights
from fisherlab.samples.parted import unstacked

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

    @cached_property
    def weight_shapes(self) -> Shapes:
        """Block name to (d_out, d_in)."""
        return self.shapes

    @property
    def formed(self) -> Operator:
        """The matrix without the names."""
        return self.whole

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
        return super().diagonal_block(name)

    @cached_property
    def pieces(self) -> dict[str, FactoredFisher] | None:
        """The exact blocks of the diagonal where the matrix is held as samples."""
        whole = self.whole
        samples = unstacked(whole.samples) if isinstance(whole, FactoredFisher) else ()
        if not samples or not isinstance(whole, FactoredFisher):
            return None
        return {
            name: FactoredFisher(
                piece, whole.count, replace(self.provenance, layer=name), whole.form
            )
            for name, piece in zip(self.shapes, samples, strict=True)
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

    def inverse(self, damping: Damping) -> "WholeNetwork":
        """Return (M + damping·I)⁻¹, by the matrix's own means.

        Raises
        ------
        IndefiniteError
            If the damped matrix is not positive definite.
        """
        inverse = self.whole.inverse(tikhonov(damping, self))
        return replace(self, whole=inverse, provenance=inverse.provenance)


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
        whole: Operator = forward.formed.inverse(shift)
    else:
        whole = IterativeInverse(forward, shift, preconditioner, provenance=made)
    return WholeNetwork(whole, forward.weight_shapes, made)

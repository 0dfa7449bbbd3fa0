"""Block-diagonal over groups of rows: an operator for each group, one on top of another."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.devices import spans
from fisherlab.operators.base import Damping, Operator, Provenance, inner_product, parsed
from fisherlab.operators.bases import Beside
from fisherlab.operators.dense import Dense
from fisherlab.operators.eigenform import Eigenform, of_matrix
from fisherlab.operators.factored import FACTORED, FactoredFisher
from fisherlab.samples import GroupedSamples


class Apart(Operator):
    """Operators side by side on the diagonal, zero between them."""

    parts: Sequence[Operator]

    @property
    def product_flops(self) -> int:
        """Those of the parts."""
        return sum(part.product_flops for part in self.parts)

    def trace(self) -> float:
        """Return the sum of the traces."""
        return sum(part.trace() for part in self.parts)

    def frobenius_norm(self) -> float:
        """Return the root of the sum of squared norms."""
        return math.hypot(*(part.frobenius_norm() for part in self.parts))

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return the eigenvalues of all parts, descending."""
        values = torch.cat([part.eigenvalues() for part in self.parts])
        return values.sort(descending=True).values

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return the sum of the log determinants, each with the damping of its part.

        Raises
        ------
        NumericalError
            If a damped part is not positive definite.
        ValueError
            For a damping that a part does not know.
        """
        return sum(part.logdet(self._own(part, damping)) for part in self.parts)

    def _own(self, part: Any, damping: Damping) -> Damping:
        """Return the damping that one part takes."""
        return damping


def has_factors(operator: Operator) -> bool:
    """Tell whether an operator has Kronecker factors to damp."""
    if isinstance(operator, Stacked):
        return all(map(has_factors, operator.parts))
    return hasattr(operator, "damped")


@final
@dataclass(frozen=True, eq=False, repr=False)
class Stacked(Apart):
    """blockdiag(M₁, M₂, …), M_g acting on the g-th group of rows of the weight.

    What the methods make of a grouped convolution: between groups everything is zero.

    Parameters
    ----------
    parts
        An operator for each group, in the order of the rows.

    Examples
    --------
    >>> part = Dense(torch.eye(3), (1, 3))
    >>> op = Stacked((part, part))
    >>> op.weight_shape, op.trace()
    ((2, 3), 6.0)
    """

    parts: tuple[Operator, ...]
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in), d_out over all groups."""
        rows = sum(part.weight_shape[0] for part in self.parts)
        return rows, self.parts[0].weight_shape[1]

    @property
    def converged(self) -> bool:
        """Whether every part that was found by an iteration converged."""
        return all(getattr(part, "converged", True) for part in self.parts)

    @property
    def iterations(self) -> int:
        """The most iterations that a part took."""
        return max(getattr(part, "iterations", 0) for part in self.parts)

    @property
    def residual(self) -> float:
        """The largest residual of a part."""
        return max(getattr(part, "residual", 0.0) for part in self.parts)

    def spans(self) -> Iterator[tuple[Operator, slice]]:
        """Yield every part with its rows of the weight."""
        places = spans([part.weight_shape[0] for part in self.parts])
        yield from zip(self.parts, places, strict=True)

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        return torch.cat([part._apply(w[:, rows]) for part, rows in self.spans()], 1)

    def _dense(self) -> Float[Tensor, "p p"]:
        return torch.block_diag(*(part._dense() for part in self.parts))

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return the diagonals of the parts on top of one another."""
        return torch.cat([part.diagonal() for part in self.parts])

    def _solve(self, w: Float[Tensor, "k o i"], damping: Damping) -> Float[Tensor, "k o i"]:
        """Solve group by group; any damping that the parts know."""
        own = parsed(damping, self)
        return torch.cat([part._solve(w[:, rows], own) for part, rows in self.spans()], 1)

    def _own(self, part: Operator, damping: Damping) -> Damping:
        return parsed(damping, self)

    def eigenform(self) -> Eigenform | None:
        """Decompose group by group; every eigenvector is zero outside of its group.

        Groups without a structured basis are decomposed densely up to 4,000 rows.
        """
        parts = []
        for part in self.parts:
            found = part.eigenform()
            if found is None or (found.free and found.rest):
                if part.shape[0] > FACTORED:
                    return None
                found = of_matrix(part.to_dense(), part.weight_shape, repr(part))
            parts.append(found)
        basis = Beside(
            tuple(one.basis for one in parts),
            tuple(one.weight_shape[0] for one in parts),
            tuple(len(one.values) for one in parts),
            0,
        )
        tables = tuple(table for one in parts for table in one.tables)
        return Eigenform(basis, tables, self.weight_shape, 0.0, self.provenance)

    def inverse(self, damping: Damping) -> "Stacked":
        """Return (M + damping)⁻¹, group by group.

        A factored damping takes π from each group's own factors.

        Raises
        ------
        NumericalError
            If a damped part is not positive definite.
        ValueError
            For a damping that the parts do not know.
        """
        made = self.provenance.inverted
        own = parsed(damping, self)
        return Stacked(tuple(part.inverse(own) for part in self.parts), made)


def _aligned(a: Stacked, b: Stacked) -> bool:
    return [p.weight_shape for p in a.parts] == [p.weight_shape for p in b.parts]


@inner_product(Stacked, Stacked)
def _stacked_stacked(a: Stacked, b: Stacked) -> float:
    if not _aligned(a, b):
        return _stacked_dense(a, Dense(b.to_dense(), b.weight_shape, b.provenance))
    return sum(one.inner(other) for one, other in zip(a.parts, b.parts, strict=True))


@inner_product(FactoredFisher, Stacked)
def _factored_stacked(a: FactoredFisher, b: Stacked) -> float:
    samples = a.samples
    if isinstance(samples, GroupedSamples) and len(samples.groups) == len(b.parts):
        groups = [FactoredFisher(group, a.count) for group in samples.groups]
        return sum(f.inner(part) for f, part in zip(groups, b.parts, strict=True))
    total = 0.0
    for stack in samples.stacks():
        total += float((stack * (b @ stack)).sum(dtype=torch.float64))
    return total / a.count


@inner_product(Dense, Stacked)
def _dense_stacked(a: Dense, b: Stacked) -> float:
    return _stacked_dense(b, a)


def _stacked_dense(a: Stacked, b: Dense) -> float:
    """Return the inner product with the diagonal blocks of a dense matrix."""
    width, total = a.weight_shape[1], 0.0
    for part, rows in a.spans():
        at = slice(rows.start * width, rows.stop * width)
        block = Dense(b.matrix[at, at].contiguous(), part.weight_shape)
        total += block.inner(part)
    return total

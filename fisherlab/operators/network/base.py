"""The interface of matrices over several weights at once, and those of blocks alone.

The weights of a network, one after the other and each by rows, are one long vector of
length p. A network operator is an `Operator` on weights of shape (p, 1), so that every
function of an operator (metrics, Lanczos, scipy) takes it as it is. Besides, its
products and solves take and return mappings ``{block: w}`` with w (..., d_out, d_in).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final, overload

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.devices import readable, spans
from fisherlab.operators.base import (
    Damping,
    Factored,
    Operator,
    Provenance,
    check_kind,
    column_inner,
    inner_product,
    tikhonov,
)
from fisherlab.operators.dense import Dense
from fisherlab.operators.factored import FactoredFisher
from fisherlab.operators.iterative import IterativeInverse
from fisherlab.operators.stacked import Apart, has_factors
from fisherlab.samples.parted import unstacked
from fisherlab.showing import html_table

Shapes = Mapping[str, tuple[int, int]]
Weights = Mapping[str, Tensor]


class NetworkOperator(Operator):
    """A symmetric p × p matrix over the weights of several blocks, in their order.

    Examples
    --------
    >>> from fisherlab.operators import BlockDiagonal, Diagonal
    >>> op = BlockDiagonal({n: Diagonal(torch.full((1, 2), 3.0)) for n in "ab"})
    >>> isinstance(op, NetworkOperator), op.weight_shape
    (True, (4, 1))
    >>> (op @ {"a": torch.ones(1, 2), "b": torch.zeros(1, 2)})["a"].tolist()
    [[3.0, 3.0]]
    """

    @property
    @abstractmethod
    def weight_shapes(self) -> Shapes:
        """Block name to (d_out, d_in), in the order of the matrix."""

    @abstractmethod
    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        """Return the products with k weights of every block, each (k, d_out, d_in)."""

    def diagonal_block(self, name: str) -> Operator:
        """Return the block on the diagonal that belongs to one weight, here dense."""
        shape = self.weight_shapes[name]
        return Dense(self.block(name, name), shape, self.provenance)

    @abstractmethod
    def inverse(self, damping: Damping) -> NetworkOperator:
        """Return the damped inverse as an operator; a number means Tikhonov."""

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(p, 1)."""
        return sum(sizes(self.weight_shapes)), 1

    @property
    def offsets(self) -> dict[str, slice]:
        """Block name to the rows (and columns) it takes."""
        at = spans(sizes(self.weight_shapes))
        return dict(zip(self.weight_shapes, at, strict=True))

    def split(self, w: Tensor) -> dict[str, Tensor]:
        """Cut w (..., p, 1) into the weights of the blocks, (..., d_out, d_in) each."""
        parts = w.squeeze(-1).split(sizes(self.weight_shapes), -1)
        return {
            name: part.unflatten(-1, shape)
            for (name, shape), part in zip(self.weight_shapes.items(), parts, strict=True)
        }

    def join(self, ws: Weights) -> Tensor:
        """Put the weights of all blocks below each other, (..., p, 1).

        Raises
        ------
        ValueError
            If blocks are missing or unknown, or a weight has another shape.
        """
        self._check_blocks(ws, "join")
        flat = [ws[name].flatten(-2) for name in self.weight_shapes]
        return torch.cat(flat, -1).unsqueeze(-1)

    def _apply(self, w: Float[Tensor, "k p 1"]) -> Float[Tensor, "k p 1"]:
        return self.join(self._apply_blocks(self.split(w)))

    # mypy wants no wider arguments for operators, because of their reflected forms; a
    # mapping has none.
    @overload  # type: ignore[override]
    def __matmul__(self, w: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, w: Weights) -> dict[str, Tensor]: ...
    def __matmul__(self, w: Tensor | Weights) -> Tensor | dict[str, Tensor]:
        """Return M w for a mapping of weights, or for w of shape (..., p, 1).

        Raises
        ------
        ValueError
            If blocks are missing or unknown, or a weight has another shape.
        """
        if isinstance(w, Tensor):
            return super().__matmul__(w)
        self._check_blocks(w, "@")
        found = self._apply_blocks(self._stacked(w))
        return self._like(w, found)

    def _like(self, ws: Weights, found: Weights) -> dict[str, Tensor]:
        shown = {name: found[name].reshape(ws[name].shape) for name in self.weight_shapes}
        return {name: weight.to(ws[name].dtype) for name, weight in shown.items()}

    def _stacked(self, ws: Weights) -> dict[str, Tensor]:
        shapes = self.weight_shapes.items()
        return {name: ws[name].to(self.dtype).reshape(-1, *shape) for name, shape in shapes}

    @overload
    def solve(self, w: Tensor, damping: Damping) -> Tensor: ...
    @overload
    def solve(self, w: Weights, damping: Damping) -> dict[str, Tensor]: ...
    def solve(self, w: Tensor | Weights, damping: Damping) -> Tensor | dict[str, Tensor]:
        """Return the damped inverse times w, in the form of w.

        Raises
        ------
        ValueError
            If blocks are missing or unknown, or a weight has another shape.
        IndefiniteError
            If the damped matrix is not positive definite.
        """
        if isinstance(w, Tensor):
            return super().solve(w, damping)
        self._check_blocks(w, "solve")
        found = self._solve_blocks(self._stacked(w), damping)
        return self._like(w, found)

    def _solve(self, w: Float[Tensor, "k p 1"], damping: Damping) -> Float[Tensor, "k p 1"]:
        return self.join(self._solve_blocks(self.split(w), damping))

    def _solve_blocks(self, ws: Weights, damping: Damping) -> dict[str, Tensor]:
        """Return the damped inverse times k weights of every block."""
        return self.inverse(damping)._apply_blocks(ws)

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return log det of the damped matrix.

        Raises
        ------
        IndefiniteError
            If the damped matrix is not positive definite.
        """
        if isinstance(damping, Factored):
            return -self.inverse(damping).logdet()
        return self.formed.logdet(tikhonov(damping, self))

    def quadratic_form(self, w: Tensor | Weights) -> Tensor:
        """Return ⟨w, M w⟩, summed over the blocks."""
        flat = w if isinstance(w, Tensor) else self.join(w)
        return super().quadratic_form(flat)

    def block(self, row: str, column: str) -> Float[Tensor, "p q"]:
        """Return the dense block between two weights, from products with its columns."""
        o, i = self.weight_shapes[column]
        unit = torch.eye(o * i, dtype=self.dtype, device=self.device).view(-1, o, i)
        inside = {
            name: unit if name == column else unit.new_zeros(len(unit), *shape)
            for name, shape in self.weight_shapes.items()
        }
        return self._apply_blocks(inside)[row].flatten(1).T.contiguous()

    def congruence(self, space: Weights) -> Float[Tensor, "m m"]:
        """Return R M Rᵀ for directions that lie inside one block each.

        Parameters
        ----------
        space
            Block name to its directions (m_b, d_out, d_in); m = Σ m_b.
        """
        columns = []
        for name, vectors in space.items():
            inside = {
                other: vectors
                if other == name
                else vectors.new_zeros(len(vectors), *self.weight_shapes[other])
                for other in self.weight_shapes
            }
            image = self._apply_blocks(inside)
            parts = [torch.einsum("moi,koi->mk", space[n], image[n]) for n in space]
            columns.append(torch.cat(parts))
        return torch.cat(columns, 1)

    def __repr__(self) -> str:
        """Return one line: what, of what, how many blocks, how large."""
        p, count = self.shape[0], len(self.weight_shapes)
        size = readable(self.stored_numbers * self.dtype.itemsize)
        kind = str(self.dtype).removeprefix("torch.")
        made = f"{self.provenance}, " if str(self.provenance) else ""
        return f"{type(self).__name__}({made}{count} blocks, {p}×{p}, {kind}, {size})"

    def _repr_html_(self) -> str:
        """Return a folding table for notebooks, a row a block."""
        rows: dict[str, object] = {
            "made by": self.provenance.method,
            "Fisher": self.provenance.fisher,
            "likelihood": self.provenance.likelihood,
            "examples N": self.provenance.examples,
            "matrix": f"{self.shape[0]} × {self.shape[1]}, {self.dtype}, {self.device}",
            "numbers held": f"{self.stored_numbers:,}",
        }
        rows |= {f"block {name}": shape for name, shape in self.weight_shapes.items()}
        return html_table(type(self).__name__, rows)

    def _check_blocks(self, ws: Weights, call: str) -> None:
        known = self.weight_shapes
        if not isinstance(ws, Mapping):
            raise TypeError(
                f"{self!r} {call}: {type(ws).__name__} was given; a tensor (..., p, 1) or "
                f"a mapping with a weight for each of the blocks {list(known)} is expected."
            )
        missing = [name for name in known if name not in ws]
        unknown = [name for name in ws if name not in known]
        if missing or unknown:
            raise ValueError(
                f"{self!r} {call}: weights of the blocks {list(known)} are expected; "
                f"missing {missing}, unknown {unknown}."
            )
        for weight in ws.values():
            check_kind(weight, self, call)
        wrong = {n: tuple(ws[n].shape) for n in known if ws[n].shape[-2:] != known[n]}
        if wrong:
            expected = {name: known[name] for name in wrong}
            raise ValueError(
                f"{self!r} {call}: weights of shape {wrong} were given, (..., d_out, d_in) "
                f"with {expected} is expected. `stats[name].pack({{parameter: tensor}})` "
                "makes them from parameters."
            )


def sizes(shapes: Shapes) -> list[int]:
    """Return d_out·d_in of every block."""
    return [o * i for o, i in shapes.values()]


def same_blocks(a: NetworkOperator, b: NetworkOperator) -> bool:
    """Tell whether two operators have the same blocks in the same order."""
    return list(a.weight_shapes.items()) == list(b.weight_shapes.items())


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

    def inverse(self, damping: Damping) -> WholeNetwork:
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
    made = forward.provenance.inverted
    if forward.shape[0] <= DENSE_ROWS:
        whole: Operator = forward.formed.inverse(shift)
    else:
        whole = IterativeInverse(forward, shift, preconditioner, provenance=made)
    return WholeNetwork(whole, forward.weight_shapes, made)


@final
@dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonal(Apart, NetworkOperator):
    r"""One operator a weight, zero between weights.

    .. math:: F = \mathrm{diag}(F_1, \ldots, F_L)

    A `Factored` damping shifts the factors of blocks with Kronecker terms and adds λI to
    the other blocks.

    Parameters
    ----------
    blocks
        Block name to its operator, in the order of the matrix; at least one.

    Raises
    ------
    ValueError
        For no blocks.

    Examples
    --------
    >>> from fisherlab.operators.eigenform import Diagonal
    >>> ones = Diagonal(torch.ones(2, 3)), Diagonal(torch.ones(1, 4))
    >>> op = BlockDiagonal({"a": ones[0], "b": ones[1]})
    >>> op.shape, op.trace()
    ((10, 10), 10.0)
    """

    blocks: Mapping[str, Operator]
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        """Check that there are blocks."""
        if not self.blocks:
            raise ValueError("BlockDiagonal: at least one block is expected, none given.")

    @property
    def parts(self) -> tuple[Operator, ...]:  # type: ignore[override]
        """The operators of the blocks."""
        return tuple(self.blocks.values())

    @cached_property
    def weight_shapes(self) -> Shapes:
        """Block name to (d_out, d_in)."""
        return {name: op.weight_shape for name, op in self.blocks.items()}

    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        return {name: op._apply(ws[name]) for name, op in self.blocks.items()}

    def diagonal_block(self, name: str) -> Operator:
        """Return the operator of one weight."""
        return self.blocks[name]

    def _dense(self) -> Float[Tensor, "p p"]:
        return torch.block_diag(*(op.to_dense() for op in self.blocks.values()))

    def diagonal(self) -> Float[Tensor, "p 1"]:
        """Return the diagonal; `split` cuts it into blocks."""
        return self.join({name: op.diagonal() for name, op in self.blocks.items()})

    def inverse(self, damping: Damping) -> BlockDiagonal:
        """Return the damped inverse of every block.

        Raises
        ------
        IndefiniteError
            If a damped block is not positive definite; the block is named.
        """
        made = self.provenance.inverted
        inverses = {
            name: op.inverse(self._own(op, damping)) for name, op in self.blocks.items()
        }
        return BlockDiagonal(inverses, made)

    def _own(self, part: Operator, damping: Damping) -> Damping:
        """Return the damping of one block: λ where it has no factors to shift."""
        if not isinstance(damping, Factored):
            return tikhonov(damping, part)
        return damping if has_factors(part) else damping.value

    def _solve_blocks(self, ws: Weights, damping: Damping) -> dict[str, Tensor]:
        return {
            name: op._solve(ws[name], self._own(op, damping))
            for name, op in self.blocks.items()
        }


@inner_product(BlockDiagonal, Operator)
def _block_diagonal_any(a: BlockDiagonal, b: Operator) -> float:
    if not isinstance(b, NetworkOperator) or not same_blocks(a, b):
        return column_inner(a, b)
    return sum(op.inner(b.diagonal_block(name)) for name, op in a.blocks.items())


@final
@dataclass(frozen=True, eq=False, repr=False)
class DirectSum(Apart, NetworkOperator):
    """Operators that share no block, zero between them, in any order of the blocks.

    Parameters
    ----------
    parts
        The operators.
    order
        All block names, in the order of the matrix.

    Examples
    --------
    >>> from fisherlab.operators.eigenform import Diagonal
    >>> from fisherlab.operators.network.base import BlockDiagonal
    >>> one, two = (BlockDiagonal({n: Diagonal(torch.ones(1, 2))}) for n in "ab")
    >>> DirectSum((one, two), ("b", "a")).trace()
    4.0
    """

    parts: Sequence[NetworkOperator]
    order: Sequence[str]
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        """Check that the order names every block once."""
        held = [name for part in self.parts for name in part.weight_shapes]
        if sorted(held) != sorted(self.order):
            msg = f"DirectSum: parts hold {held}, but the order names {list(self.order)}."
            raise ValueError(msg)

    @cached_property
    def weight_shapes(self) -> Shapes:
        """Block name to (d_out, d_in)."""
        known = {n: shape for part in self.parts for n, shape in part.weight_shapes.items()}
        return {name: known[name] for name in self.order}

    def part_of(self, name: str) -> NetworkOperator:
        """Return the part that holds a block."""
        return next(part for part in self.parts if name in part.weight_shapes)

    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for part in self.parts:
            out |= part._apply_blocks({name: ws[name] for name in part.weight_shapes})
        return out

    def diagonal_block(self, name: str) -> Operator:
        """Return the block of one weight."""
        return self.part_of(name).diagonal_block(name)

    def _dense(self) -> Float[Tensor, "p p"]:
        p, at = self.shape[0], self.offsets
        out = torch.zeros(p, p, dtype=self.dtype, device=self.device)
        for part in self.parts:
            own, dense = part.offsets, part.to_dense()
            for row in own:
                for column in own:
                    out[at[row], at[column]] = dense[own[row], own[column]]
        return out

    def diagonal(self) -> Float[Tensor, "p 1"]:
        """Return the diagonal; `split` cuts it into blocks."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            found |= part.split(part.diagonal())
        return self.join(found)

    def inverse(self, damping: Damping) -> DirectSum:
        """Return the damped inverse of every part.

        Raises
        ------
        NumericalError
            If a damped part is not positive definite.
        """
        made = self.provenance.inverted
        return DirectSum([part.inverse(damping) for part in self.parts], self.order, made)

    def _solve_blocks(self, ws: Weights, damping: Damping) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for part in self.parts:
            own = {name: ws[name] for name in part.weight_shapes}
            out |= part._solve_blocks(own, damping)
        return out

    def inner_with(self, other: NetworkOperator) -> float:
        """Return ⟨self, other⟩ for an operator over the same blocks in the same order."""
        total = 0.0
        if isinstance(other, DirectSum) and _same_parts(self, other):
            return sum(a.inner(b) for a, b in zip(self.parts, other.parts, strict=True))
        for part in self.parts:
            total += sum(
                float((part.block(row, column) * other.block(row, column)).sum())
                for row in part.weight_shapes
                for column in part.weight_shapes
            )
        return total


def _same_parts(a: DirectSum, b: DirectSum) -> bool:
    return len(a.parts) == len(b.parts) and all(
        same_blocks(left, right) for left, right in zip(a.parts, b.parts, strict=True)
    )


@inner_product(DirectSum, WholeNetwork)
def _direct_sum_whole(a: DirectSum, b: WholeNetwork) -> float:
    return b.whole.inner(a)


@inner_product(DirectSum, Operator)
def _direct_sum_any(a: DirectSum, b: Operator) -> float:
    if not isinstance(b, NetworkOperator) or not same_blocks(a, b):
        return column_inner(a, b)
    return a.inner_with(b)

"""Products over the modes of a tensor of powers of its mode moments: Shampoo, TNT."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from math import prod
from typing import Literal, final

from torch import Tensor

from fisherlab.numerics.linalg import eigh
from fisherlab.operators.base import Provenance
from fisherlab.operators.derived import FromState
from fisherlab.operators.eigenforms import TensorEigen, TensorPiece

Rule = Literal["shampoo", "tnt"]


@final
@dataclass(frozen=True)
class Modes:
    """Columns start:stop of a weight, read as a tensor of a shape."""

    start: int
    stop: int
    shape: tuple[int, ...]

    def moments(self, w: Tensor) -> list[Tensor]:
        """Return the mode contractions H_j = X_(j) X_(j)ᵀ of one weight (d_out, d_in)."""
        x = w[:, self.start : self.stop].reshape(self.shape)
        sizes = enumerate(self.shape)
        flat = [x.movedim(mode, 0).reshape(size, -1) for mode, size in sizes]
        return [rows @ rows.T for rows in flat]


def _shampoo(values: list[Tensor], epsilon: float) -> list[Tensor]:
    """(h + ε)^(1/(2k)) in each of k modes."""
    return [(h + epsilon) ** (0.5 / len(values)) for h in values]


def _tnt(values: list[Tensor], epsilon: float) -> list[Tensor]:
    """H scaled to an average of c in every mode, plus ε; cᵏ is the mean square."""
    k, size = len(values), prod(len(h) for h in values)
    mean = (values[0].sum() / size) ** (1 / k)
    scales = [mean ** (k - 1) * size / len(h) for h in values]
    alive = bool(mean > 0)
    return [
        (h / s if alive else 0 * h) + epsilon for h, s in zip(values, scales, strict=True)
    ]


_RULES: dict[Rule, Callable[[list[Tensor], float], list[Tensor]]] = {
    "shampoo": _shampoo,
    "tnt": _tnt,
}


@final
@dataclass(frozen=True, eq=False, repr=False)
class ModeProducts(FromState):
    r"""⊗_j f(H_j) over the modes of each tensor of a weight; the H_j are averaged.

    Parameters
    ----------
    block_shape
        (d_out, d_in).
    layout
        The tensors that the columns of the weight form.
    moments
        H_j of every mode of every tensor, one after the other.
    rule
        "shampoo": (H_j + εI)^(1/(2k)) for a tensor with k modes. "tnt": H_j scaled to
        the same average eigenvalue in every mode, + εI.
    epsilon
        ε, absolute.

    Examples
    --------
    >>> import torch
    >>> eye, layout = torch.eye(2), (Modes(0, 2, (2, 2)),)
    >>> op = ModeProducts((2, 2), layout, (16 * eye, eye), "shampoo")
    >>> round(op.trace(), 4)
    8.0
    """

    block_shape: tuple[int, int]
    layout: tuple[Modes, ...]
    moments: Sequence[Tensor]
    rule: Rule
    epsilon: float = 0.0
    provenance: Provenance = Provenance()

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.block_shape

    @property
    def state(self) -> Sequence[Tensor]:
        """The mode moments."""
        return self.moments

    def with_state(self, state: Sequence[Tensor]) -> "ModeProducts":
        """Return the product for other moments."""
        return replace(self, moments=tuple(state))

    @cached_property
    def formed(self) -> TensorEigen:
        """The matrix in the eigenbases of its modes."""
        pieces, left = [], list(self.moments)
        for modes in self.layout:
            here, left = left[: len(modes.shape)], left[len(modes.shape) :]
            pairs = [eigh(h, f"a mode of {self.provenance}") for h in here]
            roots = _RULES[self.rule]([v.clamp_min(0) for v, _ in pairs], self.epsilon)
            values = reduce(lambda a, b: a[..., None] * b, roots)
            bases = tuple(vectors for _, vectors in pairs)
            pieces.append(TensorPiece(modes.start, modes.stop, bases, values))
        return TensorEigen(self.block_shape, tuple(pieces), self.provenance)

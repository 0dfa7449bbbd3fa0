"""A solver in the space of pairs of positions, for few examples of wide shared weights."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.approximators.kpsvd.rearranged import Pair, Pairs, Rearranged
from fisherlab.numerics.gram_krylov import GramMap, gram_krylov, gram_power
from fisherlab.numerics.packed import PositionTable
from fisherlab.samples import Samples, SharedSamples, TurnedSamples
from fisherlab.samples.shared import form_flops, table_matrix
from fisherlab.settings import numeric
from fisherlab.showing import shown

HELD = 2**28  # bytes of tables and of a Krylov space
DEPTH = 12  # blocks of one Krylov space before a restart
OVERSAMPLE = 2
POWERS = 20  # steps of power iteration before a Krylov space is built


@shown
@numeric
@final
@dataclass(frozen=True)
class PositionGram:
    r"""Iteration on T × T tables of every example, through the Gram matrices of positions.

    With :math:`V = \sum_n A_n^T Y_n A_n` and :math:`U = \sum_{vn} G_{vn}^T X_n G_{vn}` the
    map is :math:`X_n = A_n V A_n^T / N`, its adjoint
    :math:`Y_n = \sum_v G_{vn} U G_{vn}^T / N`: what `SampleGram` is for one position. A
    step costs 2 N² T³ (1 + V²) multiply-adds, whatever the weight. Rank 1 begins with power
    iteration from the identity, whose tables stay positive semidefinite; what that leaves,
    and higher ranks, are block Krylov iteration. In float64.

    Parameters
    ----------
    tolerance, max_iterations
        As in `Power`.
    """

    tolerance: float | None = None
    max_iterations: int = 1000

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return the leading pairs.

        Raises
        ------
        ValueError
            For layers used at one position, or where terms were subtracted.
        """
        samples = block.samples
        if isinstance(samples, TurnedSamples):
            found = self(Rearranged(samples.upright, block.count, block.removed), rank)
            return found._replace(pairs=tuple((cols, rows) for rows, cols in found.pairs))
        if not isinstance(samples, SharedSamples) or block.removed:
            msg = "PositionGram solves whole blocks of shared weights; use Lanczos()."
            raise ValueError(msg)
        tolerance, fine = self.tolerance or block.tolerance, samples.to(torch.float64)
        maps = GramMap(
            PositionTable.of(fine.inputs[None]),
            PositionTable.of(fine.gradients),
            block.count,
        )
        n, t, _ = samples.inputs.shape
        eye = torch.eye(t, dtype=torch.float64, device=samples.device)
        start = eye.repeat(n, 1, 1).flatten()
        positive = False
        if rank == 1:
            steps = min(POWERS, self.max_iterations)
            triplets = gram_power(maps, start, tolerance, steps)
            positive, start = triplets.converged, triplets.right[:, :1].sum(1)
        if not positive:
            triplets = gram_krylov(
                maps,
                rank,
                _with_noise(start, rank + OVERSAMPLE),
                depth=DEPTH,
                tolerance=tolerance,
                max_products=self.max_iterations,
            )
        pairs = tuple(
            (
                _unit(table_matrix(fine.gradients, left), samples),
                _unit(table_matrix(fine.inputs[None], right), samples),
            )
            for left, right in zip(triplets.left.T, triplets.right.T, strict=True)
        )
        values = triplets.values.to(samples.dtype)
        return Pairs(pairs, values, *triplets[3:], positive=positive)


def position_flops(samples: Samples, rank: int) -> float:
    """Count the multiply-adds of `PositionGram`; infinite where it does not apply."""
    if isinstance(samples, TurnedSamples):
        samples = samples.upright
    if not isinstance(samples, SharedSamples):
        return float("inf")
    if position_bytes(samples, rank) > HELD:
        return float("inf")
    v, n, t, o = samples.gradients.shape
    i, rows = samples.inputs.shape[2], n * t
    step, last = 2 * rows**2 * t * (1 + v * v), min(form_flops(n, v, t, o, i))
    return rows**2 * (i + v * v * o) + 20 * (rank + 2) * step + rank * last


def position_bytes(samples: Samples, rank: int) -> int:
    """Count the bytes of both tables and of the Krylov space."""
    rows, t = samples.examples * samples.positions, samples.positions
    tables = (1 + samples.columns**2) * rows**2
    return 8 * (tables + 4 * DEPTH * (rank + OVERSAMPLE) * rows * t)


def _with_noise(start: Tensor, width: int) -> Float[Tensor, "m b"]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(start), width, generator=generator, dtype=start.dtype)
    noise[:, 0] = start.cpu()
    return noise.to(start.device)


def _unit(matrix: Tensor, like: Samples) -> Tensor:
    return matrix.div_(matrix.norm()).to(like.dtype)

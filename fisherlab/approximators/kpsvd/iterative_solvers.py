"""Solvers that multiply with the rearranged block: power, subspace and Lanczos."""

from dataclasses import dataclass
from typing import final

import torch

from fisherlab.approximators.kpsvd.rearranged import (
    Pair,
    Pairs,
    Rearranged,
    as_pairs,
    chained,
    significant,
)
from fisherlab.numerics.krylov import Triplets, block_krylov
from fisherlab.numerics.linalg import factorised
from fisherlab.showing import shown


@shown
@final
@dataclass(frozen=True)
class Power:
    """Power iteration, one pair after the other, each on what the others left.

    Parameters
    ----------
    tolerance
        Relative residual ‖Zᵀu − σv‖ / σ₁; 1e-10 in float64 and 2e-6 in float32 if None.
    max_iterations
        For each pair.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> fl.KPSVD(1, fl.Power())(stats["weight"]).converged
    True
    """

    tolerance: float | None = None
    max_iterations: int = 1000

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return the leading pairs."""
        found: list[Pairs] = []
        block = block.multiplied_often()
        for k in range(rank):
            triplets = block_krylov(
                block.linear(),
                1,
                block.start(1, warm[k : k + 1])
                if k < len(warm) or not k
                else block.start(2)[:, 1:],
                depth=1,
                tolerance=self.tolerance or block.tolerance,
                max_products=self.max_iterations,
                floor=block.floor,
            )
            one = as_pairs(triplets, block.samples.weight_shape)
            if not significant(one, found):
                break
            found.append(one)
            rows, cols = one.pairs[0]
            block = block.less(((one.values[0] * rows, cols),))
        return chained(found, block)


@shown
@final
@dataclass(frozen=True)
class Subspace:
    r"""Subspace iteration: a block of pairs at once, with `oversample` more than wanted.

    .. math:: V \leftarrow \mathrm{orth}(Z^T \mathrm{orth}(Z V))

    Parameters
    ----------
    oversample
        Extra columns, which speed convergence up.
    tolerance, max_iterations
        As in `Power`.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> fl.KPSVD(1, fl.Subspace())(stats["weight"]).converged
    True
    """

    oversample: int = 2
    tolerance: float | None = None
    max_iterations: int = 1000

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return the leading pairs."""
        return _krylov(block, rank, warm, self.oversample, 1, self)


@shown
@final
@dataclass(frozen=True)
class Lanczos:
    r"""Block Golub-Kahan-Lanczos with full reorthogonalisation and restarts.

    .. math:: Z V_k = U_k B_k, \qquad B_k \text{ block bidiagonal}

    Parameters
    ----------
    steps
        Blocks of one Krylov space before a restart.
    reorthogonalise
        False is the published two-step recurrence: no reorthogonalisation, no restart,
        one vector; its second pair is far off, which is why it is not the default.
    tolerance, max_iterations
        As in `Power`.

    References
    ----------
    Koroko et al. 2022, arXiv 2201.10285, section 3 (the published recurrence).

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> fl.KPSVD(1, fl.Lanczos())(stats["weight"]).converged
    True
    """

    steps: int = 8
    reorthogonalise: bool = True
    tolerance: float | None = None
    max_iterations: int = 1000

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return the leading pairs."""
        if not self.reorthogonalise:
            return _published_lanczos(block, rank, self.steps)
        return _krylov(block, rank, warm, 1, self.steps, self)


def _krylov(
    block: Rearranged,
    rank: int,
    warm: tuple[Pair, ...],
    extra: int,
    depth: int,
    limits: Subspace | Lanczos,
) -> Pairs:
    triplets = block_krylov(
        block.multiplied_often().linear(),
        rank,
        block.start(rank + extra, warm),
        depth=depth,
        tolerance=limits.tolerance or block.tolerance,
        max_products=limits.max_iterations,
        floor=block.floor,
    )
    return as_pairs(triplets, block.samples.weight_shape)


def _published_lanczos(block: Rearranged, rank: int, steps: int) -> Pairs:
    """Golub-Kahan bidiagonalisation as published: short recurrences, no restart."""
    linear, start = block.linear(), block.start(1)
    q = start / start.norm()
    p = linear.apply(q)
    alpha = [p.norm()]
    if not float(alpha[0]) > 0:  # a zero block
        return chained([], block)
    tiny = 1e2 * torch.finfo(p.dtype).eps * float(alpha[0])
    left, right, beta = [p / alpha[0]], [q], []
    for _ in range(1, steps):
        z = linear.adjoint(left[-1]) - alpha[-1] * right[-1]
        if float(z.norm()) <= tiny:
            break
        beta.append(z.norm())
        right.append(z / beta[-1])
        p = linear.apply(right[-1]) - beta[-1] * left[-1]
        alpha.append(p.norm() if float(p.norm()) > tiny else torch.zeros_like(p.norm()))
        left.append(p / alpha[-1].clamp_min(tiny))
    small = torch.diag(torch.stack(alpha))
    if beta:
        small += torch.diag(torch.stack(beta), 1)
    u, values, vt = factorised("svd", small, "the bidiagonal matrix of Lanczos")
    strong = values > 1e2 * torch.finfo(values.dtype).eps * values[0]
    keep = min(rank, int(strong.sum()))
    lefts = torch.cat(left, 1) @ u[:, :keep]
    rights = torch.cat(right, 1) @ vt.T[:, :keep]
    rest = linear.adjoint(lefts) - rights * values[:keep]
    worst = float(rest.norm(dim=0).max() / values[0].clamp_min(1e-300))
    done = worst <= block.tolerance
    return as_pairs(
        Triplets(lefts, values[:keep], rights, done, len(alpha), worst),
        block.samples.weight_shape,
    )

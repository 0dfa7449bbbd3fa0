"""SINGD and IKFAC: inverse factors that are updated by products, never inverted."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.approximators.kronecker.kfac import factor_sums
from fisherlab.operators import InverseFactors, Operator
from fisherlab.operators.dampings import tikhonov
from fisherlab.settings import numeric
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics

Structure = Literal["dense", "diagonal"]


@shown
@numeric
@final
@dataclass(frozen=True)
class SINGD:
    r"""Inverse-free natural gradient, :math:`C C^T \approx (G + λI)^{-1}`, K alike for A.

    With :math:`H_C = C^T G C` and :math:`H_K = K^T A K` of the batch

    .. math:: M_C \leftarrow α M_C + \tfrac12 (t_K H_C + λ s_K C^T C - I), \quad
              C \leftarrow C - β\, C M_C

    and alike for K with :math:`t_C, s_C`. ``adaptive`` (SINGD) takes
    :math:`t_K = \mathrm{tr} H_K / d_{in}, s_K = \mathrm{tr} K^T K / d_{in}`; without it
    (IKFAC) both are 1 and the fixed point is KFAC with factors damped by λ.

    Parameters
    ----------
    damping
        λ, inside the update.
    rate
        β, the step of the update.
    momentum
        α, on the update; 0 for IKFAC.
    adaptive
        SINGD's scales, which couple the factors.
    structure
        "dense", or "diagonal": only the diagonals of C, K and of what moves them.
    normalised
        Whether the step is β / max(1, ‖M‖), ‖M‖ the largest sum of a row in size, and
        new terms of M count 1 − α: then it is stable whatever the scale of the factors.

    Raises
    ------
    ValueError
        For a negative damping, a rate that is not positive, a momentum outside of [0, 1),
        or an unknown structure.

    Notes
    -----
    ``previous`` is the operator of the step before; the first call starts from the
    identity. The operator is the *damped* matrix whose inverse is :math:`C C^T \otimes
    K K^T`, so it is solved with damping 0. A step with β below 2 divided by the largest
    eigenvalue of :math:`H + λ C^T C` is stable, and every normalised one with β < 1.

    References
    ----------
    Lin et al. 2024, arXiv 2312.05705; normalised steps as its
    authors' package singd has them, after Murray et al. 2017, arXiv 1711.05224.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> op = None
    >>> for _ in range(3):
    ...     op = fl.SINGD(rate=0.1)(stats["weight"], previous=op)
    >>> op.weight_shape
    (2, 4)
    """

    damping: float = 1e-3
    rate: float = 1e-2
    momentum: float = 0.5
    adaptive: bool = True
    structure: Structure = "dense"
    normalised: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        object.__setattr__(self, "damping", tikhonov(self.damping, "SINGD"))
        if not (self.damping >= 0 and self.rate > 0 and 0 <= self.momentum < 1):
            msg = f"{self!r}: damping ≥ 0, rate > 0 and momentum in [0, 1) are expected."
            raise ValueError(msg)
        if self.structure not in ("dense", "diagonal"):
            msg = f"SINGD(structure={self.structure!r}): 'dense' or 'diagonal' is expected."
            raise ValueError(msg)

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> InverseFactors:
        """Return the factors after one more update.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        rows, cols = factor_sums(statistics, "expand", "SINGD")
        rows, cols = rows / max(statistics.positions, 1), cols / statistics.count
        made = statistics.provenance.by(repr(self))
        before = previous if isinstance(previous, InverseFactors) else None
        c, k, moved_c, moved_k = before.state if before else _begin(rows, cols)
        seen_c, seen_k = c.T @ rows @ c, k.T @ cols @ k
        held_c, held_k = c.T @ c, k.T @ k
        moved_c = self._moved(moved_c, seen_c, held_c, _scales(seen_k, held_k))
        moved_k = self._moved(moved_k, seen_k, held_k, _scales(seen_c, held_c))
        new_c, new_k = c - c @ self._step(moved_c), k - k @ self._step(moved_k)
        return InverseFactors(new_c, new_k, moved_c, moved_k, made)

    def _moved(
        self,
        before: Float[Tensor, "n n"],
        seen: Float[Tensor, "n n"],
        held: Float[Tensor, "n n"],
        scales: tuple[float, float],
    ) -> Float[Tensor, "n n"]:
        """Return the momentum of one factor's update."""
        times, share = scales if self.adaptive else (1.0, 1.0)
        eye = torch.eye(len(seen), dtype=seen.dtype, device=seen.device)
        pull = (times * seen + self.damping * share * held - eye) / 2
        if self.structure == "diagonal":
            pull = torch.diag(pull.diagonal())
        return self.momentum * before + (1 - self.momentum * self.normalised) * pull

    def _step(self, moved: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        """Return β M, of a normalised step with ‖βM‖ ≤ β."""
        size = moved.abs().sum(1).max().clamp_min(1) if self.normalised else 1.0
        return self.rate / size * moved


def _begin(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    eyes = [torch.eye(len(m), dtype=m.dtype, device=m.device) for m in (rows, cols)]
    return eyes[0], eyes[1], torch.zeros_like(rows), torch.zeros_like(cols)


def _scales(seen: Tensor, held: Tensor) -> tuple[float, float]:
    """Return the mean eigenvalues of H and of KᵀK of the other factor."""
    return float(seen.diagonal().mean()), float(held.diagonal().mean())

"""A bound on how far a step may move the model's distribution."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from fisherlab.showing import shown

Form = Literal["step", "direction"]
_FLOOR = 1e-8  # of the published code


@shown
@final
@dataclass(frozen=True)
class KLClip:
    r"""Shorten all directions d together if the Kullback-Leibler estimate is above κ.

    .. math:: \text{step: } ν = \min\Big(1, \sqrt{κ / \textstyle\sum η^2 ⟨d, ∇⟩}\Big),
              \qquad
              \text{direction: } ν =
              \min\Big(1, \sqrt{κ / (\textstyle\sum |⟨d, ∇⟩| + 10^{-8})}\Big)

    With :math:`d = F^{-1} ∇`, :math:`η^2 ⟨d, ∇⟩ / 2` is the divergence of a step of
    length η to second order.

    Parameters
    ----------
    bound
        κ > 0.
    form
        "step" counts the learning rate η of each parameter, "direction" does not.

    Raises
    ------
    ValueError
        If κ is not positive or the form unknown.

    References
    ----------
    "step": Ba, Grosse & Martens 2017, section 5, as public K-FAC codes have it
    (κ = 1e-3). "direction": code of Koroko et al. 2022, arXiv 2201.10285 (κ = 1e-2).

    Examples
    --------
    >>> pairs = [(0.1, torch.tensor(4.0))]
    >>> round(KLClip(0.01).scale(pairs).item(), 4)
    0.5
    >>> round(KLClip(0.04, "direction").scale(pairs).item(), 4)
    0.1
    """

    bound: float
    form: Form = "step"

    def __post_init__(self) -> None:
        """Check κ and the form."""
        if not self.bound > 0 or self.form not in ("step", "direction"):
            msg = f"{self!r}: a positive bound and 'step' or 'direction' are expected."
            raise ValueError(msg)

    def scale(self, pairs: Sequence[tuple[float, Tensor]]) -> Tensor:
        """Return ν from pairs of a learning rate and an inner product ⟨d, ∇⟩."""
        inner = torch.stack([product for _, product in pairs])
        if self.form == "direction":
            total = inner.abs().sum() + _FLOOR
        else:
            rates = torch.tensor([rate for rate, _ in pairs], dtype=torch.float64).to(inner)
            total = (rates.square() * inner).sum()
        # a direction that ascends has no positive estimate; it is left as it is
        ratio = torch.where(total > 0, self.bound / total, torch.ones_like(total))
        return ratio.sqrt().clamp_max(1)

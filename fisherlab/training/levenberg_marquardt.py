"""Damping that follows how well the quadratic model predicts the loss."""

import math
from dataclasses import dataclass
from typing import Any, Final, final

from fisherlab.operators.dampings import tikhonov
from fisherlab.showing import shown

SHARE: Final = 1e-2  # of the loss: λ₀


@shown
@final
@dataclass(frozen=True)
class LevenbergMarquardt:
    r"""Lower λ where the model predicts well, raise it where it does not.

    With the reduction ratio :math:`ρ = (h(θ+δ) - h(θ)) / (M(δ) - M(0))` and
    :math:`ω = f^T`

    .. math:: λ \leftarrow ωλ \text{ if } ρ > \tfrac34, \qquad
              λ \leftarrow λ/ω \text{ if } ρ < \tfrac14

    Parameters
    ----------
    initial
        λ at the beginning; it has the scale of the loss, so by default it is a hundredth
        of the loss before the first step. (150, often seen, is made for the autoencoders
        of the paper, whose losses are in the hundreds.)
    every
        T, steps between two changes.
    factor
        f of one step, below 1.
    low, high
        Where ρ is too low or high enough.
    floor
        λ never falls below it.

    Raises
    ------
    ValueError
        For numbers out of range.

    References
    ----------
    Martens & Grosse 2015, arXiv 1503.05671, section 6.5 (T = 5, f = 19/20).

    Examples
    --------
    >>> rule = LevenbergMarquardt(100.0, every=1, factor=0.5)
    >>> rule.adapted(100.0, ratio=0.9), rule.adapted(100.0, ratio=0.1)
    (50.0, 200.0)
    """

    initial: float | None = None
    every: int = 5
    factor: float = 19 / 20
    low: float = 0.25
    high: float = 0.75
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        fits = (self.initial or 0.0) >= 0 and self.every >= 1 and self.floor >= 0
        if not (fits and 0 < self.factor < 1 and self.low < self.high):
            msg = (
                f"{self!r}: initial and floor of at least 0, every of at least 1, a factor "
                "between 0 and 1, and low below high are expected."
            )
            raise ValueError(msg)

    def first(self, loss: float) -> float:
        """Return λ at the beginning, where the loss is this.

        Examples
        --------
        >>> LevenbergMarquardt().first(2.5), LevenbergMarquardt(1.0).first(2.5)
        (0.025, 1.0)
        """
        return SHARE * loss if self.initial is None else self.initial

    def adapted(self, damping: float, ratio: float) -> float:
        """Return the next λ; a ratio that is no number counts as too low."""
        omega = self.factor**self.every
        if ratio > self.high:
            return max(omega * damping, self.floor)
        if ratio < self.low or math.isnan(ratio):
            return damping / omega
        return damping


def rule(damping: Any) -> LevenbergMarquardt:
    """Read how λ begins and changes.

    Raises
    ------
    ValueError
        For what is neither a number of at least 0 nor a rule.
    """
    if damping is None or isinstance(damping, LevenbergMarquardt):
        return damping or LevenbergMarquardt()
    try:
        initial = tikhonov(damping, "AdaptiveKFAC")
    except ValueError:
        msg = (
            f"AdaptiveKFAC: damping={damping!r}; a number, Tikhonov(λ) or "
            "LevenbergMarquardt(λ) is expected: λ changes while it trains."
        )
        raise ValueError(msg) from None
    return LevenbergMarquardt(initial)


@shown
@final
@dataclass(frozen=True)
class GreedySearch:
    r"""Try γ and its neighbours ωγ and γ/ω now and then; the best model value wins.

    Parameters
    ----------
    every
        T, steps between two searches.
    factor
        f of one step, :math:`ω = f^{T/2}`.

    Raises
    ------
    ValueError
        For numbers out of range.

    References
    ----------
    Martens & Grosse 2015, arXiv 1503.05671, section 6.6 (T = 20, f = 19/20).

    Examples
    --------
    >>> GreedySearch(every=2, factor=0.5).candidates(1.0, step=4)
    (1.0, 0.5, 2.0)
    """

    every: int = 20
    factor: float = 19 / 20

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.every < 1 or not 0 < self.factor < 1:
            msg = f"{self!r}: every of at least 1 and a factor between 0 and 1 expected."
            raise ValueError(msg)

    def candidates(self, gamma: float, step: int) -> tuple[float, ...]:
        """Return the values of γ to try in a step, the present one first."""
        if step % self.every:
            return (gamma,)
        omega = self.factor ** (self.every / 2)
        return gamma, omega * gamma, gamma / omega

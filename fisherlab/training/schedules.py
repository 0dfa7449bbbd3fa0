"""What changes in a training: steps one looks at, batches, damping, shares of averages."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fisherlab.operators.base import tikhonov
from fisherlab.settings import require_number, setting

Every = int | Sequence[int] | Callable[[int], Sequence[int]]


@final
@setting
class LinearSteps:
    """`count` steps from 0 to the last, evenly spaced.

    Examples
    --------
    >>> LinearSteps(5)(100)
    (0, 25, 50, 75, 100)
    """

    count: int = 10

    def __post_init__(self) -> None:
        """Check the number."""
        _check("LinearSteps", self.count)

    def __call__(self, steps: int) -> tuple[int, ...]:
        """Return the steps, without repetitions."""
        return _rounded(np.linspace(0, steps, self.count))


@final
@setting
class LogarithmicSteps:
    """Step 0 and `count` − 1 later ones, evenly spaced in logarithm, the last included.

    Step k is `steps^(k / (count − 1))`, rounded; equal steps are given once.

    Examples
    --------
    >>> LogarithmicSteps(4)(1000)
    (0, 10, 100, 1000)
    """

    count: int = 10

    def __post_init__(self) -> None:
        """Check the number."""
        _check("LogarithmicSteps", self.count)

    def __call__(self, steps: int) -> tuple[int, ...]:
        """Return the steps, without repetitions."""
        powers = np.arange(1, self.count) / (self.count - 1)
        return _rounded(np.append(0.0, float(steps) ** powers))


def moments(every: Every, steps: int) -> tuple[int, ...]:
    """Return the steps at which to look, in order.

    Parameters
    ----------
    every
        A number k: steps 0, k, 2k, … and the last; a sequence of steps; or a function
        from the number of steps to them, such as `LogarithmicSteps(20)`.
    steps
        Steps of the training.

    Raises
    ------
    ValueError
        If a step lies outside of the training, or k is not positive.

    Examples
    --------
    >>> moments(40, 100), moments([100, 3], 100), moments(LogarithmicSteps(3), 100)
    ((0, 40, 80, 100), (3, 100), (0, 10, 100))
    """
    chosen: Any = every(steps) if callable(every) else every
    if not np.ndim(chosen):
        require_number(f"every={every!r}", chosen, "a whole number")
        if chosen < 1:
            raise ValueError(f"every={every}: a positive number of steps is expected.")
        chosen = [*range(0, steps, chosen), steps]
    outside = [step for step in chosen if not 0 <= step <= steps]
    if outside:
        raise ValueError(
            f"The steps {outside} lie outside of the training, which goes from step 0 "
            f"to step {steps}."
        )
    return tuple(sorted({int(step) for step in chosen}))


def _check(name: str, count: int) -> None:
    if count < 2:
        raise ValueError(f"{name}({count}): at least the first and the last are expected.")


def _rounded(steps: np.ndarray) -> tuple[int, ...]:
    return tuple(sorted({round(step) for step in steps.tolist()}))


BatchSize = int | Callable[[int], int]


class Order:
    """An endless sequence of minibatches without replacement, asked by step.

    Every epoch is a new permutation; what does not fill a batch is dropped. The same
    numbers give the same batches whatever was asked before, so a training that goes on
    from a checkpoint needs no more than the number of its step.

    Parameters
    ----------
    count
        Examples to draw from.
    batch_size
        Examples in a batch, or a function of the step, counted from 1; at most `count`
        are taken.
    seed
        Decides the order; the global generator is left alone.

    Raises
    ------
    ValueError
        If there are no examples or `batch_size` is not positive.

    Notes
    -----
    Asking on costs one permutation an epoch; asking back begins anew.

    Examples
    --------
    >>> order = Order(count=4, batch_size=2, seed=0)
    >>> sorted(torch.cat([order.indices(0), order.indices(1)]).tolist())
    [0, 1, 2, 3]
    """

    def __init__(self, count: int, batch_size: BatchSize, seed: int) -> None:
        if not callable(batch_size):
            require_number(f"batch_size={batch_size!r}", batch_size, "a whole number")
        if count < 1 or (not callable(batch_size) and batch_size < 1):
            raise ValueError(
                f"Order: {count} examples in batches of {batch_size} were given; both "
                "must be positive."
            )
        self._count, self._size, self._seed = count, batch_size, seed
        self._restart()

    def indices(self, step: int) -> Int[Tensor, " batch"]:
        """Return the examples of the batch number `step`, counted from 0."""
        if step < self._step:
            self._restart()
        while self._step < step:
            self._advance()
        return self._batch

    def _restart(self) -> None:
        self._generator = torch.Generator().manual_seed(self._seed)
        self._left = self._batch = torch.empty(0, dtype=torch.int64, device="cpu")
        self._step = -1

    def _advance(self) -> None:
        self._step += 1
        size = self._size(self._step + 1) if callable(self._size) else self._size
        size = min(size, self._count)
        if len(self._left) < size:
            self._left = torch.randperm(
                self._count, generator=self._generator, device="cpu"
            )
        self._batch, self._left = self._left[:size], self._left[size:]


@final
@setting
class ExponentialBatches:
    r"""Batch sizes that grow exponentially to a largest one.

    .. math:: m_k = \min(m_1 e^{(k-1)/b}, m_K), \qquad b = (K-1) / \ln(m_K / m_1)

    Parameters
    ----------
    first
        m₁.
    last
        m_K, often the size of the training set.
    until
        K, the step that reaches it.

    Raises
    ------
    ValueError
        For numbers out of range.

    References
    ----------
    Martens & Grosse 2015, arXiv 1503.05671, section 13 (m₁ = 1000, K = 500).

    Examples
    --------
    >>> sizes = ExponentialBatches(first=100, last=400, until=3)
    >>> [sizes(step) for step in (1, 2, 3, 4)]
    [100, 200, 400, 400]
    """

    first: int = 1000
    last: int = 60_000
    until: int = 500

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not (1 <= self.first <= self.last and self.until >= 2):
            raise ValueError(f"{self!r}: 1 ≤ first ≤ last and until ≥ 2 are expected.")

    def __call__(self, step: int) -> int:
        """Return the size of the batch of a step, counted from 1."""
        if step >= self.until:
            return self.last
        share = (step - 1) / (self.until - 1)
        return round(self.first * math.exp(share * math.log(self.last / self.first)))


SHARE: Final = 1e-2  # of the loss: λ₀


@final
@setting
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
            raise ValueError(
                f"{self!r}: initial and floor of at least 0, every of at least 1, a factor "
                "between 0 and 1, and low below high are expected."
            )

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
        raise ValueError(
            f"AdaptiveKFAC: damping={damping!r}; a number, Tikhonov(λ) or "
            "LevenbergMarquardt(λ) is expected: λ changes while it trains."
        ) from None
    return LevenbergMarquardt(initial)


@final
@setting
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


@runtime_checkable
class Averaging(Protocol):
    """A rule for the share of the old value in new = ρ_k old + (1 − ρ_k) batch."""

    def share(self, updates: int) -> float:
        """Return ρ_k after `updates` = k − 1 earlier batches; 0 for the first."""

    def warm_share(self) -> float:
        """Return ρ after a warm start, where no start has to be corrected."""


@final
@setting
class BiasCorrected:
    r"""An exponential average without the zero it would begin with.

    .. math:: ρ_k = ρ \frac{1 - ρ^{k-1}}{1 - ρ^k}

    This is :math:`(1-ρ) \sum_j ρ^{k-j} F_j / (1 - ρ^k)`, as Adam corrects its moments.

    Parameters
    ----------
    decay
        ρ in [0, 1]; 1 gives the mean of all batches, 0 the last batch.

    Raises
    ------
    ValueError
        If ρ lies outside.

    Examples
    --------
    >>> [round(BiasCorrected(0.5).share(k), 3) for k in range(3)]
    [0.0, 0.333, 0.429]
    """

    decay: float

    def __post_init__(self) -> None:
        """Check ρ."""
        _require_share(self, self.decay)

    def share(self, updates: int) -> float:
        """Return ρ_k."""
        if self.decay == 1:
            return updates / (updates + 1)
        return self.decay * (1 - self.decay**updates) / (1 - self.decay ** (updates + 1))

    def warm_share(self) -> float:
        """Return ρ."""
        return self.decay


@final
@setting
class Ramped:
    r"""The mean of all batches until they are many, :math:`ρ_k = \min(1 - 1/k, ρ)`.

    Parameters
    ----------
    decay
        ρ in [0, 1].

    Raises
    ------
    ValueError
        If ρ lies outside.

    References
    ----------
    Martens & Grosse 2015, arXiv 1503.05671, section 5; Koroko et al. 2022,
    arXiv 2201.10285 (their code).

    Examples
    --------
    >>> [Ramped(0.6).share(k) for k in range(4)]
    [0.0, 0.5, 0.6, 0.6]
    """

    decay: float

    def __post_init__(self) -> None:
        """Check ρ."""
        _require_share(self, self.decay)

    def share(self, updates: int) -> float:
        """Return ρ_k."""
        return min(1 - 1 / (updates + 1), self.decay)

    def warm_share(self) -> float:
        """Return ρ."""
        return self.decay


def averaging(rule: float | Averaging) -> Averaging:
    """Read a rule; a number ρ means `BiasCorrected(ρ)`.

    Raises
    ------
    ValueError
        For what is neither.
    """
    if isinstance(rule, Averaging):
        return rule
    require_number(f"average={rule!r}", rule)
    return BiasCorrected(float(rule))


def _require_share(rule: object, decay: float) -> None:
    if not 0 <= decay <= 1:
        raise ValueError(f"{rule!r}: a share of the old value between 0 and 1 is expected.")

"""At which steps of a training one looks, and the order and size of its batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fisherlab.showing import shown

Every = int | Sequence[int] | Callable[[int], Sequence[int]]


@shown
@final
@dataclass(frozen=True)
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


@shown
@final
@dataclass(frozen=True)
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
    if isinstance(every, int):
        if every < 1:
            raise ValueError(f"every={every}: a positive number of steps is expected.")
        chosen: Sequence[int] = [*range(0, steps, every), steps]
    else:
        chosen = every(steps) if callable(every) else every
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
        if count < 1 or (isinstance(batch_size, int) and batch_size < 1):
            msg = (
                f"Order: {count} examples in batches of {batch_size} were given; both "
                "must be positive."
            )
            raise ValueError(msg)
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
        size = self._size if isinstance(self._size, int) else self._size(self._step + 1)
        size = min(size, self._count)
        if len(self._left) < size:
            self._left = torch.randperm(
                self._count, generator=self._generator, device="cpu"
            )
        self._batch, self._left = self._left[:size], self._left[size:]


@shown
@final
@dataclass(frozen=True)
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
            msg = f"{self!r}: 1 ≤ first ≤ last and until ≥ 2 are expected."
            raise ValueError(msg)

    def __call__(self, step: int) -> int:
        """Return the size of the batch of a step, counted from 1."""
        if step >= self.until:
            return self.last
        share = (step - 1) / (self.until - 1)
        return round(self.first * math.exp(share * math.log(self.last / self.first)))

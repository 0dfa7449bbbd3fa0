"""In which order a training sees its examples, and in batches of which size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from fisherlab.showing import shown

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
        self._left = self._batch = torch.empty(0, dtype=torch.int64)
        self._step = -1

    def _advance(self) -> None:
        self._step += 1
        size = self._size if isinstance(self._size, int) else self._size(self._step + 1)
        size = min(size, self._count)
        if len(self._left) < size:
            self._left = torch.randperm(self._count, generator=self._generator)
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

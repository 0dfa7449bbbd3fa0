"""Train on minibatches and stop at checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fisherlab.errors import NumericalError
from fisherlab.likelihoods import Likelihood
from fisherlab.problems.problem import Pair, Problem

# Bounds the memory of one forward pass, and changes no result.
_CHUNK = 4096


def trajectory(
    problem: Problem,
    optimizer: torch.optim.Optimizer,
    steps: int,
    checkpoints: Sequence[int],
    *,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[int, nn.Module]]:
    """Train `problem.model` in place and yield it at every checkpoint.

    The loss of a step is the mean over its minibatch of the likelihood's loss, which
    sums over outputs. Minibatches come from an endless, reshuffled sequence without
    replacement. The model is yielded in evaluation mode: it is the live one, so look at
    it before asking for the next.

    Parameters
    ----------
    problem
        Whose model is trained on `problem.train`.
    optimizer
        Over the parameters of `problem.model`.
    steps
        Number of minibatches in all.
    checkpoints
        Steps after which to yield; 0 is before training.
    batch_size
        Examples in a minibatch, at most the size of the training set.
    seed
        Decides the order of the examples; the global generator is left alone.
    progress
        Called with the number of every finished step.

    Raises
    ------
    ValueError
        If a checkpoint lies outside of 0 to `steps`, or `batch_size` is not positive.
    NumericalError
        If the loss is not finite.

    Examples
    --------
    >>> import torch
    >>> import fisherlab as fl
    >>> problem = fl.problems.load("digits")
    >>> sgd = torch.optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.9)
    >>> for step, model in trajectory(problem, sgd, 60, checkpoints=(0, 60)):
    ...     loss = mean_loss(model, problem.likelihood, problem.test)
    ...     print(step, loss < 1.5)
    0 False
    60 True
    """
    _check(steps, checkpoints, batch_size)
    batches = _minibatches(problem.train, batch_size, seed)
    numbered = enumerate(islice(batches, steps), start=1)
    return _trained(problem, optimizer, numbered, set(checkpoints), progress)


def _check(steps: int, checkpoints: Sequence[int], batch_size: int) -> None:
    outside = [step for step in checkpoints if not 0 <= step <= steps]
    if outside:
        raise ValueError(
            f"The checkpoints {outside} lie outside of the training, which goes from "
            f"step 0 to step {steps}."
        )
    if batch_size < 1:
        raise ValueError(f"A batch size of {batch_size} is not positive.")


def _trained(
    problem: Problem,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[int, Pair]],
    checkpoints: set[int],
    progress: Callable[[int], object] | None,
) -> Iterator[tuple[int, nn.Module]]:
    if 0 in checkpoints:
        yield 0, problem.model.eval()
    for step, batch in batches:
        _take_step(problem, optimizer, batch, step)
        if progress is not None:
            progress(step)
        if step in checkpoints:
            yield step, problem.model.eval()


def _take_step(
    problem: Problem, optimizer: torch.optim.Optimizer, batch: Pair, step: int
) -> None:
    x, y = batch
    optimizer.zero_grad()
    loss = problem.likelihood.loss(problem.model.train()(x), y).mean()
    if not math.isfinite(loss.item()):
        raise NumericalError(
            f"The training loss is {loss.item()} at step {step} with the learning rate "
            f"{optimizer.param_groups[0]['lr']:g}. Train with a smaller one (--lr)."
        )
    loss.backward()
    optimizer.step()


def _minibatches(data: Pair, batch_size: int, seed: int) -> Iterator[Pair]:
    x, y = data
    for indices in _index_batches(len(x), min(batch_size, len(x)), seed):
        here = indices.to(x.device)
        yield x[here], y[here]


def _index_batches(
    count: int, batch_size: int, seed: int
) -> Iterator[Int[Tensor, " batch"]]:
    """Give batches of one size without end; what an epoch leaves over is dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch_size].split(batch_size)


@torch.no_grad()
def mean_loss(model: nn.Module, likelihood: Likelihood, data: Pair) -> float:
    """Return the mean over the examples of the loss, summed over outputs, in nats.

    Examples
    --------
    >>> import math
    >>> import fisherlab as fl
    >>> problem = fl.problems.load("digits")
    >>> for p in problem.model.parameters():
    ...     _ = p.requires_grad_(False).zero_()
    >>> loss = mean_loss(problem.model, problem.likelihood, problem.train)
    >>> math.isclose(loss, math.log(10))
    True
    """
    x, y = data
    sums = [
        likelihood.loss(model(x_part), y_part).sum().item()
        for x_part, y_part in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True)
    ]
    return math.fsum(sums) / len(x)


@torch.no_grad()
def accuracy(model: nn.Module, data: Pair) -> float:
    """Return the fraction of the examples whose largest output is at their label.

    Examples
    --------
    >>> import torch
    >>> x = torch.eye(2)
    >>> accuracy(torch.nn.Identity(), (x, torch.tensor([0, 0])))
    0.5
    """
    x, y = data
    hits = [
        int((model(x_part).argmax(-1) == y_part).sum())
        for x_part, y_part in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True)
    ]
    return sum(hits) / len(x)

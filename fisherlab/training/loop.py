"""Train on minibatches and stop at checkpoints."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisherlab.errors import NumericalError
from fisherlab.likelihoods import Categorical, Likelihood
from fisherlab.numerics.devices import generator
from fisherlab.numerics.ranks import live
from fisherlab.problems.problem import Pair, Problem
from fisherlab.settings import numeric
from fisherlab.training.one_graph import shared_gradients
from fisherlab.training.schedules import BatchSize, Order

Scheduler = torch.optim.lr_scheduler.LRScheduler
# Examples of one forward pass: bounds its memory, and changes no result.
CHUNK = 256


@numeric
def trajectory(
    problem: Problem,
    optimizer: torch.optim.Optimizer,
    steps: int,
    checkpoints: Sequence[int],
    *,
    batch_size: BatchSize = 64,
    seed: int = 0,
    scheduler: Scheduler | None = None,
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
        Over the parameters of `problem.model`: any of torch's, which is given a closure,
        or one whose ``step`` takes a batch, such as `NaturalGradient`.
    steps
        Number of minibatches in all.
    checkpoints
        Steps after which to yield; 0 is before training.
    batch_size
        Examples in a minibatch, at most the size of the training set, or a schedule
        from the number of the step, such as `ExponentialBatches`.
    seed
        Decides the order of the examples; the global generator is left alone.
    scheduler
        A ``torch.optim.lr_scheduler``, advanced after every step.
    progress
        Called with the number of every finished step.

    Raises
    ------
    ValueError
        If a checkpoint lies outside of 0 to `steps`, or `batch_size` is not positive.
    NumericalError
        If the loss is not finite, or a step of the optimiser fails; step and optimiser
        are named.

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
    batches = _minibatches(problem, batch_size, seed)
    numbered = enumerate(islice(batches, steps), start=1)
    after: list[Callable[[int], object]] = []
    if scheduler is not None:
        after.append(lambda _: scheduler.step())
    if progress is not None:
        after.append(progress)
    return _trained(problem, optimizer, numbered, set(checkpoints), after)


def _check(steps: int, checkpoints: Sequence[int], batch_size: BatchSize) -> None:
    outside = [step for step in checkpoints if not 0 <= step <= steps]
    if outside:
        raise ValueError(
            f"The checkpoints {outside} lie outside of the training, which goes from "
            f"step 0 to step {steps}."
        )
    if not callable(batch_size) and batch_size < 1:
        raise ValueError(f"A batch size of {batch_size} is not positive.")


def _trained(
    problem: Problem,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[int, Pair]],
    checkpoints: set[int],
    after: Sequence[Callable[[int], object]],
) -> Iterator[tuple[int, nn.Module]]:
    if 0 in checkpoints:
        yield 0, problem.model.eval()
    for step, batch in batches:
        take_step(problem, optimizer, batch, step)
        for call in after:
            call(step)
        if step in checkpoints:
            yield step, problem.model.eval()


@numeric
def take_step(problem: Problem, optimizer: Any, batch: Pair, step: int) -> float:
    """Let an optimiser take one step in training mode; return the loss before it.

    Where several processes are live, all are given the same batch, and each one computes
    with a part of it: replicas stay equal, and equal to one process.

    Parameters
    ----------
    problem
        Owner of model and likelihood.
    optimizer
        One whose ``step`` takes a batch is given the batch; any other is given a closure
        that computes the mean loss and its gradient.
    batch
        (x, y).
    step
        The number of the step, for errors.

    Raises
    ------
    ValueError
        If the labels do not fit the output.
    NumericalError
        If the loss is not finite, or the step fails; step and optimiser are named.
    RankError
        If several processes are given a batch of fewer examples.

    Examples
    --------
    >>> import fisherlab as fl
    >>> problem = fl.problems.load("digits")
    >>> adam = torch.optim.Adam(problem.model.parameters())
    >>> losses = [take_step(problem, adam, problem.train, step) for step in (1, 2)]
    >>> losses[1] < losses[0]
    True
    """
    problem.model.train()
    ranks = live()
    if ranks is not None:
        here = ranks.part(len(batch[0]))
        batch = batch[0][here], batch[1][here]
    if takes_batch(optimizer):
        try:
            loss = float(optimizer.step(batch=batch))
        except (NumericalError, ValueError) as error:
            error.add_note(f"This was step {step} of {_described(optimizer)}.")
            raise
        _require_finite(loss, optimizer, step)
        return loss

    def own() -> torch.Tensor:
        x, y = batch
        optimizer.zero_grad()
        with torch.enable_grad():
            output = problem.model(x)
            problem.likelihood.check(output, y)
            found = problem.likelihood.loss(output, y).mean()
        _require_finite(found.item(), optimizer, step)
        found.backward()
        return found.detach()

    def closure() -> torch.Tensor:
        if ranks is None:
            return own()
        return shared_gradients(ranks, problem.model, ranks.together(own), len(batch[0]))

    return float(optimizer.step(closure))


def takes_batch(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether the step of an optimiser is ``step(batch=...)``.

    Examples
    --------
    >>> takes_batch(torch.optim.SGD([torch.zeros(1)]))
    False
    """
    return "batch" in inspect.signature(optimizer.step).parameters


def _require_finite(loss: float, optimizer: torch.optim.Optimizer, step: int) -> None:
    if not math.isfinite(loss):
        raise NumericalError(
            f"The training loss is {loss} at step {step} of {_described(optimizer)}."
        )


def _described(optimizer: torch.optim.Optimizer) -> str:
    rate = optimizer.param_groups[0].get("lr")
    name = type(optimizer).__name__
    if rate is None:
        return name
    return f"{name} with the learning rate {float(rate):g}; a smaller one (--lr) may help"


def _minibatches(problem: Problem, batch_size: BatchSize, seed: int) -> Iterator[Pair]:
    x, y = problem.train
    order = Order(len(x), batch_size, seed)
    for step in itertools.count():
        here = order.indices(step).to(x.device)
        inputs = x[here]
        if problem.augment is not None:
            inputs = problem.augment(inputs, generator(seed, step))
        yield inputs, y[here]


class Performance(NamedTuple):
    """How well a network does on some examples.

    Attributes
    ----------
    loss
        The mean over the examples of the loss, summed over outputs, in nats.
    accuracy
        The fraction of the labels at which the output is largest; None but for classes,
        NaN where all labels are masked.
    """

    loss: float
    accuracy: float | None


@numeric
@torch.no_grad()
def performance(
    model: nn.Module, likelihood: Likelihood, data: Pair, at_once: int = CHUNK
) -> Performance:
    """Return mean loss and accuracy from one pass over the data, a chunk at a time.

    Chunks hold `at_once` examples: fewer where outputs are large.

    Raises
    ------
    ValueError
        If the labels do not fit the output.

    Examples
    --------
    >>> import fisherlab as fl
    >>> model = torch.nn.Identity()
    >>> performance(model, fl.Categorical(), (torch.eye(2), torch.tensor([0, 0]))).accuracy
    0.5
    """
    sums, hits, labels = [], 0, 0  # sequences have a label per position
    for output, y in _outputs(model, data, at_once):
        likelihood.check(output, y)
        sums.append(likelihood.loss(output, y).sum().item())
        if isinstance(likelihood, Categorical):
            axis = -1 if likelihood.class_axis is None else likelihood.class_axis
            hits += int((output.argmax(axis) == y).sum())
            labels += int((y != likelihood.ignore_index).sum())
    loss = math.fsum(sums) / len(data[0])
    if not isinstance(likelihood, Categorical):
        return Performance(loss, None)
    return Performance(loss, hits / labels if labels else math.nan)


def _outputs(model: nn.Module, data: Pair, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Give outputs and labels, a chunk of the examples at a time."""
    x, y = data
    for x_part, y_part in zip(x.split(at_once), y.split(at_once), strict=True):
        yield model(x_part), y_part


def mean_loss(model: nn.Module, likelihood: Likelihood, data: Pair) -> float:
    """Return the mean over the examples of the loss, summed over outputs, in nats.

    Raises
    ------
    ValueError
        If the labels do not fit the output.

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
    return performance(model, likelihood, data).loss


@numeric
def accuracy(
    model: nn.Module, data: Pair, class_axis: int | None = None, ignore_index: int = -100
) -> float:
    """Return the fraction of the labels at which the output is largest.

    The classes are in the last axis unless told, and labels that equal `ignore_index`
    are not counted, as in `Categorical`; NaN where no label is left.

    Examples
    --------
    >>> import torch
    >>> x = torch.eye(2)
    >>> accuracy(torch.nn.Identity(), (x, torch.tensor([0, 0])))
    0.5
    """
    likelihood = Categorical(ignore_index=ignore_index, class_axis=class_axis)
    found = performance(model, likelihood, data).accuracy
    return math.nan if found is None else found

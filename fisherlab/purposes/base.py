"""What a purpose is: what it asks of a matrix, and how two answers are held together.

A natural-gradient step, a Laplace posterior or an influence score asks another thing of
the Fisher matrix each. A purpose takes the answers of the exact block and of a method,
adds them up over the blocks of a network where that is asked, and says how far apart
they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from fisherlab.errors import BudgetError, DataError, IndefiniteError, NumericalError
from fisherlab.metrics.pairs import Pair
from fisherlab.samples import Samples
from fisherlab.statistics import LayerStatistics

# Tensors by name; under "why" the error that kept one of them from being had.
Answers = Mapping[str, Any]
EXAMPLES = "examples"  # the answer that says what every example adds to another one
TOGETHER: Final = 64  # weights that are solved for at once, at most
SOLVED_BYTES: Final = 2**28  # of these weights; a solve holds some six times as much


@final
@dataclass(frozen=True)
class Measure:
    """One number that a purpose gives, and how to read it.

    Parameters
    ----------
    name
        Of the coordinate in a table.
    title
        For figures and sentences.
    best
        The value of the exact block itself.
    unit
        "1" for a ratio, "nat" for divergences.
    assured
        What is known of it before anything is computed; empty where nothing is.
    settles
        For whom that decides who is best: how their `repr` begins.
    meaning
        What a reader is told of it, in a sentence.
    both_sides
        Whether methods lie on either side of the best, so that noise may change the side.

    Examples
    --------
    >>> measure = Measure("loss", "added loss", best=0.0, unit="nat")
    >>> measure.name, measure.best, measure.unit
    ('loss', 0.0, 'nat')
    """

    name: str
    title: str
    best: float
    unit: str = "1"
    assured: str = ""
    settles: tuple[str, ...] = ()
    meaning: str = ""
    both_sides: bool = False


@final
@dataclass(frozen=True)
class Demand:
    """What a purpose asks of every matrix, for what it costs to be counted beforehand.

    Parameters
    ----------
    dampings
        λ at which one weight is solved for.
    weights
        Further weights that are solved for.
    products, forms
        With the exact block, and quadratic forms of it.
    influences
        Whether the gradients of some examples are solved for with the exact block once,
        and the solutions multiplied by every matrix.
    traces, divergences
        Whether the inverse is held against that of the exact block as a whole, or each
        inverse against the other matrix alone.
    groups
        Whether groups of examples are held against the exact block as a whole once.
    flops
        Further multiply-adds for every matrix, e.g. of passes through the model.

    Examples
    --------
    >>> Demand(dampings=3, traces=True).products
    1
    """

    dampings: int = 1
    weights: int = 0
    products: int = 1
    traces: bool = False
    divergences: bool = False
    forms: int = 0
    influences: bool = False
    groups: bool = False
    flops: float = 0.0


@runtime_checkable
class Purpose(Protocol):
    """A use of the Fisher matrix.

    Attributes
    ----------
    name
        One word, the label in a table.
    measures
        What `measure` returns.

    Notes
    -----
    Some more are read where a purpose has them: `setting`, in words at which λ and the
    like it is judged; `demand(layer)`, what it costs; without it, one solve, one
    product and the traces of inverses are counted; and `influences(exact, approx)`, what
    every example of the exact block moves the first measure by, from which leads get
    their standard errors: the norm of the difference of two methods' influences. `noise`
    names what they are over, if not "examples"; `unheld` says why there are none.

    Examples
    --------
    >>> import fisherlab as fl
    >>> isinstance(fl.Matrix(), Purpose), fl.Matrix().name
    (True, 'matrix')
    """

    @property
    def name(self) -> str:
        """One word, the label in a table."""

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What `measure` returns, first what is ranked by."""

    def answers(self, layer: LayerStatistics, pair: Pair) -> Answers:
        """Return what one matrix answers about a block; F itself is the pair of F and F."""

    def joined(self, blocks: Sequence[Answers]) -> Answers:
        """Return the answers of a block-diagonal network from those of its blocks."""

    def measure(self, exact: Answers, approx: Answers) -> dict[str, float]:
        """Return the measures of a method beside the exact block."""


def solved_together(samples: Samples) -> int:
    """Return how many matrices of examples are solved for at once.

    Examples
    --------
    >>> from fisherlab.samples import OuterSamples
    >>> wide = OuterSamples(torch.ones(9, 5000), torch.ones(1, 9, 500))
    >>> solved_together(wide)
    13
    """
    o, i = samples.weight_shape
    return max(1, min(TOGETHER, SOLVED_BYTES // (8 * o * i)))


def summed(blocks: Sequence[Answers], *lists: str) -> Answers:
    """Add the answers of blocks; those named are put one after the other.

    Examples
    --------
    >>> one = {"trace": torch.ones(1), "step": torch.ones(2)}
    >>> {k: v.tolist() for k, v in summed([one, one], "step").items()}
    {'trace': [2.0], 'step': [1.0, 1.0, 1.0, 1.0]}
    """
    joined: dict[str, Tensor] = {}
    for name in blocks[0]:
        if name != "why" and _adds_up(blocks, name):
            parts = [block[name] for block in blocks]
            joined[name] = torch.cat(parts) if name in lists else torch.stack(parts).sum(0)
    return joined


def _adds_up(blocks: Sequence[Answers], name: str) -> bool:
    """Whether all blocks have an answer; of every example only if they are the same."""
    if name != EXAMPLES:
        return True
    return len({block[name].shape if name in block else None for block in blocks}) == 1


def of_block(purpose: str, what: str, given: Mapping[str, Any], block: str) -> Any:
    """Return what a purpose was given for a block.

    Raises
    ------
    DataError
        If it was given nothing for it.
    """
    if block not in given:
        raise DataError(
            f"{purpose}: no {what} of block {block!r} was given, but of "
            f"{', '.join(map(repr, given)) or 'none'}. Collect it for the same layers."
        )
    return given[block]


def weights_of(
    purpose: str, layer: LayerStatistics, tensors: Mapping[str, Tensor]
) -> Tensor:
    """Return w (d_out, d_in) in float64 from parameters by name.

    Raises
    ------
    DataError
        If a parameter of the block is missing.
    """
    try:
        return layer.pack(dict(tensors)).detach().to(torch.float64)
    except KeyError as error:
        raise DataError(
            f"{purpose}: the parameter {error} of block {layer.name!r} is missing; "
            "`dict(model.named_parameters())` has all."
        ) from error


def numbers(**asks: Callable[[], float]) -> dict[str, Any]:
    """Return numbers as answers; NaN, and why, where this form and size have none.

    Raises
    ------
    IndefiniteError
        If the matrix serves no purpose that inverts it.

    Examples
    --------
    >>> numbers(two=lambda: 2.0)
    {'two': tensor(2., dtype=torch.float64)}
    """
    found: dict[str, Any] = {}
    for name, ask in asks.items():
        value = math.nan
        try:
            value = float(ask())
        except IndefiniteError:
            raise
        except (ValueError, NumericalError, BudgetError) as error:
            found.setdefault("why", error)
        found[name] = torch.tensor(value, dtype=torch.float64)
    return found


def spearman(first: Tensor, second: Tensor) -> float:
    """Return the rank correlation of two lists; NaN where one is constant.

    Examples
    --------
    >>> round(spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 3.0, 4.0])), 12)
    1.0
    """
    return float(spearmans(first[None], second[None]))


def spearmans(first: Tensor, second: Tensor) -> Tensor:
    """Return the rank correlation of every row of two tables; NaN where one is constant.

    Examples
    --------
    >>> spearmans(torch.eye(2), torch.ones(2, 2))
    tensor([nan, nan], dtype=torch.float64)
    """
    from scipy.stats import rankdata

    tables = (x.detach().cpu().numpy() for x in (first, second))
    ranks = [torch.from_numpy(rankdata(table, axis=1)).double() for table in tables]
    one, other = (rank - rank.mean(1, keepdim=True) for rank in ranks)
    norms = one.norm(dim=1) * other.norm(dim=1)
    return torch.where(norms > 0, (one * other).sum(1) / norms, torch.nan)


def overlap(first: Tensor, second: Tensor, count: int) -> float:
    """Return the share of the `count` largest entries that two lists have in common.

    Examples
    --------
    >>> overlap(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([3.0, 0.0, 1.0]), 2)
    0.5
    """
    one, other = (set(x.topk(count).indices.tolist()) for x in (first, second))
    return len(one & other) / count

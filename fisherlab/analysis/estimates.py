"""Bytes and flops of a request, counted before anything large is allocated.

Layers are described by tensors without storage, so the counts are those of the samples
themselves. Flops are multiply-adds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any, Literal, final

import torch
from torch import nn

from fisherlab.analysis.costs import NEEDS_INPUTS, building_flops, result_numbers
from fisherlab.analysis.coverages import text_table
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.register import by_name
from fisherlab.errors import BudgetError
from fisherlab.layers import Block, blocks, select
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.memory import Budget, parse_budget, readable
from fisherlab.operators import FactoredFisher
from fisherlab.operators.base import html_table
from fisherlab.operators.factored import Form
from fisherlab.samples import MatrixSamples, OuterSamples, Samples, SharedSamples
from fisherlab.statistics import Exact, Fisher
from fisherlab.statistics.batches import batches
from fisherlab.statistics.model_view import ModelView, view
from fisherlab.statistics.probe import Probe, probe
from fisherlab.statistics.taps import Tapped

Route = Literal["packed GEMM", "per-example SYRK", "position pairs", "Gram"]
HEAD = (
    "layer",
    "approximator",
    "weight",
    "V",
    "T",
    "statistics",
    "result",
    "flops",
    "form",
)


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """What the statistics of one layer hold, and how its exact block is worked on.

    Parameters
    ----------
    layer
        Block name.
    samples
        The layer's samples, without storage.
    positions
        T, positions that share the weight (1 in per-example form).
    columns
        V pulled back; the samples may hold fewer.
    route
        Where second-order questions about the exact block are answered: a packed
        product or per-example gradients with a symmetric product (both form the dense
        block), or the Gram matrix of the samples.
    """

    layer: str
    samples: Samples
    positions: int
    columns: int
    route: Route

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.samples.weight_shape

    @property
    def statistics_bytes(self) -> int:
        """Bytes the statistics hold."""
        return self.samples.nbytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense exact block."""
        size = self.weight_shape[0] * self.weight_shape[1]
        return size * size * self.samples.dtype.itemsize

    @property
    def gram_bytes(self) -> int:
        """Bytes of the Gram matrix of all V·N samples."""
        size = self.samples.columns * self.samples.examples
        return size * size * self.samples.dtype.itemsize

    @property
    def dense_flops(self) -> int:
        """Multiply-adds that form the dense block."""
        return self.samples.dense_flops()

    @property
    def gram_flops(self) -> int:
        """Multiply-adds that form the Gram matrix."""
        return self.samples.gram_flops()

    @property
    def working_bytes(self) -> int:
        """Bytes of the matrix that the chosen route forms."""
        return self.gram_bytes if self.route == "Gram" else self.dense_bytes


@final
@dataclass(frozen=True)
class Cost:
    """One approximation of one layer.

    Parameters
    ----------
    layer, approximator
        Names.
    result_bytes, flops
        Bytes the operator holds besides the statistics, and multiply-adds to build it;
        NaN where it is not counted.
    note
        Why a number is missing, or the route of the exact block.
    """

    layer: str
    approximator: str
    result_bytes: float
    flops: float
    note: str


@final
@dataclass(frozen=True, eq=False, repr=False)
class Estimate:
    """The bill of a request, layer by layer.

    Parameters
    ----------
    examples
        N.
    plans
        Block name to its `Plan`.
    rows
        A `Cost` for every layer and approximator.
    exact
        Whether the exact block is among them, so that its matrix has to be formed.
    budget
        Bytes allowed.
    """

    examples: int
    plans: Mapping[str, Plan]
    rows: tuple[Cost, ...]
    exact: bool
    budget: int

    @property
    def statistics_bytes(self) -> int:
        """Bytes of all statistics."""
        return sum(plan.statistics_bytes for plan in self.plans.values())

    @property
    def result_bytes(self) -> int:
        """Bytes of all approximations that are counted."""
        counted = (row.result_bytes for row in self.rows)
        return int(sum(size for size in counted if not isnan(size)))

    @property
    def peak_bytes(self) -> int:
        """Statistics, results, and the largest matrix that an exact block forms."""
        working = max(plan.working_bytes for plan in self.plans.values())
        return self.statistics_bytes + self.result_bytes + working * self.exact

    @property
    def flops(self) -> float:
        """Multiply-adds of all rows that are counted."""
        return sum(row.flops for row in self.rows if not isnan(row.flops))

    def __repr__(self) -> str:
        """Return a plain-text table with the totals on top."""
        return f"{self._summary}\n{text_table(HEAD, map(self._cells, self.rows))}"

    def _repr_html_(self) -> str:
        """Return a folding table for notebooks."""
        shown = {
            f"{row.layer} · {row.approximator}": " · ".join(self._cells(row)[2:])
            for row in self.rows
        }
        return html_table(self._summary, shown)

    @property
    def _summary(self) -> str:
        return (
            f"N={self.examples}: statistics {readable(self.statistics_bytes)}, results "
            f"{readable(self.result_bytes)}, peak {readable(self.peak_bytes)} of "
            f"{readable(self.budget)}; {self.flops:.3g} multiply-adds"
        )

    def _cells(self, row: Cost) -> list[str]:
        plan = self.plans[row.layer]
        o, i = plan.weight_shape
        counted = not isnan(row.result_bytes)
        return [
            row.layer,
            row.approximator,
            f"{o}×{i}",
            str(plan.samples.columns),
            str(plan.positions),
            readable(plan.statistics_bytes),
            readable(row.result_bytes) if counted else "-",
            f"{row.flops:.3g}" if counted else "-",
            row.note,
        ]


def estimate(
    model: nn.Module,
    batch: Any,
    likelihood: Likelihood,
    approximators: Sequence[str] | Mapping[str, Approximator] | None = None,
    fisher: Fisher | None = None,
    budget: Budget = None,
    *,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Estimate:
    """Count bytes and flops of a request from two examples, and refuse what cannot fit.

    Parameters
    ----------
    model, likelihood, fisher, layers, dtype
        As in `collect`.
    batch
        The data of `collect`: (x, y) or an iterable of pairs.
    approximators
        Names, or a mapping of names to values; all named ones by default.
    budget
        Bytes for everything, a number or "4 GiB"; half of the free memory by default.

    Returns
    -------
    Estimate
        With `rows`, `plans`, totals, and a table as its repr.

    Raises
    ------
    BudgetError
        With the bytes, the budget, and the forms that would fit.
    ValueError, UnsupportedModelError
        As `collect`.

    Examples
    --------
    >>> from fisherlab.likelihoods import Categorical
    >>> data = (torch.zeros(100, 4), None)
    >>> found = estimate(nn.Linear(4, 3), data, Categorical(), ["exact", "kfac"])
    >>> found.plans["weight"].route, found.statistics_bytes
    ('packed GEMM', 4400)
    """
    chosen = by_name(approximators)
    plans, examples = _plans(model, batch, likelihood, fisher, layers, dtype)
    rows = tuple(
        _cost(plan, name, method)
        for plan in plans.values()
        for name, method in chosen.items()
    )
    exact = any(isinstance(method, ExactBlock) for method in chosen.values())
    found = Estimate(examples, plans, rows, exact, parse_budget(budget))
    _require_fit(found)
    return found


def _plans(
    model: nn.Module,
    batch: Any,
    likelihood: Likelihood,
    fisher: Fisher | None,
    layers: Sequence[str] | None,
    dtype: torch.dtype | None,
) -> tuple[dict[str, Plan], int]:
    seen = view(model, dtype)
    found = select(blocks(model), layers)
    probes: dict[Any, Probe] = {}
    examples = 0
    for part in batches(batch, seen.device, seen.dtype):
        examples += len(part)
        if part.signature not in probes:
            probes[part.signature] = probe(seen, found, part)
    longest = max(probes.values(), key=lambda p: p.output.numel())
    columns = (fisher or Exact()).column_count(likelihood, longest.output)
    plans = {
        name: _plan(seen, block, longest, examples, columns)
        for name, block in found.items()
    }
    return plans, examples


def _plan(seen: ModelView, block: Block, found: Probe, n: int, columns: int) -> Plan:
    tap = found.tapped.get(block.name)
    positions = 1 if tap is None else _positions(tap)
    samples = _samples(seen.dtype, block, tap is not None, n, columns, positions)
    return Plan(block.name, samples, positions, columns, _route(samples, "auto"))


def _positions(tap: Tapped) -> int:
    """Return T, summed over the calls of the modules."""
    outputs = (torch.empty(1, 1, *shape, device="meta") for shape in tap.outputs)
    return sum(tap.form.gradients(output).shape[2] for output in outputs)


def _samples(
    dtype: torch.dtype, block: Block, shared: bool, n: int, columns: int, positions: int
) -> Samples:
    """Return the samples that `collect` would hold, without storage."""
    o, i = block.weight_shape

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    if not shared:
        return MatrixSamples(empty(columns, n, o, i))
    if positions == 1:
        return OuterSamples(empty(n, i), empty(min(columns, o), n, o))
    return SharedSamples(empty(n, positions, i), empty(columns, n, positions, o))


def _route(samples: Samples, form: Form) -> Route:
    if FactoredFisher(samples, samples.examples, form=form).uses_gram:
        return "Gram"
    if isinstance(samples, OuterSamples):
        return "packed GEMM"
    if not isinstance(samples, SharedSamples) or form == "matrices":
        return "per-example SYRK"
    pairs = form == "pairs" or samples.pairs_are_cheaper
    return "position pairs" if pairs else "per-example SYRK"


def _cost(plan: Plan, name: str, method: Approximator) -> Cost:
    if isinstance(method, ExactBlock):
        route = _route(plan.samples, method.form)
        flops = plan.gram_flops if route == "Gram" else plan.dense_flops
        return Cost(plan.layer, name, 0.0, float(flops), route)
    numbers = result_numbers(method, plan.samples)
    work = building_flops(method, plan.samples)
    if numbers is None or work is None:
        shared = not isinstance(plan.samples, MatrixSamples)
        needs = isinstance(method, NEEDS_INPUTS) and not shared
        note = "needs the shared form" if needs else "not counted"
        return Cost(plan.layer, name, nan, nan, note)
    size = float(numbers * plan.samples.dtype.itemsize)
    return Cost(plan.layer, name, size, float(work), "")


def _require_fit(found: Estimate) -> None:
    if found.peak_bytes <= found.budget:
        return
    fits = [f"{what} ({readable(size)})" for what, size in _smaller(found)]
    remedy = f"These would fit: {'; '.join(fits)}." if fits else "Use fewer examples."
    raise BudgetError(
        f"The request needs {readable(found.peak_bytes)} ({found.peak_bytes} bytes), more "
        f"than the budget of {readable(found.budget)} ({found.budget} bytes): statistics "
        f"{readable(found.statistics_bytes)}, results {readable(found.result_bytes)}. "
        f"{remedy}"
    )


def _smaller(found: Estimate) -> list[tuple[str, int]]:
    """Return forms of the request that fit, with their bytes."""
    plans, base = found.plans.values(), found.statistics_bytes + found.result_bytes
    columns = max(plan.samples.columns for plan in plans)
    single = sum(plan.statistics_bytes // plan.samples.columns for plan in plans)
    forms = {
        "the exact block in dense form": base + max(p.dense_bytes for p in plans),
        "the exact block in gram form": base + max(p.gram_bytes for p in plans),
        "products with the factored exact block": base,
        "fisherlab.approximate without the exact block": found.result_bytes,
    }
    if columns > 1:
        forms["about that much with MonteCarlo(1)"] = single + found.result_bytes
    return [(what, size) for what, size in forms.items() if size <= found.budget]

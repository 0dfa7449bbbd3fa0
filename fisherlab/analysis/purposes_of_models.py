"""Purposes judged straight from a model: layers are collected, asked and freed in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from fisherlab.analysis.allowances import Allowance
from fisherlab.analysis.cells import located, reason
from fisherlab.analysis.layer_schedule import Schedule
from fisherlab.analysis.layerwise import Source
from fisherlab.analysis.progress import Telling, teller
from fisherlab.analysis.purpose_table import Answered, table
from fisherlab.analysis.purposes import answered, each_once, told
from fisherlab.approximators import Approximator
from fisherlab.errors import BudgetError
from fisherlab.purposes import Purpose


def judge_model(
    source: Source,
    methods: Mapping[str, Approximator],
    purposes: Sequence[Purpose],
    limit: int,
    progress: Telling = False,
) -> xr.Dataset:
    """Return the table of `judge` without the statistics of all layers at once.

    Parameters
    ----------
    source
        Model and data.
    methods, purposes
        As for `judge`.
    limit
        Bytes for statistics and what is formed of them; a layer that does not fit has the
        bytes in its status. What the layers answer is kept beside it.
    progress
        As for `compare`.
    """
    asked = each_once(purposes)
    plan = Schedule.of(*source.plans(limit), methods, limit, False)
    found, tell = Answered(), teller(progress, len(plan.plans))
    refused = dict(plan.refused)
    for group in plan.groups:
        for some, one in _answered(source, group, methods, asked, limit):
            if isinstance(one, Answered):
                found.add(one)
            else:
                refused |= dict.fromkeys(some, f"not served: {reason(one)}")
            for name in some:
                tell(name)
    for name, why in refused.items():
        found.reasons.update({(name, m, p): why for m in methods for p in asked})
    for name in plan.refused:
        tell(name)
    rows = {
        name: (*one.weight_shape, one.positions, one.kind)
        for name, one in plan.plans.items()
    }
    made = source.attributes(plan, methods, **told(asked)) | {"budget_bytes": limit}
    return table(found, methods, asked, located(rows), made)


def _answered(
    source: Source,
    group: Sequence[str],
    methods: Mapping[str, Approximator],
    purposes: Mapping[str, Purpose],
    limit: int,
) -> Iterator[tuple[Sequence[str], Answered | Exception]]:
    """Yield what layers answer, one by one where they do not fit together."""
    try:
        stats = source.collected(group, limit)
    except (BudgetError, MemoryError) as error:
        if len(group) == 1:
            yield group, error
            return
        for name in group:
            yield from _answered(source, [name], methods, purposes, limit)
    else:
        yield group, answered(stats, methods, purposes, Allowance.of(None, limit))

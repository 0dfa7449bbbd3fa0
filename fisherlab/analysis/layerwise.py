"""Comparisons straight from a model: layers are collected, measured and freed in turn.

Rows that are done may lie on disk, from which a comparison goes on where it was stopped.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from fisherlab.analysis.allowances import Schedule
from fisherlab.analysis.cells import (
    REFUSALS,
    located,
    made_of,
    reason,
    say_complete,
    teller,
)
from fisherlab.analysis.cost import Collection, Plan, Probed
from fisherlab.analysis.executors import Workers, filled, told
from fisherlab.analysis.files import merge, save
from fisherlab.analysis.files import open as opened
from fisherlab.approximators.ranks import everyones, require_same_weights
from fisherlab.codes import checksum, codes, described
from fisherlab.errors import BudgetError, StoreError
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.devices import tensors
from fisherlab.numerics.ranks import Ranks, dealt, live
from fisherlab.operators.base import Provenance
from fisherlab.statistics import (
    Exact,
    Fisher,
    MeanGradient,
    MonteCarlo,
    Statistics,
    collect,
    mean_gradient,
)
from fisherlab.statistics.batches import Repeated
from fisherlab.statistics.probe import Probe
from fisherlab.statistics.storing import batches_of, identity


def joined(rows: Sequence[xr.Dataset]) -> xr.Dataset:
    """Return one table of all rows."""
    found = rows[0].copy() if len(rows) == 1 else merge(rows)
    for name in ("merged_from", "refused"):
        found.attrs.pop(name, None)
    found.attrs["created_at"] = rows[0].attrs["created_at"]
    return found


@final
@dataclass(frozen=True, eq=False)
class Store:
    """Rows that are done, on disk after every layer.

    Parameters
    ----------
    path
        The file, None for none.
    request
        What the rows are an answer to.
    rows
        Those found there, by layer.
    """

    path: Path | None
    request: str
    rows: Mapping[str, xr.Dataset]

    @classmethod
    def of(
        cls, path: str | os.PathLike[str] | None, told: Callable[[], Mapping[str, str]]
    ) -> "Store":
        """Open a store, and take what is done from it.

        Raises
        ------
        StoreError
            If it is an answer to another request; what differs is named.
        """
        if path is None:
            return cls(None, "", {})
        file, request = Path(path), told()
        text = json.dumps(request, sort_keys=True)
        return cls(file, text, _done(file, request) if file.exists() else {})

    @property
    def attrs(self) -> dict[str, str]:
        """What is written beside the rows."""
        return {"request": self.request} if self.path else {}

    def write(self, rows: Sequence[xr.Dataset]) -> None:
        """Write the rows that are done; a refusal is tried again the next time."""
        done = [row for row in rows if "refused" not in row.attrs]
        if self.path is not None and done:
            self.finish(joined(done).assign_attrs(self.attrs))

    def finish(self, ds: xr.Dataset) -> None:
        """Write a table, whole or not at all."""
        if self.path is not None:
            save(ds, self.path)


def _done(file: Path, request: Mapping[str, str]) -> dict[str, xr.Dataset]:
    ds = opened(file)
    known = json.loads(str(ds.attrs.get("request", "{}")))
    other = [name for name in request if known.get(name) != request[name]]
    if other or not isinstance(ds, xr.Dataset):
        raise StoreError(
            f"compare: {file} holds another comparison: {', '.join(other)} differ. Give "
            "another store, or the request that it was made for."
        )
    ds.attrs.pop("foretold_bytes", None)
    ds.attrs.pop("budget_bytes", None)
    served = (~ds["status"].astype(str).str.startswith("not served")).all("approximator")
    return {
        str(name): ds.sel(layer=[name])
        for name, good in zip(ds["layer"].values, served.values, strict=True)
        if good
    }


Gradients = Mapping[str, Any] | None
Measure = Callable[[Statistics, Gradients, int], xr.Dataset]


@final
@dataclass(frozen=True, eq=False)
class Source:
    """Where statistics come from: the arguments of `collect`.

    Parameters
    ----------
    model, data, likelihood, fisher, layers, dtype
        As in `collect`.
    ranks
        The processes whose data these are, where there are several.
    """

    model: nn.Module
    data: Any
    likelihood: Likelihood
    fisher: Fisher
    layers: Sequence[str] | None
    dtype: torch.dtype | None
    ranks: Ranks | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: Any,
        likelihood: Likelihood,
        fisher: Fisher | None,
        layers: Sequence[str] | None,
        dtype: torch.dtype | None,
        group: Any = None,
    ) -> "Source":
        """Return the source; data that are iterated are checked to repeat.

        Where several processes are live, the data are those of all of them.
        """
        labels, ranks = fisher or Exact(), live(group)
        if ranks is not None:
            require_same_weights(ranks, model)
            data = everyones(ranks, data)
        if not isinstance(data, (tuple, Tensor, Mapping)):
            data = Repeated(data, ordered=isinstance(labels, MonteCarlo))
        return cls(model, data, likelihood, labels, layers, dtype, ranks)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters(), torch.empty(0)).device

    @property
    def labelled(self) -> bool:
        """Whether the data have labels."""
        return next(batches_of(self.model, self.data)).y is not None

    @cached_property
    def probed(self) -> Probed:
        """What two examples tell of the model, found out once."""
        return Probed.of(self.model, self.data, self.likelihood, self.layers, self.dtype)

    @cached_property
    def probes(self) -> dict[Any, Probe]:
        """What every group of layers is collected with, looked into once."""
        return self.probed.known()

    def plans(self, limit: int) -> tuple[dict[str, Plan], Collection]:
        """Return what the layers hold, and what collecting takes."""
        return self.probed.plans(self.fisher, limit)

    def collected(self, layers: Sequence[str], budget: int) -> Statistics:
        """Return the statistics of some layers."""
        return collect(
            self.model,
            self.data,
            self.likelihood,
            self.fisher,
            layers=layers,
            dtype=self.dtype,
            budget=budget,
            probes={key: one.only(layers) for key, one in self.probes.items()},
        )

    def gradients(self, layers: Sequence[str]) -> dict[str, MeanGradient]:
        """Return the gradient of the mean loss at the data's labels."""
        return mean_gradient(
            self.model, self.data, self.likelihood, layers=layers, dtype=self.dtype
        )

    def attributes(
        self, plan: Schedule, methods: Mapping[str, Any], **more: str
    ) -> dict[str, Any]:
        """Return what a table says of its making, before anything is collected."""
        made = Provenance.of(self.fisher, self.likelihood, plan.collection.examples)
        dtype = next(iter(plan.plans.values())).samples.dtype
        return dict(made_of(made, dtype, self.device, methods, **more))

    def identity(self) -> dict[str, str]:
        """Return what tells this source from others: numbers, settings and code."""
        return identity(
            self.model, self.data, self.likelihood, self.fisher, dtype=self.dtype
        )


@final
@dataclass(frozen=True, eq=False)
class Request:
    """What is asked of every layer.

    Parameters
    ----------
    source
        Model and data.
    methods
        Approximators by name.
    measure
        From the statistics and gradients of one layer, and bytes, to a row of the table.
    along
        Whether rows need gradients; where none are given, they are those of the data.
    gradient
        Those given.
    limit
        Bytes for everything.
    kind
        That of the dampings.
    told
        What tells requests apart, beside the source and the methods.
    """

    source: Source
    methods: Mapping[str, Any]
    measure: Measure
    along: bool
    gradient: Gradients
    limit: int
    kind: str
    told: Mapping[str, Any]

    def measured(
        self, group: Sequence[str], plan: Schedule
    ) -> Iterator[tuple[str, xr.Dataset]]:
        """Yield the rows of some layers, whose statistics are freed one by one."""
        try:
            found = self.source.collected(group, self.limit)
            along = self._gradients(group)
        except (BudgetError, MemoryError) as error:
            if len(group) == 1:
                yield group[0], self.refusal(plan, group[0], f"not served: {reason(error)}")
            else:
                for name in group:
                    yield from self.measured([name], plan)
            return
        made, layers = found.provenance, dict(found)
        del found
        for name in group:
            one = Statistics({name: layers.pop(name)}, made)
            own = None if along is None else {name: along[name]}
            try:
                row = self.measure(one, own, self.limit)
            except REFUSALS as error:
                if isinstance(error, ValueError):  # the request itself is wrong
                    raise
                row = self.refusal(plan, name, f"not served: {reason(error)}")
            del one
            yield name, row

    def identity(self) -> dict[str, str]:
        """Return what tells this comparison from others: numbers, settings and code."""
        asked = dict(self.told)
        metrics = asked["metrics"]
        metrics = [*metrics.items()] if isinstance(metrics, Mapping) else metrics
        asked["gradient"] = checksum(*tensors(asked["gradient"]))
        return {
            **self.source.identity(),
            **{name: described(value) for name, value in asked.items()},
            **told(self.methods),
            **codes(metrics=metrics),
        }

    def _gradients(self, group: Sequence[str]) -> Gradients:
        if not self.along:
            return None
        return self.gradient or self.source.gradients(group)

    def refusal(self, plan: Schedule, name: str, why: str) -> xr.Dataset:
        """Return the row of a layer that is not served, with the reason as its status."""
        one, listed = plan.plans[name], list(self.methods)
        dims = ("layer", "approximator")
        texts = {
            key: (dims, np.full((1, len(listed)), text, dtype=object))
            for key, text in (("floored", ""), ("status", why))
        }
        coords = located({name: (*one.weight_shape, one.positions, one.kind)})
        attrs = self.source.attributes(plan, self.methods, analysis="compare")
        more = {"damping_kind": self.kind, "refused": 1}
        return xr.Dataset(texts, {**coords, "approximator": listed}, attrs | more)


def compare_layers(
    request: Request,
    store: str | os.PathLike[str] | None,
    progress: Any,
    executor: Workers = None,
) -> xr.Dataset:
    """Collect, measure and free the layers of a model, as many at once as fit.

    Raises
    ------
    ValueError
        If an executor is given where a process group is live.
    StoreError
        If the store holds another comparison.
    """
    source, ranks = request.source, request.source.ranks
    if executor is not None and ranks is not None:
        raise ValueError(
            f"compare: executor= was given, but the layers are dealt to {ranks.size} "
            "processes of a group already. Leave one of them out."
        )
    planned = source.plans(request.limit)
    plan = Schedule.of(*planned, request.methods, request.limit, request.along)
    kept = Store.of(store, request.identity)
    rows = {name: row for name, row in kept.rows.items() if name in plan.plans}
    if ranks is not None:  # the store is that of the first
        rows = ranks.gathered(rows)[0]
    tell = teller(progress, len(plan.plans))
    for name in rows:
        tell(name)
    if store is not None and len(rows) == len(plan.plans):
        say_complete(progress, "compare", f"{len(rows)} layers in {store}")
    groups = plan.groups
    if executor is not None:  # each of whose workers collects a layer by itself
        groups = (tuple(name for group in groups for name in group),)
    for group in groups:
        left = [name for name in group if name not in rows]
        for name, row in _shared(request, left, plan, executor) if left else ():
            rows[name] = row
            kept.write([rows[n] for n in plan.plans if n in rows])
            tell(name)
    for name in plan.refused:
        if name not in rows:
            rows[name] = request.refusal(plan, name, plan.refused[name])
            tell(name)
    ds = joined([rows[name] for name in plan.plans])
    ds.attrs |= {"budget_bytes": request.limit, "foretold_bytes": plan.peak, **kept.attrs}
    kept.finish(ds)
    return ds


def _shared(
    request: Request, names: Sequence[str], plan: Schedule, executor: Workers
) -> Iterator[tuple[str, xr.Dataset]]:
    """Yield the rows of layers; several processes measure some each."""
    ranks = request.source.ranks
    if executor is not None:
        bare = replace(request, source=replace(request.source))  # without what is cached
        cells = {name: partial(_alone, bare, name, plan) for name in names}
        yield from filled("compare", cells, executor)
        return
    if ranks is None:
        yield from request.measured(names, plan)
        return
    costs = {name: plan.plans[name].samples.dense_flops() for name in names}
    own = dealt(costs, ranks.size)[ranks.rank]
    rows = ranks.together(lambda: dict(request.measured(own, plan) if own else ()))
    found = {name: row for part in ranks.gathered(rows) for name, row in part.items()}
    yield from ((name, found[name]) for name in names)


def _alone(request: Request, name: str, plan: Schedule) -> xr.Dataset:
    """Return the row of one layer, wherever this is called."""
    return dict(request.measured([name], plan))[name]

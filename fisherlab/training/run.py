"""One training between its steps: what it has done, found and still has to write."""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import xarray as xr

from fisherlab.analysis.files import join_steps
from fisherlab.numerics.devices import generator, own_randomness
from fisherlab.numerics.ranks import live
from fisherlab.problems.problem import Problem
from fisherlab.training.loop import take_step
from fisherlab.training.probes import Moment, Tracker
from fisherlab.training.schedules import BatchSize, Order
from fisherlab.training.serialise import moved
from fisherlab.training.store import Checkpoint, Store, restore

Scheduler = torch.optim.lr_scheduler.LRScheduler


class Run:
    """Take steps, look at moments, and keep both on a disk.

    Parameters
    ----------
    problem, optimizer, scheduler
        What is trained, and by what.
    probes
        What is measured.
    wanted
        The steps at which to measure.
    batch_size, seed
        Of the minibatches.
    store
        Where results and checkpoints go, if anywhere.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler | None,
        probes: Sequence[Any],
        wanted: Collection[int],
        batch_size: BatchSize,
        seed: int,
        store: Store | None,
    ) -> None:
        self.problem, self.optimizer, self.scheduler = problem, optimizer, scheduler
        self.probes, self.wanted, self.seed = probes, wanted, seed
        self.order = Order(len(problem.train[0]), batch_size, seed)
        self.device = next(problem.model.parameters()).device
        self.step, self.seconds = 0, 0.0
        self.loss_sum, self.loss_count = 0.0, 0
        self.memories: dict[int, Any] = {}
        self.rows: list[xr.Dataset] = []
        self.attributes: dict[str, Any] = {}  # of every result
        self.store = store
        self._written = 0  # rows that are in the store
        self._seen = 0  # rows that all processes have
        self._saved: int | None = None  # the step of the last checkpoint
        self._saved_at = time.monotonic()

    def resume(self, checkpoint: Checkpoint, results: xr.Dataset) -> None:
        """Take over what a store holds."""
        restore(checkpoint, self.problem.model, self.optimizer, self.scheduler)
        self.step, self.seconds = checkpoint.step, checkpoint.seconds
        self.loss_sum, self.loss_count = checkpoint.losses
        self.memories = dict(checkpoint.memories)
        if any(t.device.type != self.device.type for t in checkpoint.model.values()):
            self.memories = moved(self.memories, self.device)
        self.rows = [results.isel(step=[k]) for k in range(results.sizes.get("step", 0))]
        self._written = self._seen = len(self.rows)
        self._saved = self.step

    @property
    def fresh(self) -> bool:
        """Whether step 0 has not been looked at."""
        return self.step == 0 and self._saved is None

    @property
    def results(self) -> xr.Dataset:
        """All that was measured so far; empty where nothing was."""
        return join_steps(self.rows) if self.rows else xr.Dataset()

    @property
    def measured(self) -> tuple[int, ...]:
        """The steps at which something was measured."""
        return tuple(int(row["step"][0]) for row in self.rows)

    def advance(self) -> float:
        """Take one step and return the loss of its minibatch."""
        started, ranks = time.perf_counter(), live()
        # What the model draws itself belongs to this rank's part of the batch.
        drawn = self.seed if ranks is None else self.seed + 10**6 * ranks.rank
        with own_randomness(drawn, self.step, self.device):
            x, y = self._batch()
            if self.problem.augment is not None:
                x = self.problem.augment(x, generator(self.seed, self.step))
            loss = take_step(self.problem, self.optimizer, (x, y), self.step + 1)
        if self.scheduler is not None:
            self.scheduler.step()
        self.seconds += time.perf_counter() - started
        self.step += 1
        self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
        return loss

    def look(self) -> bool:
        """Let trackers see the iterate; measure where it is wanted, and tell so.

        The first of several processes does, for all of them.
        """
        ranks = live()
        if ranks is None:
            return self._look()
        told = ranks.of_first(lambda: (self._look(), self.rows[self._seen :]))
        looked, rows = told
        if ranks.rank:
            self.problem.model.eval()
            self.rows += rows
        self._seen = len(self.rows)
        return looked

    def _look(self) -> bool:
        wanted = self.step in self.wanted
        trackers = any(isinstance(probe, Tracker) for probe in self.probes)
        if not (wanted or trackers):
            return False
        started = time.perf_counter()
        self.problem.model.eval()
        moment = Moment(self.problem, self.optimizer, self.step, self._batch(), self.seed)
        with own_randomness(self.seed, self.step, self.device):
            for place, probe in enumerate(self.probes):
                if isinstance(probe, Tracker):
                    before = self.memories.get(place)
                    self.memories[place] = probe.observe(before, moment)
            if wanted:
                found = [self._measure(place, moment) for place in range(len(self.probes))]
                row = joined(found, [repr(probe) for probe in self.probes])
                self._add(row, time.perf_counter() - started)
        return wanted

    def save(self) -> None:
        """Write new results, then a checkpoint."""
        if self.store is None or self._saved == self.step:
            return
        self.write_rows()
        self.store.write_checkpoint(
            Checkpoint(
                self.step,
                self.problem.model.state_dict(),
                self.optimizer.state_dict(),
                None if self.scheduler is None else self.scheduler.state_dict(),
                self.memories,
                self.seconds,
                (self.loss_sum, self.loss_count),
                self.measured,
            )
        )
        self._saved, self._saved_at = self.step, time.monotonic()

    def save_if_due(self, every: float) -> None:
        """Save if the last checkpoint is so many seconds old."""
        if time.monotonic() - self._saved_at >= every:
            self.save()

    def write_rows(self) -> None:
        """Write the results that are not in the store."""
        new = self.rows[self._written :]
        if self.store is not None and new:
            self.store.write_rows(join_steps(new))
            self._written = len(self.rows)

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.problem.train
        indices = self.order.indices(self.step).to(x.device)
        return x[indices], y[indices]

    def _measure(self, place: int, moment: Moment) -> xr.Dataset:
        probe = self.probes[place]
        if isinstance(probe, Tracker):
            return probe.measure(self.memories[place], moment)
        found = probe(moment)
        if not isinstance(found, xr.Dataset):
            raise TypeError(
                f"The probe {probe!r} returned a {type(found).__name__}; an "
                "xarray.Dataset is expected."
            )
        return found

    def _add(self, row: xr.Dataset, probing: float) -> None:
        """Label the results with their step and add what the run itself knows."""
        mean = self.loss_sum / self.loss_count if self.loss_count else float("nan")
        self.loss_sum, self.loss_count = 0.0, 0
        own = {
            "batch_loss": (mean, "mean minibatch loss since the moment before", "nat"),
            "seconds": (self.seconds, "time spent in training steps", "s"),
            "probe_seconds": (probing, "time spent in measuring", "s"),
        }
        row = row.assign(
            {
                name: xr.DataArray(value, attrs={"long_name": text, "units": unit})
                for name, (value, text, unit) in own.items()
            }
        )
        labelled = row.expand_dims(step=[self.step])
        labelled.attrs |= self.attributes
        labelled["step"].attrs = {"long_name": "training step", "units": "1"}
        self.rows.append(labelled)


def joined(found: Sequence[xr.Dataset], names: Sequence[str]) -> xr.Dataset:
    """Join what the probes of one moment gave; labels keep the order they come in.

    Raises
    ------
    ValueError
        If two probes give one variable.

    Examples
    --------
    >>> one = xr.Dataset({"a": ("layer", [1.0])}, {"layer": ["fc2"]})
    >>> two = xr.Dataset({"b": ("layer", [2.0, 3.0])}, {"layer": ["fc2", "fc1"]})
    >>> joined([one, two], ["one", "two"]).layer.values.tolist()
    ['fc2', 'fc1']
    """
    givers: dict[str, str] = {}
    labels: dict[str, list[Any]] = {}
    for ds, name in zip(found, names, strict=True):
        for variable in map(str, ds.data_vars):
            if variable in givers:
                raise ValueError(
                    f"The probes {givers[variable]} and {name} both give {variable!r}; "
                    "one of them has to rename it."
                )
            givers[variable] = name
        for dim in map(str, ds.dims):
            if dim in ds.indexes:
                known = labels.setdefault(dim, [])
                known += [x for x in ds.indexes[dim].tolist() if x not in known]
    aligned = [_aligned(ds, labels) for ds in found]
    return xr.merge(
        aligned, join="exact", compat="no_conflicts", combine_attrs="drop_conflicts"
    )


def _aligned(ds: xr.Dataset, labels: Mapping[str, list[Any]]) -> xr.Dataset:
    """Give a Dataset all labels: NaN and empty texts where it has no value."""
    texts = {n: v.astype(str) for n, v in ds.data_vars.items() if v.dtype.kind in "OU"}
    wanted = {dim: labels[dim] for dim in map(str, ds.dims) if dim in labels}
    filled = ds.drop_vars(texts).reindex(wanted)
    return filled.assign(
        {name: text.reindex(wanted, fill_value="") for name, text in texts.items()}
    )

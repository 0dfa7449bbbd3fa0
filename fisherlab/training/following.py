"""Train with any optimiser and measure at chosen steps, on a disk if wished."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
import xarray as xr

from fisherlab.analysis.cells import say_complete
from fisherlab.numerics.devices import one_order
from fisherlab.numerics.ranks import live
from fisherlab.problems.problem import Problem
from fisherlab.settings import numeric, put_back
from fisherlab.training.one_graph import require_replicas
from fisherlab.training.probes import Losses, Probe, Tracker
from fisherlab.training.register import optimizer as by_name
from fisherlab.training.run import Run, Scheduler
from fisherlab.training.schedules import BatchSize, Every, LogarithmicSteps, moments
from fisherlab.training.store import (
    Checkpoint,
    Settings,
    Store,
    differences,
    session,
    settings,
)

Optimizer = torch.optim.Optimizer
MakeOptimizer = str | Optimizer | Callable[[Problem], Optimizer]
Callback = Callable[[xr.Dataset], object]
_LOSSES: Final = (Losses(),)
_MOMENTS: Final = LogarithmicSteps()


@numeric
def follow(
    problem: Problem,
    optimizer: MakeOptimizer = "sgd-momentum",
    *,
    steps: int = 1000,
    seconds: float | None = None,
    probes: Sequence[Probe | Tracker] = _LOSSES,
    every: Every = _MOMENTS,
    batch_size: BatchSize = 64,
    seed: int = 0,
    scheduler: Callable[[Optimizer], Scheduler] | None = None,
    store: str | Path | None = None,
    resume: bool = True,
    checkpoint_seconds: float = 60.0,
    deterministic: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
) -> xr.Dataset:
    """Train a problem's model in place and measure along the way.

    The first Ctrl-C lets the step be finished, saves everything and raises
    KeyboardInterrupt; called again with the same store, the training goes on with the
    same numbers as if it had not stopped, bit for bit on the same device. So it does
    from the last checkpoint after a crash.

    Where a process group of ``torch.distributed`` is live, all its ranks are given the
    same arguments: every batch is shared out, the first rank measures and writes the
    store, and all return the same results. Another number of ranks may go on. A probe
    may take no longer than the group's time-out.

    Parameters
    ----------
    problem
        Model, likelihood and data.
    optimizer
        A name (see `fl.optimizers()`), an optimiser over the model's parameters, or a
        function from the problem to one.
    steps
        Steps in all. A finished run can be gone on with by a larger number.
    seconds
        End before all steps are taken once so much time was spent in them (`seconds` of
        the result), whatever the measuring takes; the last iterate is measured.
    probes
        What is measured: values of `fl.probes`, or functions of a `Moment` that return
        a Dataset.
    every
        When: every so many steps, a sequence of steps, `fl.LinearSteps(20)`,
        `fl.LogarithmicSteps(20)`.
    batch_size, seed
        Of the minibatches, drawn without replacement; the size may be a function of the
        step, such as `ExponentialBatches`. The seed also decides what the
        model draws itself (dropout); the global generator is left alone.
    scheduler
        A function from the optimiser to a scheduler of torch, stepped after every step.
    store
        A folder for results and checkpoints; without it nothing is written.
    resume
        Whether to go on with what the store holds.
    checkpoint_seconds
        The time between two checkpoints; 0 writes one after every step.
    deterministic
        Whether torch may take only algorithms that give the same bits every time; needed
        on a GPU to go on bit for bit, and slower there.
    progress
        Whether to show a bar with the loss and the time left.
    callback
        Called with the results so far after every moment, such as `fl.plots.Live()`, which
        redraws a figure of them.

    Returns
    -------
    xarray.Dataset
        The variables of the probes over `step`, and `batch_loss`, `seconds` (in steps
        alone) and `probe_seconds`. `fl.open(store)` gives it again.

    Raises
    ------
    TypeError
        For what is no problem, optimiser or probe, or a scheduler that must be given a
        loss.
    ValueError
        If the store holds a run of other settings (they are named), or of more steps.
    RankError
        If several processes differ in what they were given, or the model has batch norm.
    StoreError
        If the store cannot be written; the last checkpoint is kept.
    NumericalError
        If the loss is not finite; results up to there are in the store.
    KeyboardInterrupt
        After Ctrl-C, with everything saved.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> problem = fl.problems.load("digits")
    >>> adam = torch.optim.Adam(problem.model.parameters(), lr=1e-3)
    >>> ds = fl.follow(problem, adam, steps=20, every=10)
    >>> ds.step.values.tolist(), bool(ds.test_loss[0] > ds.test_loss[-1])
    ([0, 10, 20], True)
    """
    if steps < 0 or (seconds is not None and not seconds > 0):
        raise ValueError(
            f"follow: steps={steps}, seconds={seconds}; at least 0 steps and a positive "
            "time are expected."
        )
    _require(problem, optimizer, probes)
    wanted = moments(every, steps)
    make = partial(by_name, optimizer) if isinstance(optimizer, str) else optimizer
    made = make if isinstance(make, Optimizer) else make(problem)
    schedule = None if scheduler is None else scheduler(made)
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            "follow: ReduceLROnPlateau waits for a loss of its own, and follow gives none; "
            "a scheduler that depends on the step alone is expected, such as StepLR."
        )
    place = None if store is None else Store(Path(store).expanduser())
    run = Run(problem, made, schedule, probes, wanted, batch_size, seed, place)
    chosen = settings(problem, made, schedule, probes, batch_size, seed)
    run.attributes = _attributes(chosen)
    ranks = live()
    if ranks is not None:
        require_replicas(ranks, problem.model, chosen)
    modes = [(module, module.training) for module in problem.model.modules()]
    with ExitStack() as stack:
        if place is not None:
            _begin(run, place, chosen, steps, resume, stack)
        stack.enter_context(one_order(deterministic))
        interrupt = stack.enter_context(held_interrupt())
        try:
            limit = _Limit(steps, float("inf") if seconds is None else seconds)
            _drive(run, limit, checkpoint_seconds, interrupt, progress, callback)
        finally:
            for module, mode in modes:
                module.train(mode)
    if interrupt.asked:
        raise KeyboardInterrupt(_stopped(run, steps))
    return run.results


def _require(problem: object, optimizer: object, probes: Sequence[object]) -> None:
    """Refuse what is no problem, no optimiser and no way to make one, or no probe."""
    Problem.require(problem, "follow")
    known = callable(optimizer) or isinstance(optimizer, (str, Optimizer))
    if not known or isinstance(optimizer, type):
        raise TypeError(
            f"follow: optimizer={optimizer!r} was given; a name of fl.optimizers(), an "
            "optimiser or a function that makes one of a problem is expected."
        )
    for one in probes:
        if not isinstance(one, (Probe, Tracker)) or isinstance(one, type):
            raise TypeError(
                f"follow: {one!r} is no probe; values of fl.probes are expected, such as "
                "fl.probes.Losses()."
            )


def _begin(
    run: Run, store: Store, chosen: Settings, steps: int, resume: bool, stack: ExitStack
) -> None:
    """Take over what the store holds, which is the first rank's alone."""
    ranks = live()

    def first() -> tuple[Checkpoint, xr.Dataset] | None:
        stack.enter_context(store.opened())
        return _held(run, store, chosen, steps, resume)

    found = first() if ranks is None else ranks.of_first(first)
    if found is not None:
        run.resume(*found)
    if ranks is None:
        _write_session(run, store, chosen, steps, 1)
        return
    ranks.of_first(lambda: _write_session(run, store, chosen, steps, ranks.size))
    if ranks.rank:
        run.store = None


def _held(
    run: Run, store: Store, chosen: Settings, steps: int, resume: bool
) -> tuple[Checkpoint, xr.Dataset] | None:
    """Return what the store holds, if it is of this run."""
    record = store.record()
    if record is None:
        record = {"settings": chosen, "sessions": []}
    elif not resume:
        raise ValueError(
            f"follow: the store {store.folder} holds a training already. Go on with it "
            "by resume=True, or name another folder."
        )
    unlike = differences(record["settings"], json.loads(json.dumps(chosen)))
    if unlike:
        raise ValueError(
            f"follow: the store {store.folder} holds another training: "
            f"{'; '.join(unlike)}. Name another folder, or give the same settings."
        )
    found = store.load()
    if found is not None:
        _check(found[0], run, store, steps)
    return found


def _write_session(
    run: Run, store: Store, chosen: Settings, steps: int, ranks: int
) -> None:
    """Record that a training begins or goes on; nothing is refused any more."""
    record = store.record() or {"settings": chosen, "sessions": []}
    record["settings"] = {**chosen, **record["settings"]}
    record |= {"steps": steps, "every": sorted({*run.measured, *run.wanted})}
    told = {"device": str(run.device), "ranks": ranks}
    record["sessions"].append(session(run.step) | told)
    store.write_record(record)
    store.drop_later(-1 if run.fresh else run.step)


def _check(checkpoint: Checkpoint, run: Run, store: Store, steps: int) -> None:
    if checkpoint.step > steps:
        raise ValueError(
            f"follow: the store {store.folder} is at step {checkpoint.step} already, "
            f"steps={steps} was given. It cannot go back."
        )
    passed = {step for step in run.wanted if step <= checkpoint.step}
    missed = sorted(passed - set(checkpoint.measured))
    if missed:
        raise ValueError(
            f"follow: the store {store.folder} is at step {checkpoint.step} and has not "
            f"measured at {missed[:5]}, which `every` asks for now. Give the `every` of "
            "then, or steps to come."
        )


@dataclass(frozen=True)
class _Limit:
    """Where a training ends: after so many steps, or so many seconds in them."""

    steps: int
    seconds: float

    def reached(self, run: Run) -> bool:
        """Tell whether a run is to end here."""
        return run.step >= self.steps or self.is_late(run)

    def is_late(self, run: Run) -> bool:
        """Tell whether the time is spent."""
        return run.seconds >= self.seconds

    @property
    def total(self) -> int | None:
        """The steps of a bar; none where time decides."""
        return self.steps if math.isinf(self.seconds) else None

    def told(self, run: Run) -> str:
        """Return the time spent, where time decides."""
        if math.isinf(self.seconds):
            return ""
        return f", {run.seconds:.0f} of {self.seconds:.0f} s in steps"


def _drive(
    run: Run,
    limit: _Limit,
    checkpoint_seconds: float,
    interrupt: Interrupt,
    progress: bool,
    callback: Callback | None,
) -> None:
    from tqdm.auto import tqdm

    hidden = not progress
    if run.store is not None and not run.fresh and limit.reached(run):
        say_complete(progress, "follow", f"step {run.step} in {run.store.folder}")
        hidden = True
    try:
        if run.fresh:  # before the bar, so that a complaint about the input stands alone
            _look(run, interrupt, callback)
            _saved(run.save)  # so that a later call begins with these weights
        with tqdm(total=limit.total, initial=run.step, unit="step", disable=hidden) as bar:
            while not (limit.reached(run) or interrupt.asked):
                loss = run.advance()
                bar.set_postfix_str(f"loss={loss:.4g}{limit.told(run)}", refresh=False)
                bar.update()
                if limit.is_late(run):
                    run.wanted = {*run.wanted, run.step}
                _look(run, interrupt, callback)
                _saved(partial(run.save_if_due, checkpoint_seconds))
                _agree(run, interrupt)
    except BaseException:
        # What was measured is kept for the reader; going on measures it again.
        with suppress(Exception):
            run.write_rows()
        raise
    _saved(run.save)


def _saved(save: Callable[[], None]) -> None:
    """Save; where one of several processes cannot, all of them end."""
    ranks = live()
    save() if ranks is None else ranks.together(save)


def _agree(run: Run, interrupt: Interrupt) -> None:
    """Let several processes know one time, and that one of them is to stop."""
    ranks = live()
    if ranks is not None:
        told = ranks.gathered((run.seconds, interrupt.asked))
        run.seconds = told[0][0]
        interrupt.asked = any(asked for _, asked in told)


def _look(run: Run, interrupt: Interrupt, callback: Callback | None) -> None:
    if not run.look() or callback is None:
        return
    try:
        callback(run.results)
    except KeyboardInterrupt:
        interrupt.asked = True


def _stopped(run: Run, steps: int) -> str:
    text = f"stopped after step {run.step} of {steps}"
    if run.store is None:
        return f"{text}; nothing is saved, as there is no store"
    return f"{text}; all is saved in {run.store.folder}, from where it can go on"


def _attributes(chosen: Settings) -> dict[str, Any]:
    """Return what a result tells of its training."""
    import fisherlab

    rates = chosen["optimizer"]["lr"]
    training = {
        "optimizer": chosen["optimizer"]["name"],
        **{name: v for name, v in chosen["optimizer"].items() if name != "name"},
        "lr": rates[0] if len(rates) == 1 else rates,
        "batch_size": chosen["batch_size"],
    }
    return {
        "creation_library": "fisherlab",
        "creation_library_version": fisherlab.__version__,
        "analysis": "follow",
        "problem": chosen["problem"],
        "likelihood": chosen["likelihood"],
        "seed": chosen["seed"],
        "training": json.dumps(training),
    }


class Interrupt:
    """Whether the user asked to stop."""

    asked = False


@contextmanager
def held_interrupt() -> Iterator[Interrupt]:
    """Note the first Ctrl-C; let the second one through at once.

    Outside of the main thread, where Python gives no signals, nothing is changed.

    Examples
    --------
    >>> with held_interrupt() as interrupt:
    ...     signal.raise_signal(signal.SIGINT)
    ...     interrupt.asked
    True
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True

    with put_back(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))):
        signal.signal(signal.SIGINT, note)
        yield interrupt

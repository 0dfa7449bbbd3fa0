"""The folder of a training: its record, its results, and all it needs to go on."""

import copy
import errno
import inspect
import json
import platform
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final, final

import torch
import xarray as xr
from torch import Tensor, nn

import fisherlab
from fisherlab.analysis.files import drop_parts, last_step, read_parts, write_part
from fisherlab.codes import checksum, codes, described, made_with
from fisherlab.durable import PARTIAL, check_seal, claimed, write_durably, write_sealed
from fisherlab.errors import DataError, StoreError
from fisherlab.numerics.devices import available_devices
from fisherlab.problems.problem import Problem
from fisherlab.training.schedules import BatchSize
from fisherlab.training.serialise import pack, unpack

_VERSION: Final = 1


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a training between two steps.

    Random numbers are no part of it: those of a step depend on the seed and the number
    of the step alone.

    Attributes
    ----------
    step
        Steps taken.
    model, optimizer, scheduler
        What their `state_dict` gave; None where there is no scheduler.
    memories
        The memory of every probe that has one, by its place.
    seconds
        Time spent in steps.
    losses
        Sum and number of the minibatch losses since the last moment.
    measured
        The steps whose results are in the store.
    """

    step: int
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None
    memories: Mapping[int, Any]
    seconds: float
    losses: tuple[float, int]
    measured: tuple[int, ...]


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint, durably: the one before stays until the new one is whole.

    Raises
    ------
    OSError
        If it cannot be written.
    TypeError
        If a state holds what a checkpoint cannot; its place is named.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "checkpoint.pt"
    >>> save_checkpoint(Checkpoint(3, {}, {}, None, {}, 0.5, (0.0, 0), (0,)), file)
    >>> load_checkpoint(file).step
    3
    """
    content = {"version": _VERSION, **pack(vars(checkpoint), "checkpoint")}
    write_sealed(path, lambda scratch: _write(content, scratch))


def _write(content: Any, path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:  # how torch's writer says that the disk is full
        raise OSError(str(error).splitlines()[0]) from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint; nothing in the file is executed.

    Raises
    ------
    DataError
        If the file is not a whole checkpoint of this version.
    """
    try:
        if not check_seal(path):  # torch reads no checksums
            _check_sums(path)
        content = torch.load(path, map_location=_where_it_was, weights_only=True)
    except DataError:
        raise
    except Exception as error:  # a damaged file may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is not a readable checkpoint: {reason}") from error
    if not isinstance(content, dict) or content.pop("version", None) != _VERSION:
        raise DataError(f"{path} is not a checkpoint of version {_VERSION}.")
    try:
        found = unpack(content)
    except ValueError as error:
        raise DataError(f"{path} is not a readable checkpoint: {error}") from error
    return _checked(found, path)


def _where_it_was(storage: Any, location: str) -> Any:
    """Load onto the device that was saved from, or onto the host where that is not."""
    if location not in available_devices():
        return storage
    return torch.serialization.default_restore_location(storage, location)


def _check_sums(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if bad := archive.testzip():
            raise ValueError(f"the checksum of {bad} is wrong")


def _checked(found: dict[str, Any], path: Path) -> Checkpoint:
    """Make a checkpoint of parts of the kinds that it is written with."""
    unlike = sorted(_KINDS.keys() ^ found.keys(), key=str)
    if not unlike:
        unlike = [name for name, fits in _KINDS.items() if not fits(found[name])]
    if unlike:
        raise DataError(
            f"{path} is not a readable checkpoint: {', '.join(map(str, unlike))} is not "
            "what a training writes there."
        )
    return Checkpoint(**found)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _counts(value: Any) -> bool:
    return type(value) is int and value >= 0


_KINDS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "step": _counts,
    "model": _is_mapping,
    "optimizer": _is_mapping,
    "scheduler": lambda value: value is None or _is_mapping(value),
    "memories": _is_mapping,
    "seconds": lambda value: type(value) in (int, float),
    "losses": lambda value: isinstance(value, tuple) and len(value) == 2,
    "measured": lambda value: isinstance(value, tuple) and all(map(_counts, value)),
}


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
) -> None:
    """Put model, optimiser and scheduler into the state of a checkpoint.

    Raises
    ------
    DataError
        If they are not what the checkpoint was made from; the model is as it was then.
    """
    before = copy.deepcopy(model.state_dict())
    try:
        model.load_state_dict(dict(checkpoint.model))
        optimizer.load_state_dict(dict(checkpoint.optimizer))
        if scheduler is not None:
            scheduler.load_state_dict(dict(checkpoint.scheduler or {}))
    except Exception as error:  # states may hold anything
        model.load_state_dict(before)
        reason = " ".join(str(error).split())
        raise DataError(f"The checkpoint does not fit the training: {reason}") from error


_RECORD: Final = "run.json"
_CHECKPOINT: Final = "checkpoint.pt"
_LOCK: Final = "lock"


@final
@dataclass(frozen=True)
class Store:
    """A folder with `run.json`, `checkpoint.pt` and `results-<first>-<last>.nc`.

    Results are written before the checkpoint that counts them, so what is there when a
    process dies is a whole checkpoint and at least the results up to it. Results that
    come after it are removed when the training goes on, and measured again.

    Parameters
    ----------
    folder
        The folder; `open` makes it.
    """

    folder: Path

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it.

        Raises
        ------
        StoreError
            If the folder cannot be made or written, or another process works in it.
        """
        missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / _LOCK).touch()
        taken = StoreError(
            f"Another process works in the store {self.folder}. Wait for it, or name "
            "another folder."
        )
        try:
            with claimed(self.folder / _LOCK, taken):
                yield
        except BaseException:
            if missing:
                self._remove_if_bare(missing)
            raise

    def _remove_if_bare(self, made: Sequence[Path]) -> None:
        """Remove folders that were made for a run in which nothing was found."""
        there = self.folder.is_dir()  # or removed by somebody in the meantime
        if there and {path.name for path in self.folder.iterdir()} <= {_LOCK, _RECORD}:
            for name in (_LOCK, _RECORD):
                (self.folder / name).unlink(missing_ok=True)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()

    def record(self) -> dict[str, Any] | None:
        """Return how the run was made, None for a new folder.

        Raises
        ------
        DataError
            If the record is damaged, or the folder holds something else.
        """
        path = self.folder / _RECORD
        if not path.exists():
            others = sorted(p.name for p in self.folder.iterdir() if p.name != _LOCK)
            others = [name for name in others if not name.startswith(PARTIAL)]
            if others:
                raise DataError(
                    f"The folder {self.folder} holds no training but other files "
                    f"({', '.join(others[:3])}). Name an empty or a new one."
                )
            return None
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}") from error
        told = found if isinstance(found, dict) else {}
        kinds = (("settings", dict), ("sessions", list))
        if not all(isinstance(told.get(name), kind) for name, kind in kinds):
            raise DataError(
                f"{path} is not the record of a training: settings and sessions are "
                "expected in it. Put the file back, or name another folder."
            )
        return told

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write how the run was made."""
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        with self._writing():
            write_durably(self.folder / _RECORD, lambda path: path.write_text(text))

    def load(self) -> tuple[Checkpoint, xr.Dataset] | None:
        """Return the last checkpoint and the results up to it; nothing is changed.

        Raises
        ------
        DataError
            If the checkpoint or results that it counts are damaged or missing.
        """
        path = self.folder / _CHECKPOINT
        if not path.exists():
            # The first checkpoint is written before the first step is taken.
            if last := last_step(self.folder):
                raise DataError(
                    f"The store {self.folder} has results up to step {last} but no "
                    f"{_CHECKPOINT} to go on from. Put it back, or name another folder; "
                    "`fl.open` reads the results."
                )
            return None
        checkpoint = load_checkpoint(path)
        if not checkpoint.measured:
            return checkpoint, xr.Dataset()
        results = read_parts(self.folder, checkpoint.step)
        found = results["step"].values.tolist()
        if found != list(checkpoint.measured):
            unlike = sorted({*found} ^ {*checkpoint.measured}) or found
            raise DataError(
                f"The store {self.folder} does not hold the results that its checkpoint "
                f"counts: steps {unlike[:5]} are missing, or there against it. Put the "
                "files back, or name another folder."
            )
        return checkpoint, results

    def drop_later(self, step: int) -> None:
        """Remove the results after a step, which are going to be measured again."""
        with self._writing():
            drop_parts(self.folder, after=step)

    def write_rows(self, rows: xr.Dataset) -> None:
        """Write the results of some moments."""
        with self._writing():
            self._check_record()
            write_part(rows, self.folder)

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint."""
        with self._writing():
            self._check_record()
            save_checkpoint(checkpoint, self.folder / _CHECKPOINT)

    def _check_record(self) -> None:
        """Notice that the folder was emptied: what is in it would lack its beginning."""
        if not (self.folder / _RECORD).exists():
            raise FileNotFoundError(errno.ENOENT, f"its {_RECORD} was removed")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            kept = "The last checkpoint is kept; the training goes on from it when the "
            told = f"{kept}store can be written again."
            if not (self.folder / _CHECKPOINT).exists():
                told = "Name another folder."
            raise StoreError(
                f"The store {self.folder} cannot be written: {reason}. {told}"
            ) from error


_PACKAGES: Final = ("torch", "numpy", "xarray", "h5netcdf")
_SAMPLED: Final = 256  # examples of a set that its fingerprint reads
_LIVE: Final = ("model", "likelihood", "params")  # not settings of an optimiser
Settings = dict[str, Any]


def settings(
    problem: Problem,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    probes: Sequence[object],
    batch_size: BatchSize,
    seed: int,
) -> Settings:
    """Return what decides a trajectory and what is measured on it, as JSON values.

    Examples
    --------
    >>> import fisherlab as fl
    >>> problem = fl.problems.load("digits")
    >>> sgd = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    >>> found = settings(problem, sgd, None, [fl.probes.Losses()], 64, 0)
    >>> found["optimizer"]["name"], found["optimizer"]["lr"], found["probes"]
    ('SGD', [0.1], ['Losses(examples=None)'])
    """
    return {
        **described_problem(problem),
        "optimizer": _optimizer(optimizer),
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "probes": [described(probe) for probe in probes],
        "batch_size": _plain(batch_size),
        "seed": seed,
        **_silent(probes),
        **_groups(optimizer),
        **_schedule(scheduler, "scheduler"),
        **codes(scheduler=_functions(scheduler), batch_size=batch_size),
    }


def described_problem(problem: Problem) -> Settings:
    """Return what a problem is, its initial weights left out.

    Examples
    --------
    >>> import fisherlab as fl
    >>> described_problem(fl.problems.load("digits"))["dtype"]
    'float64'
    """
    first = next(problem.model.parameters())
    return {
        "problem": problem.name,
        "model": described(problem.model),
        "likelihood": described(problem.likelihood),
        "dtype": str(first.dtype).removeprefix("torch."),
        "train": _fingerprint(problem.train),
        "test": _fingerprint(problem.test),
        "labels": [checksum(y) for _, y in (problem.train, problem.test)],
        "augment": described(problem.augment),
        **codes(augment=problem.augment, model=problem.model),
    }


def _optimizer(optimizer: torch.optim.Optimizer) -> Settings:
    """Return the settings of an optimiser; not its state, so that live ones may go on."""
    rates = [g.get("initial_lr", g.get("lr")) for g in optimizer.param_groups]
    given = inspect.signature(type(optimizer)).parameters
    own = {
        name: value
        for name, value in vars(optimizer).items()
        if (name in given or name == "curvature") and name not in _LIVE
    }
    found = {**optimizer.defaults, **own}
    return {
        "name": type(optimizer).__name__,
        "lr": [None if rate is None else float(rate) for rate in rates],
        **{n: _plain(v) for n, v in found.items() if n != "lr" and v is not None},
    }


def _silent(probes: Sequence[object]) -> Settings:
    """Return the settings of probes that do not show them; their code may be mended."""
    return {
        f"probe {k} {name}": _plain(value)
        for k, probe in enumerate(probes)
        if type(probe).__repr__ is object.__repr__
        for name, value in made_with(probe).items()
    }


def _groups(optimizer: torch.optim.Optimizer) -> Settings:
    """Return the settings of every group of parameters, but those a scheduler moves."""
    found: Settings = {}
    for k, group in enumerate(optimizer.param_groups):
        moved = {"params", "lr", "initial_lr"}
        if "max_momentum" in group:
            moved |= {"momentum", "betas"}
        own = {name: _plain(v) for name, v in group.items() if name not in moved}
        found |= {f"group {k} {name}": value for name, value in own.items()}
    return found


def _schedule(scheduler: object, name: str) -> Settings:
    """Return the settings of a scheduler and of those it is made of."""
    found: Settings = {}
    for part, value in _parts(scheduler).items():
        if part == "_schedulers":
            for k, one in enumerate(value):
                found |= _schedule(one, f"{name} {k}")
        else:
            found[f"{name} {part.strip('_')}"] = _plain(value)
    return found


def _functions(scheduler: object) -> list[object]:
    """Return the functions that a scheduler and those it is made of ask."""
    found: list[object] = []
    for part, value in _parts(scheduler).items():
        several = value if isinstance(value, list) else [value]
        if part == "_schedulers":
            found += [f for one in several for f in _functions(one)]
        else:
            found += [f for f in several if callable(f)]
    return found


def _parts(scheduler: object) -> Settings:
    """Return what a scheduler was made with: no counters, and not its optimiser."""
    moving = ("optimizer", "base_lrs", "last_epoch", "T_cur", "T_i", "verbose")
    nested = ("_schedulers", "_milestones")
    every = {} if scheduler is None else vars(scheduler)
    return {
        name: value
        for name, value in every.items()
        if name in nested or not (name in moving or name.startswith("_"))
    }


def _plain(value: object) -> bool | int | float | str:
    return value if isinstance(value, (bool, int, float, str)) else described(value)


def _fingerprint(pair: tuple[Tensor, Tensor]) -> str:
    """Return shapes and a checksum of examples spread over the set."""
    samples = [tensor[:: max(1, len(tensor) // _SAMPLED)] for tensor in pair]
    shapes = ["x".join(map(str, tensor.shape)) for tensor in pair]
    return f"{', '.join(shapes)}, {checksum(*samples)}"


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Name the settings that differ, with both values.

    What one of the two versions of the program does not record is not compared.

    Examples
    --------
    >>> there, here = ({"seed": 0, "optimizer": {"lr": lr}} for lr in (1, 2))
    >>> differences(there, here)
    ['optimizer lr is 1 there and 2 here']
    """
    both = [name for name in there if name in here]
    return _unlike({n: there[n] for n in both}, {n: here[n] for n in both})


def _unlike(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    found = []
    for name in {**there, **here}:
        old, new = there.get(name), here.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{name} {line}" for line in _unlike(old, new)]
        elif old != new:
            found.append(f"{name} is {_short(old)} there and {_short(new)} here")
    return found


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def session(step: int) -> Settings:
    """Return when, with what and on what a process went on from a step."""
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": step,
        "versions": {
            "fisherlab": fisherlab.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }

"""All that a training needs to go on as if it had never stopped."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from fisherlab.durable import check_seal, write_sealed
from fisherlab.errors import DataError
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
        content = torch.load(path, weights_only=True)
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

"""Devices of torch, whichever there are: names, memory, generators, waiting, looking.

To look at a number of an accelerator the host waits for it. A step that should not wait
postpones its looks; numbers on the CPU are looked at in any case.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import psutil
import torch
from torch import Tensor

from fisherlab.durable import put_back


def available_devices() -> tuple[str, ...]:
    """Return the names of the devices that torch finds here.

    Examples
    --------
    >>> available_devices()[0]
    'cpu'
    """
    found = torch.accelerator.current_accelerator() if _accelerated() else None
    if found is None:
        return ("cpu",)
    count = torch.accelerator.device_count()
    return ("cpu", found.type, *(f"{found.type}:{k}" for k in range(count)))


def require_device(name: str) -> None:
    """Refuse a device that is not here.

    Raises
    ------
    ValueError
        Naming those that are.

    Examples
    --------
    >>> require_device("abacus")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: There is no device 'abacus' here. Choose from cpu...
    """
    known = available_devices()
    if name not in known:
        msg = f"There is no device {name!r} here. Choose from {', '.join(known)}."
        raise ValueError(msg)


def _accelerated() -> bool:
    return torch.accelerator.is_available()


def is_accelerator(device: torch.device) -> bool:
    """Tell whether a call costs more than its arithmetic, where tensors are small.

    Examples
    --------
    >>> is_accelerator(torch.device("cpu"))
    False
    """
    return device.type not in ("cpu", "meta")


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Return the number of bytes free on a device now.

    What torch holds without using it counts as free.
    """
    device = torch.device(device)
    if not is_accelerator(device):
        return int(psutil.virtual_memory().available)
    module: Any = torch.get_device_module(device)
    if device.type == "mps":  # it shares the memory of the host
        return int(module.recommended_max_memory() - module.driver_allocated_memory())
    free, _ = module.mem_get_info(device)
    if not hasattr(module, "memory_reserved"):  # it holds nothing back
        return int(free)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def total_bytes(device: torch.device | str = "cpu") -> int:
    """Return the number of bytes that a device has, whoever holds them.

    Examples
    --------
    >>> total_bytes() >= free_bytes()
    True
    """
    device = torch.device(device)
    if not is_accelerator(device):
        return int(psutil.virtual_memory().total)
    module: Any = torch.get_device_module(device)
    if device.type == "mps":
        return int(module.recommended_max_memory())
    return int(module.mem_get_info(device)[1])


def wait() -> None:
    """Wait until the accelerator, if there is one, has done all it was asked for."""
    if _accelerated():
        torch.accelerator.synchronize()


def generator_states(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that a model on a device may draw from.

    Examples
    --------
    >>> len(generator_states(torch.device("cpu")))
    1
    """
    return [
        torch.get_rng_state(),
        *(_module(d).get_rng_state(*_at(d)) for d in _own(device)),
    ]


@contextmanager
def generators_kept(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Put the generators of the host and of a device back afterwards.

    Parameters
    ----------
    device
        The host's generator is kept in any case.
    seed
        What they begin with; as they are if None.

    Examples
    --------
    >>> with generators_kept(torch.device("cpu"), 3):
    ...     first = torch.rand(1)
    >>> with generators_kept(torch.device("cpu"), 3):
    ...     bool(first == torch.rand(1))
    True
    """
    with put_back(partial(_set, device, generator_states(device))):
        if seed is not None:
            all_of = [torch.device("cpu"), *_own(device)]
            seeded = [torch.Generator(d).manual_seed(seed).get_state() for d in all_of]
            _set(device, seeded)
        yield


def _set(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for own, state in zip(_own(device), states[1:], strict=True):
        _module(own).set_rng_state(state, *_at(own))


def _own(device: torch.device) -> list[torch.device]:
    return [device] if is_accelerator(device) else []


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _at(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is one of them


@final
@dataclass(frozen=True, eq=False)
class Look:
    """A condition on the device, and the error to raise where it does not hold."""

    good: Tensor
    complaint: Callable[[], Exception]


_LATER: ContextVar[list[Look] | None] = ContextVar("later", default=None)


def require(good: Tensor, complaint: Callable[[], Exception]) -> None:
    """Raise an error unless a condition holds: at once, or when it is looked at.

    Parameters
    ----------
    good
        One boolean.
    complaint
        Makes the error. It should hold few numbers: it may be kept for a while.

    Raises
    ------
    Exception
        The complaint.

    Examples
    --------
    >>> require(torch.ones(2).sum() > 3, lambda: ValueError("too small"))
    Traceback (most recent call last):
    ValueError: too small
    """
    if postponing(good):
        _LATER.get().append(Look(good, complaint))  # type: ignore[union-attr]
    elif not bool(good):
        raise complaint()


def postponing(tensor: Tensor) -> bool:
    """Tell whether conditions on a tensor are looked at later."""
    return _LATER.get() is not None and tensor.device.type != "cpu"


@contextmanager
def postponed(wanted: bool) -> Iterator[list[Look]]:
    """Keep what is required in a `with` block, if wanted, to be looked at later."""
    found: list[Look] = []
    token = _LATER.set(found if wanted else None)
    try:
        yield found
    finally:
        _LATER.reset(token)


def all_good(looks: Sequence[Look]) -> Tensor | None:
    """Return on the device whether all conditions hold, None if there are none."""
    return torch.stack([each.good for each in looks]).all() if looks else None


def look(looks: Sequence[Look]) -> None:
    """Look at all of them at once, and raise the complaint of the first that fails.

    Raises
    ------
    Exception
        The complaint.
    """
    if not looks:
        return
    found = torch.stack([each.good for each in looks]).tolist()
    for each, good in zip(looks, found, strict=True):
        if not good:
            raise each.complaint()

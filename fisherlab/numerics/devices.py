"""Devices: their names and generators, what values hold on them, and budgets of memory.

To look at a number of an accelerator the host waits for it. A step that should not wait
postpones its looks; numbers on the CPU are looked at in any case.
"""

import ctypes
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar, final

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from fisherlab.errors import BudgetError
from fisherlab.settings import put_back, require_number


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


def require_good(good: Tensor, complaint: Callable[[], Exception]) -> None:
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
    >>> require_good(torch.ones(2).sum() > 3, lambda: ValueError("too small"))
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


Budget = int | float | str | None

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_budget(budget: Budget, device: torch.device | str = "cpu") -> int:
    """Turn a budget into bytes: a number, a text such as "4 GiB", or half of what is free.

    Parameters
    ----------
    budget
        Bytes, a text with a unit (B, kB, MB, GB, KiB, MiB, GiB, ...), or None for
        half of the memory that is free on `device`.
    device
        The device whose memory is meant.

    Raises
    ------
    ValueError
        If the text cannot be read or the budget is not positive.

    Examples
    --------
    >>> parse_budget("1.5 KiB")
    1536
    """
    if budget is None:
        return free_bytes(device) // 2
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([a-zA-Z]*)\s*", budget)
        unit = None if match is None else _UNITS.get(match[2].lower())
        if match is None or unit is None:
            msg = f"budget={budget!r} is not understood; write e.g. '4 GiB' or bytes."
            raise ValueError(msg)
        budget = float(match[1]) * unit
    require_number(f"budget={budget!r}", budget)
    if not budget > 0:
        raise ValueError(f"budget={budget!r} must be positive.")
    return int(budget)


def readable(count: float) -> str:
    """Write a number of bytes for people.

    Examples
    --------
    >>> readable(3 * 2**30)
    '3.0 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def require(needed: int, budget: int, what: object, remedy: str) -> None:
    """Raise BudgetError if `needed` bytes exceed the budget.

    Raises
    ------
    BudgetError
        Naming the request, its bytes, the budget and the remedy.
    """
    if needed > budget:
        raise BudgetError(
            f"{what} needs {readable(needed)} ({needed} bytes), more than the budget "
            f"of {readable(budget)}. {remedy}"
        )


def chunks(total: int, size: int) -> Iterator[slice]:
    """Cut range(total) into slices of at most `size`.

    Examples
    --------
    >>> [(s.start, s.stop) for s in chunks(5, 2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    size = max(1, int(size))
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def spans(lengths: Sequence[int]) -> list[slice]:
    """Return the places of parts of these lengths that follow each other.

    Examples
    --------
    >>> spans([2, 3])
    [slice(0, 2, None), slice(2, 5, None)]
    """
    ends = list(accumulate(lengths))
    return [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]


def give_back() -> None:
    """Give memory that is free in this process back to the system.

    The C library of Linux keeps what lies between pieces in use: after a pass through a
    network of a hundred million weights, gigabytes. Elsewhere nothing is done.

    Examples
    --------
    >>> give_back()
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor, on huge pages where the system has them.

    numpy asks for huge pages and torch does not: the first touch of a large block then
    costs a third.

    Examples
    --------
    >>> empty((2, 3), torch.float64, torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return torch.empty(shape, dtype=dtype, device=device)
    kind = np.float32 if dtype == torch.float32 else np.float64
    return torch.from_numpy(np.empty(shape, dtype=kind))


H = TypeVar("H", bound="Held")
_FIELDS: dict[Any, tuple[tuple[str, ...], tuple[str, ...]]] = {}  # by class
STAYS = {"stays": True}  # metadata of a field that keeps its precision under `to`


class Held:
    """A frozen dataclass whose fields hold tensors, or values that hold tensors.

    Precision, device, size and casts of every such value are said here once. A field may
    nest them in tuples, lists and mappings. One with the metadata `STAYS` keeps its
    precision; one that is a `torch.dtype` is the precision of results.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Pair(Held):
    ...     one: Tensor
    ...     rest: tuple[Tensor, ...]
    >>> pair = Pair(torch.ones(2), (torch.ones(3), torch.arange(4)))
    >>> half = pair.to(torch.float16)
    >>> half.dtype, half.nbytes, half.stored_numbers
    (torch.float16, 42, 5)
    """

    @property
    def dtype(self) -> torch.dtype:
        """The precision of what goes in and out."""
        for name in _fields(self)[1]:
            for kind in _precisions(getattr(self, name)):
                return kind
        return torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        for name in _fields(self)[0]:
            for place in _devices(getattr(self, name)):
                return place
        return torch.device("cpu")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in tensors(self))

    @property
    def stored_numbers(self) -> int:
        """How many numbers the value stands on."""
        return _numbers(_parts(self))

    def to(self: H, dtype: torch.dtype) -> H:
        """Return the same value in another precision."""
        if dtype == self.dtype:
            return self
        cast = {n: _cast(getattr(self, n), dtype) for n in _fields(self)[1]}
        changed: Any = replace(self, **cast)  # type: ignore[type-var]
        return changed


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor of a value, in the order of its fields."""
    if isinstance(value, Tensor):
        yield value
    for part in _parts(value):
        yield from tensors(part)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with each of its tensors changed, also those in tuples.

    Examples
    --------
    >>> mapped((torch.ones(2), "a", 3), lambda tensor: 2 * tensor)
    (tensor([2., 2.]), 'a', 3)
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Held):
        held = {n: mapped(getattr(value, n), change) for n in _fields(value)[0]}
        return replace(value, **held)  # type: ignore[type-var]
    return tuple(mapped(v, change) for v in value) if isinstance(value, tuple) else value


def _fields(value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Name the fields of a value's class and those that are cast: every step asks."""
    kind = type(value)
    if kind not in _FIELDS:
        own = fields(kind)
        cast = (f.name for f in own if f.init and "stays" not in f.metadata)
        _FIELDS[kind] = tuple(field.name for field in own), tuple(cast)
    return _FIELDS[kind]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, Held):
        return [getattr(value, name) for name in _fields(value)[0]]
    return list(value.values()) if isinstance(value, Mapping) else []


def _precisions(value: Any) -> Iterator[torch.dtype]:
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value.dtype.to_real()
    elif isinstance(value, torch.dtype):
        yield value
    elif isinstance(value, Held):
        yield value.dtype
    elif isinstance(value, (tuple, list, Mapping)):
        for part in _parts(value):
            yield from _precisions(part)


def _devices(value: Any) -> Iterator[torch.device]:
    if isinstance(value, (Tensor, Held)):
        yield value.device
    elif isinstance(value, torch.device):
        yield value
    else:
        for part in _parts(value):
            yield from _devices(part)


def _numbers(value: Any) -> int:
    if isinstance(value, Held):
        return value.stored_numbers
    if isinstance(value, Tensor):
        real = value.numel() if value.is_floating_point() else 0
        return 2 * value.numel() if value.is_complex() else real
    return sum(map(_numbers, _parts(value)))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a value with its real and complex numbers in another precision."""
    if isinstance(value, Tensor) and value.is_complex():
        return value.to(dtype.to_complex())
    if isinstance(value, Held) or (isinstance(value, Tensor) and value.is_floating_point()):
        return value.to(dtype)
    if isinstance(value, torch.dtype):
        return dtype
    if isinstance(value, Mapping):
        return {key: _cast(part, dtype) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(part, dtype) for part in value)
    return value


def _number(seed: int, step: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + step) % 2**63


def generator(seed: int, step: int) -> torch.Generator:
    """Return a generator that depends on the seed and the step alone.

    Examples
    --------
    >>> first, second = (torch.rand(2, generator=generator(0, 5)) for _ in range(2))
    >>> bool((first == second).all())
    True
    """
    return torch.Generator().manual_seed(_number(seed, step))


@contextmanager
def own_randomness(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Give what draws from the global generator (dropout) numbers of its own.

    They depend on the seed and the step alone, so that a training that goes on from a
    checkpoint draws the same; the global generator is left as it was.

    Examples
    --------
    >>> before = torch.get_rng_state()
    >>> with own_randomness(0, 5, torch.device("cpu")):
    ...     first = torch.rand(2)
    >>> with own_randomness(0, 5, torch.device("cpu")):
    ...     bool((first == torch.rand(2)).all())
    True
    >>> bool((before == torch.get_rng_state()).all())
    True
    """
    with generators_kept(device, _number(seed, step)):
        yield


@contextmanager
def drawing(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Tell afterwards whether something drew random numbers; none are used up.

    Torch's generators of the model's devices are looked at.

    Examples
    --------
    >>> with drawing(nn.Linear(1, 1)) as drawn:
    ...     _ = torch.rand(1)
    >>> drawn()
    True
    """
    devices = dict.fromkeys(p.device for p in model.parameters())

    def states() -> list[Tensor]:
        return [state for device in devices for state in generator_states(device)]

    before, changed = states(), False
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(generators_kept(device))
        yield lambda: changed
        changed = not all(map(torch.equal, before, states()))


@contextmanager
def one_order(wanted: bool) -> Iterator[None]:
    """Let torch take only algorithms that give the same bits every time, if wanted.

    On a GPU torch may ask for CUBLAS_WORKSPACE_CONFIG in the environment; its error says
    so. What was set before is set again.

    Examples
    --------
    >>> with one_order(True):
    ...     torch.are_deterministic_algorithms_enabled()
    True
    >>> torch.are_deterministic_algorithms_enabled()
    False
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    searched = torch.backends.cudnn.benchmark
    with put_back(
        partial(torch.use_deterministic_algorithms, before, warn_only=warned),
        partial(setattr, torch.backends.cudnn, "benchmark", searched),
    ):
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        yield

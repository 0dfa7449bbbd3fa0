"""What several processes say to each other: sums, values, counts, and failures.

The only module that calls the collectives of ``torch.distributed``. A part of the data
belongs to a rank, and the whole is the parts in the order of the ranks.
"""

import io
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch
from torch import Tensor, distributed

from fisherlab.errors import RankError, lasting

T = TypeVar("T")
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)
_SENT: ContextVar[dict[str, int] | None] = ContextVar("sent", default=None)


@final
@dataclass(frozen=True)
class Ranks:
    """The processes of a group, of which this is one.

    Parameters
    ----------
    group
        A process group of ``torch.distributed``; None for the default one.
    rank, size
        This process among how many.
    """

    group: Any
    rank: int
    size: int

    def gathered(self, value: Any, device: torch.device | None = None) -> list[Any]:
        """Return the values of all ranks, tensors and all, in the order of the ranks.

        This rank's own is a copy as well: strides that differ would round differently.

        Parameters
        ----------
        value
            Anything that can be pickled; sizes may differ from rank to rank.
        device
            Where tensors of the others are put; the CPU by default.
        """
        data, here = packed(value), _Place.here()
        found: list[Any] = [None] * self.size
        with self._met():
            distributed.all_gather_object(found, (here, data), group=self.group)
        _require_one_place([place for place, _ in found])
        if (sent := _SENT.get()) is not None:
            sent["gathered"] += tensor_bytes(data)
        return [unpacked(part, device) for _, part in found]

    def added(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums over ranks of tensors that all of them have: the same bits."""
        found = list(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [k for k, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensors[k].detach().flatten() for k in places])
            total = flat.to(self._device(flat.device), copy=True)
            with self._met():
                distributed.all_reduce(total, group=self.group)
            if (sent := _SENT.get()) is not None:
                sent["added"] += total.nbytes
            parts = total.to(flat.device).split([tensors[k].numel() for k in places])
            for k, part in zip(places, parts, strict=True):
                found[k] = part.view(tensors[k].shape)
        return found

    def averaged(self, tensors: Sequence[Tensor], examples: int) -> list[Tensor]:
        """Return means over the examples of all ranks from means over this one's."""
        counts = self.gathered(examples)
        share = counts[self.rank] / sum(counts)
        return self.added([tensor * share for tensor in tensors])

    def part(self, examples: int) -> slice:
        """Return which examples of a batch that all ranks know are this one's.

        Raises
        ------
        RankError
            If there are fewer than ranks.
        """
        if examples < self.size:
            raise RankError(
                f"A batch of {examples} examples cannot be shared by {self.size} ranks. "
                "Give larger batches, or start fewer ranks."
            )
        ends = [examples * k // self.size for k in range(self.size + 1)]
        return slice(ends[self.rank], ends[self.rank + 1])

    def by_first(self, work: Callable[[], T]) -> T | None:
        """Let the first rank work alone, and the others wait; they are given None.

        Raises
        ------
        Exception
            That of the first, on all of them.
        """

        def first() -> T | None:
            if self.rank:
                return None
            with alone():
                return work()

        return self.together(first)

    def of_first(self, work: Callable[[], T]) -> T:
        """Return on all ranks what the work of the first gives, as `by_first` does it."""
        found: T = self.gathered(self.by_first(work))[0]
        return found

    def before(self, count: int) -> int:
        """Return how many examples the ranks before this one have."""
        return sum(self.gathered(count)[: self.rank])

    def together(self, work: Callable[[], T]) -> T:
        """Return what work of this rank's own gives, once no rank has failed at its.

        Raises
        ------
        Exception
            That of the first rank that failed, on all of them: they decide alike.
        """
        failure: Exception | None = None
        try:
            found = work()
        except Exception as error:
            failure = error
        told = self.gathered(None if failure is None else lasting(failure))
        failed = [(rank, error) for rank, error in enumerate(told) if error is not None]
        if not failed:
            return found
        rank, raised = failed[0]
        if rank == self.rank and failure is not None:
            raised = failure
        raised.add_note(f"This happened on rank {rank} of {self.size}.")
        raise raised

    def require_same(self, what: str, value: Any, remedy: str) -> None:
        """Refuse what differs from rank to rank.

        Raises
        ------
        RankError
            Naming the ranks that differ from the first.
        """
        first, *rest = self.gathered(value)
        others = [str(r) for r, other in enumerate(rest, 1) if other != first]
        if others:
            raise RankError(
                f"{what} of rank {', '.join(others)} differ from those of rank 0. {remedy}"
            )

    @contextmanager
    def _met(self) -> Iterator[None]:
        """Call a collective once all ranks are there.

        Raises
        ------
        RankError
            If one died, or is not there within the group's time-out; gloo names it.
        """
        try:
            if str(distributed.get_backend(self.group)) == "gloo":
                there: Any = self.group or distributed.group.WORLD
                own = there._get_backend(torch.device("cpu")).options
                # the barrier's own default is half an hour, whatever the group's is
                distributed.monitored_barrier(self.group, own._timeout, True)
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            told = " ".join(str(error).split())
            named = re.search(r"Ranks? (\d[\d, ]*) failed to pass", told)
            who = f"rank {named[1].strip(' ,')}" if named else "a rank"
            raise RankError(
                f"{who} of {self.size} died, or hung until the group's time-out: its own "
                "output tells more. Start all ranks again; a training with a store goes "
                f"on from its last checkpoint. ({told[:200]})"
            ) from error

    def _device(self, device: torch.device) -> torch.device:
        """Return where the backend takes tensors: NCCL on its GPU, gloo on the CPU."""
        backend = str(distributed.get_backend(self.group))
        return torch.device("cpu") if backend == "gloo" else device


def dealt(costs: Mapping[str, float], ranks: int) -> list[list[str]]:
    """Return what each rank does of works of known cost: the dearest first, evenly.

    Examples
    --------
    >>> dealt({"a": 1, "b": 5, "c": 3, "d": 2}, 2)
    [['b', 'a'], ['c', 'd']]
    """
    parts: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for name in sorted(costs, key=lambda name: -costs[name]):
        least = loads.index(min(loads))
        parts[least].append(name)
        loads[least] += costs[name]
    return parts


def live(group: Any = None) -> Ranks | None:
    """Return the ranks of a group or of the default one; None where there is but one.

    Examples
    --------
    >>> live() is None
    True
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        if group is None:
            return None
        raise RankError(
            "group= was given, but no process group is live: call "
            "torch.distributed.init_process_group first, or leave group out."
        )
    if group is None and _ALONE.get():
        return None
    size = distributed.get_world_size(group)
    if size < 0:
        raise RankError("group=: this process is not one of the group's.")
    return Ranks(group, distributed.get_rank(group), size) if size > 1 else None


_WITHIN = (__name__, "fisherlab.settings")  # frames that are nobody's call


@final
@dataclass(frozen=True)
class _Place:
    """Where a rank meets the others: the call that was made, and the function inside."""

    call: str
    inside: str

    @classmethod
    def here(cls) -> "_Place":
        """Return the outermost and the innermost function that is not of `_WITHIN`."""
        names, frame = [], sys._getframe(1)
        while frame.f_back is not None:
            module = str(frame.f_globals.get("__name__"))
            if module.startswith("fisherlab.") and module not in _WITHIN:
                names.append(frame.f_code.co_qualname)
            frame = frame.f_back
        return cls(names[-1], names[0]) if names else cls("a call", "a collective")

    def __str__(self) -> str:
        """Return both."""
        return f"{self.call} (at {self.inside})"


def _require_one_place(places: Sequence[_Place]) -> None:
    """Refuse ranks that are at different steps, whose values do not belong together."""
    first = places[0]
    others = [f"rank {r} in {p}" for r, p in enumerate(places) if p.inside != first.inside]
    if others:
        raise RankError(
            f"The ranks do different things: rank 0 is in {first}, "
            f"{', '.join(others[:3])}. Let all ranks make the same calls: loops over equal "
            "numbers of batches, for instance."
        )


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the bytes of tensors that this rank hands over: added, and gathered.

    What says where they belong is not counted: names, shapes, some hundred bytes each.

    Examples
    --------
    >>> with counted() as sent:
    ...     pass
    >>> sent
    {'added': 0, 'gathered': 0}
    """
    sent = {"added": 0, "gathered": 0}
    token = _SENT.set(sent)
    try:
        yield sent
    finally:
        _SENT.reset(token)


def tensor_bytes(data: bytes) -> int:
    """Return how many bytes of `packed` are numbers of tensors.

    Examples
    --------
    >>> tensor_bytes(packed({"one": torch.ones(2), "two": 2}))
    8
    """
    return sum(len(raw) for raw, _, _ in pickle.loads(data)[1])


@contextmanager
def alone() -> Iterator[None]:
    """Let `live` find no default group: work of one rank, for which the others wait.

    Examples
    --------
    >>> with alone():
    ...     live() is None
    True
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def packed(value: Any) -> bytes:
    """Return a value as bytes; of a view only what it shows, each tensor once.

    Examples
    --------
    >>> wide = torch.zeros(1000, 1000)
    >>> len(packed({"corner": wide[:2, :2]})) < 1000
    True
    """
    frame, held = _apart(value)
    return pickle.dumps((frame, [_raw(tensor) for tensor in held]))


def held_tensors(value: Any) -> list[Tensor]:
    """Return the tensors that `packed` would pack; they may have no storage.

    Examples
    --------
    >>> one = torch.ones(2, device="meta")
    >>> len(held_tensors({"one": one, "again": one, "two": (one + one,)}))
    2
    """
    return _apart(value)[1]


def _apart(value: Any) -> tuple[bytes, list[Tensor]]:
    """Return a value without its tensors, and these, each once."""
    held: dict[Any, tuple[int, Tensor]] = {}

    def place(value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if not value.numel() or value.is_meta:
            key: Any = id(value)
        else:
            key = value.data_ptr(), value.shape, value.stride(), value.dtype
        return held.setdefault(key, (len(held), value))[0]

    return _dumped(value, place), [tensor for _, tensor in held.values()]


def unpacked(data: bytes, device: torch.device | None = None) -> Any:
    """Return the value of bytes that `packed` made, tensors on a device.

    Examples
    --------
    >>> unpacked(packed({"one": torch.ones(2), "two": 2}))
    {'one': tensor([1., 1.]), 'two': 2}
    """
    frame, raw = pickle.loads(data)
    tensors = [_tensor(*each).to(device) for each in raw]
    reader = pickle.Unpickler(io.BytesIO(frame))
    reader.persistent_load = tensors.__getitem__  # type: ignore[method-assign]
    return reader.load()


def _dumped(value: Any, place: Callable[[Any], int | None]) -> bytes:
    written = io.BytesIO()
    writer = pickle.Pickler(written)
    writer.persistent_id = place  # type: ignore[method-assign]
    writer.dump(value)
    return written.getvalue()


def _raw(tensor: Tensor) -> tuple[bytes, torch.dtype, tuple[int, ...]]:
    flat = tensor.detach().cpu().contiguous().flatten()
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return data, tensor.dtype, tuple(tensor.shape)


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)

"""Batches in every shape the contract allows, checked before they are used."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.errors import UnsupportedModelError

Progress = bool | Callable[[int], Any]
Inputs = Tensor | tuple[Any, ...] | dict[str, Any]  # tensors, nested as they come


@dataclass(frozen=True, eq=False)
class Batch:
    """Model inputs and labels whose axis 0 is the example.

    Where they are not `counted`, they only show the form of what others count.
    """

    x: Inputs
    y: Tensor | None
    first: int = 0
    counted: bool = True

    def __len__(self) -> int:
        """Return the number of examples."""
        return int(self.tensors()[0].shape[0])

    @property
    def signature(self) -> tuple[torch.Size, ...]:
        """Shapes of the inputs without the example axis."""
        return tuple(t.shape[1:] for t in self.tensors())

    def part(self, examples: slice | list[int]) -> "Batch":
        """Return some examples."""
        y = None if self.y is None else self.y[examples]
        start = examples.start or 0 if isinstance(examples, slice) else 0
        return Batch(map_inputs(self.x, lambda t: t[examples]), y, self.first + start)

    def own(self, tensor: Tensor) -> Tensor:
        """Return a tensor, copied if it is a view of x: a loader may fill x again."""
        place = tensor.untyped_storage().data_ptr()
        lent = any(place == t.untyped_storage().data_ptr() for t in self.tensors())
        return tensor.clone() if lent else tensor

    def arguments(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments of the model call.

        A dict holds keyword arguments, unless the model knows none of its keys.
        """
        if isinstance(self.x, dict):
            known = inspect.signature(model.forward).parameters
            anything = any(p.kind is p.VAR_KEYWORD for p in known.values())
            if anything or not known.keys().isdisjoint(self.x):
                return (), self.x
        return (self.x if isinstance(self.x, tuple) else (self.x,)), {}

    def through(self, model: nn.Module, called: Callable[..., Any] | None = None) -> Any:
        """Return what a model, or what stands for it, makes of the inputs.

        What it raises says in a note what it was given.
        """
        args, kwargs = self.arguments(model)
        try:
            return (called or model)(*args, **kwargs)
        except Exception as error:
            kinds = (str(t.dtype).removeprefix("torch.") for t in self.tensors())
            shapes = (str(tuple(t.shape)) for t in self.tensors())
            given = ", ".join(map(" ".join, zip(kinds, shapes, strict=True)))
            error.add_note(
                f"The forward pass of {type(model).__name__} raised this for inputs "
                f"{given}: give what model(x) takes by itself, the example in axis 0."
            )
            raise

    def tensors(self) -> list[Tensor]:
        """Return the input tensors, in order."""
        return list(_leaves(self.x))

    def require_outputs(self, output: Tensor) -> None:
        """Refuse an output that has not one row an example.

        Raises
        ------
        UnsupportedModelError
            Naming its shape.
        """
        if output.shape[:1] != (len(self),):
            raise UnsupportedModelError(
                f"For {len(self)} examples the model's output has shape "
                f"{tuple(output.shape)}; axis 0 must be the example."
            )


def map_inputs(x: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply a function to every input tensor."""
    if isinstance(x, dict):
        return {name: map_inputs(part, function) for name, part in x.items()}
    if isinstance(x, tuple):
        return tuple(map_inputs(part, function) for part in x)
    return function(x)


def _leaves(x: Any) -> Iterator[Any]:
    """Yield what nested mappings, tuples and lists hold."""
    if isinstance(x, Mapping):
        x = tuple(x.values())
    if isinstance(x, (tuple, list)):
        for part in x:
            yield from _leaves(part)
    else:
        yield x


def _plain(x: Any) -> Any:
    """Return nested mappings as dicts (a tokenizer's are not) and lists as tuples."""
    if isinstance(x, Mapping):
        return {name: _plain(part) for name, part in x.items()}
    return tuple(map(_plain, x)) if isinstance(x, (tuple, list)) else x


@dataclass(eq=False)
class Repeated:
    """Data of several passes, each of which must give what the first one gave.

    Count and sums of all numbers are compared, so that another order is let through,
    unless sampled labels, which follow the place of an example, make it matter.
    """

    data: Any
    ordered: bool
    first: tuple[float, ...] | None = None

    def __iter__(self) -> Iterator[Any]:
        """Yield the pairs of one pass.

        Raises
        ------
        ValueError
            At the end of a pass that differs from the first.
        """
        found = _Sums()
        for item in _pairs(self.data):
            found.add(item, self.ordered)
            yield item
        if self.first is None:
            self.first = found.numbers
        elif not found.agree(self.first):
            raise ValueError(
                f"data: a pass over {type(self.data).__name__} gave other examples than "
                "the pass before, and the methods asked for need several. Give data that "
                "repeat: no augmentation, no drop_last with shuffle, no generator that is "
                "used up; sampled labels need shuffle=False. Or collect() once."
            )


@dataclass(eq=False)
class _Sums:
    """What one pass gave: examples, Σ x, Σ x², and Σ x of the first batch."""

    numbers: tuple[float, ...] = ()

    def add(self, item: Any, ordered: bool) -> None:
        """Add a pair or a mapping; what is neither is complained of elsewhere."""
        paired = isinstance(item, (tuple, list)) and len(item) == 2
        if not paired and not isinstance(item, Mapping):
            return
        x = item[0] if paired else item
        leaves = [t for t in _leaves(x) if isinstance(t, Tensor)]
        tensors = [t.detach().double() for t in leaves]
        total = sum(float(t.sum()) for t in tensors)
        squares = sum(float(t.square().sum()) for t in tensors)
        count = float(tensors[0].shape[0]) if tensors and tensors[0].dim() else 0.0
        start = total if ordered and not self.numbers else 0.0
        before = self.numbers or (0.0, 0.0, 0.0, 0.0)
        new = (count, total, squares, start)
        self.numbers = tuple(a + b for a, b in zip(before, new, strict=True))

    def agree(self, first: tuple[float, ...]) -> bool:
        """Tell whether another pass gave the same, up to the order of sums."""
        if len(self.numbers) != len(first):
            return False
        allowed = 1e-9 * (1 + first[2]) if first else 0.0
        pairs = zip(self.numbers, first, strict=True)
        return (
            all(abs(a - b) <= allowed for a, b in pairs) and self.numbers[:1] == first[:1]
        )


def batches(
    data: Any,
    device: torch.device,
    dtype: torch.dtype | None,
    first: int = 0,
    model: nn.Module | None = None,
) -> Iterator[Batch]:
    """Yield checked batches on a device, floats in the model's dtype.

    `first` is the index of the first example: sampled labels depend on it. A model that
    has a method `as_pair` makes pairs of what the data give, as that of `fl.hf` does.

    Raises
    ------
    ValueError
        If an item is no (x, y) pair, is empty, has axes 0 of unequal length, or holds
        NaN or infinity in x.
    TypeError
        If the data cannot be iterated.
    """
    if not isinstance(first, int) or first < 0:
        raise ValueError(f"first={first!r}: the index of the first example is expected.")
    before = first
    as_pair = getattr(model, "as_pair", None)
    items = [data] if as_pair and isinstance(data, Mapping) else _pairs(data)
    for item in items:
        batch = _checked(as_pair(item) if as_pair else item, first)
        yield moved(batch, device, dtype)
        first += len(batch)
    if first == before:
        msg = "data: no example was given; (x, y) or an iterable of pairs is expected."
        raise ValueError(msg)


def moved(batch: Batch, device: torch.device, dtype: torch.dtype | None) -> Batch:
    """Return a batch on a device, floats of x in a dtype, as autograd takes them."""

    def move(tensor: Tensor, floats: torch.dtype | None = dtype) -> Tensor:
        kind = floats if tensor.is_floating_point() else None
        there = tensor.to(device=device, dtype=kind)
        return there.clone() if there.is_inference() else there

    y = None if batch.y is None else move(batch.y, None)
    return Batch(map_inputs(batch.x, move), y, batch.first)


def _pairs(data: Any) -> Iterable[Any]:
    if isinstance(data, tuple):
        return [data]
    if isinstance(data, (Tensor, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data: {type(data).__name__} was given; a tuple (x, y) or an iterable of "
            "pairs, e.g. a DataLoader, is expected. Without labels use (x, None)."
        )
    return data


def _checked(item: Any, first: int) -> Batch:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        sized = hasattr(item, "__len__")
        what = f"{type(item).__name__} of length {len(item)}" if sized else item
        raise ValueError(f"data: each item must be a pair (x, y); {what} was given.")
    x, y = _plain(item[0]), item[1]
    tensors = list(_leaves(x))
    other = next((type(t) for t in tensors if not isinstance(t, Tensor)), None)
    if not tensors or other is not None:
        raise ValueError(
            f"data: x must be a tensor, or tuples and mappings of tensors, and holds "
            f"{'nothing' if other is None else other.__name__}."
        )
    if y is not None and not isinstance(y, Tensor):
        msg = f"data: y must be a tensor or None, not {type(y)}; see torch.as_tensor."
        raise ValueError(msg)
    given = tensors if y is None else [*tensors, y]
    _require_dense(given)
    sizes = [t.shape[0] if t.dim() else 0 for t in given]
    if len(set(sizes)) != 1:
        msg = f"data: axis 0 is the example, but x and y have lengths {sizes} there."
        raise ValueError(msg)
    if sizes[0] == 0:
        raise ValueError("data: a batch is empty.")
    for tensor in tensors:
        if tensor.is_floating_point():
            _require_squares(tensor)
    return Batch(x, y, first)


def _require_dense(tensors: list[Tensor]) -> None:
    """Raise unless examples can be taken out of every tensor."""
    for tensor in tensors:
        kinds = {
            "nested": tensor.is_nested,
            "masked": isinstance(tensor, torch.masked.MaskedTensor),
            "sparse": tensor.layout != torch.strided,
            "quantised": tensor.is_quantized,
            "meta": tensor.is_meta,
        }
        if found := next((kind for kind, holds in kinds.items() if holds), ""):
            raise ValueError(
                f"data: a {found} tensor was given; dense tensors that hold numbers are "
                "expected, with the example in axis 0. See to_dense, dequantize, "
                "torch.nested.to_padded_tensor and MaskedTensor.to_tensor."
            )


def _require_squares(x: Tensor) -> None:
    """Raise unless the sum of squares, a second moment, is finite."""
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    if bool(torch.isfinite(norm.square())):
        return
    bad = int((~torch.isfinite(x)).reshape(len(x), -1).any(1).sum())
    if bad:
        raise ValueError(f"data: x holds NaN or infinity in {bad} of {len(x)} examples.")
    raise ValueError(
        f"data: x holds numbers up to {float(x.abs().max()):.0e}, whose squares are not "
        f"numbers of {str(norm.dtype).removeprefix('torch.')}. Scale the data first."
    )


def length(data: Any) -> int:
    """Return the examples of one batch, 0 where they are not known beforehand."""
    given = data[0] if isinstance(data, tuple) and data else data
    single = isinstance(data, (tuple, Mapping))
    held = next(_leaves(given), None) if single else None
    if not isinstance(held, Tensor) or held.is_nested or not held.dim():
        return 0
    return len(held)


def is_empty(data: Any) -> bool:
    """Tell whether data are known to have no example: an empty batch, no batches.

    Examples
    --------
    >>> is_empty([]), is_empty((torch.ones(0, 3), None)), is_empty((torch.ones(1), None))
    (True, True, False)
    """
    given = data.data if isinstance(data, Repeated) else data
    if not isinstance(given, (tuple, Mapping)):
        return hasattr(given, "__len__") and len(given) == 0
    held = next(_leaves(given), None)
    if not isinstance(held, Tensor) or held.is_nested or not held.dim():
        return False
    return not len(held)


def reporter(progress: Progress) -> tuple[Callable[[int], Any], Callable[[], Any]]:
    """Return what is told how many examples are done, and what is called at the end."""
    if callable(progress):
        return progress, lambda: None
    if not progress:
        return (lambda _: None), (lambda: None)
    from tqdm.auto import tqdm

    bar = tqdm(unit=" examples", desc="Fisher statistics")
    return bar.update, bar.close

"""The partition of a model's parameters into blocks, and the modes that it is in."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from math import prod
from threading import Lock, RLock
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from fisherlab.errors import UnsupportedModelError, meant
from fisherlab.numerics.devices import generators_kept
from fisherlab.settings import put_back


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into eval mode, and every module back into its own mode afterwards.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> with frozen(model):
    ...     model[1].training
    False
    >>> model[1].training
    True
    """
    modes = [(module, module.training) for module in model.modules()]

    def undo() -> None:
        for module, mode in modes:
            module.training = mode

    with put_back(undo):
        yield model.eval()


_OF_TABLES = {
    "scale_grad_by_freq": "scales the gradients of {} by how often a batch holds a token, "
    "so they are no derivatives; set it to False.",
    "max_norm": "changes the rows of {} in place where they are looked up, so statistics "
    "would change the model; scale the rows once and set it to None.",
}


def require_independent_examples(model: nn.Module) -> None:
    """Refuse modules that couple examples or draw random numbers.

    Raises
    ------
    UnsupportedModelError
        Naming the modules and the remedy.

    Examples
    --------
    >>> require_independent_examples(nn.Dropout().eval())
    >>> require_independent_examples(nn.Sequential(nn.Dropout()))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fisherlab.errors.UnsupportedModelError: Dropout is active in ...
    """
    coupled = [
        name
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None)
    ]
    if coupled:
        raise UnsupportedModelError(
            f"Batch statistics couple the examples in {_names(coupled)}, so they have "
            "no per-example gradients. Use `with fisherlab.frozen(model):` (eval mode); "
            "track_running_stats must be on."
        )
    for option, why in _OF_TABLES.items():
        if tables := [n for n, m in model.named_modules() if getattr(m, option, None)]:
            raise UnsupportedModelError(f"{option} {why.format(_names(tables))}")
    random = [name for name, m in model.named_modules() if _randomises(m)]
    if random:
        raise UnsupportedModelError(
            f"Dropout is active in {_names(random)}, so the Fisher would be random. "
            "Use `with fisherlab.frozen(model):` (eval mode)."
        )


def _randomises(module: nn.Module) -> bool:
    if not module.training:
        return False
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RReLU):
        return module.lower < module.upper
    return isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and module.dropout > 0


def _names(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


F = TypeVar("F", bound=Callable[..., Any])
_LOCKS: "WeakKeyDictionary[nn.Module, RLock]" = WeakKeyDictionary()
_GUARD = Lock()


def exclusive(model: nn.Module) -> "RLock":
    """Return the lock of a model, whose parameters and hooks statistics change in place.

    Threads that collect from one model take turns.

    Examples
    --------
    >>> model = nn.Linear(3, 2)
    >>> exclusive(model) is exclusive(model)
    True
    """
    with _GUARD:
        return _LOCKS.setdefault(uncompiled(model), RLock())


@contextmanager
def without_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """Put the backward hooks of modules and parameters aside, and back afterwards.

    They belong to a training: one that masks or scales gradients would change the Fisher
    matrix, and one that watches them would see those of labels that nobody gave.

    Examples
    --------
    >>> model = nn.Linear(2, 1)
    >>> hook = model.weight.register_hook(lambda gradient: 0 * gradient)
    >>> with without_gradient_hooks(model):
    ...     model(torch.ones(1, 2)).backward()
    >>> model.weight.grad
    tensor([[1., 1.]])
    """
    kept: list[tuple[Any, str, Any]] = [
        (module, name, getattr(module, name))
        for module in uncompiled(model).modules()
        for name in ("_backward_hooks", "_backward_pre_hooks")
    ]
    kept += [(p, "_backward_hooks", p._backward_hooks) for p in model.parameters()]
    kept = [held for held in kept if held[2]]

    def undo() -> None:
        for holder, name, hooks in kept:
            setattr(holder, name, hooks)

    with put_back(undo):
        for holder, name, _ in kept:
            setattr(holder, name, None if isinstance(holder, Tensor) else {})
        yield


def alone(function: F) -> F:
    """Let one thread at a time call a function of a model.

    Examples
    --------
    >>> @alone
    ... def weights(model):
    ...     return sum(p.numel() for p in model.parameters())
    >>> weights(nn.Linear(3, 2))
    8
    """

    @wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with exclusive(model), without_gradient_hooks(model):
            return function(model, *args, **kwargs)

    return cast("F", call)


def in_turn(function: F) -> F:
    """Let one thread at a time make the next item; between items the model is whole.

    Examples
    --------
    >>> @in_turn
    ... def names(model):
    ...     yield from (name for name, _ in model.named_parameters())
    >>> list(names(nn.Linear(3, 2)))
    ['weight', 'bias']
    """

    @wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
        items = function(model, *args, **kwargs)
        while True:
            with exclusive(model), without_gradient_hooks(model):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    return cast("F", call)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that torch.compile or DDP was given, or the model itself.

    Statistics watch layers through hooks, at which a compiled graph breaks; so they are
    taken from this module, whose parameters are the same and have their plain names.

    Examples
    --------
    >>> import torch
    >>> model = nn.Linear(3, 2)
    >>> uncompiled(torch.compile(model, backend="eager")) is model
    True

    Raises
    ------
    TypeError
        For what is no module.
    UnsupportedModelError
        For a model of TorchScript, whose calls cannot be followed, or a quantised one.
    """
    if not isinstance(model, nn.Module):
        msg = f"model={model!r}: a torch.nn.Module is expected; wrap a function in one."
        raise TypeError(msg)
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "The model is TorchScript, whose layers cannot be followed; give the module "
            "that it was made from."
        )
    places = (f"{type(part).__module__}." for part in model.modules())
    if any(place.startswith(QUANTISED) for place in places):
        raise UnsupportedModelError(
            "The model is quantised: its weights are integers, which have no gradients; "
            "give the model that it was made from."
        )
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    found = model.module if wrapped else getattr(model, "_orig_mod", model)
    if found is model or not isinstance(found, nn.Module):
        return model
    return uncompiled(found)


QUANTISED = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FIRST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
Span = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """One weight parameter with the bias that shares its rows.

    Parameters
    ----------
    name
        The weight's name in ``named_parameters()`` without a trailing ``.weight``.
    weight, bias
        Names of the parameters; bias may be None.
    shape
        Shape of the weight parameter as stored.
    rows
        d_out: ``shape[0]``, or all entries for a norm layer's weight and a scalar.
    output_axis
        Axis of the weight as stored that runs over the outputs: 1 for transposed
        convolutions and for ``x @ W``, whose bias is a block of its own. The rows of an
        embedding's table are taken for its outputs.
    groups
        Groups of rows, each with outputs of its own, where axis 1 is the output.
    kind
        What the module is, in a few words for figures and tables, such as "Linear 3→2".

    Examples
    --------
    >>> block = Block("0", "0.weight", "0.bias", (2, 3), 2)
    >>> block.weight_shape
    (2, 4)
    """

    name: str
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    rows: int
    output_axis: int = 0
    groups: int = 1
    kind: str = field(default="", compare=False, repr=False)

    @property
    def outputs(self) -> Int[Tensor, "o i"]:
        """Return the output that each entry of the (d_out, d_in) weight belongs to.

        Examples
        --------
        >>> Block("0", "0.weight", None, (2, 3), 2, output_axis=1).outputs.tolist()
        [[0, 1, 2], [0, 1, 2]]
        """
        rows, columns = self.weight_shape
        row = torch.arange(rows)[:, None]
        if self.output_axis == 0:
            return row.expand(rows, columns)
        own = self.shape[1]
        group = row // (rows // self.groups)
        return group * own + torch.arange(columns) // (columns // own)

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in), the bias as one last column."""
        columns = prod(self.shape) // self.rows if self.rows else 0
        return self.rows, columns + (self.bias is not None)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters, weight first."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def some_rows(self, first: int, last: int) -> "Block":
        """Return the block of some rows, as if they were a weight of their own."""
        if (first, last) == (0, self.rows):
            return self
        rows = last - first
        return replace(self, shape=(rows, *self.shape[1:]), rows=rows)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return w (..., d_out, d_in) from tensors shaped like the parameters.

        Raises
        ------
        ValueError
            If a parameter is missing.
        """
        missing = [name for name in self.parameters if name not in tensors]
        if missing:
            raise ValueError(
                f"pack of block {self.name!r}: {missing} not given; the parameters "
                f"{list(self.parameters)} are expected, got {sorted(tensors)}."
            )
        weight = tensors[self.weight]
        lead = weight.shape[: weight.dim() - len(self.shape)]
        columns = self.weight_shape[1] - (self.bias is not None)
        parts = [weight.reshape(*lead, self.rows, columns)]
        if self.bias is not None:
            parts.append(tensors[self.bias].reshape(*lead, self.rows, 1))
        return torch.cat(parts, -1)

    def unpack(self, w: Tensor) -> dict[str, Tensor]:
        """Return tensors shaped like the parameters from w (..., d_out, d_in).

        Raises
        ------
        ValueError
            If w does not have the block's shape.
        """
        if w.shape[-2:] != self.weight_shape:
            raise ValueError(
                f"unpack of block {self.name!r}: shape {tuple(w.shape)} was given, "
                f"(..., {self.weight_shape[0]}, {self.weight_shape[1]}) is expected."
            )
        lead = w.shape[:-2]
        if self.bias is None:
            return {self.weight: w.reshape((*lead, *self.shape))}
        return {
            self.weight: w[..., :-1].reshape((*lead, *self.shape)),
            self.bias: w[..., -1].reshape((*lead, *self._bias_shape)),
        }

    @property
    def _bias_shape(self) -> tuple[int, ...]:
        return self.shape if self.rows > self.shape[0] else (self.rows,)


@alone
def blocks(model: nn.Module) -> dict[str, Block]:
    """Partition the trainable parameters of a model into blocks, in order.

    Tied parameters appear once, under the first name. A bias joins the weight of the
    same module whose rows it shares; otherwise it is a block of its own. Parameters
    without entries belong to none.

    Raises
    ------
    UnsupportedModelError
        If a lazy parameter has no shape yet.

    Examples
    --------
    >>> list(blocks(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))))
    ['0', '2']
    """
    model = uncompiled(model)
    trainable = {
        n: p
        for n, p in model.named_parameters()
        if p.requires_grad and (is_lazy(p) or p.numel())
    }
    modules = dict(model.named_modules())
    found: dict[str, Block] = {}
    joined: set[str] = set()
    for name, parameter in trainable.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UnsupportedModelError(
                f"The parameter {name!r} has no shape yet; run the model on a batch first."
            )
        if name in joined:
            continue
        module = modules[name.rpartition(".")[0]]
        block = _block(name, parameter, module, trainable)
        if block.bias is not None:
            joined.add(block.bias)
        found[block.name] = block
    return found


def _block(
    name: str, parameter: Tensor, module: nn.Module, trainable: Mapping[str, Tensor]
) -> Block:
    shape = tuple(parameter.shape)
    whole = isinstance(module, NORMS) or not shape
    rows = parameter.numel() if whole else shape[0]
    path, _, last = name.rpartition(".")
    axis = 0 if whole else output_axis(module, last)
    groups = module.groups if isinstance(module, TRANSPOSED) else 1
    bias = None
    if "weight" in last and axis == 0:
        partner = f"{path}.{last.replace('weight', 'bias')}".lstrip(".")
        other = trainable.get(partner)
        if other is not None and other.numel() == rows:
            bias = partner
    return Block(
        name.removesuffix(".weight"), name, bias, shape, rows, axis, groups, kind(module)
    )


WIDTHS = (
    ("in_channels", "out_channels"),
    ("in_features", "out_features"),
    ("num_embeddings", "embedding_dim"),
)


def kind(module: nn.Module) -> str:
    """Say what a module is: its class, and its widths where it tells them.

    Examples
    --------
    >>> kind(nn.Conv2d(3, 16, 5)), kind(nn.LayerNorm(4))
    ('Conv2d 3→16', 'LayerNorm')
    """
    name = type(module).__name__
    for before, after in WIDTHS:
        if hasattr(module, before) and hasattr(module, after):
            return f"{name} {getattr(module, before)}→{getattr(module, after)}"
    return name


def select(found: Mapping[str, Block], layers: Sequence[str] | None) -> dict[str, Block]:
    """Choose blocks by name, by module prefix or by the name of a parameter.

    Raises
    ------
    UnsupportedModelError
        If there are none: no parameter of the model is trainable.
    ValueError
        Listing the known names, if one is unknown.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    >>> list(select(blocks(model), ["2"]))
    ['2']
    """
    if not found:
        raise UnsupportedModelError("The model has no trainable parameters.")
    if layers is None:
        return dict(found)
    if isinstance(layers, str):
        layers = [layers]
    if not layers:
        raise ValueError(f"layers: no name was given; known blocks: {', '.join(found)}.")
    chosen: dict[str, Block] = {}
    for wanted in layers:
        hits = {
            name: block
            for name, block in found.items()
            if name == wanted or name.startswith(f"{wanted}.") or wanted in block.parameters
        }
        if not hits:
            msg = f"layers: {wanted!r} is unknown; known blocks: {', '.join(found)}."
            msg += meant(wanted, found)
            raise ValueError(msg)
        chosen |= hits
    return {name: block for name, block in found.items() if name in chosen}


@dataclass(frozen=True)
class Place:
    """Rows and columns of a parameter as a matrix (d_out, ...).

    Parameters
    ----------
    rows, columns
        First, and one past the last.
    turned
        Whether the tensor is their transpose.
    """

    rows: Span
    columns: Span
    turned: bool = False


def place_of(tensor: Tensor, parameter: Tensor) -> Place | None:
    """Return where a tensor lies, None if it is no rectangle of the parameter.

    Strides tell: views, slices, reshapes and transposes are found, whoever made them.

    Examples
    --------
    >>> w = torch.zeros(6, 4)
    >>> place_of(w[2:4], w)
    Place(rows=(2, 4), columns=(0, 4), turned=False)
    >>> place_of(w[:, 1:].T, w)
    Place(rows=(0, 6), columns=(1, 4), turned=True)
    >>> place_of(w[::2], w) is None
    True
    """
    if not parameter.dim() or not tensor.dim():
        return None
    height = parameter.shape[0]
    width = parameter.numel() // max(height, 1)
    if tensor is parameter:
        return Place((0, height), (0, width))
    if not parameter.is_contiguous() or not tensor.numel():
        return None
    try:
        found = tensor.view(tensor.shape[0], -1)
    except RuntimeError:  # no matrix without a copy
        return None
    if found.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
        return None
    offset = int(found.storage_offset() - parameter.storage_offset())
    at = divmod(offset, max(width, 1))
    return _rectangle(found, (height, width), at) or _rectangle(
        found.T, (height, width), at, turned=True
    )


def _rectangle(
    found: Tensor, shape: tuple[int, int], at: tuple[int, int], turned: bool = False
) -> Place | None:
    """Return the rows and columns from a corner on, if the strides are the parameter's."""
    (height, width), (row, column) = shape, at
    (rows, columns), (down, right) = found.shape, found.stride()
    aligned = (rows == 1 or down == width) and (columns == 1 or right == 1)
    inside = row >= 0 and row + rows <= height and column + columns <= width
    if not aligned or not inside:
        return None
    return Place((row, row + rows), (column, column + columns), turned)


def output_axis(module: nn.Module, name: str) -> int:
    """Return 1 where the weight is stored (in, out), else 0.

    Modules of one's own that hold a weight (with a bias) and nothing else are tried: the
    gradient of one output for one row of numbers fills a row of F.linear's weight, and a
    column of that of ``x @ W``, which GPT-2's Conv1D has.

    Examples
    --------
    >>> [output_axis(m, "weight") for m in (nn.ConvTranspose1d(2, 3, 1), nn.Linear(2, 2))]
    [1, 0]
    """
    if isinstance(module, TRANSPOSED):
        return int(name == "weight")
    own = module._parameters
    alone = not module._modules and not module._buffers and set(own) <= {"weight", "bias"}
    weight = own.get(name)
    if name != "weight" or weight is None or weight.dim() != 2 or not alone:
        return 0
    known = isinstance(module, FIRST + RECURRENT) or weight.numel() < 2
    return 0 if known else _tried(module, weight)


def _tried(module: nn.Module, weight: Tensor) -> int:
    """Call a copy that shares nothing on one row, of either length."""
    for length in sorted(set(weight.shape)):
        grad = _gradient(module, weight, length)
        if grad is None:
            continue
        rows, columns = int(grad.any(1).sum()), int(grad.any(0).sum())
        if (rows, columns) in ((length, 1), (1, length)):
            return int(columns == 1 and weight.shape[0] == length)
    return 0


def _gradient(module: nn.Module, weight: Tensor, length: int) -> Tensor | None:
    """Return ∂y₀/∂W for a row of ones of this length, or None if it is not taken."""
    twin, small = copy.copy(module), 1 / weight.numel()
    with generators_kept(weight.device), torch.enable_grad():
        try:
            leaf = nn.Parameter(torch.full_like(weight, small))
            twin._parameters = {**module._parameters, "weight": leaf}
            out = type(module).forward(twin, weight.new_ones(1, length))
            (grad,) = torch.autograd.grad(out.flatten()[0], leaf)
        except Exception:  # any failure of somebody else's code: it takes other inputs
            return None
    return grad

"""Which module a model is, in which modes its modules are, and who may use it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import Lock, RLock
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fisherlab.durable import put_back
from fisherlab.errors import UnsupportedModelError


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
        For a model of TorchScript, whose calls cannot be followed.
    """
    if not isinstance(model, nn.Module):
        msg = f"model={model!r}: a torch.nn.Module is expected; wrap a function in one."
        raise TypeError(msg)
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "The model is TorchScript, whose layers cannot be followed; give the module "
            "that it was made from."
        )
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    found = model.module if wrapped else getattr(model, "_orig_mod", model)
    if found is model or not isinstance(found, nn.Module):
        return model
    return uncompiled(found)

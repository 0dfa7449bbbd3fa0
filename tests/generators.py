"""Every public call of the package is watched: it leaves the global generators alone.

`watch()` wraps the public functions and methods of `fisherlab` once, before the tests are
collected. A call that comes from outside the package compares the states of the global
generators (torch, numpy) before and after, and fails the test when they differ. A test
whose own model, loader or callback draws inside the call says so by the marker
`draws("what")`. (`random` is read by beartype at every call that it checks:
`test_generators.py` looks at the sources for that one.)
"""

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

import fisherlab


class Watch:
    """How deep in the package the running call is, and who was seen to draw."""

    depth = 0
    seen: tuple[str, ...] = ()


_default_rng = np.random.default_rng


def default_rng(seed: Any = None) -> np.random.Generator:
    """Make numpy's generator; note where the package asks for one without a seed."""
    if seed is None and Watch.depth:
        caller = sys._getframe(1).f_code
        where = f"{caller.co_filename}:{caller.co_name}"
        Watch.seen += (f"a generator of numpy was made without a seed in {where}",)
    return _default_rng(seed)


def states() -> dict[str, bytes | tuple[Any, ...]]:
    """Return what the global generators would draw next."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    return {
        "numpy.random": (numpy_state[1].tobytes(), *numpy_state[2:]),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


def watched(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, watched where it is called from outside the package."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if Watch.depth or transformed:  # under torch.func the state has no bytes
            return function(*args, **kwargs)
        before = states()
        Watch.depth = 1
        try:
            return function(*args, **kwargs)
        finally:
            Watch.depth = 0
            after = states()
            Watch.seen += tuple(
                f"{function.__module__}.{function.__qualname__} changed {name}"
                for name in before
                if before[name] != after[name]
            )

    return call


def packages() -> list[ModuleType]:
    """Import the package with all its subpackages."""
    names = [m.name for m in pkgutil.iter_modules(fisherlab.__path__) if m.ispkg]
    names = [n for n in names if n != "cli"]
    return [fisherlab, *(importlib.import_module(f"fisherlab.{n}") for n in names)]


def watch() -> None:
    """Wrap every public function and every public method of the package."""
    np.random.default_rng = default_rng
    replaced: dict[int, Callable[..., Any]] = {}
    classes: set[type] = set()
    for package in packages():
        for name in dir(package):
            value = getattr(package, name)
            if not getattr(value, "__module__", "").startswith("fisherlab"):
                continue
            if isinstance(value, FunctionType):
                replaced[id(value)] = watched(value)
            elif isinstance(value, type):
                classes.update(
                    c for c in value.__mro__ if c.__module__.startswith("fisher")
                )
    for module in [m for n, m in sys.modules.items() if n.startswith("fisherlab")]:
        for name, value in list(vars(module).items()):
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)])
    for cls in classes:
        for name, value in list(vars(cls).items()):
            public = not name.startswith("_") or name in {"__call__", "__matmul__"}
            if public and isinstance(value, FunctionType):
                setattr(cls, name, watched(value))

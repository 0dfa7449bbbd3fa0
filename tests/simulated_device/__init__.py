"""A simulated accelerator, `sim`: what holds on it holds where memory is not the host's.

`device.cpp` says how. `load()` makes it known to torch, for the whole process and before
anything in it has gone backward: torch counts its devices once.
"""

import ctypes
import functools
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from tests.simulated_device.build import NoCompilerError, library

__all__ = ["Moves", "NoCompilerError", "capacity", "counted", "library", "load", "missing"]

KINDS = ("to_device", "to_host", "scalars", "waits")  # as device.cpp numbers them


@dataclass
class Moves:
    """What went between host and device or made the host wait, and by which lines."""

    to_device: int = 0
    to_host: int = 0
    scalars: int = 0
    waits: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0
    lines: list[str] = field(default_factory=list, repr=False, compare=False)

    @property
    def synchronisations(self) -> int:
        """How often the host waited for the device: a number read, a copy, a look at it."""
        return self.to_host + self.scalars + self.waits

    def add(self, kind: str, size: int) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        if kind in ("to_device", "to_host"):
            setattr(self, f"bytes_{kind}", getattr(self, f"bytes_{kind}") + size)
        self.lines.append(f"{kind}: {_line()}")


def _line() -> str:
    """The innermost line of the package on the stack."""
    frame = sys._getframe(1)
    while frame is not None and "/fisherlab/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "outside the package"
    return f"{frame.f_code.co_filename.rpartition('/fisherlab/')[2]}:{frame.f_lineno}"


@functools.cache
def load() -> torch.device:
    """Make `sim` a device of torch, and return it."""
    torch.ops.load_library(library())
    torch.utils.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device("sim", 0)


def missing(name: str) -> str:
    """Return why tests cannot run on a device, or nothing; `sim` is loaded."""
    try:
        known = load() if name == "sim" else torch.accelerator.current_accelerator(True)
    except NoCompilerError as error:
        return str(error)
    return "" if known and known.type == name else f"torch finds no {name}, but {known}"


@functools.cache
def _compiled() -> ctypes.CDLL:
    return ctypes.CDLL(str(library()))


_HEARD = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int64)


@contextmanager
def counted() -> Iterator[Moves]:
    """Count what goes between host and device, or makes the host wait, in a block."""
    moves = Moves()
    heard = _HEARD(lambda kind, size: moves.add(KINDS[kind], size))
    _compiled().listen(heard)
    try:
        yield moves
    finally:
        _compiled().listen(_HEARD(0))


@contextmanager
def capacity(size: int) -> Iterator[None]:
    """Let the device have so many bytes in a `with` block."""
    whole = torch.accelerator.get_memory_info(0)[1]
    _compiled().set_capacity(ctypes.c_int64(size))
    try:
        yield
    finally:
        _compiled().set_capacity(ctypes.c_int64(whole))


def _module() -> types.ModuleType:
    """`torch.sim`: what torch asks of a device's module."""
    module = types.ModuleType("torch.sim")

    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module.device = lambda device: nullcontext()  # there is one
    module.is_initialized = lambda: True
    module._lazy_init = lambda: None
    module._is_in_bad_fork = lambda: False
    module.synchronize = lambda device=None: torch.accelerator.synchronize()
    module.mem_get_info = lambda device=None: torch.accelerator.get_memory_info(0)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    generator = torch.ops.simulated_device.generator()
    module.default_generators = (generator,)
    module.manual_seed = generator.manual_seed
    module.manual_seed_all = generator.manual_seed
    module.initial_seed = generator.initial_seed
    module.get_rng_state = lambda device=None: generator.get_state()
    module.set_rng_state = lambda state, device=None: generator.set_state(state)
    return module

"""Numbers that can be had again: random ones of a step, and sums in one order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fisherlab.durable import put_back
from fisherlab.numerics.devices import generator_states, generators_kept


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

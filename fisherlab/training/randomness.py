"""Numbers that can be had again: random ones of a step, and sums in one order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
    on_cuda = device.type == "cuda"
    number = _number(seed, step)
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(number)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        yield


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
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.backends.cudnn.benchmark = searched

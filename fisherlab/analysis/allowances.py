"""What a comparison costs cell by cell, and what is left out to stay within a limit.

Counts, no clock: the same request is cut alike on every machine. Flops are multiply-adds.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import final

from fisherlab.approximators import (
    KPSVD,
    Approximator,
    Deflation,
    Diagonal,
    ExactBlock,
    KFACCorrected,
    MiniBlock,
)
from fisherlab.approximators.costs import EIGEN, building_flops
from fisherlab.approximators.kpsvd.position_gram import PositionGram, position_bytes
from fisherlab.approximators.kpsvd.rearranged import Rearranged
from fisherlab.approximators.kpsvd.solvers import choose
from fisherlab.catalogue import NEEDS, Needs
from fisherlab.numerics.memory import readable
from fisherlab.numerics.packed import pair_count
from fisherlab.operators.factored import KEPT_BLOCK, ROUNDS, FactoredFisher
from fisherlab.operators.kronecker import DENSE_ROWS
from fisherlab.samples import OuterSamples, Samples

RATE = 2e10  # multiply-adds a second that two plain cores do in float64, about
READ = 20  # multiply-adds in the time that one number takes from memory
SWEEPS = 4  # times that norms, traces and diagonals of one cell read the samples
EFFORT = 10  # products of block Krylov steps over those of the power steps that are counted
TERM_READS = 25  # of the factors of one term, until its errors are known
STEP_READS = 25  # of a column in a step of a Krylov space
STEPS = 8  # of a Krylov space before it is restarted
CHECKS = 300  # products that look for the smallest eigenvalue of a large sum, about
SOLVES = 4  # what solves of one sample each lose to small products
NUMBER = 8  # bytes

ITERATED = (KPSVD, Deflation, KFACCorrected)
# What is read first is computed first, at the same price.
_WORDS = {str(part): words for part, words in NEEDS.items()}
_WEIGHTS: dict[str, float] = {"matrix": 1, "gradient": 3, "damping": 10}
_UNITS = {"": 1, "s": 1, "min": 60, "m": 60, "h": 3600}


@final
@dataclass(frozen=True)
class Work:
    """Multiply-adds, and bytes held at once.

    Examples
    --------
    >>> (Work(2, 8) + Work(3, 4)).flops
    5
    """

    flops: float
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Add the flops; of the bytes the larger count."""
        return Work(self.flops + other.flops, max(self.bytes, other.bytes))


@final
@dataclass(frozen=True)
class Allowance:
    """Multiply-adds and bytes that a comparison may take.

    Examples
    --------
    >>> Allowance.of("2 min", 2**30).flops
    2400000000000.0
    """

    flops: float
    bytes: float

    @classmethod
    def of(cls, time: float | str | None, limit: float) -> "Allowance":
        """Return what a time, counted at `RATE`, and a number of bytes allow."""
        return cls(inf if time is None else parse_time(time) * RATE, limit)


def parse_time(time: float | str) -> float:
    """Turn a time into seconds: a number, or a text such as "5 min".

    Raises
    ------
    ValueError
        If it cannot be read or is not positive.

    Examples
    --------
    >>> parse_time("1.5 min")
    90.0
    """
    if isinstance(time, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", time)
        unit = None if match is None else _UNITS.get(match[2])
        if match is None or unit is None or match[1].count(".") > 1 or match[1] == ".":
            raise ValueError(f"time={time!r} is not understood; write e.g. '5 min'.")
        time = float(match[1]) * unit
    if not time > 0:
        raise ValueError(f"time={time!r} must be positive.")
    return float(time)


@final
@dataclass(frozen=True)
class Cut:
    """Which parts of which cells are left out, and what the rest costs.

    Parameters
    ----------
    reasons
        (layer, approximator, part) to the sentence that its status shall hold.
    flops
        Multiply-adds of what is kept.
    """

    reasons: Mapping[tuple[str, str, str], str]
    flops: float


def cut(
    layers: Mapping[str, Samples],
    methods: Mapping[str, Approximator],
    parts: Sequence[Needs],
    allowance: Allowance,
    levels: int = 1,
) -> Cut:
    """Choose what a comparison computes, cheapest cells first, until the allowance ends.

    Parameters
    ----------
    layers
        The samples of every layer, with or without storage.
    methods
        The approximations by name.
    parts
        What is asked of them.
    allowance
        What all may take together (flops), and each cell by itself (bytes).
    levels
        How many dampings.

    Examples
    --------
    >>> import torch
    >>> from fisherlab.approximators import KFAC
    >>> samples = OuterSamples(torch.ones(9, 40), torch.ones(2, 9, 30))
    >>> found = cut({"fc": samples}, {"kfac": KFAC()}, ["matrix"], Allowance(1e4, 1e9))
    >>> [key for key in found.reasons]
    [('fc', 'kfac', 'matrix')]
    """
    cells: dict[tuple[str, str, str], Work] = {}
    common: dict[tuple[str, str], Work] = {}
    for layer, samples in layers.items():
        for part in parts:
            times = 1 if part == "matrix" else levels
            common[layer, part] = _scaled(shared(samples, part), times)
            for name, method in methods.items():
                each = own(samples, method, part)
                cells[layer, name, part] = _scaled(each, times)
    return chosen(cells, common, len(methods), allowance)


def _scaled(work: Work, times: int) -> Work:
    return Work(times * work.flops, work.bytes)


def chosen(
    cells: Mapping[tuple[str, str, str], Work],
    shared: Mapping[tuple[str, str], Work],
    methods: int,
    allowance: Allowance,
) -> Cut:
    """Take the cheapest cells first; `shared` is paid once by the methods of a layer."""

    def price(key: tuple[str, str, str]) -> float:
        layer, _, part = key
        flops = cells[key].flops + shared[layer, part].flops / max(methods, 1)
        return _WEIGHTS.get(part, 1) * flops

    spent, paid, reasons = 0.0, set[tuple[str, str]](), {}
    for key in sorted(cells, key=price):
        layer, method, part = key
        common = Work(0) if (layer, part) in paid else shared[layer, part]
        work = cells[key] + common
        without = part != "matrix" and (layer, method, "matrix") in reasons
        heavy = max(work.bytes, shared[layer, part].bytes) > allowance.bytes
        late = spent + work.flops > allowance.flops
        if heavy or late or without:
            reasons[key] = _reason(part, work, heavy, late)
            continue
        spent += work.flops
        paid.add((layer, part))
    for layer, method, part in cells:  # nothing is asked of what is not built
        if part != "matrix" and (layer, method, "matrix") in reasons:
            reasons[layer, method, part] = reasons[layer, method, "matrix"]
    return Cut(reasons, spent)


def _reason(part: str, work: Work, heavy: bool, late: bool) -> str:
    need = [f"{work.flops:.1g} multiply-adds", f"about {_duration(work.flops / RATE)}"]
    need += [readable(work.bytes)] if heavy else []
    ask = ["--budget"] * heavy + ["--time"] * late
    return (
        f"left out for size: {_WORDS.get(part, part)} ({', '.join(need)}); ask with "
        f"{' and '.join(ask) or '--time'}"
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"


def _sizes(s: Samples) -> tuple[int, int, int, int]:
    """Return d_out, d_in, M = V·N and p."""
    o, i = s.weight_shape
    return o, i, s.columns * s.examples, o * i


def _reading(s: Samples) -> float:
    """Count one reading of the samples, which takes longer than what is done with it."""
    return READ * s.nbytes / s.dtype.itemsize


def product(s: Samples) -> float:
    """Count a product with the exact block, which reads the samples twice."""
    return _block(s).product_work + 2 * _reading(s)


def _block(s: Samples) -> FactoredFisher:
    return FactoredFisher(s, s.examples)


def _norm(s: Samples) -> float:
    """Count ‖F‖, and once more the table of the noise floor where it is not kept."""
    o, i, m, p = _sizes(s)
    if isinstance(s, OuterSamples):
        outputs = min(pair_count(o), s.columns**2 * o)
        return s.examples**2 * (i + outputs) / 2 + m * o * o / 2
    gram = s.gram_flops()
    return gram + (min(gram, s.dense_flops()) if p <= KEPT_BLOCK else gram)


def least(samples: Iterable[Samples], methods: Iterable[Approximator]) -> float:
    """Return the multiply-adds of exact norms and of the errors in closed form.

    Examples
    --------
    >>> import torch
    >>> least([OuterSamples(torch.ones(10, 4), torch.ones(1, 10, 3))], [Diagonal()])
    6235.0
    """
    closed = [method for method in methods if not isinstance(method, ITERATED)]
    return sum(
        _norm(s) + sum(own(s, method, "matrix").flops for method in closed) for s in samples
    )


def by_gram(s: Samples) -> bool:
    """Return whether the samples are fewer than the rows of their exact block."""
    return _block(s).uses_gram


def _inversion(s: Samples) -> Work:
    """Return what factorising the damped exact block takes."""
    _, _, m, p = _sizes(s)
    if by_gram(s):
        return Work(s.gram_flops() + m**3 / 3, 2 * NUMBER * m**2)
    return Work(s.dense_flops() + p**3 / 3, 3 * NUMBER * p**2)


def shared(s: Samples, part: Needs) -> Work:
    """Return what all methods of a layer share: the exact norm, direction or inverse."""
    _, _, m, p = _sizes(s)
    if part == "matrix":
        return Work(_norm(s))
    work = _inversion(s)
    if part == "gradient":
        block = _block(s)
        return Work(ROUNDS * product(s)) if block.iterates else work
    # The inverse itself, and by the Gram the samples in its coordinates.
    if by_gram(s):
        return work + Work(EIGEN * m**3 + m * m * p, 2 * NUMBER * m * p)
    return work + Work(p**3 / 2, 3 * NUMBER * p**2)


def _terms(method: Approximator) -> int:
    rank = int(getattr(method, "rank", 1))
    return rank + isinstance(method, KFACCorrected)


def own(s: Samples, method: Approximator, part: Needs) -> Work:
    """Return what one method takes beside what is shared."""
    if isinstance(method, ExactBlock):
        return Work(0)
    if part == "matrix":
        read = SWEEPS * _reading(s) + _factor_reading(s, method)
        return Work(_building(s, method) + _inner(s, method) + read, space(s, method))
    if part == "gradient":  # two quadratic forms of the exact block beside the solve
        return solve(s, method) + Work(2 * product(s))
    return solve(s, method) + against_inverse(s, method)


def _building(s: Samples, method: Approximator) -> float:
    counted = building_flops(method, s) or 0
    iterated = isinstance(method, ITERATED)
    return counted * (EFFORT if iterated and not isinstance(s, OuterSamples) else 1)


def _factor_reading(s: Samples, method: Approximator) -> float:
    """Count the readings of Kronecker factors, which take longer than what is done."""
    if isinstance(method, (Diagonal, MiniBlock)):
        return 0.0
    o, i = s.weight_shape
    reads, terms = TERM_READS * _terms(method), _terms(method)
    if isinstance(method, ITERATED) and not isinstance(s, OuterSamples):
        reads += STEP_READS * STEPS * (terms + 1)
    made_positive = EIGEN * (o**3 + i**3) if isinstance(method, ITERATED) else 0
    return READ * reads * (o * o + i * i) + made_positive


def space(s: Samples, method: Approximator) -> float:
    """Return the bytes of the Krylov space of the pairs of a shared layer."""
    if not isinstance(method, ITERATED) or isinstance(s, OuterSamples):
        return 0.0
    rank, auto = _terms(method), isinstance(method, KPSVD) and method.solver == "auto"
    if auto and isinstance(choose(Rearranged(s, s.examples), rank), PositionGram):
        return position_bytes(s, rank)
    o, i = s.weight_shape
    longer, shorter = max(o, i) ** 2, min(o, i) ** 2
    return (rank + 1) * STEPS * (longer + 2 * shorter) * s.dtype.itemsize


def _inner(s: Samples, method: Approximator) -> float:
    o, i, m, p = _sizes(s)
    if isinstance(method, Diagonal):
        return s.examples * p
    if isinstance(method, MiniBlock):
        outer = isinstance(s, OuterSamples)
        return s.examples**2 * (i + o) if outer else m * p * i
    if isinstance(s, OuterSamples):
        return _terms(method) * (s.examples * i * i + m * o * o)
    return _terms(method) * m * p * (o + i)


def solve(s: Samples, method: Approximator) -> Work:
    """Count one solve at one damping, with all that it takes beforehand."""
    o, i, _, p = _sizes(s)
    terms = _terms(method)
    if isinstance(method, Diagonal):
        return Work(p)
    if isinstance(method, MiniBlock):
        if isinstance(s, OuterSamples) and s.examples < i:
            n = s.examples
            return Work(o * (n * n * i + n**3 / 3))
        return Work(s.examples * p * i + o * i**3 / 3, 2 * NUMBER * o * i * i)
    if terms > 1 and isinstance(method, ITERATED):
        if p <= DENSE_ROWS:
            return Work(EIGEN * p**3, 3 * NUMBER * p * p)
        return Work((2 * ROUNDS + CHECKS) * terms * p * (o + i))
    return Work(EIGEN * (o**3 + i**3))


def solved_again(s: Samples, method: Approximator) -> float:
    """Count a solve by conjugate gradients; 0 for what is factorised."""
    o, i, _, p = _sizes(s)
    terms = _terms(method)
    if terms < 2 or not isinstance(method, ITERATED):
        return 0.0
    return SOLVES * ROUNDS * 2 * terms * p * (o + i)


def against_inverse(s: Samples, method: Approximator) -> Work:
    """Return ⟨P⁻¹, Q⁻¹⟩ and ‖Q⁻¹‖; by the Gram with the samples in its coordinates."""
    work = _inverse_inner(s, method)
    _, _, m, p = _sizes(s)
    return work + Work(m * m * p if by_gram(s) else 0)


def _inverse_inner(s: Samples, method: Approximator) -> Work:
    o, i, m, p = _sizes(s)
    columns = m if by_gram(s) else 0
    if isinstance(method, MiniBlock):
        formed = Work(o * i**3, 2 * NUMBER * o * i * i)
        return formed + Work(columns * p * i)
    if _terms(method) > 1 and isinstance(method, ITERATED):
        solves = SOLVES * columns * ROUNDS * 2 * p * (o + i)  # one for every sample
        return Work(p**3 * 5 / 6 + solves, 6 * NUMBER * p * p)
    dense = 0 if columns else 3 * NUMBER * p * p
    return Work(2 * columns * p * (o + i), dense)

r"""Metrics at many dampings from one eigendecomposition of each operator.

With F = Σ v_j u_j u_jᵀ and F̂ = Σ v̂_k û_k û_kᵀ every trace of functions of the two is
bilinear in the overlaps ``T_jk = ⟨u_j, û_k⟩²``:

.. math:: \mathrm{tr}\, f(F)\, g(\hat F) = \sum_{jk} f(v_j)\, g(\hat v_k)\, T_{jk}

so T, formed panel by panel and never kept, serves all dampings at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.catalogue import METRICS
from fisherlab.metrics import distances
from fisherlab.metrics.distances import divergence
from fisherlab.metrics.pairs import EPS, LOST, BelowFloor, Pair, paired, weight
from fisherlab.metrics.register import entries
from fisherlab.metrics.spectra import decomposed
from fisherlab.operators import Eigenform, Operator
from fisherlab.operators.base import Damping, tikhonov

FLOOR = 1e-5  # relative error that overlaps of computed eigenvectors resolve
ROUNDING = 1e-11  # relative error of sums over such overlaps
OF_MATRICES = (
    "inverse_error",
    "inverse_cosine",
    "gaussian_kl",
    "reverse_gaussian_kl",
    "stein_divergence",
    "log_spectrum_distance",
)
OF_DIRECTIONS = tuple(name for name, m in METRICS.items() if m.needs == "gradient")
OF_STEPS = ("slope", "curvature")  # vᵀp_Q and ⟨p_Q, P p_Q⟩, which add up over layers


def damping_curve(
    exact: Operator,
    approx: Operator,
    dampings: Sequence[Damping],
    *,
    gradient: Float[Tensor, "o i"] | None = None,
    mixed: bool = False,
) -> dict[str, list[float]]:
    """Return metrics of the damped inverses at every damping of a list.

    Parameters
    ----------
    exact, approx
        Operators over the same weight.
    dampings
        λ, any number of them.
    gradient
        v (d_out, d_in), for the metrics of directions.
    mixed
        Allow operators made from different kinds of Fisher.

    Returns
    -------
    dict
        Metric to one number per damping: `inverse_error`, `inverse_cosine`,
        `gaussian_kl`, `reverse_gaussian_kl`, `stein_divergence`,
        `log_spectrum_distance`, and with a gradient `direction_cosine`,
        `f_cosine_squared`, `model_decrease_ratio`, `gamma_ratio`, and vᵀp_Q, `slope`, and
        p_QᵀPp_Q, `curvature`, of the step p_Q = (F̂ + λI)⁻¹v. NaN where a damped matrix
        is not positive definite or its inverse has less than three digits in float64,
        `BelowFloor` where rounding hides the value.

    Raises
    ------
    UnsupportedMetric
        If an operator has no structured eigenbasis and p is above 4000.
    ValueError
        If shapes differ, or Fisher types differ without `mixed`.

    Notes
    -----
    One eigendecomposition of each (Gram matrix, Kronecker factors, mini-blocks), one
    rotation of the eigenvectors of one into the basis of the other; a further damping
    costs a handful of sums.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> one = Diagonal(torch.ones(2, 2).double())
    >>> damping_curve(one, Diagonal(3 * one.entries), [1.0])["inverse_error"]
    [0.5]
    """
    pair = paired("damping_curve", exact, approx, mixed)
    shifts = [tikhonov(one, pair.exact) for one in dampings]
    if gradient is not None:
        gradient = weight(gradient, pair.exact)
    return curve(*eigenbases("damping_curve", pair), shifts, gradient)


def eigenbases(
    call: str, pair: Pair, known: Eigenform | None = None
) -> tuple[Eigenform, Eigenform]:
    """Decompose both matrices of a pair, the exact one unless that is known.

    Raises
    ------
    UnsupportedMetric
        If one has no structured eigenbasis and is too large for a dense one.
    """
    mine = decomposed(pair.exact, call) if known is None else known
    return mine, mine if pair.same else decomposed(pair.approx, call)


def curve(
    exact: Eigenform,
    approx: Eigenform,
    dampings: Sequence[float],
    gradient: Float[Tensor, "o i"] | None = None,
) -> dict[str, list[float]]:
    """Return `damping_curve` of two decompositions, to be shared by many approximations."""
    known = [exact.resolves(one) and approx.resolves(one) for one in dampings]
    valid = [damping for damping, is_known in zip(dampings, known, strict=True) if is_known]
    steps = () if gradient is None else (*OF_DIRECTIONS, *OF_STEPS)
    names = (*OF_MATRICES, *steps)
    if not valid:
        return {name: [float("nan")] * len(dampings) for name in names}
    shifts = torch.tensor(valid, dtype=torch.float64, device=exact.values.device)
    found = _Matrices(exact, approx, shifts).metrics()
    if gradient is not None:
        found |= _Steps(exact, approx, shifts, gradient.double()).metrics()
    places = iter(range(len(valid)))
    order = [next(places) if is_known else -1 for is_known in known]
    return {
        name: [values[at] if at >= 0 else float("nan") for at in order]
        for name, values in found.items()
    }


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """A function of an operator: its values on the eigenvectors and on the rest."""

    inside: Float[Tensor, "l r"]
    rest: Float[Tensor, " l"]


@final
@dataclass(frozen=True, eq=False)
class _Matrices:
    exact: Eigenform
    approx: Eigenform
    shifts: Float[Tensor, " l"]

    def damped(self, basis: Eigenform) -> _Spectrum:
        return _Spectrum(basis.values + self.shifts[:, None], basis.rest + self.shifts)

    def inverted(self, basis: Eigenform) -> _Spectrum:
        plain = self.damped(basis)
        rest = plain.rest.reciprocal() if basis.free else torch.zeros_like(plain.rest)
        return _Spectrum(plain.inside.reciprocal(), rest)

    def squares(self, basis: Eigenform) -> Tensor:
        one = self.inverted(basis)
        return one.inside.square().sum(1) + basis.free * one.rest.square()

    def logdets(self, basis: Eigenform) -> Tensor:
        one = self.damped(basis)
        outside = basis.free * one.rest.log() if basis.free else 0.0
        return one.inside.log().sum(1) + outside

    @cached_property
    def traces(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tr P⁻¹Q⁻¹, tr P Q⁻¹ and tr P⁻¹Q at every damping, in one pass over T."""
        mine, other = self.exact, self.approx
        pairs = [
            (self.inverted(mine), self.inverted(other)),
            (self.damped(mine), self.inverted(other)),
            (self.inverted(mine), self.damped(other)),
        ]
        first = _stacked([left for left, _ in pairs])
        second = _stacked([right for _, right in pairs])
        found = _cross(mine, other, first, second).split(len(self.shifts))
        return found[0], found[1], found[2]

    @cached_property
    def rounded(self) -> list[float]:
        """Share of sums that is not known to three digits, at every damping."""
        largest = max(self.exact.largest, self.approx.largest)
        lowest = min(self.exact.smallest, self.approx.smallest)
        return (EPS / LOST * (largest + self.shifts) / (lowest + self.shifts)).tolist()

    def metrics(self) -> dict[str, list[float]]:
        same = self.exact is self.approx
        squares, others = self.squares(self.exact), self.squares(self.approx)
        first, second = self.logdets(self.exact), self.logdets(self.approx)
        product, trace, reverse = (squares, squares, squares) if same else self.traces
        found: dict[str, list[float]] = {name: [] for name in OF_MATRICES}
        spectra = self.exact.eigenvalues(), self.approx.eigenvalues()
        for at in range(len(self.shifts)):
            rounded = self.rounded[at]
            floor = max(FLOOR, rounded**0.5)
            found["inverse_error"].append(
                0.0 if same else _distance(product[at], squares[at], others[at], floor)
            )
            cosine = product[at] / (squares[at] * others[at]).sqrt()
            found["inverse_cosine"].append(float(cosine))
            logs = float(first[at]), float(second[at])
            known = max(ROUNDING, rounded)
            p, there, back = self.exact.rows, float(trace[at]), float(reverse[at])
            kl = 0.0 if same else divergence(there, p, *logs[::-1], known)
            found["gaussian_kl"].append(kl)
            doubled = BelowFloor(2 * kl) if isinstance(kl, BelowFloor) else 2 * kl
            found["stein_divergence"].append(doubled)
            back = 0.0 if same else divergence(back, p, *logs, known)
            found["reverse_gaussian_kl"].append(back)
            ratio = (spectra[0] + self.shifts[at]) / (spectra[1] + self.shifts[at])
            found["log_spectrum_distance"].append(float(ratio.log().square().mean().sqrt()))
        return found


def _distance(product: Tensor, size: Tensor, other: Tensor, floor: float) -> float:
    squared = float(1 - 2 * product / size + other / size)
    return float(squared**0.5) if squared > floor**2 else BelowFloor(floor)


def _stacked(parts: Sequence[_Spectrum]) -> _Spectrum:
    inside = torch.cat([part.inside for part in parts])
    return _Spectrum(inside, torch.cat([part.rest for part in parts]))


def _cross(mine: Eigenform, other: Eigenform, f: _Spectrum, g: _Spectrum) -> Tensor:
    """Return tr f(F) g(F̂) for every row of f and g.

    f = f₀I + Σ (f_j − f₀) u_j u_jᵀ and alike g, so four sums; panels run over the
    decomposition with fewer vectors.
    """
    if len(other.values) < len(mine.values):
        return _cross(other, mine, g, f)
    left, right = f.inside - f.rest[:, None], g.inside - g.rest[:, None]
    total = f.rest * g.rest * mine.rows
    total = total + f.rest * right.sum(1) + g.rest * left.sum(1)
    for panel in mine.panels():
        overlaps = other.rotate(mine.vectors(panel)).square_()
        total = total + ((left[:, panel] @ overlaps) * right).sum(1)
    return total


@final
@dataclass(frozen=True, eq=False)
class _Steps:
    exact: Eigenform
    approx: Eigenform
    shifts: Float[Tensor, " l"]
    gradient: Float[Tensor, "o i"]

    def solved(self, basis: Eigenform) -> Float[Tensor, "l o i"]:
        """Return (M + λI)⁻¹ v at every damping."""
        inside = basis.rotate(self.gradient[None])
        found = basis.combine(inside / (basis.values + self.shifts[:, None]))
        if not basis.free:
            return found
        outside = self.gradient - basis.combine(inside)[0]
        return found + outside / (basis.rest + self.shifts)[:, None, None]

    def curvatures(self, w: Float[Tensor, "l o i"]) -> Float[Tensor, " l"]:
        """Return ⟨w, Pw⟩ of one weight per damping."""
        squares = self.exact.rotate(w).square()
        whole = w.square().sum((1, 2))
        inside = squares @ self.exact.values
        rest = self.exact.rest * (whole - squares.sum(1))
        return inside + rest + self.shifts * whole

    def metrics(self) -> dict[str, list[float]]:
        v = self.gradient
        best = self.solved(self.exact)
        taken = best if self.exact is self.approx else self.solved(self.approx)
        plain = self.curvatures(v.expand(len(self.shifts), *v.shape))
        curved = self.curvatures(taken)
        rows = [
            of_step(
                distances.Measured(
                    gradient=v,
                    best=best[at],
                    taken=taken[at],
                    curvature=float(curved[at]),
                    plain_curvature=float(plain[at]),
                )
            )
            for at in range(len(self.shifts))
        ]
        return {name: [row[name] for row in rows] for name in (*OF_DIRECTIONS, *OF_STEPS)}


def of_step(step: distances.Directions) -> dict[str, float]:
    """Return the metrics of a direction, its slope and its curvature."""
    known = entries()
    return {name: known[name].of(step) for name in OF_DIRECTIONS} | {
        "slope": float((step.gradient * step.taken).sum()),
        "curvature": step.curvature,
    }

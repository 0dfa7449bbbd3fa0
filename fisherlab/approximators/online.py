"""Methods that carry a state of their own from step to step: K-BFGS, B-KFAC and SINGD."""

from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.approximators import register
from fisherlab.approximators.kfac import factor_sums, roots, rows_by_part
from fisherlab.errors import NumericalError
from fisherlab.numerics.devices import require_good
from fisherlab.numerics.krylov import orthonormal
from fisherlab.numerics.linalg import damped_cholesky, factorised
from fisherlab.numerics.packed import second_moment
from fisherlab.operators import (
    InverseFactors,
    KroneckerLowRank,
    Operator,
    QuasiNewtonFactors,
)
from fisherlab.operators.base import tikhonov
from fisherlab.operators.quasi_newton import HeldInverse, PairsInverse, bfgs
from fisherlab.settings import setting
from fisherlab.statistics import LayerStatistics

CURVATURE = 0.2  # μ₁, the share of yᵀHy that sᵀy is lifted to


@final
@dataclass(frozen=True, eq=False)
class Observation:
    """Means over a batch of a layer's outputs and of the gradients there.

    Parameters
    ----------
    output, gradient
        h̄ and ḡ, shape (d_out,).

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> layer, data = torch.nn.Linear(3, 2), (torch.ones(4, 3), torch.zeros(4, 2))
    >>> stats = fl.collect(layer, data, fl.Gaussian(), fl.Empirical())["weight"]
    >>> w = stats.pack(dict(layer.named_parameters())).detach()
    >>> Observation.of(stats, w).gradient.shape
    torch.Size([2])
    """

    output: Float[Tensor, " o"]
    gradient: Float[Tensor, " o"]

    @classmethod
    def of(cls, statistics: LayerStatistics, w: Float[Tensor, "o i"]) -> "Observation":
        """Observe a batch, from its statistics and the packed weight w they were taken at.

        Parameters
        ----------
        statistics
            With the labels of the data (`Empirical`).
        w
            The weight with its bias column, as `LayerStatistics.pack` gives it.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        gradient, inputs, _ = _means(statistics, of_products=False)
        return cls(w @ inputs, gradient)


def _means(
    statistics: LayerStatistics, *, of_products: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the means of g, of a and, if asked for, of a aᵀ, part by part."""
    parts = (
        (g.sum(0), a.sum(0), second_moment(a) if of_products else a.new_zeros(()))
        for g, a in rows_by_part(statistics, "K-BFGS")
    )
    gradient, inputs, products = (reduce(torch.add, t) for t in zip(*parts, strict=True))
    samples = statistics.samples
    rows = samples.examples * samples.positions
    return gradient / (samples.columns * rows), inputs / rows, products / rows


def damped_pair(
    s: Tensor, y: Tensor, turned: Tensor, least: float
) -> tuple[Tensor, Tensor]:
    r"""Return (s, y) with a curvature bounded on both sides (double damping).

    First s is moved towards Hy until :math:`s^T y \ge 0.2\, y^T H y`, then y towards s
    until :math:`s^T y \ge \mathrm{least} \cdot s^T s`.

    Parameters
    ----------
    s, y
        Change of the outputs and of the gradients.
    turned
        H y.
    least
        μ₂, the smallest curvature.

    Examples
    --------
    >>> s, y = damped_pair(*(torch.tensor([v]) for v in (-1.0, 1.0, 1.0)), least=0.5)
    >>> round(float(s), 4), round(float(y), 4)
    (0.2, 1.0)
    """
    product, length = s @ y, y @ turned
    if bool(product < CURVATURE * length):
        share = (1 - CURVATURE) * length / (length - product)
        s = share * s + (1 - share) * turned
    product, square = s @ y, s @ s
    if bool(product < least * square):
        share = (1 - least) * square / (square - product)
        y = share * y + (1 - share) * s
    return s, y


@final
@setting
class KBFGS:
    r"""K-BFGS, the matrix whose inverse is :math:`H_g ⊗ H_a`.

    H_a follows :math:`(A + \sqrtλ I)^{-1}` for the averaged second moment A of the
    inputs, by one BFGS update a batch with :math:`s = H_a \bar a, y = (A + \sqrtλ I) s`.
    H_g follows the inverse Hessian with respect to the outputs: `observe` is given the
    batch before and after a step and updates with the damped averages of
    :math:`s = \bar h^+ - \bar h, y = \bar g^+ - \bar g`.

    Parameters
    ----------
    damping
        λ, inside of the factors.
    decay
        The share of the old A, s and y in their averages.
    memory
        How many pairs (s, y) represent H_g (K-BFGS(L)); None holds H_g itself.

    Raises
    ------
    ValueError
        If λ is not positive, the decay outside [0, 1), or the memory not positive.

    Notes
    -----
    ``op.solve(g, damping=0)`` is the published direction H_g g H_a; another damping is
    added to the matrix. `previous` holds the state; do not average in addition. The
    first call inverts A + √λI, later ones cost O(d_in² N), `observe` O(d_out²).

    References
    ----------
    Goldfarb, Ren & Bahamou 2020, arXiv 2006.08877, Algorithms 1 to 3.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> layer, data = torch.nn.Linear(3, 2), (torch.eye(3), torch.zeros(3, 2))
    >>> def observed():
    ...     return fl.collect(layer, data, fl.Gaussian(), fl.Empirical())["weight"]
    >>> method, before = KBFGS(), observed()
    >>> w = before.pack({"weight": layer.weight.data, "bias": layer.bias.data})
    >>> op = method(before)
    >>> step = op.solve(before.example_gradients()[0].mean(0), damping=0.0)
    >>> for name, change in before.unpack(step).items():
    ...     _ = layer.get_parameter(name).data.sub_(0.1 * change)
    >>> after = Observation.of(observed(), w - 0.1 * step)
    >>> method.observe(op, Observation.of(before, w), after).rows.matrix.shape
    torch.Size([2, 2])
    """

    damping: float = 0.3
    decay: float = 0.9
    memory: int | None = None

    def __post_init__(self) -> None:
        """Check the parameters."""
        object.__setattr__(self, "damping", tikhonov(self.damping, "KBFGS"))
        memory = 1 if self.memory is None else self.memory
        if not (self.damping > 0 and 0 <= self.decay < 1 and memory >= 1):
            raise ValueError(
                f"{self!r}: a positive damping, a decay in [0, 1) and a positive memory "
                "are expected."
            )

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> QuasiNewtonFactors:
        """Return the factors with H_a updated on a batch; H_g stays as it is.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        ValueError
            If `previous` was made by another method.
        """
        like, mean, moment = _means(statistics, of_products=True)
        made = statistics.provenance.by(repr(self))
        if previous is None:
            root = self.damping**0.5
            factor = damped_cholesky(moment, root, f"the inputs of {statistics.name!r}")
            columns = torch.cholesky_inverse(factor).to(moment.dtype)
            return QuasiNewtonFactors(self._start(like), columns, moment, None, made)
        if not isinstance(previous, QuasiNewtonFactors):
            msg = f"KBFGS: previous is {previous!r}; an operator of KBFGS is expected."
            raise ValueError(msg)
        moment = self.decay * previous.moment + (1 - self.decay) * moment
        s = previous.columns @ mean
        columns = bfgs(previous.columns, s, moment @ s + self.damping**0.5 * s)
        return replace(previous, columns=columns, moment=moment, provenance=made)

    def _start(self, like: Tensor) -> HeldInverse | PairsInverse:
        if self.memory is not None:
            return PairsInverse(like, self.memory)
        return HeldInverse(torch.eye(len(like), dtype=like.dtype, device=like.device))

    def observe(
        self, operator: QuasiNewtonFactors, before: Observation, after: Observation
    ) -> QuasiNewtonFactors:
        """Return the factors with H_g updated by what a step changed on its own batch."""
        s, y = after.output - before.output, after.gradient - before.gradient
        if operator.change is not None:
            old = operator.change
            s, y = (
                torch.lerp(new, kept, self.decay)
                for new, kept in zip((s, y), old, strict=True)
            )
        turned = operator.rows.apply(y[:, None])[:, 0]
        pair = damped_pair(s, y, turned, self.damping**0.5)
        rows = operator.rows.updated(*pair)
        return replace(operator, rows=rows, change=(s, y))


register.add({"k-bfgs": KBFGS(), "k-bfgs-l": KBFGS(memory=100)}, estimates=False)


LowRank = tuple[Tensor, Tensor]  # orthonormal U (n, r) and values d (r,): U diag(d) Uᵀ


@final
@setting
class Correction:
    r"""Diagonalise the averaged factor within some of the columns of U.

    .. math:: Q^T X Q = W Λ W^T, \quad Q \leftarrow Q W, \quad d_Q \leftarrow Λ

    for a random subset Q of the columns. Costs O(n² c) for c columns, and never increases
    :math:`\|X - U \mathrm{diag}(d) U^T\|_F`.

    Parameters
    ----------
    columns
        c, how many columns; all of them if None.
    every
        Steps between corrections.
    seed
        Of the choice of columns, which depends on the step too.

    Raises
    ------
    ValueError
        For `columns` or `every` below 1.

    References
    ----------
    Puiu 2022, arXiv 2210.08494 (B-KFAC-C).

    Examples
    --------
    >>> start = torch.eye(3)[:, :1], torch.zeros(1)
    >>> Correction()(start, torch.diag(torch.tensor([4.0, 2.0, 1.0])), 1, 1)[1].item()
    4.0
    """

    columns: int | None = None
    every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.every < 1 or (self.columns is not None and self.columns < 1):
            raise ValueError(f"{self!r}: columns and every of at least 1 are expected.")

    def __call__(
        self, low: LowRank, moment: Float[Tensor, "n n"], rank: int, step: int
    ) -> LowRank:
        """Return U and d after the correction, largest values first."""
        basis, values = (part.clone() for part in low)
        generator = torch.Generator().manual_seed(self.seed + step)
        chosen = torch.randperm(len(values), generator=generator, device="cpu")[
            : self.columns
        ]
        chosen = chosen.to(basis.device)
        part = basis[:, chosen]
        found, turn = factorised("eigh", part.T @ moment @ part, self)
        basis[:, chosen], values[chosen] = part @ turn, found.clamp_min(0)
        order = values.argsort(descending=True)
        return basis[:, order], values[order]


@final
@setting
class RandomisedSVD:
    r"""Take U and d anew from the averaged factor, by a randomised decomposition.

    .. math:: A \approx U \mathrm{diag}(d) U^T, \qquad
        U \text{ within the span of } A^q Ω

    Power iteration on r + oversample random columns, then the eigenvectors within their
    span: O(n² (r + oversample)), against O(n³) of a full decomposition.

    Parameters
    ----------
    oversample
        Columns beyond the rank.
    iterations
        Products with the factor.
    every
        Steps between refreshes; 1 is RS-KFAC.
    seed
        Of the random columns, which depend on the step too.

    Raises
    ------
    ValueError
        For a number below its least value, which is named.

    References
    ----------
    Halko, Martinsson & Tropp 2011; Puiu 2022, arXiv 2206.15397.

    Examples
    --------
    >>> moment = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    >>> start = torch.eye(3)[:, :1], torch.zeros(1)
    >>> round(RandomisedSVD()(start, moment, 1, 1)[1].item(), 4)
    4.0
    """

    oversample: int = 10
    iterations: int = 3
    every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if min(self.oversample, self.iterations - 1, self.every - 1) < 0:
            raise ValueError(
                f"{self!r}: oversample of at least 0, iterations and every of at least 1 "
                "are expected."
            )

    def __call__(
        self, low: LowRank, moment: Float[Tensor, "n n"], rank: int, step: int
    ) -> LowRank:
        """Return the leading eigenpairs of the factor, largest first."""
        size = len(moment)
        generator = torch.Generator().manual_seed(self.seed + step)
        width = min(rank + self.oversample, size)
        noise = torch.randn(
            size, width, generator=generator, dtype=torch.float64, device="cpu"
        )
        basis = noise.to(dtype=moment.dtype, device=moment.device)
        for _ in range(self.iterations):
            basis = factorised("qr", moment @ basis, self).Q
        values, turn = factorised("eigh", basis.T @ moment @ basis, self)
        top = slice(max(width - rank, 0), None)
        return (basis @ turn[:, top]).flip(1), values[top].clamp_min(0).flip(0)


@final
@setting
class BKFAC:
    r"""KFAC's factors as running averages of a fixed rank, updated in place of a sum.

    .. math:: X_k = ρ X_{k-1} + (1 - ρ) M M^T \approx U \mathrm{diag}(d) U^T

    Parameters
    ----------
    rank
        Columns of U kept from step to step, for each factor.
    decay
        ρ, the share of what was there before; the first call uses its batch alone.
    refresh
        What the averaged factors X themselves, then kept beside U, do against the drift
        of repeated cutting: `Correction` (B-KFAC-C), `RandomisedSVD` (B-R-KFAC; every
        step, RS-KFAC), or nothing (B-KFAC, which never forms X).

    Raises
    ------
    ValueError
        For a rank below 1 or a decay outside of [0, 1).

    Notes
    -----
    ``previous`` is the operator of the step before: the average is inside the method, so
    it is not combined with `average`. A call costs O(d (r + m)²) for m columns of the
    batch: linear in the width d; with a refresh X costs d² m. Exact (KFAC of the averaged
    factors) while the rank is not exceeded. The published spectrum continuation is left
    out: eigenvalues outside the span are zero, and Tikhonov damping is added to them.

    References
    ----------
    Puiu 2022, arXiv 2210.08494 (Brand's update, its correction and refresh) and
    arXiv 2206.15397 (RS-KFAC).

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> op = fl.BKFAC(rank=2)(stats["weight"])
    >>> op.entries.shape, round(fl.BKFAC(rank=2)(stats["weight"], previous=op).trace(), 4)
    (torch.Size([2, 1]), 8.0)
    """

    rank: int = 32
    decay: float = 0.95
    refresh: Correction | RandomisedSVD | None = None

    def __post_init__(self) -> None:
        """Check rank and decay."""
        if self.rank < 1 or not 0 <= self.decay < 1:
            msg = f"{self!r}: a rank of at least 1 and a decay in [0, 1) are expected."
            raise ValueError(msg)

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> KroneckerLowRank:
        """Return the averaged product after one more batch.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        rows_, cols_ = roots(statistics, "BKFAC")
        row_batch = rows_.T / max(statistics.positions, 1) ** 0.5
        col_batch = cols_.T / statistics.count**0.5
        rows, cols = _factors(previous)
        rows = brand_update(rows, row_batch, self.rank, self.decay)
        cols = brand_update(cols, col_batch, self.rank, self.decay)
        steps = 1 + (previous.steps if isinstance(previous, KroneckerLowRank) else 0)
        moments = None
        if self.refresh is not None:
            moments = self._moments(previous, row_batch, col_batch)
            if steps % self.refresh.every == 0:
                rows = self.refresh(rows, moments[0], self.rank, steps)
                cols = self.refresh(cols, moments[1], self.rank, steps)
        return KroneckerLowRank(
            rows[0],
            cols[0],
            torch.outer(rows[1], cols[1]),
            row_values=rows[1],
            provenance=statistics.provenance.by(repr(self)),
            moments=moments,
            steps=steps,
        )

    def _moments(
        self, previous: Operator | None, rows: Tensor, cols: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the averages that the low-rank factors stand for."""
        fresh = second_moment(rows.T), second_moment(cols.T)
        old = previous.moments if isinstance(previous, KroneckerLowRank) else None
        if old is None:
            return fresh
        g, a = (torch.lerp(new, x, self.decay) for x, new in zip(old, fresh, strict=True))
        return g, a


def brand_update(
    before: LowRank | None, batch: Float[Tensor, "n m"], rank: int, decay: float
) -> LowRank:
    """Return ρ U diag(d) Uᵀ + (1 − ρ) M Mᵀ, cut to its `rank` largest values.

    Parameters
    ----------
    before
        U and d; None to begin with M Mᵀ alone.
    batch
        M, the columns of the new batch.
    rank, decay
        Values kept, and ρ.

    Examples
    --------
    >>> basis, values = brand_update(None, torch.eye(3), rank=2, decay=0.9)
    >>> values.tolist()
    [1.0, 1.0]
    """
    share = 1.0 if before is None else 1 - decay
    columns = batch * share**0.5
    if before is None:
        basis, values = columns[:, :0], columns.new_zeros(0)
    else:
        basis, values = before
    inside = basis.T @ columns
    fresh = orthonormal(columns, [basis])
    wide = torch.cat([basis, fresh], 1)
    seen = torch.cat([inside, fresh.T @ columns])
    kept = torch.cat([decay * values, values.new_zeros(fresh.shape[1])])
    small = torch.diag(kept) + seen @ seen.T
    found, turn = factorised("eigh", small, "a low-rank factor of BKFAC")
    top = slice(max(len(found) - rank, 0), None)
    return (wide @ turn[:, top]).flip(1), found[top].clamp_min(0).flip(0)


def _factors(previous: Operator | None) -> tuple[LowRank | None, LowRank | None]:
    """Return the low-rank factors of the operator before, where it has them."""
    if not isinstance(previous, KroneckerLowRank) or previous.row_values is None:
        return None, None
    rows = previous.row_values
    total = float(rows.sum())
    cols = previous.entries.sum(0) / total if total > 0 else previous.entries.sum(0)
    return (previous.row_basis, rows), (previous.column_basis, cols)


Structure = Literal["dense", "diagonal"]


@final
@setting
class SINGD:
    r"""Inverse-free natural gradient, :math:`C C^T \approx (G + λI)^{-1}`, K alike for A.

    With :math:`H_C = C^T G C` and :math:`H_K = K^T A K` of the batch

    .. math:: M_C \leftarrow α M_C + \tfrac12 (t_K H_C + λ s_K C^T C - I), \quad
              C \leftarrow C - β\, C M_C

    and alike for K with :math:`t_C, s_C`. ``adaptive`` (SINGD) takes
    :math:`t_K = \mathrm{tr} H_K / d_{in}, s_K = \mathrm{tr} K^T K / d_{in}`; without it
    (IKFAC) both are 1 and the fixed point is KFAC with factors damped by λ.

    Parameters
    ----------
    damping
        λ, inside the update.
    rate
        β, the step of the update.
    momentum
        α, on the update; 0 for IKFAC.
    adaptive
        SINGD's scales, which couple the factors.
    structure
        "dense", or "diagonal": only the diagonals of C, K and of what moves them.
    normalised
        Whether the step is β / max(1, ‖M‖), ‖M‖ the largest sum of a row in size, and
        new terms of M count 1 − α: then it is stable whatever the scale of the factors.

    Raises
    ------
    ValueError
        For a negative damping, a rate that is not positive, a momentum outside of [0, 1),
        or an unknown structure.

    Notes
    -----
    ``previous`` is the operator of the step before; the first call starts from the
    identity. The operator is the *damped* matrix whose inverse is :math:`C C^T \otimes
    K K^T`, so it is solved with damping 0. A step with β below 2 divided by the largest
    eigenvalue of :math:`H + λ C^T C` is stable, and every normalised one with β < 1.

    References
    ----------
    Lin et al. 2024, arXiv 2312.05705; normalised steps as its
    authors' package singd has them, after Murray et al. 2017, arXiv 1711.05224.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> op = None
    >>> for _ in range(3):
    ...     op = fl.SINGD(rate=0.1)(stats["weight"], previous=op)
    >>> op.weight_shape
    (2, 4)
    """

    damping: float = 1e-3
    rate: float = 1e-2
    momentum: float = 0.5
    adaptive: bool = True
    structure: Structure = "dense"
    normalised: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        object.__setattr__(self, "damping", tikhonov(self.damping, "SINGD"))
        if not (self.damping >= 0 and self.rate > 0 and 0 <= self.momentum < 1):
            msg = f"{self!r}: damping ≥ 0, rate > 0 and momentum in [0, 1) are expected."
            raise ValueError(msg)
        if self.structure not in ("dense", "diagonal"):
            msg = f"SINGD(structure={self.structure!r}): 'dense' or 'diagonal' is expected."
            raise ValueError(msg)

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> InverseFactors:
        """Return the factors after one more update.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        NumericalError
            If the factors grew out of all bounds.
        """
        rows, cols = factor_sums(statistics, "expand", "SINGD")
        rows, cols = rows / max(statistics.positions, 1), cols / statistics.count
        made = statistics.provenance.by(repr(self))
        before = previous if isinstance(previous, InverseFactors) else None
        c, k, moved_c, moved_k = before.state if before else _begin(rows, cols)
        seen_c, seen_k = c.T @ rows @ c, k.T @ cols @ k
        held_c, held_k = c.T @ c, k.T @ k
        moved_c = self._moved(moved_c, seen_c, held_c, _scales(seen_k, held_k))
        moved_k = self._moved(moved_k, seen_k, held_k, _scales(seen_c, held_c))
        new_c, new_k = c - c @ self._step(moved_c), k - k @ self._step(moved_k)
        self._require_finite(new_c, new_k, statistics.name)
        return InverseFactors(new_c, new_k, moved_c, moved_k, made)

    def _moved(
        self,
        before: Float[Tensor, "n n"],
        seen: Float[Tensor, "n n"],
        held: Float[Tensor, "n n"],
        scales: tuple[float, float],
    ) -> Float[Tensor, "n n"]:
        """Return the momentum of one factor's update."""
        times, share = scales if self.adaptive else (1.0, 1.0)
        eye = torch.eye(len(seen), dtype=seen.dtype, device=seen.device)
        pull = (times * seen + self.damping * share * held - eye) / 2
        if self.structure == "diagonal":
            pull = torch.diag(pull.diagonal())
        return self.momentum * before + (1 - self.momentum * self.normalised) * pull

    def _require_finite(self, c: Tensor, k: Tensor, layer: str) -> None:
        """Refuse factors whose inverse matrix C Cᵀ ⊗ K Kᵀ has no norm."""

        def complaint() -> NumericalError:
            remedy = "a smaller rate" if self.normalised else "normalised=True"
            return NumericalError(
                f"The inverse factors of SINGD in block {layer!r} hold NaN or infinity, or "
                f"their matrix numbers whose squares overflow; take {remedy}."
            )

        require_good((c.norm() * k.norm()).pow(4).isfinite(), complaint)

    def _step(self, moved: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        """Return β M, of a normalised step with ‖βM‖ ≤ β."""
        size = moved.abs().sum(1).max().clamp_min(1) if self.normalised else 1.0
        return self.rate / size * moved


def _begin(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    eyes = [torch.eye(len(m), dtype=m.dtype, device=m.device) for m in (rows, cols)]
    return eyes[0], eyes[1], torch.zeros_like(rows), torch.zeros_like(cols)


def _scales(seen: Tensor, held: Tensor) -> tuple[float, float]:
    """Return the mean eigenvalues of H and of KᵀK of the other factor."""
    return float(seen.diagonal().mean()), float(held.diagonal().mean())

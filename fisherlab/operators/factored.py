r"""The exact Fisher block, held as per-example gradients and never formed unless asked.

.. math:: F = \frac{1}{N} \sum_{vn} \mathrm{vec}(D_{vn}) \mathrm{vec}(D_{vn})^T

Second-order questions (norm, solve, spectrum) are answered in the smaller of two spaces:
the p × p block ("dense"), or the M × M Gram matrix of the M = V·N samples ("gram").
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherlab.errors import IndefiniteError
from fisherlab.numerics.devices import STAYS, empty, parse_budget, readable, require
from fisherlab.numerics.linalg import Label, damped_cholesky, eigh, factorised
from fisherlab.numerics.packed import pair_count
from fisherlab.operators.base import (
    PANEL_BYTES,
    Damping,
    Operator,
    Provenance,
    finely,
    inner_product,
    tikhonov,
)
from fisherlab.operators.bases import Turned
from fisherlab.operators.dense import Dense, refined_solve
from fisherlab.operators.eigenform import Eigenform
from fisherlab.operators.iterative import IterativeInverse
from fisherlab.samples import Samples, SharedSamples, TokenSamples
from fisherlab.samples.base import CHUNK_BYTES
from fisherlab.samples.cross import (
    inner_products,
    multiplied,
    row_panels,
    squared_inner,
)

Form = Literal["auto", "dense", "gram", "matrices", "pairs"]
ROUNDS = 150  # products of a damped solve by conjugate gradients, about
FACTORED = 4000  # matrices up to this size are factorised, whatever it costs
KEPT_BLOCK = 1500  # blocks up to this size are kept once formed (18 MB)


@final
@dataclass(frozen=True, eq=False, repr=False)
class FactoredFisher(Operator):
    r"""The exact block of one layer in O(N (d_in + V d_out)) numbers.

    .. math:: F = \frac{1}{N} \sum_{vn} vec(D_{vn}) vec(D_{vn})^T

    Parameters
    ----------
    samples
        Per-example gradients; see `fisherlab.samples`.
    count
        N, the examples the sum is divided by (masked ones included).
    form
        Where norms, solves and spectra are computed: "dense" (p × p), "gram"
        (M × M), or "auto", the one that counts fewer flops. "matrices" and "pairs" are
        dense and say how the block of a shared weight is built: from per-example
        gradients, or from pairs of positions.

    Examples
    --------
    >>> from fisherlab.samples import OuterSamples
    >>> samples = OuterSamples(torch.ones(4, 3), torch.ones(1, 4, 2))
    >>> FactoredFisher(samples, 4).trace()
    6.0
    """

    samples: Samples
    count: int
    provenance: Provenance = Provenance()
    form: Form = "auto"
    _kept: dict[float, Operator] = field(default_factory=dict, init=False)

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.samples.weight_shape

    @property
    def stored_numbers(self) -> int:
        """Numbers held: the samples, or the packed block where that is smaller."""
        return min(self.samples.nbytes // self.dtype.itemsize, pair_count(self.shape[0]))

    @property
    def product_flops(self) -> int:
        """The cheaper of two passes over the samples and one dense product."""
        return min(_two_passes(self.samples), self.shape[0] ** 2)

    @cached_property
    def uses_gram(self) -> bool:
        """Whether second-order questions are answered in the sample space."""
        if self.form != "auto":
            return self.form == "gram"
        p, m = self.shape[0], self.samples.total
        dense = self.samples.dense_flops() + p**3 // 3
        return self.samples.gram_flops() + m**3 // 3 < dense

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        return self.samples.combine(self.samples.project(w)) / self.count

    def quadratic_form(self, w: Float[Tensor, "*k o i"]) -> Float[Tensor, "*k"]:
        """Return (1/N) Σ ⟨D, w⟩², half of a product."""
        if w.dtype != self.dtype or w.shape[-2:] != self.weight_shape:
            return super().quadratic_form(w)
        found = self.samples.project(w.reshape(-1, *self.weight_shape))
        return (found.square().sum((1, 2)) / self.count).view(w.shape[:-2])

    def forms_by_example(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k n"]:
        """Return (1/N) Σ_v ⟨D_vn, w⟩², what every example adds to wᵀFw."""
        return self.samples.project(w).square().sum(1) / self.count

    def some_examples(self, index: Int[Tensor, " k"]) -> "FactoredFisher":
        """Return what some examples add to F, (1/N) Σ over them."""
        some = self.samples.some_examples(index)
        return FactoredFisher(some, self.count, self.provenance, self.form)

    def _dense(self) -> Float[Tensor, "p p"]:
        out = empty(self.shape, self.dtype, self.device)
        if isinstance(self.samples, SharedSamples) and self.form == "pairs":
            return self.samples.add_pairs_(out, 1 / self.count)
        if self.form == "matrices":
            return self.samples.add_matrices_(out, 1 / self.count)
        return self.samples.add_dense_(out, 1 / self.count)

    @cached_property
    def _block(self) -> Float[Tensor, "p p"]:
        return self.to_dense()

    def _formed(self) -> Float[Tensor, "p p"]:
        """Return the dense block, kept for the next question while it is small."""
        return self._block if self.shape[0] <= KEPT_BLOCK else self.to_dense()

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return (1/N) Σ D∘D."""
        return self.samples.squares() / self.count

    def trace(self) -> float:
        """Return (1/N) Σ ‖D‖²."""
        return float(self.samples.squared_norms().sum(dtype=torch.float64)) / self.count

    def frobenius_norm(self) -> float:
        """Return (1/N) (Σ_ab ⟨D_a, D_b⟩²)^½, or the norm of the block if cheaper."""
        return self._norm

    @cached_property
    def _norm(self) -> float:
        if self._block_is_cheap:
            return float(torch.linalg.vector_norm(self._formed(), dtype=torch.float64))
        return finely(_norm_of_samples, self)

    @property
    def _block_is_cheap(self) -> bool:
        """Whether the block is small, kept, and cheaper than the Gram matrix."""
        fewer = self.samples.dense_flops() < self.samples.gram_flops()
        forced = self.form in ("dense", "matrices", "pairs")
        return forced or (self.form == "auto" and fewer and self.shape[0] <= KEPT_BLOCK)

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return all eigenvalues, descending; outside the span of the samples 0."""
        p = self.shape[0]
        matrix = self._gram() if self.uses_gram else self._formed()
        values = factorised("eigvalsh", matrix.double(), self).flip(0).to(self.dtype)
        return torch.cat([values, values.new_zeros(max(0, p - len(values)))])[:p]

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return log det(F + damping·I) = p log λ + log det(I + K/λ).

        Raises
        ------
        IndefiniteError
            If the damped block is not positive definite.
        """
        damping = tikhonov(damping, self)
        if not self.uses_gram or damping <= 0:
            return -self.inverse(damping).logdet()
        factor = damped_cholesky(self._gram(), damping, self, overwrite=True)
        logs = 2 * float(factor.diagonal().log().sum())
        return logs + (self.shape[0] - len(factor)) * math.log(damping)

    def _solve(self, w: Float[Tensor, "k o i"], damping: Damping) -> Float[Tensor, "k o i"]:
        """Return (F + damping·I)⁻¹ w, refined once, residual checked.

        Where both spaces are large, by conjugate gradients on products with F, to a
        relative residual of 1e-10 (1e-5 in float32).

        Raises
        ------
        IndefiniteError
            If the damped block is not positive definite.
        NumericalError
            If the relative residual stays above 1e-6 (1e-3 in float32).
        """
        damping = tikhonov(damping, self)
        if damping > 0 and damping not in self._kept and self.iterates:
            return IterativeInverse(self, damping, provenance=self.provenance) @ w
        return refined_solve(self, self.inverse(damping), w, damping)

    @property
    def iterates(self) -> bool:
        """Whether a damped solve takes products only, being dearer by a factor."""
        p, m = self.shape[0], self.samples.total
        if self.form != "auto" or min(p, m) <= FACTORED:
            return False
        gram = self.samples.gram_flops() + m**3 // 3
        dense = self.samples.dense_flops() + p**3 // 3
        return ROUNDS * self.samples.product_work() < min(gram, dense)

    def inverse(self, damping: Damping) -> Operator:
        """Return (F + damping·I)⁻¹ through the smaller space; the last one is kept.

        Raises
        ------
        IndefiniteError
            If the damped block is not positive definite.
        """
        damping = tikhonov(damping, self)
        if damping not in self._kept:
            self._kept.clear()
            self._kept[damping] = self._invert(damping)
        return self._kept[damping]

    def _invert(self, damping: float) -> Operator:
        if not damping and self.samples.total < self.shape[0]:
            raise IndefiniteError(repr(self), damping, 0.0)  # fewer samples than p
        if self.uses_gram and damping > 0:
            made = self.provenance.by("inverse of exact")
            factor = damped_cholesky(self._gram(), damping, self, overwrite=True)
            return WoodburyInverse(self.samples, self.count, damping, factor, made)
        return Dense(self._formed(), self.weight_shape, self.provenance).inverse(damping)

    def eigenform(self) -> Eigenform | None:
        """Go through the Gram matrix: u_j = Dᵀ q_j / √(N κ_j).

        Vectors of small κ_j are far from orthonormal, which is harmless where they are
        measured against the rest. As many samples as rows may leave no rest: then the
        block is decomposed.
        """
        samples, count, p = self.samples, self.count, self.shape[0]
        wide = samples.total >= p
        if not self.uses_gram or (wide and p <= FACTORED):
            return None
        values, vectors = eigh(
            samples.gram().div_(count), Label("the Gram matrix of {}", self)
        )
        top = float(values[-1]) if len(values) else 0.0
        kept = values > top * len(values) * torch.finfo(values.dtype).eps
        values, vectors = values[kept], vectors[:, kept]
        turn = vectors / (values * count).sqrt()
        size = samples.columns, samples.examples
        basis = Turned(
            lambda w: samples.project(w).flatten(1) @ turn,
            lambda c: samples.combine((c @ turn.T).unflatten(1, size)),
        )
        return Eigenform(basis, (values[None],), self.weight_shape, 0.0, self.provenance)

    def _gram(self) -> Float[Tensor, "m m"]:
        m = self.samples.total
        require(
            2 * m * m * 8,
            parse_budget(None, self.device),
            Label(f"The {m}×{m} Gram matrix of {{}}", self),
            f"The dense block would take {readable(2 * 8 * self.shape[0] ** 2)}; "
            "use fewer examples, or MonteCarlo instead of Exact.",
        )
        return self.samples.gram().div_(self.count)


def _norm_of_samples(block: FactoredFisher) -> float:
    return float(block.samples.squared_norm() ** 0.5 / block.count)


def _two_passes(samples: Samples) -> int:
    o, i = samples.weight_shape
    return 2 * max(samples.nbytes // samples.dtype.itemsize, samples.examples * o * i)


@final
@dataclass(frozen=True, eq=False, repr=False)
class WoodburyInverse(Operator):
    r"""The damped inverse of an exact block through the sample space.

    .. math:: (F + λI)^{-1} = \frac{1}{λ}\left(I - \frac{1}{N} D^T (K + λI)^{-1} D\right)

    with the rows of D the vectorised samples and K = D Dᵀ / N.
    """

    samples: Samples
    count: int
    damping: float
    factor: Float[Tensor, "m m"] = field(metadata=STAYS)
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.samples.weight_shape

    @property
    def stored_numbers(self) -> int:
        """The samples and the factor."""
        held = self.samples.nbytes // self.dtype.itemsize
        return held + pair_count(self.factor.shape[0])

    @property
    def product_flops(self) -> int:
        """Two passes over the samples and two triangular solves."""
        return _two_passes(self.samples) + self.factor.shape[0] ** 2

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        c = self.samples.project(w)
        flat = c.flatten(1).T.double()
        solved = torch.cholesky_solve(flat, self.factor).T.to(w.dtype)
        inside = self.samples.combine(solved.reshape(c.shape)) / self.count
        return (w - inside) / self.damping

    def _rows(self, samples: Samples | None = None) -> Float[Tensor, "m p"]:
        """Return R = L⁻¹ D / √N, or that of other samples: the inverse is (I − RᵀR) / λ."""
        flat = (self.samples if samples is None else samples).flat().double()
        return torch.linalg.solve_triangular(self.factor, flat, upper=False).div_(
            self.count**0.5
        )

    def _energies(self, samples: Samples) -> Float[Tensor, " p"]:
        """Return the sums of squares of R's columns, a few rows of the weight at once."""
        found, at = self.factor.new_empty(math.prod(samples.weight_shape)), 0
        for panel in row_panels(samples, PANEL_BYTES):
            squares = self._rows(panel).square_().sum(0)
            found[at : at + len(squares)] = squares
            at += len(squares)
        return found

    @cached_property
    def _coupling(self) -> Float[Tensor, "m m"]:
        """(K + λI)⁻¹."""
        return torch.cholesky_inverse(self.factor)

    def inner_of_samples(self, turned: Samples) -> float:
        """Return Σ_b ⟨R_b, E_b⟩ where E are the products of R with a matrix.

        Parameters
        ----------
        turned
            The products of the samples D with that matrix.
        """
        table = inner_products(self.samples.to(torch.float64), turned.to(torch.float64))
        return float((table * self._coupling).sum()) / self.count

    def _dense(self) -> Float[Tensor, "p p"]:
        inside = self._rows()
        matrix = torch.eye(self.shape[0], dtype=torch.float64, device=self.device)
        return (matrix.addmm_(inside.T, inside, alpha=-1) / self.damping).to(self.dtype)

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return the diagonal."""
        inside = self._energies(self.samples).view(self.weight_shape)
        return inside.neg_().add_(1).div_(self.damping).to(self.dtype)

    @cached_property
    def _values(self) -> Float[Tensor, " m"]:
        """Eigenvalues of K + λI, ascending."""
        values: Tensor = factorised("svdvals", self.factor, self).square().flip(0)
        return values

    def trace(self) -> float:
        """Return (p − M)/λ + tr (K + λI)⁻¹."""
        free = self.shape[0] - len(self.factor)
        return free / self.damping + float(self._coupling.trace())

    def frobenius_norm(self) -> float:
        """Return ((p − M)/λ² + Σ 1/(κ + λ)²)^½."""
        free = self.shape[0] - len(self._values)
        inside = float(self._values.reciprocal().square().sum())
        return (free / self.damping**2 + inside) ** 0.5

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return all eigenvalues, descending."""
        p, m = self.shape[0], len(self._values)
        values = self._values.reciprocal()  # descending: κ + λ ascend
        if m >= p:  # K has at least M − p zero eigenvalues that are not the block's
            return values[m - p :].to(self.dtype)
        outside = values.new_full((p - m,), 1 / self.damping)
        return torch.cat([outside, values]).to(self.dtype)

    def _spectra(self) -> Iterator[Float[Tensor, "p 1"]]:
        yield self.eigenvalues()[:, None]  # reciprocals: small, but no rounding

    def inner_with(self, other: Operator) -> float:
        """Return ⟨self, other⟩ = (tr other − Σ ⟨R_b, other R_b⟩)/λ.

        In an eigenbasis Σ ⟨R_b, other R_b⟩ = Σ_j v_j Σ_b ⟨R_b, u_j⟩²: one rotation, of
        the factors of the samples where these have some.
        """
        pair = other.basis.pair if isinstance(other, Eigenform) else None
        if pair is not None and pair[0] is not None and pair[1] is not None:
            turned = multiplied(self.samples.to(torch.float64), pair[0], pair[1])
            if turned is not None and isinstance(other, Eigenform):
                inside = float(self._energies(turned) @ other._inside.double())
                if other.rest:
                    inside += other.rest * self.inner_of_samples(self.samples)
                return (other.trace() - inside) / self.damping
        stack = self._rows().to(self.dtype).unflatten(1, self.weight_shape)
        inside = 0.0
        for part in stack.split(max(1, CHUNK_BYTES // (stack[0].nbytes or 1))):
            if isinstance(other, Eigenform):
                energies = other.basis.rotate(part).square().sum(0, dtype=torch.float64)
                inside += float(energies @ other._inside.double())
                inside += other.rest * float(part.square().sum(dtype=torch.float64))
            else:
                inside += float((part * (other @ part)).sum(dtype=torch.float64))
        return (other.trace() - inside) / self.damping


@inner_product(FactoredFisher, FactoredFisher)
def _factored_factored(a: FactoredFisher, b: FactoredFisher) -> float:
    if a.samples is b.samples:
        return a.frobenius_norm() ** 2 * a.count / b.count
    for one, other in ((a, b), (b, a)):
        if other._block_is_cheap:
            return _factored_dense(one, Dense(other._formed(), other.weight_shape))
    if any(isinstance(s, TokenSamples) for s in (a.samples, b.samples)):
        return _factored_any(a, b)  # rows of a table too long to be formed
    return squared_inner(a.samples, b.samples) / (a.count * b.count)


@inner_product(FactoredFisher, Eigenform)
def _factored_eigenform(a: FactoredFisher, b: Eigenform) -> float:
    total = float((b.basis.energies(a.samples) * b._inside).sum(dtype=torch.float64))
    return total / a.count + (b.rest * a.trace() if b.rest else 0.0)


@inner_product(FactoredFisher, Dense)
def _factored_dense(a: FactoredFisher, b: Dense) -> float:
    p, m = a.shape[0], a.samples.total
    if a._block_is_cheap or a.samples.dense_flops() < m * p * p:
        return float((a._formed() * b.matrix).sum(dtype=torch.float64))
    return _factored_any(a, b)


@inner_product(FactoredFisher, IterativeInverse)
def _factored_iterative(a: FactoredFisher, b: IterativeInverse) -> float:
    """Solve for every sample, or form the inverse where that is cheaper."""
    p, m = a.shape[0], a.samples.total
    solves = m * ROUNDS * b.forward.product_flops
    iterated = b.closed or b.stopping.truncated
    by_samples = a.uses_gram and (iterated or solves < p**3 + m * p * p)
    return _factored_any(a, b) if by_samples else a.inner(b.formed)


@inner_product(FactoredFisher, Operator, by_samples=True)
def _factored_any(a: FactoredFisher, b: Operator) -> float:
    total = 0.0
    for stack in a.samples.stacks():
        total += float((stack * (b @ stack)).sum(dtype=torch.float64))
    return total / a.count


@inner_product(WoodburyInverse, Eigenform)
def _woodbury_eigenform(a: WoodburyInverse, b: Eigenform) -> float:
    """Multiply the M samples by b, or the eigenvectors of b by a if those are fewer."""
    if b.basis.is_identity:
        return float(b.values.double() @ a.diagonal().flatten().double())
    return b.inner_by_vectors(a) if len(b.values) < len(a.factor) else a.inner_with(b)


inner_product(WoodburyInverse, Operator, by_samples=True)(WoodburyInverse.inner_with)

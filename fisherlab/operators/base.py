"""The interface of every matrix over one weight, its inner product and its damping.

A weight w of shape (d_out, d_in) is a vector by rows: ``vec(w)[o·d_in + i] = w[o, i]``.
Operators are symmetric p × p matrices, p = d_out·d_in, that never hold p² numbers unless
asked for `to_dense`. A curvature matrix is made invertible by λI beside it, or by shifts
of its factors. Every call that takes a damping takes the same values, `Damping`, and reads
them here: `parsed` where both kinds are served, `tikhonov` where λ alone is.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, SupportsFloat, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import NumericalError
from fisherlab.numerics.devices import Budget, Held, parse_budget, readable, require
from fisherlab.numerics.krylov import extreme_eigenpairs
from fisherlab.numerics.linalg import Label, require_positive
from fisherlab.settings import is_number, require_number, setting
from fisherlab.showing import html_table

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

    from fisherlab.operators.eigenform import Eigenform


Mode = Literal["clip", "raw", "abs"]


@final
@setting
class Tikhonov:
    r"""Damp by a multiple of the identity, :math:`\hat F + λ I`; a number means this.

    Parameters
    ----------
    value
        λ ≥ 0.

    Raises
    ------
    ValueError
        If λ is negative or not finite.

    Examples
    --------
    >>> Tikhonov(0.1)
    Tikhonov(value=0.1)
    """

    value: float

    def __post_init__(self) -> None:
        """Check λ."""
        object.__setattr__(self, "value", _number("Tikhonov", self.value))


@final
@setting
class Factored:
    r"""Damp the factors of the leading Kronecker product.

    .. math:: (G + \tfrac{\sqrtλ}{π} I) \otimes (A + π\sqrtλ I)
              + \sum_{k \ge 2} G_k \otimes A_k

    Another matrix than :math:`\hat F + λI`; `KroneckerSum.damped` returns it.

    Parameters
    ----------
    value
        λ ≥ 0.
    pi
        π; if None :math:`\sqrt{(\mathrm{tr} A / d_{in}) / (\mathrm{tr} G / d_{out})}`,
        and 1 where a trace is not positive.
    mode
        What is done for a second term. In the basis that diagonalises both terms the sum
        is 1 + s: "clip" keeps it above `floor`, "raw" leaves it and raises where it is
        not positive, "abs" takes 1 + |s| as the published code does. No basis
        diagonalises three and more terms at once: they take "raw" alone, whose inverse
        is solved for by conjugate gradients.
    floor
        The smallest value of 1 + s under "clip".

    Raises
    ------
    ValueError
        If λ is negative, π or the floor not positive, or the mode unknown.

    References
    ----------
    Martens & Grosse 2015, arXiv 1503.05671, section 6.3 (π); Koroko et al. 2022,
    arXiv 2201.10285, section 4 (two terms). Their code adds λ to both factors:
    ``Factored(λ**2, pi=1, mode="abs")`` here.

    Examples
    --------
    >>> import torch
    >>> Factored(1.0).damped(4 * torch.eye(2), torch.eye(3))[1][0, 0].item()
    1.5
    """

    value: float
    pi: float | None = None
    mode: Mode = "clip"
    floor: float = 0.1

    def __post_init__(self) -> None:
        """Check the numbers and the mode."""
        object.__setattr__(self, "value", _number("Factored", self.value))
        if self.mode not in ("clip", "raw", "abs"):
            msg = f"Factored(mode={self.mode!r}): 'clip', 'raw' or 'abs' is expected."
            raise ValueError(msg)
        if not self.floor > 0 or not (self.pi is None or self.pi > 0):
            raise ValueError(f"{self!r}: pi and floor must be positive.")

    def ratio(self, rows: Float[Tensor, "o o"], cols: Float[Tensor, "i i"]) -> float:
        """Return π for a row factor G and a column factor A."""
        return self.ratio_of(rows.diagonal(), cols.diagonal())

    def ratio_of(self, rows: Float[Tensor, " o"], cols: Float[Tensor, " i"]) -> float:
        """Return π for the diagonals of G and A."""
        if self.pi is not None:
            return self.pi
        row_mean = float(rows.mean()) if len(rows) else 0.0
        col_mean = float(cols.mean()) if len(cols) else 0.0
        positive = row_mean > 0 and col_mean > 0
        return (col_mean / row_mean) ** 0.5 if positive else 1.0

    def damped(
        self, rows: Float[Tensor, "o o"], cols: Float[Tensor, "i i"]
    ) -> tuple[Float[Tensor, "o o"], Float[Tensor, "i i"]]:
        """Return G + (√λ/π) I and A + π√λ I."""
        row_shift, col_shift = self.shifts(rows, cols)
        return shifted(rows, row_shift), shifted(cols, col_shift)

    def shifts(
        self, rows: Float[Tensor, "o o"], cols: Float[Tensor, "i i"]
    ) -> tuple[float, float]:
        """Return √λ/π and π√λ for a row factor G and a column factor A."""
        ratio, root = self.ratio(rows, cols), self.value**0.5
        return root / ratio, root * ratio


@final
@setting
class RelativeDamping:
    """λ = α · tr F / p: a fraction of each block's mean eigenvalue.

    Parameters
    ----------
    alphas
        One fraction; or several, which label the `damping` dimension of an analysis.

    Raises
    ------
    ValueError
        If a fraction is not positive and finite.

    Examples
    --------
    >>> RelativeDamping(0.01).alphas
    (0.01,)
    """

    alphas: float | Sequence[float] = 1e-2

    def __post_init__(self) -> None:
        """Turn the fractions into a tuple and check them."""
        given: Any = self.alphas
        many = hasattr(given, "__len__") and getattr(given, "ndim", 1) > 0
        listed = tuple(
            _number("RelativeDamping", one) for one in (given if many else (given,))
        )
        if not listed or 0 in listed:
            msg = f"RelativeDamping({given!r}): positive fractions are expected."
            raise ValueError(msg)
        object.__setattr__(self, "alphas", listed)

    def single(self) -> float:
        """Return the one fraction.

        Raises
        ------
        ValueError
            If there are several.
        """
        first, *rest = tuple(self.alphas)  # type: ignore[arg-type]
        if rest:
            raise ValueError(
                f"{self!r}: one fraction is expected here; several belong to analyses "
                "with a `damping` dimension."
            )
        return float(first)

    def of(self, operator: Any) -> Tikhonov:
        """Return α · tr F / p of an operator, as Tikhonov's.

        Raises
        ------
        ValueError
            If there are several fractions, or nothing that has a mean eigenvalue.
        NumericalError
            If the mean eigenvalue, or that share of it, is NaN or infinite.
        """
        alpha = self.single()
        if not hasattr(operator, "trace"):
            msg = f"{operator} with {self!r}: there is no block to be relative to; give λ."
            raise ValueError(msg)
        mean = operator.trace() / max(operator.shape[0], 1)
        if not alpha * mean < _INFINITY:
            raise NumericalError(
                f"{operator!r} with {self!r}: its mean eigenvalue is {mean:.3g}, so that "
                "λ is no number. Scale the data or the outputs, or leave the layer out."
            )
        return Tikhonov(alpha * max(mean, 0.0))


Damping = SupportsFloat | Tikhonov | Factored | RelativeDamping


def parsed(damping: Damping, operator: Any) -> Tikhonov | Factored:
    """Read a damping for one operator: the door that every call goes through.

    A number (also of numpy, or a tensor without dimensions) means Tikhonov; a relative
    damping becomes λ = α·tr/p of this operator.

    Raises
    ------
    ValueError
        For what is no damping, is negative or not finite.

    Examples
    --------
    >>> import torch
    >>> parsed(torch.tensor(0.5), None)
    Tikhonov(value=0.5)
    """
    if isinstance(damping, (Tikhonov, Factored)):
        return damping
    if isinstance(damping, RelativeDamping):
        return damping.of(operator)
    return Tikhonov(_number("damping", damping))


def require_damping(damping: Damping) -> None:
    """Refuse what is no damping of one operator.

    Raises
    ------
    ValueError
        Also for several fractions, which belong to analyses.

    Examples
    --------
    >>> require_damping(RelativeDamping(0.1))
    """
    if isinstance(damping, RelativeDamping):
        damping.single()
    elif not isinstance(damping, (Tikhonov, Factored)):
        _number("damping", damping)


def tikhonov(damping: Damping, operator: Any) -> float:
    """Return λ of a Tikhonov damping.

    Raises
    ------
    ValueError
        For what is no damping, or a factored one, which needs Kronecker terms.

    Examples
    --------
    >>> tikhonov(Tikhonov(0.5), "a block")
    0.5
    """
    if isinstance(damping, float) and 0 <= damping < _INFINITY:
        return float(damping)
    found = parsed(damping, operator)
    if isinstance(found, Factored):
        raise ValueError(
            f"{operator!r} with {damping!r}: a factored damping needs an operator with "
            "Kronecker terms (KFAC, KPSVD, TKFAC). Use Tikhonov(λ) or a number."
        )
    return found.value


def shifted(matrix: Float[Tensor, "n n"], shift: float) -> Float[Tensor, "n n"]:
    """Return matrix + shift·I."""
    out = matrix.clone()
    out.diagonal().add_(shift)
    return out


_INFINITY = float("inf")


def _number(name: str, given: Any) -> float:
    if not is_number(given) or not 0 <= float(given) < _INFINITY:
        call = f"damping={given!r}" if name == "damping" else f"{name}({given!r})"
        raise ValueError(
            f"{call}: one finite number of at least 0 (positive in "
            "analyses), Tikhonov(λ), Factored(λ) or RelativeDamping(α) is expected."
        )
    return float(given)


PANEL_BYTES = 64 * 2**20  # unit matrices multiplied at once in the general paths

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Provenance:
    """Tell how a value was made; shown, compared, never used in arithmetic.

    Examples
    --------
    >>> print(Provenance("fc1", "Exact()", "Categorical()", 100).by("KFAC"))
    'fc1': KFAC, Exact(), Categorical(), N=100
    """

    layer: str = ""
    fisher: str = ""
    likelihood: str = ""
    examples: int = 0
    seed: int | None = None
    method: str = ""

    def __str__(self) -> str:
        """Return one line, leaving out what is not known."""
        known = [self.method, self.fisher, self.likelihood]
        parts = [text for text in known if text]
        parts += [f"N={self.examples}"] if self.examples else []
        return (f"{self.layer!r}: " if self.layer else "") + ", ".join(parts)

    @classmethod
    def of(cls, fisher: object, likelihood: object, examples: int = 0) -> Provenance:
        """Return that of statistics: of which labels, of which loss, of how many."""
        seed = getattr(fisher, "seed", None)
        return cls("", repr(fisher), repr(likelihood), examples, seed)

    def by(self, method: str) -> Provenance:
        """Return the same with the name of the method that made the value."""
        return replace(self, method=method)

    @property
    def inverted(self) -> Provenance:
        """That of the inverse, damped or not."""
        return self.by(f"inverse of {self.method}")


class Operator(Held, ABC):
    """A symmetric (p, p) matrix that acts on weights of shape (d_out, d_in).

    An operator says what it holds, its `weight_shape`, and its product `_apply`, or the
    matrix it stands for, `formed`. It answers everything else through `formed`, the dense
    block unless told otherwise; what it answers faster or better, it overrides.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> operator = fl.operators.Diagonal(torch.tensor([[1.0, 4.0]]))
    >>> isinstance(operator, fl.operators.Operator), operator.trace()
    (True, 5.0)
    >>> operator @ torch.ones(1, 2), operator.solve(torch.ones(1, 2), damping=0.0)
    (tensor([[1., 4.]]), tensor([[1.0000, 0.2500]]))
    """

    provenance: Provenance
    block_shape: tuple[int, int]

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in); of what holds no `block_shape`, that of its tensors or parts."""
        return self.block_shape

    @cached_property
    def formed(self) -> Operator:
        """The matrix in the form that answers what this one does not: here dense."""
        from fisherlab.operators.dense import Dense

        return Dense(self.to_dense(), self.weight_shape, self.provenance)

    @property
    def _stands(self) -> bool:
        """Whether the matrix stands for another one, which is no dense block."""
        return type(self).formed is not Operator.formed

    @property
    def product_flops(self) -> int:
        """Multiply-adds of one product with a weight."""
        return self.formed.product_flops if self._stands else self.stored_numbers

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        """Return the products with k weights."""
        return self.formed._apply(w)

    def _dense(self) -> Float[Tensor, "p p"]:
        """Return the matrix; from products, unless it is written from the definition."""
        if self._stands:
            return self.formed._dense()
        return torch.cat([self._apply(unit).flatten(1) for unit in unit_weights(self)])

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return the diagonal, shaped like the weight."""
        return self.formed.diagonal()

    def trace(self) -> float:
        """Return the trace."""
        return self.formed.trace()

    def frobenius_norm(self) -> float:
        """Return √Σ M_ij²."""
        return self.formed.frobenius_norm()

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return all p eigenvalues, descending."""
        return self.formed.eigenvalues()

    def inverse(self, damping: Damping) -> Operator:
        """Return (M + damping·I)⁻¹ as an operator.

        Raises
        ------
        NumericalError
            If M + λI is not positive definite.
        """
        return self.formed.inverse(damping)

    def eigenform(self) -> Eigenform | None:
        """Return the matrix in an orthonormal basis, if one is known in closed form."""
        return self.formed.eigenform() if self._stands else None

    def solve(
        self, w: Float[Tensor, "*k o i"], damping: Damping
    ) -> Float[Tensor, "*k o i"]:
        """Return (M + damping·I)⁻¹ w, in the shape of w.

        Rounding leaves a residual ‖(M + λI)x − w‖ of at most 4ε(1 + ‖M‖₂/λ)‖w‖, ε of the
        precision; conjugate gradients one of 1e-10‖w‖ (1e-5 in float32) where that is
        more, unless they are meant to be cut. Weights in half precision are solved for in
        that of the operator.

        Raises
        ------
        NumericalError
            If M + λI is not positive definite. At λ = 0 that is: if the smallest
            eigenvalue does not exceed ε·p·largest (of each block that stands alone), so
            that it may be rounding.
        """
        self._check(w, "solve")
        if w.dtype in HALF and w.dtype != self.dtype:
            return self.solve(w.to(self.dtype), damping).to(w.dtype)
        return self._solve(w.reshape(-1, *self.weight_shape), damping).reshape(w.shape)

    def _solve(self, w: Float[Tensor, "k o i"], damping: Damping) -> Float[Tensor, "k o i"]:
        """Return the solves with k weights: by the inverse, or as `formed` has it."""
        if type(self).inverse is Operator.inverse:
            return self.formed._solve(w, damping)
        return self.inverse(damping)._apply(w)

    @property
    def _rounded_rows(self) -> int | None:
        """Of how many rows the rounding of the eigenvalues is, where it is not all."""
        return None

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(p, p)."""
        o, i = self.weight_shape
        return o * i, o * i

    def __matmul__(self, w: Float[Tensor, "*k o i"]) -> Float[Tensor, "*k o i"]:
        """Return M w for weights of shape (..., d_out, d_in)."""
        self._check(w, "@")
        if w.dtype in HALF and w.dtype != self.dtype:
            return (self @ w.to(self.dtype)).to(w.dtype)
        return self._apply(w.reshape(-1, *self.weight_shape)).view(w.shape)

    def to_dense(self, budget: Budget = None) -> Float[Tensor, "p p"]:
        """Return the p × p matrix.

        Raises
        ------
        BudgetError
            If p² numbers exceed the budget (default: half of the free memory).
        """
        p = self.shape[0]
        require(
            p * p * self.dtype.itemsize,
            parse_budget(budget, self.device),
            Label("to_dense of {}", self),
            "Products, norms, solves and inner products need no dense matrix.",
        )
        return self._dense()

    def inner(self, other: Operator) -> float:
        """Return ⟨M, other⟩ = Σ M_ij other_ij.

        Raises
        ------
        ValueError
            If the two act on weights of different shapes.
        """
        if self.weight_shape != other.weight_shape:
            raise ValueError(
                f"inner: {self!r} acts on weights of shape {self.weight_shape}, "
                f"{other!r} on {other.weight_shape}."
            )
        return finely(_inner, self, other)

    def quadratic_form(self, w: Float[Tensor, "*k o i"]) -> Float[Tensor, "*k"]:
        """Return ⟨w, M w⟩."""
        return (w * (self @ w)).sum((-2, -1))

    def take_rows(self, index: Sequence[int]) -> Float[Tensor, "k o i"]:
        """Return some rows of the matrix, each in the shape of the weight.

        Parameters
        ----------
        index
            Positions in ``vec(w)``.

        Raises
        ------
        ValueError
            If a position lies outside of the block.
        """
        p = self.shape[0]
        if any(not 0 <= place < p for place in index):
            msg = f"take_rows of {self!r}: {list(index)} given, 0 to {p - 1} expected."
            raise ValueError(msg)
        unit = torch.zeros(len(index), p, dtype=self.dtype, device=self.device)
        unit[range(len(index)), list(index)] = 1.0
        return self._apply(unit.unflatten(1, self.weight_shape))

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return log det(M + damping·I).

        Raises
        ------
        NumericalError
            If the damped matrix is not positive definite.
        """
        if isinstance(damping, Factored):
            return -self.inverse(damping)._log_volume()
        shift, total = tikhonov(damping, self), 0.0
        if self._stands:
            return self.formed.logdet(shift)
        for values in self._spectra():
            require_positive(values, shift, Label("logdet of {}", self), self._rounded_rows)
            total += float((values.double() + shift).log().sum())
        return total

    def _spectra(self) -> Iterator[Float[Tensor, "*b k"]]:
        """Yield the eigenvalues of what stands alone on the diagonal, a row a block."""
        if self._stands:
            yield from self.formed._spectra()
        else:
            yield self.eigenvalues()

    def _log_volume(self) -> float:
        """Return log det M of what is positive as it was made: an inverse."""
        if self._stands:
            return self.formed._log_volume()
        return float(self.eigenvalues().double().log().sum())

    def top_eigenvalues(self, k: int) -> Float[Tensor, " k"]:
        """Return the k largest eigenvalues, descending, by Lanczos on products.

        Raises
        ------
        ValueError
            If k is no positive number.
        """
        require_number(f"top_eigenvalues({k!r})", k, "a whole number")
        if k < 1:
            raise ValueError(f"top_eigenvalues({k!r}): at least one is expected.")
        p = self.shape[0]
        if p <= 512 or k >= p // 2:
            return self.eigenvalues()[:k]
        values, _ = extreme_eigenpairs(self.to_scipy(), k, "LA", repr(self))
        return values.flip(0).to(dtype=self.dtype, device=self.device)

    def to_scipy(self) -> LinearOperator:
        """Return a flat scipy LinearOperator on float64 numpy vectors."""
        from scipy.sparse.linalg import LinearOperator

        def product(flat: Any) -> Any:
            columns = torch.as_tensor(flat).reshape(self.shape[0], -1).T
            w = columns.to(self.dtype).to(self.device).unflatten(1, self.weight_shape)
            return self._apply(w).flatten(1).T.double().cpu().numpy().reshape(flat.shape)

        return LinearOperator(
            self.shape, matvec=product, rmatvec=product, matmat=product, dtype="float64"
        )

    def __repr__(self) -> str:
        """Return one line: what, of what, how large."""
        p = self.shape[0]
        size = readable(self.stored_numbers * self.dtype.itemsize)
        kind = str(self.dtype).removeprefix("torch.")
        return f"{type(self).__name__}({self.provenance}, {p}×{p}, {kind}, {size})"

    def _repr_html_(self) -> str:
        """Return a small folding table for notebooks."""
        rows = {
            "layer": self.provenance.layer,
            "made by": self.provenance.method,
            "Fisher": self.provenance.fisher,
            "likelihood": self.provenance.likelihood,
            "examples N": self.provenance.examples,
            "weight (d_out, d_in)": self.weight_shape,
            "matrix": f"{self.shape[0]} × {self.shape[1]}, {self.dtype}, {self.device}",
            "numbers held": f"{self.stored_numbers:,}",
            "memory": readable(self.stored_numbers * self.dtype.itemsize),
        }
        return html_table(type(self).__name__, rows)

    def _check(self, w: Tensor, call: str) -> None:
        check_kind(w, self, call)
        if w.shape[-2:] != self.weight_shape:
            raise ValueError(
                f"{self!r} {call}: a weight of shape {tuple(w.shape)} was given, "
                f"(..., {self.weight_shape[0]}, {self.weight_shape[1]}) is expected. "
                "`stats[name].pack({parameter: tensor})` makes it from parameters."
            )


def check_kind(w: object, by: Operator, call: str) -> None:
    """Refuse what is no weight of the operator's own precision (or half) and device."""
    if not isinstance(w, Tensor):
        given = f"{type(w).__name__} was given"
    elif w.dtype not in {by.dtype, *HALF}:
        given = f"a weight in {w.dtype} was given"
    elif w.device != by.device:
        given = f"a weight on {w.device} was given"
    else:
        return
    raise TypeError(
        f"{by!r} {call}: {given}, a tensor in {by.dtype} on {by.device} is expected. "
        "Convert it by `w.to(operator.dtype)`, or the operator by `operator.to(w.dtype)`."
    )


A = TypeVar("A", bound=Operator)
B = TypeVar("B", bound=Operator)
Pair = tuple[type[Operator], type[Operator]]
_PAIRS: dict[Pair, Callable[[Any, Any], float]] = {}
_BY_SAMPLES: set[type[Operator]] = set()  # operators that multiply sample by sample


def inner_product(
    first: type[A], second: type[B], *, by_samples: bool = False
) -> Callable[[Callable[[A, B], float]], Callable[[A, B], float]]:
    """Register the closed form of ⟨first, second⟩.

    With `by_samples` it multiplies every sample of the first with the second, which is
    dear: a form of the second with any operator goes before it.
    """

    def register(function: Callable[[A, B], float]) -> Callable[[A, B], float]:
        _PAIRS[first, second] = function
        if by_samples:
            _BY_SAMPLES.add(first)
        return function

    return register


SIZES: Final = (1e-13, 1e17)  # of matrices in float32 whose squares lose no part


def finely(measure: Callable[..., float], *given: Operator) -> float:
    """Return a norm, or an inner product, in float64 where squares of float32 are none.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> small = Diagonal(torch.full((1, 4), 1e-30))
    >>> f"{small.inner(small):.1e}"
    '4.0e-60'
    """
    found = measure(*given)
    least, most = SIZES
    known = least < abs(found) ** (1 / len(given)) < most
    if known or all(one.dtype == torch.float64 for one in given):
        return found
    return measure(*(one.to(torch.float64) for one in given))


def _inner(a: Operator, b: Operator) -> float:
    """Take the closed form of the pair, then forms they stand for, then products."""
    kinds = type(a), type(b)
    orders = [(kinds, a, b), (kinds[::-1], b, a)]
    orders += [((type(one), Operator), one, other) for one, other in ((a, b), (b, a))]
    for pair, left, right in orders:
        if pair in _PAIRS and (pair[1] is not Operator or pair[0] not in _BY_SAMPLES):
            return _PAIRS[pair](left, right)
    if a._stands or b._stands:
        return a.formed.inner(b) if a._stands else a.inner(b.formed)
    for pair, left, right in orders:
        if pair in _PAIRS:
            return _PAIRS[pair](left, right)
    return column_inner(a, b)


def column_inner(a: Operator, b: Operator) -> float:
    """Return Σ M_ij N_ij column by column: the general path, without p² numbers."""
    return sum(
        float(((a @ unit) * (b @ unit)).sum(dtype=torch.float64))
        for unit in unit_weights(a)
    )


def unit_weights(operator: Operator) -> Iterator[Float[Tensor, "k o i"]]:
    """Yield the p unit weights in panels: exact sums over columns without p² memory."""
    p = operator.shape[0]
    panel = max(1, PANEL_BYTES // (p * operator.dtype.itemsize))
    for start in range(0, p, panel):
        rows = torch.arange(start, min(start + panel, p), device=operator.device)
        unit = torch.zeros(len(rows), p, dtype=operator.dtype, device=operator.device)
        unit[torch.arange(len(rows), device=operator.device), rows] = 1.0
        yield unit.unflatten(1, operator.weight_shape)

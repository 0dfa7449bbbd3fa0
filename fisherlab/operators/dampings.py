"""How a curvature matrix is made invertible: λI beside it, or shifts of its factors.

Every call that takes a damping takes the same values, `Damping`, and reads them here:
`parsed` where both kinds are served, `tikhonov` where λ alone is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsFloat, final

from jaxtyping import Float
from torch import Tensor

from fisherlab.settings import is_number, numeric
from fisherlab.showing import shown

Mode = Literal["clip", "raw", "abs"]


@shown
@numeric
@final
@dataclass(frozen=True)
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


@shown
@numeric
@final
@dataclass(frozen=True)
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
            msg = f"{self!r}: pi and floor must be positive."
            raise ValueError(msg)

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


@shown
@final
@dataclass(frozen=True)
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
            msg = (
                f"{self!r}: one fraction is expected here; several belong to analyses "
                "with a `damping` dimension."
            )
            raise ValueError(msg)
        return float(first)

    def of(self, operator: Any) -> Tikhonov:
        """Return α · tr F / p of an operator, as Tikhonov's.

        Raises
        ------
        ValueError
            If there are several fractions, or nothing that has a mean eigenvalue.
        """
        alpha = self.single()
        if not hasattr(operator, "trace"):
            msg = f"{operator} with {self!r}: there is no block to be relative to; give λ."
            raise ValueError(msg)
        mean = operator.trace() / max(operator.shape[0], 1)
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
        msg = (
            f"{operator!r} with {damping!r}: a factored damping needs an operator with "
            "Kronecker terms (KFAC, KPSVD, TKFAC). Use Tikhonov(λ) or a number."
        )
        raise ValueError(msg)
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
        msg = (
            f"{call}: one finite number of at least 0 (positive in "
            "analyses), Tikhonov(λ), Factored(λ) or RelativeDamping(α) is expected."
        )
        raise ValueError(msg)
    return float(given)

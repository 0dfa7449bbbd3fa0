"""Damped inverses that are solved for, never formed unasked."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import IndefiniteError, NumericalError
from fisherlab.numerics.krylov import Solution, conjugate_gradients
from fisherlab.operators.base import Damping, Operator, Provenance, inner_product, tikhonov
from fisherlab.operators.dense import CholeskyInverse, Dense


@final
@dataclass(frozen=True)
class Stopping:
    """When conjugate gradients end.

    Parameters
    ----------
    tolerance
        Relative residual; 1e-10 in float64 and 1e-5 in float32 if None.
    max_iterations
        Products spent at most.
    truncated
        Whether the iterate at the cap is the answer; if not, it is an error.

    Examples
    --------
    >>> Stopping().residual(torch.float64), Stopping(tolerance=0.1).residual(torch.float32)
    (1e-10, 0.1)
    """

    tolerance: float | None = None
    max_iterations: int = 2000
    truncated: bool = False

    def residual(self, dtype: torch.dtype) -> float:
        """Return the relative residual asked for in a precision."""
        return self.tolerance or (1e-10 if dtype == torch.float64 else 1e-5)


TO_TOLERANCE = Stopping()


@final
@dataclass(frozen=True, eq=False, repr=False)
class IterativeInverse(Operator):
    """(M + damping·I)⁻¹ by conjugate gradients on products with M.

    Parameters
    ----------
    forward
        M.
    damping
        λ.
    preconditioner
        A positive definite operator close to the inverse; identity if None.
    stopping
        Tolerance and cap.
    closed
        Whether the matrix has an inverse of its own, that answers all but products.

    Examples
    --------
    >>> forward = Dense(2 * torch.eye(6, dtype=torch.float64), (2, 3))
    >>> inverse = IterativeInverse(forward, 2.0)
    >>> (inverse @ torch.ones(2, 3, dtype=torch.float64))[0, 0].item()
    0.25
    """

    forward: Operator
    damping: float
    preconditioner: Operator | None = None
    stopping: Stopping = TO_TOLERANCE
    provenance: Provenance = Provenance()
    closed: bool = False

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.forward.weight_shape

    @cached_property
    def formed(self) -> Operator:
        """The matrix's own inverse where it has one, else the dense block."""
        if self.closed:
            return self.forward.inverse(self.damping)
        return Dense(self.to_dense(), self.weight_shape, self.provenance)

    @property
    def _stands(self) -> bool:
        """Whether `formed` is no dense block."""
        return self.closed

    @cached_property
    def factor(self) -> CholeskyInverse:
        """The same inverse as a Cholesky factor of M + λI, p³/3 multiply-adds.

        Once made it also answers products, which then cost p² each.
        """
        block = Dense(self.forward.to_dense(), self.weight_shape, self.provenance)
        return block.inverse(self.damping)

    @property
    def stored_numbers(self) -> int:
        """Those of M."""
        return self.forward.stored_numbers

    @property
    def product_flops(self) -> int:
        """Twenty iterations (an estimate) of one product and one preconditioning."""
        other = self.preconditioner.product_flops if self.preconditioner else 0
        count = min(20, self.stopping.max_iterations)
        return count * (self.forward.product_flops + other)

    def solution(
        self, w: Float[Tensor, "k o i"], start: Float[Tensor, "k o i"] | None = None
    ) -> Solution:
        """Return x with (M + λI) x ≈ w, whether it converged, and after how long.

        Parameters
        ----------
        w
            Right-hand sides.
        start
            A first guess, e.g. the last step's answer.
        """
        return conjugate_gradients(
            lambda x: self.forward._apply(x) + self.damping * x,
            w,
            precondition=None
            if self.preconditioner is None
            else self.preconditioner._apply,
            start=start,
            tolerance=self.stopping.residual(self.dtype),
            max_iterations=self.stopping.max_iterations,
        )

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        if "factor" in vars(self) and not self.stopping.truncated:
            return self.factor._apply(w)
        return self.checked(self.solution(w)).value

    def checked(self, solution: Solution) -> Solution:
        """Return the solution if it may be used.

        Raises
        ------
        NumericalError
            If the residual was not reached and the iteration is not meant to be cut, or
            a direction of negative curvature was met.
        """
        if not solution.positive:
            raise NumericalError(
                f"solve with {self.forward!r}, damping {self.damping:g}: conjugate "
                "gradients met a direction of negative curvature, so the damped matrix is "
                "not positive definite. Increase the damping."
            )
        if not solution.converged and not self.stopping.truncated:
            raise NumericalError(
                f"solve with {self.forward!r}, damping {self.damping:g}: conjugate "
                f"gradients reached a relative residual of {solution.residual:.2g} in "
                f"{solution.iterations} iterations. Increase the damping."
            )
        return solution

    def _dense(self) -> Float[Tensor, "p p"]:
        if self.closed:
            return self.formed.to_dense()
        return self.factor.to_dense()

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return the reciprocals of the damped eigenvalues, descending.

        Raises
        ------
        IndefiniteError
            If the damped matrix is not positive definite.
        """
        damped = self.forward.eigenvalues() + self.damping
        if not bool((damped > 0).all()):
            smallest = float(damped.min()) - self.damping
            raise IndefiniteError(repr(self.forward), self.damping, smallest)
        return damped.reciprocal().flip(0)

    def _spectra(self) -> Iterator[Float[Tensor, "p 1"]]:
        yield self.eigenvalues()[:, None]  # reciprocals: small, but no rounding


@inner_product(Dense, IterativeInverse)
def _dense_iterative(a: Dense, b: IterativeInverse) -> float:
    return a.inner(b.formed)


@final
@dataclass(frozen=True, eq=False, repr=False)
class SolvedByProducts(Operator):
    """The same matrix as `forward`, but every damped solve runs conjugate gradients.

    Parameters
    ----------
    forward
        The matrix; questions other than solves go to it.
    stopping
        Tolerance and cap of the iteration.

    Examples
    --------
    >>> import torch
    >>> from fisherlab.operators import Diagonal
    >>> op = SolvedByProducts(Diagonal(torch.ones(2, 3)))
    >>> op.solve(torch.ones(2, 3), damping=1.0)[0, 0].item()
    0.5
    """

    forward: Operator
    stopping: Stopping = TO_TOLERANCE
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.forward.weight_shape

    @cached_property
    def formed(self) -> Operator:
        """The same matrix."""
        return self.forward

    def solve(
        self,
        w: Float[Tensor, "*k o i"],
        damping: Damping,
        start: Float[Tensor, "*k o i"] | None = None,
    ) -> Float[Tensor, "*k o i"]:
        """Return (M + damping·I)⁻¹ w.

        Parameters
        ----------
        w
            Right-hand sides.
        damping
            λ or Tikhonov(λ).
        start
            A first guess, e.g. the answer of the step before.

        Raises
        ------
        NumericalError
            If the residual is not reached, unless the iteration is meant to be cut.
        """
        if start is None:
            return super().solve(w, damping)
        return self.solution(w, damping, start).value

    def _solve(self, w: Float[Tensor, "k o i"], damping: Damping) -> Float[Tensor, "k o i"]:
        return self.solution(w, damping).value

    def solution(
        self,
        w: Float[Tensor, "*k o i"],
        damping: Damping,
        start: Float[Tensor, "*k o i"] | None = None,
    ) -> Solution:
        """Return the solve with its iterations, its residual and whether it converged.

        Parameters and errors are those of `solve`.
        """
        self._check(w, "solve")
        flat = (-1, *self.weight_shape)
        inverse = self.inverse(damping)
        guess = None if start is None else start.reshape(flat)
        found = inverse.checked(inverse.solution(w.reshape(flat), guess))
        return found._replace(value=found.value.view(w.shape))

    def inverse(self, damping: Damping) -> IterativeInverse:
        """Return (M + damping·I)⁻¹, solved for at every product."""
        made = self.provenance.inverted
        shift = tikhonov(damping, self)
        return IterativeInverse(
            self.forward, shift, stopping=self.stopping, provenance=made, closed=True
        )

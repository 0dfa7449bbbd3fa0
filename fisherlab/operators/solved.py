"""A block whose damped solves are conjugate gradients on its products, nothing else."""

from dataclasses import dataclass
from functools import cached_property
from typing import final

from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.conjugate_gradients import Solution
from fisherlab.operators.base import Operator, Provenance
from fisherlab.operators.dampings import Damping, tikhonov
from fisherlab.operators.iterative import TO_TOLERANCE, IterativeInverse, Stopping


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

    @property
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
        made = self.provenance.by(f"inverse of {self.provenance.method}")
        shift = tikhonov(damping, self)
        return IterativeInverse(
            self.forward, shift, stopping=self.stopping, provenance=made
        )

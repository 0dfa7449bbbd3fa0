"""A two-level inverse whose coarse space follows each right-hand side."""

from dataclasses import dataclass
from typing import Never, final

import torch
from torch import Tensor

from fisherlab.operators.base import Provenance
from fisherlab.operators.dampings import Damping
from fisherlab.operators.network.base import NetworkOperator, Shapes, Weights
from fisherlab.operators.network.coarse_spaces import Coarse, right_side_space
from fisherlab.operators.network.two_level_inverse import Combination, TwoLevelInverse


@final
@dataclass(frozen=True, eq=False, repr=False)
class AdaptiveTwoLevelInverse(NetworkOperator):
    """The map w ↦ two-level inverse with directions from what K⁻¹ leaves of w.

    It is not linear: it has products, and refuses every question about a matrix.

    Parameters
    ----------
    fine
        K⁻¹.
    exact, shift
        F and λ with P = F + λI.
    coarse
        "residual" or "krylov".
    combination
        "additive" or "multiplicative".
    vectors
        Directions a layer.

    Examples
    --------
    >>> from fisherlab.operators import BlockDiagonal, Diagonal
    >>> same = BlockDiagonal({n: Diagonal(torch.ones(1, 2)) for n in "ab"})
    >>> op = AdaptiveTwoLevelInverse(same.inverse(3.0), same, 1.0, "residual")
    >>> (op @ {n: torch.ones(1, 2) for n in "ab"})["a"].tolist()
    [[0.5, 0.5]]
    """

    fine: NetworkOperator
    exact: NetworkOperator
    shift: float
    coarse: Coarse
    combination: Combination = "multiplicative"
    vectors: int = 1
    provenance: Provenance = Provenance()

    @property
    def weight_shapes(self) -> Shapes:
        """Block name to (d_out, d_in)."""
        return self.fine.weight_shapes

    @property
    def product_flops(self) -> int:
        """Solves of the fine level, and two products with F."""
        return (1 + self.vectors) * self.fine.product_flops + 2 * self.exact.product_flops

    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        done = self.fine._apply_blocks(ws)
        image = self.exact._apply_blocks(done)
        rest = {name: w - image[name] - self.shift * done[name] for name, w in ws.items()}
        found = []
        for k in range(len(next(iter(ws.values())))):
            own = {name: r[k] for name, r in rest.items()}
            space = right_side_space(self.coarse, self.fine, own, self.vectors)
            corrected = TwoLevelInverse(
                self.fine, self.exact, self.shift, space, self.combination
            )
            one = corrected._apply_blocks({name: w[k : k + 1] for name, w in ws.items()})
            found.append(one)
        return {name: torch.cat([one[name] for one in found]) for name in ws}

    @property
    def formed(self) -> Never:
        """Raise ValueError, as every question about a matrix does: there is none."""
        msg = (
            f"{self!r}: the coarse space {self.coarse!r} follows the right-hand side, so "
            "this is no matrix. Take products, or another space."
        )
        raise ValueError(msg)

    def block(self, row: str, column: str) -> Tensor:
        """Raise ValueError: there is no matrix."""
        return self.formed

    def inverse(self, damping: Damping) -> NetworkOperator:
        """Raise ValueError: there is no matrix."""
        return self.formed

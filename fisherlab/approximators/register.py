"""Names of approximators, for the command line and for tables."""

from collections.abc import Mapping, Sequence

from fisherlab.approximators.base import Approximator
from fisherlab.approximators.blocks.diagonal import Diagonal, QuasiDiagonal
from fisherlab.approximators.blocks.exact import ExactBlock, LowRank
from fisherlab.approximators.blocks.mini_block import ByOutput, MiniBlock
from fisherlab.approximators.kpsvd.deflation import Deflation
from fisherlab.approximators.kpsvd.iterative_solvers import Lanczos
from fisherlab.approximators.kpsvd.kfac_corrected import KFACCorrected
from fisherlab.approximators.kpsvd.kpsvd import KPSVD
from fisherlab.approximators.kronecker.cg_fac import CGFAC
from fisherlab.approximators.kronecker.eigenvalues import EKFAC, TEKFAC
from fisherlab.approximators.kronecker.kfac import FOOF, KFAC
from fisherlab.approximators.kronecker.partial_traces import TKFAC, Shampoo
from fisherlab.approximators.mean_gradients import (
    AdamPreconditioner,
    ShampooPreconditioner,
    TNTPreconditioner,
)
from fisherlab.approximators.online.k_bfgs import KBFGS

_REGISTER: dict[str, Approximator] = {
    "exact": ExactBlock(),
    "kfac": KFAC(),
    "kfac-reduce": KFAC(sharing="reduce"),
    "ekfac": EKFAC(),
    "tkfac": TKFAC(),
    "tekfac": TEKFAC(),
    "shampoo": Shampoo(),
    "foof": FOOF(),
    "cg-fac": CGFAC(),
    "kpsvd": KPSVD(),
    "kpsvd-2": KPSVD(rank=2),
    "kpsvd-3": KPSVD(rank=3),
    "kpsvd-4": KPSVD(rank=4),
    "deflation": Deflation(),
    "lanczos-2": KPSVD(rank=2, solver=Lanczos()),
    "lanczos-paper": KPSVD(rank=2, solver=Lanczos(steps=2, reorthogonalise=False)),
    "kfac-corrected": KFACCorrected(),
    "mini-block": MiniBlock(),
    "mini-block-shared": MiniBlock(spatial_average=True),
    "unit-wise": MiniBlock(partition=ByOutput()),
    "low-rank": LowRank(),
    "quasi-diagonal": QuasiDiagonal(),
    "diagonal": Diagonal(),
}
# Matrices that precondition a gradient but are no estimates of the block, or of F/N.
_PRECONDITIONERS: dict[str, Approximator] = {
    "mini-block-mean": MiniBlock(statistic="mean_gradient"),
    "mini-block-mean-shared": MiniBlock(statistic="mean_gradient", spatial_average=True),
    "shampoo-mean": ShampooPreconditioner(),
    "tnt-mean": TNTPreconditioner(),
    "adam": AdamPreconditioner(),
    "k-bfgs": KBFGS(),
    "k-bfgs-l": KBFGS(memory=100),
}
_ALIASES = {  # other names of the same matrix
    "kflr": "kfac",  # with all output columns, Exact()
    "kfc": "kfac",  # on convolutions
    "tnt": "tkfac",  # its per-example form
}


def approximators() -> dict[str, Approximator]:
    """Return all named approximators.

    Examples
    --------
    >>> approximators()["kpsvd-2"]
    KPSVD(rank=2, solver='auto')
    """
    return dict(_REGISTER)


def preconditioners() -> dict[str, Approximator]:
    """Return the named preconditioners, which are no estimates of the block itself.

    They take mean gradients; `compare` gives them the statistics of a layer, whose mean
    gradient they take for `Empirical` and `MonteCarlo`. K-BFGS takes those statistics.

    Examples
    --------
    >>> preconditioners()["adam"]
    AdamPreconditioner()
    """
    return dict(_PRECONDITIONERS)


def by_name(
    chosen: Sequence[str] | Mapping[str, Approximator] | None,
) -> dict[str, Approximator]:
    """Return approximators by name, values as they are; all named ones by default.

    Other names of the same matrix are understood: kflr and kfc (kfac), tnt (tkfac). So
    are the names of `preconditioners`.

    Raises
    ------
    ValueError
        If a name is unknown; the known ones are listed.

    Examples
    --------
    >>> by_name(["kfac"])
    {'kfac': KFAC(sharing='expand')}
    """
    if chosen is None:
        return approximators()
    if isinstance(chosen, Mapping):
        return dict(chosen)
    if isinstance(chosen, str):
        chosen = [chosen]
    known = _REGISTER | _PRECONDITIONERS
    unknown = [name for name in chosen if _ALIASES.get(name, name) not in known]
    if unknown:
        msg = (
            f"approximators: {', '.join(map(repr, unknown))} unknown; known: "
            f"{', '.join(known)}."
        )
        raise ValueError(msg)
    return {name: known[_ALIASES.get(name, name)] for name in chosen}

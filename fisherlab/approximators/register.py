"""Names of approximators, for the command line and for tables."""

from collections.abc import Mapping, Sequence

from fisherlab.approximators.base import Approximator
from fisherlab.approximators.cg_fac import CGFAC
from fisherlab.approximators.diagonal import Diagonal
from fisherlab.approximators.ekfac import EKFAC
from fisherlab.approximators.exact import ExactBlock
from fisherlab.approximators.foof import FOOF
from fisherlab.approximators.kfac import KFAC
from fisherlab.approximators.kpsvd import KPSVD, Deflation, KFACCorrected
from fisherlab.approximators.mini_block import MiniBlock
from fisherlab.approximators.shampoo import Shampoo
from fisherlab.approximators.solvers import Lanczos
from fisherlab.approximators.tekfac import TEKFAC
from fisherlab.approximators.tkfac import TKFAC

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
    "diagonal": Diagonal(),
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


def by_name(
    chosen: Sequence[str] | Mapping[str, Approximator] | None,
) -> dict[str, Approximator]:
    """Return approximators by name, values as they are; all named ones by default.

    Other names of the same matrix are understood: kflr and kfc (kfac), tnt (tkfac).

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
    unknown = [name for name in chosen if _ALIASES.get(name, name) not in _REGISTER]
    if unknown:
        msg = (
            f"approximators: {', '.join(map(repr, unknown))} unknown; known: "
            f"{', '.join(_REGISTER)}."
        )
        raise ValueError(msg)
    return {name: _REGISTER[_ALIASES.get(name, name)] for name in chosen}

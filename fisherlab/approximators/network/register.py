"""Names of network approximators."""

from collections.abc import Mapping, Sequence

from fisherlab.approximators.network.base import NetworkApproximator
from fisherlab.approximators.network.block_diagonal import PerBlock
from fisherlab.approximators.network.kfac_tridiagonal import KFACTridiagonal
from fisherlab.approximators.network.khatri_rao import KhatriRao
from fisherlab.approximators.network.two_level_kfac import ExactNetwork, TwoLevelKFAC

_REGISTER: dict[str, NetworkApproximator] = {
    "exact-network": ExactNetwork(),
    "kfac-block-diagonal": PerBlock("kfac"),
    "kfac-tridiagonal": KFACTridiagonal(),
    "khatri-rao": KhatriRao(),
    "two-level-kfac": TwoLevelKFAC(),
    "two-level-kfac-additive": TwoLevelKFAC(combination="additive"),
    "two-level-kfac-krylov": TwoLevelKFAC(coarse="krylov", vectors=2),
    "two-level-kfac-residual": TwoLevelKFAC(coarse="residual"),
    "two-level-kfac-spectral": TwoLevelKFAC(coarse="spectral"),
}


def network_approximators() -> dict[str, NetworkApproximator]:
    """Return all named approximators of a whole network.

    Examples
    --------
    >>> network_approximators()["kfac-tridiagonal"]
    KFACTridiagonal(chain=None)
    """
    return dict(_REGISTER)


def network_by_name(
    chosen: Sequence[str] | Mapping[str, NetworkApproximator] | None,
) -> dict[str, NetworkApproximator]:
    """Return network approximators by name, values as they are; all by default.

    Raises
    ------
    ValueError
        If a name is unknown; the known ones are listed.

    Examples
    --------
    >>> network_by_name(["khatri-rao"])
    {'khatri-rao': KhatriRao()}
    """
    if chosen is None:
        return network_approximators()
    if isinstance(chosen, Mapping):
        return dict(chosen)
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    unknown = [name for name in names if name not in _REGISTER]
    if unknown:
        msg = (
            f"network approximators: {', '.join(map(repr, unknown))} unknown; known: "
            f"{', '.join(_REGISTER)}."
        )
        raise ValueError(msg)
    return {name: _REGISTER[name] for name in names}

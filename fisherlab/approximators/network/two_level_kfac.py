"""The exact Fisher of a network, and KFAC coupled by a small system of it."""

from dataclasses import dataclass
from typing import ClassVar, final, get_args

from fisherlab.approximators import register
from fisherlab.approximators.base import NetworkStatistics
from fisherlab.approximators.network.block_diagonal import (
    block_diagonal,
    own_method,
    provenance,
)
from fisherlab.operators import FactoredFisher
from fisherlab.operators.factored import Form
from fisherlab.operators.network import TwoLevel, WholeNetwork
from fisherlab.operators.network.two_level import ONE_VECTOR, Coarse, Combination
from fisherlab.samples.parted import stacked
from fisherlab.settings import numeric
from fisherlab.showing import shown
from fisherlab.statistics.network import require_matching


@shown
@final
@dataclass(frozen=True)
class ExactNetwork:
    r"""The exact Fisher over all weights, F = (1/N) Σ d dᵀ with d all of D_vn, in a row.

    Products are sums over the layers; damped solves, spectra and norms go through the
    summed Gram matrix of the M = V·N samples or through the p × p matrix, whichever
    counts fewer flops. Nothing of size p² is held unless asked for.

    Parameters
    ----------
    form
        Where norms, solves and spectra are computed: "dense" (p × p), "gram" (M × M) or
        "auto", by counted flops.

    Notes
    -----
    Needs matching columns: collect with ``compress=False`` where a layer has fewer
    outputs than there are columns. Exact always.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> stats = fl.collect(
    ...     model, (torch.ones(5, 3), None), fl.Gaussian(), compress=False
    ... )
    >>> ExactNetwork()(stats).shape
    (20, 20)
    """

    takes: ClassVar[str] = "network"

    form: Form = "auto"

    def __call__(self, statistics: NetworkStatistics) -> WholeNetwork:
        """Return the exact matrix of all blocks.

        Raises
        ------
        ValueError
            If there are no blocks, or the columns of two layers do not match.
        """
        made = provenance(statistics, "exact network")
        layers = list(statistics.values())
        for layer in layers[1:]:
            require_matching("ExactNetwork", layers[0], layer)
        samples = stacked([layer.samples for layer in layers])
        whole = FactoredFisher(samples, layers[0].count, made, self.form)
        shapes = {name: layer.weight_shape for name, layer in statistics.items()}
        return WholeNetwork(whole, shapes, made)


@shown
@numeric
@final
@dataclass(frozen=True)
class TwoLevelKFAC:
    r"""KFAC with a coarse correction that lets layers act on each other.

    .. math:: K^{-1} + R^T (R (F + λI) R^T)^{-1} R

    with K the damped KFAC blocks, F the exact Fisher of the statistics and R a few
    directions a layer.

    Parameters
    ----------
    coarse
        "nicolaides": the constant of every layer. "residual": K⁻¹ r of every layer, with
        r = v − (F + λI) K⁻¹ v what KFAC leaves of the right-hand side v. "spectral": the
        eigenvectors of the smallest eigenvalues of every layer's block. "krylov": K⁻¹ r,
        K⁻² r, … of every layer.
    combination
        "additive" as above; "multiplicative" applies the coarse solve to what KFAC
        leaves, v − (F + λI) K⁻¹ v, which never increases the error in the norm of
        F + λI; the additive form can.
    vectors
        Directions a layer, for "spectral" and "krylov".

    Raises
    ------
    ValueError
        For an unknown coarse space or combination, which names the known.

    Notes
    -----
    The coarse matrix comes from the samples, λ R Rᵀ included; a common implementation
    uses Kronecker factors of all pairs and adds λ instead of λ‖r‖². Layers without inputs
    and output gradients get their exact block in place of KFAC. Products and norms are
    those of KFAC; the coarse level enters damped solves. Columns must match: collect with
    ``compress=False``. A solve costs one of KFAC, one product with F and one with as many
    directions as there are layers.

    References
    ----------
    Tselepidis et al. 2020, arXiv 2011.00573 (nicolaides, additive, Kronecker coarse
    matrix); Koroko et al. 2023, arXiv 2303.18083 (coarse spaces, residual correction).

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> stats = fl.collect(
    ...     model, (torch.ones(5, 3), None), fl.Gaussian(), compress=False
    ... )
    >>> op = TwoLevelKFAC(coarse="residual")(stats)
    >>> op.solve({"0": torch.ones(2, 4), "1": torch.ones(4, 3)}, 0.1)["1"].shape
    torch.Size([4, 3])
    """

    takes: ClassVar[str] = "network"

    coarse: Coarse = "nicolaides"
    combination: Combination = "multiplicative"
    vectors: int = 1

    def __post_init__(self) -> None:
        """Check the choices."""
        if self.coarse not in get_args(Coarse):
            msg = f"{self!r}: coarse is one of {', '.join(get_args(Coarse))}."
            raise ValueError(msg)
        if self.combination not in get_args(Combination):
            msg = f"{self!r}: combination is one of {', '.join(get_args(Combination))}."
            raise ValueError(msg)
        if self.vectors < 1 or (self.vectors > 1 and self.coarse in ONE_VECTOR):
            msg = (
                f"{self!r}: at least one direction a layer is expected, and exactly one "
                f"for {' and '.join(ONE_VECTOR)}."
            )
            raise ValueError(msg)

    def __call__(self, statistics: NetworkStatistics) -> TwoLevel:
        """Return the two levels.

        Raises
        ------
        ValueError
            If there are no blocks, or the columns of two layers do not match.
        """
        made = provenance(statistics, repr(self))
        methods = {name: own_method(layer) for name, layer in statistics.items()}
        return TwoLevel(
            block_diagonal(methods, statistics),
            ExactNetwork()(statistics),
            self.coarse,
            self.combination,
            self.vectors,
            made,
        )


register.add({"exact-network": ExactNetwork()})
register.add(
    {
        "two-level-kfac": TwoLevelKFAC(),
        "two-level-kfac-additive": TwoLevelKFAC(combination="additive"),
        "two-level-kfac-krylov": TwoLevelKFAC(coarse="krylov", vectors=2),
        "two-level-kfac-residual": TwoLevelKFAC(coarse="residual"),
        "two-level-kfac-spectral": TwoLevelKFAC(coarse="spectral"),
    }
)

"""Optimisers by name, with the settings that papers and their codes give them."""

from functools import partial
from typing import Any, Final

import torch
from torch.optim import Optimizer

from fisherlab.approximators import (
    CGFAC,
    EKFAC,
    KFAC,
    KPSVD,
    SINGD,
    TKFAC,
    Deflation,
    ExactBlock,
    KFACCorrected,
    Lanczos,
    MiniBlock,
)
from fisherlab.approximators.mean_gradients import (
    KLShampooPreconditioner,
    ShampooPreconditioner,
    SOAPPreconditioner,
    TNTPreconditioner,
)
from fisherlab.approximators.network import KFACTridiagonal, TwoLevelKFAC
from fisherlab.approximators.online import KBFGS
from fisherlab.errors import meant
from fisherlab.operators.base import Factored
from fisherlab.problems.problem import Problem
from fisherlab.training.moves import KLClip
from fisherlab.training.recipes import (
    INVERSE_FREE,
    KFAC_SOURCE,
    MBF_SOURCE,
    OWN_STATE,
    Recipe,
    always,
    from_data,
    of_full,
    of_goldfarb,
    of_koroko,
    of_muon,
    of_torch,
    plain,
    sampled,
    unit_ratio,
)


def optimizer(name: str, problem: Problem, **settings: Any) -> Optimizer:
    """Make an optimiser by its name.

    Parameters
    ----------
    name
        One of `optimizers()`.
    problem
        Whose model is optimised; methods with a warm start read its training data.
    settings
        Such as ``lr`` and ``damping``; the others keep the recipe's defaults.

    Raises
    ------
    ValueError
        If name or setting are unknown; the known ones are listed.
    TypeError
        For what is no problem.

    Examples
    --------
    >>> import fisherlab as fl
    >>> problem = fl.problems.load("digits")
    >>> sgd = fl.training.optimizer("sgd-momentum", problem, lr=0.1)
    >>> sgd.param_groups[0]["momentum"]
    0.9
    """
    if name not in _RECIPES:
        msg = f"optimizer: {name!r} is unknown; known: {', '.join(_RECIPES)}."
        msg += meant(name, _RECIPES)
        raise ValueError(msg)
    Problem.require(problem, "optimizer")
    return _RECIPES[name](problem, **settings)


def optimizers() -> dict[str, Recipe]:
    """Return all named optimisers.

    Examples
    --------
    >>> optimizers()["mbf"].summary
    'mini-block Fisher from mean gradients'
    """
    return dict(_RECIPES)


_CLIPPED: Final[dict[str, Any]] = {"lr": 3e-2, "damping": 0.1, "clip": KLClip(1e-3)}
_RECIPES: Final[dict[str, Recipe]] = {
    "sgd-momentum": of_torch(
        "stochastic gradient descent with momentum",
        "Polyak 1964; torch.optim.SGD",
        torch.optim.SGD,
        lr=0.1,
        momentum=0.9,
        weight_decay=0.0,
    ),
    "sgd-nesterov": of_torch(
        "stochastic gradient descent with Nesterov's momentum",
        "Sutskever et al. 2013; torch.optim.SGD",
        partial(torch.optim.SGD, nesterov=True),
        lr=0.1,
        momentum=0.9,
        weight_decay=0.0,
    ),
    "adam": of_torch(
        "Adam",
        "Kingma & Ba 2015, arXiv 1412.6980; torch.optim.Adam",
        torch.optim.Adam,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
    ),
    "kfac": plain(
        "KFAC with factored damping",
        KFAC_SOURCE,
        KFAC(),
        Factored,
        **_CLIPPED,
    ),
    "kfac-eigen": plain(
        "KFAC with exact Tikhonov damping in its eigenbasis and a KL clip",
        "public KFAC codes cited by arXiv 2202.04124",
        KFAC(),
        lr=1e-2,
        damping=0.03,
        statistics_every=10,
        inverse_every=100,
        clip=KLClip(1e-3, "step"),
    ),
    "kfac-tridiagonal": plain(
        "block-tridiagonal KFAC with factored damping",
        KFAC_SOURCE,
        KFACTridiagonal(),
        Factored,
        **_CLIPPED,
    ),
    "two-level-kfac": plain(
        "KFAC with a coarse correction between layers",
        "Tselepidis, Kohler & Orvieto 2020, arXiv 2011.00573",
        TwoLevelKFAC(),
        Factored,
        **_CLIPPED,
    ),
    "ekfac": plain(
        "eigenvalue-corrected KFAC",
        "George et al. 2018, arXiv 1806.03884",
        EKFAC(),
        **_CLIPPED,
    ),
    "tkfac": plain(
        "trace-restricted KFAC with factored damping",
        "Gao et al. 2020, arXiv 2011.10741",
        TKFAC(),
        unit_ratio,
        damping=0.03,
    ),
    "cg-fac": plain(
        "KFAC's system solved by at most ten conjugate-gradient iterations",
        "Chen 2021, arXiv 2101.00218",
        CGFAC(max_iterations=10),
        **_CLIPPED,
        average=0.0,
        burn_in=0,
        inverse_every=1,
    ),
    "kfac-full": of_full(
        "the full K-FAC optimiser, block-diagonal",
        f"{KFAC_SOURCE}, Algorithm 2",
        KFAC(),
    ),
    "kfac-full-tridiagonal": of_full(
        "the full K-FAC optimiser, block-tridiagonal",
        f"{KFAC_SOURCE}, Algorithm 2",
        KFACTridiagonal(),
    ),
    "kfac-koroko": of_koroko("KFAC as its extensions compare with it", KFAC(), 1),
    "kpsvd-koroko": of_koroko("the nearest Kronecker product", KPSVD(), 1),
    "deflation-koroko": of_koroko(
        "two Kronecker products by deflation", Deflation(), 2, lr=3e-3, damping=1e-3
    ),
    "lanczos-koroko": of_koroko(
        "two Kronecker products by Lanczos",
        KPSVD(rank=2, solver=Lanczos()),
        2,
        lr=3e-3,
        damping=1e-3,
    ),
    "kfac-corrected-koroko": of_koroko(
        "KFAC and a Kronecker correction", KFACCorrected(), 2, lr=0.1, damping=0.01
    ),
    "mbf": of_goldfarb(
        "mini-block Fisher from mean gradients",
        f"{MBF_SOURCE}, Algorithm 2",
        always(MiniBlock(statistic="mean_gradient")),
        float,
        from_data,
        lr=1e-5,
        damping=3e-4,
    ),
    "mbf-shared": of_goldfarb(
        "mini-block Fisher from mean gradients, one matrix a layer",
        f"{MBF_SOURCE}, Algorithm 2 with spatial averaging",
        always(MiniBlock(statistic="mean_gradient", spatial_average=True)),
        float,
        from_data,
        lr=1e-5,
        damping=3e-4,
    ),
    "mbf-true": of_goldfarb(
        "mini-block Fisher from mean gradients at sampled labels",
        f"{MBF_SOURCE}, Algorithm 4",
        always(MiniBlock(statistic="mean_gradient")),
        float,
        sampled,
        lr=1e-5,
        damping=3e-4,
    ),
    "bdf": of_goldfarb(
        "dense layer blocks of the empirical Fisher",
        f"{MBF_SOURCE}, Algorithm 5",
        always(ExactBlock()),
        float,
        from_data,
        lr=1e-2,
        damping=1e-2,
        inverse_every=1,
    ),
    "kfac-goldfarb": of_goldfarb(
        "KFAC as MBF, TNT and K-BFGS compare with it",
        f"{MBF_SOURCE}, appendix, and the group's public code",
        always(KFAC()),
        unit_ratio,
        sampled,
        lr=3e-3,
        damping=0.3,
    ),
    "shampoo": of_goldfarb(
        "Shampoo on mean gradients",
        "Gupta, Koren & Singer 2018, arXiv 1802.09568; settings of arXiv 2202.04124",
        ShampooPreconditioner,
        always(0.0),
        from_data,
        lr=3e-4,
        damping=3e-4,
    ),
    "soap": of_goldfarb(
        "Adam in Shampoo's eigenbasis; lr counts a momentum that sums up",
        "Vyas et al. 2024, arXiv 2409.11321",
        always(SOAPPreconditioner()),
        float,
        from_data,
        lr=1.5e-4,
        damping=1e-8,
        momentum=0.95,
        average=0.95,
        inverse_every=1,
    ),
    "kl-shampoo": of_goldfarb(
        "Shampoo whose factors whiten each other's gradients",
        "Lin et al. 2025, arXiv 2509.03378; settings as for Shampoo",
        KLShampooPreconditioner,
        always(0.0),
        from_data,
        lr=3e-4,
        damping=1e-3,
    ),
    "muon": of_muon(
        "momentum replaced by its nearest semi-orthogonal matrix",
        "Jordan et al. 2024",
        lr=0.02,
        damping=1e-3,
        momentum=0.95,
    ),
    "tnt": of_goldfarb(
        "tensor normal training",
        "Ren & Goldfarb 2021, arXiv 2106.02925",
        TNTPreconditioner,
        always(0.0),
        sampled,
        lr=1e-4,
        damping=0.1,
    ),
    "k-bfgs": of_goldfarb(
        "Kronecker factors learnt by BFGS updates",
        "Goldfarb, Ren & Bahamou 2020, arXiv 2006.08877",
        KBFGS,
        always(0.0),
        from_data,
        **{**OWN_STATE, "lr": 0.03, "damping": 0.3, "inverse_every": 1},
    ),
    "k-bfgs-l": of_goldfarb(
        "Kronecker factors learnt by limited-memory BFGS updates",
        "Goldfarb, Ren & Bahamou 2020, arXiv 2006.08877",
        partial(KBFGS, memory=100),
        always(0.0),
        from_data,
        **{**OWN_STATE, "lr": 0.03, "damping": 0.3, "inverse_every": 1},
    ),
    "singd": of_goldfarb(
        "inverse factors learnt by products",
        "Lin et al. 2024, arXiv 2312.05705",
        partial(SINGD, rate=1e-2, momentum=0.5, normalised=True),
        always(0.0),
        from_data,
        momentum_of="direction",
        **OWN_STATE | INVERSE_FREE,
    ),
    "ikfac": of_goldfarb(
        "inverse-free KFAC",
        "Lin et al. 2024, arXiv 2312.05705",
        partial(SINGD, rate=1e-2, momentum=0.0, adaptive=False, normalised=True),
        always(0.0),
        from_data,
        momentum_of="direction",
        **OWN_STATE | INVERSE_FREE,
    ),
}

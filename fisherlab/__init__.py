"""Tell how good each approximation of a network's Fisher matrix is, and what it costs.

>>> import fisherlab as fl
>>> sorted(name for name in dir(fl) if "KFAC" in name)
['BKFAC', 'EKFAC', 'KFAC', 'KFACCorrected', 'RecurrentKFAC', 'TEKFAC', 'TKFAC']
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "fisherlab.analysis": [
        "RelativeDamping",
        "compare",
        "coverage",
        "estimate",
        "inverse_blocks",
        "open",
        "save",
    ],
    "fisherlab.approximators": [
        "BKFAC",
        "CGFAC",
        "EKFAC",
        "FOOF",
        "KFAC",
        "KPSVD",
        "SINGD",
        "TEKFAC",
        "TKFAC",
        "Deflation",
        "DenseSVD",
        "Diagonal",
        "ExactBlock",
        "KFACCorrected",
        "Lanczos",
        "MiniBlock",
        "Passes",
        "Power",
        "RecurrentKFAC",
        "SampleGram",
        "Shampoo",
        "Subspace",
        "approximate",
        "average",
        "kfra",
    ],
    "fisherlab.errors": [
        "BudgetError",
        "DataError",
        "FisherlabError",
        "IndefiniteError",
        "NeedsSharedForm",
        "NumericalError",
        "UnsupportedModelError",
    ],
    "fisherlab.layers": ["blocks", "frozen"],
    "fisherlab.likelihoods": ["Bernoulli", "Categorical", "Gaussian"],
    "fisherlab.operators": [
        "Dense",
        "Factored",
        "FactoredFisher",
        "KroneckerEigen",
        "KroneckerSum",
        "MiniBlocks",
        "Partition",
        "Tikhonov",
    ],
    "fisherlab.statistics": [
        "Empirical",
        "Exact",
        "LayerStatistics",
        "MeanGradient",
        "MonteCarlo",
        "collect",
        "cross_block",
        "full_matrix",
        "mean_gradient",
    ],
    "fisherlab.statistics.improved_empirical": ["ImprovedEmpirical"],
}
_MODULES = [
    "analysis",
    "approximators",  # a callable module: its call is the register
    "metrics",
    "operators",
    "plots",
    "problems",
    "report",
    "statistics",
    "training",
]
_NAMES = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_NAMES, *_MODULES]  # noqa: PLE0604 - names, unpacked


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"fisherlab.{name}")
    msg = f"module 'fisherlab' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)


if TYPE_CHECKING:  # the same names for type checkers and editors
    from fisherlab.analysis import RelativeDamping as RelativeDamping
    from fisherlab.analysis import compare as compare
    from fisherlab.analysis import coverage as coverage
    from fisherlab.analysis import estimate as estimate
    from fisherlab.analysis import inverse_blocks as inverse_blocks
    from fisherlab.analysis import open as open
    from fisherlab.analysis import save as save
    from fisherlab.approximators import BKFAC as BKFAC
    from fisherlab.approximators import CGFAC as CGFAC
    from fisherlab.approximators import EKFAC as EKFAC
    from fisherlab.approximators import FOOF as FOOF
    from fisherlab.approximators import KFAC as KFAC
    from fisherlab.approximators import KPSVD as KPSVD
    from fisherlab.approximators import SINGD as SINGD
    from fisherlab.approximators import TEKFAC as TEKFAC
    from fisherlab.approximators import TKFAC as TKFAC
    from fisherlab.approximators import Deflation as Deflation
    from fisherlab.approximators import DenseSVD as DenseSVD
    from fisherlab.approximators import Diagonal as Diagonal
    from fisherlab.approximators import ExactBlock as ExactBlock
    from fisherlab.approximators import KFACCorrected as KFACCorrected
    from fisherlab.approximators import Lanczos as Lanczos
    from fisherlab.approximators import MiniBlock as MiniBlock
    from fisherlab.approximators import Passes as Passes
    from fisherlab.approximators import Power as Power
    from fisherlab.approximators import RecurrentKFAC as RecurrentKFAC
    from fisherlab.approximators import SampleGram as SampleGram
    from fisherlab.approximators import Shampoo as Shampoo
    from fisherlab.approximators import Subspace as Subspace
    from fisherlab.approximators import approximate as approximate
    from fisherlab.approximators import approximators as approximators
    from fisherlab.approximators import average as average
    from fisherlab.approximators import kfra as kfra
    from fisherlab.errors import BudgetError as BudgetError
    from fisherlab.errors import DataError as DataError
    from fisherlab.errors import FisherlabError as FisherlabError
    from fisherlab.errors import IndefiniteError as IndefiniteError
    from fisherlab.errors import NeedsSharedForm as NeedsSharedForm
    from fisherlab.errors import NumericalError as NumericalError
    from fisherlab.errors import UnsupportedModelError as UnsupportedModelError
    from fisherlab.layers import blocks as blocks
    from fisherlab.layers import frozen as frozen
    from fisherlab.likelihoods import Bernoulli as Bernoulli
    from fisherlab.likelihoods import Categorical as Categorical
    from fisherlab.likelihoods import Gaussian as Gaussian
    from fisherlab.operators import Dense as Dense
    from fisherlab.operators import Factored as Factored
    from fisherlab.operators import FactoredFisher as FactoredFisher
    from fisherlab.operators import KroneckerEigen as KroneckerEigen
    from fisherlab.operators import KroneckerSum as KroneckerSum
    from fisherlab.operators import MiniBlocks as MiniBlocks
    from fisherlab.operators import Partition as Partition
    from fisherlab.operators import Tikhonov as Tikhonov
    from fisherlab.statistics import Empirical as Empirical
    from fisherlab.statistics import Exact as Exact
    from fisherlab.statistics import LayerStatistics as LayerStatistics
    from fisherlab.statistics import MeanGradient as MeanGradient
    from fisherlab.statistics import MonteCarlo as MonteCarlo
    from fisherlab.statistics import collect as collect
    from fisherlab.statistics import cross_block as cross_block
    from fisherlab.statistics import full_matrix as full_matrix
    from fisherlab.statistics import mean_gradient as mean_gradient
    from fisherlab.statistics.improved_empirical import (
        ImprovedEmpirical as ImprovedEmpirical,
    )

"""Tell how good each approximation of a network's Fisher matrix is, and what it costs.

>>> import fisherlab as fl
>>> sorted(name for name in dir(fl) if "KFAC" in name)
['EKFAC', 'KFAC', 'KFACCorrected', 'TKFAC']
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "fisherlab.analysis": [
        "RelativeDamping",
        "compare",
        "inverse_blocks",
        "open",
        "save",
    ],
    "fisherlab.approximators": [
        "EKFAC",
        "KFAC",
        "KPSVD",
        "TKFAC",
        "Deflation",
        "DenseSVD",
        "Diagonal",
        "ExactBlock",
        "KFACCorrected",
        "Lanczos",
        "MiniBlock",
        "Power",
        "SampleGram",
        "Subspace",
        "approximate",
        "approximators",
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
        "FactoredFisher",
        "KroneckerEigen",
        "KroneckerSum",
        "MiniBlocks",
        "Partition",
    ],
    "fisherlab.statistics": [
        "Empirical",
        "Exact",
        "LayerStatistics",
        "MeanGradient",
        "MonteCarlo",
        "collect",
        "mean_gradient",
    ],
}
_MODULES = [
    "analysis",
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
    from fisherlab.analysis import inverse_blocks as inverse_blocks
    from fisherlab.analysis import open as open
    from fisherlab.analysis import save as save
    from fisherlab.approximators import EKFAC as EKFAC
    from fisherlab.approximators import KFAC as KFAC
    from fisherlab.approximators import KPSVD as KPSVD
    from fisherlab.approximators import TKFAC as TKFAC
    from fisherlab.approximators import Deflation as Deflation
    from fisherlab.approximators import DenseSVD as DenseSVD
    from fisherlab.approximators import Diagonal as Diagonal
    from fisherlab.approximators import ExactBlock as ExactBlock
    from fisherlab.approximators import KFACCorrected as KFACCorrected
    from fisherlab.approximators import Lanczos as Lanczos
    from fisherlab.approximators import MiniBlock as MiniBlock
    from fisherlab.approximators import Power as Power
    from fisherlab.approximators import SampleGram as SampleGram
    from fisherlab.approximators import Subspace as Subspace
    from fisherlab.approximators import approximate as approximate
    from fisherlab.approximators import approximators as approximators
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
    from fisherlab.operators import FactoredFisher as FactoredFisher
    from fisherlab.operators import KroneckerEigen as KroneckerEigen
    from fisherlab.operators import KroneckerSum as KroneckerSum
    from fisherlab.operators import MiniBlocks as MiniBlocks
    from fisherlab.operators import Partition as Partition
    from fisherlab.statistics import Empirical as Empirical
    from fisherlab.statistics import Exact as Exact
    from fisherlab.statistics import LayerStatistics as LayerStatistics
    from fisherlab.statistics import MeanGradient as MeanGradient
    from fisherlab.statistics import MonteCarlo as MonteCarlo
    from fisherlab.statistics import collect as collect
    from fisherlab.statistics import mean_gradient as mean_gradient

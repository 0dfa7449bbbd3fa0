"""Approximations of a Fisher block: statistics in, an operator out."""

import sys
from types import ModuleType

from fisherlab.approximators.averages import average
from fisherlab.approximators.b_kfac import BKFAC
from fisherlab.approximators.base import Approximator, Streaming
from fisherlab.approximators.cg_fac import CGFAC
from fisherlab.approximators.diagonal import Diagonal
from fisherlab.approximators.ekfac import EKFAC
from fisherlab.approximators.exact import ExactBlock
from fisherlab.approximators.foof import FOOF
from fisherlab.approximators.kfac import KFAC
from fisherlab.approximators.kpsvd import KPSVD, Deflation, KFACCorrected
from fisherlab.approximators.mini_block import MiniBlock
from fisherlab.approximators.passes import Passes
from fisherlab.approximators.recurrent import RecurrentKFAC
from fisherlab.approximators.recursion import kfra
from fisherlab.approximators.register import approximators, by_name
from fisherlab.approximators.shampoo import Shampoo
from fisherlab.approximators.singd import SINGD
from fisherlab.approximators.solvers import (
    DenseSVD,
    Lanczos,
    Power,
    SampleGram,
    Subspace,
)
from fisherlab.approximators.streaming import approximate
from fisherlab.approximators.tekfac import TEKFAC
from fisherlab.approximators.tkfac import TKFAC

__all__ = [
    "BKFAC",
    "CGFAC",
    "EKFAC",
    "FOOF",
    "KFAC",
    "KPSVD",
    "SINGD",
    "TEKFAC",
    "TKFAC",
    "Approximator",
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
    "Streaming",
    "Subspace",
    "approximate",
    "approximators",
    "average",
    "by_name",
    "kfra",
]


class _Register(ModuleType):
    """Let ``fisherlab.approximators()`` be the register.

    The package and the function share a name; importing the one hides the other.
    """

    def __call__(self) -> dict[str, Approximator]:
        """Return all named approximators."""
        return approximators()


sys.modules[__name__].__class__ = _Register

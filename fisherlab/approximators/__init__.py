"""Approximations of a Fisher block: statistics in, an operator out."""

import sys
from types import ModuleType

# isort: off
# The methods in the order in which tables show them: each names itself as it is imported.
from fisherlab.approximators.exact import ExactBlock as ExactBlock
from fisherlab.approximators.exact import LowRank as LowRank
from fisherlab.approximators.kfac import FOOF as FOOF
from fisherlab.approximators.kfac import KFAC as KFAC
from fisherlab.approximators.kronecker import EKFAC as EKFAC
from fisherlab.approximators.kronecker import SOAP as SOAP
from fisherlab.approximators.kronecker import TEKFAC as TEKFAC
from fisherlab.approximators.kronecker import TKFAC as TKFAC
from fisherlab.approximators.kronecker import Muon as Muon
from fisherlab.approximators.kronecker import Shampoo as Shampoo
from fisherlab.approximators.kronecker import KLShampoo as KLShampoo
from fisherlab.approximators.kfac_variants import RecurrentKFAC as RecurrentKFAC
from fisherlab.approximators.kfac_variants import CGFAC as CGFAC
from fisherlab.approximators.kpsvd import KPSVD as KPSVD
from fisherlab.approximators.kpsvd import Deflation as Deflation
from fisherlab.approximators.kpsvd import KFACCorrected as KFACCorrected
from fisherlab.approximators.mini_block import ByInput as ByInput
from fisherlab.approximators.mini_block import ByOutput as ByOutput
from fisherlab.approximators.mini_block import ByTile as ByTile
from fisherlab.approximators.mini_block import MiniBlock as MiniBlock
from fisherlab.approximators.mini_block import Diagonal as Diagonal
from fisherlab.approximators.mini_block import QuasiDiagonal as QuasiDiagonal
from fisherlab.approximators.mean_gradients import AdamPreconditioner as AdamPreconditioner
from fisherlab.approximators.mean_gradients import (
    ShampooPreconditioner as ShampooPreconditioner,
)
from fisherlab.approximators.mean_gradients import TNTPreconditioner as TNTPreconditioner
from fisherlab.approximators.mean_gradients import (
    KLShampooPreconditioner as KLShampooPreconditioner,
)
from fisherlab.approximators.mean_gradients import MuonPreconditioner as MuonPreconditioner
from fisherlab.approximators.mean_gradients import SOAPPreconditioner as SOAPPreconditioner
from fisherlab.approximators.online import KBFGS as KBFGS
from fisherlab.approximators.online import Observation as Observation
from fisherlab.approximators.online import BKFAC as BKFAC
from fisherlab.approximators.online import Correction as Correction
from fisherlab.approximators.online import RandomisedSVD as RandomisedSVD
from fisherlab.approximators.online import SINGD as SINGD
from fisherlab.approximators.network import ExactNetwork as ExactNetwork
from fisherlab.approximators.network import TwoLevelKFAC as TwoLevelKFAC
from fisherlab.approximators.network import MethodByBlock as MethodByBlock
from fisherlab.approximators.network import PerBlock as PerBlock
from fisherlab.approximators.network import block_diagonal as block_diagonal
from fisherlab.approximators.network import (
    KFACTridiagonal as KFACTridiagonal,
)
from fisherlab.approximators.network import KhatriRao as KhatriRao

# isort: on
from fisherlab.approximators.averages import average as average
from fisherlab.approximators.base import Approximator as Approximator
from fisherlab.approximators.base import Cost as Cost
from fisherlab.approximators.base import NetworkApproximator as NetworkApproximator
from fisherlab.approximators.base import OfSamples as OfSamples
from fisherlab.approximators.base import OfSums as OfSums
from fisherlab.approximators.base import Streaming as Streaming
from fisherlab.approximators.kfac_variants import kfra as kfra
from fisherlab.approximators.kpsvd_choice import Auto as Auto
from fisherlab.approximators.kpsvd_choice import Passes as Passes
from fisherlab.approximators.kpsvd_solvers import DenseSVD as DenseSVD
from fisherlab.approximators.kpsvd_solvers import Lanczos as Lanczos
from fisherlab.approximators.kpsvd_solvers import Power as Power
from fisherlab.approximators.kpsvd_solvers import SampleGram as SampleGram
from fisherlab.approximators.kpsvd_solvers import Subspace as Subspace
from fisherlab.approximators.register import approximators as approximators
from fisherlab.approximators.register import by_name as by_name
from fisherlab.approximators.register import network_approximators as network_approximators
from fisherlab.approximators.register import preconditioners as preconditioners
from fisherlab.approximators.streaming import approximate as approximate
from fisherlab.approximators.streaming import approximate_network as approximate_network


class _Register(ModuleType):
    """Let ``fisherlab.approximators()`` be the register.

    The package and the function share a name; importing the one hides the other.
    """

    def __call__(self) -> dict[str, Approximator]:
        """Return all named approximators."""
        return approximators()


sys.modules[__name__].__class__ = _Register

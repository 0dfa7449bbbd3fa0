"""Approximations of a Fisher block: statistics in, an operator out."""

import sys
from types import ModuleType

# isort: off
# The methods in the order in which tables show them: each names itself as it is imported.
from fisherlab.approximators.blocks.exact import ExactBlock as ExactBlock
from fisherlab.approximators.blocks.exact import LowRank as LowRank
from fisherlab.approximators.kronecker.kfac import FOOF as FOOF
from fisherlab.approximators.kronecker.kfac import KFAC as KFAC
from fisherlab.approximators.kronecker.eigenvalues import EKFAC as EKFAC
from fisherlab.approximators.kronecker.eigenvalues import SOAP as SOAP
from fisherlab.approximators.kronecker.eigenvalues import TEKFAC as TEKFAC
from fisherlab.approximators.kronecker.partial_traces import TKFAC as TKFAC
from fisherlab.approximators.kronecker.partial_traces import Muon as Muon
from fisherlab.approximators.kronecker.partial_traces import Shampoo as Shampoo
from fisherlab.approximators.kronecker.kl_shampoo import KLShampoo as KLShampoo
from fisherlab.approximators.kronecker.recurrent import RecurrentKFAC as RecurrentKFAC
from fisherlab.approximators.kronecker.cg_fac import CGFAC as CGFAC
from fisherlab.approximators.kpsvd.kpsvd import KPSVD as KPSVD
from fisherlab.approximators.kpsvd.kpsvd import Deflation as Deflation
from fisherlab.approximators.kpsvd.kfac_corrected import KFACCorrected as KFACCorrected
from fisherlab.approximators.blocks.mini_block import ByInput as ByInput
from fisherlab.approximators.blocks.mini_block import ByOutput as ByOutput
from fisherlab.approximators.blocks.mini_block import ByTile as ByTile
from fisherlab.approximators.blocks.mini_block import MiniBlock as MiniBlock
from fisherlab.approximators.blocks.mini_block import Diagonal as Diagonal
from fisherlab.approximators.blocks.mini_block import QuasiDiagonal as QuasiDiagonal
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
from fisherlab.approximators.online.k_bfgs import KBFGS as KBFGS
from fisherlab.approximators.online.k_bfgs import Observation as Observation
from fisherlab.approximators.online.b_kfac import BKFAC as BKFAC
from fisherlab.approximators.online.b_kfac import Correction as Correction
from fisherlab.approximators.online.b_kfac import RandomisedSVD as RandomisedSVD
from fisherlab.approximators.online.singd import SINGD as SINGD
from fisherlab.approximators.network.two_level_kfac import ExactNetwork as ExactNetwork
from fisherlab.approximators.network.two_level_kfac import TwoLevelKFAC as TwoLevelKFAC
from fisherlab.approximators.network.block_diagonal import MethodByBlock as MethodByBlock
from fisherlab.approximators.network.block_diagonal import PerBlock as PerBlock
from fisherlab.approximators.network.block_diagonal import block_diagonal as block_diagonal
from fisherlab.approximators.network.kfac_tridiagonal import (
    KFACTridiagonal as KFACTridiagonal,
)
from fisherlab.approximators.network.kfac_tridiagonal import KhatriRao as KhatriRao

# isort: on
from fisherlab.approximators.averages import average as average
from fisherlab.approximators.base import Approximator as Approximator
from fisherlab.approximators.base import NetworkApproximator as NetworkApproximator
from fisherlab.approximators.base import OfSamples as OfSamples
from fisherlab.approximators.base import OfSums as OfSums
from fisherlab.approximators.base import Streaming as Streaming
from fisherlab.approximators.costs import Cost as Cost
from fisherlab.approximators.kpsvd.choice import Auto as Auto
from fisherlab.approximators.kpsvd.passes import Passes as Passes
from fisherlab.approximators.kpsvd.solvers import DenseSVD as DenseSVD
from fisherlab.approximators.kpsvd.solvers import Lanczos as Lanczos
from fisherlab.approximators.kpsvd.solvers import Power as Power
from fisherlab.approximators.kpsvd.solvers import SampleGram as SampleGram
from fisherlab.approximators.kpsvd.solvers import Subspace as Subspace
from fisherlab.approximators.kronecker.kfra import kfra as kfra
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

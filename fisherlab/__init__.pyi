"""The public names: `__all__` is what one begins with; all imports work as ``fl.name``."""

from fisherlab import analysis as analysis
from fisherlab import errors as errors
from fisherlab import layers as layers
from fisherlab import likelihoods as likelihoods
from fisherlab import metrics as metrics
from fisherlab import operators as operators
from fisherlab import plots as plots
from fisherlab import problems as problems
from fisherlab import purposes as purposes
from fisherlab import report as report
from fisherlab import statistics as statistics
from fisherlab import training as training
from fisherlab.analysis import compare as compare
from fisherlab.analysis import compare_networks as compare_networks
from fisherlab.analysis import coverage as coverage
from fisherlab.analysis import decompose as decompose
from fisherlab.analysis import density as density
from fisherlab.analysis import estimate as estimate
from fisherlab.analysis import inverse_blocks as inverse_blocks
from fisherlab.analysis import merge as merge
from fisherlab.analysis import open as open
from fisherlab.analysis import pareto as pareto
from fisherlab.analysis import rank_curve as rank_curve
from fisherlab.analysis import save as save
from fisherlab.analysis import spectra as spectra
from fisherlab.analysis import structure as structure
from fisherlab.analysis import sweep as sweep
from fisherlab.analysis import uncertainty as uncertainty
from fisherlab.approximators import BKFAC as BKFAC
from fisherlab.approximators import CGFAC as CGFAC
from fisherlab.approximators import EKFAC as EKFAC
from fisherlab.approximators import FOOF as FOOF
from fisherlab.approximators import KBFGS as KBFGS
from fisherlab.approximators import KFAC as KFAC
from fisherlab.approximators import KPSVD as KPSVD
from fisherlab.approximators import SINGD as SINGD
from fisherlab.approximators import SOAP as SOAP
from fisherlab.approximators import TEKFAC as TEKFAC
from fisherlab.approximators import TKFAC as TKFAC
from fisherlab.approximators import AdamPreconditioner as AdamPreconditioner
from fisherlab.approximators import Auto as Auto
from fisherlab.approximators import ByInput as ByInput
from fisherlab.approximators import ByOutput as ByOutput
from fisherlab.approximators import ByTile as ByTile
from fisherlab.approximators import Correction as Correction
from fisherlab.approximators import Deflation as Deflation
from fisherlab.approximators import DenseSVD as DenseSVD
from fisherlab.approximators import Diagonal as Diagonal
from fisherlab.approximators import ExactBlock as ExactBlock
from fisherlab.approximators import ExactNetwork as ExactNetwork
from fisherlab.approximators import KFACCorrected as KFACCorrected
from fisherlab.approximators import KFACTridiagonal as KFACTridiagonal
from fisherlab.approximators import KhatriRao as KhatriRao
from fisherlab.approximators import KLShampoo as KLShampoo
from fisherlab.approximators import KLShampooPreconditioner as KLShampooPreconditioner
from fisherlab.approximators import Lanczos as Lanczos
from fisherlab.approximators import LowRank as LowRank
from fisherlab.approximators import MethodByBlock as MethodByBlock
from fisherlab.approximators import MiniBlock as MiniBlock
from fisherlab.approximators import Muon as Muon
from fisherlab.approximators import MuonPreconditioner as MuonPreconditioner
from fisherlab.approximators import Passes as Passes
from fisherlab.approximators import PerBlock as PerBlock
from fisherlab.approximators import Power as Power
from fisherlab.approximators import QuasiDiagonal as QuasiDiagonal
from fisherlab.approximators import RandomisedSVD as RandomisedSVD
from fisherlab.approximators import RecurrentKFAC as RecurrentKFAC
from fisherlab.approximators import SampleGram as SampleGram
from fisherlab.approximators import Shampoo as Shampoo
from fisherlab.approximators import ShampooPreconditioner as ShampooPreconditioner
from fisherlab.approximators import SOAPPreconditioner as SOAPPreconditioner
from fisherlab.approximators import Subspace as Subspace
from fisherlab.approximators import TNTPreconditioner as TNTPreconditioner
from fisherlab.approximators import TwoLevelKFAC as TwoLevelKFAC
from fisherlab.approximators import approximate as approximate
from fisherlab.approximators import approximate_network as approximate_network
from fisherlab.approximators import approximators as approximators
from fisherlab.approximators import average as average
from fisherlab.approximators import block_diagonal as block_diagonal
from fisherlab.approximators import kfra as kfra
from fisherlab.approximators import network_approximators as network_approximators
from fisherlab.approximators import preconditioners as preconditioners
from fisherlab.errors import BudgetError as BudgetError
from fisherlab.errors import DataError as DataError
from fisherlab.errors import ExecutorError as ExecutorError
from fisherlab.errors import FisherlabError as FisherlabError
from fisherlab.errors import IndefiniteError as IndefiniteError
from fisherlab.errors import NeedsMeanGradient as NeedsMeanGradient
from fisherlab.errors import NeedsSharedForm as NeedsSharedForm
from fisherlab.errors import NumericalError as NumericalError
from fisherlab.errors import RankError as RankError
from fisherlab.errors import StoreError as StoreError
from fisherlab.errors import UnsupportedMetric as UnsupportedMetric
from fisherlab.errors import UnsupportedModelError as UnsupportedModelError
from fisherlab.layers import blocks as blocks
from fisherlab.layers import frozen as frozen
from fisherlab.layers import hf as hf
from fisherlab.layers import unrolled as unrolled
from fisherlab.likelihoods import Bernoulli as Bernoulli
from fisherlab.likelihoods import Categorical as Categorical
from fisherlab.likelihoods import Gaussian as Gaussian
from fisherlab.likelihoods import Likelihood as Likelihood
from fisherlab.operators import BlockDiagonal as BlockDiagonal
from fisherlab.operators import BlockTridiagonal as BlockTridiagonal
from fisherlab.operators import Dense as Dense
from fisherlab.operators import Factored as Factored
from fisherlab.operators import FactoredFisher as FactoredFisher
from fisherlab.operators import KroneckerBlocks as KroneckerBlocks
from fisherlab.operators import KroneckerEigen as KroneckerEigen
from fisherlab.operators import KroneckerSum as KroneckerSum
from fisherlab.operators import MiniBlocks as MiniBlocks
from fisherlab.operators import NetworkOperator as NetworkOperator
from fisherlab.operators import Partition as Partition
from fisherlab.operators import RelativeDamping as RelativeDamping
from fisherlab.operators import Tikhonov as Tikhonov
from fisherlab.plots import explore as explore
from fisherlab.purposes import EWC as EWC
from fisherlab.purposes import HeldOut as HeldOut
from fisherlab.purposes import Influence as Influence
from fisherlab.purposes import Laplace as Laplace
from fisherlab.purposes import Matrix as Matrix
from fisherlab.purposes import Pruning as Pruning
from fisherlab.purposes import Sharpness as Sharpness
from fisherlab.purposes import Step as Step
from fisherlab.statistics import Empirical as Empirical
from fisherlab.statistics import Exact as Exact
from fisherlab.statistics import ImprovedEmpirical as ImprovedEmpirical
from fisherlab.statistics import LayerStatistics as LayerStatistics
from fisherlab.statistics import MeanGradient as MeanGradient
from fisherlab.statistics import MonteCarlo as MonteCarlo
from fisherlab.statistics import collect as collect
from fisherlab.statistics import cross_block as cross_block
from fisherlab.statistics import full_matrix as full_matrix
from fisherlab.statistics import mean_gradient as mean_gradient
from fisherlab.training import AdaptiveKFAC as AdaptiveKFAC
from fisherlab.training import BiasCorrected as BiasCorrected
from fisherlab.training import ExponentialBatches as ExponentialBatches
from fisherlab.training import GreedySearch as GreedySearch
from fisherlab.training import KLClip as KLClip
from fisherlab.training import LevenbergMarquardt as LevenbergMarquardt
from fisherlab.training import LinearSteps as LinearSteps
from fisherlab.training import LogarithmicSteps as LogarithmicSteps
from fisherlab.training import NaturalGradient as NaturalGradient
from fisherlab.training import Ramped as Ramped
from fisherlab.training import follow as follow
from fisherlab.training import optimizer as optimizer
from fisherlab.training import optimizers as optimizers
from fisherlab.training import probes as probes
from fisherlab.training import tune as tune

__version__: str

__all__ = [
    "EKFAC",
    "KFAC",
    "KPSVD",
    "TKFAC",
    "AdaptiveKFAC",
    "Bernoulli",
    "BudgetError",
    "Categorical",
    "DataError",
    "Deflation",
    "Diagonal",
    "Empirical",
    "Exact",
    "ExactBlock",
    "Factored",
    "FisherlabError",
    "Gaussian",
    "KFACCorrected",
    "KFACTridiagonal",
    "Likelihood",
    "LowRank",
    "MiniBlock",
    "MonteCarlo",
    "NaturalGradient",
    "NumericalError",
    "RelativeDamping",
    "Shampoo",
    "Tikhonov",
    "TwoLevelKFAC",
    "UnsupportedModelError",
    "approximate",
    "block_diagonal",
    "blocks",
    "collect",
    "compare",
    "coverage",
    "decompose",
    "density",
    "estimate",
    "explore",
    "follow",
    "frozen",
    "full_matrix",
    "hf",
    "inverse_blocks",
    "mean_gradient",
    "merge",
    "open",
    "optimizer",
    "optimizers",
    "pareto",
    "preconditioners",
    "rank_curve",
    "save",
    "spectra",
    "structure",
    "sweep",
    "tune",
    "uncertainty",
    "unrolled",
]

"""Training loops, optimisers, and the moments at which they are looked at."""

from fisherlab.training import probes as probes
from fisherlab.training.adaptive_kfac import AdaptiveKFAC as AdaptiveKFAC
from fisherlab.training.following import follow as follow
from fisherlab.training.loop import accuracy as accuracy
from fisherlab.training.loop import mean_loss as mean_loss
from fisherlab.training.loop import performance as performance
from fisherlab.training.loop import take_step as take_step
from fisherlab.training.loop import trajectory as trajectory
from fisherlab.training.moves import KLClip as KLClip
from fisherlab.training.natural_gradient import NaturalGradient as NaturalGradient
from fisherlab.training.recipes import Recipe as Recipe
from fisherlab.training.register import optimizer as optimizer
from fisherlab.training.register import optimizers as optimizers
from fisherlab.training.schedules import BiasCorrected as BiasCorrected
from fisherlab.training.schedules import ExponentialBatches as ExponentialBatches
from fisherlab.training.schedules import GreedySearch as GreedySearch
from fisherlab.training.schedules import LevenbergMarquardt as LevenbergMarquardt
from fisherlab.training.schedules import LinearSteps as LinearSteps
from fisherlab.training.schedules import LogarithmicSteps as LogarithmicSteps
from fisherlab.training.schedules import Ramped as Ramped
from fisherlab.training.sending import StepBytes as StepBytes
from fisherlab.training.sending import step_bytes as step_bytes
from fisherlab.training.tuning import best_runs as best_runs
from fisherlab.training.tuning import tune as tune

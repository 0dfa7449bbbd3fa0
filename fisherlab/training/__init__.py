"""Training loops, optimisers, and the moments at which they are looked at."""

from fisherlab.training import probes
from fisherlab.training.adaptive_kfac import AdaptiveKFAC
from fisherlab.training.averaging import BiasCorrected, Ramped
from fisherlab.training.following import follow
from fisherlab.training.levenberg_marquardt import GreedySearch, LevenbergMarquardt
from fisherlab.training.loop import (
    accuracy,
    mean_loss,
    performance,
    take_step,
    trajectory,
)
from fisherlab.training.moves import KLClip
from fisherlab.training.natural_gradient import NaturalGradient
from fisherlab.training.order import ExponentialBatches
from fisherlab.training.recipes import Recipe
from fisherlab.training.register import optimizer, optimizers
from fisherlab.training.schedules import LinearSteps, LogarithmicSteps
from fisherlab.training.tuning import best_runs, tune

__all__ = [
    "AdaptiveKFAC",
    "BiasCorrected",
    "ExponentialBatches",
    "GreedySearch",
    "KLClip",
    "LevenbergMarquardt",
    "LinearSteps",
    "LogarithmicSteps",
    "NaturalGradient",
    "Ramped",
    "Recipe",
    "accuracy",
    "best_runs",
    "follow",
    "mean_loss",
    "optimizer",
    "optimizers",
    "performance",
    "probes",
    "take_step",
    "trajectory",
    "tune",
]

"""Purposes: what a Fisher matrix is used for, and what a replacement is worth in it."""

from fisherlab.purposes.base import Answers, Demand, Measure, Purpose
from fisherlab.purposes.influence import Influence
from fisherlab.purposes.laplace import HeldOut, Laplace
from fisherlab.purposes.matrix import Matrix, Sharpness
from fisherlab.purposes.step import Step
from fisherlab.purposes.weights import EWC, Pruning

__all__ = [
    "EWC",
    "Answers",
    "Demand",
    "HeldOut",
    "Influence",
    "Laplace",
    "Matrix",
    "Measure",
    "Pruning",
    "Purpose",
    "Sharpness",
    "Step",
]

"""Purposes: what a Fisher matrix is used for, and what a replacement is worth in it."""

from fisherlab.purposes.base import Answers as Answers
from fisherlab.purposes.base import Demand as Demand
from fisherlab.purposes.base import Measure as Measure
from fisherlab.purposes.base import Purpose as Purpose
from fisherlab.purposes.influence import Influence as Influence
from fisherlab.purposes.laplace import HeldOut as HeldOut
from fisherlab.purposes.laplace import Laplace as Laplace
from fisherlab.purposes.matrix import Matrix as Matrix
from fisherlab.purposes.matrix import Sharpness as Sharpness
from fisherlab.purposes.step import Step as Step
from fisherlab.purposes.weights import EWC as EWC
from fisherlab.purposes.weights import Pruning as Pruning

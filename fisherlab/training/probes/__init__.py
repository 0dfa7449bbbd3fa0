"""What is measured along a trajectory: small values, or any function of a moment.

>>> import fisherlab as fl
>>> fl.probes.Errors(["kfac"], examples=100).examples
100
"""

from fisherlab.training.probes.blocks import InverseBlocks, Spectra
from fisherlab.training.probes.directions import Directions
from fisherlab.training.probes.errors import Errors, Losses
from fisherlab.training.probes.moment import Moment, Probe, Tracker
from fisherlab.training.probes.staleness import Staleness

__all__ = [
    "Directions",
    "Errors",
    "InverseBlocks",
    "Losses",
    "Moment",
    "Probe",
    "Spectra",
    "Staleness",
    "Tracker",
]

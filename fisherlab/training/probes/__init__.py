"""What is measured along a trajectory: small values, or any function of a moment.

>>> import fisherlab as fl
>>> fl.probes.Errors(["kfac"], examples=100).examples
100
"""

from fisherlab.training.probes.blocks import InverseBlocks as InverseBlocks
from fisherlab.training.probes.blocks import Spectra as Spectra
from fisherlab.training.probes.directions import Directions as Directions
from fisherlab.training.probes.errors import Errors as Errors
from fisherlab.training.probes.errors import Losses as Losses
from fisherlab.training.probes.errors import Moment as Moment
from fisherlab.training.probes.errors import Probe as Probe
from fisherlab.training.probes.errors import Staleness as Staleness
from fisherlab.training.probes.errors import Tracker as Tracker

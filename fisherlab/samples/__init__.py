r"""Per-example gradients of one layer, held in the smallest form that is exact.

A sample set stands for the matrices :math:`D_{vn}` of shape (d_out, d_in), one for each
column v of the output-Fisher root and each example n, and answers every question about

.. math:: S = \sum_{vn} \mathrm{vec}(D_{vn}) \mathrm{vec}(D_{vn})^T

without forming S. Nine forms share one interface (`Samples`):

- `OuterSamples`: :math:`D_{vn} = g_{vn} a_n^T`, a layer used at one position;
- `SharedSamples`: :math:`D_{vn} = \sum_t g_{vnt} a_{nt}^T`, convolutions and tokens;
- `TokenSamples`: :math:`D_{vn} = \sum_t e_{k(n,t)} g_{vnt}^T`, embeddings;
- `TurnedSamples`: :math:`D_{vn} = E_{vn}^T` of samples E, a weight stored (in, out);
- `GroupedSamples`: rows in groups with inputs of their own, grouped convolutions;
- `SummedSamples`: :math:`D_{vn} = \sum_k E^k_{vn}`, a weight used in several ways;
- `MatrixSamples`: the matrices themselves;
- `StackedSamples`: those of several weights as one long vector;
- `PartedSamples`: parts of the examples, opened one after the other.
"""

from fisherlab.samples.base import Samples as Samples
from fisherlab.samples.outer import OuterSamples as OuterSamples
from fisherlab.samples.parted import PartedSamples as PartedSamples
from fisherlab.samples.parted import StackedSamples as StackedSamples
from fisherlab.samples.shared import GroupedSamples as GroupedSamples
from fisherlab.samples.shared import MatrixSamples as MatrixSamples
from fisherlab.samples.shared import SharedSamples as SharedSamples
from fisherlab.samples.summed import SummedSamples as SummedSamples
from fisherlab.samples.summed import TokenSamples as TokenSamples
from fisherlab.samples.summed import TurnedSamples as TurnedSamples

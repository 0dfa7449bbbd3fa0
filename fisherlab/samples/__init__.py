r"""Per-example gradients of one layer, held in the smallest form that is exact.

A sample set stands for the matrices :math:`D_{vn}` of shape (d_out, d_in), one for each
column v of the output-Fisher root and each example n, and answers every question about

.. math:: S = \sum_{vn} \mathrm{vec}(D_{vn}) \mathrm{vec}(D_{vn})^T

without forming S. Three forms share one interface (`Samples`):

- `OuterSamples`: :math:`D_{vn} = g_{vn} a_n^T`, a layer used at one position;
- `SharedSamples`: :math:`D_{vn} = \sum_t g_{vnt} a_{nt}^T`, convolutions and tokens;
- `MatrixSamples`: the matrices themselves.
"""

from fisherlab.samples.base import Samples
from fisherlab.samples.matrices import MatrixSamples
from fisherlab.samples.outer import OuterSamples
from fisherlab.samples.shared import SharedSamples

__all__ = ["MatrixSamples", "OuterSamples", "Samples", "SharedSamples"]

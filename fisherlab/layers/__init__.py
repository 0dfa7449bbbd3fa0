"""Which parameters form which block, and how a layer reads its inputs."""

from fisherlab.layers.blocks import Block as Block
from fisherlab.layers.blocks import alone as alone
from fisherlab.layers.blocks import blocks as blocks
from fisherlab.layers.blocks import exclusive as exclusive
from fisherlab.layers.blocks import frozen as frozen
from fisherlab.layers.blocks import in_turn as in_turn
from fisherlab.layers.blocks import (
    require_independent_examples as require_independent_examples,
)
from fisherlab.layers.blocks import select as select
from fisherlab.layers.blocks import uncompiled as uncompiled
from fisherlab.layers.hugging_face import hf as hf
from fisherlab.layers.unrolled import unrolled as unrolled

"""Which parameters form which block, and how a layer reads its inputs."""

from fisherlab.layers.blocks import Block, blocks, frozen_parameters, select
from fisherlab.layers.compiled import alone, exclusive, in_turn, uncompiled
from fisherlab.layers.hugging_face import hf
from fisherlab.layers.modes import frozen, require_independent_examples
from fisherlab.layers.unrolled import unrolled

__all__ = [
    "Block",
    "alone",
    "blocks",
    "exclusive",
    "frozen",
    "frozen_parameters",
    "hf",
    "in_turn",
    "require_independent_examples",
    "select",
    "uncompiled",
    "unrolled",
]

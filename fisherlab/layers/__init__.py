"""Which parameters form which block, and how a layer reads its inputs."""

from fisherlab.layers.blocks import Block, blocks, frozen_parameters, select
from fisherlab.layers.hugging_face import hf
from fisherlab.layers.modes import (
    alone,
    exclusive,
    frozen,
    in_turn,
    require_independent_examples,
    uncompiled,
)
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

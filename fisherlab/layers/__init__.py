"""Which parameters form which block, and how a layer reads its inputs."""

from fisherlab.layers.blocks import Block, blocks, frozen_parameters, select
from fisherlab.layers.compiled import uncompiled
from fisherlab.layers.modes import frozen, require_independent_examples
from fisherlab.layers.shared_form import SharedForm, shared_form
from fisherlab.layers.unrolled import unrolled

__all__ = [
    "Block",
    "SharedForm",
    "blocks",
    "frozen",
    "frozen_parameters",
    "require_independent_examples",
    "select",
    "shared_form",
    "uncompiled",
    "unrolled",
]

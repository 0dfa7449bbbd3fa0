"""The partition of a model's trainable parameters into blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fisherlab.errors import UnsupportedModelError
from fisherlab.layers.modes import exclusive, uncompiled
from fisherlab.layers.places import TRANSPOSED, output_axis

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)


@dataclass(frozen=True)
class Block:
    """One weight parameter with the bias that shares its rows.

    Parameters
    ----------
    name
        The weight's name in ``named_parameters()`` without a trailing ``.weight``.
    weight, bias
        Names of the parameters; bias may be None.
    shape
        Shape of the weight parameter as stored.
    rows
        d_out: ``shape[0]``, or all entries for a norm layer's weight and a scalar.
    output_axis
        Axis of the weight as stored that runs over the outputs: 1 for transposed
        convolutions and for ``x @ W``, whose bias is a block of its own. The rows of an
        embedding's table are taken for its outputs.
    groups
        Groups of rows, each with outputs of its own, where axis 1 is the output.

    Examples
    --------
    >>> block = Block("0", "0.weight", "0.bias", (2, 3), 2)
    >>> block.weight_shape
    (2, 4)
    """

    name: str
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    rows: int
    output_axis: int = 0
    groups: int = 1

    @property
    def outputs(self) -> Int[Tensor, "o i"]:
        """Return the output that each entry of the (d_out, d_in) weight belongs to.

        Examples
        --------
        >>> Block("0", "0.weight", None, (2, 3), 2, output_axis=1).outputs.tolist()
        [[0, 1, 2], [0, 1, 2]]
        """
        rows, columns = self.weight_shape
        row = torch.arange(rows)[:, None]
        if self.output_axis == 0:
            return row.expand(rows, columns)
        own = self.shape[1]
        group = row // (rows // self.groups)
        return group * own + torch.arange(columns) // (columns // own)

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in), the bias as one last column."""
        columns = prod(self.shape) // self.rows if self.rows else 0
        return self.rows, columns + (self.bias is not None)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters, weight first."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def some_rows(self, first: int, last: int) -> "Block":
        """Return the block of some rows, as if they were a weight of their own."""
        if (first, last) == (0, self.rows):
            return self
        rows = last - first
        return replace(self, shape=(rows, *self.shape[1:]), rows=rows)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return w (..., d_out, d_in) from tensors shaped like the parameters.

        Raises
        ------
        ValueError
            If a parameter is missing.
        """
        missing = [name for name in self.parameters if name not in tensors]
        if missing:
            msg = (
                f"pack of block {self.name!r}: {missing} not given; the parameters "
                f"{list(self.parameters)} are expected, got {sorted(tensors)}."
            )
            raise ValueError(msg)
        weight = tensors[self.weight]
        lead = weight.shape[: weight.dim() - len(self.shape)]
        columns = self.weight_shape[1] - (self.bias is not None)
        parts = [weight.reshape(*lead, self.rows, columns)]
        if self.bias is not None:
            parts.append(tensors[self.bias].reshape(*lead, self.rows, 1))
        return torch.cat(parts, -1)

    def unpack(self, w: Tensor) -> dict[str, Tensor]:
        """Return tensors shaped like the parameters from w (..., d_out, d_in).

        Raises
        ------
        ValueError
            If w does not have the block's shape.
        """
        if w.shape[-2:] != self.weight_shape:
            msg = (
                f"unpack of block {self.name!r}: shape {tuple(w.shape)} was given, "
                f"(..., {self.weight_shape[0]}, {self.weight_shape[1]}) is expected."
            )
            raise ValueError(msg)
        lead = w.shape[:-2]
        if self.bias is None:
            return {self.weight: w.reshape(*lead, *self.shape)}
        return {
            self.weight: w[..., :-1].reshape(*lead, *self.shape),
            self.bias: w[..., -1].reshape(*lead, *self._bias_shape),
        }

    @property
    def _bias_shape(self) -> tuple[int, ...]:
        return self.shape if self.rows > self.shape[0] else (self.rows,)


def blocks(model: nn.Module) -> dict[str, Block]:
    """Partition the trainable parameters of a model into blocks, in order.

    Tied parameters appear once, under the first name. A bias joins the weight of the
    same module whose rows it shares; otherwise it is a block of its own.

    Raises
    ------
    UnsupportedModelError
        If a lazy parameter has no shape yet.

    Examples
    --------
    >>> list(blocks(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))))
    ['0', '2']
    """
    with exclusive(model):
        return _partition(uncompiled(model))


def _partition(model: nn.Module) -> dict[str, Block]:
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    modules = dict(model.named_modules())
    found: dict[str, Block] = {}
    joined: set[str] = set()
    for name, parameter in trainable.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UnsupportedModelError(
                f"The parameter {name!r} has no shape yet; run the model on a batch first."
            )
        if name in joined:
            continue
        module = modules[name.rpartition(".")[0]]
        block = _block(name, parameter, module, trainable)
        if block.bias is not None:
            joined.add(block.bias)
        found[block.name] = block
    return found


def _block(
    name: str, parameter: Tensor, module: nn.Module, trainable: Mapping[str, Tensor]
) -> Block:
    shape = tuple(parameter.shape)
    whole = isinstance(module, NORMS) or not shape
    rows = parameter.numel() if whole else shape[0]
    path, _, last = name.rpartition(".")
    axis = 0 if whole else output_axis(module, last)
    groups = module.groups if isinstance(module, TRANSPOSED) else 1
    bias = None
    if "weight" in last and axis == 0:
        partner = f"{path}.{last.replace('weight', 'bias')}".lstrip(".")
        other = trainable.get(partner)
        if other is not None and other.numel() == rows:
            bias = partner
    return Block(name.removesuffix(".weight"), name, bias, shape, rows, axis, groups)


def frozen_parameters(model: nn.Module) -> list[str]:
    """List the parameters that do not require a gradient.

    Examples
    --------
    >>> frozen_parameters(nn.Linear(2, 1).requires_grad_(False))
    ['weight', 'bias']
    """
    named = uncompiled(model).named_parameters()
    return [name for name, p in named if not p.requires_grad]


def select(found: Mapping[str, Block], layers: Sequence[str] | None) -> dict[str, Block]:
    """Choose blocks by name, by module prefix or by the name of a parameter.

    Raises
    ------
    UnsupportedModelError
        If there are none: no parameter of the model is trainable.
    ValueError
        Listing the known names, if one is unknown.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    >>> list(select(blocks(model), ["2"]))
    ['2']
    """
    if not found:
        raise UnsupportedModelError("The model has no trainable parameters.")
    if layers is None:
        return dict(found)
    if isinstance(layers, str):
        layers = [layers]
    if not layers:
        msg = f"layers: no name was given; known blocks: {', '.join(found)}."
        raise ValueError(msg)
    chosen: dict[str, Block] = {}
    for wanted in layers:
        hits = {
            name: block
            for name, block in found.items()
            if name == wanted or name.startswith(f"{wanted}.") or wanted in block.parameters
        }
        if not hits:
            msg = f"layers: {wanted!r} is unknown; known blocks: {', '.join(found)}."
            raise ValueError(msg)
        chosen |= hits
    return {name: block for name, block in found.items() if name in chosen}

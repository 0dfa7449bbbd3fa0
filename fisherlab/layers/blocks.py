"""The partition of a model's trainable parameters into blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
        d_out: ``shape[0]``, or all entries for a norm layer's weight.

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

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in), the bias as one last column."""
        entries = 1
        for size in self.shape:
            entries *= size
        columns = entries // self.rows if self.rows else 0
        return self.rows, columns + (self.bias is not None)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters, weight first."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

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
        parts = [weight.reshape(*lead, self.rows, -1)]
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
        bias = w[..., -1] if len(self.shape) != 1 else w[..., 1]
        return {
            self.weight: w[..., :-1].reshape(*lead, *self.shape),
            self.bias: bias.reshape(*lead, *self._bias_shape),
        }

    @property
    def _bias_shape(self) -> tuple[int, ...]:
        return self.shape if self.rows > self.shape[0] else (self.rows,)


def blocks(model: nn.Module) -> dict[str, Block]:
    """Partition the trainable parameters of a model into blocks, in order.

    Tied parameters appear once, under the first name. A bias joins the weight of the
    same module whose rows it shares; otherwise it is a block of its own.

    Examples
    --------
    >>> list(blocks(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))))
    ['0', '2']
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    modules = dict(model.named_modules())
    found: dict[str, Block] = {}
    joined: set[str] = set()
    for name, parameter in trainable.items():
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
    shape = tuple(parameter.shape) or (1,)
    norm = isinstance(module, NORMS)
    rows = parameter.numel() if norm else shape[0]
    path, _, last = name.rpartition(".")
    bias = None
    if "weight" in last and not isinstance(module, TRANSPOSED):
        partner = f"{path}.{last.replace('weight', 'bias')}".lstrip(".")
        other = trainable.get(partner)
        if other is not None and other.numel() == rows:
            bias = partner
    return Block(name.removesuffix(".weight"), name, bias, shape, rows)


def frozen_parameters(model: nn.Module) -> list[str]:
    """List the parameters that do not require a gradient.

    Examples
    --------
    >>> frozen_parameters(nn.Linear(2, 1).requires_grad_(False))
    ['weight', 'bias']
    """
    return [name for name, p in model.named_parameters() if not p.requires_grad]


def select(found: Mapping[str, Block], layers: Sequence[str] | None) -> dict[str, Block]:
    """Choose blocks by name or by module prefix.

    Raises
    ------
    ValueError
        Listing the known names, if one is unknown.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    >>> list(select(blocks(model), ["2"]))
    ['2']
    """
    if layers is None:
        return dict(found)
    if isinstance(layers, str):
        layers = [layers]
    chosen: dict[str, Block] = {}
    for wanted in layers:
        hits = {
            name: block
            for name, block in found.items()
            if name == wanted or name.startswith(f"{wanted}.")
        }
        if not hits:
            msg = f"layers: {wanted!r} is unknown; known blocks: {', '.join(found)}."
            raise ValueError(msg)
        chosen |= hits
    return {name: block for name, block in found.items() if name in chosen}

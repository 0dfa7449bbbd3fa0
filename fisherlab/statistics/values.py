"""Per-example gradients of layers, as values."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherlab.errors import NeedsSharedForm
from fisherlab.layers import Block
from fisherlab.numerics.held import Held
from fisherlab.numerics.memory import readable
from fisherlab.operators.base import Provenance
from fisherlab.samples import (
    GroupedSamples,
    MatrixSamples,
    OuterSamples,
    Samples,
    SharedSamples,
    SummedSamples,
    TokenSamples,
    TurnedSamples,
)
from fisherlab.showing import html_table

HALF = (torch.bfloat16, torch.float16)


@final
@dataclass(frozen=True, eq=False, repr=False)
class LayerStatistics(Held):
    r"""Per-example gradients :math:`D_{vn}` of one block, weighted by output columns.

    .. math:: F = \frac{1}{\mathrm{count}} \sum_{vn} vec(D_{vn}) vec(D_{vn})^T

    Either in shared form, ``D_vn = Σ_t g_vnt a_ntᵀ`` with `inputs` a (bias column last)
    and `gradients` g, or as `matrices` D. Relatives of the shared form: an embedding
    holds `tokens` in place of inputs, ``D_vn = Σ_t e_k(n,t) g_vntᵀ``; a grouped
    convolution holds the inputs of its groups one after the other; a weight stored
    (in, out) is `turned`, ``D_vn = Σ_t a_nt g_vntᵀ``; a weight that is used in several
    ways, or of whose rows several calls use some each, is described by its `parts`.

    Parameters
    ----------
    block
        Which parameters, and how they form the weight.
    count
        Examples seen; 0 for further columns of examples counted already.
    inputs
        (N, T, groups·d_in), or None.
    gradients
        (V, N, T, d_out), or None; (V, N, T, d_in) of an embedding.
    matrices
        (V, N, d_out, d_in), or None.
    positions
        Σ_n T_n over the examples counted, padding left out.
    compressed
        Whether the columns were replaced by fewer with the same Σ_v g gᵀ, so that they
        no longer match those of other blocks.
    tokens
        (N, T), the rows of an embedding that were looked up, -1 for padding; or None.
    groups
        Groups of rows, each with inputs of its own.
    turned
        Whether the rows of the weight belong to the inputs.
    parts
        Statistics of the uses: of rows of their own, one below the other, or of the
        whole weight, whose gradients add up.
    why
        Why there is no shared form, where there is none.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> stats["weight"].count, stats["weight"].weight_shape
    (20, (2, 4))
    """

    block: Block
    count: int
    inputs: Float[Tensor, "n t i"] | None = None
    gradients: Float[Tensor, "v n t o"] | None = None
    matrices: Float[Tensor, "v n o i"] | None = None
    positions: int = 0
    provenance: Provenance = Provenance()
    compressed: bool = False
    tokens: Int[Tensor, "n t"] | None = None
    groups: int = 1
    turned: bool = False
    parts: tuple["LayerStatistics", ...] = ()
    why: str = ""

    def __getstate__(self) -> dict[str, object]:
        """Leave out the samples and the tables that they keep: they are made again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def name(self) -> str:
        """The block's name."""
        return self.block.name

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in), the bias column included."""
        return self.block.weight_shape

    @property
    def is_shared(self) -> bool:
        """Whether the inputs (or tokens) and output gradients are known."""
        return self.matrices is None

    @property
    def uses(self) -> tuple["LayerStatistics", ...]:
        """The parts whose gradients add up, of a weight that is used in several ways."""
        whole = all(part.block.rows == self.block.rows for part in self.parts)
        return self.parts if whole else ()

    @cached_property
    def samples(self) -> Samples:
        """The gradients with every sum over them; tables it keeps are shared by all.

        Statistics may be held in half precision; sums over them are taken in float32.
        """
        if self.matrices is not None:
            return MatrixSamples(summable(self.matrices))
        if self.uses:
            return SummedSamples(tuple(part.samples for part in self.uses))
        if self.parts or self.groups > 1:
            return GroupedSamples(tuple(part.samples for part in self.by_group()))
        assert self.gradients is not None
        gradients = summable(self.gradients)
        if self.tokens is not None:
            return TokenSamples(self.tokens, gradients, self.weight_shape[0])
        assert self.inputs is not None
        pair = pair_samples(summable(self.inputs), gradients)
        return TurnedSamples(pair) if self.turned else pair

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """Inputs and output gradients as rows, whose spans hold every sum over them."""
        both = [] if self.groups > 1 or self.parts else [self.inputs, self.gradients]
        held = (summable(one) for one in both if one is not None)
        return tuple(one.reshape(-1, one.shape[-1]) for one in held)

    def by_group(self) -> tuple["LayerStatistics", ...]:
        """Return the statistics of each group of rows, itself if there is but one.

        The block of one group is a layer with d_out / groups outputs. Across groups the
        examples are the same, so the exact block of the whole is no sum over groups.
        """
        if self.parts and not self.uses:
            return self.parts
        if self.groups == 1:
            return (self,)
        inputs, gradients = self.inputs, self.gradients
        assert inputs is not None
        assert gradients is not None
        size = self.block.rows // self.groups

        def part(group: int) -> LayerStatistics:
            first = group * size
            return replace(
                self,
                block=self.block.some_rows(first, first + size),
                groups=1,
                inputs=inputs.chunk(self.groups, 2)[group],
                gradients=gradients.chunk(self.groups, 3)[group],
            )

        return tuple(map(part, range(self.groups)))

    def without_examples(self) -> "LayerStatistics":
        """Return statistics of the same form, of no example."""

        def cut(tensor: Tensor | None, axis: int) -> Tensor | None:
            return None if tensor is None else tensor.narrow(axis, 0, 0)

        return replace(
            self,
            count=0,
            positions=0,
            inputs=cut(self.inputs, 0),
            tokens=cut(self.tokens, 0),
            gradients=cut(self.gradients, 1),
            matrices=cut(self.matrices, 1),
            parts=tuple(part.without_examples() for part in self.parts),
            provenance=replace(self.provenance, examples=0),
        )

    def example_gradients(self) -> Float[Tensor, "v n o i"]:
        """Form D_vn for all columns and examples.

        Returns
        -------
        Tensor
            Shape (V, N, d_out, d_in); for Empirical its one column holds the gradient
            of each example's loss.
        """
        return self.samples.matrices()

    def shared(self, method: str) -> tuple[Tensor, Tensor]:
        """Return (inputs, gradients).

        Raises
        ------
        NeedsSharedForm
            If the block is described by matrices only, by the tokens of an embedding, by
            several groups or uses, or its weight is stored (in, out).
        """
        if self.turned:
            raise NeedsSharedForm(method, self.name, self._form)
        return self.pair(method)

    def pair(self, method: str) -> tuple[Tensor, Tensor]:
        """Return (inputs, gradients), which the weight may have either way round.

        Raises
        ------
        NeedsSharedForm
            As `shared`, but for a weight stored (in, out).
        """
        if self.inputs is None or self.gradients is None or self.groups > 1:
            raise NeedsSharedForm(method, self.name, self._form)
        return summable(self.inputs), summable(self.gradients)

    @property
    def _form(self) -> str:
        """Say how a block without one pair of inputs and gradients is described."""
        if self.matrices is not None:
            why = f" ({self.why})" if self.why else ""
            remedy = _recurrent_remedy(self.block.weight)
            return f"per-example gradient matrices{remedy or why}"
        if self.tokens is not None:
            return "the rows of an embedding that were looked up"
        if self.uses:
            return f"{len(self.uses)} kinds of uses"
        if self.turned:
            return "inputs and output gradients of a weight stored (in, out)"
        groups = len(self.by_group())
        return f"{groups} groups of outputs with inputs of their own"

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return w (..., d_out, d_in) from tensors by parameter name."""
        return self.block.pack(tensors)

    def unpack(self, w: Tensor) -> dict[str, Tensor]:
        """Return tensors by parameter name from w (..., d_out, d_in)."""
        return self.block.unpack(w)

    def __repr__(self) -> str:
        """Return one line."""
        s = self.samples
        form = type(s).__name__.removesuffix("Samples").lower()
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"LayerStatistics({self.provenance}, V={s.columns}, weight "
            f"{s.weight_shape}, {form}, {kind}, {readable(self.nbytes)})"
        )

    def _repr_html_(self) -> str:
        """Return a small folding table for notebooks."""
        s = self.samples
        rows = {
            "layer": self.name,
            "Fisher": self.provenance.fisher,
            "likelihood": self.provenance.likelihood,
            "examples N": self.count,
            "columns V": s.columns,
            "weight (d_out, d_in)": s.weight_shape,
            "form": type(s).__name__,
            "numbers": f"{self.dtype}, {s.device}, {readable(self.nbytes)}",
        }
        return html_table("LayerStatistics", rows)


def _recurrent_remedy(weight: str) -> str:
    fused = re.search(r"(weight|bias)_(ih|hh|hr)_l\d+(_reverse)?$", weight)
    how = "fisherlab.unrolled(model) gives it the shared form"
    return f" (a fused recurrent layer: {how})" if fused else ""


def summable(tensor: Tensor) -> Tensor:
    """Return numbers in a precision that can be summed and factorised: half as float32."""
    return tensor.float() if tensor.dtype in HALF else tensor


def pair_samples(
    inputs: Float[Tensor, "n t i"], gradients: Float[Tensor, "v n t o"]
) -> OuterSamples | SharedSamples:
    """Return samples of inputs and output gradients, the simpler form for one position."""
    if inputs.shape[1] == 1:
        return OuterSamples(inputs[:, 0], gradients[:, :, 0])
    return SharedSamples(inputs, gradients)


@final
@dataclass(frozen=True, eq=False, repr=False)
class MeanGradient(Held):
    """The gradient of the mean loss over a batch, for one block.

    Parameters
    ----------
    block
        Which parameters.
    gradient
        (1/N) Σ_n ∇ℓ_n, shape (d_out, d_in).
    count
        N.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> found = fl.mean_gradient(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> found["weight"].gradient.shape
    torch.Size([2, 4])
    """

    block: Block
    gradient: Float[Tensor, "o i"]
    count: int
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.block.weight_shape

    def without_examples(self) -> "MeanGradient":
        """Return the same for a weighted sum in which it does not count."""
        return replace(self, count=0)

    def __repr__(self) -> str:
        """Return one line."""
        norm = float(self.gradient.norm())
        made = f"{self.provenance}, " if str(self.provenance) else ""
        return f"MeanGradient({made}{self.weight_shape}, norm {norm:.3g})"

    def _repr_html_(self) -> str:
        """Return a small folding table for notebooks."""
        rows = {
            "layer": self.block.name,
            "likelihood": self.provenance.likelihood,
            "examples N": self.count,
            "weight (d_out, d_in)": self.weight_shape,
            "norm": f"{float(self.gradient.norm()):.6g}",
            "numbers": f"{self.gradient.dtype}, {self.gradient.device}, "
            f"{readable(self.nbytes)}",
        }
        return html_table("MeanGradient", rows)


@final
class Statistics(Mapping[str, LayerStatistics]):
    """A mapping from block names to their statistics, with how they were made."""

    def __init__(
        self, layers: Mapping[str, LayerStatistics], provenance: Provenance
    ) -> None:
        self._layers = dict(layers)
        self.provenance = provenance

    def __getitem__(self, name: str) -> LayerStatistics:
        """Return one block's statistics; an unknown name lists the known ones."""
        if name not in self._layers:
            msg = f"no block {name!r}; known: {', '.join(self._layers)}"
            raise KeyError(msg)
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over block names."""
        return iter(self._layers)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes held by all blocks."""
        return sum(layer.nbytes for layer in self.values())

    @property
    def device(self) -> torch.device:
        """Where they are held."""
        each = (layer.device for layer in self.values())
        return next(each, torch.device("cpu"))

    def __repr__(self) -> str:
        """Return one line."""
        made = str(self.provenance)
        return f"Statistics({len(self)} blocks, {made}, {readable(self.nbytes)})"

    def _repr_html_(self) -> str:
        """Return a folding table, a row a block."""
        rows: dict[str, object] = {"made": str(self.provenance)}
        rows |= {
            name: f"{layer.weight_shape}, {readable(layer.nbytes)}"
            for name, layer in self.items()
        }
        return html_table(f"Statistics of {len(self)} blocks", rows)

"""Per-example gradients of layers, as values."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherlab.errors import DataError, NeedsSharedForm
from fisherlab.layers import Block
from fisherlab.numerics.devices import Held, parse_budget, readable, require, spans
from fisherlab.operators.base import Provenance
from fisherlab.samples import (
    GroupedSamples,
    MatrixSamples,
    OuterSamples,
    PartedSamples,
    Samples,
    SharedSamples,
    SummedSamples,
    TokenSamples,
    TurnedSamples,
)
from fisherlab.showing import html_table

HALF = (torch.bfloat16, torch.float16)


def state_of(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the size of a file, and when it was written."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


@final
@dataclass(frozen=True, eq=False)
class StoredPart(Held):
    """The statistics of some examples in a file, which is mapped at every visit.

    Parameters
    ----------
    path
        The file.
    examples, columns
        N of the part, and V of the whole.
    precision
        What it is read in.
    groups
        Which group of rows is meant, in turn.
    state
        Size and time of the file when it was verified, none before.
    """

    path: str
    examples: int
    columns: int
    precision: torch.dtype
    groups: tuple[int, ...] = ()
    state: tuple[int, int] | None = None

    def layer(self) -> "LayerStatistics":
        """Return the part, with the columns of the whole."""
        found = self.read()
        for number in self.groups:
            found = found.by_group()[number]
        missing = self.columns - found.samples.columns
        return (_with_columns(found, missing) if missing else found).to(self.precision)

    def read(self) -> "LayerStatistics":
        """Map the file; numbers come from the disk as they are used.

        Raises
        ------
        DataError
            If the file is gone, was changed, or cannot be read.
        """
        try:
            if self.state not in (None, state_of(self.path)):
                raise OSError("it was changed")
            with torch.serialization.safe_globals([LayerStatistics, Block, Provenance]):
                found: LayerStatistics = torch.load(
                    self.path, "cpu", mmap=True, weights_only=True
                )
        except FileNotFoundError as error:
            raise DataError(
                f"{self.path} is gone, which stored statistics stand on. Call collect "
                "again with store=, and keep the folder as long as its statistics."
            ) from error
        except Exception as error:  # a damaged file may raise anything
            raise DataError(
                f"{self.path}, which stored statistics stand on, cannot be read "
                f"({' '.join(str(error).split())[:100]}). Call collect again with store=, "
                "which verifies the folder."
            ) from error
        return found

    def opened(self) -> Samples:
        """Return the gradients with every sum over them."""
        return self.layer().samples

    def group(self, number: int) -> "StoredPart":
        """Return the part of one group of rows."""
        return replace(self, groups=(*self.groups, number))


def _with_columns(layer: "LayerStatistics", more: int) -> "LayerStatistics":
    """Add columns of zeros, which other parts have."""

    def grown(held: Tensor | None) -> Tensor | None:
        if held is None:
            return None
        return torch.cat([held, held.new_zeros(more, *held.shape[1:])])

    return replace(
        layer,
        gradients=grown(layer.gradients),
        matrices=grown(layer.matrices),
        parts=tuple(_with_columns(part, more) for part in layer.parts),
    )


@final
@dataclass(frozen=True, eq=False)
class Stored(Held):
    """Statistics on a disk: the files of their parts, and the shapes of the whole."""

    parts: tuple[StoredPart, ...]
    like: "LayerStatistics"

    @property
    def samples(self) -> Samples:
        """The gradients part by part, in a precision that can be summed."""
        whole = self.like.samples
        return PartedSamples(tuple(part.to(whole.dtype) for part in self.parts), whole)

    def pair(self, method: str) -> tuple[Tensor, Tensor]:
        """Read the inputs and gradients of all examples into memory.

        Raises
        ------
        BudgetError
            If they take more than half of what is free.
        NeedsSharedForm
            If there are none.
        """
        whole = self.like.pair(method)
        needed, limit = sum(one.nbytes for one in whole), parse_budget(None)
        remedy = "It takes all examples at once: give it fewer, or use another method."
        require(needed, limit, f"{method} of statistics on disk", remedy)
        inputs, gradients = (torch.zeros(t.shape, dtype=t.dtype) for t in whole)
        places = spans([part.examples for part in self.parts])
        for part, at in zip(self.parts, places, strict=True):
            here = part.layer().pair(method)
            length = here[0].shape[1]
            inputs[at, :length], gradients[:, at, :length] = here
        return inputs, gradients

    def by_group(self) -> "tuple[LayerStatistics, ...]":
        """Return the statistics of each group of rows, none where there is but one."""
        groups = self.like.by_group()
        if len(groups) == 1:
            return ()
        cut = [tuple(p.group(k) for p in self.parts) for k in range(len(groups))]
        return tuple(stored_as(*one) for one in zip(groups, cut, strict=True))


def stored_as(like: "LayerStatistics", parts: tuple[StoredPart, ...]) -> "LayerStatistics":
    """Return statistics whose numbers lie in files."""
    stored = Stored(parts, like)
    return replace(
        like,
        inputs=None,
        gradients=None,
        matrices=None,
        tokens=None,
        parts=(),
        stored=stored,
    )


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
    stored
        The files that hold the numbers, from ``collect(..., store=folder)``; then there
        are no tensors here, `samples` answers part by part, and `pieces` are those parts.

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
    stored: Stored | None = None

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
        return self.stored.like.is_shared if self.stored else self.matrices is None

    def pieces(self) -> Iterator["LayerStatistics"]:
        """Yield the statistics of every part that is on the disk, else themselves."""
        if self.stored is None:
            yield self
        for part in self.stored.parts if self.stored else ():
            yield part.layer()

    @property
    def uses(self) -> tuple["LayerStatistics", ...]:
        """The parts whose gradients add up, of a weight that is used in several ways."""
        if self.stored:
            return self.stored.like.uses
        whole = all(part.block.rows == self.block.rows for part in self.parts)
        return self.parts if whole else ()

    @cached_property
    def samples(self) -> Samples:
        """The gradients with every sum over them; tables it keeps are shared by all.

        Statistics may be held in half precision; sums over them are taken in float32.
        """
        if self.stored:
            return self.stored.samples
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
        if self.stored:
            return self.stored.by_group() or (self,)
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
        if self.stored:
            return self.stored.pair(method)
        if self.inputs is None or self.gradients is None or self.groups > 1:
            raise NeedsSharedForm(method, self.name, self._form)
        return summable(self.inputs), summable(self.gradients)

    @property
    def _form(self) -> str:
        """Say how a block without one pair of inputs and gradients is described."""
        if self.stored:
            return self.stored.like._form
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
        form = type(s.counted_as).__name__.removesuffix("Samples").lower()
        form += " on disk" if self.stored else ""
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
            "form": type(s.counted_as).__name__,
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

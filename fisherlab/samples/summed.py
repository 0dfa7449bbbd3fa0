r"""Samples of tables that are looked up, and samples made of others.

An embedding is never written as one-hot rows,

.. math:: D_{vn} = \sum_t e_{k(n,t)}\, g_{vnt}^T, \qquad e_k \text{ the k-th unit vector}

and a weight used in several ways, or stored as (in, out), is asked through its uses.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import cast, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherlab.numerics.devices import chunks
from fisherlab.samples.base import (
    CHUNK_BYTES,
    WHOLE,
    DenseRoute,
    Samples,
    counted_together,
    kept_once,
)
from fisherlab.samples.outer import OuterSamples
from fisherlab.samples.shared import SharedSamples


@final
@dataclass(frozen=True, eq=False)
class TokenSamples(Samples):
    """Hold the rows looked up and the gradients of what was found there.

    Parameters
    ----------
    tokens
        k(n, t), rows of the table; -1 where there is none (padding).
    gradients
        g, zero where the token is -1.
    size
        Rows of the table.
    """

    tokens: Int[Tensor, "n t"]
    gradients: Float[Tensor, "v n t i"]
    size: int

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(rows of the table, width)."""
        return self.size, self.gradients.shape[3]

    @cached_property
    def merged(self) -> "TokenSamples":
        """The same gradients with every token of an example looked up once."""
        order = self.tokens.argsort(dim=1, stable=True)
        tokens = self.tokens.gather(1, order)
        fresh = torch.ones_like(tokens)
        fresh[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
        place = fresh.cumsum(1) - 1
        known = place.numel() and not place.is_meta  # else as many as positions
        width = int(place.max()) + 1 if known else place.shape[1]
        once = torch.full_like(tokens[:, :1], -1).repeat(1, width).scatter(1, place, tokens)
        v, n, t, i = self.gradients.shape
        sorted_ = self.gradients.gather(2, order[None, :, :, None].expand(v, n, t, i))
        sums = self.gradients.new_zeros(v, n, width, i)
        sums.scatter_add_(2, place[None, :, :, None].expand(v, n, t, i), sorted_)
        return TokenSamples(once, sums, self.size)

    @cached_property
    def seen(self) -> Int[Tensor, " r"]:
        """The rows that were looked up, ascending; every other row of D is zero."""
        if self.tokens.is_meta:  # as many as positions
            return self.tokens.flatten()[: self.size]
        return self.tokens[self.tokens >= 0].unique()

    def of_seen(self) -> "TokenSamples":
        """Return the same gradients of a table that has the rows looked up alone."""
        places = torch.searchsorted(self.seen, self.tokens)
        tokens = torch.where(self.tokens >= 0, places, -1)
        return TokenSamples(tokens, self.gradients, len(self.seen))

    def counts(self) -> Float[Tensor, " k"]:
        """Return how often each row was looked up."""
        seen = self.tokens.flatten()
        found = seen.new_zeros(self.size)
        return found.index_add_(0, seen.clamp_min(0), (seen >= 0).long()).to(self.dtype)

    def _add_rows(self, values: Float[Tensor, "n t c"]) -> Float[Tensor, "k c"]:
        """Add values (n, t, c) up at the rows of their tokens."""
        out = values.new_zeros(self.size, values.shape[2])
        return out.index_add_(0, self.tokens.clamp_min(0).flatten(), values.flatten(0, 1))

    def some_columns(self, columns: slice) -> "TokenSamples":
        """Return the samples of some columns."""
        return TokenSamples(self.tokens, self.gradients[columns], self.size)

    def some_rows(self, rows: slice) -> "TokenSamples":
        """Return D[rows]: tokens of other rows are none."""
        start, stop, _ = rows.indices(self.size)
        inside = (self.tokens >= start) & (self.tokens < stop)
        tokens = torch.where(inside, self.tokens - start, -1)
        return TokenSamples(tokens, self.gradients * inside[..., None], stop - start)

    def some_examples(self, index: Tensor) -> "TokenSamples":
        """Return the samples of some examples."""
        return TokenSamples(self.tokens[index], self.gradients[:, index], self.size)

    def matrices(self, part: slice = WHOLE) -> Float[Tensor, "v n k i"]:
        """Form the matrices of some examples: V·rows·width numbers each."""
        gradients = self.gradients[:, part]
        v, n, t, i = gradients.shape
        out = gradients.new_zeros(v, n, self.size, i)
        index = self.tokens[part].clamp_min(0)[None, :, :, None].expand(v, n, t, i)
        return out.scatter_add_(2, index, gradients)

    def project(self, w: Float[Tensor, "m k i"]) -> Float[Tensor, "m v n"]:
        """Return ⟨D_vn, w⟩ = Σ_t g_vnt · w[k(n, t)]."""
        found = self.tokens.clamp_min(0)
        out = self.gradients.new_empty(len(w), self.columns, self.examples)
        for m, one in enumerate(w):
            out[m] = torch.einsum("vnti,nti->vn", self.gradients, one[found])
        return out

    def combine(self, c: Float[Tensor, "m v n"]) -> Float[Tensor, "m k i"]:
        """Return Σ c_vn D_vn, adding the columns up first."""
        out = self.gradients.new_empty(len(c), *self.weight_shape)
        for m, one in enumerate(c):
            out[m] = self._add_rows(torch.einsum("vn,vnti->nti", one, self.gradients))
        return out

    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖²."""
        return self.merged.gradients.square().sum((2, 3))

    def squares(self) -> Float[Tensor, "k i"]:
        """Return Σ D∘D."""
        return self.merged._add_rows(self.merged.gradients.square().sum(0))

    def column_squares(self, cols: Float[Tensor, "i c"]) -> Float[Tensor, "k c"]:
        """Return Σ (D cols)∘²: the diagonal of S with the columns rotated alone."""
        turned = (self.merged.gradients @ cols).square_().sum(0)
        return self.merged._add_rows(turned)

    def row_side(self, middle: Float[Tensor, "i i"]) -> Float[Tensor, "k k"]:
        """Return Σ D M Dᵀ from pairs of positions."""
        out = self.gradients.new_zeros(self.size, self.size)
        for part in self._pair_parts():
            g, tokens = self.gradients[:, part], self.tokens[part].clamp_min(0)
            pairs = torch.einsum("vnti,vnsi->nts", g @ middle, g)
            index = tokens[:, :, None] * self.size + tokens[:, None, :]
            out.view(-1).index_add_(0, index.flatten(), pairs.flatten())
        return out

    def column_side(self, middle: Float[Tensor, "k k"]) -> Float[Tensor, "i i"]:
        """Return Σ Dᵀ M D from pairs of positions."""
        out = self.gradients.new_zeros(self.weight_shape[1], self.weight_shape[1])
        for part in self._pair_parts():
            g, tokens = self.gradients[:, part], self.tokens[part].clamp_min(0)
            weights = middle[tokens[:, :, None], tokens[:, None, :]]
            out += g.flatten(0, 2).T @ (weights @ g).flatten(0, 2)
        return out

    def kronecker_inner(
        self, rows: Float[Tensor, "k k"], cols: Float[Tensor, "i i"]
    ) -> float:
        """Return Σ ⟨D, rows D cols⟩; of the rows of the table only pairs are read."""
        return float((self.column_side(rows) * cols).sum())

    def _pair_parts(self) -> list[slice]:
        """Cut the examples so that tables over pairs of positions stay small."""
        each = self.tokens.shape[1] ** 2 * self.dtype.itemsize
        return list(chunks(self.examples, CHUNK_BYTES // max(each, 1)))

    def diagonal_inner(
        self, diagonal: Float[Tensor, " k"], cols: Float[Tensor, "i i"]
    ) -> float:
        """Return Σ ⟨D, diag(d) D cols⟩; no table over pairs of rows is formed."""
        g = self.merged.gradients
        forms = ((g @ cols) * g).sum((0, 3))
        return float((diagonal[self.merged.tokens.clamp_min(0)] * forms).sum())

    def form_flops(self) -> int:
        """Count the multiply-adds of `kronecker_inner`, over pairs of positions."""
        t, i = self.tokens.shape[1], self.weight_shape[1]
        return self.total * t * i * (t + i)

    def gram(self) -> Float[Tensor, "m m"]:
        """Return all inner products, Σ over pairs of positions with one token."""
        if not self._pairs_are_cheaper:
            return super().gram()
        v, n = self.columns, self.examples
        table = self.gradients.new_empty(v, n, v, n)
        once = self.merged
        for at in range(n):
            same = once.tokens[at][:, None, None] == once.tokens[None]
            found = torch.einsum(
                "vti,tns,wnsi->vwn",
                once.gradients[:, at],
                same.to(self.dtype),
                once.gradients,
            )
            table[:, at] = found
        return table.view(v * n, v * n)

    def squared_norm(self) -> float:
        """Return Σ ⟨D_a, D_b⟩²."""
        if not self._pairs_are_cheaper:
            return super().squared_norm()
        return float(self.gram().square().sum(dtype=torch.float64))

    @property
    def _pairs_are_cheaper(self) -> bool:
        """Whether pairs of positions are fewer than rows of the table."""
        return self.tokens.shape[1] ** 2 < self.size

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix."""
        k, i = self.weight_shape
        m = self.total
        return m * m * i * min(self.tokens.shape[1] ** 2, k) // 2

    def counted(self, *, needs_inputs: bool, entrywise: bool) -> tuple[Samples, ...]:
        """Return them where entries are alone: other factors of a table are not counted."""
        return (self,) if entrywise else ()


@final
@dataclass(frozen=True, eq=False)
class TurnedSamples(Samples):
    """Hold D_vn = E_vnᵀ: ``x @ W``, GPT-2's Conv1D, transposed convolutions.

    Parameters
    ----------
    upright
        E, with outputs in the rows.

    Examples
    --------
    >>> import torch
    >>> from fisherlab.samples import OuterSamples
    >>> upright = OuterSamples(torch.ones(4, 3), torch.ones(1, 4, 2))
    >>> TurnedSamples(upright).weight_shape
    (3, 2)
    """

    upright: Samples

    @cached_property
    def columns(self) -> int:
        """V."""
        return self.upright.columns

    @cached_property
    def examples(self) -> int:
        """N."""
        return self.upright.examples

    @property
    def positions(self) -> int:
        """T."""
        return self.upright.positions

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(in, out)."""
        o, i = self.upright.weight_shape
        return i, o

    def some_columns(self, columns: slice) -> "TurnedSamples":
        """Return the samples of some columns."""
        return TurnedSamples(self.upright.some_columns(columns))

    def some_examples(self, index: Tensor) -> "TurnedSamples":
        """Return the samples of some examples."""
        return TurnedSamples(self.upright.some_examples(index))

    def multiplied_often(self, limit: int) -> "TurnedSamples":
        """Return the form for many quadratic forms, see `SharedSamples`."""
        if not isinstance(self.upright, SharedSamples):
            return self
        return TurnedSamples(self.upright.multiplied_often(limit))

    def matrices(self, part: slice = WHOLE) -> Float[Tensor, "v n i o"]:
        """Form the matrices of some examples."""
        return self.upright.matrices(part).mT

    def project(self, w: Float[Tensor, "k i o"]) -> Float[Tensor, "k v n"]:
        """Return ⟨D_vn, w⟩."""
        return self.upright.project(w.mT.contiguous())

    def combine(self, c: Float[Tensor, "k v n"]) -> Float[Tensor, "k i o"]:
        """Return Σ c_vn D_vn."""
        return self.upright.combine(c).mT

    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖²."""
        return self.upright.squared_norms()

    def squares(self) -> Float[Tensor, "i o"]:
        """Return Σ D∘D."""
        return self.upright.squares().T

    def rotated_squares(
        self, rows: Float[Tensor, "i r"], cols: Float[Tensor, "o c"]
    ) -> Float[Tensor, "r c"]:
        """Return Σ (rowsᵀ D cols)∘²."""
        return self.upright.rotated_squares(cols, rows).T

    def row_side(self, middle: Float[Tensor, "o o"]) -> Float[Tensor, "i i"]:
        """Return Σ D M Dᵀ."""
        return self.upright.column_side(middle)

    def column_side(self, middle: Float[Tensor, "i i"]) -> Float[Tensor, "o o"]:
        """Return Σ Dᵀ M D."""
        return self.upright.row_side(middle)

    def kronecker_inner(
        self, rows: Float[Tensor, "i i"], cols: Float[Tensor, "o o"]
    ) -> float:
        """Return Σ ⟨D, rows D cols⟩."""
        return self.upright.kronecker_inner(cols, rows)

    def gram(self) -> Float[Tensor, "m m"]:
        """Return all inner products: those of E."""
        return self.upright.gram()

    def squared_norm(self) -> float:
        """Return Σ ⟨D_a, D_b⟩²."""
        return self.upright.squared_norm()

    def _tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        return self.upright._tiles()

    def form_flops(self) -> int:
        """Count `kronecker_inner`: that of E."""
        return self.upright.form_flops()

    def add_dense_(
        self, out: Float[Tensor, "p p"], scale: float = 1.0
    ) -> Float[Tensor, "p p"]:
        """Write scale · S into `out`: the sum of E, with rows and columns exchanged."""
        i, o = self.weight_shape
        turned = self.upright.add_dense_(out.new_empty(out.shape), scale)
        return out.copy_(turned.view(o, i, o, i).permute(1, 0, 3, 2).reshape(out.shape))

    def dense_flops(self) -> int:
        """Count the multiply-adds of the dense sum."""
        return self.upright.dense_flops()

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix."""
        return self.upright.gram_flops()

    def dense_route(self, form: str = "auto") -> DenseRoute:
        """Say how the sum of E goes."""
        return self.upright.dense_route(form)

    def dense_workspace(self) -> int:
        """Count the bytes that `add_dense_` takes beside the block: E's, and a copy."""
        o, i = self.weight_shape
        return self.dtype.itemsize * (o * i) ** 2 + self.upright.dense_workspace()

    def counted(self, *, needs_inputs: bool, entrywise: bool) -> tuple[Samples, ...]:
        """Return those of E: rows and columns change places."""
        return self.upright.counted(needs_inputs=needs_inputs, entrywise=entrywise)


Pair = OuterSamples | SharedSamples | TurnedSamples


@final
@dataclass(frozen=True, eq=False)
class SummedSamples(Samples):
    """Hold D_vn = Σ_k E^k_vn: an embedding that is the last layer's weight too.

    Parameters
    ----------
    uses
        E^1, E^2, …, of the same columns and examples.

    Examples
    --------
    >>> from fisherlab.samples import OuterSamples
    >>> one = OuterSamples(torch.ones(4, 3), torch.ones(1, 4, 2))
    >>> SummedSamples((one, one)).squared_norms()
    tensor([[24., 24., 24., 24.]])
    """

    uses: tuple[Samples, ...]

    @cached_property
    def columns(self) -> int:
        """V."""
        return self.uses[0].columns

    @cached_property
    def examples(self) -> int:
        """N."""
        return self.uses[0].examples

    @property
    def positions(self) -> int:
        """T, of all uses."""
        return sum(use.positions for use in self.uses)

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.uses[0].weight_shape

    def some_columns(self, columns: slice) -> "SummedSamples":
        """Return the samples of some columns."""
        return SummedSamples(tuple(use.some_columns(columns) for use in self.uses))

    def some_rows(self, rows: slice) -> "SummedSamples | None":
        """Return D[rows], where all uses have them."""
        uses = [use.some_rows(rows) for use in self.uses]
        found = tuple(use for use in uses if use is not None)
        return SummedSamples(found) if len(found) == len(uses) else None

    def some_examples(self, index: Tensor) -> "SummedSamples":
        """Return the samples of some examples."""
        return SummedSamples(tuple(use.some_examples(index) for use in self.uses))

    def matrices(self, part: slice = WHOLE) -> Float[Tensor, "v n o i"]:
        """Form the matrices of some examples."""
        return _sum(use.matrices(part) for use in self.uses)

    def project(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k v n"]:
        """Return ⟨D_vn, w⟩."""
        return _sum(use.project(w) for use in self.uses)

    def combine(self, c: Float[Tensor, "k v n"]) -> Float[Tensor, "k o i"]:
        """Return Σ c_vn D_vn."""
        return _sum(use.combine(c) for use in self.uses)

    @kept_once
    def gram(self) -> Float[Tensor, "m m"]:
        """Return all inner products; of a tied table without a matrix of its size."""
        tied = self._tied
        if tied is None:
            return super().gram()
        table, pair = tied
        crossed = looked_up_inner(table, pair)
        return table.gram() + pair.gram() + crossed + crossed.T

    def squared_norm(self) -> float:
        """Return Σ ⟨D_a, D_b⟩²."""
        if self._tied is None:
            return super().squared_norm()
        return float(self.gram().square().sum(dtype=torch.float64))

    @property
    def _tied(self) -> tuple[TokenSamples, Pair] | None:
        """The two uses of an embedding that is a layer's weight too, if it is large."""
        tables = [use for use in self.uses if isinstance(use, TokenSamples)]
        pairs = [use for use in self.uses if isinstance(use, Pair)]
        if len(self.uses) != 2 or len(tables) != 1 or len(pairs) != 1:
            return None
        t, s = tables[0].tokens.shape[1], pairs[0].positions
        return (tables[0], pairs[0]) if t * s < self.weight_shape[0] else None

    @kept_once
    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖², from the matrices of a few examples at a time."""
        if self._tied is not None:
            return self.gram().diagonal().view(self.columns, self.examples)
        out = torch.empty(self.columns, self.examples, dtype=self.dtype, device=self.device)
        for part in self.parts():
            out[:, part] = self.matrices(part).square().sum((2, 3))
        return out

    def dense_flops(self) -> int:
        """Count the multiply-adds of the dense sum: forming D, then half a product."""
        return self.matrix_flops() + super().dense_flops()

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix: forming D, then half a product."""
        o, i = self.weight_shape
        samples = self.total
        tied = self._tied
        if tied is not None:
            each = tied[0].tokens.shape[1] * tied[1].positions * i
            return samples * samples * each + sum(use.gram_flops() for use in tied)
        return self.matrix_flops() + samples * samples * o * i // 2

    def counted(self, *, needs_inputs: bool, entrywise: bool) -> tuple[Samples, ...]:
        """Return all uses where their inputs are needed, else the sums themselves."""
        if not needs_inputs:
            return (self,)
        return counted_together(self.uses, needs_inputs, entrywise)


def looked_up_inner(table: TokenSamples, pair: Pair) -> Float[Tensor, "m m"]:
    """Return ⟨D_a, E_b⟩ for a table that is looked up and for pairs, v-major.

    Σ_ts r_ms[k(n,t)] (g_vnt · c_ms), where the pairs are E = Σ_s r_s c_sᵀ.
    """
    rows, cols = _sides(pair)
    v, n = table.columns, table.examples
    out = table.gradients.new_empty(v, n, v, n)
    for at in range(n):
        found = rows[..., table.tokens[at].clamp_min(0)]
        inside = torch.einsum("vti,wmsi->vwmst", table.gradients[:, at], cols)
        out[:, at] = (inside * found).sum((3, 4))
    return out.view(v * n, v * n)


def _sides(pair: Pair) -> tuple[Float[Tensor, "_ n s o"], Float[Tensor, "_ n s i"]]:
    """Return r and c; the columns v are one on the side of the inputs."""
    if isinstance(pair, TurnedSamples):
        rows, cols = _sides(cast("Pair", pair.upright))
        return cols, rows
    inputs, gradients = pair.inputs, pair.gradients
    if isinstance(pair, OuterSamples):
        inputs, gradients = inputs[:, None], gradients[:, :, None]
    return gradients, inputs[None]


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    left = iter(tensors)  # one after the other: each may be large
    total = next(left).clone()
    for tensor in left:
        total += tensor
    return total

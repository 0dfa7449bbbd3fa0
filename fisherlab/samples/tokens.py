r"""Gradients of a table that is looked up: an embedding, never written as one-hot rows.

.. math:: D_{vn} = \sum_t e_{k(n,t)}\, g_{vnt}^T, \qquad e_k \text{ the k-th unit vector}
"""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherlab.numerics.memory import chunks
from fisherlab.samples.base import CHUNK_BYTES, WHOLE, Samples


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

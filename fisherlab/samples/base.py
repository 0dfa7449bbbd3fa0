"""What every form of per-example gradients answers, by its matrices or by better means."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, wraps
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.devices import Held, chunks
from fisherlab.numerics.packed import mirror_, symmetric_product_

CHUNK_BYTES = 64 * 2**20  # matrices formed at once
WHOLE = slice(None)
S = TypeVar("S", bound="Samples")
DenseRoute = Literal["packed GEMM", "per-example SYRK", "position pairs"]
Tiles = Iterator[tuple[slice, slice, Tensor]]
_CASTS: WeakKeyDictionary[Any, WeakValueDictionary[torch.dtype, Any]] = WeakKeyDictionary()


def kept_once(sums: Callable[[S], Tensor]) -> Callable[[S], Tensor]:
    """Keep what a pass over the samples found; every caller gets a copy of his own."""
    name = f"_kept_{sums.__name__}"

    @wraps(sums)
    def again(samples: S) -> Tensor:
        held = vars(samples)
        if name not in held:
            held[name] = sums(samples)
        copy: Tensor = held[name].clone()
        return copy

    return again


class Samples(Held, ABC):
    """Matrices D_vn (V columns, N examples) of shape (o, i), and sums over them.

    A form says what it holds (`gradients` have V and N first), its matrices, their
    projections and combinations, and what it sums faster than matrix by matrix.
    """

    gradients: Tensor

    @cached_property
    def columns(self) -> int:
        """V, the number of columns of the output-Fisher root."""
        return self.gradients.shape[0]

    @cached_property
    def examples(self) -> int:
        """N, the number of examples."""
        return self.gradients.shape[1]

    @property
    def total(self) -> int:
        """M = V·N, the number of samples."""
        return self.columns * self.examples

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, int]:
        """(o, i) = (d_out, d_in)."""

    @property
    def positions(self) -> int:
        """T, the uses of the weight an example that a product goes through."""
        return 1

    @property
    def counted_as(self) -> "Samples":
        """The samples whose shapes tell what sums over these cost."""
        return self

    @property
    def cuts(self) -> tuple[int, ...]:
        """The examples of every part that is visited alone; here one part of all."""
        return (self.examples,)

    def in_parts(self) -> Iterator["Samples"]:
        """Yield the samples of every part."""
        yield self

    def opened(self) -> "Samples":
        """Return the samples themselves, which may be a part of others."""
        return self

    def to(self: S, dtype: torch.dtype) -> S:
        """Return the same samples in another precision, one object a precision.

        Two operators of the same samples then still have the same samples in float64, and
        what those keep (tables of inner products, norms) serves both.
        """
        if dtype == self.dtype:
            return self
        known = _CASTS.setdefault(self, WeakValueDictionary())
        cast: S | None = known.get(dtype)
        if cast is None:
            cast = known[dtype] = super().to(dtype)
        return cast

    @abstractmethod
    def some_columns(self, columns: slice) -> "Samples":
        """Return the samples of some columns."""

    def some_rows(self, rows: slice) -> "Samples | None":
        """Return D[rows] as samples of these rows, None where they have no short form."""
        return None

    def some_examples(self, index: Tensor) -> "Samples":
        """Return the samples of some examples, by their numbers.

        Raises
        ------
        TypeError
            For samples that are visited part by part, or of several weights.
        """
        kind = type(self).__name__
        raise TypeError(f"some_examples: {kind} hold no examples to choose.")

    @abstractmethod
    def matrices(self, part: slice = WHOLE) -> Float[Tensor, "v n o i"]:
        """Return the matrices of some examples."""

    @abstractmethod
    def project(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k v n"]:
        """Return ⟨D_vn, w⟩."""

    @abstractmethod
    def combine(self, c: Float[Tensor, "k v n"]) -> Float[Tensor, "k o i"]:
        """Return Σ c_vn D_vn."""

    @abstractmethod
    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖²."""

    @kept_once
    def squares(self) -> Float[Tensor, "o i"]:
        """Return Σ D_vn∘D_vn, the diagonal of S."""
        return self.summed(lambda d: d.square().sum(0))

    def rotated_squares(
        self, rows: Float[Tensor, "o r"], cols: Float[Tensor, "i c"]
    ) -> Float[Tensor, "r c"]:
        """Return Σ (rowsᵀ D_vn cols)∘², the diagonal of S in another basis."""
        return self.summed(lambda d: (rows.T @ d @ cols).square().sum(0))

    def column_squares(self, cols: Float[Tensor, "i c"]) -> Float[Tensor, "o c"]:
        """Return Σ (D cols)∘²: the diagonal of S with the columns rotated alone."""
        o = self.weight_shape[0]
        return self.rotated_squares(
            torch.eye(o, dtype=self.dtype, device=self.device), cols
        )

    def row_side(self, middle: Float[Tensor, "i i"]) -> Float[Tensor, "o o"]:
        """Return Σ D M Dᵀ: the rearranged S applied to vec(M)."""
        return self.summed(lambda d: row_product(d, middle))

    def column_side(self, middle: Float[Tensor, "o o"]) -> Float[Tensor, "i i"]:
        """Return Σ Dᵀ M D: the transposed rearranged S applied to vec(M)."""
        return self.summed(lambda d: column_product(d, middle))

    def kronecker_inner(
        self, rows: Float[Tensor, "o o"], cols: Float[Tensor, "i i"]
    ) -> float:
        """Return ⟨S, rows ⊗ cols⟩ = Σ ⟨D, rows D cols⟩."""
        return float((self.row_side(cols) * rows).sum())

    def diagonal_inner(
        self, diagonal: Float[Tensor, " o"], cols: Float[Tensor, "i i"]
    ) -> float:
        """Return Σ ⟨D, diag(d) D cols⟩."""
        return self.kronecker_inner(torch.diag(diagonal), cols)

    def add_dense_(
        self, out: Float[Tensor, "p p"], scale: float = 1.0
    ) -> Float[Tensor, "p p"]:
        """Write scale · S into `out`, which is overwritten."""
        return self.add_matrices_(out, scale)

    def add_matrices_(
        self, out: Float[Tensor, "p p"], scale: float
    ) -> Float[Tensor, "p p"]:
        """Write scale · S into `out` from matrices: half a product of p × M × p."""
        if self.examples == 0:
            return out.zero_()
        for number, stack in enumerate(self.stacks()):
            symmetric_product_(out, stack.flatten(1), scale, beta=float(number > 0))
        return mirror_(out)

    def gram(self) -> Float[Tensor, "m m"]:
        """Return ⟨D_a, D_b⟩ for all pairs of the M = V·N samples, v-major."""
        v, n = self.columns, self.examples
        table = torch.empty(v, n, v, n, dtype=self.dtype, device=self.device)
        for left, right, tile in self._tiles():
            size = (v, left.stop - left.start, v, right.stop - right.start)
            block = tile.view(size)
            table[:, left, :, right] = block
            table[:, right, :, left] = block.permute(2, 3, 0, 1)
        return table.view(v * n, v * n)

    def squared_norm(self) -> float:
        """Return ‖S‖² = Σ ⟨D_a, D_b⟩², tile by tile and summed in float64."""
        return sum(
            (1.0 if left == right else 2.0) * float(tile.square().sum(dtype=torch.float64))
            for left, right, tile in self._tiles()
        )

    def _tiles(self) -> Tiles:
        """Yield tiles of the inner products, rows before columns."""
        pieces = list(self.parts())
        for at, left in enumerate(pieces):
            rows = self.flat(left)
            for right in pieces[at:]:
                others = rows if left == right else self.flat(right)
                yield left, right, rows @ others.T

    def product_work(self) -> int:
        """Count the multiply-adds of `project` and `combine` with one weight."""
        (o, i), t = self.weight_shape, self.positions
        return 2 * self.total * min(o * i * t, t * (o + i) + o * i)

    def form_flops(self) -> int:
        """Count the multiply-adds of `kronecker_inner`, here those of matrices."""
        o, i = self.weight_shape
        return self.total * o * i * (o + i)

    def dense_flops(self) -> int:
        """Count the multiply-adds of `add_dense_`, here half a product."""
        o, i = self.weight_shape
        return self.total * (o * i) ** 2 // 2

    @abstractmethod
    def gram_flops(self) -> int:
        """Count the multiply-adds of `gram`."""

    def matrix_flops(self) -> int:
        """Count the multiply-adds of `matrices`."""
        o, i = self.weight_shape
        return self.total * o * i * self.positions

    def square_flops(self) -> int:
        """Count the multiply-adds of `squares`."""
        return self.matrix_flops()

    def row_trace_flops(self) -> int:
        """Count the multiply-adds of Σ D Dᵀ."""
        o, i = self.weight_shape
        return self.matrix_flops() + self.total * o * i * (o + i)

    def column_trace_flops(self) -> int:
        """Count the multiply-adds of Σ Dᵀ D, beside Σ D Dᵀ."""
        return self.row_trace_flops()

    def alternating_flops(self) -> int:
        """Count the multiply-adds of `row_side` and `column_side` of formed matrices."""
        o, i = self.weight_shape
        return 2 * self.total * o * i * (o + i)

    def factor_rows(self) -> tuple[int, int]:
        """Bound the ranks of Kronecker factors by the rows that are summed up in them."""
        return self.weight_shape

    def dense_route(self, form: str = "auto") -> DenseRoute:
        """Say how `add_dense_` goes, where a form of it may be asked for."""
        return "per-example SYRK"

    def dense_workspace(self) -> int:
        """Count the bytes that `add_dense_` takes beside the block."""
        o, i = self.weight_shape
        return min(CHUNK_BYTES, self.dtype.itemsize * self.total * o * i)

    def counted(self, *, needs_inputs: bool, entrywise: bool) -> tuple["Samples", ...]:
        """Return the samples whose counts add up to that of an approximation.

        Parameters
        ----------
        needs_inputs
            Whether it needs inputs and output gradients of a layer.
        entrywise
            Whether it treats every entry of the weight alone.
        """
        return (self,)

    def parts(self, limit: int = CHUNK_BYTES) -> Iterator[slice]:
        """Cut the examples so that their matrices stay below `limit` bytes."""
        o, i = self.weight_shape
        each = self.columns * o * i * self.dtype.itemsize
        return chunks(self.examples, limit // max(each, 1))

    def stacks(self, limit: int = CHUNK_BYTES) -> Iterator[Float[Tensor, "m o i"]]:
        """Yield all matrices in stacks below `limit` bytes, for sums over all of them.

        Where those of one example are more, its columns are cut too: 1,000 classes on a
        convolution are gigabytes an example.
        """
        o, i = self.weight_shape
        width = max(1, limit // max(o * i * self.dtype.itemsize, 1))
        for columns in chunks(self.columns, width):
            some = self.some_columns(columns)
            for part in some.parts(limit):
                formed = some.matrices(part)
                turned = formed.transpose(0, 1)  # sums do not mind the order
                chosen = turned if turned.is_contiguous() else formed
                yield chosen.flatten(0, 1)  # without a copy

    def flat(self, part: slice = WHOLE) -> Float[Tensor, "m p"]:
        """Return the matrices of some examples as rows vec(D), v-major."""
        o, i = self.weight_shape
        return self.matrices(part).reshape(-1, o * i)

    def summed(self, term: Callable[[Float[Tensor, "m o i"]], Tensor]) -> Tensor:
        """Add up term(matrices) over all stacks."""
        total: Tensor | None = None
        for stack in self.stacks():
            value = term(stack)
            total = value if total is None else total + value
        if total is None:  # no examples: an empty chunk has the right shape
            total = term(self.matrices(slice(0, 0)).flatten(0, 1))
        return total


def counted_together(
    parts: Iterable[Samples], needs_inputs: bool, entrywise: bool
) -> tuple[Samples, ...]:
    """Return `Samples.counted` of several."""
    kinds = [part.counted(needs_inputs=needs_inputs, entrywise=entrywise) for part in parts]
    return tuple(one for kind in kinds for one in kind)


def row_product(
    matrices: Float[Tensor, "m o i"], middle: Float[Tensor, "i i"]
) -> Float[Tensor, "o o"]:
    """Return Σ D M Dᵀ of formed matrices as one product over (m, i)."""
    left = (matrices @ middle).transpose(0, 1).flatten(1)
    return left @ matrices.transpose(0, 1).flatten(1).T


def column_product(
    matrices: Float[Tensor, "m o i"], middle: Float[Tensor, "o o"]
) -> Float[Tensor, "i i"]:
    """Return Σ Dᵀ M D of formed matrices as one product over (m, o)."""
    return matrices.flatten(0, 1).T @ (middle @ matrices).flatten(0, 1)

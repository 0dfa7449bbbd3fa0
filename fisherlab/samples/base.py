"""What every form of per-example gradients answers."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor

S = TypeVar("S", bound="Samples")
_CASTS: WeakKeyDictionary[Any, WeakValueDictionary[torch.dtype, Any]] = WeakKeyDictionary()


def cast_once(to: Callable[[S, torch.dtype], S]) -> Callable[[S, torch.dtype], S]:
    """Let `to` return one object a precision, for as long as somebody holds it.

    Two operators of the same samples then still have the same samples in float64, and
    what those keep (tables of inner products, norms) serves both.
    """

    @wraps(to)
    def again(samples: S, dtype: torch.dtype) -> S:
        if dtype == samples.dtype:
            return samples
        known = _CASTS.setdefault(samples, WeakValueDictionary())
        cast: S | None = known.get(dtype)
        if cast is None:
            cast = known[dtype] = to(samples, dtype)
        return cast

    return again


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


@runtime_checkable
class Samples(Protocol):
    """Matrices D_vn (V columns, N examples) of shape (o, i), and sums over them."""

    @property
    def columns(self) -> int:
        """V, the number of columns of the output-Fisher root."""

    @property
    def examples(self) -> int:
        """N, the number of examples."""

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(o, i) = (d_out, d_in)."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the samples."""

    @property
    def device(self) -> torch.device:
        """Where the samples are."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def to(self, dtype: torch.dtype) -> "Samples":
        """Return the same samples in another precision."""

    def some_columns(self, columns: slice) -> "Samples":
        """Return the samples of some columns."""

    def matrices(self, part: slice = slice(None)) -> Float[Tensor, "v n o i"]:
        """Return the matrices of some examples."""

    def project(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k v n"]:
        """Return ⟨D_vn, w⟩."""

    def combine(self, c: Float[Tensor, "k v n"]) -> Float[Tensor, "k o i"]:
        """Return Σ c_vn D_vn."""

    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖²."""

    def squares(self) -> Float[Tensor, "o i"]:
        """Return Σ D_vn∘D_vn, the diagonal of S."""

    def rotated_squares(
        self, rows: Float[Tensor, "o r"], cols: Float[Tensor, "i c"]
    ) -> Float[Tensor, "r c"]:
        """Return Σ (rowsᵀ D_vn cols)∘², the diagonal of S in another basis."""

    def row_side(self, middle: Float[Tensor, "i i"]) -> Float[Tensor, "o o"]:
        """Return Σ D M Dᵀ: the rearranged S applied to vec(M)."""

    def column_side(self, middle: Float[Tensor, "o o"]) -> Float[Tensor, "i i"]:
        """Return Σ Dᵀ M D: the transposed rearranged S applied to vec(M)."""

    def kronecker_inner(
        self, rows: Float[Tensor, "o o"], cols: Float[Tensor, "i i"]
    ) -> float:
        """Return ⟨S, rows ⊗ cols⟩ = Σ ⟨D, rows D cols⟩."""

    def add_dense_(
        self, out: Float[Tensor, "p p"], scale: float = 1.0
    ) -> Float[Tensor, "p p"]:
        """Write scale · S into `out`, which is overwritten."""

    def gram(self) -> Float[Tensor, "m m"]:
        """Return ⟨D_a, D_b⟩ for all pairs of the M = V·N samples, v-major."""

    def squared_norm(self) -> float:
        """Return ‖S‖² = Σ ⟨D_a, D_b⟩²."""

    def dense_flops(self) -> int:
        """Count the multiply-adds of `add_dense_`."""

    def gram_flops(self) -> int:
        """Count the multiply-adds of `gram`."""

"""Inverses of mini-blocks of few examples, in the space of these examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.devices import STAYS, chunks, parse_budget, require
from fisherlab.numerics.linalg import stacked_cholesky
from fisherlab.numerics.packed import pair_count
from fisherlab.operators.base import PANEL_BYTES, Operator, Provenance, inner_product
from fisherlab.operators.factored import FactoredFisher, WoodburyInverse
from fisherlab.samples import OuterSamples


@final
@dataclass(frozen=True, eq=False, repr=False)
class RowwiseWoodbury(Operator):
    r"""The damped inverse of the mini-blocks of rows, each through the N examples.

    .. math:: (M_o + λI)^{-1} = \frac{1}{λ}\left(I - A^T S_o A\right), \qquad
              S_o = R_o (λI + R_o A A^T R_o)^{-1} R_o, \quad R_o = (E_o / N)^{1/2}

    with the inputs A (N, d_in) and the output energies E_o of row o.
    """

    blocks: Operator
    samples: OuterSamples
    damping: float
    couplings: Float[Tensor, "o n n"] = field(metadata=STAYS)
    provenance: Provenance = Provenance()

    @classmethod
    def of(
        cls, blocks: Operator, samples: OuterSamples, count: int, damping: float
    ) -> RowwiseWoodbury:
        """Factorise every block in the examples.

        Raises
        ------
        IndefiniteError
            If a damped block is not positive definite.
        """
        (o, _), n = samples.weight_shape, samples.examples
        device = samples.inputs.device
        require(8 * o * n * n, parse_budget(None, device), f"Inverting {blocks!r}", "")
        couplings = torch.empty(o, n, n, dtype=torch.float64, device=device)
        for part, root, factor in factors(blocks, samples, count, damping):
            inside = torch.cholesky_inverse(factor)
            couplings[part] = root[:, :, None] * inside * root[:, None, :]
        made = blocks.provenance.inverted
        return cls(blocks, samples, damping, couplings, made)

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.blocks.weight_shape

    @cached_property
    def formed(self) -> Operator:
        """The inverse blocks themselves."""
        return self.blocks.formed.inverse(self.damping)

    @property
    def stored_numbers(self) -> int:
        """The inputs and the couplings."""
        return self.samples.inputs.numel() + len(self.couplings) * pair_count(
            self.couplings.shape[1]
        )

    @property
    def product_flops(self) -> int:
        """Two passes over the inputs a row, and its coupling."""
        (o, i), n = self.weight_shape, self.couplings.shape[1]
        return o * n * (2 * i + n)

    @cached_property
    def _inputs(self) -> Float[Tensor, "n i"]:
        return self.samples.inputs.double()

    @cached_property
    def _traces(self) -> Float[Tensor, "2 o"]:
        """Tr S_o K and tr (S_o K)² of every row, K = A Aᵀ."""
        turned = self.couplings @ (self._inputs @ self._inputs.T)
        squares = (turned * turned.mT).sum((1, 2))
        return torch.stack([turned.diagonal(dim1=1, dim2=2).sum(1), squares])

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        flat = w.double()
        seen = (flat @ self._inputs.T).transpose(0, 1)  # (o, k, n)
        inside = (seen @ self.couplings).transpose(0, 1) @ self._inputs
        return ((flat - inside) / self.damping).to(w.dtype)

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return the diagonal."""
        inside = ((self.couplings @ self._inputs) * self._inputs).sum(1)
        return ((1 - inside) / self.damping).to(self.dtype)

    def trace(self) -> float:
        """Return Σ_o (d_in − tr S_o K) / λ."""
        return float(self.shape[0] - self._traces[0].sum()) / self.damping

    def frobenius_norm(self) -> float:
        """Return (Σ_o d_in − 2 tr S_o K + tr (S_o K)²)^½ / λ."""
        inside = float(self._traces[1].sum() - 2 * self._traces[0].sum())
        return (self.shape[0] + inside) ** 0.5 / self.damping


def factors(
    blocks: Operator, samples: OuterSamples, count: int, damping: float
) -> Iterator[tuple[slice, Float[Tensor, "b n"], Float[Tensor, "b n n"]]]:
    """Yield rows, their R_o, and the Cholesky factors of λI + R_o A Aᵀ R_o."""
    inputs = samples.inputs.double()
    roots = (samples.output_energy.double() / count).sqrt().T
    gram = inputs @ inputs.T
    for part in chunks(len(roots), PANEL_BYTES // max(8 * gram.numel(), 1)):
        root = roots[part]
        inner = root[:, :, None] * gram * root[:, None, :]
        inner.diagonal(dim1=1, dim2=2).add_(damping)
        yield part, root, stacked_cholesky(inner, damping, blocks)


def rowwise_inner(
    samples: OuterSamples,
    weights: Float[Tensor, "m m"],
    inputs: Float[Tensor, "n i"],
    couplings: Float[Tensor, "o n n"],
) -> float:
    """Return ⟨W, D X Dᵀ⟩ for weights W of pairs of samples, X having blocks Aᵀ S_o A.

    With C, the samples' inputs times Aᵀ, that is
    Σ_omk (C S_o Cᵀ)_mk Σ_vw g_vmo W_vm,wk g_wko: a product with W for every example k.
    """
    seen, gradients = samples.inputs.double() @ inputs.T, samples.gradients.double()
    columns, examples = gradients.shape[:2]
    inside = seen @ couplings @ seen.T  # (o, m, k)
    pairs = weights.reshape(columns, examples, columns, examples)
    total = 0.0
    for k in range(examples):
        turned = (pairs[..., k] @ gradients[:, k]) * gradients  # (v, m, o)
        total += float((turned.sum(0).T * inside[:, k]).sum())
    return total


@inner_product(FactoredFisher, RowwiseWoodbury)
def _factored_rowwise(a: FactoredFisher, b: RowwiseWoodbury) -> float:
    """Return (tr F − Σ_mo e_mo (C S_o Cᵀ)_mm / N) / λ with the output energies e."""
    if not isinstance(a.samples, OuterSamples):
        return a.inner(b.formed)
    seen = a.samples.inputs.double() @ b._inputs.T
    energies = a.samples.output_energy.double().T  # (o, m)
    inside = ((seen @ b.couplings) * seen).sum(2)
    return (a.trace() - float((energies * inside).sum()) / a.count) / b.damping


@inner_product(WoodburyInverse, RowwiseWoodbury)
def _woodbury_rowwise(a: WoodburyInverse, b: RowwiseWoodbury) -> float:
    """Return (tr B − tr (K + λI)⁻¹ D B Dᵀ / N) / λ."""
    if not isinstance(a.samples, OuterSamples):
        return a.inner(b.formed)
    weights = a._coupling
    whole = float((a.samples.to(torch.float64).gram() * weights).sum())
    inside = rowwise_inner(a.samples, weights, b._inputs, b.couplings)
    return (b.trace() - (whole - inside) / (b.damping * a.count)) / a.damping

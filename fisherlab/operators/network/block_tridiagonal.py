r"""A chain of layers, each conditionally independent of the rest given its neighbours.

.. math:: \hat F^{-1} = Ξ^T Λ Ξ, \quad Ψ_{i,i+1} = Ψ^G_i \otimes Ψ^A_i

Ξ is the identity with −Ψ on its block super-diagonal, Λ the block diagonal of the inverse
conditional moments Σ. The matrix agrees with the Kronecker approximation of all pairs of
layers on its block tridiagonal, and its inverse is zero outside of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import NumericalError
from fisherlab.numerics.devices import spans
from fisherlab.numerics.linalg import eigh, factorised, kron
from fisherlab.operators.base import (
    Damping,
    Factored,
    Operator,
    Provenance,
    inner_product,
    tikhonov,
)
from fisherlab.operators.dense import Dense
from fisherlab.operators.iterative import IterativeInverse
from fisherlab.operators.kronecker import KroneckerSum
from fisherlab.operators.kronecker_congruence import (
    KroneckerCongruence,
    simultaneous,
)
from fisherlab.operators.network.base import (
    NetworkOperator,
    Shapes,
    Weights,
    WholeNetwork,
    tikhonov_inverse,
)
from fisherlab.operators.network.kronecker_blocks import KroneckerBlocks

Link = tuple[Float[Tensor, "_ _"], Float[Tensor, "_ _"]]  # row part, column part
Part = tuple[Tensor, Tensor, Tensor]  # bases R, C and entries e of (R ⊗ C) diag(e) (R ⊗ C)ᵀ


@final
@dataclass(frozen=True, eq=False, repr=False)
class BlockTridiagonalInverse(NetworkOperator):
    """ΞᵀΛΞ with Ξ = I − Ψ on the super-diagonal and Λ = diag(Σ_1⁻¹, …, Σ_ℓ⁻¹).

    Parameters
    ----------
    middles
        Layer name to Σ_i⁻¹, in forward order.
    regressions
        (Ψ^G_i, Ψ^A_i) of every pair of neighbours.

    Examples
    --------
    >>> from fisherlab.operators.kronecker_congruence import KroneckerCongruence
    >>> one = torch.ones(1, 1)
    >>> middles = {n: KroneckerCongruence(one, one, one) for n in "ab"}
    >>> BlockTridiagonalInverse(middles, [(one, 0.5 * one)]).to_dense().tolist()
    [[1.0, -0.5], [-0.5, 1.25]]
    """

    middles: Mapping[str, KroneckerCongruence]
    regressions: Sequence[Link]
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shapes(self) -> Shapes:
        """Layer name to (d_out, d_in)."""
        return {name: op.weight_shape for name, op in self.middles.items()}

    @property
    def product_flops(self) -> int:
        """Four products a layer and one each way along every link."""
        shapes = list(self.weight_shapes.values())
        own = sum(op.product_flops for op in self.middles.values())
        links = sum(o * p * j + o * i * j for (o, i), (p, j) in pairwise(shapes))
        return own + 2 * links

    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        """Return Ξᵀ Λ Ξ w."""
        names, middle = list(self.middles), {}
        for number, name in enumerate(names):
            w = ws[name]
            if number < len(self.regressions):
                psi, phi = self.regressions[number]
                w = w - psi @ ws[names[number + 1]] @ phi.T
            middle[name] = self.middles[name]._apply(w)
        out = dict(middle)
        for number, (psi, phi) in enumerate(self.regressions):
            later = names[number + 1]
            out[later] = out[later] - psi.T @ middle[names[number]] @ phi
        return out

    def _parts(self, name: str) -> list[Part]:
        """Return the terms of one diagonal block: Λ_i and Ψᵀ_{i-1} Λ_{i-1} Ψ_{i-1}."""
        names = list(self.middles)
        number, own = names.index(name), self.middles[name]
        parts = [(own.row_basis, own.column_basis, own.entries)]
        if number:
            psi, phi = self.regressions[number - 1]
            before = self.middles[names[number - 1]]
            parts.append(
                (psi.T @ before.row_basis, phi.T @ before.column_basis, before.entries)
            )
        return parts

    def diagonal_block(self, name: str) -> Dense:
        """Return one diagonal block, dense."""
        matrix = sum((_formed(part) for part in self._parts(name)), torch.zeros(()))
        matrix = matrix.to(dtype=self.dtype, device=self.device)
        return Dense(matrix, self.weight_shapes[name], self.provenance)

    def _beside(self, number: int) -> Float[Tensor, "p q"]:
        """Return the dense block −Λ_i Ψ_i right of the diagonal."""
        psi, phi = self.regressions[number]
        own = list(self.middles.values())[number]
        left = kron(own.row_basis, own.column_basis) * own.entries.flatten()
        right = kron(own.row_basis.T @ psi, own.column_basis.T @ phi)
        return -(left @ right)

    def _dense(self) -> Float[Tensor, "p p"]:
        p = self.shape[0]
        out = torch.zeros(p, p, dtype=self.dtype, device=self.device)
        names, at = list(self.middles), self.offsets
        for name in names:
            out[at[name], at[name]] = self.diagonal_block(name).matrix
        for number in range(len(self.regressions)):
            above, below = at[names[number]], at[names[number + 1]]
            block = self._beside(number)
            out[above, below], out[below, above] = block, block.T
        return out

    def diagonal(self) -> Float[Tensor, "p 1"]:
        """Return the diagonal; `split` cuts it into blocks."""
        found = {}
        for name in self.middles:
            parts = (r.square() @ e @ c.square().T for r, c, e in self._parts(name))
            found[name] = torch.stack(list(parts)).sum(0)
        return self.join(found)

    def trace(self) -> float:
        """Return the trace."""
        return float(self.diagonal().sum(dtype=torch.float64))

    def frobenius_norm(self) -> float:
        """Return √ΣM² from the bases, block by block of the tridiagonal."""
        total = sum(
            _overlap(left, right)
            for name in self.middles
            for left in self._parts(name)
            for right in self._parts(name)
        )
        return max(total + 2 * sum(self._squares_beside()), 0.0) ** 0.5

    def _squares_beside(self) -> Iterator[float]:
        """Yield ‖Λ_i Ψ_i‖² = tr(Λ_i Ψ_i Ψ_iᵀ Λ_i)."""
        for own, (psi, phi) in zip(self.middles.values(), self.regressions, strict=False):
            r, c, e = own.row_basis, own.column_basis, own.entries
            rows = (r.T @ r) * (r.T @ psi @ psi.T @ r)
            cols = (c.T @ c) * (c.T @ phi @ phi.T @ c)
            yield float((e * (rows @ e @ cols)).sum(dtype=torch.float64))

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return log det; Σ_i log det Σ_i⁻¹ if the damping is 0.

        Raises
        ------
        NumericalError
            If the damped matrix is not positive definite.
        """
        shift = tikhonov(damping, self)
        if shift:
            return super().logdet(shift)
        return sum(op._log_volume() for op in self.middles.values())

    def inverse(self, damping: Damping) -> WholeNetwork:
        """Return (M + damping·I)⁻¹: dense up to 2000 rows, else iterative."""
        return tikhonov_inverse(self, tikhonov(damping, self), None)


def _formed(part: Part) -> Tensor:
    rows, cols, entries = part
    basis = kron(rows, cols)
    return (basis * entries.flatten()) @ basis.T


def _overlap(left: Part, right: Part) -> float:
    """Return ⟨X, Y⟩ of two terms from the products of their bases."""
    rows, cols = left[0].T @ right[0], left[1].T @ right[1]
    return float(
        (left[2] * (rows.square() @ right[2] @ cols.square().T)).sum(dtype=torch.float64)
    )


@final
@dataclass(frozen=True, eq=False, repr=False)
class BlockTridiagonal(NetworkOperator):
    r"""F̂ of a chain of layers, from Kronecker factors of neighbours only.

    .. math:: Ψ^G_i = G_{i,i+1} G_{i+1,i+1}^+, \quad Ψ^A_i = A_{i,i+1} A_{i+1,i+1}^+

    .. math:: Σ_i = G_i \otimes A_i
              - Ψ^G_i G_{i+1} Ψ^{GT}_i \otimes Ψ^A_i A_{i+1} Ψ^{AT}_i,
              \quad Σ_ℓ = G_ℓ \otimes A_ℓ

    with A_i the second moment of the layer's own inputs. Products and damped solves are
    products of the factors; the p × p matrix is formed only if asked for.

    Parameters
    ----------
    factors
        Layer name to (G_i, A_i), in forward order.
    links
        (G_{i,i+1}, A_{i,i+1}) of every pair of neighbours.

    Raises
    ------
    ValueError
        For blocks that do not fit one another.

    Notes
    -----
    Numbers held: those of the factors and d_out(i)·d_out(i+1) + d_in(i)·d_in(i+1) a pair.
    A solve with `Factored(λ)`, the damping of the paper, costs about four solves of the
    block diagonal; with a number, conjugate gradients on F̂ + λI preconditioned with it.

    References
    ----------
    Martens & Grosse 2015, arXiv 1503.05671, section 4.3 and appendix B.

    Examples
    --------
    >>> eye, zero = torch.eye(2).double(), torch.zeros(2, 2).double()
    >>> op = BlockTridiagonal({"a": (eye, eye), "b": (eye, eye)}, [(zero, zero)])
    >>> step = op.solve({"a": eye, "b": eye}, Factored(1.0))
    >>> round(step["a"][0, 0].item(), 12)
    0.25
    """

    factors: Mapping[str, Link]
    links: Sequence[Link]
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        """Check that the links join the layers."""
        shapes = list(self.weight_shapes.values())
        expected = [((o, p), (i, j)) for (o, i), (p, j) in pairwise(shapes)]
        given = [(tuple(g.shape), tuple(a.shape)) for g, a in self.links]
        if given != expected:
            raise ValueError(
                f"BlockTridiagonal of {dict(self.weight_shapes)}: links of shapes {given} "
                f"were given, {expected} are expected."
            )

    @cached_property
    def weight_shapes(self) -> Shapes:
        """Layer name to (d_out, d_in)."""
        return {name: (len(g), len(a)) for name, (g, a) in self.factors.items()}

    @property
    def stored_numbers(self) -> int:
        """The free numbers of the factors and the numbers of the links."""
        own = sum(o * (o + 1) + i * (i + 1) for o, i in self.weight_shapes.values()) // 2
        return own + sum(g.numel() + a.numel() for g, a in self.links)

    @property
    def product_flops(self) -> int:
        """Two products a layer with Σ, and one each way along every link."""
        own = sum(2 * o * i * (o + i) for o, i in self.weight_shapes.values())
        shapes = list(self.weight_shapes.values())
        links = sum(o * p * j + o * i * j for (o, i), (p, j) in pairwise(shapes))
        return own + 2 * links

    @cached_property
    def regressions(self) -> tuple[Link, ...]:
        """Ψ^G_i and Ψ^A_i of every pair of neighbours."""
        later = list(self.factors.items())[1:]
        return tuple(
            (
                _regression(g, rows, f"the row factor of {name!r} in {self!r}"),
                _regression(a, cols, f"the column factor of {name!r} in {self!r}"),
            )
            for (g, a), (name, (rows, cols)) in zip(self.links, later, strict=True)
        )

    @cached_property
    def explained(self) -> tuple[Link, ...]:
        """(C, D) with C ⊗ D what the next layer explains of each layer but the last."""
        later = list(self.factors.values())[1:]
        return tuple(
            (psi @ g @ psi.T, phi @ a @ phi.T)
            for (psi, phi), (g, a) in zip(self.regressions, later, strict=True)
        )

    @cached_property
    def conditionals(self) -> dict[str, KroneckerSum]:
        """Σ_i of every layer."""
        found = {}
        for number, (name, (g, a)) in enumerate(self.factors.items()):
            terms = [(g, a)]
            if number < len(self.explained):
                rows, cols = self.explained[number]
                terms.append((-rows, cols))
            made = replace(self.provenance, layer=name)
            found[name] = KroneckerSum(terms, (len(g), len(a)), made)
        return found

    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        """Return Ξ⁻¹ Λ⁻¹ Ξ⁻ᵀ w: along the chain, through Σ, and back."""
        names, out = list(self.factors), {}
        carried: Tensor | None = None
        for number, name in enumerate(names):
            if carried is None:
                carried = ws[name]
            else:
                psi, phi = self.regressions[number - 1]
                carried = ws[name] + psi.T @ carried @ phi
            out[name] = self.conditionals[name]._apply(carried)
        for number in range(len(names) - 2, -1, -1):
            psi, phi = self.regressions[number]
            out[names[number]] += psi @ out[names[number + 1]] @ phi.T
        return out

    @cached_property
    def completion(self) -> KroneckerBlocks:
        """The same matrix with all its blocks as Kronecker products, none left out.

        Blocks off the tridiagonal follow from the chain: F̂_ij = Ψ_i ··· Ψ_{j-1} F̂_jj.
        """
        rows = _complete(
            [g for g, _ in self.factors.values()], [p for p, _ in self.regressions]
        )
        cols = _complete(
            [a for _, a in self.factors.values()], [p for _, p in self.regressions]
        )
        return KroneckerBlocks(rows, cols, dict(self.weight_shapes), self.provenance)

    def diagonal_block(self, name: str) -> KroneckerSum:
        """Return G_i ⊗ A_i."""
        made = replace(self.provenance, layer=name)
        return KroneckerSum((self.factors[name],), self.weight_shapes[name], made)

    def block(self, row: str, column: str) -> Float[Tensor, "p q"]:
        """Return the dense block between two layers."""
        return self.completion.block(row, column)

    def _dense(self) -> Float[Tensor, "p p"]:
        return self.completion._dense()

    def diagonal(self) -> Float[Tensor, "p 1"]:
        """Return the diagonal; `split` cuts it into blocks."""
        return self.join({n: self.diagonal_block(n).diagonal() for n in self.factors})

    def trace(self) -> float:
        """Return Σ tr G_i · tr A_i."""
        return sum(self.diagonal_block(name).trace() for name in self.factors)

    def frobenius_norm(self) -> float:
        """Return √ΣM² from the factors of all blocks."""
        return self.completion.frobenius_norm()

    def damped(self, damping: Factored) -> "BlockTridiagonal":
        """Return F̂ with the factors of every layer damped before Ψ and Σ are formed.

        The links stay as they are, as the paper has it.
        """
        factors = {name: damping.damped(*pair) for name, pair in self.factors.items()}
        return replace(self, factors=factors)

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return log det; with `Factored` or 0 it is Σ_i log det Σ_i.

        Raises
        ------
        NumericalError
            If the damped matrix is not positive definite.
        """
        if isinstance(damping, Factored):
            return self.damped(damping).logdet(0.0)
        if tikhonov(damping, self) == 0:
            return -self._exact_inverse().logdet()
        return super().logdet(tikhonov(damping, self))

    def inverse(self, damping: Damping) -> NetworkOperator:
        """Return the damped inverse.

        With `Factored` (and with 0) a `BlockTridiagonalInverse` in matrix form; with a
        number (F̂ + λI)⁻¹ by conjugate gradients, preconditioned with the former.

        Raises
        ------
        IndefiniteError
            If a factor is not positive definite; the layer is named.
        NumericalError
            If a Σ_i is not positive definite; the layer is named.
        """
        if isinstance(damping, Factored):
            return self.damped(damping)._exact_inverse()
        shift = tikhonov(damping, self)
        if shift == 0:
            return self._exact_inverse()
        near = self.damped(Factored(shift))._exact_inverse()
        made = self.provenance.inverted
        whole = IterativeInverse(self, shift, near, provenance=made)
        return WholeNetwork(whole, self.weight_shapes, made)

    def _exact_inverse(self) -> BlockTridiagonalInverse:
        middles = {}
        for number, (name, pair) in enumerate(self.factors.items()):
            what = f"layer {name!r} of {self!r}"
            second = self.explained[number] if number < len(self.explained) else None
            middles[name] = _inverse_conditional(pair, second, what)
        made = self.provenance.inverted
        return BlockTridiagonalInverse(middles, self.regressions, made)


def _regression(
    cross: Float[Tensor, "a b"], factor: Float[Tensor, "b b"], what: str
) -> Float[Tensor, "a b"]:
    """Return cross · factor⁺; directions without variance explain nothing."""
    values, vectors = eigh(factor.double(), what)
    floor = len(values) * torch.finfo(factor.dtype).eps * float(values.abs().max())
    inverse = torch.where(values > floor, values.reciprocal(), torch.zeros_like(values))
    return (cross.double() @ vectors * inverse @ vectors.T).to(cross.dtype)


def _complete(own: Sequence[Tensor], steps: Sequence[Tensor]) -> Tensor:
    """Return the matrix with blocks M_ij = S_i ··· S_{j-1} M_jj for i < j, symmetric."""
    lengths = [len(block) for block in own]
    table = torch.zeros(
        sum(lengths), sum(lengths), dtype=own[0].dtype, device=own[0].device
    )
    places = spans(lengths)
    for j, across in enumerate(places):
        table[across, across] = own[j]
        for i in range(j - 1, -1, -1):
            block = steps[i] @ table[places[i + 1], across]
            table[places[i], across], table[across, places[i]] = block, block.T
    return table


def _inverse_conditional(
    own: Link, explained: Link | None, what: str
) -> KroneckerCongruence:
    """Return (G ⊗ A − C ⊗ D)⁻¹ in the bases that diagonalise both terms.

    Raises
    ------
    IndefiniteError
        If G or A is not positive definite.
    NumericalError
        If the difference is not positive definite.
    """
    zeros = (torch.zeros_like(own[0]), torch.zeros_like(own[1]))
    (rows, cols), (more_rows, more_cols) = own, explained or zeros
    row_values, row_basis = simultaneous(rows, more_rows, False, what)
    col_values, col_basis = simultaneous(cols, more_cols, False, what)
    entries = 1 - torch.outer(row_values, col_values)
    if not bool((entries > 0).all()):
        raise NumericalError(
            f"The conditional moment of {what} is not positive definite: relative to its "
            f"own block its smallest eigenvalue is {float(entries.min()):.3g}. Increase "
            "the damping; Factored(λ) damps before the chain is formed."
        )
    kind = rows.dtype
    row_basis, col_basis = (
        factorised("inv", basis, what).mT.contiguous().to(kind)
        for basis in (row_basis, col_basis)
    )
    return KroneckerCongruence(row_basis, col_basis, entries.reciprocal().to(kind))


@inner_product(BlockTridiagonal, Operator)
def _chain_any(a: BlockTridiagonal, b: Operator) -> float:
    other = b.completion if isinstance(b, BlockTridiagonal) else b
    return a.completion.inner(other)

"""K-FAC by conjugate gradients, for recurrent layers, and by a recursion over layers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fisherlab.approximators import register
from fisherlab.approximators.base import Cost, OfSamples, OfSums, Returned, Sums, add
from fisherlab.approximators.exact import ExactBlock
from fisherlab.approximators.kfac import factor_sums, roots
from fisherlab.errors import UnsupportedModelError
from fisherlab.layers import blocks
from fisherlab.likelihoods import Likelihood
from fisherlab.operators import (
    KroneckerSamples,
    KroneckerSum,
    Operator,
    Provenance,
    SolvedByProducts,
    Stopping,
)
from fisherlab.operators.kronecker_series import Chain, KroneckerSeries
from fisherlab.samples import Samples
from fisherlab.settings import setting
from fisherlab.statistics import LayerStatistics

Variant = Literal["kfac", "exact"]


@final
@setting
class CGFAC(OfSamples[SolvedByProducts]):
    r"""The block of a variant, damped systems in it solved by conjugate gradients.

    With 𝒢 (V·N·T × d_out) and 𝒜 (N·T × d_in) the products are

    .. math:: \text{kfac: } \frac{1}{N^2 T}\, 𝒢^T 𝒢\, W 𝒜^T 𝒜, \qquad
              \text{exact: } \frac1N \sum_{vn} \langle D_{vn}, W \rangle D_{vn}

    Parameters
    ----------
    variant
        "kfac" for KFAC's matrix, "exact" for F itself.
    tolerance
        Relative residual; 1e-10 in float64 and 1e-5 in float32 if None.
    max_iterations
        A cap that ends the iteration with what it has, as the method is meant to be used
        (5 to 20). If None, a residual that is not reached is an error.

    Raises
    ------
    ValueError
        For an unknown variant, or fewer than one iteration.

    Notes
    -----
    A product costs 2·(V·N·T + N·T)·d_out·d_in for "kfac" and 4·V·N·d_out·d_in for
    "exact" at one position. Holds the samples, so it can be neither streamed nor
    averaged. ``op.solve(w, damping, start=...)`` starts from the last step's answer;
    ``op.solution(...)`` tells iterations and residual.

    References
    ----------
    Chen 2021, arXiv 2101.00218. Only its abstract could be consulted: which of the two
    variants and which stopping rule it uses is not known.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> op = fl.CGFAC(max_iterations=5)(stats["weight"])
    >>> op.solve(torch.ones(2, 4), damping=1.0)[0, 0].item()
    0.20000000298023224
    """

    needs_inputs: ClassVar[bool] = True
    result: ClassVar[Returned] = "products"

    variant: Variant = "kfac"
    tolerance: float | None = None
    max_iterations: int | None = None

    def __post_init__(self) -> None:
        """Check the variant and the cap."""
        if self.variant not in ("kfac", "exact"):
            msg = f"CGFAC(variant={self.variant!r}): 'kfac' or 'exact' is expected."
            raise ValueError(msg)
        if self.max_iterations is not None and self.max_iterations < 1:
            msg = f"CGFAC(max_iterations={self.max_iterations}): at least 1 is expected."
            raise ValueError(msg)

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> SolvedByProducts:
        """Return the block of one layer.

        Raises
        ------
        NeedsSharedForm
            For "kfac", if the block has no inputs and output gradients.
        """
        exact = self.variant == "exact"
        forward = ExactBlock()(statistics) if exact else _kfac(statistics)
        cut = self.max_iterations is not None
        stopping = Stopping(self.tolerance, self.max_iterations or 2000, cut)
        return SolvedByProducts(forward, stopping, statistics.provenance.by(repr(self)))

    def cost(self, samples: Samples) -> Cost:
        """Count nothing: the samples are all it holds."""
        return Cost(0, 0)


def _kfac(statistics: LayerStatistics) -> KroneckerSamples:
    """Return KFAC's matrix with its scale in the rows."""
    rows, cols = roots(statistics, "CGFAC(variant='kfac')", turned=True)
    rows = rows / max(statistics.positions, 1) ** 0.5
    cols = cols / statistics.count**0.5
    rows, cols = (cols, rows) if statistics.turned else (rows, cols)
    return KroneckerSamples(rows, cols, statistics.provenance.by("CGFAC"))


register.add({"cg-fac": CGFAC()})


@final
@setting
class RecurrentKFAC(OfSums[Sums, KroneckerSeries]):
    r"""KFAC with correlations in time, :math:`F \approx \sum_{|d|<T} (T - |d|) V_d`.

    .. math:: V_d = Ψ_G^d G_0 \otimes Ψ_A^d A_0, \quad V_{-d} = V_d^T, \quad
              Ψ_X = X_1 X_0^{-1}

    with the moments at equal and at neighbouring times,
    :math:`A_0 = E[a_t a_t^T], A_1 = E[a_t a_{t-1}^T]`, and G alike.

    Parameters
    ----------
    chain
        "symmetric" is the paper's option 1 (the symmetric part of
        :math:`X_0^{-1/2} X_1 X_0^{-1/2}`), "stationary" its option 2 (T → ∞ in the
        factored inverse). Singular values of that matrix are kept at most 1.

    Raises
    ------
    ValueError
        For a setting out of its range, which is named.

    Notes
    -----
    Positions must be in the order of time, as those of a layer called once a step are;
    `unrolled` makes that of a fused LSTM, GRU or RNN. T is their mean number. KFAC
    (expand) is the term d = 0, and what is left for T = 1.
    ``op.solve(w, Factored(λ))`` is the closed form of the paper.

    References
    ----------
    Martens, Ba & Johnson 2018, "Kronecker-factored curvature approximations for
    recurrent neural networks", ICLR, section 3.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.ones(4, 5, 3), None
    >>> stats = fl.collect(torch.nn.Linear(3, 2), data, fl.Gaussian())
    >>> fl.RecurrentKFAC()(stats["weight"]).length
    5
    """

    chain: Chain = "symmetric"

    def __post_init__(self) -> None:
        """Check the kind of chain."""
        if self.chain not in ("symmetric", "stationary"):
            raise ValueError(
                f"RecurrentKFAC(chain={self.chain!r}): 'symmetric' or 'stationary' is "
                "expected."
            )

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add the moments of a chunk at equal and at neighbouring times, in float64.

        Moments in float32 know a lag between a large and a small direction to 1e-3 only.
        """
        wide = statistics.to(torch.float64)
        rows, cols = factor_sums(wide, "expand", "RecurrentKFAC")
        inputs, gradients = wide.shared("RecurrentKFAC")
        now, before = gradients[:, :, 1:].flatten(0, 2), gradients[:, :, :-1].flatten(0, 2)
        row_lags = now.T @ before
        now, before = inputs[:, 1:].flatten(0, 1), inputs[:, :-1].flatten(0, 1)
        col_lags = now.T @ before if statistics.count else cols
        sums = Sums.of(wide, rows, cols, row_lags, col_lags)
        return add(state, replace(sums, precision=statistics.samples.dtype))

    def finish(self, state: Sums) -> KroneckerSeries:
        """Divide by times and by pairs of neighbours."""
        rows, cols, row_lags, col_lags = state.tensors
        times = max(state.positions, 1)
        pairs = max(state.positions - state.count, 1)
        return KroneckerSeries(
            (rows / times, row_lags / pairs),
            (cols / times, col_lags / pairs),
            max(round(times / max(state.count, 1)), 1),
            self.chain,
            state.provenance.by(repr(self)),
            state.precision,
        )


ELEMENTWISE = (
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Softplus,
    nn.Sigmoid,
    nn.Tanh,
)


def kfra(
    model: nn.Sequential, data: tuple[Tensor, Tensor | None], likelihood: Likelihood
) -> dict[str, KroneckerSum]:
    r"""Return G ⊗ A of every layer, G by the recursion of expectations.

    .. math:: G_L = E[H(z)], \quad
              G_l = (W_{l+1}^T G_{l+1} W_{l+1}) \circ E[φ'(s_l) φ'(s_l)^T], \quad
              A_l = E[a_l a_l^T]

    Parameters
    ----------
    model
        A Sequential of Linear layers and elementwise activations, ending in a Linear.
    data
        One batch (x, y); y may be None.
    likelihood
        Gives H(z), the exact output Fisher.

    Returns
    -------
    dict
        Block name to operator.

    Raises
    ------
    UnsupportedModelError
        If a module is neither a trainable Linear nor a known activation, or an input has
        more than one position.

    Notes
    -----
    Needs the model, so it is a function and no approximator. One forward pass and one
    product a layer, whatever the number of outputs. Exact for one example; elsewhere the
    expectation of the product is replaced by the product of expectations.

    References
    ----------
    Botev, Ritter & Barber 2017, arXiv 1706.03662, section 3.2.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> found = fl.kfra(model, (torch.ones(5, 3), None), fl.Categorical())
    >>> found["0"].weight_shape
    (4, 4)
    """
    names = {block.weight: name for name, block in blocks(model).items()}
    layers = list(_forward(model, data[0].detach()))
    rows = _output_factor(likelihood, layers[-1].values, data[1])
    found: dict[str, KroneckerSum] = {}
    for layer in reversed(layers):
        rows = rows * _moment(layer.slopes)
        name = names[f"{layer.path}.weight"]
        made = Provenance(
            name, "Exact()", repr(likelihood), len(layer.inputs), method="KFRA"
        )
        cols = _moment(layer.inputs)
        found[name] = KroneckerSum(((rows, cols),), (len(rows), len(cols)), made)
        weight = layer.module.weight.detach()
        rows = weight.T @ rows @ weight
    return dict(reversed(found.items()))


@dataclass(frozen=True, eq=False)
class _Layer:
    """A linear layer, its inputs with ones for the bias, and what follows it.

    Parameters
    ----------
    values
        What the activation behind the layer returns.
    slopes
        Its derivatives φ'(s).
    """

    path: str
    module: nn.Linear
    inputs: Float[Tensor, "n i"]
    values: Float[Tensor, "n o"]
    slopes: Float[Tensor, "n o"]


def _forward(model: nn.Sequential, x: Tensor) -> Iterator[_Layer]:
    """Run the network, layer by layer with the activations that follow each."""
    pieces = list(model.named_children())
    if x.dim() != 2 or not pieces or not isinstance(pieces[0][1], nn.Linear):
        raise UnsupportedModelError(
            "kfra: a Sequential that begins with a Linear layer, on inputs of shape "
            f"(examples, features), is expected; the input has shape {tuple(x.shape)}."
        )
    starts = [at for at, (_, piece) in enumerate(pieces) if isinstance(piece, nn.Linear)]
    for start, stop in zip(starts, [*starts[1:], len(pieces)], strict=True):
        path, module = pieces[start]
        assert isinstance(module, nn.Linear)
        values, slopes = _activate(module(x).detach(), pieces[start + 1 : stop])
        ones = [] if module.bias is None else [x.new_ones(len(x), 1)]
        yield _Layer(path, module, torch.cat([x, *ones], 1), values, slopes)
        x = values


def _activate(s: Tensor, pieces: Sequence[tuple[str, nn.Module]]) -> tuple[Tensor, Tensor]:
    """Return φ(s) and φ'(s) of the activations in turn."""
    with torch.enable_grad():
        leaf = s.requires_grad_()
        values = leaf * 1.0
        for path, piece in pieces:
            if not isinstance(piece, ELEMENTWISE):
                raise UnsupportedModelError(
                    f"kfra: {path!r} is a {type(piece).__name__}; only Linear layers and "
                    "elementwise activations are understood. Use KFAC instead."
                )
            values = piece(values)
        (slopes,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), slopes


def _output_factor(
    likelihood: Likelihood, output: Tensor, target: Tensor | None
) -> Float[Tensor, "c c"]:
    """Return the mean of H(z) over examples."""
    likelihood.check(output, target)
    columns = likelihood.root(output, target, slice(0, likelihood.column_count(output)))
    return torch.einsum("vni,vnj->ij", columns, columns) / len(output)


def _moment(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    return rows.T @ rows / len(rows)

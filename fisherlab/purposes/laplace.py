"""Laplace posteriors: their distance, predictive variances, evidence, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fisherlab.likelihoods import Gaussian
from fisherlab.metrics.distances import backward, forward
from fisherlab.metrics.pairs import Damped, Pair
from fisherlab.numerics.devices import chunks
from fisherlab.operators import FactoredFisher, Operator
from fisherlab.purposes.base import (
    EXAMPLES,
    Answers,
    Demand,
    Measure,
    numbers,
    of_block,
    solved_together,
    summed,
)
from fisherlab.settings import numeric
from fisherlab.showing import shown
from fisherlab.statistics import Exact, LayerStatistics, Statistics, collect
from fisherlab.statistics.batches import batches
from fisherlab.statistics.model_view import view

BINS = 15  # of the calibration error
DRAWN = 32  # examples whose influence is looked at, the same in every layer or none
LITTLE = 2e8  # multiply-adds that their solves may take, if a factorisation takes less
KEPT = 2**27  # bytes of their solutions
_SOLVED: WeakKeyDictionary[FactoredFisher, Any] = WeakKeyDictionary()
DIVERGENCES = (
    Measure(
        "kl",
        "KL(exact posterior ‖ its own)",
        0.0,
        "nat",
        "at least 0",
        meaning="KL(N(w, Σ) ‖ N(w, Σ̂)) with Σ̂ = (N(F̂ + λI))⁻¹ and Σ that of the exact "
        "block; λ = δ/N for the prior precision δ and N examples.",
    ),
    Measure(
        "reverse_kl",
        "KL(its own ‖ exact posterior)",
        0.0,
        "nat",
        "at least 0",
        meaning="The same with the two posteriors exchanged.",
    ),
    Measure(
        "log_evidence",
        "log evidence minus the exact one",
        0.0,
        "nat",
        meaning="½ log det(F + λI) − ½ log det(F̂ + λI): what the method adds to the log "
        "marginal likelihood of the Laplace approximation.",
    ),
)
VARIANCES = (
    Measure(
        "variance_error",
        "mean relative error of variances",
        0.0,
        meaning="Of JΣ̂Jᵀ beside JΣJᵀ over outputs of held-out examples; J is the Jacobian "
        "of an output, Σ the posterior covariance.",
    ),
    Measure(
        "worst_variance_error",
        "worst relative error of variances",
        0.0,
        meaning="The largest of the same.",
    ),
)
PREDICTIVE = (
    Measure(
        "nll",
        "negative log-likelihood minus the exact one",
        0.0,
        "nat",
        meaning="Of held-out labels under the probit predictive, mean over the examples; "
        "below 0 the method predicts better than the exact block.",
    ),
    Measure(
        "calibration",
        "calibration error minus the exact one",
        0.0,
        meaning="Of the same predictive: gaps between confidence and accuracy in "
        f"{BINS} bins, weighted by their examples.",
    ),
)


@shown
@final
@dataclass(frozen=True, eq=False)
class HeldOut:
    """What predictions on held-out data need: output Jacobians, outputs and labels.

    Parameters
    ----------
    jacobians
        Statistics whose columns are the rows of the Jacobian of the outputs.
    outputs
        (N, K), the outputs f(x); without labels of any shape (N, ...).
    labels
        (N,), classes; None without, and for outputs that are no classes.

    Raises
    ------
    ValueError
        For labels that are no classes of the outputs.

    Examples
    --------
    >>> data = torch.ones(5, 3).double(), torch.zeros(5).long()
    >>> HeldOut.of(torch.nn.Linear(3, 2).double(), data).outputs.shape
    torch.Size([5, 2])
    """

    jacobians: Statistics
    outputs: Float[Tensor, "n ..."] = field(repr=False)
    labels: Int[Tensor, " n"] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse labels for which the probit predictive has no probability."""
        if self.labels is None:
            return
        shape, labels = tuple(self.outputs.shape), self.labels
        whole = not (labels.is_floating_point() or labels.dtype == torch.bool)
        fits = len(shape) == 2 and shape[1] > 1 and labels.shape == shape[:1]
        if whole and fits and bool(((labels >= 0) & (labels < shape[1])).all()):
            return
        raise ValueError(
            f"HeldOut: labels of shape {tuple(labels.shape)} and dtype {labels.dtype} were "
            f"given for outputs of shape {shape}; one class an example is expected, of two "
            "or more outputs (N, K). Without labels (None) variances are judged alone."
        )

    @classmethod
    def of(
        cls, model: nn.Module, data: Any, layers: Sequence[str] | None = None
    ) -> HeldOut:
        """Collect it from a model and held-out data, as `fl.collect` takes them."""
        seen = view(model, None)
        given = list(batches(data, seen.device, seen.dtype, model=seen.model))
        found = collect(
            model,
            [(batch.x, None) for batch in given],
            Gaussian(),
            Exact(),
            layers=layers,
            compress=False,
        )
        with torch.no_grad():
            outputs = torch.cat([seen(batch) for batch in given])
        labels = [batch.y for batch in given if batch.y is not None]
        return cls(found, outputs, torch.cat(labels) if labels else None)


@shown
@numeric
@final
@dataclass(frozen=True, eq=False)
class Laplace:
    r"""A Laplace posterior N(w, (N F̂ + δI)⁻¹) in the place of the exact block's.

    .. math:: Σ̂ = \frac1N (F̂ + λI)^{-1}, \quad λ = δ/N, \qquad
              \mathrm{var} f_k(x) = J_k(x) Σ̂ J_k(x)^T

    λ is no choice here: the prior precision and the number of data fix it. With held-out
    data the linearised predictive is judged too; its classes by the probit approximation
    ``softmax(f_k / √(1 + π var f_k / 8))``.

    Parameters
    ----------
    prior_precision
        δ of a prior N(0, δ⁻¹I).
    data_size
        N, the number of training examples whose losses are summed in the posterior.
    held_out
        For predictive variances, and with labels for likelihood and calibration.

    Raises
    ------
    ValueError
        For a prior precision or a data size that is not positive.

    References
    ----------
    Daxberger et al. 2021, arXiv 2106.14806, section 2; MacKay 1992 for the probit form.

    Examples
    --------
    >>> Laplace(prior_precision=2.0, data_size=100).damping
    0.02
    """

    prior_precision: float
    data_size: int
    held_out: HeldOut | None = None

    name: ClassVar[str] = "laplace"

    def __post_init__(self) -> None:
        """Refuse a prior or a data set that is none."""
        if not (self.prior_precision > 0 and self.data_size > 0):
            raise ValueError(
                f"Laplace: prior_precision={self.prior_precision!r} and data_size="
                f"{self.data_size!r} were given; positive numbers are expected."
            )

    @property
    def damping(self) -> float:
        """λ = δ/N."""
        return self.prior_precision / self.data_size

    @property
    def setting(self) -> str:
        """Prior, λ and held-out examples in words."""
        said = (
            f"prior precision {self.prior_precision:g} over {self.data_size:,} examples, "
            f"λ = {self.damping:.3g}"
        )
        if self.held_out is None:
            return said
        count = len(self.held_out.outputs)
        return f"{said}, variances on {count:,} held-out example{'s' * (count != 1)}"

    def demand(self, layer: LayerStatistics) -> Demand:
        """Count the traces of divergences, and a solve a held-out output."""
        weights = 0
        if self.held_out is not None and layer.name in self.held_out.jacobians:
            samples = self.held_out.jacobians[layer.name].samples
            weights = samples.total
        return Demand(weights=weights, influences=True, divergences=True)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Divergences and evidence; more with held-out data and labels."""
        if self.held_out is None:
            return DIVERGENCES
        labelled = self.held_out.labels is not None
        return DIVERGENCES + VARIANCES + PREDICTIVE * labelled

    def answers(self, layer: LayerStatistics, pair: Pair) -> Answers:
        """Return the divergences from the exact posterior, log det and variances."""
        damped = pair.damped(self.damping)
        # Covariances are inverses: the divergence of posteriors is that of P and Q turned.
        found = numbers(
            kl=lambda: backward(damped),
            reverse_kl=lambda: forward(damped),
            logdet=lambda: damped.logdets[1],
        )
        if self.held_out is not None:
            found["variances"] = self._variances(layer, damped)
        drawn = [] if pair.same or found["kl"].isnan() else drawn_examples(pair.exact)
        if drawn:  # the inverse that divergences took is there
            found[EXAMPLES] = _influences(damped, drawn)
        return found

    def _variances(self, layer: LayerStatistics, damped: Damped) -> Float[Tensor, "k n"]:
        """Return J (F̂ + λI)⁻¹ Jᵀ / N for every output and held-out example."""
        assert self.held_out is not None
        jacobians = of_block(
            "Laplace", "held-out data", self.held_out.jacobians, layer.name
        )
        samples = jacobians.samples.to(torch.float64)
        most, found = solved_together(samples), []
        for columns in chunks(samples.columns, most):
            some = samples.some_columns(columns)
            parts = chunks(some.examples, max(1, most // some.columns))
            rows = (some.matrices(part) for part in parts)
            forms = [(w * damped.solve(w)).sum((-2, -1)) for w in rows]
            found.append(torch.cat(forms, 1))
        return torch.cat(found) / self.data_size

    def joined(self, blocks: Sequence[Answers]) -> Answers:
        """Add everything: blocks are independent under a block-diagonal posterior."""
        return summed(blocks)

    def influences(self, exact: Answers, approx: Answers) -> Float[Tensor, " n"]:
        r"""Return what some random examples move KL(exact ‖ own) by, scaled to all.

        .. math:: ½ \mathrm{tr}\left[(P^{-1} - P^{-1} Q P^{-1}) \mathrm{d}F\right]

        where an example adds F_n to F and Q is held as it is; nothing (0,) where they are
        too dear or not known.
        """
        return Tensor(approx.get(EXAMPLES, torch.empty(0)))

    def measure(self, exact: Answers, approx: Answers) -> dict[str, float]:
        """Return divergences, evidence and errors of the predictive."""
        found = {name: float(approx[name]) for name in ("kl", "reverse_kl")}
        found["log_evidence"] = float(exact["logdet"] - approx["logdet"]) / 2
        if self.held_out is None:
            return found
        true, own = exact["variances"], approx["variances"]
        errors = ((own - true).abs() / true)[true > 0]
        found["variance_error"] = float(errors.mean()) if len(errors) else float("nan")
        found["worst_variance_error"] = float(errors.max()) if len(errors) else float("nan")
        if self.held_out.labels is not None:
            mine, other = (self._predicted(v) for v in (true, own))
            found["nll"] = other[0] - mine[0]
            found["calibration"] = other[1] - mine[1]
        return found

    def _predicted(self, variances: Float[Tensor, "k n"]) -> tuple[float, float]:
        """Return negative log-likelihood and calibration error of the probit predictive."""
        assert self.held_out is not None
        outputs, labels = self.held_out.outputs.to(torch.float64), self.held_out.labels
        assert labels is not None
        scaled = outputs / (1 + torch.pi / 8 * variances.T).sqrt()
        return float(F.cross_entropy(scaled, labels)), calibration_error(
            scaled.softmax(1), labels
        )


def drawn_examples(exact: Operator) -> list[int]:
    """Return random examples whose influence is looked at; none where that is dear.

    Examples
    --------
    >>> from fisherlab.samples import OuterSamples
    >>> samples = OuterSamples(torch.ones(100, 4), torch.ones(1, 100, 3))
    >>> len(drawn_examples(FactoredFisher(samples, 100)))
    32
    """
    if not isinstance(exact, FactoredFisher):
        return []
    samples, p, m = exact.samples, exact.shape[0], exact.samples.total
    factorised = p**3 / 3 + samples.dense_flops()
    product: float = p * p
    if exact.uses_gram:
        factorised = m**3 / 3 + samples.gram_flops()
        product = samples.product_work() + m * m
    work = max(factorised, LITTLE)
    each = samples.columns * max(product / work, 8 * p / KEPT)
    count = min(samples.examples, DRAWN)
    if count * each > 1:
        return []
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(samples.examples, generator=generator, device="cpu")
    return [int(n) for n in order[:count]]


def _influences(damped: Damped, drawn: Sequence[int]) -> Float[Tensor, " n"]:
    """Return ½ dᵀ(P⁻¹ − P⁻¹QP⁻¹)d of examples, centred, as if they were all."""
    exact = damped.pair.exact
    assert isinstance(exact, FactoredFisher)
    solved, inside = _solved(exact, damped.damping, drawn)
    turned = damped.pair.approx @ solved + damped.damping * solved
    terms = (inside - (solved * turned).sum((-2, -1))).sum(0) / (2 * exact.count)
    return (terms - terms.mean()) * (exact.samples.examples / len(drawn)) ** 0.5


def _solved(
    exact: FactoredFisher, damping: float, drawn: Sequence[int]
) -> tuple[Float[Tensor, "v n o i"], Float[Tensor, "v n"]]:
    """Return P⁻¹d and dᵀP⁻¹d of examples, once for all methods."""
    if exact not in _SOLVED or _SOLVED[exact][0] != damping:
        rows = torch.cat([exact.samples.matrices(slice(n, n + 1)) for n in drawn], 1)
        found = exact.inverse(damping) @ rows
        _SOLVED[exact] = damping, (found, (rows * found).sum((-2, -1)))
    return _SOLVED[exact][1]


def calibration_error(
    probabilities: Float[Tensor, "n k"], labels: Int[Tensor, " n"]
) -> float:
    """Return Σ_b (n_b/N) |accuracy_b − confidence_b| over bins of confidence.

    References
    ----------
    Guo et al. 2017, arXiv 1706.04599, equation 3, with 15 bins of equal width.

    Examples
    --------
    >>> certain = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> calibration_error(certain, torch.tensor([0, 1]))
    0.5
    """
    confidence, chosen = probabilities.max(1)
    hits = (chosen == labels).to(confidence.dtype)
    bins = (confidence * BINS).ceil().clamp(1, BINS).long()
    gaps = confidence.new_zeros(BINS + 1).index_add(0, bins, hits - confidence)
    return float(gaps.abs().sum()) / len(labels)

"""Collect per-example gradients of a model over data, batch by batch, chunk by chunk."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.errors import NumericalError, UnsupportedModelError
from fisherlab.layers import Block, select
from fisherlab.layers import blocks as blocks_of
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.memory import Budget, chunks, parse_budget, require
from fisherlab.operators.base import Provenance
from fisherlab.statistics import per_example, taps
from fisherlab.statistics.batches import Batch, batches
from fisherlab.statistics.fishers import Exact, Fisher
from fisherlab.statistics.model_view import ModelView, view
from fisherlab.statistics.probe import Probe, probe
from fisherlab.statistics.values import (
    LayerStatistics,
    MeanGradient,
    Statistics,
    join_columns,
    join_examples,
)

Progress = bool | Callable[[int], Any]
EXAMPLES = 2048  # examples per forward pass: gradients stay in cache
COLUMN_BYTES = 64 * 2**20  # output columns held at once
MATRIX_BYTES = 256 * 2**20  # per-example matrices formed at once


@dataclass(frozen=True, eq=False)
class _Job:
    """Everything that stays the same from batch to batch."""

    view: ModelView
    blocks: Mapping[str, Block]
    likelihood: Likelihood
    fisher: Fisher
    provenance: Provenance
    chunk_size: int | None
    budget: int

    def at_once(self, likelihood_columns: int) -> int:
        """Return how many columns are pulled back together on this device."""
        return 1 if self.view.device.type == "cpu" else min(likelihood_columns, 64)


def collect(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    fisher: Fisher | None = None,
    *,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    budget: Budget = None,
    progress: Progress = False,
) -> Statistics:
    r"""Collect the per-example gradients that make up the Fisher of every block.

    .. math:: F = \frac{1}{N} \sum_{vn} vec(D_{vn}) vec(D_{vn})^T,
              \quad D_{vn} = \sum_t g_{vnt} a_{nt}^T

    Parameters
    ----------
    model
        Any module that returns one tensor with the example in axis 0. It is left as it
        was found.
    data
        A tuple (x, y), or an iterable of such pairs. x may be a tensor, a tuple or a
        dict of tensors; y may be None where labels are not needed.
    likelihood
        `Categorical()`, `Bernoulli()` or `Gaussian()`.
    fisher
        `Exact()` (default), `MonteCarlo(samples, seed)` or `Empirical()`.
    layers
        Block names or module prefixes; all blocks by default.
    dtype
        Precision of the whole computation; the model's by default.
    chunk_size
        Examples per forward pass; chosen by default.
    budget
        Bytes the statistics may take, a number or "4 GiB"; half of the free memory by
        default.
    progress
        True for a bar, or a callable that is given the number of examples done.

    Returns
    -------
    Statistics
        A mapping from block names to `LayerStatistics`.

    Raises
    ------
    ValueError
        For empty data, NaN in data or weights, labels that do not fit, unknown layers.
    UnsupportedModelError
        For train-mode batch norm, active dropout, or an output that is not one tensor
        by examples.
    BudgetError
        If the statistics would exceed the budget; the remedies are named.

    Notes
    -----
    One forward pass, then V backward passes that stop at the layer outputs. Memory is
    N·T·(d_in + V·d_out) numbers a block in the shared form, V·N·p otherwise.

    Examples
    --------
    >>> from fisherlab.likelihoods import Categorical
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    >>> stats = collect(model, (torch.ones(5, 4), None), Categorical())
    >>> stats["2"].gradients.shape
    torch.Size([1, 5, 1, 2])
    """
    held: dict[str, list[LayerStatistics]] = {}
    columns: dict[str, list[LayerStatistics]] = {}
    taken = 0
    limit = parse_budget(budget, next(model.parameters(), torch.empty(0)).device)
    for pieces in stream(
        model,
        data,
        likelihood,
        fisher,
        layers=layers,
        dtype=dtype,
        chunk_size=chunk_size,
        budget=limit,
        progress=progress,
    ):
        for name, piece in pieces.items():
            if piece.count:  # a new run of examples: close the one before
                _close(held, columns, name)
                columns[name] = []
            columns[name].append(piece)
            if len(columns[name]) > 1:
                columns[name] = [join_columns(columns[name])]
            taken += piece.nbytes
        require(
            taken, limit, "collect", "Use fewer layers or MonteCarlo, or approximate()."
        )
    for name in list(columns):
        _close(held, columns, name)
    joined = {name: join_examples(held.pop(name)) for name in list(held)}
    examples = max(layer.count for layer in joined.values())
    made = replace(next(iter(joined.values())).provenance, layer="", examples=examples)
    return Statistics(joined, made)


def _close(
    held: dict[str, list[LayerStatistics]],
    columns: dict[str, list[LayerStatistics]],
    name: str,
) -> None:
    if columns.get(name):
        held.setdefault(name, []).append(join_columns(columns[name]))


def stream(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    fisher: Fisher | None = None,
    *,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    budget: Budget = None,
    progress: Progress = False,
) -> Iterator[dict[str, LayerStatistics]]:
    """Yield statistics of chunks of examples and columns, as `collect` joins them.

    Further columns of the same examples carry ``count=0``, so that sums over pieces
    count every example once. Parameters, errors and costs are those of `collect`.

    Examples
    --------
    >>> from fisherlab.likelihoods import Gaussian
    >>> pieces = stream(nn.Linear(4, 2), (torch.ones(5, 4), None), Gaussian())
    >>> [(name, p.count) for piece in pieces for name, p in piece.items()]
    [('weight', 5)]
    """
    if chunk_size is not None and chunk_size < 1:
        msg = f"chunk_size={chunk_size}: a positive number of examples is expected."
        raise ValueError(msg)
    seen = view(model, dtype)
    job = _Job(
        seen,
        select(blocks_of(model), layers),
        likelihood,
        fisher or Exact(),
        _provenance(likelihood, fisher or Exact()),
        chunk_size,
        parse_budget(budget, seen.device),
    )
    if not job.blocks:
        raise UnsupportedModelError("The model has no trainable parameters.")
    report, finish = _reporter(progress)
    known: tuple[Any, Probe] | None = None
    try:
        for batch in batches(data, seen.device, seen.dtype):
            if known is None or known[0] != batch.signature:
                known = (batch.signature, probe(seen, job.blocks, batch))
            for part in chunks(len(batch), chunk_size or EXAMPLES):
                yield from _pieces(job, known[1], batch.part(part))
                report(part.stop - part.start)
    finally:
        finish()


def _pieces(job: _Job, found: Probe, batch: Batch) -> Iterator[dict[str, LayerStatistics]]:
    """Yield one run of examples, cut into chunks of columns."""
    done = taps.forward(job.view, found.tapped, batch)
    output = done.output.detach()
    _check_output(job, output, batch)
    inputs = {name: taps.features(t, done.inputs[name]) for name, t in found.tapped.items()}
    total = job.fisher.column_count(job.likelihood, output)
    size = max(1, COLUMN_BYTES // max(1, output.nbytes))
    for part in chunks(total, size) if total else [slice(0, 0)]:
        columns = job.fisher.columns(
            job.likelihood, output, batch.y, batch.first, part
        ).detach()
        count = len(batch) if part.start == 0 else 0
        pieces = _shared_pieces(job, found, done, inputs, columns, count)
        pieces |= _general_pieces(job, found, batch, columns, count)
        yield {name: pieces[name] for name in job.blocks}


def _shared_pieces(
    job: _Job,
    found: Probe,
    done: taps.Pass,
    inputs: Mapping[str, Tensor],
    columns: Tensor,
    count: int,
) -> dict[str, LayerStatistics]:
    if not found.tapped:
        return {}
    gradients = taps.pull(done, found.tapped, columns, job.at_once(len(columns)))
    return {
        name: LayerStatistics(
            job.blocks[name],
            count,
            inputs=inputs[name],
            gradients=gradients[name],
            positions=count * inputs[name].shape[1],
            provenance=replace(job.provenance, layer=name, examples=count),
        )
        for name in found.tapped
    }


def _general_pieces(
    job: _Job, found: Probe, batch: Batch, columns: Tensor, count: int
) -> dict[str, LayerStatistics]:
    blocks = {name: job.blocks[name] for name in found.general}
    if not blocks:
        return {}
    numbers = sum(b.weight_shape[0] * b.weight_shape[1] for b in blocks.values())
    each = max(1, len(columns) * numbers * columns.element_size())
    require(
        each * len(batch),
        job.budget,
        f"Per-example gradients of {', '.join(blocks)}",
        "Choose other layers, fewer examples or MonteCarlo.",
    )
    size = job.chunk_size or max(1, MATRIX_BYTES // each)
    formed: dict[str, list[Tensor]] = {name: [] for name in blocks}
    for part in chunks(len(batch), size):
        found_here = per_example.matrices(
            job.view, blocks, batch.part(part), columns[:, part]
        )
        for name, matrices in found_here.items():
            formed[name].append(matrices)
    return {
        name: LayerStatistics(
            blocks[name],
            count,
            matrices=pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1),
            positions=count,
            provenance=replace(job.provenance, layer=name, examples=count),
        )
        for name, pieces in formed.items()
    }


def _check_output(job: _Job, output: Tensor, batch: Batch) -> None:
    if output.shape[0] != len(batch):
        raise UnsupportedModelError(
            f"For {len(batch)} examples the model's output has shape "
            f"{tuple(output.shape)}; axis 0 must be the example."
        )
    if not bool(torch.isfinite(output).all()):
        raise NumericalError(
            "The model's output holds NaN or infinity, although data and weights are "
            "finite. Look for an overflow in the forward pass."
        )
    job.likelihood.check(output, batch.y)


def _provenance(likelihood: Likelihood, fisher: Fisher) -> Provenance:
    seed = getattr(fisher, "seed", None)
    return Provenance(fisher=repr(fisher), likelihood=repr(likelihood), seed=seed)


def _reporter(progress: Progress) -> tuple[Callable[[int], Any], Callable[[], Any]]:
    if callable(progress):
        return progress, lambda: None
    if not progress:
        return (lambda _: None), (lambda: None)
    from tqdm.auto import tqdm

    bar = tqdm(unit=" examples", desc="Fisher statistics")
    return bar.update, bar.close


def mean_gradient(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    *,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, MeanGradient]:
    """Return the gradient of the mean loss, (1/N) Σ_n ∇ℓ_n, block by block.

    Parameters and errors are those of `collect`; labels are needed.

    Examples
    --------
    >>> from fisherlab.likelihoods import Gaussian
    >>> data = (torch.ones(5, 4), torch.zeros(5, 2))
    >>> mean_gradient(nn.Linear(4, 2), data, Gaussian())["weight"].weight_shape
    (2, 5)
    """
    seen = view(model, dtype)
    blocks = select(blocks_of(model), layers)
    names = [name for block in blocks.values() for name in block.parameters]
    leaves = {name: seen.parameters[name].clone().requires_grad_() for name in names}
    totals = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    count = 0
    for whole in batches(data, seen.device, seen.dtype):
        for part in chunks(len(whole), EXAMPLES):
            batch = whole.part(part)
            if batch.y is None:
                msg = "mean_gradient needs the data's labels, but y is None."
                raise ValueError(msg)
            with torch.enable_grad():
                output = seen(batch, leaves)
                likelihood.check(output, batch.y)
                loss = likelihood.loss(output, batch.y).sum()
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for total, grad in zip(totals.values(), grads, strict=True):
                if grad is not None:
                    total.add_(grad)
            count += len(batch)
    made = Provenance(likelihood=repr(likelihood), examples=count, method="mean gradient")
    means = {name: total / count for name, total in totals.items()}
    return {
        name: MeanGradient(block, block.pack(means), count, replace(made, layer=name))
        for name, block in blocks.items()
    }

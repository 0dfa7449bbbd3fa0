"""Collect per-example gradients of a model over data, or the gradient of the mean loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fisherlab.errors import NumericalError
from fisherlab.layers import Block, alone, in_turn, select, uncompiled
from fisherlab.layers import blocks as blocks_of
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.devices import Budget, Held, chunks, parse_budget, readable, require
from fisherlab.operators.base import Provenance
from fisherlab.settings import numeric
from fisherlab.showing import html_table
from fisherlab.statistics import recorder, storing, taps
from fisherlab.statistics.batches import Batch, Progress, batches, length, reporter
from fisherlab.statistics.fishers import Empirical, Exact, Fisher, require_kinds
from fisherlab.statistics.model_view import ModelView, require_repeatable, view
from fisherlab.statistics.network import Statistics, gathered, require_equal
from fisherlab.statistics.probe import (
    OtherUses,
    Probe,
    differentiable,
    leads_to,
    probe,
    pull,
    require_independence,
)
from fisherlab.statistics.recorder import Pass
from fisherlab.statistics.storing import identity
from fisherlab.statistics.values import LayerStatistics

Planned = Callable[[dict[str, LayerStatistics], int], None]
EXAMPLES = 2000  # doubles of one feature in a run: they stay in cache (no power of two)
COLUMN_BYTES = 64 * 2**20  # output columns held at once
MATRIX_BYTES = 256 * 2**20  # per-example matrices formed at once
WORKING_BYTES = 2**30  # activations held at once
PIECE_BYTES = 2**30  # output gradients held at once
PASS_BYTES = 48 * 2**20  # activations of one forward pass on a CPU: they stay in cache


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
    by_column: bool
    planned: Planned | None

    def at_once(self, likelihood_columns: int) -> int:
        """Return how many columns are pulled back together on this device."""
        return 1 if self.view.device.type == "cpu" else min(likelihood_columns, 64)

    def piece_columns(self, found: Probe, output: Tensor) -> int:
        """Return how many columns one piece holds, so that it stays within its bytes."""
        fine = output.dtype not in (torch.float16, torch.bfloat16)  # many small sums
        if self.by_column and fine and not found.general and self.at_once(2) == 1:
            return 1
        gradients = max(1, found.column_bytes * len(output))
        held = min(PIECE_BYTES, self.budget // 2) // gradients
        return max(1, min(held, COLUMN_BYTES // max(1, output.nbytes)))

    def pass_length(self, found: Probe, examples: int) -> int:
        """Return how many examples one forward pass takes: equal parts, kept in cache."""
        if self.view.device.type != "cpu":
            return examples
        passes = -(-examples * found.example_bytes // PASS_BYTES)
        return -(-examples // max(1, passes))


@numeric
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
    compress: bool = True,
    check_deterministic: bool = False,
    first: int = 0,
    probes: dict[Any, Probe] | None = None,
    store: str | Path | None = None,
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
    compress
        Whether a layer used at one position may keep d_out columns with the same
        Σ_v g gᵀ in place of V > d_out; cross-layer blocks need the columns themselves.
    check_deterministic
        Whether to run the first two batches twice and to name the layer that differs.
    first
        Index of the first example: labels that are sampled depend on it alone, so parts
        of the data that are collected apart have those of the whole.
    probes
        A dict that keeps what was found out about the model, for the next call with the
        same model, layers and shapes of data; an optimiser collects at every step.
    store
        A folder for statistics larger than memory: they are written there in parts of a
        sixteenth of the budget (at most 256 MiB) and read part by part by whatever is
        asked of them. A folder of an earlier call with the same arguments is verified
        and opened, and nothing is computed.

    Returns
    -------
    Statistics
        A mapping from block names to `LayerStatistics`.

    Raises
    ------
    TypeError
        If the likelihood or the Fisher is no value of its kind.
    ValueError
        For empty data, NaN in data or weights, labels that do not fit, unknown layers.
    UnsupportedModelError
        For a model without trainable parameters, train-mode batch norm, active dropout,
        an output that is not one tensor by examples, or examples that depend on one
        another.
    NumericalError
        If the output is not finite, or two runs differ where that is checked.
    BudgetError
        If the statistics would exceed the budget; the remedies are named.
    DataError
        If the folder to store in is damaged, or holds other statistics.

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
    device = next(uncompiled(model).parameters(), torch.empty(0)).device
    limit = parse_budget(budget, device)
    run = partial(
        stream,
        model,
        data,
        likelihood,
        fisher,
        layers=layers,
        dtype=dtype,
        budget=limit,
        progress=progress,
        first=first,
        check_deterministic=check_deterministic,
        probes=probes,
    )
    if store is not None:
        storing.require_repeatable(data)
        about = {"layers": layers, "dtype": dtype, "first": first, "compress": compress}
        known = identity(model, data, likelihood, fisher or Exact(), **about)
        return storing.kept(
            Path(store).expanduser(), known, run, chunk_size, limit, compress
        )
    return gathered(run, chunk_size, length(data), limit, compress)


@numeric
@in_turn
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
    check_deterministic: bool = False,
    first: int = 0,
    probes: dict[Any, Probe] | None = None,
    by_column: bool = False,
    planned: Planned | None = None,
) -> Iterator[dict[str, LayerStatistics]]:
    """Yield statistics of chunks of examples and columns, as `collect` joins them.

    Further columns of the same examples carry ``count=0``, so that sums over pieces
    count every example once. Parameters, errors and costs are those of `collect`; with
    `by_column` a piece holds one column where columns are pulled back one by one (a CPU,
    shared forms alone), which is fastest for sums over columns: nothing is copied. The
    first piece of every run is shown to `planned`, with how many columns follow in all.

    Examples
    --------
    >>> from fisherlab.likelihoods import Gaussian
    >>> pieces = stream(nn.Linear(4, 2), (torch.ones(5, 4), None), Gaussian())
    >>> [(name, p.count) for piece in pieces for name, p in piece.items()]
    [('weight', 5)]
    """
    if chunk_size is not None and (chunk_size < 1 or chunk_size != int(chunk_size)):
        msg = f"chunk_size={chunk_size}: a positive number of whole examples is expected."
        raise ValueError(msg)
    require_kinds(likelihood, fisher)
    seen = view(model, dtype)
    job = _Job(
        seen,
        select(blocks_of(model), layers),
        likelihood,
        fisher or Exact(),
        Provenance.of(fisher or Exact(), likelihood),
        chunk_size,
        parse_budget(budget, seen.device),
        by_column,
        planned,
    )
    report, finish = reporter(progress)
    known: dict[Any, tuple[_Job, Probe]] = {}
    kept = {} if probes is None else probes
    found_in = batches(data, seen.device, seen.dtype, first, seen.model)
    try:
        for number, batch in enumerate(found_in):
            checked = check_deterministic and number < 2
            if batch.signature not in known:
                known[batch.signature] = _probed(job, batch, checked, kept)
            job, found = known[batch.signature]
            for part in chunks(len(batch), job.chunk_size or run_length(found, job.budget)):
                run = batch.part(part)
                pieces = _pieces(job, found, run)
                if run.first == first:
                    found, pieces = _begun(job, found, run)
                    kept[batch.signature] = found.settled()
                if checked and part.start == 0:
                    _require_same(job, found, run)
                yield from pieces
                found = found.settled()  # its example was in this run
                known[batch.signature] = job, found
                report(part.stop - part.start)
    finally:
        finish()


def _probed(
    job: _Job, batch: Batch, checked: bool, kept: dict[Any, Probe]
) -> tuple[_Job, Probe]:
    """Decide the forms of the blocks, and refuse examples that are not independent."""
    known = kept.get(batch.signature)
    found = known or probe(job.view, job.blocks, batch)
    job = replace(job, view=replace(job.view, copies_data=found.overwrites_data))
    if checked:
        _require_same(job, found, batch.part(slice(0, 2)))
    if known is None:
        require_independence(found.alone, found.output[:1])
        kept[batch.signature] = found.settled()
    return job, found


def _begun(
    job: _Job, found: Probe, batch: Batch
) -> tuple[Probe, Iterator[dict[str, LayerStatistics]]]:
    """Collect the first piece of all, and take blocks example by example if it needs to.

    Experts that not all examples are sent to have no shared form, which two examples do
    not show.
    """
    apart: list[str] = []
    while True:
        pieces = _pieces(job, found, batch)
        try:
            begun = next(pieces)
        except OtherUses as other:
            apart += other.names
            found = probe(job.view, job.blocks, batch, apart)
        else:
            return found, chain([begun], pieces)


def _require_same(job: _Job, found: Probe, batch: Batch) -> None:
    """Compare two runs of the same examples layer by layer, before other examples."""
    require_equal(*(next(_pieces(job, found.settled(), batch)) for _ in range(2)))


def run_length(found: Probe, budget: int) -> int:
    """Return how many examples are collected together."""
    cached = EXAMPLES * 8 // found.output.element_size()
    return max(1, min(cached, min(WORKING_BYTES, budget // 2) // found.example_bytes))


def _pieces(job: _Job, found: Probe, batch: Batch) -> Iterator[dict[str, LayerStatistics]]:
    """Yield one run of examples, cut into chunks of columns."""
    tapped = {name: job.blocks[name] for name in found.tapped}
    passes = []
    for part in chunks(len(batch), job.pass_length(found, len(batch))):
        passes.append(_passed(job, found, tapped, batch.part(part)))
    output = torch.cat([done.output.detach() for done in passes])
    _check_output(job, output, batch)
    if len(found.alone):
        _require_alone(job, found.alone, batch, passes[0].output.detach())
    mask = job.likelihood.mask(output, batch.y) if tapped else None
    with job.view.settings():  # a checkpoint calls its part of the model again
        layers = taps.described(tapped, found.tapped, passes, batch, mask, job.provenance)
    count, total = len(batch), job.fisher.column_count(job.likelihood, output)
    for columns in _columns(job, found, batch, output):
        many = job.at_once(len(columns))
        with job.view.settings():
            gradients = taps.pull(passes, found.tapped, columns, many)
        pieces = {name: made(gradients[name], count) for name, made in layers.items()}
        pieces |= _general_pieces(job, found, batch, columns, count)
        if count and job.planned:
            job.planned(pieces, total)
        yield {name: pieces[name] for name in job.blocks}
        count = 0  # of further columns


def _require_alone(job: _Job, first: Tensor, batch: Batch, output: Tensor) -> None:
    """Hold the first and the last example of a pass against what they give alone.

    What couples examples but for the first (a sum of all before, `x[1:]`) reaches the last.
    """
    count = len(output)
    require_independence(first, output[:1], partial(_copies, job, batch, 0, count))
    if count > 1:
        many = partial(_copies, job, batch, count - 1)
        require_independence(many(1), output[-1:], partial(many, count))


def _copies(job: _Job, batch: Batch, example: int, count: int) -> Tensor:
    """Return what an example gives among so many copies of it, at its own place."""
    done = recorder.forward(job.view, {}, batch.part([example] * count))
    place = min(example, count - 1)
    return done.output[place : place + 1].detach()


def _passed(job: _Job, found: Probe, blocks: Mapping[str, Block], batch: Batch) -> Pass:
    """Run some examples forward, and see that they use the weights as the first two did.

    Raises
    ------
    OtherUses
        If they do not: what was found out about the model does not hold for them.
    """
    leaves = job.view.leaves(blocks)
    done = recorder.forward(job.view, blocks, batch, leaves)
    left = leads_to(done.output, leaves)
    other = [
        name
        for name, block in blocks.items()
        if not found.tapped[name].fits(done.calls[name], len(batch))
        or name in done.unseen
        or not left.isdisjoint(block.parameters)
    ]
    if other:
        raise OtherUses(other, batch.first, batch.first + len(batch) - 1)
    return done


def _columns(job: _Job, found: Probe, batch: Batch, output: Tensor) -> Iterator[Tensor]:
    """Yield the columns of each piece; one empty run of them if there are none."""
    total = job.fisher.column_count(job.likelihood, output)
    size = max(1, COLUMN_BYTES // max(1, output.nbytes))
    held = job.piece_columns(found, output)
    for part in chunks(total, size) if total else [slice(0, 0)]:
        columns = job.fisher.columns(
            job.likelihood, output, batch.y, batch.first, part
        ).detach()
        yield from columns.split(held)


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
    most = min(MATRIX_BYTES // each, WORKING_BYTES // found.example_bytes)
    size = job.chunk_size or max(1, most)
    formed: dict[str, list[Tensor]] = {name: [] for name in blocks}
    for part in chunks(len(batch), size):
        found_here = found.matrices(job.view, blocks, batch.part(part), columns[:, part])
        for name, matrices in found_here.items():
            formed[name].append(matrices)
    return {
        name: LayerStatistics(
            blocks[name],
            count,
            matrices=pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1),
            positions=count,
            why=found.general[name],
            provenance=replace(job.provenance, layer=name, examples=count),
        )
        for name, pieces in formed.items()
    }


def _check_output(job: _Job, output: Tensor, batch: Batch) -> None:
    batch.require_outputs(output)
    if not bool(torch.isfinite(output).all()):
        raise NumericalError(
            "The model's output holds NaN or infinity, although data and weights are "
            "finite. Look for an overflow in the forward pass."
        )
    job.likelihood.check(output, batch.y)


@final
@dataclass(frozen=True, eq=False, repr=False)
class MeanGradient(Held):
    """The gradient of the mean loss over a batch, for one block.

    Parameters
    ----------
    block
        Which parameters.
    gradient
        (1/N) Σ_n ∇ℓ_n, shape (d_out, d_in).
    count
        N.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> found = fl.mean_gradient(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> found["weight"].gradient.shape
    torch.Size([2, 4])
    """

    block: Block
    gradient: Float[Tensor, "o i"]
    count: int
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.block.weight_shape

    def without_examples(self) -> "MeanGradient":
        """Return the same for a weighted sum in which it does not count."""
        return replace(self, count=0)

    def __repr__(self) -> str:
        """Return one line."""
        norm = float(self.gradient.norm())
        made = f"{self.provenance}, " if str(self.provenance) else ""
        return f"MeanGradient({made}{self.weight_shape}, norm {norm:.3g})"

    def _repr_html_(self) -> str:
        """Return a small folding table for notebooks."""
        rows = {
            "layer": self.block.name,
            "likelihood": self.provenance.likelihood,
            "examples N": self.count,
            "weight (d_out, d_in)": self.weight_shape,
            "norm": f"{float(self.gradient.norm()):.6g}",
            "numbers": f"{self.gradient.dtype}, {self.gradient.device}, "
            f"{readable(self.nbytes)}",
        }
        return html_table("MeanGradient", rows)


@numeric
@alone
def mean_gradient(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    *,
    fisher: Fisher | None = None,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    first: int = 0,
    progress: Progress = False,
) -> dict[str, MeanGradient]:
    """Return the gradient of the mean loss, (1/N) Σ_n ∇ℓ_n, block by block.

    Parameters
    ----------
    model, data, likelihood, layers, dtype, first, progress
        As in `collect`.
    fisher
        Whose labels: `Empirical()`, the data's (by default), or `MonteCarlo(k)`, drawn
        from the model. Then ∇ℓ_n is the mean over k draws, and with k = 1 its outer
        product has the expectation F/N: the statistic of MBF-True and TNT.

    Raises
    ------
    ValueError
        If y is None and the data's labels are meant, or for `Exact()`: the mean over the
        model's own distribution of ∇ℓ is zero. Else as `collect`.

    Examples
    --------
    >>> from fisherlab.likelihoods import Gaussian
    >>> data = (torch.ones(5, 4), torch.zeros(5, 2))
    >>> mean_gradient(nn.Linear(4, 2), data, Gaussian())["weight"].weight_shape
    (2, 5)
    """
    require_kinds(likelihood, fisher)
    if isinstance(fisher, Exact):
        raise ValueError(
            "mean_gradient with Exact(): the mean over the model's own labels is zero. "
            "Use Empirical() or MonteCarlo(1)."
        )
    seen = replace(view(model, dtype), copies_data=True)
    blocks = select(blocks_of(model), layers)
    named = dict(seen.model.named_parameters())
    leaves = {name: named[name] for block in blocks.values() for name in block.parameters}
    totals: dict[str, Tensor] = {}
    count, (report, finish) = 0, reporter(progress)
    for whole in batches(data, seen.device, seen.dtype, first, seen.model):
        if not count:
            require_repeatable(seen, whole)
        for part in chunks(len(whole), EXAMPLES):
            output, column = _column(seen, whole.part(part), likelihood, fisher)
            for grads in pull(seen, output, leaves, column[None]):
                for name in list(grads):  # one by one: each is as large as the model
                    grad = grads.pop(name)
                    totals[name] = totals[name] + grad if name in totals else grad
            count += part.stop - part.start
            report(part.stop - part.start)
    finish()
    made = Provenance.of(fisher or Empirical(), likelihood, count).by("mean gradient")

    def mean(name: str) -> Tensor:
        total = totals.pop(name, None)
        return torch.zeros_like(leaves[name]) if total is None else total / count

    found = {}
    for name, block in blocks.items():
        packed = block.pack({one: mean(one) for one in block.parameters})
        found[name] = MeanGradient(block, packed, count, replace(made, layer=name))
    return found


def _column(
    seen: ModelView, batch: Batch, likelihood: Likelihood, fisher: Fisher | None
) -> tuple[Tensor, Tensor]:
    """Return what is differentiated, and the column that is pulled back from it."""
    of_labels = fisher is None or isinstance(fisher, Empirical)
    if of_labels and batch.y is None:
        raise ValueError("mean_gradient needs the data's labels, but y is None.")
    output = seen.directly(differentiable(batch))
    likelihood.check(output, batch.y)
    if of_labels and batch.y is not None:
        with torch.enable_grad():
            loss = likelihood.loss(output, batch.y).sum()
        return loss, torch.ones_like(loss)
    assert fisher is not None
    held = output.detach()
    every = slice(0, fisher.column_count(likelihood, held))
    columns = fisher.columns(likelihood, held, batch.y, batch.first, every)
    # A column of k draws carries 1/√k, so that outer products add up to a mean.
    return output, columns.sum(0) / len(columns) ** 0.5

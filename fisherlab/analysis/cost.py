"""What a request will hold and compute, layer by layer, from two examples."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, final

import torch
from torch import nn

from fisherlab.layers import Block, blocks, exclusive, select
from fisherlab.likelihoods import Likelihood
from fisherlab.operators import FactoredFisher
from fisherlab.operators.factored import Form
from fisherlab.samples import Samples
from fisherlab.samples.base import DenseRoute
from fisherlab.statistics import Exact, Fisher, LayerStatistics, recorder, taps
from fisherlab.statistics.batches import Batch, batches
from fisherlab.statistics.collect import COLUMN_BYTES, run_length
from fisherlab.statistics.fishers import require_kinds
from fisherlab.statistics.model_view import ModelView, view
from fisherlab.statistics.network import join_columns
from fisherlab.statistics.probe import Probe, probe, require_independence
from fisherlab.statistics.taps import Part, Tapped

Route = DenseRoute | Literal["Gram"]


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """What the statistics of one layer hold, and how its exact block is worked on.

    Parameters
    ----------
    layer
        Block name.
    statistics
        The layer's statistics, without storage and with all columns.
    positions
        T, positions that share the weight (1 in per-example form).
    columns
        V pulled back; the samples may hold fewer.
    column_bytes
        Bytes of the statistics with one column in place of all.
    route
        Where second-order questions about the exact block are answered: a packed
        product or per-example gradients with a symmetric product (both form the dense
        block), or the Gram matrix of the samples.
    """

    layer: str
    statistics: LayerStatistics
    positions: int
    columns: int
    column_bytes: int
    route: Route

    @cached_property
    def held(self) -> LayerStatistics:
        """The statistics that `collect` returns, without storage."""
        return join_columns([self.statistics])

    @cached_property
    def samples(self) -> Samples:
        """Their samples."""
        return self.held.samples

    @property
    def kind(self) -> str:
        """What the module is, see `Block`."""
        return self.statistics.block.kind

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.samples.weight_shape

    @property
    def statistics_bytes(self) -> int:
        """Bytes the statistics hold."""
        return self.held.nbytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense exact block."""
        size = self.weight_shape[0] * self.weight_shape[1]
        return size * size * self.samples.dtype.itemsize

    @property
    def gram_bytes(self) -> int:
        """Bytes of the Gram matrix of all V·N samples."""
        size = self.samples.total
        return size * size * self.samples.dtype.itemsize

    @property
    def dense_flops(self) -> int:
        """Multiply-adds that form the dense block."""
        return self.samples.dense_flops()

    @property
    def gram_flops(self) -> int:
        """Multiply-adds that form the Gram matrix."""
        return self.samples.gram_flops()

    @property
    def workspace_bytes(self) -> int:
        """Bytes that forming the dense block takes beside the block itself."""
        return self.samples.dense_workspace()

    def working_bytes(self, form: Form) -> int:
        """Bytes a form of the exact block takes: a Gram matrix and its factor, or p²."""
        if route(self.samples, form) == "Gram":
            return 2 * self.gram_bytes
        return self.dense_bytes + self.workspace_bytes


@final
@dataclass(frozen=True)
class Collection:
    """What collecting costs, whatever is built from it.

    Parameters
    ----------
    examples
        N.
    run
        Examples collected together; streaming holds the statistics of so many.
    bytes
        Activations and output columns of one run.
    forward
        Multiply-adds of one example's forward pass.
    flops
        Multiply-adds of one forward pass and V backward passes over all examples.
    by_column
        Whether `fisherlab.approximate` takes one column at a time.
    """

    examples: int
    run: int
    bytes: int
    forward: int
    flops: int
    by_column: bool


@final
@dataclass(frozen=True, eq=False)
class Probed:
    """What two examples of every kind of batch tell of a network, for any number of them.

    Parameters
    ----------
    likelihood
        The likelihood.
    seen, found
        The network and its chosen blocks.
    probes
        What was found out, by the signature of batches.
    examples
        N of the batch.
    once, each
        Multiply-adds of one example's forward pass and of one of its columns.
    """

    likelihood: Likelihood
    seen: ModelView
    found: Mapping[str, Block]
    probes: Mapping[Any, Probe]
    examples: int
    once: int
    each: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batch: Any,
        likelihood: Likelihood,
        layers: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Probed":
        """Probe a network; parameters are those of `estimate`."""
        seen = view(model, dtype)
        found = select(blocks(model), layers)
        probes: dict[Any, Probe] = {}
        examples, first = 0, None
        with exclusive(model):
            for part in batches(batch, seen.device, seen.dtype, model=seen.model):
                examples += len(part)
                first = first or part
                if part.signature not in probes:
                    probes[part.signature] = tried = probe(seen, found, part)
                    y = None if part.y is None else part.y[:1]
                    likelihood.check(tried.output[:1].detach(), y)
        assert first is not None  # batches refuses empty data
        flops = _pass_flops(seen, found, _longest(probes), first)
        return cls(likelihood, seen, found, probes, examples, *flops)

    def known(self) -> dict[Any, Probe]:
        """Return the `probes` that `collect` need not make again, for these blocks.

        Raises
        ------
        UnsupportedModelError
            If an example's output depends on the others.
        """
        for one in self.probes.values():
            require_independence(one.alone, one.output[:1])
        return {signature: one.settled() for signature, one in self.probes.items()}

    def plans(
        self,
        fisher: Fisher | None,
        budget: int,
        *,
        by_column: bool = False,
        examples: int | None = None,
    ) -> tuple[dict[str, Plan], Collection]:
        """Plan what `collect` will hold of so many examples; of the batch if None.

        `by_column` says that the methods allow one column at a time.
        """
        require_kinds(self.likelihood, fisher)
        longest, seen = _longest(self.probes), self.seen
        count = self.examples if examples is None else examples
        columns = (fisher or Exact()).column_count(self.likelihood, longest.output)
        planned = {
            name: _plan(seen, block, longest, count, columns)
            for name, block in self.found.items()
        }
        alone = by_column and not longest.general and seen.device.type == "cpu"
        run = min(count, run_length(longest, budget))
        outputs = longest.output[0].numel() * longest.output.element_size()
        root = 3 * max(run * outputs, min(COLUMN_BYTES, run * columns * outputs))
        flops = count * (self.once + columns * self.each)
        held = run * longest.example_bytes + root  # columns, and what makes them
        return planned, Collection(count, run, held, self.once, flops, alone)


def _longest(probes: Mapping[Any, Probe]) -> Probe:
    """Return the probe with the largest output."""
    return max(probes.values(), key=lambda p: p.output.numel())


def _plan(seen: ModelView, block: Block, found: Probe, n: int, columns: int) -> Plan:
    tap = found.tapped.get(block.name)
    positions = 1 if tap is None else sum(part.positions for part in tap.parts)
    every = _statistics(seen.dtype, block, tap, n, columns)
    alone = _statistics(seen.dtype, block, tap, n, min(columns, 1)).nbytes
    way = route(join_columns([every]).samples, "auto")
    return Plan(block.name, every, positions, columns, alone, way)


def _statistics(
    dtype: torch.dtype, block: Block, tap: Tapped | None, n: int, columns: int
) -> LayerStatistics:
    """Return the statistics that `collect` makes, without storage and with all columns."""
    if tap is None:
        shape = (columns, n, *block.weight_shape)
        return LayerStatistics(block, n, matrices=_empty(dtype, *shape), positions=n)
    parts = [_part_statistics(dtype, block, part, n, columns) for part in tap.parts]
    if len(parts) == 1:
        return parts[0]
    positions = sum(part.positions for part in parts)
    return LayerStatistics(block, n, parts=tuple(parts), positions=positions)


def _part_statistics(
    dtype: torch.dtype, block: Block, part: Part, n: int, columns: int
) -> LayerStatistics:
    own, t, form = block.some_rows(*part.rows), part.positions, part.form
    o, i = own.weight_shape
    if form.looked_up:
        tokens, found = _empty(torch.long, n, t), _empty(dtype, columns, n, t, i)
        return LayerStatistics(own, n, tokens=tokens, gradients=found, positions=n * t)
    rows = o // form.groups
    inside, outside = (rows, i) if form.turned else (i, rows)
    return LayerStatistics(
        own,
        n,
        inputs=_empty(dtype, n, t, form.groups * inside),
        gradients=_empty(dtype, columns, n, t, form.groups * outside),
        positions=n * t,
        groups=form.groups,
        turned=form.turned,
    )


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def route(samples: Samples, form: Form) -> Route:
    """Return where second-order questions about the exact block are answered."""
    if FactoredFisher(samples, samples.examples, form=form).uses_gram:
        return "Gram"
    return samples.dense_route(form)


def _pass_flops(
    seen: ModelView, found: Mapping[str, Block], longest: Probe, batch: Batch
) -> tuple[int, int]:
    """Count one example's forward pass and one of its columns, by watching them."""
    from torch.utils.flop_counter import FlopCounterMode

    one = batch.part(slice(0, 1))
    tapped = {name: found[name] for name in longest.tapped}
    with FlopCounterMode(display=False) as forward:
        done = recorder.forward(seen, tapped, one)
    column = torch.ones_like(done.output)[None]
    general = {name: found[name] for name in longest.general}
    backward = FlopCounterMode(display=False)
    no_modules: Any = nullcontext()  # their hooks fail where one is given a parameter
    no_modules.parents = {"Global"}
    backward.mod_tracker = no_modules
    with backward, seen.settings():
        taps.pull([done], longest.tapped, column)
        if general:
            longest.matrices(seen, general, one, column)
    return forward.get_total_flops() // 2, backward.get_total_flops() // 2

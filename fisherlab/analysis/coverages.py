"""Every parameter of a model, and what the Fisher statistics make of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import pandas as pd
from torch import Tensor, nn

from fisherlab.layers import Block, alone, blocks, uncompiled
from fisherlab.showing import aligned, html_table
from fisherlab.statistics.batches import batches
from fisherlab.statistics.model_view import view
from fisherlab.statistics.probe import expected_rules, no_call, owners_of, probe

Form = Literal["shared", "per-example", "frozen", "unsupported"]
COLUMNS = ("parameter", "block", "numbers", "form", "rule", "reason")


@final
@dataclass(frozen=True)
class Covered:
    """One parameter: its block, its form, and why.

    Parameters
    ----------
    parameter
        Name in ``named_parameters(remove_duplicate=False)``.
    block
        Name of the block that holds it, "" if none does.
    numbers
        Entries; 0 for another name of a tied parameter, which counts once.
    form
        "shared" (inputs and output gradients), "per-example" (gradient matrices),
        "frozen" or "unsupported".
    reason
        Why it is so, "" for the shared form.
    rule
        The calls that give the shared form its inputs and output gradients.
    """

    parameter: str
    block: str
    numbers: int
    form: Form
    reason: str
    rule: str = ""


@final
@dataclass(frozen=True, repr=False)
class Coverage:
    """All parameters of a model, a row each.

    Parameters
    ----------
    rows
        In the order of the model.
    parameters
        Entries of the model's parameters, tied ones counted once.
    probed
        Whether the forms were seen on a batch, or only expected from the modules.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> found = fl.coverage(torch.nn.Linear(3, 2))
    >>> found.parameters, found.complete, [row.block for row in found.rows]
    (8, True, ['weight', 'weight'])
    """

    rows: tuple[Covered, ...]
    parameters: int
    probed: bool

    @property
    def complete(self) -> bool:
        """Whether every parameter is in a block or frozen, to the last entry."""
        known = [row for row in self.rows if row.form != "unsupported"]
        return sum(row.numbers for row in known) == self.parameters

    def table(self) -> pd.DataFrame:
        """Return the rows as a data frame."""
        cells = [[getattr(row, name) for name in COLUMNS] for row in self.rows]
        return pd.DataFrame(cells, columns=list(COLUMNS))

    def __repr__(self) -> str:
        """Return a plain-text table."""
        cells = [[str(getattr(row, name)) for name in COLUMNS] for row in self.rows]
        return "\n".join([self._summary, aligned([COLUMNS, *cells])])

    def _repr_html_(self) -> str:
        """Return a folding table for notebooks."""
        shown = {
            row.parameter: " · ".join(
                filter(None, [row.form, row.block, row.rule, row.reason])
            )
            for row in self.rows
        }
        return html_table(self._summary, shown)

    @property
    def _summary(self) -> str:
        forms = [row.form for row in self.rows]
        counts = {form: forms.count(form) for form in dict.fromkeys(forms)}
        parts = ", ".join(f"{count} {form}" for form, count in counts.items())
        state = "complete" if self.complete else "INCOMPLETE"
        how = "" if self.probed else " (expected)"
        return f"Coverage of {self.parameters} numbers, {state}: {parts}{how}"


@alone
def coverage(model: nn.Module, batch: Any = None) -> Coverage:
    """Account for every parameter of a model: its block, its form and the reason.

    Without a batch the forms are those the modules lead to expect; with one they are
    found on two of its examples, as `collect` does.

    Parameters
    ----------
    model
        Any module.
    batch
        Inputs x, or a pair (x, y) as for `collect`.

    Raises
    ------
    UnsupportedModelError
        With a batch, for what `collect` refuses too.

    Examples
    --------
    >>> from torch import nn
    >>> found = coverage(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))
    >>> print(found)
    Coverage of 12 numbers, complete: 2 shared, 2 per-example (expected)
    parameter  block  numbers  form         rule    reason
    0.weight   0      6        shared       linear
    0.bias     0      2        shared       linear
    1.weight   1      2        per-example          LayerNorm: no shared form
    1.bias     1      2        per-example          LayerNorm: no shared form
    """
    model = uncompiled(model)
    found = {name: b for name, b in blocks(model).items() if not _refused(model, b)}
    rules, general = _found_out(model, found, batch)
    owner = {p: block for block in found.values() for p in block.parameters}
    rows = tuple(_rows(model, owner, rules, general))
    total = sum(parameter.numel() for parameter in model.parameters())
    return Coverage(rows, total, batch is not None)


def _found_out(
    model: nn.Module, found: Mapping[str, Block], batch: Any
) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return the rules of blocks in shared form, and why the others are not."""
    if batch is None:
        rules = expected_rules(model, found)
        named = dict(model.named_parameters())
        return rules, {
            name: no_call(owners_of(model, named[block.weight]))
            for name, block in found.items()
            if name not in rules
        }
    seen = view(model, None)
    given = batch if hasattr(seen.model, "as_pair") else _pair(batch)
    first = next(batches([given], seen.device, seen.dtype, model=seen.model))
    result = probe(seen, found, first)
    loop = f"; in a loop: {result.unfollowed}" if result.unfollowed else ""
    rules = {name: tap.rule for name, tap in result.tapped.items()}
    return rules, {name: reason + loop for name, reason in result.general.items()}


def _pair(batch: Any) -> Any:
    if isinstance(batch, (Tensor, Mapping)):
        return batch, None
    return batch


def _rows(
    model: nn.Module,
    owner: Mapping[str, Block],
    rules: Mapping[str, str],
    general: Mapping[str, str],
) -> Iterable[Covered]:
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        yield _row(name, original, parameter, owner.get(original), rules, general)


def _row(
    name: str,
    original: str,
    parameter: Tensor,
    block: Block | None,
    rules: Mapping[str, str],
    general: Mapping[str, str],
) -> Covered:
    tied = "" if name == original else f"tied to {original}"
    numbers = 0 if tied else parameter.numel()
    if not parameter.requires_grad:
        return Covered(name, "", numbers, "frozen", tied or "requires_grad is False")
    if block is None:
        return Covered(name, "", numbers, "unsupported", tied or _unsupported(parameter))
    reason = general.get(block.name, "")
    form: Form = "per-example" if reason else "shared"
    why = "; ".join(filter(None, [tied, reason]))
    return Covered(name, block.name, numbers, form, why, rules.get(block.name, ""))


def _refused(model: nn.Module, block: Block) -> bool:
    named = dict(model.named_parameters())
    return any(_unsupported(named[name]) for name in block.parameters)


def _unsupported(parameter: Tensor) -> str:
    if not parameter.numel():
        return "no entries"
    return "" if parameter.is_floating_point() else f"dtype {parameter.dtype}"

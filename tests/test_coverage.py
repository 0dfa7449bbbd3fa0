"""Coverage accounts for every parameter."""

import pytest
import torch
from torch import nn

import fisherlab as fl
from tests.model_zoo import (
    MODULES,
    NETWORKS,
    randomised,
    rows,
)
from tests.zoo_modules import (
    GPT,
    Recomputed,
)


@pytest.mark.parametrize("name", NETWORKS | MODULES)
@pytest.mark.parametrize("probed", [False, True])
def test_every_number_is_accounted_for(name: str, probed: bool) -> None:
    case = (NETWORKS | MODULES)[name]()
    found = fl.coverage(case.model, (case.x, case.y) if probed else None)
    assert found.complete
    assert sum(row.numbers for row in found.rows) == found.parameters
    assert found.parameters == sum(p.numel() for p in case.model.parameters())
    names = [n for n, _ in case.model.named_parameters(remove_duplicate=False)]
    assert [row.parameter for row in found.rows] == names
    assert {row.block for row in found.rows} == set(fl.blocks(case.model))


@pytest.mark.parametrize("name", NETWORKS)
def test_forms_are_those_of_collect(name: str) -> None:
    case = NETWORKS[name]()
    stats = fl.collect(case.model, (case.x, case.y), case.likelihood)
    for row in fl.coverage(case.model, (case.x, case.y)).rows:
        assert (row.form == "shared") == stats[row.block].is_shared
        assert (row.rule != "") == (row.form == "shared")
        assert row.rule or row.reason


def test_frozen_parameters_are_listed() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    found = fl.coverage(model)
    assert found.complete
    assert [row.form for row in found.rows] == ["frozen"] * 2 + ["shared"] * 2
    assert found.rows[0].block == ""


def test_tied_parameters_count_once_and_name_their_origin() -> None:
    row = fl.coverage(GPT()).rows[-1]
    assert (row.parameter, row.block, row.numbers) == ("head.weight", "token", 0)
    assert row.reason.startswith("tied to token.weight")


def test_what_cannot_be_covered_is_incomplete() -> None:
    model = nn.Linear(2, 2)
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    found = fl.coverage(model)
    assert not found.complete
    assert [row.reason for row in found.rows if row.form == "unsupported"] == [
        "dtype torch.complex64"
    ]
    with pytest.raises(fl.UnsupportedModelError, match="'weight' has no shape yet"):
        fl.coverage(nn.LazyLinear(2))


def test_unused_parameters_and_loops_are_told() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    reasons = {
        row.parameter: row.reason for row in fl.coverage(model, rows(4, 3).float()).rows
    }
    assert "gradient is zero" in reasons["unused"]
    looped = fl.coverage(randomised(Recomputed()), rows(3, 3)).rows[2]
    assert "in a loop" in looped.reason


def test_shown_as_text_html_and_table() -> None:
    found = fl.coverage(nn.Sequential(nn.Linear(3, 2)))
    assert repr(found).splitlines()[0].startswith("Coverage of 8 numbers, complete")
    assert "0.weight" in found._repr_html_()
    assert list(found.table()["numbers"]) == [6, 2]

"""Every analysis takes a mapping of layers, or one layer, as it takes statistics."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import xarray as xr

import fisherlab as fl
from fisherlab.analysis.intervals import with_noise
from tests.cases import normal

LIKELIHOOD = fl.Categorical()
FEW = ["kfac", "diagonal"]


def collected(**options: Any) -> fl.statistics.Statistics:
    layers = [torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)]
    model = torch.nn.Sequential(*layers).double()
    return fl.collect(model, (normal(12, 5), torch.arange(12) % 3), LIKELIHOOD, **options)


CALLS: dict[str, Callable[[Any], Any]] = {
    "compare": lambda s: fl.compare(s, FEW, damping=0.1),
    "reference": lambda s: fl.compare(collected(), FEW, reference=s),
    "purpose": lambda s: fl.compare(s, FEW, purpose=fl.Sharpness()),
    "sweep": lambda s: fl.sweep(s, FEW),
    "pareto": lambda s: fl.pareto(s, FEW).sel(cost=["stored_bytes"]),
    "rank_curve": fl.rank_curve,
    "spectra": lambda s: fl.spectra(s, FEW),
    "density": lambda s: fl.density(s, FEW, steps=5),
    "structure": fl.structure,
    "inverse_blocks": lambda s: fl.inverse_blocks(s, FEW, damping=0.1),
    "compare_networks": lambda s: fl.compare_networks(s, damping=0.1),
    "full_matrix": lambda s: fl.full_matrix(s).values,
    "cross_block": lambda s: fl.cross_block(s, "0", "0"),
    "with_noise": lambda s: with_noise(fl.compare(collected(), FEW), s),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, xr.DataTree):
        return bool(one.equals(other))
    if isinstance(one, xr.Dataset):
        return bool(one.drop_attrs().equals(other.drop_attrs()))
    return bool(torch.equal(one, other))


@pytest.mark.parametrize("call", CALLS)
def test_a_mapping_of_layers_is_as_good_as_statistics(call: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = collected(compress=False)
        torch.manual_seed(0)
        expected = CALLS[call](whole)
        torch.manual_seed(0)
        assert same(CALLS[call](dict(whole)), expected)
    with pytest.raises(TypeError, match=r"statistics are expected.*; list was|Type-check"):
        CALLS[call]([1])


def test_one_layer_is_enough() -> None:
    whole = collected()
    one = fl.compare(whole["0"], FEW)
    assert one.layer.values.tolist() == ["0"]
    assert one.drop_attrs().equals(
        fl.compare(dict(whole), FEW).drop_attrs().sel(layer=["0"])
    )


def test_what_is_no_result_is_not_saved(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"save: Statistics was given|Type-check"):
        fl.save(collected(), tmp_path / "statistics.nc")
    assert not list(tmp_path.iterdir())

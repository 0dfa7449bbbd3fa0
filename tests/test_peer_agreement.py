"""KFAC and EKFAC against curvlinops and nngeometry, after a conversion of the order.

Common ground: fully connected layers, cross-entropy averaged over examples, which is the
Fisher normalisation of this package. Both peers list a layer's weight first and its bias
after it; here the bias is the last column of the weight.
"""

import warnings

import pytest
import torch
from torch import nn

import fisherlab as fl
from tests import cases
from tests.oracles import assert_close

METHODS = {"KFAC": fl.KFAC(), "EKFAC": fl.EKFAC()}


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x, y = cases.normal(7, 4), torch.randint(0, 3, (7,), generator=torch.Generator())
    return model, x, y


def theirs(weight_shape, start):
    """Return where the entries of a block by rows are in the peers' order."""
    o, i = weight_shape
    weight = torch.arange(o * (i - 1)).view(o, i - 1)
    bias = o * (i - 1) + torch.arange(o)
    return start + torch.cat([weight, bias[:, None]], 1).flatten()


def assert_agree(dense, stats, method):
    start = 0
    for layer in stats.values():
        order = theirs(layer.weight_shape, start)
        start += len(order)
        assert_close(dense[order][:, order], method(layer).to_dense(), rtol=1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_curvlinops(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not there")
        model, x, y = network()
        kind = getattr(curvlinops, f"{name}LinearOperator")
        peer = kind(
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            [(x, y)],
            fisher_type=curvlinops.FisherType.TYPE2,
            separate_weight_and_bias=False,
        )
        dense = peer @ torch.eye(peer.shape[1], dtype=torch.float64)
    stats = fl.collect(model, (x, y), fl.Categorical())
    assert_agree(dense, stats, METHODS[name])


@pytest.fixture
def double():
    """nngeometry makes its tables in the default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", METHODS)
def test_nngeometry(name, double):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = pytest.importorskip(
            "nngeometry.metrics", reason="nngeometry is not there"
        )
        objects = pytest.importorskip("nngeometry.object")
        model, x, y = network()
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y), batch_size=len(x)
        )
        peer = metrics.FIM(
            model=model,
            loader=loader,
            representation=getattr(objects, f"PMat{name}"),
            variant="classif_logits",
            device="cpu",
        )
        if name == "EKFAC":
            peer.update_diag(loader)
        dense = peer.to_torch()
    stats = fl.collect(model, (x, y), fl.Categorical())
    assert_agree(dense, stats, METHODS[name])

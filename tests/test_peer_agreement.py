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
from tests import cases, oracles
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


def convolutional():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    return model, cases.normal(6, 2, 3, 3), torch.arange(6) % 3


def curvlinops_dense(kind, model, loss, data, **named):
    """Return the dense matrix of one of curvlinops' operators, type-2 where it samples."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = pytest.importorskip("curvlinops", reason="curvlinops is not there")
        if not hasattr(peer, kind):
            pytest.skip(f"this curvlinops has no {kind}")
        if kind != "GGNLinearOperator":
            named |= {
                "fisher_type": peer.FisherType.TYPE2,
                "separate_weight_and_bias": False,
            }
        chosen = [p for p in model.parameters() if p.requires_grad]
        found = getattr(peer, kind)(model, loss, chosen, [data], **named)
        return found @ torch.eye(found.shape[1], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "sharing"), [("KFAC", "expand"), ("KFAC", "reduce"), ("EKFAC", "expand")]
)
def test_convolutions(name, sharing):
    model, x, y = convolutional()
    dense = curvlinops_dense(
        f"{name}LinearOperator", model, nn.CrossEntropyLoss(), (x, y), kfac_approx=sharing
    )
    method = fl.EKFAC() if name == "EKFAC" else fl.KFAC(sharing)
    assert_agree(dense, fl.collect(model, (x, y), fl.Categorical()), method)


LIKELIHOODS = {  # ours, theirs summed over outputs and examples
    "Gaussian": (fl.Gaussian(0.5), nn.MSELoss(reduction="sum")),
    "Bernoulli": (fl.Bernoulli(), nn.BCEWithLogitsLoss(reduction="sum")),
}


@pytest.mark.parametrize(
    "kind", ["KFAC", "EKFAC", pytest.param("GGN", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_likelihoods(likelihood, kind):
    ours, loss = LIKELIHOODS[likelihood]
    model, x, _ = network()
    y = (cases.normal(7, 3, seed=5) > 0).double()
    dense = curvlinops_dense(f"{kind}LinearOperator", model, loss, (x, y)) / len(x)
    stats = fl.collect(model, (x, y), ours)
    if kind != "GGN":
        assert_agree(dense, stats, METHODS[kind])
        return
    start = 0
    for layer in stats.values():
        order = theirs(layer.weight_shape, start)
        start += len(order)
        assert_close(dense[order][:, order], fl.ExactBlock()(layer).to_dense(), rtol=1e-8)


def test_rank_one_products():
    model, x, y = network()
    dense = curvlinops_dense("KFOCLinearOperator", model, nn.CrossEntropyLoss(), (x, y))
    assert_agree(dense, fl.collect(model, (x, y), fl.Categorical()), fl.KPSVD(1))


@pytest.mark.parametrize("make", [network, convolutional])
def test_backpack(make):
    backpack = pytest.importorskip("backpack", reason="BackPACK is not there")
    model, x, y = make()
    stats = fl.collect(model, (x, y), fl.Categorical())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extensions = pytest.importorskip("backpack.extensions")
        peer, loss = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())
        with backpack.backpack(extensions.KFLR(), extensions.DiagGGNExact()):
            loss(peer(x), y).backward()
    for name, layer in stats.items():
        module = peer.get_submodule(name)
        exact = fl.ExactBlock()(layer).diagonal()
        assert_close(exact[:, :-1].reshape_as(module.weight), module.weight.diag_ggn_exact)
        assert_close(exact[:, -1], module.bias.diag_ggn_exact)
        # BackPACK adds up the gradients of a convolution over positions, not its inputs.
        places = layer.positions // layer.count
        ((rows, _),) = fl.KFAC("reduce")(layer).terms
        ((_, cols),) = fl.KFAC()(layer).terms
        rows = rows * places**2
        assert_close(torch.kron(rows, cols[:-1, :-1]), torch.kron(*module.weight.kflr))
        assert_close(rows, module.bias.kflr[0])


@pytest.mark.parametrize("likelihood", [fl.Categorical(), fl.Bernoulli(), fl.Gaussian(0.3)])
def test_the_divergence_of_outputs_is_half_of_the_quadratic_form(likelihood):
    model, x, _ = network()
    for name, layer in fl.collect(model, (x, None), likelihood).items():
        w = 1e-4 * cases.normal(*layer.weight_shape)
        held = dict(model.named_parameters())
        moved = {key: held[key] + step for key, step in layer.unpack(w).items()}
        before, after = model(x), torch.func.functional_call(model, moved, (x,))
        found = divergence(likelihood, before.detach(), after.detach()) / len(x)
        expected = fl.ExactBlock()(layer).quadratic_form(w) / 2
        assert float(found) == pytest.approx(float(expected), rel=1e-3), name


def divergence(likelihood, first, second):
    """Return Σ KL(p(· | first) ‖ p(· | second))."""
    if isinstance(likelihood, fl.Gaussian):
        return (first - second).square().sum() / (2 * likelihood.variance)
    if isinstance(likelihood, fl.Categorical):
        p, q = (torch.distributions.Categorical(logits=z) for z in (first, second))
    else:
        p, q = (torch.distributions.Bernoulli(logits=z) for z in (first, second))
    return torch.distributions.kl_divergence(p, q).sum()


@pytest.mark.parametrize("likelihood", [fl.Categorical(), fl.Gaussian()])
def test_the_block_of_a_piecewise_linear_network_is_its_hessian(likelihood):
    model, x, y = network()
    model = nn.Sequential(model[0], nn.ReLU(), model[2])
    y = y if isinstance(likelihood, fl.Categorical) else cases.normal(7, 3, seed=5)
    held = dict(model.named_parameters())
    for layer in fl.collect(model, (x, y), likelihood).values():

        def mean_loss(w, layer=layer):
            moved = held | layer.unpack(w)
            output = torch.func.functional_call(model, moved, (x,))
            return oracles.loss(likelihood, output, y) / len(x)

        names = layer.unpack(torch.zeros(layer.weight_shape))
        w = layer.pack({name: held[name].detach() for name in names})
        hessian = torch.autograd.functional.hessian(mean_loss, w).reshape(w.numel(), -1)
        assert_close(fl.ExactBlock()(layer).to_dense(), hessian, rtol=1e-9)


def test_a_bias_alone():
    model, x, y = network()
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    dense = curvlinops_dense("KFACLinearOperator", model, nn.CrossEntropyLoss(), (x, y))
    layer = fl.collect(model, (x, y), fl.Categorical())["0.bias"]
    assert_close(fl.ExactBlock()(layer).to_dense(), dense, rtol=1e-9)  # G ⊗ 1
    assert_close(fl.KFAC()(layer).to_dense(), dense, rtol=1e-9)


class TiedWithOneBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.slow
def test_ties_with_one_bias():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TiedWithOneBias().double()
    x, y = cases.normal(7, 3), torch.arange(7) % 3
    dense = curvlinops_dense("GGNLinearOperator", model, nn.CrossEntropyLoss(), (x, y))
    layer = fl.collect(model, (x, y), fl.Categorical())["first"]
    order = theirs(layer.weight_shape, 0)
    assert_close(fl.ExactBlock()(layer).to_dense(), dense[order][:, order], rtol=1e-9)
    with pytest.raises(fl.NeedsSharedForm, match="first"):
        fl.KFAC()(layer)

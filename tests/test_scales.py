"""Laws of scale: what is made of a loss c times as large is c or c² times as large."""

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.approximators.averages import average
from fisherlab.numerics.krylov import conjugate_gradients
from tests.cases import normal
from tests.model_zoo import randomised
from tests.oracles import assert_close

HOMOGENEOUS = sorted(set(fl.approximators()) - {"foof", "muon", "lanczos-paper"})
AVERAGED = sorted(set(HOMOGENEOUS) - {"cg-fac"})
LAYERS = {
    "linear": (lambda: nn.Linear(4, 5, bias=False), (9, 4)),
    "convolution": (lambda: nn.Conv2d(2, 3, 2, bias=False), (6, 2, 4, 4)),
}
# of inputs and of outputs, in float32: sizes of F, and of one of its sides, far from 1
SCALES = [(1e-12, 1.0), (1.0, 1e-16), (1e12, 1.0), (1.0, 1e16)]
SCALES += [(1e-10, 1e10), (1e10, 1e-10)]


class Scaled(nn.Module):
    """A layer whose inputs and output gradients are scaled, and nothing else."""

    def __init__(self, layer, inputs=1.0, outputs=1.0):
        super().__init__()
        self.layer, self.inputs, self.outputs = layer, inputs, outputs
        size = layer.weight.shape[0]
        self.register_buffer("mixing", normal(size, size) / size)

    def forward(self, x):
        out = self.layer(x * self.inputs) / self.inputs
        out = out.flatten(2).mean(2) if out.dim() > 2 else out
        return (out @ self.mixing).tanh() * self.inputs * self.outputs


def statistics(kind, scales=(1.0, 1.0), dtype=torch.float64):
    make, shape = LAYERS[kind]
    model = randomised(Scaled(make(), *scales)).to(dtype)
    return fl.collect(model, (normal(*shape).to(dtype), None), fl.Gaussian())["layer"]


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kind", LAYERS)
def test_single_precision_holds_matrices_of_any_size(kind, scales):
    plain, scaled = statistics(kind), statistics(kind, scales, torch.float32)
    times = (scales[0] * scales[1]) ** 2
    w = normal(1, *plain.weight_shape)
    for name in HOMOGENEOUS:
        method = fl.approximators()[name]
        expected, found = method(plain), method(scaled)
        assert_close(found.to_dense().double() / times, expected.to_dense(), 2e-3)
        norm = expected.frobenius_norm()
        assert_close(found.frobenius_norm() / times, norm, 2e-3)
        solved = found.solve(w.float(), times * norm).double() * times
        assert_close(solved, expected.solve(w, norm), 1e-2)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kind", LAYERS)
def test_single_precision_averages_matrices_of_any_size(kind, scales):
    """A square beyond float32 is no sign: it turned the newer factors of K-FAC around."""
    chosen = {name: fl.approximators()[name] for name in AVERAGED}

    def averages(scales, dtype):
        make, (count, *shape) = LAYERS[kind]
        model = randomised(Scaled(make(), *scales)).to(dtype)
        found = []
        for x in normal(2, 4 * count, *shape).to(dtype):
            layer = fl.collect(model, (x, None), fl.Gaussian())["layer"]
            found.append({name: method(layer) for name, method in chosen.items()})
        return {n: average(found[0][n], found[1][n], weight=0.6) for n in chosen}

    expected, found = averages((1.0, 1.0), torch.float64), averages(scales, torch.float32)
    for name in chosen:
        dense = found[name].to_dense().double() / (scales[0] * scales[1]) ** 2
        assert_close(dense, expected[name].to_dense(), 2e-3)


@pytest.mark.parametrize("method", [fl.KPSVD(2), fl.Deflation(2), fl.KFACCorrected()])
@pytest.mark.parametrize("scale", [1e-90, 1e90])
def test_products_of_what_has_no_squares_are_refused(method, scale):
    with pytest.raises(fl.NumericalError, match=r"no numbers of float64|NaN or infinite"):
        method(statistics("linear", (1.0, scale)))


@pytest.mark.parametrize("method", [fl.KPSVD, fl.Deflation, fl.KFACCorrected])
@pytest.mark.parametrize(("scale", "refused"), [(1e-6, False), (1e6, False), (1e-9, True)])
def test_passes_find_the_same_products_at_any_size_or_refuse(method, scale, refused):
    make, shape = LAYERS["convolution"]
    model, x = randomised(Scaled(make(), 1.0, scale)), normal(*shape)
    chosen = {"passes": method(1, fl.Passes())}

    def streamed(dtype):
        batches = [(part.to(dtype), None) for part in x.split(4)]
        found = fl.approximate(model.to(dtype), batches, fl.Gaussian(), chosen)
        return found["passes"]["layer"].to_dense()

    expected = streamed(torch.float64)
    if refused:
        with pytest.raises(fl.NumericalError, match=r"dtype=torch\.float64"):
            streamed(torch.float32)
    else:
        assert_close(streamed(torch.float32), expected, 1e-4)


@pytest.mark.parametrize("power", [-90, 90])
def test_conjugate_gradients_do_not_depend_on_the_size_of_what_is_solved_for(power):
    root = normal(7, 7).float()
    right = normal(2, 7).float()

    def product(x):
        return x @ (root @ root.T + torch.eye(7))

    plain = conjugate_gradients(product, right, tolerance=1e-6)
    scaled = conjugate_gradients(product, right * 2.0**power, tolerance=1e-6)
    assert plain.converged
    assert scaled.converged
    assert torch.equal(scaled.value, plain.value * 2.0**power)


@pytest.mark.parametrize("variance", [1e-24, 1e24])
def test_single_precision_solves_for_networks_of_any_size(variance):
    """Krylov's second direction, of the size of 1/F², had no square in float32."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), normal(9, 4)
    model = randomised(model)
    plain = fl.collect(model, (x, None), fl.Gaussian())
    single = fl.collect(model.float(), (x.float(), None), fl.Gaussian(variance))
    ws = {name: normal(*layer.weight_shape) for name, layer in plain.items()}
    for method in fl.network_approximators().values():
        expected = method(plain).solve(ws, 0.1)
        fine = {name: w.float() for name, w in ws.items()}
        found = method(single).solve(fine, 0.1 / variance)
        for name, w in expected.items():
            assert_close(found[name].double() / variance, w, 1e-4)

"""Wrong numbers, false bounds and NaN, one test a kind, against dense matrices."""

import ast
import contextlib
import functools
import inspect
import pathlib
from fractions import Fraction

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import fisherlab as fl
from fisherlab import metrics, operators
from fisherlab.approximators.base import Sums
from fisherlab.metrics.pairs import EPS, Pair
from tests import extended
from tests.extended import WIDE
from tests.oracles import assert_close


def layer(model, x, likelihood, name):
    return fl.collect(model.double(), (x.double(), None), likelihood)[name]


@pytest.mark.parametrize(("shape", "examples", "seed"), [((8, 3), 7, 4), ((8, 3), 5, 17)])
def test_a_correction_of_an_exact_kfac_holds_nan(shape, examples, seed):
    torch.manual_seed(seed)
    x = torch.randn(examples, shape[0], dtype=torch.double)
    stats = layer(nn.Linear(*shape), x, fl.Gaussian(), "weight")
    assert_close(fl.KFACCorrected()(stats).to_dense(), fl.ExactBlock()(stats).to_dense())


@pytest.mark.parametrize("seed", [1, 2, 3, 11])
@pytest.mark.parametrize("name", ["kpsvd-3", "kpsvd-4", "deflation"])
def test_a_tie_cut_by_the_rank_leaves_an_asymmetric_sum(name, seed):
    torch.manual_seed(seed)
    head = nn.Linear(27, 1)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), head)
    stats = layer(model, torch.randn(1, 2, 4, 4), fl.Gaussian(), "0")
    found = fl.approximators()[name](stats)
    dense, exact = found.to_dense(), fl.ExactBlock()(stats).to_dense()
    assert_close(dense, dense.T)
    if name != "deflation":  # Eckart and Young: what is left are the other values
        assert_close((exact - dense).norm() ** 2, left_over(exact, stats, found))


def left_over(exact, stats, found):
    o, i = stats.weight_shape
    folded = exact.view(o, i, o, i).permute(0, 2, 1, 3).reshape(o * o, i * i)
    return torch.linalg.svdvals(folded)[len(found.terms) :].square().sum()


NETWORKS = {  # model, likelihood, shape of an input, layer
    "tanh": (
        lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)),
        fl.Gaussian(),
        (2,),
        "0",
    ),
    "softmax": (lambda: nn.Linear(2, 3), fl.Categorical(), (2,), "weight"),
    "linear": (lambda: nn.Linear(3, 2), fl.Gaussian(), (3,), "weight"),
    "positions": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2)),
        fl.Categorical(),
        (2, 2),
        "0",
    ),
    "groups": (
        lambda: nn.Sequential(nn.Conv1d(2, 2, 2, groups=2), nn.Tanh(), nn.Flatten()),
        fl.Bernoulli(),
        (2, 3),
        "0",
    ),
}
OUTLIERS = [
    pytest.param(network, size, marks=() if size in quick else pytest.mark.slow)
    for network, quick in {"tanh": (), "softmax": (1e6,)}.items()
    for size in (1e3, 1e4, 1e5, 1e6, 1e7, 1e8)
] + [
    pytest.param(network, size, marks=pytest.mark.slow)
    for network in ("linear", "positions", "groups")
    for size in (1e3, 1e5, 1e6, 1e8)
]


def wide_dense(operator):
    """Return the matrix an operator stands for, sums of its terms rounded once."""
    if isinstance(operator, operators.Stacked):
        parts = [wide_dense(part) for part in operator.parts]
        ends = np.cumsum([0, *map(len, parts)])
        whole = np.zeros((ends[-1], ends[-1]), WIDE)
        for part, start, end in zip(parts, ends[:-1], ends[1:], strict=True):
            whole[start:end, start:end] = part
        return whole
    if not isinstance(operator, operators.KroneckerSum):
        return operator.to_dense().numpy().astype(WIDE)
    exact = np.vectorize(Fraction, otypes=[object])
    terms = (
        np.kron(*(exact(factor.numpy()) for factor in pair)) for pair in operator.terms
    )
    return sum(terms).astype(float).astype(WIDE)


def accepted(stats, mean):
    """Yield what every registered method makes of a block that it accepts."""
    for name, method in fl.approximators().items():
        if name != "exact":
            takes_mean = getattr(method, "takes", "") == "mean_gradient"
            with contextlib.suppress(fl.NeedsSharedForm):
                yield method(mean if takes_mean else stats)


@pytest.mark.parametrize(("network", "outlier"), OUTLIERS)
def test_one_large_input_hides_every_number(network, outlier):
    torch.manual_seed(1)
    make, likelihood, shape, name = NETWORKS[network]
    model, x = make().double(), torch.randn(9, *shape, dtype=torch.double)
    x[0] *= outlier
    z = model(x)
    y = torch.rand_like(z.detach())
    y = z.argmax(-1) if isinstance(likelihood, fl.Categorical) else y
    stats = fl.collect(model, (x, y), likelihood)[name]
    mean = fl.mean_gradient(model, (x, y), likelihood)[name]
    exact, gradient = fl.ExactBlock()(stats), torch.randn(stats.weight_shape).double()
    made = list(accepted(stats, mean))
    samples = stats.example_gradients().flatten(0, 1).flatten(1).numpy().astype(WIDE)
    f = samples.T @ samples / stats.count
    damping = 1e-2 * float(np.trace(f)) / len(f)
    g = np.stack([wide_dense(one) for one in made])
    expected = extended.plain(f, g) | extended.damped(f, g, damping, gradient.numpy())
    sizes = np.maximum(extended.norm(g), extended.norm(f)) / damping
    for at, approx in enumerate(made):
        pair = metrics.pairs.paired("law", exact, approx, mixed=True)
        for entry in metrics.register.entries().values():
            if entry.name != "subspace_overlap":  # all of them, where p is small
                wanted = float(expected[entry.name][at])
                lost = 0 if entry.needs == "matrix" else 100 * EPS * float(sizes[at])
                hold(entry, pair, damping, gradient, wanted, 1e-6 + lost)


def hold(entry, pair, damping, gradient, wanted, tolerance):
    """Check one number against the definition, or that it is marked."""
    try:
        asked = pair if entry.needs == "matrix" else pair.damped(damping)
        asked = asked.along(gradient) if entry.needs == "gradient" else asked
        found = entry.of(asked)
    except fl.NumericalError as error:
        indefinite = isinstance(error, fl.IndefiniteError) and np.isnan(wanted)
        if not indefinite and tolerance < 1e-2:
            raise
        return
    told = f"{entry.name} of {pair.source}: {found!r} is not {wanted!r}"
    if isinstance(found, metrics.BelowFloor):
        assert wanted <= found * (1 + 1e-9), told
    elif not (np.isnan(found) and np.isnan(wanted)):
        assert abs(found - wanted) <= tolerance * max(abs(wanted), 1e-3), told


def test_cancelled_terms_of_a_large_sum_are_marked():
    one = torch.ones(1, 70, dtype=torch.double).T @ torch.ones(1, 70, dtype=torch.double)
    eye = torch.eye(70, dtype=torch.double)
    exact = operators.Diagonal(torch.ones(70, 70, dtype=torch.double))
    large = 1e7 * one
    kept = (large, one), (-large, one), (eye, eye)
    sums = operators.KroneckerSum(kept, (70, 70))
    found = metrics.frobenius_error(exact, sums)
    assert isinstance(found, metrics.BelowFloor)
    assert found > 1e-4
    hidden = (1e7 * large, one), (-1e7 * large, one), (eye, eye)
    gone = operators.KroneckerSum(hidden, (70, 70))
    for name in ("frobenius_error", "cosine_similarity", "optimal_scale"):
        with pytest.raises(fl.NumericalError, match="less than three digits"):
            getattr(metrics, name)(exact, gone)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_in_float32_lose_the_rule_of_their_parts(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 12, 3, groups=groups), nn.Flatten())
    stats = fl.collect(model, (torch.randn(1, 8, 3), None), fl.Gaussian())["0"]
    for method in (fl.EKFAC(), fl.TEKFAC()):
        found = metrics.frobenius_error(fl.ExactBlock()(stats), method(stats))
        assert found < 1e-6


def sums_by_row():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.double)).Q
    rowwise = operators.RowwiseEigen(basis, torch.rand(4, 3, dtype=torch.double))
    diagonal = operators.KroneckerDiagonal(torch.rand(4).double(), basis @ basis.T + 1)
    low = operators.LowRank(basis[:1, None], torch.rand(1).double() + 2, 1.0)
    return {
        "rowwise": rowwise,
        "diagonal": diagonal,
        "stacked": operators.Stacked((rowwise, low)),
    }


@pytest.mark.parametrize("kind", sums_by_row())
def test_a_structured_form_has_no_decomposition(kind):
    operator = sums_by_row()[kind]
    basis = metrics.spectra.decomposed(operator)
    vectors = basis.vectors(torch.arange(len(basis.values))).flatten(1)
    assert basis.free == 0
    assert_close((vectors.T * basis.values) @ vectors, operator.to_dense())
    assert operator.eigenform() is not None


def test_a_bias_without_effect_adds_rounding_noise():
    squares = torch.tensor([[2.0, 1.0, 4e-31]], dtype=torch.double)
    with_bias = torch.tensor([[6e-16, 5e-16, 4e-31]], dtype=torch.double)
    dense = operators.QuasiDiagonal(squares, with_bias).to_dense()
    assert_close(dense, torch.diag(squares[0]))


@functools.cache
def deficient(seed, dtype):
    """Return statistics of softmax outputs, and of fewer examples than inputs."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    x = torch.randn(5, 6, generator=generator, dtype=dtype)
    y = torch.randint(0, 3, (5,), generator=generator)
    mean = fl.mean_gradient(model, (x, y), fl.Categorical())
    return fl.collect(model, (x, y), fl.Categorical()), mean


def made(name, seed, layer, dtype=torch.double):
    method, (stats, mean) = fl.approximators()[name], deficient(seed, dtype)
    chosen = mean if getattr(method, "takes", "") == "mean_gradient" else stats
    return method(chosen[layer])


@pytest.mark.parametrize("layer", ["0", "2"])
@pytest.mark.parametrize("name", fl.approximators())
def test_a_singular_block_is_solved_without_damping(name, layer):
    generator = torch.Generator().manual_seed(5)
    for seed in range(2):
        op = made(name, seed, layer)
        values = torch.linalg.eigvalsh(op.to_dense())
        w = torch.randn(op.weight_shape, generator=generator, dtype=torch.double)
        calls = [
            lambda op=op, w=w: op.solve(w, 0.0),
            lambda op=op, w=w: op.inverse(0.0) @ w,
            lambda op=op: op.logdet(0.0),
        ]
        if values[0] <= 1e-15 * values[-1]:
            for call in calls:
                with pytest.raises(fl.NumericalError, match="damping 0"):
                    call()
        elif values[0] >= 1e-10 * values[-1]:
            expected = torch.linalg.solve(op.to_dense(), w.flatten()).view_as(w)
            assert_close(calls[0](), expected, 1e-4)
            assert_close(calls[1](), expected, 1e-4)
            assert calls[2]() == pytest.approx(float(values.log().sum()), rel=1e-4)


@pytest.mark.parametrize("name", fl.approximators())
def test_a_solve_leaves_the_residual_it_states(name):
    op = made(name, 0, "0", torch.float32)
    wide = op.to(torch.double)
    values = torch.linalg.eigvalsh(wide.to_dense())
    w = torch.randn(op.weight_shape, generator=torch.Generator().manual_seed(5))
    for share in (1e-2, 1e-4, 1e-6, 1e-7, 1e-8):
        shift = share * float(values[-1])
        try:
            x = op.solve(w, shift).double()
        except fl.NumericalError:  # named, as it should be
            continue
        left = float((wide @ x + shift * x - w.double()).norm() / w.norm())
        stated = 4 * torch.finfo(torch.float32).eps * (1 + share) / share
        assert left <= max(stated, 1e-5)


NAMED = "sel isel interp reindex head tail thin shift roll pad chunk rolling coarsen"


def taken_by_xarray():
    """Return the names of arguments beside which xarray takes dimensions as keywords."""
    found = set()
    for kind in (xr.Dataset, xr.DataArray, xr.DataTree):
        calls = [getattr(kind, name) for name in NAMED.split() if hasattr(kind, name)]
        found |= {one for call in calls for one in inspect.signature(call).parameters}
    return found


def test_a_dimension_named_method_is_swallowed_by_sel():
    taken, root = taken_by_xarray(), pathlib.Path(fl.__file__).parent
    assert {"method", "drop", "tolerance"} <= taken
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf8")
        for node in ast.walk(ast.parse(text)) if "xarray" in text else ():
            held = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", ())
            names = {one.value for one in held if isinstance(one, ast.Constant)}
            assert not names & taken, f"{path}, line {node.lineno}: {names & taken}"


def test_old_results_with_a_dimension_named_method_open(tmp_path):
    old = xr.Dataset({"cosine": ("method", [1.0])}, {"method": ["KFAC"]})
    found = fl.open(fl.save(old, tmp_path / "old.nc"))
    assert float(found.cosine.sel(approximator="KFAC")) == 1.0


def test_the_root_of_a_singular_factor_is_taken_for_regular():
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 3, generator=generator, dtype=torch.double)
        x = torch.cat([x, x[:, :1]], 1)  # the same input twice
        rows = torch.randn(1, 4, 3, generator=generator, dtype=torch.double)
        state = Sums(
            (rows[0].T @ rows[0], x.T @ x), 4, 4, (3, 4), operators.Provenance("0")
        )
        found = fl.Shampoo().finish(state)
        with pytest.raises(fl.IndefiniteError, match="damping 0"):
            found.solve(torch.ones(3, 4).double(), 0.0)


@pytest.mark.slow
def test_intervals_take_one_kind_of_damping():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(6, 3).double()
    kinds = [0.1, fl.Factored(0.1), fl.RelativeDamping(0.1)]
    asked = functools.partial(
        fl.uncertainty,
        *(model, (x, None), fl.Categorical(), ["kfac"]),
        seeds=(0, 1),
        metrics=["inverse_error"],
        splits=1,
    )
    columns = asked(damping=kinds).inverse_error
    scalars = np.float64(0.1), torch.tensor(0.1).double(), fl.Tikhonov(0.1)
    for at, kind in [*enumerate(kinds), *((0, one) for one in scalars)]:
        alone = asked(damping=kind).inverse_error
        np.testing.assert_allclose(alone.isel(damping=0), columns.isel(damping=at))


def test_large_blocks_are_refused_by_their_norm_not_by_their_eigenvalues(monkeypatch):
    """Eigenvalues of 2,000 mini-blocks took 14 GiB, only to refuse a damping."""
    one = operators.Diagonal(torch.full((5000, 1), 1e20).double())
    two = operators.Diagonal(2 * one.entries)
    monkeypatch.setattr(operators.Diagonal, "eigenvalues", None)
    with pytest.raises(fl.NumericalError, match="three digits"):
        Pair(one, two).damped(1e-6)


def test_a_large_product_in_float32_is_refused_for_the_rounding_of_all_its_rows():
    """Two factors of 400 and 785 rows round as so many rows, not as 314,000."""
    rows, cols = torch.linspace(0.2, 1.5, 400), torch.linspace(0.3, 1.5, 785)
    inside = torch.outer(rows, cols)
    expected = float(inside.double().reciprocal().sum())
    for op in (
        operators.KroneckerEigen(torch.eye(400), torch.eye(785), inside),
        operators.KroneckerSum(((torch.diag(rows), torch.diag(cols)),), (400, 785)),
    ):
        assert op.inverse(0.0).trace() == pytest.approx(expected, rel=1e-4)
    nothing = torch.where(inside == inside.min(), 1e-9, inside)
    with pytest.raises(fl.NumericalError, match="damping 0"):
        operators.KroneckerEigen(torch.eye(400), torch.eye(785), nothing).inverse(0.0)

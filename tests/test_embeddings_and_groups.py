"""Laws of two relatives of the shared form: embeddings, and grouped convolutions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fisherlab as fl
from fisherlab.operators import KroneckerDiagonal, KroneckerSum, RowwiseEigen, Stacked
from fisherlab.statistics import Statistics
from tests import cases, oracles
from tests.cases import METHODS, normal
from tests.oracles import assert_close
from tests.test_approximators import passes

ROWS, WIDTH = 6, 3
FISHERS = pytest.mark.parametrize("fisher", cases.FISHERS)
SHARING = pytest.mark.parametrize("sharing", ["expand", "reduce"])


class Tokens(nn.Module):
    """A table, then a layer that mixes the positions; one-hot rows give the same."""

    def __init__(self, first, positions=3):
        super().__init__()
        self.first, self.last = first, nn.Linear(positions * WIDTH, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)).flatten(1))


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make().double()


def embedded(positions=3, **options):
    return seeded(lambda: Tokens(nn.Embedding(ROWS, WIDTH, **options), positions))


def tokens(n=7, t=3, seed=5):
    return torch.randint(0, ROWS, (n, t), generator=torch.Generator().manual_seed(seed))


def labels(n=7):
    return torch.arange(n) % 4


def embedding_statistics(fisher="exact", t=3, **options):
    data, kind = (tokens(t=t), labels()), cases.FISHERS[fisher]
    model = embedded(t, **options)
    return fl.collect(model, data, fl.Categorical(), kind, layers=["first"])["first"]


def one_hot_statistics(fisher="exact", t=3):
    """Return the statistics of the same network on one-hot rows and a Linear layer."""
    model = embedded(t)
    linear = seeded(lambda: Tokens(nn.Linear(ROWS, WIDTH, bias=False), t))
    linear.load_state_dict(model.state_dict() | {"first.weight": model.first.weight.T})
    rows = nn.functional.one_hot(tokens(t=t), ROWS).double()
    kind = cases.FISHERS[fisher]
    found = fl.collect(linear, (rows, labels()), fl.Categorical(), kind, layers=["first"])
    return found["first"]


def exact(stats):
    return oracles.second_moment_block(stats.example_gradients(), stats.count)


class Made(TorchDispatchMode):
    """Note the largest tensor that is made, and the numbers of all of at least a size."""

    def __init__(self, least=1):
        super().__init__()
        self.least, self.largest, self.numbers = least, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = any(one.alias_info for one in func._schema.returns)
        for one in out if isinstance(out, (tuple, list)) else (out,):
            size = one.numel() if isinstance(one, torch.Tensor) and not views else 0
            self.largest = max(self.largest, size)
            self.numbers += size if size >= self.least else 0
        return out


# --- embeddings ---


@FISHERS
@SHARING
@pytest.mark.parametrize("t", [1, 3])
def test_kfac_of_an_embedding_is_that_of_one_hot_rows(fisher, sharing, t):
    stats, hot = embedding_statistics(fisher, t), one_hot_statistics(fisher, t)
    ((outputs, inputs),) = fl.KFAC(sharing)(hot).terms
    found = fl.KFAC(sharing)(stats)
    ((rows, cols),) = found.terms
    assert_close(rows, inputs, 1e-12)
    assert_close(cols, outputs, 1e-12)
    assert isinstance(found, KroneckerDiagonal) == (sharing == "expand")
    assert_close(found.to_dense(), np.kron(inputs.numpy(), outputs.numpy()), 1e-12)


def test_kfac_of_an_embedding_is_its_definition_by_loops():
    stats = embedding_statistics("exact", padding_idx=2)
    rows, cols = np.zeros(ROWS), np.zeros((WIDTH, WIDTH))
    places = [(n, t) for n, t in np.ndindex(7, 3) if int(tokens()[n, t]) != 2]
    for n, t in places:
        rows[int(tokens()[n, t])] += 1 / 7
        for v in range(stats.gradients.shape[0]):
            g = stats.gradients[v, n, t].numpy()
            cols += np.outer(g, g) / len(places)
    found = fl.KFAC()(stats)
    assert_close(found.row_diagonal, rows, 1e-12)
    assert_close(found.column_factor, cols, 1e-12)
    assert stats.positions == len(places)
    assert rows[2] == 0


def test_padding_to_the_longest_changes_nothing():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(ROWS, WIDTH, padding_idx=0)
            self.head = nn.Linear(WIDTH, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.table(x)).sum(1))

    model, x, likelihood = seeded(Pooled), 1 + tokens(6, 2) % (ROWS - 1), fl.Categorical()
    longer = torch.cat([x[3:], torch.zeros(3, 2, dtype=torch.long)], 1)
    ragged = [(x[:3], None), (longer, None)]
    short = fl.collect(model, (x, None), likelihood)["table"]
    long = fl.collect(model, ragged, likelihood)["table"]
    for method in (fl.KFAC(), fl.KFAC("reduce"), fl.EKFAC(), fl.FOOF(), fl.KPSVD()):
        assert_close(method(long).to_dense(), method(short).to_dense(), 1e-8)
    assert_close(exact(long), exact(short), 1e-12)


@FISHERS
def test_ekfac_of_an_embedding_is_the_best_diagonal_of_its_basis(fisher):
    stats = embedding_statistics(fisher)
    block, found = exact(stats), fl.EKFAC()(stats)
    assert isinstance(found, RowwiseEigen)
    basis = torch.from_numpy(np.kron(np.eye(ROWS), found.column_basis.numpy()))
    assert_close(found.entries.flatten(), (basis.T @ block @ basis).diagonal(), 1e-10)
    left = float((block - found.to_dense()).norm() ** 2)
    square = float(block.norm() ** 2 - found.entries.norm() ** 2)
    assert_close(left, square, 0, 1e-12 * float(block.norm() ** 2))
    worse = float((block - fl.KFAC()(stats).to_dense()).norm() ** 2)
    assert left <= worse
    other = embedding_statistics("empirical")
    kept = fl.EKFAC(keep_basis=True)(other, previous=found)
    assert torch.equal(kept.column_basis, found.column_basis)
    moved = (basis.T @ exact(other) @ basis).diagonal()
    assert_close(kept.entries.flatten(), moved, 1e-10)


def test_kfac_of_an_embedding_is_exact_for_one_datum_in_one_place():
    stats = embedding_statistics("exact", t=1)
    one = replace(
        stats,
        tokens=stats.tokens[:1],
        gradients=stats.gradients[:, :1],
        count=1,
        positions=1,
    )
    for method in (fl.KFAC(), fl.EKFAC(), fl.TKFAC(), fl.KPSVD()):
        assert_close(method(one).to_dense(), exact(one), 1e-9)


def test_foof_of_an_embedding_counts_rows():
    stats = embedding_statistics()
    found = fl.FOOF()(stats)
    counts = torch.bincount(tokens().flatten(), minlength=ROWS)
    assert_close(found.row_diagonal, counts.double() / 7, 1e-12)
    assert_close(found.column_factor, torch.eye(WIDTH), 1e-12)


@pytest.mark.parametrize(
    "damping", [0.3, fl.Tikhonov(0.3), fl.Factored(0.3), fl.Factored(0.3, 2.0)]
)
def test_dampings_of_a_diagonal_factor_are_those_of_the_same_matrix_formed(damping):
    found = fl.KFAC()(embedding_statistics())
    formed = KroneckerSum(found.terms, found.weight_shape)
    w = normal(2, ROWS, WIDTH)
    assert_close(found.solve(w, damping), formed.solve(w, damping), 1e-10)
    inverse = formed.inverse(damping).to_dense()
    assert_close(found.inverse(damping).to_dense(), inverse, 1e-10)
    assert_close(found.sqrt(0.2).to_dense(), formed.sqrt(0.2).to_dense(), 1e-9)
    root = formed.inverse_sqrt(0.2).to_dense()
    assert_close(found.inverse_sqrt(0.2).to_dense(), root, 1e-9)


def test_a_large_table_is_never_one_hot():
    size = 100_000
    model = nn.Sequential(nn.Embedding(size, 2), nn.Flatten(), nn.Linear(6, 3))
    data = (tokens(5, 3) * 1000, None)
    stats = fl.collect(model, data, fl.Categorical(), layers=["0"])["0"]
    assert stats.nbytes < 10_000
    with Made() as seen:
        kfac = fl.KFAC()(stats)
        fl.FOOF()(stats)
        fl.ExactBlock()(stats).frobenius_norm()
    assert seen.largest <= size
    assert kfac.stored_numbers == size + 3
    with Made() as seen:
        error = fl.metrics.frobenius_error(fl.ExactBlock()(stats), fl.EKFAC()(stats))
        kfac.solve(torch.zeros(size, 2), 0.1)
    assert seen.largest <= 2 * size
    assert 0 < error < 1


def test_methods_of_one_pair_refuse_an_embedding():
    with pytest.raises(fl.NeedsSharedForm, match="rows of an embedding"):
        fl.SINGD()(embedding_statistics())


# --- grouped convolutions ---


def grouped_model(groups=2, bias=True, positions=4):
    def make():
        conv = nn.Conv1d(4, 2 * groups, 2, groups=groups, bias=bias)
        tail = nn.Linear(2 * groups * positions, 3)
        return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), tail)

    return seeded(make)


def grouped_statistics(groups=2, bias=True, fisher="exact", positions=4, n=5):
    x = normal(n, 4, positions + 1, seed=3)
    y = torch.arange(n) % 3
    model, kind = grouped_model(groups, bias, positions), cases.FISHERS[fisher]
    return fl.collect(model, (x, y), fl.Categorical(), kind, layers=["0"])["0"]


def groups_by_hand(stats, groups, bias, positions):
    """Return inputs and gradients of each group, from the data and unfold."""
    x = normal(stats.count, 4, positions + 1, seed=3)
    width = 4 // groups
    for g in range(groups):
        patches = x[:, g * width : (g + 1) * width].unfold(2, 2, 1)  # (n, channel, t, 2)
        a = patches.permute(0, 2, 1, 3).flatten(2)
        if bias:
            a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
        yield a, stats.gradients[..., 2 * g : 2 * g + 2]


@FISHERS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("groups", "positions"), [(2, 4), (4, 4), (2, 1)])
def test_kfac_of_a_grouped_convolution_has_a_product_for_each(
    fisher, bias, groups, positions
):
    stats = grouped_statistics(groups, bias, fisher, positions)
    found = fl.KFAC()(stats)
    assert isinstance(found, Stacked)
    assert stats.groups == groups
    blocks = []
    by_hand = groups_by_hand(stats, groups, bias, positions)
    for (a, g), part in zip(by_hand, found.parts, strict=True):
        rows, cols = oracles.kfac(a, g, stats.count, stats.count * positions)
        ((g_found, a_found),) = part.terms
        assert_close(g_found, rows, 1e-12)
        assert_close(a_found, cols, 1e-12)
        blocks.append(torch.from_numpy(np.kron(rows.numpy(), cols.numpy())))
    assert_close(found.to_dense(), torch.block_diag(*blocks), 1e-12)


@pytest.mark.parametrize("positions", [4, 1])
@pytest.mark.parametrize("rank", [1, 2])
def test_kpsvd_of_a_grouped_convolution_is_the_best_of_each_diagonal_block(rank, positions):
    stats = grouped_statistics(2, positions=positions)
    found, whole = fl.KPSVD(rank)(stats), exact(stats)
    half = len(whole) // 2
    best = [
        oracles.best_sum(whole[at, at], (2, stats.weight_shape[1]), rank)
        for at in (slice(0, half), slice(half, None))
    ]
    assert_close(found.to_dense(), torch.block_diag(*best), 1e-8)
    assert found.converged
    assert found.iterations >= 1
    assert found.residual <= 1e-9


@pytest.mark.parametrize("name", METHODS)
def test_a_stack_answers_as_its_groups_do(name):
    stats, method = grouped_statistics(), METHODS[name]
    try:
        found = method(stats)
    except fl.NeedsSharedForm as error:
        assert "2 groups" in str(error)  # noqa: PT017 - methods may refuse, saying why
        return
    if not isinstance(found, Stacked):
        return
    whole = torch.block_diag(*(method(part).to_dense() for part in stats.by_group()))
    assert_close(found.to_dense(), whole, 1e-9)
    for damping in (0.3, fl.Factored(0.3)):
        w = normal(*stats.weight_shape)
        pairs = zip(found.parts, w.split(2), strict=True)
        try:
            expected = [part.solve(rows, damping) for part, rows in pairs]
        except (ValueError, fl.NumericalError):
            continue
        assert_close(found.solve(w, damping), torch.cat(expected), 1e-9)
        assert_close(found.inverse(damping) @ w, torch.cat(expected), 1e-9)


def test_errors_of_grouped_layers_are_in_order():
    stats = grouped_statistics()
    block = exact(stats)
    e = {
        name: float((block - METHODS[name](stats).to_dense()).norm())
        for name in ("kpsvd-2", "kfac-corrected", "kpsvd", "kfac", "ekfac", "tkfac")
    }
    assert e["kpsvd-2"] <= e["kfac-corrected"] + 1e-12
    assert e["kfac-corrected"] <= e["kfac"] + 1e-12
    assert e["kpsvd"] <= min(e["kfac"], e["tkfac"]) + 1e-12
    assert e["ekfac"] <= e["kfac"] + 1e-12


# --- both ---


STATISTICS = {"embedding": embedding_statistics, "grouped": grouped_statistics}


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("name", METHODS)
def test_streams_give_what_statistics_give(kind, name):
    model = embedded() if kind == "embedding" else grouped_model()
    x = tokens() if kind == "embedding" else normal(5, 4, 5, seed=3)
    block = "first" if kind == "embedding" else "0"
    method = METHODS[name]
    if not hasattr(method, "accumulate"):
        pytest.skip("takes no stream")
    halves = [(x[:2], None), (x[2:], None)]
    whole = fl.collect(model, (x, None), fl.Categorical(), layers=[block])[block]
    try:
        expected = method(whole)
    except fl.NeedsSharedForm:
        pytest.skip("needs the shared form")
    found = fl.approximate(
        model, halves, fl.Categorical(), {"it": method}, layers=[block], chunk_size=2
    )["it"][block]
    assert type(found) is type(expected)
    assert found.provenance.examples == len(x)
    assert_close(found.to_dense(), expected.to_dense(), 1e-8)


def part(stats, examples, columns=slice(None), counted=True):
    """Cut a run of examples, and columns of it, out of statistics."""
    cut = {"gradients": stats.gradients[columns, examples]}
    if stats.tokens is None:
        cut["inputs"] = stats.inputs[examples]
        positions = cut["inputs"].shape[0] * cut["inputs"].shape[1]
    else:
        cut["tokens"] = stats.tokens[examples]
        positions = int((cut["tokens"] >= 0).sum())
    count = cut["gradients"].shape[1]
    return replace(stats, count=count * counted, positions=positions * counted, **cut)


PIECEWISE = {name: METHODS[name] for name in ("kfac", "kfac-reduce", "ekfac", "foof")} | {
    "tkfac": fl.TKFAC(),
    "kpsvd by passes": fl.KPSVD(2, fl.Passes()),
    "deflation": fl.Deflation(2),
    "kfac-corrected by passes": fl.KFACCorrected(1, fl.Passes()),
}


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("name", PIECEWISE)
def test_pieces_of_examples_and_columns_add_up_to_the_whole(kind, name):
    options = {"padding_idx": 2} if kind == "embedding" else {}
    stats, method = STATISTICS[kind](**options), PIECEWISE[name]
    first = [
        part(stats, slice(0, 2), slice(0, 1)),
        part(stats, slice(0, 2), slice(1, None), counted=False),
    ]
    groups = [first, [part(stats, slice(2, 3)), part(stats, slice(3, None))]]
    found = passes(method, groups)
    assert_close(found.to_dense(), method(stats).to_dense(), 1e-7)
    assert found.provenance.examples == stats.count


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("name", ["kfac", "ekfac", "foof", "kpsvd"])
def test_averages_are_those_of_the_matrices(kind, name):
    make = STATISTICS[kind]
    old, new = (METHODS[name](make(fisher=f)) for f in ("exact", "empirical"))
    assert_close(fl.average(old, new, 0.0).to_dense(), new.to_dense(), 1e-10)
    if name == "ekfac":  # the diagonal of the averaged matrix, so its trace is kept
        half = fl.average(old, new, 0.5)
        assert_close(half.trace(), (old.trace() + new.trace()) / 2, 1e-10)
    else:
        assert_close(fl.average(old, new, 1.0).to_dense(), old.to_dense(), 1e-10)


@pytest.mark.parametrize("kind", STATISTICS)
def test_compare_takes_them(kind):
    one = STATISTICS[kind]()
    stats = Statistics({one.name: one}, one.provenance)
    names = ["kfac", "ekfac", "kpsvd", "diagonal", "mini-block"]
    found = fl.compare(stats, names)
    errors = found["frobenius_error"].sel(layer=one.name).to_numpy()
    block = exact(one)
    for name, value in zip(names, errors, strict=True):
        dense = METHODS[name](one).to_dense()
        assert_close(float(value), (block - dense).norm() / block.norm(), 1e-7)


def test_a_group_that_did_not_converge_is_visible_in_a_comparison():
    one = grouped_statistics()
    stats = Statistics({one.name: one}, one.provenance)
    cut = fl.KPSVD(2, fl.Lanczos(steps=1, max_iterations=1))
    found = fl.compare(stats, {"cut": cut})
    assert "not converged" in str(found["status"].sel(layer=one.name).item())
    assert not cut(one).converged


@pytest.mark.parametrize("name", ["kfac", "ekfac", "kpsvd"])
def test_they_train(name):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(ROWS, 4)
            self.conv = nn.Conv1d(4, 4, 2, groups=2)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            found = self.conv(self.table(x).transpose(1, 2))
            return self.head(torch.tanh(found).flatten(1))

    model = seeded(Both)
    step = fl.NaturalGradient(model, fl.Categorical(), METHODS[name], lr=0.1, damping=0.1)
    losses = [float(step.step(batch=(tokens(), labels()))) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)


# --- large tables ---


LARGE = {
    "kpsvd": fl.KPSVD(),
    "kpsvd-2": fl.KPSVD(2),
    "power": fl.KPSVD(2, fl.Power()),
    "lanczos-2": fl.KPSVD(2, fl.Lanczos()),
    "lanczos-paper": fl.KPSVD(2, fl.Lanczos(steps=2, reorthogonalise=False)),
    "deflation": fl.Deflation(2),
    "kfac-corrected": fl.KFACCorrected(),
}


def large(size, n=4, t=2, fisher=None):
    """Return the statistics of a table of which a few rows are looked up, and padding."""
    rows = torch.tensor([size // 2, 3, size - 2, size - 5])
    places = torch.randint(0, 4, (n, t))
    model = Tokens(nn.Embedding(size, WIDTH, padding_idx=3), t).double()
    data = rows[places], labels(n)
    return fl.collect(model, data, fl.Categorical(), fisher, layers=["first"])["first"]


@pytest.mark.parametrize("name", LARGE)
def test_of_a_large_table_only_the_rows_in_use_are_iterated_on(name):
    method, size = LARGE[name], 400
    stats = large(size)
    with Made(size**2) as made:
        found = method(stats)
    assert made.numbers <= len(found.terms) * size**2  # what it returns, and no more


@pytest.mark.parametrize("name", LARGE)
def test_of_a_large_table_the_sum_is_that_of_the_dense_rearrangement(name):
    size = 20
    stats = large(size)
    z = oracles.rearranged(exact(stats), stats.weight_shape)
    terms = LARGE[name](stats).terms
    found = sum(np.outer(g.numpy().ravel(), a.numpy().ravel()) for g, a in terms)
    if name == "kfac-corrected":
        ((rows, cols),) = fl.KFAC()(stats).terms
        kfac = np.outer(rows.numpy().ravel(), cols.numpy().ravel())
        found, z = found - kfac, z - kfac
    u, values, vt = np.linalg.svd(z, full_matrices=False)
    rank = 1 if name in ("kpsvd", "kfac-corrected") else 2
    best = (u[:, :rank] * values[:rank]) @ vt[:rank]
    if name == "lanczos-paper":  # two steps, so below the best, but a projection
        left = np.linalg.norm(z - found)
        assert np.linalg.norm(z - best) <= left < np.linalg.norm(z)
    else:
        assert_close(found, best, 1e-8)


def test_errors_of_a_table_with_fewer_samples_than_columns_are_those_of_dense_matrices():
    stats = large(20, n=1, fisher=fl.Empirical())
    one = Statistics({stats.name: stats}, stats.provenance)
    found = fl.compare(one, METHODS, metrics=["frobenius_error"]).isel(layer=0)
    block = exact(stats)
    for name, method in METHODS.items():
        cell = found.sel(approximator=name)
        if np.isnan(cell.frobenius_error.item()):
            assert "inputs and output gradients" in cell.status.item()
            continue
        error = (block - method(stats).to_dense()).norm() / block.norm()
        assert_close(1 + cell.frobenius_error.item(), 1 + error, 1e-7)


def test_tables_whose_sums_exceed_a_budget_are_refused_before_they_are_made():
    size = 400
    stats = large(size)
    one = Statistics({stats.name: stats}, stats.provenance)
    names = ["kfac", "ekfac", "kpsvd", "kfac-corrected"]
    with Made(size**2) as made:
        found = fl.compare(one, names, metrics=["frobenius_error"], budget=8 * size**2)
    status = dict(zip(names, found.status.values.ravel().tolist(), strict=True))
    assert status["kfac"] == status["ekfac"] == "ok"
    assert "more than the budget" in status["kpsvd"]
    assert "more than the budget" in status["kfac-corrected"]
    assert made.numbers == 0

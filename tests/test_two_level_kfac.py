"""The two-level solve is KFAC's plus a Galerkin solve on a space with layers in it."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import fisherlab as fl
from tests import network_oracles as oracle
from tests.cases import FISHERS, LIKELIHOODS, normal
from tests.oracles import assert_close, damped_inverse
from tests.test_network_operators import LAMBDA, N, statistics, weights

SPACES = {"nicolaides": 1, "residual": 1, "spectral": 2, "krylov": 2}


def dense_levels(stats, damping, factored=False):
    """Return P = F + λI and the inverse of the damped KFAC blocks."""
    exact = oracle.exact(stats)
    own = []
    for name in stats:
        rows, cols = oracle.pair_factors(stats, name, name)
        if factored:
            rows, cols = oracle.damped(rows, cols, damping)
        block = torch.kron(torch.from_numpy(rows), torch.from_numpy(cols))
        own.append(damped_inverse(block, 0.0 if factored else damping))
    eye = torch.eye(len(exact), dtype=exact.dtype)
    return exact + damping * eye, torch.block_diag(*own)


def space(coarse, vectors, stats, p, fine, right):
    """Return the rows of R from the definition, one block at a time, any scale."""
    at = oracle.offsets({name: s.weight_shape for name, s in stats.items()})
    rows = []
    for name, own in at.items():
        columns = torch.zeros(vectors, len(right), dtype=right.dtype)
        inside = list(own)
        if coarse == "nicolaides":
            columns[0, inside] = 1.0
        elif coarse == "spectral":
            block = fl.KFAC()(stats[name]).to_dense()
            columns[:, inside] = torch.linalg.eigh(block)[1][:, :vectors].T
        else:
            rest = right - p @ (fine @ right)
            for k in range(vectors):
                rest = fine @ rest
                columns[k, inside] = rest[inside]
        rows.append(columns)
    return torch.cat(rows)


def expected(coarse, combination, vectors, stats, right, damping, factored=False):
    p, fine = dense_levels(stats, damping, factored)
    first = fine @ right
    rows = space(coarse, vectors, stats, p, fine, right)
    rows = rows / rows.norm(dim=1, keepdim=True)
    left = right - p @ first if combination == "multiplicative" else right
    return first + rows.T @ torch.linalg.solve(rows @ p @ rows.T, rows @ left)


@pytest.mark.parametrize("coarse", SPACES)
@pytest.mark.parametrize("combination", ["additive", "multiplicative"])
@pytest.mark.parametrize("factored", [False, True])
def test_solve_is_the_definition(coarse, combination, factored):
    # The empirical Fisher of many examples: no eigenvalue of a block is repeated.
    stats = statistics("gaussian", "empirical", examples=40)
    op = fl.TwoLevelKFAC(coarse, combination, SPACES[coarse])(stats)
    ws = weights(op, 2)
    flat = torch.cat([w.flatten(1) for w in ws.values()], 1)
    damping = fl.Factored(LAMBDA) if factored else LAMBDA
    solved = op.join(op.solve(ws, damping)).squeeze(-1)
    again = op.solve(flat[..., None], damping).squeeze(-1)
    for k, right in enumerate(flat):
        wanted = expected(
            coarse, combination, SPACES[coarse], stats, right, LAMBDA, factored
        )
        assert_close(solved[k], wanted, 1e-8)
        assert_close(again[k], wanted, 1e-8)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("coarse", SPACES)
def test_multiplicative_never_increases_the_energy_error(likelihood, fisher, coarse):
    stats = statistics(likelihood, fisher)
    op = fl.TwoLevelKFAC(coarse, "multiplicative", SPACES[coarse])(stats)
    p, fine = dense_levels(stats, LAMBDA)
    ws = weights(op, 8)
    flat = op.join(ws).squeeze(-1)
    best = torch.linalg.solve(p, flat.T).T
    alone, both = flat @ fine, op.join(op.solve(ws, LAMBDA)).squeeze(-1)
    before, after = (energy(p, found - best) for found in (alone, both))
    assert bool((after <= before * (1 + 1e-9)).all())
    if coarse != "spectral":  # the smallest eigenvectors may see none of the error
        assert bool((after < before).any())


def energy(p, error):
    return torch.einsum("kp,pq,kq->k", error, p, error).clamp_min(0).sqrt()


def test_additive_can_increase_the_energy_error():
    stats = statistics()
    op = fl.TwoLevelKFAC(combination="additive")(stats)
    p, fine = dense_levels(stats, LAMBDA)
    ws = weights(op, 8)
    flat = op.join(ws).squeeze(-1)
    best = torch.linalg.solve(p, flat.T).T
    alone, both = flat @ fine, op.join(op.solve(ws, LAMBDA)).squeeze(-1)
    assert bool((energy(p, both - best) > energy(p, alone - best)).any())


def test_multiplicative_is_exact_on_the_coarse_space():
    """What the fine level leaves has no part in the coarse space afterwards."""
    stats = statistics()
    op = fl.TwoLevelKFAC()(stats)
    p, _ = dense_levels(stats, LAMBDA)
    ws = weights(op)
    solved = op.solve(ws, LAMBDA)
    rest = op.split(op.join(ws) - (p @ op.join(solved).squeeze(-1))[:, None])
    for name, w in rest.items():
        assert abs(float(w.sum())) < 1e-10 * float(ws[name].norm())


def test_coarse_matrix_holds_lambda_times_the_squared_norm():
    """Unit directions: λ‖r‖² is λ; F enters by the sums of the layers' entries."""
    stats = statistics()
    sizes = torch.tensor(
        [float(s.weight_shape[0] * s.weight_shape[1]) for s in stats.values()]
    )
    groups = oracle.offsets({name: s.weight_shape for name, s in stats.items()}).values()
    exact = oracle.exact(stats)
    sums = torch.tensor(
        [[exact[list(a)][:, list(b)].sum() for b in groups] for a in groups]
    )
    for damping in (0.01, 10.0):
        inverse = fl.TwoLevelKFAC()(stats).inverse(damping)
        scale = torch.outer(sizes, sizes).sqrt().double()
        wanted = sums.double() / scale + damping * torch.eye(3).double()
        assert_close(torch.linalg.inv(inverse.coarse_inverse), wanted, 1e-6)


def test_the_scale_of_the_directions_does_not_matter():
    """λ R Rᵀ scales as R F Rᵀ does; λ I would not."""
    for combination in ("additive", "multiplicative"):
        inverse = fl.TwoLevelKFAC(combination=combination)(statistics()).inverse(0.1)
        scaled = {name: 3 * vectors for name, vectors in inverse.space.items()}
        other = replace(inverse, space=scaled)
        assert_close(other.to_dense(), inverse.to_dense())


def test_coarse_matrix_from_samples_is_that_from_products():
    op = fl.ExactNetwork()(statistics())
    space = {name: w.repeat(2, 1, 1) + 0.1 for name, w in weights(op, 1).items()}
    rows = torch.block_diag(*(vectors.flatten(1) for vectors in space.values()))
    wanted = rows @ op.to_dense() @ rows.T
    assert_close(op.congruence(space), wanted)
    assert_close(
        fl.KhatriRao()(statistics()).congruence(space),
        rows @ fl.KhatriRao()(statistics()).to_dense() @ rows.T,
    )


def test_one_block_that_kfac_solves_exactly_needs_no_correction():
    """A zero residual spans no coarse space; nothing is divided by it."""
    stats = fl.collect(
        nn.Linear(3, 2).double(), (normal(N, 3), None), fl.Gaussian(), compress=False
    )
    for coarse in ("residual", "krylov"):
        op = fl.TwoLevelKFAC(coarse)(stats)
        ws = {"weight": torch.zeros(2, 4).double()}
        assert not op.solve(ws, LAMBDA)["weight"].any()
        right = weights(op)
        exact = fl.ExactBlock()(stats["weight"]).solve(right["weight"], LAMBDA)
        assert_close(op.solve(right, LAMBDA)["weight"], exact, 1e-9)


def test_layers_without_the_shared_form_have_their_exact_block():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3)
    ).double()
    data = (normal(4, 1, 3, 3), None)
    stats = fl.collect(model, data, fl.Categorical(), compress=False)
    for coarse, vectors in SPACES.items():
        op = fl.TwoLevelKFAC(coarse, vectors=vectors)(stats)
        p = oracle.exact(stats)
        p = p + 0.1 * torch.eye(len(p), dtype=p.dtype)
        ws = weights(op, 3)
        flat = op.join(ws).squeeze(-1)
        best = torch.linalg.solve(p, flat.T).T
        both = op.join(op.solve(ws, 0.1)).squeeze(-1)
        alone = op.join(op.local.solve(ws, 0.1)).squeeze(-1)
        assert bool((energy(p, both - best) <= energy(p, alone - best) * (1 + 1e-9)).all())


def test_a_space_that_follows_the_right_side_has_no_matrix():
    op = fl.TwoLevelKFAC("residual")(statistics())
    inverse = op.inverse(0.1)
    ws = weights(op, 2)
    products, solved = inverse @ ws, op.solve(ws, 0.1)
    assert all(torch.equal(products[name], w) for name, w in solved.items())
    for question in (
        inverse.to_dense,
        inverse.diagonal,
        inverse.trace,
        inverse.frobenius_norm,
        inverse.eigenvalues,
        lambda: op.logdet(0.1),
        lambda: inverse.inverse(0.1),
        lambda: inverse.inner(inverse),
        lambda: inverse.diagonal_block("0"),
        lambda: inverse.block("0", "2"),
    ):
        with pytest.raises(ValueError, match="no matrix"):
            question()
    with pytest.raises(ValueError, match="unknown"):
        op.solve({"a": torch.ones(2, 2)}, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coarse": "fourier"}, "coarse is one of nicolaides"),
        ({"combination": "sum"}, "combination is one of additive"),
        ({"vectors": 2}, "exactly one for nicolaides and residual"),
        ({"coarse": "krylov", "vectors": 0}, "at least one"),
    ],
)
def test_wrong_choices_are_named(options, message):
    # Type checks of the test run would refuse some of them before the class does.
    wrong = object.__new__(fl.TwoLevelKFAC)
    for name, value in {
        "coarse": "nicolaides",
        "combination": "additive",
        "vectors": 1,
    }.items():
        object.__setattr__(wrong, name, options.get(name, value))
    with pytest.raises(ValueError, match=message):
        wrong.__post_init__()


def test_block_diagonal_keeps_the_diagonal_blocks():
    stats = statistics()
    exact = oracle.exact(stats)
    mask = oracle.tridiagonal_mask({n: s.weight_shape for n, s in stats.items()}, 0)
    kept = torch.where(mask, exact, torch.zeros((), dtype=exact.dtype))
    op = fl.block_diagonal("exact", stats)
    assert_close(op.to_dense(), kept)
    whole = fl.ExactNetwork()(stats)
    error = fl.metrics.frobenius_error(whole, op)
    assert_close(error, (exact - kept).norm() / exact.norm(), 1e-9)
    mixed = fl.block_diagonal({"0": "kfac", "2": fl.Diagonal(), "4": "exact"}, stats)
    kinds = [type(block).__name__ for block in mixed.blocks.values()]
    assert kinds == ["KroneckerSum", "Diagonal", "FactoredFisher"]
    assert_close(mixed.trace(), op.trace() - kfac_gap(stats["0"]))
    assert list(fl.block_diagonal("kfac", {n: stats[n] for n in ("4", "0")}).blocks) == [
        "4",
        "0",
    ]


def kfac_gap(layer):
    return fl.ExactBlock()(layer).trace() - fl.KFAC()(layer).trace()


def test_block_diagonal_refuses_unknown_names():
    stats = statistics()
    with pytest.raises(ValueError, match=r"misses \['2', '4'\], and \['x'\] are unknown"):
        fl.block_diagonal({"0": "kfac", "x": "kfac"}, stats)
    with pytest.raises(ValueError, match="unknown; known"):
        fl.block_diagonal("kfaq", stats)
    with pytest.raises(ValueError, match="unknown; known"):
        fl.approximate_network(nn.Linear(2, 2), [], fl.Gaussian(), ["kfaq"])


def test_factored_damping_of_blocks_without_kronecker_terms_is_tikhonov():
    stats = statistics()
    op = fl.block_diagonal({"0": "kfac", "2": "exact", "4": "diagonal"}, stats)
    ws = weights(op)
    found = op.solve(ws, fl.Factored(LAMBDA))
    for name, damping in zip(ws, (fl.Factored(LAMBDA), LAMBDA, LAMBDA), strict=True):
        assert_close(found[name], op.blocks[name].inverse(damping) @ ws[name])
    assert_close(op.logdet(fl.Factored(LAMBDA)), -op.inverse(fl.Factored(LAMBDA)).logdet())


def test_names_of_network_approximators():
    found = fl.network_approximators()
    for name, other in itertools.pairwise(sorted(found)):
        assert found[name] != found[other]
    assert {"kfac-tridiagonal", "two-level-kfac", "khatri-rao"} <= set(found)

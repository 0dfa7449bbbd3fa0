"""Laws of operators: every one behaves as its dense matrix, whatever it holds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import fractional_matrix_power
from torch.utils._python_dispatch import TorchDispatchMode

import fisherlab as fl
from fisherlab.operators import (
    Dense,
    Diagonal,
    FactoredFisher,
    FactoredMiniBlocks,
    KroneckerDiagonal,
    KroneckerEigen,
    KroneckerSum,
    LowRank,
    MiniBlocks,
    ModeProducts,
    OneSidedRoot,
    Partition,
    Provenance,
    QuasiDiagonal,
    QuasiNewtonFactors,
    RootDiagonal,
    RotatedAdam,
    RowRankOne,
    RowwiseEigen,
    Stacked,
    WhitenedRoot,
)
from fisherlab.operators.gradient_roots import Modes
from fisherlab.operators.kronecker_congruence import KroneckerCholesky
from fisherlab.operators.quasi_newton import HeldInverse, PairsInverse
from fisherlab.samples import GroupedSamples, TokenSamples
from tests import cases, oracles
from tests.cases import normal
from tests.oracles import assert_close

DAMPING = 0.5


def psd(size, seed):
    root = normal(size, size + 1, seed=seed)
    return root @ root.T / size


def basis(size, seed):
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


def dense(o, i, seed):
    matrix = psd(o * i, seed)
    return Dense(matrix, (o, i)), matrix


def diagonal(o, i, seed):
    entries = normal(o, i, seed=seed).square()
    return Diagonal(entries), torch.diag(entries.flatten())


def factored(kind, form, v, n):
    def make(o, i, seed):
        shared = {"t": 2} if kind is cases.shared else {}
        samples = kind(v=v, n=n, o=o, i=i, seed=seed, **shared)
        expected = oracles.second_moment_block(formed(samples), n)
        return FactoredFisher(samples, n, form=form), expected

    return make


def formed(samples):
    return torch.cat(  # one example after the other: not the path of the operators
        [samples.matrices(slice(k, k + 1)) for k in range(samples.examples)], 1
    )


def kronecker(terms):
    def make(o, i, seed):
        pairs = [(psd(o, seed + k), psd(i, seed + k + 9)) for k in range(terms)]
        total = sum(np.kron(g.numpy(), a.numpy()) for g, a in pairs)
        matrix = torch.as_tensor(total + np.zeros((o * i, o * i)))
        made = KroneckerSum(tuple(pairs), (o, i), precision=torch.float64)
        return made, matrix

    return make


def kronecker_cholesky(o, i, seed):
    triangles = [torch.linalg.cholesky(psd(k, seed + k) + eye(k)) for k in (o, i)]
    rows, cols = (torch.linalg.inv(one @ one.T) for one in triangles)
    return KroneckerCholesky(tuple(triangles), torch.float64), torch.kron(rows, cols)


def kronecker_skew(o, i, seed):
    """Add a pair of skew factors, whose product is symmetric: transposes show."""
    made, matrix = kronecker(1)(o, i, seed)
    rows, cols = (normal(size, size, seed=seed + size) for size in (o, i))
    pair = 0.1 * (rows - rows.T), 0.1 * (cols - cols.T)
    ((g, a),) = made.terms
    g, a = g + 2 * torch.eye(o), a + 2 * torch.eye(i)
    matrix = np.kron(g.numpy(), a.numpy()) + np.kron(pair[0].numpy(), pair[1].numpy())
    return KroneckerSum(((g, a), pair), (o, i)), torch.from_numpy(matrix)


def eigen(o, i, seed):
    u, v, s = basis(o, seed), basis(i, seed + 1), normal(o, i, seed=seed).square()
    whole = torch.from_numpy(np.kron(u.numpy(), v.numpy()))
    return KroneckerEigen(u, v, s), whole @ torch.diag(s.flatten()) @ whole.T


def kronecker_diagonal(o, i, seed):
    rows, cols = normal(o, seed=seed).square(), psd(i, seed)
    whole = np.kron(np.diag(rows.numpy()), cols.numpy())
    return KroneckerDiagonal(rows, cols), torch.from_numpy(whole)


def rowwise_eigen(o, i, seed):
    v, s = basis(i, seed), normal(o, i, seed=seed).square()
    whole = torch.from_numpy(np.kron(np.eye(o), v.numpy()))
    return RowwiseEigen(v, s), whole @ torch.diag(s.flatten()) @ whole.T


def stacked(kinds):
    """Stack an operator for each row group: all rows but one, and the last."""

    def make(o, i, seed):
        sizes = [o - 1, 1] if o > 1 else [1]
        chosen = zip(kinds, sizes, strict=False)
        pairs = [kind(size, i, seed + k) for k, (kind, size) in enumerate(chosen)]
        whole = torch.block_diag(*(matrix for _, matrix in pairs))
        return Stacked(tuple(op for op, _ in pairs)), whole

    return make


def grouped(v, n, o, i, seed):
    groups = [cases.outer(v, n, 1, i, seed + k) for k in range(o)]
    return GroupedSamples(tuple(groups))


def looked_up(v, n, o, i, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, o, (n, 2), generator=generator)
    return TokenSamples(tokens, normal(v, n, 2, i, seed=seed + 1), o)


def partitions(o, i):
    shuffled = torch.randperm(o * i, generator=torch.Generator().manual_seed(0))
    return {
        "row": Partition.by_row((o, i)),
        "kernel": Partition.by_kernel((o, i), 1 if i % 2 else 2, bias=i % 2 == 1),
        "shuffled": Partition((o, i), (shuffled[: o * i - 1][None], shuffled[-1:][None])),
    }


def mini_blocks(which):
    def make(o, i, seed):
        chosen = partitions(o, i)[which]
        whole, groups = psd(o * i, seed), [g for table in chosen.groups for g in table]
        blocks = tuple(
            torch.stack([whole[g][:, g] for g in table]) for table in chosen.groups
        )
        return MiniBlocks(chosen, blocks), oracles.mini_blocks(whole, groups)

    return make


def factored_mini_blocks(kind, which):
    def make(o, i, seed):
        fisher, whole = factored(kind, "auto", 2, 5)(o, i, seed)
        chosen = partitions(o, i)[which]
        groups = [g for table in chosen.groups for g in table]
        made = FactoredMiniBlocks(chosen, fisher.samples, fisher.count)
        return made, oracles.mini_blocks(whole, groups)

    return make


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def mini_blocks_shared(which):
    def make(o, i, seed):
        chosen = partitions(o, i)[which]
        blocks = [psd(table.shape[1], seed + k) for k, table in enumerate(chosen.groups)]
        matrix = torch.zeros(o * i, o * i, dtype=torch.float64)
        for block, table in zip(blocks, chosen.groups, strict=True):
            for group in table:
                matrix[group[:, None], group] = block
        return MiniBlocks(chosen, tuple(block[None] for block in blocks)), matrix

    return make


def low_rank(o, i, seed):
    rows = normal(2, o, i, seed=seed)
    matrix = 0.2 * eye(o * i)
    for row in rows:
        matrix = matrix + torch.outer(row.flatten(), row.flatten())
    return replace(LowRank.of_rows(rows), shift=0.2), matrix


def row_rank_one(o, i, seed):
    d, u, s = normal(o, i, seed=seed).square(), normal(o, i, seed=seed + 1), normal(o)
    blocks = [
        torch.diag(a) + c.abs() * torch.outer(b, b) for a, b, c in zip(d, u, s, strict=True)
    ]
    return RowRankOne(d, u, s.abs()), torch.block_diag(*blocks)


def quasi_diagonal(o, i, seed):
    blocks = []
    for row in range(o):
        block = psd(i, seed + row)
        bias = block[:, -1]
        full = torch.outer(bias, bias) / bias[-1]
        full.fill_diagonal_(0)
        blocks.append((block, full + torch.diag(block.diagonal())))
    squares = torch.stack([block.diagonal() for block, _ in blocks])
    column = torch.stack([block[:, -1] for block, _ in blocks])
    return QuasiDiagonal(squares, column), torch.block_diag(*(full for _, full in blocks))


def root_diagonal(o, i, seed):
    squares = normal(o, i, seed=seed) ** 4
    return RootDiagonal(squares), torch.diag(normal(o, i, seed=seed).square().flatten())


def mode_products(o, i, seed):
    """Two tensors: the first columns as a matrix, the last one as a vector."""
    moments = [psd(o, seed), psd(i - 1, seed + 1), psd(o, seed + 2)]
    layout = (Modes(0, i - 1, (o, i - 1)), Modes(i - 1, i, (o,)))
    made = ModeProducts((o, i), layout, moments, "shampoo", 0.3)
    powers = [
        torch.from_numpy(fractional_matrix_power((h + 0.3 * eye(len(h))).numpy(), e).real)
        for h, e in zip(moments, (0.25, 0.25, 0.5), strict=True)
    ]
    place = torch.arange(o * i).view(o, i)
    matrix = torch.zeros(o * i, o * i, dtype=torch.float64)
    weights, bias = place[:, :-1].flatten(), place[:, -1]
    matrix[weights[:, None], weights] = torch.kron(*powers[:2])
    matrix[bias[:, None], bias] = powers[2]
    return made, matrix


def rotated_adam(o, i, seed):
    left, right = (torch.linalg.qr(normal(k, k, seed=seed + k))[0] for k in (o, i))
    roots, gradient = normal(o, i, seed=seed).abs(), normal(o, i)
    made = RotatedAdam(gradient, eye(o), eye(i), left, right, roots.square())
    basis = torch.kron(left, right)
    return made, basis @ torch.diag(roots.flatten()) @ basis.T


def whitened_root(o, i, seed):
    rows, cols = psd(o, seed), psd(i, seed + 1)
    made = WhitenedRoot(normal(o, i), rows @ rows, cols @ cols, 0.0)
    return made, torch.kron(rows, cols)


def one_sided_root(o, i, seed):
    b = normal(o, i, seed=seed)
    tall = o > i
    root = fractional_matrix_power((b.T @ b if tall else b @ b.T).numpy(), 0.5).real
    root = torch.from_numpy(root)
    matrix = torch.kron(eye(o), root) if tall else torch.kron(root, eye(i))
    return OneSidedRoot(b), matrix


def quasi_newton(whole):
    def make(o, i, seed):
        rows, cols = eye(o), psd(i, seed) + eye(i)
        held = HeldInverse(rows) if whole else PairsInverse(rows[0], 3)
        for k in range(2):
            s = normal(o, seed=seed + k)
            y = (psd(o, seed + 5) + eye(o)) @ s
            held = held.updated(s, y)
            left = eye(o) - torch.outer(s, y) / (s @ y)
            rows = left @ rows @ left.T + torch.outer(s, s) / (s @ y)
        matrix = torch.linalg.inv(torch.kron(rows, cols))
        return QuasiNewtonFactors(held, cols, cols), (matrix + matrix.T) / 2

    return make


OPERATORS = {
    "dense": dense,
    "diagonal": diagonal,
    "factored": factored(cases.outer, "auto", 2, 3),
    "factored by gram": factored(cases.outer, "gram", 2, 3),
    "factored by gram of many": factored(cases.outer, "gram", 2, 9),
    "factored by block": factored(cases.outer, "dense", 2, 3),
    "factored shared": factored(cases.shared, "auto", 2, 3),
    "factored shared by gram": factored(cases.shared, "gram", 1, 4),
    "factored matrices": factored(cases.matrices, "auto", 2, 3),
    "kronecker": kronecker(1),
    "kronecker sum": kronecker(3),
    "kronecker skew": kronecker_skew,
    "kronecker by triangles": kronecker_cholesky,
    "kronecker zero": kronecker(0),
    "kronecker eigen": eigen,
    "kronecker diagonal": kronecker_diagonal,
    "rowwise eigen": rowwise_eigen,
    "stacked": stacked([kronecker(1), kronecker(2)]),
    "stacked eigen": stacked([eigen, dense]),
    "factored grouped": factored(grouped, "auto", 2, 3),
    "factored tokens": factored(looked_up, "auto", 2, 3),
    "factored tokens by gram": factored(looked_up, "gram", 2, 4),
    "mini-blocks by row": mini_blocks("row"),
    "mini-blocks by kernel": mini_blocks("kernel"),
    "mini-blocks shuffled": mini_blocks("shuffled"),
    "factored mini-blocks by row": factored_mini_blocks(cases.outer, "row"),
    "factored mini-blocks by kernel": factored_mini_blocks(cases.outer, "kernel"),
    "factored mini-blocks shared": factored_mini_blocks(cases.shared, "row"),
    "mini-blocks shared by rows": mini_blocks_shared("row"),
    "mini-blocks shared by kernels": mini_blocks_shared("kernel"),
    "mini-blocks shared, shuffled": mini_blocks_shared("shuffled"),
    "low rank": low_rank,
    "row rank one": row_rank_one,
    "quasi-diagonal": quasi_diagonal,
    "root diagonal": root_diagonal,
    "mode products": mode_products,
    "rotated Adam": rotated_adam,
    "whitened root": whitened_root,
    "one-sided root": one_sided_root,
    "quasi-Newton": quasi_newton(whole=True),
    "quasi-Newton by pairs": quasi_newton(whole=False),
    "factored mini-blocks of matrices": factored_mini_blocks(cases.matrices, "shuffled"),
}
EVERY = pytest.mark.parametrize("name", OPERATORS)
EITHER = pytest.mark.parametrize("inverted", [False, True], ids=["itself", "inverse"])


def make(name, inverted=False, o=3, i=4, seed=0):
    """Return an operator, or its damped inverse, with its dense definition."""
    operator, matrix = OPERATORS[name](o, i, seed)
    if inverted:
        return operator.inverse(0.3), oracles.damped_inverse(matrix, 0.3)
    return operator, matrix


@EVERY
@EITHER
def test_it_is_the_matrix_of_its_definition(name, inverted):
    operator, matrix = make(name, inverted)
    assert operator.shape == (12, 12)
    assert operator.weight_shape == (3, 4)
    assert_close(operator.to_dense(), matrix, 1e-9 if inverted else 1e-12)
    assert_close(operator.diagonal().flatten(), matrix.diagonal(), 1e-9)
    assert_close(operator.trace(), matrix.trace(), 1e-9)
    assert_close(operator.frobenius_norm(), matrix.norm(), 1e-9)


@EVERY
@EITHER
def test_products_are_those_of_the_matrix(name, inverted):
    operator, matrix = make(name, inverted)
    for w in (
        normal(3, 4),
        normal(2, 5, 3, 4),
        normal(4, 3).T,
        normal(5, 4, 3, 2).permute(3, 0, 2, 1),
        normal(3, 4).expand(2, 3, 4),
        torch.zeros(0, 3, 4, dtype=torch.float64),
    ):
        expected = (w.reshape(-1, 12) @ matrix).reshape(w.shape)
        kept = w.clone()
        assert_close(operator @ w, expected, 1e-8)
        forms = (w * expected).sum((-2, -1))
        assert_close(operator.quadratic_form(w), forms, 1e-8, atol=1e-12)
        assert torch.equal(w, kept)
    flat = normal(12, 3).numpy()
    assert_close(operator.to_scipy() @ flat, matrix.numpy() @ flat, 1e-8)
    assert_close(operator.to_scipy() @ flat[:, 0], matrix.numpy() @ flat[:, 0], 1e-8)


@EVERY
@EITHER
def test_spectra_are_those_of_the_matrix(name, inverted):
    operator, matrix = make(name, inverted)
    values = torch.linalg.eigvalsh(matrix).flip(0)
    assert_close(operator.eigenvalues(), values, 1e-9)
    assert_close(operator.top_eigenvalues(2), values[:2], 1e-9)
    shifted = matrix + DAMPING * torch.eye(12)
    assert_close(operator.logdet(DAMPING), torch.logdet(shifted), 1e-10, atol=1e-10)


@EVERY
@EITHER
def test_damped_solves_are_those_of_the_matrix(name, inverted):
    operator, matrix = make(name, inverted)
    expected = oracles.damped_inverse(matrix, DAMPING)
    for w in (normal(3, 4), normal(2, 1, 3, 4)):
        solved = (w.reshape(-1, 12) @ expected).reshape(w.shape)
        assert_close(operator.solve(w, DAMPING), solved, 1e-8)
    inverse = operator.inverse(DAMPING)
    assert_close(inverse @ w, solved, 1e-8)
    assert_close(inverse.to_dense(), expected, 1e-8)


@EVERY
@EITHER
def test_inner_products_with_every_operator(name, inverted):
    a, left = make(name, inverted)
    for other in OPERATORS:
        for turned in (False, True):
            b, right = make(other, turned, seed=1)
            size = float(left.norm() * right.norm())
            assert_close(a.inner(b), (left * right).sum(), 0, 1e-8 * size)
    same, matrix = OPERATORS[name](3, 4, 0)
    assert_close(same.inner(same), matrix.square().sum(), 1e-10)


@EVERY
def test_approximations_of_the_same_samples_have_exact_inner_products(name):
    """The samples of both are one object: short cuts may be taken, and must be right."""
    for make_fisher in (
        factored(cases.outer, "auto", 2, 5),
        factored(cases.shared, "gram", 2, 5),
    ):
        fisher, matrix = make_fisher(3, 4, 0)
        other, whole = OPERATORS[name](3, 4, 2)
        if isinstance(other, FactoredMiniBlocks):
            groups = [g for table in other.partition.groups for g in table]
            other = FactoredMiniBlocks(other.partition, fisher.samples, 3)
            whole = oracles.mini_blocks(matrix * fisher.count / 3, groups)
        elif isinstance(other, FactoredFisher):
            other = FactoredFisher(fisher.samples, 3)
            whole = matrix * fisher.count / 3
        assert_close(fisher.inner(other), (matrix * whole).sum(), 1e-10, atol=1e-14)
        assert_close(other.inner(fisher), (matrix * whole).sum(), 1e-10, atol=1e-14)


@EVERY
@given(o=st.integers(1, 3), i=st.integers(2, 3), seed=st.integers(0, 99))
def test_small_shapes(name, o, i, seed):
    operator, matrix = make(name, o=o, i=i, seed=seed)
    w = normal(2, o, i, seed=seed)
    expected = (w.flatten(1) @ matrix).view(w.shape)
    assert_close(operator @ w, expected, 1e-11, atol=1e-13)
    assert_close(operator.to_dense(), matrix, 1e-12)
    solved = w.flatten(1) @ oracles.damped_inverse(matrix, DAMPING)
    assert_close(operator.solve(w, DAMPING).flatten(1), solved, 1e-8)


@EVERY
@EITHER
def test_precision_is_what_is_asked_for(name, inverted):
    operator, matrix = make(name, inverted)
    single = operator.to(torch.float32)
    assert (operator.dtype, single.dtype) == (torch.float64, torch.float32)
    assert single.to_dense().dtype == torch.float32
    w = normal(3, 4).float()
    assert (single @ w).dtype == torch.float32
    assert_close(single.to_dense(), matrix, 1e-4)
    assert_close(single @ w, (w.double().flatten() @ matrix).view(3, 4), 1e-3)
    solved = single.solve(w, DAMPING)
    assert solved.dtype == torch.float32
    expected = w.double().flatten() @ oracles.damped_inverse(matrix, DAMPING)
    assert_close(solved.flatten(), expected, 1e-3)
    assert single.to(torch.float64).dtype == torch.float64


@EVERY
@EITHER
def test_it_shows_itself_in_one_line_and_escapes_names(name, inverted):
    operator, _ = make(name, inverted)
    object.__setattr__(operator, "provenance", Provenance("<b>&layer", "Exact()"))
    assert "\n" not in repr(operator)
    assert "12×12" in repr(operator)
    assert "float64" in repr(operator)
    html = operator._repr_html_()
    assert "&lt;b&gt;&amp;layer" in html
    assert "<b>&layer" not in html
    assert operator.stored_numbers >= 0
    assert operator.product_flops >= 0


class Work(TorchDispatchMode):
    """Notes what multiplies or factorises matrices."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        words = "mm", "dot", "linalg", "cholesky", "triangular", "einsum", "eigh"
        if any(word in str(func) for word in words):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@EVERY
@EITHER
def test_counting_computes_nothing(name, inverted):
    operator, _ = make(name, inverted)
    with Work() as work:
        counted = operator.product_flops, operator.stored_numbers
    assert work.seen == []
    assert min(counted) >= 0


@EVERY
@EITHER
def test_a_weight_of_another_shape_is_refused(name, inverted):
    operator, _ = make(name, inverted)
    for call in (lambda w: operator @ w, lambda w: operator.solve(w, 1.0)):
        for shape in ((4, 3), (12,), (2, 3, 5)):
            with pytest.raises((ValueError, TypeError), match=r"4|Tensor"):
                call(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(4, 3\)"):
        operator.inner(OPERATORS["diagonal"](4, 3, 0)[0])
    with pytest.raises(fl.BudgetError, match=r"1152 bytes.*100 B"):
        operator.to_dense(budget=100)


@EVERY
@EITHER
def test_what_is_no_weight_of_its_precision_is_refused_by_one_sentence(name, inverted):
    operator, _ = make(name, inverted)
    w = torch.ones(3, 4, dtype=torch.float64)
    wrong = [w.float(), w.long(), w > 0, w * 1j, w.numpy(), [1.0], 2.0, w.to("meta")]
    told = r"given, a tensor in torch.float64 on cpu is expected. Convert|Type-check error"
    for other in wrong:
        for call in (lambda w: operator @ w, lambda w: operator.solve(w, 1.0)):
            with pytest.raises(TypeError, match=told):
                call(other)


@pytest.mark.parametrize(
    "name", ["dense", "diagonal", "kronecker", "kronecker sum", "mini-blocks by row"]
)
def test_an_indefinite_operator_names_the_damping_that_suffices(name):
    operator, _ = make(name)
    shifts = {"dense": "matrix", "diagonal": "entries"}
    if name in shifts:
        held = getattr(operator, shifts[name])
        shifted = held - (torch.eye(12) if held.shape == (12, 12) else 1.0)
        operator = type(operator)(shifted, *((3, 4),) * (name == "dense"))
    elif name == "mini-blocks by row":
        blocks = tuple(b - torch.eye(4) for b in operator.blocks)
        operator = MiniBlocks(operator.partition, blocks)
    else:
        first, *rest = operator.terms
        minus = (-first[0], first[1])
        operator = KroneckerSum((minus, *rest), (3, 4))
    smallest = float(torch.linalg.eigvalsh(operator.to_dense())[0])
    assert smallest < 0
    with pytest.raises(fl.IndefiniteError, match="smallest") as info:
        operator.solve(normal(3, 4), -smallest / 2)
    assert_close(info.value.smallest, smallest, 1e-5)
    operator.inverse(info.value.sufficient)
    with pytest.raises(fl.NumericalError, match=r"logdet|definite"):
        operator.logdet(-smallest / 2)


@pytest.mark.parametrize(
    "name", ["factored by gram", "factored by block", "kronecker zero"]
)
def test_no_damping_on_a_singular_block_is_an_error(name):
    operator, _ = make(name)
    with pytest.raises(fl.NumericalError, match=r"definite|singular"):
        operator.solve(normal(3, 4), 0.0)


def test_no_damping_on_a_regular_block_is_allowed():
    for name in (
        "dense",
        "diagonal",
        "kronecker",
        "kronecker sum",
        "factored by gram of many",
    ):
        operator, matrix = make(name, o=2, i=3)
        w = normal(2, 3)
        assert_close(
            operator.solve(w, 0.0).flatten(), torch.linalg.solve(matrix, w.flatten()), 1e-6
        )
        assert_close(operator.logdet(), torch.logdet(matrix), 1e-8)


@pytest.mark.parametrize("name", ["dense", "diagonal", "kronecker", "mini-blocks by row"])
def test_a_nan_is_named_not_called_indefinite(name):
    operator, _ = make(name)
    held = {
        "dense": lambda: operator.matrix,
        "diagonal": lambda: operator.entries,
        "kronecker": lambda: operator.terms[0][1],
        "mini-blocks by row": lambda: operator.blocks[0],
    }[name]()
    held.view(-1)[1] = float("nan")
    held.transpose(-1, -2)[..., 0, 1] = float("nan")
    with pytest.raises(fl.NumericalError, match="NaN") as info:
        operator.inverse(1.0)
    assert not isinstance(info.value, fl.IndefiniteError)


def test_top_eigenvalues_of_large_operators_come_by_lanczos():
    rows, cols = psd(24, 1), psd(25, 2)
    op = KroneckerSum(((rows, cols),), (24, 25))
    values = torch.outer(*map(torch.linalg.eigvalsh, (rows, cols))).flatten()
    expected = values.sort(descending=True).values[:3]
    assert_close(op.top_eigenvalues(3), expected, 1e-9)
    signs = torch.ones(600, dtype=torch.float64)
    signs[::2] = -1  # the eigenvector is orthogonal to a vector of ones
    lone = Dense(torch.outer(signs, signs), (24, 25))
    assert_close(lone.top_eigenvalues(1), [600.0], 1e-9)


def test_the_spectrum_of_a_large_sum_is_refused_with_the_remedy():
    eye = (torch.eye(70), torch.eye(70))
    with pytest.raises(ValueError, match=r"top_eigenvalues\(k\)"):
        KroneckerSum((eye, eye), (70, 70)).eigenvalues()


@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1], [2, 7]]])
def test_a_partition_names_every_entry_once(groups):
    with pytest.raises(ValueError, match="once"):
        Partition((2, 2), (torch.tensor(groups),))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_partitions_by_kernel_leave_biases_alone(o, channels, kernel, bias):
    found = Partition.by_kernel((o, channels * kernel + bias), kernel, bias)
    assert [g.shape for g in found.groups] == [(o * channels, kernel), (o, 1)][: 1 + bias]
    for block in found.groups[0].tolist():
        start = block[0] % (channels * kernel + bias)
        assert start % kernel == 0
        assert block == list(range(block[0], block[0] + kernel))
    if bias:
        width = channels * kernel + 1
        assert found.groups[1].flatten().tolist() == [width * (r + 1) - 1 for r in range(o)]


@pytest.mark.parametrize("rows_first", [True, False])
def test_a_basis_held_by_rows_beside_one_held_by_columns_gives_the_dense_block(rows_first):
    rows, cols = (torch.linalg.qr(normal(n, n, seed=n)).Q for n in (3, 4))
    rows, cols = rows.contiguous(), cols.contiguous()
    turned = (rows, cols.T.contiguous().T) if rows_first else (rows.T.contiguous().T, cols)
    entries = normal(3, 4, seed=7)
    dense = KroneckerEigen(*turned, entries).to_dense()
    basis = torch.kron(rows, cols)
    assert_close(dense, (basis * entries.flatten()) @ basis.T, 1e-13)

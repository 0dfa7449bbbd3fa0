"""Laws of per-example gradients: every form answers as its formed matrices do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherlab.numerics import devices as held
from fisherlab.operators.factored import FactoredFisher
from fisherlab.samples import (
    GroupedSamples,
    MatrixSamples,
    PartedSamples,
    SharedSamples,
    SummedSamples,
    TokenSamples,
    TurnedSamples,
    base,
    cross,
    outer,
    shared,
)
from tests import cases
from tests.cases import normal
from tests.oracles import assert_close


def tokens(v, n, t, o, i, s):
    """Make tokens with repetitions and padding, gradients zero at the padding."""
    generator = torch.Generator().manual_seed(s)
    found = torch.randint(-1, o, (n, t), generator=generator)
    gradients = normal(v, n, t, i, seed=s + 1) * (found >= 0)[None, :, :, None]
    return TokenSamples(found, gradients, o)


def grouped(v, n, t, o, i, s):
    if t == 1:
        return GroupedSamples(tuple(cases.outer(v, n, o, i, s + k) for k in range(2)))
    return GroupedSamples(tuple(cases.shared(v, n, t, o, i, s + k) for k in range(3)))


FORMS = {
    "tokens": tokens,
    "grouped": grouped,
    "outer": lambda v, n, t, o, i, s: cases.outer(v, n, o, i, s),
    "shared": cases.shared,
    "matrices": lambda v, n, t, o, i, s: cases.matrices(v, n, o, i, s),
}


def parted(make):
    """Make samples of a form in parts of one, two, … examples."""

    def made(v, n, t, o, i, s):
        whole = make(v, n, t, o, i, s)
        ends = [0, *range(1, n, 2), n] if n else [0, 0]
        pieces = [cut(whole, slice(*ends[k : k + 2])) for k in range(len(ends) - 1)]
        return PartedSamples(
            tuple(pieces), held.mapped(whole, lambda tensor: tensor.to("meta"))
        )

    return made


def cut(samples, part):
    if isinstance(samples, GroupedSamples):
        return GroupedSamples(tuple(cut(group, part) for group in samples.groups))
    if isinstance(samples, MatrixSamples):
        return MatrixSamples(samples.stored[:, part])
    gradients = samples.gradients[:, part]
    if isinstance(samples, TokenSamples):
        return TokenSamples(samples.tokens[part], gradients, samples.size)
    return type(samples)(samples.inputs[part], gradients)


FORMS |= {f"{form} in parts": parted(make) for form, make in FORMS.items()}
SMALL = st.integers(1, 4)
SHAPES = st.tuples(st.integers(1, 5), SMALL, SMALL, SMALL, SMALL, st.integers(0, 2**20))
FAST = {*list(FORMS)[: len(FORMS) // 2], "outer in parts"}
EVERY_FORM = pytest.mark.parametrize(
    "form", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FORMS]
)


@pytest.fixture(params=["whole", "chunked"])
def chunked(request, monkeypatch):
    """Run a law with everything at once, and in chunks of two examples or fewer."""
    if request.param == "chunked":
        monkeypatch.setattr(outer, "GRAM_ROWS", 2)
        monkeypatch.setattr(outer, "KEPT_EXAMPLES", 1)
        # parts' limit is a default argument: chunks of one example through it
        monkeypatch.setattr(base.Samples, "parts", lambda s, limit=1: _ones(s))


def _ones(samples):
    return (slice(k, k + 1) for k in range(samples.examples))


def formed(samples):
    if isinstance(samples, PartedSamples):
        return torch.cat([formed(piece) for piece in samples.pieces], 1)
    if isinstance(samples, GroupedSamples):
        return torch.cat([formed(group) for group in samples.groups], 2)
    if isinstance(samples, TokenSamples):
        one_hot = torch.arange(samples.size) == samples.tokens[:, :, None]
        return torch.einsum("ntk,vnti->vnki", one_hot.double(), samples.gradients)
    if isinstance(samples, MatrixSamples):
        return samples.stored
    if hasattr(samples, "inputs") and samples.inputs.dim() == 2:
        return torch.einsum("vno,ni->vnoi", samples.gradients, samples.inputs)
    return torch.einsum("vnto,nti->vnoi", samples.gradients, samples.inputs)


def check_every_answer(samples):
    d = formed(samples)
    v, n, o, i = d.shape
    flat = d.reshape(v * n, o * i)
    w, c = normal(2, o, i, seed=1), normal(2, v, n, seed=2)
    left, right = normal(o, o, seed=3), normal(i, i, seed=4)
    assert (samples.columns, samples.examples, samples.weight_shape) == (v, n, (o, i))
    assert_close(samples.matrices(), d, 1e-13)
    assert_close(samples.matrices(slice(1, None)), d[:, 1:], 1e-13)
    for rows in (slice(0, 1), slice(o // 2, o)):
        some = samples.some_rows(rows)
        assert some is None or torch.equal(some.matrices(), samples.matrices()[:, :, rows])
    assert_close(samples.project(w), torch.einsum("vnoi,koi->kvn", d, w), 1e-12)
    assert_close(samples.combine(c), torch.einsum("vnoi,kvn->koi", d, c), 1e-12)
    assert_close(samples.squared_norms(), d.square().sum((2, 3)), 1e-12)
    assert_close(samples.squares(), d.square().sum((0, 1)), 1e-12)
    turned = torch.einsum("or,vnoi,ic->vnrc", left, d, right)
    assert_close(samples.rotated_squares(left, right), turned.square().sum((0, 1)), 1e-12)
    gram = flat @ flat.T
    assert_close(samples.gram(), gram, 1e-12)
    assert_close(samples.squared_norm(), gram.square().sum(), 1e-12)
    out = torch.full((o * i, o * i), float("nan"), dtype=torch.float64)
    assert_close(samples.add_dense_(out), flat.T @ flat, 1e-12)


def check_both_sides(samples):
    d = formed(samples)
    _, _, o, i = d.shape
    left = normal(o, o, seed=3)
    right = normal(i, i, seed=4)
    size = float(d.square().sum())
    row_side = torch.einsum("vnai,ij,vnbj->ab", d, right, d)
    column_side = torch.einsum("vnai,ab,vnbj->ij", d, left, d)
    assert_close(samples.row_side(right), row_side, 0, 1e-12 * size * float(right.norm()))
    assert_close(
        samples.column_side(left), column_side, 0, 1e-12 * size * float(left.norm())
    )
    inner = torch.einsum("vnai,ab,ij,vnbj->", d, left, right, d)
    size *= float(left.norm() * right.norm())
    assert_close(samples.kronecker_inner(left, right), inner, 0, 1e-12 * size)


@pytest.mark.parametrize("form", [form for form in FORMS if "parts" not in form])
def test_some_examples_are_those_of_the_formed_matrices(form):
    one = FORMS[form](2, 5, 3, 2, 4, 0)
    samples = TurnedSamples(SummedSamples((one, one)))
    index = torch.tensor([4, 0, 2])
    assert_close(samples.some_examples(index).matrices(), samples.matrices()[:, index])


def test_examples_in_parts_are_not_chosen_from():
    with pytest.raises(TypeError, match="PartedSamples hold no examples to choose"):
        FORMS["outer in parts"](2, 5, 1, 2, 4, 0).some_examples(torch.tensor([0]))


@EVERY_FORM
@given(shape=SHAPES)
def test_every_form_answers_as_its_matrices(form, shape):
    n, v, t, o, i, seed = shape
    samples = FORMS[form](v, n, t, o, i, seed)
    check_every_answer(samples)
    check_both_sides(samples)


@EVERY_FORM
@pytest.mark.parametrize("shape", [(5, 3, 2, 3, 4), (4, 1, 3, 2, 2), (3, 4, 1, 1, 3)])
def test_chunks_give_the_same_answers(form, shape, chunked):
    n, v, t, o, i = shape
    check_every_answer(FORMS[form](v, n, t, o, i, 9))
    check_both_sides(FORMS[form](v, n, t, o, i, 9))


@pytest.mark.parametrize("shape", [(1, 6, 2, 9), (3, 6, 2, 9), (9, 6, 2, 2), (2, 30, 3, 3)])
def test_the_norm_is_one_number_by_every_route(shape, monkeypatch):
    v, n, o, i = shape
    samples = cases.outer(v, n, o, i)
    dense = torch.empty(o * i, o * i, dtype=torch.float64)
    expected = samples.add_dense_(dense).square().sum()
    for pairs in (0, 2**22):  # through Grams, through the packed rearrangement if cheaper
        monkeypatch.setattr(outer, "KEPT_PAIRS", pairs)
        assert_close(cases.outer(v, n, o, i).squared_norm(), expected, 1e-12)
    assert_close(samples.packed.square().sum(), expected, 1e-12)


@EVERY_FORM
def test_precision_changes_and_no_examples_are_a_zero_sum(form):
    samples = FORMS[form](2, 3, 2, 3, 4, 0)
    assert samples.to(torch.float64) is samples
    single = samples.to(torch.float32)
    assert (single.dtype, samples.dtype) == (torch.float32, torch.float64)
    assert_close(single.squares(), samples.squares(), 1e-5)
    whole = samples.counted_as
    indices = whole.tokens.nbytes if isinstance(whole, TokenSamples) else 0
    assert (single.nbytes - indices) * 2 == samples.nbytes - indices
    empty = FORMS[form](2, 0, 2, 3, 4, 0)
    assert_close(empty.squares(), torch.zeros(empty.weight_shape))
    assert_close(
        empty.row_side(torch.eye(4).double()), torch.zeros(*2 * empty.weight_shape[:1])
    )
    assert empty.squared_norm() == 0.0


@given(shape=SHAPES)
def test_tokens_answer_without_tables_over_pairs_of_rows(shape):
    n, v, t, o, i, seed = shape
    samples = tokens(v, n, t, o, i, seed)
    d = formed(samples)
    diagonal, cols = normal(o, seed=1), normal(i, i, seed=2)
    inner = torch.einsum("vnki,k,ij,vnkj->", d, diagonal, cols, d)
    size = float(d.square().sum() * diagonal.norm() * cols.norm())
    assert_close(samples.diagonal_inner(diagonal, cols), inner, 0, 1e-12 * size)
    squares = (d @ cols).square().sum((0, 1))
    assert_close(samples.column_squares(cols), squares, 1e-12)
    for k in range(o):
        assert int(samples.counts()[k]) == int((samples.tokens == k).sum())
    once = samples.merged
    for row in once.tokens:
        assert len(set(row[row >= 0].tolist())) == int((row >= 0).sum())
    assert_close(once.matrices(), d, 1e-12)


@pytest.mark.parametrize("tile", [1, 3, 10**6])
@pytest.mark.parametrize("kinds", ["outer outer", "outer matrices", "shared shared"])
def test_inner_products_of_two_blocks_are_those_of_the_dense_ones(kinds, tile, monkeypatch):
    monkeypatch.setattr(cross, "TABLE_ROWS", tile)
    monkeypatch.setattr(base, "CHUNK_BYTES", 100 * tile)
    a, b = cases.outer(2, 5, 3, 4), cases.outer(3, 4, 3, 4, seed=5)
    if kinds == "outer matrices":
        b = MatrixSamples(b.matrices())
    if kinds == "shared shared":
        a = SharedSamples(normal(5, 2, 4), normal(2, 5, 2, 3, seed=1))
        b = SharedSamples(normal(4, 3, 4, seed=2), normal(3, 4, 3, 3, seed=3))
    blocks = []
    for samples in (a, b):
        flat = samples.matrices().flatten(0, 1).flatten(1)
        blocks.append(flat.T @ flat)
    assert_close(cross.squared_inner(a, b), (blocks[0] * blocks[1]).sum(), 1e-12)


@pytest.mark.parametrize("limit", [None, 200])
@pytest.mark.parametrize("weights", [1, 2, 40])
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_many_weights_meet_matrices_and_one_meets_positions(
    weights, limit, columns, examples, positions, seed
):
    """Whichever is counted to be cheaper, the products are those with the matrices."""
    samples = cases.shared(columns, examples, positions, 3, 4, seed)
    w, c = normal(weights, 3, 4, seed=seed), normal(weights, columns, examples, seed=seed)
    before = shared.CHUNK_BYTES
    try:
        shared.CHUNK_BYTES = before if limit is None else limit
        found = samples.project(w), samples.combine(c)
        many = samples._formed_for(weights)
    finally:
        shared.CHUNK_BYTES = before
    matrices = samples.matrices()
    assert_close(found[0], torch.einsum("vnoi,koi->kvn", matrices, w))
    assert_close(found[1], torch.einsum("kvn,vnoi->koi", c, matrices))
    cheaper = columns * (positions + weights) * 4 < weights * positions * (4 + columns)
    assert many == (cheaper and (limit is None or columns * 96 <= limit))


@pytest.mark.parametrize(("t", "formed"), [(2, False), (30, True)])
def test_matrices_are_formed_once_where_that_is_cheaper_and_fits(t, formed):
    samples = SharedSamples(normal(5, t, 9), normal(1, 5, t, 8, seed=1))
    often = samples.multiplied_often(5 * 72 * 8)
    assert isinstance(often, MatrixSamples) == formed
    assert samples.multiplied_often(5 * 72 * 8 - 1) is samples
    middle = normal(9, 9, seed=2)
    assert_close(often.row_side(middle), samples.row_side(middle), 1e-12)


def test_rows_of_a_tied_table_are_those_of_its_matrices_and_add_up_in_panels():
    """An embedding that is the head too is never formed whole for its diagonal."""
    uses = (tokens(2, 5, 4, 7, 3, 1), cases.shared(2, 5, 4, 7, 3, 2))
    tied = SummedSamples(uses)
    whole = uses[0].matrices() + uses[1].matrices()
    assert_close(tied.some_rows(slice(2, 6)).matrices(), whole[:, :, 2:6], 1e-14)
    panels = list(cross.row_panels(tied, 2 * tied.total * 3 * 8))
    assert [panel.weight_shape[0] for panel in panels] == [2, 2, 2, 1]
    assert_close(torch.cat([panel.matrices() for panel in panels], 2), whole, 1e-14)
    inverse = FactoredFisher(tied, 5, form="gram").inverse(0.1)
    assert_close(inverse.diagonal().flatten(), inverse.to_dense().diagonal(), 1e-12)

"""CG-FAC: solves by products alone, against the dense system."""

import pytest
import torch

import fisherlab as fl
from tests import cases
from tests.oracles import assert_close, second_moment_block

F64 = torch.float64
SAMPLES = {
    "outer": cases.outer(2, 9, 3, 4),
    "shared": cases.shared(2, 5, 3, 3, 4),
}


def law(variant, statistics):
    if variant == "kfac":
        return fl.KFAC()(statistics).to_dense()
    return second_moment_block(statistics.example_gradients(), statistics.count)


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("variant", ["kfac", "exact"])
def test_it_is_the_matrix_of_its_variant_and_solves_it(variant, samples):
    statistics = cases.layer_statistics(samples)
    op, dense = fl.CGFAC(variant)(statistics), law(variant, statistics)
    assert_close(op.to_dense(), dense)
    w = cases.normal(2, 3, 4)
    assert_close((op @ w).flatten(1), w.flatten(1) @ dense)
    assert_close(op.diagonal().flatten(), dense.diagonal())
    assert op.trace() == pytest.approx(float(dense.trace()))
    assert op.frobenius_norm() == pytest.approx(float(dense.norm()))
    assert_close(op.eigenvalues(), torch.linalg.eigvalsh(dense).flip(0), atol=1e-9)
    damped = dense + 0.1 * torch.eye(12, dtype=F64)
    expected = torch.linalg.solve(damped, w.flatten(1).T).T.view(w.shape)
    assert_close(op.solve(w, 0.1), expected, rtol=1e-8)
    assert_close(
        op.inverse(fl.Tikhonov(0.1)).to_dense(), torch.linalg.inv(damped), rtol=1e-8
    )


@pytest.mark.parametrize("variant", ["kfac", "exact"])
def test_metrics_agree_with_those_of_the_matrix(variant):
    statistics = cases.layer_statistics(SAMPLES["outer"])
    exact, op = fl.ExactBlock()(statistics), fl.CGFAC(variant)(statistics)
    plain = fl.KFAC()(statistics) if variant == "kfac" else exact
    for metric in (fl.metrics.frobenius_error, fl.metrics.cosine_similarity):
        assert metric(exact, op) == pytest.approx(metric(exact, plain), abs=1e-9)
    found = fl.metrics.inverse_error(exact, op, 0.1)
    assert found == pytest.approx(fl.metrics.inverse_error(exact, plain, 0.1), abs=1e-7)


def test_it_starts_where_it_is_told():
    op = fl.CGFAC()(cases.layer_statistics(SAMPLES["outer"]))
    w = cases.normal(3, 4)
    first = op.solution(w, 0.01)
    assert first.converged
    assert op.solution(w, 0.01, start=first.value).iterations == 0
    near = op.solution(w * 1.001, 0.01, start=first.value)
    assert near.iterations <= first.iterations


def test_a_cap_cuts_and_its_residual_falls():
    statistics = cases.layer_statistics(cases.outer(1, 40, 6, 7))
    w = cases.normal(6, 7)
    answers = [fl.CGFAC("exact", max_iterations=k)(statistics) for k in (1, 5, 25, 200)]
    found = [op.solution(w, 1e-2) for op in answers]
    assert [f.iterations for f in found[:3]] == [1, 5, 25]
    energies = [energy(statistics, f.value, w) for f in found]
    assert energies == sorted(energies, reverse=True)
    assert found[-1].converged


def energy(statistics, x, w):
    """½xᵀPx − xᵀw, which conjugate gradients lower at every step."""
    dense = law("exact", statistics) + 1e-2 * torch.eye(42, dtype=F64)
    return float(0.5 * x.flatten() @ dense @ x.flatten() - (x * w).sum())


def test_a_tolerance_ends_the_iteration():
    statistics = cases.layer_statistics(cases.outer(1, 40, 6, 7))
    w = cases.normal(6, 7)
    loose = fl.CGFAC("exact", tolerance=1e-2)(statistics).solution(w, 1e-2)
    tight = fl.CGFAC("exact")(statistics).solution(w, 1e-2)
    assert loose.iterations < tight.iterations
    assert tight.residual <= 1e-10 < loose.residual <= 1e-2


def test_a_solve_forms_no_factor(monkeypatch):
    statistics = cases.layer_statistics(cases.outer(1, 5, 30, 40))
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(tuple(out.shape))
            return out

    for variant in ("kfac", "exact"):
        op = fl.CGFAC(variant, max_iterations=5)(statistics)
        with Watch():
            op.solve(cases.normal(30, 40), 0.1)
    assert not {(30, 30), (40, 40), (1200, 1200)} & set(sizes)


@pytest.mark.parametrize("variant", ["kfac", "exact"])
def test_questions_about_an_inverse_form_no_dense_matrix(variant):
    """They took p solves, and 26 GiB for a layer of 200 × 300."""
    statistics = cases.layer_statistics(cases.outer(1, 10, 200, 300))
    exact = fl.ExactBlock()(statistics)
    same = exact if variant == "exact" else fl.KFAC()(statistics)
    inverse, other = fl.CGFAC(variant)(statistics).inverse(0.1), same.inverse(0.1)
    assert inverse.frobenius_norm() == pytest.approx(other.frobenius_norm(), rel=1e-12)
    assert inverse.trace() == pytest.approx(other.trace(), rel=1e-12)
    asked = exact.inverse(0.1)
    assert asked.inner(inverse) == pytest.approx(asked.inner(other), rel=1e-12)


def test_values_are_checked():
    with pytest.raises(ValueError, match="at least 1"):
        fl.CGFAC(max_iterations=0)
    matrices = cases.layer_statistics(cases.matrices(1, 4, 3, 2))
    with pytest.raises(fl.NeedsSharedForm):
        fl.CGFAC()(matrices)
    assert fl.CGFAC("exact")(matrices).weight_shape == (3, 2)
    op = fl.CGFAC()(cases.layer_statistics(SAMPLES["outer"]))
    with pytest.raises(ValueError, match="Kronecker terms"):
        op.solve(cases.normal(3, 4), fl.Factored(0.1))

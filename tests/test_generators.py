"""Tests can be repeated: nothing reads a generator that has no seed."""

import ast
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator

from fisherlab.numerics.krylov import extreme_eigenpairs
from tests import generators

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for folder in ("fisherlab", "tests") for path in (ROOT / folder).rglob("*.py")
)
UNSEEDED = {  # what draws from the machine's own noise when called without an argument
    "default_rng",
    "RandomState",
    "SeedSequence",
    "Random",
    "SystemRandom",
}
NOISE = {"urandom", "uuid1", "uuid4", "token_hex", "token_bytes", "randbits"}
GLOBAL = {name for name in dir(random) if name[0].islower()}


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_no_source_makes_a_generator_without_a_seed():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {name}()"
        for path in SOURCES
        for node, name in calls(path)
        if (name.split(".")[-1] in UNSEEDED and not node.args and not node.keywords)
        or name.split(".")[-1] in NOISE
        or name in {"torch.seed", "torch.random.seed"}
    ]
    assert found == []


def test_the_package_draws_nothing_from_the_module_random():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {name}"
        for path in SOURCES
        for node, name in calls(path)
        if path.is_relative_to(ROOT / "fisherlab")
        and name.startswith("random.")
        and name.removeprefix("random.") in GLOBAL
    ]
    assert found == []


def test_a_call_that_changes_a_global_generator_is_seen():
    def careless(draw):
        return draw()

    def careful():
        with torch.random.fork_rng(devices=[]):
            return torch.rand(2)

    call = generators.watched(careless)
    for draw, name in [(lambda: torch.rand(2), "torch"), (np.random.rand, "numpy.random")]:
        call(draw)
        (seen,) = generators.Watch.seen
        assert seen.endswith(f"careless changed {name}")
        generators.Watch.seen = ()
    call(lambda: np.random.default_rng(None))
    assert "without a seed" in generators.Watch.seen[0]
    generators.Watch.seen = ()
    call(careful)
    call(lambda: torch.rand(2, generator=torch.Generator()))
    call(lambda: np.random.default_rng(0).random())
    assert generators.Watch.seen == ()


@pytest.mark.parametrize("end", ["LA", "SA", "LM"])
def test_lanczos_restarts_from_fixed_noise(end):
    """The Krylov space of the identity is exhausted at once: what follows is drawn."""
    products = aslinearoperator(np.eye(40))
    first, second = (extreme_eigenpairs(products, 4, end, "it") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_a_zero_matrix_has_zero_eigenvalues_and_orthonormal_vectors():
    values, vectors = extreme_eigenpairs(
        aslinearoperator(np.zeros((40, 40))), 3, "LA", "it"
    )
    assert torch.equal(values, torch.zeros(3).double())
    assert torch.equal(vectors.T @ vectors, torch.eye(3).double())

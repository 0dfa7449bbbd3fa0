"""Public objects show themselves in one line, and as a folding table in notebooks."""

from dataclasses import replace

import pytest
import torch

import fisherlab as fl
from fisherlab.operators import Provenance
from tests import cases
from tests.cases import METHODS


def one_line(text):
    assert "\n" not in text
    assert "tensor(" not in text
    return text


@pytest.mark.parametrize("name", METHODS)
def test_methods_and_operators_fit_one_line_and_fold(name):
    method, stats = METHODS[name], cases.statistics("linear")
    one_line(repr(method))
    operator = method(stats)
    text = one_line(repr(operator))
    assert "'0'" in text
    assert "float64" in text
    html = operator._repr_html_()
    assert html.startswith("<details")
    for told in ("Exact()", "Categorical", "examples N", "float64", "memory"):
        assert told in html
    one_line(repr(operator.inverse(1.0)))


def test_values_fit_one_line():
    stats = cases.statistics("linear")
    many = fl.statistics.Statistics({"0": stats}, stats.provenance)
    gradient = fl.MeanGradient(stats.block, torch.ones(stats.weight_shape), 3)
    labels = torch.tensor([[0, 0, 1], [0, 0, 1]])
    values = (
        stats,
        many,
        gradient,
        fl.Partition.by_label((2, 3), labels),
        fl.MiniBlock(partition=fl.Partition.by_row((3, 4))),
        fl.RelativeDamping([0.1, 1.0]),
        fl.Factored(0.1),
        fl.MonteCarlo(2),
    )
    for value in values:
        one_line(repr(value))
    assert repr(fl.Partition.by_label((2, 3), labels)) == (
        "Partition((2, 3), 1 blocks of 2, 1 blocks of 4)"
    )
    for shown in (stats, many, gradient):
        assert shown._repr_html_().startswith("<details")


def test_names_are_escaped_in_tables():
    made = Provenance(layer="<script>alert(1)</script>", fisher="Exact()")
    operator = replace(fl.Diagonal()(cases.statistics("linear")), provenance=made)
    assert "<script>" not in operator._repr_html_()
    assert "&lt;script&gt;" in operator._repr_html_()


NAMED = [getattr(fl, name) for name in fl._NAMES]
PUBLIC = [kind for kind in NAMED if isinstance(kind, type) and kind is not fl.Likelihood]


@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)
def test_every_public_kind_folds_in_a_notebook(kind):
    assert issubclass(kind, Exception) or hasattr(kind, "_repr_html_")


def test_small_values_show_what_they_are_and_their_settings():
    html = fl.KPSVD(rank=2, solver=fl.Lanczos(steps=4))._repr_html_()
    assert html.startswith("<details")
    for told in ("KPSVD", "rank", "2", "Lanczos(steps=4", "what it is"):
        assert told in html
    assert "blocks of 4" in fl.Partition.by_row((3, 4))._repr_html_()
    assert "variance" in fl.Gaussian(2.0)._repr_html_()

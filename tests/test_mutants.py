"""The list of mutants cannot rot: each stands for one place and for tests that exist."""

import re
from pathlib import Path

import pytest

from tests.mutants.cases import EVERY, Mutant

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("mutant", EVERY, ids=lambda mutant: mutant.name)
def test_a_mutant_has_its_place_and_its_tests(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert mutant.tests or mutant.explained
    for node in mutant.tests:
        file, _, test = node.partition("::")
        text = (ROOT / file).read_text()
        assert re.search(rf"^def {test}\(" if test else "^def test_", text, re.MULTILINE)


def test_every_mutant_has_a_name_of_its_own() -> None:
    assert len({mutant.name for mutant in EVERY}) == len(EVERY) >= 60

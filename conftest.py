"""Every test draws from generators seeded by its own name and one base seed.

`--seed N` or $FISHERLAB_TEST_SEED gives the base seed (0 without). The same name and seed
draw the same numbers, whatever ran before and in whatever process, so that a test that
fails under one seed fails again when it is run alone. How many examples hypothesis tries:
`fast`, or `long` by $FISHERLAB_TESTS=long.
"""

import os
import random
import zlib
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis.internal.conjecture import providers

from tests import generators, simulated_device

COMMON = {
    "deadline": None,  # the machines are shared
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}
hypothesis.settings.register_profile("fast", max_examples=20, database=None, **COMMON)
hypothesis.settings.register_profile("long", max_examples=500, **COMMON)
hypothesis.settings.load_profile(os.environ.get("FISHERLAB_TESTS", "fast"))
# What hypothesis draws is mixed with constants of the modules imported so far, which differ
# with the tests that a worker ran before.
if hasattr(providers, "_get_local_constants"):
    NO_CONSTANTS = providers._local_constants  # as yet
    providers._get_local_constants = lambda: NO_CONSTANTS


def pytest_addoption(parser: pytest.Parser) -> None:
    default = int(os.environ.get("FISHERLAB_TEST_SEED", "0"))
    help_ = "the base seed of every test's generators (default: $FISHERLAB_TEST_SEED or 0)"
    parser.addoption("--seed", type=int, default=default, help=help_)
    help_ = "of the cases of one test run every N-th only; which, the seed decides"
    parser.addoption("--every", type=int, default=1, help=help_)
    help_ = "where tests marked `device` run: sim, or what torch finds, such as cuda"
    parser.addoption("--device", default="sim", help=help_)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Thin out cases, and make the device known before a test goes backward."""
    keep_every(config, items)
    asking = [item for item in items if item.get_closest_marker("device")]
    if not asking:
        return
    missing = simulated_device.missing(config.getoption("device"))
    for item in asking if missing else ():
        item.add_marker(pytest.mark.skip(reason=missing))


def keep_every(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep every N-th case of each test, and at least one."""
    step, seed = config.getoption("every"), config.getoption("seed")
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {
        item
        for group in cases.values()
        for item in group[seed % min(step, len(group)) :: step]
    }
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where tests marked `device` put models and data."""
    return torch.device(request.config.getoption("device"), 0)


def pytest_report_header(config: pytest.Config) -> str:
    return f"base seed: {config.getoption('seed')}"


def seed_by(config: pytest.Config, name: str) -> int:
    """Seed the global generators, which a test or a library may read, by a name."""
    seed = zlib.crc32(f"{config.getoption('seed')} {name}".encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    return seed


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """What a test file draws while it is imported depends on its name alone."""
    seed_by(collector.config, collector.nodeid)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest):
    """What a shared fixture draws does not depend on the test that asks for it first."""
    if fixturedef.scope == "function":
        return (yield)
    name = (
        f"{fixturedef.baseid}::{fixturedef.argname}[{getattr(request, 'param_index', 0)}]"
    )
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seed_by(request.config, name)
    try:
        return (yield)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed before the first fixture of the test."""
    seed = seed_by(item.config, item.nodeid)
    function = getattr(item, "function", None)
    if hypothesis.is_hypothesis_test(function):
        hypothesis.seed(seed)(function)


def pytest_sessionstart(session: pytest.Session) -> None:
    generators.watch()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test in which the package changed a global generator."""
    generators.Watch.seen = ()
    result = yield
    marker = item.get_closest_marker("draws")
    if generators.Watch.seen and marker is None:
        told = "; ".join(dict.fromkeys(generators.Watch.seen))
        remedy = "if the test's own model or loader draws: @pytest.mark.draws(who)"
        pytest.fail(f"{told} ({remedy})", pytrace=False)
    return result


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw figures but spare their rendering, which most tests do not look at."""

    def write(figure, kind, dpi, kept, target):
        target.write_bytes(kind.encode())

    def reduce(source, colours, target):
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr("fisherlab.plots.saving._render", write)
    monkeypatch.setattr("fisherlab.plots.saving._reduce", reduce)


@pytest.fixture
def one_figure(unrendered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write pages with their first figure alone, unrendered."""
    from fisherlab.report import figures

    monkeypatch.setattr(figures, "RECIPES", figures.RECIPES[:1])


@pytest.fixture(autouse=True)
def _examples_draw_one_figure(request: pytest.FixtureRequest) -> None:
    """Let the examples of docstrings write pages with one figure, as most tests do."""
    if request.node.name.startswith("fisherlab.report."):
        request.getfixturevalue("one_figure")

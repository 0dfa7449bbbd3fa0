"""What is said of a result is true: every sentence is recomputed from its numbers."""

import json
import re

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherlab as fl
from fisherlab.analysis import contests, verdicts
from fisherlab.analysis.files import beside
from fisherlab.report import judging, summary
from fisherlab.report.rankings import moment

CLOSEST = re.compile(
    r"(?P<who>`[^.;]*?`)(?: and (?P<more>\d+) more)? (?:is|are) the closest "
    r"to the exact block"
    r"(?P<among> of those (?:that can be used|with a number (?:there|in every layer)))?,? "
    r"by (?P<title>.*?): (?P<value>[-0-9.e+]*[0-9])"
    r"(?:, then `(?P<next>[^`]+)` with (?P<second>[-0-9.e+]*[0-9]))?"
)
OVER = re.compile(r"Over (\d+) of (\d+) layers \(([0-9.e-]+) % of the parameters\) `")
WON = re.compile(r"`([^`]+)` in (\d+)(?: of (\d+) layers)? \(([0-9.e-]+) %\)")
INDEFINITE = re.compile(
    r"`([^`]+)` is indefinite in ([^(]*) \(([0-9.e-]+) % of the parameters\); "
    r"from λ = ([0-9.e-]+) on it is not"
)
COSTS = re.compile(
    r"(; a solve with)?(?:; )? ?`([^`]+)` (?:holds|takes) ([0-9.e+-]+)( % of| times) the "
    r"(?:numbers of the exact blocks|flops of theirs)(, dearer than the exact solve)?"
)
WHO = r"((?:`[^`]+`(?:, | and )?)+)"
ABSENT = re.compile(
    WHO + r" ha(?:ve|s) no number in [^(]* \(([0-9.e-]+) % of the parameters\): "
)
LISTED = re.compile(WHO + r" in [^(`]* \(([0-9.e-]+) %\)")
WITHOUT = re.compile(
    rf"[Ww]ithout a number \(share of the parameters\): ((?:{LISTED.pattern}(?:, )?)+): "
)
LEAD = re.compile(
    r" \((?:a lead of ([-+0-9.e]+) ± ([-+0-9.e]+)(, within the noise of the \w+)?|"
    r"leads are not held against noise(?:: [^()]+)?|"
    r"a lead within the noise of the data, .*?)\)"
)
NEAR = re.compile(
    r" \((?:leads are not held against noise(?:: [^()]+)?|"
    r"a lead within the noise of the \w+ in (\d+))\)"
)
NOISE = re.compile(r"within the noise of the (\w+)|held against noise:? ?([^()]*)\)")
TIED = 2e-6


def names(text):
    return re.findall(r"`([^`]+)`", text)


def close(told, value):
    return float(told) == pytest.approx(value, rel=6e-3, abs=1e-12)


def check_lead(text, first, second, lead, errors):
    """Hold what is said of a lead against its standard error, where that is known."""
    told, error = LEAD.match(text), np.nan
    if errors is not None:
        error = float(errors.sel(approximator=first, rival=second))
    assert (told is not None and told[1] is not None) == np.isfinite(error)
    if np.isfinite(error):
        assert float(told[1]) == pytest.approx(lead, rel=0.06)
        assert float(told[2]) == pytest.approx(2 * error, rel=0.06)
        if abs(lead - 2 * error) > 1e-9 * lead:
            assert bool(told[3]) == (lead <= 2 * error)


def check_leads(text, rows, known):
    """Hold in how many layers the nearest leads by chance against standard errors."""
    told = NEAR.search(text)
    if told is None or rows.get("errors") is None:
        assert told is None or told[1] is None
        return
    ratios = []
    for i in np.flatnonzero(known):
        row = np.abs(rows["values"] - rows["best"])[i]
        gaps = dict(zip(rows["methods"], row, strict=True))
        order = sorted((m for m in gaps if np.isfinite(gaps[m])), key=gaps.get)
        rest = [m for m in order if gaps[m] > gaps[order[0]] + TIED / 2]
        errors = rows["errors"]["layers"].isel(layer=i)
        lead = gaps[rest[0]] - gaps[order[0]] if rest else np.inf
        first = [m for m in order if m not in rest]
        next_ = [m for m in rest if gaps[m] <= gaps[rest[0]] + TIED / 2]
        pairs = [float(errors.sel(approximator=a, rival=b)) for a in first for b in next_]
        ratios.append(lead / np.max(pairs) if rest else np.inf)
    assert (told[1] is None) == bool(np.isnan(ratios).any())
    assert told[1] is None or int(told[1]) == sum(ratio <= 2 for ratio in ratios)


def check_ranking(found, gaps, numbers, errors=None):
    """Hold first and second of a sentence against the distances from the best."""
    who = set(names(found["who"]))
    nearest = min(gaps.values())
    tied = {m for m, gap in gaps.items() if gap <= nearest + TIED / 2}
    assert who <= tied
    assert len(who) + int(found["more"] or 0) == len(tied)
    assert close(found["value"], numbers[names(found["who"])[0]])
    rest = {m: gap for m, gap in gaps.items() if m not in tied}
    assert bool(found["next"]) == bool(rest)
    if rest:
        assert rest[found["next"]] <= min(rest.values()) + TIED
        assert close(found["second"], numbers[found["next"]])
        assert found["second"] != found["value"]
        first, second = names(found["who"])[0], found["next"]
        lead = gaps[second] - nearest
        check_lead(found.string[found.end() :], first, second, lead, errors)


def check(text, rows):
    """Hold one line against its numbers.

    `rows` has values and status (layer, method), pooled (method), best, sizes (layer),
    all as labelled arrays of numpy and lists, and as `common` the layers over which
    methods are ranked where some lack a few, with their numbers.
    """
    methods, sizes, best = rows["methods"], rows["sizes"], rows["best"]
    gaps = np.abs(rows["values"] - best)
    pooled = rows["pooled"]
    complete = {m: abs(v - best) for m, v in pooled.items() if np.isfinite(v)}
    bad = [[("λ above" in cell) for cell in line] for line in rows["status"]]
    indefinite = {m for j, m in enumerate(methods) if any(line[j] for line in bad)}

    def share(layers):
        return 100 * sizes[layers].sum() / sizes.sum()

    lead, _, layered = text.partition("ayer by layer")
    found, over = CLOSEST.search(lead), OVER.search(lead)
    if found and "with a number" in str(found["among"]):
        there, pooled = rows["common"]
        assert share(there) >= 90
        assert there.all() == (over is None)
        if over:
            assert over[1] == str(there.sum())
            assert over[2] == str(len(sizes))
            assert float(over[3]) == pytest.approx(share(there), rel=0.06)
        ranked = {m: abs(v - best) for m, v in pooled.items() if np.isfinite(v)}
        held = {
            m
            for m, gap in zip(methods, gaps.T, strict=True)
            if np.isfinite(gap[there]).all()
        }
        assert set(ranked) == held
        assert len(held) > 1
        which = "pooled" if there.all() else "common"
        check_ranking(found, ranked, pooled, rows.get("errors", {}).get(which))
    elif found:
        check_ranking(found, complete, pooled, rows.get("errors", {}).get("pooled"))
        assert bool(found["among"]) == (len(complete) < len(methods))
        # nobody with a number somewhere and none elsewhere was left out of the contest
        assert all(
            m in complete
            or m in indefinite
            or np.isnan(gaps[:, j]).all()
            or f"`{m}`" in text
            for j, m in enumerate(methods)
        )
    if layered:
        known = np.isfinite(gaps).sum(1) > 1
        check_leads(layered, rows, known)
        for name, count, of, percent in WON.findall(layered.split("ithout a number")[0]):
            column = gaps[:, methods.index(name)]
            with np.errstate(invalid="ignore"):
                won = known & (
                    column <= np.nanmin(np.where(known[:, None], gaps, 0), 1) + TIED / 2
                )
            assert int(count) == won.sum()
            assert not of or int(of) == known.sum()
            assert float(percent) == pytest.approx(share(won), rel=0.06)
    told = {
        name: (at, percent, needed)
        for name, at, percent, needed in INDEFINITE.findall(text)
    }
    assert set(told) == indefinite, "every indefinite one is named, and no other"
    for name, (_, percent, needed) in told.items():
        column = np.array([line[methods.index(name)] for line in bad])
        assert float(percent) == pytest.approx(share(column), rel=0.06)
        assert float(needed) == pytest.approx(rows["needed"][name], rel=0.01)
    lacking = {}  # (method, reason) to the layers
    for j, name in enumerate(methods):
        for i in range(len(sizes)):
            if np.isnan(rows["values"][i, j]) and not bad[i][j] and name not in complete:
                why = contests.coarse(str(rows["status"][i][j]))
                lacking.setdefault((name, why), []).append(i)
    clauses = [(one, [one.groups()]) for one in ABSENT.finditer(text)]
    clauses += [(one, LISTED.findall(one[1])) for one in WITHOUT.finditer(text)]
    told = set()
    for clause, parts in clauses:
        why = max((w for _, w in lacking if text.startswith(w, clause.end())), key=len)
        for who, percent in parts:
            for name in names(who):
                told.add((name, why))
                assert float(percent) == pytest.approx(share(lacking[name, why]), rel=0.06)
    assert told == set(lacking), "every lack is told with its own reason"


def check_costs(text, ds):
    """Hold what the winner is said to cost against sums over all layers."""
    lead, _, _ = text.partition("ayer by layer")
    found, told = CLOSEST.search(lead), COSTS.findall(lead)
    p = (ds["d_out"] * ds["d_in"]).values
    for solve, name, amount, unit, dearer in told:
        assert name == names(found["who"])[0]
        one, whole = ds["stored_numbers"].sel(approximator=name), p * (p + 1) / 2
        if solve:
            one = ds["solve_flops"].sel(approximator=name)
            whole = ds["solve_flops"].sel(approximator="exact").values
        known = one.notnull().values
        share = float(one.values[known].sum() / whole[known].sum())
        assert float(amount) == pytest.approx(share * (100 if "%" in unit else 1), rel=0.06)
        assert bool(dearer) == (bool(solve) and share > 1)
    assert len(told) == (2 if found and found["next"] else len(told))


def needed(status, methods):
    found = {}
    for line in status:
        for name, cell in zip(methods, line, strict=True):
            for value in re.findall(r"λ above ([-0-9.e+]+) needed", cell)[:1]:
                found[name] = max(found.get(name, 0.0), float(value))
    return found


def rows_of(table, purpose):
    """The numbers behind the line of a purpose, read from the table itself."""
    at = int(np.flatnonzero(table["of_purpose"].values == purpose)[0])
    methods = [str(m) for m in table["approximator"].values if m != "exact"]
    part = table.sel(approximator=methods)
    status = part["purpose_status"].sel(purpose=purpose).transpose("layer", "approximator")
    return {
        "methods": methods,
        "sizes": (table["d_out"] * table["d_in"]).values.astype(float),
        "best": float(table["best"][at]),
        "values": part["purpose_value"]
        .isel(measure=at)
        .transpose("layer", "approximator")
        .values,
        "pooled": dict(
            zip(methods, part["purpose_network"].isel(measure=at).values, strict=True)
        ),
        "status": status.values.tolist(),
        "needed": needed(status.values.tolist(), methods),
        "common": (
            part["purpose_common_layers"].sel(purpose=purpose).values.astype(bool),
            dict(zip(methods, part["purpose_common"].isel(measure=at).values, strict=True)),
        ),
        "errors": {
            "layers": part["purpose_lead_error"].sel(purpose=purpose),
            "pooled": part["purpose_network_lead_error"].sel(purpose=purpose),
            "common": part["purpose_common_lead_error"].sel(purpose=purpose),
        },
    }


def random_errors(layers, methods, seed):
    """Standard errors of leads, symmetric, some layers' unknown."""
    draw = np.random.default_rng(seed)
    errors = draw.lognormal(-2, 2, (layers + 2, methods, methods))
    errors = errors + errors.transpose(0, 2, 1)
    errors[:, range(methods), range(methods)] = 0.0
    errors[draw.random(layers + 2) < 0.2] = np.nan
    over, errors = ("approximator", "rival", "purpose"), errors[..., None]
    return {
        "purpose_lead_error": (("layer", *over), errors[2:]),
        "purpose_network_lead_error": (over, errors[0]),
        "purpose_common_lead_error": (over, errors[1]),
    }


def rows_of_errors(ds):
    methods = [str(m) for m in ds["approximator"].values if m != "exact"]
    part = ds.sel(approximator=methods)
    values = part["frobenius_error"].transpose("layer", "approximator").values
    squares, sizes = ds["fisher_norm"].values ** 2, (ds["d_out"] * ds["d_in"]).values
    there = contests.in_common(sizes.astype(float), np.isfinite(values))
    errors = np.maximum(values, 1e-6) ** 2 * squares[:, None]
    pooled = np.sqrt(errors.sum(0) / squares.sum())
    common = np.sqrt(errors[there].sum(0) / squares[there].sum())
    status = part["status"].transpose("layer", "approximator").values.tolist()
    judged = PURPOSES if "purpose_status" in part else ()
    for purpose in judged:  # what one of them finds indefinite is so for all
        told = part["purpose_status"].sel(purpose=purpose)
        told = told.transpose("layer", "approximator").values
        for i, j in np.argwhere(np.isfinite(values)):
            status[i][j] = told[i, j] if "λ above" in told[i, j] else status[i][j]
    return {
        "methods": methods,
        "sizes": sizes.astype(float),
        "common": (there, dict(zip(methods, common, strict=True))),
        "best": 0.0,
        "values": values,
        "pooled": dict(zip(methods, pooled, strict=True)),
        "status": status,
        "needed": needed(status, methods),
    }


PURPOSES = ("step", "laplace", "influence", "pruning", "sharpness")
JUMPS = "choices of weights jump with the examples"
METHODS = ("exact", "kfac", "ekfac", "kpsvd", "kpsvd-2", "mini-block", "diagonal", "foof")


def small_network(seed, kind):
    """A network, data and likelihood drawn from a seed."""
    draw = np.random.default_rng(seed)
    width, count = (int(n) for n in draw.integers(2, 6, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = torch.randn(12, 1, 4, 4).double()
        if kind == "conv":
            body = [torch.nn.Conv2d(1, width, 3), torch.nn.Tanh(), torch.nn.Flatten()]
            body += [torch.nn.Linear(4 * width, count)]
        elif kind == "norm":
            body = [
                torch.nn.Flatten(),
                torch.nn.Linear(16, width),
                torch.nn.LayerNorm(width),
            ]
            body += [torch.nn.Linear(width, count)]
        else:
            body = [torch.nn.Flatten(), torch.nn.Linear(16, width), torch.nn.Tanh()]
            body += [torch.nn.Linear(width, width), torch.nn.Linear(width, count)]
        model = torch.nn.Sequential(*body).double()
    y = torch.arange(12) % count
    return model, (x, y)


def told_of(seed, kind, alpha, tmp_path=None):
    """A result as a report makes it, through a file, and its sentences by topic."""
    model, data = small_network(seed, kind)
    likelihood = fl.Categorical()
    stats = fl.collect(model, data, likelihood)
    gradient = fl.mean_gradient(model, data, likelihood)
    damping = fl.RelativeDamping(alpha)
    ds = fl.compare(stats, METHODS, damping=damping, gradient=gradient)
    asked = judging.Asked(
        stats, gradient, model, likelihood, data, data, damping, 10.0 * alpha, 12
    )
    time = [None, 1e-4, 1e-3][seed % 3]
    found = judging.judged(PURPOSES, asked, METHODS, seconds=time)
    ds = beside(ds, found)
    if tmp_path is not None:
        fl.save(ds, tmp_path / "results.nc")
        ds = fl.open(tmp_path / "results.nc")
    return ds, {one.topic: one.text for one in summary.verdict(ds)}


def winners_of(text):
    lead, _, layered = text.partition("ayer by layer")
    if found := CLOSEST.search(lead):
        return set(names(found["who"]))
    return {one[0] for one in WON.findall(layered.split("ithout a number")[0])}


def check_known(told, pruning, matrix):
    """What follows from definitions is said of who leads by it, and is so."""
    knows = {"pruning": {"diagonal", "mini-block"}, "matrix": {"kpsvd", "kpsvd-2"}}
    for purpose, text in told.items():
        led = winners_of(text) & knows.get(purpose, set())
        assert text.count("follows from the definition") == bool(led), purpose
    for name in knows["pruning"]:
        own = pruning["values"][:, pruning["methods"].index(name)]
        assert (own[np.isfinite(own)] == 1).all()
    errors = dict(zip(matrix["methods"], matrix["values"].T, strict=True))
    for nearer, others in [("kpsvd", ("kfac", "foof")), ("kpsvd-2", ("kpsvd", "kfac"))]:
        for other in others:
            assert not (errors[nearer] > errors[other] + 1e-6).any()


def check_noise(purpose, text):
    """Leads are held against the noise of what they depend on, or it is said why not."""
    for drawn, why in NOISE.findall(text):
        over = "queries" if purpose == "influence" else "examples"
        assert drawn in ("", over)
        assert drawn or why == (JUMPS if purpose == "pruning" else "")


def check_all(told, ds, purposes):
    for purpose in purposes:
        check(told[purpose], rows_of(ds, purpose))
        check_noise(purpose, told[purpose])


def hold_matrices(seed, kind, drift):
    """The same of what `compare` says of matrices and of penalties for a drift."""
    model, data = small_network(seed, kind)
    stats = fl.collect(model, data, fl.Categorical())
    weights = {name: w.detach() for name, w in model.named_parameters()}
    others = [{name: w + drift * w.square() for name, w in weights.items()}]
    found = fl.compare(
        stats, METHODS[1:], purpose=[fl.Matrix(), fl.EWC(weights, others, random=2)]
    )
    table = beside(xr.Dataset(coords=found.coords), found)
    told = dict(line.split(": ", 1) for line in fl.analysis.verdict(found))
    check_all(told, table, ("matrix", "ewc"))
    errors = found["network_lead_error"]
    there = np.isfinite(found["network"].sel(measure="matrix.frobenius_error")).values
    known = np.isfinite(errors.sel(purpose="matrix").values)
    np.testing.assert_array_equal(known, there[:, None] & there)
    return told


def hold(seed, kind, alpha, tmp_path=None):
    ds, told = told_of(seed, kind, alpha, tmp_path)
    check_all(told, ds, PURPOSES)
    check(told["matrix"], rows_of_errors(ds))
    for text in told.values():
        check_costs(text, ds)
    lines = {purpose: told[purpose] for purpose in (*PURPOSES, "matrix")}
    check_known(lines, rows_of(ds, "pruning"), rows_of_errors(ds))


@pytest.mark.parametrize(
    ("seed", "kind", "alpha"),
    [(0, "dense", 0.1), (1, "conv", 1e-3), (5, "norm", 1e-2), (102, "norm", 1e-4)],
)
def test_no_sentence_of_a_result_is_false(seed, kind, alpha, tmp_path):
    hold(seed, kind, alpha, tmp_path)


@pytest.mark.parametrize(("seed", "kind"), [(2, "dense"), (4, "conv"), (6, "norm")])
def test_no_sentence_of_matrices_and_penalties_is_false(seed, kind):
    hold_matrices(seed, kind, 0.1)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["dense", "conv", "norm"]),
    st.sampled_from([1e-4, 1e-2, 1.0]),
)
def test_no_sentence_is_false_over_many_networks(seed, kind, alpha):
    hold(seed, kind, alpha)
    hold_matrices(seed, kind, alpha)


SAID = re.compile(
    r"`(?P<who>[^`]+)` reaches (?P<most>at most )?(?P<share>[0-9.]+) % of it,? "
    r"(?P<good>[^;(]*?)(?: \(of (?P<some>\d+) of \d+ layers.*?\))?; "
    r"(?:(?P<fine>nowhere worse than the gradient)|worse than the gradient (?P<bad>[^;]*?))"
    r"(?:; no step (?P<none>[^(]*?) \(in .*?\))?\.$"
)


def levels_of(words, dampings):
    """The dampings that words like "up to λ = 0.1 and at λ = 1 to 10" mean."""
    held = np.zeros(len(dampings), dtype=bool)
    for part in (words or "").split(" and "):
        low, high = -np.inf, np.inf
        numbers = [float(n) for n in re.findall(r"[0-9][-0-9.e+]*", part)]
        if part.startswith("up to"):
            high = numbers[0]
        elif part.startswith("from"):
            low = numbers[0]
        elif part.startswith("at every"):
            pass
        elif numbers:
            low, high = numbers[0], numbers[-1]
        else:
            continue
        held |= (dampings >= low * 0.99) & (dampings <= high * 1.01)
    return held


def check_dampings(ds, told):
    """Hold the lines of a sweep against the sums of its slopes and curvatures."""
    ds, lines = ds.sortby("damping"), {SAID.match(one)["who"]: one for one in told[1:]}
    assert set(lines) == set(ds.approximator.values)
    dampings = ds.damping.values
    for name, line in lines.items():
        one, said = ds.sel(approximator=name), SAID.match(line)
        there = one.slope.notnull()
        one = one.sel(layer=there.any("damping"))
        some = len(one.layer) < len(ds.layer)
        assert said["some"] == (str(len(one.layer)) if some else None)
        goal = one.exact_slope.sum("layer")
        share = one.slope.sum("layer", skipna=False) ** 2
        share = (share / one.curvature.sum("layer", skipna=False) / goal).values
        plain = one.gradient_slope.sum() ** 2 / one.gradient_curvature.sum("layer") / goal
        if said["most"]:
            assert np.nanmax(share) < 0.9
            assert float(said["share"]) == pytest.approx(100 * np.nanmax(share), rel=0.06)
        else:
            np.testing.assert_array_equal(levels_of(said["good"], dampings), share >= 0.9)
        worse = share < plain.values - 1e-6
        np.testing.assert_array_equal(levels_of(said["bad"], dampings), worse)
        assert bool(said["fine"]) == (not worse.any())
        np.testing.assert_array_equal(levels_of(said["none"], dampings), np.isnan(share))


@pytest.mark.parametrize(
    ("seed", "kind", "limit"), [(0, "dense", 0), (3, "conv", 4000), (5, "norm", 0)]
)
def test_a_sweep_answers_at_which_damping(seed, kind, limit, tmp_path, monkeypatch):
    """Also above the size up to which blocks without structure are diagonalised."""
    monkeypatch.setattr("fisherlab.metrics.spectra.DENSE_ROWS", limit)
    model, data = small_network(seed, kind)
    stats = fl.collect(model, data, fl.Categorical())
    gradient = fl.mean_gradient(model, data, fl.Categorical())
    found = fl.sweep(stats, METHODS, gradient=gradient)
    fl.save(found, tmp_path / "results.nc")
    found = fl.open(tmp_path / "results.nc")
    check_dampings(found, fl.analysis.verdict(found))
    for name in stats:  # the numbers themselves, from dense matrices
        exact = fl.ExactBlock()(stats[name]).to_dense()
        v = gradient[name].gradient.flatten()
        cells = found.sel(layer=name)
        assert float(cells.gradient_slope) == pytest.approx(float(v @ v))
        for method in ("kfac", "kpsvd-2", "mini-block"):
            if cells.slope.sel(approximator=method).isnull().all():
                assert kind == "norm"
                continue
            dense = fl.approximators()[method](stats[name]).to_dense()
            for level, lam in enumerate(cells["lambda"].values):
                eye = lam * torch.eye(len(v)).double()
                if torch.linalg.eigvalsh(dense + eye)[0] <= 0:
                    continue
                step = torch.linalg.solve(dense + eye, v)
                own = cells.sel(approximator=method).isel(damping=level)
                assert float(own.slope) == pytest.approx(float(v @ step), rel=1e-5)
                bent = float(step @ (exact + eye) @ step)
                assert float(own.curvature) == pytest.approx(bent, rel=1e-5)
                best = float(v @ torch.linalg.solve(exact + eye, v))
                assert float(own.exact_slope) == pytest.approx(best, rel=1e-5)
                plain = float(v @ (exact + eye) @ v)
                assert float(own.gradient_curvature) == pytest.approx(plain, rel=1e-7)


NUMBERS = st.one_of(
    st.sampled_from([np.nan, np.inf]), st.floats(0.01, 3).map(lambda x: round(x, 3))
)
WHY = {
    "indefinite": "not positive definite (smallest eigenvalue -1, λ above {} needed)",
    "size": "left out for size: step (1e9 multiply-adds, about 1 s); ask with --time",
}


@given(
    st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 10_000),
)
def test_no_sentence_is_false_whatever_the_numbers(rows, best, seed):
    """Infinity stands for an indefinite cell, NaN for one left out for its size."""
    methods, layers = ["kfac", "kpsvd", "mine"], [str(n) for n in range(len(rows))]
    drawn = np.array(rows)
    values = np.where(np.isfinite(drawn), drawn, np.nan)
    status = np.full(values.shape, "ok", dtype=object)
    status[np.isnan(drawn)] = WHY["size"]
    for i, j in np.argwhere(np.isinf(drawn)):
        status[i, j] = WHY["indefinite"].format(0.5 + i)
    sizes = np.arange(1, len(rows) + 1)
    pooled = np.where(np.isnan(values).any(0), np.nan, values.sum(0))
    there = contests.in_common(sizes.astype(float) ** 2, np.isfinite(values))
    common = values[there].sum(0)
    found = xr.Dataset(
        {
            "purpose_value": (("layer", "approximator", "measure"), values[:, :, None]),
            "purpose_network": (("approximator", "measure"), pooled[:, None]),
            "purpose_status": (("layer", "approximator", "purpose"), status[:, :, None]),
            "purpose_common": (("approximator", "measure"), common[:, None]),
            "purpose_common_layers": (("layer", "purpose"), there[:, None]),
            **random_errors(len(rows), len(methods), seed),
        },
        {
            "layer": layers,
            "approximator": methods,
            "rival": methods,
            "measure": ["p.m"],
            "purpose": ["p"],
            "of_purpose": ("measure", ["p"]),
            "title": ("measure", ["gap"]),
            "best": ("measure", [best]),
            "assured": ("measure", [""]),
            "d_out": ("layer", sizes),
            "d_in": ("layer", sizes),
        },
        {"approximators": json.dumps(dict.fromkeys(methods, "Mine()"))},
    )
    (line,) = fl.analysis.verdict(found)
    check(line, rows_of(found, "p"))
    if not np.isfinite(pooled).any():
        words = "is the closest to the exact block by ", "of those that can be used"
        assert not any(word in line for word in words)
    assert line.split(": ", 1)[1].startswith(found_headline(found))


def found_headline(found):
    (one,) = verdicts.contests(found).values()
    return one.headline()


def test_of_many_that_are_equally_close_a_few_are_named():
    values, ok = np.ones((1, 9)), np.full((1, 9), "ok")
    methods = tuple("abcdefghi")
    one = contests.Contest("gap", 1.0, ("0",), methods, np.ones(1), values, ok, values[0])
    assert one.headline().startswith("`a`, `b` and `c` and 6 more are the closest")
    near = np.array([[1 - 2e-5, 1 - 3e-5]])
    two = contests.Contest(
        "gap", 1.0, ("0",), ("a", "b"), np.ones(1), near, ok[:, :2], near[0]
    )
    assert "gap: 0.99998, then `b` with 0.99997" in two.headline()


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10_000))
def test_layers_in_common_cover_nearly_all_and_no_method_could_join(rows, methods, seed):
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 100, rows).astype(float)
    known = draw.random((rows, methods)) < 0.8
    there = contests.in_common(sizes, known)
    assert sizes[there].sum() >= 0.9 * sizes.sum()
    held = known[there].all(0)
    np.testing.assert_array_equal(there, known[:, held].all(1))
    for column in known.T[~held]:
        assert sizes[there & column].sum() < 0.9 * sizes.sum()


@pytest.mark.parametrize(
    ("noise", "said"),
    [
        (np.nan, "leads are not held against noise"),
        (0.5, "a lead within the noise of the data, 0.5"),
        (0.3, ""),
    ],
)
def test_a_lead_is_noise_or_not_or_not_known(noise, said):
    values, ok = np.array([[0.1, 0.5]]), np.array([["ok"] * 2], dtype=object)
    facts = ("error", 0.0, ("0",), ("a", "b"), np.ones(1), values, ok)
    one = contests.Contest(*facts, values[0], noise=noise).told()
    assert re.findall(r"\((.*)\)", one) == ([said] if said else [])
    by_layer = contests.Contest(*facts, None, noise=noise).told()
    assert "noise" not in by_layer, "one winner: there is no count of layers to doubt"


def test_what_is_dearer_than_the_exact_solve_is_called_so():
    ok = np.array([["ok"] * 2], dtype=object)
    values = np.array([[0.1, 0.5]])
    flops = np.array([[30.0, 3.0]]), np.array([10.0])
    one = contests.Contest(
        "error", 0.0, ("0",), ("a", "b"), np.ones(1), values, ok, values[0],
        {contests.SOLVE: flops},
    )  # fmt: skip
    told = "; a solve with `a` takes 3 times the flops of theirs"
    assert f"{told}, dearer than the exact solve" in one.told()
    cheap = np.array([[3.0, 3.0]]), np.array([10.0])
    other = contests.Contest(
        "error", 0.0, ("0",), ("a", "b"), np.ones(1), values, ok, values[0],
        {contests.SOLVE: cheap},
    )  # fmt: skip
    assert "dearer" not in other.told()


def test_layers_whose_exact_block_is_zero_are_no_contest():
    """As after a training that died: errors relative to nothing say nothing."""
    model, data = small_network(0, "dense")
    with torch.no_grad():
        model[-1].weight.zero_()  # nothing before it reaches the output
    stats = fl.collect(model, data, fl.Categorical())
    ds = fl.compare(stats, ["kfac", "diagonal"])
    told = {one.topic: one.text for one in summary.verdict(ds)}
    assert (
        "The exact block is zero in layers 1 · Linear 16→5, 3 · Linear 5→5, 2 of 3"
        in told["caution"]
    )
    check(told["matrix"], rows_of_errors(ds.sel(layer=["4"])))
    assert moment(ds).alive.tolist() == [False, False, True]


def test_what_a_figure_lacks_is_said_with_its_reason():
    values = np.array([[0.4, np.nan], [0.5, np.nan], [0.6, 0.7]])
    status = np.full((3, 2), "ok", dtype=object)
    status[0, 1] = "not positive definite (smallest eigenvalue -1, λ above 1 needed)"
    status[1, 1] = "left out for size: directions (3e13 multiply-adds); ask with --time"
    one = contests.Contest(
        "gap", 0.0, ("a", "b", "c"), ("kfac", "mine"), np.array([1, 2, 1]), values, status
    )
    assert one.missing() == (
        "Without a mark: `mine` in a (25 %): indefinite; `mine` in b (50 %): left out for "
        "size."
    )
    whole = contests.Contest(*list(vars(one).values())[:5], np.ones((3, 2)), status)
    assert not whole.missing()


def test_a_contest_learns_from_another_who_is_indefinite():
    facts = "gap", 0.0, ("a", "b"), ("kfac", "mine"), np.ones(2), np.array([[1.0, 2.0]] * 2)
    ok = np.full((2, 2), "ok", dtype=object)
    known = ok.copy()
    known[1, 1] = "not positive definite (smallest eigenvalue -3, λ above 3 needed)"
    plain, other = contests.Contest(*facts, ok), contests.Contest(*facts, known)
    assert plain.indefinite == {}
    assert plain.knowing(other).indefinite == {"mine": [1]}
    assert plain.knowing(plain).indefinite == {}

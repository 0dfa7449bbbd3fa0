"""Verdicts are computed from numbers, and every row of every paper says its state."""

import re
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import xarray as xr

import fisherlab as fl
from fisherlab.cli import main
from fisherlab.reproduce import catalogue
from fisherlab.reproduce import exact_statements as exact
from fisherlab.reproduce.catalogue import PAPERS
from fisherlab.reproduce.experiment import Bound, Claim, Experiment, Row, Setting, judged
from tests.drawings import assert_texts_apart

A, B = 0.2, 0.4


def claim(**changes):
    return Claim(
        **{
            "statement": "Two numbers.",
            "published": {"a": A, "b": B},
            "measure": lambda ds: {name: float(ds[name]) for name in ds.data_vars},
            "tolerance": 0.1,
            "order": ("a", "b"),
            "reason": lambda ds: "It is so.",
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (A, B, "reproduced"),
        (1.09 * A, 0.91 * B, "reproduced"),
        (1.11 * A, B, "ordering only"),
        (1.11 * B, B, "not"),
        (float("nan"), B, "not measured"),
        (float("inf"), B, "not"),  # what should give the number failed
        (A, float("inf"), "not"),
    ],
)
def test_the_verdict_follows_from_tolerance_and_order(a, b, verdict):
    assert judged(claim(), [xr.Dataset({"a": a, "b": b})]).verdict == verdict


def test_an_order_that_is_not_claimed_earns_nothing():
    found = judged(claim(order=()), [xr.Dataset({"a": 3 * A, "b": 3 * B})])
    assert found.verdict == "not"


def test_the_mean_of_the_seeds_decides_and_all_are_told():
    seeds = [xr.Dataset({"a": A * scale, "b": B}) for scale in (0.8, 1.2)]
    found = judged(claim(), seeds)
    assert found.verdict == "reproduced"
    assert found.measured["a"] == pytest.approx([0.8 * A, 1.2 * A])


def test_a_number_that_a_run_does_not_hold_is_not_measured():
    assert judged(claim(), [xr.Dataset({"a": A})]).verdict == "not measured"


@pytest.mark.parametrize(("value", "holds"), [(0.9, False), (1.0, True), (2.1, False)])
def test_a_bound_has_no_tolerance(value, holds):
    one = claim(published={"a": Bound(at_least=1.0, at_most=2.0)}, order=())
    found = judged(one, [xr.Dataset({"a": value})])
    assert found.verdict == ("reproduced" if holds else "not")
    assert one.allowed == "bound"


def test_a_reason_is_told_only_where_a_claim_fails():
    one = claim(reason=lambda ds: f"b is {float(ds.b)}")
    assert judged(one, [xr.Dataset({"a": A, "b": B})]).reason == ""
    assert judged(one, [xr.Dataset({"a": A, "b": 0.1})]).reason == "b is 0.1"


def test_a_claim_without_a_reason_cannot_be_made():
    with pytest.raises(TypeError, match="reason"):
        Claim("One.", {"a": A}, lambda ds: {"a": A})


def test_a_reason_of_several_seeds_is_said_to_be_the_firsts():
    one = claim(reason=lambda ds: f"b is {float(ds.b)}")
    seeds = [xr.Dataset({"a": A, "b": b}) for b in (0.1, 0.2)]
    assert judged(one, seeds).reason == "Of the first seed: b is 0.1"


def test_the_committed_page_has_every_row_and_a_reason_where_a_claim_fails():
    page = (Path(__file__).parents[1] / "docs/REPRODUCTION.md").read_text(encoding="utf-8")
    for row in catalogue.rows():
        place, shows = (text.replace("|", "\\|") for text in (row.place, row.shows))
        assert f"\n| {place} | {shows} | " in page, row.name
        for one in row.claims:
            assert f"| {place} | {one.statement.replace('|', chr(92) + '|')} " in page
    told = re.findall(r"\*\*(not measured|not|ordering only)\*\*(.*) \|\n", page)
    assert len(told) > 30
    for _, reason in told:
        assert len(reason) > 20
        assert "The reason was not found" not in reason


def test_verdicts_are_counted_in_one_order():
    results = [xr.Dataset({"a": a, "b": B}) for a in (1.11 * B, 1.11 * A, A, float("nan"))]
    every = [judged(claim(), [one]) for one in results]
    told = "1 reproduced, 1 ordering only, 1 not, 1 not measured"
    assert catalogue._counted(every) == catalogue._counted(every[::-1]) == told


def test_every_row_has_a_command_or_says_why_not():
    known, every = catalogue.experiments(), catalogue.rows()
    assert len({row.name for row in every}) == len(every)
    assert {row.paper for row in every} == set(PAPERS)
    for row in every:
        if row.experiment is None:
            assert row.missing, row.name
            assert not row.claims
        else:
            assert row.experiment in known, row.name
    used = {row.experiment for row in every}
    assert used - {None} == set(known)


def test_every_problem_of_an_experiment_is_described():
    for one in catalogue.experiments().values():
        assert set(one.data) <= set(fl.problems.names())
        assert one.minutes[0] <= 10


def test_two_cores_are_expected_to_judge_everything_in_half_an_hour():
    cores = [0.0, 0.0]  # the longest first, as `write_all` does
    every = catalogue.experiments().values()
    for minutes in sorted((one.minutes[0] for one in every), reverse=True):
        cores[cores.index(min(cores))] += minutes
    assert max(cores) <= 28


# --- the command ---


def tiny(setting):
    numbers = {"a": A + 0.01 * setting.seed, "b": B * (1 + setting.quick)}
    return xr.Dataset(numbers, attrs={"settings": "two numbers"})


def named(setting):
    return tiny(setting).assign_attrs(settings=setting.problem)


def both(ds):
    return {"a": float(ds["a"]), "b": float(ds["b"])}


def broken(_):
    raise ArithmeticError("no drawing")


@pytest.fixture
def listed(monkeypatch):
    known = {
        "tiny": Experiment("tiny", "Two.", tiny, lambda _: plt.figure(), data=()),
        "broken": Experiment("broken", "Never drawn.", tiny, broken, data=()),
    }
    every = [
        Row("Table 9", "Two numbers.", "tiny", (claim(measure=both),), paper="chen2021"),
        Row("Table 10", "None.", "broken", paper="chen2021"),
        Row("Table 11", "A diagram.", missing="nothing to measure", paper="chen2021"),
    ]
    monkeypatch.setattr(catalogue, "experiments", lambda: known)
    monkeypatch.setattr(catalogue, "rows", lambda: every)


def test_rows_are_listed_and_unknown_ones_named(listed, capsys):
    assert main(["reproduce"]) == main(["reproduce", "list"]) == 0
    said = capsys.readouterr().out
    assert "Two numbers." in said
    assert "no command: nothing to measure" in said
    assert main(["reproduce", "nothing"]) == 2
    assert "tiny" in capsys.readouterr().err
    assert main(["reproduce", "chen2021-table-11"]) == 2
    assert "nothing to measure" in capsys.readouterr().err


def test_a_run_writes_data_figure_and_comparison(listed, tmp_path, capsys):
    out = tmp_path / "new"
    command = ["reproduce", "chen2021-table-9", "--seed", "3", "--seeds", "2"]
    assert main([*command, "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    names = sorted(file.name for file in out.iterdir())
    assert names == ["comparison.md", "results.nc", "tiny.csv", "tiny.pdf", "tiny.png"]
    found = fl.open(out / "results.nc")
    assert found["a"].values == pytest.approx([A + 0.03, A + 0.04])
    assert found["seed"].values.tolist() == [3, 4]
    page = (out / "comparison.md").read_text(encoding="utf-8")
    assert "a 0.235 (0.230–0.240), b 0.400" in page
    assert "**ordering only**" in page
    assert "two numbers; paper size; seed 3, 4" in page
    assert main([*command, "--out", str(out)]) == 2  # it is not empty


def test_all_writes_every_row_and_goes_on_where_it_stopped(listed, tmp_path, capsys):
    out = tmp_path / "all"
    command = ["reproduce", "all", "--quick", "--out", str(out)]
    assert main(command) == 0
    page = (out / "REPRODUCTION.md").read_text(encoding="utf-8")
    assert re.search(r"Table 9 .*\| 1 ordering only", page)
    assert re.search(r"Table 10 .*failed: ArithmeticError: no drawing", page)
    assert re.search(r"Table 11 .*nothing to measure", page)
    before = (out / "tiny" / "results.nc").stat().st_mtime_ns
    assert main(command) == 0
    assert (out / "tiny" / "results.nc").stat().st_mtime_ns == before
    fl.save(
        fl.open(out / "tiny" / "results.nc").drop_vars("b"), out / "tiny" / "results.nc"
    )
    assert main(command) == 0  # of another version
    page = (out / "REPRODUCTION.md").read_text(encoding="utf-8")
    assert re.search(r"Table 9 .*failed: .*'b'.*remove it", page)
    assert main(["reproduce", "all", "--out", str(out)]) == 0  # another size
    page = (out / "REPRODUCTION.md").read_text(encoding="utf-8")
    assert re.search(r"Table 9 .*failed: .*remove it", page)


def test_whole_matrices_are_of_one_seed_and_say_so(tmp_path, monkeypatch):
    seen = []

    def matrices(setting):
        seen.append(setting.seed)
        return xr.DataTree.from_dict({"/": tiny(setting), "/fc": tiny(setting)})

    known = {"tree": Experiment("tree", "A tree.", matrices, lambda _: plt.figure(), ())}
    monkeypatch.setattr(catalogue, "experiments", lambda: known)
    monkeypatch.setattr(catalogue, "rows", lambda: [])
    command = ["reproduce", "all", "--seeds", "2", "--seed", "3", "--out", str(tmp_path)]
    assert main(command) == main(command) == 0  # the second time from what is there
    assert seen == [3]
    assert fl.open(tmp_path / "tree" / "results.nc").attrs["seeds"] == 1
    page = (tmp_path / "tree" / "comparison.md").read_text(encoding="utf-8")
    assert "; paper size; seed 3." in page


def test_another_problem_is_taken_where_an_experiment_can_and_refused_elsewhere(
    listed, tmp_path, capsys
):
    known = catalogue.experiments()
    known["tiny"] = replace(known["tiny"], compute=named, problems=("digits", "mnist"))
    out = tmp_path / "new"
    command = ["reproduce", "tiny", "--problem", "mnist", "--out", str(out)]
    assert main(command) == 0
    assert fl.open(out / "results.nc").attrs["settings"] == "mnist"
    assert main(["reproduce"]) == 0
    assert "--problem digits mnist" in capsys.readouterr().out
    for name, takes in (
        ("broken", "takes no other problem"),
        ("all", "takes no other problem"),
        ("tiny", "takes one of digits, mnist"),
    ):
        other = ["--problem", "faces", "--out", str(tmp_path / "no")]
        assert main(["reproduce", name, *other]) == 2
        said = capsys.readouterr().err
        assert takes in said
        assert "it is for tiny" in said
    assert not (tmp_path / "no").exists()


def test_steps_are_taken_where_an_experiment_trains_and_refused_elsewhere(
    listed, tmp_path, capsys
):
    def counted(setting):
        return tiny(setting).assign_attrs(settings=f"{setting.steps} steps")

    known = catalogue.experiments()
    known["tiny"] = replace(known["tiny"], compute=counted, trains=True)
    out, refused = tmp_path / "new", tmp_path / "no"
    assert main(["reproduce", "tiny", "--steps", "7", "--out", str(out)]) == 0
    assert fl.open(out / "results.nc").attrs["settings"] == "7 steps"
    assert main(["reproduce"]) == 0
    assert "--steps N" in capsys.readouterr().out
    for name, steps, said in (
        ("broken", "7", "reproduce broken has no --steps; it is for tiny."),
        ("all", "7", "reproduce all has no --steps"),
        ("tiny", "0", "--steps must be at least 1, but is 0."),
    ):
        assert main(["reproduce", name, "--steps", steps, "--out", str(refused)]) == 2
        assert said in capsys.readouterr().err
    assert not refused.exists()


def test_the_longest_experiments_begin_first(listed, tmp_path):
    known, begun = catalogue.experiments(), []
    known |= {
        name: replace(known["tiny"], name=name, minutes=(quick, 9.0 - quick))
        for name, quick in (("a", 2.0), ("b", 3.0), ("tiny", 1.0), ("broken", 0.5))
    }
    setting = Setting(quick=True)
    catalogue.write_all(setting, 1, tmp_path / "quick", begun.append)
    told = [said.split(":")[0] for said in begun]
    assert list(dict.fromkeys(told)) == ["b", "a", "tiny", "broken"]
    assert re.fullmatch(r"b: \d+ s, \d+ s of the processor", begun[1])
    begun.clear()
    catalogue.write_all(replace(setting, quick=False), 1, tmp_path / "all", begun.append)
    told = [said.split(":")[0] for said in begun]
    assert list(dict.fromkeys(told)) == ["broken", "tiny", "a", "b"]


def test_a_run_that_fails_leaves_nothing_behind(listed, tmp_path):
    with pytest.raises(ArithmeticError):
        main(["reproduce", "broken", "--out", str(tmp_path / "new")])
    assert list(tmp_path.iterdir()) == []


def test_a_caption_lies_below_all_that_is_drawn():
    drawing, ax = plt.subplots(figsize=(4, 2))
    ax.set_xticks([0, 1], ["labels of the data, and more of them"] * 2, rotation=40)
    low = drawing.get_tightbbox().y0
    catalogue._caption(drawing, "two numbers; " * 20)
    caption = drawing.texts[-1]
    assert caption.get_window_extent().y1 / drawing.dpi < low
    assert_texts_apart(drawing)
    plt.close(drawing)


# --- verdicts of what is cheap to run ---


def verdicts(name):
    result = catalogue.experiment(name).compute(Setting(quick=True))
    own = [row for row in catalogue.rows() if row.experiment == name]
    return [judged(one, [result]) for row in own for one in row.claims]


def test_undamped_kfac_is_invariant_and_damped_is_not():
    invariant, others = verdicts("kfac-invariance")
    assert invariant.verdict == others.verdict == "reproduced"
    assert invariant.measured["difference"][0] < 1e-10
    assert others.measured["smallest"][0] > 1e-2


def test_theorem_1_holds_for_small_steps_and_not_at_one_over_k():
    small, large = verdicts("mbf-theorem-1")
    assert small.verdict == "reproduced"
    assert large.verdict == "not"
    assert "It holds in 75 % of the runs: 100 % with n=6, m=16, 50 % with" in large.reason
    assert "the bound is first crossed in step 10." in large.reason


def test_reasons_name_the_runs_that_break_a_bound():
    result = catalogue.experiment("mbf-theorem-1").compute(Setting(quick=True))
    first = next(row for row in catalogue.rows() if row.experiment == "mbf-theorem-1")
    result["holds"][0, 0, 0, 1] = False
    result["residual"][0, 0, 0, 1, 3] = 2.0
    found = judged(first.claims[0], [result])
    assert found.verdict == "not"
    assert "first crossed in step 3." in found.reason


def test_algorithms_and_lemmas_hold_to_rounding():
    found = verdicts("exact-statements")
    assert len(found) == 9
    for one in found:
        assert one.verdict == "reproduced", one.claim.statement
    result = xr.Dataset(
        {"difference": ("statement", [1e-3, 0.0])}, {"statement": ["a", "b"]}
    )
    told = judged(exact.exactly("Both.", "a", "b"), [result])
    assert told.verdict == "not"
    assert told.reason.startswith("Above 1e-09 are a 0.00100; 1 of the 2 statements")

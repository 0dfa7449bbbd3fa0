"""Laws of the command line: light, one line for a mistake, exit codes."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

import fisherlab as fl
from fisherlab import cli
from fisherlab.cli import commands, parser
from fisherlab.cli.report import configuration
from fisherlab.errors import NumericalError
from fisherlab.report.config import ReportConfig


def parsed(*words):
    return configuration(parser().parse_args(["report", *words]))


def fails_with(capsys, *words):
    """Run a command that must be refused, and return its one line on stderr."""
    assert cli.main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fisherlab: ")
    assert len(err.splitlines()) == 1
    return err


def test_parsing_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from fisherlab.cli import parser\n"
        "from fisherlab.cli.report import configuration\n"
        "configuration(parser().parse_args(['report', '--steps', '5']))\n"
        "heavy = {'torch', 'xarray', 'numpy', 'pandas', 'matplotlib', 'tyro'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_options_give_the_default_configuration():
    assert parsed() == ReportConfig()


def test_every_field_of_the_configuration_has_its_option(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in fields(ReportConfig):
        assert f"--{field.name.replace('_', '-')} " in text.replace("\n", " ")


def test_values_may_be_separated_by_spaces_or_commas():
    assert parsed("--checkpoints", "0", "5").checkpoints == (0, 5)
    assert parsed("--checkpoints", "0,5").checkpoints == (0, 5)
    assert parsed("--approximators", "exact,kfac", "ekfac").approximators == (
        "exact",
        "kfac",
        "ekfac",
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["report", "--steps", "0"], "--steps must be at least 1"),
        (["report", "--steps", "few"], "'few'"),
        (["report", "--damping", "0"], "--damping must be positive"),
        (["report", "--alpha", "nan"], "--alpha must be positive"),
        (["sweep", "--factored", "-1"], "--factored must be positive"),
        (["report", "--lr", "-1"], "--lr must be positive"),
        (["report", "--checkpoints", "0", "2000"], "between 0 and --steps"),
        (["report", "--approximators", ","], "given at least once"),
        (["report", "--fisher", "true"], "choose from"),
        (["report", "--stepps", "3"], "--stepps"),
        (["report", "--problem", "digit"], "digits, mnist"),
        (["report", "--device", "abacus"], "cpu"),
        (["report", "--layers", "fc9"], "fc1, fc2"),
        (["report", "--out", "/dev/null/x"], "/dev/null/x cannot be written"),
        (["rapport"], "rapport"),
        ([], "command"),
    ],
)
def test_a_mistake_is_named_in_one_line(capsys, words, named):
    assert named in fails_with(capsys, *words)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["rapport"], "report"),
        (["report", "--stepps", "3"], "--steps"),
        (["report", "--fisher", "emprical"], "empirical"),
        (["report", "--problem", "digit"], "digits"),
        (["report", "--approximators", "kfca"], "kfac"),
        (["report", "--layers", "fcc2"], "fc2"),
    ],
)
def test_a_misspelt_name_is_answered_by_the_nearest(capsys, words, meant):
    said = fails_with(capsys, *words)
    assert f"Did you mean {meant!r}?" in said


def test_nothing_is_meant_by_what_is_near_nothing(capsys):
    assert "mean" not in fails_with(capsys, "zzz")


@pytest.mark.parametrize("words", [["approximators"], ["problems"], ["reproduce", "list"]])
def test_tables_are_there_for_programs(capsys, words):
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert cli.main(words) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert len(found) == len(lines) > 20
    first = next(iter(found[0].values()))
    assert lines[0].startswith(first)
    assert head.startswith(next(iter(found[0])))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("two\nlines"), 2),
        (NumericalError("no root"), 2),
        (PermissionError("not yours"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_exit_codes(monkeypatch, capsys, error, code):
    def fail(*_):
        raise error

    monkeypatch.setattr(commands, "_problems", fail)
    assert cli.main(["problems"]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_defect_is_not_hidden(monkeypatch):
    def fail(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(commands, "_problems", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["problems"])


def test_problems_are_listed(capsys):
    assert cli.main(["problems"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:3] == ["name", "digits", "mnist"]


def test_approximators_are_listed(capsys):
    assert cli.main(["approximators"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("exact", "kfac", "kpsvd-2", "mini-block"))


ASKED = (  # a line up to the tab key, and what it may go on with
    (["re"], {"report", "reproduce"}),
    (["report", "--pro"], {"--problem"}),
    (["report", "--problem", "digits-v"], {"digits-vit"}),
    (["follow", "--optimizer", "kfac-k"], {"kfac-koroko"}),
)


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_a_shell_completes_commands_options_and_names(shell, capsys, tmp_path):
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell}")
    assert cli.main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    if shell == "zsh":  # its line editor answers in terminals alone
        assert subprocess.run([program, "-n", str(script)], check=False).returncode == 0
        found = script.read_text()
        assert all(word in found for _, expected in ASKED for word in expected)
        return
    asks = [f". {script}"]
    for words, _ in ASKED:
        if shell == "fish":
            asks.append(f"complete -C 'fisherlab {' '.join(words)}'; echo")
        else:
            asks.append(
                f"COMP_WORDS=(fisherlab {' '.join(words)}); COMP_CWORD={len(words)}; "
                f"COMPREPLY=(); _shtab_fisherlab fisherlab {words[-1]}; "
                r"printf '%s\n' ${COMPREPLY[@]} ''"
            )
    told = subprocess.run(
        [program, "-c", "\n".join(asks)], capture_output=True, text=True, check=True
    ).stdout
    answers = [block.splitlines() for block in told.split("\n\n")]
    for (_, expected), lines in zip(ASKED, answers[: len(ASKED)], strict=True):
        assert {line.split("\t")[0] for line in lines if line} == expected


def test_without_shtab_the_remedy_is_told(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install 'fisherlab[completion]'" in fails_with(capsys, "completion", "bash")
    assert "bash" in fails_with(capsys, "completion", "bahs")


def test_an_estimate_names_every_parameter_and_counts_before_work(capsys):
    assert cli.main(["estimate", "--examples", "100", "--approximators", "kfac"]) == 0
    text = capsys.readouterr().out
    for layer in range(1, 7):
        assert f"fc{layer}.weight" in text
        assert f"fc{layer}.bias" in text
    assert "N=100" in text


def test_an_estimate_is_there_for_programs(capsys):
    words = ["--examples", "100", "--approximators", "kfac,adam", "--json"]
    assert cli.main(["estimate", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    problem = fl.problems.load("digits")
    x, y = problem.train
    batch = x[:100], y[:100]
    expected = fl.estimate(problem.model, batch, problem.likelihood, ["kfac", "adam"])
    for name in ("examples", "statistics_bytes", "result_bytes", "peak_bytes", "flops"):
        assert found[name] == getattr(expected, name)
    for row, cost in zip(found["rows"], expected.rows, strict=True):
        assert (row["layer"], row["approximator"]) == (cost.layer, cost.approximator)
        assert row["flops"] == (None if math.isnan(cost.flops) else cost.flops)
    assert sum(row["numbers"] for row in found["coverage"]) == sum(
        p.numel() for p in problem.model.parameters()
    )


def test_an_estimate_of_several_ranks_says_what_one_of_them_sends(capsys):
    words = ["--examples", "100", "--approximators", "kfac,exact", "--ranks", "8"]
    assert cli.main(["estimate", *words]) == 0
    assert "8 ranks, 13 examples each" in capsys.readouterr().out
    assert cli.main(["estimate", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["shares"]
    sizes = [(row["added"], row["gathered"]) for row in found["rows"]]
    assert found["sent"] == dict(
        zip(("added", "gathered"), map(sum, zip(*sizes, strict=True)), strict=True)
    )
    told = fails_with(capsys, "estimate", "--examples", "4", "--ranks", "8")
    assert "ranks=8 share 4 examples" in told


def test_an_estimate_of_steps_is_that_of_their_optimisers(capsys):
    words = ["--examples", "100", "--approximators", "kfac", "--ranks", "4"]
    words += ["--optimizers", "adam,k-bfgs", "--batch-size", "20"]
    assert cli.main(["estimate", *words]) == 0
    assert "optimizer  added" in capsys.readouterr().out
    assert cli.main(["estimate", *words, "--json"]) == 0
    for name, found in json.loads(capsys.readouterr().out)["steps"].items():
        problem = fl.problems.load("digits")
        told = fl.training.step_bytes(problem, name, ranks=4, batch_size=20)
        assert found == vars(told.at(0)) | {"gradient": told.gradient.added}
        assert (found["gathered"] > 0) == (name == "k-bfgs")
    told = fails_with(capsys, "estimate", "--optimizers", "adam")
    assert "give --ranks" in told


def test_an_estimate_above_its_budget_says_so(capsys):
    assert cli.main(["estimate", "--budget", "1KiB"]) == 0
    assert "more than the budget" in capsys.readouterr().out
    assert "--fisher" in fails_with(capsys, "estimate", "--fisher", "wrong")


def each_command():
    """Return every command's parser by its name."""
    (known,) = (a for a in parser()._actions if isinstance(a.choices, dict))
    return known.choices


@pytest.mark.parametrize("name", each_command())
def test_help_explains_every_option_and_tells_its_default(name):
    command = each_command()[name]
    shown = command._get_formatter()
    for action in command._actions:
        assert action.help
        told = shown._expand_help(action)
        given = action.default
        values = given if isinstance(given, (list, tuple)) else [given]
        for value in values:
            unsaid = value is None or value in ("", argparse.SUPPRESS)
            assert unsaid or value is False or str(value) in told


@pytest.mark.parametrize("name", each_command())
def test_help_ends_with_an_example_that_is_understood(name):
    told = each_command()[name].epilog.split()
    assert told[:3] == ["example:", "fisherlab", name]
    parser().parse_args(told[2:])


@pytest.mark.parametrize("by_default", [signal.default_int_handler, signal.SIG_IGN])
def test_a_termination_is_an_interrupt_and_the_signal_is_given_back(
    by_default, monkeypatch, capsys
):
    """Also in a job that a script began with `&`, which ignores Ctrl-C."""

    def act(arguments, command):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("went on")

    monkeypatch.setattr(commands, "_problems", act)
    interrupt, terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, by_default)
    try:
        assert cli.main(["problems"]) == 130
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert capsys.readouterr().err == "fisherlab: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is terminate


def test_a_reader_that_leaves_ends_a_command_without_a_word(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["problems"]) == 141
    assert capsys.readouterr().err == ""


PRINTING = """
import torch
print("hello")
def net():
    print("λ")
    return torch.nn.Linear(64, 10)
"""


def test_what_a_file_of_ones_own_prints_is_no_result(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "printing_net.py").write_text(PRINTING, encoding="utf-8")
    torch.save((torch.ones(4, 64), torch.tensor([0, 1, 2, 3])), tmp_path / "data.pt")
    words = ["estimate", "--model", "printing_net.py:net", "--data", "data.pt", "--json"]
    assert cli.main(words) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert json.loads(out)
    assert err == "hello\nλ\n"


def test_a_terminal_without_greek_letters_ends_no_command(monkeypatch):
    shown = io.BytesIO()
    with io.TextIOWrapper(shown, encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(commands, "_problems", lambda *_: print("λ"))
        assert cli.main(["problems"]) == 0
        assert shown.getvalue() == b"\\u03bb\n"

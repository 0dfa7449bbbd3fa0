"""`fisherlab sweep`: errors of inverse and step over decades of damping."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any, Final

from fisherlab.cli.parsing import add_command
from fisherlab.cli.report import add_options, configuration

ALPHAS: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def add(commands: Any) -> None:
    """Add the command."""
    text = (
        "Train a problem, or take a model of your own, and hold the damped inverse and "
        "step of every approximation against the exact ones over decades of damping."
    )
    sweep = add_command(commands, "sweep", _sweep, text)
    add_options(sweep, without=("checkpoints", "layers", "budget"), alpha=ALPHAS)


def _sweep(arguments: argparse.Namespace, command: str) -> None:
    config = configuration(arguments)
    if arguments.alpha is ALPHAS and (config.damping or config.factored):
        config = replace(config, alpha=())

    from fisherlab.report.sweeping import run

    print(run(config, command))

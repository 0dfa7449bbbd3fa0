"""A row for everything of a paper that can be reproduced, whether it can be run or not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

from fisherlab.reproduce.claims import Claim


@final
@dataclass(frozen=True)
class Row:
    """A figure, table, algorithm or theorem of a paper.

    Parameters
    ----------
    paper
        First author and year, as the module that holds the row is named.
    place
        Such as "Figure 3".
    shows
        What it shows, in a line.
    experiment
        The name of what computes it; None if there is no command.
    claims
        What is claimed there.
    missing
        Why there is no command, or what the command leaves out.

    Examples
    --------
    >>> Row("martens2015", "Figures 5, 6", "Inverses.").name
    'martens2015-figures-5-6'
    """

    paper: str
    place: str
    shows: str
    experiment: str | None = None
    claims: tuple[Claim, ...] = ()
    missing: str = ""

    @property
    def name(self) -> str:
        """The row's id on the command line."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.place.lower()).strip("-")
        return f"{self.paper}-{slug}"

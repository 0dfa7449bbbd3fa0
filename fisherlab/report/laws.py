"""Inequalities between approximations that theory guarantees, checked on a result."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import xarray as xr

from fisherlab.catalogue import FLOOR
from fisherlab.report.moments import Moment, moment
from fisherlab.report.words import number


@dataclass(frozen=True)
class Law:
    """An inequality that theory guarantees, checked on every cell of a result.

    Examples
    --------
    >>> Law("kpsvd", "kfac", "why", checked=6, broken=()).holds
    True
    """

    smaller: str
    larger: str
    why: str
    checked: int
    broken: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Say whether no cell breaks the law."""
        return not self.broken


LAWS: Final = (
    ("kpsvd", "kfac", "KPSVD is the best single Kronecker product"),
    ("kpsvd-2", "kpsvd", "a second term cannot hurt the best fit"),
    ("kfac-corrected", "kfac", "the correction is the best fit to what KFAC leaves"),
    ("kpsvd-2", "kfac-corrected", "KPSVD of rank 2 is the best sum of two products"),
    ("kpsvd-2", "deflation", "KPSVD of rank 2 is the best sum of two products"),
    ("deflation", "kpsvd", "deflation adds a best-fitting second term"),
    ("ekfac", "kfac", "EKFAC's scalings are the best in KFAC's eigenbasis"),
    ("kpsvd", "tkfac", "KPSVD is the best single Kronecker product"),
    ("mini-block", "diagonal", "mini-blocks hold the diagonal and more"),
)


def laws(ds: xr.Dataset) -> tuple[Law, ...]:
    """Check the inequalities of theory on every layer and step of a result.

    A law is broken where the smaller error exceeds the larger one by more than
    1e-5 of it and more than the numerical floor.

    Examples
    --------
    >>> import xarray as xr
    >>> dims = ("layer", "approximator")
    >>> coords = {"layer": ["0"], "approximator": ["kfac", "kpsvd"]}
    >>> ds = xr.Dataset({"frobenius_error": (dims, [[0.4, 0.5]])}, coords)
    >>> laws(ds)[0].broken
    ('layer=0: kpsvd 0.500 > kfac 0.400',)
    """
    if "frobenius_error" not in ds:
        return ()
    steps: list[int | None] = (
        [int(s) for s in ds["step"].values] if "step" in ds.dims else [None]
    )
    moments = [moment(ds, step) for step in steps]
    checked = [_law(moments, *law) for law in LAWS]
    return tuple(law for law in checked if law.checked)


def _law(moments: list[Moment], smaller: str, larger: str, why: str) -> Law:
    checked, broken = 0, []
    for m in moments:
        low, high = (m.column("frobenius_error", name) for name in (smaller, larger))
        known = np.isfinite(low) & np.isfinite(high)
        checked += int(known.sum())
        for i in np.flatnonzero(known & (low > high * (1 + 1e-5) + FLOOR)):
            where = "" if m.step is None else f"step={m.step}, "
            broken.append(
                f"{where}layer={m.layers[i]}: {smaller} {number(low[i])} > "
                f"{larger} {number(high[i])}"
            )
    return Law(smaller, larger, why, checked, tuple(broken))

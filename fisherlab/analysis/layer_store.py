"""Rows of a comparison on disk, from which it goes on where it was stopped."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import xarray as xr

from fisherlab.analysis.files import open as opened
from fisherlab.analysis.files import save
from fisherlab.analysis.merging import merge
from fisherlab.errors import StoreError


def joined(rows: Sequence[xr.Dataset]) -> xr.Dataset:
    """Return one table of all rows."""
    found = rows[0].copy() if len(rows) == 1 else merge(rows)
    for name in ("merged_from", "refused"):
        found.attrs.pop(name, None)
    found.attrs["created_at"] = rows[0].attrs["created_at"]
    return found


@final
@dataclass(frozen=True, eq=False)
class Store:
    """Rows that are done, on disk after every layer.

    Parameters
    ----------
    path
        The file, None for none.
    request
        What the rows are an answer to.
    rows
        Those found there, by layer.
    """

    path: Path | None
    request: str
    rows: Mapping[str, xr.Dataset]

    @classmethod
    def of(
        cls, path: str | os.PathLike[str] | None, told: Callable[[], Mapping[str, str]]
    ) -> "Store":
        """Open a store, and take what is done from it.

        Raises
        ------
        StoreError
            If it is an answer to another request; what differs is named.
        """
        if path is None:
            return cls(None, "", {})
        file, request = Path(path), told()
        text = json.dumps(request, sort_keys=True)
        return cls(file, text, _done(file, request) if file.exists() else {})

    @property
    def attrs(self) -> dict[str, str]:
        """What is written beside the rows."""
        return {"request": self.request} if self.path else {}

    def write(self, rows: Sequence[xr.Dataset]) -> None:
        """Write the rows that are done; a refusal is tried again the next time."""
        done = [row for row in rows if "refused" not in row.attrs]
        if self.path is not None and done:
            self.finish(joined(done).assign_attrs(self.attrs))

    def finish(self, ds: xr.Dataset) -> None:
        """Write a table, whole or not at all."""
        if self.path is not None:
            save(ds, self.path)


def _done(file: Path, request: Mapping[str, str]) -> dict[str, xr.Dataset]:
    ds = opened(file)
    known = json.loads(str(ds.attrs.get("request", "{}")))
    other = [name for name in request if known.get(name) != request[name]]
    if other or not isinstance(ds, xr.Dataset):
        raise StoreError(
            f"compare: {file} holds another comparison: {', '.join(other)} differ. Give "
            "another store, or the request that it was made for."
        )
    ds.attrs.pop("foretold_bytes", None)
    ds.attrs.pop("budget_bytes", None)
    served = (~ds["status"].astype(str).str.startswith("not served")).all("approximator")
    return {
        str(name): ds.sel(layer=[name])
        for name, good in zip(ds["layer"].values, served.values, strict=True)
        if good
    }

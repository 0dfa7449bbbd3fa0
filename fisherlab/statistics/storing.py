"""Statistics of more examples than memory holds, written to a folder part by part.

The folder is there whole or not at all, with a hash of all files; it tells which model,
data, likelihood and settings it belongs to.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from fisherlab.codes import codes, described
from fisherlab.durable import check_folder, claimed, flush, flush_tree, seal_folder
from fisherlab.errors import DataError
from fisherlab.numerics.devices import mapped, require
from fisherlab.statistics.batches import Batch, batches
from fisherlab.statistics.network import (
    Chunks,
    Statistics,
    foretold,
    held_bytes,
    join_examples,
    together,
)
from fisherlab.statistics.values import LayerStatistics, StoredPart, state_of, stored_as

SHARE = 16  # parts of the budget: pairs of parts are opened, and cast to float64
PART_BYTES = 256 * 2**20  # the largest part
ABOUT: Final = "about.json"
FORMAT: Final = 1
Pieces = Iterator[dict[str, LayerStatistics]]
Run = Callable[..., Pieces]  # of `chunk_size` and `planned`


def identity(
    model: nn.Module, data: Any, likelihood: Any, fisher: Any, **settings: Any
) -> dict[str, str]:
    """Return what tells statistics from others: numbers, settings and code."""
    return {
        "fisher": described(fisher),
        "likelihood": described(likelihood),
        "model": described(model),
        **{name: str(value) for name, value in settings.items()},
        "model and data": fingerprint(model, data),
        **codes(model=model, likelihood=likelihood),
    }


def fingerprint(model: nn.Module, data: Any) -> str:
    """Return a digest of all weights and all data."""
    digest = hashlib.sha256()
    for name, held in model.state_dict().items():
        digest.update(name.encode())
        _add(digest, held)
    for batch in batches_of(model, data):
        for held in (*batch.tensors(), batch.y):
            _add(digest, held)
    return digest.hexdigest()


def batches_of(model: nn.Module, data: Any) -> Iterator[Batch]:
    """Yield the batches of data as they are given, on the host."""
    return batches(data, torch.device("cpu"), None, model=model)


def _add(digest: Any, held: Any) -> None:
    if isinstance(held, Tensor):
        flat = held.detach().cpu().contiguous().flatten()
        digest.update(f"{held.dtype}{tuple(held.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")


def require_repeatable(data: Any) -> None:
    """Refuse data that are used up by the first pass, which their digest takes.

    Raises
    ------
    ValueError
        Saying what to give.
    """
    if isinstance(data, Iterator):
        raise ValueError(
            f"collect(store=): data is a {type(data).__name__}, which can be gone through "
            "once; a tuple (x, y), a list of pairs or a DataLoader is expected: the data "
            "are read once more to tell whose the folder is."
        )


def kept(
    folder: Path,
    about: Mapping[str, str],
    run: Run,
    chunk_size: int | None,
    limit: int,
    compress: bool,
) -> Statistics:
    """Return the statistics in a folder, which are collected if there is none.

    Raises
    ------
    DataError
        If the folder is damaged, belongs to other statistics, is none, or another
        process is writing it.
    """
    if not folder.name:
        raise DataError(f"collect(store={str(folder)!r}): give a folder with a name.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"collect(store={str(folder)!r}): {folder.parent} cannot be made a folder "
            f"({error.strerror}); give another one."
        ) from error
    busy = DataError(f"collect(store={str(folder)!r}): another process is writing it.")
    with claimed(folder.with_name(f".{folder.name}.lock"), busy):
        if not folder.exists():
            _write(folder, about, partial(_collected, run, compress, limit), chunk_size)
        else:
            _require_same(folder, about)
    return _opened(folder)


def _require_same(folder: Path, about: Mapping[str, str]) -> None:
    if not (folder / ABOUT).is_file() or not check_folder(folder):
        raise DataError(
            f"collect(store={str(folder)!r}): the folder is there and holds no statistics. "
            "Give a folder that is not there yet, or one of an earlier call."
        )
    known = json.loads((folder / ABOUT).read_text())
    names = {*known["identity"], *about}
    other = sorted(n for n in names if known["identity"].get(n) != about.get(n))
    other += ["format"] * (known["format"] != FORMAT)
    if other:
        raise DataError(
            f"collect(store={str(folder)!r}): the folder holds other statistics; these "
            f"differ: {', '.join(other)}. Give another folder, or remove this one."
        )


def _write(
    folder: Path,
    about: Mapping[str, str],
    collected: Callable[[int | None, Path], int],
    chunk_size: int | None,
) -> None:
    """Collect into a folder beside, and put it in its place in one move."""
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".partial-{folder.name}-"))
    try:
        try:
            parts = collected(chunk_size, beside / "new")
        except _TooLong as found:
            shutil.rmtree(beside / "new")
            parts = collected(found.examples, beside / "new")
        content = {"format": FORMAT, "identity": dict(about), "parts": parts}
        (beside / "new" / ABOUT).write_text(json.dumps(content, indent=1))
        seal_folder(beside / "new")
        flush_tree(beside / "new")
        (beside / "new").rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class _TooLong(Exception):
    """A run of examples is larger than a part; this many are not."""

    def __init__(self, examples: int) -> None:
        self.examples = examples


@final
@dataclass(eq=False)
class _Writer:
    """Statistics on their way to a disk: a part is written when it is full."""

    folder: Path
    most: int
    held: dict[str, Chunks] = field(default_factory=dict)
    parts: int = 0

    def add(self, pieces: Mapping[str, LayerStatistics], compress: bool) -> None:
        for name, piece in pieces.items():
            self.held[name] = self.held.get(name, Chunks((), compress)).add(piece)

    def make_room(self, needed: int) -> None:
        """Write what is held before a run that would make it too large."""
        if self.held and held_bytes(self.held) + needed > self.most:
            self.write()

    def write(self) -> None:
        """Write one part, a file for every block."""
        for number, name in enumerate(list(self.held)):
            layer = self.held.pop(name).joined()
            file = self.folder / f"{self.parts:05d}-{number:04d}.pt"
            torch.save(mapped(layer, _compact), file)
            flush(file)
        self.parts += 1


def _compact(tensor: Tensor) -> Tensor:
    """Return a tensor on the host that is no view: files hold what it stands in."""
    own = tensor.detach().cpu().contiguous()
    return own if own.untyped_storage().nbytes() == own.nbytes else own.clone()


def _collected(
    run: Run, compress: bool, limit: int, chunk_size: int | None, folder: Path
) -> int:
    """Write all parts and return their number; a run of examples is never cut.

    Raises
    ------
    BudgetError
        If one run of the size asked for exceeds the budget.
    """
    folder.mkdir()
    writer = _Writer(folder, min(limit // SHARE, PART_BYTES))

    def planned(pieces: dict[str, LayerStatistics], columns: int) -> None:
        needed = foretold(pieces, columns, 0, {}, compress)
        count = max(piece.count for piece in pieces.values())
        if chunk_size is None and needed > writer.most and count > 1:
            raise _TooLong(max(1, count * writer.most // needed))
        require(needed, limit, f"collect(store=) of {count} examples", "Lower chunk_size.")
        writer.make_room(needed)

    for pieces in run(chunk_size=chunk_size, planned=planned):
        writer.add(pieces, compress)
    writer.write()
    return writer.parts


def _opened(folder: Path) -> Statistics:
    """Return the statistics that a folder holds."""
    layers, found = {}, sorted(folder.resolve().glob("*-*.pt"))
    for number in range(sum(file.name.startswith("00000-") for file in found)):
        files = [file for file in found if file.stem.endswith(f"-{number:04d}")]
        whole = _joined(files)
        layers[whole.name] = whole
    return together(layers)


def _joined(files: list[Path]) -> LayerStatistics:
    """Return the statistics of one block, whose numbers stay in the files."""
    shapes = []
    for file in files:
        layer = StoredPart(str(file), 0, 0, torch.float64).read()
        shapes.append(mapped(layer, lambda tensor: tensor.to("meta")))
    whole = join_examples(shapes)
    columns, precision = whole.samples.columns, whole.dtype
    parts = (
        StoredPart(
            str(file), layer.samples.examples, columns, precision, state=state_of(file)
        )
        for file, layer in zip(files, shapes, strict=True)
    )
    return stored_as(whole, tuple(parts))

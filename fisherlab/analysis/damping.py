"""The damping dimension of an analysis: several dampings, their labels and their λ."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

from fisherlab.operators import Operator
from fisherlab.operators.dampings import (
    Damping as One,
)
from fisherlab.operators.dampings import (
    Factored,
    RelativeDamping,
    Tikhonov,
    parsed,
)

Damping = One | Iterable[One] | None
Label = float | str


@final
@dataclass(frozen=True)
class Dampings:
    """The dampings of an analysis, one after the other.

    Examples
    --------
    >>> dampings([0.1, Factored(0.1)]).labels
    ('0.1', 'factored 0.1')
    >>> dampings([0.1, 1.0]).labels
    (0.1, 1.0)
    """

    each: tuple[One, ...]

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Which kind each is: absolute (λ beside the matrix), relative or factored."""
        named = {RelativeDamping: "relative", Factored: "factored"}
        return tuple(named.get(type(one), "absolute") for one in self.each)

    @cached_property
    def kind(self) -> str:
        """The kind of all, or "mixed"."""
        kinds = set(self.kinds)
        return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "absolute"

    @cached_property
    def labels(self) -> tuple[Label, ...]:
        """The numbers where all are of one kind, else kind and number in words."""
        numbers = tuple(_size(one) for one in self.each)
        if self.kind != "mixed" and len(set(self.each)) == len(set(numbers)):
            return numbers
        pairs = zip(self.kinds, self.each, strict=True)
        return tuple(_words(kind, one) for kind, one in pairs)

    def told(self, level: int) -> str:
        """Return one label as text."""
        label = self.labels[level]
        return label if isinstance(label, str) else f"{label:g}"

    def read(self, exact: Operator) -> tuple[Tikhonov | Factored, ...]:
        """Return every damping for one exact block."""
        return tuple(parsed(one, exact) for one in self.each)

    def values(self, exact: Operator) -> tuple[float, ...]:
        """Return λ for one exact block."""
        return tuple(one.value for one in self.read(exact))

    def single(self, call: str, exact: Operator) -> Tikhonov | Factored:
        """Return the one damping of a call that takes one.

        Raises
        ------
        ValueError
            If there are several.
        """
        self.require_one(call)
        return self.read(exact)[0]

    def require_one(self, call: str) -> None:
        """Refuse several dampings.

        Raises
        ------
        ValueError
            Unless there is exactly one.
        """
        if len(self.each) != 1:
            msg = f"{call}: one damping is expected, {self.labels} was given."
            raise ValueError(msg)


def dampings(damping: Damping) -> Dampings:
    """Read a damping argument: None, one damping of any kind, or several.

    Raises
    ------
    ValueError
        For what is no damping, or not positive.
    """
    if damping is None:
        return Dampings(())
    single = isinstance(damping, (str, Tikhonov, Factored, RelativeDamping))
    if getattr(damping, "ndim", None) == 0 or not hasattr(damping, "__iter__"):
        single = True
    given: Any = (damping,) if single else damping
    found: list[One] = []
    for one in given:
        if isinstance(one, RelativeDamping):
            assert isinstance(one.alphas, tuple)
            found += [RelativeDamping(alpha) for alpha in one.alphas]
        else:
            found.append(parsed(one, None))
    if not found or any(not _size(one) > 0 for one in found):
        raise ValueError(f"damping={damping!r}: positive dampings are expected.")
    return Dampings(tuple(found))


def _size(damping: One) -> float:
    if isinstance(damping, RelativeDamping):
        return damping.single()
    assert isinstance(damping, (Tikhonov, Factored))
    return damping.value


def _words(kind: str, damping: One) -> str:
    if isinstance(damping, Factored) and damping != Factored(damping.value):
        return repr(damping)
    return f"{'' if kind == 'absolute' else kind + ' '}{_size(damping):g}"

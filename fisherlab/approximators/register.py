"""The register: names of approximators, which each of them gives itself in its own file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from fisherlab.approximators.base import Approximator, NetworkApproximator, facts
from fisherlab.errors import meant

Scope = Literal["block", "network", "any"]
Chosen = str | Callable[..., Any] | Sequence[Any] | Mapping[str, Any] | None


class _Entry(NamedTuple):
    approximator: Any
    estimates: bool
    scope: Scope


_ENTRIES: Final[dict[str, _Entry]] = {}
_ALIASES: Final[dict[str, str]] = {}


def add(
    named: Mapping[str, Any],
    *,
    estimates: bool = True,
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Give approximators names, by which tables, reports, optimisers and probes know them.

    Parameters
    ----------
    named
        Values by name; any function of the statistics is one. What a value says of
        itself (`Facts`), and what it costs, stand in its class.
    estimates
        Whether they estimate the block, so that a comparison takes them unasked; else
        they are `preconditioners`.
    aliases
        Other names of the same matrices.

    Raises
    ------
    ValueError
        If a name stands for another value already.

    Examples
    --------
    >>> add({"kfac": approximators()["kfac"]})
    """
    taken = [n for n, value in named.items() if n in _ENTRIES and _value(n) != value]
    if taken:
        raise ValueError(f"register.add: {', '.join(map(repr, taken))} are names already.")
    for name, value in named.items():
        scope: Scope = "network" if facts(value).couples else "block"
        _ENTRIES[name] = _Entry(value, estimates, scope)
    _ALIASES.update(aliases or {})


def approximators() -> dict[str, Approximator]:
    """Return all named approximators.

    Examples
    --------
    >>> approximators()["kpsvd-2"]
    KPSVD(rank=2, solver='auto')
    """
    return _listed("block", estimates=True)


def preconditioners() -> dict[str, Approximator]:
    """Return the named preconditioners, which are no estimates of the block itself.

    They take mean gradients; `compare` gives them the statistics of a layer, whose mean
    gradient they take for `Empirical` and `MonteCarlo`. K-BFGS takes those statistics.

    Examples
    --------
    >>> preconditioners()["adam"]
    AdamPreconditioner()
    """
    return _listed("block", estimates=False)


def network_approximators() -> dict[str, NetworkApproximator]:
    """Return all named approximators of a whole network.

    Examples
    --------
    >>> network_approximators()["kfac-tridiagonal"]
    KFACTridiagonal(chain=None)
    """
    return _listed("network", estimates=True)


def by_name(chosen: Chosen, scope: Scope = "block") -> dict[str, Any]:
    """Return approximators by name, values as they are; all named ones by default.

    Parameters
    ----------
    chosen
        Names, values or functions, one or several, or a mapping of names to values. A
        value is called as it is registered, else by its repr, a function by its own name.
        Other names of the same matrix are understood: kflr and kfc (kfac), tnt (tkfac).
        So are the names of `preconditioners`.
    scope
        Whether names of methods of single blocks, of those that couple layers, or both
        are known.

    Raises
    ------
    ValueError
        If a name is unknown, where the known ones are listed, or two values have one.
    TypeError
        For a class in the place of its value, or what cannot be called.

    Examples
    --------
    >>> by_name(["kfac"])
    {'kfac': KFAC(sharing='expand')}
    """
    if chosen is None:
        return _listed(scope, estimates=True)
    if isinstance(chosen, Mapping):
        _require_values(chosen.values())
        return dict(chosen)
    given = [chosen] if isinstance(chosen, str) or callable(chosen) else list(chosen)
    _require_values(given)
    known = {n for n, entry in _ENTRIES.items() if scope in ("any", entry.scope)}
    names = [one for one in given if isinstance(one, str)]
    unknown = [name for name in names if _ALIASES.get(name, name) not in known]
    if unknown:
        what = "network approximators" if scope == "network" else "approximators"
        listed = ", ".join(n for n in _ENTRIES if n in known)
        msg = f"{what}: {', '.join(map(repr, unknown))} unknown; known: {listed}."
        msg += meant(str(unknown[0]), known)
        raise ValueError(msg)
    found: dict[str, Any] = {}
    for one in given:
        label, value = _label(one), _value(one) if isinstance(one, str) else one
        if found.setdefault(label, value) != value:
            msg = f"approximators: two are called {label!r}; give a mapping of names."
            raise ValueError(msg)
    return found


def _require_values(given: Iterable[object]) -> None:
    for one in given:
        if isinstance(one, type):
            told = f"approximators: the class {one.__name__} was given; a value is expected"
            raise TypeError(f"{told}, such as fl.{one.__name__}().")
        if not (isinstance(one, str) or callable(one)):
            raise TypeError(
                f"approximators: {type(one).__name__} was given; a name, a value such as "
                "fl.KFAC() or a function of a layer's statistics is expected."
            )


def network_by_name(chosen: Chosen) -> dict[str, NetworkApproximator]:
    """Return network approximators by name; as `by_name` of that scope.

    Examples
    --------
    >>> network_by_name(["khatri-rao"])
    {'khatri-rao': KhatriRao()}
    """
    return by_name(chosen, "network")


def named(chosen: Any, scope: Scope = "any") -> Any:
    """Return the approximator of a name; a value, or None, as it is.

    Raises
    ------
    ValueError
        If the name is unknown.
    TypeError
        For a class in the place of its value, or what cannot be called.
    """
    if isinstance(chosen, str):
        return by_name([chosen], scope)[chosen]
    _require_values([] if chosen is None else [chosen])
    return chosen


def _value(name: str) -> Any:
    return _ENTRIES[_ALIASES.get(name, name)].approximator


def _listed(scope: Scope, *, estimates: bool) -> dict[str, Any]:
    return {
        name: entry.approximator
        for name, entry in _ENTRIES.items()
        if scope in ("any", entry.scope) and entry.estimates == estimates
    }


def _label(one: Any) -> str:
    """Return what a value is called in a table."""
    if isinstance(one, str):
        return one
    known = [name for name, entry in _ENTRIES.items() if entry.approximator == one]
    return known[0] if known else str(getattr(one, "__name__", repr(one)))

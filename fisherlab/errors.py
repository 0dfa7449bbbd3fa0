"""The errors fisherlab raises besides ValueError: each names the thing and the remedy."""

import pickle
import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class FisherlabError(Exception):
    """Base of every error that fisherlab defines itself.

    Examples
    --------
    >>> import fisherlab as fl
    >>> issubclass(fl.errors.BudgetError, fl.errors.FisherlabError)
    True
    """


def _by_message(error: FisherlabError) -> tuple[Any, ...]:
    """Pickle an error by its message and fields, from which it cannot be made again."""
    return _again, (type(error), error.args), error.__dict__


def _again(kind: Any, args: tuple[Any, ...]) -> Any:
    return kind.__new__(kind, *args)


class NeedsSharedForm(FisherlabError, TypeError):
    """A method needs inputs and output gradients, but the layer is described otherwise.

    A norm layer, a bare parameter, a tied or recurrent weight has per-example gradient
    matrices only, an embedding its tokens, a grouped convolution several pairs.

    Parameters
    ----------
    method, layer
        What was called, on what.
    form
        How the layer is described instead.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.ones(4, 3), None
    >>> stats = fl.collect(torch.nn.LayerNorm(3), data, fl.Gaussian())
    >>> fl.KFAC()(stats["weight"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fisherlab.errors.NeedsSharedForm: KFAC needs the shared form ...
    """

    __reduce__ = _by_message

    def __init__(
        self, method: str, layer: str, form: str = "per-example gradient matrices"
    ) -> None:
        self.method = method
        self.layer = layer
        super().__init__(
            f"{method} needs the shared form (inputs and output gradients) of a "
            f"layer, but {layer!r} is described by {form} "
            "only. Use a method without that need for it (ExactBlock, Diagonal, "
            "MiniBlock), or leave the layer out with `layers=`."
        )


class NeedsMeanGradient(FisherlabError, ValueError):
    """A method needs the gradient of the mean loss, which the statistics do not give.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> fl.AdamPreconditioner()(stats["weight"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fisherlab.errors.NeedsMeanGradient: ...
    """


class NumericalError(FisherlabError, ArithmeticError):
    """A factorisation failed or a value is not finite; layer and damping are named.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(3, 2), torch.nn.Threshold(1e9, float("inf"))
    ... )
    >>> fl.collect(model, (torch.ones(4, 3), None), fl.Gaussian())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fisherlab.errors.NumericalError: The model's output holds NaN or infinity, ...
    """


class IndefiniteError(NumericalError):
    """A damped operator is not positive definite; the smallest remedy is named.

    Parameters
    ----------
    what
        The operator.
    damping
        λ that was given.
    smallest
        The smallest eigenvalue without damping.
    floor
        What it must exceed: 0, or the size of rounding where nothing is damped.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> operator = fl.operators.Diagonal(torch.tensor([[1.0, -0.5]]))
    >>> operator.solve(torch.ones(1, 2), damping=0.1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fisherlab.errors.IndefiniteError: ... A damping above 0.5 is needed.
    """

    __reduce__ = _by_message

    def __init__(
        self, what: object, damping: float, smallest: float, floor: float = 0.0
    ) -> None:
        self.damping, self.smallest = damping, smallest
        self.sufficient = max(floor - smallest, 0.0) * (1 + 1e-6) + 1e-300
        rounding = f", where rounding is up to {floor:.3g}" if floor else ""
        super().__init__(
            f"{what} with damping {damping:g} is not positive definite: its smallest "
            f"undamped eigenvalue is {smallest:.6g}{rounding}. A damping above "
            f"{self.sufficient:.6g} is needed."
        )


class BudgetError(FisherlabError, MemoryError):
    """A request would exceed the memory budget; bytes, budget and a remedy are named.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model, data = torch.nn.Linear(3, 2), (torch.ones(4, 3), None)
    >>> fl.collect(model, data, fl.Gaussian(), budget=10)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fisherlab.errors.BudgetError: collect needs ...
    """


class UnsupportedMetric(FisherlabError, ValueError):
    """An operator cannot serve a metric; metric, operator and remedy are named.

    Parameters
    ----------
    metric
        The metric asked for.
    operator
        The operator, in one line.
    remedy
        Why not, and what to do instead.

    Examples
    --------
    >>> print(UnsupportedMetric("gaussian_kl", "An operator", "Give it an inverse."))
    gaussian_kl: An operator cannot serve it. Give it an inverse.
    """

    __reduce__ = _by_message

    def __init__(self, metric: str, operator: str, remedy: str) -> None:
        self.metric, self.remedy = metric, remedy
        super().__init__(f"{metric}: {operator} cannot serve it. {remedy}")


class DataError(FisherlabError, ValueError):
    """A data file is missing, corrupted or not what it should be.

    Examples
    --------
    >>> import tempfile, fisherlab as fl
    >>> from pathlib import Path
    >>> file = Path(tempfile.mkdtemp()) / "errors.nc"
    >>> _ = file.write_text("no result")
    >>> fl.open(file)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fisherlab.errors.DataError: ...
    """


class UnsupportedModelError(FisherlabError, ValueError):
    """A model holds something fisherlab would have to guess about; it is named.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    >>> fl.collect(model, (torch.ones(4, 3), None), fl.Gaussian())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fisherlab.errors.UnsupportedModelError: Batch statistics couple the examples in ...
    """


class StoreError(FisherlabError, OSError):
    """The folder of a training cannot be written, or is in use; what is kept is told.

    Examples
    --------
    >>> import fisherlab as fl
    >>> try:
    ...     raise fl.errors.StoreError("The folder 'run' is in use.")
    ... except OSError as error:
    ...     print(error)
    The folder 'run' is in use.
    """


class RankError(FisherlabError, RuntimeError):
    """Processes of a group do not agree, or one of them failed; its rank is named.

    Examples
    --------
    >>> import fisherlab as fl
    >>> try:
    ...     raise fl.errors.RankError("The weights of rank 1 differ from those of rank 0.")
    ... except RuntimeError as error:
    ...     print(error)
    The weights of rank 1 differ from those of rank 0.
    """


class ExecutorError(FisherlabError, RuntimeError):
    """An executor lost cells of an analysis; what is done and the remedy are told.

    Examples
    --------
    >>> import fisherlab as fl
    >>> try:
    ...     raise fl.errors.ExecutorError("2 of 40 cells were lost.")
    ... except RuntimeError as error:
    ...     print(error)
    2 of 40 cells were lost.
    """


def lasting(error: Exception) -> Exception:
    """Return an error that another process can be sent: itself, or one that says the same.

    Examples
    --------
    >>> class Mine(Exception):
    ...     "Known to this process alone."
    >>> lasting(Mine("no number"))
    FisherlabError('Mine: no number')
    """
    try:
        again = pickle.loads(pickle.dumps(error))
    except Exception:
        again = None
    same = type(again) is type(error) and str(again) == str(error)
    return error if same else FisherlabError(f"{type(error).__name__}: {error}")


def meant(given: str, known: Iterable[str]) -> str:
    """Ask for the known name nearest to a given one, in any case; nothing where none is.

    Examples
    --------
    >>> meant("kfca", ["ekfac", "kfac", "diagonal"])
    " Did you mean 'kfac'?"
    >>> meant("KFAC", ["ekfac", "kfac"]), meant("adam", ["kfac"])
    (" Did you mean 'kfac'?", '')
    """
    spelt = {name.lower(): name for name in known}
    near = get_close_matches(given.lower(), list(spelt), n=1)
    return f" Did you mean {spelt[near[0]]!r}?" if near else ""


def warn(message: str) -> None:
    """Warn at the line that called fisherlab, however deep in it the reason was found.

    Examples
    --------
    >>> with warnings.catch_warnings(record=True, action="always") as told:
    ...     warn("this takes long")
    >>> str(told[0].message)
    'this takes long'
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _within(str(frame.f_globals.get("__name__"))):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _within(module: str) -> bool:
    """Whether a frame is this package's, or torch's around it (hooks of `step`)."""
    return module.partition(".")[0] in ("fisherlab", "torch")

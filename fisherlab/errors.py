"""The errors fisherlab raises besides ValueError: each names the thing and the remedy."""

import pickle
from collections.abc import Iterable
from difflib import get_close_matches


class FisherlabError(Exception):
    """Base of every error that fisherlab defines itself."""


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
    """

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
    """A method needs the gradient of the mean loss, which the statistics do not give."""


class NumericalError(FisherlabError, ArithmeticError):
    """A factorisation failed or a value is not finite; layer and damping are named."""


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
    """

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
    """A request would exceed the memory budget; bytes, budget and a remedy are named."""


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
    """

    def __init__(self, metric: str, operator: str, remedy: str) -> None:
        self.metric, self.remedy = metric, remedy
        super().__init__(f"{metric}: {operator} cannot serve it. {remedy}")


class DataError(FisherlabError, ValueError):
    """A data file is missing, corrupted or not what it should be."""


class UnsupportedModelError(FisherlabError, ValueError):
    """A model holds something fisherlab would have to guess about; it is named."""


class StoreError(FisherlabError, OSError):
    """The folder of a training cannot be written, or is in use; what is kept is told."""


class RankError(FisherlabError, RuntimeError):
    """Processes of a group do not agree, or one of them failed; its rank is named."""


class ExecutorError(FisherlabError, RuntimeError):
    """An executor lost cells of an analysis; what is done and the remedy are told."""


def lasting(error: Exception) -> Exception:
    """Return an error that another process can be sent: itself, or one that says the same.

    Examples
    --------
    >>> lasting(NeedsSharedForm("kfac", "fc1"))  # doctest: +ELLIPSIS
    FisherlabError(...NeedsSharedForm: kfac needs the shared form ...
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

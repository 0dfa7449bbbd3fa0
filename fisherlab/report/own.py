"""One's own model and data, by name: what `--model` and `--data` stand for."""

import copy
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fisherlab as fl
from fisherlab.likelihoods import Likelihood, lacks
from fisherlab.problems import Problem
from fisherlab.problems.problem import Pair
from fisherlab.report.config import ReportConfig

LIKELIHOODS: Final[Mapping[str, Callable[[], Likelihood]]] = {
    "categorical": fl.Categorical,
    "bernoulli": fl.Bernoulli,
    "gaussian": fl.Gaussian,
}


def problem(
    name: str, data_dir: Path | None = None, seed: int = 0, dtype: torch.dtype | None = None
) -> Problem:
    """Return a problem by its name, or that of `file.py:function` with a seed's weights.

    Raises
    ------
    ValueError
        If there is none, or the function gives something else.

    Examples
    --------
    >>> problem("nowhere.py:mine")
    Traceback (most recent call last):
    ValueError: --problem nowhere.py:mine is not found: there is no file nowhere.py.
    """
    if ":" not in name:
        return fl.problems.load(name, data_dir, seed, dtype=dtype or torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = _call("problem", name)
    if not isinstance(made, Problem):
        raise ValueError(
            f"--problem {name} must return a fisherlab.problems.Problem, but returns a "
            f"{type(made).__name__}."
        )
    return _of_type(made, dtype)


def named(config: ReportConfig, dtype: torch.dtype | None = None) -> Problem:
    """Return one's own model and data, or else the problem, with a seed's weights.

    Examples
    --------
    >>> named(ReportConfig(problem="digits", seed=3)).name
    'digits'
    """
    if not config.model:
        return problem(config.problem, config.data_dir, config.seed, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return _of_type(load(config), dtype)


def check_problem(config: ReportConfig) -> None:
    """Refuse the name of a problem that there is not; files are read later."""
    if not config.model and ":" not in config.problem:
        fl.problems.describe(config.problem)


def _of_type(made: Problem, dtype: torch.dtype | None) -> Problem:
    if dtype is None:
        return made
    made.model.to(dtype)
    return replace(made, train=_cast(made.train, dtype), test=_cast(made.test, dtype))


def _cast(pair: Pair, dtype: torch.dtype) -> Pair:
    x, y = (part.to(dtype) if part.is_floating_point() else part for part in pair)
    return x, y


def likelihood(name: str) -> Likelihood:
    """Return a likelihood by name, or what `file.py:function` returns.

    Raises
    ------
    ValueError
        If that is no likelihood; the methods that it lacks are named.

    Examples
    --------
    >>> likelihood("gaussian")
    Gaussian(variance=1.0)
    >>> likelihood("math:gcd")
    Traceback (most recent call last):
    ValueError: --likelihood math:gcd returns a int, which lacks check, loss, gradient, \
column_count, root, uniforms_per_example, sample, mask; see fl.Likelihood.
    """
    if name in LIKELIHOODS:
        return LIKELIHOODS[name]()
    made = _call("likelihood", name)
    if lacking := lacks(made):
        raise ValueError(
            f"--likelihood {name} returns a {type(made).__name__}, which lacks "
            f"{', '.join(lacking)}; see fl.Likelihood."
        )
    found: Likelihood = made
    return found


def load(config: ReportConfig) -> Problem:
    """Make the problem of one's own model and data.

    Raises
    ------
    ValueError
        If a name or file is not found, or does not give a model or data that fit.

    Examples
    --------
    >>> load(ReportConfig(model="torch.nn:Linear"))
    Traceback (most recent call last):
    ValueError: --model torch.nn:Linear failed when called without arguments: TypeError: \
Linear.__init__() missing 2 required positional arguments: 'in_features' and \
'out_features'.
    """
    made = _call("model", config.model)
    if isinstance(made, Problem):
        if config.data:
            raise ValueError(f"--model {config.model} returns a Problem: drop --data.")
        return made
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"--model {config.model} must return a torch.nn.Module or a "
            f"fisherlab.problems.Problem, but returns a {type(made).__name__}."
        )
    if not config.data:
        raise ValueError("--model needs --data: a file with x and y, or module:function.")
    meant = likelihood(config.likelihood)
    train, test = (_fit(pair, config.data, meant) for pair in _data(config.data))
    for parameter in made.parameters():
        if parameter.is_floating_point():  # numpy saves float64, torch makes float32
            train, test = _cast(train, parameter.dtype), _cast(test, parameter.dtype)
            break
    _try(made, train[0][:2], config)
    return Problem(config.subject, made, meant, train, test)


def _try(model: nn.Module, x: Tensor, config: ReportConfig) -> None:
    """Refuse a model that fails on the first two examples; a copy of it is called."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(model).eval()(x.clone())
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"--model {config.model} failed on the first examples of --data "
            f"{config.data}, of shape {tuple(x.shape)} and {x.dtype}: {_told(error)}."
        ) from error


def _call(option: str, spec: str) -> Any:
    """Import by `module:name` or `file.py:name`: a function is called, a value taken."""
    home, colon, name = spec.rpartition(":")
    if not (colon and home and name):
        raise ValueError(
            f"--{option} must be module:function or file.py:function, but is {spec!r}."
        )
    # Code of one's own may also call sys.exit(), which must not end the command with 0.
    try:
        with _here(), redirect_stdout(sys.stderr):  # standard output is the command's
            module = _module(home)
    except (ImportError, OSError) as error:
        raise ValueError(f"--{option} {spec} is not found: {error}.") from error
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"--{option} {spec} failed when {home} was imported: {_told(error)}."
        ) from error
    if not hasattr(module, name):
        raise ValueError(f"--{option} {spec} is not found: {home} has no {name}.")
    made = getattr(module, name)
    if isinstance(made, nn.Module) or not callable(made):
        return made
    try:
        with redirect_stdout(sys.stderr):
            return made()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"--{option} {spec} failed when called without arguments: {_told(error)}."
        ) from error


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _module(home: str) -> Any:
    if not home.endswith(".py"):
        return importlib.import_module(home)
    path = Path(home)
    if not path.is_file():
        raise ImportError(f"there is no file {path}")
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None, "a .py file has a loader"
    assert found.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(found)
    # Classes defined there are looked up by their module's name, e.g. by dataclasses.
    sys.modules.setdefault(path.stem, module)
    found.loader.exec_module(module)
    return module


@contextmanager
def _here() -> Iterator[None]:
    # As `python -m` does, and the installed script does not.
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _data(spec: str) -> tuple[Any, Any]:
    """Return the training and the test pair; the latter is None where there is none."""
    if spec.endswith((".npz", ".pt")):
        return _pairs(spec, _read(Path(spec)))
    found = _call("data", spec)
    return _pairs(spec, _joined(spec, found) if isinstance(found, DataLoader) else found)


def _joined(spec: str, loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    """Return the batches of a loader as one pair."""
    try:
        x, y = zip(*loader, strict=True)
        return torch.cat(x), torch.cat(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"--data {spec} is a DataLoader, whose batches must be pairs (x, y) of "
            f"tensors: {_told(error)}."
        ) from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"--data: there is no file {path}.")
    # What readers raise for a damaged file is not documented: struct.error, EOFError,
    # BadZipFile, UnpicklingError and more.
    try:
        if path.suffix == ".pt":
            return torch.load(path, map_location="cpu", weights_only=True)
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:
        raise ValueError(
            f"--data {path} cannot be read; it must hold nothing but arrays or tensors, "
            f"as numpy.savez and torch.save write them: {_told(error)}."
        ) from error


def _pairs(spec: str, found: Any) -> tuple[Any, Any]:
    if isinstance(found, Mapping):
        if not {"x", "y"} <= set(found):
            raise ValueError(f"--data {spec} must hold x and y, but holds {list(found)}.")
        tests = [found.get(name) for name in ("x_test", "y_test")]
        tests = [each for each in tests if each is not None]
        if len(tests) == 1:
            raise ValueError(f"--data {spec} must hold both x_test and y_test, or none.")
        return (found["x"], found["y"]), tuple(tests) or None
    if not (isinstance(found, tuple | list) and len(found) == 2):
        raise ValueError(
            f"--data {spec} must give (x, y) or ((x, y), (x_test, y_test)), but gives a "
            f"{type(found).__name__}."
        )
    first, second = found
    if not isinstance(first, tuple | list):
        return found, None
    pairs = (first,) if second is None else (first, second)
    if any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"--data {spec} gives {len(first)} inputs and a {type(second).__name__}; a "
            "report takes (x, y) or ((x, y), (x_test, y_test)) with one tensor x. "
            "fl.collect takes several inputs."
        )
    return first, second


def _fit(pair: Any, spec: str, meant: Likelihood) -> Pair:
    """Return a pair of tensors whose y has the type that the likelihood reads."""
    if pair is None:
        return torch.empty(0), torch.empty(0)
    x, y = (_tensor(each, spec) for each in pair)
    if not (x.ndim and y.ndim and len(x) == len(y) and len(x)):
        raise ValueError(
            f"--data {spec} must hold as many x as y, at least one, but has "
            f"shapes {tuple(x.shape)} and {tuple(y.shape)}."
        )
    if isinstance(meant, fl.Categorical):
        return x, _classes(y, spec)
    return x, y.to(x.dtype if x.dtype.is_floating_point else torch.get_default_dtype())


def _tensor(values: Any, spec: str) -> Tensor:
    """Return numbers as a tensor of the machine's byte order."""
    if values is None or isinstance(values, Mapping):
        raise ValueError(
            f"--data {spec} must hold one tensor or array x and labels y, and holds a "
            f"{type(values).__name__} in the place of one of them."
        )
    try:
        array = np.asarray(values) if not isinstance(values, Tensor) else values
        if isinstance(array, np.ndarray):
            array = torch.as_tensor(array.astype(array.dtype.newbyteorder("=")))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"--data {spec} must hold arrays of numbers: {_told(error)}."
        ) from error
    if array.is_complex():
        raise ValueError(f"--data {spec} holds complex numbers; give real ones.")
    return array


def _classes(y: Tensor, spec: str) -> Tensor:
    if y.dtype.is_floating_point:
        raise ValueError(
            f"--data {spec} has y of {str(y.dtype).removeprefix('torch.')}, but a "
            "categorical likelihood needs classes as integers; see --likelihood."
        )
    return y.long()

"""The value that a loaded problem is, parts of its data, and random changes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float
from torch import Generator, Tensor, device, nn

from fisherlab.likelihoods import Likelihood, lacks

Pair = tuple[Tensor, Tensor]
Augment = Callable[[Tensor, Generator], Tensor]


# Tensors have no single truth value, so two problems are equal only if identical.
@dataclass(frozen=True, eq=False, repr=False)
class Problem:
    """Hold a network, its likelihood and its data.

    Attributes
    ----------
    name
        The name it was loaded by. A data set that stands in for another one carries
        `surrogate` in its name.
    model
        The network at its initial weights, in evaluation mode. Training changes it in
        place.
    likelihood
        What the network's output means; the loss is its negative logarithm.
    train, test
        Pairs (x, y) of tensors whose axis 0 is the example.
    augment
        Changes the inputs of a training minibatch at random, `augment(x, generator)`;
        None if the problem has no such rule. Data are stored unchanged, and the Fisher
        is that of unchanged data.

    Raises
    ------
    TypeError
        For a model, a likelihood or a pair that is none.
    ValueError
        If x is not one tensor.

    Examples
    --------
    >>> import fisherlab as fl
    >>> fl.problems.load("digits")
    Problem('digits', Categorical, train=1438, test=359, float64, cpu)
    """

    name: str
    model: nn.Module
    likelihood: Likelihood
    train: Pair
    test: Pair
    augment: Augment | None = None

    def __post_init__(self) -> None:
        """Refuse networks of several inputs: minibatches are rows of one tensor.

        Raises
        ------
        TypeError
            For a model, a likelihood or a pair that is none.
        ValueError
            Naming what is not a tensor, and what trains such networks.
        """
        wrong = [] if isinstance(self.model, nn.Module) else ["model"]
        wrong += ["likelihood"] if lacks(self.likelihood) else []
        pairs = {name: getattr(self, name) for name in ("train", "test")}
        wrong += [
            n for n, p in pairs.items() if not isinstance(p, (tuple, list)) or len(p) != 2
        ]
        if wrong:
            raise TypeError(
                f"Problem {self.name!r}: {wrong[0]} is of type "
                f"{type(getattr(self, wrong[0])).__name__}; Problem(name, model, "
                "likelihood, train, test) takes a network, a fl.Likelihood and two pairs "
                "(x, y)."
            )
        for name, (x, _) in pairs.items():
            if not isinstance(x, Tensor):
                raise ValueError(
                    f"Problem {self.name!r}: {name} has x of type {type(x).__name__}; one "
                    "tensor with the example in axis 0 is expected. fl.NaturalGradient and "
                    "its step(batch=...) train networks of several inputs."
                )

    @staticmethod
    def require(given: object, call: str) -> None:
        """Refuse what is no problem, such as its name or a model.

        Raises
        ------
        TypeError
            Saying how to make one.
        """
        if not isinstance(given, Problem):
            name = given if isinstance(given, str) else "digits"
            raise TypeError(
                f"{call}: {type(given).__name__} was given; a problem is expected, as "
                f"fl.problems.load({name!r}) returns it, or Problem(name, model, "
                "likelihood, train, test)."
            )

    def to(self, where: str | device) -> Problem:
        """Move the data to a device, and the model with it (in place, as in torch)."""
        return replace(
            self,
            model=self.model.to(where),
            train=_moved(self.train, where),
            test=_moved(self.test, where),
        )

    def __repr__(self) -> str:
        x, _ = self.train
        dtype = str(x.dtype).removeprefix("torch.")
        return (
            f"Problem({self.name!r}, {type(self.likelihood).__name__}, "
            f"train={len(x)}, test={len(self.test[0])}, {dtype}, {x.device})"
        )


def _moved(pair: Pair, where: str | device) -> Pair:
    x, y = pair
    moved = x.to(where)
    # The targets of an autoencoder are its inputs, also in memory.
    return moved, moved if y is x else y.to(where)


Data = Callable[[Path | None, torch.dtype], tuple[Pair, Pair]]


def validation(
    data: Data, count: int, data_dir: Path | None, dtype: torch.dtype
) -> tuple[Pair, Pair]:
    """Keep `count` random training examples; the others take the place of the test set.

    The choice is the same at every call.
    """
    (x, y), _ = data(data_dir, dtype)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    kept, held = order[:count].sort().values, order[count:].sort().values
    if y is x:  # an autoencoder: its targets need no memory of their own
        x, x_held = x[kept], x[held]
        return (x, x), (x_held, x_held)
    return (x[kept], y[kept]), (x[held], y[held])


def drawn(pair: Pair, examples: int | None, seed: int = 0) -> Pair:
    """Return a random part of at most so many examples, in the order of the data set.

    Data sets are ordered (FACES by person), so that the first examples say little of the
    rest. The choice depends on the seed and the sizes alone; None means all.

    Raises
    ------
    ValueError
        For fewer than one example.

    Examples
    --------
    >>> x = torch.arange(7)
    >>> drawn((x, x), 3)[0].diff().min() > 0
    tensor(True)
    """
    x, y = pair
    if examples is not None and examples < 1:
        raise ValueError(f"examples={examples}: at least one, or None, is expected.")
    if examples is None or examples >= len(x):
        return pair
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(x), generator=generator, device="cpu")
    chosen = order[:examples].sort().values.to(x.device)
    part = x[chosen]
    return part, part if y is x else y[chosen.to(y.device)]


def thinned(pair: Pair, examples: int) -> Pair:
    """Return at most so many examples, evenly spaced in the order of the data set.

    Examples
    --------
    >>> x = torch.arange(7)
    >>> thinned((x, x), 3)[0]
    tensor([0, 2, 4])
    """
    x, y = pair
    if examples >= len(x):
        return pair
    chosen = torch.arange(examples, device=x.device) * len(x) // examples
    part = x[chosen]
    return part, part if y is x else y[chosen.to(y.device)]


@final
@dataclass(frozen=True)
class CropAndFlip:
    """Crop images at random from a padded copy, and mirror half of them.

    Each image moves by an independent offset of −padding … padding pixels along both
    axes. The result depends on the images and the generator only.

    Parameters
    ----------
    padding
        Pixels added to every side.
    flip
        Whether to mirror left and right with probability ½.
    background
        The value of the padding in each channel.

    References
    ----------
    He et al., "Deep residual learning for image recognition", 2016, section 4.2.

    Examples
    --------
    >>> change = CropAndFlip(4, True, (0.0, 0.0, 0.0))
    >>> x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> change(x, torch.Generator().manual_seed(1)).shape
    torch.Size([5, 3, 32, 32])
    """

    padding: int
    flip: bool
    background: tuple[float, ...]

    def __call__(
        self, x: Float[Tensor, "n c h w"], generator: Generator
    ) -> Float[Tensor, "n c h w"]:
        """Return changed images; draws on the generator's device."""
        n, _, height, width = x.shape
        rows = self._offsets(n, generator) + torch.arange(height, device="cpu")
        columns = self._offsets(n, generator) + torch.arange(width, device="cpu")
        if self.flip:
            mirrored = torch.rand(n, 1, generator=generator, device=generator.device) < 0.5
            columns = torch.where(mirrored.cpu(), columns.flip(1), columns)
        rows, columns = rows.to(x.device), columns.to(x.device)
        example = torch.arange(n, device=x.device).view(n, 1, 1)
        picked = self._padded(x)[example, :, rows[:, :, None], columns[:, None, :]]
        return picked.permute(0, 3, 1, 2).contiguous()

    def _offsets(self, n: int, generator: Generator) -> Tensor:
        size, device = (n, 1), generator.device
        drawn = torch.randint(
            2 * self.padding + 1, size, generator=generator, device=device
        )
        return drawn.cpu()

    def _padded(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        if channels != len(self.background):
            raise ValueError(
                f"{self} was given images of {channels} channels; "
                f"{len(self.background)} are expected."
            )
        p = self.padding
        background = x.new_tensor(self.background).view(1, channels, 1, 1)
        padded = background.repeat(n, 1, height + 2 * p, width + 2 * p)
        padded[:, :, p : p + height, p : p + width] = x
        return padded

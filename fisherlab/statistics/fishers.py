"""Which Fisher: exact, sampled, or empirical. Each yields weighted output columns."""

from dataclasses import replace
from numbers import Integral
from typing import Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.likelihoods import Likelihood, lacks
from fisherlab.settings import setting


@runtime_checkable
class Fisher(Protocol):
    """A choice of output columns s_v with Σ_v s_v s_vᵀ the wanted output matrix.

    Examples
    --------
    >>> isinstance(MonteCarlo(samples=2), Fisher)
    True
    """

    def column_count(self, likelihood: Likelihood, output: Tensor) -> int:
        """Return V."""

    def columns(
        self,
        likelihood: Likelihood,
        output: Tensor,
        target: Tensor | None,
        first_example: int,
        part: slice,
    ) -> Tensor:
        """Return some columns, shape ``(v, *output.shape)``."""


@final
@setting
class Exact:
    r"""The expectation over the model's own labels, in closed form.

    .. math:: F = \frac{1}{N} \sum_n J_n^T H_n J_n, \qquad
        H_n = E_{y \sim p(y | f_n)} [\nabla_f ℓ \nabla_f ℓ^T]

    Equals the generalised Gauss-Newton matrix for the three likelihoods. One column per
    output (classes − 1 for Categorical).

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> model = torch.nn.Linear(3, 2).double()
    >>> stats = fl.collect(model, data, fl.Categorical(), fl.Exact())
    >>> stats["weight"].provenance.fisher
    'Exact()'
    """

    def column_count(self, likelihood: Likelihood, output: Tensor) -> int:
        """Return the columns of the likelihood's root."""
        return likelihood.column_count(output)

    def columns(
        self,
        likelihood: Likelihood,
        output: Tensor,
        target: Tensor | None,
        first_example: int,
        part: slice,
    ) -> Tensor:
        """Return columns of the root."""
        return likelihood.root(output, target, part)


@final
@setting
class MonteCarlo:
    r"""Labels sampled from the model: `samples` draws per example, each weighted 1/√k.

    .. math:: F = \frac{1}{Nk} \sum_{n, j} g_{nj} g_{nj}^T, \qquad
        g_{nj} = \nabla_w ℓ(y_{nj}, f_n), \quad y_{nj} \sim p(y | f_n)

    A draw depends on (seed, step, example index, draw) only, so neither the batch size
    nor the order of batches changes it.

    Parameters
    ----------
    samples
        k, draws per example.
    seed, step
        What the draws depend on; an optimiser counts `step` up.

    Raises
    ------
    ValueError
        For fewer than one draw.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> model = torch.nn.Linear(3, 2).double()
    >>> stats = fl.collect(model, data, fl.Categorical(), fl.MonteCarlo(3))
    >>> stats["weight"].provenance.fisher
    'MonteCarlo(samples=3, seed=0, step=0)'
    """

    samples: int = 1
    seed: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        """Check the number of draws."""
        if self.samples < 1:
            msg = f"MonteCarlo(samples={self.samples}): at least one draw is needed."
            raise ValueError(msg)
        if not all(isinstance(n, Integral) for n in (self.samples, self.seed, self.step)):
            raise TypeError(f"{self!r}: whole numbers are expected.")

    def column_count(self, likelihood: Likelihood, output: Tensor) -> int:
        """Return k."""
        return self.samples

    def columns(
        self,
        likelihood: Likelihood,
        output: Tensor,
        target: Tensor | None,
        first_example: int,
        part: slice,
    ) -> Tensor:
        """Return loss gradients at sampled labels, divided by √k."""
        mask, drawn = likelihood.mask(output, target), []
        for draw in range(part.start, part.stop):
            label = self.labels(likelihood, output, first_example, draw)
            drawn.append(likelihood.gradient(output, label))
        columns = torch.stack(drawn) / self.samples**0.5
        return columns if mask is None else columns * mask

    def labels(
        self, likelihood: Likelihood, output: Tensor, first_example: int, draw: int
    ) -> Tensor:
        """Return the labels of one draw for a run of examples."""
        numbers = uniforms(
            seed=self.seed,
            stream=(self.step << 20) + draw,
            first=first_example,
            examples=output.shape[0],
            each=likelihood.uniforms_per_example(output),
        )
        return likelihood.sample(output, numbers.to(output.device))

    def at(self, step: int) -> "MonteCarlo":
        """Return the same choice with fresh draws for another step."""
        return replace(self, step=step)


@final
@setting
class Empirical:
    r"""The data's own labels, one column: not an expectation, not the Gauss-Newton.

    .. math:: F = \frac{1}{N} \sum_n g_n g_n^T, \qquad g_n = \nabla_w ℓ(y_n, f_n)

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> model = torch.nn.Linear(3, 2).double()
    >>> stats = fl.collect(model, data, fl.Categorical(), fl.Empirical())
    >>> stats["weight"].provenance.fisher
    'Empirical()'
    """

    def column_count(self, likelihood: Likelihood, output: Tensor) -> int:
        """Return 1."""
        return 1

    def columns(
        self,
        likelihood: Likelihood,
        output: Tensor,
        target: Tensor | None,
        first_example: int,
        part: slice,
    ) -> Tensor:
        """Return the loss gradient.

        Raises
        ------
        ValueError
            If there are no labels.
        """
        if target is None:
            raise ValueError("Empirical() needs the data's labels, but y is None.")
        return likelihood.gradient(output, target)[None]


def _own_words(likelihood: object) -> str:
    """Name what a likelihood of one's own lacks, if it has some of it."""
    lacking = lacks(likelihood)
    some = lacking != lacks(None) and not isinstance(likelihood, type)
    return f"; this one lacks {', '.join(lacking)}, see fl.Likelihood" * some


def require_kinds(likelihood: object, fisher: object) -> None:
    """Refuse what is no likelihood or no Fisher: a name, or a class in place of a value.

    Raises
    ------
    TypeError
        Saying what is expected.

    Examples
    --------
    >>> require_kinds("categorical", None)
    Traceback (most recent call last):
    TypeError: likelihood='categorical': a value is expected, such as fl.Categorical() for \
cross entropy, fl.Bernoulli() for its binary kind, fl.Gaussian() for squares.
    """
    if isinstance(likelihood, type) or not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"likelihood={likelihood!r}: a value is expected, such as fl.Categorical() for "
            "cross entropy, fl.Bernoulli() for its binary kind, fl.Gaussian() for squares"
            f"{_own_words(likelihood)}."
        )
    if fisher is not None and (isinstance(fisher, type) or not isinstance(fisher, Fisher)):
        raise TypeError(f"fisher={fisher!r}: a value such as fl.Exact() is expected.")


@final
@setting
class ImprovedEmpirical:
    r"""The data's labels, each example divided by the norm of its output gradient.

    .. math:: F = \frac1N \sum_n \frac{\nabla_θ \ell_n \nabla_θ \ell_n^T}
              {\|\nabla_z \ell_n\|^2}

    Notes
    -----
    Removes the empirical Fisher's bias towards examples of large loss. For one output it
    is JᵀJ/N, the Gauss-Newton matrix of a unit Gaussian. An example whose output
    gradient vanishes adds nothing.

    References
    ----------
    Wu et al. 2024, arXiv 2406.06420, eq. 14 and 18.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.ones(5, 3), torch.zeros(5, 1)
    >>> stats = fl.collect(
    ...     torch.nn.Linear(3, 1), data, fl.Gaussian(), fl.ImprovedEmpirical()
    ... )
    >>> round(fl.KFAC()(stats["weight"]).trace(), 5)
    4.0
    """

    def column_count(self, likelihood: Likelihood, output: Tensor) -> int:
        """Return 1."""
        return 1

    def columns(
        self,
        likelihood: Likelihood,
        output: Tensor,
        target: Tensor | None,
        first_example: int,
        part: slice,
    ) -> Tensor:
        """Return the loss gradient with unit norm for every example.

        Raises
        ------
        ValueError
            If there are no labels.
        """
        plain = Empirical().columns(likelihood, output, target, first_example, part)
        norms = plain.flatten(2).norm(dim=2)
        norms = norms.view(*norms.shape, *[1] * (plain.dim() - 2))
        return plain / norms.where(norms > 0, 1.0)


_PER_COUNTER = 4  # a Philox counter step yields four 64-bit numbers


def uniforms(
    *, seed: int, stream: int, first: int, examples: int, each: int
) -> Float[Tensor, "n u"]:
    """Return `each` uniforms in [0, 1) for a run of examples, in float64 on the CPU.

    A counter-based generator (Philox) is moved to the run's place, so that the numbers
    of example i are the same whichever run it is drawn in.

    Examples
    --------
    >>> both = uniforms(seed=0, stream=0, first=0, examples=2, each=3)
    >>> second = uniforms(seed=0, stream=0, first=1, examples=1, each=3)
    >>> bool((both[1:] == second).all())
    True
    """
    steps = -(-each // _PER_COUNTER)
    key = np.array([seed % 2**64, stream % 2**64], dtype=np.uint64)
    bits = np.random.Philox(key=key).advance(first * steps)
    numbers = np.random.Generator(bits).random((examples, steps * _PER_COUNTER))
    return torch.from_numpy(numbers[:, :each].copy())

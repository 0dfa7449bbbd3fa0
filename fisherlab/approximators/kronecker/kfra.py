"""KFRA: the output factor of KFAC by a recursion over layers instead of a backward pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fisherlab.errors import UnsupportedModelError
from fisherlab.layers import blocks
from fisherlab.likelihoods import Likelihood
from fisherlab.operators import KroneckerSum, Provenance

ELEMENTWISE = (
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Softplus,
    nn.Sigmoid,
    nn.Tanh,
)


def kfra(
    model: nn.Sequential, data: tuple[Tensor, Tensor | None], likelihood: Likelihood
) -> dict[str, KroneckerSum]:
    r"""Return G ⊗ A of every layer, G by the recursion of expectations.

    .. math:: G_L = E[H(z)], \quad
              G_l = (W_{l+1}^T G_{l+1} W_{l+1}) \circ E[φ'(s_l) φ'(s_l)^T], \quad
              A_l = E[a_l a_l^T]

    Parameters
    ----------
    model
        A Sequential of Linear layers and elementwise activations, ending in a Linear.
    data
        One batch (x, y); y may be None.
    likelihood
        Gives H(z), the exact output Fisher.

    Returns
    -------
    dict
        Block name to operator.

    Raises
    ------
    UnsupportedModelError
        If a module is neither a trainable Linear nor a known activation, or an input has
        more than one position.

    Notes
    -----
    Needs the model, so it is a function and no approximator. One forward pass and one
    product a layer, whatever the number of outputs. Exact for one example; elsewhere the
    expectation of the product is replaced by the product of expectations.

    References
    ----------
    Botev, Ritter & Barber 2017, arXiv 1706.03662, section 3.2.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> found = fl.kfra(model, (torch.ones(5, 3), None), fl.Categorical())
    >>> found["0"].weight_shape
    (4, 4)
    """
    names = {block.weight: name for name, block in blocks(model).items()}
    layers = list(_forward(model, data[0].detach()))
    rows = _output_factor(likelihood, layers[-1].values, data[1])
    found: dict[str, KroneckerSum] = {}
    for layer in reversed(layers):
        rows = rows * _moment(layer.slopes)
        name = names[f"{layer.path}.weight"]
        made = Provenance(
            name, "Exact()", repr(likelihood), len(layer.inputs), method="KFRA"
        )
        cols = _moment(layer.inputs)
        found[name] = KroneckerSum(((rows, cols),), (len(rows), len(cols)), made)
        weight = layer.module.weight.detach()
        rows = weight.T @ rows @ weight
    return dict(reversed(found.items()))


@dataclass(frozen=True, eq=False)
class _Layer:
    """A linear layer, its inputs with ones for the bias, and what follows it.

    Parameters
    ----------
    values
        What the activation behind the layer returns.
    slopes
        Its derivatives φ'(s).
    """

    path: str
    module: nn.Linear
    inputs: Float[Tensor, "n i"]
    values: Float[Tensor, "n o"]
    slopes: Float[Tensor, "n o"]


def _forward(model: nn.Sequential, x: Tensor) -> Iterator[_Layer]:
    """Run the network, layer by layer with the activations that follow each."""
    pieces = list(model.named_children())
    if x.dim() != 2 or not pieces or not isinstance(pieces[0][1], nn.Linear):
        raise UnsupportedModelError(
            "kfra: a Sequential that begins with a Linear layer, on inputs of shape "
            f"(examples, features), is expected; the input has shape {tuple(x.shape)}."
        )
    starts = [at for at, (_, piece) in enumerate(pieces) if isinstance(piece, nn.Linear)]
    for start, stop in zip(starts, [*starts[1:], len(pieces)], strict=True):
        path, module = pieces[start]
        assert isinstance(module, nn.Linear)
        values, slopes = _activate(module(x).detach(), pieces[start + 1 : stop])
        ones = [] if module.bias is None else [x.new_ones(len(x), 1)]
        yield _Layer(path, module, torch.cat([x, *ones], 1), values, slopes)
        x = values


def _activate(s: Tensor, pieces: Sequence[tuple[str, nn.Module]]) -> tuple[Tensor, Tensor]:
    """Return φ(s) and φ'(s) of the activations in turn."""
    with torch.enable_grad():
        leaf = s.requires_grad_()
        values = leaf * 1.0
        for path, piece in pieces:
            if not isinstance(piece, ELEMENTWISE):
                raise UnsupportedModelError(
                    f"kfra: {path!r} is a {type(piece).__name__}; only Linear layers and "
                    "elementwise activations are understood. Use KFAC instead."
                )
            values = piece(values)
        (slopes,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), slopes


def _output_factor(
    likelihood: Likelihood, output: Tensor, target: Tensor | None
) -> Float[Tensor, "c c"]:
    """Return the mean of H(z) over examples."""
    likelihood.check(output, target)
    columns = likelihood.root(output, target, slice(0, likelihood.column_count(output)))
    return torch.einsum("vni,vnj->ij", columns, columns) / len(output)


def _moment(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    return rows.T @ rows / len(rows)

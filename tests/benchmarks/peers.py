"""The neighbours, called as their documentation says, returning comparable matrices.

They are installed by `make peers`; a missing one is left out and named.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.data import DataLoader, TensorDataset

Blocks = list[Tensor]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """nngeometry and ASDL make buffers in the default dtype."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(kept)


def _loader(x: Tensor, batch: int) -> DataLoader:
    labels = x.new_zeros(len(x), dtype=torch.long)
    return DataLoader(TensorDataset(x, labels), batch_size=batch)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _frozen_modules(model: nn.Sequential) -> list[nn.Module]:
    return [m for m in model if any(not p.requires_grad for p in m.parameters())]


def nngeometry_blocks(model: nn.Sequential, x: Tensor, batch: int) -> Blocks:
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatBlockDiag

    layers = LayerCollection()
    for module in model:
        if any(p.requires_grad for p in module.parameters()):
            layers.add_layer_from_model(model, module)
    with default_dtype(x.dtype):
        found = FIM(
            model,
            _loader(x, batch),
            PMatBlockDiag,
            variant="classif_logits",
            layer_collection=layers,
            device=x.device,
        )
    return list(found.data.values())


def nngeometry_kfac(model: nn.Module, x: Tensor, batch: int) -> list[tuple[Tensor, Tensor]]:
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatKFAC

    with default_dtype(x.dtype):
        options = {"variant": "classif_logits", "device": x.device}
        found = FIM(model, _loader(x, batch), PMatKFAC, **options)
    return list(found.data.values())


def backpack_blocks(model: nn.Module, x: Tensor, batch: int) -> Blocks:
    """Square roots of the GGN, multiplied out layer by layer."""
    from backpack import backpack, extend
    from backpack.extensions import SqrtGGNExact

    extended, loss = extend(deepcopy(model)), extend(nn.CrossEntropyLoss(reduction="sum"))
    blocks: list[Tensor] | None = None
    for part in x.split(batch):
        labels = part.new_zeros(len(part), dtype=torch.long)
        extended.zero_grad()
        with default_dtype(x.dtype), backpack(SqrtGGNExact()):
            loss(extended(part), labels).backward()
        roots = [p.sqrt_ggn_exact.flatten(2).flatten(0, 1) for p in _trainable(extended)]
        pairs = [torch.cat(pair, 1) for pair in zip(roots[::2], roots[1::2], strict=True)]
        new = [root.T @ root / len(x) for root in pairs]
        blocks = (
            new if blocks is None else [a.add_(b) for a, b in zip(blocks, new, strict=True)]
        )
        for p in _trainable(extended):
            del p.sqrt_ggn_exact
    assert blocks is not None
    return blocks


def backpack_kfac(model: nn.Module, x: Tensor, batch: int) -> list[list[Tensor]]:
    from backpack import backpack, extend
    from backpack.extensions import KFLR

    extended, loss = extend(deepcopy(model)), extend(nn.CrossEntropyLoss())
    total: list[list[Tensor]] | None = None
    for part in x.split(batch):
        extended.zero_grad()
        with default_dtype(x.dtype), backpack(KFLR()):
            labels = part.new_zeros(len(part), dtype=torch.long)
            loss(extended(part), labels).backward()
        new = [p.kflr for p in extended.parameters()]
        total = (
            new
            if total is None
            else [
                [a + b for a, b in zip(s, t, strict=True)]
                for s, t in zip(total, new, strict=True)
            ]
        )
    assert total is not None
    return total


def asdl(model: nn.Module, x: Tensor, batch: int, shape: str) -> list[Tensor]:
    from asdl import FISHER_EXACT, LOSS_CROSS_ENTROPY, FisherConfig, get_fisher_maker

    model = deepcopy(model)  # its hooks stay
    config = FisherConfig(
        FISHER_EXACT,
        [shape],
        LOSS_CROSS_ENTROPY,
        data_size=len(x),
        ignore_modules=_frozen_modules(model),
    )
    with default_dtype(x.dtype):
        maker = get_fisher_maker(model, config)
        for number, part in enumerate(x.split(batch)):
            labels = part.new_zeros(len(part), dtype=torch.long)
            output = maker.setup_model_call(model, part)
            maker.setup_loss_call(nn.functional.cross_entropy, output, labels)
            maker.forward_and_backward(accumulate=number > 0)
    found = []
    for module in model:
        matrix = getattr(module, "fisher", None)
        if matrix is not None:
            found.append(matrix.data if matrix.data is not None else matrix.kron)
            del module.fisher
    return found


def asdl_blocks(model: nn.Module, x: Tensor, batch: int) -> Blocks:
    from asdl import SHAPE_LAYER_WISE

    return asdl(model, x, batch, SHAPE_LAYER_WISE)


def asdl_kfac(model: nn.Module, x: Tensor, batch: int) -> list[Tensor]:
    from asdl import SHAPE_KRON

    return asdl(model, x, batch, SHAPE_KRON)


def curvlinops_kfac(model: nn.Module, x: Tensor, batch: int) -> object:
    from curvlinops import FisherType, KFACLinearOperator

    data = [(part, part.new_zeros(len(part), dtype=torch.long)) for part in x.split(batch)]
    operator = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        [p for p in model.parameters() if p.requires_grad],
        data,
        fisher_type=FisherType.TYPE2,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    _ = operator.trace  # factors are computed at the first question
    return operator


def jacrev_blocks(model: nn.Module, x: Tensor, batch: int) -> Blocks:
    """A plain build: Jacobians of all outputs by vmap(jacrev), then one product a layer."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    state = {n: named[n] for n, p in model.named_parameters() if p.requires_grad}

    def single(p: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, named | p, one[None])[0]

    blocks: list[Tensor] | None = None
    for part in x.split(batch):
        jacobian = vmap(jacrev(single), in_dims=(None, 0))(state, part)
        p = model(part).detach().softmax(-1)
        root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
        stacked = [j.flatten(2) for j in jacobian.values()]
        joined = [
            torch.cat(pair, 2) for pair in zip(stacked[::2], stacked[1::2], strict=True)
        ]
        rows = [torch.einsum("nck,ncp->nkp", root, j).flatten(0, 1) for j in joined]
        new = [r.T @ r / len(x) for r in rows]
        blocks = (
            new if blocks is None else [a.add_(b) for a, b in zip(blocks, new, strict=True)]
        )
    assert blocks is not None
    return blocks


BLOCKS: dict[str, tuple[str, Callable[[nn.Module, Tensor, int], Blocks]]] = {
    "nngeometry": ("nngeometry", nngeometry_blocks),
    "BackPACK": ("backpack", backpack_blocks),
    "ASDL": ("asdl", asdl_blocks),
    "vmap(jacrev)": ("torch", jacrev_blocks),
}
KFAC: dict[str, tuple[str, Callable[[nn.Module, Tensor, int], object]]] = {
    "nngeometry": ("nngeometry", nngeometry_kfac),
    "BackPACK": ("backpack", backpack_kfac),
    "ASDL": ("asdl", asdl_kfac),
    "curvlinops": ("curvlinops", curvlinops_kfac),
}

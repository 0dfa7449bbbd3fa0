"""A model seen from outside: called with given parameters, left as it was found."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import UninitializedParameter
from torch.utils import checkpoint

from fisherlab.errors import UnsupportedModelError
from fisherlab.layers import Block, alone, require_independent_examples, uncompiled
from fisherlab.numerics.devices import generator_states, generators_kept
from fisherlab.settings import put_back
from fisherlab.statistics.batches import Batch, map_inputs

_SHARDED = {"DTensor", "FullyShardedDataParallel", "FlatParameter"}


@dataclass(frozen=True, eq=False)
class ModelView:
    """A model in the wanted precision, its own parameters, and its state detached.

    `copies_data` is for models that overwrite what they are given; `kinds` are the
    precisions of the numbers of the model that was given, where this one is a copy.
    """

    model: nn.Module
    own: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    copies_data: bool = False
    kinds: frozenset[torch.dtype] = frozenset()

    def leaves(self, blocks: Mapping[str, Block]) -> dict[str, Tensor]:
        """Return the parameters of some blocks, each the beginning of a graph."""
        return {
            name: self.parameters[name].detach().requires_grad_()
            for block in blocks.values()
            for name in block.parameters
        }

    def __call__(
        self, batch: Batch, replaced: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the output, with some parameters replaced.

        Raises
        ------
        UnsupportedModelError
            If the model does not return one tensor.
        """
        return self._call({**self.parameters, **self.buffers, **(replaced or {})}, batch)

    def directly(self, batch: Batch) -> Tensor:
        """Return the output of the model with its own parameters, for autograd.

        It sees every use of a parameter, also those that `torch.func` does not.

        Raises
        ------
        UnsupportedModelError
            If the model does not return one tensor.
        """
        with torch.enable_grad():
            return self._call(self.buffers, batch)

    def _call(self, state: Mapping[str, Tensor], batch: Batch) -> Tensor:
        if self.copies_data:
            batch = Batch(map_inputs(batch.x, torch.clone), None)
        with (
            self.settings(),
            plain_attributes_kept(self.model),
            swapped(self.model, state),
        ):
            output: Any = self._called(batch)
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"The model returns {type(output).__name__}; one tensor is expected. "
                "Wrap it in a module that returns the logits alone."
            )
        return output

    def _called(self, batch: Batch) -> object:
        try:
            return batch.through(self.model)
        except RuntimeError as error:
            if not self.kinds:
                raise
            raise UnsupportedModelError(
                f"The model holds numbers in {', '.join(sorted(map(str, self.kinds)))}; "
                f"statistics take a copy in {self.dtype}, which failed: {error}. Let it "
                "cast to the dtype of the weight that it uses next, not to one it names."
            ) from error

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Choose kernels that autograd and torch.func can follow, for a while.

        Fused attention has no batching rule, the fused encoder layer bypasses its
        modules, fused LSTM cells cannot be batched, and those of cuDNN have no backward
        pass in eval mode; a checkpoint would call its part of the model again, without
        the tensors that stand in for the parameters here.
        """
        recurrent = [m for m in self.model.modules() if isinstance(m, nn.RNNBase)]
        cuda = self.device.type == "cuda"
        fused: Any = torch.backends.cudnn if cuda else torch.backends.mkldnn
        with (
            put_back(
                *_attention(),
                _as_now(checkpoint, _KEEPING),
                *([_as_now(fused, ["enabled"])] if recurrent else []),
                *(_unhooked(module) for module in recurrent),
                _gradients(self.model),
            ),
            sdpa_kernel(SDPBackend.MATH),
            warnings.catch_warnings(),
            warnings.catch_warnings(),  # where the inner one is left by an interrupt
        ):
            warnings.filterwarnings("ignore", message=_EXPECTED)
            torch.backends.mha.set_fastpath_enabled(False)
            for name, value in _KEEPING.items():
                setattr(checkpoint, name, value)
            if recurrent:
                fused.enabled = False
            for module in recurrent:
                module.register_forward_pre_hook(_with_states, with_kwargs=True)
            yield


@alone
def view(model: nn.Module, dtype: torch.dtype | None) -> ModelView:
    """Check a model and see it in a precision, through a copy if it has another.

    Raises
    ------
    UnsupportedModelError
        For train-mode batch norm, active dropout, a model without parameters, complex
        parameters, or inside of `torch.inference_mode` or `torch.autocast`.
    ValueError
        If a parameter holds NaN or infinity.
    """
    require_gradients()
    require_whole_parameters(model)
    if dtype is not None and not getattr(dtype, "is_floating_point", False):
        msg = f"dtype={dtype!r}: None or a real one such as torch.float64 is expected."
        raise TypeError(msg)
    model = uncompiled(model)
    require_independent_examples(model)
    named = dict(model.named_parameters())
    if not named:
        raise UnsupportedModelError("The model has no parameters.")
    _check_parameters(named)
    floats = [p for p in named.values() if p.is_floating_point()]
    trained = [p for p in floats if p.requires_grad]  # adapters, whatever their base is
    chosen = dtype or reduce(torch.promote_types, (p.dtype for p in trained or floats))
    seen = _in_precision(model, chosen)
    kinds = frozenset(_precisions(model) if seen is not model else ())
    model = seen
    own = dict(model.named_parameters())
    parameters = {name: p.detach() for name, p in own.items()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    device = floats[0].device
    _require_own_precision(device)
    return ModelView(model, own, parameters, buffers, device, chosen, kinds=kinds)


def require_gradients() -> None:
    """Refuse to work where torch makes no gradients at all.

    Raises
    ------
    UnsupportedModelError
        Inside of `torch.inference_mode`.
    """
    if torch.is_inference_mode_enabled():
        raise UnsupportedModelError(
            "torch.inference_mode is on, and there are no gradients in it; call fisherlab "
            "outside of it. Data that were made in it may be given."
        )


def require_whole_parameters(model: nn.Module) -> None:
    """Refuse parameters of which every process holds a part: no curvature sees a row.

    Raises
    ------
    UnsupportedModelError
        Naming what shards them, and what works.
    """
    kinds = {type(part).__name__ for part in (*model.modules(), *model.parameters())}
    if sharded := sorted(kinds & _SHARDED):
        raise UnsupportedModelError(
            f"The model's parameters are sharded ({', '.join(sharded)}), and curvature "
            "needs whole weights on every rank: wrap the plain model in "
            "DistributedDataParallel, or give it as it is."
        )


def _require_own_precision(device: torch.device) -> None:
    """Refuse autocast: gradients would be those of a rounded forward pass."""
    if torch.is_autocast_enabled(device.type):
        rounded = torch.get_autocast_dtype(device.type)
        raise UnsupportedModelError(
            f"torch.autocast is on, and the forward pass would be rounded to {rounded} "
            "without a word in the result; leave autocast, or pass dtype= to take the "
            "statistics of a model in another precision."
        )


def _check_parameters(named: Mapping[str, Tensor]) -> None:
    for name, parameter in named.items():
        if parameter.is_meta or isinstance(parameter, UninitializedParameter):
            raise UnsupportedModelError(
                f"The parameter {name!r} holds no numbers yet: run a lazy model on a batch "
                "first, and move one of the device 'meta' to another (`to_empty`)."
            )
        if parameter.is_inference():
            raise UnsupportedModelError(
                f"The parameter {name!r} was made in torch.inference_mode and has no "
                "gradients; make or load the model outside of it."
            )
        if parameter.is_complex():
            raise UnsupportedModelError(
                f"The parameter {name!r} is complex; real parameters are expected. Hold "
                "its real and imaginary parts as two parameters."
            )
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"The parameter {name!r} holds NaN or infinity.")
    if not any(p.is_floating_point() for p in named.values()):
        raise UnsupportedModelError("The model has no floating-point parameters.")


def _precisions(model: nn.Module) -> set[torch.dtype]:
    """Return in which precisions the real numbers of a model are."""
    state = (*model.parameters(), *model.buffers())
    return {tensor.dtype for tensor in state if tensor.is_floating_point()}


def _in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the model itself if all its numbers have the precision, else a copy."""
    if _precisions(model) <= {dtype}:
        return model
    with _derived_tensors_aside(model):
        return copy.deepcopy(model).to(dtype)


def require_repeatable(view: ModelView, batch: Batch) -> None:
    """Refuse a model whose forward pass draws from torch's generator.

    It is refused even if two outputs are equal: a layer that is seldom dropped would
    pass by chance. The generator is put back.

    Raises
    ------
    UnsupportedModelError
        Saying what to do.
    """
    with torch.no_grad(), generators_kept(view.device):
        before = generator_states(view.device)
        view(batch.part(slice(0, 2)))
        draws = not all(map(torch.equal, before, generator_states(view.device)))
    if draws:
        raise UnsupportedModelError(
            "The model's forward pass draws random numbers (functional or attention "
            "dropout, noise, stochastic depth), so its Fisher would be random. Use `with "
            "fisherlab.frozen(model):` (eval mode), or switch the randomness off."
        )


@contextmanager
def swapped(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of parameters and buffers, each slot once.

    `torch.func.functional_call` goes by names: it swaps the slot of a module with two
    names twice, and gives back the first replacement instead of the parameter.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    given = {id(own[name]): tensor for name, tensor in state.items()}
    slots: list[tuple[dict[str, Any], str, Any]] = [
        (held, name, tensor)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if id(tensor) in given
    ]

    def own_again() -> None:
        for held, name, tensor in slots:
            held[name] = tensor

    with put_back(own_again):
        for held, name, tensor in slots:
            held[name] = given[id(tensor)]
        yield


def _plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in vars(module).items() if isinstance(t, Tensor)}


@contextmanager
def plain_attributes_kept(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass stores in attributes: caches, normalised weights."""
    kept = [(vars(module), _plain_tensors(module)) for module in model.modules()]

    def undo() -> None:
        for (held, before), module in zip(kept, model.modules(), strict=True):
            for name in sorted(_plain_tensors(module).keys() - before.keys()):
                del held[name]
            held.update(before)

    with put_back(undo):
        yield


@contextmanager
def buffers_kept(model: nn.Module, *, always: bool = False) -> Iterator[None]:
    """Put buffers back as they were (running averages) if an error, or always.

    Examples
    --------
    >>> model = nn.BatchNorm1d(2)
    >>> with buffers_kept(model, always=True):
    ...     _ = model(torch.ones(3, 2))
    >>> model.running_mean
    tensor([0., 0.])
    """
    held = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    done = False

    def undo() -> None:
        if always or not done:
            for module, name, buffer, before in held:
                buffer.detach().copy_(before)
                module._buffers[name] = buffer

    with put_back(undo):
        yield
        done = True


@contextmanager
def _derived_tensors_aside(model: nn.Module) -> Iterator[None]:
    """Take tensors with a history out of the way: they cannot be copied."""
    with plain_attributes_kept(model):
        for module in model.modules():
            for name, tensor in _plain_tensors(module).items():
                if not tensor.is_leaf:
                    del vars(module)[name]
        yield


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Undo what a backward pass inside of a backward pass adds to ``.grad``."""
    with put_back(_gradients(model)):
        yield


def _gradients(model: nn.Module) -> Callable[[], None]:
    """Return what gives every parameter the gradient that it has now."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]

    def undo() -> None:
        for parameter, grad in kept:
            parameter.grad = grad

    return undo


def _as_now(holder: Any, names: Iterable[str]) -> Callable[[], None]:
    """Return what gives attributes of an object the values that they have now."""
    kept = {name: getattr(holder, name) for name in names}

    def undo() -> None:
        for name, value in kept.items():
            setattr(holder, name, value)

    return undo


def _attention() -> Iterator[Callable[[], object]]:
    """Yield what chooses the kernels of attention that are chosen now."""
    backends, cuda = torch.backends.mha, torch.backends.cuda
    yield partial(backends.set_fastpath_enabled, backends.get_fastpath_enabled())
    yield partial(cuda.enable_flash_sdp, cuda.flash_sdp_enabled())
    yield partial(cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled())
    yield partial(cuda.enable_math_sdp, cuda.math_sdp_enabled())
    yield partial(cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled())


def _unhooked(module: nn.RNNBase) -> Callable[[], None]:
    """Return what takes new hooks of ours from a recurrent module.

    And gives it its flat list of weights, which is made anew when they are swapped.
    """
    hooks, flat = module._forward_pre_hooks, _as_now(module, ["_flat_weights"])
    before = set(hooks)

    def undo() -> None:
        for key in [k for k, hook in hooks.items() if hook is _with_states]:
            if key not in before:
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                hooks.pop(key, None)
        flat()

    return undo


def _around_nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


class _Called:
    @staticmethod
    def apply(function: Any, preserve: bool, *args: Any) -> Any:
        """Call the function that a re-entrant checkpoint is given."""
        return function(*args)


_EXPECTED = "None of the inputs have requires_grad|There is a performance drop"
_KEEPING: Mapping[str, Any] = {  # it keeps what it would compute again: runs are short
    "CheckpointFunction": _Called,
    "_checkpoint_without_reentrant_generator": _around_nothing,
}


def _with_states(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let a recurrent module begin with states that take part in ``vmap``.

    Adding to its own zero states in place fails there.
    """
    x, hx = (*args, None, None)[:2]
    x, hx = kwargs.get("input", x), kwargs.get("hx", hx)
    if hx is None and isinstance(x, Tensor):
        return (x, _zero_states(module, x)), {}
    return args, kwargs


def _zero_states(module: nn.RNNBase, x: Tensor) -> Any:
    """Return what the module would begin with, made from its input."""
    layers = module.num_layers * (2 if module.bidirectional else 1)
    batch = [] if x.dim() == 2 else [x.shape[0 if module.batch_first else 1]]
    hidden = x.new_zeros(layers, *batch, module.proj_size or module.hidden_size)
    if not isinstance(module, nn.LSTM):
        return hidden
    return hidden, x.new_zeros(layers, *batch, module.hidden_size)

"""Small networks of every kind the package must handle, with data and a likelihood."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fisherlab as fl
from tests.zoo_modules import (
    GPT,
    Attention,
    Bidirectional,
    Caching,
    Checkpointed,
    Folded,
    FunctionalUse,
    Gated,
    Graph,
    HiddenScale,
    HiddenUse,
    Hypernetwork,
    Keyword,
    LanguageModel,
    Offloaded,
    Recomputed,
    ResNet,
    Scaled,
    TimeFirst,
    Twice,
    TwoHeads,
    ViT,
)


@dataclass(frozen=True, eq=False)
class Case:
    """A model in eval mode and float64, inputs, labels and a likelihood."""

    model: nn.Module
    x: Any
    y: Tensor | None
    likelihood: Any


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 3, 2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(3, 4),
        nn.ReLU(inplace=True),
        nn.Linear(4, 3),
    )


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)
    )


def randomised(model: nn.Module) -> nn.Module:
    """Return the model in eval mode with every parameter and statistic drawn at random."""
    generator = torch.Generator().manual_seed(1)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            elif name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model


def images(n: int, channels: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, channels, size, size, generator=generator).double()


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).double()


def tokens(n: int, t: int, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(vocabulary, (n, t), generator=generator)


def ignored(labels: Tensor) -> Tensor:
    """Return labels of which some positions are dropped, one example entirely."""
    labels = labels.clone()
    labels[0, 0] = -100
    labels[-1] = -100
    return labels


GATED = [[-1.0, 0.5, 2.0], [-0.5, 1.0, -1.0], [2.0, 0.1, 0.3], [1.0, -2.0, 0.7]]

NETWORKS: dict[str, Callable[[], Case]] = {
    "mlp": lambda: Case(randomised(mlp()), rows(6, 5), None, fl.Categorical()),
    "lenet": lambda: Case(randomised(lenet()), images(4, 1, 8), None, fl.Categorical()),
    "resnet": lambda: Case(randomised(ResNet()), images(3, 2, 5), None, fl.Categorical()),
    "vit": lambda: Case(randomised(ViT()), images(3, 1, 4), None, fl.Categorical()),
    "gpt": lambda: Case(
        randomised(GPT()), tokens(3, 5, 6), ignored(tokens(3, 5, 6)), fl.Categorical()
    ),
    "lstm": lambda: Case(
        randomised(LanguageModel()),
        tokens(3, 4, 5),
        ignored(tokens(3, 4, 5)),
        fl.Categorical(),
    ),
}


def _gaussian(model: nn.Module, x: Any) -> Case:
    return Case(randomised(model), x, None, fl.Gaussian(variance=0.5))


def _conv(module: nn.Module, dims: int) -> Case:
    channels = module.in_channels  # type: ignore[union-attr]
    x = rows(3, channels, *([4] * dims))
    return _gaussian(nn.Sequential(module, nn.Tanh(), nn.Flatten()), x)


def _norm(module: nn.Module, *shape: int) -> Case:
    return _gaussian(nn.Sequential(module, nn.Flatten()), rows(3, *shape))


def _weight_normed(new: bool) -> nn.Module:
    layer = nn.Linear(3, 3)
    if new:
        layer = nn.utils.parametrizations.weight_norm(layer)
    else:
        with warnings.catch_warnings():  # the old function, which models still use
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(layer)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 2))


MODULES: dict[str, Callable[[], Case]] = {
    "conv1d-groups": lambda: _conv(nn.Conv1d(4, 2, 3, groups=2), 1),
    "conv1d-circular": lambda: _conv(
        nn.Conv1d(2, 2, 3, padding=2, padding_mode="circular"), 1
    ),
    "conv2d-same": lambda: _conv(nn.Conv2d(1, 2, (3, 1), padding="same"), 2),
    "conv2d-reflect": lambda: _conv(
        nn.Conv2d(2, 1, 3, stride=2, padding=(1, 2), padding_mode="reflect"), 2
    ),
    "conv2d-replicate": lambda: _conv(
        nn.Conv2d(1, 2, 2, dilation=2, padding=1, padding_mode="replicate"), 2
    ),
    "conv2d-depthwise": lambda: _conv(nn.Conv2d(2, 4, 3, groups=2, padding=1), 2),
    "conv3d": lambda: _conv(nn.Conv3d(1, 1, (2, 1, 3), stride=(2, 3, 1)), 3),
    "conv3d-groups": lambda: _conv(nn.Conv3d(2, 2, 3, groups=2), 3),
    "transposed-1d": lambda: _conv(nn.ConvTranspose1d(2, 3, 2, stride=2), 1),
    "transposed-2d": lambda: _conv(nn.ConvTranspose2d(2, 2, 2, groups=2), 2),
    "layer-norm": lambda: _norm(nn.LayerNorm([2, 3]), 2, 3),
    "group-norm": lambda: _norm(nn.GroupNorm(2, 4), 4, 2),
    "rms-norm": lambda: _norm(nn.RMSNorm(5), 5),
    "batch-norm": lambda: _norm(nn.BatchNorm1d(3), 3, 2),
    "instance-norm": lambda: _norm(nn.InstanceNorm1d(3, affine=True), 3, 4),
    "prelu": lambda: _norm(nn.Sequential(nn.Linear(3, 4), nn.PReLU(4)), 3),
    "embedding": lambda: _gaussian(
        nn.Sequential(nn.Embedding(5, 2, padding_idx=0), nn.Flatten()), tokens(4, 3, 5)
    ),
    "bag": lambda: _gaussian(
        nn.Sequential(nn.EmbeddingBag(5, 2, padding_idx=0), nn.Tanh(), nn.Linear(2, 2)),
        tokens(4, 3, 5),
    ),
    "lstm-time-first": lambda: _gaussian(LanguageModel(False), tokens(3, 2, 5)),
    "gru": lambda: _gaussian(LanguageModel(True, nn.GRU), tokens(3, 2, 5)),
    "rnn-time-first": lambda: _gaussian(LanguageModel(False, nn.RNN), tokens(3, 2, 5)),
    "lstm-bidirectional": lambda: _gaussian(Bidirectional(), rows(3, 2, 2)),
    "attention": lambda: _gaussian(Attention(True), rows(3, 2, 4)),
    "attention-time-first": lambda: _gaussian(Attention(False), rows(3, 2, 4)),
    "attention-bias-kv": lambda: _gaussian(
        Attention(True, add_bias_kv=True, kdim=2, vdim=2), rows(3, 3, 4)
    ),
    "twice": lambda: _gaussian(Twice(), rows(4, 3)),
    "functional": lambda: _gaussian(FunctionalUse(), rows(4, 3)),
    "gated": lambda: _gaussian(Gated(), torch.tensor(GATED).double()),
    "hidden": lambda: _gaussian(HiddenUse(), rows(4, 3)),
    "scalar": lambda: _gaussian(Scaled(), rows(4, 3)),
    "weight-norm": lambda: _gaussian(_weight_normed(False), rows(4, 3)),
    "weight-norm-new": lambda: _gaussian(_weight_normed(True), rows(4, 3)),
    "checkpoint": lambda: _gaussian(Checkpointed(False), rows(3, 3)),
    "checkpoint-reentrant": lambda: _gaussian(
        Checkpointed(True), rows(3, 3).requires_grad_()
    ),
    "recomputed": lambda: _gaussian(Recomputed(), rows(3, 3)),
    "hidden-scale": lambda: _gaussian(HiddenScale(), rows(3, 3)),
    "offloaded": lambda: _gaussian(Offloaded(), rows(3, 3)),
    "folded": lambda: _gaussian(Folded(), rows(3, 2, 3)),
    "time-first": lambda: _gaussian(TimeFirst(), rows(3, 2, 3)),
    "keyword": lambda: _gaussian(Keyword(), rows(3, 3)),
    "caching": lambda: _gaussian(Caching(), rows(3, 3)),
    "tuple-input": lambda: _gaussian(TwoHeads(), (rows(3, 3), tokens(3, 2, 4))),
    "dict-input": lambda: _gaussian(TwoHeads(), {"b": tokens(3, 2, 4), "a": rows(3, 3)}),
    "overwritten-input": lambda: _gaussian(
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2), nn.PReLU()), rows(4, 3)
    ),
    "graph": lambda: _gaussian(Graph(), rows(3, 3, 2)),
    "hypernetwork": lambda: _gaussian(Hypernetwork(), rows(3, 3)),
    "encoder": lambda: _gaussian(
        nn.TransformerEncoderLayer(4, 2, 3, batch_first=True), rows(3, 2, 4)
    ),
}

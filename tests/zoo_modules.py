"""Networks with the habits that break assumptions: ties, loops, folded axes, caches."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class ResidualBlock(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.layer1 = ResidualBlock(3, 3, 1)
        self.layer2 = ResidualBlock(3, 4, 2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer2(self.layer1(x))
        return self.fc(x.mean((2, 3)))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 4, 2, 2)
        self.cls = nn.Parameter(torch.randn(1, 1, 4))
        self.pos = nn.Parameter(torch.randn(1, 5, 4))
        layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.encoder(x))[:, 0])


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (
            z.view(n, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).reshape(n, t, d))


class GPTBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalAttention(width, 2)
        self.mlp = nn.Sequential(
            nn.Linear(width, width + 1), nn.GELU(), nn.Linear(width + 1, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(6, 4)
        self.position = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([GPTBlock(4), GPTBlock(4)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(steps)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class LanguageModel(nn.Module):
    """An LSTM over tokens, example axis first or second inside."""

    def __init__(self, batch_first: bool = True, kind: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.token = nn.Embedding(5, 3)
        self.lstm = kind(3, 4, num_layers=2, batch_first=batch_first)
        self.head = nn.Linear(4, 5)
        self.batch_first = batch_first

    def forward(self, tokens: Tensor) -> Tensor:
        if self.batch_first:
            return self.head(self.lstm(self.token(tokens))[0])
        hidden, _ = self.lstm(self.token(tokens.T))
        return self.head(hidden).transpose(0, 1)


class Bidirectional(nn.Module):
    """Two directions and projected states, called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, bidirectional=True, proj_size=2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(input=x)[0])


class Twice(nn.Module):
    """One module called at two places, the second time on what came of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(torch.tanh(self.first(x))))


class FunctionalUse(nn.Module):
    """A weight used by its module and by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.fc(x))
        return self.head(F.linear(hidden, self.fc.weight.T)) * self.head.bias


class Gated(nn.Module):
    """A second use of a weight that the first examples do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.fc(x))
        return self.head(hidden + F.relu(x[:, :1]) * F.linear(hidden, self.fc.weight))


class FastPathWitness(nn.Module):
    """Note whether the fused encoder layer could be taken."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 2), nn.LayerNorm(2)
        self.seen: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(torch.backends.mha.get_fastpath_enabled())
        return self.norm(self.fc(x))


class HiddenUse(nn.Module):
    """A parameter reached through a Python list too, where torch.func cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.hidden = [self.fc.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.hidden[0]))


class HiddenScale(nn.Module):
    """A parameter reached through a Python list alone, in a function that is unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(2))
        self.hidden = [self.scale]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x) * self.hidden[0])


class Offloaded(nn.Module):
    """A norm layer that keeps what its backward pass needs elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 2), nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return self.norm(self.fc(x))


class Again(torch.autograd.Function):
    """Call a function anew in the backward pass, as checkpoints of other libraries do."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor) -> Tensor:
        ctx.function, ctx.x = function, x.detach()
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.x.clone().requires_grad_()
            torch.autograd.backward(ctx.function(x), gradient)
        return None, x.grad


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = Again.apply(lambda z: torch.tanh(self.second(z)), self.first(x))
        return self.head(hidden)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(
            lambda z: torch.tanh(self.second(torch.tanh(self.first(z)))),
            x,
            use_reentrant=self.reentrant,
        )
        return self.head(hidden)


class Scaled(nn.Module):
    """A scalar parameter and a vector parameter without modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.shift = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.fc(x) + self.shift * self.scale.square()


class Attention(nn.Module):
    """Multi-head attention with the example axis where the module is told to expect it."""

    def __init__(self, batch_first: bool, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.head = nn.Linear(4, 2)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        source = x[..., : self.attention.kdim]
        mixed, _ = self.attention(x, source, source)
        mixed = mixed if self.batch_first else mixed.transpose(0, 1)
        return self.head(mixed)


class Folded(nn.Module):
    """Positions folded into axis 0, where the example no longer is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.tanh(self.fc(x.reshape(-1, 3)))
        return self.head(flat.view(x.shape).sum(1))


class TimeFirst(nn.Module):
    """Linear layers on (time, example, feature), with as many steps as probe examples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.fc(x.transpose(0, 1)))
        return self.head(hidden.sum(0))


class Caching(nn.Module):
    """A model that keeps its last features in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(3, 2), nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.norm(self.fc(x))
        return torch.tanh(self.features)


class Keyword(nn.Module):
    """A module called with its input as a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(input=x)


class TwoHeads(nn.Module):
    """Two inputs, one of them integer, given as a tuple or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(4, 3, mode="sum")
        self.fc = nn.Bilinear(3, 3, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fc(a, self.embedding(b))


class Graph(nn.Module):
    """Messages along the edges of a ring for each example, one sparse matrix for all."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.last = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, nodes, _ = x.shape
        place = torch.arange(n * nodes)
        after = place // nodes * nodes + (place + 1) % nodes
        sent = torch.ones(n * nodes, dtype=x.dtype)
        edges = torch.sparse_coo_tensor(
            torch.stack([after, place]), sent, (n * nodes,) * 2, check_invariants=True
        )
        received = torch.sparse.mm(edges, self.message(x).flatten(0, 1))
        return self.last(torch.tanh(received).unflatten(0, (n, nodes)).mean(1))


class Hypernetwork(nn.Module):
    """A layer called on a parameter makes the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.maker = nn.Parameter(torch.randn(2, 3)), nn.Linear(3, 4)
        self.last = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.maker(self.code)
        return self.last(torch.tanh(F.linear(x, weight[:, :3], weight[:, 3])))


class UntilSettled(nn.Module):
    """A fixed-point iteration that ends once all examples have settled."""

    def __init__(self, tolerance: float = 1e-6) -> None:
        super().__init__()
        self.fc, self.tolerance = nn.Linear(3, 3), tolerance

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for _ in range(50):
            before, hidden = hidden, torch.tanh(self.fc(hidden) / 4 + x)
            if (hidden - before).abs().max() < self.tolerance:
                break
        return hidden


class Narrowed(nn.Module):
    """A product in a lower precision than that of the weights, as attention has them."""

    def __init__(self, within: torch.dtype) -> None:
        super().__init__()
        self.first, self.last, self.within = nn.Linear(16, 64), nn.Linear(64, 5), within
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)).to(self.within) @ self.weight.to(self.within)
        return self.last(torch.tanh(hidden.to(x.dtype)))


class Coupled(nn.Module):
    """Batch statistics in a functional call, which no module gives away."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x - x.mean(0))


class Noisy(nn.Module):
    """Noise between two layers, from a generator of its own."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.size, self.generator = size, torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        noise = torch.randn(hidden.shape, generator=self.generator, dtype=hidden.dtype)
        return self.last(torch.tanh(hidden + self.size * noise))

"""Networks that use weights in every known way, and tell of each use to who asks.

``forward(x, see)`` calls ``see(block, a, z, turned)`` at every use: features a (n, t, i)
as the block has them, what the use puts out as z (n, t, o), and whether the rows of the
block belong to a. What it returns goes on.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

See = Callable[..., Tensor]


def unseen(block: str, a: Tensor, z: Tensor, turned: bool = False) -> Tensor:
    return z


def with_one(a: Tensor) -> Tensor:
    return torch.cat([a, torch.ones_like(a[..., :1])], -1)


def with_zero(a: Tensor) -> Tensor:
    return torch.cat([a, torch.zeros_like(a[..., :1])], -1)


def ones(z: Tensor) -> Tensor:
    return torch.ones_like(z[..., :1])


class Conv1D(nn.Module):
    """The linear layer of GPT-2: the weight is stored (in, out)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


class GPT2Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.head = Conv1D(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, see: See = unseen) -> Tensor:
        z = see("c_fc", x, self.c_fc(x), turned=True)
        z = see("c_fc.bias", ones(z), z)
        h = torch.tanh(z)
        return see("head", with_one(h), self.head(h)).sum(1)


class Bare(nn.Module):
    """Products with bare parameters from both sides, and a bias that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))
        self.b = nn.Parameter(torch.randn(4))
        self.mix = nn.Parameter(torch.randn(2, 3))
        self.out = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor, see: See = unseen) -> Tensor:
        z = see("w", x, x @ self.w, turned=True)
        z = see("b", ones(z), z + self.b)
        h = torch.tanh(z)
        mixed = see("mix", h.mT, torch.matmul(self.mix, h).mT).mT  # over the positions
        y = torch.tanh(mixed)
        return see("out", y, y @ self.out.T).flatten(1)


class Added(nn.Module):
    """``F.linear(x, W) + b`` is what ``F.linear(x, W, b)`` is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, see: See = unseen) -> Tensor:
        z = F.linear(x, self.fc.weight) + self.fc.bias
        h = torch.tanh(see("fc", with_one(x), z))
        return see("head", with_one(h), self.head(h)).sum(1)


class Contracted(nn.Module):
    """Heads by einsum, the weight on either side, with and without an ellipsis."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.randn(3, 2, 2))
        self.mix = nn.Parameter(torch.randn(2, 4))
        self.out = nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor, see: See = unseen) -> Tensor:
        z = torch.einsum("ntd,dhk->nhtk", x, self.heads)
        flat = see("heads", x, z.transpose(1, 2).flatten(2), turned=True)
        h = torch.tanh(flat)
        z = see("mix", h, torch.einsum("oi,nti", self.mix, h).mT)
        h = torch.tanh(z)
        return see("out", h, torch.einsum("...i,io->...o", h, self.out), turned=True).sum(1)


class Bagged(nn.Module):
    """Rows of a table, looked up and added with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(5, 3, mode="sum"), nn.Linear(3, 2)

    def forward(self, x: Tensor, see: See | None = None) -> Tensor:
        dtype = self.head.weight.dtype
        shares = torch.linspace(0.2, 1.0, x.shape[1], dtype=dtype).expand(x.shape)
        if see is None:
            return self.head(torch.tanh(self.table(x, per_sample_weights=shares)))
        one_hot = F.one_hot(x, 5).to(dtype)
        rows = F.embedding(x, self.table.weight)
        rows = see("table", one_hot, rows, turned=True)
        h = torch.tanh((rows * shares[..., None]).sum(1, keepdim=True))
        return see("head", with_one(h), self.head(h))[:, 0]


class Sliced(nn.Module):
    """Rows and columns of one weight, of which some are used by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 3))
        self.rows = nn.Linear(3, 5)

    def forward(self, x: Tensor, see: See = unseen) -> Tensor:
        a = x[..., :2]
        z = F.linear(a, self.w[1:4, 1:])
        whole = see("w", F.pad(a, (1, 0)), F.pad(z, (1, 2)))
        h = torch.tanh(whole[..., 1:4])
        w, b = self.rows.weight, self.rows.bias
        left = F.linear(h, w[:2], b[:2])
        right = F.linear(h * 2, w[2:], b[2:])
        left = see("rows 0:2", with_one(h), left)
        right = see("rows 2:5", with_one(h * 2), right)
        return torch.cat([left, right], -1).sum(1)


class Tied(nn.Module):
    """A table that is looked up, and the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mid = nn.Embedding(5, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor, see: See = unseen) -> Tensor:
        one_hot = F.one_hot(x, 5).to(self.mid.weight.dtype)
        z = see("table", one_hot, self.table(x), turned=True)
        h = torch.tanh(see("mid", with_one(z), self.mid(z)))
        return see("table", h, self.head(h))


class Autoencoder(nn.Module):
    """A weight and its transpose; the first use alone has the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(3, 2)

    def forward(self, x: Tensor, see: See = unseen) -> Tensor:
        h = torch.tanh(see("enc", with_one(x), self.enc(x)))
        y = F.linear(h, self.enc.weight.T)
        padded = see("enc", h, F.pad(y, (0, 1)), turned=True)
        return padded[..., :3].flatten(1)


class BiasOnce(nn.Module):
    """A tie whose bias is used once, and a bias whose weight is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.head.weight.requires_grad_(False)

    def forward(self, x: Tensor, see: See = unseen) -> Tensor:
        h = torch.tanh(see("fc", with_one(x), self.fc(x)))
        h = torch.tanh(see("fc", with_zero(h), F.linear(h, self.fc.weight)))
        z = self.head(h)
        return see("head.bias", ones(z), z).sum(1)


class CrossAttention(nn.Module):
    """Queries of one sequence, keys and values of a longer one."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True, **options)

    def forward(self, x: Tensor, see: See | None = None) -> Tensor:
        q, kv = x[:, :2], x[:, 1:]
        if see is None:
            return self.attention(q, kv, kv)[0].sum(1)
        w, b = self.attention.in_proj_weight, self.attention.in_proj_bias
        query = see("rows 0:4", with_one(q), F.linear(q, w[:4], b[:4]))
        both = see("rows 4:12", with_one(kv), F.linear(kv, w[4:], b[4:]))
        key, value = both.chunk(2, -1)
        weights = torch.softmax(query @ key.mT / 2, -1)
        mixed, out = weights @ value, self.attention.out_proj
        return see("attention.out_proj", with_one(mixed), out(mixed)).sum(1)


class Upsampled(nn.Module):
    """A transposed convolution, whose output gradients are unfolded."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(2, 2, 2, stride=2)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor, see: See = unseen) -> Tensor:
        # stride = kernel: the patches of the output do not meet
        patches = torch.einsum("nit,iok->ntok", x, self.up.weight)
        patches = see("up", x.mT, patches.flatten(2), turned=True).unflatten(2, (2, 2))
        z = patches.permute(0, 2, 1, 3).flatten(2).mT + self.up.bias
        z = see("up.bias", ones(z), z)
        h = torch.tanh(z.mT.flatten(1))
        return see("head", with_one(h[:, None]), self.head(h)[:, None])[:, 0]


class Upsampling(Upsampled):
    """The same by torch's own layer."""

    def forward(self, x: Tensor, see: See = unseen) -> Tensor:
        return self.head(torch.tanh(self.up(x).flatten(1)))


class LateUse(nn.Module):
    """A second use of a weight that only large inputs reach."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc(x))
        if bool((x > 5).any()):
            h = torch.tanh(self.more(h))
        return self.head(h)

    def more(self, h: Tensor) -> Tensor:
        return self.fc(h)


class LateUnknownUse(LateUse):
    """As before, by a function that is not known."""

    def more(self, h: Tensor) -> Tensor:
        return (h[:, None] * self.fc.weight).sum(2)


class LateUnseenUse(LateUse):
    """As before, where autograd looks away."""

    def more(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            return self.fc(h)


class OneDict(nn.Module):
    """A model whose only argument is a mapping, with a mapping in it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, batch: Any) -> Tensor:
        return self.fc(batch["a"]) * batch["more"]["scale"]

"""
A network of convolutions
=========================

A convolution uses its weight at many positions; KFAC averages over them, the mini-blocks
are its kernels. Entry by entry its block is hard to read: a pixel a pair of kernels shows
which of them go together, and a window the entries of the first two output channels.
"""

import torch
import xarray as xr
from matplotlib import pyplot as plt
from torch import nn

import fisherlab as fl

torch.manual_seed(0)
head = [nn.Flatten(), nn.Linear(4 * 36, 10)]
model = nn.Sequential(
    nn.Conv2d(1, 4, 5, 2), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), *head
)
x = fl.problems.load("digits").train[0][:100].reshape(-1, 1, 16, 16).float()
stats = fl.collect(model, (x, None), fl.Categorical())
fl.plots.errors(
    fl.compare(stats, ["kfac", "kfac-reduce", "kpsvd", "mini-block", "diagonal"])
)

layer = stats["2"]
exact = xr.DataArray(fl.ExactBlock()(layer).to_dense().numpy(), dims=("row", "col"))
kernels = fl.plots.kernels(layer.weight_shape, 9)
_, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
fl.plots.heatmap(exact, axes[0], kernels=kernels).set_title("pairs of kernels")
rows = (0, 2 * layer.weight_shape[1])
fl.plots.heatmap(exact, axes[1], outlines=kernels, rows=rows, columns=rows)
axes[1].set_title("two output channels")

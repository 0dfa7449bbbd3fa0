"""
Pairs of kernels, and a window
==============================

Entry by entry the block of a convolution is hard to read: a pixel a pair of kernels shows
which of them go together, and a window the entries of the first two output channels.
"""

import xarray as xr
from matplotlib import pyplot as plt
from torch import nn

import fisherlab as fl

model = nn.Sequential(nn.Conv2d(1, 4, 5, 2), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten())
x = fl.problems.load("digits").train[0][:100].reshape(-1, 1, 16, 16).float()
layer = fl.collect(model, (x, None), fl.Categorical(), layers=["2"])["2"]
exact = xr.DataArray(fl.ExactBlock()(layer).to_dense().numpy(), dims=("row", "col"))
kernels, rows = fl.plots.kernels(layer.weight_shape, 9), (0, 2 * layer.weight_shape[1])
_, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
fl.plots.heatmap(exact, axes[0], kernels=kernels).set_title("pairs of kernels")
fl.plots.heatmap(exact, axes[1], outlines=kernels, rows=rows, columns=rows)
axes[1].set_title("two output channels")

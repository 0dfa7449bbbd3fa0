"""
The matrix of a whole network
=============================

All blocks at once, between layers too, of a small network; squares are its layers.
"""

import torch
import xarray as xr

import fisherlab as fl

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
stats = fl.collect(model, (torch.randn(200, 6), None), fl.Categorical(), compress=False)
matrix = fl.full_matrix(stats)
layers = {name: (part.start, part.stop) for name, part in matrix.offsets.items()}
fl.plots.heatmap(
    xr.DataArray(matrix.values, dims=("row", "col")), outlines=layers, scale="log"
)

"""
The exact block
===============

All entries of the Fisher of one layer; the squares are the mini-blocks of its output
neurons.
"""

import xarray as xr

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
stats = fl.collect(problem.model, (x[:300], y[:300]), problem.likelihood, layers=["fc6"])
F = fl.ExactBlock()(stats["fc6"]).to_dense()
rows = F.shape[0] // 10
squares = [(start, start + rows) for start in range(0, F.shape[0], rows)]
fl.plots.heatmap(xr.DataArray(F.numpy(), dims=("row", "col")), outlines=squares)

"""
What one Kronecker product misses
=================================

The entries of F − G ⊗ A for the nearest product, and for the nearest sums of two and
four.
"""

import xarray as xr
from matplotlib import pyplot as plt

import fisherlab as fl

problem = fl.problems.load("digits")
data = problem.train[0][:300], None
layer = fl.collect(problem.model, data, problem.likelihood, layers=["fc6"])["fc6"]
exact = fl.ExactBlock()(layer).to_dense()
_, axes = plt.subplots(1, 3, figsize=(11, 3.6))
for ax, rank in zip(axes, [1, 2, 4], strict=True):
    missed = exact - fl.KPSVD(rank)(layer).to_dense()
    fl.plots.heatmap(
        xr.DataArray(missed, dims=("row", "col")), ax=ax, vmax=0.002
    ).set_title(f"rank {rank}")

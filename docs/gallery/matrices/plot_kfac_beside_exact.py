"""
One Kronecker product beside the exact block
============================================

KFAC, and the product that is nearest in Frobenius norm.
"""

import xarray as xr
from matplotlib import pyplot as plt

import fisherlab as fl

problem = fl.problems.load("digits")
data = problem.train[0][:300], None
layer = fl.collect(problem.model, data, problem.likelihood, layers=["fc6"])["fc6"]
_, axes = plt.subplots(1, 3, figsize=(11, 3.6))
for ax, method in zip(axes, [fl.ExactBlock(), fl.KFAC(), fl.KPSVD()], strict=True):
    entries = xr.DataArray(method(layer).to_dense().numpy(), dims=("row", "col"))
    fl.plots.heatmap(entries, ax=ax, vmax=0.02).set_title(repr(method), fontsize=8)

"""
Another loss, another Fisher
============================

The same network with the loss of a classifier and of a regression.
"""

from matplotlib import pyplot as plt

import fisherlab as fl

problem = fl.problems.load("digits")
data = problem.train[0][:200], None
_, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
for ax, likelihood in zip(axes, [fl.Categorical(), fl.Gaussian()], strict=True):
    stats = fl.collect(problem.model, data, likelihood)
    fl.plots.errors(fl.compare(stats, ["kfac", "kpsvd", "diagonal"]), ax=ax)
    ax.set_title(repr(likelihood), fontsize=8)

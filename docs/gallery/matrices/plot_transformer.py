"""
A small transformer
===================

Attention, norms and embeddings; a gap is a method that a layer cannot have, and
`ds.status` says why.
"""

from matplotlib import pyplot as plt

import fisherlab as fl

problem = fl.problems.load("digits-vit")
data = problem.train[0][:16], problem.train[1][:16]
stats = fl.collect(problem.model, data, problem.likelihood, fl.MonteCarlo(1))
_, ax = plt.subplots(figsize=(9, 4.5))
fl.plots.errors(fl.compare(stats, ["kfac", "ekfac", "mini-block", "diagonal"]), ax=ax)
ax.tick_params("x", rotation=90)

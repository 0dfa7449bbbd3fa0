"""
Inverses on a logarithmic scale
===============================

Small entries between the mini-blocks become visible.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
stats = fl.collect(problem.model, (x[:300], y[:300]), problem.likelihood, layers=["fc6"])
tree = fl.inverse_blocks(
    stats, ["exact", "kfac", "kpsvd-2"], damping=fl.RelativeDamping(1.0)
)
fl.plots.inverse_heatmap(tree, scale="log")

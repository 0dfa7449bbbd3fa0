"""
What a smaller error holds in memory
====================================

Small marks are layers, large ones the network; the line joins methods that none other
beats in both.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
stats = fl.collect(problem.model, (x[:200], y[:200]), problem.likelihood)
fl.plots.cost(
    fl.compare(stats, ["kfac", "ekfac", "kpsvd", "kpsvd-2", "mini-block", "diagonal"])
)

"""
Where the error comes from
==========================

The squared error of the whole network's matrix in parts that add up: dropped blocks
between layers, and the shape and scale of those kept.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
ds = fl.decompose(problem.model, (x[:100], y[:100]), problem.likelihood)
fl.plots.decomposition(ds)

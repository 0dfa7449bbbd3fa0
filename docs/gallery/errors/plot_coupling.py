"""
How strongly layers are coupled
===============================

The size of the blocks between layers, relative to those on the diagonal: what every
method "per layer" leaves out.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
ds = fl.decompose(problem.model, (x[:100], y[:100]), problem.likelihood, ["kfac"])
fl.plots.layer_table(ds.coupling)

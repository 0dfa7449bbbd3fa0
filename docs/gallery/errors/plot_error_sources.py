"""
The wrong Fisher, or the wrong matrix for it?
=============================================

Each method made from the exact Fisher, from sampled labels and from the labels of the
data, all against the exact block.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
methods = ["kfac", "kpsvd", "mini-block"]
ds = fl.decompose(problem.model, (x[:100], y[:100]), problem.likelihood, methods)
fl.plots.error_sources(ds, layers=["fc3", "fc6"])

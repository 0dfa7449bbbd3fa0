"""
Error of each method, layer by layer
====================================

The relative Frobenius error ‖F − F̂‖ / ‖F‖ of six approximations of each block of a
network on handwritten digits. Nothing is estimated: F is the exact Fisher on these
examples.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
stats = fl.collect(problem.model, (x[:300], y[:300]), problem.likelihood)
ds = fl.compare(stats, ["kfac", "ekfac", "kpsvd", "kpsvd-2", "mini-block", "diagonal"])
fl.plots.errors(ds)

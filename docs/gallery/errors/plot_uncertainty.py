"""
Is a difference larger than noise?
==================================

Intervals over the seeds of sampled labels; below the shaded floor the reference itself is
not known from so few examples.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
data, methods = (x[:100], y[:100]), ["kfac", "kpsvd", "mini-block", "diagonal"]
ds = fl.uncertainty(problem.model, data, problem.likelihood, methods, reference=fl.Exact())
fl.plots.errors(ds)

"""
Sharpness
=========

The largest eigenvalue, the trace and the effective rank, relative to the exact block's.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
stats = fl.collect(problem.model, (x[:200], y[:200]), problem.likelihood)
fl.plots.purposes(
    fl.compare(stats, ["kfac", "kpsvd", "mini-block", "diagonal"], purpose=fl.Sharpness())
)

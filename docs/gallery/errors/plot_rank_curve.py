"""
How many terms are worth it
===========================

The least error that a sum of k Kronecker products, or k eigenvectors, can have.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
stats = fl.collect(
    problem.model, (x[:200], y[:200]), problem.likelihood, layers=["fc3", "fc6"]
)
fl.plots.rank_curve(fl.rank_curve(stats, ranks=[1, 2, 4, 8, 16]))

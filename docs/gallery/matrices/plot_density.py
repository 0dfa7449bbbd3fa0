"""
The density of eigenvalues
==========================

For blocks of any size, by all eigenvalues or by stochastic Lanczos quadrature.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
stats = fl.collect(
    problem.model, (x[:200], y[:200]), problem.likelihood, layers=["fc3", "fc6"]
)
fl.plots.density(fl.density(stats, ["kfac", "diagonal"]))

"""
All eigenvalues
===============

Of the exact block and of approximations, relative to the mean eigenvalue.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
stats = fl.collect(
    problem.model, (x[:200], y[:200]), problem.likelihood, layers=["fc3", "fc6"]
)
fl.plots.spectra(fl.spectra(stats, ["kfac", "kpsvd", "mini-block", "diagonal"]))

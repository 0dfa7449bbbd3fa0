"""
Error of the eigenvalues alone
==============================

A method may have the right eigenvalues in the wrong directions, and the other way round:
the spectrum error compares the sorted eigenvalues only.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
stats = fl.collect(
    problem.model, (x[:200], y[:200]), problem.likelihood, layers=["fc3", "fc6"]
)
methods = ["kfac", "ekfac", "kpsvd", "mini-block", "diagonal"]
ds = fl.compare(stats, methods, metrics=["frobenius_error", "spectrum_error"])
fl.plots.errors(ds, "spectrum_error")

"""
A Laplace posterior
===================

Variances of predictions on held-out data, and the evidence, against the exact block's.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
stats = fl.collect(problem.model, (x[:200], y[:200]), problem.likelihood)
held_out = fl.HeldOut.of(problem.model, (x[200:220], y[200:220]))
purpose = fl.Laplace(prior_precision=1.0, data_size=200, held_out=held_out)
fl.plots.purposes(
    fl.compare(stats, ["kfac", "ekfac", "mini-block", "diagonal"], purpose=purpose)
)

"""
A method of one's own in the table
==================================

Any function from the statistics of a layer to an operator is a method. Here: half of KFAC
and half of the diagonal.
"""

import fisherlab as fl


def mixed(layer):
    return fl.Dense(
        (fl.KFAC()(layer).to_dense() + fl.Diagonal()(layer).to_dense()) / 2,
        layer.weight_shape,
    )


problem = fl.problems.load("digits")
x, y = problem.train
stats = fl.collect(
    problem.model, (x[:200], y[:200]), problem.likelihood, layers=["fc3", "fc4", "fc5"]
)
fl.plots.errors(
    fl.compare(stats, {"kfac": fl.KFAC(), "diagonal": fl.Diagonal(), "mixed": mixed})
)

"""
Which parameter is in which block
=================================

And which path its statistics take: no parameter is left out in silence.
"""

import fisherlab as fl

problem = fl.problems.load("digits-vit")
fl.plots.coverage_map(
    fl.coverage(problem.model, (problem.train[0][:2], problem.train[1][:2]))
)

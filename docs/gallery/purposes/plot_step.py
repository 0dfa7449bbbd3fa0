"""
A natural-gradient step
=======================

The share of the exact step's decrease that each method reaches, at its own best damping,
and what it reaches at others: below the dashed line the gradient itself is better.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
batch = tuple(part[:200] for part in problem.train)
stats = fl.collect(problem.model, batch, problem.likelihood)
gradient = fl.mean_gradient(problem.model, batch, problem.likelihood)
found = fl.compare(
    stats, ["kfac", "kpsvd-2", "mini-block", "diagonal"], purpose=fl.Step(gradient, 0.01)
)
fl.plots.own_dampings(found)

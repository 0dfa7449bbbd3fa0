"""
Does the step point the right way?
==================================

The cosine between the damped natural gradient of the exact block and of each method.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
batch = tuple(part[:300] for part in problem.train)
stats = fl.collect(problem.model, batch, problem.likelihood)
gradient = fl.mean_gradient(problem.model, batch, problem.likelihood)
methods, damping = ["kfac", "kpsvd-2", "mini-block", "diagonal"], fl.RelativeDamping(1.0)
fl.plots.direction_cosines(fl.compare(stats, methods, damping=damping, gradient=gradient))

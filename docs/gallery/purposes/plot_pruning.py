"""
Pruning
=======

The loss without the weights that each method would remove.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
batch = tuple(part[:200] for part in problem.train)
stats = fl.collect(problem.model, batch, problem.likelihood)
purpose = fl.Pruning.of(problem.model, batch, problem.likelihood)
fl.plots.purposes(
    fl.compare(stats, ["kfac", "ekfac", "mini-block", "diagonal"], purpose=purpose)
)

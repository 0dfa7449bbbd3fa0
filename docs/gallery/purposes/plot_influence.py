"""
Influence of training examples
==============================

Whether a method finds the same influential examples as the exact block.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
(x, y), likelihood = problem.train, problem.likelihood
stats = fl.collect(problem.model, (x[:200], y[:200]), likelihood)
examples = fl.collect(problem.model, (x[:200], y[:200]), likelihood, fl.Empirical())
queries = fl.collect(problem.model, (x[200:210], y[200:210]), likelihood, fl.Empirical())
purpose = fl.Influence(0.01, queries, examples)
fl.plots.purposes(
    fl.compare(stats, ["kfac", "ekfac", "mini-block", "diagonal"], purpose=purpose)
)

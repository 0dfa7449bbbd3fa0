"""
Continual learning
==================

The penalty of elastic weight consolidation on a drift of the weights, here the drift of
thirty steps of training.
"""

import copy

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
before = copy.deepcopy(dict(problem.model.named_parameters()))
stats = fl.collect(problem.model, (x[:200], y[:200]), problem.likelihood)
fl.follow(problem, "sgd-momentum", steps=30, every=30)
purpose = fl.EWC(before, [dict(problem.model.named_parameters())])
fl.plots.purposes(
    fl.compare(stats, ["kfac", "ekfac", "mini-block", "diagonal"], purpose=purpose)
)

"""
Inverses, the exact one beside the approximations
=================================================

The absolute entries of (F̂ + λI)⁻¹: a row is a layer and shares one scale.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
stats = fl.collect(
    problem.model, (x[:300], y[:300]), problem.likelihood, layers=["fc3", "fc6"]
)
methods = ["exact", "kfac", "mini-block"]
fl.plots.inverse_heatmap(fl.inverse_blocks(stats, methods, damping=fl.RelativeDamping(1.0)))

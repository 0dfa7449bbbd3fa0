"""
The error of the inverse depends on the damping
===============================================

From one eigendecomposition of each block: the error of (F̂ + λI)⁻¹ at every λ.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
stats = fl.collect(
    problem.model, (x[:200], y[:200]), problem.likelihood, layers=["fc3", "fc6"]
)
fl.plots.damping_sweep(fl.sweep(stats, ["kfac", "kpsvd", "mini-block", "diagonal"]))

"""
Error against the work of a solve
=================================

`fl.pareto` counts bytes and flops of every method and measures its seconds.
"""

import fisherlab as fl

problem = fl.problems.load("digits")
x, y = problem.train
stats = fl.collect(
    problem.model, (x[:200], y[:200]), problem.likelihood, layers=["fc3", "fc6"]
)
ds = fl.pareto(stats, ["kfac", "kpsvd", "kpsvd-2", "mini-block", "diagonal"], repeats=1)
fl.plots.pareto(ds, cost="solve_flops")

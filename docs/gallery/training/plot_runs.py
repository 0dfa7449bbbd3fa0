"""
Several runs
============

Results are joined by `fl.merge`; here the same network from three initialisations.
"""

import fisherlab as fl


def run(seed):
    problem = fl.problems.load("digits", seed=seed)
    data = problem.train[0][:200], problem.train[1][:200]
    stats = fl.collect(problem.model, data, problem.likelihood, layers=["fc3", "fc6"])
    return fl.compare(stats, ["kfac", "kpsvd", "diagonal"])


results = [run(seed) for seed in range(3)]
fl.plots.runs(fl.merge(results, "run", ["first", "second", "third"]))

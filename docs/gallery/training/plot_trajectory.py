"""
Errors along a training
=======================

The network changes, and with it how good each approximation is.
"""

import fisherlab as fl

methods = ["kfac", "kpsvd", "mini-block", "diagonal"]
probe = fl.probes.Errors(methods, examples=100, layers=["fc3", "fc6"])
problem = fl.problems.load("digits")
ds = fl.follow(problem, "sgd-momentum", steps=100, every=20, probes=[probe])
fl.plots.trajectory(ds)

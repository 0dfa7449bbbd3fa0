"""
Optimisers side by side
=======================

Every method is an optimiser; here with the settings of its paper, a hundred steps each.
"""

import fisherlab as fl


def run(name):
    return fl.follow(fl.problems.load("digits"), name, steps=100, every=10)


fl.plots.losses({name: run(name) for name in ["sgd-momentum", "adam", "kfac", "ekfac"]})

"""
A network of convolutions
=========================

A convolution uses its weight at many positions; KFAC averages over them, the mini-blocks
are its kernels.
"""

import torch
from torch import nn

import fisherlab as fl

torch.manual_seed(0)
head = [nn.Flatten(), nn.Linear(4 * 36, 10)]
model = nn.Sequential(
    nn.Conv2d(1, 4, 5, 2), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), *head
)
x = fl.problems.load("digits").train[0][:100].reshape(-1, 1, 16, 16).float()
stats = fl.collect(model, (x, None), fl.Categorical())
fl.plots.errors(
    fl.compare(stats, ["kfac", "kfac-reduce", "kpsvd", "mini-block", "diagonal"])
)

"""
The order of the entries, drawn
===============================

Left: a weight of three outputs and two inputs, its bias as the last column; each cell has
its place in vec(W), which goes along the rows. Right: the block is G ⊗ A for a Kronecker
method, the output factor first, so that one square belongs to a pair of outputs.
"""

import numpy as np
import torch
from matplotlib import pyplot as plt

_, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6))
left.imshow(np.arange(9).reshape(3, 3), cmap="Blues", vmax=16)
for place in range(9):
    left.text(place % 3, place // 3, place, ha="center", va="center")
left.set_xticks(range(3), ["input 0", "input 1", "bias"])
left.set(yticks=range(3), ylabel="output")
G, A = torch.tensor([[3.0, 1, 0], [1, 2, 1], [0, 1, 1]]), torch.eye(3) + 0.4
right.imshow(torch.kron(G, A).numpy(), cmap="Blues")
right.set(xticks=range(9), yticks=range(9), title="G ⊗ A: 3 × 3 squares of 3 × 3")

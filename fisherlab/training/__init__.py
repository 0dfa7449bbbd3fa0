"""Training loops and the moments at which they are looked at."""

from fisherlab.training.loop import accuracy, mean_loss, trajectory

__all__ = ["accuracy", "mean_loss", "trajectory"]

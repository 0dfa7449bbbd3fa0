"""The exact block, and what is left of it on smaller blocks."""

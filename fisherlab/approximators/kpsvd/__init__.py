"""The best sums of Kronecker products, and their solvers."""

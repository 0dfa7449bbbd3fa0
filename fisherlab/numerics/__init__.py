"""Numerical kernels that know nothing of networks: packing, products, iterations."""

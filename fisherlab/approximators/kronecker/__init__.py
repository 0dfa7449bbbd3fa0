"""Kronecker products of second moments."""

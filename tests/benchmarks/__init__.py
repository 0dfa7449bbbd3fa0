"""Times against the arithmetic and against the neighbours, in one run: `make bench`."""

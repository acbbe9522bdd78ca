"""Benchmarks: our operators, their competitors and the machine's own limits, in one run."""

"""Measurements: each target prints its table and writes `benchmarks/results/TARGET.json`."""

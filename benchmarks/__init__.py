"""Benchmarks: each measures both sides in one run and writes a record; the demo is one of them."""

"""Benchmarks: each runs without arguments on a small random model, prints a table, and one line of JSON last."""

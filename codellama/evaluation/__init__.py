"""Scores on benchmarks: command → run → answers, marking → tasks; journal, pass_at_k and summary beside them.

This file imports nothing: the sandbox loads it in each of its processes.
"""

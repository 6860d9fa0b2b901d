"""Scores: published problems, answered by a model, and judged by running the answers in a sandbox.

This file imports nothing: the sandbox loads it in each of its processes.
"""

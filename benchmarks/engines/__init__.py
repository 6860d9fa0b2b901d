"""Programs that run the same weights for `benchmarks.peers`: a process each, which answers on a pipe.

A module is one engine. It is started as `python -m benchmarks.engines.NAME`, where that engine is installed, so nothing
here imports torch or codellama but in the engine that needs it.
"""

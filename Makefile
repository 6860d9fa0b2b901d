.PHONY: demo test check fix bench gpu clients soak screenshots
PYTHON ?= python3
# Two tests at a time, on a core each: many of them wait for processes that they start.
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile
TORCHRUN = .venv/bin/torchrun --nproc_per_node

demo: .venv/demo  ## the three examples on the bundled demo checkpoint
	$(TORCHRUN) 1 example_completion.py
	$(TORCHRUN) 1 example_infilling.py
	$(TORCHRUN) 2 example_instructions.py

test: .venv/dev  ## the tests
	$(PYTEST)

check: .venv/dev  ## lint, types, imports, tests: what CI runs
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	$(PYTEST)

fix: .venv/dev  ## what can be mended without thought
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: .venv/dev  ## small benchmarks; each prints a table and one line of JSON
	.venv/bin/python -m benchmarks.prefill
	.venv/bin/python -m benchmarks.decode
	.venv/bin/python -m benchmarks.kernels
	.venv/bin/python -m benchmarks.memory
	.venv/bin/python -m benchmarks.load
	.venv/bin/python -m benchmarks.quality
	.venv/bin/python -m benchmarks.serving
	.venv/bin/python -m benchmarks.evaluation replicas
	.venv/bin/python -m benchmarks.evaluation solutions
	.venv/bin/python -m benchmarks.start
	.venv/bin/python -m benchmarks.peers

gpu: .venv/gpu  ## with a GPU: its tests and benchmarks, and a page of results; an hour or less
	.venv/bin/python -m benchmarks.gpu

clients: .venv/dev  ## real clients against the server; needs a package index
	.venv/bin/python -m tests.clients.run

soak: .venv/dev  ## thousands of requests, abandoned, hostile and generated ones: minutes
	.venv/bin/python -m tests.soak

screenshots: .venv/dev  ## pictures of the chat page for the documentation; needs chromium
	SCREENSHOTS=docs/images .venv/bin/python -m pytest tests/chat/test_browser.py

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/gpu: .venv/demo
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --group gpu
	touch $@

.venv/dev: .venv/demo
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --group dev
	touch $@

.PHONY: demo test check fix bench clients soak screenshots
PYTHON ?= python3
TORCHRUN = .venv/bin/torchrun --nproc_per_node

demo: .venv/demo  ## the three examples on the bundled demo checkpoint
	$(TORCHRUN) 1 example_completion.py
	$(TORCHRUN) 1 example_infilling.py
	$(TORCHRUN) 2 example_instructions.py

test: .venv/dev  ## the tests
	.venv/bin/python -m pytest

check: .venv/dev  ## lint, types, imports, tests: what CI runs
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/python -m pytest

fix: .venv/dev  ## what can be mended without thought
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: .venv/dev  ## small benchmarks; each prints a table and one line of JSON
	.venv/bin/python -m benchmarks.prefill
	.venv/bin/python -m benchmarks.decode
	.venv/bin/python -m benchmarks.memory
	.venv/bin/python -m benchmarks.load
	.venv/bin/python -m benchmarks.serving
	.venv/bin/python -m benchmarks.evaluation replicas
	.venv/bin/python -m benchmarks.evaluation solutions

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

.venv/dev: .venv/demo
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --group dev
	touch $@

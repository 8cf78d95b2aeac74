# On a machine with Python >= 3.11, pip and make: `make demo` runs the main job, `make test` the tests. Both set up .venv
# first, once. PYTHON=/path/to/python names the interpreter to make it with.
.PHONY: help demo test check clean

help:
	@echo "make demo    train on clutter, explain, evaluate; writes runs/demo/ with the report"
	@echo "make test    the test suite"
	@echo "make check   lint, format, types, layers"
	@echo "make clean   remove .venv, caches and build outputs; runs/ stays"

demo:
	@scripts/setup train
	.venv/bin/python -m sightline demo --out runs/demo --resume

# The shape checker wraps functions, which torch.compile would trace: those tests run without it.
test: export OMP_NUM_THREADS = 1
test: export HF_HUB_OFFLINE = 1
test: export XDG_CACHE_HOME = $(CURDIR)/.cache
test: export SIGHTLINE_CACHE = $(CURDIR)/.cache/sightline
test:
	@scripts/setup dev
	.venv/bin/python -m pytest -n 2
	.venv/bin/python -m pytest -m compile -o addopts="--strict-markers --import-mode=importlib" tests

check:
	@scripts/setup dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pyright
	.venv/bin/lint-imports

clean:
	rm -rf .venv .cache build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

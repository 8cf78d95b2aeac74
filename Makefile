# Needs Python >= 3.11, pip and make. `make demo` runs the main job and `make test` the tests; both create .venv the first
# time. PYTHON=/path/to/python chooses the interpreter for it.
.PHONY: help demo test proofs check docs clean

help:
	@echo "make demo    train on clutter, explain, evaluate; write runs/demo/ with the report"
	@echo "make test    run the test suite"
	@echo "make proofs  run the slow tests that it leaves out"
	@echo "make check   check lint, format, types, import layers and the pages and links of docs/"
	@echo "make docs    write the documentation to build/docs/"
	@echo "make clean   remove .venv, caches and build outputs; keep runs/"

demo:
	@scripts/setup train
	.venv/bin/python -m sightline demo --out runs/demo --resume

# Without compiled files every process of the tests compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

# torch.compile would trace the shape checker's wrappers, so the compile tests run without the checker.
test proofs: export OMP_NUM_THREADS = 1
test proofs: export HF_HUB_OFFLINE = 1
test proofs: export XDG_CACHE_HOME = $(CURDIR)/.cache
test proofs: export SIGHTLINE_CACHE = $(CURDIR)/.cache/sightline
test:
	@scripts/setup dev
	.venv/bin/python -m pytest -n 2 --dist worksteal
	.venv/bin/python -m pytest -m "compile and not slow" -o addopts="--strict-markers --import-mode=importlib" -n 2 tests

proofs:
	@scripts/setup dev
	.venv/bin/python -m pytest -m slow -o addopts="--strict-markers --import-mode=importlib" -n 2 tests

check:
	@scripts/setup dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pyright
	.venv/bin/lint-imports
	.venv/bin/python -m sphinx -q -E -W --keep-going -n -b dummy -d build/doctrees docs build/docs-checked

docs:
	@scripts/setup dev
	.venv/bin/python -m sphinx -q -E -W --keep-going -n -b html -d build/doctrees docs build/docs
	@echo "$(CURDIR)/build/docs/index.html"

clean:
	rm -rf .venv .cache build dist docs/reference/generated .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

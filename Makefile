# Each target makes what it needs; on a fresh machine the first one creates .venv and installs into it.
PYTHON ?= python3
BIN := .venv/bin
# Processes: half of the time goes by waiting.
TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder
SOAKED := tests/integration/test_kills.py tests/faults tests/integration/test_drains.py tests/integration/test_rivals.py \
	tests/integration/test_memory.py tests/integration/test_store_faults.py tests/unit/test_specfuzz.py \
	tests/unit/input/test_hostile_files.py tests/unit/test_rounds.py

.PHONY: demo test soak check fmt docs clean

demo: .venv/installed ## Run the quickstart job on docstrings of this Python's standard library
	@$(BIN)/python jobs/quickstart/demo.py

# What the tests counted stands at the end.
test: .venv/installed ## Unit and integration tests; those for a card and the slow ones are left out
	$(BIN)/python -m pytest $(TWO)

# Prints kills, jobs, wrong outputs and rows recomputed. A seed that fails is printed: set it to replay.
soak: .venv/installed ## An hour of what `make test` does for minutes: 300 kills, rivals, a million rows, fuzz
	QUANTBATCH_TEST_KILLS=300 QUANTBATCH_TEST_SPECS=5000 QUANTBATCH_TEST_FLIPS=2000 \
	QUANTBATCH_TEST_SCHEDULES=20000 $(BIN)/python -m pytest -m "not gpu" --hypothesis-profile default $(TWO) $(SOAKED)

check: .venv/installed ## Format, lint, types, stale generated files, every config planned
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python jobs/generated.py --check

fmt: .venv/installed ## Format and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/installed ## Write the generated files: the JSON schema and the reference of the spec
	$(BIN)/python jobs/generated.py

clean:
	rm -rf .venv out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch first and by its exact version: a range would let pip take a newer build with gigabytes of CUDA.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

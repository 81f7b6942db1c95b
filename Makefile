# Marrow. Two commands on a fresh machine:
#   make run     set-up, then raw rows -> a served model
#   make test    set-up, then every test
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test check lint fast soak bench clean setup setup-test

run: setup
	$(BIN)/marrow run recipes/quickstart.toml

# loadfile: what the tests of a file share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile

test: lint
	$(PYTEST) -m "not slow and not soak"
	$(PYTEST) -m "slow and not soak"

check: lint fast

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Fewer examples of each property than `make test` tries.
fast: setup-test
	$(PYTEST) -m "not slow and not soak" --hypothesis-profile quick

# The long forms: hundreds of kills, gigabytes under a memory limit. About an hour.
soak: setup-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -m soak --timeout 3600

bench: setup-test
	$(BIN)/python bench/all.py

setup:
	@$(PYTHON) scripts/setup.py

setup-test:
	@$(PYTHON) scripts/setup.py --extra test --extra lint

clean:
	rm -rf .venv .bench build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

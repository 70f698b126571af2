# The commands of README and docs/. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA ?=

.PHONY: help install demo results results-pretraining results-stages results-sequences results-faces results-end-to-end quick test test-all lint bench docs clean

help:
	@echo "make install         virtual environment in .venv with everything"
	@echo "make demo            the whole system on this machine: cluster, shards, search, training, ensemble, score"
	@echo "make demo DATA=DIR   the same on your data in the s-Aff-Wild2 layout"
	@echo "make results         baseline, B and A on rendered faces, three seeds each, and the page that compares them"
	@echo "make results-pretraining, make results-stages, make results-sequences"
	@echo "                     does masked pre-training help, do the parts of 2Att-2Mt, do encoders of whole videos:"
	@echo "                     three seeds each, with pages"
	@echo "make results-faces DATA=DIR   detectors of faces side by side, on scenes with the photographs of a set in them"
	@echo "make results-end-to-end DATA=DIR   from scenes with these photographs to a score, beside the set's own crops"
	@echo "make quick           the tests that need no server, no Ray and no training: two minutes, for the hand at the keyboard"
	@echo "make test            the tests"
	@echo "make test-all        the tests and the slow ones: every failure at every moment"
	@echo "make bench           the loader beside its peers, and the order at scale"
	@echo "make docs            what every module, class and function is, from their docstrings: build/docs/index.html"
	@echo "make lint            ruff"
	@echo "make clean           remove what demo and tests leave (not .venv)"

install: $(STAMP)

# uv installs in a third of pip's time; without compiled bytecode every rank would compile torch's sources at its start.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
		|| { echo "error: $$($(PYTHON) --version) is not supported; install Python 3.11 or 3.12, or set PYTHON=python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "error: no virtual environment can be made; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m cluster.demo $(if $(DATA),--data '$(DATA)')

results: $(STAMP)
	@$(BIN)/python -m benchmarks.comparators

results-pretraining: $(STAMP)
	@$(BIN)/python -m benchmarks.pretraining $(if $(DATA),--photographs '$(DATA)')

results-stages: $(STAMP)
	@$(BIN)/python -m benchmarks.stages

results-sequences: $(STAMP)
	@$(BIN)/python -m benchmarks.sequences

results-faces: $(STAMP)
	@$(BIN)/python -m benchmarks.faces $(if $(DATA),--photographs '$(DATA)')

results-end-to-end: $(STAMP)
	@$(BIN)/python -m benchmarks.faces_end_to_end $(if $(DATA),--photographs '$(DATA)')

# Files side by side, one more than there are cores: tests wait for a third of their time. Of what starts a cluster two.
WORKERS := $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$(( cores < 8 ? cores + 1 : 8 )))
SIDE_BY_SIDE := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

quick: $(STAMP) lint
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not whole and not integration and not slow'

test: $(STAMP) lint
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not integration and not slow'
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m 'integration and not slow'

# In an environment of its own: the peers want older releases of what we use.
bench: $(STAMP)
	@test -x $(VENV)-bench/bin/python || $(BIN)/python -m venv $(VENV)-bench
	$(BIN)/uv pip install --quiet --python $(VENV)-bench/bin/python --compile-bytecode --editable '.[bench]'
	$(VENV)-bench/bin/python -m benchmarks.scale
	$(VENV)-bench/bin/python -m benchmarks.loader

docs: $(STAMP)
	@$(BIN)/python docs/reference.py build/docs

test-all: test
	@$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	@for dir in demo/*/cluster; do test ! -d $$dir || $(BIN)/python -m cluster.local down --dir $$dir --purge; done
	rm -rf demo .pytest_cache .ruff_cache .hypothesis build *.egg-info

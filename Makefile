# Each target makes what it needs in .venv; Python 3.11+ and git are enough to start.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/python -m uv

.DEFAULT_GOAL := help
.PHONY: help demo systems test test-slow lint format bench docs build lock clean

help:
	@echo "make demo   compare attentions on real photographs; report in runs/demo/report.html"
	@echo "make test   the whole test suite          make lint   style, types, room contract"
	@echo "make systems   train the demo of every system, with and without its mechanism"
	@echo "make bench  side-by-side benchmarks       make docs   the documentation site"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.run: $(BIN)/python pyproject.toml requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --constraint requirements.lock -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(UV) pip install --quiet --python $(BIN)/python --constraint requirements.lock -e ".[dev]"
	@touch $@

DEMO := runs/demo

demo: $(VENV)/.run
	$(BIN)/gridattn compare --recipe demo --out $(DEMO) --overwrite
	$(BIN)/gridattn predict classify --checkpoint $(DEMO)/models/neighborhood --unseen textures --out $(DEMO)/predict
	$(BIN)/gridattn show --image astronaut --attention neighborhood --checkpoint $(DEMO)/models/neighborhood --out $(DEMO)/show.png
	@echo "The report is $(DEMO)/report.html; predictions are in $(DEMO)/predict, the attention picture is $(DEMO)/show.png"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

systems: $(VENV)/.run
	$(BIN)/gridattn demos --out runs/systems

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/neighborhood.py --json runs/bench/neighborhood.json
	$(BIN)/python benchmarks/layers.py --json runs/bench/layers.json
	$(BIN)/python benchmarks/models.py --json runs/bench/models.json

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: $(VENV)/.dev
	$(BIN)/python -m build

lock: $(BIN)/python
	$(UV) pip compile --quiet --universal --python-version 3.11 --all-extras --no-header --no-annotate \
		--no-emit-index-url --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) build dist site runs .pytest_cache .ruff_cache .hypothesis

# `make help` lists what can be done. .venv is made on first need, and brought up to date when what it is made of
# changes; a second run starts at once.
PYTHON ?=
export PYTHON
export PATH := $(PATH):/usr/sbin:/sbin
BIN := .venv/bin
ARGS ?=
COMPILE := uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header $(UPGRADE)
EVERYTHING := --extra generation --extra fleet --extra gateway
MADE_OF := pyproject.toml tools/setup

.DEFAULT_GOAL := help
.PHONY: help demo test test-system check format bench bench-footprint requirements clean

help: ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | expand -t 20

demo: .venv/demo.stamp ## Show the whole flow on this machine, on real parts
	@$(BIN)/python -m examples.demo $(ARGS)

test: .venv/dev.stamp ## Run every test (ARGS="-k word" picks some)
	@$(BIN)/python -m pytest -m "not quiet_machine" $(ARGS)

test-system: .venv/dev.stamp ## Run the tests that need the machine for themselves
	@$(BIN)/python -m pytest -m quiet_machine $(ARGS)

check: .venv/dev.stamp ## Lint, formatting, types, import contracts, text rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_text.py

format: .venv/dev.stamp ## Write the formatting that `make check` asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: bench-footprint ## Measure every claim that has a benchmark

bench-footprint: .venv/demo.stamp ## Memory, start time and size of an idle agent
	@$(BIN)/python bench/footprint.py

requirements: ## Pin again what pyproject.toml asks for (UPGRADE=--upgrade: the newest); needs uv
	$(COMPILE) $(EVERYTHING) --group test --group check -o requirements/dev.txt
	$(COMPILE) -c requirements/dev.txt $(EVERYTHING) --group demo -o requirements/demo.txt
	$(COMPILE) -c requirements/dev.txt --extra generation -o requirements/box.txt
	$(COMPILE) -c requirements/dev.txt --extra gateway -o requirements/gateway.txt
	$(COMPILE) --extra tflite -o requirements/tflite.txt
	sed -i '1i # Made by `make requirements`.' requirements/*.txt

clean: ## Remove everything that make has made, .venv too
	rm -rf .venv .run build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/demo.stamp: requirements/demo.txt $(MADE_OF)
	@tools/setup demo

.venv/dev.stamp: requirements/dev.txt $(MADE_OF)
	@tools/setup dev

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
# An environment that has the reference already may be named instead of the one that is made.
REFERENCE ?= .venv/reference
REFERENCE_MADE := $(if $(filter .venv/reference,$(REFERENCE)),.venv/reference.stamp)

.DEFAULT_GOAL := help
.PHONY: bench-latency bench-throughput bench-peers bench-generation bench-soak-generation help demo test test-system check format bench bench-footprint bench-bindings bench-update bench-variants requirements clean test-reference reference test-arm64 test-mutants test-onnx-backend test-tflite-runtime

help: ## Show this list
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/\1\t\2/p' Makefile | expand -t 20

demo: .venv/demo.stamp ## Show the whole flow on this machine, on real parts
	@$(BIN)/python -m examples.demo $(ARGS)

test: .venv/dev.stamp ## Run every test (ARGS="-k word" picks some)
	@$(BIN)/python -m pytest -m "not quiet_machine" $(ARGS)

test-system: .venv/dev.stamp ## Run the tests that need the machine for themselves
	@$(BIN)/python -m pytest -m quiet_machine $(ARGS)

test-reference: .venv/dev.stamp $(REFERENCE_MADE) ## Compare with transformers live, on new models and questions (SEED=n)
	@rm -rf .run/reference
	@$(REFERENCE)/bin/python -m tests.reference.make .run/reference $(if $(SEED),--seed $(SEED)) $(ARGS)
	@$(BIN)/python -m tests.reference.compare .run/reference

reference: $(REFERENCE_MADE) ## Write the recorded models and answers of tests/reference again
	@$(REFERENCE)/bin/python -m tests.reference.make tests/reference/recorded --recorded --seed 1 --inputs 8 $(ARGS)

test-arm64: ## Run the tests of sessions and runtimes on an emulated Raspberry Pi 4 and 5 (root; ARGS="cortex-a72 -- tests")
	@tests/system/arm64 $(ARGS)

test-tflite-runtime: .venv/dev.stamp .venv/tflite.stamp ## Compare LiteRT and tflite-runtime on numpy 1 and 2 (Python 3.11)
	@.venv/tflite/bin/python -m tests.system.tflite_runtime .venv/bin/python

test-mutants: .venv/dev.stamp ## Damaged models beside a healthy one (ARGS="--trials 2000 --opened 50000": the long run)
	@$(BIN)/python -m tests.system.mutants $(ARGS)

test-onnx-backend: .venv/dev.stamp ## Run the ONNX project's backend suite against plain ONNX Runtime
	@$(BIN)/python -m tests.support.onnx_cases $(ARGS)

test-conformance: .venv/dev.stamp ## Let the public TUF conformance suite, checked out in SUITE=folder, judge what boxes trust
	@test -n "$(SUITE)" || { echo "make test-conformance SUITE=folder (a checkout of tuf-conformance)"; exit 1; }
	@command -v faketime >/dev/null || { echo "apt-get install faketime"; exit 1; }
	@test -d .venv/conformance || $(BIN)/python -m venv .venv/conformance
	@.venv/conformance/bin/python -m pip install --quiet -e $(SUITE)
	@.venv/conformance/bin/python -m pytest $(SUITE)/tuf_conformance --rootdir $(SUITE) $(ARGS) \
		--entrypoint "$(CURDIR)/$(BIN)/python -m cloud_sync.tuf_client"

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

bench-footprint: .venv/demo.stamp ## Memory, start time, idle load, unloading (ARGS=--long: 1,000 rounds)
	@$(BIN)/python bench/footprint.py $(ARGS)

bench-latency: .venv/dev.stamp ## What the box adds to one request over MQTT, and to the rate of many (ARGS=--long)
	@$(BIN)/python -m bench.latency $(ARGS)

bench-throughput: .venv/dev.stamp ## Processor time of a request at 32 in flight; large bodies to the worker (ARGS=--long)
	@$(BIN)/python -m bench.throughput $(ARGS)

PEERS := starlette litserve mlserver ray
bench-peers: .venv/dev.stamp $(PEERS:%=.run/peers/%.stamp) ## The same model behind MLServer, LitServe, Ray Serve and Starlette
	@$(BIN)/python -m bench.peers $(ARGS)

bench-bindings: .venv/dev.stamp ## What a sensor's message costs the agent
	@$(BIN)/python bench/bindings.py

bench-variants: .venv/dev.stamp ## Size, time and memory of well-known models in 32, 8 and 4 bits (makes them once)
	@test -d .run/bench-variants/wav2vec2-base || { \
		$(MAKE) .venv/reference.stamp && .venv/reference/bin/python bench/variants/make.py .run/bench-variants; }
	@$(BIN)/python bench/variants.py .run/bench-variants $(ARGS)

bench-update: .venv/dev.stamp ## Bytes of an update against xdelta3, bsdiff, zstd and casync (trains for half an hour once)
	@test -f .run/bench-update/head.safetensors || { \
		$(MAKE) .venv/reference.stamp && .venv/reference/bin/python bench/update/train.py .run/bench-update; }
	@$(BIN)/python bench/update.py .run/bench-update $(ARGS)

bench-generation: .venv/generation.stamp ## Text generation against onnxruntime-genai, ONNX Runtime and llama.cpp (ARGS=--long)
	@.venv/generation/bin/python -m bench.generation $(ARGS)

bench-soak-generation: .venv/dev.stamp ## Sixteen askers at one generating worker (ARGS=--long: ten minutes)
	@$(BIN)/python -m bench.soak_generation $(ARGS)

requirements: ## Pin again what pyproject.toml asks for (UPGRADE=--upgrade: the newest); needs uv
	$(COMPILE) $(EVERYTHING) --extra optimize --group test --group check -o requirements/dev.txt
	$(COMPILE) -c requirements/dev.txt $(EVERYTHING) --group demo -o requirements/demo.txt
	$(COMPILE) -c requirements/dev.txt --extra generation -o requirements/box.txt
	$(COMPILE) -c requirements/dev.txt --extra gateway -o requirements/gateway.txt
	$(COMPILE) --extra tflite -o requirements/tflite.txt
	cd tests/reference && uv pip compile requirements.in --quiet --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-header $(UPGRADE) -o requirements.txt
	cd bench/peers && for peer in $(PEERS); do uv --no-config pip compile requirements-$$peer.in --quiet --universal \
		--python-version 3.11 --generate-hashes --no-emit-index-url --no-header -o requirements-$$peer.txt $(UPGRADE); done
	cd bench/generation_peers && uv pip compile requirements.in --quiet --python-version 3.11 --generate-hashes \
		--no-header --output-file requirements.txt $(UPGRADE)
	sed -i '1i # Made by `make requirements`.' requirements/*.txt tests/reference/requirements.txt bench/generation_peers/requirements.txt

clean: ## Remove everything that make has made, .venv too
	rm -rf .venv .run build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.run/peers/%.stamp: bench/peers/requirements-%.txt
	@rm -rf .run/peers/$*
	@$(BIN)/python -m venv .run/peers/$*
	@.run/peers/$*/bin/python -m pip install --quiet --no-input --disable-pip-version-check --require-hashes -r $<
	@touch $@

.venv/generation.stamp: bench/generation_peers/requirements.txt
	.venv/bin/python -m venv --clear .venv/generation
	.venv/generation/bin/python -m pip install --quiet --require-hashes -r $<
	@touch $@

.venv/reference.stamp: tests/reference/requirements.txt
	.venv/bin/python -m venv --clear .venv/reference
	.venv/reference/bin/python -m pip install --quiet --require-hashes -r $<
	@touch $@

# tflite-runtime stops at Python 3.11.
.venv/tflite.stamp: requirements/tflite.txt
	@.venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "This needs a .venv of Python 3.11.")'
	.venv/bin/python -m venv --clear .venv/tflite
	.venv/tflite/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r $<
	@touch $@

.venv/demo.stamp: requirements/demo.txt $(MADE_OF)
	@tools/setup demo

.venv/dev.stamp: requirements/dev.txt $(MADE_OF)
	@tools/setup dev

# Run the model once, then train from disk. `make help` lists the targets.

PYTHON  ?= $(shell command -v python3.11 || echo python3)
VENV    ?= .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready

MODEL        ?= smollm2-135m
DATASET      ?= news
TOKENS       ?= 200000
EVAL_TOKENS  ?= 40000
LAYERS       ?= auto
CONTEXT      ?= 512
CODEC        ?= delta
STORE        ?= runs/$(notdir $(MODEL))-$(notdir $(DATASET)).zarr
RUNS         ?= runs/saes
SAES         ?= routesae topk
LATENTS      ?= 4608
K            ?= 32
EPOCHS       ?= 4
BATCH_TOKENS ?= 1024
RESULTS      ?= runs/eval.json
EXPERIMENT   ?= experiments/demo.toml
TIMES        ?= 1

.DEFAULT_GOAL := help
.PHONY: help install harvest train evaluate demo test test-cluster test-faults check format clean

help: ## list the targets and variables
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo
	@echo "  Variables, for example: make train MODEL=llama-3.2-1b DATASET=openwebtext2 TOKENS=100000000"
	@grep -E '^[A-Z_]+ +\?=' $(MAKEFILE_LIST) | sed 's/^/    /'

install: $(READY) ## make .venv and install everything, pinned

$(READY): pyproject.toml constraints.txt requirements-demo.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.txt
	touch $@

harvest: $(READY) ## run the model once and fill the store
	$(BIN)/routesae harvest --model $(MODEL) --dataset $(DATASET) --tokens $(TOKENS) \
	    --eval-tokens $(EVAL_TOKENS) --layers $(LAYERS) --context $(CONTEXT) --codec $(CODEC) \
	    --out $(STORE)

train: harvest ## train the SAEs from the store, all in one pass
	$(BIN)/routesae train $(STORE) $(addprefix --sae ,$(SAES)) --latents $(LATENTS) --k $(K) \
	    --epochs $(EPOCHS) --batch-tokens $(BATCH_TOKENS) --out $(RUNS) --resume

evaluate: train ## measure every run on held-out tokens
	$(BIN)/routesae evaluate $(STORE) $(RUNS)/* --json $(RESULTS)

demo: $(READY) ## a whole experiment on a small real model and real news, to a report
	$(BIN)/routesae pipeline $(EXPERIMENT)

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile

test-cluster: $(READY) ## run the tests on a local Ray cluster (three minutes; pip install '.[ray]')
	$(BIN)/python -m pytest tests/cluster

test-faults: $(READY) ## kill (TIMES= more often), fill the disk, tear, attack: docs/RELIABILITY.md
	FAULT_TIMES=$(TIMES) $(BIN)/python -m pytest tests/faults -n auto --dist loadfile

check: $(READY) ## formatting, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist loadfile

format: $(READY) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and caches, keep runs/
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

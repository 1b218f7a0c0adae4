# hocket. `make help` lists the targets; each makes its own environment in .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help env demo test lint format bench parablock async cllora lora seeds fleet clean

help:  ## this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(READY)  ## the environment in .venv, with everything tests and demo need

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hocket needs Python 3.11 or newer; try make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(READY)

demo: $(READY)  ## fine-tune SmolLM2-135M on four teams' code, once waiting and once not; writes runs/demo/compare.html
	$(BIN)/python -m hocket models pull smollm2-135m-instruct
	$(BIN)/python recipes/demo.py

test: $(READY)  ## all tests (under 15 minutes on two cores)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check src tests benchmarks recipes
	$(BIN)/ruff format --check src
	$(BIN)/mypy

format: $(READY)  ## let ruff rewrite the sources
	$(BIN)/ruff check --fix src tests benchmarks recipes
	$(BIN)/ruff format src

bench: $(READY)  ## the benchmarks; each prints ratios measured in one run and writes benchmarks/results/
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

parablock: $(READY)  ## ParaBlock's comparison on SmolLM2, resumable (about two hours on two cores; see docs/parablock.md)
	$(BIN)/python -m hocket models pull smollm2-135m-instruct
	$(BIN)/python -m hocket compare benchmarks/parablock/*.toml --jobs 2 --results benchmarks/parablock/results
	$(BIN)/python benchmarks/parablock/report.py

async: $(READY)  ## the asynchronous schedules compared, resumable (about two hours on two cores; see docs/asynchronous.md)
	$(BIN)/python -m hocket models pull smollm2-135m-instruct
	$(BIN)/python -m hocket models pull minilm-l6-v2
	test -f runs/gpt2-small/provenance.json || $(BIN)/python benchmarks/async/train_gpt2.py
	$(BIN)/python -m hocket compare benchmarks/async/*.toml --jobs 2 --results benchmarks/async/results
	$(BIN)/python benchmarks/async/report.py

lora: $(READY)  ## LoRA for clients of unequal ranks, resumable (about an hour and a half on two cores; see docs/unequal-ranks.md)
	$(BIN)/python -m hocket models pull minilm-l6-v2
	$(BIN)/python -m hocket compare benchmarks/lora/*.toml --jobs 2 --results benchmarks/lora/results
	$(BIN)/python benchmarks/lora/report.py

seeds: $(READY)  ## full-parameter tuning in kilobytes, resumable (about three hours on two cores; see docs/kilobytes.md)
	$(BIN)/python -m hocket models pull minilm-l6-v2
	test -f runs/gpt2-small/provenance.json || $(BIN)/python benchmarks/async/train_gpt2.py
	for studies in "sst2-skewed sst2-iid" "qqp-skewed qqp-iid mrpc-skewed mrpc-iid rte-skewed rte-iid" beyond-sst2 beyond-sst2-iid dolly; do \
	  $(BIN)/python -m hocket compare $$(printf 'benchmarks/seeds/%s.toml ' $$studies) --jobs 2 \
	    --results benchmarks/seeds/results || exit 1; done
	$(BIN)/python benchmarks/seeds/report.py

cllora: $(READY)  ## texts unequal among clients, resumable (about half an hour; see docs/cllora.md)
	test -f runs/gpt2-small/provenance.json || $(BIN)/python benchmarks/async/train_gpt2.py
	test -f runs/gpt2-tiny/provenance.json || $(BIN)/python benchmarks/async/train_gpt2.py --width 64 --layers 2 --steps 1000 --test none --out runs/gpt2-tiny
	$(BIN)/python -m hocket compare benchmarks/cllora/*.toml --jobs 1 --results benchmarks/cllora/results
	$(BIN)/python benchmarks/cllora/local.py
	$(BIN)/python benchmarks/cllora/report.py

fleet: $(READY)  ## a real fleet over shaped links, beside what simulate says (as root; about 45 minutes; see docs/deployment.md)
	nice -n -10 $(BIN)/python benchmarks/deploy/overlap.py

clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache

# One-line help per target: `make`.
PROFILE ?= cpu
SEED ?= 17
PYTHON ?= python3
BIN := .venv/bin
# keeps outputs of notebooks, takes away what a machine leaves in them
STRIP := $(BIN)/nbstripout --keep-output --keep-count --keep-id \
	--extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.language_info.version"

.DEFAULT_GOAL := help
.PHONY: help setup lock reproduce study smoke test test-browser bench gpu lint lab notebooks readme book clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or later is needed; set PYTHON=python3.11'"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch .venv/ready

setup: .venv/ready ## the environment in .venv

lock: ## constraints.txt anew: what pip resolves for pyproject.toml in an environment made for it
	$(PYTHON) -m venv .lock
	.lock/bin/python -m pip install --quiet '.[test]'
	{ head -1 constraints.txt; .lock/bin/python -m pip freeze --all --exclude pip --exclude elva-workbook; } > .lock/constraints.txt
	mv .lock/constraints.txt constraints.txt && rm -rf .lock

reproduce: .venv/ready ## the whole chain [PROFILE=cpu] [SEED=17]; prints the result table
	$(BIN)/python -m elva_core run $(PROFILE) --seed $(SEED)

study: .venv/ready ## every arm of params/arms.yaml over several seeds [PROFILE=cpu]; resumable
	$(BIN)/python -m elva_core study $(PROFILE) --seed $(SEED)

smoke: ## the chain at plumbing size
	$(MAKE) reproduce PROFILE=smoke

test: .venv/ready ## unit tests, then every notebook at smoke size
	rm -rf outputs/smoke
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --nbval-lax notebooks --nbval-cell-timeout 300 --nbval-current-env --no-header
	$(BIN)/python -m pytest --no-header tests/experiments/test_keys.py -k smoke_run

CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
NO_CHROMIUM = Chromium is missing. As root: apt-get install chromium. Elsewhere: make test-browser CHROMIUM=/path/to/it

test-browser: .venv/ready ## every notebook in JupyterLab in a real browser, the explorer, and the book
	test -n "$(CHROMIUM)" || $(if $(filter 0,$(shell id -u)),,sudo) sh -c "apt-get update && apt-get install -y chromium" || { echo "$(NO_CHROMIUM)"; exit 1; }
	$(BIN)/python -m pip install --quiet -e '.[test,browser]'
	CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest -m browser tests/apps/test_browser.py

bench: .venv/ready ## speed and memory of stage 3, of decoding and of the search, against TRL, generate and FAISS, into outputs/bench
	$(BIN)/python bench/rl.py
	$(BIN)/python bench/decode.py
	$(BIN)/python bench/search.py

gpu: ## right and fast on the card of this machine? eight minutes, with the Python that is there [PYTHON=python3]
	PYTHONPATH=$(CURDIR) $(PYTHON) bench/gpu

lint: .venv/ready ## style of code and notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(STRIP) --verify notebooks/*.ipynb

lab: .venv/ready ## JupyterLab in the notebooks folder
	$(BIN)/jupyter lab --notebook-dir notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

# the kernelspec python3 of .venv comes before any of that name elsewhere
export JUPYTER_PATH := $(CURDIR)/.venv/share/jupyter:$(JUPYTER_PATH)
# transformers announces its next major version in every kernel
export PYTHONWARNINGS := ignore::FutureWarning
export TQDM_DISABLE := 1

notebooks: .venv/ready ## re-execute the notebooks at smoke size and store their outputs
	for notebook in notebooks/*.ipynb; do $(BIN)/jupyter execute --inplace $$notebook || exit 1; done
	$(STRIP) notebooks/*.ipynb

readme: .venv/ready ## the report's texts and README's blocks anew from the tables of outputs/cpu/seed-17/90_report
	$(BIN)/python -m elva_core readme cpu

book: .venv/ready ## executed notebooks and report as a static site [PROFILE=cpu] [SEED=17]
	$(BIN)/python -m elva_core book $(PROFILE) --seed $(SEED)

clean: ## everything that was computed, except the committed reference run
	rm -rf outputs/cache outputs/smoke

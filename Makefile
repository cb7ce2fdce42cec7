# The verbs of the project; no logic lives here. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SPECS ?= models/smollm2-135m.yaml models/minilm-l6.yaml
REPOSITORY ?= model_repository
TOOLCHAIN ?= 26.07
CONTAINER ?= docker
GPU_KIT ?= build/gpu-kit
TEST_JOBS ?= 2
STAMP := $(VENV)/.setup-stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo engines serve bench benchmarks gpu-wheels bench-gpu test check image browser clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv with everything, exactly pinned

$(STAMP): pyproject.toml client/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable client --editable '.[build,serve,openai,tensorrt,dev]'
	@touch $(STAMP)

demo: setup ## the main job: checkpoint -> engines -> tritonserver -> answers -> comparison
	$(BIN)/enginesmith demo $(SPECS) --repository $(REPOSITORY)

engines: setup ## build and verify every engine of SPECS and publish them
	$(BIN)/enginesmith build $(SPECS) --publish $(REPOSITORY)

serve: setup ## run tritonserver on the published repository, on 127.0.0.1
	$(BIN)/enginesmith serve $(REPOSITORY)

bench: setup ## the standard profile against the demo's model in a tritonserver of its own, with a report
	$(BIN)/enginesmith build models/smollm2-135m.yaml --variant int4-awq --publish $(REPOSITORY)
	$(BIN)/enginesmith bench smollm2-135m-int4-awq --repository $(REPOSITORY) --profile standard --slo models/smollm2-135m.yaml

benchmarks: setup ## the benchmarks of the served models, recorded in benchmarks/results (others by name: benchmarks/README.md)
	$(BIN)/python benchmarks/run.py

browser: ## Chromium, in which the tests open reports: kept if one is there, else installed by apt-get as root
	@sh tests/perf/browser.sh

gpu-wheels: setup ## wheels and models for bench-gpu, into GPU_KIT; needs a package registry, no GPU
	$(BIN)/python benchmarks/gpu_kit.py --kit $(GPU_KIT)

bench-gpu: ## the standard profile through onnxruntime-genai CUDA, from GPU_KIT; needs a GPU, no network (docs/bench-gpu.md)
	$(PYTHON) benchmarks/gpu.py --kit $(GPU_KIT)

test: setup browser ## run every test, TEST_JOBS files at the same time
	$(BIN)/python -m pytest --numprocesses $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

check: setup ## formatting, lint, types, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/enginesmith schema --check docs/spec.schema.json

image: ## the production server image, from NVIDIA's; needs docker (or CONTAINER=podman)
	@$(CONTAINER) version >/dev/null 2>&1 || { echo "error: make image needs a container tool, and '$(CONTAINER) version' fails: it is not installed or its daemon does not answer (another one: make image CONTAINER=podman)" >&2; exit 1; }
	$(CONTAINER) build --file Dockerfile.triton --build-arg BASE_TAG=$(TOOLCHAIN) --tag enginesmith-triton:$(TOOLCHAIN) .

clean: ## remove what builds and tests left behind (keeps .venv and published models)
	rm -rf .enginesmith .pytest_cache .mypy_cache .ruff_cache build dist

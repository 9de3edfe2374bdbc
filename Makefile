# Everything runs from .venv and keeps its state under .preheat/; neither root nor a home folder is needed.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.preheat-installed
IPEX_BIN := .venv-ipex/bin
IPEX_STAMP := .venv-ipex/.preheat-installed
PEERS_STAMP := .venv-peers/.preheat-installed

CHROMIUM ?= /usr/bin/chromium

CONFIG ?= model-config/tiny-sdxl.yaml
MODEL ?=
NAME ?=
OUT ?= .preheat/archives
FORMAT ?= zip-store
BACKEND ?= auto
EXTERNAL ?=
AOT ?=
VERSION ?=
WATCH ?=
WAIT ?= 1800
PROFILE ?= tiny
CSV ?=
COUNT ?= 10000
SEED ?=
BENCH_OPTIONS ?=
PLAN_OPTIONS ?=
FIT_OPTIONS ?=
DOCTOR_OPTIONS ?=
PROFILE_OPTIONS ?=
INIT_OPTIONS ?=

INFERENCE_PORT ?= 8080
MANAGEMENT_PORT ?= 8081
METRICS_PORT ?= 8082
GRPC_PORT ?= 7070
GRPC_MANAGEMENT_PORT ?= 7071
GATEWAY_PORT ?= 8000
GATEWAY ?= 1

# Idle OpenMP threads sleep sooner: on few cores, spinning ones slow down whoever shares the machine by a factor.
export GOMP_SPINCOUNT ?= 1000

# Longest first, and the servers of the end-to-end tests in one process: tests/by_server.py.
TWO_PROCESSES := -n 2 --no-loadscope-reorder

# What torch 2.8 can change, and IPEX itself: not YAML, bytes, processes, commands, documents, plans,
# what trains the examples, what may lie in a share and what an allocation that fails leaves behind.
IPEX_TESTS := tests/test_device.py tests/test_handler.py tests/config/test_pt2_forms.py \
	tests/benchmarks/test_bench_cpu.py tests/e2e/test_cpu_roads.py \
	$(filter-out $(addprefix tests/,$(addsuffix /,benchmarks browser cli config e2e examples gateway gpu planning protocol \
	preflight torchserve __pycache__)),$(wildcard tests/*/))
IPEX_LEAVES_OUT := $(addprefix --ignore=tests/,cache/test_bundle.py cache/test_cache_faults.py \
	cache/test_share.py cache/test_trust.py $(addprefix models/diffusion/test_,faults.py geometry.py images.py request.py))

MODEL_OPTION = $(if $(MODEL),--model '$(MODEL)')
NAME_OPTION = $(if $(NAME),--name '$(NAME)')
PORT_OPTIONS = --inference-port $(INFERENCE_PORT) --management-port $(MANAGEMENT_PORT) --metrics-port $(METRICS_PORT) \
	--grpc-port $(GRPC_PORT) --grpc-management-port $(GRPC_MANAGEMENT_PORT) \
	--gateway-port $(GATEWAY_PORT) $(if $(filter 0,$(GATEWAY)),--no-gateway)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint test-fit fuzz check doctor profile init serve ready status stop archive plan bench-traffic bench-load bench-gateway \
	bench-forecast bench-peers bench-start bench-cpu bench-gpu bench-quality test-browser train-shapes train-text setup-ipex setup-peers test-ipex \
	reference clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# An existing .venv is kept; pip runs again whenever what is asked for has changed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(IPEX_STAMP): pyproject.toml constraints-ipex.txt
	test -x $(IPEX_BIN)/python || $(PYTHON) -m venv .venv-ipex
	$(IPEX_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-ipex.txt -e '.[dev,ipex]'
	touch $@

$(PEERS_STAMP): constraints-peers.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-peers.txt \
		optimum-intel openvino-genai torch diffusers
	touch $@

demo: $(STAMP) ## build, archive, warm and ask a tiny model, results land in out/: [MODEL=sdxl|bert|resnet] [BACKEND=inductor]
	$(BIN)/preheat demo $(MODEL_OPTION) --backend '$(BACKEND)'

test: lint ## lint, types and every test
	$(BIN)/python -m pytest $(TWO_PROCESSES)

lint: $(STAMP) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict handler tests bench examples

setup-ipex: $(IPEX_STAMP) ## Intel's extension with torch 2.8 in an environment of its own, .venv-ipex (7 GB)

setup-peers: $(PEERS_STAMP) ## OpenVINO GenAI and what converts for it in an environment of its own, .venv-peers (for bench-peers)

# The page in a browser. axe-core looks for what people with a screen reader or a keyboard would meet.
test-browser: $(STAMP) ## the gateway's page in headless Chromium (CHROMIUM=, of the system)
	CHROMIUM='$(CHROMIUM)' $(BIN)/python -m pytest tests/browser

train-text: $(STAMP) ## train a tiny language model that adds, into examples/text/model: some minutes of one core
	PYTHONPATH=. $(BIN)/python -m examples.text.train examples/text/model

test-ipex: $(IPEX_STAMP) ## the tests that torch 2.8 can change, and IPEX inside a real TorchServe
	$(IPEX_BIN)/python -m pytest $(TWO_PROCESSES) $(IPEX_TESTS) $(IPEX_LEAVES_OUT)

test-fit: $(STAMP) ## pictures of all sizes with fit: mask, each compared with what diffusers alone paints: [FIT_OPTIONS=--family sdxl ...]
	PYTHONPATH=. $(BIN)/python tests/fit.py $(FIT_OPTIONS)

fuzz: $(STAMP) ## made-up requests against a tiny server: [COUNT=10000] [SEED=]
	$(BIN)/python tests/fuzz.py --count $(COUNT) $(if $(SEED),--seed '$(SEED)')

check: $(STAMP) ## verify what serve would, and start nothing: CONFIG= [MODEL=folder, hub id or tiny:sdxl] [NAME=] [INFERENCE_PORT=] ...
	$(BIN)/preheat check '$(CONFIG)' $(MODEL_OPTION) $(NAME_OPTION) $(PORT_OPTIONS)

doctor: $(STAMP) ## say what would go wrong in production, and what mends it: CONFIG= [MODEL=] [DOCTOR_OPTIONS=]
	$(BIN)/preheat doctor '$(CONFIG)' $(if $(MODEL),'$(MODEL)') $(DOCTOR_OPTIONS)

profile: $(STAMP) ## say where the time of a request goes, and what compiling gains at most: CONFIG= [MODEL=] [PROFILE_OPTIONS=]
	$(BIN)/preheat profile '$(CONFIG)' $(if $(MODEL),'$(MODEL)') $(PROFILE_OPTIONS)

init: $(STAMP) ## write a YAML for a model folder, with timeouts that are measured: MODEL= [CSV=] [INIT_OPTIONS=]
	$(BIN)/preheat init '$(MODEL)' $(if $(CSV),--csv '$(CSV)') $(INIT_OPTIONS)

serve: $(STAMP) ## start TorchServe and the gateway: CONFIG=x.yaml or x.mar [MODEL=folder, hub id or tiny:sdxl] [NAME=] [GATEWAY_PORT=] ...
	$(BIN)/preheat serve '$(CONFIG)' $(MODEL_OPTION) $(NAME_OPTION) $(PORT_OPTIONS)

ready: $(STAMP) ## wait until every worker is warm: [NAME=] [WAIT=seconds]
	$(BIN)/preheat ready $(NAME_OPTION) --wait $(WAIT)

status: $(STAMP) ## show workers, queue, restarts and what serves each bucket: [NAME=] [WATCH=1]
	$(BIN)/preheat status $(NAME_OPTION) $(if $(WATCH),--watch)

stop: $(STAMP) ## stop the server that make serve started: [NAME=]
	$(BIN)/preheat stop $(NAME_OPTION)

archive: $(STAMP) ## package a model: CONFIG= [MODEL=folder, hub id or tiny:sdxl] [OUT=folder] [FORMAT=zip-store|default|no-archive] [EXTERNAL=1] [AOT=1] [VERSION=1.0]
	$(BIN)/preheat archive '$(CONFIG)' $(MODEL_OPTION) --output '$(OUT)' --format $(FORMAT) $(if $(EXTERNAL),--external) $(if $(AOT),--aot) $(if $(VERSION),--version '$(VERSION)')

plan: $(STAMP) ## choose buckets for the sizes that are asked for, and prove it: [CSV=height,width[,count]] [NAME=] [PLAN_OPTIONS=]
	$(BIN)/preheat plan $(if $(CSV),--csv '$(CSV)') $(NAME_OPTION) $(PLAN_OPTIONS)

bench-traffic: $(STAMP) ## compare the strategies under the same traffic: [PROFILE=tiny|small|sdxl] [CSV=height,width[,count]] [BENCH_OPTIONS=]
	$(BIN)/python -m bench.traffic --profile '$(PROFILE)' $(if $(CSV),--csv '$(CSV)') $(BENCH_OPTIONS)

bench-load: $(STAMP) ## closed and open loops of real clients against the bare pipeline: [PROFILE=tiny|small|sdxl] [BENCH_OPTIONS=]
	$(BIN)/python -m bench.load --profile '$(PROFILE)' $(BENCH_OPTIONS)

bench-gateway: $(STAMP) ## what the gateway costs, and how near its queue comes to its simulation: [PROFILE=tiny|small|sdxl] [BENCH_OPTIONS=]
	$(BIN)/python -m bench.gateway --profile '$(PROFILE)' $(BENCH_OPTIONS)

bench-forecast: $(STAMP) ## whether make profile foretells what a served request takes: [PROFILE=tiny|small] [BENCH_OPTIONS=]
	$(BIN)/python -m bench.forecast --profile '$(PROFILE)' $(BENCH_OPTIONS)

bench-start: $(STAMP) ## time to READY and first image: eager, cold, local, shared and shipped cache: [PROFILE=tiny|small|sdxl] [BENCH_OPTIONS=]
	$(BIN)/python -m bench.start --profile '$(PROFILE)' $(BENCH_OPTIONS)

bench-cpu: $(STAMP) ## the engines of a CPU side by side on two UNets, a CNN and an encoder; IPEX if make setup-ipex ran: [BENCH_OPTIONS=]
	$(BIN)/python -m bench.cpu $(BENCH_OPTIONS)

bench-peers: $(STAMP) ## Preheat against diffusers, OpenVINO GenAI (if make setup-peers ran) and BaseHandler: [PROFILE=tiny|small] [BENCH_OPTIONS=]
	$(BIN)/python -m bench.peers --profile '$(PROFILE)' $(BENCH_OPTIONS)

bench-quality: $(STAMP) ## what each fit, engine and strategy does to pictures, by a judge without a network, resumed until finished: [BENCH_OPTIONS=]
	$(BIN)/python -m bench.quality $(BENCH_OPTIONS)

bench-gpu: $(STAMP) ## tests/gpu and an SDXL of real size on every road of a CUDA GPU, resumed until finished: [BENCH_OPTIONS=]
	$(BIN)/python -m bench.gpu $(BENCH_OPTIONS)

# Two processes share the pictures of a step; a run that was stopped goes on from its last checkpoint.
train-shapes: $(STAMP) ## train the demo's model anew: two to three hours on two cores, resumed until finished
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m examples.shapes.train .preheat/shapes \
		--out examples/shapes/model

reference: $(STAMP) ## write docs/configuration.md anew from the config's docstrings
	$(BIN)/python -m preheat.config.reference > docs/configuration.md

clean: ## remove everything made here but .venv: caches, unfinished training and benches too
	@! ls .preheat/run/*/server.json >/dev/null 2>&1 || { echo 'a server still runs: make stop'; exit 1; }
	rm -rf .preheat out .hypothesis .mypy_cache .pytest_cache .ruff_cache handler/*.egg-info

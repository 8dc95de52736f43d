# Two commands to start with: `make demo` and `make test`. Everything runs in .venv, made from pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TYPESCRIPT := clients/typescript
LISTEN ?= 127.0.0.1:50051
MODEL ?=
DRAFT ?=
ARGS ?=
VARIANT ?= cpu
IMAGE ?= dspark-serve:0.1.0$(if $(filter cuda,$(VARIANT)),-cuda)

.PHONY: demo serve real test lint types bench bench-load bench-peers bench-kernels bench-round lossless report soak fuzz proto release-proto typescript proto-typescript image chart clean

demo: $(VENV)/serve.stamp
	@$(BIN)/python -m clients demo

serve: $(VENV)/serve.stamp
	@$(BIN)/python -m server --listen $(LISTEN) $(if $(MODEL),--model $(MODEL)) $(if $(DRAFT),--draft $(DRAFT)) $(ARGS)

# Gemma 3 270M from a package, converted once into the user's cache folder. Its terms are shown and kept beside it.
real: $(VENV)/real.stamp
	@model=$$($(BIN)/python -m engine.models.real) && \
		exec $(BIN)/python -m server --listen $(LISTEN) --model "$$model" --draft $(or $(DRAFT),none) $(ARGS)

test: $(VENV)/dev.stamp lint types
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd proto && ../$(BIN)/buf lint && ../$(BIN)/buf breaking --against released.binpb

types: $(VENV)/dev.stamp
	$(BIN)/mypy engine kernels server clients docker

bench: $(VENV)/dev.stamp
	@$(BIN)/python -m tests.bench $(ARGS)

bench-load: $(VENV)/dev.stamp
	@$(BIN)/python -m tests.bench.load $(ARGS)

# Each peer has an environment of its own below build/peers, made the first time (5 GB in all). Terms of Gemma: see `make real`.
bench-peers: $(VENV)/dev.stamp $(VENV)/real.stamp
	@$(BIN)/python -m tests.bench.peers install
	@$(BIN)/python -m tests.bench.peers run $(ARGS)

bench-kernels: $(VENV)/dev.stamp
	@$(BIN)/python -m tests.bench.kernels $(ARGS)

bench-round: $(VENV)/dev.stamp
	@$(BIN)/python -m tests.bench.round $(ARGS)

lossless: $(VENV)/dev.stamp
	@$(BIN)/python -m tests.lossless $(ARGS)

report: $(VENV)/train.stamp
	$(BIN)/python -m engine.training compare --config engine/demo/recipes/report.toml $(ARGS)

soak: $(VENV)/dev.stamp
	@$(BIN)/python -m tests.soak $(ARGS)

fuzz: $(VENV)/dev.stamp
	@$(BIN)/python -m tests.fuzz $(ARGS)

proto: $(VENV)/dev.stamp
	$(BIN)/python proto/build.py

# From now on, what the .proto files say must stay: `make lint` refuses changes that break a client of it.
release-proto: $(VENV)/dev.stamp
	cd proto && ../$(BIN)/buf breaking --against released.binpb
	cd proto && ../$(BIN)/buf build --exclude-source-info -o released.binpb

image:
	docker build -f docker/Dockerfile --build-arg VARIANT=$(VARIANT) -t $(IMAGE) .

chart: $(VENV)/dev.stamp
	@$(BIN)/python -m tests.deploy.chart $(ARGS)

# The TypeScript client, which `make test` then tests, too. Needs Node.js 20 or newer with npm.
typescript: $(TYPESCRIPT)/node_modules/.package-lock.json
	cd $(TYPESCRIPT) && npm run --silent build

proto-typescript: $(VENV)/dev.stamp $(TYPESCRIPT)/node_modules/.package-lock.json
	$(BIN)/python proto/build_typescript.py

$(TYPESCRIPT)/node_modules/.package-lock.json: $(TYPESCRIPT)/package.json $(TYPESCRIPT)/package-lock.json
	cd $(TYPESCRIPT) && npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/serve.stamp: requirements/serve.txt | $(VENV)/bin/python
	@echo "installing pinned packages into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/serve.txt
	@touch $@

$(VENV)/dev.stamp: requirements/dev.txt $(VENV)/serve.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@touch $@

$(VENV)/real.stamp: requirements/real.txt $(VENV)/serve.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/real.txt
	@touch $@

$(VENV)/train.stamp: requirements/train.txt $(VENV)/serve.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/train.txt
	@touch $@

clean:
	rm -rf $(VENV) $(TYPESCRIPT)/node_modules $(TYPESCRIPT)/dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

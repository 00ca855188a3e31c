# Every target makes what it needs in .venv; nothing else has to be installed but Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST_PROCESSES ?= 2

.PHONY: demo test test-engines test-kubernetes test-monitoring test-image check lint proto fuzz bench image clean

demo: $(VENV)/.demo ## the main job: simulated engines, the picker and a real Envoy under a chat workload
	$(BIN)/epp demo $(DEMO_FLAGS)

test: $(VENV)/.dev ## every test, with coverage, in two processes (TEST_PROCESSES=0: in one)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_FLAGS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --skip-covered

test-engines: $(VENV)/.dev ## against real vLLM, Triton, SGLang (installed on first use) and llama.cpp: tests/engines/README.md
	$(BIN)/python -m pytest tests/engines $(PYTEST_FLAGS)

test-kubernetes: $(VENV)/.dev ## against a real API server, by KUBE_APISERVER_DIR or TEST_KUBECONFIG: tests/kubernetes/README.md
	$(BIN)/python -m pytest tests/kubernetes $(PYTEST_FLAGS)

test-monitoring: $(VENV)/.dev ## a real Prometheus (fetched with apt-get on first use): every dashboard query, every alert
	$(BIN)/python -m pytest tests/monitoring $(PYTEST_FLAGS)

test-image: $(VENV)/.dev ## builds and runs the image without a daemon (root, buildah, debootstrap or EPP_IMAGE_BASE)
	$(BIN)/python -m pytest tests/cluster $(PYTEST_FLAGS)

image: ## the container image, with docker, podman or buildah: make image IMAGE=registry.example/epp:1
	deploy/image/build.sh $(or $(IMAGE),envoy-endpoint-picker:dev) $(IMAGE_FLAGS)

check: lint test ## what CI runs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: $(VENV)/.dev ## regenerate epp/_pb from proto/
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=epp/_pb --pyi_out=epp/_pb proto/*.proto

fuzz: $(VENV)/.dev ## a million inputs for the codec, the session, the parsers and the HTTP/2 connection; the property tests with new ones
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[fuzz]' || echo "no atheris for this Python: fuzzing without coverage guidance"
	$(BIN)/python -m tests.fuzz.run --inputs 1000000
	$(BIN)/python -m pytest -q -m hypothesis --hypothesis-profile=default

bench: $(VENV)/.dev ## a selection of the measurements in bench/, about three minutes
	$(BIN)/python -m bench overhead --quick
	$(BIN)/python -m bench decide --endpoints 16,1000 --prompt-tokens 1000,32000
	$(BIN)/python -m bench scrape --endpoints 100
	$(BIN)/python -m bench replay --scenario shared-prompts,agents,hot-prefix,lora,replica-loss \
	  --policies cost-aware,llm-d,lmetric,lpwl,aibrix,round-robin --seeds 2
	$(BIN)/python -m bench replay --flow priority,cold-burst --policies off,default,holdback --replicas 4 --seeds 1

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo]'
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .coverage* htmlcov .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

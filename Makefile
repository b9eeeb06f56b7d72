# The two commands of a newcomer: `make demo` and `make test`. Everything lands in .venv and demo/.
PYTHON ?= python3
ENV := .venv
BIN := $(ENV)/bin
# PyPI's torch for Linux brings several GB of CUDA; this index has the CPU build.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# The server's binary, for x86-64 with glibc 2.35 or newer; its dependencies are those of a Python part that stays unused.
TRITONSERVER ?= nvidia-pytriton==0.7.0
PIP := $(BIN)/python -m pip install --disable-pip-version-check --retries 2
BUNDLE := src/volcast/models/hippocampus
SAMPLE := $(BIN)/volcast sample demo/artifact --steps 50 --guidance 2 --seed 1

.PHONY: env demo test lint clean
env: $(ENV)/dev

# Once for each of the two, since every editable install compiles the extension again.
define install
	@echo "== environment: $(ENV), $(2), a few minutes"
	$(PYTHON) -m venv $(ENV)
	$(PIP) --extra-index-url $(TORCH_INDEX) "$(TORCH)"
	$(PIP) -e ".[$(1)]"
endef

$(ENV)/ready: setup.py pyproject.toml $(wildcard csrc/*)
	$(call install,bench,about 1 GB on disk)
	@touch $@

$(ENV)/dev: setup.py pyproject.toml $(wildcard csrc/*)
	$(call install,dev,with what the tests need: about 3 GB on disk)
	$(PIP) --no-deps "$(TRITONSERVER)"
	@touch $(ENV)/ready $@

demo: $(ENV)/ready
	@echo "== export the bundled model (about a minute)"
	rm -rf demo && mkdir demo
	$(BIN)/volcast export $(BUNDLE) -o demo/artifact
	@echo "== compare it with MONAI"
	$(BIN)/volcast verify demo/artifact $(BUNDLE)
	@echo "== four samples"
	$(SAMPLE) -n 4 --condition anterior=0.2 --condition posterior=0.8 -o demo/sample.nii.gz --png demo/samples.png
	@echo "== look at demo/samples.png, or at demo/sample_0.nii.gz in any NIfTI viewer"

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

clean:
	rm -rf $(ENV) demo build src/volcast.egg-info src/volcast/_core*.so

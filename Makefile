# `make serve` and `make test` each work as the first command on a fresh clone.
# On an NVIDIA GPU: make serve EXTRAS=server,cuda13. On a TPU: make serve EXTRAS=server,tpu.
VENV := .venv
EXTRAS ?= server
BIN := $(VENV)/bin
# Without an extra for a device jax must not look for one: the tests' packages can compile for devices that are not there.
PLATFORM := $(if $(findstring cuda,$(EXTRAS))$(findstring tpu,$(EXTRAS)),,JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu})

.PHONY: serve test test-slow test-gpu check format clean

serve: $(VENV)/installed-$(EXTRAS)
	$(PLATFORM) $(BIN)/python -m server $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu:
	python3 -m pytest -m gpu tests/kernels/gpu tests/paged/test_on_gpu.py $(ARGS)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@for python in python3 python3.12 python3.13; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	    echo "creating $(VENV) with $$($$python --version)"; exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	if command -v uv >/dev/null; then exec uv venv --seed $(VENV); fi; \
	echo "paged needs Python 3.12 or newer: install it (for example: pyenv install 3.12) and run make again" >&2; exit 1

$(VENV)/installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info

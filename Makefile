# Two commands need nothing but Python 3.11+, git and make: `make train` and `make test`.
# Both build .venv first, once, and again when pyproject.toml or constraints.txt change.

# The first interpreter on PATH that is new enough and can make virtual environments.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell $p -c 'import ensurepip, sys; print("$p" * (sys.version_info >= (3, 11)))' 2>/dev/null)))
comma := ,
# Attention from cuDNN's front end is for machines with an NVIDIA driver only.
EXTRAS := dev$(if $(shell command -v nvidia-smi),$(comma)cuda)

INSTALLED := .venv/installed
RUN := .venv/bin/python

# The model that `make train` trains, from the sources of the Python that runs it: under 3 minutes on two CPU cores.
MODEL ?= --data python --depth 4 --aspect-ratio 32 --head-dim 32 --max-seq-len 128 --device-batch-size 8 --total-batch-size 1024 --num-iterations 200
# Anything else for scripts.base_train, as in: make train FLAGS='--model-tag mine --save-every 50'
FLAGS ?=

.PHONY: train test lint clean

train: $(INSTALLED)
	$(RUN) -m scripts.base_train $(MODEL) $(FLAGS)

test: $(INSTALLED)
	$(RUN) -m pytest

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/mypy

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'make: no Python 3.11 or newer with ensurepip is on PATH; name one: make PYTHON=/path/to/python3' >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

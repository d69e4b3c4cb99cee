# Three commands need nothing but Python 3.11+, git and make: `make dry-run`, `make train` and `make test`.
# They build .venv first, once, and again when pyproject.toml or constraints.txt change.

# The first interpreter on PATH that is new enough and can make virtual environments.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell $p -c 'import ensurepip, sys; print("$p" * (sys.version_info >= (3, 11)))' 2>/dev/null)))
comma := ,
# Attention from cuDNN's front end is for machines with an NVIDIA driver only.
EXTRAS := dev$(if $(shell command -v nvidia-smi),$(comma)cuda)

INSTALLED := .venv/installed
RUN := .venv/bin/python

# The model that `make train` trains, from the sources of the Python that runs it: 2 minutes on two CPU cores.
# The rates are those of so small a batch: nanochat's rule scales them by sqrt(2048 / 2^19) = 1/16.
TOKENIZER := out/tokenizer-4096
MODEL ?= --model-tag quickstart --depth 4 --aspect-ratio 32 --head-dim 32 --max-seq-len 256 \
	--device-batch-size 8 --total-batch-size 2048 --num-iterations 250 --warmup-steps 20 \
	--matrix-lr 0.3 --embedding-lr 3 --unembedding-lr 0.08 --scalar-lr 1 \
	--eval-every 125 --core-metric-every -1
# Anything else for the script, as in: make train FLAGS='--model-tag mine --save-every 50', make dry-run FLAGS='--depth 24'
FLAGS ?=

# A dry run on a GPU has a head as large as nanochat's: its vocabulary.
VOCABULARY := $(if $(shell command -v nvidia-smi),32768,4096)

.PHONY: dry-run train test lint

dry-run: $(INSTALLED) out/tokenizer-$(VOCABULARY)/tokenizer.json
	$(RUN) -m scripts.dry_run --tokenizer out/tokenizer-$(VOCABULARY) $(FLAGS)

train: $(INSTALLED) $(TOKENIZER)/tokenizer.json
	$(RUN) -m scripts.base_train --data python --tokenizer $(TOKENIZER) $(MODEL) $(FLAGS)

out/tokenizer-%/tokenizer.json: | $(INSTALLED)
	$(RUN) -m scripts.tok_train --data python --vocab-size $* --out $(@D)

test: $(INSTALLED)
	$(RUN) -m pytest --numprocesses auto --maxprocesses 12 --dist worksteal

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'make: no Python 3.11 or newer with ensurepip is on PATH; name one: make PYTHON=/path/to/python3' >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

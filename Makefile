# trl-parity: `make demo` runs the main job on a CPU, `make test` the tests; both set up what they need.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: setup demo test lint clean

setup: $(STAMP)

# torch first: its CPU build lies on its own index. The rest goes through uv, which installs the pinned
# stack in seconds where pip takes minutes; without uv, pip does the same work.
$(STAMP): requirements-cpu.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@torch=$$(grep '^torch==' requirements-cpu.lock); echo "installing $$torch"; \
	$(BIN)/pip install -q --no-compile --no-deps "$$torch" 2>/dev/null \
	  || $(BIN)/pip install --no-compile --no-deps --index-url $(TORCH_INDEX) "$$torch"
	@echo "installing the pinned stack (about 180 packages, 4 GB)"
	@{ $(BIN)/pip install -q uv 2>/dev/null && $(BIN)/uv pip install -q --no-deps --python $(BIN)/python -r requirements-cpu.lock; } \
	  || $(BIN)/pip install --no-compile --no-deps -r requirements-cpu.lock
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" accelerate launch --cpu --num_processes 1 recipes/grpo/train.py --config configs/grpo_tiny_cpu.yaml

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs .cache build *.egg-info

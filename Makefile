# trl-parity: `make demo` runs the main job on a CPU, `make test` the tests; both set up what they need.
# PPOTrainer is gone from newer TRLs: it has an environment of its own, `make test-ppo` its tests. DeepSpeed lies
# beside the same stack for `make test-deepspeed` alone.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PPO    := .venv-ppo
DOCS   := .venv-docs
ZERO   := .venv-deepspeed/lib/python3.11/site-packages
CLEAN  := build/clean
TORCH_INDEX := https://download.pytorch.org/whl/cpu

# what the commands need to say anything; torch, TRL and vLLM are for what they run
LIGHT  := jinja2 markdown-it-py markupsafe mdurl pygments pyyaml rich

.PHONY: setup setup-ppo setup-deepspeed demo test test-fast test-ppo test-deepspeed lint docs dist licenses clean

setup: $(VENV)/.installed
setup-ppo: $(PPO)/.installed
$(VENV)/.installed: requirements-cpu.lock
$(PPO)/.installed: requirements-ppo-cpu.lock

# one package of a lock file, with its hashes
one = awk -v name="$(1)==" '/^[^ \#]/ {on = index($$0, name) == 1} on' $(2)

# torch first: its CPU build lies on its own index. The rest goes through uv, which installs the pinned
# stack in seconds where pip takes minutes; without uv, pip does the same work. Every file must have a hash
# that the lock file names.
%/.installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $*
	@$(call one,torch,$(filter %.lock,$^)) > $*/torch.lock; echo "installing $$(head -n 1 $*/torch.lock | cut -d ' ' -f 1)"; \
	$*/bin/pip install -q --no-compile --no-deps --require-hashes -r $*/torch.lock 2>/dev/null \
	  || $*/bin/pip install --no-compile --no-deps --require-hashes --index-url $(TORCH_INDEX) -r $*/torch.lock
	@echo "installing the pinned stack (about 180 packages, 4 GB)"
	@$(call one,uv,$(filter %.lock,$^)) > $*/uv.lock; \
	{ $*/bin/pip install -q --no-deps --require-hashes -r $*/uv.lock 2>/dev/null \
	  && $*/bin/uv pip install -q --no-deps --require-hashes --python $*/bin/python -r $(filter %.lock,$^); } \
	  || $*/bin/pip install --no-compile --no-deps --require-hashes -r $(filter %.lock,$^)
	$*/bin/pip install -q --no-deps --no-build-isolation -e .
	@touch $@

# DeepSpeed's sdist is whole as it is: unpacked and not built, it needs no compiler
setup-deepspeed: $(ZERO)/.installed
$(ZERO)/.installed: requirements-deepspeed.lock $(VENV)/.installed
	rm -rf $(ZERO) build/deepspeed && mkdir -p $(ZERO) build/deepspeed
	for name in hjson msgpack; do $(call one,$$name,$<); done > build/deepspeed/wheels.lock
	$(BIN)/pip install -q --no-compile --no-deps --require-hashes --target $(ZERO) -r build/deepspeed/wheels.lock
	$(call one,deepspeed,$<) > build/deepspeed/sdist.lock
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip download -q --no-build-isolation --no-deps --require-hashes -d build/deepspeed -r build/deepspeed/sdist.lock
	tar xzf build/deepspeed/deepspeed-*.tar.gz -C $(ZERO) --strip-components=1 --wildcards '*/deepspeed' '*/deepspeed.egg-info'
	@touch $@

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" accelerate launch --cpu --num_processes 1 recipes/grpo/train.py --config configs/grpo_tiny_cpu.yaml

# one engine serves a file: it stays in one process; the longest first (tests/conftest.py)
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# no engine, no vLLM, no children that import torch: under a minute, for every save
test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not slow_unit" tests/unit

# the engine-free tests show that this stack, too, is one trl-parity works with
test-ppo: setup-ppo
	$(PPO)/bin/python -m pytest tests/ppo $(addprefix tests/unit/,metrics/test_statistics.py judging/test_breaker.py scoring/test_sampling.py)

# whole runs under ZeRO, and the unit test that wants DeepSpeed
test-deepspeed: setup-deepspeed
	PYTHONPATH=$(CURDIR)/$(ZERO) DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/zero tests/unit/scoring/test_sharded_head.py::test_a_zero3_head_is_gathered_and_let_go

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .

# strict: a link, picture, heading or name that is not there fails
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# the pages need the sources alone, neither torch nor vLLM
$(DOCS)/.installed: requirements-docs.lock
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install -q --no-compile --no-deps --require-hashes -r requirements-docs.lock
	@touch $@

# the wheel is built from the sdist, and installed without the heavy stack
dist: setup
	rm -rf dist $(CLEAN)
	$(BIN)/uv build -q
	$(BIN)/uv venv -q -p $(BIN)/python $(CLEAN)
	for name in $(LIGHT); do $(call one,$$name,requirements-cpu.lock); done > $(CLEAN)/light.lock
	$(BIN)/uv pip install -q --python $(CLEAN)/bin/python --no-deps --require-hashes -r $(CLEAN)/light.lock
	$(BIN)/uv pip install -q --python $(CLEAN)/bin/python --no-deps dist/*.whl
	cd $(CLEAN) && unset PYTHONPATH && bin/trl-parity --version && bin/trl-parity --help \
	  && bin/python -P $(CURDIR)/.ci/check_dist.py $(CURDIR)

# who wrote what the lock files bring, and on which terms
licenses: setup setup-ppo setup-deepspeed docs
	$(BIN)/python .ci/licenses.py requirements-cpu.lock=$(VENV) requirements-ppo-cpu.lock=$(PPO) requirements-docs.lock=$(DOCS) \
	  requirements-deepspeed.lock=.venv-deepspeed > THIRD_PARTY_LICENSES.md

clean:
	rm -rf $(VENV) $(PPO) $(DOCS) .venv-deepspeed runs .cache build dist site *.egg-info

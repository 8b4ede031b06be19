# Every verb first makes what it needs: the virtual environment, the packages in it, the native library.
#
#   PYTHON=/path/to/python3     which Python makes .venv; by default the first one from 3.11 on
#   TORCH_INDEX=URL             where PyTorch comes from, for machines that want its CPU wheels; empty: where pip looks
#   CXX=g++                     the compiler of the native kernels; without a working one the PyTorch path serves
#   VLLM_PYTHON=/path/python    the Python of an environment that has vLLM, for bench-peers; empty: vLLM is not run
#   ARGS="..."                  more arguments for demo, serve, test, fuzz, bench, bench-peers or bench-training

VENV ?= .venv
ASSETS := server/lorasrv/assets
TORCH_INDEX ?=
VLLM_PYTHON ?=
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
PROJECT_FILES := pyproject.toml constraints.txt hatch_build.py
NATIVE := kernels/lorasrv_kernels/cpu/_native.so
NATIVE_SOURCES := $(wildcard kernels/lorasrv_kernels/cpu/*.cpp kernels/lorasrv_kernels/cpu/*.h)

.PHONY: help demo serve aot-check test fuzz check bench bench-peers bench-training gpu-check readme proto native assets clean
.DEFAULT_GOAL := help
# pip cannot install twice at a time
.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## Show the verbs
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r verb text; do \
		printf '%-14s %s\n' "$$verb" "$$text"; done

demo: $(VENV)/.runtime $(NATIVE) ## One server, several adapters, one mixed batch
	@$(BIN)/lorasrv demo $(ARGS)

serve: $(VENV)/.runtime $(NATIVE) ## Serve the embedded base (ARGS: see lorasrv serve --help)
	@$(BIN)/lorasrv serve $(ARGS)

test: $(VENV)/.test $(NATIVE) ## Run the tests
	@$(BIN)/python -m pytest $(ARGS)

fuzz: $(VENV)/.fuzz ## Fuzz the parsers of untrusted files (ARGS: libFuzzer's options)
	@if $(BIN)/python -c "import atheris" 2>/dev/null; then \
		for target in tests/fuzz/fuzz_*.py; do \
			echo "$$target"; PYTHONPATH=tests/support$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python "$$target" $(ARGS) || exit 1; \
		done; \
	else \
		echo "skipped: atheris has wheels for Python 3.11 to 3.13 on Linux x86-64 only; make test has the same checks"; \
	fi

check: $(VENV)/.dev $(NATIVE) ## Lint, formatting, types, import contracts, wire contract, Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo
	$(BIN)/buf lint proto
	$(BIN)/python proto/generate.py --check
	$(BIN)/python server/make_readme.py --check
	$(BIN)/hadolint Dockerfile

bench: $(VENV)/.runtime $(NATIVE) ## Time the kernels on this machine, once their results are right
	@for script in $$(grep -l '^if __name__' kernels/benchmarks/*.py server/benchmarks/*.py); do \
		$(BIN)/python "$$script" $(ARGS) || exit 1; done

# vLLM needs an environment of its own, which is never made here: CONTRIBUTING.md says how
bench-peers: $(VENV)/.test $(NATIVE) ## The same work on lorasrv, PEFT and vLLM, side by side (VLLM_PYTHON=python that has vLLM)
	@PYTHONPATH=server/benchmarks$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python server/benchmarks/peers/compare.py \
		$(if $(SMALL),--small) --vllm-python "$(VLLM_PYTHON)" $(ARGS)

bench-training: $(VENV)/.test $(NATIVE) ## Train on lorasrv and in a plain loop around PEFT, side by side (SMALL=1: tiny)
	@PYTHONPATH=server/benchmarks:tests/support$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python server/benchmarks/peers/training.py \
		$(if $(SMALL),--small) $(ARGS)

# no environment of ours: whatever Python has PyTorch for the device, where nothing can be installed
gpu-check: ## Test and time the CUDA kernels and steps, 8 minutes at most (SMALL=1: tiny, through Triton's interpreter)
	@python="$(PYTHON)"; [ -n "$$python" ] || { python=$(BIN)/python; [ -x "$$python" ] || python=python3; }; \
		PYTHONPATH=kernels:adapters:server:tests/support$${PYTHONPATH:+:$$PYTHONPATH} "$$python" kernels/benchmarks/cuda/check.py \
		$(if $(SMALL),--small) $(ARGS)

aot-check: $(VENV)/.test ## Compile the CUDA kernels for sm_80 and sm_90 (TRITON=3.6.0: with that Triton)
	@folder="$(VENV)/triton-$(TRITON)"; \
		if [ -n "$(TRITON)" ] && [ ! -d "$$folder/triton" ]; then \
			echo "installing triton $(TRITON) into $$folder"; \
			$(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps --target "$$folder" \
				"triton==$(TRITON)" || exit 1; \
		fi; \
		PYTHONPATH="$$folder$${PYTHONPATH:+:$$PYTHONPATH}" $(BIN)/python -m pytest -q -m aot tests/kernels $(ARGS)

readme: $(VENV)/.runtime ## Write README's tables of what is served anew
	$(BIN)/python server/make_readme.py

proto: $(VENV)/.dev ## Generate the code of the wire contract anew
	$(BIN)/python proto/generate.py

native: $(VENV)/.runtime ## Compile the native kernels anew
	@$(BIN)/python hatch_build.py

assets: $(VENV)/.test $(NATIVE) ## Train the embedded base and adapters anew (TEXTS=folder STYLES=folder; hours)
	@test -d "$(TEXTS)" && test -d "$(STYLES)" || { echo "make assets needs TEXTS=folder and STYLES=folder of .txt files" >&2; exit 2; }
	$(BIN)/python server/make_assets/base.py "$(TEXTS)" --out $(ASSETS)/base
	$(BIN)/python server/make_assets/adapters.py "$(STYLES)" --out $(ASSETS)/adapters
	$(BIN)/python server/make_assets/evaluate.py $(ASSETS) "$(TEXTS)" "$(STYLES)"

clean: ## Remove everything that the other verbs made
	rm -rf $(VENV) $(NATIVE) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# a build that fails leaves no library and exits 0, so that every verb goes on, and the next one tries again
$(NATIVE): $(NATIVE_SOURCES) hatch_build.py | $(VENV)/.runtime
	@$(BIN)/python hatch_build.py

# one stamp for each set of packages; a larger set holds the smaller ones
$(VENV)/.runtime: $(VENV)/.torch $(PROJECT_FILES)
	@echo "installing lorasrv into $(VENV)"
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(PROJECT_FILES)
	@echo "installing lorasrv and what its tests need into $(VENV)"
	@$(PIP) --no-build-isolation --editable '.[test]'
	@touch $(VENV)/.runtime $@

$(VENV)/.fuzz: $(VENV)/.torch $(PROJECT_FILES)
	@echo "installing lorasrv and what its fuzzing needs into $(VENV)"
	@$(PIP) --no-build-isolation --editable '.[fuzz]'
	@touch $(VENV)/.runtime $@

$(VENV)/.dev: $(VENV)/.torch $(PROJECT_FILES)
	@echo "installing lorasrv and what its checks need into $(VENV)"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $(VENV)/.runtime $(VENV)/.test $@

# first and alone, so that TORCH_INDEX holds for PyTorch only; hatchling builds the project itself
$(VENV)/.torch: $(BIN)/python constraints.txt
	@echo "installing PyTorch into $(VENV) (once; the longest step)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) hatchling
	@touch $@

define FIND_PYTHON
IFS=:; for folder in $$PATH; do for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$folder/$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	found="$$folder/$$name"; "$$found" -c 'import ensurepip, venv' 2>/dev/null && echo "$$found" && exit; \
done; done; \
if [ -n "$$found" ]; then \
	echo "$$found has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; \
else \
	echo "no Python from 3.11 on found: install one (Debian, Ubuntu: apt-get install python3 python3-venv)" >&2; \
fi; exit 1
endef

$(BIN)/python:
	@python="$(PYTHON)"; [ -n "$$python" ] || python=$$($(FIND_PYTHON)) || exit 1; \
	echo "making $(VENV) with $$python"; "$$python" -m venv $(VENV)

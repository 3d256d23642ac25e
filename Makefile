# Both commands work on a fresh machine: they make .venv and install everything from the package registries.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# It gives way to the tests beside it, which wait for each other; workers of its own would give up waiting for it.
MYPY := nice $(BIN)/mypy --strict
# Bytecode is made afterwards, by all cores.
INSTALL := $(BIN)/pip install -q --no-compile -c constraints.txt
# Large, and little of it is ever imported.
SELDOM := site-packages/(transformers|sympy|networkx|fontTools|setuptools|pip)/
# Of all distributions here, installed once and not once for each.
BUILD_TOOLS := hatchling editables scikit-build-core nanobind cmake ninja
DISTRIBUTIONS := . backends/cpu conformance backends/cuda backends/musa backends/rocm backends/dcu integrations/vllm integrations/sglang
# Where lint makes a backend of each kind, whose types are checked too.
MADE := $(VENV)/new-backends
# Whatever decides what is installed; Python sources are live in an editable install and need no reinstall.
INPUTS := constraints.txt $(wildcard pyproject.toml */pyproject.toml backends/*/pyproject.toml integrations/*/pyproject.toml) \
          $(wildcard backends/*/CMakeLists.txt backends/*/native/* backends/*/native/*/*)

.PHONY: demo test pytest lint sweep bench conform mutants docs clean

demo: $(VENV)/.installed
	$(BIN)/hal demo
	$(BIN)/python -m examples.deepseek_v3

# Side by side, for many tests wait, for a process to start or for a time to pass: hence also more workers than cores.
test: $(VENV)/.installed
	$(MAKE) --no-print-directory --jobs 2 lint pytest

pytest: $(VENV)/.installed
	$(BIN)/pytest -n 4 --dist loadgroup --no-loadscope-reorder --sample

# What `hal new-backend` makes is held to the same types.
lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(MYPY) hal conformance/hal_conformance backends/cuda/hal_cuda backends/musa/hal_musa \
	  backends/rocm/hal_rocm backends/dcu/hal_dcu
	$(MYPY) -p examples.deepseek_v3
	$(MYPY) integrations/recorded.py integrations/vllm/hal_vllm integrations/sglang/hal_sglang
	@rm -rf $(MADE)
	@name=new; for runtime in host opencl cuda-like hip-like; do name=a$$name; \
	  $(BIN)/hal new-backend $$name --runtime $$runtime --out $(MADE)/$$name >/dev/null || exit 1; done
	$(MYPY) $(MADE)/*/hal_*

# Every case of the published sweep, about half an hour on two cores, and all of what the device kernels' tests draw from.
sweep: $(VENV)/.installed
	HAL_SWEEP=all HAL_COMPILE=all $(BIN)/pytest -n 2 -q \
	  tests/test_mla_sweep.py tests/test_portable_compiled.py \
	  backends/cuda/tests/test_interpreter.py backends/cuda/tests/test_compiled.py

# The suite against the backend in force, with a report; see hal conform --help.
conform: $(VENV)/.installed
	$(BIN)/hal conform

# The suite against its planted bugs: every one must die, in the level that claims it.
mutants: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python -m mutants

# The site, in site/; a link to a page or a heading that is not there fails. Its tools are an extra, installed here.
# Not --quiet: of warnings that it does not print mkdocs counts none, and --strict then passes.
docs: $(VENV)/.installed
	$(INSTALL) -e .[docs] --no-build-isolation
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.installed
	$(BIN)/hal bench mla --quick

# One core compiles the kernels while the other fetches and unpacks what the rest needs.
$(VENV)/.installed: $(INPUTS)
	@echo "Installing into $(VENV): torch and the compiled kernels take a few minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) $(BUILD_TOOLS)
	@$(INSTALL) --no-build-isolation --no-deps -e backends/cpu & compiled=$$!; \
	  $(INSTALL) --no-build-isolation $(foreach d,$(filter-out backends/cpu,$(DISTRIBUTIONS)),-e $(d)[dev]) && wait $$compiled
	@$(BIN)/python -m compileall -qq -j 0 -x '$(SELDOM)' $(VENV)/lib $(DISTRIBUTIONS:.=hal) || true # templates are no Python
	@touch $@

clean:
	rm -rf $(VENV) backends/cpu/build site

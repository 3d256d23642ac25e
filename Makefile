# Both commands work on a fresh machine: they make .venv and install everything from the package registries.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DISTRIBUTIONS := . backends/cpu conformance backends/cuda backends/musa integrations/vllm integrations/sglang
# Whatever decides what is installed; Python sources are live in an editable install and need no reinstall.
INPUTS := constraints.txt $(wildcard pyproject.toml */pyproject.toml backends/*/pyproject.toml integrations/*/pyproject.toml) \
          $(wildcard backends/*/CMakeLists.txt backends/*/native/* backends/*/native/*/*)

.PHONY: demo test lint sweep bench conform mutants clean

demo: $(VENV)/.installed
	$(BIN)/hal demo
	$(BIN)/python -m examples.deepseek_v3

test: lint
	$(BIN)/pytest -n 2 --dist loadgroup

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict hal conformance/hal_conformance backends/cuda/hal_cuda backends/musa/hal_musa
	$(BIN)/mypy --strict -p examples.deepseek_v3
	$(BIN)/mypy --strict integrations/recorded.py integrations/vllm/hal_vllm integrations/sglang/hal_sglang

# Every case of the published sweep; about half an hour on two cores.
sweep: $(VENV)/.installed
	HAL_SWEEP=all $(BIN)/pytest -n 2 tests/test_mla_sweep.py -q

# The suite against the backend in force, with a report; see hal conform --help.
conform: $(VENV)/.installed
	$(BIN)/hal conform

# The suite against its planted bugs: every one must die, in the level that claims it.
mutants: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python -m mutants

bench: $(VENV)/.installed
	$(BIN)/hal bench mla --quick

$(VENV)/.installed: $(INPUTS)
	@echo "Installing into $(VENV): torch and the compiled kernels take a few minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q -c constraints.txt $(foreach d,$(DISTRIBUTIONS),-e $(d)[dev])
	@touch $@

clean:
	rm -rf $(VENV)

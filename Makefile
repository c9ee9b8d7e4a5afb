# Everything runs in .venv, which the first target creates. PYTHON selects another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-all test-versions lint faults clean

demo: $(VENV)/report
	$(RUN) demo.py --work_dir demo

# Two test processes; on a machine with more cores, set WORKERS.
WORKERS ?= 2
PYTEST := $(RUN) -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

test: $(VENV)/dev
	$(PYTEST) -m "not slow"

# The tests marked slow too: many injected faults, two hosts, Slurm, the tutorial, whole submissions, a browser.
test-all: $(VENV)/dev
	$(PYTEST)

# The lowest torch of pyproject.toml's range and the highest that has been tried, each in an environment of its own (for
# Linux a build for CUDA, which runs on a CPU): the tests of what depends on it. One takes about 7 GB, and is removed
# when its tests have passed.
TORCH_VERSIONS ?= 2.11.0 2.14.1
# Triton's interpreter and compiler are those of each torch, not the pinned ones: they are left out. What other versions
# warn of is printed and fails nothing.
VERSION_TESTS := tests/model tests/runtime tests/data_loading tests/common tests/export tests/test_fake_gpu.py \
	--ignore tests/model/kernels

test-versions: requirements-dev.txt pyproject.toml
	grep -v -E '^-r|^triton' requirements-dev.txt > $(VENV)-requirements.txt
	for version in $(TORCH_VERSIONS); do set -e; \
		$(PYTHON) -m venv $(VENV)-torch-$$version; \
		$(VENV)-torch-$$version/bin/python -m pip install --quiet --disable-pip-version-check torch==$$version \
			--requirement $(VENV)-requirements.txt .; \
		$(VENV)-torch-$$version/bin/python -m pytest -n $(WORKERS) -W default -m "not slow" $(VERSION_TESTS); \
		rm -rf $(VENV)-torch-$$version; \
	done

# Injects every fault of docs/reliability.md and writes its table.
faults: $(VENV)/core
	$(RUN) -m tests.faults --document docs/reliability.md

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Stamps of the installed versions: a changed requirements file triggers another installation.
$(VENV)/core: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/report: $(VENV)/core pyproject.toml
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint requirements-dev.txt '.[report]'
	touch $@

$(VENV)/dev: $(VENV)/core requirements-dev.txt pyproject.toml
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* demo

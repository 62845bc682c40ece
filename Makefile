# Two commands, each of which does its own set-up on a fresh machine: make book, make test.
# The rest is for maintainers; CONTRIBUTING.md says when.
SHELL := /bin/bash -o pipefail
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/installed
# A kernel of the user's own must not stand in for the one of the virtual environment.
export JUPYTER_PREFER_ENV_PATH := 1
# Large arrays go back to the system when they are freed, as on Binder (see the file start).
export MALLOC_MMAP_THRESHOLD_ := 8388608
# Chapters run in their own folder, so a path relative to this one is made absolute, blanks and all.
ifdef SCBMLP_DATA_DIR
override SCBMLP_DATA_DIR := $(shell $(PYTHON) -c 'import os, sys; print(os.path.abspath(os.path.expanduser(sys.argv[1])))' "$(SCBMLP_DATA_DIR)")
export SCBMLP_DATA_DIR
endif

.PHONY: book test lint site-test dist outputs bench lock

book: $(INSTALLED) ## build the site; every chapter is executed, and any error or warning stops the build
	rm -rf _build
	$(BIN)/jupyter-book build . -n -W --keep-going
	@echo "The book is at $(CURDIR)/_build/html/index.html"

test: lint ## lint, unit tests, and every chapter on simulated cells against its stored results
	SCBMLP_DATA_SOURCE=simulated OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest chapters tests \
	  -n 2 --dist loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env --nbval-cell-timeout=1800

lint: $(INSTALLED) ## style, spelling, the workflow's security, and the house by the Scientific Python guide
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/zizmor --offline --no-progress .github
	$(BIN)/repo-review . --show err

# Lighthouse 12 is the last for Node 20. Its reports are in _build/.lighthouseci.
LHCI := npx --yes --prefer-offline @lhci/cli@0.15.1 --config=../.ci/lighthouse.yml
LOW = sed -n 's|.*"url": "http://localhost:[0-9]*\(/[^"]*\)".*|--url=\1|p' .lighthouseci/assertion-results.json | sort -u

site-test: $(INSTALLED) ## what make book left: opened from disk in Debian's chromium, and by Lighthouse, pages that fail twice more
	$(BIN)/python -m pytest tests/test_site.py
	cd _build && export CHROME_PATH="$$(command -v chromium)" && \
	if [ -z "$$CHROME_PATH" ] || ! npm_config_fetch_retries=0 npm_config_fetch_timeout=20000 $(LHCI) --version; then \
	  echo "Lighthouse cannot be had here: it takes chromium, npx of Node 20, and npm's registry the first time."; \
	else $(LHCI) collect -n 1 && $(LHCI) assert || { $(LHCI) collect -n 2 $$($(LOW)) && $(LHCI) assert; }; fi

# A checkout may be another user's, as in a container.
FILES = git -c safe.directory='*' ls-files
# Outside the repository, so that nothing but what is installed can be imported.
TRY = cd "$$(mktemp -d)" && OMP_NUM_THREADS=1 "$(CURDIR)/.venv-dist/bin/python" -I

dist: $(INSTALLED) ## build sdist and wheel, and try each in an environment that has nothing else
	rm -rf dist .venv-dist
	$(BIN)/python -m build --sdist --wheel
	@# The sdist has every file that is committed, the wheel the package, no more.
	[ ! -e .git ] || diff <($(FILES) | sort) <(tar -tf dist/*.tar.gz | sed 's|^[^/]*/||' | grep -vx PKG-INFO | sort)
	[ ! -e .git ] || diff <($(FILES) scbmlp | sort) <($(BIN)/python -m zipfile -l dist/*.whl | awk 'NR > 1 && !/dist-info/ { print $$1 }' | sort)
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	$(TRY) "$(CURDIR)/.ci/installed.py"
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps dist/*.tar.gz
	$(TRY) "$(CURDIR)/.ci/installed.py"

outputs: $(INSTALLED) ## store anew what the checked cells of the chapters printed in the book built last, of simulated cells
	$(BIN)/python .ci/outputs.py

bench: $(INSTALLED) ## measure time and memory anew, half an hour of a quiet machine, for the page on scale
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python -W ignore benchmarks/stored.py

lock: ## resolve every version anew, and write constraints.txt and environment.yml
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[book,report,test]"
	sed -i '2,$$d' constraints.txt
	@# CUDA libraries come with torch where it needs them; they are not the same on every machine.
	$(BIN)/python -m pip list --format=freeze --exclude-editable | grep -Ev '^(pip=|setuptools=|nvidia|cuda|triton)' | \
	  sed 's/+.*//; s/_/-/g; s/.*/\L&/' | LC_ALL=C sort -t= -k1,1 >> constraints.txt
	sed -i "/^      - /d; s/^  - numpy=.*/  - $$(sed -n 's/^numpy==/numpy=/p' constraints.txt)/" environment.yml
	sed -n '/^#/d; /^torch==/d; s/^/      - /p' constraints.txt >> environment.yml

$(INSTALLED): constraints.txt pyproject.toml
	@echo "Making .venv with $(PYTHON), $$($(PYTHON) --version); 3.11 is proven, on 3.13 the unit tests were run, 3.12 is allowed. Another: make PYTHON=..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[book,report,test]"
	touch $@

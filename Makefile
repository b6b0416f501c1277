# Two commands set everything up on a machine that has only Python >= 3.11:
#   make demo   the main job: a real model on real tasks, flat, merged, small, quantized: a report
#   make test   lint, types, and the test suite but for what takes long (make long)

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= $(if $(filter true,$(CI)),test$(comma)parity,test)
comma := ,
BIN := $(VENV)/bin
# Processes that the tests are spread over, file by file.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
SOURCES := $(shell find models optim train data launch -name '*.py' -o -name '*.json' -o -name '*.css' -o -name '*.html')
STAMP := $(VENV)/.deps-$(subst $(comma),-,$(EXTRAS))
# What the tests that read real weights and data need; absent ones are skipped, and said so.
ASSETS ?= minilm-l6 minilm-l3 vader sarcasm twitter-ner mnist digits spider \
  $(if $(filter true,$(CI)),mpnet brown nlp-corpus smollm2 dinov2-s marian-en-pt marian-pt-en libreoffice-help)

.PHONY: demo test long coverage lint types fast assets clean

demo: $(VENV)/.deps-demo $(VENV)/.package
	$(BIN)/steppe assets fetch minilm-l6 vader sarcasm
	$(BIN)/steppe tour $(ARGS)

test: $(STAMP) $(VENV)/.package lint types assets
	$(PYTEST) -m "not long" $(ARGS)

long: $(STAMP) $(VENV)/.package assets
	$(PYTEST) -m long $(ARGS)

# Lines of every room that the tests run; what runs in processes of its own is not counted.
coverage: $(STAMP) $(VENV)/.package assets
	$(PYTEST) -m "not long" --cov=steppe --cov-report= $(ARGS)
	@for room in models optim train data launch; do printf '%-7s %s %%\n' $$room \
	  "$$($(BIN)/coverage report --include="*/steppe/$$room/*" --precision=1 --format=total)"; done

fast: $(STAMP) $(VENV)/.package
	$(PYTEST) -m "not slow and not long and not parity" $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) $(VENV)/.package
	cd $(VENV) && bin/python -m mypy --config-file $(CURDIR)/pyproject.toml \
	  -p steppe.models -p steppe.optim -p steppe.train -p steppe.data -p steppe.launch

assets: $(VENV)/.package
	-$(BIN)/steppe assets fetch $(ASSETS)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "steppe needs Python >= 3.11, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

# Dependencies change rarely and the package often: two stamps.
$(VENV)/.deps-demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt .
	touch $@

$(STAMP): $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt '.[$(EXTRAS)]' 'setuptools>=77'
	touch $@

# The installed package is what is tested, not the checkout.
$(VENV)/.package: $(wildcard $(VENV)/.deps-*) $(SOURCES) pyproject.toml
	rm -rf build
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps --force-reinstall .
	rm -rf build
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info

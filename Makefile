# `make demo` and `make test` set up everything they need in .venv and run.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow lint clean

demo: $(VENV)/.installed
	$(RUN) scripts/demo.py --output demo_output

test: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m pytest

test-slow: $(VENV)/.installed
	$(RUN) -m pytest -m slow

lint: $(VENV)/.installed
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) demo_output results

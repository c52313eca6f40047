# `make demo` and `make test` set up everything they need in .venv and run.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
CODE := qdiff qdiff_cli ddim ldm scripts benchmarks tests

.PHONY: demo test test-unit test-slow test-gpu bench-gpu lint format clean

demo: $(VENV)/.installed
	$(RUN) scripts/demo.py --output demo_output

test: lint
	$(RUN) -m pytest -n 2 --dist loadfile

test-unit: $(VENV)/.installed
	$(RUN) -m pytest -n 2 --dist loadfile -m "unit and not slow and not multiprocess"

test-slow: $(VENV)/.installed
	$(RUN) -m pytest -m slow

# for owners of a card, in an environment whose PyTorch has CUDA
test-gpu: $(VENV)/.installed
	$(RUN) -m pytest -m gpu

bench-gpu: $(VENV)/.installed
	$(RUN) benchmarks/gpu.py

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) tests/check_length.py $(CODE)

format: $(VENV)/.installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) demo_output results build *.egg-info

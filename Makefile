# make demo   sets up and runs the main job on a real checkpoint
# make test   sets up, then lint, types and tests
# make check  lint, types, and the contract between packages; the rest of the tests is left out
# make slow   the tests that take longer
# make zoo    proves every spec on its tiny models; PART=1/2 and PART=2/2 halve it (ten minutes each on 2 cores)
# make bench  prints all tables (an hour)
# make clean  removes the environment

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check slow zoo bench clean

demo: $(VENV)/ready
	$(BIN)/streammap demo

test: check
	$(BIN)/python -m pytest -m "not slow" -n auto --dist worksteal

check: $(VENV)/ready
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_package.py

slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

PART ?= 1/1
zoo: $(VENV)/ready
	$(BIN)/python -m pytest tests/tools/test_proof.py -n auto --dist worksteal --part $(PART)

bench: $(VENV)/ready
	for table in speed memory tensors startup dequantise peers align gpu; do $(BIN)/python -m bench.$$table || exit 1; done

clean:
	rm -rf $(VENV)

$(VENV)/ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV): this takes a minute or two, and downloads torch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,demo,remote-test]'
	touch $@

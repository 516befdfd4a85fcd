# make demo      train a small model and sample from it, in minutes on a laptop CPU
# make test      ruff and the tests, in minutes
# make test-all  all of them: more seeds, more fuzz examples, many kills
PYTHON ?= python3
VENV ?= .venv
OUT ?= out/completep_small
FLAGS ?=
# one process per core, one thread each
TEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n auto --dist=worksteal

.PHONY: demo test test-all clean

demo: $(VENV)/.run
	$(VENV)/bin/python data/stdlib/prepare.py
	$(VENV)/bin/python train.py config/completep_small.py --out_dir=$(OUT) --overwrite=True $(FLAGS)
	$(VENV)/bin/python sample.py --out_dir=$(OUT) --start='def ' --max_new_tokens=300
	@echo "The loss curve is $(OUT)/loss.png, the figures are in $(OUT)/metrics.csv and $(OUT)/summary.json."

test: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(TEST) -m "not slow" --durations=10

test-all: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	FUZZ_EXAMPLES=300 $(TEST)

$(VENV)/.run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build nanop.egg-info __pycache__ */__pycache__

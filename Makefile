# make demo | test | lab | reproduce | bench | notebooks
PYTHON ?= python3
BIN := .venv/bin
# One stamp: reinstall only when a list of requirements changes.
READY := .venv/.installed

.PHONY: demo test lab reproduce bench notebooks clean

demo: $(READY)  ## execute the quickstart, print its table, name its page
	$(BIN)/python -m tdq_utils demo

test: $(READY)  ## lint, unit tests, and every notebook against its stored outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n 2
	$(BIN)/pytest -n 2 --dist loadfile --nbval --nbval-current-env notebooks

lab: $(READY)  ## JupyterLab on the quickstart
	$(BIN)/jupyter lab notebooks/00_quickstart.ipynb

reproduce: $(READY)  ## the table of post-training quantization, hours; stop it any time, it goes on where it was
	$(BIN)/python -m tdq_utils reproduce ptq --out data/results/ptq.csv --cache runs/cache

bench: $(READY)  ## what profiling and simulation cost, as ratios measured in one run
	$(BIN)/python -m tdq_utils bench

notebooks: $(READY)  ## execute every notebook in place
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb

clean:
	rm -rf .venv runs

$(READY): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(READY)

# make demo | test | lab | exercises | site | reproduce | bench | notebooks
PYTHON ?= python3
BIN := .venv/bin
# One stamp: reinstall only when a list of requirements changes.
READY := .venv/.installed

.PHONY: demo test lab exercises site reproduce bench notebooks clean

demo: $(READY)  ## execute the quickstart, print its table, name its page
	$(BIN)/python -m tdq_utils demo

test: $(READY)  ## lint, types, unit tests, and every notebook against its stored outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2
	$(BIN)/pytest -n 2 --dist loadfile --nbval --nbval-current-env notebooks

lab: $(READY)  ## JupyterLab on the quickstart
	$(BIN)/jupyter lab notebooks/00_quickstart.ipynb

exercises: $(READY)  ## the students' notebooks from their sources, and solved ones into build/solutions
	$(BIN)/python -m tdq_utils exercises

site: $(READY)  ## lessons, explorer, tables and cards as pages that open without a network: build/site/index.html
	$(BIN)/python -m tdq_utils site --out build/site

# How the committed tables were sampled: with so many threads, and these options. Without 8-bit dot products or a C++ compiler:
# make reproduce ENGINE=eager
ENGINE ?= integer
INTEGER = --engine $(ENGINE) --batch-size 64
MEASURE = OMP_NUM_THREADS=$(2) $(BIN)/python -m tdq_utils reproduce $(1) --out data/results/$(1).csv --cache runs/cache $(3)

reproduce: $(READY)  ## the tables of post-training quantization, its ablations and training, hours; stopped, it goes on where it was
	$(call MEASURE,quickstart,2)
	$(call MEASURE,ptq,2,$(INTEGER))
	$(call MEASURE,ablations,2,$(INTEGER))
	$(call MEASURE,balance,2,$(INTEGER))
	$(call MEASURE,qat,1,$(INTEGER))
	$(call MEASURE,trials,1,$(INTEGER))

bench: $(READY)  ## time and memory in floats, simulated and in integers, as ratios measured in one run
	$(BIN)/python -m tdq_utils bench --out data/results

notebooks: $(READY)  ## execute every notebook in place
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb

clean:
	rm -rf .venv runs build

$(READY): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(READY)

# Two commands matter: `make demo` and `make test`. Every path is relative, so the folder's own name may hold spaces.
.DEFAULT_GOAL := help
.PHONY: help demo test check soak bench results site gates lab install dev export readme notebooks corpora reference small clean
PYTHON ?= python3
PY := .venv/bin/python
# two processes take a file after the other, the longest first, as tests/conftest.py lists them
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
# computed features stay inside the clone, shared by the demo, the tests and the notebooks; SPEECHIMG_CACHE moves them
SPEECHIMG_CACHE ?= $(CURDIR)/.cache
export SPEECHIMG_CACHE

help: ## this list
	@echo "speechimg: find the right picture from a spoken description"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: install ## evaluate the trained model, answer human recordings with pictures, watch a small model learn (about five minutes)
	@$(PY) tools/demo.py

test: dev ## everything: gates, notebooks, tests (about twenty minutes on two cores)
	@$(PY) tools/gates.py
	@OMP_NUM_THREADS=1 $(PY) tools/notebooks.py test
	@$(PYTEST)

check: dev ## the quick part of `make test` (three minutes on two free cores: 330 processor seconds)
	@$(PY) tools/gates.py & gates=$$!; \
	OMP_NUM_THREADS=1 $(PY) tools/notebooks.py test 06_sic 08_mining --workers 1; notebooks=$$?; \
	wait $$gates && exit $$notebooks
	@$(PYTEST) -m "not slow"

soak: dev ## kills, a full disk, hostile and mutated files: reliability in figures, to data/soak.json (under 30 minutes)
	@$(PY) experiments/soak.py

results: dev ## every run behind nbs/14_results.ipynb that data/results.jsonl does not hold yet (hours; stop it whenever you like)
	@$(PY) experiments/results.py

bench: install ## speed in figures, before and after, to data/bench.json (under 10 minutes on two free cores)
	@$(PY) experiments/bench.py

site: ## build the site into site/ and check its links: notebooks, reference, results, search (about half a minute)
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no '$(PYTHON)' here: install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3 site"; exit 1; }
	@"$(PYTHON)" tools/install.py site
	@$(PY) tools/website.py

gates: dev ## only the gates
	@$(PY) tools/gates.py

lab: install ## open the notebooks in JupyterLab
	@$(PY) -m jupyterlab nbs/index.ipynb

install: # the library in .venv; costs nothing when nothing changed
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no '$(PYTHON)' here: install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3 demo"; exit 1; }
	@"$(PYTHON)" tools/install.py

dev: # the same, with what the tests need
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no '$(PYTHON)' here: install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3 test"; exit 1; }
	@"$(PYTHON)" tools/install.py dev

export: dev ## write speechimg/*.py from the notebooks, and clean the notebooks
	@$(PY) tools/notebooks.py export

readme: dev ## write README.md from nbs/index.ipynb, and the maps of nbs/map
	@$(PY) tools/map.py
	@$(PY) tools/readme.py

notebooks: dev ## run every notebook and keep its outputs, then export and README (NB="06_sic 08_mining" for some)
	@$(PY) tools/notebooks.py run $(NB)
	@$(PY) tools/notebooks.py export
	@$(PY) tools/readme.py

reference: install ## train the reference model again (at most an hour on two cores)
	@$(PY) -m speechimg.cli train --corpus scenes+things/5 --config data/models/reference/train.json --out runs/reference
	@$(PY) experiments/publish.py runs/reference data/models/reference

small: install ## train the small model from scratch again (about an hour on two cores)
	@$(PY) -m speechimg.cli train --corpus scenes --config data/models/small/train.json --out runs/small
	@$(PY) experiments/publish.py runs/small data/models/small

corpora: ## build data/*.zip again from the packages that data/README.md names
	@"$(PYTHON)" tools/install.py corpora
	@$(PY) data/sources.py
	@$(PY) data/build_scenes.py
	@$(PY) data/build_stamps.py
	@$(PY) data/build_towers.py
	@$(PY) data/build_things.py
	@$(PY) data/build_words.py
	@$(PY) data/describe.py --write

clean: ## forget computed features, trainings and the site (.venv stays)
	@rm -rf .cache runs site .pytest_cache .hypothesis

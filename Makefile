# What a newcomer runs: `make demo`, `make demo-vision` and `make test`. Each sets up .venv first.
PYTHON ?= python3
VENV ?= .venv
export PYTHON VENV

# One OpenMP thread per process: several worker processes share the cores.
RUN = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/bin

.PHONY: setup demo demo-vision test test-slow lint bench clean

setup:
	@bash .ci/setup.sh

demo: setup
	$(RUN)/bregman run recipes/tiny_thinking/recipe.yaml

demo-vision: setup
	$(RUN)/bregman run recipes/tiny_kimi_vl/recipe.yaml

test: setup lint
	$(RUN)/python -m pytest -m "not slow"

test-slow: setup
	$(RUN)/python -m pytest -m slow

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

bench: setup
	$(RUN)/python benchmarks/startup.py
	$(RUN)/python benchmarks/memory.py
	$(RUN)/python benchmarks/tiny_thinking_seeds.py
	$(RUN)/python benchmarks/rollout_worker.py
	$(RUN)/python benchmarks/weight_sync.py
	$(RUN)/python benchmarks/rl_step.py
	$(RUN)/python benchmarks/reward_workers.py
	$(RUN)/python benchmarks/sft_step.py
	$(RUN)/python benchmarks/sft_data.py
	$(RUN)/python benchmarks/chunked_logprob.py
	$(RUN)/python benchmarks/kimi_vl_parity.py
	$(RUN)/python benchmarks/kimi_vl_learner.py
	$(RUN)/python benchmarks/tiny_kimi_vl_seeds.py

clean:
	rm -rf runs .pytest_cache .ruff_cache .mypy_cache

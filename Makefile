.PHONY: test test-dist lint types bench

test:
	uv run pytest

test-dist:
	uv run pytest -m dist

lint:
	uv run ruff check
	uv run ruff format --check

types:
	uv run pyright

bench:
	OMP_NUM_THREADS=1 uv run --group peers python benchmarks/step_time.py
	OMP_NUM_THREADS=1 uv run --group peers python benchmarks/step_time_bert.py
	OMP_NUM_THREADS=1 uv run --group peers python benchmarks/lm_loss.py
	OMP_NUM_THREADS=1 uv run --group peers python benchmarks/record.py
	OMP_NUM_THREADS=1 uv run python benchmarks/pool.py

# Two commands: `make demo` and `make test`. Both set everything up in .venv with nothing but Python 3.11.
PYTHON ?= python3.11
WORKERS ?= 2
STAMP := .venv/.installed

# One thread per worker process: more threads than cores only slow each other down.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test lint types install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	touch $@

demo: $(STAMP)
	OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 .venv/bin/accelerate launch --num_processes 1 --num_machines 1 \
		--mixed_precision no --dynamo_backend no --cpu examples/train.py --config examples/configs/demo.yaml

lint: $(STAMP)
	.venv/bin/ruff check .

types: $(STAMP)
	.venv/bin/mypy

test: lint types
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache

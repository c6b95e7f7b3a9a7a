# make demo   set up, run the main job on the built-in example, show what came out
# make test   set up, check style, run the tests
# make test-boards      a real sshd, a real adbd, emulated ARM and an arm64 machine, downloaded from Debian (needs root and apt)
# make bench            write the figures of CLINC150 that the README quotes (an hour; nothing else should run)
# make bench-files  our files against plain conversion of the same student, operator by operator (ten minutes, after make bench)
# make bench-methods    every pruning, factorization and sharing method on CLINC150, side by side (three hours; a second run goes on from the first)
# make bench-tasks      every task on its preset: teacher, floor, int8 of the same weights, compressed (two hours; a second run goes on from the first)
# make bench-runner     the C runner against a loop in C (six minutes; BUNDLE=... names a bundle, out/clinc150/bundle otherwise)
# make bench-comparison how often a comparison is right about no change and a tenth (ten minutes)
# make bench-boards     a bundle on emulated Arm and on a virtual board made from nothing (ten minutes; downloads; needs root and apt)
# make bench-peers      the same weights in every converter's files and in ours, side by side (an hour; 13 GB of environments)

PYTHON  ?= $(firstword $(shell command -v python3.11 python3 2>/dev/null) python3.11)
VENV    ?= .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.ready
# The runtime of old devices needs numpy 1, so it has an environment of its own.
OLD     := $(VENV)/old-runtime
export POCKETBERT_DATA ?= ../shared/data

.PHONY: setup demo test test-boards lint bench bench-files bench-methods bench-tasks bench-peers bench-runner bench-comparison bench-boards clean
# How many processes run tests.
JOBS    ?= 2
# A bundle of the CLINC150 recipe, whose files the benchmarks of boards take.
BUNDLE  ?= out/clinc150/bundle
.DEFAULT_GOAL := demo

setup: $(STAMP)

# The CPU build of torch is asked for first: the plain version drags in gigabytes of CUDA where both are offered.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 with venv is needed: install python3.11 and python3.11-venv, or say make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0+cpu" 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	test -x $(OLD)/bin/python || $(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install --quiet --disable-pip-version-check "tflite-runtime==2.14.0" "numpy==1.26.4"
	@touch $@

demo: $(STAMP)
	$(BIN)/pocketbert run demo --out out/demo
	$(BIN)/pocketbert verify out/demo/bundle
	$(BIN)/pocketbert predict out/demo/bundle "wake me up at half past six please"

lint: $(STAMP)
	$(BIN)/ruff check .

# Two processes with one thread each: OpenMP threads of two tests at once wait for each other most of the time.
test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 25

test-boards: $(STAMP)
	$(BIN)/python -m pytest tests/boards

bench: $(STAMP)
	$(BIN)/python benchmarks/clinc150.py; status=$$?; $(BIN)/python benchmarks/tables.py; exit $$status

bench-files: $(STAMP)
	$(BIN)/python benchmarks/files.py --record; status=$$?; $(BIN)/python benchmarks/tables.py; exit $$status

bench-methods: $(STAMP)
	$(BIN)/python benchmarks/methods.py --keep out/methods --record; status=$$?; $(BIN)/python benchmarks/tables.py; exit $$status

bench-tasks: $(STAMP)
	$(BIN)/python -m benchmarks.tasks --record; status=$$?; $(BIN)/python benchmarks/tables.py; exit $$status

bench-peers: $(STAMP)
	$(BIN)/python benchmarks/peers.py --record; status=$$?; $(BIN)/python benchmarks/tables.py; exit $$status

bench-runner: $(STAMP)
	$(BIN)/python benchmarks/runner.py $(BUNDLE) --record; status=$$?; $(BIN)/python benchmarks/tables.py; exit $$status

bench-comparison: $(STAMP)
	$(BIN)/python benchmarks/comparison.py $(BUNDLE) --record; status=$$?; $(BIN)/python benchmarks/tables.py; exit $$status

bench-boards: $(STAMP)
	$(BIN)/python -m benchmarks.boards $(BUNDLE) --record; status=$$?; $(BIN)/python benchmarks/tables.py; exit $$status

clean:
	rm -rf $(VENV) out build *.egg-info

# The only entrance: `make install demo lint test bench`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
unexport PYTHONPATH

# The extension's features for tests and benches, too: what they depend on is compiled once for all of them.
UNIFIED := --workspace --features ao-py/extension-module

# A build of another level of optimization than what is asked for now is no build.
BUILT := $(BIN)/.built$(CARGO_PROFILE_RELEASE_OPT_LEVEL)

RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml)

# The oldest transformers, huggingface_hub and PEFT that are supported, in an environment on top of .venv: all else is its.
FLOOR := .venv-floor

.PHONY: help install demo lint test test-floor soak fuzz fuzz-tools bench clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

# The environment is made once, and again when what it is made from changes.
$(BIN)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet maturin
	touch $@

# The compiler begins while pip loads libraries, in the way that maturin calls it later; an error of it shows there, too.
$(BUILT): $(BIN)/.ready $(RUST_SOURCES)
	cargo build --release --quiet --lib --package ao-py --features extension-module & \
		$(BIN)/maturin develop --release --quiet; wait
	rm -f $(BIN)/.built*
	touch $@

install: $(BUILT) ## make .venv and build the extension in release mode

demo: install ## train and score an oracle on the embedded demo world (two minutes)
	$(BIN)/ao demo

lint: install ## formatting, lints, types, stub
	cargo fmt --all --check
	$(BIN)/ruff format --check python tests benches
	$(BIN)/ruff check python tests benches
	cargo clippy --release --quiet $(UNIFIED) --all-targets -- -D warnings & \
		status=0; $(BIN)/basedpyright --level error || status=$$?; wait $$!; exit $$status
	$(BIN)/python -m mypy.stubtest ao._ao

# A process for each core, and a thread for each process; what a file of tests shares stays in one.
test: lint ## everything that CI checks
	cargo test --release --quiet $(UNIFIED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# constraints.txt would ask for the newest again. A line of a .pth file puts .venv behind the floor's own packages.
$(FLOOR)/.ready: constraints-floor.txt $(BIN)/.ready
	test -x $(FLOOR)/bin/python || $(BIN)/python -m venv $(FLOOR)
	site() { "$$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
		echo "import site; site.addsitedir('$$(site $(BIN)/python)')" > "$$(site $(FLOOR)/bin/python)/newest.pth"
	PIP_CONSTRAINT= $(FLOOR)/bin/python -m pip install --quiet -r constraints-floor.txt
	touch $@

test-floor: install $(FLOOR)/.ready ## the Python tests, or those in TESTS=, on the oldest libraries that are supported
	$(FLOOR)/bin/python -m pytest $(TESTS)

soak: fuzz-tools install ## the long counts: 50 kills of builds and of `ao collect`, 100 of writers, many cases of each property, a minute of fuzzing for each target
	AO_KILLS=50 $(BIN)/python -m pytest -s tests/python/test_kill.py
	AO_KILLS=100 $(BIN)/python -m pytest -s tests/python/test_cache.py -k killed
	AO_EXAMPLES=5000 $(BIN)/python -m pytest tests/python/test_collect.py -k no_manifest
	PROPTEST_CASES=2000 cargo test --release --quiet $(UNIFIED)
	$(MAKE) fuzz

# The tests run the same checks on what fuzzing found, without these tools.
fuzz-tools:
	@cargo +nightly fuzz --version >/dev/null 2>&1 || \
		{ echo 'fuzzing needs `rustup toolchain install nightly` and `cargo install cargo-fuzz`' >&2; exit 1; }

fuzz: fuzz-tools ## fuzz every target for SECONDS=60; keeps what it learned in tests/fuzz/corpus
	AO_FUZZ_SEEDS=$(CURDIR)/tests/fuzz/corpus cargo test --release --quiet $(UNIFIED) --test fuzz_findings seeds
	for target in $$(cargo +nightly fuzz list --fuzz-dir tests/fuzz); do \
		RAYON_NUM_THREADS=1 cargo +nightly fuzz run --fuzz-dir tests/fuzz --sanitizer none $$target -- \
			-max_total_time=$(or $(SECONDS),60) -timeout=20 -rss_limit_mb=2500 -max_len=6000 -verbosity=0; \
	done

bench: install ## every benchmark, one table at the end; QUICK=1: does it run?
	cargo bench --quiet $(UNIFIED) --bench '*' -- --noplot $(if $(QUICK),--quick)
	$(BIN)/python benches/table.py $(if $(QUICK),--quick)

clean: ## remove what was built, not what was trained
	rm -rf $(VENV) $(FLOOR) target python/ao/_ao*.so

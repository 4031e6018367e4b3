# The two commands: `make demo` and `make test`. Each sets up what it needs.
CARGO ?= cargo

.PHONY: demo install uninstall package test quick soak test-python test-vllm test-sglang bench-vllm test-deploy wheel check build bench gpu ptx sbom image

# Where the built programs are.
BUILT ?= target/release
PROGRAMS := swiftcache-broker swiftcache

## Builds, starts a node of real processes on this machine, replays a sample workload, prints the table.
demo: setup
	@[ -x $(BUILT)/swiftcache ] || echo "The first build compiles 300 crates: about five minutes on two cores, one on sixteen. Later ones take seconds."
	$(CARGO) build --release --locked $(PROGRAMS:%=--bin %)
	@echo "The programs are $(BUILT)/swiftcache and $(BUILT)/swiftcache-broker; make install copies them to $(PREFIX)/bin."
	$(BUILT)/swiftcache demo

## Copies both programs, their manual page and completions to PREFIX (below DESTDIR, for packages).
PREFIX ?= /usr/local
install: setup
	$(CARGO) build --release --locked $(PROGRAMS:%=--bin %)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/man/man1 \
		$(DESTDIR)$(PREFIX)/share/bash-completion/completions
	install -m 0755 $(PROGRAMS:%=$(BUILT)/%) $(DESTDIR)$(PREFIX)/bin/
	$(BUILT)/swiftcache man > $(DESTDIR)$(PREFIX)/share/man/man1/swiftcache.1
	$(BUILT)/swiftcache completions bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/swiftcache

## Removes what `make install` copied.
uninstall:
	rm -f $(PROGRAMS:%=$(DESTDIR)$(PREFIX)/bin/%) $(DESTDIR)$(PREFIX)/share/man/man1/swiftcache.1 \
		$(DESTDIR)$(PREFIX)/share/bash-completion/completions/swiftcache

## An archive of both programs with units, licence and bill of materials, in target/packages; what a release has.
package: setup
	$(CARGO) build --release --locked $(PROGRAMS:%=--bin %)
	deploy/release/package.sh $(BUILT) target/packages

## Every check and every test.
# All targets at once, so that nothing is compiled twice: the tests turn on features of what programs share with them.
# Downloads go on meanwhile.
test: setup
	@mkdir -p target && tests/fetch.sh >target/fetch.log 2>&1 &
	$(MAKE) check
	$(CARGO) build --workspace --all-targets --locked
	$(CARGO) test --workspace --locked
	$(MAKE) test-python
	$(MAKE) test-vllm
	$(MAKE) test-sglang
	$(MAKE) test-deploy

## The inner loop: formatting, lints, the broker's state machine, the client's unit tests. Under two minutes when warm.
quick: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) test -p swiftcache-broker --lib --locked core::
	$(CARGO) test -p swiftcache-device -p swiftcache-client --lib --locked

## The fault suites for as long as SOAK_SECONDS says, each, by the seed of SWIFTCACHE_FAULT_SEED.
SOAK_SECONDS ?= 300
soak:
	$(CARGO) build --workspace --all-targets --locked
	SWIFTCACHE_FAULT_SECONDS=$(SOAK_SECONDS) $(CARGO) test --workspace --locked --no-fail-fast \
		--test kill --test many --test garbage --test revoke_load --test fake_broker --test exhaustion \
		--test unknown_outcomes --test lender --test tenants
	PROPTEST_CASES=4096 $(CARGO) test -p swiftcache-broker --locked --lib core::

## The Python module over real processes. Needs the binaries of `make test`.
test-python:
	engine-adapter/tests/run.sh

## The connector on the real engine, vLLM's CPU build (6 GB in target/vllm). Needs the binaries of `make test`.
test-vllm:
	tests/vllm/run.sh

## The linker on the real engine, SGLang's CPU engine (5 GB in target/sglang, most of them target/vllm's files). Needs the
## binaries of `make test`.
test-sglang:
	tests/sglang/run.sh

## Time to the first token of a next turn: SwiftCache, computed again, vLLM's ExampleConnector; docs/vllm.md.
bench-vllm:
	tests/vllm/run.sh --bench $(ARGS)

## Manifests, image, units, alerts, protocol tools, supply chain, docs/operations.md: a line for each tool that was
## used or could not be had. Needs the binaries of `make test`.
test-deploy:
	tests/deploy/run.sh

## The Python package: one wheel for every Python since 3.10, in target/wheels.
wheel:
	$$(engine-adapter/tests/venv.sh)/bin/maturin build --release --locked \
	    --manifest-path engine-adapter/Cargo.toml --out target/wheels

## The bill of materials of the two programs, CycloneDX JSON.
sbom:
	python3 deploy/supply-chain/sbom.py target/swiftcache.cdx.json

## The container image.
image:
	docker build --file deploy/image/Dockerfile --tag swiftcache:$(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1) .

## Formatting, lints, and documentation whose links lead somewhere.
check: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked

## DESIGN's budgets, each as a ratio with its baseline measured in the same run; rewrites docs/benchmarks.md.
bench: setup
	$(CARGO) build --release --locked --bin swiftcache-broker --bin swiftcache --bin swiftcache-bench
	target/release/swiftcache-bench --write docs/benchmarks.md

## Checks and measures the CUDA backend and the whole stack on this machine's GPUs. Carry the four programs and
## tests/gpu/run.sh to run it elsewhere; `run.sh --only peers` is what two GPUs add.
gpu:
	$(CARGO) build --release --locked --bin swiftcache-gpu-check --bin swiftcache-broker --bin swiftcache \
		--bin swiftcache-test-borrower
	SWIFTCACHE_REQUIRE_GPU=1 tests/gpu/run.sh

## Compiles the kernels again, after a change to a .cu file; needs CUDA 12.1's nvcc.
ptx:
	nvcc --ptx --gpu-architecture=compute_70 -o client/device/src/cuda/gather.ptx client/device/src/cuda/gather.cu
	nvcc --ptx --gpu-architecture=compute_70 -o tests/gpu/src/busy.ptx tests/gpu/src/busy.cu

# clippy and rustfmt are components of the toolchain, not of every install of it.
.PHONY: setup
setup:
	@$(CARGO) clippy --version >/dev/null 2>&1 || rustup component add clippy
	@$(CARGO) fmt --version >/dev/null 2>&1 || rustup component add rustfmt

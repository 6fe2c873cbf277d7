# The commands of the README and of CONTRIBUTING.md. scripts/setup.sh installs everything they need.

# Which PostgreSQL is meant, for everything here; the script says how it is chosen.
PG_CONFIG ?= $(shell scripts/pg_config.sh 2>/dev/null)
DESTDIR ?=
ONLY ?=

# Expanded when a recipe runs, because `make demo` may have installed PostgreSQL a moment ago.
major = $(shell '$(PG_CONFIG)' --version | sed 's/[^0-9]*\([0-9]*\).*/\1/')
# PostgreSQL 15 shares cargo's directory with the relay. Every other version has a directory of its own, so that switching
# between versions rebuilds nothing.
library_target = $(if $(filter 15,$(major)),target,target/pg$(major))
library_cargo = PGRX_PG_CONFIG_PATH='$(PG_CONFIG)' CARGO_TARGET_DIR='$(library_target)' cargo
# With a name only the integration tests that match it, else all tests of the package.
tests = $(if $(strip $(ONLY)),--test it -- $(ONLY))
# How long, and which seed.
soak = $(if $(MINUTES),--minutes $(MINUTES),--hours $(or $(HOURS),1)) $(if $(SEED),--seed $(SEED))

.PHONY: help setup setup-to-run demo up down test check lint unit bench soak install library relay packages clean needs-postgresql

## Usage: make TARGET [PG_CONFIG=/path/to/pg_config]
##
help:
	@sed -n 's/^## \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

##   demo               deliver real events on private servers, with the time of each step; ends by itself
##   up [RELAYS=1]      start private servers and relays and leave them running; .dev/env says how to reach them
# A fresh make, because the server's pg_config may not have been there when this one started.
demo up: setup-to-run
	@$(MAKE) --no-print-directory install relay
	@PG_CONFIG='$(PG_CONFIG)' cargo run --quiet --release -p outbox-tests --bin $(if $(filter up,$@),dev -- up,demo)

##   down               stop what `make up` started and remove its data
down:
	@cargo run --quiet --release -p outbox-tests --bin dev -- down

##   check              what a commit needs: formatting, lints, unit tests; builds, but installs nothing
check: lint unit

##   test [ONLY=name]   all tests; ONLY: install, then run only the integration tests whose names contain it
test: setup
	@$(MAKE) --no-print-directory install relay $(if $(strip $(ONLY)),,unit)
	@PG_CONFIG='$(PG_CONFIG)' cargo test --release -p outbox-tests $(tests)

##   bench [ONLY=rows]  the benchmark, or some of its rows; see docs/performance.md
bench: setup-to-run
	@$(MAKE) --no-print-directory install relay
	@PG_CONFIG='$(PG_CONFIG)' cargo run --quiet --release -p outbox-bench -- $(ONLY)

##   soak [HOURS=1]     random faults under load, judged by a record outside the database; MINUTES=, SEED=; see docs/soak.md
soak: setup-to-run
	@$(MAKE) --no-print-directory install relay
	@PG_CONFIG='$(PG_CONFIG)' cargo run --quiet --release -p outbox-tests --bin soak -- $(soak)

##   lint               formatting and lints
lint: needs-postgresql
	@cargo fmt --all --check
	@cargo clippy --release --all-targets -p outbox-relay -p outbox-models -p outbox-tests -p outbox-bench -- -D warnings
	@$(library_cargo) clippy --release --all-targets -p pg_outbox --features pg$(major) -- -D warnings

##   unit               unit tests and models
unit: needs-postgresql
	@cargo test --release -p outbox-relay
	@cargo test --release -p outbox-models
	@$(library_cargo) test --release -p pg_outbox --lib --features pg$(major)

##   install            build the extension and install it for that PostgreSQL; DESTDIR= is honoured
install: library
	@DESTDIR='$(DESTDIR)' scripts/install.sh '$(PG_CONFIG)' '$(library_target)/release/libpg_outbox.so'

##   library            build the extension
library: needs-postgresql
	@$(library_cargo) build --release -p pg_outbox --features pg$(major)

##   relay              build the relay: target/release/outbox-relay
relay:
	@cargo build --release -p outbox-relay

##   packages           .deb files of the relay and of the extension for each PostgreSQL of Debian's, in target/packages
packages: setup-to-run
	@scripts/packages.sh

##   setup              install what building and testing need; does nothing when all is there
setup:
	@scripts/setup.sh tests

setup-to-run:
	@scripts/setup.sh

##   clean              remove all build results and downloads
clean:
	cargo clean
	rm -rf .cache

needs-postgresql:
	@PG_CONFIG='$(PG_CONFIG)' scripts/pg_config.sh >/dev/null

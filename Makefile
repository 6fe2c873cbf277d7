# The commands of the README. Everything they need is installed by scripts/setup.sh.

PG_CONFIG ?= $(firstword $(wildcard /usr/lib/postgresql/15/bin/pg_config) $(lastword $(sort $(wildcard /usr/lib/postgresql/*/bin/pg_config))) $(shell command -v pg_config))
DESTDIR ?=
VERSION := $(shell sed -n "s/^default_version = '\(.*\)'/\1/p" pg_outbox_ext/pg_outbox.control)

# Known only when a recipe runs: `make demo` may have installed PostgreSQL a moment ago.
major = $(shell '$(PG_CONFIG)' --version | sed 's/[^0-9]*\([0-9]*\).*/\1/')
# The first version shares cargo's directory with the relay; others have their own, so that they don't build in turns.
library_target = $(if $(filter 15,$(major)),target,target/pg$(major))
library_cargo = PGRX_PG_CONFIG_PATH='$(PG_CONFIG)' CARGO_TARGET_DIR='$(library_target)' cargo

.PHONY: help demo test up down bench install library relay unit setup clean

help:
	@echo 'make demo | test | up | down | bench [ONLY=name] | install PG_CONFIG=… [DESTDIR=…]'

setup:
	@scripts/setup.sh

# A fresh make, because the server's pg_config may not have been there when this one started.
demo up: setup
	@$(MAKE) --no-print-directory install relay
	@PG_CONFIG='$(PG_CONFIG)' cargo run --quiet --release -p outbox-tests --bin $(if $(filter up,$@),dev -- up,demo)

down:
	@cargo run --quiet --release -p outbox-tests --bin dev -- down

test: setup
	@$(MAKE) --no-print-directory install relay unit
	@PG_CONFIG='$(PG_CONFIG)' cargo test --release -p outbox-tests

bench: setup
	@$(MAKE) --no-print-directory install relay
	@PG_CONFIG='$(PG_CONFIG)' cargo run --quiet --release -p outbox-tests --bin bench -- $(ONLY)

unit:
	@cargo test --release -p outbox-relay
	@cargo test --release -p outbox-models
	@$(library_cargo) test --release -p pg_outbox --lib --features pg$(major)

relay:
	@cargo build --release -p outbox-relay

library:
	@[ -n '$(PG_CONFIG)' ] || { echo 'no PostgreSQL found: set PG_CONFIG to its pg_config' >&2; exit 1; }
	@$(library_cargo) build --release -p pg_outbox --features pg$(major)

install: library
	@scripts/install.sh '$(PG_CONFIG)' '$(library_target)/release/libpg_outbox.so' '$(VERSION)' '$(DESTDIR)'

clean:
	cargo clean
	rm -rf .cache

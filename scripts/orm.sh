#!/usr/bin/env bash
# Downloads SQLAlchemy, psycopg and Django from PyPI unless they are there already, and prints the directory for PYTHONPATH.
set -euo pipefail
cache=$(cd "$(dirname "$0")/.." && pwd)/.cache
packages='psycopg[binary]==3.2.3 sqlalchemy==2.0.36 django==5.2.8'
dir=$cache/orm-$(printf '%s' "$packages" | cksum | cut -d ' ' -f 1)
mkdir -p "$cache"
exec 9>"$dir.lock"
flock 9
if [ ! -d "$dir" ]; then
    rm -rf "$dir.new"
    python3 -m pip install --quiet --disable-pip-version-check --target "$dir.new" $packages >&2
    mv "$dir.new" "$dir"
fi
printf '%s\n' "$dir"

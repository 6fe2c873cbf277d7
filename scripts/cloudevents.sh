#!/usr/bin/env bash
# Downloads the reference library of CloudEvents from PyPI unless it is there already, and prints the directory for
# PYTHONPATH.
set -euo pipefail
cache=$(cd "$(dirname "$0")/.." && pwd)/.cache
dir=$cache/cloudevents
mkdir -p "$cache"
exec 9>"$dir.lock"
flock 9
if [ ! -d "$dir" ]; then
    rm -rf "$dir.new"
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$dir.new" \
        cloudevents==2.2.0 python-dateutil==2.9.0.post0 six==1.17.0 >&2
    mv "$dir.new" "$dir"
fi
printf '%s\n' "$dir"

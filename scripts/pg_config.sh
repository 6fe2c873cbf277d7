#!/usr/bin/env bash
# Prints the pg_config of the PostgreSQL that is meant: the one that PG_CONFIG names, else Debian's 15, else the newest of
# Debian's, else the one on the path. Fails if there is none.
set -euo pipefail
if [ -n "${PG_CONFIG:-}" ]; then
    printf '%s\n' "$PG_CONFIG"
    exit
fi
for found in /usr/lib/postgresql/15/bin/pg_config $(compgen -G '/usr/lib/postgresql/*/bin/pg_config' | sort -rV); do
    if [ -x "$found" ]; then
        printf '%s\n' "$found"
        exit
    fi
done
command -v pg_config || { echo 'No PostgreSQL found. Set PG_CONFIG to the path of its pg_config.' >&2; exit 1; }

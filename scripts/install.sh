#!/usr/bin/env bash
# Installs the built extension for one PostgreSQL. Arguments: pg_config, library. DESTDIR is honoured.
set -euo pipefail
pg_config=$1 library=$2 destdir=${DESTDIR:-}
cd "$(dirname "$0")/.."
libdir=$destdir$("$pg_config" --pkglibdir) extdir=$destdir$("$pg_config" --sharedir)/extension

staged=$(mktemp -d)
trap 'rm -rf "$staged"' EXIT
cp "$library" "$staged/pg_outbox.so"
scripts/extension-files.sh "$staged"

# If the same files are there already, nothing is written, so no right to write is needed.
same=yes
for file in "$staged"/*; do
    case $file in *.so) target=$libdir ;; *) target=$extdir ;; esac
    cmp -s "$file" "$target/${file##*/}" || same=no
done
[ "$same" = no ] || exit 0

sudo=()
writable() { mkdir -p "$1" 2>/dev/null && [ -w "$1" ]; }
if ! writable "$libdir" || ! writable "$extdir"; then
    command -v sudo >/dev/null || { echo "install: can't write to $libdir; run as root, or set DESTDIR" >&2; exit 1; }
    sudo=(sudo)
fi
"${sudo[@]}" mkdir -p "$libdir" "$extdir"
# The old file is removed first, not overwritten: a running server has it mapped.
"${sudo[@]}" rm -f "$libdir/pg_outbox.so"
"${sudo[@]}" install -m 755 "$staged/pg_outbox.so" "$libdir/"
"${sudo[@]}" install -m 644 "$staged"/*.control "$staged"/*.sql "$extdir/"
echo "installed pg_outbox into $libdir and $extdir"

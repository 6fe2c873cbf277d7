#!/usr/bin/env bash
# An upgrade with the real programs of an older version, which takes two compilations of them. Argument: the commit or tag
# of that version. Needs the right to install the extension.
#
# 1. A server runs the old library and the new files are installed: the update is refused until the server is restarted.
# 2. The old relay is at work while the extension is updated (tests/it/upgrade.rs).
set -euo pipefail
commit=$1
cd "$(dirname "$0")/.."
make --no-print-directory install relay
pg_config=${PG_CONFIG:-$(ls -d /usr/lib/postgresql/*/bin/pg_config | sort -V | tail -n 1)}
major=$("$pg_config" --version | sed 's/[^0-9]*\([0-9]*\).*/\1/')
bindir=$("$pg_config" --bindir) library=$("$pg_config" --pkglibdir)/pg_outbox.so

old=$PWD/.cache/old-$commit
mkdir -p "$old"
git archive "$commit" | tar -x -C "$old"
version=$(sed -n "s/^default_version = '\(.*\)'/\1/p" "$old/pg_outbox_ext/pg_outbox.control")
(cd "$old" && PGRX_PG_CONFIG_PATH=$pg_config cargo build --release -p pg_outbox --features "pg$major" \
    && cargo build --release -p outbox-relay)

work=$(mktemp -d)
port=$((20000 + RANDOM % 10000))
down=()
[ "$(id -u)" -ne 0 ] || { chown postgres "$work"; down=(setpriv --reuid=postgres --regid=postgres --clear-groups); }
control() { "${down[@]}" "$bindir/pg_ctl" -D "$work/data" -w -s -l "$work/log" "$@"; }
clean() { control -m immediate stop || true; cp "$work/new.so" "$library.new" && mv "$library.new" "$library"; rm -rf "$work"; }
sql() { psql -X -q -At -v ON_ERROR_STOP=1 -h "$work" -p "$port" -d postgres "$@"; }
export PGUSER=rehearsal
cp "$library" "$work/new.so"
cp "$old/target/release/libpg_outbox.so" "$library.new"
trap clean EXIT
mv "$library.new" "$library"
"${down[@]}" "$bindir/initdb" -D "$work/data" -U rehearsal -A trust --no-sync >/dev/null
control -o "-p $port -k $work -c listen_addresses= -c shared_preload_libraries=pg_outbox" start
sql -c "CREATE EXTENSION pg_outbox VERSION '$version'" -c "SELECT outbox.publish('a', '{}')" >/dev/null
cp "$work/new.so" "$library.new" && mv "$library.new" "$library"
refusal=$(sql -c 'ALTER EXTENSION pg_outbox UPDATE' 2>&1 || true)
grep -q 'Restart PostgreSQL' <<<"$refusal" || { echo "not refused: $refusal" >&2; exit 1; }
control restart
sql -c 'ALTER EXTENSION pg_outbox UPDATE'
[ "$(sql -c 'SELECT count(*) FROM outbox.claim()')" = 1 ] || { echo "the event is gone" >&2; exit 1; }
echo "the library: refused before the restart, updated after it"

OUTBOX_OLD_RELAY=$old/target/release/outbox-relay PG_CONFIG=$pg_config \
    cargo test --release -p outbox-tests --test it -- an_update_under_load

#!/usr/bin/env bash
# Writes the extension's control file and SQL scripts into a directory: the install script of this version, those of
# released versions, and the scripts that upgrade from each to the next. Argument: the directory.
#
# An upgrade script begins with sql/upgrades/OLD--NEW.sql. That file says by hand how tables, types and triggers changed
# and which functions are gone, and it has a line "\layers". Where that stands, the last script of all repeats what
# can be replaced: the functions, views, comments, owners and grants of sql/ (scripts/upgradable.awk).
set -euo pipefail
out=$1
cd "$(dirname "$0")/.."
version=$(sed -n "s/^default_version = '\(.*\)'/\1/p" pg_outbox_ext/pg_outbox.control)
[ -n "$version" ] || { echo "no default_version in pg_outbox.control" >&2; exit 1; }

cp pg_outbox_ext/pg_outbox.control sql/released/pg_outbox--*.sql "$out/"
cat sql/[0-9]*.sql > "$out/pg_outbox--$version.sql"

layers=$(mktemp)
trap 'rm -f "$layers"' EXIT
awk -f scripts/upgradable.awk sql/[0-9]*.sql > "$layers"
for upgrade in sql/upgrades/*--*.sql; do
    name=${upgrade##*/}
    new=${name#*--}
    {
        echo '\echo Use "ALTER EXTENSION pg_outbox UPDATE" to load this file. \quit'
        sed "s/@version@/$version/g" sql/upgrades/begin.sql
        case $new in
            # Between these two a later version's functions may not fit the tables.
            "$version.sql") sed -e "/^\\\\layers\$/{r $layers" -e 'd}' "$upgrade"; cat sql/upgrades/end.sql ;;
            *) sed '/^\\layers$/d' "$upgrade" ;;
        esac
    } > "$out/pg_outbox--$name"
done

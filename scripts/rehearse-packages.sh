#!/usr/bin/env bash
# Installs the packages of target/packages with apt into a new root of this machine's Debian, and delivers an event there:
# PostgreSQL and the relay run from what the packages installed. Then it removes them again. Needs root, debootstrap and
# some minutes. Arguments: PostgreSQL's major version, and a directory with a root that debootstrap made (optional).
set -euo pipefail
major=$1 base=${2:-}
cd "$(dirname "$0")/.."
packages=$PWD/target/packages
root=$(mktemp -d) port=$((20000 + RANDOM % 10000)) hook=$((10000 + RANDOM % 10000))
rooted=(chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8)
in_root() { "${rooted[@]}" "$@"; }
receiver='' relay=''
clean() {
    [ -z "$receiver" ] || kill "$receiver" || true
    [ -z "$relay" ] || kill "$relay" || true
    in_root pg_ctlcluster "$major" rehearsal stop -m immediate 2>/dev/null || true
    umount "$root/proc" || true
    rm -rf --one-file-system "$root"
}
trap clean EXIT
if [ -n "$base" ]; then
    cp -a "$base/." "$root/"
else
    debootstrap --variant=minbase "$(. /etc/os-release && echo "$VERSION_CODENAME")" "$root"
fi
chmod 755 "$root"
cp /etc/resolv.conf "$root/etc/"
mount -t proc proc "$root/proc"
printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
mkdir -p "$root/etc/postgresql-common/createcluster.d" "$root/packages"
echo 'create_main_cluster = false' > "$root/etc/postgresql-common/createcluster.d/rehearsal.conf"
cp "$packages"/outbox-relay_*.deb "$packages"/postgresql-"$major"-outbox_*.deb "$root/packages/"

in_root apt-get update -q
in_root sh -c "apt-get install -y -q --no-install-recommends /packages/*.deb"
in_root outbox-relay --version
in_root sh -c '[ "$(stat -c %a /etc/outbox-relay/database-url)" = 600 ]'

in_root pg_createcluster -p "$port" "$major" rehearsal -- --no-sync
echo "shared_preload_libraries = 'pg_outbox'" >> "$root/etc/postgresql/$major/rehearsal/conf.d/outbox.conf"
in_root pg_ctlcluster "$major" rehearsal start
sql() { in_root setpriv --reuid=postgres --regid=postgres --clear-groups psql -X -q -At -v ON_ERROR_STOP=1 -p "$port" "$@"; }
python3 -c "
from http.server import *
class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(204)
        self.end_headers()
HTTPServer(('127.0.0.1', $hook), Answer).serve_forever()" 2>/dev/null &
receiver=$!
sql -c 'CREATE EXTENSION pg_outbox' -c "CREATE ROLE relay LOGIN PASSWORD 'relay'" \
    -c "SELECT outbox.grant_relay('relay')" -c "SELECT outbox.add_webhook('hook', 'http://127.0.0.1:$hook/')" \
    -c "SELECT outbox.publish('package.installed', '{}')" >/dev/null
echo "postgres://relay:relay@127.0.0.1:$port/postgres" > "$root/etc/outbox-relay/database-url"
"${rooted[@]}" env DATABASE_URL_FILE=/etc/outbox-relay/database-url HTTP_LISTEN=127.0.0.1:0 \
    OUTBOX_WEBHOOK_ALLOW_NETWORKS=127.0.0.0/8 outbox-relay run --config /etc/outbox-relay/config.toml &
relay=$!
for _ in $(seq 100); do
    status=$(sql -c 'SELECT status FROM outbox_events')
    [ "$status" != processed ] || break
    sleep 0.1
done
[ "$status" = processed ] || { echo "the event is $status" >&2; exit 1; }
kill "$relay"
wait "$relay"
relay=''
in_root apt-get purge -y -q outbox-relay "postgresql-$major-outbox"
left=$(find "$root/etc/outbox-relay" "$root/usr/bin/outbox-relay" "$root/usr/lib/postgresql/$major/lib/pg_outbox.so" 2>/dev/null || true)
[ -z "$left" ] || { echo "left behind: $left" >&2; exit 1; }
echo "installed, delivered, removed"

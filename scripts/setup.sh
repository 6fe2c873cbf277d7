#!/usr/bin/env bash
# Installs the packages that this machine lacks: those that building and running need, and with the argument "tests" what
# the tests need besides. It asks nothing, and does nothing when all of them are there. It leaves no server running: no
# cluster is created and no service started by the packages.
set -euo pipefail

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

command -v cargo >/dev/null || die "Rust is missing; install it from https://rustup.rs and try again"
command -v cc >/dev/null || die "a C compiler is missing; install gcc or clang and try again"

# If PG_CONFIG names another PostgreSQL that has the file, Debian's is not needed.
given() { [ -n "${PG_CONFIG:-}" ] && [ -e "$("$PG_CONFIG" "--$1")/$2" ]; }
missing=()
have() { [ -e "$1" ] || missing+=("$2"); }
libclang() { compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null || compgen -G '/usr/lib/*/libclang*.so*' >/dev/null; }
server() { given bindir postgres || compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null; }
headers() { given includedir-server postgres.h || compgen -G '/usr/include/postgresql/*/server/postgres.h' >/dev/null; }

server || missing+=(postgresql)
headers || missing+=(postgresql-server-dev-all)
have /usr/lib/rabbitmq/bin/rabbitmq-server rabbitmq-server
libclang || missing+=(libclang-dev clang)
command -v pkg-config >/dev/null || missing+=(pkg-config)
command -v setpriv >/dev/null || missing+=(util-linux)
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
if [ "${1:-}" = tests ]; then
    have /usr/sbin/pgbouncer pgbouncer
    command -v chromium >/dev/null || missing+=(chromium)
    command -v chromedriver >/dev/null || missing+=(chromium-driver)
    command -v prometheus >/dev/null && command -v promtool >/dev/null || missing+=(prometheus)
    command -v curl >/dev/null || missing+=(curl)
    command -v node >/dev/null || missing+=(nodejs)
    ruby -e 'require "active_record"; require "pg"' 2>/dev/null || missing+=(ruby-activerecord ruby-pg)
    python3 -m pip --version >/dev/null 2>&1 || missing+=(python3-pip)
fi
[ ${#missing[@]} -gt 0 ] || exit 0

command -v apt-get >/dev/null || die "please install: ${missing[*]} (only Debian and Ubuntu are set up automatically)"
sudo=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || die "please install as root: apt-get install ${missing[*]}"
    sudo=(sudo)
    sudo -n true 2>/dev/null || [ -t 0 ] || die "sudo needs a password and there is no terminal; please install as root: apt-get install ${missing[*]}"
fi
say "installing ${missing[*]}"

# The packages installed now start no service and create no cluster; servers that run already are left alone.
policy=/usr/sbin/policy-rc.d clusters=/etc/postgresql-common/createcluster.d/pg_outbox-setup.conf
made=()
clean() { [ ${#made[@]} -eq 0 ] || "${sudo[@]}" rm -f "${made[@]}"; }
trap clean EXIT
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$policy" >/dev/null
    "${sudo[@]}" chmod 755 "$policy"
    made+=("$policy")
fi
"${sudo[@]}" mkdir -p "$(dirname "$clusters")"
printf 'create_main_cluster = false\n' | "${sudo[@]}" tee "$clusters" >/dev/null
made+=("$clusters")

apt() { "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -y -q "$@" >&2 </dev/null; }
apt update
# Only the headers of the installed version are needed.
wanted=()
for package in "${missing[@]}"; do
    # Where there is no such package, the tests that need a browser say so.
    case $package in chromium*)
        apt-cache show "$package" >/dev/null 2>&1 || { say "there is no package $package here: tests in a browser will fail"; continue; } ;;
    esac
    [ "$package" = postgresql-server-dev-all ] || { wanted+=("$package"); continue; }
    major=$(apt-cache depends postgresql | sed -n 's/.*Depends: postgresql-\([0-9]\+\)$/\1/p' | head -n 1)
    server && major=$(basename "$(dirname "$(dirname "$(compgen -G '/usr/lib/postgresql/*/bin/postgres' | sort -V | tail -n 1)")")")
    wanted+=("postgresql-server-dev-$major")
done
apt install --no-install-recommends "${wanted[@]}"

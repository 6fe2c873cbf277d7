#!/usr/bin/env bash
# Builds Debian packages into target/packages: of the relay, and of the extension for each of Debian's PostgreSQLs that is
# installed here, each with its debug symbols in a package of their own. With OUT, RELAY, LIBRARY and PG_CONFIG in the
# environment it takes these programs, and that PostgreSQL alone: so a test need not compile them.
set -euo pipefail
cd "$(dirname "$0")/.."
version=$(sed -n "s/^default_version = '\(.*\)'/\1/p" pg_outbox_ext/pg_outbox.control)
architecture=$(dpkg --print-architecture)
# The same input gives the same bytes.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH
umask 022
out=${OUT:-$PWD/target/packages}
mkdir -p "$out"
staging=$(mktemp -d)
trap 'rm -rf "$staging"' EXIT

# Takes the debug symbols out of a program of a package: they become a package of their own.
strip_into() { # program in the tree, package, tree of the symbols
    local id
    id=$(readelf -n "$1" | sed -n 's/.*Build ID: *//p')
    [ -n "$id" ] || { echo "$1 has no build ID" >&2; exit 1; }
    local symbols=$3/usr/lib/debug/.build-id/${id:0:2}/${id:2}.debug
    mkdir -p "${symbols%/*}"
    objcopy --only-keep-debug --compress-debug-sections=zlib "$1" "$symbols"
    chmod 644 "$symbols"
    strip --strip-unneeded --remove-section=.comment "$1"
    pack "$3" "$2-dbgsym" "Depends: $2 (= $version)" "Section: debug" "Description: debug symbols of $2"
}

# The oldest libc that has all that a program asks for.
libc_of() {
    printf 'libc6 (>= %s), libgcc-s1' "$(objdump -T "$1" | grep -o 'GLIBC_[0-9.]*' | sed 's/GLIBC_//' | sort -Vu | tail -n 1)"
}

documentation() { # tree, package, cargo's package, features
    local doc=$1/usr/share/doc/$2
    mkdir -p "$doc"
    scripts/sbom.py "$3" "$4" "$doc/$2.cdx.json" "$doc/third-party-licences"
    gzip -9n "$doc/third-party-licences"
    { cat LICENSE; echo; echo "The libraries that are compiled in: third-party-licences.gz, $2.cdx.json."; } > "$doc/copyright"
    gzip -9nc CHANGELOG.md > "$doc/changelog.gz"
}

pack() { # tree, package, lines of its control file
    local tree=$1 package=$2
    shift 2
    mkdir -p "$tree/DEBIAN"
    {
        printf 'Package: %s\nVersion: %s\nArchitecture: %s\nMaintainer: the pg_outbox developers <pg_outbox@localhost>\n' \
            "$package" "$version" "$architecture"
        printf 'Priority: optional\nInstalled-Size: %s\n' "$(du -sk --exclude=DEBIAN "$tree" | cut -f1)"
        printf '%s\n' "$@"
    } > "$tree/DEBIAN/control"
    (cd "$tree" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | sort -z | xargs -0 md5sum > DEBIAN/md5sums)
    # Debug symbols are compressed already.
    local compression=xz
    [[ $package != *-dbgsym ]] || compression=none
    dpkg-deb --root-owner-group -Z$compression --build "$tree" "$out/${package}_${version}_$architecture.deb" >/dev/null
    echo "$out/${package}_${version}_$architecture.deb"
}

relay() { # the built program
    local tree=$staging/relay program
    program=$tree/usr/bin/outbox-relay
    install -D -m 755 "$1" "$program"
    install -D -m 644 packaging/outbox-relay.service "$tree/lib/systemd/system/outbox-relay.service"
    install -D -m 644 packaging/config.toml "$tree/etc/outbox-relay/config.toml"
    local share=$tree/usr/share
    mkdir -p "$share/man/man1" "$share/bash-completion/completions" "$share/zsh/vendor-completions" \
        "$share/fish/vendor_completions.d" "$tree/DEBIAN"
    "$program" man | gzip -9n > "$share/man/man1/outbox-relay.1.gz"
    "$program" completions bash > "$share/bash-completion/completions/outbox-relay"
    "$program" completions zsh > "$share/zsh/vendor-completions/_outbox-relay"
    "$program" completions fish > "$share/fish/vendor_completions.d/outbox-relay.fish"
    documentation "$tree" outbox-relay outbox-relay ""
    for script in postinst prerm postrm; do
        install -m 755 "packaging/outbox-relay.$script" "$tree/DEBIAN/$script"
    done
    echo /etc/outbox-relay/config.toml > "$tree/DEBIAN/conffiles"
    strip_into "$program" outbox-relay "$staging/relay-dbgsym"
    pack "$tree" outbox-relay "Section: database" "Depends: $(libc_of "$program")" "Recommends: ca-certificates" \
        "Description: publishes the events of pg_outbox to RabbitMQ and to signed webhooks" \
        " A transactional outbox for PostgreSQL that pushes and never polls: this is the" \
        " program that delivers, postgresql-NN-outbox is the extension that it needs."
}

extension() { # pg_config, the built library
    local pg_config=$1 major package tree
    major=$("$pg_config" --version | sed 's/[^0-9]*\([0-9]*\).*/\1/')
    package=postgresql-$major-outbox tree=$staging/$major
    DESTDIR=$tree scripts/install.sh "$pg_config" "$2" >/dev/null
    local library
    library=$tree$("$pg_config" --pkglibdir)/pg_outbox.so
    chmod 644 "$library"
    documentation "$tree" "$package" pg_outbox "pg$major"
    strip_into "$library" "$package" "$staging/$major-dbgsym"
    pack "$tree" "$package" "Section: database" "Depends: postgresql-$major, $(libc_of "$library")" \
        "Description: transactional outbox for PostgreSQL $major that pushes and never polls" \
        " Events are inserted in the transaction that changes the data, and announced" \
        " when it commits. Add pg_outbox to shared_preload_libraries, restart" \
        " PostgreSQL, and run CREATE EXTENSION pg_outbox."
}

if [ -n "${LIBRARY:-}" ]; then
    relay "$RELAY"
    extension "$PG_CONFIG" "$LIBRARY"
    exit
fi
make --no-print-directory relay
relay target/release/outbox-relay
for server in /usr/lib/postgresql/*/bin/postgres; do
    pg_config=${server%postgres}pg_config
    major=${server#/usr/lib/postgresql/} major=${major%%/*}
    if [ ! -e "$("$pg_config" --includedir-server)/postgres.h" ]; then
        echo "packages: the headers are missing: install postgresql-server-dev-$major" >&2
        exit 1
    fi
    make --no-print-directory library PG_CONFIG="$pg_config"
    # As in the Makefile.
    target=target
    [ "$major" = 15 ] || target=target/pg$major
    extension "$pg_config" "$target/release/libpg_outbox.so"
done

#!/usr/bin/env bash
# Downloads node-postgres and what it needs from npm's registry unless they are there already, and prints the directory for
# NODE_PATH. npm itself is not needed.
set -euo pipefail
packages="\
pg 8.16.3 33c9619b46fec18bd5d0f01043302226acd532e1e7e2f447514b08e1e568b056
pg-connection-string 2.14.1 22f69d9711c971d8b66eb78474073ba7f47f27bb69a4347c13cb8ab7c75dfaff
pg-int8 1.0.1 f010d48974a96814e841edbb6fc6096385574610714d2a50e99811170c365e92
pg-pool 3.14.0 0b0b8729c09d5eaa059313c9c3d11efc8907441386bbf86ccc57e1298c6ce71a
pg-protocol 1.16.1 e1315b9dc839a029109e3a521c1dd1d9c7265722fdbc50d27ff5f7274f70732f
pg-types 2.2.0 c4804fd058140c32f8fda78883ad45dee3eaa4fd9e9127b6eb659fefe51981bd
pgpass 1.0.5 ff794c956186430afd600b5bc4500f3f0faf34b62be6ff98494f4c7f4a6d8597
postgres-array 2.0.0 dbf1035c777631d4b0a4b5c035b1f6247dd923db6b2ea115b93b1eabb172b3a0
postgres-bytea 1.0.1 0395e34ecb9945b0003132af6e11463ec7ec8f17fb5cbdbccc5a822bd6807d96
postgres-date 1.0.7 a67a8d90e7b8f64041a6f425b102b27a3e86d5854ace7e9414a890912f3adb59
postgres-interval 1.2.0 e67563626b30aa7d22caf930e38529bb137476146a11eaaa0bb1e07c0a2413b1
split2 4.2.0 e0061e7f042fc5ff6dcda8afb66619757d92ab1ff514a28a5904f2ebde27bf54
xtend 4.0.2 bd22a01d43c799be7bb53dfa9e775b132045e39525e51efb977528a00041ba48"
cache=$(cd "$(dirname "$0")/.." && pwd)/.cache
dir=$cache/node-postgres-$(printf '%s' "$packages" | cksum | cut -d ' ' -f 1)
mkdir -p "$cache"
exec 9>"$cache/node-postgres.lock"
flock 9
if [ ! -d "$dir" ]; then
    rm -rf "$dir.new"
    while read -r name version sha256; do
        mkdir -p "$dir.new/$name"
        curl -fsSL --retry 3 -o "$dir.new/$name.tgz" "https://registry.npmjs.org/$name/-/$name-$version.tgz"
        echo "$sha256  $dir.new/$name.tgz" | sha256sum --check --quiet >&2
        tar -xzf "$dir.new/$name.tgz" -C "$dir.new/$name" --strip-components=1
        rm "$dir.new/$name.tgz"
    done <<<"$packages"
    mv "$dir.new" "$dir"
fi
printf '%s\n' "$dir"

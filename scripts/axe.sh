#!/usr/bin/env bash
# Downloads axe-core, which finds faults of accessibility in a page, from npm's registry unless it is there already, and
# prints the path of its script.
set -euo pipefail
version=4.14.1
sha256=e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745
cache=$(cd "$(dirname "$0")/.." && pwd)/.cache
file=$cache/axe-$version.min.js
mkdir -p "$cache"
exec 9>"$cache/axe.lock"
flock 9
if [ ! -e "$file" ]; then
    new=$(mktemp -d "$cache/axe.XXXXXX")
    trap 'rm -rf "$new"' EXIT
    curl -fsSL --retry 3 -o "$new/axe.tgz" "https://registry.npmjs.org/axe-core/-/axe-core-$version.tgz"
    echo "$sha256  $new/axe.tgz" | sha256sum --check --quiet >&2
    tar -xzf "$new/axe.tgz" -C "$new" package/axe.min.js
    mv "$new/package/axe.min.js" "$file"
fi
printf '%s\n' "$file"

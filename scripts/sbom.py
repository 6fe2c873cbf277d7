#!/usr/bin/env python3
"""What a program of this workspace is made of. Arguments: package, features or "", a path for the list of components
(CycloneDX 1.5, JSON), and one for the texts of their licences. Both list what is compiled in, not what builds or tests it."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

package, features, sbom_path, licences_path = sys.argv[1:]
root = Path(__file__).resolve().parent.parent
target = next(line.split()[1] for line in
              subprocess.check_output(["rustc", "-vV"], text=True).splitlines() if line.startswith("host:"))
command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", target]
if features:
    command += ["--features", features]
metadata = json.loads(subprocess.check_output(command, cwd=root, text=True))
packages = {one["id"]: one for one in metadata["packages"]}
nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
top = next(one["id"] for one in metadata["packages"] if one["name"] == package and one["source"] is None)

checksums = {}
for entry in (root / "Cargo.lock").read_text().split("[[package]]")[1:]:
    fields = dict(line.split(" = ", 1) for line in entry.splitlines() if " = " in line)
    if "checksum" in fields:
        checksums[fields["name"].strip('"'), fields["version"].strip('"')] = fields["checksum"].strip('"')


def compiled_in(node):
    """Dependencies that end in the program: neither for build scripts nor for tests, and no procedural macros."""
    for dependency in nodes[node]["deps"]:
        kinds = [kind["kind"] for kind in dependency["dep_kinds"]]
        macro = any("proc-macro" in target["kind"] for target in packages[dependency["pkg"]]["targets"])
        if None in kinds and not macro:
            yield dependency["pkg"]


found, open_ones = {top}, [top]
while open_ones:
    for dependency in compiled_in(open_ones.pop()):
        if dependency not in found:
            found.add(dependency)
            open_ones.append(dependency)


def ref(one):
    return f"pkg:cargo/{packages[one]['name']}@{packages[one]['version']}"


def component(one):
    about = packages[one]
    described = {"type": "application" if one == top else "library", "bom-ref": ref(one), "name": about["name"],
                 "version": about["version"], "purl": ref(one)}
    if about["description"]:
        described["description"] = " ".join(about["description"].split())
    if about["license"]:
        # Cargo's old way to say OR.
        described["licenses"] = [{"expression": about["license"].replace("/", " OR ").replace("  ", " ")}]
    if (about["name"], about["version"]) in checksums:
        described["hashes"] = [{"alg": "SHA-256", "content": checksums[about["name"], about["version"]]}]
    return described


libraries = sorted(found - {top}, key=ref)
sbom = {
    "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
    # The same for the same contents, so that a package can be built again bit for bit.
    "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, " ".join([features, *map(ref, sorted(found, key=ref))])).urn,
    "metadata": {"component": component(top)},
    "components": [component(one) for one in libraries],
    "dependencies": [{"ref": ref(one), "dependsOn": sorted(set(map(ref, compiled_in(one))))}
                     for one in sorted(found, key=ref)],
}
Path(sbom_path).write_text(json.dumps(sbom, indent=1) + "\n")

with open(licences_path, "w") as out:
    for one in libraries:
        about = packages[one]
        out.write(f"{'=' * 78}\n{about['name']} {about['version']}: {about['license'] or 'see its file'}\n")
        folder = Path(about["manifest_path"]).parent
        texts = sorted(path for path in folder.iterdir() if path.is_file() and
                       path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE")))
        for path in texts:
            out.write(f"{'-' * 78}\n{path.read_text(errors='replace')}\n")
        if not texts:
            # The text of a licence that it names is in this package's own copyright file or in common-licenses.
            out.write(f"Authors: {', '.join(about['authors']) or 'not named'}; {about['repository'] or about['name']}\n")

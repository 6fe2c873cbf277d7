//! What `make packages` makes is what Debian's tools take; and one version is said by all files that name it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use outbox_tests::process::run;
use serde_json::Value;

const VERSION: &str = env!("CARGO_PKG_VERSION");

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(repository().join(path)).with_context(|| path.to_owned())
}

#[test]
fn one_version_is_said_everywhere() -> Result<()> {
    for (path, line) in [
        ("pg_outbox_ext/pg_outbox.control", format!("\ndefault_version = '{VERSION}'\n")),
        ("deploy/kubernetes.yaml", format!("image: outbox-relay:{VERSION}\n")),
    ] {
        ensure!(read(path)?.contains(&line), "{path} has no line {line:?}");
    }
    let meta: Value = serde_json::from_str(&read("META.json")?)?;
    assert_eq!((&meta["version"], &meta["provides"]["pg_outbox"]["version"]), (&VERSION.into(), &VERSION.into()));
    let script = meta["provides"]["pg_outbox"]["file"].as_str().context("no file")?;
    ensure!(repository().join(script).exists(), "META.json names {script}");
    Ok(())
}

/// The stop of the unit and of the pod is later than the relay's own.
#[test]
fn the_relay_may_take_its_time_to_end() -> Result<()> {
    let help = {
        let mut command = outbox_tests::relay::command(None)?;
        command.args(["run", "--help"]);
        String::from_utf8(run(command)?.stdout)?
    };
    ensure!(help.contains("Seconds to finish after SIGTERM [default: 25]"), "{help}");
    ensure!(read("packaging/outbox-relay.service")?.contains("\nTimeoutStopSec=30\n"));
    ensure!(read("deploy/kubernetes.yaml")?.contains("terminationGracePeriodSeconds: 30\n"));
    ensure!(read("compose.yaml")?.contains("stop_grace_period: 30s\n"));
    Ok(())
}

/// `scripts/packages.sh` with stand-ins for what takes minutes to compile: the relay of this test, and for the library
/// the installed one.
#[test]
fn debian_takes_the_packages() -> Result<()> {
    let out = outbox_tests::scratch::dir("packages")?;
    let installation = outbox_tests::postgres::Installation::get()?;
    let library = installation.pkglibdir.join("pg_outbox.so");
    let pg_config = installation.bindir.join("pg_config");
    let mut command = Command::new(repository().join("scripts/packages.sh"));
    command.env("OUT", &out).env("RELAY", outbox_tests::relay::binary()?).env("LIBRARY", library);
    command.env("PG_CONFIG", &pg_config);
    run(command)?;

    let (major, architecture) = (installation.major, architecture()?);
    let file = |package: &str| out.join(format!("{package}_{VERSION}_{architecture}.deb"));
    let contents = |package: &str| dpkg("--contents", &file(package));
    let relay = contents("outbox-relay")?;
    for path in [
        "/usr/bin/outbox-relay",
        "/lib/systemd/system/outbox-relay.service",
        "/etc/outbox-relay/config.toml",
        "/usr/share/man/man1/outbox-relay.1.gz",
        "/usr/share/bash-completion/completions/outbox-relay",
        "/usr/share/doc/outbox-relay/copyright",
        "/usr/share/doc/outbox-relay/third-party-licences.gz",
        "/usr/share/doc/outbox-relay/outbox-relay.cdx.json",
    ] {
        ensure!(relay.lines().any(|line| line.ends_with(&format!(".{path}"))), "{path} is not in\n{relay}");
    }
    ensure!(dpkg("--field", &file("outbox-relay"))?.contains("\nDepends: libc6 (>= 2."));
    ensure!(contents("outbox-relay-dbgsym")?.contains("/usr/lib/debug/.build-id/"));

    let package = format!("postgresql-{major}-outbox");
    let extension = contents(&package)?;
    for name in
        ["pg_outbox.so", "pg_outbox.control", &format!("pg_outbox--{VERSION}.sql"), "pg_outbox--0.1.0--0.2.0.sql"]
    {
        ensure!(extension.lines().any(|line| line.ends_with(&format!("/{name}"))), "{name} is not in\n{extension}");
    }
    ensure!(dpkg("--field", &file(&package))?.contains(&format!("\nDepends: postgresql-{major}, libc6 (>= 2.")));
    let unpacked = out.join("unpacked");
    let mut command = Command::new("dpkg-deb");
    command.arg("--extract").arg(file("outbox-relay")).arg(&unpacked);
    run(command)?;
    let program = unpacked.join("usr/bin/outbox-relay");
    ensure!(std::fs::metadata(&program)?.len() < 20_000_000, "it is not stripped");
    let mut command = Command::new(program);
    command.arg("--version");
    assert_eq!(String::from_utf8(run(command)?.stdout)?, format!("outbox-relay {VERSION}\n"));
    let sbom = std::fs::read(unpacked.join("usr/share/doc/outbox-relay/outbox-relay.cdx.json"))?;
    let sbom: Value = serde_json::from_slice(&sbom)?;
    let components = sbom["components"].as_array().context("no components")?;
    ensure!(components.iter().any(|component| component["name"] == "lapin"), "{sbom}");
    ensure!(!components.iter().any(|component| component["name"] == "proptest"), "that is for tests");
    Ok(())
}

fn architecture() -> Result<String> {
    let mut command = Command::new("dpkg");
    command.arg("--print-architecture");
    Ok(String::from_utf8(run(command)?.stdout)?.trim().to_owned())
}

fn dpkg(what: &str, file: &Path) -> Result<String> {
    let mut command = Command::new("dpkg-deb");
    command.arg(what).arg(file);
    Ok(String::from_utf8(run(command)?.stdout)?)
}

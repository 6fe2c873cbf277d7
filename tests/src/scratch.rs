//! Directories, ports and passwords of private servers.
//!
//! Everything that this process creates is under one directory in `/tmp`, short enough for Unix sockets and open enough
//! for the unprivileged user. It is removed when the process ends, in whatever way: a janitor, a shell that waits for
//! the end of a pipe, sees to it.

use std::fs::{self, DirBuilder, File};
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, Result, anyhow};

use crate::process::Account;

/// Below the range from which Linux takes the ports of outgoing connections, so that a server that is stopped for a
/// while finds its port free.
const PORTS: std::ops::Range<u16> = 12_000..32_000;

const JANITOR: &str = r#"trap '' HUP INT TERM
cat >/dev/null
tries=0
while [ -e "$0" ] && [ $tries -lt 300 ]; do rm -rf "$0" 2>/dev/null; tries=$((tries + 1)); sleep 0.1; done"#;

struct Scratch {
    dir: PathBuf,
    _held_open_for_the_janitor: ChildStdin,
}

/// A new directory that belongs to the account of the servers and goes with this process.
pub fn dir(name: &str) -> Result<PathBuf> {
    static SCRATCH: OnceLock<Result<Scratch, String>> = OnceLock::new();
    let scratch = SCRATCH
        .get_or_init(|| create().map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow!("{error}"))?;
    let dir = scratch.dir.join(format!("{name}-{}", random_hex(4)?));
    private_dir(&dir)?;
    Ok(dir)
}

/// Creates a directory that only the account of the servers (and root) can look into.
pub fn private_dir(dir: &Path) -> Result<()> {
    DirBuilder::new().mode(0o700).create(dir).with_context(|| format!("can't create {}", dir.display()))?;
    Account::of_servers()?.give(dir)
}

fn create() -> Result<Scratch> {
    let dir = PathBuf::from(format!("/tmp/outbox-{}-{}", std::process::id(), random_hex(4)?));
    DirBuilder::new().mode(0o711).create(&dir).with_context(|| format!("can't create {}", dir.display()))?;
    let mut janitor = Command::new("/bin/sh")
        .args(["-c", JANITOR])
        .arg(&dir)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .context("can't start /bin/sh")?;
    let stdin = janitor.stdin.take().context("the janitor has no standard input")?;
    Ok(Scratch { dir, _held_open_for_the_janitor: stdin })
}

/// A port of 127.0.0.1 that nothing listens on, and that this process hands out once.
pub fn free_port() -> Result<u16> {
    static NEXT: OnceLock<AtomicU16> = OnceLock::new();
    let span = PORTS.end - PORTS.start;
    let next =
        NEXT.get_or_init(|| AtomicU16::new(u16::from_str_radix(&random_hex(2).unwrap_or_default(), 16).unwrap_or(0)));
    (0..span)
        .map(|_| PORTS.start + next.fetch_add(1, Ordering::Relaxed) % span)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .context("no free port")
}

/// Random bytes in hexadecimal, fit for names and passwords.
pub fn random_hex(bytes: usize) -> Result<String> {
    let mut buffer = vec![0; bytes];
    File::open("/dev/urandom")?.read_exact(&mut buffer)?;
    Ok(buffer.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The end of a log file, for error messages.
pub fn tail(file: &Path, lines: usize) -> String {
    let text = fs::read(file).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

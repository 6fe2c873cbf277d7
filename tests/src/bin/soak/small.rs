//! A small file system for the database's tables, so that a full disk is a fault like another. Only root can mount one, in a
//! mount namespace of its own that ends with this process: nothing is left mounted, however it ends.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::unistd::{User, geteuid};
use outbox_tests::scratch;

/// Set in the process that has a mount namespace of its own.
const INSIDE: &str = "OUTBOX_SOAK_INSIDE";

const SIZE: &str = "384m";

/// Takes this process's place with one in a mount namespace of its own, where that can be had.
pub fn enter() {
    if std::env::var_os(INSIDE).is_some() || !geteuid().is_root() {
        return;
    }
    let inside = || Command::new("unshare").args(["--mount", "--propagation", "private", "true"]).status();
    let Ok(program) = std::env::current_exe() else { return };
    if inside().is_ok_and(|status| status.success()) {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private"]).arg(program).args(std::env::args_os().skip(1));
        // Comes back only if it fails; then the soak goes on without a full disk.
        let error = command.env(INSIDE, "1").exec();
        eprintln!("no mount namespace: {error}");
    }
}

pub struct Disk(PathBuf);

impl Disk {
    /// None where nothing can be mounted.
    pub fn mount() -> Result<Option<Self>> {
        if std::env::var_os(INSIDE).is_none() {
            return Ok(None);
        }
        let dir = scratch::dir("small")?;
        let owner = ["postgres", "nobody"].iter().find_map(|name| User::from_name(name).ok().flatten());
        let owner = owner.context("no account of the servers")?;
        let options = format!("size={SIZE},mode=0700,uid={},gid={}", owner.uid, owner.gid);
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&dir).status()?;
        ensure!(status.success(), "can't mount a small file system: {status}");
        Ok(Some(Disk(dir)))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    /// Takes all the space that is left.
    pub fn fill(&self) -> Result<()> {
        let mut file = File::create(self.filler())?;
        let block = vec![0; 1 << 16];
        loop {
            match file.write_all(&block) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENOSPC as i32) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    pub fn empty(&self) -> Result<()> {
        Ok(fs::remove_file(self.filler())?)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: servers may still have files open there. The namespace ends with this process in any case.
        let _gone = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

//! What systemd is told (sd_notify(3)): that the relay is attached, that its session loop still turns, that it ends. Without
//! `NOTIFY_SOCKET` in the environment nothing is sent, and without `WATCHDOG_USEC` there is no timer.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

/// Cheap to clone.
#[derive(Clone, Default)]
pub struct Systemd {
    socket: Option<Arc<UnixDatagram>>,
    /// Pause between two signs of life: half of what systemd waits for.
    beat: Option<Duration>,
}

impl Systemd {
    /// Who started this process says where it listens.
    pub fn from_environment() -> io::Result<Self> {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Ok(Self::default());
        };
        let variable = |name: &str| std::env::var(name).ok();
        let beat = beat(variable("WATCHDOG_USEC"), variable("WATCHDOG_PID"), std::process::id());
        let socket = UnixDatagram::unbound()?;
        // Whoever does not read what it is told holds up no delivery.
        socket.set_nonblocking(true)?;
        socket.connect_addr(&address(name.as_bytes())?)?;
        Ok(Systemd { socket: Some(Arc::new(socket)), beat })
    }

    /// Attached: events are delivered from now on. Said again after each loss of the session.
    pub fn ready(&self) {
        self.tell("READY=1\nSTATUS=attached");
    }

    /// Why there is no session, for `systemctl status`.
    pub fn waiting(&self, reason: &str) {
        self.tell(&format!("STATUS={}", reason.replace('\n', " ")));
    }

    pub fn stopping(&self) {
        self.tell("STOPPING=1\nSTATUS=finishing what is under way");
    }

    /// Does the work, with a sign of life from the same task now and then: if the work blocks or spins, there is none.
    pub async fn watched<T>(&self, work: impl Future<Output = T>) -> T {
        let Some(pause) = self.beat else { return work.await };
        let beats = async {
            loop {
                self.tell("WATCHDOG=1");
                tokio::time::sleep(pause).await;
            }
        };
        tokio::select! {
            biased;
            done = work => done,
            () = beats => unreachable!("it beats as long as the work lasts"),
        }
    }

    fn tell(&self, text: &str) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = socket.send(text.as_bytes()) {
            tracing::warn!(%error, "systemd can't be told");
        }
    }
}

/// A path, or after `@` a name that is in no directory.
fn address(name: &[u8]) -> io::Result<SocketAddr> {
    match name.split_first() {
        Some((b'@', name)) => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(std::path::Path::new(std::ffi::OsStr::from_bytes(name))),
    }
}

/// Half of the time, as sd_watchdog_enabled(3) advises. None: systemd waits for nothing, or for another process.
fn beat(microseconds: Option<String>, process: Option<String>, own: u32) -> Option<Duration> {
    let ours = process.is_none_or(|process| process.parse() == Ok(own));
    let time = Duration::from_micros(microseconds?.parse().ok()?);
    (ours && !time.is_zero()).then(|| time / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_of_life_comes_twice_in_the_time() {
        let beat = |microseconds: &str, process: Option<&str>| {
            beat(Some(microseconds.into()), process.map(Into::into), 42).map(|beat| beat.as_millis())
        };
        assert_eq!(beat("30000000", Some("42")), Some(15_000));
        assert_eq!(beat("30000000", None), Some(15_000));
        assert_eq!(beat("30000000", Some("43")), None);
        assert_eq!(beat("0", None), None);
        assert_eq!(beat("soon", None), None);
        assert_eq!(super::beat(None, None, 42), None);
    }

    #[test]
    fn a_name_after_an_at_is_abstract() {
        let abstracted = address(b"@one/two").expect("a name");
        assert_eq!(abstracted.as_abstract_name(), Some(&b"one/two"[..]));
        let path = address(b"/run/systemd/notify").expect("a path");
        assert_eq!(path.as_pathname(), Some(std::path::Path::new("/run/systemd/notify")));
    }
}

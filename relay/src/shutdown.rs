//! Signals. SIGTERM and SIGINT ask for an end, as something that any task can wait for; a second one does not wait. SIGHUP
//! changes nothing: there is nothing that could be read again without losing what is under way.

use std::process::exit;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::systemd::Systemd;

/// Exit code after a second signal: what was held is given back by the server, not by us.
const HASTY: i32 = 1;

/// Cheap to clone. Once requested, always requested.
#[derive(Clone)]
pub struct Shutdown(watch::Receiver<bool>);

impl Shutdown {
    /// Requested at the first SIGTERM or SIGINT, after systemd was told.
    pub fn on_signals(systemd: Systemd) -> std::io::Result<Self> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hang_up = signal(SignalKind::hangup())?;
        let (sender, receiver) = watch::channel(false);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                    _ = hang_up.recv() => {
                        tracing::info!("SIGHUP: nothing is read again; restart the relay to change its configuration");
                        continue;
                    }
                }
                if *sender.borrow() {
                    tracing::warn!("a second signal: ending at once");
                    exit(HASTY);
                }
                tracing::info!("shutting down");
                systemd.stopping();
                // The sender stays, so that nobody takes its end for a change.
                sender.send_replace(true);
            }
        });
        Ok(Shutdown(receiver))
    }

    pub fn is_requested(&self) -> bool {
        *self.0.borrow()
    }

    pub async fn requested(&self) {
        let mut receiver = self.0.clone();
        if receiver.wait_for(|requested| *requested).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

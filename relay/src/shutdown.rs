//! SIGTERM and SIGINT, as something that any task can wait for.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Cheap to clone. Once requested, always requested.
#[derive(Clone)]
pub struct Shutdown(watch::Receiver<bool>);

impl Shutdown {
    /// Requested at the first SIGTERM or SIGINT.
    pub fn on_signals() -> std::io::Result<Self> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let (sender, receiver) = watch::channel(false);
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("shutting down");
            sender.send_replace(true);
            // Whoever waits later sees the value; the sender stays so that nobody takes its end for a change.
            sender.closed().await;
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

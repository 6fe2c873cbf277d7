//! Prepared transactions, which somebody else commits or rolls back later, perhaps after a restart.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use outbox_tests::trace::{Micros, now_us};

use crate::record::Fate;
use crate::stage::Stage;
use crate::trouble::{Trouble, connected};

#[derive(Debug, Clone)]
pub struct Prepared {
    pub transaction: u64,
    /// Nobody else uses it before this transaction is committed.
    pub aggregate: u32,
    pub due: Micros,
    pub commit: bool,
}

impl Prepared {
    pub fn name(&self) -> String {
        format!("soak {}", self.transaction)
    }
}

/// Decides each at its moment; when the load is over, all that are left.
pub async fn decide(stage: Arc<Stage>) {
    let mut session = None;
    loop {
        let next = {
            let mut waiting = stage.prepared.lock().unwrap_or_else(PoisonError::into_inner);
            let over = !stage.is_loading();
            if over && waiting.is_empty() {
                return;
            }
            let at = waiting.iter().position(|prepared| over || prepared.due <= now_us());
            at.map(|at| waiting.remove(at))
        };
        let Some(prepared) = next else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let again = |prepared| stage.prepared.lock().unwrap_or_else(PoisonError::into_inner).push(prepared);
        let Some(open) = session.take() else {
            session = connected(&stage.url()).await;
            again(prepared);
            continue;
        };
        let verb = if prepared.commit { "COMMIT" } else { "ROLLBACK" };
        match open.batch_execute(&format!("{verb} PREPARED '{}'", prepared.name())).await.map_err(Trouble::from) {
            Ok(()) => {
                let fate = if prepared.commit { Fate::Committed } else { Fate::RolledBack };
                stage.record.set_fate(prepared.transaction, fate);
                if prepared.commit {
                    stage.followed.lock().unwrap_or_else(PoisonError::into_inner).push(prepared.aggregate);
                }
                session = Some(open);
            }
            // Its preparation failed, or an earlier try succeeded and nobody heard of it.
            Err(Trouble::Strange(what)) if what.starts_with("42704") => session = Some(open),
            // Still being prepared, or the session that did so has not let go of it yet.
            Err(Trouble::Strange(what)) if what.starts_with("55000") => {
                again(prepared);
                session = Some(open);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(Trouble::GivenUp) => {
                again(prepared);
                session = Some(open);
            }
            Err(Trouble::Lost) => again(prepared),
            Err(Trouble::Strange(what)) => {
                stage.record.complain(format!("{verb} PREPARED '{}': {what}", prepared.name()));
            }
        }
    }
}

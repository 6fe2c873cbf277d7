//! `health`: each check of `outbox.health()`, with its hint where it is not well.

use serde_json::Value;

use super::session::{Session, Work};
use super::table::{Column, Table, left};
use super::{Outcome, answer, text};
use crate::cli::Output;
use crate::error::Result;
use crate::postgres::Connector;

const HEALTH: &str = "SELECT jsonb_build_object('check', h.check_name, 'ok', h.ok, 'detail', h.detail, 'hint', h.hint)::text \
     FROM outbox.health() h";

const COLUMNS: [Column; 3] = [left("CHECK"), left("OK"), left("DETAIL")];

pub async fn health(connector: &Connector, output: &Output) -> Result<Outcome> {
    let session = Session::open(connector, "health", Work::Looks).await?;
    let checks = session.rows(HEALTH, &[]).await?;
    session.commit().await?;
    // A check that can't tell is not well.
    let well = checks.iter().all(is_well);
    answer(output, &Value::from(checks.clone()), || shown(&checks))?;
    Ok(Outcome::well_if(well))
}

fn is_well(check: &Value) -> bool {
    check["ok"] == Value::Bool(true)
}

/// What is not well comes first.
fn shown(checks: &[Value]) -> String {
    let (well, not_well): (Vec<_>, Vec<_>) = checks.iter().partition(|check| is_well(check));
    let mut table = Table::new(&COLUMNS);
    for check in &not_well {
        let detail = format!("{} - {}", text(check, "detail"), text(check, "hint"));
        table.add(vec![text(check, "check").to_owned(), "NO".into(), detail]);
    }
    for check in well {
        table.add(vec![text(check, "check").to_owned(), "ok".into(), text(check, "detail").to_owned()]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_well_comes_first_with_its_hint() {
        let checks = [
            serde_json::json!({"check": "worker", "ok": true, "detail": "pid 7, idle", "hint": "See the log."}),
            serde_json::json!({"check": "consumers", "ok": false, "detail": "none attached", "hint": "Start one."}),
        ];
        let lines = "CHECK      OK  DETAIL\n\
                     consumers  NO  none attached - Start one.\n\
                     worker     ok  pid 7, idle\n";
        assert_eq!(shown(&checks), lines);
    }
}

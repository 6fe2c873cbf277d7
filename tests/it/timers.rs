//! Timers: what is due at a moment happens at that moment, on a system where nothing else happens.

use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::relay::Relay;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

use crate::claims::{claim, insert};

const IDLE: &str = "SELECT worker_state = 'idle' FROM outbox.stats()";

/// Seconds after the end of a lease. Nothing else would wake the worker; the machine may stand still for a while.
const AT_ITS_END: std::ops::Range<f64> = 0.0..10.0;

/// A claim that is settled in time, and within its lease another that is not.
async fn claim_within_a_settled_lease(session: &Session) -> Result<Vec<i64>> {
    insert(session, &["a"]).await?;
    let (_, token) = claim(session, "10, NULL, '2 s'").await?;
    assert_eq!(session.one::<i64>(&format!("SELECT outbox.ack({token})")).await?, 1);
    session.until(IDLE, LONG).await?;
    let ids = insert(session, &["b"]).await?;
    session.until(IDLE, LONG).await?;
    assert_eq!(claim(session, "10, NULL, '3 s'").await?.0, ids);
    Ok(ids)
}

#[tokio::test]
async fn a_lease_ends_though_the_one_before_it_was_settled() -> Result<()> {
    let World { session, .. } = World::new().await?;
    for round in 0..2 {
        let ids = claim_within_a_settled_lease(&session).await?;
        let end: String = session.one("SELECT min(lease_until)::text FROM outbox.claims").await?;
        session.until(&format!("SELECT status = 'pending' FROM outbox_events WHERE id = {}", ids[0]), LONG).await?;
        let late: f64 = session.one(&format!("SELECT extract(epoch FROM clock_timestamp() - '{end}')::float8")).await?;
        assert!(AT_ITS_END.contains(&late), "round {round}: released {late} s after the end of its lease");
        let (_, token) = claim(&session, "10").await?;
        assert_eq!(session.one::<i64>(&format!("SELECT outbox.ack({token})")).await?, 1);
    }
    Ok(())
}

#[tokio::test]
async fn a_claim_that_is_renewed_ends_when_its_last_lease_does() -> Result<()> {
    let World { session, .. } = World::new().await?;
    insert(&session, &["a"]).await?;
    let (_, token) = claim(&session, "10, NULL, '3 s'").await?;
    assert_eq!(session.one::<i64>(&format!("SELECT outbox.renew('{{{token}}}', '5 s')")).await?, 1);
    let end: String = session.one("SELECT min(lease_until)::text FROM outbox.claims").await?;
    session.until("SELECT status = 'pending' FROM outbox_events", LONG).await?;
    let late: f64 = session.one(&format!("SELECT extract(epoch FROM clock_timestamp() - '{end}')::float8")).await?;
    assert!(AT_ITS_END.contains(&late), "released {late} s after the end of its lease");
    Ok(())
}

/// The other relay hears of nothing: only the end of the lease can wake it.
#[tokio::test]
async fn what_a_relay_holds_that_stands_still_goes_to_the_other_when_its_lease_ends() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply_with(|number, _| if (1..4).contains(&number) { Reply::Never } else { Reply::Accept });
    session.execute("SELECT outbox.add_webhook('w', $1)", &[&receiver.url("/")]).await?;
    let variables = [("OUTBOX_LEASE", "6")];
    let url = cluster.url(&database);
    let stuck = Relay::with(&url, None, &variables).await?;
    insert(&session, &[""]).await?;
    session.until("SELECT processed = 1 FROM outbox.stats()", LONG).await?;
    insert(&session, &["", "", ""]).await?;
    receiver.wait_for(4, LONG).await?;
    stuck.signal(Signal::SIGSTOP);
    let _other = Relay::with(&url, None, &variables).await?;
    session.until("SELECT processed = 4 FROM outbox.stats()", Duration::from_secs(30)).await?;
    Ok(())
}

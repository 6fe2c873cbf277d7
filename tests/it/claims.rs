//! Claims: nothing is handed out twice at once, the order of an aggregate holds, and what a consumer held when it ended
//! goes to another.

use anyhow::Result;
use nix::sys::signal::Signal;
use outbox_tests::cluster::{Cluster, Stop};
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

pub const NONE: [i64; 0] = [];

pub async fn insert(session: &Session, aggregates: &[&str]) -> Result<Vec<i64>> {
    let rows = session
        .query(
            "INSERT INTO outbox_events (event_type, event_data, aggregate_type, aggregate_id)
             SELECT 'test.happened', '{}', 'test', nullif(a, '') FROM unnest($1::text[]) WITH ORDINALITY AS u (a, n) ORDER BY n
             RETURNING id",
            &[&aggregates],
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// The ids and the token of a claim.
pub async fn claim(session: &Session, arguments: &str) -> Result<(Vec<i64>, i64)> {
    let rows = session.query(&format!("SELECT id, claim_token FROM outbox.claim({arguments})"), &[]).await?;
    Ok((rows.iter().map(|row| row.get(0)).collect(), rows.first().map_or(0, |row| row.get(1))))
}

/// Waits for a wake-up that says that something is due.
pub async fn due(listener: &mut Session) -> Result<()> {
    while !listener.notification(LONG).await?.payload().contains(r#""reason":"due""#) {}
    Ok(())
}

async fn statuses(session: &Session) -> Result<String> {
    session.one("SELECT string_agg(status, ' ' ORDER BY id) FROM outbox_events").await
}

#[tokio::test]
async fn no_event_is_handed_out_twice_at_once() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let other = cluster.connect(&database).await?;
    let ids = insert(&session, &["", "", "", ""]).await?;
    let (first, token) = claim(&session, "3").await?;
    let (second, _) = claim(&other, "100").await?;
    assert_eq!((first.as_slice(), second.as_slice()), (&ids[..3], &ids[3..]));
    assert_eq!(claim(&other, "100").await?.0, NONE);
    assert_eq!(session.one::<i64>(&format!("SELECT outbox.ack({token})")).await?, 3);
    assert_eq!(session.one::<i64>(&format!("SELECT outbox.ack({token})")).await?, 0);
    assert_eq!(statuses(&session).await?, "processed processed processed processing");
    Ok(())
}

#[tokio::test]
async fn an_aggregate_in_flight_waits_and_others_do_not() -> Result<()> {
    let World { session, .. } = World::new().await?;
    let ids = insert(&session, &["a", "b", "a", "c"]).await?;
    let (first, token) = claim(&session, "1").await?;
    assert_eq!(first, [ids[0]]);
    assert_eq!(claim(&session, "10").await?.0, [ids[1], ids[3]]);
    session.execute(&format!("SELECT outbox.ack({token})"), &[]).await?;
    assert_eq!(claim(&session, "10").await?.0, [ids[2]]);
    Ok(())
}

#[tokio::test]
async fn after_a_failure_the_later_events_of_the_aggregate_wait_for_the_retry() -> Result<()> {
    let World { session, .. } = World::new().await?;
    let ids = insert(&session, &["a", "a", "b"]).await?;
    let (claimed, token) = claim(&session, "10").await?;
    assert_eq!(claimed, ids);
    assert!(session.one::<bool>(&format!("SELECT outbox.fail({token}, {}, 'no luck', '1 hour')", ids[0])).await?);
    assert_eq!(
        session.one::<i64>(&format!("SELECT outbox.ack({token})")).await?,
        1,
        "only the other aggregate is held still"
    );
    assert_eq!(claim(&session, "10").await?.0, NONE);
    session
        .execute("UPDATE outbox.delivery SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL", &[])
        .await?;
    let (again, token) = claim(&session, "10").await?;
    assert_eq!(again, ids[..2]);
    assert_eq!(session.one::<i64>(&format!("SELECT outbox.ack({token})")).await?, 2);
    assert_eq!(statuses(&session).await?, "processed processed processed");
    Ok(())
}

#[tokio::test]
async fn a_retry_is_announced_at_its_moment() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let mut listener = cluster.connect(&database).await?;
    let ids = insert(&session, &["a"]).await?;
    let (_, token) = claim(&session, "10").await?;
    listener.batch_execute("LISTEN outbox_events").await?;
    session.execute(&format!("SELECT outbox.fail({token}, {}, 'no luck', '150 ms')", ids[0]), &[]).await?;
    due(&mut listener).await?;
    assert_eq!(claim(&session, "10").await?.0, ids);
    assert_eq!(session.one::<i32>("SELECT retry_count FROM outbox_events").await?, 1);
    Ok(())
}

#[tokio::test]
async fn a_stale_token_changes_nothing() -> Result<()> {
    let World { session, .. } = World::new().await?;
    let ids = insert(&session, &["a"]).await?;
    let (_, old) = claim(&session, "1").await?;
    assert_eq!(session.one::<i64>(&format!("SELECT outbox.release({old})")).await?, 1);
    let (_, new) = claim(&session, "1").await?;
    assert_ne!(old, new);
    for call in ["ack({t})", "release({t})"] {
        assert_eq!(
            session.one::<i64>(&format!("SELECT outbox.{}", call.replace("{t}", &old.to_string()))).await?,
            0,
            "{call}"
        );
    }
    for call in ["fail({t}, {i}, 'x')", "reject({t}, {i}, 'x')", "fail(424242, {i}, 'x')"] {
        let call = call.replace("{t}", &old.to_string()).replace("{i}", &ids[0].to_string());
        assert!(!session.one::<bool>(&format!("SELECT outbox.{call}")).await?, "{call}");
    }
    assert_eq!(session.one::<i64>(&format!("SELECT outbox.ack({new})")).await?, 1);
    Ok(())
}

#[tokio::test]
async fn the_claims_of_a_session_end_with_it() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let consumer = cluster.connect(&database).await?;
    consumer.execute("SELECT outbox.attach('consumer')", &[]).await?;
    let ids = insert(&session, &["a", "b"]).await?;
    assert_eq!(claim(&consumer, "10, NULL, '1 hour'").await?.0, ids);
    session.until("SELECT consumers = 1 FROM outbox.stats()", LONG).await?;
    drop(consumer);
    session.until("SELECT bool_and(status = 'pending') FROM outbox_events", LONG).await?;
    session.until("SELECT consumers = 0 FROM outbox.stats()", LONG).await?;
    assert_eq!(claim(&session, "10").await?.0, ids);
    Ok(())
}

#[tokio::test]
async fn a_claim_ends_with_its_lease() -> Result<()> {
    let World { session, .. } = World::new().await?;
    let ids = insert(&session, &["a"]).await?;
    let (_, token) = claim(&session, "1, NULL, '50 ms'").await?;
    session.until("SELECT status = 'pending' FROM outbox_events", LONG).await?;
    assert_eq!(session.one::<i64>(&format!("SELECT outbox.ack({token})")).await?, 0);
    assert_eq!(claim(&session, "1").await?.0, ids);
    Ok(())
}

#[tokio::test]
async fn a_crash_of_the_server_releases_every_claim() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    let session = cluster.connect(&database).await?;
    let ids = insert(&session, &["a", "a", "b"]).await?;
    assert_eq!(claim(&session, "10, NULL, '1 hour'").await?.0, ids);
    cluster.restart(Stop::Immediate).await?;
    let session = cluster.connect(&database).await?;
    session.until("SELECT bool_and(status = 'pending') FROM outbox_events", LONG).await?;
    session.until("SELECT pending = 3 AND processing = 0 FROM outbox.stats()", LONG).await?;
    assert_eq!(claim(&session, "10").await?.0, ids);
    Ok(())
}

#[tokio::test]
async fn an_event_that_commits_late_is_delivered_at_once() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let late = cluster.connect(&database).await?;
    late.batch_execute("BEGIN").await?;
    let early_id = insert(&late, &["a"]).await?;
    let ids = insert(&session, &["b", "c"]).await?;
    let (claimed, token) = claim(&session, "10").await?;
    assert_eq!(claimed, ids);
    session.execute(&format!("SELECT outbox.ack({token})"), &[]).await?;
    assert_eq!(claim(&session, "10").await?.0, NONE);
    late.batch_execute("COMMIT").await?;
    assert_eq!(claim(&session, "10").await?.0, early_id);
    Ok(())
}

#[tokio::test]
async fn an_event_that_commits_late_survives_the_savepoint_in_which_it_was_claimed() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let (late, consumer) = (cluster.connect(&database).await?, cluster.connect(&database).await?);
    late.batch_execute("BEGIN").await?;
    let early_id = insert(&late, &[""]).await?;
    let later_id = insert(&session, &[""]).await?;
    consumer.batch_execute("BEGIN").await?;
    assert_eq!(claim(&consumer, "10").await?.0, later_id);
    late.batch_execute("COMMIT").await?;
    consumer.batch_execute("SAVEPOINT s").await?;
    assert_eq!(claim(&consumer, "10").await?.0, early_id);
    consumer.batch_execute("ROLLBACK TO s; COMMIT").await?;
    assert_eq!(claim(&session, "10").await?.0, early_id);
    Ok(())
}

/// Between two steps of a claim, after it has read the low-water mark, a session commits two events of an aggregate, the first
/// of them with an id below that mark.
#[tokio::test]
async fn what_a_session_commits_one_after_the_other_is_not_handed_out_the_other_way_round() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let (late, consumer) = (cluster.connect(&database).await?, cluster.connect(&database).await?);
    late.batch_execute("BEGIN").await?;
    let mut ids = insert(&late, &["a"]).await?;
    insert(&session, &["b"]).await?;
    let (_, token) = claim(&consumer, "10").await?;
    assert_eq!(consumer.one::<i64>(&format!("SELECT outbox.ack({token})")).await?, 1);
    assert_eq!(claim(&consumer, "10").await?.0, NONE);
    consumer.batch_execute("BEGIN; SET ROLE outbox_owner; SELECT outbox._lock()").await?;
    let mark = consumer.one::<i64>("SELECT outbox._advance_low_water(outbox._low_water(true))").await?;
    assert!(mark > ids[0]);
    late.batch_execute("COMMIT").await?;
    ids.extend(insert(&late, &["a"]).await?);
    let claimed: Vec<i64> = consumer
        .one(&format!(
            "SELECT ids FROM outbox._claim_fresh(outbox._new_token(), (NULL, NULL, NULL, NULL), {mark}, {mark}, 10, 10, 210,
                                                 false, NULL, 1000)"
        ))
        .await?;
    assert_eq!(claimed, ids);
    Ok(())
}

/// The launcher takes the only background worker, beside that of logical replication. The database postgres has a place
/// in shared memory and never a worker; a new one has not even that.
#[tokio::test]
async fn an_aggregate_in_flight_waits_also_where_no_worker_can_run() -> Result<()> {
    let cluster = Cluster::with(&[("max_worker_processes", "2"), ("max_logical_replication_workers", "1")]).await?;
    for database in ["postgres".to_owned(), cluster.empty_database().await?] {
        let (session, other) = (cluster.connect(&database).await?, cluster.connect(&database).await?);
        session.batch_execute("CREATE EXTENSION pg_outbox").await?;
        let ids = insert(&session, &["a", "a"]).await?;
        let (first, token) = claim(&session, "1").await?;
        assert_eq!(first, ids[..1], "{database}");
        assert_eq!(claim(&other, "1").await?.0, NONE, "{database}");
        assert_eq!(session.one::<i64>(&format!("SELECT outbox.ack({token})")).await?, 1);
        assert_eq!(claim(&other, "1").await?.0, ids[1..], "{database}");
        assert_eq!(session.one::<Option<i32>>("SELECT worker_pid FROM outbox.stats()").await?, None);
    }
    Ok(())
}

#[tokio::test]
async fn a_prepared_transaction_is_delivered_after_its_commit_even_after_a_restart() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    let session = cluster.connect(&database).await?;
    for restart in [false, true] {
        session_prepares(&cluster, &database).await?;
        if restart {
            cluster.restart(Stop::Immediate).await?;
        }
        let mut session = cluster.connect(&database).await?;
        session.until("SELECT worker_state = 'idle' FROM outbox.stats()", LONG).await?;
        session.batch_execute("LISTEN outbox_events").await?;
        session.batch_execute("COMMIT PREPARED 'later'").await?;
        session.notification(LONG).await?;
        session.until("SELECT pending = 1 FROM outbox.stats()", LONG).await?;
        let (claimed, token) = claim(&session, "10").await?;
        assert_eq!(claimed.len(), 1, "after a restart: {restart}");
        session.execute(&format!("SELECT outbox.ack({token})"), &[]).await?;
    }
    drop(session);
    Ok(())
}

/// A restart forgets what the transaction had noted, and the worker that looks for it in the tables may be slow.
#[tokio::test]
async fn what_a_session_publishes_after_a_commit_prepared_comes_after_it_even_after_a_restart() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    session_prepares(&cluster, &database).await?;
    cluster.restart(Stop::Immediate).await?;
    let session = cluster.connect(&database).await?;
    session.until("SELECT worker_state = 'idle' FROM outbox.stats()", LONG).await?;
    assert_eq!(claim(&session, "10").await?.0, NONE);
    let worker = session.one::<i32>("SELECT worker_pid FROM outbox.stats()").await?;
    cluster.signal(worker, Signal::SIGSTOP)?;
    session.batch_execute("COMMIT PREPARED 'later'").await?;
    let later = insert(&session, &["a"]).await?;
    let (claimed, _) = claim(&session, "10").await?;
    cluster.signal(worker, Signal::SIGCONT)?;
    assert_eq!((claimed.len(), claimed.last()), (2, later.last()), "{claimed:?}");
    Ok(())
}

async fn session_prepares(cluster: &Cluster, database: &str) -> Result<()> {
    let session = cluster.connect(database).await?;
    session.batch_execute("BEGIN").await?;
    insert(&session, &["a"]).await?;
    session.batch_execute("PREPARE TRANSACTION 'later'").await?;
    // What commits in between moves the low-water mark past it.
    insert(&session, &["b"]).await?;
    let (_, token) = claim(&session, "10").await?;
    session.execute(&format!("SELECT outbox.ack({token})"), &[]).await?;
    assert_eq!(claim(&session, "10").await?.0, NONE);
    Ok(())
}

/// Some events become visible late, while later ones of their aggregate wait for a retry; a claim has no room for all.
#[tokio::test]
async fn who_comes_late_goes_before_those_that_wait() -> Result<()> {
    let World { cluster, database, mut session } = World::new().await?;
    session.batch_execute("LISTEN outbox_events").await?;
    let late = cluster.connect(&database).await?;
    let first = insert(&session, &["a"]).await?[0];
    late.batch_execute("BEGIN").await?;
    let between = insert(&late, &["x", "y", "a", "b"]).await?;
    let after = insert(&session, &["a", "b"]).await?;
    let (claimed, token) = claim(&session, "10").await?;
    assert_eq!(claimed, [first, after[0], after[1]]);
    for id in [first, after[1]] {
        assert!(session.one::<bool>(&format!("SELECT outbox.fail({token}, {id}, 'no luck', '0')")).await?);
    }
    late.batch_execute("COMMIT").await?;
    let (mut order, mut room) = (Vec::new(), 4);
    while order.len() < 7 {
        let (ids, token) = claim(&session, &room.to_string()).await?;
        if ids.is_empty() {
            session.notification(LONG).await?;
        } else {
            session.execute(&format!("SELECT outbox.ack({token})"), &[]).await?;
        }
        order.extend(ids);
        room = 2;
    }
    let of = |ids: &[i64]| order.iter().copied().filter(|id| ids.contains(id)).collect::<Vec<_>>();
    let (a, b) = ([first, between[2], after[0]], [between[3], after[1]]);
    assert_eq!((of(&a), of(&b)), (a.to_vec(), b.to_vec()), "{order:?}");
    Ok(())
}

/// Two of one aggregate are due, the later one first: it must not be in the way of the one that probes.
#[tokio::test]
async fn a_circuit_is_probed_whatever_is_due_first() -> Result<()> {
    let World { cluster, database, mut session } = World::new().await?;
    session.execute("SELECT outbox.add_webhook('w', 'http://127.0.0.1:9/')", &[]).await?;
    let ids = insert(&session, &["a", "a"]).await?;
    let (claimed, token) = claim(&session, "10").await?;
    assert_eq!(claimed, ids);
    let admin = cluster.connect(&database).await?;
    for (id, outcome) in [(ids[1], "released"), (ids[0], "unavailable")] {
        let exceptions =
            format!(r#"[{{"token":{token},"id":{id},"destination":"w","outcome":"{outcome}","error":"refused"}}]"#);
        let settle = format!("SELECT settled FROM outbox.settle('{{}}', '{{}}', '{exceptions}')");
        assert_eq!(admin.one::<i64>(&settle).await?, 1);
    }
    session.batch_execute("LISTEN outbox_events").await?;
    admin.until("SELECT bool_and(circuit_open_until < clock_timestamp()) FROM outbox.destination", LONG).await?;
    let mut probe = claim(&session, "10").await?.0;
    while probe.is_empty() {
        session.notification(LONG).await?;
        probe = claim(&session, "10").await?.0;
    }
    assert_eq!(probe, ids[..1]);
    Ok(())
}

#[tokio::test]
async fn arguments_that_make_no_claim_are_errors_with_a_hint() -> Result<()> {
    let World { session, .. } = World::new().await?;
    for call in [
        "claim(0)",
        "claim(-5)",
        "claim(NULL)",
        "claim(1, NULL, '-1 s')",
        "attach('')",
        "attach(NULL)",
        "publish(NULL, '{}')",
        "publish('', '{}')",
        "publish('a', NULL)",
        "add_webhook('h', 'not a url')",
        "add_webhook('h', 'http://user:pw@example.com/')",
        "add_webhook('h', 'https://example.com/', '{}')",
        "add_rabbitmq('bad name')",
        "add_rabbitmq('r', routing_key => '{nope}')",
        "add_rabbitmq('r', settings => '[]')",
    ] {
        let error = session.execute(&format!("SELECT outbox.{call}"), &[]).await.expect_err(call);
        let error = error.as_db_error().unwrap_or_else(|| panic!("{call}: {error}"));
        assert_eq!(error.code().code(), "22023", "{call}: {error}");
        assert!(error.hint().is_some_and(|hint| !hint.is_empty()), "{call}: {error} has no hint");
        assert!(!error.message().contains("pw"), "{call}: {error}");
    }
    Ok(())
}

/// Its snapshot may be older than what others hold.
#[tokio::test]
async fn a_claim_in_an_old_snapshot_is_refused() -> Result<()> {
    let World { session, .. } = World::new().await?;
    insert(&session, &["a"]).await?;
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        session.batch_execute(&format!("BEGIN ISOLATION LEVEL {level}")).await?;
        let error = session.query("SELECT * FROM outbox.claim()", &[]).await.expect_err(level);
        let error = error.as_db_error().expect("an error of the server");
        assert_eq!((error.code().code(), error.hint().is_some()), ("0A000", true), "{level}");
        session.batch_execute("ROLLBACK").await?;
    }
    assert_eq!(claim(&session, "10").await?.0.len(), 1);
    Ok(())
}

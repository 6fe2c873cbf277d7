//! What announces waits for nobody: whatever stops retention, releases or recovery, new events are announced, and what
//! could not be done is done later.

use std::time::{Duration, Instant};

use anyhow::Result;
use outbox_tests::cluster::Cluster;
use outbox_tests::session::Session;
use outbox_tests::wait::{self, LONG};
use outbox_tests::world::World;

use crate::claims::{claim, insert};

/// Announcements are not to take longer than that, on a machine that is busy with other tests.
const SOON: Duration = Duration::from_secs(2);

/// Inserts events and hears of each.
pub async fn events_are_announced(session: &Session, listener: &mut Session) -> Result<()> {
    for _ in 0..20 {
        let id = insert(session, &[""]).await?[0];
        let since = Instant::now();
        while !listener.notification(LONG).await?.payload().contains(&format!(r#""id":{id},"#)) {}
        assert!(since.elapsed() < SOON, "announced after {:?}", since.elapsed());
    }
    Ok(())
}

pub async fn listener(cluster: &Cluster, database: &str) -> Result<Session> {
    let listener = cluster.connect(database).await?;
    listener.batch_execute("LISTEN outbox_events").await?;
    Ok(listener)
}

pub async fn worker(session: &Session) -> Result<i32> {
    session.one("SELECT worker_pid FROM outbox.stats()").await
}

/// A consumer that claims and stays in its transaction, while another session that held events ends.
#[tokio::test]
async fn who_sits_on_the_lock_of_claims_delays_releases_and_nothing_else() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let mut listener = listener(cluster, &database).await?;
    let pid = worker(&session).await?;
    let gone = cluster.connect(&database).await?;
    gone.execute("SELECT outbox.attach('gone')", &[]).await?;
    let held = insert(&session, &["a"]).await?;
    assert_eq!(claim(&gone, "1, NULL, '1 hour'").await?.0, held);
    let sitting = cluster.connect(&database).await?;
    sitting.batch_execute("SET application_name = 'sitting'; BEGIN").await?;
    claim(&sitting, "1").await?;
    drop(gone);
    events_are_announced(&session, &mut listener).await?;
    let named = "SELECT NOT ok AND detail LIKE '%sitting%' FROM outbox.health() WHERE check_name = 'claims_lock'";
    session.until(named, LONG).await?;
    // A scheduled event's moment is announced too.
    session
        .batch_execute("SELECT outbox.publish('later', '{}', available_at => clock_timestamp() + interval '1 s')")
        .await?;
    session.until("SELECT bool_or(available_at < clock_timestamp()) FROM outbox_events", LONG).await?;
    crate::claims::due(&mut listener).await?;
    assert_eq!(session.one::<String>("SELECT status FROM outbox_events ORDER BY id LIMIT 1").await?, "processing");
    let since = Instant::now();
    sitting.batch_execute("COMMIT").await?;
    session.until("SELECT status = 'pending' FROM outbox_events ORDER BY id LIMIT 1", LONG).await?;
    assert!(since.elapsed() < SOON, "released {:?} after the lock was free", since.elapsed());
    assert_eq!(worker(&session).await?, pid, "the worker was started anew");
    session.until("SELECT ok FROM outbox.health() WHERE check_name = 'claims_lock'", LONG).await?;
    Ok(())
}

/// One of the events of one claim is locked: the others of the session that ended, and other leases, end all the same.
#[tokio::test]
async fn a_row_lock_on_one_claimed_event_delays_the_release_of_that_claim_alone() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let mut listener = listener(cluster, &database).await?;
    let gone = cluster.connect(&database).await?;
    gone.execute("SELECT outbox.attach('gone')", &[]).await?;
    let ids = insert(&session, &["a", "b", "c"]).await?;
    for id in &ids {
        assert_eq!(claim(&gone, "1, NULL, '1 hour'").await?.0, [*id]);
    }
    let holder = cluster.connect(&database).await?;
    holder.batch_execute(&format!("BEGIN; SELECT FROM outbox_events WHERE id = {} FOR UPDATE", ids[0])).await?;
    drop(gone);
    let free = format!(
        "SELECT array_agg(id ORDER BY id) = '{{{},{}}}' FROM outbox_events WHERE status = 'pending'",
        ids[1], ids[2]
    );
    session.until(&free, LONG).await?;
    events_are_announced(&session, &mut listener).await?;
    holder.batch_execute("ROLLBACK").await?;
    session.until(&format!("SELECT status = 'pending' FROM outbox_events WHERE id = {}", ids[0]), LONG).await?;
    Ok(())
}

/// Events that were committed before somebody locked the table for long are announced without a description.
#[tokio::test]
async fn a_table_that_is_locked_keeps_no_event_from_being_announced() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let mut listener = listener(cluster, &database).await?;
    session.until("SELECT worker_state = 'idle' FROM outbox.stats()", LONG).await?;
    while listener.heard().is_some() {}
    // The lock is there when the worker looks, because the same transaction took it: it is prepared, and committed while
    // another holds the table.
    let gid: String = session.one("SELECT current_database()::text").await?;
    session.batch_execute("BEGIN").await?;
    insert(&session, &[""]).await?;
    session.batch_execute(&format!("PREPARE TRANSACTION '{gid}'")).await?;
    let locker = cluster.connect(&database).await?;
    let lock = locker.batch_execute("BEGIN; LOCK TABLE outbox_events IN ACCESS EXCLUSIVE MODE");
    let commit = async {
        let waits = "SELECT count(*) = 1 FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND NOT granted
                        AND relation = 'outbox_events'::regclass";
        session.until(waits, LONG).await?;
        anyhow::Ok(session.batch_execute(&format!("COMMIT PREPARED '{gid}'")).await?)
    };
    let (locked, committed) = tokio::join!(lock, commit);
    locked?;
    committed?;
    let payload = listener.notification(LONG).await?.payload().to_owned();
    assert!(payload.contains("overflow") || payload.contains(r#""id":"#), "{payload}");
    locker.batch_execute("ROLLBACK").await?;
    Ok(())
}

#[tokio::test]
async fn a_worker_that_can_not_recover_yet_announces() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    let (session, mut listener) = (cluster.connect(&database).await?, listener(&cluster, &database).await?);
    let sitting = cluster.connect(&database).await?;
    sitting.batch_execute("BEGIN; LOCK TABLE outbox.claim_lock IN EXCLUSIVE MODE").await?;
    let pid = worker(&session).await?;
    session.execute("SELECT pg_terminate_backend($1)", &[&pid]).await?;
    let back = format!("SELECT worker_pid <> {pid} FROM outbox.stats()");
    session.until(&back, LONG).await?;
    while !listener.notification(LONG).await?.payload().contains("startup") {}
    events_are_announced(&session, &mut listener).await?;
    sitting.batch_execute("ROLLBACK").await?;
    session.until("SELECT worker_state = 'idle' FROM outbox.stats()", LONG).await?;
    Ok(())
}

/// Another extension's end, in a transaction that stays open, and this one's.
#[tokio::test]
async fn an_extension_that_is_being_dropped_stops_no_announcement() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let mut listener = listener(cluster, &database).await?;
    let pid = worker(&session).await?;
    let dropper = cluster.connect(&database).await?;
    dropper.batch_execute("CREATE EXTENSION IF NOT EXISTS hstore; BEGIN; DROP EXTENSION hstore").await?;
    events_are_announced(&session, &mut listener).await?;
    dropper.batch_execute("ROLLBACK; BEGIN; DROP EXTENSION pg_outbox; ROLLBACK").await?;
    events_are_announced(&session, &mut listener).await?;
    assert_eq!(worker(&session).await?, pid, "the worker was started anew");
    Ok(())
}

/// Whoever may create databases, and owns none of these.
#[tokio::test]
async fn who_may_not_drop_or_copy_a_database_does_not_silence_it() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let mut listener = listener(cluster, &database).await?;
    let pid = worker(&session).await?;
    let role = format!("creator_{database}");
    session.batch_execute(&format!("CREATE ROLE {role} LOGIN CREATEDB PASSWORD 'x'")).await?;
    let creator = Session::open(&cluster.url_as(&role, "x", "postgres")).await?;
    for command in [
        format!("DROP DATABASE {database}"),
        format!("ALTER DATABASE {database} RENAME TO {database}_x"),
        format!("ALTER DATABASE {database} SET TABLESPACE pg_default"),
        format!("CREATE DATABASE {database}_x TEMPLATE {database}"),
    ] {
        assert!(creator.batch_execute(&command).await.is_err(), "{command}");
        // In a transaction that goes on.
        creator.batch_execute("BEGIN; SAVEPOINT s").await?;
        assert!(creator.batch_execute(&command).await.is_err(), "{command}");
        creator.batch_execute("ROLLBACK TO s").await?;
        events_are_announced(&session, &mut listener).await?;
        creator.batch_execute("ROLLBACK").await?;
    }
    assert_eq!(worker(&session).await?, pid, "the worker was started anew");
    // Nor does the owner for longer than the command lasts.
    let owner = cluster.connect("postgres").await?;
    owner.batch_execute("BEGIN; SAVEPOINT s").await?;
    assert!(owner.batch_execute(&format!("ALTER DATABASE {database} RENAME TO postgres")).await.is_err());
    owner.batch_execute("ROLLBACK TO s").await?;
    session.until("SELECT worker_pid IS NOT NULL AND worker_state = 'idle' FROM outbox.stats()", LONG).await?;
    events_are_announced(&session, &mut listener).await?;
    owner.batch_execute("ROLLBACK").await?;
    session.batch_execute(&format!("DROP ROLE {role}")).await?;
    Ok(())
}

/// Settings for all sessions of a database are not the worker's.
#[tokio::test]
async fn settings_of_the_database_do_not_reach_the_worker() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let role = format!("app_{database}");
    session.batch_execute(&format!("CREATE ROLE {role}")).await?;
    for setting in [
        format!("role = '{role}'"),
        "session_replication_role = 'replica'".into(),
        "default_transaction_isolation = 'serializable'".into(),
        "default_transaction_read_only = on".into(),
        "default_transaction_deferrable = on".into(),
        "statement_timeout = '1ms'".into(),
        "lock_timeout = '1ms'".into(),
        "idle_in_transaction_session_timeout = '1ms'".into(),
        "idle_session_timeout = '1ms'".into(),
        "search_path = 'nowhere'".into(),
        "transform_null_equals = on".into(),
        "enable_nestloop = off".into(),
        "plpgsql.variable_conflict = 'use_column'".into(),
        "plpgsql.extra_errors = 'all'".into(),
    ] {
        let old = worker(&session).await?;
        session.batch_execute(&format!("ALTER DATABASE {database} SET {setting}")).await?;
        session.execute("SELECT pg_terminate_backend($1)", &[&old]).await?;
        let back = format!("SELECT worker_pid <> {old} AND worker_state = 'idle' FROM outbox.stats()");
        session.until(&back, LONG).await.map_err(|e| e.context(setting.clone()))?;
        let name = setting.split(' ').next().unwrap_or_default().to_owned();
        session.batch_execute(&format!("ALTER DATABASE {database} RESET {name}")).await?;
        let mut listener = listener(cluster, &database).await?;
        let (pid, ids) = (worker(&session).await?, insert(&session, &[""]).await?);
        while !listener.notification(LONG).await?.payload().contains(&format!(r#""id":{},"#, ids[0])) {}
        claim(&session, "1, NULL, '50 ms'").await?;
        // Released by the worker, which the counters are told by a trigger.
        session.until("SELECT processing = 0 AND pending > 0 FROM outbox.stats()", LONG).await?;
        assert_eq!(worker(&session).await?, pid, "the worker was started anew with {setting}");
        session.batch_execute("DELETE FROM outbox_events").await?;
    }
    session.batch_execute(&format!("DROP ROLE {role}")).await?;
    Ok(())
}

#[tokio::test]
async fn an_extension_that_is_created_anew_begins_anew() -> Result<()> {
    let World { mut session, .. } = World::new().await?;
    session.batch_execute("SELECT outbox.attach('me'); LISTEN outbox_events").await?;
    insert(&session, &["a"; 50]).await?;
    claim(&session, "10, NULL, '1 hour'").await?;
    insert(&session, &["b"]).await?;
    let old = worker(&session).await?;
    session
        .batch_execute(
            "BEGIN; DROP EXTENSION pg_outbox; CREATE EXTENSION pg_outbox;
             INSERT INTO outbox_events (event_type, event_data) VALUES ('new', '{}'); COMMIT",
        )
        .await?;
    let (ids, _) = claim(&session, "10, NULL, '1 s'").await?;
    assert_eq!(ids, [1]);
    session.until(&format!("SELECT worker_pid <> {old} AND worker_state = 'idle' FROM outbox.stats()"), LONG).await?;
    session.until("SELECT pending = 1 AND processing = 0 AND processed = 0 FROM outbox.stats()", LONG).await?;
    let id = insert(&session, &[""]).await?[0];
    while !session.notification(LONG).await?.payload().contains(&format!(r#""id":{id},"#)) {}
    assert_eq!(claim(&session, "10").await?.0, [1, id]);
    Ok(())
}

#[tokio::test]
async fn events_with_extreme_ids_are_delivered() -> Result<()> {
    let World { session, .. } = World::new().await?;
    let ids = [-9_223_372_036_854_775_807, -5, 3, i64::MAX - 1];
    for id in ids {
        let insert = format!("INSERT INTO outbox_events (id, event_type, event_data) VALUES ({id}, 'a', '{{}}')");
        session.batch_execute(&insert).await?;
        let (claimed, token) = claim(&session, "10").await?;
        assert_eq!(claimed, [id]);
        assert_eq!(session.one::<i64>(&format!("SELECT outbox.ack({token})")).await?, 1);
    }
    Ok(())
}

/// A pooled session that goes to another user takes nothing with it.
#[tokio::test]
async fn a_session_that_is_reset_or_detaches_gives_back_what_it_held() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let pooled = cluster.connect(&database).await?;
    let ids = insert(&session, &["a"]).await?;
    // More often than PostgreSQL has room for callbacks.
    for round in 0..30 {
        let end = if round % 2 == 0 { "DISCARD ALL" } else { "SELECT outbox.detach()" };
        pooled.execute("SELECT outbox.attach('pooled')", &[]).await?;
        assert_eq!(claim(&pooled, "10, NULL, '1 hour'").await?.0, ids);
        assert_eq!(session.one::<i32>("SELECT consumers FROM outbox.stats()").await?, 1);
        pooled.batch_execute(end).await?;
        session.until("SELECT status = 'pending' FROM outbox_events", LONG).await?;
        session.until("SELECT consumers = 0 FROM outbox.stats()", LONG).await?;
    }
    assert!(!pooled.one::<bool>("SELECT outbox.detach()").await?);
    // What it claims without being attached is its own until the lease ends.
    assert_eq!(claim(&pooled, "10, NULL, '1 hour'").await?.0, ids);
    drop(pooled);
    assert_eq!(session.one::<String>("SELECT status FROM outbox_events").await?, "processing");
    Ok(())
}

/// Wide events in all modes: what does not fit a notification is not even read.
#[tokio::test]
async fn wide_events_do_not_take_the_workers_memory() -> Result<()> {
    let cluster = Cluster::with(&[("outbox.notify_payload", "full")]).await?;
    let database = cluster.database().await?;
    let (session, mut listener) = (cluster.connect(&database).await?, listener(&cluster, &database).await?);
    let pid = worker(&session).await?;
    session
        .batch_execute(
            "INSERT INTO outbox_events (event_type, event_data)
             SELECT 'wide', to_jsonb(repeat('x', 2000000)) FROM generate_series(1, 300);
             INSERT INTO outbox_events (event_type, event_data, aggregate_id)
             SELECT 'long', '{}', repeat('y', 30000000) FROM generate_series(1, 20);",
        )
        .await?;
    let last = insert(&session, &[""]).await?[0];
    let mut truncated = 0;
    loop {
        let payload = listener.notification(LONG).await?.payload().to_owned();
        truncated += payload.matches(r#""truncated":true"#).count();
        if payload.contains(&format!(r#""id":{last},"#)) {
            break;
        }
    }
    assert_eq!(truncated, 320);
    assert_eq!(worker(&session).await?, pid, "the worker was started anew");
    let peak = peak_memory(pid)?;
    assert!(peak < 100 << 20, "the worker took {peak} bytes");
    Ok(())
}

/// Most bytes that a process ever had in memory, what it shares with others included.
fn peak_memory(pid: i32) -> Result<i64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    Ok(line.unwrap_or_default().trim().trim_end_matches(" kB").parse::<i64>()? * 1024)
}

#[tokio::test]
async fn a_chore_that_fails_for_a_while_is_a_few_lines_in_the_log() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    let session = cluster.connect(&database).await?;
    session
        .batch_execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN IF NEW.status = 'pending' THEN RAISE EXCEPTION E'not\\nnow'; END IF; RETURN NEW; END $$;
             CREATE TRIGGER refuse BEFORE UPDATE ON outbox_events FOR EACH ROW EXECUTE FUNCTION refuse();",
        )
        .await?;
    insert(&session, &[""]).await?;
    claim(&session, "1, NULL, '100 ms'").await?;
    let lines = || cluster.log().lines().filter(|line| line.contains("P0001")).map(str::to_owned).collect::<Vec<_>>();
    wait::until("some lines in the log", LONG, async || Ok((lines().len() >= 3).then_some(()))).await?;
    let lines = lines();
    assert!(lines.iter().all(|line| line.contains("WARNING") && line.contains("not now")), "{lines:#?}");
    assert!(!cluster.log().contains("ERROR"), "{}", cluster.log());
    session.batch_execute("DROP TRIGGER refuse ON outbox_events").await?;
    session.until("SELECT status = 'pending' FROM outbox_events", LONG).await?;
    Ok(())
}

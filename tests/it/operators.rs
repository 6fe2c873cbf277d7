//! What operators call, as a role that may do no more than an operator: dead letters, destinations, events.

use anyhow::Result;
use outbox_tests::session::Session;
use outbox_tests::world::World;

use crate::claims::{NONE, claim, insert};

/// A session of a role that is granted what an operator needs, and nothing else.
pub async fn operator(world: &World<'_>) -> Result<Session> {
    let session = world.cluster.connect(&world.database).await?;
    let role = format!("operator_of_{}", world.database);
    session
        .batch_execute(&format!("CREATE ROLE {role}; SELECT outbox.grant_operator('{role}'); SET ROLE {role}"))
        .await?;
    Ok(session)
}

/// What is listed: the number of the event, the destination and the status of the delivery.
const LISTED: &str =
    "SELECT coalesce(string_agg(concat_ws(' ', event, destination, status), ', ' ORDER BY event, destination), '')
                        FROM outbox.deliveries";

/// Events 1 to 6, of which 1 to 4 are dead at A: 1 and 2 of type a.x, 3 and 4 of type b.x; 2 and 4 failed with a time-out.
/// Event 3 is dead at B too, event 4 pending there, event 5 delivered; event 6 is fresh. Event n is n days old.
async fn dead_letters(session: &Session) -> Result<()> {
    session
        .batch_execute(
            "SELECT outbox.add_rabbitmq('A'), outbox.add_rabbitmq('B');
             INSERT INTO outbox_events (id, event_type, event_data, created_at)
             SELECT n, CASE WHEN n < 3 THEN 'a.x' ELSE 'b.x' END, '{}', now() - n * interval '1 day' FROM generate_series(1, 5) AS n;
             CREATE TABLE c AS SELECT * FROM outbox.claim();
             SELECT outbox.reject(claim_token, id, CASE WHEN id % 2 = 0 THEN 'timeout: 5 s' ELSE 'HTTP 404' END, 'A') FROM c WHERE id <= 4;
             SELECT outbox.reject(claim_token, 3, 'HTTP 500', 'B'), outbox.fail(claim_token, 4, 'HTTP 500', '1 hour', 'B')
               FROM c WHERE id = 3;
             SELECT outbox.ack(min(claim_token)) FROM c;
             DROP TABLE c;
             INSERT INTO outbox_events (id, event_type, event_data) VALUES (6, 'a.x', '{}')",
        )
        .await?;
    assert_eq!(
        session.one::<String>(LISTED).await?,
        "1 A failed, 2 A failed, 3 A failed, 3 B failed, 4 A failed, 4 B pending"
    );
    Ok(())
}

/// Calls, of which the closing bracket is left out, with a dry run, which must change nothing and wait for nobody, and then in earnest: both return this.
async fn both(operator: &Session, holder: &Session, call: &str, expected: i64) -> Result<()> {
    let before: String = operator.one(LISTED).await?;
    holder.batch_execute("BEGIN; LOCK TABLE outbox.claim_lock IN EXCLUSIVE MODE").await?;
    operator.batch_execute("SET lock_timeout = '1 s'").await?;
    let dry = operator.one::<i64>(&format!("SELECT outbox.{call}, dry_run => true)")).await;
    operator.batch_execute("RESET lock_timeout").await?;
    holder.batch_execute("ROLLBACK").await?;
    assert_eq!(dry?, expected, "{call}");
    assert_eq!(operator.one::<String>(LISTED).await?, before, "{call}: a dry run");
    assert_eq!(operator.one::<i64>(&format!("SELECT outbox.{call})")).await?, expected, "{call}");
    Ok(())
}

#[tokio::test]
async fn dead_letters_are_replayed_by_type_destination_error_age_and_number() -> Result<()> {
    for (arguments, events, left) in [
        ("error => '*'", 4, ""),
        ("event_types => NULL, error => NULL", 4, ""),
        ("event_types => 'b.*'", 2, "1 A, 2 A"),
        ("destination => 'B'", 1, "1 A, 2 A, 3 A, 4 A"),
        ("error => '*time_ut*'", 0, "1 A, 2 A, 3 A, 3 B, 4 A"),
        ("error => 'timeout'", 0, "1 A, 2 A, 3 A, 3 B, 4 A"),
        ("error => 'timeout*'", 2, "1 A, 3 A, 3 B"),
        ("error => '*500', destination => 'B'", 1, "1 A, 2 A, 3 A, 4 A"),
        ("since => now() - interval '60 hours'", 2, "3 A, 3 B, 4 A"),
        ("until => now() - interval '60 hours'", 2, "1 A, 2 A"),
        ("since => now() - interval '84 hours', until => now() - interval '60 hours'", 1, "1 A, 2 A, 4 A"),
        ("max_events => 3", 3, "4 A"),
        ("error => 'HTTP*', max_events => 1", 1, "2 A, 3 A, 3 B, 4 A"),
    ] {
        let world = World::new().await?;
        dead_letters(&world.session).await?;
        let operator = operator(&world).await?;
        both(&operator, &world.session, &format!("replay_failed({arguments}"), events).await?;
        let dead =
            "SELECT coalesce(string_agg(concat_ws(' ', event, destination), ', ' ORDER BY event, destination), '')
                      FROM outbox.deliveries WHERE status = 'failed'";
        assert_eq!(operator.one::<String>(dead).await?, left, "{arguments}");
        let due = "SELECT count(*) FROM outbox.deliveries WHERE status = 'pending' AND next_attempt_at <= now() AND attempts = 0";
        let listed = 5 - left.split(", ").filter(|one| !one.is_empty()).count();
        assert_eq!(operator.one::<i64>(due).await?, listed as i64, "{arguments}");
    }
    Ok(())
}

#[tokio::test]
async fn purging_removes_the_event_that_nobody_else_is_owed_or_gave_up() -> Result<()> {
    for (arguments, events, listed, left) in [
        ("error => '*'", 4, "4 B pending", "4 5 6"),
        ("older_than => NULL, event_types => NULL, error => NULL", 4, "4 B pending", "4 5 6"),
        ("older_than => '60 hours'", 2, "1 A failed, 2 A failed, 4 B pending", "1 2 4 5 6"),
        ("event_types => 'a.*'", 2, "3 A failed, 3 B failed, 4 A failed, 4 B pending", "3 4 5 6"),
        ("destination => 'A'", 4, "3 B failed, 4 B pending", "3 4 5 6"),
        ("destination => 'B'", 1, "1 A failed, 2 A failed, 3 A failed, 4 A failed, 4 B pending", "1 2 3 4 5 6"),
        ("error => 'HTTP 404'", 2, "2 A failed, 3 B failed, 4 A failed, 4 B pending", "2 3 4 5 6"),
    ] {
        let world = World::new().await?;
        dead_letters(&world.session).await?;
        let operator = operator(&world).await?;
        both(&operator, &world.session, &format!("purge_failed({arguments}"), events).await?;
        assert_eq!(operator.one::<String>(LISTED).await?, listed, "{arguments}");
        let ids = "SELECT string_agg(id::text, ' ' ORDER BY id) FROM outbox_events";
        assert_eq!(world.session.one::<String>(ids).await?, left, "{arguments}");
    }
    Ok(())
}

#[tokio::test]
async fn a_dead_letter_whose_event_is_locked_is_not_purged_and_stops_no_purge() -> Result<()> {
    let world = World::new().await?;
    dead_letters(&world.session).await?;
    let operator = operator(&world).await?;
    world.session.batch_execute("BEGIN; SELECT FROM outbox_events WHERE id = 1 FOR KEY SHARE").await?;
    assert_eq!(operator.one::<i64>("SELECT outbox.purge_failed(event_types => 'a.*')").await?, 1);
    world.session.batch_execute("COMMIT").await?;
    assert_eq!(operator.one::<i64>("SELECT outbox.purge_failed(event_types => 'a.*')").await?, 1);
    Ok(())
}

#[tokio::test]
async fn purging_a_dead_letter_lets_those_behind_it_go() -> Result<()> {
    let world = World::new().await?;
    world.execute(r#"SELECT outbox.add_rabbitmq('A', settings => '{"on_failure": "block"}')"#).await?;
    let ids = insert(&world.session, &["a", "a"]).await?;
    let (_, token) = claim(&world.session, "10").await?;
    assert!(world.session.one::<bool>(&format!("SELECT outbox.reject({token}, {}, 'no')", ids[0])).await?);
    assert_eq!(claim(&world.session, "10").await?.0, NONE);
    let operator = operator(&world).await?;
    assert_eq!(operator.one::<i64>("SELECT outbox.purge_failed(destination => 'A')").await?, 1);
    assert_eq!(claim(&world.session, "10").await?.0, ids[1..]);
    Ok(())
}

/// Each call is refused with this SQLSTATE.
#[tokio::test]
async fn what_makes_no_sense_is_refused() -> Result<()> {
    let world = World::new().await?;
    world.execute("SELECT outbox.add_rabbitmq('A')").await?;
    let operator = operator(&world).await?;
    for (call, code) in [
        ("replay_failed('')", "22023"),
        ("replay_failed(error => '')", "22023"),
        ("replay_failed(max_events => 0)", "22023"),
        ("replay_failed(destination => 'nowhere')", "42704"),
        ("replay_failed(destination => 'nowhere', dry_run => true)", "42704"),
        ("purge_failed(event_types => '')", "22023"),
        ("purge_failed(error => '')", "22023"),
        ("purge_failed(destination => '')", "42704"),
    ] {
        let error = operator.batch_execute(&format!("SELECT outbox.{call}")).await.expect_err(call);
        assert_eq!(error.code().map(|code| code.code()), Some(code), "{call}: {error}");
    }
    Ok(())
}

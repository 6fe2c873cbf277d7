//! What operators call, as a role that may do no more than an operator: dead letters, destinations, events.

use anyhow::Result;
use outbox_tests::receiver::Receiver;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;
use uuid::Uuid;

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
        refused(&operator, &format!("SELECT outbox.{call}"), code).await?;
    }
    Ok(())
}

async fn refused(session: &Session, statement: &str, code: &str) -> Result<()> {
    let error = session.batch_execute(statement).await.expect_err(statement);
    assert_eq!(error.code().map(|code| code.code()), Some(code), "{statement}: {error:?}");
    assert!(!format!("{error:?}").contains("hidden"), "{statement}: {error:?}");
    Ok(())
}

#[tokio::test]
async fn a_merge_patch_changes_what_it_names_and_hidden_values_stay_hidden_and_stored() -> Result<()> {
    let world = World::new().await?;
    let settings = r#"{"headers": {"authorization": "hidden-1", "x-a": "hidden-2", "x-b": "hidden-3"}, "max_attempts": 3, "base": 7}"#;
    world.add_webhook("hook", "https://example.com/?token=hidden", settings).await?;
    world.execute("SELECT outbox.pause('hook')").await?;
    let secrets = "SELECT secrets[1] FROM outbox.relay_destinations()";
    let secret: String = world.session.one(secrets).await?;
    let mut operator = operator(&world).await?;
    operator.batch_execute("LISTEN outbox_destinations").await?;
    let change = async |changes: &str| {
        let sql = "SELECT outbox.alter_destination('hook', $1::text::jsonb)";
        operator.execute(sql, &[&changes]).await
    };
    change(
        r#"{"settings": {"headers": {"x-a": null, "x-b": "hidden-4", "x-c": "hidden-5"}, "base": null, "cap": "1 h"},
            "event_types": ["a.*", "b"], "tenant_id": "acme", "filter": "$.amount > 100"}"#,
    )
    .await?;
    let stored = "SELECT concat_ws(' ', url, settings) FROM outbox.hidden";
    let headers = r#""headers": {"x-b": "hidden-4", "x-c": "hidden-5", "authorization": "hidden-1"}"#;
    assert_eq!(
        world.session.one::<String>(stored).await?,
        format!(r#"https://example.com/?token=hidden {{"cap": "1 h", {headers}, "max_attempts": 3}}"#)
    );
    let shown = "SELECT concat_ws(' ', url, event_types, tenant_id, filter, state, settings -> 'headers') FROM outbox.destinations";
    assert_eq!(
        operator.one::<String>(shown).await?,
        r#"https://example.com/?… {a.*,b} acme ($."amount" > 100) paused {"x-b": "…", "x-c": "…", "authorization": "…"}"#
    );
    change("{}").await?;
    change(r#"{"event_types": null, "tenant_id": null, "filter": null, "url": "https://example.org/", "settings": {"headers": null}}"#)
        .await?;
    assert_eq!(world.session.one::<String>(stored).await?, r#"https://example.org/ {"cap": "1 h", "max_attempts": 3}"#);
    assert_eq!(operator.one::<String>(shown).await?, "https://example.org/ {*} paused");
    change(r#"{"settings": null}"#).await?;
    assert_eq!(world.session.one::<String>(stored).await?, "https://example.org/ {}");
    assert_eq!(world.session.one::<String>(secrets).await?, secret);
    for _ in 0..4 {
        let said = operator.notification(LONG).await?;
        assert_eq!((said.channel(), said.payload()), ("outbox_destinations", "hook"));
    }
    Ok(())
}

#[tokio::test]
async fn a_rabbitmq_destination_gets_its_defaults_back() -> Result<()> {
    let world = World::new().await?;
    world.execute(r#"SELECT outbox.add_rabbitmq('A', 'x', 'k', '{a}', '{"queue": "q", "concurrency": 3}')"#).await?;
    let operator = operator(&world).await?;
    let shown = "SELECT concat_ws(' ', exchange, routing_key, event_types, settings) FROM outbox.destinations";
    let change = async |changes: &str| {
        let sql = "SELECT outbox.alter_destination('A', $1::text::jsonb)";
        operator.execute(sql, &[&changes]).await
    };
    change(r#"{"exchange": "y", "settings": {"queue": "r"}}"#).await?;
    assert_eq!(operator.one::<String>(shown).await?, r#"y k {a} {"queue": "r", "concurrency": 3}"#);
    change(r#"{"exchange": null, "routing_key": null, "event_types": null, "settings": {"concurrency": null}}"#)
        .await?;
    assert_eq!(operator.one::<String>(shown).await?, r#"outbox_events {event_type} {*} {"queue": "r"}"#);
    Ok(())
}

#[tokio::test]
async fn changes_that_a_destination_can_not_have_change_nothing() -> Result<()> {
    let world = World::new().await?;
    let settings = r#"{"headers": {"authorization": "hidden"}}"#;
    world.add_webhook("hook", "https://example.com/?token=hidden", settings).await?;
    world.execute("SELECT outbox.add_rabbitmq('mq')").await?;
    let all = "SELECT string_agg(concat_ws(' ', d, h), ' ') FROM outbox.destination d LEFT JOIN outbox.hidden h ON h.destination = d.name";
    let before: String = world.session.one(all).await?;
    let operator = operator(&world).await?;
    for (arguments, code) in [
        (r#"'hook', '{"url": null}'"#, "22023"),
        (r#"'hook', '{"url": "ftp://hidden"}'"#, "22023"),
        (r#"'hook', '{"url": {"a": "hidden"}}'"#, "22023"),
        (r#"'hook', '{"exchange": "x"}'"#, "22023"),
        (r#"'hook', '{"name": "x"}'"#, "22023"),
        (r#"'hook', '{"secret": "hidden"}'"#, "22023"),
        (r#"'hook', '{"event_types": []}'"#, "22023"),
        (r#"'hook', '{"event_types": "a"}'"#, "22023"),
        (r#"'hook', '{"event_types": ["a", 1]}'"#, "22023"),
        (r#"'hook', '{"tenant_id": ""}'"#, "22023"),
        (r#"'hook', '{"filter": "$nothing"}'"#, "22023"),
        (r#"'hook', '{"filter": "hidden("}'"#, "42601"),
        (r#"'hook', '{"settings": ["hidden"]}'"#, "22023"),
        (r#"'hook', '{"settings": {"max_attempts": 0}}'"#, "22023"),
        (r#"'hook', '{"settings": {"headers": {"x": "…"}}}'"#, "22023"),
        (r#"'hook', '{"settings": {"max_atempts": 5}}'"#, "22023"),
        (r#"'hook', '{"settings": {"broker": "default"}}'"#, "22023"),
        (r#"'hook', '["url"]'"#, "22023"),
        ("'hook', NULL", "22023"),
        (r#"'mq', '{"url": "https://example.com/"}'"#, "22023"),
        (r#"'mq', '{"routing_key": ""}'"#, "22023"),
        (r#"'mq', '{"exchange": "{nothing}"}'"#, "22023"),
        (r#"'mq', '{"settings": {"declare": "all"}}'"#, "22023"),
        (r#"'nowhere', '{}'"#, "42704"),
    ] {
        refused(&operator, &format!("SELECT outbox.alter_destination({arguments})"), code).await?;
    }
    assert_eq!(world.session.one::<String>(all).await?, before);
    Ok(())
}

/// A claim holds what was wanted when it was made.
#[tokio::test]
async fn a_destination_that_wants_more_gets_nothing_of_a_claim_in_flight() -> Result<()> {
    let world = World::new().await?;
    world.execute("SELECT outbox.add_rabbitmq('A'), outbox.add_rabbitmq('B', event_types => '{other}')").await?;
    let ids = insert(&world.session, &["a"]).await?;
    let (claimed, token) = claim(&world.session, "10").await?;
    assert_eq!(claimed, ids);
    operator(&world).await?.batch_execute(r#"SELECT outbox.alter_destination('B', '{"event_types": ["*"]}')"#).await?;
    assert!(world.session.one::<bool>(&format!("SELECT outbox.fail({token}, {}, 'no', '1 hour')", ids[0])).await?);
    assert_eq!(world.session.one::<String>(LISTED).await?, format!("{} A pending", ids[0]));
    insert(&world.session, &["b"]).await?;
    assert_eq!(world.session.one::<Vec<String>>("SELECT destinations FROM outbox.claim()").await?, ["A", "B"]);
    Ok(())
}

#[tokio::test]
async fn only_another_address_or_setting_enables_a_disabled_destination() -> Result<()> {
    let world = World::new().await?;
    world.add_webhook("hook", "https://example.com/", "{}").await?;
    insert(&world.session, &["a"]).await?;
    world
        .execute(
            "SELECT outbox.settle('{}', '{}', jsonb_build_array(jsonb_build_object(
                        'token', claim_token, 'id', id, 'destination', 'hook', 'outcome', 'gone', 'error', '410')))
               FROM outbox.claim()",
        )
        .await?;
    let operator = operator(&world).await?;
    for (changes, state) in [
        (r#"{"event_types": ["a"], "filter": "$.a", "tenant_id": "t"}"#, "disabled"),
        (r#"{"url": "https://example.com/"}"#, "disabled"),
        (r#"{"url": "https://example.com/new"}"#, "active"),
    ] {
        operator.execute("SELECT outbox.alter_destination('hook', $1::text::jsonb)", &[&changes]).await?;
        assert_eq!(operator.one::<String>("SELECT state FROM outbox.destinations").await?, state, "{changes}");
    }
    Ok(())
}

#[tokio::test]
async fn a_test_event_goes_to_one_destination_whatever_it_wants_and_waits_while_it_is_paused() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let operator = operator(&world).await?;
    for (name, wants) in
        [("A", "'{a.*}', tenant_id => 'acme', filter => '$.amount > 1'"), ("B", "'{outbox.*}'"), ("C", "'{*}'")]
    {
        let add = format!("SELECT outbox.add_webhook($1, $2, {wants})");
        operator.execute(&add, &[&name, &receiver.url(name)]).await?;
    }
    operator.batch_execute("SELECT outbox.pause('A')").await?;
    let event: Uuid = operator.one("SELECT outbox.send_test('A')").await?;
    assert_eq!(claim(&world.session, "10").await?.0, NONE, "A is paused, and nobody else wants it");
    let of = format!("SELECT outbox.event('{event}') #>> '{{destinations,A,status}}'");
    assert_eq!(operator.one::<String>(&of).await?, "pending");
    operator.batch_execute("SELECT outbox.resume('A')").await?;
    let _relay = world.relay().await?;
    world.processed().await?;
    let received = receiver.received();
    assert_eq!(received.iter().map(|one| one.path.as_str()).collect::<Vec<_>>(), ["/A"]);
    let body = received[0].json()?;
    assert_eq!((&body["type"], &body["data"]["destination"]), (&"outbox.test".into(), &"A".into()));
    assert!(body["data"]["sent_at"].as_str().is_some_and(|at| at.ends_with('Z')), "{body}");
    assert_eq!(received[0].event_id()?, event);
    assert_eq!(operator.one::<String>(&of).await?, "delivered");
    assert_eq!(
        operator
            .one::<i64>(
                "SELECT count(*) FROM jsonb_object_keys(outbox.event($1) -> 'destinations')"
                    .replace("$1", &format!("'{event}'"))
                    .as_str()
            )
            .await?,
        1
    );
    refused(&operator, "SELECT outbox.send_test('nowhere')", "42704").await
}

/// Events 1 to 8 were given out while there was A alone: 5 is claimed for it, 6 waits for a retry, 7 is dead there and 8
/// scheduled; 3 is of another tenant and 4 of another type. B came then, and 9 is fresh.
async fn before_b(world: &World<'_>) -> Result<i64> {
    world
        .execute(
            "SELECT outbox.add_rabbitmq('A');
             INSERT INTO outbox_events (id, event_type, event_data, tenant_id, created_at, available_at)
             SELECT n, CASE n WHEN 4 THEN 'b' ELSE 'a.x' END, jsonb_build_object('n', n), CASE n WHEN 3 THEN 'other' ELSE 'acme' END,
                    now() - n * interval '1 day', CASE n WHEN 8 THEN now() + interval '1 day' END FROM generate_series(1, 8) AS n",
        )
        .await?;
    let (_, token) = claim(&world.session, "4").await?;
    world.execute(&format!("SELECT outbox.ack({token})")).await?;
    let (_, held) = claim(&world.session, "1").await?;
    let (_, token) = claim(&world.session, "10").await?;
    world
        .execute(&format!(
            "SELECT outbox.fail({token}, 6, 'no', '1 hour'), outbox.reject({token}, 7, 'no');
             SELECT outbox.add_rabbitmq('B', event_types => '{{a.*}}', tenant_id => 'acme', filter => '$.n != 2');
             INSERT INTO outbox_events (id, event_type, event_data, tenant_id) VALUES (9, 'a.x', '{{\"n\": 9}}', 'acme')"
        ))
        .await?;
    Ok(held)
}

#[tokio::test]
async fn a_backfill_owes_what_a_destination_would_have_had_and_does_not_get_anyway() -> Result<()> {
    for (arguments, owed) in [
        ("'B'", "1 5 6 7"),
        ("'B', max_events => 2", "1 5"),
        ("'B', since => now() - interval '132 hours'", "1 5"),
        ("'B', until => now() - interval '132 hours'", "6 7"),
        ("'B', 'a.*'", "1 5 6 7"),
        ("'B', 'b*'", ""),
    ] {
        let world = World::new().await?;
        let held = before_b(&world).await?;
        let operator = operator(&world).await?;
        let n = owed.split_whitespace().count() as i64;
        both(&operator, &world.session, &format!("backfill({arguments}"), n).await?;
        let listed = "SELECT coalesce(string_agg(event::text, ' ' ORDER BY event), '') FROM outbox.deliveries
                       WHERE destination = 'B' AND status = 'pending' AND next_attempt_at <= now()";
        assert_eq!(operator.one::<String>(listed).await?, owed, "{arguments}");
        assert_eq!(operator.one::<i64>("SELECT outbox.backfill('B')").await?, 4 - n, "{arguments}: owed twice");
        // What the claim holds for A is still its own to settle.
        assert_eq!(world.session.one::<i64>(&format!("SELECT outbox.ack({held})")).await?, 1);
        let (ids, _) = claim(&world.session, "10, '{B}'").await?;
        assert_eq!(ids, [1, 5, 6, 7, 9], "{arguments}");
        let left = "SELECT string_agg(concat_ws(' ', event, status), ', ' ORDER BY event) FROM outbox.deliveries WHERE destination = 'A'";
        assert_eq!(world.session.one::<String>(left).await?, "6 pending, 7 failed, 9 pending");
    }
    Ok(())
}

#[tokio::test]
async fn a_backfilled_aggregate_keeps_its_order_with_what_is_outstanding() -> Result<()> {
    let world = World::new().await?;
    world.execute("SELECT outbox.add_rabbitmq('A')").await?;
    let mut ids = insert(&world.session, &["a", "a", "b"]).await?;
    world.execute("SELECT outbox.ack(min(claim_token)) FROM outbox.claim()").await?;
    world.execute("SELECT outbox.add_rabbitmq('B')").await?;
    ids.extend(insert(&world.session, &["a", "a"]).await?);
    // One of the later ones is in flight, the other waits behind it.
    let (claimed, first) = claim(&world.session, "1, '{B}'").await?;
    assert_eq!(claimed, [ids[3]]);
    assert_eq!(operator(&world).await?.one::<i64>("SELECT outbox.backfill('B')").await?, 3);
    let (claimed, other) = claim(&world.session, "10, '{B}'").await?;
    assert_eq!(claimed, [ids[2]], "one of the aggregate a is in flight");
    world.execute(&format!("SELECT outbox.ack({other})")).await?;
    assert!(world.session.one::<bool>(&format!("SELECT outbox.fail({first}, {}, 'no', '0')", ids[3])).await?);
    for expected in [ids[0], ids[1], ids[3], ids[4]] {
        let (claimed, token) = claim(&world.session, "1, '{B}'").await?;
        assert_eq!(claimed, [expected]);
        assert_eq!(claim(&world.session, "10, '{B}'").await?.0, NONE, "behind {expected}");
        world.execute(&format!("SELECT outbox.ack({token})")).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_backfill_waits_for_no_locked_event_and_owes_what_a_claim_holds_only_once() -> Result<()> {
    let world = World::new().await?;
    world.execute("SELECT outbox.add_rabbitmq('A'), outbox.add_rabbitmq('B')").await?;
    let ids = insert(&world.session, &["a", "b", "c"]).await?;
    let (_, token) = claim(&world.session, "2").await?;
    world.execute(&format!("SELECT outbox.ack({token}, '{{{}}}')", ids[0])).await?;
    let operator = operator(&world).await?;
    operator.batch_execute("SET statement_timeout = '1 s'").await?;
    world.execute(&format!("BEGIN; SELECT FROM outbox_events WHERE id = {} FOR UPDATE", ids[0])).await?;
    assert_eq!(operator.one::<i64>("SELECT outbox.backfill('B')").await?, 0, "locked, claimed and fresh");
    world.execute("COMMIT").await?;
    assert_eq!(operator.one::<i64>("SELECT outbox.backfill('B')").await?, 1);
    refused(&operator, "SELECT outbox.backfill('nowhere')", "42704").await?;
    refused(&operator, "SELECT outbox.backfill('B', '')", "22023").await?;
    refused(&operator, "SELECT outbox.backfill('B', max_events => 0)", "22023").await
}

#[tokio::test]
async fn an_event_tells_what_became_of_it_at_each_destination() -> Result<()> {
    let world = World::new().await?;
    let operator = operator(&world).await?;
    world.execute("SELECT outbox.add_rabbitmq('A'), outbox.add_rabbitmq('B'), outbox.add_rabbitmq('other', event_types => '{x}')").await?;
    let ids = insert(&world.session, &["a"]).await?;
    let event: Uuid = world.session.one("SELECT event_id FROM outbox_events").await?;
    let statuses = format!(
        "SELECT string_agg(concat_ws(' ', d.key, d.value ->> 'status', d.value ->> 'attempts', d.value ->> 'last_error'), ', ' ORDER BY d.key)
           FROM jsonb_each(outbox.event('{event}') -> 'destinations') d"
    );
    assert_eq!(operator.one::<String>(&statuses).await?, "A pending 0, B pending 0");
    let (_, token) = claim(&world.session, "10").await?;
    assert_eq!(operator.one::<String>(&statuses).await?, "A processing 0, B processing 0");
    world.execute("SELECT outbox.add_rabbitmq('late')").await?;
    assert_eq!(operator.one::<String>(&statuses).await?, "A processing 0, B processing 0", "added later");
    world.execute("SELECT outbox.remove_destination('late')").await?;
    world.execute(&format!("SELECT outbox.fail({token}, {}, 'no luck', '1 hour', 'A')", ids[0])).await?;
    assert_eq!(operator.one::<String>(&statuses).await?, "A pending 1 no luck, B processing 0");
    world.execute(&format!("SELECT outbox.ack({token})")).await?;
    assert_eq!(operator.one::<String>(&statuses).await?, "A pending 1 no luck, B delivered");
    let next =
        format!("SELECT outbox.event('{event}') #>> '{{destinations,A,next_attempt_at}}' LIKE '____-__-__T%+00:00'");
    assert!(operator.one::<bool>(&next).await?);
    world.execute("UPDATE outbox.delivery SET next_attempt_at = now()").await?;
    let (_, token) = claim(&world.session, "10").await?;
    world.execute(&format!("SELECT outbox.reject({token}, {}, 'no good', 'A')", ids[0])).await?;
    assert_eq!(operator.one::<String>(&statuses).await?, "A failed 2 no good, B delivered");
    world.execute("SELECT outbox.replay_failed()").await?;
    world.execute("SELECT outbox.ack(min(claim_token)) FROM outbox.claim()").await?;
    world.execute("SELECT outbox.add_rabbitmq('late')").await?;
    assert_eq!(operator.one::<String>(&statuses).await?, "A delivered, B delivered");
    let keys = format!("SELECT string_agg(k, ' ' ORDER BY k) FROM jsonb_object_keys(outbox.event('{event}')) AS k");
    assert_eq!(
        operator.one::<String>(&keys).await?,
        "aggregate_id aggregate_type available_at created_at destinations event_data event_id event_type event_version id \
         last_error metadata processed_at retry_count status tenant_id"
    );
    assert_eq!(operator.one::<Option<String>>("SELECT outbox.event(gen_random_uuid())::text").await?, None);
    Ok(())
}

//! Who wants an event: patterns, tenants and filters; and what it costs, however many destinations there are.

use anyhow::{Context, Result};
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

use crate::claims::claim;
use crate::statistics::cost;

/// Who gets an event with these columns.
async fn wanted(session: &Session, columns: &str, values: &str) -> Result<String> {
    session.batch_execute(&format!("INSERT INTO outbox_events ({columns}) VALUES ({values})")).await?;
    let destinations = session
        .query("SELECT array_to_string(destinations, ' '), claim_token FROM outbox.claim(1)", &[])
        .await
        .with_context(|| values.to_owned())?;
    let Some(row) = destinations.first() else { return Ok("nobody".into()) };
    session.execute("SELECT outbox.ack($1)", &[&row.get::<_, i64>(1)]).await?;
    Ok(row.get(0))
}

#[tokio::test]
async fn patterns_and_tenants_say_who_wants_an_event() -> Result<()> {
    let World { session, .. } = World::new().await?;
    session
        .batch_execute(
            r"SELECT outbox.add_rabbitmq('all'), outbox.add_rabbitmq('exact', event_types => '{order.made}'),
                     outbox.add_rabbitmq('head', event_types => '{order.*}'),
                     outbox.add_rabbitmq('word', event_types => '{ord*}'),
                     outbox.add_rabbitmq('tail', event_types => '{*.made}'),
                     outbox.add_rabbitmq('middle', event_types => '{o*.m**e}'),
                     outbox.add_rabbitmq('several', event_types => '{order.made,order.*,zebra}'),
                     outbox.add_rabbitmq('odd', event_types => ARRAY['50%_\*', 'é.*']),
                     outbox.add_rabbitmq('acme', tenant_id => 'acme'),
                     outbox.add_rabbitmq('acme-order', event_types => '{order.*}', tenant_id => 'acme'),
                     outbox.add_rabbitmq('own', event_types => '{outbox.*}')",
        )
        .await?;
    for (event_type, tenant, expected) in [
        ("order.made", None, "all exact head middle several tail word"),
        ("order.made", Some("acme"), "acme acme-order all exact head middle several tail word"),
        ("order.made", Some("ACME"), "all exact head middle several tail word"),
        ("order.", None, "all head several word"),
        ("order", None, "all word"),
        ("ordermade", None, "all word"),
        ("zebra", Some("acme"), "acme all several"),
        ("zebras", None, "all"),
        ("50%_\\x", None, "all odd"),
        ("50xy\\x", None, "all"),
        ("é.x", None, "all odd"),
        ("outbox.test", Some("acme"), "own"),
        ("outbox", None, "all"),
    ] {
        let tenant = tenant.map_or("NULL".into(), |tenant| format!("'{tenant}'"));
        let values = format!("$q${event_type}$q$, {tenant}, '{{}}'");
        assert_eq!(wanted(&session, "event_type, tenant_id, event_data", &values).await?, expected, "{values}");
    }
    let long = "x".repeat(150) + "." + &"y".repeat(150);
    session
        .batch_execute(&format!(
            "SELECT outbox.add_rabbitmq('long', event_types => '{{{long}}}'), outbox.add_rabbitmq('long-head', event_types => '{{{long}*}}')"
        ))
        .await?;
    let found = wanted(&session, "event_type, event_data", &format!("'{long}', '{{}}'")).await?;
    assert_eq!(found, "all long long-head");
    let found = wanted(&session, "event_type, event_data", &format!("'{long}z', '{{}}'")).await?;
    assert_eq!(found, "all long-head");
    Ok(())
}

/// The index finds what a look at each pattern would find.
#[tokio::test]
async fn what_is_found_is_what_matches() -> Result<()> {
    let World { session, .. } = World::new().await?;
    session
        .batch_execute(
            "SELECT count(outbox.add_rabbitmq('d' || n, event_types => ARRAY[p, q], tenant_id => CASE n % 3 WHEN 0 THEN 't' || n % 4 END))
               FROM (SELECT n, (SELECT string_agg(('{a,b.,*,c,.d,Z9,-,é}'::text[])[1 + floor(random() * 8)::int], '') FROM generate_series(1, 1 + n % 4) WHERE n > 0) AS p,
                            (SELECT string_agg(('{a,b.,*,.,_}'::text[])[1 + floor(random() * 5)::int], '') FROM generate_series(1, 1 + n % 3) WHERE n > 0) AS q
                       FROM generate_series(1, 300) n) x",
        )
        .await?;
    let differing = "WITH event AS MATERIALIZED (
            SELECT (SELECT string_agg(('{a,b.,x,c,.d,Z9,-,é,.,_}'::text[])[1 + floor(random() * 10)::int], '') FROM generate_series(1, 1 + n % 6) WHERE n > 0) AS type,
                   CASE n % 2 WHEN 0 THEN 't' || n % 4 END AS tenant
              FROM generate_series(1, 400) n
        ), expected AS (
            SELECT e.type, e.tenant, d.name FROM event e JOIN outbox.destination d
                ON (d.tenant_id IS NULL OR d.tenant_id = e.tenant)
               AND EXISTS (SELECT FROM unnest(d.event_types) p WHERE e.type ~ ('^' || replace(regexp_replace(p, '([.])', '\\\\\\1', 'g'), '*', '.*') || '$'))
        ), found AS (SELECT e.type, e.tenant, d.name FROM event e CROSS JOIN LATERAL outbox._wanting(e.type, e.tenant) d)
        SELECT count(*) AS all, count(*) FILTER (WHERE expected.name IS NULL OR found.name IS NULL) AS differ
          FROM expected FULL JOIN found ON (found.type, coalesce(found.tenant, ''), found.name) = (expected.type, coalesce(expected.tenant, ''), expected.name)";
    let row = session.query_one(differing, &[]).await?;
    let (all, differ): (i64, i64) = (row.get(0), row.get(1));
    assert!(all > 1000 && differ == 0, "{differ} of {all} differ");
    Ok(())
}

#[tokio::test]
async fn a_filter_says_yes_or_no_and_never_fails() -> Result<()> {
    let World { session, .. } = World::new().await?;
    session
        .batch_execute(
            r#"SELECT outbox.add_rabbitmq('amount', filter => '$.amount > 100'),
                      outbox.add_rabbitmq('items', filter => '$.items[*] ? (@.price > 10)'),
                      outbox.add_rabbitmq('first', filter => '$.list[*]'),
                      outbox.add_rabbitmq('variables', filter => '$metadata.vip == true && $event_type starts with "a" && $tenant_id == "t"'),
                      outbox.add_rabbitmq('no-key', filter => '$aggregate_id == null && $aggregate_type == null'),
                      outbox.add_rabbitmq('strict', filter => 'strict $.deep.er.still > 1'),
                      outbox.add_rabbitmq('dates', filter => '$.at.datetime() > "2026-01-01T00:00:00+00:00".datetime()'),
                      outbox.add_rabbitmq('text', filter => '$.text like_regex "^\\$nobody\\$"')"#,
        )
        .await?;
    for (data, metadata, aggregate, expected) in [
        (r#"{"amount": 101}"#, "{}", "NULL", "amount no-key"),
        (r#"{"amount": 100}"#, "{}", "'1'", "nobody"),
        (r#"{"amount": "101"}"#, "{}", "'1'", "nobody"),
        (r#"{"amount": [1, 200]}"#, "{}", "'1'", "amount"),
        (r#"{"items": [{"price": 1}, {"price": 11}]}"#, "{}", "'1'", "items"),
        (r#"{"items": 7}"#, "{}", "'1'", "nobody"),
        (r#"{"list": [false, true]}"#, "{}", "'1'", "nobody"),
        (r#"{"list": [null, true]}"#, "{}", "'1'", "nobody"),
        (r#"{"list": [0]}"#, "{}", "'1'", "first"),
        (r#"{"list": []}"#, "{}", "'1'", "nobody"),
        ("{}", r#"{"vip": true}"#, "'1'", "variables"),
        ("{}", r#"{"vip": "true"}"#, "'1'", "nobody"),
        (r#"{"at": "2026-06-01"}"#, "{}", "'1'", "dates"),
        (r#"{"at": "soon"}"#, "{}", "'1'", "nobody"),
        (r#"{"at": "2025-06-01 10:00:00"}"#, "{}", "'1'", "nobody"),
        (r#"{"text": "$nobody$ is here"}"#, "{}", "'1'", "text"),
        (r#"{"deep": {"er": {}}}"#, "{}", "'1'", "nobody"),
        ("null", "null", "'1'", "nobody"),
    ] {
        let values = format!("'a.b', '{data}', '{metadata}', {aggregate}, {aggregate}, 't'");
        let columns = "event_type, event_data, metadata, aggregate_id, aggregate_type, tenant_id";
        assert_eq!(wanted(&session, columns, &values).await?, expected, "{values}");
    }
    for (filter, code) in [
        ("$nobody == 1", "22023"),
        (r#"$.x ? (@.y == $"event_typ")"#, "22023"),
        ("$..", "42601"),
        (&format!("$.x == \"{}\"", "y".repeat(9000)), "22023"),
    ] {
        let error = session.query("SELECT outbox.add_rabbitmq('x', filter => $1::text::jsonpath)", &[&filter]).await;
        let error = error.expect_err(filter);
        assert_eq!(error.code().map(tokio_postgres::error::SqlState::code), Some(code), "{filter}: {error:?}");
    }
    Ok(())
}

/// An event that is claimed whole is listed for those that it was claimed for, though its filter was changed meanwhile.
#[tokio::test]
async fn what_a_destination_wants_may_change_under_a_claim() -> Result<()> {
    let World { session, .. } = World::new().await?;
    session
        .batch_execute(
            "SELECT outbox.add_rabbitmq('a', filter => '$.x == 1'), outbox.add_rabbitmq('b', tenant_id => 't')",
        )
        .await?;
    session
        .batch_execute("INSERT INTO outbox_events (event_type, event_data, tenant_id) VALUES ('e', '{\"x\": 1}', 't')")
        .await?;
    let (ids, token) = claim(&session, "10").await?;
    session
        .batch_execute(
            "SELECT outbox.add_rabbitmq('a', filter => '$.x == 2'), outbox.add_rabbitmq('b', tenant_id => 'u')",
        )
        .await?;
    let failed: bool =
        session.query_one("SELECT outbox.fail($1, $2, 'no', '0', 'a')", &[&token, &ids[0]]).await?.get(0);
    assert!(failed, "the claim holds what it was given");
    assert_eq!(session.query_one("SELECT outbox.ack($1)", &[&token]).await?.get::<_, i64>(0), 1);
    let owed: String =
        session.one("SELECT string_agg(destination || ' ' || status, ',') FROM outbox.deliveries").await?;
    assert_eq!(owed, "a pending");
    Ok(())
}

async fn tenants(session: &Session, count: usize) -> Result<()> {
    let add = format!(
        "SELECT count(outbox.add_webhook('w' || n, 'http://192.0.2.1/', tenant_id => 't' || n)) FROM generate_series(1, {count}) n"
    );
    Ok(session.batch_execute(&add).await?)
}

/// The pages that the steps of events' way touch.
async fn way(session: &Session) -> Result<Vec<(&'static str, i64)>> {
    session
        .batch_execute(
            "INSERT INTO outbox_events (event_type, event_data, tenant_id, aggregate_id)
             SELECT 'order.made', '{}', 't' || n, n FROM generate_series(1, 9) n",
        )
        .await?;
    let mut costs = Vec::new();
    for (name, call) in [
        ("claim", "PERFORM outbox.claim_for(9, '1 minute')"),
        ("fail one", "PERFORM outbox.fail(c.token, c.ids[1], 'no', '0') FROM outbox.claims c"),
        ("ack", "PERFORM outbox.ack(c.token) FROM outbox.claims c"),
        ("claim due", "PERFORM outbox.claim_for(9, '1 minute')"),
        ("fail again", "PERFORM outbox.fail(c.token, c.ids[1], 'no', '1 hour') FROM outbox.claims c"),
        ("claim nothing", "PERFORM outbox.claim_for(9, '1 minute')"),
        ("due", "PERFORM outbox._due()"),
    ] {
        costs.push((name, cost(session, &format!("DO $do$ BEGIN {call}; END $do$")).await?));
    }
    Ok(costs)
}

#[tokio::test]
async fn destinations_of_other_tenants_cost_an_event_nothing() -> Result<()> {
    let World { session, cluster, .. } = World::new().await?;
    let mut sizes = Vec::new();
    for count in [10, 3000] {
        let database = cluster.database().await?;
        let session = cluster.connect(&database).await?;
        tenants(&session, count).await?;
        way(&session).await?;
        sizes.push(way(&session).await?);
    }
    drop(session);
    for ((name, few), (_, many)) in sizes[0].iter().zip(&sizes[1]) {
        // Indexes are a level or two deeper.
        assert!(*many <= few * 2 + 10, "{name}: {few} pages with 10 destinations, {many} with 3000");
    }
    Ok(())
}

#[tokio::test]
async fn an_event_for_thousands_is_handed_out_with_few_others() -> Result<()> {
    const WIDE: usize = 3000;
    let World { session, .. } = World::new().await?;
    session
        .batch_execute(&format!(
            "SELECT count(outbox.add_webhook('w' || n, 'http://192.0.2.1/', event_types => '{{wide}}')) FROM generate_series(1, {WIDE}) n;
             SELECT outbox.add_webhook('other', 'http://192.0.2.1/', event_types => '{{other}}');
             INSERT INTO outbox_events (event_type, event_data) SELECT 'wide', '{{}}' FROM generate_series(1, 20);
             INSERT INTO outbox_events (event_type, event_data) VALUES ('other', '{{}}')"
        ))
        .await?;
    let mut rounds = Vec::new();
    let mut deliveries = 0;
    while deliveries < 20 * WIDE as i64 + 1 {
        let row = session
            .query_one("SELECT count(*), coalesce(sum(cardinality(destinations)), 0)::bigint, max(claim_token) FROM outbox.claim(500)", &[])
            .await?;
        rounds.push(row.get::<_, i64>(0));
        deliveries += row.get::<_, i64>(1);
        assert!(rounds.len() < 10 && rounds.last() != Some(&0), "{rounds:?}");
        session.execute("SELECT outbox.ack($1)", &[&row.get::<_, i64>(2)]).await?;
    }
    assert!(rounds[0] < 10, "a claim stops at some number of deliveries: {rounds:?}");
    session.until("SELECT bool_and(status = 'processed') FROM outbox_events", LONG).await?;
    Ok(())
}

/// A retry, a probe and a pause each find their moment among thousands of destinations.
#[tokio::test]
async fn what_is_due_is_found_among_thousands() -> Result<()> {
    let World { session, .. } = World::new().await?;
    tenants(&session, 2000).await?;
    session
        .batch_execute(
            "INSERT INTO outbox_events (event_type, event_data, tenant_id) SELECT 'e', '{}', 't' || n FROM generate_series(1, 2000) n",
        )
        .await?;
    let token: i64 = session.one("SELECT max(claim_token) FROM outbox.claim_for(2000, '1 minute')").await?;
    // A third fails for now, a third is throttled, a third is delivered.
    let outcomes = format!(
        "SELECT outbox.settle(array_agg({token}::bigint) FILTER (WHERE id % 3 = 0), array_agg(id) FILTER (WHERE id % 3 = 0),
                jsonb_agg(jsonb_build_object('token', {token}, 'id', id, 'destination', 'w' || substr(tenant_id, 2), 'error', 'no',
                    'outcome', CASE id % 3 WHEN 1 THEN 'failed' ELSE 'throttled' END, 'retry_in', CASE id % 3 WHEN 1 THEN 0 ELSE 3600 END))
                FILTER (WHERE id % 3 > 0)) FROM outbox_events"
    );
    session.execute(&outcomes, &[]).await?;
    let due = "SELECT count(*) FROM outbox_events WHERE id % 3 = 1";
    let expected: i64 = session.one(due).await?;
    let mut found: i64 = 0;
    loop {
        let row =
            session.query_one("SELECT count(*), max(claim_token) FROM outbox.claim_for(100, '1 minute')", &[]).await?;
        let count: i64 = row.get(0);
        if count == 0 {
            break;
        }
        found += count;
        session.execute("SELECT outbox.ack($1)", &[&row.get::<_, i64>(1)]).await?;
    }
    assert_eq!(found, expected, "the throttled wait, the others came");
    // One of those that wait is resumed, another one is paused and then resumed.
    for (call, comes) in [("resume('w2')", 1_i64), ("pause('w5')", 0), ("resume('w5')", 1)] {
        session.execute(&format!("SELECT outbox.{call}"), &[]).await?;
        let row =
            session.query_one("SELECT count(*), max(claim_token) FROM outbox.claim_for(100, '1 minute')", &[]).await?;
        assert_eq!(row.get::<_, i64>(0), comes, "{call}");
        if comes > 0 {
            session.execute("SELECT outbox.ack($1)", &[&row.get::<_, i64>(1)]).await?;
        }
    }
    let hidden: i64 = session.one(LATE_NOTES).await?;
    assert_eq!(hidden, 0, "no delivery is due before its destination's next_due");
    Ok(())
}

/// Deliveries that no claim would find at their moment.
pub const LATE_NOTES: &str = "SELECT count(*) FROM outbox.delivery d JOIN outbox.destination t ON t.name = d.destination
     WHERE d.status = 'pending' AND d.next_attempt_at IS NOT NULL AND (t.next_due IS NULL OR t.next_due > d.next_attempt_at)";

#[tokio::test]
async fn the_scope_of_a_relay_says_what_it_does_not_serve() -> Result<()> {
    let World { session, .. } = World::new().await?;
    session
        .batch_execute(
            r#"SELECT outbox.add_webhook('a.hook', 'http://192.0.2.1/'), outbox.add_webhook('b.hook', 'http://192.0.2.1/'),
                      outbox.add_rabbitmq('a.mq'), outbox.add_rabbitmq('b.mq', settings => '{"broker": "second"}')"#,
        )
        .await?;
    for (arguments, expected) in [
        ("", "a.hook b.hook"),
        (", brokers => '{default}'", "a.hook a.mq b.hook"),
        (", brokers => '{default,second}', passed => '{a.hook,b.mq}'", "a.mq b.hook"),
        (", brokers => '{second}', patterns => '{b.%,c.%}'", "b.hook b.mq"),
        (", brokers => '{default}', only_names => '{b.hook,b.mq}'", "b.hook"),
        (", only_names => '{a.mq}'", ""),
        (", only_names => '{}'", ""),
    ] {
        session.batch_execute("INSERT INTO outbox_events (event_type, event_data) VALUES ('e', '{}')").await?;
        let claim = format!(
            "SELECT coalesce(string_agg(array_to_string(destinations, ' '), '|'), '') FROM outbox.claim_for(10, '1 minute'{arguments})"
        );
        assert_eq!(session.one::<String>(&claim).await?, expected, "{arguments}");
        session.batch_execute("DELETE FROM outbox_events").await?;
        session.until("SELECT count(*) = 0 FROM outbox.delivery", LONG).await?;
    }
    // While there is no destination, events are for consumers of the application's own.
    session.batch_execute("SELECT outbox.remove_destination(name) FROM outbox.destinations").await?;
    session.batch_execute("INSERT INTO outbox_events (event_type, event_data) VALUES ('e', '{}')").await?;
    assert_eq!(
        session.one::<i64>("SELECT count(*) FROM outbox.claim_for(10, '1 minute', brokers => '{default}')").await?,
        0
    );
    assert_eq!(session.one::<i64>("SELECT count(*) FROM outbox.claim(10)").await?, 1);
    Ok(())
}

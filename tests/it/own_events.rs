//! Events about destinations: for those that name their types, once for each change, and never about themselves.

use anyhow::Result;
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::session::Session;
use outbox_tests::world::World;

use crate::claims::{NONE, claim, insert};

/// What was inserted: type, destination and reason.
const SAID: &str = "SELECT coalesce(string_agg(concat_ws(' ', substr(event_type, 8), event_data ->> 'destination', event_data ->> 'reason'),
                                               ', ' ORDER BY id), '')
                      FROM outbox_events WHERE event_type LIKE 'outbox.%'";

/// Claims one event for a destination and reports this outcome.
async fn end(session: &Session, destination: &str, outcome: &str) -> Result<()> {
    let row =
        session.query_one(&format!("SELECT id, claim_token FROM outbox.claim(1, '{{{destination}}}')"), &[]).await?;
    let (id, token): (i64, i64) = (row.get(0), row.get(1));
    let settle = format!(
        "SELECT settled FROM outbox.settle('{{}}', '{{}}', jsonb_build_array(jsonb_build_object(
             'token', {token}, 'id', {id}, 'destination', '{destination}', 'outcome', '{outcome}', 'error', '{outcome}', 'retry_in', 0)))"
    );
    assert_eq!(session.one::<i64>(&settle).await?, 1, "{outcome}");
    Ok(())
}

#[tokio::test]
async fn each_change_of_a_destination_is_said_once() -> Result<()> {
    let world = World::new().await?;
    world.execute("SELECT outbox.add_rabbitmq('A', tenant_id => 'acme', event_types => '{test.*}')").await?;
    world.execute("SELECT outbox.add_rabbitmq('all', event_types => '{*,*x}')").await?;
    let event = "INSERT INTO outbox_events (event_type, event_data, tenant_id, aggregate_type, aggregate_id) VALUES ('test.x', '{}', 'acme', 't', '1')";
    world.execute(event).await?;
    end(&world.session, "A", "unavailable").await?;
    end(&world.session, "A", "delivered").await?;
    assert_eq!(world.session.one::<String>(SAID).await?, "", "nobody names such a type");

    world
        .execute(
            "SELECT outbox.add_rabbitmq('named', event_types => '{outbox.destination.*,*.dead}'),
                    outbox.add_rabbitmq('tenant', event_types => '{outbox.*}', tenant_id => 'acme'),
                    outbox.add_rabbitmq('stranger', event_types => '{outbox.*}', tenant_id => 'other')",
        )
        .await?;
    world.execute(event).await?;
    for (outcome, said) in [
        ("unavailable", "destination.opened A unavailable"),
        ("unavailable", ""),
        ("failed", "destination.closed A"),
        ("throttled", "destination.opened A throttled"),
        ("released", ""),
        ("delivered", "destination.closed A"),
    ] {
        let before: String = world.session.one(SAID).await?;
        world
            .execute(
                "UPDATE outbox.delivery SET next_attempt_at = now() WHERE destination = 'A' AND status = 'pending'",
            )
            .await?;
        end(&world.session, "A", outcome).await?;
        let after: String = world.session.one(SAID).await?;
        assert_eq!(after.trim_start_matches(&before).trim_start_matches(", "), said, "{outcome}: {after}");
    }
    world.execute("DELETE FROM outbox_events WHERE event_type LIKE 'outbox.%'").await?;
    world.execute(event).await?;
    end(&world.session, "A", "unavailable").await?;
    world.execute("SELECT outbox.resume('A')").await?;
    end(&world.session, "A", "gone").await?;
    let said = "destination.opened A unavailable, destination.closed A, event.dead A gone, destination.disabled A gone";
    assert_eq!(world.session.one::<String>(SAID).await?, said);
    let data = "SELECT concat_ws(' ', tenant_id, aggregate_id, event_data ->> 'event_type', event_data ->> 'aggregate_id', event_data ->> 'attempts',
                    event_data -> 'event_id' = (SELECT to_jsonb(event_id) FROM outbox_events WHERE event_type = 'test.x' ORDER BY id DESC LIMIT 1))
                  FROM outbox_events WHERE event_type = 'outbox.event.dead'";
    assert_eq!(world.session.one::<String>(data).await?, "acme test.x 1 1 t");
    let ids: Vec<i64> = world
        .session
        .one("SELECT array_agg(id ORDER BY id) FROM outbox_events WHERE event_type LIKE 'outbox.%'")
        .await?;
    assert_eq!(claim(&world.session, "100, '{all,stranger}'").await?.0.iter().filter(|id| ids.contains(id)).count(), 0);
    assert_eq!(claim(&world.session, "100, '{tenant}'").await?.0, ids);
    assert_eq!(claim(&world.session, "100, '{named}'").await?.0, ids);
    Ok(())
}

#[tokio::test]
async fn nothing_is_said_of_deliveries_of_what_was_said() -> Result<()> {
    let world = World::new().await?;
    world
        .execute(
            "SELECT outbox.add_rabbitmq('A', event_types => '{test.*}'), outbox.add_rabbitmq('M', event_types => '{outbox.*}'),
                    outbox.add_rabbitmq('N', event_types => '{outbox.*}')",
        )
        .await?;
    insert(&world.session, &[""]).await?;
    end(&world.session, "A", "rejected").await?;
    let said: String = world.session.one(SAID).await?;
    assert_eq!(said, "event.dead A rejected");
    for outcome in ["unavailable", "unavailable", "failed"] {
        for monitor in ["M", "N"] {
            world.execute("UPDATE outbox.delivery SET next_attempt_at = now() WHERE status = 'pending'").await?;
            end(&world.session, monitor, outcome).await?;
        }
    }
    world.execute("UPDATE outbox.delivery SET next_attempt_at = now() WHERE status = 'pending'").await?;
    end(&world.session, "M", "rejected").await?;
    end(&world.session, "N", "gone").await?;
    world.execute("SELECT outbox.resume('N'), outbox.send_test('M')").await?;
    end(&world.session, "M", "rejected").await?;
    assert_eq!(world.session.one::<String>(SAID).await?, format!("{said}, test M"));
    assert_eq!(claim(&world.session, "10").await?.0, NONE);
    Ok(())
}

#[tokio::test]
async fn a_trigger_that_refuses_such_an_event_fails_no_settlement() -> Result<()> {
    let world = World::new().await?;
    world
        .execute(
            "SELECT outbox.add_rabbitmq('A', event_types => '{test.*}'), outbox.add_rabbitmq('M', event_types => '{outbox.*}');
             CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'not such a type'; END $$;
             CREATE TRIGGER refuse BEFORE INSERT ON outbox_events FOR EACH ROW WHEN (NEW.event_type LIKE 'outbox.%') EXECUTE FUNCTION refuse();",
        )
        .await?;
    insert(&world.session, &[""]).await?;
    end(&world.session, "A", "unavailable").await?;
    end(&world.session, "A", "rejected").await?;
    assert_eq!(world.session.one::<String>("SELECT status FROM outbox_events").await?, "failed");
    Ok(())
}

#[tokio::test]
async fn a_relay_delivers_them_to_the_one_that_names_them() -> Result<()> {
    let world = World::new().await?;
    let (down, alarm) = (Receiver::start()?, Receiver::start()?);
    down.reply(Reply::With(503, Vec::new(), Vec::new()));
    world.add_webhook("down", &down.url("down"), "{}").await?;
    world
        .session
        .execute("SELECT outbox.add_webhook('alarm', $1, '{outbox.destination.*}')", &[&alarm.url("alarm")])
        .await?;
    let _relay = world.relay().await?;
    world.publish("1").await?;
    let opened = alarm.wait_for(1, outbox_tests::wait::LONG).await?.remove(0).json()?;
    assert_eq!(
        (&opened["type"], &opened["data"]["destination"]),
        (&"outbox.destination.opened".into(), &"down".into())
    );
    assert!(opened["data"]["reason"].as_str().is_some_and(|reason| reason.contains("503")), "{opened}");
    down.reply(Reply::Accept);
    let closed = alarm.wait_for(2, outbox_tests::wait::LONG).await?.remove(1).json()?;
    assert_eq!(
        (&closed["type"], &closed["data"]["destination"]),
        (&"outbox.destination.closed".into(), &"down".into())
    );
    world.processed().await?;
    assert_eq!((alarm.count(), down.received().iter().filter(|one| one.path != "/down").count()), (2, 0));
    Ok(())
}

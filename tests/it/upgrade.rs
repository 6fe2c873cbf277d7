//! From each released version to this one: a server whose files were replaced goes on with the old SQL, and `ALTER EXTENSION
//! pg_outbox UPDATE` makes of it what a new installation is, while events come and go. No event is lost, sent twice or
//! overtaken.
//!
//! `scripts/rehearse-upgrade.sh` runs the same with the old version's own relay, whose path is in `OUTBOX_OLD_RELAY`, and
//! begins with its library.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use outbox_tests::cluster::Cluster;
use outbox_tests::receiver::{Received, Receiver};
use outbox_tests::relay::{self, Relay};
use outbox_tests::session::Session;
use outbox_tests::wait::{self, LONG};
use uuid::Uuid;

const UPDATE: &str = "ALTER EXTENSION pg_outbox UPDATE";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Versions of which the install script is kept, the oldest first.
fn released() -> Result<Vec<String>> {
    let mut versions = Vec::new();
    for entry in std::fs::read_dir(repository().join("sql/released"))? {
        let name = entry?.file_name().into_string().ok().context("a file's name")?;
        let version = name.strip_prefix("pg_outbox--").and_then(|name| name.strip_suffix(".sql"));
        versions.push(version.with_context(|| name.clone())?.to_owned());
    }
    ensure!(!versions.is_empty(), "no released version");
    versions.sort();
    Ok(versions)
}

/// A database with an old version of the extension, whose worker runs.
async fn old_database(cluster: &Cluster, version: &str) -> Result<(String, Session)> {
    let database = cluster.empty_database().await?;
    let session = cluster.connect(&database).await?;
    session.batch_execute(&format!("CREATE EXTENSION pg_outbox VERSION '{version}'")).await?;
    session.until("SELECT worker_pid IS NOT NULL FROM outbox.stats()", LONG).await?;
    Ok((database, session))
}

async fn catalog(session: &Session) -> Result<BTreeSet<String>> {
    let rows = session.query(include_str!("catalog.sql"), &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

#[tokio::test]
async fn an_updated_extension_is_what_a_new_one_is() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let new = catalog(&cluster.connect(&cluster.database().await?).await?).await?;
    ensure!(new.len() > 2000, "only {} lines", new.len());
    for version in released()? {
        let (_, session) = old_database(cluster, &version).await?;
        session.batch_execute(UPDATE).await?;
        let updated = catalog(&session).await?;
        let missing: Vec<_> = new.difference(&updated).take(20).collect();
        let left: Vec<_> = updated.difference(&new).take(20).collect();
        ensure!(
            missing.is_empty() && left.is_empty(),
            "from {version}: sql/upgrades/ does not lead to a new installation.\nnew: {missing:#?}\nupdated: {left:#?}"
        );
    }
    Ok(())
}

/// Who was granted a part before has all that the part takes now, and pg_dump sees it.
#[tokio::test]
async fn those_who_were_granted_a_part_are_granted_what_is_new() -> Result<()> {
    let cluster = Cluster::shared().await?;
    for version in released()? {
        let (database, session) = old_database(cluster, &version).await?;
        let role = format!("role_{database}");
        session
            .batch_execute(&format!(
                "CREATE ROLE {role};
                 SELECT outbox.grant_relay('{role}'), outbox.grant_operator('{role}');
                 REVOKE EXECUTE ON FUNCTION outbox.attach, outbox.replay, outbox.stats FROM {role};
                 {UPDATE}"
            ))
            .await?;
        for function in ["attach(text)", "replay(uuid, text)", "stats()"] {
            let granted = format!("SELECT has_function_privilege('{role}', 'outbox.{function}', 'EXECUTE')");
            ensure!(session.one::<bool>(&granted).await?, "{function}");
        }
        let publish = "SELECT outbox.publish('a', '{}')";
        session.batch_execute(&format!("SET ROLE {role}")).await?;
        assert!(session.batch_execute(publish).await.is_err(), "nobody granted that");
        let mut dump = cluster.client("pg_dump")?;
        dump.args(["--schema-only", &cluster.url(&database)]);
        let dump = String::from_utf8(outbox_tests::process::run(dump)?.stdout)?;
        ensure!(dump.contains(&format!("GRANT ALL ON FUNCTION outbox.attach(consumer text) TO {role};")), "{dump}");
        session.batch_execute(&format!("RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")).await?;
    }
    Ok(())
}

/// An upgrade that can't have its locks gives up, and delivery goes on.
#[tokio::test]
async fn an_update_waits_for_no_transaction_for_long() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let version = released()?.pop().context("no version")?;
    let (database, session) = old_database(cluster, &version).await?;
    let reader = cluster.connect(&database).await?;
    reader.batch_execute("BEGIN; SELECT FROM outbox.deliveries").await?;
    let error = session.batch_execute(UPDATE).await.expect_err("the view is locked");
    assert_eq!(error.code().map(|code| code.code()), Some("55P03"), "{error}");
    reader.batch_execute("COMMIT; BEGIN; SELECT outbox.publish('a', '{}')").await?;
    let error = session.batch_execute(UPDATE).await.expect_err("the table of the events is locked");
    assert_eq!(error.code().map(|code| code.code()), Some("55P03"), "{error}");
    reader.batch_execute("COMMIT").await?;
    session.batch_execute(UPDATE).await?;
    session.until("SELECT count(*) = 1 FROM outbox.claim()", LONG).await
}

/// Everything that tells what is owed to whom.
const OWED: &str = "SELECT jsonb_build_object(
    'events', (SELECT jsonb_agg(to_jsonb(e) ORDER BY id) FROM outbox_events e),
    'deliveries', (SELECT jsonb_agg(to_jsonb(d) ORDER BY id, destination) FROM outbox.delivery d),
    'destinations', (SELECT jsonb_agg(to_jsonb(d) ORDER BY name) FROM outbox.destination d),
    'secrets', (SELECT jsonb_agg(to_jsonb(s) ORDER BY destination, secret) FROM outbox.secret s),
    'claims', (SELECT jsonb_agg(to_jsonb(c) ORDER BY token) FROM outbox.claims c),
    'adopted', (SELECT jsonb_agg(to_jsonb(a) ORDER BY event) FROM outbox.adopted_event a))::text";

/// Events in each state. `hook` and `parked` are webhooks at the receiver; a consumer of SQL serves the others.
async fn fill(session: &Session, receiver: &Receiver) -> Result<()> {
    session
        .batch_execute(&format!(
            r#"CREATE TABLE orders_outbox (id bigserial PRIMARY KEY, event_type text NOT NULL, payload jsonb NOT NULL,
                                           status text NOT NULL DEFAULT 'pending', created_at timestamptz DEFAULT now());
            SELECT outbox.add_webhook('parked', '{parked}', '{{parked.*}}');
            SELECT outbox.add_webhook('hook', '{hook}', '{{hook.*,later.*}}');
            SELECT outbox.rotate_secret('hook');
            SELECT outbox.pause('parked');
            SELECT outbox.add_rabbitmq('held', event_types => '{{held.*}}');
            SELECT outbox.add_rabbitmq('retrying', event_types => '{{retrying.*}}');
            SELECT outbox.add_rabbitmq('blocking', event_types => '{{blocking.*}}', settings => '{{"on_failure": "block"}}');
            INSERT INTO orders_outbox (event_type, payload) SELECT 'parked.adopted', '{{}}' FROM generate_series(1, 3);
            SELECT outbox.adopt('public.orders_outbox', '{{"event_data": "payload"}}');
            INSERT INTO outbox_events (event_type, aggregate_type, aggregate_id, event_data)
                 SELECT t || '.n', t, 'one', jsonb_build_object('n', n)
                   FROM unnest('{{hook,parked,held,retrying,blocking,nobody}}'::text[]) t, generate_series(1, 3) n;
            SELECT outbox.publish('later.n', '{{}}', available_at => now() + interval '1 hour');"#,
            parked = receiver.url("parked"),
            hook = receiver.url("hook"),
        ))
        .await?;
    // What each consumer makes of its events: `held` keeps them.
    session
        .batch_execute(
            "SELECT outbox.fail(claim_token, id, 'not now', '1 hour', 'retrying') FROM outbox.claim(1, '{retrying}');
             SELECT outbox.reject(claim_token, id, 'never', 'blocking') FROM outbox.claim(1, '{blocking}');",
        )
        .await?;
    Ok(())
}

#[tokio::test]
async fn what_was_owed_before_an_update_is_owed_after_it() -> Result<()> {
    let cluster = Cluster::shared().await?;
    for version in released()? {
        let (database, session) = old_database(cluster, &version).await?;
        let receiver = Receiver::start()?;
        fill(&session, &receiver).await?;
        let holder = cluster.connect(&database).await?;
        holder.batch_execute("SELECT outbox.attach('holder')").await?;
        let token: i64 = holder.one("SELECT max(claim_token) FROM outbox.claim(10, '{held}')").await?;
        let states = "SELECT string_agg(DISTINCT status, ' ' ORDER BY status) FROM outbox_events";
        assert_eq!(session.one::<String>(states).await?, "failed pending processed processing");
        let before: String = session.one(OWED).await?;
        session.batch_execute(UPDATE).await?;
        assert_eq!(session.one::<String>(OWED).await?, before);

        // Each goes on from where it was.
        assert_eq!(holder.one::<i64>(&format!("SELECT outbox.ack({token})")).await?, 3);
        session
            .until("SELECT count(*) = 3 FROM outbox_events WHERE event_type = 'held.n' AND status = 'processed'", LONG)
            .await?;
        assert_eq!(session.one::<i64>("SELECT count(*) FROM outbox.claim(10, '{retrying,blocking}')").await?, 0);
        session
            .batch_execute("SELECT outbox.replay(event_id) FROM outbox.deliveries WHERE last_error = 'never'")
            .await?;
        assert_eq!(session.one::<i64>("SELECT count(*) FROM outbox.claim(10, '{blocking}')").await?, 3);
        let _relay = Relay::start(cluster, &database, None).await?;
        let requests = receiver.wait_for(3, LONG).await?;
        let order: Vec<_> =
            requests.iter().map(|request| Ok(request.json()?["data"]["n"].clone())).collect::<Result<_>>()?;
        assert_eq!(order, [1, 2, 3]);
        let signatures = requests[0].header("webhook-signature").context("no signature")?;
        assert_eq!(signatures.split(' ').count(), 2, "{signatures}");
        session.batch_execute("SELECT outbox.resume('parked'); INSERT INTO orders_outbox (event_type, payload) VALUES ('parked.adopted', '{}')").await?;
        let requests = receiver.wait_for(3 + 3 + 4, LONG).await?;
        assert_eq!(requests.iter().filter(|request| request.path == "/parked").count(), 7);
        session.until("SELECT bool_and(status = 'processed') FROM orders_outbox", LONG).await?;
        assert_eq!(session.one::<i64>("SELECT outbox.release_adopted('public.orders_outbox')").await?, 4);
        session.until("SELECT count(*) = 1 FROM outbox.deliveries WHERE status = 'scheduled'", LONG).await?;
        assert_eq!(receiver.count(), 10, "nothing was sent twice");
    }
    Ok(())
}

/// A consumer from before: it has prepared its statements, is attached, and goes on over the update.
struct Consumer {
    got: Arc<Mutex<Vec<(Uuid, String, i64)>>>,
    task: tokio::task::JoinHandle<Result<()>>,
}

impl Consumer {
    async fn start(mut session: Session) -> Result<Self> {
        session.batch_execute("LISTEN outbox_events; SELECT outbox.attach('from before')").await?;
        let claim = session
            .prepare("SELECT event_id, aggregate_id, id, claim_token FROM outbox.claim(7, '{old}') ORDER BY id")
            .await?;
        let ack = session.prepare("SELECT outbox.ack($1)").await?;
        let got = Arc::<Mutex<Vec<_>>>::default();
        let into = got.clone();
        let task = tokio::spawn(async move {
            loop {
                let rows = session.query(&claim, &[]).await?;
                for row in &rows {
                    let event = (row.get(0), row.get(1), row.get(2));
                    into.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(event);
                }
                match rows.first() {
                    Some(row) => drop(session.query_one(&ack, &[&row.get::<_, i64>(3)]).await?),
                    None => drop(session.notification(LONG).await?),
                }
            }
        });
        Ok(Consumer { got, task })
    }

    fn got(&self) -> Vec<(Uuid, String, i64)> {
        self.got.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

/// Each once, and those of one aggregate in the order of their ids.
fn once_and_in_order(what: &str, events: &[(Uuid, String, i64)]) -> Result<()> {
    let (mut seen, mut latest) = (HashSet::new(), HashMap::new());
    for (event, aggregate, id) in events {
        ensure!(seen.insert(event), "{what} got event {id} twice");
        let before = latest.insert(aggregate, *id);
        ensure!(before.is_none_or(|before| before < *id), "{what}, aggregate {aggregate}: {id} after {before:?}");
    }
    Ok(())
}

fn known(requests: &[Received], ids: &HashMap<Uuid, (String, i64)>) -> Result<Vec<(Uuid, String, i64)>> {
    let event = |request: &Received| {
        let event = request.event_id()?;
        let (aggregate, id) = ids.get(&event).context("an event that nobody published")?;
        Ok((event, aggregate.clone(), *id))
    };
    requests.iter().map(event).collect()
}

#[tokio::test]
async fn an_update_under_load_loses_repeats_and_reorders_nothing() -> Result<()> {
    let cluster = Cluster::shared().await?;
    for version in released()? {
        let (database, session) = old_database(cluster, &version).await?;
        let receiver = Receiver::start()?;
        session.execute("SELECT outbox.add_webhook('hook', $1)", &[&receiver.url("/")]).await?;
        session.batch_execute("SELECT outbox.add_rabbitmq('old')").await?;
        let consumer = Consumer::start(cluster.connect(&database).await?).await?;
        let old_relay = match std::env::var("OUTBOX_OLD_RELAY") {
            Ok(binary) => Some(Relay::of(Path::new(&binary), &cluster.url(&database)).await?),
            Err(_) => None,
        };
        let producing = Arc::new(AtomicBool::new(true));
        let producer = cluster.connect(&database).await?;
        let going_on = producing.clone();
        let producer = tokio::spawn(async move {
            let insert = producer.prepare("SELECT outbox.publish('order.placed', '{}', 'order', $1)").await?;
            let mut n = 0_i64;
            while going_on.load(Ordering::Relaxed) {
                producer.execute(&insert, &[&(n % 7).to_string()]).await?;
                n += 1;
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            Ok::<_, anyhow::Error>(n)
        });

        // The new library serves the old SQL, and says what is left to do.
        wait::until("events before the update", LONG, async || Ok((consumer.got().len() > 100).then_some(()))).await?;
        let health = "SELECT hint FROM outbox.health() WHERE check_name = 'versions' AND NOT ok";
        let hint: String = session.one(health).await?;
        ensure!(hint.contains("ALTER EXTENSION pg_outbox UPDATE"), "{hint}");
        if let Some(relay) = &old_relay {
            wait::until("the old relay to deliver", LONG, async || Ok((receiver.count() > 100).then_some(()))).await?;
            relay.ready().await?;
        }
        session.batch_execute(UPDATE).await?;
        let (then, sent) = (consumer.got().len(), receiver.count());
        wait::until("events after the update", LONG, async || Ok((consumer.got().len() > then + 100).then_some(())))
            .await?;
        if let Some(relay) = &old_relay {
            wait::until("the old relay to go on", LONG, async || Ok((receiver.count() > sent + 100).then_some(())))
                .await?;
            ensure!(relay.terminate(LONG).await?.success(), "{}", relay.log());
        }
        let _relay = Relay::start(cluster, &database, None).await?;
        producing.store(false, Ordering::Relaxed);
        let count = usize::try_from(producer.await??)?;

        session.until("SELECT bool_and(status = 'processed') FROM outbox_events", LONG).await?;
        let rows = session.query("SELECT event_id, aggregate_id, id FROM outbox_events", &[]).await?;
        let ids = rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect();
        let (got, sent) = (consumer.got(), known(&receiver.received(), &ids)?);
        assert_eq!((got.len(), sent.len()), (count, count));
        once_and_in_order("the consumer", &got)?;
        once_and_in_order("the webhook", &sent)?;
        ensure!(!consumer.task.is_finished(), "the consumer ended");
        consumer.task.abort();
        session.until("SELECT ok FROM outbox.health() WHERE check_name = 'versions'", LONG).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_relay_refuses_an_extension_that_was_not_updated() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let version = released()?.pop().context("no version")?;
    let (database, _session) = old_database(cluster, &version).await?;
    let mut command: Command = relay::command(None)?;
    command.arg("run").env("DATABASE_URL", cluster.url(&database)).env("HTTP_LISTEN", "127.0.0.1:0");
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    assert_eq!(output.status.code(), Some(64));
    let text = String::from_utf8(output.stderr)?;
    ensure!(text.contains(&format!("pg_outbox {version} does not go with relay")), "{text}");
    ensure!(text.contains("ALTER EXTENSION pg_outbox UPDATE"), "{text}");
    Ok(())
}

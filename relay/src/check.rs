//! `outbox-relay check`: tries what `run` would need, one line each. It leaves no trace but in logs.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::io::Write;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;
use tokio_postgres::{Client, Notification};

use crate::config::{BROKER, Config};
use crate::destination::{Destination, Environment, Spec};
use crate::directory::Which;
use crate::dispatch::answer_limit;
use crate::error::{Error, Result};
use crate::postgres::{Connector, Pair};
use crate::store;

/// Of those that there are: the version is checked before.
const MISSING_FUNCTIONS: &str = "SELECT coalesce(string_agg(f::text, ', '), '') \
     FROM unnest('{attach(text), \"claim_for(int,interval,text[],text[],text[],text[])\", \
     \"claim_refs_for(int,interval,text[],text[],text[],text[])\", \"claimed(bigint,bigint)\", claimed_attempts(bigint), \"settle(bigint[],bigint[],jsonb)\", \
     \"renew(bigint[],interval)\", release(bigint), relay_destinations(text[]), webhook_allow_networks(), destination_back(text[]), \"destination_unable(text[],text)\", \
     stats(), \"metrics(text[],int)\"}'::text[]) AS f \
     WHERE NOT has_function_privilege(to_regprocedure('outbox.' || f)::oid, 'EXECUTE')";

/// Prints what was found and says whether all is well.
pub async fn check(config: &Config, connector: &Connector, environment: &Environment) -> bool {
    let mut report = Report { ok: true };
    let (notified, mut notifications) = unbounded_channel();
    let limit = answer_limit(&config.tuning);
    let pair = timeout(limit, Pair::open(connector, Some(notified), limit));
    let pair = pair.await.unwrap_or_else(|_| Err(Error::Server(format!("no sessions within {} s", limit.as_secs()))));
    if let Some(pair) = report.line("postgresql", pair, |_| format!("two sessions with {}", connector.target())) {
        let database = timeout(limit, check_database(&mut report, &pair, &mut notifications)).await;
        let late = || Error::Server(format!("no answer within {} s", limit.as_secs()));
        match database {
            Ok(Some(())) => check_destinations(&mut report, config, &pair.settles.client, environment).await,
            Ok(None) => {}
            Err(_) => drop(report.line("postgresql", Err::<(), _>(late()), |()| String::new())),
        }
    }
    for (name, checked) in environment.check_brokers().await {
        let what = if *name == *BROKER { "rabbitmq".into() } else { format!("rabbitmq {name}") };
        report.line(&what, checked, |()| "connected".into());
    }
    if config.amqp.is_empty() {
        print("ok    rabbitmq: AMQP_URL is not set, RabbitMQ destinations are left to others");
    }
    report.ok
}

async fn check_database(
    report: &mut Report,
    pair: &Pair,
    notifications: &mut UnboundedReceiver<Notification>,
) -> Option<()> {
    let client = &pair.claims.client;
    report.line("server", writable(client).await, |version| format!("PostgreSQL {version}"))?;
    let version = store::fitting_version(client).await;
    report.line("extension", version, |version| format!("pg_outbox {version}"))?;
    report.line("privileges", privileges(client).await, |()| "all that a relay needs".into())?;
    let heard = listens(pair, notifications).await;
    report.line("notifications", heard, |()| "arrive, and a session can be attached".into())
}

/// A role or a server that is read-only by default is no hindrance; one that can't write is.
async fn writable(client: &Client) -> Result<String> {
    let query = "SELECT current_setting('server_version'), pg_is_in_recovery(), \
                 current_setting('transaction_read_only')::bool";
    let row = client.query_one(query, &[]).await?;
    if row.try_get(1)? {
        return Err(Error::Server("this is a standby; use target_session_attrs=read-write".into()));
    }
    match row.try_get(2)? {
        true => Err(Error::Server("it is read-only".into())),
        false => Ok(row.try_get(0)?),
    }
}

async fn privileges(client: &Client) -> Result<()> {
    let user: String = client.query_one("SELECT current_user::text", &[]).await?.try_get(0)?;
    let usage: bool = client.query_one("SELECT has_schema_privilege('outbox', 'USAGE')", &[]).await?.try_get(0)?;
    let missing = match usage {
        true => client.query_one(MISSING_FUNCTIONS, &[]).await?.try_get(0)?,
        false => "the schema outbox".to_owned(),
    };
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::Server(format!("{user} may not use {missing}; run SELECT outbox.grant_relay('{user}')")))
}

async fn listens(pair: &Pair, notifications: &mut UnboundedReceiver<Notification>) -> Result<()> {
    store::hears(&pair.claims.client, &pair.settles.client, notifications).await?;
    pair.claims.client.execute("SELECT outbox.attach('outbox-relay check')", &[]).await?;
    Ok(())
}

async fn check_destinations(report: &mut Report, config: &Config, client: &Client, environment: &Environment) {
    let specs = async {
        environment.allow_networks_of_database(&store::webhook_allow_networks(client).await?);
        store::destinations(client, &Which::All).await
    };
    let served = |specs: &[Spec]| specs.iter().filter(|spec| environment.serves(spec)).count();
    let Some(specs) = report.line("destinations", specs.await, |specs| match (specs.len(), config.amqp.is_empty()) {
        (0, false) => "none; events stay pending: SELECT outbox.add_rabbitmq('orders')".into(),
        (0, true) => "none; events stay pending: SELECT outbox.add_webhook('crm', 'https://…')".into(),
        (n, _) if n == served(specs) => format!("{n}"),
        (n, _) => format!("{n}, of which this relay serves {}", served(specs)),
    }) else {
        return;
    };
    let unknown: BTreeSet<&str> = specs.iter().filter_map(|spec| environment.unknown_broker(spec)).collect();
    for broker in unknown.iter().filter(|_| !config.amqp.is_empty()) {
        print(&format!("ok    rabbitmq {broker}: AMQP_URL has no such broker, its destinations are left to others"));
    }
    for spec in specs.iter().filter(|spec| environment.serves(spec)) {
        let name = format!("destination {}", spec.name);
        let tried = AssertUnwindSafe(try_destination(spec, environment)).catch_unwind().await;
        let tried = tried.unwrap_or_else(|_| Err("the relay failed, see the line before".into()));
        report.line(&name, tried, |()| spec.kind.clone());
    }
}

async fn try_destination(spec: &Spec, environment: &Environment) -> std::result::Result<(), String> {
    match Destination::build(spec, environment) {
        Ok(destination) => destination.check().await,
        Err(error) => Err(error.to_string()),
    }
}

/// Nobody may be there to read it.
fn print(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

struct Report {
    ok: bool,
}

impl Report {
    /// One line; the value when all is well.
    fn line<T, E: Display>(
        &mut self,
        what: &str,
        result: std::result::Result<T, E>,
        detail: impl FnOnce(&T) -> String,
    ) -> Option<T> {
        match result {
            Ok(value) => {
                print(&format!("ok    {what}: {}", detail(&value)));
                Some(value)
            }
            Err(error) => {
                print(&format!("FAIL  {what}: {}", error.to_string().replace('\n', " ")));
                self.ok = false;
                None
            }
        }
    }
}

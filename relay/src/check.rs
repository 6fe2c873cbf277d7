//! `outbox-relay check`: tries what `run` would need, one line each.

use std::fmt::Display;

use tokio_postgres::Client;

use crate::config::Config;
use crate::destination::{Destination, Environment};
use crate::error::{Error, Result};
use crate::postgres::Connector;
use crate::store;

const RELAY_FUNCTIONS: &str = "SELECT coalesce(string_agg(f::text, ', '), '') \
     FROM unnest('{attach(text), \"claim(int,text[],interval)\", \"settle(bigint[],bigint[],jsonb)\", \
     \"renew(bigint[],interval)\", release(bigint), relay_destinations(), claimed_attempts(bigint), \"claim_refs(integer,text[],interval)\", \"claimed(bigint,bigint)\", webhook_allow_networks(), destination_back(text[]), \"destination_unable(text[],text)\", stats()}'::text[]) \
     AS f WHERE NOT has_function_privilege('outbox.' || f, 'EXECUTE')";

/// Prints what was found and says whether all is well.
pub async fn check(config: &Config, connector: &Connector, environment: &Environment) -> bool {
    let mut report = Report { ok: true };
    let target = connector.target();
    let session = connector.connect(None).await;
    if let Some(session) = report.line("postgresql", session, |_| target) {
        let database = check_database(&mut report, &session.client).await;
        if database.is_some() {
            check_destinations(&mut report, config, &session.client, environment).await;
        }
    }
    if config.amqp.is_some() {
        report.line("rabbitmq", environment.check_broker().await, |_| "connected".into());
    } else {
        println!("ok    rabbitmq: AMQP_URL is not set, RabbitMQ destinations are left to others");
    }
    report.ok
}

async fn check_database(report: &mut Report, client: &Client) -> Option<()> {
    report.line("server", writable(client).await, |version| format!("PostgreSQL {version}"))?;
    report.line("extension", extension(client).await, |version| format!("pg_outbox {version}"))?;
    report.line("privileges", privileges(client).await, |()| "all that a relay needs".into())
}

async fn writable(client: &Client) -> Result<String> {
    let row = client.query_one("SELECT current_setting('server_version'), pg_is_in_recovery()", &[]).await?;
    if row.try_get(1)? {
        return Err(Error::Server("this is a standby; use target_session_attrs=read-write".into()));
    }
    Ok(row.try_get(0)?)
}

async fn extension(client: &Client) -> Result<String> {
    let row = client
        .query_opt("SELECT extversion FROM pg_extension WHERE extname = 'pg_outbox'", &[])
        .await?
        .ok_or_else(|| Error::Server("not in this database; run CREATE EXTENSION pg_outbox".into()))?;
    let version: String = row.try_get(0)?;
    let ours = env!("CARGO_PKG_VERSION");
    let minor = |v: &str| v.rsplit_once('.').map(|(minor, _)| minor.to_owned());
    if minor(&version) != minor(ours) {
        return Err(Error::Server(format!(
            "version {version} does not go with relay {ours}; run ALTER EXTENSION pg_outbox UPDATE, or update the relay"
        )));
    }
    Ok(version)
}

async fn privileges(client: &Client) -> Result<()> {
    let user: String = client.query_one("SELECT current_user::text", &[]).await?.try_get(0)?;
    let usage: bool = client.query_one("SELECT has_schema_privilege('outbox', 'USAGE')", &[]).await?.try_get(0)?;
    let missing = match usage {
        true => client.query_one(RELAY_FUNCTIONS, &[]).await?.try_get(0)?,
        false => "the schema outbox".to_owned(),
    };
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::Server(format!("{user} may not use {missing}; run SELECT outbox.grant_relay('{user}')")))
}

async fn check_destinations(report: &mut Report, config: &Config, client: &Client, environment: &Environment) {
    let specs = async {
        environment.allow_networks_of_database(&store::webhook_allow_networks(client).await?);
        store::destinations(client).await
    };
    let Some(specs) = report.line("destinations", specs.await, |specs| match (specs.len(), &config.amqp) {
        (0, Some(_)) => "none; events stay pending: SELECT outbox.add_rabbitmq('orders')".into(),
        (0, None) => "none; events stay pending: SELECT outbox.add_webhook('crm', 'https://…')".into(),
        (n, _) => format!("{n}"),
    }) else {
        return;
    };
    for spec in specs.iter().filter(|spec| environment.serves(&spec.kind)) {
        let name = format!("destination {}", spec.name);
        let tried = match Destination::build(spec, environment) {
            Ok(destination) => destination.check().await,
            Err(error) => Err(error.to_string()),
        };
        report.line(&name, tried, |()| spec.kind.clone());
    }
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
                println!("ok    {what}: {}", detail(&value));
                Some(value)
            }
            Err(error) => {
                println!("FAIL  {what}: {}", error.to_string().replace('\n', " "));
                self.ok = false;
                None
            }
        }
    }
}

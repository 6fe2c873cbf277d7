//! How the relay reaches PostgreSQL: TLS as libpq names it, several hosts, standbys that become primaries.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use outbox_tests::broker::Broker;
use outbox_tests::cluster::{Cluster, Stop};
use outbox_tests::postgres::Installation;
use outbox_tests::process::Account;
use outbox_tests::relay::{self, Relay};
use outbox_tests::tls::{Authority, Identity};
use outbox_tests::wait::LONG;

/// What `check` says of a connection to PostgreSQL.
fn check(url: &str) -> Result<(bool, String)> {
    let output = relay::command(None)?.arg("check").env("DATABASE_URL", url).output()?;
    Ok((
        output.status.success(),
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr),
    ))
}

#[tokio::test]
async fn tls_does_what_sslmode_says() -> Result<()> {
    if !Installation::get()?.tls {
        return without_tls().await;
    }
    let (authority, other) = (Authority::new()?, Authority::new()?);
    let Identity { certificate, key } = authority.issue_for("server", "IP:127.0.0.1")?;
    let (cert, key) = (certificate.display().to_string(), key.display().to_string());
    let cluster = Cluster::with(&[("ssl", "on"), ("ssl_cert_file", &cert), ("ssl_key_file", &key)]).await?;
    let database = cluster.database().await?;
    let hba = "hostssl all all 127.0.0.1/32 scram-sha-256\nlocal all all scram-sha-256\n";
    fs::write(cluster.dir().join("data/pg_hba.conf"), hba)?;
    reload(&cluster).await?;
    let url = cluster.url(&database);
    let secured = |options: &str| check(&format!("{url}?{options}"));
    let (ca, wrong_ca) = (authority.certificate().display().to_string(), other.certificate().display().to_string());
    for (options, works) in [
        ("sslmode=disable".to_owned(), false),
        ("sslmode=prefer".to_owned(), true),
        ("sslmode=require".to_owned(), true),
        (format!("sslmode=verify-ca&sslrootcert={ca}"), true),
        (format!("sslmode=verify-full&sslrootcert={ca}"), true),
        (format!("sslmode=verify-ca&sslrootcert={wrong_ca}"), false),
        (format!("sslmode=require&sslrootcert={wrong_ca}"), false),
        ("sslmode=verify-full&sslrootcert=/nowhere/ca.crt".to_owned(), false),
    ] {
        let (worked, text) = secured(&options)?;
        assert_eq!(worked, works, "{options}: {text}");
    }
    // The authority is right, the name is not.
    let named = url.replace("127.0.0.1", "localhost");
    let (worked, text) = check(&format!("{named}?sslmode=verify-full&sslrootcert={ca}"))?;
    assert!(!worked, "{text}");
    Ok(())
}

/// The server was built without TLS.
async fn without_tls() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let url = cluster.url(&cluster.database().await?);
    for (mode, works) in [("disable", true), ("prefer", true), ("require", false)] {
        let (worked, text) = check(&format!("{url}?sslmode={mode}"))?;
        assert_eq!(worked, works, "{mode}: {text}");
    }
    Ok(())
}

/// Has the server read its files again.
async fn reload(cluster: &Cluster) -> Result<()> {
    let session = cluster.connect("postgres").await?;
    let loaded: String = session.one("SELECT pg_conf_load_time()::text FROM pg_reload_conf()").await?;
    session.until(&format!("SELECT pg_conf_load_time() > '{loaded}'"), LONG).await
}

async fn into_standby(cluster: &Cluster) -> Result<()> {
    cluster.stop(Stop::Fast).await?;
    let file: &Path = &cluster.dir().join("data/standby.signal");
    fs::write(file, "")?;
    Account::of_servers()?.give(file)?;
    cluster.resume().await
}

#[tokio::test]
async fn a_standby_refuses_claims_and_works_once_promoted() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    cluster.connect(&database).await?.batch_execute("SELECT outbox.publish('before', '{}')").await?;
    into_standby(&cluster).await?;
    let session = cluster.connect(&database).await?;
    for call in ["claim()", "ack(1)", "attach('me')"] {
        let error = session.batch_execute(&format!("SELECT outbox.{call}")).await.err().context(call)?;
        let error = error.as_db_error().context("no database error")?;
        assert_eq!(error.code().code(), "25006", "{call}: {error}");
        assert!(call != "claim()" || error.hint().is_some_and(|hint| hint.contains("primary")), "{error:?}");
    }
    session.batch_execute("SELECT * FROM outbox.stats(); SELECT * FROM outbox.health()").await?;
    session.batch_execute("SELECT pg_promote()").await?;
    session.until("SELECT worker_pid IS NOT NULL AND pending = 1 FROM outbox.stats()", LONG).await?;
    assert_eq!(session.one::<i64>("SELECT count(*) FROM outbox.claim()").await?, 1);
    Ok(())
}

#[tokio::test]
async fn of_several_hosts_the_primary_is_used() -> Result<()> {
    let (first, second) = (Cluster::start().await?, Cluster::start().await?);
    for cluster in [&first, &second] {
        cluster.connect("postgres").await?.batch_execute("CREATE DATABASE same").await?;
        let session = cluster.connect("same").await?;
        session.batch_execute("CREATE EXTENSION pg_outbox; SELECT outbox.add_rabbitmq('rabbitmq')").await?;
    }
    into_standby(&first).await?;
    let broker = Broker::shared().await?;
    broker.channel().await?.bind("outbox_events", "#", "all").await?;
    let (one, two) = (first.url("same"), second.port());
    let both = one.replace("/same", &format!(",127.0.0.1:{two}/same?target_session_attrs=read-write"));
    let _relay = Relay::with(&both, Some(&broker.url()), &[]).await?;
    let processed = "SELECT bool_and(status = 'processed') FROM outbox_events";
    let session = second.connect("same").await?;
    session.batch_execute("SELECT outbox.publish('to.second', '{}')").await?;
    session.until(processed, LONG).await?;

    // Failover: the primary goes, the standby takes over.
    second.stop(Stop::Immediate).await?;
    let session = first.connect("same").await?;
    session.batch_execute("SELECT pg_promote()").await?;
    session.batch_execute("SELECT outbox.publish('to.first', '{}')").await?;
    session.until(processed, LONG).await
}

/// It accepts in the kernel's name and says nothing, as a server that stands still does.
#[tokio::test]
async fn a_host_that_says_nothing_does_not_hide_the_next() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = cluster.database().await?;
    let silent = std::net::TcpListener::bind("127.0.0.1:0")?;
    let url = cluster.url(&database);
    let both = url.replace(
        &format!(":{}/", cluster.port()),
        &format!(":{},127.0.0.1:{}/", silent.local_addr()?.port(), cluster.port()),
    );
    assert_ne!(both, url);
    let _relay = Relay::with(&both, None, &[]).await?;
    Ok(())
}

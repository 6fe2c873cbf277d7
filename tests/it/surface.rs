//! The relay as its host sees it: signals, limits, options, and what its output never shows.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use outbox_tests::broker::Broker;
use outbox_tests::cluster::Cluster;
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::relay::{self, Relay};
use outbox_tests::scratch;
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

const GOOD: &str = "postgres://me:hidden-word@localhost/db";
const SECRET: &str = "postgres://me:hidden-word@localhost/db";

#[tokio::test]
async fn a_hang_up_ends_nothing_and_a_second_signal_ends_at_once() -> Result<()> {
    let World { cluster, database, session } = World::new().await?;
    let receiver = Receiver::start()?;
    receiver.reply(Reply::Never);
    session.execute("SELECT outbox.add_webhook('hook', $1)", &[&receiver.url("/")]).await?;
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let before = receiver.count();
        let relay = Relay::with(&cluster.url(&database), None, &[("OUTBOX_GRACE_PERIOD", "3600")]).await?;
        relay.signal(Signal::SIGHUP);
        relay.logged("SIGHUP", LONG).await?;
        session.batch_execute("SELECT outbox.publish('a', '{}')").await?;
        receiver.wait_for(before + 1, LONG).await?;
        relay.signal(signal);
        relay.logged("shutting down", LONG).await?;
        let status = relay.terminate(LONG).await?;
        ensure!(status.code().is_some_and(|code| code != 0), "{signal}: {status}");
    }
    Ok(())
}

#[tokio::test]
async fn the_limit_of_open_files_is_raised() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = cluster.database().await?;
    let relay = Relay::start(cluster, &database, None).await?;
    let limits = fs::read_to_string(format!("/proc/{}/limits", relay.pid()))?;
    let line = limits.lines().find(|line| line.starts_with("Max open files")).context("no such limit")?;
    let values: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(values[3], values[4], "{line}");
    Ok(())
}

/// What `run` prints, and its exit code.
fn run(arguments: &[&str], variables: &[(&str, &str)]) -> Result<(i32, String)> {
    let mut command = relay::command(None)?;
    let output = command.arg("run").args(arguments).envs(variables.iter().copied()).output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    Ok((output.status.code().context("no exit code")?, text))
}

#[test]
fn a_url_in_the_wrong_option_is_not_shown() -> Result<()> {
    let options = [
        ("--config", "OUTBOX_CONFIG"),
        ("--amqp-ca-cert", "AMQP_CA_CERT"),
        ("--database-url-file", "DATABASE_URL_FILE"),
        ("--amqp-url", "AMQP_URL"),
        ("--amqp-url-file", "AMQP_URL_FILE"),
        ("--http-listen", "HTTP_LISTEN"),
        ("--ui-password-file", "OUTBOX_UI_PASSWORD_FILE"),
        ("--ui-hosts", "OUTBOX_UI_HOSTS"),
        ("--consumer", "OUTBOX_CONSUMER"),
        ("--max-in-flight", "OUTBOX_MAX_IN_FLIGHT"),
        ("--lease", "OUTBOX_LEASE"),
        ("--grace-period", "OUTBOX_GRACE_PERIOD"),
        ("--webhook-allow-networks", "OUTBOX_WEBHOOK_ALLOW_NETWORKS"),
        ("--webhook-proxy", "OUTBOX_WEBHOOK_PROXY"),
        ("--webhook-ca-cert", "OUTBOX_WEBHOOK_CA_CERT"),
        ("--log-format", "OUTBOX_LOG_FORMAT"),
        ("--log-level", "OUTBOX_LOG_LEVEL"),
    ];
    for (flag, variable) in options {
        let url = if flag == "--database-url-file" { ("X", "y") } else { ("DATABASE_URL", GOOD) };
        let amqp = if flag.contains("amqp-ca") { ("AMQP_URL", "amqp://localhost") } else { ("X", "y") };
        for (arguments, variables) in
            [(&[flag, SECRET][..], &[url, amqp][..]), (&[], &[url, amqp, (variable, SECRET)][..])]
        {
            let (code, text) = run(arguments, variables)?;
            assert_eq!(code, 64, "{flag}: {text}");
            ensure!(!text.contains("hidden-word") && text.trim_end().lines().count() == 1, "{flag}: {text}");
        }
    }
    for arguments in [&[SECRET][..], &["--postgres://me:hidden-word@h"], &["--hidden-word"], &["--", "hidden-word"]] {
        let (code, text) = run(arguments, &[("DATABASE_URL", GOOD)])?;
        assert_eq!(code, 64, "{text}");
        ensure!(!text.contains("hidden-word") && text.trim_end().lines().count() == 1, "{text}");
    }
    let help = relay::command(None)?.args(["run", "--help"]).env("HTTP_LISTEN", SECRET).output()?;
    ensure!(!String::from_utf8_lossy(&help.stdout).contains("hidden-word"));
    Ok(())
}

#[test]
fn an_amqp_url_that_would_be_misread_is_refused() -> Result<()> {
    for url in [
        "amqp://u:hidden-word@fd00::5/",
        "amqp://u:hidden-word@/v",
        "amqp://u:hidden-word@h:0/",
        "amqp://u:1/hidden-word@h/",
        "amqp://u:hidden-word@h/?frame_max=1",
        "amqp://u:hidden-word@h/?unknown=1",
    ] {
        let (code, text) = run(&[], &[("DATABASE_URL", GOOD), ("AMQP_URL", url)])?;
        assert_eq!(code, 64, "{url}: {text}");
        ensure!(text.contains("AMQP_URL") && !text.contains("hidden-word"), "{url}: {text}");
        assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    }
    Ok(())
}

#[tokio::test]
async fn no_log_level_shows_a_login() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = cluster.database().await?;
    let broker = Broker::shared().await?;
    let (url, amqp) = (cluster.url(&database), broker.url());
    cluster.connect(&database).await?.batch_execute("SELECT outbox.add_rabbitmq('rabbitmq')").await?;
    let password = |url: &str| url.split(['@', ':']).nth(2).unwrap_or_default().to_owned();
    for level in ["trace", "lapin::channel=trace,lapin=trace,tokio_postgres=trace,info"] {
        let relay = Relay::with(&url, Some(&amqp), &[("OUTBOX_LOG_LEVEL", level)]).await?;
        let connected = cluster.connect(&database).await?;
        connected.batch_execute("SELECT outbox.publish('a', '{}')").await?;
        // The broker is reached: the event is settled in some way.
        connected.until("SELECT bool_or(retry_count > 0) FROM outbox_events", LONG).await?;
        let log = relay.log();
        ensure!(password(&url).len() > 8 && !log.contains(&password(&url)), "{level}");
        ensure!(password(&amqp).len() > 8 && !log.contains(&password(&amqp)) && !log.contains("PLAIN"), "{level}");
        connected.batch_execute("DELETE FROM outbox_events").await?;
    }
    Ok(())
}

#[tokio::test]
async fn what_surrounds_a_connection_string_is_no_part_of_it() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = cluster.database().await?;
    let url = cluster.url(&database);
    let dir = scratch::dir("secrets")?;
    let file = dir.join("url");
    fs::write(&file, format!("{url}\n"))?;
    let toml = dir.join("relay.toml");
    fs::write(&toml, format!("database_url = '''\n{url}\n'''\n"))?;
    let (file, toml) = (file.display().to_string(), toml.display().to_string());
    for variables in
        [("DATABASE_URL", format!(" {url}\r\n")), ("DATABASE_URL_FILE", file.clone()), ("OUTBOX_CONFIG", toml.clone())]
    {
        let output = relay::command(None)?.arg("check").env(variables.0, &variables.1).output()?;
        ensure!(output.status.success(), "{}: {}", variables.0, String::from_utf8_lossy(&output.stdout));
    }
    let both = [("DATABASE_URL", &*url), ("DATABASE_URL_FILE", &*file)];
    assert_eq!(run(&[], &both)?.0, 64);
    fs::remove_dir_all(dir)?;
    Ok(())
}

#[tokio::test]
async fn libpqs_environment_and_files_are_read() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let database = cluster.database().await?;
    let (user, password) = cluster.login();
    let port = cluster.port().to_string();
    let dir = scratch::dir("libpq")?;
    let passwords = dir.join(".pgpass");
    fs::write(&passwords, format!("127.0.0.1:{port}:*:{user}:{password}\n"))?;
    fs::set_permissions(&passwords, fs::Permissions::from_mode(0o600))?;
    let service = format!("[mine]\nhost=127.0.0.1\nport={port}\nuser={user}\ndbname={database}\n");
    fs::write(dir.join(".pg_service.conf"), service)?;
    let home = ("HOME", dir.to_str().context("a path")?);
    let place = [("PGHOST", "127.0.0.1"), ("PGPORT", &port), ("PGUSER", &user), ("PGDATABASE", &database)];
    for variables in [
        [&place[..], &[("PGPASSWORD", &password)]].concat(),
        [&place[..], &[home]].concat(),
        vec![home, ("PGSERVICE", "mine")],
        vec![home, ("DATABASE_URL", "service=mine")],
    ] {
        let output = relay::command(None)?.arg("check").envs(variables.iter().copied()).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{text}");
    }
    fs::remove_dir_all(dir)?;
    Ok(())
}

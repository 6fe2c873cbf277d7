//! `tail`: events as they are announced.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use outbox_tests::relay;
use outbox_tests::wait::{self, LONG};
use outbox_tests::world::World;
use serde_json::Value;

use super::{expect, login};

/// A running `tail`. Killed when dropped.
struct Tail {
    child: Child,
    lines: Lines,
}

type Lines = Arc<Mutex<Vec<String>>>;

impl Tail {
    /// Waits until it listens.
    async fn start(url: &str, arguments: &[&str]) -> Result<Self> {
        let mut command = relay::command(Some("KILL"))?;
        command.arg("tail").args(arguments).env("DATABASE_URL", url).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let lines = Lines::default();
        collect(child.stdout.take().context("no stdout")?, "", lines.clone());
        collect(child.stderr.take().context("no stderr")?, "stderr: ", lines.clone());
        let tail = Tail { child, lines };
        tail.line("listening on").await?;
        Ok(tail)
    }

    /// Waits for a line with this text.
    async fn line(&self, text: &str) -> Result<String> {
        let look = async || Ok(self.lines().into_iter().find(|line| line.contains(text)));
        wait::until(&format!("a line with {text:?}"), LONG, look).await.with_context(|| self.lines().join("\n"))
    }

    fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    async fn end(mut self, signal: Signal) -> Result<i32> {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal)?;
        let child = RefCell::new(&mut self.child);
        let status = wait::until("tail to end", LONG, async || Ok(child.borrow_mut().try_wait()?)).await?;
        status.code().context("no exit code")
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(from: impl Read + Send + 'static, mark: &'static str, lines: Lines) {
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(std::result::Result::ok) {
            lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(format!("{mark}{line}"));
        }
    });
}

#[tokio::test]
async fn events_are_shown_as_they_are_announced_to_whoever_may_connect() -> Result<()> {
    let world = World::new().await?;
    let (_, url) = login(&world).await?;
    let all = Tail::start(&url, &[]).await?;
    let some = Tail::start(&url, &["--type", "order.*", "--json"]).await?;
    let contact = world.publish("42").await?;
    world
        .execute("NOTIFY outbox_events, 'test-payload'; SELECT outbox.publish('order.placed', '{\"secret\": 1}')")
        .await?;
    let line = all.line(&contact.to_string()).await?;
    ensure!(line.contains("  contact.created v1  contact/42  ") && line.starts_with("20"), "{line}");
    let line = some.line("order.placed").await?;
    let event: Value = serde_json::from_str(&line)?;
    ensure!(event["event_type"] == "order.placed" && event["event_id"].is_string(), "{line}");
    all.line("order.placed").await?;
    let lines = some.lines();
    ensure!(!lines.iter().any(|line| line.contains("contact.created")), "{lines:?}");
    assert_eq!(all.end(Signal::SIGTERM).await?, 0);
    assert_eq!(some.end(Signal::SIGINT).await?, 0);
    Ok(())
}

#[tokio::test]
async fn a_lost_connection_is_made_again() -> Result<()> {
    let world = World::new().await?;
    let tail = Tail::start(&world.cluster.url(&world.database), &[]).await?;
    let ended: i64 = world
        .session
        .one("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'outbox-relay tail' AND datname = current_database()")
        .await?;
    assert_eq!(ended, 1);
    tail.line("events meanwhile are not shown").await?;
    let look = async || {
        world.publish("1").await?;
        Ok(tail.lines().iter().any(|line| line.contains("contact.created")).then_some(()))
    };
    wait::until("an event after the loss", LONG, look).await?;
    assert_eq!(tail.end(Signal::SIGTERM).await?, 0);
    Ok(())
}

#[tokio::test]
async fn without_the_extension_there_is_nothing_to_wait_for() -> Result<()> {
    let world = World::new().await?;
    let ran = expect(1, &world.cluster.url("postgres"), "tail")?;
    ensure!(ran.err.contains("CREATE EXTENSION pg_outbox"), "{ran:?}");
    let ran = expect(1, &world.cluster.url_as("nobody_at_all", "hidden-word", "postgres"), "tail")?;
    ensure!(!ran.err.contains("hidden-word"), "{ran:?}");
    Ok(())
}

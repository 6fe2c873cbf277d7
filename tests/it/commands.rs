//! The commands of the relay's binary, as an operator or a program runs them: what they print and how they end.

mod apply;
mod dead;
mod destinations;
mod look;
mod roles;
mod tail;
mod verify;

use anyhow::{Context, Result, ensure};
use outbox_tests::relay;
use outbox_tests::scratch;
use outbox_tests::world::World;
use serde_json::Value;
use uuid::Uuid;

/// What a command printed, and its exit code.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// What it printed for programs.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.out).with_context(|| format!("no JSON: {self:?}"))
    }

    /// All that it printed.
    pub fn text(&self) -> String {
        format!("{}{}", self.out, self.err)
    }
}

/// Runs it with a database; an argument is what stands between spaces.
pub fn run(url: &str, arguments: &str) -> Result<Ran> {
    run_with(&arguments.split(' ').collect::<Vec<_>>(), &[("DATABASE_URL", url)])
}

pub fn run_with(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Ran> {
    let output = relay::command(None)?.args(arguments).envs(variables.iter().copied()).output()?;
    Ok(Ran {
        code: output.status.code().context("no exit code")?,
        out: String::from_utf8(output.stdout)?,
        err: String::from_utf8(output.stderr)?,
    })
}

/// Runs it, and holds it to an exit code.
pub fn expect(code: i32, url: &str, arguments: &str) -> Result<Ran> {
    let ran = run(url, arguments)?;
    ensure!(ran.code == code, "{arguments}: {ran:?}");
    Ok(ran)
}

/// A file that goes with the tests.
pub fn file(content: &[u8]) -> Result<String> {
    let path = scratch::dir("file")?.join("file");
    std::fs::write(&path, content)?;
    Ok(path.to_str().context("no text")?.to_owned())
}

pub fn url(world: &World<'_>) -> String {
    world.cluster.url(&world.database)
}

/// A login with a name of its own and no right but to connect.
pub async fn login(world: &World<'_>) -> Result<(String, String)> {
    let role = format!("role_{}", scratch::random_hex(4)?);
    world.execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'pw'")).await?;
    let url = world.cluster.url_as(&role, "pw", &world.database);
    Ok((role, url))
}

/// An event that a destination gave up, with this error; the destination must exist.
pub async fn dead_letter(world: &World<'_>, event_type: &str, destination: &str, error: &str) -> Result<Uuid> {
    let publish = "SELECT outbox.publish($1, '{\"n\": 12345678901234567890.10}', 'thing', gen_random_uuid()::text)";
    let event_id: Uuid = world.session.query_one(publish, &[&event_type]).await?.get(0);
    let reject = "SELECT outbox.reject(c.claim_token, c.id, $1, $2) FROM outbox.claim(1000, ARRAY[$2]) c";
    world.session.query(reject, &[&error, &destination]).await?;
    Ok(event_id)
}

/// A webhook that nobody serves.
pub async fn webhook(world: &World<'_>, name: &str) -> Result<String> {
    world
        .add_webhook(name, "https://example.com/hook?token=hidden-word", r#"{"headers": {"X-Key": "hidden-word"}}"#)
        .await
}

#[tokio::test]
async fn wrong_usage_is_one_line_and_changes_nothing() -> Result<()> {
    let world = World::new().await?;
    webhook(&world, "crm").await?;
    dead_letter(&world, "a", "crm", "no").await?;
    for arguments in [
        "dead",
        "dead replay",
        "dead purge",
        "dead replay --limit 1",
        "dead purge --dry-run",
        "dead list --since yesterday",
        "dead list --limit 0",
        "dead replay --all --hidden-word",
        "event hidden-word",
        "destinations pause",
        "destinations rotate crm --grace -1h",
        "destinations apply",
        "destinations apply -f /nowhere/at-all",
        "completions hidden-word",
        "verify --body /dev/null",
        "verify --secret-file /nowhere/at-all --headers /dev/null --body /dev/null",
        "hidden-word",
    ] {
        let ran = expect(64, &url(&world), arguments)?;
        ensure!(ran.out.is_empty() && ran.err.trim_end().lines().count() == 1, "{arguments}: {ran:?}");
        ensure!(!ran.err.contains("hidden-word"), "{ran:?}");
    }
    let dead: i64 = world.session.one("SELECT count(*) FROM outbox.deliveries WHERE status = 'failed'").await?;
    assert_eq!(dead, 1);
    Ok(())
}

/// Nothing but what makes them: no database, no configuration.
#[test]
fn completions_and_the_manual_page_are_printed() -> Result<()> {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ran = run_with(&["completions", shell], &[])?;
        ensure!(
            ran.code == 0 && ran.out.contains("healthcheck") && ran.out.contains("dry-run"),
            "{shell}: {}",
            ran.code
        );
    }
    let ran = run_with(&["man"], &[])?;
    ensure!(ran.code == 0 && ran.out.contains(".SH \"OUTBOX-RELAY DESTINATIONS APPLY\""), "{ran:?}");
    Ok(())
}

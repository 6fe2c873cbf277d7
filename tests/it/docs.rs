//! What the documentation says to type is typed, page by page, and every link leads somewhere.
//!
//! The blocks ```` ```sql ```` and ```` ```sh ```` of a page run in their order: on a database with the extension, in one shell, in an
//! empty directory, with `DATABASE_URL` of a superuser, and with `psql` and `outbox-relay` on the path. Comments of a page,
//! which nobody sees, say the rest:
//!
//! - `<!-- test: skip REASON -->`: the next block is not run
//! - `<!-- test: sql`, lines, `-->`, and the same with `sh`: what the reader has and a test has not
//! - `<!-- test: file NAME -->`: the next block, of whatever language, is written to this file
//! - `<!-- test: until QUERY -->`: waits until the query gives true
//!
//! `019…` stands for the `event_id` [`EVENT_ID`], and the ports 8000 and 9464 are two that are free.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use outbox_tests::cluster::Cluster;
use outbox_tests::postgres::Installation;
use outbox_tests::{relay, scratch};

const EVENT_ID: &str = "019b0000-0000-7000-9000-000000000001";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// How GitHub links to a heading.
pub fn anchor(title: &str) -> String {
    let mut plain = String::new();
    let mut rest = title.trim();
    // Of a link its text alone.
    while let Some((before, link)) = rest.split_once('[') {
        let (text, after) = link.split_once("](").unwrap_or((link, ""));
        plain = plain + before + text;
        rest = after.split_once(')').map_or("", |(_, after)| after);
    }
    let letters = (plain + rest).to_lowercase();
    letters
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

/// A page without its blocks of code.
fn prose(text: &str) -> String {
    let mut in_block = false;
    let outside = |line: &&str| {
        let fence = line.trim_start().starts_with("```");
        in_block ^= fence;
        !in_block && !fence
    };
    text.lines().filter(outside).collect::<Vec<_>>().join("\n")
}

fn anchors(text: &str) -> BTreeSet<String> {
    let titles = prose(text);
    let titles = titles.lines().filter(|line| line.starts_with('#')).filter_map(|line| line.split_once("# "));
    titles.map(|(_, title)| anchor(title)).collect()
}

/// All pages of the repository.
fn pages() -> Result<Vec<PathBuf>> {
    fn collect(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if path.is_dir() && !name.starts_with('.') && name != "target" && name != "node_modules" {
                collect(&path, found)?;
            } else if name.ends_with(".md") {
                found.push(path);
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    collect(&root(), &mut found)?;
    found.sort();
    Ok(found)
}

#[test]
fn every_link_leads_somewhere() -> Result<()> {
    let (mut broken, mut followed) = (Vec::new(), 0);
    for page in pages()? {
        let text = prose(&std::fs::read_to_string(&page)?);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next()) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            followed += 1;
            let (file, part) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.clone() } else { page.with_file_name(file) };
            let there =
                target.exists() && (part.is_empty() || anchors(&std::fs::read_to_string(&target)?).contains(part));
            if !there {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    ensure!(broken.is_empty(), "links that lead nowhere:\n{}", broken.join("\n"));
    ensure!(followed > 150, "only {followed} links were found");
    Ok(())
}

/// Whoever opens the project reads it to its end.
#[test]
fn the_readme_is_short() -> Result<()> {
    for name in ["README.md", "README.pt-BR.md"] {
        let size = std::fs::metadata(root().join(name))?.len();
        ensure!(size <= 20_000, "{name} has {size} bytes");
    }
    Ok(())
}

/// What a page has its readers type, as one script.
fn script(name: &str, text: &str) -> Result<(String, usize)> {
    let mut script = String::new();
    let (mut blocks, mut skipped, mut file) = (0, false, None);
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let place = format!("{name}:{}", number + 1);
        let until = |end: &str, lines: &mut dyn Iterator<Item = (usize, &str)>| {
            lines
                .map(|(_, line)| line)
                .take_while(|line| *line != end)
                .map(|line| format!("{line}\n"))
                .collect::<String>()
        };
        if let Some(directive) = line.trim_start().strip_prefix("<!-- test: ") {
            match directive.strip_suffix(" -->").unwrap_or(directive).split_once(' ') {
                Some(("skip", reason)) if !reason.is_empty() => skipped = true,
                Some(("file", name)) => file = Some(name),
                Some(("until", query)) => step(&mut script, &place, &format!("until_true {}\n", quoted(query)))?,
                None if directive == "sql" => sql(&mut script, &place, &until("-->", &mut lines))?,
                None if directive == "sh" => step(&mut script, &place, &until("-->", &mut lines))?,
                _ => bail!("{place}: {line}"),
            }
        } else if let Some(language) = line.trim_start().strip_prefix("```") {
            let indent = " ".repeat(line.len() - line.trim_start().len());
            let block = until(&format!("{indent}```"), &mut lines);
            let block: String =
                block.lines().map(|line| format!("{}\n", line.strip_prefix(&indent).unwrap_or(line))).collect();
            if let Some(name) = file.take() {
                blocks += 1;
                step(&mut script, &place, &format!("cat > {name} <<'END_OF_FILE'\n{block}END_OF_FILE\n"))?;
            } else if language == "sql" || language == "sh" {
                blocks += 1;
                match (std::mem::take(&mut skipped), language) {
                    (true, _) => {}
                    (false, "sql") => sql(&mut script, &place, &block)?,
                    (false, _) => step(&mut script, &place, &block)?,
                }
            } else {
                ensure!(!skipped, "{place}: the block to skip is not one that runs");
            }
        }
    }
    Ok((script, blocks))
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn step(script: &mut String, place: &str, commands: &str) -> Result<()> {
    Ok(write!(script, "echo '== {place}' >&2\n{commands}")?)
}

fn sql(script: &mut String, place: &str, statements: &str) -> Result<()> {
    step(script, place, &format!("run_sql <<'END_OF_SQL'\n{statements}END_OF_SQL\n"))
}

const BEGIN: &str = r#"
set -euo pipefail
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
run_sql() { psql -X -q -v ON_ERROR_STOP=1 -P pager=off "$DATABASE_URL"; }
until_true() {
    for _ in $(seq 600); do
        [ "$(psql -XAtq "$DATABASE_URL" -c "$1")" = t ] && return
        sleep 0.1
    done
    echo "it never becomes true: $1" >&2
    return 1
}
"#;

async fn run_page(name: &str) -> Result<()> {
    let text = std::fs::read_to_string(root().join(name))?;
    let (script, blocks) = script(name, &text)?;
    ensure!(blocks > 0, "{name} has nothing to run");
    let (receiver, pages) = (scratch::free_port()?.to_string(), scratch::free_port()?.to_string());
    let script = script.replace("019…", EVENT_ID).replace("8000", &receiver).replace("9464", &pages);
    // Roles are of a whole server.
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    let directory = scratch::dir("page")?;
    std::fs::write(directory.join("script"), format!("{BEGIN}{script}"))?;
    let relay = relay::binary()?;
    let mut path = vec![relay.parent().context("a directory")?.to_owned(), Installation::get()?.bindir.clone()];
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let mut shell = Command::new("timeout");
    shell.args(["-k", "5", "240", "bash", "script"]).current_dir(&directory).env("PATH", std::env::join_paths(path)?);
    for (variable, _) in std::env::vars_os() {
        if variable.to_str().is_some_and(|name| name.starts_with("PG") || name.starts_with("OUTBOX_")) {
            shell.env_remove(variable);
        }
    }
    shell.env("DATABASE_URL", cluster.url(&database)).env("HTTP_LISTEN", format!("127.0.0.1:{pages}"));
    let output = tokio::task::spawn_blocking(move || shell.output()).await??;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{name}, {}:\n{said}", output.status);
    Ok(())
}

macro_rules! run {
    ($($test:ident: $page:literal,)*) => {
        /// The pages with something to type.
        const RUN: &[&str] = &[$($page),*];
        $(
            #[tokio::test]
            async fn $test() -> Result<()> {
                run_page($page).await
            }
        )*
    };
}

run! {
    readme: "README.md",
    readme_in_portuguese: "README.pt-BR.md",
    commands: "docs/commands.md",
    console: "docs/console.md",
    consumers: "docs/consumers.md",
    delivery: "docs/delivery.md",
    from_a_polling_job: "docs/from-a-polling-job.md",
    from_debezium: "docs/from-debezium.md",
    from_your_own_table: "docs/from-your-own-table.md",
    install: "docs/install.md",
    moving_in: "docs/moving-in.md",
    operations: "docs/operations.md",
    producers: "docs/producers.md",
    rabbitmq: "docs/rabbitmq.md",
    the_relay: "docs/relay.md",
    scaling_out: "docs/scaling-out.md",
    testing: "docs/testing.md",
    troubleshooting: "docs/troubleshooting.md",
    webhooks: "docs/webhooks.md",
    webhooks_for_customers: "docs/webhooks-for-customers.md",
}

/// Their commands build images and packages and run other programs, which tests of their own do.
const NOT_RUN: [&str; 3] = ["docs/guarantees.md", "docs/observability.md", "docs/packages.md"];

#[test]
fn every_page_with_something_to_type_is_run() -> Result<()> {
    let root = root();
    for page in pages()? {
        let name = page.strip_prefix(&root)?.to_str().context("a name")?.to_owned();
        let (_, blocks) = script(&name, &std::fs::read_to_string(&page)?)?;
        let reader = name.starts_with("README") || name.starts_with("docs/") && !name.starts_with("docs/decisions/");
        ensure!(
            !reader || blocks == 0 || RUN.contains(&name.as_str()) || NOT_RUN.contains(&name.as_str()),
            "{name} has {blocks} blocks that no test runs"
        );
    }
    Ok(())
}

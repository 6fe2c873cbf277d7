//! Lists in the pages of `docs/` that people write by hand name all that there is.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use outbox_tests::relay;
use outbox_tests::world::World;

fn page(name: &str) -> Result<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    std::fs::read_to_string(&file).with_context(|| file.display().to_string())
}

/// The first cells of the tables of a page.
fn listed(page: &str) -> String {
    let rows = page.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    rows.collect::<Vec<_>>().join("\n")
}

#[tokio::test]
async fn every_setting_of_a_destination_is_listed() -> Result<()> {
    let world = World::new().await?;
    let keys: Vec<String> =
        world.session.one("SELECT outbox._known_settings('webhook') || outbox._known_settings('rabbitmq')").await?;
    ensure!(keys.len() > 20, "only {keys:?}");
    let pages = listed(&(page("delivery.md")? + &page("rabbitmq.md")? + &page("webhooks.md")?));
    for key in keys {
        ensure!(pages.contains(&format!("`{key}`")), "no table explains settings.{key}");
    }
    Ok(())
}

#[tokio::test]
async fn every_health_check_and_figure_is_listed() -> Result<()> {
    let world = World::new().await?;
    let checks = "SELECT array_agg(check_name) FROM outbox.health()";
    let figures = "SELECT proargnames FROM pg_proc WHERE oid = 'outbox.stats'::regproc";
    let page = listed(&page("operations.md")?);
    for names in [checks, figures] {
        let names: Vec<String> = world.session.one(names).await?;
        ensure!(names.len() > 10, "only {names:?}");
        for name in names {
            ensure!(page.contains(&format!("`{name}`")), "no table of operations.md explains {name}");
        }
    }
    Ok(())
}

fn help(words: &[&str]) -> Result<String> {
    Ok(String::from_utf8(relay::command(None)?.args(words).arg("--help").output()?.stdout)?)
}

/// What a help lists under a heading, without what clap adds by itself.
fn entries<'a>(help: &'a str, heading: &str) -> Vec<&'a str> {
    let lines = help.lines().skip_while(|line| *line != heading).skip(1).take_while(|line| !line.is_empty());
    let names = lines.filter_map(|line| line.split_whitespace().find(|word| !word.starts_with("-h")));
    names.map(|name| name.trim_end_matches(',')).filter(|name| *name != "help" && *name != "--help").collect()
}

#[test]
fn every_command_and_its_flags_are_listed() -> Result<()> {
    let page = page("commands.md")?;
    let everywhere = help(&[])?;
    let everywhere = entries(&everywhere, "Options:");
    let commands = help(&[])?;
    let mut looked = 0;
    for command in entries(&commands, "Commands:").into_iter().filter(|command| *command != "run") {
        let of_command = help(&[command])?;
        let parts = entries(&of_command, "Commands:");
        let helps = match parts.is_empty() {
            true => vec![(command.to_owned(), of_command.clone())],
            false => parts
                .iter()
                .map(|part| Ok((format!("{command} {part}"), help(&[command, part])?)))
                .collect::<Result<_>>()?,
        };
        for (name, help) in helps {
            let last = name.split(' ').next_back().unwrap_or_default();
            ensure!(page.contains(last), "commands.md does not say what {name} does");
            // The configuration of `check` is that of `run`.
            let flags = if name == "check" { Vec::new() } else { entries(&help, "Options:") };
            for flag in flags.into_iter().filter(|flag| flag.starts_with("--") && !everywhere.contains(flag)) {
                ensure!(page.contains(flag), "commands.md does not explain {flag} of {name}");
                looked += 1;
            }
        }
    }
    ensure!(looked > 30, "only {looked} flags were found");
    Ok(())
}

//! What a role may not do is one line that says which grant it lacks.

use anyhow::{Result, ensure};
use outbox_tests::world::World;

use super::{dead_letter, expect, file, login, url, webhook};

const LOOKS: [&str; 6] =
    ["status", "health", "dead list", "destinations list", "destinations show crm", "destinations export"];

/// With the exit code for an operator. The first replay leaves no dead letter.
const CHANGES: [(&str, i32); 12] = [
    ("event EVENT_ID", 0),
    ("replay EVENT_ID", 0),
    ("destinations pause crm", 0),
    ("destinations resume crm", 0),
    ("destinations test crm", 0),
    ("destinations rotate crm", 0),
    ("dead replay --all --dry-run", 2),
    ("dead replay --error *HTTP*", 2),
    ("dead purge --all --dry-run", 2),
    ("dead purge --all", 2),
    ("backfill crm --dry-run", 2),
    ("destinations remove crm", 0),
];

#[tokio::test]
async fn each_command_works_with_its_grant_and_names_it_without() -> Result<()> {
    let world = World::new().await?;
    let secret = webhook(&world, "crm").await?;
    let event_id = dead_letter(&world, "a", "crm", "HTTP 500").await?;
    let export = file(expect(0, &url(&world), "destinations export")?.out.as_bytes())?;
    let changes = CHANGES.map(|(command, code)| (command.replace("EVENT_ID", &event_id.to_string()), code));
    let (nobody, nobodys) = login(&world).await?;
    let (monitor, monitors) = login(&world).await?;
    let (operator, operators) = login(&world).await?;
    world.execute(&format!("SELECT outbox.grant_monitor('{monitor}'), outbox.grant_operator('{operator}')")).await?;
    for command in LOOKS {
        let ran = expect(1, &nobodys, command)?;
        let advice = format!(
            "lacks grant_monitor: permission denied for schema outbox; a superuser can run SELECT outbox.grant_monitor('{nobody}')"
        );
        ensure!(ran.err.contains(&advice) && ran.err.lines().count() == 1 && ran.out.is_empty(), "{command}: {ran:?}");
        for url in [&monitors, &operators] {
            let ran = super::run(url, command)?;
            ensure!(ran.code == i32::from(command == "health"), "{command}: {ran:?}");
            ensure!(!ran.text().contains(&secret) && !ran.text().contains("hidden-word"), "{ran:?}");
        }
    }
    for (command, _) in &changes {
        for (role, url) in [(&nobody, &nobodys), (&monitor, &monitors)] {
            let ran = expect(1, url, command)?;
            let advice = format!("SELECT outbox.grant_operator('{role}')");
            ensure!(
                ran.err.contains(&advice) && ran.err.lines().count() == 1 && ran.out.is_empty(),
                "{command}: {ran:?}"
            );
        }
    }
    for (command, code) in &changes {
        let ran = expect(*code, &operators, command)?;
        ensure!(!ran.text().contains(&secret) && !ran.text().contains("hidden-word"), "{ran:?}");
    }
    // The destination is gone: what the file holds of it is not enough, and the operator is told so.
    let ran = expect(1, &operators, &format!("destinations apply -f {export}"))?;
    ensure!(ran.err.contains("stands for a hidden value"), "{ran:?}");
    Ok(())
}

//! Destinations that come and go under load, in tenants, paused, altered and removed. Each life of one has its own path.

use std::sync::Arc;

use anyhow::Result;
use outbox_tests::trace::now_us;

use crate::random::Random;
use crate::record::Wanted;
use crate::stage::Stage;

const NAMES: usize = 3;
const TENANTS: [Option<&str>; 3] = [None, Some("acme"), Some("globex")];
const TYPES: [&str; 3] = ["", "contact.", "order."];

/// The paths of the present lives.
type Lives = [Option<String>; NAMES];

pub async fn lane(stage: Arc<Stage>, mut random: Random) -> Result<()> {
    let mut lives = Lives::default();
    while stage.is_storming() {
        stage.pause(random.millis(1_000, 6_000)).await;
        if stage.is_storming() {
            one(&stage, &mut random, &mut lives).await?;
        }
    }
    // Those that live on have to get all that they are owed; the next round begins without them.
    for (number, life) in lives.iter().enumerate() {
        if life.is_some() {
            stage.insist(&format!("SELECT outbox.resume('churn{number}')")).await?;
        }
    }
    Ok(())
}

async fn one(stage: &Stage, random: &mut Random, lives: &mut Lives) -> Result<()> {
    let number = random.below(NAMES as u64) as usize;
    let name = format!("churn{number}");
    let Some(life) = lives[number].clone() else {
        lives[number] = Some(add(stage, random, &name).await?);
        return Ok(());
    };
    let what = match random.below(10) {
        0..2 => {
            let fault = stage.fault(format!("remove destination {name}"));
            if let Some(wanted) = stage.record.lock().destinations.get_mut(&life) {
                wanted.removed = true;
            }
            remove(stage, &name).await?;
            stage.healed(fault);
            lives[number] = None;
            return Ok(());
        }
        2..4 => "pause",
        4..7 => "resume",
        _ => "alter_destination",
    };
    let fault = stage.fault(format!("{what} {name}"));
    let changes = match what {
        "alter_destination" => {
            let concurrency = 1 + random.below(8);
            format!(r#", '{{"settings": {{"concurrency": {concurrency}, "timeout": {}}}}}'"#, 5 + random.below(5))
        }
        _ => String::new(),
    };
    stage.insist(&format!("SELECT outbox.{what}('{name}'{changes})")).await?;
    stage.healed(fault);
    Ok(())
}

/// The answer may be lost with the server, so it looks before it tries again.
async fn add(stage: &Stage, random: &mut Random, name: &str) -> Result<String> {
    let tenant = random.one_of(&TENANTS).copied().flatten();
    let types = random.one_of(&TYPES).copied().unwrap_or("");
    let life = format!("{name}/{}", random.below(1_000_000));
    let fault = stage.fault(format!("add destination {life} for {types}* of tenant {tenant:?}"));
    let wanted = Wanted { types, tenant, since: i64::MAX, removed: false, only_outages: true };
    stage.record.lock().destinations.insert(life.clone(), wanted);
    let tenant = tenant.map_or_else(|| "NULL".to_owned(), |tenant| format!("'{tenant}'"));
    stage
        .insist(&format!(
            r#"SELECT outbox.add_webhook('{name}', '{}', '{{{types}*}}', tenant_id => {tenant}, settings => '{{"max_attempts": 1}}')
                WHERE NOT EXISTS (SELECT FROM outbox.destinations WHERE name = '{name}')"#,
            stage.outages.url(&life)
        ))
        .await?;
    if let Some(wanted) = stage.record.lock().destinations.get_mut(&life) {
        wanted.since = now_us();
    }
    stage.healed(fault);
    Ok(life)
}

async fn remove(stage: &Stage, name: &str) -> Result<()> {
    let exists = format!("EXISTS (SELECT FROM outbox.destinations WHERE name = '{name}')");
    stage.insist(&format!("SELECT outbox.remove_destination('{name}') WHERE {exists}")).await
}

/// Between rounds.
pub async fn remove_all(stage: &Stage) -> Result<()> {
    for number in 0..NAMES {
        remove(stage, &format!("churn{number}")).await?;
    }
    for (_, wanted) in stage.record.lock().destinations.iter_mut().filter(|(life, _)| life.starts_with("churn")) {
        wanted.removed = true;
    }
    Ok(())
}

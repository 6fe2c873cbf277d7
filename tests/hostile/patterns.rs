//! The database and the relay understand patterns alike.

use anyhow::{Result, ensure};
use outbox_tests::world::World;

use crate::Dice;

#[path = "../../relay/src/pattern.rs"]
#[allow(dead_code, reason = "the file is the relay's")]
mod pattern;

fn word(dice: &mut Dice, alphabet: &[&str]) -> String {
    (0..dice.roll(9)).map(|_| dice.pick(alphabet)).collect()
}

#[tokio::test]
#[allow(clippy::disallowed_macros, reason = "for whoever reads the output of the tests")]
async fn a_pattern_matches_in_sql_what_it_matches_in_the_relay() -> Result<()> {
    let seed = crate::seed()?;
    println!("OUTBOX_HOSTILE_SEED={seed}");
    let (mut dice, world) = (Dice(seed), World::new().await?);
    let mut pairs = Vec::new();
    for _ in 0..20_000 {
        let text = word(&mut dice, &["a", "b", ".", "%", "_", "\\", "ä", "😀"]);
        // Half of them come from the text itself, so that enough of them match.
        let pattern = match dice.roll(2) {
            0 => word(&mut dice, &["a", "b", ".", "*", "%", "_", "\\", "ä", "**"]),
            _ => text.chars().map(|c| if dice.roll(3) == 0 { "*".to_owned() } else { c.to_string() }).collect(),
        };
        pairs.push((pattern, text));
    }
    let (patterns, texts): (Vec<&str>, Vec<&str>) = pairs.iter().map(|(p, t)| (p.as_str(), t.as_str())).unzip();
    let likes: Vec<String> = patterns.iter().map(|p| pattern::like(p)).collect();
    let rows = world
        .session
        .query(
            "SELECT t LIKE outbox._like_pattern(p), t LIKE l
               FROM unnest($1::text[], $2::text[], $3::text[]) WITH ORDINALITY AS x (p, t, l, n) ORDER BY n",
            &[&patterns, &texts, &likes],
        )
        .await?;
    let mut matching = 0;
    for (row, (p, t)) in rows.iter().zip(&pairs) {
        let (sql, like, relay) =
            (row.get::<_, bool>(0), row.get::<_, bool>(1), pattern::matches(p.as_bytes(), t.as_bytes()));
        ensure!(sql == relay && like == relay, "{p:?} and {t:?}: in SQL {sql}, as LIKE {like}, in the relay {relay}");
        matching += usize::from(relay);
    }
    ensure!(rows.len() == pairs.len() && matching > 2000 && matching < 18_000, "{matching} of {} match", rows.len());
    Ok(())
}

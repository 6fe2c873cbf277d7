//! No plan of the hot path depends on what the statistics say: whatever ANALYZE saw, a claim and what follows from it touch
//! the same pages in a large table as in a small one. Counted in pages, not in time.

use anyhow::{Context, Result};
use outbox_tests::cluster::Cluster;
use outbox_tests::session::Session;

use crate::growth::insert;

const FILL: usize = 10_000;

/// What statistics may be like when a session makes its plans.
const STATES: [(&str, &str); 4] = [
    ("never analyzed", ""),
    (
        "analyzed while empty",
        "TRUNCATE outbox_events; ANALYZE outbox_events; ANALYZE outbox.delivery; ANALYZE outbox.claims",
    ),
    ("analyzed while huge, then emptied", "ANALYZE outbox_events; ANALYZE outbox.delivery; TRUNCATE outbox_events"),
    ("without statistics", "ANALYZE outbox_events; DELETE FROM pg_statistic; TRUNCATE outbox_events"),
];

/// Pages of tables and indexes that the running transaction asked for.
const PAGES: &str = "SELECT sum(pg_stat_get_xact_blocks_fetched(c.oid))::bigint FROM pg_class c
     WHERE c.relnamespace IN ('outbox'::regnamespace, 'public'::regnamespace) AND c.relkind IN ('r', 'i')";

/// The pages that a call asks for.
pub async fn cost(session: &Session, call: &str) -> Result<i64> {
    session.batch_execute("BEGIN").await?;
    let before: i64 = session.one(PAGES).await?;
    session.batch_execute(call).await.with_context(|| call.to_owned())?;
    let pages: i64 = session.one(PAGES).await?;
    session.batch_execute("COMMIT").await?;
    Ok(pages - before)
}

/// Each step of ten events' way, and what it costs.
async fn steps(session: &Session) -> Result<Vec<(&'static str, i64)>> {
    let calls = [
        ("claim", "PERFORM outbox.claim(10, '{well}')"),
        ("release", "PERFORM outbox.release(c.token) FROM outbox.claims c"),
        ("claim again", "PERFORM outbox.claim(10, '{well}')"),
        ("settle", "PERFORM outbox.settle('{}', '{}', (SELECT jsonb_agg(jsonb_build_object('token', c.token, 'id', i,
             'destination', 'well', 'outcome', 'failed', 'error', 'no luck', 'retry_in', 0)) FROM outbox.claims c, unnest(c.ids) AS i))"),
        ("claim due", "PERFORM outbox.claim(10, '{well}')"),
        ("ack", "PERFORM outbox.ack(c.token) FROM outbox.claims c"),
        ("leases", "PERFORM outbox._end_leases()"),
        ("due", "PERFORM outbox._due()"),
        ("description", "PERFORM outbox._describe(ARRAY(SELECT e.id FROM outbox_events e ORDER BY e.id DESC LIMIT 10), 'full')"),
        ("retention", "PERFORM outbox._retain((SELECT max(e.id) - 20 FROM outbox_events e), 5)"),
    ];
    insert(session, "test.happened", 10).await?;
    let mut costs = Vec::new();
    for (name, call) in calls {
        costs.push((name, cost(session, &format!("DO $do$ BEGIN {call}; END $do$")).await?));
    }
    Ok(costs)
}

/// Many events that were delivered, and as many that wait for a destination that is paused.
async fn fill(session: &Session) -> Result<()> {
    let processed = format!(
        "INSERT INTO outbox_events (event_type, event_data, status, processed_at)
         SELECT 'test.old', '{{}}', 'processed', now() FROM generate_series(1, {FILL})"
    );
    session.batch_execute(&processed).await?;
    insert(session, "other.waits", FILL).await?;
    for _ in 0..3 {
        session.execute("SELECT FROM outbox.claim(10000, '{well}')", &[]).await?;
    }
    Ok(())
}

#[tokio::test]
async fn claims_cost_the_same_whatever_the_statistics_say() -> Result<()> {
    let cluster = Cluster::start().await?;
    for (state, statements) in STATES {
        let database = cluster.database().await?;
        let operator = cluster.connect(&database).await?;
        operator
            .batch_execute(
                "ALTER TABLE outbox_events SET (autovacuum_enabled = off); ALTER TABLE outbox.delivery SET (autovacuum_enabled = off);
                 SELECT outbox.add_rabbitmq('well', event_types => '{test.*}');
                 SELECT outbox.add_rabbitmq('ill', event_types => '{other.*}'), outbox.pause('ill')",
            )
            .await?;
        if !statements.is_empty() {
            fill(&operator).await?;
            operator.batch_execute(statements).await?;
        }
        // A session that makes its plans now, and keeps them.
        let session = cluster.connect(&database).await?;
        steps(&session).await?;
        let small = steps(&session).await?;
        fill(&session).await?;
        steps(&session).await?;
        let large = steps(&session).await?;
        for ((name, before), (_, after)) in small.into_iter().zip(large) {
            assert!(
                after < 3 * before + 50,
                "{state}, {name}: {before} pages in a small table, {after} in a large one"
            );
        }
    }
    Ok(())
}

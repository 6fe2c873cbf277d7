//! What waits must cost nothing: plans are made while the tables are nearly empty and kept, and a million deliveries that
//! wait for a dead destination must not make every claim and every settlement slower. Counted in pages, not in time.

use anyhow::{Context, Result};
use outbox_tests::cluster::Cluster;
use outbox_tests::session::Session;

const BATCH: usize = 200;
const WAITING: usize = 30_000;

pub async fn insert(session: &Session, kind: &str, count: usize) -> Result<()> {
    let sql = format!(
        "INSERT INTO outbox_events (event_type, aggregate_type, aggregate_id, event_data)
         SELECT '{kind}', 'test', (n % 1000)::text, '{{}}' FROM generate_series(1, {count}) AS n"
    );
    session.execute(&sql, &[]).await?;
    Ok(())
}

/// Events are claimed, one part fails, the rest is delivered, what failed is claimed again and delivered. Returns the pages
/// that were looked at.
async fn round(session: &Session) -> Result<i64> {
    insert(session, "test.happened", BATCH).await?;
    session.execute("SELECT pg_stat_statements_reset()", &[]).await?;
    for outcome in ["failed", "delivered"] {
        let claim = format!(
            "SELECT coalesce(jsonb_agg(jsonb_build_object('token', claim_token, 'id', id, 'destination', 'well',
                        'outcome', '{outcome}', 'error', 'no luck', 'retry_in', 0)), '[]')::text
               FROM outbox.claim({BATCH}, '{{well}}')"
        );
        let exceptions: String = session.one(&claim).await?;
        let settle = "SELECT settled FROM outbox.settle('{}', '{}', $1::text::jsonb)";
        let settled: i64 = session.query_one(settle, &[&exceptions]).await?.get(0);
        assert_eq!(settled, BATCH as i64, "{outcome}");
    }
    let pages = "SELECT sum(shared_blks_hit + shared_blks_read)::bigint FROM pg_stat_statements
                  WHERE query ~ 'outbox.(claim|settle)\\(' AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database())";
    session.query_one(pages, &[]).await?.get::<_, Option<i64>>(0).context("nothing was counted")
}

#[tokio::test]
async fn claims_and_settlements_cost_the_same_however_much_waits() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    let session = cluster.connect(&database).await?;
    session.batch_execute("CREATE EXTENSION pg_stat_statements").await?;
    session.batch_execute("ALTER TABLE outbox.delivery SET (autovacuum_enabled = off)").await?;
    session.batch_execute("ALTER TABLE outbox_events SET (autovacuum_enabled = off)").await?;
    session.batch_execute("SELECT outbox.add_rabbitmq('well', event_types => '{test.*}')").await?;
    session
        .batch_execute("SELECT outbox.add_rabbitmq('ill', event_types => '{*}'); SELECT outbox.pause('ill')")
        .await?;
    round(&session).await?;
    let before = round(&session).await?;
    insert(&session, "other.waits", WAITING).await?;
    for _ in 0..4 {
        session.execute("SELECT FROM outbox.claim(10000, '{well}')", &[]).await?;
    }
    let parked: i64 = session.one("SELECT count(*) FROM outbox.delivery WHERE destination = 'ill'").await?;
    assert!(parked >= WAITING as i64, "{parked} wait");
    round(&session).await?;
    let after = round(&session).await?;
    assert!(after < 3 * before, "{before} pages with little waiting, {after} with much");
    Ok(())
}

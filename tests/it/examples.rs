//! The recipes of `examples/` do what they show: the event is in the order's transaction, and a consumer works on it once.

use anyhow::{Result, ensure};
use outbox_tests::cluster::Cluster;
use outbox_tests::orm;
use outbox_tests::world::World;

const SCHEMA: &str = include_str!("../../examples/schema.sql");

async fn runs(file: &str) -> Result<()> {
    // Its role is of a whole server.
    let cluster = Cluster::start().await?;
    let world = World::on(&cluster).await?;
    world.execute(SCHEMA).await?;
    let (url, recipe) = (cluster.url_as("shop", "shop", &world.database), file.to_owned());
    tokio::task::spawn_blocking(move || orm::recipe(&recipe, &url)).await??;
    let sql = "SELECT count(*) = 1 AND bool_and(e.event_type = 'order.placed' AND e.aggregate_type = 'order'
                      AND e.event_data -> 'order_id' = to_jsonb(o.id) AND e.event_data ? 'amount' AND o.customer = 'Ada')
                 FROM outbox_events e FULL JOIN orders o ON e.aggregate_id = o.id::text";
    ensure!(world.session.one::<bool>(sql).await?, "{file}: not one order and its event");
    ensure!(world.session.one::<i64>("SELECT count(*) FROM invoices").await? == 1, "{file}: not one invoice");
    Ok(())
}

#[tokio::test]
async fn psycopg() -> Result<()> {
    runs("python/with_psycopg.py").await
}

#[tokio::test]
async fn sqlalchemy() -> Result<()> {
    runs("python/with_sqlalchemy.py").await
}

#[tokio::test]
async fn django() -> Result<()> {
    runs("python/with_django.py").await
}

#[tokio::test]
async fn node_postgres() -> Result<()> {
    runs("node/with_pg.js").await
}

#[tokio::test]
async fn rails() -> Result<()> {
    runs("ruby/with_rails.rb").await
}

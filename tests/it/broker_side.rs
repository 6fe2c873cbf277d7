//! What is made at RabbitMQ in a destination's name.

use anyhow::{Context, Result, ensure};
use outbox_tests::relay;
use outbox_tests::wait::{self, LONG};

use crate::rabbitmq::Site;

/// Exit code and output of `outbox-relay check`.
fn check(site: &Site) -> Result<(i32, String)> {
    let mut command = relay::command(None)?;
    command.arg("check").env("DATABASE_URL", site.cluster.url(&site.database)).env("AMQP_URL", site.broker.url());
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok((output.status.code().context("no exit code")?, text))
}

async fn list(site: &Site, what: &str, column: &str) -> Result<String> {
    site.broker.ctl(&[what, "-p", &site.broker.vhost, column]).await
}

#[tokio::test]
async fn a_value_of_an_event_binds_no_queue_to_the_events_of_others() -> Result<()> {
    let site = Site::shared().await?;
    site.add("mq", r#", routing_key => '{tenant_id}', settings => '{"declare": "queue"}'"#).await?;
    let _relay = site.relay().await?;
    for tenant in ["#", "*", "a.#", "acme"] {
        let publish = "SELECT outbox.publish('contact.created', '{}', tenant_id => $1)";
        site.session.query_one(publish, &[&tenant]).await?;
    }
    site.until(
        "SELECT bool_and(status = CASE tenant_id WHEN 'acme' THEN 'processed' ELSE 'failed' END) FROM outbox_events",
    )
    .await?;
    site.until(
        "SELECT bool_and(last_error LIKE 'routing key % holds a wildcard from the event%') FROM outbox.deliveries",
    )
    .await?;
    let keys = list(&site, "list_bindings", "routing_key").await?;
    ensure!(!keys.lines().any(|key| key.contains('#') || key.contains('*')), "{keys}");
    Ok(())
}

#[tokio::test]
async fn a_queue_is_there_before_the_first_event() -> Result<()> {
    let site = Site::shared().await?;
    site.add("orders", r#", event_types => '{order.*}', settings => '{"declare": "queue"}'"#).await?;
    let _relay = site.relay().await?;
    let consume = async || Ok(Some(site.broker.channel().await?.consume("orders").await?));
    let mut queue = wait::until("the queue", LONG, consume).await?;
    site.session.batch_execute("SELECT outbox.publish('order.created', '{}')").await?;
    assert_eq!(queue.next(LONG).await?.routing_key, "order.created");
    site.processed().await
}

#[tokio::test]
async fn check_says_what_does_not_fit_and_makes_nothing() -> Result<()> {
    let site = Site::shared().await?;
    site.add("orders", r#", 'new-exchange', settings => '{"declare": "queue"}'"#).await?;
    let (code, text) = check(&site)?;
    ensure!(code == 0, "{text}");
    ensure!(!list(&site, "list_exchanges", "name").await?.contains("new-exchange"), "an exchange was made");
    ensure!(!list(&site, "list_queues", "name").await?.contains("orders"), "a queue was made");

    // A classic queue where a quorum queue is wanted.
    site.broker.channel().await?.declare("orders", &[]).await?;
    let (code, text) = check(&site)?;
    ensure!(code == 1 && text.contains("inequivalent arg 'x-queue-type'"), "{text}");

    site.add("orders", r#", 'missing', settings => '{"declare": "none"}'"#).await?;
    let (code, text) = check(&site)?;
    ensure!(code == 1 && text.contains("no exchange 'missing'"), "{text}");
    Ok(())
}

#[tokio::test]
async fn an_exchange_that_a_template_renders_to_nothing_is_not_the_default_one() -> Result<()> {
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    channel.declare("contact.created", &[]).await?;
    site.add("mq", ", '{tenant_id}', settings => '{\"declare\": \"none\"}'").await?;
    let _relay = site.relay().await?;
    site.publish("1").await?;
    site.until("SELECT status = 'failed' AND last_error LIKE '%yields nothing%' FROM outbox_events").await
}

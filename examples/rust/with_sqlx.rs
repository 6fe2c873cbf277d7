//! sqlx: the event in the transaction of the order, and a consumer that works on an event once. Run by hand, not by
//! the tests.
//!
//! Use `&mut **tx` and not the pool, which takes another connection and with it another transaction.

use serde_json::json;
use sqlx::{PgPool, Postgres, Transaction};
use uuid::Uuid;

async fn place_order(tx: &mut Transaction<'_, Postgres>, customer: &str, amount: i64) -> sqlx::Result<i64> {
    let insert = "INSERT INTO orders (customer, amount) VALUES ($1, $2) RETURNING id";
    let id: i64 = sqlx::query_scalar(insert).bind(customer).bind(amount).fetch_one(&mut **tx).await?;
    sqlx::query("SELECT outbox.publish('order.placed', $1, 'order', $2)")
        .bind(json!({ "order_id": id, "customer": customer, "amount": amount }))
        .bind(id.to_string())
        .execute(&mut **tx)
        .await?;
    Ok(id)
}

/// `event_id`: `message_id` of RabbitMQ, the header `webhook-id`. It may come twice.
async fn on_order_placed(tx: &mut Transaction<'_, Postgres>, event_id: Uuid, order_id: i64) -> sqlx::Result<()> {
    let first = sqlx::query_scalar("SELECT outbox.first_time('invoicing', $1)").bind(event_id);
    if first.fetch_one(&mut **tx).await? {
        sqlx::query("INSERT INTO invoices (order_id) VALUES ($1)").bind(order_id).execute(&mut **tx).await?;
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pool = PgPool::connect(&std::env::var("DATABASE_URL")?).await?;
    let mut tx = pool.begin().await?;
    let order_id = place_order(&mut tx, "Ada", 99).await?;
    tx.commit().await?;

    let mut tx = pool.begin().await?;
    place_order(&mut tx, "Bob", 1).await?;
    drop(tx); // The card was refused: neither Bob's order nor its event is there.

    let event_id = Uuid::new_v4();
    for _ in 0..2 {
        let mut tx = pool.begin().await?;
        on_order_placed(&mut tx, event_id, order_id).await?;
        tx.commit().await?;
    }
    Ok(())
}

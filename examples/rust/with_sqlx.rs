//! sqlx: the event in the transaction of the order, and a consumer that works on an event once. Not run by the
//! tests.
//!
//! Use `&mut *tx` and not the pool, which takes another connection and with it another transaction.

use serde_json::json;
use sqlx::PgPool;
use uuid::Uuid;

pub async fn place_order(pool: &PgPool, customer: &str, amount: i64) -> sqlx::Result<i64> {
    let mut tx = pool.begin().await?;
    let insert = "INSERT INTO orders (customer, amount) VALUES ($1, $2) RETURNING id";
    let id: i64 = sqlx::query_scalar(insert).bind(customer).bind(amount).fetch_one(&mut *tx).await?;
    sqlx::query("SELECT outbox.publish('order.placed', $1, 'order', $2)")
        .bind(json!({ "order_id": id, "customer": customer, "amount": amount }))
        .bind(id.to_string())
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(id)
}

/// `event_id`: `message_id` of RabbitMQ, the header `webhook-id`. It may come twice.
pub async fn on_order_placed(pool: &PgPool, event_id: Uuid, order_id: i64) -> sqlx::Result<()> {
    let mut tx = pool.begin().await?;
    let first = sqlx::query_scalar("SELECT outbox.first_time('invoicing', $1)").bind(event_id);
    if first.fetch_one(&mut *tx).await? {
        sqlx::query("INSERT INTO invoices (order_id) VALUES ($1)").bind(order_id).execute(&mut *tx).await?;
    }
    tx.commit().await
}

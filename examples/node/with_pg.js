// node-postgres: the event in the transaction of the order, and a consumer that works on an event once.
//
// A transaction belongs to one client. pool.query() takes any client of the pool, each time another one: never use it
// between BEGIN and COMMIT.
const { randomUUID } = require("node:crypto");
const { Pool } = require("pg");

async function inTransaction(pool, work) {
  const client = await pool.connect();
  try {
    await client.query("BEGIN");
    const result = await work(client);
    await client.query("COMMIT");
    return result;
  } catch (error) {
    await client.query("ROLLBACK");
    throw error;
  } finally {
    client.release();
  }
}

async function placeOrder(client, customer, amount) {
  const insert = "INSERT INTO orders (customer, amount) VALUES ($1, $2) RETURNING id";
  const { rows: [order] } = await client.query(insert, [customer, amount]);
  const data = { order_id: Number(order.id), customer, amount };
  await client.query("SELECT outbox.publish('order.placed', $1, 'order', $2)", [data, order.id]);
  return order.id;
}

// eventId: message_id of RabbitMQ, the header webhook-id. It may come twice.
async function onOrderPlaced(client, eventId, data) {
  const { rows: [{ first }] } = await client.query("SELECT outbox.first_time('invoicing', $1) AS first", [eventId]);
  if (first) await client.query("INSERT INTO invoices (order_id) VALUES ($1)", [data.order_id]);
}

async function main() {
  const pool = new Pool({ connectionString: process.env.DATABASE_URL });
  const orderId = await inTransaction(pool, (client) => placeOrder(client, "Ada", 99));
  await inTransaction(pool, async (client) => {
    await placeOrder(client, "Bob", 1);
    throw new Error("the card was refused");
  }).catch((error) => {
    // Neither Bob's order nor its event is there.
    if (error.message !== "the card was refused") throw error;
  });
  const eventId = randomUUID();
  for (let time = 0; time < 2; time++) {
    await inTransaction(pool, (client) => onOrderPlaced(client, eventId, { order_id: orderId }));
  }
  await pool.end();
}

main();

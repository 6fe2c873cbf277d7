// TypeORM: the event in the transaction of the entities, and a consumer that works on an event once. Run by hand, not
// by the tests.
//
// Use the manager that the transaction hands over. That of the data source has connections of its own.
const { randomUUID } = require("node:crypto");
const { DataSource, EntitySchema } = require("typeorm");

const Order = new EntitySchema({
  name: "Order",
  tableName: "orders",
  columns: {
    id: { type: "bigint", primary: true, generated: "identity" },
    customer: { type: "text" },
    amount: { type: "numeric" },
  },
});

const Invoice = new EntitySchema({
  name: "Invoice",
  tableName: "invoices",
  columns: { orderId: { type: "bigint", name: "order_id", primary: true } },
});

async function placeOrder(manager, customer, amount) {
  const order = await manager.save(Order, { customer, amount });
  const data = JSON.stringify({ order_id: Number(order.id), customer, amount });
  await manager.query("SELECT outbox.publish('order.placed', $1, 'order', $2)", [data, String(order.id)]);
  return order.id;
}

// eventId: message_id of RabbitMQ, the header webhook-id. It may come twice.
async function onOrderPlaced(manager, eventId, data) {
  const [{ first }] = await manager.query("SELECT outbox.first_time('invoicing', $1) AS first", [eventId]);
  if (first) await manager.insert(Invoice, { orderId: data.order_id });
}

async function main() {
  const shop = new DataSource({ type: "postgres", url: process.env.DATABASE_URL, entities: [Order, Invoice] });
  await shop.initialize();
  const orderId = await shop.transaction((manager) => placeOrder(manager, "Ada", 99));
  await shop.transaction(async (manager) => {
    await placeOrder(manager, "Bob", 1);
    throw new Error("the card was refused");
  }).catch((error) => {
    // Neither Bob's order nor its event is there.
    if (error.message !== "the card was refused") throw error;
  });
  const eventId = randomUUID();
  for (let time = 0; time < 2; time++) {
    await shop.transaction((manager) => onOrderPlaced(manager, eventId, { order_id: orderId }));
  }
  await shop.destroy();
}

main();

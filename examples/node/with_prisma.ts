// Prisma 7: the event in an interactive transaction, and a consumer that works on an event once. The schema has models Order
// and Invoice of examples/schema.sql; `npx prisma generate` makes ./generated of it. Run by hand, not by the tests.
//
// $queryRaw of `tx` runs on the transaction's connection; that of `prisma` would run on another one. The casts are needed:
// Prisma sends texts. A model for outbox_events would read back all columns, for which the role needs
// outbox.grant_producer('shop', may_read => true).
import { randomUUID } from "node:crypto";
import { PrismaPg } from "@prisma/adapter-pg";
import { type Prisma, PrismaClient } from "./generated/client";

async function placeOrder(tx: Prisma.TransactionClient, customer: string, amount: number) {
  const order = await tx.order.create({ data: { customer, amount } });
  const data = JSON.stringify({ order_id: Number(order.id), customer, amount });
  await tx.$queryRaw`SELECT outbox.publish('order.placed', ${data}::jsonb, 'order', ${String(order.id)})::text`;
  return order.id;
}

// eventId: message_id of RabbitMQ, the header webhook-id. It may come twice.
async function onOrderPlaced(tx: Prisma.TransactionClient, eventId: string, data: { order_id: bigint }) {
  const [{ first }] = await tx.$queryRaw<{ first: boolean }[]>`
    SELECT outbox.first_time('invoicing', ${eventId}::uuid) AS first`;
  if (first) await tx.invoice.create({ data: { orderId: data.order_id } });
}

async function main() {
  const prisma = new PrismaClient({ adapter: new PrismaPg({ connectionString: process.env.DATABASE_URL }) });
  const orderId = await prisma.$transaction((tx) => placeOrder(tx, "Ada", 99));
  await prisma.$transaction(async (tx) => {
    await placeOrder(tx, "Bob", 1);
    throw new Error("the card was refused");
  }).catch((error) => {
    // Neither Bob's order nor its event is there.
    if (error.message !== "the card was refused") throw error;
  });
  const eventId = randomUUID();
  for (let time = 0; time < 2; time++) {
    await prisma.$transaction((tx) => onOrderPlaced(tx, eventId, { order_id: orderId }));
  }
  await prisma.$disconnect();
}

main();

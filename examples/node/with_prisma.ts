// Prisma: the event in an interactive transaction, and a consumer that works on an event once. Not run by the tests.
//
// $queryRaw of `tx` runs on the transaction's connection; that of `prisma` would run on another one. The casts are needed:
// Prisma sends texts. A model for outbox_events would read back all columns, for which the role needs
// outbox.grant_producer('shop', may_read => true).
import { PrismaClient } from "@prisma/client";

const prisma = new PrismaClient();

export async function placeOrder(customer: string, amount: number) {
  return prisma.$transaction(async (tx) => {
    const order = await tx.order.create({ data: { customer, amount } });
    const data = JSON.stringify({ order_id: Number(order.id), customer, amount });
    await tx.$queryRaw`SELECT outbox.publish('order.placed', ${data}::jsonb, 'order', ${String(order.id)})::text`;
    return order.id;
  });
}

export async function onOrderPlaced(eventId: string, data: { order_id: number }) {
  await prisma.$transaction(async (tx) => {
    const [{ first }] = await tx.$queryRaw<{ first: boolean }[]>`
      SELECT outbox.first_time('invoicing', ${eventId}::uuid) AS first`;
    if (first) await tx.invoice.create({ data: { order_id: data.order_id } });
  });
}

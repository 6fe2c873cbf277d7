// TypeORM: the event in the transaction of the entities, and a consumer that works on an event once. Not run by the tests.
//
// Use the manager that the transaction hands over. That of the data source has connections of its own.
import { DataSource } from "typeorm";
import { Invoice, Order } from "./entities";

export async function placeOrder(dataSource: DataSource, customer: string, amount: number) {
  return dataSource.transaction(async (manager) => {
    const order = await manager.save(Order, { customer, amount });
    const data = JSON.stringify({ order_id: Number(order.id), customer, amount });
    await manager.query("SELECT outbox.publish('order.placed', $1, 'order', $2)", [data, String(order.id)]);
    return order.id;
  });
}

export async function onOrderPlaced(dataSource: DataSource, eventId: string, data: { order_id: number }) {
  await dataSource.transaction(async (manager) => {
    const [{ first }] = await manager.query("SELECT outbox.first_time('invoicing', $1) AS first", [eventId]);
    if (first) await manager.insert(Invoice, { orderId: data.order_id });
  });
}

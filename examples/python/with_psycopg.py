"""psycopg 3: the event in the transaction of the order, and a consumer that works on an event once."""

import os
import uuid

import psycopg
from psycopg.types.json import Jsonb


def place_order(connection, customer, amount):
    with connection.transaction():
        insert = "INSERT INTO orders (customer, amount) VALUES (%s, %s) RETURNING id"
        [order_id] = connection.execute(insert, (customer, amount)).fetchone()
        data = Jsonb({"order_id": order_id, "customer": customer, "amount": amount})
        connection.execute("SELECT outbox.publish('order.placed', %s, 'order', %s)", (data, str(order_id)))
    return order_id


def on_order_placed(connection, event_id, data):
    """event_id: message_id of RabbitMQ, the header webhook-id. It may come twice."""
    with connection.transaction():
        [first] = connection.execute("SELECT outbox.first_time('invoicing', %s)", (event_id,)).fetchone()
        if first:
            connection.execute("INSERT INTO invoices (order_id) VALUES (%s)", (data["order_id"],))


if __name__ == "__main__":
    # Without autocommit, transaction() would be a savepoint of a transaction that nobody commits.
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        order_id = place_order(connection, "Ada", 99)
        try:
            with connection.transaction():
                place_order(connection, "Bob", 1)
                raise ValueError("the card was refused")
        except ValueError:
            pass  # Neither Bob's order nor its event is there.
        event_id = uuid.uuid4()
        for _ in range(2):
            on_order_placed(connection, event_id, {"order_id": order_id})

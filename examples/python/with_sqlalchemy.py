"""SQLAlchemy 2: the event in the session's transaction, and a consumer that works on an event once.

The session's own connection runs the function, so the event is committed or rolled back with the objects of the session.
flush() comes first where the event needs a key that the database makes.
"""

import os
import uuid
from decimal import Decimal

from sqlalchemy import cast, create_engine, func, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    amount: Mapped[Decimal]


class Invoice(Base):
    __tablename__ = "invoices"
    order_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


def publish(session, event_type, data, aggregate_type, aggregate_id):
    call = func.outbox.publish(event_type, cast(data, JSONB), aggregate_type, str(aggregate_id))
    return session.scalar(select(call))


def place_order(session, customer, amount):
    order = Order(customer=customer, amount=amount)
    session.add(order)
    session.flush()
    publish(session, "order.placed", {"order_id": order.id, "amount": amount}, "order", order.id)
    return order.id


def on_order_placed(session, event_id, data):
    if session.scalar(select(func.outbox.first_time("invoicing", event_id))):
        session.add(Invoice(order_id=data["order_id"]))


if __name__ == "__main__":
    engine = create_engine(os.environ["DATABASE_URL"].replace("postgres://", "postgresql+psycopg://"))
    with Session(engine) as session, session.begin():
        order_id = place_order(session, "Ada", 99)
    try:
        with Session(engine) as session, session.begin():
            place_order(session, "Bob", 1)
            raise ValueError("the card was refused")
    except ValueError:
        pass  # Neither Bob's order nor its event is there.
    event_id = uuid.uuid4()
    for _ in range(2):
        with Session(engine) as session, session.begin():
            on_order_placed(session, event_id, {"order_id": order_id})

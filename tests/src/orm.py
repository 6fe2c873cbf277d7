"""What an application with SQLAlchemy and psycopg does with its outbox table; prints what it saw."""
import sys, uuid
import psycopg
from sqlalchemy import Column, FetchedValue, MetaData, String, Table, create_engine, func, insert, select
from sqlalchemy.orm import DeclarativeBase, Session

url = sys.argv[1]
engine = create_engine(url.replace("postgres://", "postgresql+psycopg://", 1))
saw = []


class Base(DeclarativeBase):
    pass


# Reflection reads the columns of a view as those of a table; the ORM wants to be told the key.
table = Table("outbox_events", Base.metadata, autoload_with=engine)
for name in ("id", "event_id", "status", "created_at", "retry_count", "seq", "length", "metadata"):
    table.c[name].server_default = table.c[name].server_default or FetchedValue()


class Event(Base):
    __table__ = table
    __mapper_args__ = {"primary_key": [table.c.id], "exclude_properties": ["metadata"]}


def event(name, **more):
    return Event(aggregate_id=uuid.uuid4(), aggregate_type="orm", event_type=name, event_data={"n": 1}, **more)


with Session(engine) as session:
    one = event("orm.one")
    session.add(one)
    session.flush()
    saw.append((one.status, one.retry_count, one.length, one.id is not None, one.created_at is not None))
    session.add_all([event("orm.many", tags=["x", "y"], amount=2) for _ in range(50)])
    session.commit()
    again = session.get(Event, one.id)
    saw.append((again.event_type, again.event_id == one.event_id, again.event_data))
    again.event_data = {"n": 2}
    session.commit()
    saw.append(session.scalar(select(Event.event_data).where(Event.event_id == again.event_id)))
    saw.append(session.scalar(select(func.count()).where(Event.event_type == "orm.many", Event.status == "pending")))
    session.delete(again)
    session.commit()
    saw.append(session.get(Event, one.id))
with engine.begin() as connection:
    rows = connection.execute(insert(table).returning(table.c.status, table.c.length), [
        {"aggregate_id": uuid.uuid4(), "aggregate_type": "orm", "event_type": "orm.core", "event_data": {}} for _ in range(3)])
    saw.append([tuple(row) for row in rows])
with psycopg.connect(url) as connection:
    for _ in range(10):   # psycopg prepares it at the sixth
        cursor = connection.execute("INSERT INTO outbox_events (aggregate_id, aggregate_type, event_type, event_data) "
                                    "VALUES (%s, 'raw', 'orm.raw', '{}') RETURNING status", (uuid.uuid4(),))
        saw.append(cursor.fetchone())
    with connection.cursor() as cursor:
        with cursor.copy("COPY outbox_events (aggregate_id, aggregate_type, event_type, event_data) FROM STDIN") as copy:
            for _ in range(3):
                copy.write_row((uuid.uuid4(), "raw", "orm.copy", "{}"))
    polled = connection.execute("SELECT event_type FROM outbox_events WHERE status = 'pending' AND event_type LIKE 'orm.%' "
                                "ORDER BY created_at LIMIT 1000 FOR UPDATE SKIP LOCKED").fetchall()
    saw.append(len(polled))
    connection.execute("DELETE FROM outbox_events WHERE event_type LIKE 'orm.%'")
print(saw)

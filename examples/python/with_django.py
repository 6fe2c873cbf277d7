"""Django 5: the event as a model in transaction.atomic(), and a consumer that works on an event once.

Django inserts all fields of a model, so the model has just those that a producer may name; `managed = False`, because
migrations must not make the table. on_commit() is the opposite of an outbox: what it does is lost if the process dies.
"""

import os
import uuid
from urllib.parse import urlparse

import django
from django.conf import settings

url = urlparse(os.environ["DATABASE_URL"])
settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": url.hostname,
            "PORT": url.port,
            "USER": url.username,
            "PASSWORD": url.password,
            "NAME": url.path[1:],
        }
    },
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
django.setup()

from django.db import connection, models, transaction  # noqa: E402


class OutboxEvent(models.Model):
    event_id = models.UUIDField(default=uuid.uuid4)
    event_type = models.TextField()
    aggregate_type = models.TextField(null=True)
    aggregate_id = models.TextField(null=True)
    event_data = models.JSONField()
    metadata = models.JSONField(default=dict)

    class Meta:
        app_label = "shop"
        db_table = "outbox_events"
        managed = False


class Order(models.Model):
    customer = models.TextField()
    amount = models.DecimalField(max_digits=12, decimal_places=2)

    class Meta:
        app_label = "shop"
        db_table = "orders"
        managed = False


class Invoice(models.Model):
    order_id = models.BigIntegerField(primary_key=True)

    class Meta:
        app_label = "shop"
        db_table = "invoices"
        managed = False


@transaction.atomic
def place_order(customer, amount):
    order = Order.objects.create(customer=customer, amount=amount)
    OutboxEvent.objects.create(
        event_type="order.placed",
        aggregate_type="order",
        aggregate_id=str(order.pk),
        event_data={"order_id": order.pk, "amount": amount},
    )
    return order.pk


@transaction.atomic
def on_order_placed(event_id, data):
    with connection.cursor() as cursor:
        cursor.execute("SELECT outbox.first_time('invoicing', %s)", [event_id])
        [first] = cursor.fetchone()
    if first:
        Invoice.objects.create(order_id=data["order_id"])


if __name__ == "__main__":
    order_id = place_order("Ada", 99)
    try:
        with transaction.atomic():
            place_order("Bob", 1)
            raise ValueError("the card was refused")
    except ValueError:
        pass  # Neither Bob's order nor its event is there.
    event_id = uuid.uuid4()
    for _ in range(2):
        on_order_placed(event_id, {"order_id": order_id})

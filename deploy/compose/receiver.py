"""Prints each message that arrives: webhooks on port 8080, and what the exchange outbox_events publishes."""

import json
import os
import threading
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pika


def show(way, event_id, event_type, data):
    now = datetime.now(timezone.utc).strftime("%H:%M:%S.%f")[:-3]
    print(f"{now}  {way:<8}  {event_type:<20}  {event_id}  {data}", flush=True)


class Webhook(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        show("webhook", self.headers["webhook-id"], body["type"], json.dumps(body["data"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def arrived(channel, method, properties, body):
    show("rabbitmq", properties.message_id, properties.type, body.decode())
    channel.basic_ack(method.delivery_tag)


server = ThreadingHTTPServer(("", int(os.environ.get("PORT", "8080"))), Webhook)
threading.Thread(target=server.serve_forever, daemon=True).start()
channel = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"])).channel()
channel.exchange_declare("outbox_events", exchange_type="topic", durable=True)
channel.queue_declare("receiver", durable=True)
channel.queue_bind("receiver", "outbox_events", "#")
channel.basic_consume("receiver", arrived)
print("waiting for events", flush=True)
channel.start_consuming()

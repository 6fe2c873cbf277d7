-- What `docker compose up` begins with: the extension, the relay's role, two destinations and three events.
CREATE EXTENSION pg_outbox;
CREATE ROLE relay LOGIN PASSWORD 'relay';
SELECT outbox.grant_relay('relay'), outbox.grant_operator('relay');
SELECT outbox.add_rabbitmq('events');
SELECT outbox.add_webhook('receiver', 'http://receiver:8080/');
SELECT outbox.publish('order.placed', jsonb_build_object('order', n, 'total', n * 10), 'order', n::text) FROM generate_series(1, 3) AS n;

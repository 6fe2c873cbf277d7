-- Read-only windows for operators and monitors. They show no secret.

CREATE VIEW outbox.destinations AS
SELECT d.name, d.kind, d.event_types, d.tenant_id, d.filter, d.exchange, d.routing_key, d.url, d.settings,
       CASE WHEN d.disabled_reason IS NOT NULL THEN 'disabled'
            WHEN d.paused THEN 'paused'
            WHEN d.circuit_failures = 0 AND d.unable_at IS NOT NULL THEN 'open'
            WHEN d.circuit_failures = 0 THEN 'active'
            WHEN d.circuit_open_until > clock_timestamp() THEN 'open'
            ELSE 'half-open' END AS state,
       d.circuit_failures, d.circuit_open_until, coalesce(d.disabled_reason, d.last_error) AS last_error, d.created_at,
       EXISTS (SELECT FROM outbox.secret s WHERE s.destination = d.name AND s.expires_at > clock_timestamp()) AS rotating
  FROM outbox.destination d;
COMMENT ON VIEW outbox.destinations IS
    'destinations with their state: active, paused, disabled, open (circuit breaker) or half-open; no secrets';

CREATE VIEW outbox.deliveries AS
SELECT d.id AS event, e.event_id, e.event_type, e.aggregate_type, e.aggregate_id, nullif(d.destination, '') AS destination,
       d.status, d.attempts, d.next_attempt_at, d.last_error, e.created_at
  FROM outbox.delivery d JOIN @extschema@.outbox_events e ON e.id = d.id
UNION ALL
SELECT e.id, e.event_id, e.event_type, e.aggregate_type, e.aggregate_id, NULL, 'scheduled', 0, e.available_at, NULL, e.created_at
  FROM @extschema@.outbox_events e
 WHERE e.available_at IS NOT NULL AND NOT e.routed AND e.status = 'pending' AND NOT e.listed;
COMMENT ON VIEW outbox.deliveries IS
    'what is outstanding or dead: event (id), destination (null: not routed yet), status, attempts, next_attempt_at, last_error';

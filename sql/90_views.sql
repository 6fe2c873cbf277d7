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
COMMENT ON COLUMN outbox.destinations.name IS '1 to 63 letters, digits, dots, dashes and underscores';
COMMENT ON COLUMN outbox.destinations.kind IS 'rabbitmq or webhook';
COMMENT ON COLUMN outbox.destinations.event_types IS 'patterns of the types of events that it wants';
COMMENT ON COLUMN outbox.destinations.tenant_id IS 'wants events of this tenant only; null: of any, and of none';
COMMENT ON COLUMN outbox.destinations.filter IS 'wants events whose event_data passes it; null: all';
COMMENT ON COLUMN outbox.destinations.exchange IS 'template of the exchange of a RabbitMQ destination';
COMMENT ON COLUMN outbox.destinations.routing_key IS 'template of the routing key of a RabbitMQ destination';
COMMENT ON COLUMN outbox.destinations.url IS 'where a webhook is sent, without the query';
COMMENT ON COLUMN outbox.destinations.settings IS 'as given, without the values of headers, client_key and the login of proxy';
COMMENT ON COLUMN outbox.destinations.state IS
    'active; paused; disabled: a 410, or no success for disable_after; open: it is down, or no relay that tried can serve it; half-open';
COMMENT ON COLUMN outbox.destinations.circuit_failures IS 'how often in a row it was down';
COMMENT ON COLUMN outbox.destinations.circuit_open_until IS 'when the next probe may go out';
COMMENT ON COLUMN outbox.destinations.last_error IS 'why it is disabled, or why it was last down';
COMMENT ON COLUMN outbox.destinations.created_at IS 'when it was added';
COMMENT ON COLUMN outbox.destinations.rotating IS 'the previous secret signs too';

CREATE VIEW outbox.deliveries AS
SELECT d.id AS event, e.event_id, e.event_type, e.aggregate_type, e.aggregate_id, nullif(d.destination, '') AS destination,
       d.status, d.attempts, d.next_attempt_at, d.last_error, e.created_at
  FROM outbox.delivery d JOIN @extschema@.outbox_events e ON e.id = d.id
UNION ALL
SELECT e.id, e.event_id, e.event_type, e.aggregate_type, e.aggregate_id, NULL, 'scheduled', 0, e.available_at, NULL, e.created_at
  FROM @extschema@.outbox_events e
 WHERE e.available_at IS NOT NULL AND NOT e.routed AND e.status = 'pending' AND NOT e.listed;
COMMENT ON VIEW outbox.deliveries IS
    'outstanding and dead deliveries, a row for each event and destination; one that succeeds at the first attempt never has a row';
COMMENT ON COLUMN outbox.deliveries.event IS 'id of the event';
COMMENT ON COLUMN outbox.deliveries.event_id IS 'of the event';
COMMENT ON COLUMN outbox.deliveries.event_type IS 'of the event';
COMMENT ON COLUMN outbox.deliveries.aggregate_type IS 'of the event';
COMMENT ON COLUMN outbox.deliveries.aggregate_id IS 'of the event';
COMMENT ON COLUMN outbox.deliveries.destination IS 'name; null: not routed yet (scheduled, or there is no destination)';
COMMENT ON COLUMN outbox.deliveries.status IS 'scheduled, pending, processing or failed (a dead letter)';
COMMENT ON COLUMN outbox.deliveries.attempts IS 'failed attempts at this destination';
COMMENT ON COLUMN outbox.deliveries.next_attempt_at IS 'when it is tried next; null with pending: behind an earlier event of its aggregate';
COMMENT ON COLUMN outbox.deliveries.last_error IS 'the last failure at this destination';
COMMENT ON COLUMN outbox.deliveries.created_at IS 'of the event';

-- What became of an event at each destination. Deliveries tell it while they are outstanding or dead. What was delivered has
-- none: then it follows from what the destinations want now, and from when they were added.
CREATE FUNCTION outbox.event(event_id uuid) RETURNS jsonb
    LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET timezone = 'UTC'
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_event record;
    v_fresh boolean;
    v_listed_at timestamptz;
    v_destinations jsonb;
BEGIN
    SELECT e.* INTO v_event FROM @extschema@.outbox_events e WHERE e.event_id = event.event_id;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    v_fresh := v_event.status = 'pending' AND NOT v_event.listed;
    -- A destination that was added later had no part in it.
    v_listed_at := CASE WHEN v_event.status = 'processed' THEN coalesce(v_event.processed_at, v_event.created_at)
                        ELSE (SELECT min(d.owed_since) FROM outbox.delivery d WHERE d.id = v_event.id) END;
    SELECT jsonb_object_agg(x.name, jsonb_build_object('status', x.status, 'attempts', x.attempts,
                                                       'next_attempt_at', x.next_attempt_at, 'last_error', x.last_error))
      INTO v_destinations
      FROM (SELECT d.destination AS name, d.status, d.attempts, d.next_attempt_at, d.last_error
              FROM outbox.delivery d WHERE d.id = v_event.id
            UNION ALL
            SELECT t.name, CASE WHEN v_fresh THEN 'pending' WHEN v_event.claim_token IS NOT NULL THEN 'processing' ELSE 'delivered' END,
                   CASE WHEN v_fresh OR v_event.claim_token IS NOT NULL THEN 0 END,
                   CASE WHEN v_fresh THEN v_event.available_at END, NULL
              FROM outbox.destination t
             WHERE t.name = ANY (
                   CASE WHEN v_event.event_type = 'outbox.test' AND v_event.listed
                        THEN ARRAY[v_event.event_data ->> 'destination']
                        ELSE ARRAY(SELECT r.destination FROM outbox._routes(ARRAY[v_event.id]) r) END)
               AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = v_event.id AND d.destination = t.name)
               AND CASE WHEN v_fresh THEN true
                        WHEN v_event.claim_token IS NOT NULL THEN t.since_token < v_event.claim_token
                        ELSE t.created_at <= v_listed_at END) x;
    RETURN (to_jsonb(v_event) - ARRAY['claim_token', 'listed', 'routed'])
        || jsonb_build_object('destinations', coalesce(v_destinations, '{}'));
END
$$;
COMMENT ON FUNCTION outbox.event(uuid) IS
    'the event and, by destination, what became of it: pending, processing, failed or delivered; null: no such event';

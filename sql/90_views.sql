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

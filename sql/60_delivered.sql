-- Settling what was delivered.

-- Events that reached every destination of their claim. The common case changes one row, the event's.
CREATE FUNCTION outbox._delivered(v_tokens bigint[], v_ids bigint[]) RETURNS bigint
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_done bigint[];
    v_gone record;
BEGIN
    WITH done AS (
        UPDATE @extschema@.outbox_events e
           SET status = CASE WHEN e.listed THEN outbox._rest(e.id) ELSE 'processed' END,
               processed_at = CASE WHEN e.listed AND outbox._rest(e.id) <> 'processed' THEN NULL ELSE clock_timestamp() END,
               claim_token = NULL
          FROM unnest(v_tokens, v_ids) AS s (token, id)
         WHERE e.id BETWEEN s.id AND s.id AND e.claim_token = s.token AND e.status = 'processing'
        RETURNING s.token
    )
    SELECT array_agg(token) INTO v_done FROM done;
    PERFORM outbox._let_go(v_done);
    IF coalesce(cardinality(v_done), 0) = cardinality(v_ids) THEN
        RETURN coalesce(cardinality(v_done), 0);
    END IF;
    WITH gone AS (
        DELETE FROM outbox.delivery d
         WHERE d.ctid = ANY (ARRAY(
               SELECT x.at FROM unnest(v_tokens, v_ids) AS s (token, id)
                CROSS JOIN LATERAL (SELECT y.ctid AS at FROM outbox.delivery y
                                     WHERE y.id = s.id AND y.claim_token IS NOT DISTINCT FROM s.token OFFSET 0) x
                WHERE s.token IS NOT NULL))
        RETURNING d.id, d.destination, d.ordering_key, d.claim_token
    )
    SELECT array_agg(id) AS ids, array_agg(destination) AS destinations, array_agg(ordering_key) AS keys,
           array_agg(claim_token) AS tokens, count(DISTINCT id) AS events
      INTO v_gone FROM gone;
    IF v_gone.ids IS NOT NULL THEN
        PERFORM outbox._left_claim(v_gone.ids, v_gone.destinations, v_gone.keys, v_gone.tokens);
        PERFORM outbox._close_circuits(v_gone.destinations);
    END IF;
    RETURN coalesce(cardinality(v_done), 0) + v_gone.events;
END
$$;
COMMENT ON FUNCTION outbox._delivered(bigint[], bigint[]) IS 'settles events delivered to all that their claim handed out';

-- Exceptions with the outcome delivered: one destination has the event while another is still at work or failed.
CREATE FUNCTION outbox._delivered_to(v_exceptions jsonb) RETURNS bigint
    LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_ids bigint[];
    v_tokens bigint[];
    v_destinations text[];
    v_gone record;
BEGIN
    SELECT array_agg(x.id), array_agg(x.token), array_agg(x.destination) INTO v_ids, v_tokens, v_destinations
      FROM jsonb_to_recordset(v_exceptions) AS x (token bigint, id bigint, destination text, outcome text)
     WHERE x.outcome = 'delivered';
    IF v_ids IS NULL THEN
        RETURN 0;
    END IF;
    WITH gone AS (
        DELETE FROM outbox.delivery d
         WHERE d.ctid = ANY (ARRAY(
               SELECT x.at FROM unnest(v_tokens, v_ids, v_destinations) AS s (token, id, destination)
                CROSS JOIN LATERAL (SELECT y.ctid AS at FROM outbox.delivery y
                                     WHERE y.id = s.id AND y.destination = s.destination
                                       AND y.claim_token IS NOT DISTINCT FROM s.token OFFSET 0) x
                WHERE s.token IS NOT NULL))
        RETURNING d.id, d.destination, d.ordering_key, d.claim_token
    )
    SELECT array_agg(id) AS ids, array_agg(destination) AS destinations, array_agg(ordering_key) AS keys,
           array_agg(claim_token) AS tokens, count(*) AS n
      INTO v_gone FROM gone;
    IF v_gone.n > 0 THEN
        PERFORM outbox._left_claim(v_gone.ids, v_gone.destinations, v_gone.keys, v_gone.tokens);
        PERFORM outbox._close_circuits(v_gone.destinations);
    END IF;
    RETURN v_gone.n;
END
$$;
COMMENT ON FUNCTION outbox._delivered_to(jsonb) IS 'settles single deliveries that succeeded';

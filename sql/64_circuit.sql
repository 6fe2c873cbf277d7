-- The circuit breaker of each destination. Closed: deliveries flow. Open until a moment: nothing is handed out, nothing
-- uses an attempt. Half open after that moment: one event probes; success closes the circuit, failure opens it for longer.

CREATE FUNCTION outbox._open_circuit(v_destination text, v_error text, v_retry_in interval) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_until timestamptz;
BEGIN
    UPDATE outbox.destination t
       SET circuit_failures = t.circuit_failures + 1, last_error = v_error,
           circuit_open_until = clock_timestamp()
               + coalesce(v_retry_in, (0.5 + random() / 2) * least(interval '30 seconds',
                                           interval '250 milliseconds' * power(2, least(t.circuit_failures, 20))))
     WHERE t.name = v_destination AND coalesce(t.circuit_open_until, '-infinity') <= clock_timestamp()
    RETURNING t.circuit_open_until INTO v_until;
    PERFORM outbox._timer(v_until);
END
$$;
COMMENT ON FUNCTION outbox._open_circuit(text, text, interval) IS
    'a destination is down as a whole: it is left alone for a while, longer each time (up to 30 s)';

CREATE FUNCTION outbox._close_circuits(v_destinations text[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE outbox.destination t SET circuit_failures = 0, circuit_open_until = NULL
     WHERE t.name = ANY (v_destinations) AND t.circuit_failures > 0;
    IF FOUND THEN
        PERFORM outbox._wake('due');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._close_circuits(text[]) IS 'a destination answered: its deliveries flow again';

CREATE FUNCTION outbox._disable(v_destination text, v_reason text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE outbox.destination t SET disabled_reason = coalesce(v_reason, 'gone'), last_error = v_reason
     WHERE t.name = v_destination AND t.disabled_reason IS NULL;
    PERFORM outbox._destinations_changed(v_destination);
END
$$;
COMMENT ON FUNCTION outbox._disable(text, text) IS 'a destination asked not to be called again; outbox.resume() ends that';

-- The relay's call: everything that became known since the last one.
CREATE FUNCTION outbox.settle(
    tokens bigint[], ids bigint[], exceptions jsonb DEFAULT '[]', OUT settled bigint, OUT latencies float8[])
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0 SET lock_timeout = 0
AS $$
#variable_conflict use_column
DECLARE
    v_count bigint := 0;
    v_row record;
    v_changed boolean;
BEGIN
    IF tokens IS NULL OR ids IS NULL OR cardinality(tokens) <> cardinality(ids)
       OR coalesce(jsonb_typeof(exceptions), '') <> 'array' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'tokens and ids must be arrays of one length and exceptions a JSON array',
            HINT = 'Each id goes with the claim_token that it was handed out with.';
    END IF;
    PERFORM outbox._lock();
    SELECT p.tokens, p.ids, p.exceptions, p.postponed INTO tokens, ids, exceptions, v_count
      FROM outbox._postpone(tokens, ids, exceptions) p;
    IF cardinality(ids) > 0 THEN
        v_count := v_count + outbox._delivered(tokens, ids);
    END IF;
    IF exceptions <> '[]' THEN
        PERFORM outbox._expand(ARRAY(SELECT h.id FROM jsonb_to_recordset(exceptions) AS x (token bigint, id bigint)
                                      CROSS JOIN LATERAL (SELECT e.id FROM @extschema@.outbox_events e
                                                           WHERE e.id = x.id AND e.claim_token = x.token OFFSET 0) h));
        PERFORM outbox._expand_lines(array_agg(x.token), array_agg(x.id))
           FROM jsonb_to_recordset(exceptions) AS x (token bigint, id bigint, outcome text)
          WHERE x.outcome IS DISTINCT FROM 'delivered' HAVING count(*) > 0;
        v_count := v_count + outbox._delivered_to(exceptions);
        FOR v_row IN
            SELECT x.token, x.id, x.destination, x.outcome, x.error, make_interval(secs => x.retry_in) AS retry_in
              FROM jsonb_to_recordset(exceptions)
                   AS x (token bigint, id bigint, destination text, outcome text, error text, retry_in float8)
             WHERE x.outcome IS DISTINCT FROM 'delivered' ORDER BY x.id
        LOOP
            CASE v_row.outcome
            WHEN 'failed', 'rejected', 'unavailable' THEN
                v_changed := outbox._failed(v_row.token, v_row.id, v_row.destination, v_row.outcome, v_row.error, v_row.retry_in);
            WHEN 'gone' THEN
                v_changed := outbox._failed(v_row.token, v_row.id, v_row.destination, 'rejected', v_row.error, NULL);
                PERFORM outbox._disable(v_row.destination, v_row.error) WHERE v_changed;
            WHEN 'released' THEN
                v_changed := outbox._release_one(v_row.token, v_row.id, v_row.destination);
            ELSE
                RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                    MESSAGE = format('unknown outcome %s', coalesce(quote_literal(v_row.outcome), 'null')),
                    HINT = 'Outcomes are delivered, failed, rejected, unavailable, gone and released.';
            END CASE;
            v_count := v_count + v_changed::int;
        END LOOP;
    END IF;
    PERFORM outbox._settled(v_count > 0);
    settled := v_count;
    latencies := outbox._latencies();
END
$$;
COMMENT ON FUNCTION outbox.settle(bigint[], bigint[], jsonb) IS
    'settles many events of many claims at once; exceptions lists what did not go to every destination alike. settled: what the tokens held; latencies: seconds, of each event that is processed now';

-- The exceptions that say «delivered»: to this destination, while another one of the event is still at work or failed.
CREATE FUNCTION outbox._delivered_to(v_exceptions jsonb) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
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
        RETURNING d.id, d.destination, d.aggregate_key, d.claim_token
    )
    SELECT array_agg(id) AS ids, array_agg(destination) AS destinations, array_agg(aggregate_key) AS keys,
           array_agg(claim_token) AS tokens, count(*) AS n
      INTO v_gone FROM gone;
    IF v_gone.n > 0 THEN
        PERFORM outbox._left_line(v_gone.ids, v_gone.destinations, v_gone.keys, v_gone.tokens);
        PERFORM outbox._close_circuits(v_gone.destinations);
    END IF;
    RETURN v_gone.n;
END
$$;
COMMENT ON FUNCTION outbox._delivered_to(jsonb) IS 'settles single deliveries that succeeded';

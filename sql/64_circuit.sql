-- The circuit breaker of each destination. Closed: deliveries flow. Open until a moment: nothing is handed out, nothing
-- uses an attempt. Half open after that moment: one event probes; success closes the circuit, failure opens it for longer.
--
-- The circuit is the destination's. That one relay can't serve it is the relay's: it is noted for the operator, as long as
-- nobody delivers there, and holds up nobody else.

-- Whether somebody other than this session has just delivered there: then what failed here is not the destination's fault.
CREATE FUNCTION outbox._answers_others(v_destination text) RETURNS boolean
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN EXISTS (SELECT FROM outbox.destination t
                    WHERE t.name = v_destination AND t.last_success_by <> pg_backend_pid()
                      AND t.last_success_at > clock_timestamp() - interval '5 seconds');
END
$$;
COMMENT ON FUNCTION outbox._answers_others(text) IS 'another session has delivered to the destination within seconds';

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

-- What succeeds while the circuit is open was under way before: it does not end the rest that a receiver asked for.
CREATE FUNCTION outbox._close_circuits(v_destinations text[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE outbox.destination t SET circuit_failures = 0, circuit_open_until = NULL
     WHERE t.name = ANY (v_destinations) AND t.circuit_failures > 0
       AND coalesce(t.circuit_open_until, '-infinity') <= clock_timestamp();
    IF FOUND THEN
        PERFORM outbox._wake('due');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._close_circuits(text[]) IS 'a destination answered: its deliveries flow again';

-- Deliveries have succeeded: said by relays now and then, not with each.
CREATE FUNCTION outbox._answered(v_destinations text[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE outbox.destination t
       SET last_success_at = clock_timestamp(), last_success_by = pg_backend_pid(), failing_since = NULL, unable_at = NULL
     WHERE t.name = ANY (v_destinations);
    PERFORM outbox._close_circuits(v_destinations);
END
$$;
COMMENT ON FUNCTION outbox._answered(text[]) IS 'notes that destinations take deliveries';

CREATE FUNCTION outbox._note_unable(v_destinations text[], v_error text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE outbox.destination t SET unable_at = clock_timestamp(), last_error = v_error
     WHERE t.name = ANY (v_destinations) AND NOT outbox._answers_others(t.name)
       AND (t.unable_at IS NULL OR t.last_error IS DISTINCT FROM v_error);
END
$$;
COMMENT ON FUNCTION outbox._note_unable(text[], text) IS
    'a relay can''t serve the destinations: shown unless another one has just delivered there';

CREATE FUNCTION outbox.destination_unable(names text[], error text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._lock();
    PERFORM outbox._note_unable(names, error);
END
$$;
COMMENT ON FUNCTION outbox.destination_unable(text[], text) IS
    'this consumer can''t serve these destinations, and why; what they are owed stays for others';

-- Half open and not closed: what the destination says next decides.
CREATE FUNCTION outbox.destination_back(names text[]) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    PERFORM outbox._lock();
    UPDATE outbox.destination t SET circuit_open_until = least(t.circuit_open_until, clock_timestamp()), unable_at = NULL
     WHERE t.name = ANY (names) AND (t.circuit_open_until > clock_timestamp() OR t.unable_at IS NOT NULL);
    IF FOUND THEN
        PERFORM outbox._wake('due');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox.destination_back(text[]) IS
    'this consumer reaches these destinations again: an open circuit is half open from now on';

-- Every failure counts from the first one since the last success: a destination that never answers is disabled in the end.
CREATE FUNCTION outbox._note_failure(v_destination text, v_kind text, v_settings jsonb, v_error text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_limit interval := outbox._span(v_settings, 'disable_after', CASE v_kind WHEN 'webhook' THEN interval '5 days' END);
    v_since timestamptz;
BEGIN
    UPDATE outbox.destination t SET failing_since = clock_timestamp()
     WHERE t.name = v_destination AND t.failing_since IS NULL;
    SELECT t.failing_since INTO v_since FROM outbox.destination t WHERE t.name = v_destination;
    IF v_limit IS NULL OR clock_timestamp() - v_since < v_limit THEN
        RETURN;
    ELSIF outbox._has_delivered_since(v_destination, v_since) THEN
        UPDATE outbox.destination t SET failing_since = clock_timestamp() WHERE t.name = v_destination;
    ELSE
        PERFORM outbox._disable(v_destination, format('no success since %s: %s',
                                                      to_char(v_since AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'), v_error));
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._note_failure(text, text, jsonb, text) IS
    'an attempt failed: after settings.disable_after without a success the destination is disabled';

-- Relays say so themselves; other consumers may have settled events without telling how a destination is. A bounded look at
-- the latest events, made when a destination is about to be disabled.
CREATE FUNCTION outbox._has_delivered_since(v_destination text, v_since timestamptz) RETURNS boolean
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM (SELECT e.id, e.event_type, e.status, e.processed_at FROM @extschema@.outbox_events e
                      ORDER BY e.id DESC LIMIT 1000) e
          JOIN outbox.destination t ON t.name = v_destination AND e.event_type LIKE ANY (t.like_patterns)
         WHERE e.status = 'processed' AND e.processed_at > v_since);
END
$$;
COMMENT ON FUNCTION outbox._has_delivered_since(text, timestamptz) IS 'an event that the destination wants was processed lately';

CREATE FUNCTION outbox._disable(v_destination text, v_reason text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE outbox.destination t SET disabled_reason = coalesce(v_reason, 'gone'), last_error = v_reason
     WHERE t.name = v_destination AND t.disabled_reason IS NULL;
    PERFORM outbox._destinations_changed(v_destination);
END
$$;
COMMENT ON FUNCTION outbox._disable(text, text) IS
    'a destination asked not to be called again, or has not answered for too long; outbox.resume() ends that';

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
          WHERE x.outcome IS DISTINCT FROM 'delivered' AND x.outcome IS DISTINCT FROM 'answered' HAVING count(*) > 0;
        v_count := v_count + outbox._delivered_to(exceptions);
        PERFORM outbox._answered(array_agg(DISTINCT x.destination))
           FROM jsonb_to_recordset(exceptions) AS x (destination text, outcome text)
          WHERE x.outcome = 'answered' HAVING count(*) > 0;
        FOR v_row IN
            SELECT x.token, x.id, x.destination, x.outcome, x.error,
                   make_interval(secs => CASE WHEN x.retry_in IS NOT NULL THEN least(greatest(x.retry_in, 0), 1e8) END) AS retry_in
              FROM jsonb_to_recordset(exceptions)
                   AS x (token bigint, id bigint, destination text, outcome text, error text, retry_in float8)
             WHERE x.outcome IS DISTINCT FROM 'delivered' AND x.outcome IS DISTINCT FROM 'answered' ORDER BY x.id
        LOOP
            CASE v_row.outcome
            WHEN 'failed', 'rejected', 'unavailable', 'throttled', 'unable' THEN
                v_changed := outbox._failed(v_row.token, v_row.id, v_row.destination, v_row.outcome, v_row.error, v_row.retry_in);
            WHEN 'gone' THEN
                v_changed := outbox._failed(v_row.token, v_row.id, v_row.destination, 'rejected', v_row.error, NULL);
                PERFORM outbox._disable(v_row.destination, v_row.error) WHERE v_changed;
            WHEN 'released' THEN
                v_changed := outbox._release_one(v_row.token, v_row.id, v_row.destination);
            ELSE
                RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                    MESSAGE = format('unknown outcome %s', coalesce(quote_literal(v_row.outcome), 'null')),
                    HINT = 'Outcomes are delivered, failed, rejected, unavailable, throttled, unable, gone, released and answered.';
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

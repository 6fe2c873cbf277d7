-- What did not work out: retries, dead letters, deliveries given back.

-- What claims hold of these events, and of those that stand behind them in their lines, is listed delivery by delivery.
-- Once for all that a settlement reports: whatever is not delivered takes back what is behind it.
CREATE FUNCTION outbox._expand_lines(v_tokens bigint[], v_ids bigint[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off
    SET enable_mergejoin = off SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    PERFORM outbox._expand(ARRAY(
        WITH given AS MATERIALIZED (
            SELECT s.token, e.id, e.claim_token, outbox._aggregate_key(e.aggregate_type, e.aggregate_id) AS key
              FROM unnest(v_tokens, v_ids) AS s (token, id)
             CROSS JOIN LATERAL (SELECT x.* FROM @extschema@.outbox_events x WHERE x.id = s.id OFFSET 0) e
        )
        SELECT g.id FROM given g WHERE g.claim_token = g.token
        UNION
        SELECT e.id
          FROM outbox.claims c CROSS JOIN LATERAL unnest(c.ids) AS i (id)
         CROSS JOIN LATERAL (SELECT x.* FROM @extschema@.outbox_events x WHERE x.id = i.id OFFSET 0) e
         WHERE c.token = ANY (ARRAY(SELECT DISTINCT g.token FROM given g WHERE g.key IS NOT NULL)) AND e.claim_token = c.token
           AND outbox._aggregate_key(e.aggregate_type, e.aggregate_id)
               = ANY (ARRAY(SELECT DISTINCT g.key FROM given g WHERE g.key IS NOT NULL))));
END
$$;
COMMENT ON FUNCTION outbox._expand_lines(bigint[], bigint[]) IS 'lists what claims hold of these events and of those behind them';

-- After a delivery left its line without success, the later ones of the line that are in flight with the same consumer
-- are taken back: they must not be delivered before it. Only those of the same claim can be.
CREATE FUNCTION outbox._take_back(v_token bigint, v_destination text, v_key bigint, v_id bigint) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_back record;
BEGIN
    WITH back AS (
        UPDATE outbox.delivery d SET status = 'pending', claim_token = NULL, next_attempt_at = NULL
         WHERE d.destination = v_destination AND d.aggregate_key = v_key AND d.place > v_id
           AND d.claim_token IS NOT DISTINCT FROM v_token
        RETURNING d.id
    )
    SELECT array_agg(id) AS ids, array_agg(v_token) AS tokens INTO v_back FROM back;
    PERFORM outbox._let_go(v_back.tokens);
    PERFORM outbox._refresh(v_back.ids);
END
$$;
COMMENT ON FUNCTION outbox._take_back(bigint, text, bigint, bigint) IS 'later events of a line wait behind one that failed';

-- outcome: failed (uses an attempt), rejected (dead letter), unavailable (the destination is down: uses none).
CREATE FUNCTION outbox._failed(
    v_token bigint, v_id bigint, v_destination text, v_outcome text, v_error text, v_retry_in interval) RETURNS boolean
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_row record;
    v_attempts int;
    v_dead boolean;
    v_next timestamptz;
    v_any boolean := false;
BEGIN
    FOR v_row IN
        SELECT d.destination, d.aggregate_key, d.attempts, coalesce(t.settings, '{}') AS settings, t.kind
          FROM outbox.delivery d LEFT JOIN outbox.destination t ON t.name = d.destination
         WHERE d.id = v_id AND d.claim_token IS NOT DISTINCT FROM v_token AND v_token IS NOT NULL AND (v_destination IS NULL OR d.destination = v_destination)
    LOOP
        v_any := true;
        v_attempts := v_row.attempts + (v_outcome <> 'unavailable')::int;
        v_dead := v_outcome = 'rejected'
                  OR (v_outcome = 'failed' AND v_attempts >= outbox._max_attempts(v_row.settings));
        v_next := CASE WHEN v_dead THEN NULL
                       WHEN v_outcome = 'unavailable' THEN clock_timestamp()
                       ELSE clock_timestamp() + coalesce(v_retry_in, outbox._retry_in(v_row.kind, v_row.settings, v_attempts)) END;
        UPDATE outbox.delivery d
           SET status = CASE WHEN v_dead THEN 'failed' ELSE 'pending' END, attempts = v_attempts,
               next_attempt_at = v_next, last_error = v_error, claim_token = NULL
         WHERE d.id = v_id AND d.destination = v_row.destination;
        UPDATE @extschema@.outbox_events e
           SET last_error = v_error, retry_count = greatest(e.retry_count, v_attempts) WHERE e.id = v_id;
        IF v_row.aggregate_key IS NOT NULL
           AND (NOT v_dead OR v_row.settings ->> 'on_failure' = 'block') THEN
            PERFORM outbox._take_back(v_token, v_row.destination, v_row.aggregate_key, v_id);
        END IF;
        PERFORM outbox._left_line(ARRAY[v_id], ARRAY[v_row.destination], ARRAY[v_row.aggregate_key], ARRAY[v_token]);
        PERFORM outbox._timer(v_next);
        IF v_outcome = 'unavailable' THEN
            PERFORM outbox._open_circuit(v_row.destination, v_error, v_retry_in);
        ELSE
            PERFORM outbox._close_circuits(ARRAY[v_row.destination]);
        END IF;
    END LOOP;
    RETURN v_any;
END
$$;
COMMENT ON FUNCTION outbox._failed(bigint, bigint, text, text, text, interval) IS
    'one event did not get through, to one destination or to all that the token holds';

CREATE FUNCTION outbox._retry_in(kind text, settings jsonb, attempts int) RETURNS interval
    LANGUAGE sql VOLATILE
RETURN outbox._backoff(attempts,
    outbox._duration(settings, 'base', CASE kind WHEN 'webhook' THEN interval '5 seconds' ELSE interval '1 second' END),
    outbox._duration(settings, 'cap', CASE kind WHEN 'webhook' THEN interval '6 hours' ELSE interval '5 minutes' END));
COMMENT ON FUNCTION outbox._retry_in(text, jsonb, int) IS
    'a destination''s backoff: base 5 s and cap 6 h for webhooks, 1 s and 5 min for all else';

-- Gives back what these claims hold, as if it had never been handed out. What the application has locked is given back when
-- it is free: until then the claim's row stays, with a lease that is over.
CREATE FUNCTION outbox._release(v_tokens bigint[]) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_held bigint[];
    v_locked bigint[];
    v_whole record;
    v_back record;
    v_empty int;
BEGIN
    SELECT array_agg(i) INTO v_held FROM outbox.claims c, unnest(c.ids) AS i WHERE c.token = ANY (v_tokens);
    v_locked := outbox._locked(v_held);
    PERFORM outbox._expand(ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                                  WHERE e.id = ANY (v_held) AND e.id <> ALL (v_locked) AND e.claim_token = ANY (v_tokens)
                                    AND e.expanded));
    SELECT array_agg(e.id) AS ids, array_agg(e.claim_token) AS tokens INTO v_whole
      FROM @extschema@.outbox_events e
     WHERE e.id = ANY (v_held) AND e.id <> ALL (v_locked) AND e.claim_token = ANY (v_tokens) AND e.status = 'processing';
    UPDATE @extschema@.outbox_events e SET status = 'pending', claim_token = NULL WHERE e.id = ANY (v_whole.ids);
    PERFORM outbox._let_go(v_whole.tokens);
    SELECT array_agg(d.id) AS ids, array_agg(d.destination) AS destinations, array_agg(d.aggregate_key) AS keys,
           array_agg(d.claim_token) AS tokens, count(DISTINCT d.id) AS events
      INTO v_back FROM outbox.delivery d WHERE d.claim_token = ANY (v_tokens);
    UPDATE outbox.delivery d SET status = 'pending', claim_token = NULL, next_attempt_at = clock_timestamp()
     WHERE d.claim_token = ANY (v_tokens);
    IF v_back.ids IS NOT NULL THEN
        PERFORM outbox._left_line(v_back.ids, v_back.destinations, v_back.keys, v_back.tokens);
    END IF;
    UPDATE outbox.claims c SET attachment = NULL, lease_until = clock_timestamp()
     WHERE c.token = ANY (v_tokens) AND c.token = ANY (ARRAY(SELECT e.claim_token FROM @extschema@.outbox_events e
                                                             WHERE e.id = ANY (v_locked)));
    IF FOUND THEN
        PERFORM outbox._claims(0, clock_timestamp() + interval '250 milliseconds');
    END IF;
    WITH gone AS (
        DELETE FROM outbox.claims c
         WHERE c.token = ANY (v_tokens)
           AND c.token <> ALL (ARRAY(SELECT e.claim_token FROM @extschema@.outbox_events e
                                      WHERE e.id = ANY (v_locked) AND e.claim_token IS NOT NULL))
        RETURNING 1
    )
    SELECT count(*) INTO v_empty FROM gone;
    PERFORM outbox._claims(-v_empty, NULL) WHERE v_empty > 0;
    IF v_whole.ids IS NOT NULL OR v_back.ids IS NOT NULL THEN
        PERFORM outbox._wake('released');
    END IF;
    RETURN coalesce(cardinality(v_whole.ids), 0) + v_back.events;
END
$$;
COMMENT ON FUNCTION outbox._release(bigint[]) IS 'gives back all that the claims hold';

-- One destination of one event is given back: the consumer has no room for it now.
CREATE FUNCTION outbox._release_one(v_token bigint, v_id bigint, v_destination text) RETURNS boolean
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_key bigint;
BEGIN
    UPDATE outbox.delivery d SET status = 'pending', claim_token = NULL, next_attempt_at = clock_timestamp()
     WHERE d.id = v_id AND d.destination = v_destination AND d.claim_token IS NOT DISTINCT FROM v_token AND v_token IS NOT NULL
    RETURNING d.aggregate_key INTO v_key;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF v_key IS NOT NULL THEN
        PERFORM outbox._take_back(v_token, v_destination, v_key, v_id);
    END IF;
    PERFORM outbox._left_line(ARRAY[v_id], ARRAY[v_destination], ARRAY[v_key], ARRAY[v_token]);
    PERFORM outbox._wake('released');
    RETURN true;
END
$$;
COMMENT ON FUNCTION outbox._release_one(bigint, bigint, text) IS 'gives back one delivery; uses no attempt';

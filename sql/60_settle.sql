-- Settling: what became of claimed events. Each function changes only what the given token still holds; anything else
-- counts for nothing. They take the lock that claims take, so that a claim sees a settlement whole or not at all.
-- (A token is compared with IS NOT DISTINCT FROM where a delivery is already known by its key: with = the planner may look
-- through all that the token holds instead, once for each delivery.)

-- Each token given holds one thing less. A claim's row goes when it holds nothing any more.
CREATE FUNCTION outbox._let_go(tokens bigint[]) RETURNS void
    LANGUAGE plpgsql
AS $$
DECLARE
    v_closed int;
BEGIN
    IF tokens IS NULL THEN
        RETURN;
    END IF;
    WITH less AS MATERIALIZED (
        SELECT t.token, count(*) AS n FROM unnest(tokens) AS t (token) GROUP BY t.token
    ), found AS MATERIALIZED (
        SELECT l.token, l.n, c.at, c.held <= l.n AS empty
          FROM less l
         CROSS JOIN LATERAL (SELECT x.ctid AS at, x.held FROM outbox.claims x WHERE x.token = l.token OFFSET 0) c
    ), closed AS (
        DELETE FROM outbox.claims c WHERE c.ctid = ANY (ARRAY(SELECT f.at FROM found f WHERE f.empty)) RETURNING 1
    ), kept AS (
        UPDATE outbox.claims c SET held = c.held - (SELECT f.n FROM found f WHERE f.token = c.token)
         WHERE c.ctid = ANY (ARRAY(SELECT f.at FROM found f WHERE NOT f.empty))
    )
    SELECT count(*) INTO v_closed FROM closed;
    IF v_closed > 0 THEN
        PERFORM outbox._claims(-v_closed, NULL);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._let_go(bigint[]) IS 'each token given holds one thing less';

-- An expanded event's status follows from its deliveries. Where the application has locked the row, this is done later.
CREATE FUNCTION outbox._refresh(v_ids bigint[]) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_locked bigint[] := outbox._locked(v_ids);
BEGIN
    UPDATE @extschema@.outbox_events e
       SET status = s.status, processed_at = CASE WHEN s.status = 'processed' THEN clock_timestamp() END
      FROM (SELECT i.id,
                   CASE WHEN bool_or(d.status = 'processing') THEN 'processing'
                        WHEN bool_or(d.status IN ('pending', 'scheduled')) THEN 'pending'
                        WHEN bool_or(d.status = 'failed') THEN 'failed'
                        ELSE 'processed' END AS status
              FROM (SELECT DISTINCT unnest(v_ids) AS id) i
              LEFT JOIN LATERAL (SELECT x.status FROM outbox.delivery x WHERE x.id = i.id OFFSET 0) d ON true
             WHERE i.id <> ALL (v_locked)
             GROUP BY i.id) s
     WHERE e.id BETWEEN s.id AND s.id AND e.expanded AND e.claim_token IS NULL AND e.status <> s.status;
    IF v_locked <> '{}' THEN
        INSERT INTO outbox.touched (id) SELECT unnest(v_locked);
        PERFORM outbox._look_again();
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._refresh(bigint[]) IS 'the status of expanded events, from what is outstanding';

-- The first of each line becomes due, when nothing before it is outstanding.
CREATE FUNCTION outbox._promote(v_destinations text[], v_keys bigint[]) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
BEGIN
    UPDATE outbox.delivery d SET next_attempt_at = clock_timestamp()
     WHERE d.ctid = ANY (ARRAY(
           SELECT h.at
             FROM (SELECT DISTINCT l.destination, l.key FROM unnest(v_destinations, v_keys) AS l (destination, key)) l
            CROSS JOIN LATERAL (
                  SELECT x.ctid AS at, x.status, x.next_attempt_at FROM outbox.delivery x
                   WHERE x.destination = l.destination AND x.aggregate_key = l.key AND x.status <> 'scheduled'
                     AND (x.status <> 'failed'
                          OR EXISTS (SELECT FROM outbox.destination t
                                      WHERE t.name = l.destination AND t.settings ->> 'on_failure' = 'block'))
                   ORDER BY x.place LIMIT 1) h
            WHERE h.status = 'pending' AND h.next_attempt_at IS NULL));
    IF FOUND THEN
        PERFORM outbox._wake('due');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._promote(text[], bigint[]) IS 'moves lines on after something left them';

-- Hops from destination to destination in the index: a line may be long.
CREATE FUNCTION outbox._promote_lines(v_keys bigint[]) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_line record;
BEGIN
    WITH RECURSIVE line (key, destination) AS (
        SELECT k.key, (SELECT min(d.destination) FROM outbox.delivery d WHERE d.aggregate_key = k.key)
          FROM (SELECT DISTINCT unnest(v_keys) AS key) k
        UNION ALL
        SELECT l.key, (SELECT min(d.destination) FROM outbox.delivery d
                        WHERE d.aggregate_key = l.key AND d.destination > l.destination)
          FROM line l WHERE l.destination IS NOT NULL
    )
    SELECT array_agg(l.destination) AS destinations, array_agg(l.key) AS keys
      INTO v_line FROM line l WHERE l.destination IS NOT NULL;
    PERFORM outbox._promote(v_line.destinations, v_line.keys) WHERE v_line.keys IS NOT NULL;
END
$$;
COMMENT ON FUNCTION outbox._promote_lines(bigint[]) IS 'moves these lines on, at each destination';

CREATE FUNCTION outbox._promote_all(v_destination text) RETURNS void
    LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT outbox._promote(array_agg(v_destination), array_agg(k.aggregate_key))
      FROM (SELECT DISTINCT d.aggregate_key FROM outbox.delivery d
             WHERE d.destination = v_destination AND d.aggregate_key IS NOT NULL
               AND (d.status = 'failed' OR (d.status = 'pending' AND d.next_attempt_at IS NULL))) k
$$;
COMMENT ON FUNCTION outbox._promote_all(text) IS 'moves on each line of a destination that has no reason to wait any more';

-- Delivered to every destination the claim handed out. The common case: no row but the event's is touched.
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
           SET status = CASE WHEN e.expanded THEN outbox._rest(e.id) ELSE 'processed' END,
               processed_at = CASE WHEN e.expanded AND outbox._rest(e.id) <> 'processed' THEN NULL ELSE clock_timestamp() END,
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
        RETURNING d.id, d.destination, d.aggregate_key, d.claim_token
    )
    SELECT array_agg(id) AS ids, array_agg(destination) AS destinations, array_agg(aggregate_key) AS keys,
           array_agg(claim_token) AS tokens, count(DISTINCT id) AS events
      INTO v_gone FROM gone;
    IF v_gone.ids IS NOT NULL THEN
        PERFORM outbox._left_line(v_gone.ids, v_gone.destinations, v_gone.keys, v_gone.tokens);
        PERFORM outbox._close_circuits(v_gone.destinations);
    END IF;
    RETURN coalesce(cardinality(v_done), 0) + v_gone.events;
END
$$;
COMMENT ON FUNCTION outbox._delivered(bigint[], bigint[]) IS 'settles events delivered to all that their claim handed out';

CREATE FUNCTION outbox._rest(v_id bigint) RETURNS text
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (
    SELECT CASE WHEN bool_or(d.status = 'processing') THEN 'processing'
                WHEN bool_or(d.status IN ('pending', 'scheduled')) THEN 'pending'
                WHEN bool_or(d.status = 'failed') THEN 'failed'
                ELSE 'processed' END
      FROM outbox.delivery d WHERE d.id = v_id);
END
$$;
COMMENT ON FUNCTION outbox._rest(bigint) IS 'the status that an event''s deliveries alone give it';

-- After deliveries ended or were given back: their claims, their lines, their events.
CREATE FUNCTION outbox._left_line(v_ids bigint[], v_destinations text[], v_keys bigint[], v_tokens bigint[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._let_go(v_tokens);
    PERFORM outbox._promote(v_destinations, v_keys);
    PERFORM outbox._refresh(v_ids);
END
$$;
COMMENT ON FUNCTION outbox._left_line(bigint[], text[], bigint[], bigint[]) IS 'what follows when deliveries leave a claim';

-- An outcome is neither lost nor waited for because the application has the event's row locked: it is settled when the row
-- is free. Until then the claim holds the event.
CREATE FUNCTION outbox._postpone(
    INOUT tokens bigint[], INOUT ids bigint[], INOUT exceptions jsonb, OUT postponed bigint)
    LANGUAGE plpgsql
AS $$
#variable_conflict use_variable
DECLARE
    v_locked bigint[] := outbox._locked(ids || ARRAY(SELECT x.id FROM jsonb_to_recordset(exceptions) AS x (id bigint)));
BEGIN
    postponed := 0;
    IF v_locked = '{}' THEN
        RETURN;
    END IF;
    WITH late AS (
        SELECT s.token, s.id, NULL::jsonb AS exception FROM unnest(tokens, ids) AS s (token, id) WHERE s.id = ANY (v_locked)
        UNION ALL
        SELECT (x.value ->> 'token')::bigint, (x.value ->> 'id')::bigint, x.value
          FROM jsonb_array_elements(exceptions) AS x WHERE (x.value ->> 'id')::bigint = ANY (v_locked)
    ), kept AS (
        INSERT INTO outbox.postponed (claim_token, id, exception)
        SELECT l.token, l.id, l.exception FROM late l
         WHERE EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = l.id AND e.claim_token = l.token)
            OR EXISTS (SELECT FROM outbox.delivery d WHERE d.id = l.id AND d.claim_token = l.token)
        RETURNING 1
    )
    SELECT count(*) INTO postponed FROM kept;
    SELECT coalesce(array_agg(s.token), '{}'), coalesce(array_agg(s.id), '{}') INTO tokens, ids
      FROM unnest(tokens, ids) AS s (token, id) WHERE s.id <> ALL (v_locked);
    exceptions := (SELECT coalesce(jsonb_agg(x.value), '[]') FROM jsonb_array_elements(exceptions) AS x
                    WHERE (x.value ->> 'id')::bigint <> ALL (v_locked));
    PERFORM outbox._look_again();
END
$$;
COMMENT ON FUNCTION outbox._postpone(bigint[], bigint[], jsonb) IS 'keeps for later what concerns locked events, and returns the rest';

CREATE FUNCTION outbox._postpone_one(
    v_token bigint, v_id bigint, v_destination text, v_outcome text, v_error text, v_retry_in interval) RETURNS boolean
    LANGUAGE plpgsql
AS $$
BEGIN
    RETURN p.postponed > 0
      FROM outbox._postpone('{}', '{}', jsonb_build_array(jsonb_build_object(
               'token', v_token, 'id', v_id, 'destination', v_destination, 'outcome', v_outcome, 'error', v_error,
               'retry_in', extract(epoch FROM v_retry_in)))) p;
END
$$;
COMMENT ON FUNCTION outbox._postpone_one(bigint, bigint, text, text, text, interval) IS 'whether this outcome is kept for later';

-- Ends a settlement: consumers that wait for one to end are told.
CREATE FUNCTION outbox._settled(v_changed boolean) RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    IF v_changed AND outbox._is_waiting() THEN
        PERFORM outbox._waiting(false);
        PERFORM outbox._wake('released');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._settled(boolean) IS 'ends a settlement';

CREATE FUNCTION outbox._claim_ids(v_token bigint) RETURNS bigint[]
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN coalesce((SELECT c.ids FROM outbox.claims c WHERE c.token = v_token), '{}');
END
$$;
COMMENT ON FUNCTION outbox._claim_ids(bigint) IS 'all events that a claim handed out';

CREATE FUNCTION outbox.ack(claim_token bigint, ids bigint[] DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0 SET lock_timeout = 0
AS $$
DECLARE
    v_ids bigint[];
    v_late record;
    v_count bigint;
BEGIN
    PERFORM outbox._lock();
    v_ids := ARRAY(SELECT DISTINCT unnest(coalesce(ack.ids, outbox._claim_ids(ack.claim_token))));
    SELECT * INTO v_late FROM outbox._postpone(array_fill(ack.claim_token, ARRAY[cardinality(v_ids)]), v_ids, '[]');
    v_count := v_late.postponed + outbox._delivered(v_late.tokens, v_late.ids);
    PERFORM outbox._settled(v_count > 0);
    RETURN v_count;
END
$$;
COMMENT ON FUNCTION outbox.ack(bigint, bigint[]) IS
    'settles events as delivered (null: all that the claim holds) and returns how many the token held';

CREATE FUNCTION outbox.fail(
    claim_token bigint, id bigint, error text, retry_in interval DEFAULT NULL, destination text DEFAULT NULL)
    RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
DECLARE
    v_changed boolean;
BEGIN
    IF fail.retry_in < interval '0' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'retry_in must not be negative',
            HINT = 'Leave it out for the destination''s own backoff.';
    END IF;
    PERFORM outbox._lock();
    IF outbox._postpone_one(fail.claim_token, fail.id, fail.destination, 'failed', fail.error, fail.retry_in) THEN
        RETURN true;
    END IF;
    PERFORM outbox._expand_lines(ARRAY[fail.claim_token], ARRAY[fail.id]);
    v_changed := outbox._failed(fail.claim_token, fail.id, fail.destination, 'failed', fail.error, fail.retry_in);
    PERFORM outbox._settled(v_changed);
    RETURN v_changed;
END
$$;
COMMENT ON FUNCTION outbox.fail(bigint, bigint, text, interval, text) IS
    'an attempt failed: try again later, or a dead letter after the last attempt (destination null: all that are held)';

CREATE FUNCTION outbox.reject(claim_token bigint, id bigint, error text, destination text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
DECLARE
    v_changed boolean;
BEGIN
    PERFORM outbox._lock();
    IF outbox._postpone_one(reject.claim_token, reject.id, reject.destination, 'rejected', reject.error, NULL) THEN
        RETURN true;
    END IF;
    PERFORM outbox._expand_lines(ARRAY[reject.claim_token], ARRAY[reject.id]);
    v_changed := outbox._failed(reject.claim_token, reject.id, reject.destination, 'rejected', reject.error, NULL);
    PERFORM outbox._settled(v_changed);
    RETURN v_changed;
END
$$;
COMMENT ON FUNCTION outbox.reject(bigint, bigint, text, text) IS 'gives an event up: a dead letter at once';

CREATE FUNCTION outbox.release(claim_token bigint) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
DECLARE
    v_count bigint;
BEGIN
    PERFORM outbox._lock();
    v_count := outbox._release(ARRAY[release.claim_token]);
    PERFORM outbox._settled(v_count > 0);
    RETURN v_count;
END
$$;
COMMENT ON FUNCTION outbox.release(bigint) IS 'gives back all that the claim still holds; uses no attempt';

CREATE FUNCTION outbox.renew(tokens bigint[], lease interval DEFAULT '1 minute') RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
DECLARE
    v_count bigint;
BEGIN
    PERFORM outbox._check_claim(1, lease);
    PERFORM outbox._lock();
    UPDATE outbox.claims c SET lease_until = clock_timestamp() + renew.lease WHERE c.token = ANY (renew.tokens);
    GET DIAGNOSTICS v_count = ROW_COUNT;
    PERFORM outbox._claims(0, clock_timestamp() + renew.lease) WHERE v_count > 0;
    RETURN v_count;
END
$$;
COMMENT ON FUNCTION outbox.renew(bigint[], interval) IS 'the lease of open claims starts anew; returns how many were open';

-- What the application's transactions and its locks left behind. For the worker, under the claims' lock.
CREATE FUNCTION outbox._catch_up() RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_batch CONSTANT int := 5000;
    v_late record;
    v_touched record;
    v_gone record;
BEGIN
    WITH late AS (DELETE FROM outbox.postponed RETURNING claim_token, id, exception)
    SELECT coalesce(array_agg(l.claim_token) FILTER (WHERE l.exception IS NULL), '{}') AS tokens,
           coalesce(array_agg(l.id) FILTER (WHERE l.exception IS NULL), '{}') AS ids,
           coalesce(jsonb_agg(l.exception) FILTER (WHERE l.exception IS NOT NULL), '[]') AS exceptions, count(*) AS n
      INTO v_late FROM late l;
    PERFORM outbox.settle(v_late.tokens, v_late.ids, v_late.exceptions) WHERE v_late.n > 0;
    WITH taken AS (
        DELETE FROM outbox.touched t WHERE t.ctid = ANY (ARRAY(SELECT x.ctid FROM outbox.touched x LIMIT v_batch))
        RETURNING t.id, t.aggregate_key, t.claim_token
    )
    SELECT array_agg(t.id) AS ids, array_agg(t.aggregate_key) FILTER (WHERE t.aggregate_key IS NOT NULL) AS keys,
           array_agg(t.claim_token) FILTER (WHERE t.claim_token IS NOT NULL) AS tokens, count(*) AS n
      INTO v_touched FROM taken t;
    IF v_touched.n = 0 THEN
        RETURN;
    END IF;
    WITH gone AS (
        DELETE FROM outbox.delivery d
         WHERE d.id = ANY (v_touched.ids) AND NOT EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = d.id)
        RETURNING d.aggregate_key, d.claim_token
    )
    SELECT array_agg(g.aggregate_key) AS keys, array_agg(g.claim_token) FILTER (WHERE g.claim_token IS NOT NULL) AS tokens
      INTO v_gone FROM gone g;
    PERFORM outbox._let_go(v_touched.tokens || v_gone.tokens);
    PERFORM outbox._promote_lines(v_touched.keys || v_gone.keys);
    PERFORM outbox._refresh(v_touched.ids);
    PERFORM outbox._settled(true);
    PERFORM outbox._timer(clock_timestamp()) WHERE v_touched.n = v_batch;
END
$$;
COMMENT ON FUNCTION outbox._catch_up() IS
    'settles what was postponed, drops the deliveries of events that were deleted, and moves their lines on';

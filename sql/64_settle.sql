-- Settling: consumers report the outcomes of claimed events. Each function changes only what the given token still holds. It
-- takes the claim lock, so that a claim sees a settlement whole or not at all. (Statements that know a delivery's key compare
-- its token with IS NOT DISTINCT FROM: with "=" the planner may look through everything that the token holds instead.)

-- Keeps the outcome of an event that the application has locked, and settles it when the row is free. Until then the claim
-- holds the event, and nobody waits.
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
COMMENT ON FUNCTION outbox._postpone(bigint[], bigint[], jsonb) IS 'keeps the outcomes of locked events for later and returns the others';

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
COMMENT ON FUNCTION outbox._postpone_one(bigint, bigint, text, text, text, interval) IS 'keeps one outcome for later if its event is locked; whether it did';

CREATE FUNCTION outbox._dead_letter(v_id bigint, v_destination text) RETURNS jsonb
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    RETURN (
    SELECT jsonb_build_object('destination', d.destination, 'event_id', e.event_id, 'error', d.last_error)
      FROM outbox.delivery d
     CROSS JOIN LATERAL (SELECT x.event_id FROM @extschema@.outbox_events x WHERE x.id = d.id OFFSET 0) e
     WHERE d.id = v_id AND d.destination = v_destination AND d.status = 'failed');
END
$$;
COMMENT ON FUNCTION outbox._dead_letter(bigint, text) IS 'what is to be said of a delivery, if it is a dead letter';

-- The relay's call: reports all outcomes since the last one.
CREATE FUNCTION outbox.settle(
    tokens bigint[], ids bigint[], exceptions jsonb DEFAULT '[]', OUT settled bigint, OUT latencies float8[], OUT dead jsonb)
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
    v_dead jsonb;
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
        PERFORM outbox._list(ARRAY(SELECT h.id FROM jsonb_to_recordset(exceptions) AS x (token bigint, id bigint)
                                      CROSS JOIN LATERAL (SELECT e.id FROM @extschema@.outbox_events e
                                                           WHERE e.id = x.id AND e.claim_token = x.token OFFSET 0) h));
        PERFORM outbox._list_keys(array_agg(x.token), array_agg(x.id))
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
                PERFORM outbox._disable(v_row.destination, v_row.error, v_row.id) WHERE v_changed;
            WHEN 'released' THEN
                v_changed := outbox._release_one(v_row.token, v_row.id, v_row.destination);
            ELSE
                RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                    MESSAGE = format('unknown outcome %s', coalesce(quote_literal(v_row.outcome), 'null')),
                    HINT = 'Outcomes are delivered, failed, rejected, unavailable, throttled, unable, gone, released and answered.';
            END CASE;
            v_count := v_count + v_changed::int;
            IF v_changed AND v_row.outcome NOT IN ('released', 'unable') THEN
                v_dead := outbox._dead_letter(v_row.id, v_row.destination);
                dead := CASE WHEN v_dead IS NULL THEN dead ELSE coalesce(dead, '[]') || v_dead END;
            END IF;
        END LOOP;
    END IF;
    PERFORM outbox._settled(v_count > 0);
    settled := v_count;
    latencies := outbox._latencies();
END
$$;
COMMENT ON FUNCTION outbox.settle(bigint[], bigint[], jsonb) IS
    'settles events of many claims at once; exceptions: those that did not reach every destination. Returns how many the tokens held, the seconds from when each event that is processed now could be delivered, and what is a dead letter now';

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
    PERFORM outbox._list_keys(ARRAY[fail.claim_token], ARRAY[fail.id]);
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
    PERFORM outbox._list_keys(ARRAY[reject.claim_token], ARRAY[reject.id]);
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
    PERFORM outbox._open_claims(0, clock_timestamp() + renew.lease) WHERE v_count > 0;
    RETURN v_count;
END
$$;
COMMENT ON FUNCTION outbox.renew(bigint[], interval) IS 'the lease of open claims starts anew; returns how many were open';

-- Does the work that was left for later. For the worker, under the claim lock.
CREATE FUNCTION outbox._catch_up() RETURNS void
    LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_late record;
BEGIN
    WITH late AS (DELETE FROM outbox.postponed RETURNING claim_token, id, exception)
    SELECT coalesce(array_agg(l.claim_token) FILTER (WHERE l.exception IS NULL), '{}') AS tokens,
           coalesce(array_agg(l.id) FILTER (WHERE l.exception IS NULL), '{}') AS ids,
           coalesce(jsonb_agg(l.exception) FILTER (WHERE l.exception IS NOT NULL), '[]') AS exceptions, count(*) AS n
      INTO v_late FROM late l;
    PERFORM outbox.settle(v_late.tokens, v_late.ids, v_late.exceptions) WHERE v_late.n > 0;
    PERFORM outbox._look_after_touched();
END
$$;
COMMENT ON FUNCTION outbox._catch_up() IS 'settles postponed outcomes and looks after touched events';

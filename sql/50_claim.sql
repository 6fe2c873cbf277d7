-- Claiming. One claim or settlement runs at a time: each takes the same lock and holds it to its commit. That alone makes
-- the rules below simple, because nothing they read can change under them.
--
-- Plans are kept for a session's life, and most are made while the tables are empty or their statistics say so. So no
-- statement leaves the order of its joins to chance: rows are found by the key that a LATERAL ... OFFSET 0 hands to the
-- table, and deliveries and claims are changed by the ctid that was found (nobody else changes them meanwhile). An UPDATE
-- that joins says "e.id BETWEEN p.id AND p.id": with "=" the planner may walk the whole primary key for a merge that never
-- comes, when it takes the table for empty.
--
-- No claim or settlement waits for a row of outbox_events that the application has locked: see outbox._locked().
--
-- Holds true, for a destination and an aggregate: an event is handed out only when no earlier one of them is outstanding
-- elsewhere and none at all is in flight in another claim. Within one claim the consumer keeps the order of id.

-- The table of events comes before that of deliveries, for a TRUNCATE that holds the first and wants the second.
CREATE FUNCTION outbox._lock() RETURNS void
    LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    LOCK TABLE outbox.turn IN EXCLUSIVE MODE;
    LOCK TABLE @extschema@.outbox_events IN ROW EXCLUSIVE MODE;
    -- For the rest of the transaction, or of the function that sets it too: others wait for this lock.
    PERFORM set_config('lock_timeout', '2s', true);
END
$$;
COMMENT ON FUNCTION outbox._lock() IS 'claims and settlements run one at a time, until commit';

-- Two aggregates with one key would wait for each other and lose nothing.
CREATE FUNCTION outbox._aggregate_key(aggregate_type text, aggregate_id text) RETURNS bigint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE WHEN aggregate_id IS NOT NULL
            THEN hashtextextended(coalesce(aggregate_type, '') || chr(31) || aggregate_id, 0::bigint) END;
COMMENT ON FUNCTION outbox._aggregate_key(text, text) IS 'the line an event stands in; null: none';

-- A row that nobody locked or changed has no xmax, so the common case is one look-up. What has one may be free all the same.
-- Between the look and the change another transaction can still come in: then lock_timeout ends the wait, see outbox._lock().
CREATE FUNCTION outbox._locked(v_ids bigint[]) RETURNS bigint[]
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_touched bigint[];
BEGIN
    v_touched := ARRAY(SELECT x.id FROM unnest(v_ids) AS i (id)
                        CROSS JOIN LATERAL (SELECT e.id FROM @extschema@.outbox_events e
                                             WHERE e.id = i.id AND e.xmax <> 0 OFFSET 0) x);
    IF cardinality(v_touched) = 0 THEN
        RETURN '{}';
    END IF;
    RETURN ARRAY(SELECT unnest(v_touched)
                 EXCEPT
                 SELECT x.id FROM (SELECT e.id FROM @extschema@.outbox_events e
                                    WHERE e.id = ANY (v_touched) FOR NO KEY UPDATE SKIP LOCKED) x);
END
$$;
COMMENT ON FUNCTION outbox._locked(bigint[]) IS
    'those of these events whose rows another transaction has locked; the others stay free until this one ends';

-- Whatever could not be done because of a lock is looked at again after this time.
CREATE FUNCTION outbox._look_again() RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM outbox._timer(clock_timestamp() + interval '250 milliseconds');
END
$$;
COMMENT ON FUNCTION outbox._look_again() IS 'at commit: what the application has locked is looked at again shortly';

CREATE FUNCTION outbox._check_claim(max_events int, lease interval) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION USING ERRCODE = 'read_only_sql_transaction',
            MESSAGE = 'cannot claim events on a standby',
            HINT = 'Connect to the primary, for example with target_session_attrs=read-write.';
    ELSIF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION USING ERRCODE = 'feature_not_supported',
            MESSAGE = format('cannot claim events in a %s transaction', current_setting('transaction_isolation')),
            DETAIL = 'Its snapshot may be older than what other consumers have claimed meanwhile.',
            HINT = 'Claim in a READ COMMITTED transaction, for example with SET default_transaction_isolation.';
    ELSIF max_events IS NULL OR max_events < 1 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('max_events must be at least 1, not %s', coalesce(max_events::text, 'null')),
            HINT = 'Ask for as many events as you can work on before the lease ends.';
    ELSIF lease IS NULL OR lease <= interval '0' OR lease > interval '100 years' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'lease must be above zero and at most 100 years',
            HINT = 'A claim is released when its lease ends; the default is 1 minute.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_claim(int, interval) IS 'an error for arguments that make no claim';

-- No settings of its own, so that the planner can merge it into the query that uses it.
-- The destinations as this claim may use them. serve: hand out freely; probe: the circuit is half open, hand out one;
-- elsewhere: another consumer may serve it now.
-- While there is no destination at all, '' stands for a consumer of the application's own, which names none.
CREATE FUNCTION outbox._lanes(served text[])
    RETURNS TABLE (name text, like_patterns text[], serve boolean, probe boolean, elsewhere boolean, blocks boolean)
    LANGUAGE sql STABLE ROWS 10
AS $$
    SELECT d.name, d.like_patterns, m.active AND m.mine AND d.circuit_failures = 0,
           m.active AND m.mine AND d.circuit_failures > 0
             AND coalesce(d.circuit_open_until, '-infinity') <= clock_timestamp()
             -- Those in flight are few; of a destination there may be millions.
             AND NOT EXISTS (SELECT FROM outbox.delivery x WHERE x.claim_token > 0 AND x.destination || '' = d.name),
           m.active AND NOT m.mine AND coalesce(d.circuit_open_until, '-infinity') <= clock_timestamp(),
           coalesce(d.settings ->> 'on_failure', 'skip') = 'block'
      FROM outbox.destination d,
           LATERAL (SELECT served IS NULL OR d.name = ANY (served), NOT d.paused AND d.disabled_reason IS NULL) AS m (mine, active)
    UNION ALL
    SELECT '', ARRAY['%'], true, false, false, false
     WHERE served IS NULL AND NOT EXISTS (SELECT FROM outbox.destination)
$$;
COMMENT ON FUNCTION outbox._lanes(text[]) IS 'the destinations and what a claim may hand out for each';

-- Recovery: everything in shared memory follows from the tables, when the worker starts and after rows arrived with a
-- status of their own.

-- Mends rows that came with a restore or were copied by hand, in any order and any number of transactions. A missing row may
-- still be on its way, so nothing follows from it. The rows that are there tell that
--   an event of an unknown claim is given back; if it is listed, every destination that wants it is owed it
--   a delivery of an unknown claim is given back
--   a delivery that waits for nothing is due, and an event's status follows from its deliveries
-- Contradictions are counted for outbox.health() and left to outbox.repair().
CREATE FUNCTION outbox._mend() RETURNS void
    LANGUAGE plpgsql SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_locked bigint[];
    v_unknown bigint[];
BEGIN
    -- Each destination has a row here for each of its patterns.
    PERFORM outbox._put_interest(d.name) FROM outbox.destination d
      WHERE NOT EXISTS (SELECT FROM outbox.interest i WHERE i.destination = d.name);
    v_unknown := ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                        WHERE e.claim_token IS NOT NULL
                          AND NOT EXISTS (SELECT FROM outbox.claims c WHERE c.token = e.claim_token));
    v_locked := outbox._locked(v_unknown);
    WITH lost AS (
        UPDATE @extschema@.outbox_events e SET claim_token = NULL
         WHERE e.id = ANY (v_unknown) AND e.id <> ALL (v_locked) AND e.listed AND e.status = 'processing'
           AND EXISTS (SELECT FROM outbox.destination)
        RETURNING e.id
    )
    INSERT INTO outbox.delivery (id, destination, ordering_key, status, next_attempt_at)
    SELECT r.id, r.destination, r.ordering_key, 'pending', clock_timestamp()
      FROM outbox._routes(ARRAY(SELECT l.id FROM lost l)) r
    ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING;
    UPDATE @extschema@.outbox_events e
       SET status = CASE e.status WHEN 'processing' THEN 'pending' ELSE e.status END, claim_token = NULL
     WHERE e.id = ANY (v_unknown) AND e.id <> ALL (v_locked) AND NOT e.listed;
    UPDATE @extschema@.outbox_events e SET routed = true
     WHERE e.available_at IS NOT NULL AND NOT e.routed AND (e.status <> 'pending' OR e.listed) AND e.id <> ALL (v_locked);
    UPDATE outbox.delivery d SET status = 'pending', claim_token = NULL, next_attempt_at = clock_timestamp()
     WHERE d.status = 'processing' AND NOT EXISTS (SELECT FROM outbox.claims c WHERE c.token = d.claim_token);
    UPDATE outbox.delivery d SET next_attempt_at = clock_timestamp()
     WHERE d.status = 'pending' AND d.next_attempt_at IS NULL AND d.ordering_key IS NULL
       AND EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = d.id);
    PERFORM outbox._promote_keys(ARRAY(SELECT DISTINCT d.ordering_key FROM outbox.delivery d
                                         WHERE d.status = 'pending' AND d.next_attempt_at IS NULL
                                           AND d.ordering_key IS NOT NULL
                                           AND EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = d.id)));
    PERFORM outbox._find_due(ARRAY(SELECT d.name FROM outbox.destination d));
    PERFORM outbox._recount_deliveries();
    PERFORM outbox._refresh_all();
    PERFORM outbox._look_again() WHERE v_locked <> '{}';
    DELETE FROM outbox.contradiction;
    INSERT INTO outbox.contradiction (kind, found)
    SELECT x.kind, x.n FROM (
        SELECT 'event without delivery' AS kind, count(*) AS n FROM @extschema@.outbox_events e
         WHERE e.status IN ('pending', 'processing') AND e.listed AND e.claim_token IS NULL
           AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id)
        UNION ALL
        SELECT 'delivery without event', count(*) FROM outbox.delivery d
         WHERE NOT EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = d.id)) x
     WHERE x.n > 0;
END
$$;
COMMENT ON FUNCTION outbox._mend() IS 'mends rows that came with a restore and counts contradictions';

-- Rebuilds shared memory when the worker starts and after a restore. Returns when to look for what is due: at once. v_count:
-- counts the events, because shared memory is new; after a worker alone has restarted, the counters are right. Writers go on:
-- their rows are added to the count.
CREATE FUNCTION outbox._recover(v_count boolean) RETURNS timestamptz
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = on SET enable_hashjoin = on
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_counts record;
BEGIN
    PERFORM outbox._lock();
    PERFORM outbox._release(ARRAY(
        SELECT c.token FROM outbox.claims c
         WHERE c.boot <> outbox._boot()
            OR (c.attachment IS NOT NULL AND NOT EXISTS (SELECT FROM outbox._attachments() a WHERE a.attachment = c.attachment))));
    IF NOT v_count THEN
        RETURN clock_timestamp();
    END IF;
    PERFORM outbox._forget_earlier_starts();
    PERFORM outbox._mend();
    -- If a commit came in at each try, the last count is nearly right, and the worker counts again.
    FOR v_try IN 1..100 LOOP
        PERFORM outbox._count_begin();
        SELECT count(*) FILTER (WHERE e.status = 'pending') AS pending,
               count(*) FILTER (WHERE e.status = 'processing') AS processing,
               count(*) FILTER (WHERE e.status = 'processed') AS processed,
               count(*) FILTER (WHERE e.status = 'failed') AS failed,
               min(e.id) FILTER (WHERE (e.status = 'pending' AND NOT e.listed) OR e.claim_token IS NOT NULL) AS low_water,
               max(e.id) FILTER (WHERE e.claim_token IS NOT NULL) AS high_water, CASE WHEN max(e.id) < 9223372036854775807 THEN max(e.id) + 1 ELSE max(e.id) END AS past_all
          INTO v_counts FROM @extschema@.outbox_events e
         WHERE outbox._count_from_here(v_try = 100);
        EXIT WHEN outbox._count_from_here(false);
    END LOOP;
    PERFORM outbox._recovered(coalesce(v_counts.low_water, v_counts.past_all, 1), coalesce(v_counts.high_water, 0),
                              v_counts.pending, v_counts.processing, v_counts.processed, v_counts.failed,
                              (SELECT count(*) FROM outbox.claims));
    RETURN clock_timestamp();
END
$$;
COMMENT ON FUNCTION outbox._recover(boolean) IS 'rebuilds shared memory from the tables and releases claims whose session has ended';

CREATE FUNCTION outbox.repair() RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
DECLARE
    v_gone record;
    v_count bigint;
BEGIN
    PERFORM outbox._lock();
    WITH gone AS (
        DELETE FROM outbox.delivery d
         WHERE NOT EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = d.id)
        RETURNING d.ordering_key, d.claim_token
    )
    SELECT array_agg(DISTINCT g.ordering_key) FILTER (WHERE g.ordering_key IS NOT NULL) AS keys,
           array_agg(g.claim_token) FILTER (WHERE g.claim_token IS NOT NULL) AS tokens, count(*) AS n
      INTO v_gone FROM gone g;
    PERFORM outbox._let_go(v_gone.tokens);
    PERFORM outbox._promote_keys(v_gone.keys);
    UPDATE @extschema@.outbox_events e SET status = 'pending', listed = false, routed = false
     WHERE e.status IN ('pending', 'processing') AND e.listed AND e.claim_token IS NULL
       AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id);
    GET DIAGNOSTICS v_count = ROW_COUNT;
    DELETE FROM outbox.contradiction;
    PERFORM outbox._wake('due');
    RETURN v_gone.n + v_count;
END
$$;
COMMENT ON FUNCTION outbox.repair() IS
    'after a restore is complete: removes deliveries without event, owes events without delivery to all that want them; returns how many';

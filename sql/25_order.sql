-- Order. One claim or settlement runs at a time: each takes the same lock and holds it to its commit. That alone makes
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
-- For each destination and ordering key: an event is handed out only when no earlier one is outstanding elsewhere and no
-- other claim holds one. Within a claim the consumer keeps the order of id.

-- Locks the table of events before anybody locks a delivery: a TRUNCATE holds the first and then wants the second.
CREATE FUNCTION outbox._lock() RETURNS void
    LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    LOCK TABLE outbox.claim_lock IN EXCLUSIVE MODE;
    LOCK TABLE @extschema@.outbox_events IN ROW EXCLUSIVE MODE;
    -- Others wait for this lock: no statement of its holder may wait long. Ends with the calling function, if that sets
    -- lock_timeout, or with the transaction.
    PERFORM set_config('lock_timeout', '2s', true);
END
$$;
COMMENT ON FUNCTION outbox._lock() IS 'claims and settlements run one at a time, until commit';

-- A hash: two aggregates that share one wait for each other, and lose nothing.
CREATE FUNCTION outbox._ordering_key(aggregate_type text, aggregate_id text) RETURNS bigint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE WHEN aggregate_id IS NOT NULL
            THEN hashtextextended(coalesce(aggregate_type, '') || chr(31) || aggregate_id, 0::bigint) END;
COMMENT ON FUNCTION outbox._ordering_key(text, text) IS 'what orders events: those with the same key go out one by one; null: no order';

-- Locks the rows that are to change, all at once and without waiting: nobody can take one between the look and the change.
-- (Looking alone is not enough. An application that deletes some of them could have locked one since and wait for another.)
CREATE FUNCTION outbox._locked(v_ids bigint[]) RETURNS bigint[]
    LANGUAGE plpgsql VOLATILE
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_free CONSTANT bigint[] := ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                                       WHERE e.id = ANY (v_ids) FOR NO KEY UPDATE SKIP LOCKED);
BEGIN
    IF cardinality(v_free) = cardinality(v_ids) THEN
        RETURN '{}';
    END IF;
    -- Some of the others may not be there at all.
    RETURN ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                  WHERE e.id = ANY (v_ids) AND (e.id IN (SELECT unnest(v_free))) IS NOT TRUE);
END
$$;
COMMENT ON FUNCTION outbox._locked(bigint[]) IS
    'those of these events whose rows another transaction has locked; this one locks the others';

-- The interval at which rows that were locked are looked at again.
CREATE FUNCTION outbox._look_again() RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM outbox._wake_at(clock_timestamp() + interval '250 milliseconds');
END
$$;
COMMENT ON FUNCTION outbox._look_again() IS 'at commit: has the worker look at locked events again shortly';

-- Scheduled events that are due and not routed yet, because more fell due at once than one claim routes.
-- No settings of its own, so that the planner can merge it into the query that uses it.
CREATE FUNCTION outbox._unrouted_ahead(key bigint, moment timestamptz) RETURNS TABLE (id bigint, event_type text, tenant_id text)
    LANGUAGE sql STABLE ROWS 1
AS $$
    SELECT e.id, e.event_type, e.tenant_id
      FROM @extschema@.outbox_events e
     WHERE CASE WHEN e.aggregate_id IS NOT NULL
                THEN hashtextextended(coalesce(e.aggregate_type, '') || chr(31) || e.aggregate_id, 0::bigint) END = key
       AND e.available_at IS NOT NULL AND NOT e.routed AND e.available_at <= moment
       AND e.status = 'pending' AND NOT e.listed
$$;
COMMENT ON FUNCTION outbox._unrouted_ahead(bigint, timestamptz) IS 'scheduled events with this ordering key that are due and not routed yet';

-- The rule of order at one destination: the deliveries that an event waits for. These are the earlier ones with its ordering
-- key, and any that is in flight: two consumers never have events with the same key at once. blocks: dead letters count.
-- No settings of its own, so that the planner can merge it into the query that uses it.
CREATE FUNCTION outbox._ahead(destination text, key bigint, id bigint, blocks boolean) RETURNS TABLE (event bigint)
    LANGUAGE sql STABLE ROWS 1
AS $$
    SELECT d.id
      FROM outbox.delivery d
     WHERE d.destination = $1 AND d.ordering_key = $2 AND d.place <> $3
       AND (d.status = 'processing'
            OR (d.place < $3 AND (d.status = 'pending' OR (d.status = 'failed' AND $4))))
$$;
COMMENT ON FUNCTION outbox._ahead(text, bigint, bigint, boolean) IS 'the deliveries that an event waits for at a destination';

-- The first event of each key that waits for nothing but those ahead becomes due, when there are none.
CREATE FUNCTION outbox._promote(v_destinations text[], v_keys bigint[]) RETURNS void
    LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
BEGIN
    UPDATE outbox.delivery d SET next_attempt_at = clock_timestamp()
     WHERE d.ctid = ANY (ARRAY(
           SELECT h.at
             FROM (SELECT DISTINCT k.destination, k.key,
                          EXISTS (SELECT FROM outbox.destination t WHERE t.name = k.destination AND t.blocks) AS blocks
                     FROM unnest(v_destinations, v_keys) AS k (destination, key)) k
            CROSS JOIN LATERAL (
                  SELECT x.id, x.ctid AS at, x.next_attempt_at FROM outbox.delivery x
                   WHERE x.destination = k.destination AND x.ordering_key = k.key AND x.status = 'pending'
                   ORDER BY x.place LIMIT 1) h
            WHERE h.next_attempt_at IS NULL
              AND NOT EXISTS (SELECT FROM outbox._ahead(k.destination, k.key, h.id, k.blocks))));
    IF FOUND THEN
        PERFORM outbox._wake('due');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._promote(text[], bigint[]) IS 'makes the next event of each key due, after one of them was settled or given back';

-- Hops from destination to destination in the index: a key may have many deliveries.
CREATE FUNCTION outbox._promote_keys(v_keys bigint[]) RETURNS void
    LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_found record;
BEGIN
    WITH RECURSIVE held_up (key, destination) AS (
        SELECT k.key, (SELECT min(d.destination) FROM outbox.delivery d WHERE d.ordering_key = k.key)
          FROM (SELECT DISTINCT unnest(v_keys) AS key) k
        UNION ALL
        SELECT l.key, (SELECT min(d.destination) FROM outbox.delivery d
                        WHERE d.ordering_key = l.key AND d.destination > l.destination)
          FROM held_up l WHERE l.destination IS NOT NULL
    )
    SELECT array_agg(l.destination) AS destinations, array_agg(l.key) AS keys
      INTO v_found FROM held_up l WHERE l.destination IS NOT NULL;
    PERFORM outbox._promote(v_found.destinations, v_found.keys) WHERE v_found.keys IS NOT NULL;
END
$$;
COMMENT ON FUNCTION outbox._promote_keys(bigint[]) IS 'makes the next event of each key due, at each destination';

CREATE FUNCTION outbox._promote_all(v_destination text) RETURNS void
    LANGUAGE sql VOLATILE
AS $$
    SELECT outbox._promote(array_agg(v_destination), array_agg(k.ordering_key))
      FROM (SELECT DISTINCT d.ordering_key FROM outbox.delivery d
             WHERE d.destination = v_destination AND d.ordering_key IS NOT NULL
               AND (d.status = 'failed' OR (d.status = 'pending' AND d.next_attempt_at IS NULL))) k
$$;
COMMENT ON FUNCTION outbox._promote_all(text) IS 'makes the next event of each key due at one destination, after it changed';

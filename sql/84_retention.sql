-- Retention: processed events older than outbox.retention go, in small batches, oldest first. Dead letters stay until an
-- operator removes them.

-- Null: never (outbox.retention = -1).
CREATE FUNCTION outbox._retention() RETURNS interval
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    RETURN nullif(current_setting('outbox.retention'), '-1')::interval;
END
$$;
COMMENT ON FUNCTION outbox._retention() IS 'how long processed events are kept; null: for ever';

CREATE FUNCTION outbox._remove_unlocked(v_ids bigint[]) RETURNS void
    LANGUAGE sql
AS $$
    DELETE FROM @extschema@.outbox_events e
     WHERE e.id = ANY (ARRAY(SELECT x.id FROM @extschema@.outbox_events x
                              WHERE x.id = ANY (v_ids) AND x.status = 'processed' FOR UPDATE SKIP LOCKED))
$$;
COMMENT ON FUNCTION outbox._remove_unlocked(bigint[]) IS 'removes those of these processed events that nobody has locked';

-- Removes them together or, if that fails, one by one. Checks foreign keys here, not at the commit, to know which event they
-- keep.
CREATE FUNCTION outbox._remove_processed(v_ids bigint[]) RETURNS text
    LANGUAGE plpgsql
AS $$
DECLARE
    v_id bigint;
    v_error text;
BEGIN
    SET CONSTRAINTS ALL IMMEDIATE;
    BEGIN
        PERFORM outbox._remove_unlocked(v_ids);
        RETURN NULL;
    EXCEPTION WHEN OTHERS THEN
        v_error := SQLSTATE || ' ' || SQLERRM;
    END;
    FOREACH v_id IN ARRAY v_ids LOOP
        BEGIN
            PERFORM outbox._remove_unlocked(ARRAY[v_id]);
        EXCEPTION WHEN OTHERS THEN
            v_error := SQLSTATE || ' ' || SQLERRM;
        END;
    END LOOP;
    RETURN v_error;
END
$$;
COMMENT ON FUNCTION outbox._remove_processed(bigint[]) IS
    'removes processed events, as many as can be; returns SQLSTATE and message of what was in the way';

-- One step: looks at events from an id on, in the order of id, and removes up to v_most of those that are old enough.
-- Passes events that can't be removed (locked, referenced, kept by a trigger): the worker comes back to them. With v_most 0 the
-- first that is old enough is passed untried. Takes no lock that a claim could wait for, and waits for none.
--   last      the last id that was looked at; null: the end of the table was reached
--   skipped   the lowest id that was to go and is still there
--   young     when the first of the younger ones can go
--   error     SQLSTATE and message of what was in the way of one of them
CREATE FUNCTION outbox._retain(
    v_from bigint, v_most int, OUT last bigint, OUT skipped bigint, OUT young timestamptz, OUT error text)
    LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_kept CONSTANT interval := outbox._retention();
    v_old_before CONSTANT timestamptz := clock_timestamp() - v_kept;
    v_window CONSTANT int := least(10000, greatest(100, 10 * v_most));
    v_seen record;
    v_batch bigint[];
BEGIN
    IF v_kept IS NULL THEN
        RETURN;
    END IF;
    SELECT count(*) AS n, max(w.id) AS last, array_agg(w.id ORDER BY w.id) FILTER (WHERE w.processed_at <= v_old_before) AS old,
           min(w.processed_at) FILTER (WHERE w.processed_at > v_old_before) AS young
      INTO v_seen
      FROM (SELECT e.id, CASE WHEN e.status = 'processed' THEN coalesce(e.processed_at, e.created_at) END AS processed_at
              FROM @extschema@.outbox_events e WHERE e.id >= v_from ORDER BY e.id LIMIT v_window) w;
    v_batch := v_seen.old[:greatest(v_most, 1)];
    IF v_most > 0 AND cardinality(v_batch) > 0 THEN
        error := outbox._remove_processed(v_batch);
    END IF;
    skipped := (SELECT min(e.id) FROM @extschema@.outbox_events e WHERE e.id = ANY (v_batch) AND e.status = 'processed');
    IF cardinality(v_seen.old) > cardinality(v_batch) THEN
        last := v_batch[cardinality(v_batch)];
        RETURN;
    END IF;
    last := CASE WHEN v_seen.n = v_window THEN v_seen.last END;
    -- A sum beyond the last timestamp means never.
    IF isfinite(v_seen.young) THEN
        young := v_seen.young + v_kept;
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._retain(bigint, int) IS 'removes a batch of processed events that are older than the retention';

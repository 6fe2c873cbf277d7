-- Retention: processed events older than outbox.retention go, in small batches, oldest first. Dead letters stay until an
-- operator removes them.

-- Null: never (outbox.retention = -1).
CREATE FUNCTION outbox._retention() RETURNS interval
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN nullif(current_setting('outbox.retention'), '-1')::interval;
END
$$;
COMMENT ON FUNCTION outbox._retention() IS 'how long processed events are kept; null: for ever';

-- One step: looks at 10,000 events in the order of id, removes at most 1,000 of them, and returns when to go on; null:
-- nothing processed is left, and an event that becomes processed sets the timer itself. The worker's session remembers
--   at, kept      nothing is to be removed before that moment, as long as the retention is the same
--   from, since   what lies before that id was looked at less than an hour ago: it was removed, is dead, or waits
-- It takes no lock that a claim could wait for, and rests four times as long as a step took.
CREATE FUNCTION outbox._retain() RETURNS timestamptz
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_window CONSTANT int := 10000;
    v_batch CONSTANT int := 1000;
    v_now CONSTANT timestamptz := clock_timestamp();
    v_kept CONSTANT interval := outbox._retention();
    v_processed CONSTANT bigint := (SELECT c.processed FROM outbox._counters() c);
    v_state jsonb := coalesce(nullif(current_setting('outbox.retention_state', true), ''), '{}');
    v_from bigint := 0;
    v_since timestamptz := v_now;
    v_seen record;
    v_removed bigint;
    v_next timestamptz;
BEGIN
    IF v_kept IS NULL OR v_processed = 0 THEN
        RETURN NULL;
    ELSIF (v_state ->> 'kept')::interval = v_kept AND (v_state ->> 'at')::timestamptz > v_now THEN
        RETURN (v_state ->> 'at')::timestamptz;
    ELSIF (v_state ->> 'since')::timestamptz > v_now - interval '1 hour' THEN
        v_from := (v_state ->> 'from')::bigint;
        v_since := (v_state ->> 'since')::timestamptz;
    END IF;
    SELECT count(*) AS n, max(w.id) AS last, array_agg(w.id ORDER BY w.id) FILTER (WHERE w.processed_at <= v_now - v_kept) AS old,
           min(w.processed_at) FILTER (WHERE w.processed_at > v_now - v_kept) AS young
      INTO v_seen
      FROM (SELECT e.id, CASE WHEN e.status = 'processed' THEN coalesce(e.processed_at, e.created_at) END AS processed_at
              FROM @extschema@.outbox_events e WHERE e.id >= v_from ORDER BY e.id LIMIT v_window) w;
    -- Foreign keys that would wait for the commit: nothing may be left to it.
    SET CONSTRAINTS ALL IMMEDIATE;
    DELETE FROM @extschema@.outbox_events e WHERE e.id = ANY (v_seen.old[:v_batch]) AND e.status = 'processed';
    GET DIAGNOSTICS v_removed = ROW_COUNT;
    IF v_removed = v_processed THEN
        RETURN NULL;
    ELSIF cardinality(v_seen.old) > v_batch OR v_seen.n = v_window AND v_seen.young IS NULL THEN
        v_next := clock_timestamp() + greatest(interval '50 milliseconds', 4 * (clock_timestamp() - v_now));
        v_from := coalesce(v_seen.old[least(v_batch, cardinality(v_seen.old))], v_seen.last) + 1;
    ELSIF v_seen.young IS NOT NULL THEN
        v_next := greatest(v_seen.young + v_kept, v_now + interval '1 second');
    ELSE
        -- The end of the table: what is left was processed in front of this round.
        v_next := v_now + greatest(v_kept, interval '1 second');
        v_from := 0;
    END IF;
    PERFORM set_config('outbox.retention_state', jsonb_build_object(
        'at', v_next, 'kept', v_kept, 'from', v_from, 'since', v_since)::text, false);
    RETURN v_next;
END
$$;
COMMENT ON FUNCTION outbox._retain() IS 'removes a batch of processed events that are older than the retention';

CREATE FUNCTION outbox.purge_failed(older_than interval DEFAULT '0', event_types text DEFAULT '*') RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_gone record;
    v_count bigint;
BEGIN
    PERFORM outbox._check_patterns(ARRAY[event_types]);
    PERFORM outbox._lock();
    -- Nothing may be left to the commit.
    IF EXISTS (SELECT FROM pg_constraint c
                WHERE c.confrelid = '@extschema@.outbox_events'::regclass AND c.contype = 'f' AND c.condeferrable) THEN
        SET CONSTRAINTS ALL IMMEDIATE;
    END IF;
    WITH dead AS (
        DELETE FROM outbox.delivery d USING @extschema@.outbox_events e
         WHERE e.id = d.id AND d.status = 'failed' AND e.created_at <= clock_timestamp() - older_than
           AND e.event_type LIKE ANY (outbox._like_patterns(ARRAY[purge_failed.event_types]))
        RETURNING d.id, d.destination, d.aggregate_key
    )
    SELECT array_agg(d.id) AS ids, array_agg(d.destination) AS destinations, array_agg(d.aggregate_key) AS keys
      INTO v_gone FROM dead d;
    DELETE FROM @extschema@.outbox_events e WHERE e.id = ANY (v_gone.ids) AND e.status = 'failed';
    GET DIAGNOSTICS v_count = ROW_COUNT;
    PERFORM outbox._refresh(v_gone.ids);
    PERFORM outbox._promote(v_gone.destinations, v_gone.keys);
    RETURN v_count;
END
$$;
COMMENT ON FUNCTION outbox.purge_failed(interval, text) IS
    'removes dead letters created longer ago than that, and returns how many events went';

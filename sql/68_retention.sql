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
-- nothing processed is left. The worker remembers where it was, so that dead letters are not passed again and again; after
-- a round that removed nothing it begins at the front. An event that becomes processed sets the timer itself.
CREATE FUNCTION outbox._retain() RETURNS timestamptz
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off
    SET jit = off
AS $$
DECLARE
    v_window CONSTANT int := 10000;
    v_batch CONSTANT int := 1000;
    v_soon CONSTANT timestamptz := clock_timestamp() + interval '50 milliseconds';
    v_from bigint := coalesce(nullif(current_setting('outbox.retention_position', true), ''), '0');
    v_seen record;
BEGIN
    IF outbox._retention() IS NULL THEN
        RETURN NULL;
    END IF;
    SELECT count(*) AS n, max(w.id) AS last, array_agg(w.id ORDER BY w.id) FILTER (WHERE w.old) AS old,
           min(w.id) FILTER (WHERE w.status = 'processed' AND NOT w.old) AS first_young,
           min(w.processed_at) FILTER (WHERE w.status = 'processed' AND NOT w.old) AS oldest
      INTO v_seen
      FROM (SELECT e.id, e.status, e.processed_at,
                   e.status = 'processed' AND e.processed_at <= clock_timestamp() - outbox._retention() AS old
              FROM @extschema@.outbox_events e WHERE e.id >= v_from ORDER BY e.id LIMIT v_window) w;
    DELETE FROM @extschema@.outbox_events e WHERE e.id = ANY (v_seen.old[:v_batch]) AND e.status = 'processed';
    IF cardinality(v_seen.old) > v_batch THEN
        RETURN v_soon;
    ELSIF v_seen.n = v_window AND v_seen.oldest IS NULL THEN
        PERFORM set_config('outbox.retention_position', (v_seen.last + 1)::text, false);
        RETURN v_soon;
    END IF;
    PERFORM set_config('outbox.retention_position', CASE WHEN v_seen.old IS NOT NULL THEN v_seen.first_young::text END, false);
    RETURN greatest(v_seen.oldest + outbox._retention(), clock_timestamp() + interval '1 second');
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
    WITH dead AS (
        DELETE FROM outbox.delivery d USING @extschema@.outbox_events e
         WHERE e.id = d.id AND d.status = 'failed' AND e.created_at <= clock_timestamp() - older_than
           AND e.event_type LIKE ANY (outbox._like_patterns(ARRAY[purge_failed.event_types]))
        RETURNING d.id, d.destination, d.aggregate_key
    )
    SELECT array_agg(d.id) AS ids, array_agg(d.destination) AS destinations, array_agg(d.aggregate_key) AS keys
      INTO v_gone FROM dead d;
    DELETE FROM @extschema@.outbox_events e
     WHERE e.status = 'failed' AND e.created_at <= clock_timestamp() - older_than
       AND e.event_type LIKE ANY (outbox._like_patterns(ARRAY[purge_failed.event_types]))
       AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id);
    GET DIAGNOSTICS v_count = ROW_COUNT;
    PERFORM outbox._refresh(v_gone.ids);
    PERFORM outbox._promote(v_gone.destinations, v_gone.keys);
    RETURN v_count;
END
$$;
COMMENT ON FUNCTION outbox.purge_failed(interval, text) IS
    'removes dead letters created longer ago than that, and returns how many events went';

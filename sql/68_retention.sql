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

-- The moment at which the oldest processed event is old enough. With nothing processed yet: after one retention, when
-- anything processed from now on has come of age.
CREATE FUNCTION outbox._retention_due() RETURNS timestamptz
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
BEGIN
    RETURN greatest(
        coalesce((SELECT e.processed_at
                    FROM (SELECT x.status, x.processed_at, x.id FROM @extschema@.outbox_events x ORDER BY x.id LIMIT 10000) e
                   WHERE e.status = 'processed' ORDER BY e.id LIMIT 1), clock_timestamp()) + outbox._retention(),
        clock_timestamp() + least(interval '10 seconds', outbox._retention() / 100));
END
$$;
COMMENT ON FUNCTION outbox._retention_due() IS 'when retention has something to do next';

-- One batch: at most 1,000 of the 10,000 events with the lowest id.
CREATE FUNCTION outbox._retain() RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off
    SET jit = off
AS $$
DECLARE
    v_count bigint := 0;
BEGIN
    IF outbox._retention() IS NOT NULL THEN
        DELETE FROM @extschema@.outbox_events e
         WHERE e.id = ANY (ARRAY(
               SELECT x.id FROM (SELECT y.id, y.status, y.processed_at FROM @extschema@.outbox_events y
                                  ORDER BY y.id LIMIT 10000) x
                WHERE x.status = 'processed' AND x.processed_at <= clock_timestamp() - outbox._retention()
                ORDER BY x.id LIMIT 1000));
        GET DIAGNOSTICS v_count = ROW_COUNT;
    END IF;
    RETURN v_count;
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

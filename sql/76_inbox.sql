-- The inbox of consumers: which events they have seen, so that an event that arrives twice is worked on once.

CREATE FUNCTION outbox._inbox_retention() RETURNS interval
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    RETURN nullif(current_setting('outbox.inbox_retention'), '-1')::interval;
END
$$;
COMMENT ON FUNCTION outbox._inbox_retention() IS 'how long the inbox remembers an event; null: for ever';

-- Whoever inserts the same pair meanwhile is waited for: if that transaction rolls back, this is the first time.
CREATE FUNCTION outbox.first_time(consumer text, event_id uuid) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_now CONSTANT timestamptz := clock_timestamp();
BEGIN
    IF consumer IS NULL OR event_id IS NULL OR octet_length(consumer) NOT BETWEEN 1 AND 1000 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'consumer must have 1 to 1000 bytes, and event_id must not be null',
            HINT = 'Name what is done with the event, for example ''invoicing'': each consumer has a first time of its own.';
    END IF;
    INSERT INTO outbox.inbox (consumer, event_id, seen_at) VALUES (first_time.consumer, first_time.event_id, v_now)
    ON CONFLICT ON CONSTRAINT inbox_pkey DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM outbox._wake_at(v_now + outbox._inbox_retention());
    RETURN true;
END
$$;
COMMENT ON FUNCTION outbox.first_time(text, uuid) IS
    'true the first time that a consumer sees an event in a transaction that commits; false ever after';

-- Removes a batch of what is old enough, and returns when to come back: at the moment when the next is, or after a rest.
CREATE FUNCTION outbox._forget_seen(v_now timestamptz) RETURNS timestamptz
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_batch CONSTANT int := 1000;
    v_kept CONSTANT interval := outbox._inbox_retention();
    v_rest interval := interval '1 second';
    v_removed int;
    v_oldest timestamptz;
BEGIN
    IF v_kept IS NULL THEN
        RETURN NULL;
    END IF;
    DELETE FROM outbox.inbox i
     WHERE i.ctid = ANY (ARRAY(SELECT x.ctid FROM outbox.inbox x WHERE x.seen_at <= v_now - v_kept
                                ORDER BY x.seen_at LIMIT v_batch FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS v_removed = ROW_COUNT;
    IF v_removed = v_batch THEN
        v_rest := interval '50 milliseconds';
    END IF;
    SELECT x.seen_at INTO v_oldest FROM outbox.inbox x ORDER BY x.seen_at LIMIT 1;
    -- One by one only where they are rare: a stream of them goes once a second.
    RETURN CASE WHEN v_oldest IS NULL THEN NULL
                WHEN v_removed > 0 THEN greatest(v_oldest + v_kept, v_now + v_rest)
                ELSE greatest(v_oldest + v_kept, CASE WHEN v_oldest + v_kept <= v_now THEN v_now + v_rest END) END;
END
$$;
COMMENT ON FUNCTION outbox._forget_seen(timestamptz) IS 'removes what the inbox has remembered long enough; returns when to come back';

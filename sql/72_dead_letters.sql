-- Dead letters: another try for what was given up on, or once more for what was delivered; and removing them.

CREATE FUNCTION outbox._owed_again(v_ids bigint[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    UPDATE @extschema@.outbox_events e SET listed = true, routed = e.available_at IS NOT NULL
     WHERE e.id = ANY (v_ids) AND NOT e.listed;
    PERFORM outbox._refresh(v_ids);
    PERFORM outbox._wake('due');
END
$$;
COMMENT ON FUNCTION outbox._owed_again(bigint[]) IS 'events with new deliveries are pending again';

-- Owes an event again to one destination, or (null) to each that gave it up; a processed event, to each that wants it.
CREATE FUNCTION outbox.replay(event_id uuid, destination text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET lock_timeout = 0
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_event record;
    v_changed bigint;
BEGIN
    PERFORM outbox._require_destination(replay.destination) WHERE replay.destination IS NOT NULL;
    -- Locks the row first: the holder of the claim lock must not wait for one. Retention, which takes no claim lock, passes
    -- it meanwhile.
    PERFORM FROM @extschema@.outbox_events e WHERE e.event_id = replay.event_id FOR UPDATE;
    PERFORM outbox._lock();
    SELECT e.id, e.event_type, e.status, e.claim_token, outbox._ordering_key(e.aggregate_type, e.aggregate_id) AS key,
           e.status = 'failed' OR EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id AND d.status = 'failed') AS dead
      INTO v_event FROM @extschema@.outbox_events e WHERE e.event_id = replay.event_id;
    IF NOT FOUND OR NOT (v_event.dead OR v_event.status = 'processed') THEN
        RETURN false;
    END IF;
    WITH again AS (
        UPDATE outbox.delivery d SET status = 'pending', attempts = 0, next_attempt_at = clock_timestamp(), owed_since = clock_timestamp()
         WHERE d.id = v_event.id AND d.status = 'failed'
           AND (replay.destination IS NULL OR d.destination = replay.destination)
        RETURNING 1
    ), anew AS (
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, next_attempt_at)
        SELECT v_event.id, t.name, v_event.key, 'pending', clock_timestamp()
          FROM (SELECT replay.destination AS name WHERE replay.destination IS NOT NULL AND v_event.claim_token IS NULL
                UNION
                SELECT r.destination FROM outbox._routes_or_nobody(ARRAY[v_event.id]) r
                 WHERE replay.destination IS NULL AND NOT v_event.dead) t
        ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING
        RETURNING 1
    )
    SELECT (SELECT count(*) FROM again) + (SELECT count(*) FROM anew) INTO v_changed;
    IF v_changed > 0 THEN
        PERFORM outbox._owed_again(ARRAY[v_event.id]);
    END IF;
    RETURN v_changed > 0;
END
$$;
COMMENT ON FUNCTION outbox.replay(uuid, text) IS
    'owes an event again: a dead letter to those that gave it up, a processed one to all that want it, or to one destination';

CREATE FUNCTION outbox.replay_failed(event_types text DEFAULT '*', destination text DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_ids bigint[];
BEGIN
    PERFORM outbox._check_patterns(ARRAY[replay_failed.event_types]);
    PERFORM outbox._require_destination(replay_failed.destination) WHERE replay_failed.destination IS NOT NULL;
    PERFORM outbox._lock();
    WITH again AS (
        UPDATE outbox.delivery d SET status = 'pending', attempts = 0, next_attempt_at = clock_timestamp(), owed_since = clock_timestamp()
          FROM @extschema@.outbox_events e
         WHERE e.id = d.id AND d.status = 'failed'
           AND e.event_type LIKE outbox._like_pattern(replay_failed.event_types)
           AND (replay_failed.destination IS NULL OR d.destination = replay_failed.destination)
        RETURNING d.id
    )
    SELECT array_agg(DISTINCT a.id) INTO v_ids FROM again a;
    IF v_ids IS NOT NULL THEN
        PERFORM outbox._owed_again(v_ids);
    END IF;
    RETURN coalesce(cardinality(v_ids), 0);
END
$$;
COMMENT ON FUNCTION outbox.replay_failed(text, text) IS
    'owes all dead letters of these types again; returns the number of events';

CREATE FUNCTION outbox.purge_failed(older_than interval DEFAULT '0', event_types text DEFAULT '*') RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_gone record;
    v_count bigint;
BEGIN
    PERFORM outbox._check_patterns(ARRAY[event_types]);
    PERFORM outbox._lock();
    -- Checks must not be left to the commit, which is the caller's.
    IF EXISTS (SELECT FROM pg_constraint c
                WHERE c.confrelid = '@extschema@.outbox_events'::regclass AND c.contype = 'f' AND c.condeferrable) THEN
        SET CONSTRAINTS ALL IMMEDIATE;
    END IF;
    WITH dead AS (
        DELETE FROM outbox.delivery d USING @extschema@.outbox_events e
         WHERE e.id = d.id AND d.status = 'failed' AND e.created_at <= clock_timestamp() - older_than
           AND e.event_type LIKE outbox._like_pattern(purge_failed.event_types)
        RETURNING d.id, d.destination, d.ordering_key
    )
    SELECT array_agg(d.id) AS ids, array_agg(d.destination) AS destinations, array_agg(d.ordering_key) AS keys
      INTO v_gone FROM dead d;
    DELETE FROM @extschema@.outbox_events e WHERE e.id = ANY (v_gone.ids) AND e.status = 'failed';
    GET DIAGNOSTICS v_count = ROW_COUNT;
    PERFORM outbox._refresh(v_gone.ids);
    PERFORM outbox._promote(v_gone.destinations, v_gone.keys);
    RETURN v_count;
END
$$;
COMMENT ON FUNCTION outbox.purge_failed(interval, text) IS
    'removes dead letters of events created longer ago; returns the number of events removed';

-- Dead letters: another try for what was given up on, or once more for what was delivered; and removing them.

CREATE FUNCTION outbox._owed_again(v_ids bigint[]) RETURNS void
    LANGUAGE plpgsql SET enable_seqscan = off
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

-- Null stands for no restriction, wherever an operator narrows down what is replayed or purged.
CREATE FUNCTION outbox._check_selection(event_types text, destination text, error text, max_events int) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    PERFORM outbox._check_patterns(ARRAY[coalesce(event_types, '*')]);
    PERFORM outbox._require_destination(destination) WHERE destination IS NOT NULL;
    IF error = '' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'error must not be empty',
            HINT = 'Use ''*'' for all errors, or a pattern such as ''*timeout*''.';
    ELSIF max_events < 1 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('max_events must be at least 1, not %s', max_events),
            HINT = 'Leave it out for all events, or ask with dry_run how many there are.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_selection(text, text, text, int) IS 'an error for a selection of events that makes no sense';

-- No settings of its own, so that the planner can merge it into the query that uses it.
CREATE FUNCTION outbox._dead(event_types text, destination text, since timestamptz, until timestamptz, error text)
    RETURNS TABLE (id bigint, at tid)
    LANGUAGE sql STABLE
AS $$
    SELECT d.id, d.ctid
      FROM outbox.delivery d JOIN @extschema@.outbox_events e ON e.id = d.id
     WHERE d.status = 'failed' AND e.event_type LIKE outbox._like_pattern(coalesce($1, '*'))
       AND ($2 IS NULL OR d.destination = $2) AND ($3 IS NULL OR e.created_at >= $3) AND ($4 IS NULL OR e.created_at < $4)
       AND (coalesce($5, '*') = '*' OR d.last_error LIKE outbox._like_pattern($5))
$$;
COMMENT ON FUNCTION outbox._dead(text, text, timestamptz, timestamptz, text) IS
    'the dead letters of events of these types, created from since on and before until, with such an error';

CREATE FUNCTION outbox.replay_failed(
    event_types text DEFAULT '*', destination text DEFAULT NULL, since timestamptz DEFAULT NULL,
    until timestamptz DEFAULT NULL, error text DEFAULT '*', max_events int DEFAULT NULL, dry_run boolean DEFAULT false)
    RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_ids bigint[];
BEGIN
    PERFORM outbox._check_selection(replay_failed.event_types, replay_failed.destination, replay_failed.error, replay_failed.max_events);
    IF dry_run IS DISTINCT FROM false THEN
        RETURN (SELECT count(*) FROM (
            SELECT DISTINCT f.id FROM outbox._dead(replay_failed.event_types, replay_failed.destination, replay_failed.since,
                                                   replay_failed.until, replay_failed.error) f
             LIMIT replay_failed.max_events) x);
    END IF;
    PERFORM outbox._lock();
    WITH dead AS MATERIALIZED (
        SELECT f.id, f.at FROM outbox._dead(replay_failed.event_types, replay_failed.destination, replay_failed.since,
                                               replay_failed.until, replay_failed.error) f
    ), oldest AS MATERIALIZED (
        SELECT DISTINCT f.id FROM dead f ORDER BY f.id LIMIT replay_failed.max_events
    ), again AS (
        UPDATE outbox.delivery d SET status = 'pending', attempts = 0, next_attempt_at = clock_timestamp(), owed_since = clock_timestamp()
         WHERE d.ctid = ANY (ARRAY(SELECT f.at FROM dead f WHERE f.id <= (SELECT max(o.id) FROM oldest o)))
    )
    SELECT array_agg(o.id) INTO v_ids FROM oldest o;
    IF v_ids IS NOT NULL THEN
        PERFORM outbox._owed_again(v_ids);
    END IF;
    RETURN coalesce(cardinality(v_ids), 0);
END
$$;
COMMENT ON FUNCTION outbox.replay_failed(text, text, timestamptz, timestamptz, text, int, boolean) IS
    'owes dead letters again, those of the oldest events first; returns the number of events; dry_run: the number alone';

-- Another destination may still be owed the event, or have given it up too: then the event stays.
CREATE FUNCTION outbox.purge_failed(
    older_than interval DEFAULT '0', event_types text DEFAULT '*', destination text DEFAULT NULL, error text DEFAULT '*',
    dry_run boolean DEFAULT false) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_until timestamptz := CASE WHEN older_than > interval '0' THEN clock_timestamp() - older_than END;
    v_gone record;
BEGIN
    PERFORM outbox._check_selection(purge_failed.event_types, purge_failed.destination, purge_failed.error, NULL);
    IF dry_run IS DISTINCT FROM false THEN
        RETURN (SELECT count(DISTINCT f.id) FROM outbox._dead(purge_failed.event_types, purge_failed.destination, NULL, v_until,
                                                              purge_failed.error) f);
    END IF;
    PERFORM outbox._lock();
    -- Checks must not be left to the commit, which is the caller's.
    IF EXISTS (SELECT FROM pg_constraint c
                WHERE c.confrelid = '@extschema@.outbox_events'::regclass AND c.contype = 'f' AND c.condeferrable) THEN
        SET CONSTRAINTS ALL IMMEDIATE;
    END IF;
    WITH dead AS MATERIALIZED (
        SELECT f.id, f.at FROM outbox._dead(purge_failed.event_types, purge_failed.destination, NULL, v_until, purge_failed.error) f
    ), free AS MATERIALIZED (
        SELECT e.id FROM @extschema@.outbox_events e WHERE e.id = ANY (ARRAY(SELECT f.id FROM dead f)) FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM outbox.delivery d
         WHERE d.ctid = ANY (ARRAY(SELECT f.at FROM dead f WHERE f.id IN (SELECT x.id FROM free x)))
        RETURNING d.id, d.destination, d.ordering_key
    )
    SELECT array_agg(g.id) AS ids, array_agg(g.destination) AS destinations, array_agg(g.ordering_key) AS keys,
           count(DISTINCT g.id) AS events, (SELECT count(DISTINCT f.id) FROM dead f) - count(DISTINCT g.id) AS locked
      INTO v_gone FROM gone g;
    IF v_gone.locked > 0 THEN
        RAISE WARNING USING MESSAGE = format('dead letters of %s events stay, because other transactions have the events locked',
                                             v_gone.locked),
            HINT = 'Purge again when these transactions have ended.';
    END IF;
    DELETE FROM @extschema@.outbox_events e
     WHERE e.id = ANY (v_gone.ids) AND e.listed AND e.claim_token IS NULL
       AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id);
    PERFORM outbox._refresh(v_gone.ids);
    PERFORM outbox._promote(v_gone.destinations, v_gone.keys);
    RETURN v_gone.events;
END
$$;
COMMENT ON FUNCTION outbox.purge_failed(interval, text, text, text, boolean) IS
    'removes dead letters of events created longer ago, and the events that nobody else is owed or gave up; returns the number of events; dry_run: the number alone';

-- Removes one event's dead letters, or the one of a destination; the event too, when nobody else is owed or gave it up.
CREATE FUNCTION outbox.purge(event_id uuid, destination text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0 SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_id bigint;
    v_gone record;
BEGIN
    PERFORM outbox._require_destination(purge.destination) WHERE purge.destination IS NOT NULL;
    -- Locks the row first: the holder of the claim lock must not wait for one.
    SELECT e.id INTO v_id FROM @extschema@.outbox_events e WHERE e.event_id = purge.event_id FOR UPDATE;
    PERFORM outbox._lock();
    -- Checks must not be left to the commit, which is the caller's.
    IF EXISTS (SELECT FROM pg_constraint c
                WHERE c.confrelid = '@extschema@.outbox_events'::regclass AND c.contype = 'f' AND c.condeferrable) THEN
        SET CONSTRAINTS ALL IMMEDIATE;
    END IF;
    WITH gone AS (
        DELETE FROM outbox.delivery d
         WHERE d.id = v_id AND d.status = 'failed' AND (purge.destination IS NULL OR d.destination = purge.destination)
        RETURNING d.destination, d.ordering_key
    )
    SELECT array_agg(g.destination) AS destinations, array_agg(g.ordering_key) AS keys INTO v_gone FROM gone g;
    IF v_gone.destinations IS NULL THEN
        RETURN false;
    END IF;
    DELETE FROM @extschema@.outbox_events e
     WHERE e.id = v_id AND e.listed AND e.claim_token IS NULL
       AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id);
    PERFORM outbox._refresh(ARRAY[v_id]);
    PERFORM outbox._promote(v_gone.destinations, v_gone.keys);
    RETURN true;
END
$$;
COMMENT ON FUNCTION outbox.purge(uuid, text) IS
    'removes the dead letters of one event, or that of one destination, and the event if nobody else is owed or gave it up';

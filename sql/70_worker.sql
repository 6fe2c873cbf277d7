-- What the background worker calls, each in a transaction of its own: recovery at its start, what is due when a timer
-- fires, the end of leases and of attached sessions, and the texts it announces. The worker sets a short lock_timeout and
-- tries again what fails; what it announces waits for none of this.

-- Everything in shared memory follows from the tables. Run when the worker starts, and after rows arrived with a status
-- of their own (a restore). Returns when to look for what is due: at once. v_count: shared memory is new, so that
-- events are counted; a worker that comes back on a running server finds the counters right. Writers are not kept out:
-- what they add while the rows are counted is added to the count.
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
    -- On a server so busy that no moment is quiet the last count is nearly right, and the worker makes another.
    FOR v_try IN 1..100 LOOP
        PERFORM outbox._count_begin();
        SELECT count(*) FILTER (WHERE e.status = 'pending') AS pending,
               count(*) FILTER (WHERE e.status = 'processing') AS processing,
               count(*) FILTER (WHERE e.status = 'processed') AS processed,
               count(*) FILTER (WHERE e.status = 'failed') AS failed,
               min(e.id) FILTER (WHERE (e.status = 'pending' AND NOT e.expanded) OR e.claim_token IS NOT NULL) AS mark,
               max(e.id) FILTER (WHERE e.claim_token IS NOT NULL) AS head, CASE WHEN max(e.id) < 9223372036854775807 THEN max(e.id) + 1 ELSE max(e.id) END AS past_all
          INTO v_counts FROM @extschema@.outbox_events e
         WHERE outbox._count_from_here(v_try = 100);
        EXIT WHEN outbox._count_from_here(false);
    END LOOP;
    PERFORM outbox._recovered(coalesce(v_counts.mark, v_counts.past_all, 1), coalesce(v_counts.head, 0),
                              v_counts.pending, v_counts.processing, v_counts.processed, v_counts.failed,
                              (SELECT count(*) FROM outbox.claims));
    RETURN clock_timestamp();
END
$$;
COMMENT ON FUNCTION outbox._recover(boolean) IS 'rebuilds shared memory from the tables and releases the claims of the dead';

-- No session survives the server: what was claimed before is free. Claims of consumers that don't wait for the disk may
-- have been lost in a crash: their tokens are not given out again, and that is on disk before the first new one.
CREATE FUNCTION outbox._forget_earlier_starts() RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._release(ARRAY(SELECT c.token FROM outbox.claims c WHERE c.boot <> outbox._boot()))
      WHERE EXISTS (SELECT FROM outbox.claims c WHERE c.boot <> outbox._boot());
    PERFORM outbox._commit_to_disk();
    PERFORM setval('outbox.claim_token_seq', nextval('outbox.claim_token_seq') + 100000);
END
$$;
COMMENT ON FUNCTION outbox._forget_earlier_starts() IS 'ends all claims of earlier starts of the server';

-- Rows that came with a restore, or were copied by hand, in whatever order and number of transactions. So nothing follows
-- from a row that is not there: it may be on its way. What follows from those that are there:
--   an event claimed by an unknown claim is given back; where some of its deliveries are listed, all that want it are owed it
--   a delivery claimed by an unknown claim is given back
--   a delivery that waits for nothing goes on, and an event's status is what its deliveries say
-- What contradicts itself is counted for outbox.health(), and left for outbox.repair().
CREATE FUNCTION outbox._mend() RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_locked bigint[];
    v_unknown bigint[];
BEGIN
    v_unknown := ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                        WHERE e.claim_token IS NOT NULL
                          AND NOT EXISTS (SELECT FROM outbox.claims c WHERE c.token = e.claim_token));
    v_locked := outbox._locked(v_unknown);
    WITH lost AS (
        UPDATE @extschema@.outbox_events e SET claim_token = NULL
         WHERE e.id = ANY (v_unknown) AND e.id <> ALL (v_locked) AND e.expanded AND e.status = 'processing'
           AND EXISTS (SELECT FROM outbox.destination)
        RETURNING e.id, e.event_type, outbox._aggregate_key(e.aggregate_type, e.aggregate_id) AS key
    )
    INSERT INTO outbox.delivery (id, destination, aggregate_key, status, next_attempt_at)
    SELECT l.id, t.name, l.key, 'pending', clock_timestamp()
      FROM lost l JOIN outbox.destination t ON l.event_type LIKE ANY (t.like_patterns)
    ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING;
    UPDATE @extschema@.outbox_events e
       SET status = CASE e.status WHEN 'processing' THEN 'pending' ELSE e.status END, claim_token = NULL
     WHERE e.id = ANY (v_unknown) AND e.id <> ALL (v_locked) AND NOT e.expanded;
    UPDATE @extschema@.outbox_events e SET routed = true
     WHERE e.available_at IS NOT NULL AND NOT e.routed AND (e.status <> 'pending' OR e.expanded) AND e.id <> ALL (v_locked);
    UPDATE outbox.delivery d SET status = 'pending', claim_token = NULL, next_attempt_at = clock_timestamp()
     WHERE d.status = 'processing' AND NOT EXISTS (SELECT FROM outbox.claims c WHERE c.token = d.claim_token);
    UPDATE outbox.delivery d SET next_attempt_at = clock_timestamp()
     WHERE d.status = 'pending' AND d.next_attempt_at IS NULL AND d.aggregate_key IS NULL
       AND EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = d.id);
    PERFORM outbox._promote_lines(ARRAY(SELECT DISTINCT d.aggregate_key FROM outbox.delivery d
                                         WHERE d.status = 'pending' AND d.next_attempt_at IS NULL
                                           AND d.aggregate_key IS NOT NULL
                                           AND EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = d.id)));
    PERFORM outbox._refresh_all();
    PERFORM outbox._look_again() WHERE v_locked <> '{}';
    DELETE FROM outbox.contradiction;
    INSERT INTO outbox.contradiction (kind, found)
    SELECT x.kind, x.n FROM (
        SELECT 'event without delivery' AS kind, count(*) AS n FROM @extschema@.outbox_events e
         WHERE e.status IN ('pending', 'processing') AND e.expanded AND e.claim_token IS NULL
           AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id)
        UNION ALL
        SELECT 'delivery without event', count(*) FROM outbox.delivery d
         WHERE NOT EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = d.id)) x
     WHERE x.n > 0;
END
$$;
COMMENT ON FUNCTION outbox._mend() IS 'draws from rows that came with a restore what follows from them, and counts what contradicts itself';

CREATE FUNCTION outbox._refresh_all() RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    PERFORM outbox._refresh(ARRAY(
        SELECT e.id FROM @extschema@.outbox_events e
          JOIN (SELECT d.id, CASE WHEN bool_or(d.status = 'processing') THEN 'processing'
                                  WHEN bool_or(d.status = 'pending') THEN 'pending' ELSE 'failed' END AS status
                  FROM outbox.delivery d GROUP BY d.id) s ON s.id = e.id
         WHERE e.claim_token IS NULL AND e.expanded AND e.status <> s.status));
END
$$;
COMMENT ON FUNCTION outbox._refresh_all() IS 'the status of all events that have deliveries';

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
        RETURNING d.aggregate_key, d.claim_token
    )
    SELECT array_agg(DISTINCT g.aggregate_key) FILTER (WHERE g.aggregate_key IS NOT NULL) AS keys,
           array_agg(g.claim_token) FILTER (WHERE g.claim_token IS NOT NULL) AS tokens, count(*) AS n
      INTO v_gone FROM gone g;
    PERFORM outbox._let_go(v_gone.tokens);
    PERFORM outbox._promote_lines(v_gone.keys);
    UPDATE @extschema@.outbox_events e SET status = 'pending', expanded = false, routed = false
     WHERE e.status IN ('pending', 'processing') AND e.expanded AND e.claim_token IS NULL
       AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id);
    GET DIAGNOSTICS v_count = ROW_COUNT;
    DELETE FROM outbox.contradiction;
    PERFORM outbox._wake('due');
    RETURN v_gone.n + v_count;
END
$$;
COMMENT ON FUNCTION outbox.repair() IS
    'after a restore is complete: removes deliveries without event, owes events without delivery to all that want them; returns how many';

CREATE FUNCTION outbox._next_due() RETURNS timestamptz
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    RETURN least(
        (SELECT min(x.next_attempt_at)
           FROM (SELECT d.name FROM outbox.destination d WHERE NOT d.paused AND d.disabled_reason IS NULL
                 UNION ALL SELECT '') t
          CROSS JOIN LATERAL (SELECT d.next_attempt_at FROM outbox.delivery d
                               WHERE d.destination = t.name AND d.status IN ('pending', 'scheduled')
                                 AND d.next_attempt_at > now()
                               ORDER BY d.next_attempt_at LIMIT 1) x),
        (SELECT e.available_at FROM @extschema@.outbox_events e
          WHERE e.available_at > now() AND e.available_at IS NOT NULL AND NOT e.routed AND e.status = 'pending'
          ORDER BY e.available_at LIMIT 1),
        (SELECT min(d.circuit_open_until) FROM outbox.destination d
          WHERE d.circuit_open_until > now() AND NOT d.paused AND d.disabled_reason IS NULL),
        outbox._secrets_end());
END
$$;
COMMENT ON FUNCTION outbox._next_due() IS 'the next moment at which something is due; null: nothing is';

-- The timer fired. Takes no turn: who claims and stays in its transaction holds up no wake-up.
CREATE FUNCTION outbox._due() RETURNS timestamptz
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    IF EXISTS (SELECT FROM (SELECT d.name FROM outbox.destination d WHERE NOT d.paused AND d.disabled_reason IS NULL
                            UNION ALL SELECT '') t
                CROSS JOIN LATERAL (SELECT FROM outbox.delivery d
                                     WHERE d.destination = t.name AND d.status IN ('pending', 'scheduled')
                                       AND d.next_attempt_at <= v_now LIMIT 1) x)
       OR EXISTS (SELECT FROM @extschema@.outbox_events e
                   WHERE e.available_at <= v_now AND e.available_at IS NOT NULL AND NOT e.routed AND e.status = 'pending')
       -- What a claim left behind may have been behind a row that the application had locked.
       OR outbox._is_waiting() THEN
        PERFORM outbox._wake('due');
    END IF;
    IF outbox._forget_secrets(v_now) THEN
        PERFORM pg_notify('outbox_destinations', 'secret');
    END IF;
    RETURN outbox._next_due();
END
$$;
COMMENT ON FUNCTION outbox._due() IS 'wakes consumers for what is due and returns when the next thing is';

-- What can't be released now holds up nothing else. Returns SQLSTATE and message of what was in the way.
CREATE FUNCTION outbox._release_apart(v_tokens bigint[]) RETURNS text
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_token bigint;
    v_error text;
BEGIN
    BEGIN
        PERFORM outbox._release(v_tokens);
        RETURN NULL;
    EXCEPTION WHEN OTHERS THEN
        v_error := SQLSTATE || ' ' || SQLERRM;
    END;
    FOREACH v_token IN ARRAY v_tokens LOOP
        EXIT WHEN cardinality(v_tokens) = 1;
        BEGIN
            PERFORM outbox._release(ARRAY[v_token]);
        EXCEPTION WHEN OTHERS THEN
            v_error := SQLSTATE || ' ' || SQLERRM;
            -- Whoever is in the way was waited for already.
            PERFORM set_config('lock_timeout', '1ms', true);
        END;
    END LOOP;
    RETURN v_error;
END
$$;
COMMENT ON FUNCTION outbox._release_apart(bigint[]) IS 'releases claims, each for itself where not all can be';

-- What was left for later is done, and claims whose lease is over are released. Takes a turn only if there are any. Returns what was in the way of some.
CREATE FUNCTION outbox._end_leases() RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_error text;
BEGIN
    IF EXISTS (SELECT FROM outbox.claims c WHERE c.lease_until <= v_now)
       OR EXISTS (SELECT FROM outbox.touched) OR EXISTS (SELECT FROM outbox.postponed) THEN
        PERFORM outbox._lock();
        PERFORM outbox._catch_up();
        v_error := outbox._release_apart(ARRAY(SELECT c.token FROM outbox.claims c WHERE c.lease_until <= v_now));
    END IF;
    PERFORM outbox._claims(0, (SELECT min(c.lease_until) FROM outbox.claims c WHERE c.lease_until > v_now));
    RETURN v_error;
END
$$;
COMMENT ON FUNCTION outbox._end_leases() IS 'does what was left for later and releases the claims whose lease is over';

-- released: of these attachments, those that hold nothing any more. error: what was in the way of the others.
CREATE FUNCTION outbox._release_attachments(v_attachments bigint[], OUT released bigint[], OUT error text)
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_tokens bigint[] := ARRAY(SELECT c.token FROM outbox.claims c WHERE c.attachment = ANY (v_attachments));
BEGIN
    -- Those that ended claim nothing any more: what they hold is seen without a turn.
    IF cardinality(v_tokens) > 0 THEN
        PERFORM outbox._lock();
        error := outbox._release_apart(v_tokens);
    END IF;
    released := ARRAY(SELECT a.id FROM unnest(v_attachments) AS a (id)
                       WHERE NOT EXISTS (SELECT FROM outbox.claims c WHERE c.attachment = a.id));
END
$$;
COMMENT ON FUNCTION outbox._release_attachments(bigint[]) IS 'releases the claims of sessions that ended';

-- The announcements of events, as bytes in the database's encoding, in the order of id. bodies: as outbox.notify_payload
-- wants it; cuts: without the data, marked as truncated; shorts: the identities alone. What can't fit in a notification is
-- not even fetched: texts of more than 8,000 bytes, and data of more than 65,536 (as stored, JSON takes up to five times
-- what it takes as text).
CREATE FUNCTION outbox._describe(v_ids bigint[], v_mode text, OUT bodies bytea[], OUT cuts bytea[], OUT shorts bytea[])
    LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    SELECT array_agg(convert_to(CASE WHEN v_mode = 'id' THEN s.open || '}'
                                     WHEN v_mode = 'metadata' THEN m.open || '}'
                                     WHEN f.fits THEN m.open || ',"metadata":' || e.metadata::text
                                                             || ',"event_data":' || e.event_data::text || '}' END,
                                getdatabaseencoding()) ORDER BY e.id),
           array_agg(CASE WHEN v_mode = 'full' THEN convert_to(m.open || ',"truncated":true}', getdatabaseencoding()) END
                     ORDER BY e.id),
           array_agg(convert_to(s.open || ',"truncated":true}', getdatabaseencoding()) ORDER BY e.id)
      INTO bodies, cuts, shorts
      FROM unnest(v_ids) AS i (id)
     CROSS JOIN LATERAL (SELECT x.* FROM @extschema@.outbox_events x WHERE x.id = i.id OFFSET 0) e
     CROSS JOIN LATERAL (SELECT '{"id":' || e.id || ',"event_id":"' || e.event_id || '"' AS open OFFSET 0) s
     CROSS JOIN LATERAL (SELECT CASE WHEN v_mode <> 'id'
                                      AND octet_length(e.event_type)::bigint + octet_length(e.event_version)
                                        + coalesce(octet_length(e.aggregate_type), 0)
                                        + coalesce(octet_length(e.aggregate_id), 0)
                                        + coalesce(octet_length(e.tenant_id), 0) <= 8000 THEN s.open
               || ',"event_type":' || to_json(e.event_type)::text
               || ',"event_version":' || to_json(e.event_version)::text
               || ',"aggregate_type":' || coalesce(to_json(e.aggregate_type)::text, 'null')
               || ',"aggregate_id":' || coalesce(to_json(e.aggregate_id)::text, 'null')
               || ',"tenant_id":' || coalesce(to_json(e.tenant_id)::text, 'null')
               || ',"created_at":"' || to_char(e.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') || '"' END AS open
                         OFFSET 0) m
     CROSS JOIN LATERAL (SELECT v_mode = 'full' AND m.open IS NOT NULL
                            AND outbox._raw_size(e.event_data) + outbox._raw_size(e.metadata) <= 65536 AS fits OFFSET 0) f;
END
$$;
COMMENT ON FUNCTION outbox._describe(bigint[], text) IS 'what a notification says of each event';

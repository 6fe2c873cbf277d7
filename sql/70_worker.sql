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
    PERFORM outbox._release_orphans();
    PERFORM outbox._forget_earlier_starts();
    -- On a server so busy that no moment is quiet the last count is nearly right, and the worker makes another.
    FOR v_try IN 1..100 LOOP
        PERFORM outbox._count_begin();
        SELECT count(*) FILTER (WHERE e.status = 'pending') AS pending,
               count(*) FILTER (WHERE e.status = 'processing') AS processing,
               count(*) FILTER (WHERE e.status = 'processed') AS processed,
               count(*) FILTER (WHERE e.status = 'failed') AS failed,
               min(e.id) FILTER (WHERE (e.status = 'pending' AND NOT e.expanded) OR e.claim_token IS NOT NULL) AS mark,
               max(e.id) FILTER (WHERE e.claim_token IS NOT NULL) AS head, max(e.id) + 1 AS past_all
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

-- Claimed rows whose claim is unknown: they came with a restore, or with rows copied by hand. Where it can't be told any
-- more to whom an event is owed, it is owed to all that want it.
CREATE FUNCTION outbox._release_orphans() RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_expanded record;
BEGIN
    WITH lost AS (
        UPDATE @extschema@.outbox_events e SET claim_token = NULL
         WHERE e.status = 'processing' AND e.expanded AND e.claim_token IS NOT NULL
           AND NOT EXISTS (SELECT FROM outbox.claims c WHERE c.token = e.claim_token)
        RETURNING e.id, e.event_type, outbox._aggregate_key(e.aggregate_type, e.aggregate_id) AS key
    )
    INSERT INTO outbox.delivery (id, destination, aggregate_key, status, next_attempt_at)
    SELECT l.id, t.name, l.key, 'pending', clock_timestamp()
      FROM lost l JOIN outbox.destination t ON l.event_type LIKE ANY (t.like_patterns)
    ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING;
    UPDATE @extschema@.outbox_events e SET status = 'pending', claim_token = NULL
     WHERE e.status = 'processing' AND NOT e.expanded
       AND NOT EXISTS (SELECT FROM outbox.claims c WHERE c.token = e.claim_token);
    UPDATE outbox.delivery d SET status = 'pending', claim_token = NULL, next_attempt_at = clock_timestamp()
     WHERE d.status = 'processing' AND NOT EXISTS (SELECT FROM outbox.claims c WHERE c.token = d.claim_token);
    SELECT array_agg(e.id) FILTER (WHERE e.listed) AS listed, array_agg(e.id) FILTER (WHERE NOT e.listed) AS unlisted
      INTO v_expanded
      FROM (SELECT e.id, EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id) AS listed
              FROM @extschema@.outbox_events e
             WHERE e.status IN ('pending', 'processing') AND e.expanded AND e.claim_token IS NULL) e;
    PERFORM outbox._refresh(v_expanded.listed);
    UPDATE @extschema@.outbox_events e SET status = 'pending', expanded = false WHERE e.id = ANY (v_expanded.unlisted);
END
$$;
COMMENT ON FUNCTION outbox._release_orphans() IS 'gives back what an unknown claim seems to hold';

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
                                       AND d.next_attempt_at <= v_now LIMIT 1) x) THEN
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

-- Claims whose lease is over are released. Takes a turn only if there are any. Returns what was in the way of some.
CREATE FUNCTION outbox._end_leases() RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_error text;
BEGIN
    IF EXISTS (SELECT FROM outbox.claims c WHERE c.lease_until <= v_now) THEN
        PERFORM outbox._lock();
        v_error := outbox._release_apart(ARRAY(SELECT c.token FROM outbox.claims c WHERE c.lease_until <= v_now));
    END IF;
    PERFORM outbox._claims(0, (SELECT min(c.lease_until) FROM outbox.claims c WHERE c.lease_until > v_now));
    RETURN v_error;
END
$$;
COMMENT ON FUNCTION outbox._end_leases() IS 'releases the claims whose lease is over';

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

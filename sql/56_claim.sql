-- The claim itself: what a consumer calls.

-- What a claim hands out: events with the destinations they are owed to, as the text of an array. The caller has the settings.
CREATE FUNCTION outbox._claim(
    max_events int, served text[], lease interval, OUT token bigint, OUT ids bigint[], OUT held text[])
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz;
    v_low bigint;
    v_low_water bigint;
    v_high_water bigint;
    v_new_high_water bigint;
    v_room int := max_events;
    v_reserve int := 0;
    v_asked int;
    v_window bigint;
    v_extra bigint := 200;
    v_served_types text[];
    v_only text[];
    v_ids bigint[] := '{}';
    v_held text[] := '{}';
    v_due_ids bigint[] := '{}';
    v_due_destinations text[] := '{}';
    v_busy bigint[];
    v_fresh record;
    v_serve boolean;
    v_probe boolean;
    v_due boolean;
    v_left boolean := false;
    v_exhausted boolean := false;
    v_listed boolean := false;
    v_unblocked boolean := false;
    v_stuck boolean := false;
    v_more boolean := false;
    v_behind bigint := 0;
    v_unrouted bigint := 0;
    v_count int;
BEGIN
    PERFORM outbox._check_claim(max_events, lease);
    PERFORM outbox._lock();
    v_now := clock_timestamp();
    IF NOT outbox._is_recovered() THEN
        PERFORM outbox._forget_earlier_starts();
    END IF;
    IF EXISTS (SELECT FROM @extschema@.outbox_events e
                WHERE e.available_at <= v_now AND e.available_at IS NOT NULL AND NOT e.routed
                  AND e.status = 'pending' AND NOT e.listed) THEN
        v_left := outbox._route_due(greatest(max_events, 500), v_now);
    END IF;
    IF EXISTS (SELECT FROM outbox.delivery d
                WHERE d.destination = '' AND d.status IN ('pending', 'scheduled') AND d.next_attempt_at IS NOT NULL)
       AND EXISTS (SELECT FROM outbox.destination) THEN
        PERFORM outbox._give_to_destinations();
    END IF;
    SELECT bool_or(l.serve), bool_or(l.probe) INTO v_serve, v_probe FROM outbox._eligible(served) l;
    IF NOT coalesce(v_serve OR v_probe, false) THEN
        RETURN;
    END IF;
    token := outbox._new_token();
    v_high_water := coalesce(outbox._high_water(), (SELECT max(e.id) FROM @extschema@.outbox_events e), 0);
    -- A statement of its own: what lowered the mark is seen only by a snapshot that is taken after it.
    v_low := outbox._low_water(true);
    v_low_water := outbox._advance_low_water(v_low);
    -- A claim that is kept for long must not make every later walk longer.
    IF outbox._is_recovered() AND v_low_water < greatest(v_high_water, -9223372036854755808) - 20000 THEN
        PERFORM outbox._list(ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                                      WHERE e.id BETWEEN v_low_water AND v_high_water - 10000 AND e.claim_token IS NOT NULL));
        v_low_water := outbox._advance_low_water(v_low_water);
    END IF;

    -- Fresh events first, then deliveries that are due, for which half of the room is kept; what they leave goes to fresh
    -- events again.
    v_due := EXISTS (SELECT FROM outbox._eligible(served) l
                      CROSS JOIN LATERAL (SELECT FROM outbox.delivery d
                                           WHERE d.destination = l.name AND d.status = 'pending'
                                             AND d.next_attempt_at <= v_now LIMIT 1) d
                      WHERE l.serve OR l.probe);
    IF v_due THEN
        v_reserve := greatest(max_events / 2, (random() < 0.5)::int);
    END IF;
    FOR v_pass IN 1..2 LOOP
        FOR i IN 1..30 LOOP
            EXIT WHEN v_exhausted OR v_room <= v_reserve;
            v_asked := CASE WHEN v_serve THEN v_room - v_reserve ELSE 1 END;
            v_window := v_asked + v_extra;
            SELECT * INTO v_fresh
              FROM outbox._claim_fresh(token, served, v_low_water, v_high_water, v_asked, v_window, v_left, v_only);
            v_exhausted := NOT v_serve OR (v_only IS NULL AND v_fresh.seen < v_asked AND NOT v_fresh."full");
            v_ids := v_ids || v_fresh.ids;
            v_held := v_held || v_fresh.held;
            v_room := v_room - coalesce(cardinality(v_fresh.ids), 0);
            v_behind := v_behind + v_fresh.behind;
            v_unrouted := v_unrouted + v_fresh.unrouted;
            v_stuck := v_stuck OR v_fresh.stuck > 0;
            IF v_serve AND NOT v_unblocked AND v_fresh.seen < v_asked AND v_fresh.behind - v_fresh.stuck >= 200 THEN
                -- Too many wait behind events in flight: they go into their lines, and the walk gets past them.
                PERFORM outbox._list(ARRAY(SELECT f.id FROM outbox._in_flight(v_low_water, v_high_water) f));
                v_exhausted := false;
                v_listed := true;
                v_unblocked := true;
            ELSIF v_fresh."full" AND v_fresh.seen < v_asked THEN
                -- What can't go now fills the window: a wider one sees what stands behind it.
                v_extra := 2 * v_extra + v_fresh.behind;
            ELSIF i >= 8 THEN
                EXIT;
            ELSIF v_served_types IS NULL AND v_serve AND 2 * coalesce(cardinality(v_fresh.ids), 0) < v_fresh.seen THEN
                -- Most of what stands in front is owed to others: what is owed to those that are served goes first.
                v_served_types := ARRAY(SELECT unnest(l.like_patterns) FROM outbox._eligible(served) l
                                        WHERE l.serve);
                v_only := v_served_types;
            ELSE
                v_only := NULL;
            END IF;
        END LOOP;
        v_new_high_water := greatest(v_high_water, (SELECT max(i) FROM unnest(v_ids) AS i));
        -- A half-open circuit may have its probe in what was just parked.
        EXIT WHEN v_pass = 2 OR v_room <= 0 OR NOT (v_due OR v_probe);
        SELECT coalesce(d.ids, '{}'), coalesce(d.destinations, '{}'), d.busy, d.more
          INTO v_due_ids, v_due_destinations, v_busy, v_more
          FROM outbox._claim_due(token, served, v_low_water, v_new_high_water, v_room, v_left) d;
        v_room := v_room - cardinality(v_due_ids);
        v_reserve := 0;
        IF v_busy IS NOT NULL THEN
            PERFORM outbox._list(ARRAY(SELECT f.id FROM outbox._in_flight(v_low_water, v_new_high_water) f WHERE f.key = ANY (v_busy)));
            v_listed := true;
        END IF;
        IF cardinality(v_due_ids) > 0 THEN
            -- Of these events, what claims hold for other destinations is listed now, while it can be told from this.
            PERFORM outbox._list(ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                                          WHERE e.id = ANY (v_due_ids) AND e.claim_token IS NOT NULL));
            v_listed := true;
        END IF;
    END LOOP;
    IF v_more OR (NOT v_exhausted AND v_room > 0) THEN
        PERFORM outbox._wake('due');    -- there is room for more: the next claim goes on from here
    END IF;
    IF v_stuck THEN
        PERFORM outbox._look_again();
    END IF;
    PERFORM outbox._waiting(v_behind > 0 OR v_busy IS NOT NULL);
    PERFORM outbox._count_unrouted(v_unrouted) WHERE v_unrouted > 0;
    PERFORM outbox._set_water(v_low_water, v_new_high_water);
    v_count := cardinality(v_ids) + cardinality(v_due_ids);
    IF v_count = 0 THEN
        RETURN;
    END IF;
    IF v_listed THEN
        v_count := (SELECT count(*) FROM @extschema@.outbox_events e WHERE e.id = ANY (v_ids) AND e.claim_token = token)
                 + (SELECT count(*) FROM outbox.delivery d WHERE d.claim_token = token);
    END IF;
    INSERT INTO outbox.claims (token, attachment, boot, lease_until, ids, held)
    VALUES (token, outbox._attachment(), outbox._boot(), clock_timestamp() + lease, v_ids || v_due_ids, v_count);
    PERFORM outbox._open_claims(1, clock_timestamp() + lease);
    IF cardinality(v_due_ids) > 0 THEN
        SELECT array_agg(u.id), array_agg(u.destinations::text) INTO v_ids, v_held
          FROM (SELECT x.id, array_agg(x.destination ORDER BY x.destination) AS destinations
                  FROM (SELECT f.id, unnest(f.held::text[]) AS destination FROM unnest(v_ids, v_held) AS f (id, held)
                        UNION ALL
                        SELECT d.id, d.destination FROM unnest(v_due_ids, v_due_destinations) AS d (id, destination)) x
                 GROUP BY x.id) u;
    END IF;
    ids := v_ids;
    held := v_held;
END
$$;
COMMENT ON FUNCTION outbox._claim(int, text[], interval) IS 'what outbox.claim and outbox.claim_refs share';

CREATE FUNCTION outbox.claim(
    max_events int DEFAULT 100, destinations text[] DEFAULT NULL, lease interval DEFAULT '1 minute')
    RETURNS SETOF outbox.claimed_event
    LANGUAGE plpgsql SECURITY DEFINER ROWS 100
    SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0 SET lock_timeout = 0
AS $$
#variable_conflict use_column
DECLARE
    v_claim record;
BEGIN
    SELECT * INTO v_claim FROM outbox._claim(claim.max_events, claim.destinations, claim.lease);
    RETURN QUERY
    SELECT e.id, e.event_id, e.event_type, e.event_version, e.aggregate_type, e.aggregate_id, e.tenant_id,
           e.event_data, e.metadata, e.created_at, e.retry_count, array_remove(h.held::text[], ''), v_claim.token
      FROM unnest(v_claim.ids, v_claim.held) AS h (id, held)
     CROSS JOIN LATERAL (SELECT x.* FROM @extschema@.outbox_events x WHERE x.id = h.id OFFSET 0) e
     ORDER BY e.id;
END
$$;
COMMENT ON FUNCTION outbox.claim(int, text[], interval) IS
    'hands out up to max_events events, oldest first, to be settled with ack, fail, reject or release before the lease ends';

-- For a consumer whose claim failed because one event of it can't be sent: no client can read a text that is longer than
-- 1 GB, or bytes that are none of its encoding. It claims like this, then asks for each event by itself.
CREATE FUNCTION outbox.claim_refs(
    max_events int DEFAULT 100, destinations text[] DEFAULT NULL, lease interval DEFAULT '1 minute')
    RETURNS SETOF outbox.claimed_ref
    LANGUAGE plpgsql SECURITY DEFINER ROWS 100
    SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0 SET lock_timeout = 0
AS $$
#variable_conflict use_column
DECLARE
    v_claim record;
BEGIN
    SELECT * INTO v_claim FROM outbox._claim(claim_refs.max_events, claim_refs.destinations, claim_refs.lease);
    RETURN QUERY
    SELECT e.id, e.event_id, e.retry_count, array_remove(h.held::text[], ''), v_claim.token
      FROM unnest(v_claim.ids, v_claim.held) AS h (id, held)
     CROSS JOIN LATERAL (SELECT x.* FROM @extschema@.outbox_events x WHERE x.id = h.id OFFSET 0) e
     ORDER BY e.id;
END
$$;
COMMENT ON FUNCTION outbox.claim_refs(int, text[], interval) IS
    'as outbox.claim, without what the events hold: see outbox.claimed';

CREATE FUNCTION outbox.claimed(claim_token bigint, id bigint) RETURNS SETOF outbox.claimed_event
    LANGUAGE plpgsql STABLE SECURITY DEFINER ROWS 1
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT e.id, e.event_id, e.event_type, e.event_version, e.aggregate_type, e.aggregate_id, e.tenant_id,
           e.event_data, e.metadata, e.created_at, e.retry_count,
           ARRAY(SELECT d.destination FROM outbox.delivery d
                  WHERE d.id = e.id AND d.claim_token = claimed.claim_token AND d.destination <> '' ORDER BY 1),
           claimed.claim_token
      FROM @extschema@.outbox_events e
     WHERE e.id = claimed.id
       AND (e.claim_token = claimed.claim_token
            OR EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id AND d.claim_token = claimed.claim_token));
END
$$;
COMMENT ON FUNCTION outbox.claimed(bigint, bigint) IS
    'one event that an open claim holds; destinations are those that are listed: the claim''s own answer names all';

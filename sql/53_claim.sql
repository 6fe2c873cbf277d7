-- The claim itself: what a consumer calls.

-- From now on what a claim holds of these events is listed delivery by delivery.
CREATE FUNCTION outbox._expand(v_ids bigint[], v_token bigint DEFAULT NULL) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    WITH target AS MATERIALIZED (
        SELECT e.id, e.claim_token, e.event_type, outbox._aggregate_key(e.aggregate_type, e.aggregate_id) AS key
          FROM @extschema@.outbox_events e
         WHERE e.id = ANY (v_ids) AND e.status = 'processing' AND e.claim_token IS NOT NULL
           AND (v_token IS NULL OR e.claim_token = v_token)
    ), listed AS (
        INSERT INTO outbox.delivery (id, destination, aggregate_key, status, claim_token)
        SELECT t.id, coalesce(d.name, ''), t.key, 'processing', t.claim_token
          FROM target t
          LEFT JOIN outbox.destination d ON d.since_token < t.claim_token AND t.event_type LIKE ANY (d.like_patterns)
        ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING
        RETURNING claim_token
    ), marked AS (
        UPDATE @extschema@.outbox_events e SET claim_token = NULL, expanded = true FROM target t WHERE e.id = t.id
    )
    UPDATE outbox.claims c SET held = c.held + n.n
      FROM (SELECT u.claim_token, sum(u.n) AS n
              FROM (SELECT claim_token, 1 AS n FROM listed UNION ALL SELECT claim_token, -1 FROM target) u
             GROUP BY u.claim_token) n
     WHERE c.token = n.claim_token;
END
$$;
COMMENT ON FUNCTION outbox._expand(bigint[], bigint) IS 'lists what claims hold of these events in outbox.delivery';

CREATE FUNCTION outbox._advance_mark(mark bigint) RETURNS bigint
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
BEGIN
    RETURN coalesce(
        (SELECT e.id FROM @extschema@.outbox_events e
          WHERE e.id >= mark AND ((e.status = 'pending' AND NOT e.expanded)
                                  OR (e.status = 'processing' AND e.claim_token IS NOT NULL))
          ORDER BY e.id LIMIT 1),
        (SELECT e.id + 1 FROM @extschema@.outbox_events e WHERE e.id >= mark ORDER BY e.id DESC LIMIT 1),
        mark);
END
$$;
COMMENT ON FUNCTION outbox._advance_mark(bigint) IS 'the lowest fresh or claimed event from the mark on';

CREATE FUNCTION outbox.claim(
    max_events int DEFAULT 100, destinations text[] DEFAULT NULL, lease interval DEFAULT '1 minute')
    RETURNS SETOF outbox.claimed_event
    LANGUAGE plpgsql SECURITY DEFINER ROWS 100
    SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_token bigint;
    v_mark bigint;
    v_head bigint;
    v_top bigint;
    v_room int := max_events;
    v_reserve int := 0;
    v_ids bigint[] := '{}';
    v_held text[] := '{}';
    v_due_ids bigint[] := '{}';
    v_due_destinations text[] := '{}';
    v_busy bigint[];
    v_fresh record;
    v_serve boolean;
    v_probe boolean;
    v_exhausted boolean := false;
    v_expanded boolean := false;
    v_more boolean := false;
    v_behind bigint := 0;
    v_unrouted bigint := 0;
    v_count int;
BEGIN
    PERFORM outbox._check_claim(max_events, lease);
    PERFORM outbox._lock();
    PERFORM outbox._route_due(max_events);
    SELECT bool_or(l.serve), bool_or(l.probe) INTO v_serve, v_probe FROM outbox._lanes(claim.destinations) l;
    IF NOT coalesce(v_serve OR v_probe, false) THEN
        RETURN;
    END IF;
    v_token := nextval('outbox.claim_token_seq');
    v_head := outbox._claim_head();
    v_mark := outbox._advance_mark(outbox._low_mark(true));
    -- A claim that is kept for long must not make every later walk longer.
    IF v_head - v_mark > 20000 THEN
        PERFORM outbox._expand(ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                                      WHERE e.id BETWEEN v_mark AND v_head - 10000 AND e.claim_token IS NOT NULL));
        v_mark := outbox._advance_mark(v_mark);
    END IF;

    -- Fresh events first, then deliveries that are due, for which half of the room is kept; what they leave goes to fresh
    -- events again.
    IF EXISTS (SELECT FROM outbox._lanes(claim.destinations) l
                CROSS JOIN LATERAL (SELECT FROM outbox.delivery d
                                     WHERE d.destination = l.name AND d.status = 'pending'
                                       AND d.next_attempt_at <= now() LIMIT 1) d
                WHERE l.serve OR l.probe) THEN
        v_reserve := greatest(max_events / 2, (random() < 0.5)::int);
    END IF;
    FOR v_pass IN 1..2 LOOP
        FOR i IN 1..8 LOOP
            EXIT WHEN v_exhausted OR v_room <= v_reserve;
            SELECT * INTO v_fresh
              FROM outbox._claim_fresh(v_token, claim.destinations, v_mark, v_head,
                                       CASE WHEN v_serve THEN v_room - v_reserve ELSE 1 END);
            v_exhausted := NOT v_serve OR v_fresh.seen < v_room - v_reserve;
            v_ids := v_ids || v_fresh.ids;
            v_held := v_held || v_fresh.held;
            v_room := v_room - coalesce(cardinality(v_fresh.ids), 0);
            v_behind := v_behind + v_fresh.behind;
            v_unrouted := v_unrouted + v_fresh.unrouted;
            IF v_exhausted AND v_fresh.behind >= 200 THEN
                -- Too many wait behind events in flight: they go into their lines, and the walk gets past them.
                PERFORM outbox._expand(ARRAY(SELECT f.id FROM outbox._in_flight(v_mark, v_head) f));
                v_exhausted := false;
                v_expanded := true;
            END IF;
        END LOOP;
        v_top := greatest(v_head, (SELECT max(i) FROM unnest(v_ids) AS i));
        EXIT WHEN v_pass = 2 OR v_room <= 0;
        SELECT coalesce(d.ids, '{}'), coalesce(d.destinations, '{}'), d.busy, d.more
          INTO v_due_ids, v_due_destinations, v_busy, v_more
          FROM outbox._claim_due(v_token, claim.destinations, v_mark, v_top, v_room) d;
        v_room := v_room - cardinality(v_due_ids);
        v_reserve := 0;
        IF v_busy IS NOT NULL THEN
            PERFORM outbox._expand(ARRAY(SELECT f.id FROM outbox._in_flight(v_mark, v_top) f WHERE f.key = ANY (v_busy)));
            v_expanded := true;
        END IF;
    END LOOP;
    IF v_more OR (NOT v_exhausted AND v_room > 0) THEN
        PERFORM outbox._wake('due');    -- there is room for more: the next claim goes on from here
    END IF;
    PERFORM outbox._waiting(v_behind > 0 OR v_busy IS NOT NULL);
    PERFORM outbox._unrouted(v_unrouted) WHERE v_unrouted > 0;
    PERFORM outbox._raise_mark(v_mark, v_top);
    v_count := cardinality(v_ids) + cardinality(v_due_ids);
    IF v_count = 0 THEN
        RETURN;
    END IF;
    IF v_expanded THEN
        v_count := (SELECT count(*) FROM @extschema@.outbox_events e WHERE e.id = ANY (v_ids) AND e.claim_token = v_token)
                 + (SELECT count(*) FROM outbox.delivery d WHERE d.claim_token = v_token);
    END IF;
    INSERT INTO outbox.claims (token, attachment, boot, lease_until, ids, held)
    VALUES (v_token, outbox._attachment(), outbox._boot(), clock_timestamp() + lease, v_ids || v_due_ids, v_count);
    PERFORM outbox._claims(1, clock_timestamp() + lease);

    RETURN QUERY
    SELECT e.id, e.event_id, e.event_type, e.event_version, e.aggregate_type, e.aggregate_id, e.tenant_id,
           e.event_data, e.metadata, e.created_at, e.retry_count, h.destinations, v_token
      FROM (SELECT u.id, array_remove(array_agg(u.destination ORDER BY u.destination), '') AS destinations
              FROM (SELECT f.id, unnest(f.held::text[]) AS destination FROM unnest(v_ids, v_held) AS f (id, held)
                    UNION ALL
                    SELECT d.id, d.destination FROM unnest(v_due_ids, v_due_destinations) AS d (id, destination)) u
             GROUP BY u.id) h
      JOIN @extschema@.outbox_events e ON e.id = h.id
     ORDER BY e.id;
END
$$;
COMMENT ON FUNCTION outbox.claim(int, text[], interval) IS
    'hands out up to max_events events, oldest first, to be settled with ack, fail, reject or release before the lease ends';

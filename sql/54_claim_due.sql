-- The other path of a claim: deliveries that are due again.

-- Owes scheduled events whose time has come to each destination that wants them. The next claims route the rest; until
-- then outbox._unrouted_ahead() finds them. A destination may not want an event that others waited for: these are promoted.
CREATE FUNCTION outbox._route_due(max_events int, v_now timestamptz) RETURNS boolean
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_ids bigint[];
    v_keys bigint[];
    v_unrouted bigint;
BEGIN
    v_ids := ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                    WHERE e.available_at <= v_now AND e.available_at IS NOT NULL AND NOT e.routed
                      AND e.status = 'pending' AND NOT e.listed
                    ORDER BY e.available_at, e.id LIMIT max_events FOR NO KEY UPDATE SKIP LOCKED);
    IF cardinality(v_ids) > 0 THEN
        UPDATE @extschema@.outbox_events e SET routed = true, listed = true WHERE e.id = ANY (v_ids);
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, next_attempt_at)
        SELECT r.id, r.destination, r.ordering_key, 'pending', v_now FROM outbox._routes_or_nobody(v_ids) r
        ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING;
        v_keys := ARRAY(SELECT DISTINCT outbox._ordering_key(e.aggregate_type, e.aggregate_id)
                          FROM @extschema@.outbox_events e WHERE e.id = ANY (v_ids) AND e.aggregate_id IS NOT NULL);
        v_unrouted := (SELECT count(*) FROM unnest(v_ids) AS i (id)
                        WHERE NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = i.id));
        UPDATE @extschema@.outbox_events e SET status = 'processed', processed_at = clock_timestamp()
         WHERE v_unrouted > 0 AND e.id = ANY (v_ids) AND e.status = 'pending'
           AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id);
        PERFORM outbox._count_unrouted(v_unrouted) WHERE v_unrouted > 0;
        PERFORM outbox._promote_keys(v_keys);
        PERFORM outbox._wake('due');    -- for those that serve other destinations, and for what there was no room for
    END IF;
    -- Events are left if there are more than one claim routes, or if others have locked them.
    IF NOT EXISTS (SELECT FROM @extschema@.outbox_events e
                    WHERE e.available_at <= v_now AND e.available_at IS NOT NULL AND NOT e.routed
                      AND e.status = 'pending' AND NOT e.listed) THEN
        RETURN false;
    END IF;
    PERFORM outbox._look_again();
    RETURN true;
END
$$;
COMMENT ON FUNCTION outbox._route_due(int, timestamptz) IS
    'turns scheduled events whose time has come into deliveries; whether some are left; part of outbox.claim';

-- Owes events to each destination that wants them, with their attempts and schedule, if they were owed while there was no
-- destination or to one that was removed in flight. All at once: fresh events with the same ordering keys come later.
CREATE FUNCTION outbox._give_to_destinations() RETURNS void
    LANGUAGE plpgsql
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_ids bigint[];
    v_keys bigint[];
BEGIN
    IF NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.destination = '' AND d.status IN ('pending', 'failed')) THEN
        RETURN;
    END IF;
    WITH given AS (
        DELETE FROM outbox.delivery d WHERE d.destination = '' AND d.status IN ('pending', 'failed')
        RETURNING d.*
    ), listed AS (
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, attempts, next_attempt_at, last_error)
        SELECT g.id, r.destination, g.ordering_key, g.status, g.attempts, g.next_attempt_at, g.last_error
          FROM given g JOIN outbox._routes(ARRAY(SELECT x.id FROM given x)) r ON r.id = g.id
        ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING
    )
    SELECT array_agg(g.id), array_agg(DISTINCT g.ordering_key) FILTER (WHERE g.ordering_key IS NOT NULL)
      INTO v_ids, v_keys FROM given g;
    PERFORM outbox._promote_keys(v_keys);
    PERFORM outbox._refresh(v_ids);
END
$$;
COMMENT ON FUNCTION outbox._give_to_destinations() IS 'events that waited for the first destination are owed to those that want them';

-- Takes due deliveries of the destinations that this claim may serve, oldest due first, each with those that wait directly
-- behind it. One that is due while another is ahead of it waits again. Fresh events that appeared late, with a lower id than
-- a delivery of their ordering key, are listed. One whose event another transaction has locked is put off for a moment; one
-- whose event is not there (a restore may still bring it) leaves the way until recovery finds the event.
-- busy: ordering keys that wait for an event claimed whole. more: another claim is needed.
CREATE FUNCTION outbox._claim_due(
    v_token bigint, scope outbox.claim_scope, low_water bigint, high_water bigint, max_events int, unrouted_left boolean,
    OUT ids bigint[], OUT destinations text[], OUT busy bigint[], OUT more boolean)
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_lanes CONSTANT int := 100;    -- destinations looked at, if fewer deliveries were asked for
    v_now timestamptz := clock_timestamp();
    v_put_off boolean;
    v_looked_at text[];
BEGIN
    WITH lane AS MATERIALIZED (
        SELECT * FROM outbox._with_due(scope, v_now) LIMIT greatest(max_events, v_lanes)
    ), found AS MATERIALIZED (
        SELECT l.name, l.blocks, l.probe, x.id, x.ordering_key AS key, x.at,
               (SELECT e.xmax <> 0 FROM @extschema@.outbox_events e WHERE e.id = x.id) AS touched
          FROM lane l
         CROSS JOIN LATERAL (
               SELECT d.id, d.ordering_key, d.ctid AS at FROM outbox.delivery d
                WHERE d.destination = l.name AND d.status = 'pending' AND d.next_attempt_at <= v_now
                ORDER BY d.next_attempt_at, d.id LIMIT CASE WHEN l.probe THEN 1 ELSE max_events END) x
    ), lockable AS MATERIALIZED (
        SELECT e.id FROM @extschema@.outbox_events e
         WHERE e.id = ANY (ARRAY(SELECT f.id FROM found f WHERE f.touched)) FOR NO KEY UPDATE SKIP LOCKED
    ), due AS MATERIALIZED (
        SELECT f.* FROM found f WHERE NOT f.touched OR (f.id IN (SELECT l.id FROM lockable l)) IS TRUE
    ), put_off AS (
        UPDATE outbox.delivery d
           SET next_attempt_at = CASE WHEN d.ctid = ANY (ARRAY(SELECT f.at FROM found f WHERE f.touched IS NOT NULL))
                                      THEN v_now + interval '250 milliseconds' END
         WHERE d.ctid = ANY (ARRAY(SELECT f.at FROM found f
                                    WHERE f.touched IS NULL OR (f.touched AND (f.id IN (SELECT l.id FROM lockable l)) IS NOT TRUE)))
        RETURNING 1
    ), whole AS MATERIALIZED (
        SELECT array_agg(DISTINCT f.key) AS keys FROM outbox._in_flight(low_water, high_water) f WHERE EXISTS (SELECT FROM due)
    ), last AS MATERIALIZED (
        SELECT k.name, k.key, (SELECT max(y.place) FROM outbox.delivery y
                                WHERE y.destination = k.name AND y.ordering_key = k.key) AS id
          FROM (SELECT DISTINCT d.name, d.key FROM due d WHERE d.key IS NOT NULL) k
    ), late AS MATERIALIZED (
        -- One sort, where a join would compare each fresh event with each key.
        SELECT u.id
          FROM (SELECT f.id, max(f.last) OVER (PARTITION BY f.key) AS last
                  FROM (SELECT e.id, outbox._ordering_key(e.aggregate_type, e.aggregate_id) AS key, NULL::bigint AS last
                          FROM @extschema@.outbox_events e
                         WHERE e.id >= low_water AND e.id < (SELECT max(t.id) FROM last t) AND e.status = 'pending' AND NOT e.listed
                           AND e.aggregate_id IS NOT NULL AND e.available_at IS NULL
                        UNION ALL SELECT NULL, t.key, t.id FROM last t) f) u
         WHERE u.id < u.last
    ), late_free AS MATERIALIZED (
        SELECT e.id FROM @extschema@.outbox_events e
         WHERE e.id = ANY (ARRAY(SELECT t.id FROM late t)) FOR NO KEY UPDATE SKIP LOCKED
    ), late_at AS MATERIALIZED (
        SELECT r.id, r.destination AS name, r.ordering_key AS key, (r.id IN (SELECT f.id FROM late_free f)) IS NOT TRUE AS touched
          FROM outbox._routes_or_nobody(ARRAY(SELECT t.id FROM late t)) r
    ), listed AS (
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, next_attempt_at)
        SELECT t.id, t.name, t.key, 'pending', v_now FROM late_at t WHERE NOT t.touched
        ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING
    ), lined_up AS (
        UPDATE @extschema@.outbox_events e SET listed = true
         WHERE e.id = ANY (ARRAY(SELECT DISTINCT t.id FROM late_at t WHERE NOT t.touched))
    ), judged AS MATERIALIZED (
        SELECT d.*, coalesce(d.key = ANY (coalesce((SELECT w.keys FROM whole w), '{}')), false) AS busy,
               d.key IS NOT NULL AND (EXISTS (SELECT FROM outbox._ahead(d.name, d.key, d.id, d.blocks))
                   OR EXISTS (SELECT FROM late_at t WHERE t.name = d.name AND t.key = d.key AND t.id < d.id)
                   OR (unrouted_left AND EXISTS (SELECT FROM outbox._unrouted_ahead(d.key, v_now) s
                                                  WHERE s.id < d.id AND outbox._wants(d.name, s.id, s.event_type, s.tenant_id)))) AS behind
          FROM due d
    ), with_followers AS (
        SELECT j.name, j.key, j.id, j.at FROM judged j WHERE NOT j.busy AND NOT j.behind
        UNION ALL
        SELECT j.name, j.key, y.id, y.at
          FROM judged j
         CROSS JOIN LATERAL (
               SELECT z.id, z.at, bool_and(z.status = 'pending' AND coalesce(z.next_attempt_at <= v_now, true))
                                      OVER (ORDER BY z.id) AS waits
                 FROM (SELECT y.id, y.ctid AS at, y.status, y.next_attempt_at
                         FROM outbox.delivery y
                        WHERE y.destination = j.name AND y.ordering_key = j.key AND y.place > j.id
                          AND (y.status <> 'failed' OR j.blocks)
                        ORDER BY y.place LIMIT 50 + max_events / (SELECT count(*) FROM due)) z) y
         WHERE NOT j.busy AND NOT j.behind AND NOT j.probe AND j.key IS NOT NULL AND y.waits
           AND NOT EXISTS (SELECT FROM late_at t WHERE t.name = j.name AND t.key = j.key AND t.id < y.id)
           AND NOT (unrouted_left AND EXISTS (SELECT FROM outbox._unrouted_ahead(j.key, v_now) s
                                               WHERE s.id < y.id AND outbox._wants(j.name, s.id, s.event_type, s.tenant_id)))
    ), picked AS MATERIALIZED (
        -- The first of each destination, then the second of each.
        SELECT l.name, l.key, l.id, l.at
          FROM (SELECT f.*, row_number() OVER (PARTITION BY f.name ORDER BY f.id) AS n FROM with_followers f) l
         ORDER BY l.n, l.id, l.name LIMIT max_events
    ), free AS MATERIALIZED (
        SELECT e.id FROM @extschema@.outbox_events e
         WHERE e.id = ANY (ARRAY(SELECT DISTINCT p.id FROM picked p)) FOR NO KEY UPDATE SKIP LOCKED
    ), missed AS MATERIALIZED (
        -- Another transaction has locked these, or they are not there.
        SELECT p.* FROM picked p WHERE (p.id IN (SELECT f.id FROM free f)) IS NOT TRUE
    ), chosen AS MATERIALIZED (
        SELECT p.* FROM picked p
         WHERE (p.id IN (SELECT f.id FROM free f)) IS TRUE
           AND NOT EXISTS (SELECT FROM missed m WHERE m.name = p.name AND m.key = p.key AND m.id < p.id)
    ), taken AS (
        UPDATE outbox.delivery d SET status = 'processing', claim_token = v_token, next_attempt_at = NULL
         WHERE d.ctid = ANY (ARRAY(SELECT c.at FROM chosen c))
    ), put_back AS (
        -- A fresh event that another transaction has locked is not listed, and nothing tells when it is free.
        UPDATE outbox.delivery d
           SET next_attempt_at = CASE WHEN d.ctid = ANY (ARRAY(
                   SELECT j.at FROM judged j JOIN late_at t ON t.touched AND t.name = j.name AND t.key = j.key AND t.id < j.id))
                   THEN v_now + interval '250 milliseconds' END
         WHERE d.ctid = ANY (ARRAY(SELECT j.at FROM judged j
                                    WHERE j.behind AND NOT EXISTS (SELECT FROM chosen c WHERE c.at = j.at)))
    ), marked AS (
        UPDATE @extschema@.outbox_events e SET status = 'processing'
         WHERE e.id = ANY (ARRAY(SELECT DISTINCT c.id FROM chosen c)) AND e.status = 'pending'
    )
    SELECT array_agg(c.id), array_agg(c.name),
           EXISTS (SELECT FROM put_off) OR EXISTS (SELECT FROM missed) OR EXISTS (SELECT FROM late_at t WHERE t.touched),
           (SELECT array_agg(DISTINCT j.key) FROM judged j WHERE j.busy AND NOT j.behind),
           -- Deliveries that were put back, took a probe's place or were just listed used up the room of others.
           (count(*) < max_events AND ((SELECT count(*) FROM found) >= max_events
                                       OR EXISTS (SELECT FROM judged j WHERE j.probe AND j.behind)))
           OR EXISTS (SELECT FROM late_at t WHERE NOT t.touched) OR EXISTS (SELECT FROM judged j WHERE j.busy AND NOT j.behind)
           OR (SELECT count(*) FROM lane) >= greatest(max_events, v_lanes),
           (SELECT array_agg(l.name) FROM lane l WHERE l.name <> '')
      INTO ids, destinations, v_put_off, busy, more, v_looked_at
      FROM chosen c;
    PERFORM outbox._find_due(v_looked_at) WHERE v_looked_at IS NOT NULL;
    IF v_put_off THEN
        more := true;
        PERFORM outbox._look_again();
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._claim_due(bigint, outbox.claim_scope, bigint, bigint, int, boolean) IS 'claims due deliveries; part of outbox.claim';

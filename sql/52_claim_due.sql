-- The other path of a claim: deliveries that are due again.

-- Scheduled events whose time has come, and events from before there was a destination: now they are owed to each
-- destination that wants them. A scheduled event takes its place in its aggregate's line at this moment.
CREATE FUNCTION outbox._route_due(max_events int, v_now timestamptz) RETURNS void
    LANGUAGE plpgsql
AS $$
DECLARE
    v_ids bigint[];
    v_unrouted bigint;
BEGIN
    SELECT array_agg(d.id) INTO v_ids
      FROM (SELECT d.id FROM outbox.delivery d
             WHERE d.destination = '' AND d.status IN ('pending', 'scheduled') AND d.next_attempt_at <= v_now
             ORDER BY d.next_attempt_at, d.id LIMIT max_events) d;
    IF v_ids IS NULL THEN
        RETURN;
    ELSIF NOT EXISTS (SELECT FROM outbox.destination) THEN
        UPDATE outbox.delivery d SET status = 'pending'
         WHERE d.id = ANY (v_ids) AND d.destination = '' AND d.status = 'scheduled';
        RETURN;
    END IF;
    DELETE FROM outbox.delivery d WHERE d.id = ANY (v_ids) AND d.destination = '';
    INSERT INTO outbox.delivery (id, destination, aggregate_key, status, next_attempt_at)
    SELECT e.id, t.name, outbox._aggregate_key(e.aggregate_type, e.aggregate_id), 'pending', v_now
      FROM @extschema@.outbox_events e JOIN outbox.destination t ON e.event_type LIKE ANY (t.like_patterns)
     WHERE e.id = ANY (v_ids)
    ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING;
    SELECT count(*) INTO v_unrouted FROM unnest(v_ids) AS i (id)
     WHERE NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = i.id);
    PERFORM outbox._unrouted(v_unrouted) WHERE v_unrouted > 0;
    PERFORM outbox._refresh(v_ids);
    PERFORM outbox._wake('due');    -- for those that serve other destinations, and for what there was no room for
END
$$;
COMMENT ON FUNCTION outbox._route_due(int, timestamptz) IS 'turns events that waited unrouted into deliveries; part of outbox.claim';

-- Due deliveries of the destinations this claim may serve, oldest due first, each with those that wait in line behind it.
-- One that is due while an earlier one of its line is outstanding goes back into the line. Fresh events that appeared late,
-- among or before those of a line, join it. busy: lines that wait for an event claimed whole. more: another claim is needed.
CREATE FUNCTION outbox._claim_due(
    v_token bigint, served text[], mark bigint, head bigint, max_events int,
    OUT ids bigint[], OUT destinations text[], OUT busy bigint[], OUT more boolean)
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    WITH lane AS MATERIALIZED (
        SELECT * FROM outbox._lanes(served)
    ), due AS MATERIALIZED (
        SELECT l.name, l.blocks, l.probe, x.id, x.aggregate_key AS key, x.at
          FROM lane l
         CROSS JOIN LATERAL (
               SELECT d.id, d.aggregate_key, d.ctid AS at FROM outbox.delivery d
                WHERE d.destination = l.name AND d.status = 'pending' AND d.next_attempt_at <= v_now
                ORDER BY d.next_attempt_at, d.id LIMIT CASE WHEN l.probe THEN 1 ELSE max_events END) x
         WHERE l.serve OR l.probe
    ), whole AS MATERIALIZED (
        SELECT array_agg(DISTINCT f.key) AS keys FROM outbox._in_flight(mark, head) f WHERE EXISTS (SELECT FROM due)
    ), last AS MATERIALIZED (
        SELECT k.name, k.key, (SELECT max(y.place) FROM outbox.delivery y
                                WHERE y.destination = k.name AND y.aggregate_key = k.key) AS id
          FROM (SELECT DISTINCT d.name, d.key FROM due d WHERE d.key IS NOT NULL) k
    ), late AS MATERIALIZED (
        -- One sort, where a join would compare each fresh event with each line.
        SELECT u.id, u.name, u.key, u.event_type
          FROM (SELECT f.id, l.name, f.key, f.event_type, max(f.last) OVER (PARTITION BY l.name, f.key) AS last
                  FROM (SELECT e.id, e.event_type, outbox._aggregate_key(e.aggregate_type, e.aggregate_id) AS key,
                               NULL::text AS name, NULL::bigint AS last
                          FROM @extschema@.outbox_events e
                         WHERE e.id >= mark AND e.id < (SELECT max(t.id) FROM last t) AND e.status = 'pending' AND NOT e.expanded
                           AND e.aggregate_id IS NOT NULL AND (e.available_at IS NULL OR e.available_at <= v_now)
                        UNION ALL SELECT NULL, NULL, t.key, t.name, t.id FROM last t) f
                  JOIN lane l ON l.name = f.name OR f.event_type LIKE ANY (l.like_patterns)) u
         WHERE u.id < u.last
    ), listed AS (
        INSERT INTO outbox.delivery (id, destination, aggregate_key, status, next_attempt_at)
        SELECT DISTINCT e.id, l.name, e.key, 'pending', v_now
          FROM late e JOIN lane l ON e.event_type LIKE ANY (l.like_patterns)
    ), lined_up AS (
        UPDATE @extschema@.outbox_events e SET expanded = true WHERE e.id = ANY (ARRAY(SELECT DISTINCT t.id FROM late t))
    ), judged AS MATERIALIZED (
        SELECT d.*, coalesce(d.key = ANY (coalesce((SELECT w.keys FROM whole w), '{}')), false) AS busy,
               d.key IS NOT NULL AND (EXISTS (
                   SELECT FROM outbox.delivery y
                    WHERE y.destination = d.name AND y.aggregate_key = d.key AND y.place <> d.id
                      AND (y.status = 'processing'
                           OR (y.place < d.id AND (y.status = 'pending' OR (y.status = 'failed' AND d.blocks)))))
                   OR EXISTS (SELECT FROM late t WHERE t.name = d.name AND t.key = d.key AND t.id < d.id)) AS behind
          FROM due d
    ), line AS (
        SELECT j.name, j.id, j.at FROM judged j WHERE NOT j.busy AND NOT j.behind
        UNION ALL
        SELECT j.name, y.id, y.at
          FROM judged j
         CROSS JOIN LATERAL (
               SELECT z.id, z.at, bool_and(z.status = 'pending' AND coalesce(z.next_attempt_at <= v_now, true)) OVER (ORDER BY z.id) AS waits
                 FROM (SELECT y.id, y.ctid AS at, y.status, y.next_attempt_at FROM outbox.delivery y
                        WHERE y.destination = j.name AND y.aggregate_key = j.key AND y.place > j.id
                          AND y.status <> 'scheduled' AND (y.status <> 'failed' OR j.blocks)
                        ORDER BY y.place LIMIT 50 + max_events / (SELECT count(*) FROM due)) z) y
         WHERE NOT j.busy AND NOT j.behind AND NOT j.probe AND j.key IS NOT NULL AND y.waits
           AND NOT EXISTS (SELECT FROM late t WHERE t.name = j.name AND t.key = j.key AND t.id < y.id)
    ), chosen AS MATERIALIZED (
        SELECT l.name, l.id, l.at FROM line l ORDER BY l.id, l.name LIMIT max_events
    ), taken AS (
        UPDATE outbox.delivery d SET status = 'processing', claim_token = v_token, next_attempt_at = NULL
         WHERE d.ctid = ANY (ARRAY(SELECT c.at FROM chosen c))
    ), put_back AS (
        UPDATE outbox.delivery d SET next_attempt_at = NULL
         WHERE d.ctid = ANY (ARRAY(SELECT j.at FROM judged j
                                    WHERE j.behind AND NOT EXISTS (SELECT FROM chosen c WHERE c.at = j.at)))
    ), marked AS (
        UPDATE @extschema@.outbox_events e SET status = 'processing'
         WHERE e.id = ANY (ARRAY(SELECT DISTINCT c.id FROM chosen c)) AND e.status = 'pending'
    )
    SELECT array_agg(c.id), array_agg(c.name), (SELECT array_agg(DISTINCT j.key) FROM judged j WHERE j.busy AND NOT j.behind),
           -- What was put back, or in the place of a probe, or has just joined a line took the room of others.
           (count(*) < max_events AND ((SELECT count(*) FROM due) >= max_events
                                       OR EXISTS (SELECT FROM judged j WHERE j.probe AND j.behind)))
           OR EXISTS (SELECT FROM late) OR EXISTS (SELECT FROM judged j WHERE j.busy AND NOT j.behind)
      INTO ids, destinations, busy, more
      FROM chosen c;
END
$$;
COMMENT ON FUNCTION outbox._claim_due(bigint, text[], bigint, bigint, int) IS 'claims due deliveries; part of outbox.claim';

-- The common path of a claim: fresh events, found by walking the primary key from the low-water mark.

-- Decides for each fresh event and each destination that wants it: this claim holds it, or it is parked in outbox.delivery,
-- because the destination can't be served or the event waits for another one there.
-- (An event that waits is ahead of the later ones of its key: none of them passes a parked one.) Events whose row another
-- transaction has locked can't go now, nor can those with the ordering key of a locked event or of one in flight.
-- unrouted_left: some scheduled events are due and not routed. only_types: looks at events of these types only.
-- seen: events that were decided on. full: there may be more behind the window. behind: events that can't go now. stuck: the
-- locked ones among these.
CREATE FUNCTION outbox._claim_fresh(
    token bigint, served text[], low_water bigint, high_water bigint, max_events int, window_size bigint, unrouted_left boolean,
    only_types text[],
    OUT ids bigint[], OUT held text[], OUT seen bigint, OUT "full" boolean, OUT behind bigint, OUT stuck bigint,
    OUT unrouted bigint)
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_elsewhere boolean;
BEGIN
    WITH lane AS MATERIALIZED (
        SELECT * FROM outbox._eligible(served) l ORDER BY l.name
    ), candidate AS MATERIALIZED (
        SELECT e.id, e.event_type, outbox._ordering_key(e.aggregate_type, e.aggregate_id) AS key, e.xmax <> 0 AS touched
          FROM @extschema@.outbox_events e
         WHERE e.id >= low_water AND e.status = 'pending' AND NOT e.listed AND e.available_at IS NULL
           AND (only_types IS NULL OR e.event_type LIKE ANY (only_types))
         ORDER BY e.id LIMIT window_size
    ), lockable AS MATERIALIZED (
        SELECT e.id FROM @extschema@.outbox_events e
         WHERE e.id = ANY (ARRAY(SELECT c.id FROM candidate c WHERE c.touched)) FOR NO KEY UPDATE SKIP LOCKED
    ), judged AS MATERIALIZED (
        SELECT c.id, c.event_type, c.key, c.touched AND (c.id IN (SELECT l.id FROM lockable l)) IS NOT TRUE AS locked
          FROM candidate c
    ), busy AS MATERIALIZED (
        SELECT f.key FROM outbox._in_flight(low_water, high_water) f
        UNION ALL
        SELECT j.key FROM judged j WHERE j.locked
    ), marked AS MATERIALIZED (
        SELECT j.id, j.event_type, j.key, j.locked, j.locked OR (j.key IS NOT NULL AND j.key IN (SELECT b.key FROM busy b)) AS waits
          FROM judged j
    ), ready AS MATERIALIZED (
        SELECT m.id, m.event_type, m.key FROM marked m WHERE NOT m.waits ORDER BY m.id LIMIT max_events
    ), plan AS MATERIALIZED (
        SELECT r.id, r.key, w.wanted, w.held, w.parked, w.behind, w.elsewhere
          FROM ready r
         CROSS JOIN LATERAL (
               SELECT count(*) AS wanted, array_agg(x.name) FILTER (WHERE x.serve AND NOT x.behind) AS held,
                      array_agg(x.name) FILTER (WHERE x.behind OR NOT x.serve) AS parked,
                      array_agg(x.behind) FILTER (WHERE x.behind OR NOT x.serve) AS behind,
                      bool_or(x.elsewhere AND NOT x.behind) AS elsewhere
                 FROM (SELECT l.name, l.serve, l.elsewhere, r.key IS NOT NULL AND (EXISTS (
                              SELECT FROM outbox._ahead(l.name, r.key, r.id, l.blocks))
                              OR (unrouted_left AND EXISTS (
                              SELECT FROM outbox._unrouted_ahead(r.key, v_now) s
                               WHERE s.id < r.id AND s.event_type LIKE ANY (l.like_patterns)))) AS behind
                         FROM lane l WHERE r.event_type LIKE ANY (l.like_patterns)
                       OFFSET 0) x) w
    ), moved AS (
        UPDATE @extschema@.outbox_events e
           SET status = CASE WHEN p.wanted = 0 THEN 'processed' WHEN p.held IS NULL THEN 'pending' ELSE 'processing' END,
               processed_at = CASE WHEN p.wanted = 0 THEN v_now END,
               claim_token = CASE WHEN p.held IS NOT NULL THEN token END,
               listed = p.parked IS NOT NULL
          FROM plan p WHERE e.id BETWEEN p.id AND p.id AND e.status = 'pending' AND NOT e.listed
        RETURNING p.*
    ), listed AS (
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, next_attempt_at)
        SELECT m.id, u.name, m.key, 'pending',
               CASE WHEN m.key IS NULL OR (NOT u.behind AND row_number() OVER (PARTITION BY u.name, m.key ORDER BY m.id) = 1)
                    THEN v_now END
          FROM moved m CROSS JOIN LATERAL unnest(m.parked, m.behind) AS u (name, behind)
        ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING
    )
    SELECT array_agg(m.id ORDER BY m.id) FILTER (WHERE m.held IS NOT NULL),
           array_agg(m.held::text ORDER BY m.id) FILTER (WHERE m.held IS NOT NULL),
           count(*), count(*) FILTER (WHERE m.wanted = 0), bool_or(m.elsewhere),
           (SELECT count(*) FROM candidate) >= window_size,
           (SELECT count(*) FROM marked k WHERE k.waits), (SELECT count(*) FROM marked k WHERE k.locked)
      INTO ids, held, seen, unrouted, v_elsewhere, "full", behind, stuck
      FROM moved m;
    IF v_elsewhere THEN
        PERFORM outbox._wake('due');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._claim_fresh(bigint, text[], bigint, bigint, int, bigint, boolean, text[]) IS
    'claims fresh events; part of outbox.claim';

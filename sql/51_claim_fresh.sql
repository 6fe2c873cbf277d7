-- The common path of a claim: fresh events, found by walking the primary key from the low-water mark.

-- No settings of its own, so that the planner can merge it into the query that uses it.
-- In flight: claimed whole. Their aggregates are skipped; they stay fresh and are found again.
CREATE FUNCTION outbox._in_flight(mark bigint, head bigint) RETURNS TABLE (id bigint, key bigint)
    LANGUAGE sql STABLE ROWS 100
AS $$
    SELECT e.id, outbox._aggregate_key(e.aggregate_type, e.aggregate_id)
      FROM @extschema@.outbox_events e
     WHERE e.id BETWEEN mark AND head AND e.status = 'processing' AND e.claim_token IS NOT NULL
       AND e.aggregate_id IS NOT NULL
$$;
COMMENT ON FUNCTION outbox._in_flight(bigint, bigint) IS 'events claimed whole that stand in a line, with their line';

-- Of the fresh events that can go now, each destination gets its own answer: held by this claim, or parked in
-- outbox.delivery because the destination can't be served or an earlier event of the aggregate is outstanding there.
-- (What is outstanding before one event of a line is so before the later ones: no event of a line passes a parked one.)
-- seen: how many events were looked at closely; fewer than asked for means that no more can go now.
CREATE FUNCTION outbox._claim_fresh(
    token bigint, served text[], mark bigint, head bigint, max_events int,
    OUT ids bigint[], OUT held text[], OUT seen bigint, OUT behind bigint, OUT unrouted bigint)
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_later timestamptz;
    v_elsewhere boolean;
BEGIN
    WITH lane AS MATERIALIZED (
        SELECT * FROM outbox._lanes(served) l ORDER BY l.name
    ), candidate AS MATERIALIZED (
        SELECT e.id, e.event_type, outbox._aggregate_key(e.aggregate_type, e.aggregate_id) AS key, e.available_at
          FROM @extschema@.outbox_events e
         WHERE e.id >= mark AND e.status = 'pending' AND NOT e.expanded
         ORDER BY e.id LIMIT max_events + 200
    ), busy AS MATERIALIZED (
        SELECT f.key FROM outbox._in_flight(mark, head) f
    ), marked AS MATERIALIZED (
        SELECT c.id, c.event_type, c.key, c.available_at, coalesce(c.available_at > v_now, false) AS early,
               c.key IS NOT NULL AND c.key IN (SELECT b.key FROM busy b) AS waits
          FROM candidate c
    ), ready AS MATERIALIZED (
        SELECT m.id, m.event_type, m.key FROM marked m WHERE NOT m.early AND NOT m.waits ORDER BY m.id LIMIT max_events
    ), plan AS MATERIALIZED (
        SELECT r.id, r.key, w.wanted, w.held, w.parked, w.behind, w.elsewhere
          FROM ready r
         CROSS JOIN LATERAL (
               SELECT count(*) AS wanted, array_agg(x.name) FILTER (WHERE x.serve AND NOT x.behind) AS held,
                      array_agg(x.name) FILTER (WHERE x.behind OR NOT x.serve) AS parked,
                      array_agg(x.behind) FILTER (WHERE x.behind OR NOT x.serve) AS behind,
                      bool_or(x.elsewhere AND NOT x.behind) AS elsewhere
                 FROM (SELECT l.name, l.serve, l.elsewhere, r.key IS NOT NULL AND EXISTS (
                              SELECT FROM outbox.delivery d
                               WHERE d.destination = l.name AND d.aggregate_key = r.key
                                 AND (d.status = 'processing'
                                      OR (d.place < r.id AND (d.status = 'pending' OR (d.status = 'failed' AND l.blocks)))))
                              AS behind
                         FROM lane l WHERE r.event_type LIKE ANY (l.like_patterns)
                       OFFSET 0) x) w
    ), moved AS (
        UPDATE @extschema@.outbox_events e
           SET status = CASE WHEN p.wanted = 0 THEN 'processed' WHEN p.held IS NULL THEN 'pending' ELSE 'processing' END,
               processed_at = CASE WHEN p.wanted = 0 THEN v_now END,
               claim_token = CASE WHEN p.held IS NOT NULL THEN token END,
               expanded = p.parked IS NOT NULL
          FROM plan p WHERE e.id = p.id
    ), listed AS (
        INSERT INTO outbox.delivery (id, destination, aggregate_key, status, next_attempt_at)
        SELECT p.id, u.name, p.key, 'pending',
               CASE WHEN p.key IS NULL OR (NOT u.behind AND row_number() OVER (PARTITION BY u.name, p.key ORDER BY p.id) = 1)
                    THEN v_now END
          FROM plan p CROSS JOIN LATERAL unnest(p.parked, p.behind) AS u (name, behind)
        ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING
    ), early AS (
        UPDATE @extschema@.outbox_events e SET expanded = true
         WHERE e.id = ANY (ARRAY(SELECT m.id FROM marked m WHERE m.early))
    ), scheduled AS (
        INSERT INTO outbox.delivery (id, destination, aggregate_key, status, next_attempt_at)
        SELECT m.id, '', m.key, 'scheduled', m.available_at FROM marked m WHERE m.early
    )
    SELECT array_agg(p.id) FILTER (WHERE p.held IS NOT NULL), array_agg(p.held::text) FILTER (WHERE p.held IS NOT NULL),
           count(*), count(*) FILTER (WHERE p.wanted = 0),
           (SELECT count(*) FROM marked m WHERE NOT m.early AND m.waits),
           (SELECT min(m.available_at) FROM marked m WHERE m.early), bool_or(p.elsewhere)
      INTO ids, held, seen, unrouted, behind, v_later, v_elsewhere
      FROM plan p;
    IF v_later IS NOT NULL THEN
        PERFORM outbox._timer(v_later);
    END IF;
    IF v_elsewhere THEN
        PERFORM outbox._wake('due');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._claim_fresh(bigint, text[], bigint, bigint, int) IS 'claims fresh events; part of outbox.claim';

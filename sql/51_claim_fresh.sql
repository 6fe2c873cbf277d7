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
-- seen: how many events were looked at closely; fewer than asked for means that no more can go now. later: when the first
-- of those that are scheduled is due.
CREATE FUNCTION outbox._claim_fresh(
    token bigint, served text[], mark bigint, head bigint, max_events int,
    OUT ids bigint[], OUT held text[], OUT seen bigint, OUT behind bigint, OUT unrouted bigint, OUT later timestamptz)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    WITH lane AS MATERIALIZED (
        SELECT * FROM outbox._lanes(served)
    ), candidate AS MATERIALIZED (
        SELECT e.id, e.event_type, outbox._aggregate_key(e.aggregate_type, e.aggregate_id) AS key, e.available_at
          FROM @extschema@.outbox_events e
         WHERE e.id >= mark AND e.status = 'pending' AND NOT e.expanded
         ORDER BY e.id LIMIT max_events + 200
    ), busy AS MATERIALIZED (
        SELECT array_agg(DISTINCT f.key) AS keys FROM outbox._in_flight(mark, head) f
    ), ready AS MATERIALIZED (
        SELECT c.id, c.event_type, c.key
          FROM candidate c
         WHERE (c.available_at IS NULL OR c.available_at <= v_now)
           AND (c.key IS NULL OR c.key <> ALL (coalesce((SELECT b.keys FROM busy b), '{}')))
         ORDER BY c.id LIMIT max_events
    ), wanted AS (
        SELECT r.id, r.key, l.name, l.serve,
               r.key IS NOT NULL AND EXISTS (
                   SELECT FROM outbox.delivery x
                    WHERE x.destination = l.name AND x.aggregate_key = r.key
                      AND (x.status = 'processing'
                           OR (x.id < r.id AND (x.status = 'pending' OR (x.status = 'failed' AND l.blocks))))) AS behind
          FROM ready r JOIN lane l ON r.event_type LIKE ANY (l.like_patterns)
    ), lined AS MATERIALIZED (
        SELECT w.id, w.key, w.name, w.behind,
               CASE WHEN w.key IS NULL THEN NOT w.serve
                    ELSE bool_or(w.behind OR NOT w.serve) OVER line END AS parked,
               w.key IS NULL OR (NOT w.behind AND row_number() OVER line = 1) AS first
          FROM wanted w WINDOW line AS (PARTITION BY w.name, w.key ORDER BY w.id)
    ), plan AS MATERIALIZED (
        -- One sort, where a join of the two would compare each row with each.
        SELECT u.id, count(u.name) AS wanted, count(*) FILTER (WHERE u.parked) AS parked,
               array_agg(u.name) FILTER (WHERE NOT u.parked) AS held
          FROM (SELECT r.id, NULL AS name, NULL AS parked FROM ready r
                UNION ALL SELECT l.id, l.name, l.parked FROM lined l) u
         GROUP BY u.id
    ), moved AS (
        UPDATE @extschema@.outbox_events e
           SET status = CASE WHEN p.wanted = 0 THEN 'processed' WHEN p.held IS NULL THEN 'pending' ELSE 'processing' END,
               processed_at = CASE WHEN p.wanted = 0 THEN v_now END,
               claim_token = CASE WHEN p.held IS NOT NULL THEN token END,
               expanded = p.parked > 0
          FROM plan p WHERE e.id = p.id
    ), parked AS (
        INSERT INTO outbox.delivery (id, destination, aggregate_key, status, next_attempt_at)
        SELECT l.id, l.name, l.key, 'pending', CASE WHEN l.first THEN v_now END
          FROM lined l WHERE l.parked
    ), early AS (
        UPDATE @extschema@.outbox_events e SET expanded = true
          FROM candidate c WHERE e.id = c.id AND c.available_at > v_now
    ), scheduled AS (
        INSERT INTO outbox.delivery (id, destination, aggregate_key, status, next_attempt_at)
        SELECT c.id, '', c.key, 'scheduled', c.available_at FROM candidate c WHERE c.available_at > v_now
    )
    SELECT array_agg(p.id) FILTER (WHERE p.held IS NOT NULL), array_agg(p.held::text) FILTER (WHERE p.held IS NOT NULL),
           count(*), count(*) FILTER (WHERE p.wanted = 0),
           (SELECT count(*) FROM candidate c WHERE (c.available_at IS NULL OR c.available_at <= v_now)
               AND c.key = ANY (coalesce((SELECT b.keys FROM busy b), '{}'))),
           (SELECT min(c.available_at) FROM candidate c WHERE c.available_at > v_now)
      INTO ids, held, seen, unrouted, behind, later
      FROM plan p;
    PERFORM outbox._timer(later) WHERE later IS NOT NULL;
END
$$;
COMMENT ON FUNCTION outbox._claim_fresh(bigint, text[], bigint, bigint, int) IS 'claims fresh events; part of outbox.claim';

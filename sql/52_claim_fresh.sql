-- The common path of a claim: fresh events, found by walking the primary key from the low-water mark.

CREATE FUNCTION outbox._kind(event_type text, tenant_id text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN event_type || coalesce(chr(31) || tenant_id, '');
COMMENT ON FUNCTION outbox._kind(text, text) IS 'names the kind of an event: those of a kind have the same type and tenant';

-- Decides for each fresh event and each destination that wants it: this claim holds it, or it is parked in outbox.delivery,
-- because the destination can't be served or the event waits for another one there.
-- (An event that waits is ahead of the later ones of its key: none of them passes a parked one.) Events whose row another
-- transaction has locked can't go now, nor can those with the ordering key of a locked event or of one in flight.
-- max_events: of the kinds that this claim serves. decide: of all kinds. unrouted_left: some scheduled events are due and not
-- routed. passed: kinds of events that are not looked at. most: at about so many deliveries a claim stops, because an event may
-- have thousands.
-- low_water was read before this statement's snapshot was taken. Of two events that a session committed since then, one after
-- the other, the first may be below it: the mark is read again when the snapshot is there.
-- seen: events that were decided on. full: there may be more, behind the window or within. behind: events that can't go now.
-- stuck: the locked ones among these. owed: deliveries that were decided on. unserved: kinds that only others serve.
CREATE FUNCTION outbox._claim_fresh(
    token bigint, scope outbox.claim_scope, low_water bigint, high_water bigint, max_events int, decide bigint,
    window_size bigint, unrouted_left boolean, passed jsonb, most bigint,
    OUT ids bigint[], OUT held text[], OUT seen bigint, OUT "full" boolean, OUT behind bigint, OUT stuck bigint,
    OUT unrouted bigint, OUT owed bigint, OUT parked boolean, OUT unserved text[])
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_elsewhere boolean;
    v_ids bigint[];
    v_keys bigint[];
    v_parked text[];     -- for each of them its destinations, an array as text ...
    v_behind text[];     -- ... and whether it is behind another one there
BEGIN
    WITH candidate AS MATERIALIZED (
        SELECT e.id, e.event_type, e.tenant_id, outbox._ordering_key(e.aggregate_type, e.aggregate_id) AS key,
               e.xmax <> 0 AS touched
          FROM @extschema@.outbox_events e
         WHERE e.id >= (SELECT least(low_water, outbox._low_water(false)))
           AND e.status = 'pending' AND NOT e.listed AND e.available_at IS NULL
           AND (passed IS NULL OR NOT passed ? outbox._kind(e.event_type, e.tenant_id))
         ORDER BY e.id LIMIT window_size
    ), lockable AS MATERIALIZED (
        SELECT e.id FROM @extschema@.outbox_events e
         WHERE e.id = ANY (ARRAY(SELECT c.id FROM candidate c WHERE c.touched)) FOR NO KEY UPDATE SKIP LOCKED
    ), judged AS MATERIALIZED (
        SELECT c.*, c.touched AND (c.id IN (SELECT l.id FROM lockable l)) IS NOT TRUE AS locked
          FROM candidate c
    ), busy AS MATERIALIZED (
        SELECT f.key FROM outbox._in_flight(low_water, high_water) f
        UNION ALL
        SELECT j.key FROM judged j WHERE j.locked
    ), marked AS MATERIALIZED (
        SELECT j.*, j.locked OR (j.key IS NOT NULL AND j.key IN (SELECT b.key FROM busy b)) AS waits
          FROM judged j
    ), ready AS MATERIALIZED (
        SELECT m.id, m.event_type, m.tenant_id, m.key FROM marked m WHERE NOT m.waits ORDER BY m.id LIMIT decide
    ), kind AS MATERIALIZED (
        SELECT r.event_type, r.tenant_id, array_agg(r.id) AS ids, array_agg(r.key) AS keys
          FROM ready r GROUP BY r.event_type, r.tenant_id
    ), menu AS MATERIALIZED (
        SELECT k.*, w.*
          FROM kind k
         CROSS JOIN LATERAL (
               SELECT array_agg(l.name) AS names, array_agg(l.filter) AS filters, array_agg(l.serve) AS serves,
                      array_agg(l.elsewhere) AS elsewheres, array_agg(l.blocks) AS blocks,
                      coalesce(bool_or(l.serve), false) AS served, count(*) AS n
                 FROM (SELECT * FROM outbox._eligible(scope, k.event_type, k.tenant_id) ORDER BY 1) l) w
    ), within AS MATERIALIZED (
        SELECT max(u.id) AS last
          FROM (SELECT e.id, sum(m.n) OVER up_to - m.n AS deliveries, count(*) FILTER (WHERE m.served) OVER up_to AS served
                  FROM menu m CROSS JOIN LATERAL unnest(m.ids) AS e (id) WINDOW up_to AS (ORDER BY e.id)) u
         WHERE u.deliveries < most AND u.served <= max_events
    ), plan AS MATERIALIZED (
        SELECT e.id, e.key, w.wanted, w.held, w.parked, w.behind, w.elsewhere
          FROM menu m
         CROSS JOIN LATERAL unnest(m.ids, m.keys) AS e (id, key)
         CROSS JOIN LATERAL (
               SELECT count(*) AS wanted, array_agg(x.name) FILTER (WHERE x.serve AND NOT x.behind) AS held,
                      array_agg(x.name) FILTER (WHERE x.behind OR NOT x.serve) AS parked,
                      array_agg(x.behind) FILTER (WHERE x.behind OR NOT x.serve) AS behind,
                      bool_or(x.elsewhere AND NOT x.behind) AS elsewhere
                 FROM (SELECT l.name, l.serve, l.elsewhere, e.key IS NOT NULL AND (EXISTS (
                              SELECT FROM outbox._ahead(l.name, e.key, e.id, l.blocks))
                              OR (unrouted_left AND EXISTS (
                              SELECT FROM outbox._unrouted_ahead(e.key, v_now) s
                               WHERE s.id < e.id AND outbox._wants(l.name, s.id, s.event_type, s.tenant_id)))) AS behind
                         FROM unnest(m.names, m.filters, m.serves, m.elsewheres, m.blocks)
                              AS l (name, filter, serve, elsewhere, blocks)
                        WHERE CASE WHEN l.filter IS NULL THEN true ELSE outbox._passes(l.filter, e.id) END
                       OFFSET 0) x) w
         WHERE e.id <= (SELECT x.last FROM within x)
    ), moved AS (
        UPDATE @extschema@.outbox_events e
           SET status = CASE WHEN p.wanted = 0 THEN 'processed' WHEN p.held IS NULL THEN 'pending' ELSE 'processing' END,
               processed_at = CASE WHEN p.wanted = 0 THEN v_now END,
               claim_token = CASE WHEN p.held IS NOT NULL THEN token END,
               listed = p.parked IS NOT NULL
          FROM plan p WHERE e.id BETWEEN p.id AND p.id AND e.status = 'pending' AND NOT e.listed
        RETURNING p.*
    )
    SELECT array_agg(m.id ORDER BY m.id) FILTER (WHERE m.held IS NOT NULL),
           array_agg(m.held::text ORDER BY m.id) FILTER (WHERE m.held IS NOT NULL),
           count(*), count(*) FILTER (WHERE m.wanted = 0), bool_or(m.elsewhere), coalesce(sum(m.wanted), 0),
           (SELECT count(*) FROM candidate) >= window_size
               OR (SELECT count(*) FROM marked k WHERE NOT k.waits) > (SELECT count(*) FROM plan),
           (SELECT count(*) FROM marked k WHERE k.waits), (SELECT count(*) FROM marked k WHERE k.locked),
           (SELECT array_agg(outbox._kind(k.event_type, k.tenant_id)) FROM menu k WHERE NOT k.served),
           array_agg(m.id) FILTER (WHERE m.parked IS NOT NULL), array_agg(m.key) FILTER (WHERE m.parked IS NOT NULL),
           array_agg(m.parked::text) FILTER (WHERE m.parked IS NOT NULL),
           array_agg(m.behind::text) FILTER (WHERE m.parked IS NOT NULL)
      INTO ids, held, seen, unrouted, v_elsewhere, owed, "full", behind, stuck, unserved,
           v_ids, v_keys, v_parked, v_behind
      FROM moved m;
    parked := v_ids IS NOT NULL;
    IF parked THEN
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, next_attempt_at)
        SELECT p.id, u.name, p.key, 'pending',
               CASE WHEN p.key IS NULL OR (NOT u.behind AND row_number() OVER (PARTITION BY u.name, p.key ORDER BY p.id) = 1)
                    THEN v_now END
          FROM unnest(v_ids, v_keys, v_parked, v_behind) AS p (id, key, parked, behind)
         CROSS JOIN LATERAL unnest(p.parked::text[], p.behind::boolean[]) AS u (name, behind)
        ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING;
    END IF;
    IF v_elsewhere THEN
        PERFORM outbox._wake('due');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._claim_fresh(bigint, outbox.claim_scope, bigint, bigint, int, bigint, bigint, boolean, jsonb, bigint) IS
    'claims fresh events; part of outbox.claim';

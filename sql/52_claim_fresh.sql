-- The common path of a claim: fresh events, found by walking the primary key from the low-water mark.

CREATE FUNCTION outbox._kind(event_type text, tenant_id text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN event_type || coalesce(chr(31) || tenant_id, '');
COMMENT ON FUNCTION outbox._kind(text, text) IS 'names the kind of an event: those of a kind have the same type and tenant';

-- A kind of event: the events, oldest first, and the destinations that may want them.
CREATE TYPE outbox.kind_wanted AS (
    ids    bigint[],
    keys   bigint[],    -- their ordering keys
    wanted outbox.eligible[]
);
COMMENT ON TYPE outbox.kind_wanted IS 'events of one kind, and the destinations that may want them; internal';

-- Decides for each event and each destination that wants it: this claim holds it, or it is parked in outbox.delivery, because
-- the destination can't be served or the event waits for another one there. (An event that waits is ahead of the later ones of
-- its key: none of them passes a parked one.) Stops after max_events that the claim may hold, and after about so many deliveries
-- as "most" says: an event may have thousands.
-- held, parked: for each event its destinations, an array as text. behind: whether it is behind another one there, likewise.
CREATE FUNCTION outbox._decide(
    v_kinds outbox.kind_wanted[], max_events int, unrouted_left boolean, most bigint,
    OUT ids bigint[], OUT keys bigint[], OUT held text[], OUT parked text[], OUT behind text[], OUT owed bigint, OUT elsewhere boolean)
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_now CONSTANT timestamptz := clock_timestamp();
BEGIN
    WITH event AS MATERIALIZED (
        SELECT u.id, u.key, k.wanted, k.n, k.served
          FROM (SELECT x.ids, x.keys, x.wanted, coalesce(cardinality(x.wanted), 0) AS n,
                       EXISTS (SELECT FROM unnest(x.wanted) AS l WHERE l.serve) AS served
                  FROM unnest(v_kinds) AS x OFFSET 0) k
         CROSS JOIN LATERAL unnest(k.ids, k.keys) AS u (id, key)
    ), within AS MATERIALIZED (
        SELECT max(u.id) AS last
          FROM (SELECT e.id, sum(e.n) OVER up_to - e.n AS deliveries, count(*) FILTER (WHERE e.served) OVER up_to AS served
                  FROM event e WINDOW up_to AS (ORDER BY e.id)) u
         WHERE u.deliveries < most AND u.served <= max_events
    )
    SELECT array_agg(e.id), array_agg(e.key), array_agg(w.held::text), array_agg(w.parked::text), array_agg(w.behind::text),
           coalesce(sum(w.wanted), 0), coalesce(bool_or(w.elsewhere), false)
      INTO ids, keys, held, parked, behind, owed, elsewhere
      FROM (SELECT x.* FROM event x WHERE x.id <= (SELECT y.last FROM within y) ORDER BY x.id) e
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
                     FROM unnest(e.wanted) AS l
                    WHERE CASE WHEN l.filter IS NULL THEN true ELSE outbox._passes(l.filter, e.id) END
                   OFFSET 0) x) w;
END
$$;
COMMENT ON FUNCTION outbox._decide(outbox.kind_wanted[], int, boolean, bigint) IS
    'decides what becomes of fresh events at each destination; part of outbox.claim';

-- Claims fresh events, step by step: looks, sets aside what can't go now, asks who wants the rest, decides, locks, writes.
-- In small statements: most claims find one event or two, and the start of a large statement costs more than those do.
-- Events whose row another transaction has locked can't go now, nor can those with the ordering key of a locked event or of one
-- in flight.
-- max_events: of the kinds that this claim serves. decide: of all kinds. unrouted_left: some scheduled events are due and not
-- routed. passed: kinds of events that are not looked at. most: see outbox._decide().
-- low_water was read before the snapshot of the first statement was taken. Of two events that a session committed since then, one
-- after the other, the first may be below it: the mark is read again when the snapshot is there.
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
    v_locked bigint[] := '{}';
    v_busy bigint[];                -- ordering keys that wait
    v_kinds outbox.kind_wanted[];
    v_clear boolean;                -- nothing is in the way of any event at any destination
    e record;                       -- the events: first those that were seen, then those that may go
    -- What was decided, as by outbox._decide().
    v_ids bigint[];
    v_keys bigint[];
    v_held text[];
    v_parked text[];
    v_behind text[];
    v_elsewhere boolean := false;
    v_free bigint[];
BEGIN
    seen := 0;
    unrouted := 0;
    owed := 0;
    parked := false;
    SELECT count(*) AS n, array_agg(w.id) AS ids, array_agg(w.key) AS keys, array_agg(w.event_type) AS types,
           array_agg(w.tenant_id) AS tenants, array_agg(w.id) FILTER (WHERE w.touched) AS touched
      INTO e
      FROM (SELECT x.id, x.event_type, x.tenant_id, outbox._ordering_key(x.aggregate_type, x.aggregate_id) AS key,
                   x.xmax <> 0 AS touched
              FROM @extschema@.outbox_events x
             WHERE x.id >= (SELECT least(low_water, outbox._low_water(false)))
               AND x.status = 'pending' AND NOT x.listed AND x.available_at IS NULL
               AND (passed IS NULL OR NOT passed ? outbox._kind(x.event_type, x.tenant_id))
             ORDER BY x.id LIMIT window_size) w;
    "full" := e.n >= window_size;
    behind := e.n;

    -- What can't go now.
    IF e.touched IS NOT NULL THEN
        v_locked := outbox._locked(e.touched);
    END IF;
    v_busy := ARRAY(SELECT f.key FROM outbox._in_flight(low_water, high_water) f);
    IF v_locked <> '{}' THEN
        v_busy := v_busy || ARRAY(SELECT u.key FROM unnest(e.ids, e.keys) AS u (id, key) WHERE u.id = ANY (v_locked));
    END IF;
    IF v_locked <> '{}' OR v_busy <> '{}' THEN
        SELECT count(*) AS n, array_agg(u.id) AS ids, array_agg(u.key) AS keys, array_agg(u.event_type) AS types,
               array_agg(u.tenant_id) AS tenants
          INTO e
          FROM unnest(e.ids, e.keys, e.types, e.tenants) AS u (id, key, event_type, tenant_id)
         WHERE (u.id IN (SELECT unnest(v_locked))) IS NOT TRUE AND (u.key IN (SELECT unnest(v_busy))) IS NOT TRUE;
    END IF;
    behind := behind - e.n;
    stuck := cardinality(v_locked);
    IF e.n = 0 THEN
        RETURN;
    END IF;

    -- Who wants the rest.
    SELECT array_agg(ROW(k.ids, k.keys, w.wanted)::outbox.kind_wanted), bool_and(w.clear) AND sum(w.n * cardinality(k.ids)) <= most,
           array_agg(outbox._kind(k.event_type, k.tenant_id)) FILTER (WHERE NOT w.served)
      INTO v_kinds, v_clear, unserved
      FROM (SELECT u.event_type, u.tenant_id, array_agg(u.id) AS ids, array_agg(u.key) AS keys
              FROM unnest(e.ids[:decide], e.keys[:decide], e.types[:decide], e.tenants[:decide]) AS u (id, key, event_type, tenant_id)
             GROUP BY u.event_type, u.tenant_id) k
     CROSS JOIN LATERAL (
           SELECT array_agg(ROW(l.name, l.filter, l.serve, l.elsewhere, l.blocks)::outbox.eligible) AS wanted, count(*) AS n,
                  coalesce(bool_and(l.serve AND l.filter IS NULL), false) AS clear, coalesce(bool_or(l.serve), false) AS served
             FROM (SELECT * FROM outbox._eligible(scope, k.event_type, k.tenant_id) ORDER BY 1) l) w;

    -- Nearly always nothing is in the way: every destination gets every event of a kind that it wants.
    IF v_clear AND NOT unrouted_left AND least(e.n, decide) <= max_events
       AND NOT EXISTS (SELECT FROM unnest(v_kinds) AS k CROSS JOIN LATERAL unnest(k.ids, k.keys) AS u (id, key)
                        CROSS JOIN LATERAL unnest(k.wanted) AS l
                        CROSS JOIN LATERAL outbox._ahead(l.name, u.key, u.id, l.blocks)
                        WHERE u.key IS NOT NULL) THEN
        IF cardinality(v_kinds) = 1 THEN
            v_ids := v_kinds[1].ids;
            v_keys := v_kinds[1].keys;
            v_held := array_fill(ARRAY(SELECT l.name FROM unnest(v_kinds[1].wanted) AS l)::text, ARRAY[cardinality(v_ids)]);
            owed := cardinality(v_ids) * cardinality(v_kinds[1].wanted);
        ELSE
            SELECT array_agg(u.id), array_agg(u.key), array_agg(u.held), sum(u.n)
              INTO v_ids, v_keys, v_held, owed
              FROM (SELECT x.id, x.key, k.held, k.n
                      FROM (SELECT y.ids, y.keys, ARRAY(SELECT l.name FROM unnest(y.wanted) AS l)::text AS held,
                                   cardinality(y.wanted) AS n
                              FROM unnest(v_kinds) AS y OFFSET 0) k
                     CROSS JOIN LATERAL unnest(k.ids, k.keys) AS x (id, key) ORDER BY x.id) u;
        END IF;
    ELSE
        SELECT d.ids, d.keys, d.held, d.parked, d.behind, d.owed, d.elsewhere
          INTO v_ids, v_keys, v_held, v_parked, v_behind, owed, v_elsewhere
          FROM outbox._decide(v_kinds, max_events, unrouted_left, most) d;
    END IF;
    "full" := "full" OR e.n > cardinality(v_ids);

    -- Another transaction may have locked some since they were seen. They wait, and what comes after them.
    v_free := ARRAY(SELECT x.id FROM @extschema@.outbox_events x
                     WHERE x.id = ANY (v_ids) AND x.status = 'pending' AND NOT x.listed FOR NO KEY UPDATE SKIP LOCKED);
    IF cardinality(v_free) < cardinality(v_ids) THEN
        stuck := stuck + cardinality(v_ids) - cardinality(v_free);
        behind := behind + cardinality(v_ids);
        v_busy := ARRAY(SELECT u.key FROM unnest(v_ids, v_keys) AS u (id, key) WHERE (u.id IN (SELECT unnest(v_free))) IS NOT TRUE);
        SELECT array_agg(u.id), array_agg(u.key), array_agg(u.held), array_agg(u.parked), array_agg(u.behind)
          INTO v_ids, v_keys, v_held, v_parked, v_behind
          FROM unnest(v_ids, v_keys, v_held, v_parked, v_behind) AS u (id, key, held, parked, behind)
         WHERE (u.id IN (SELECT unnest(v_free))) IS TRUE
           AND (u.key IN (SELECT unnest(v_busy))) IS NOT TRUE;
        behind := behind - coalesce(cardinality(v_ids), 0);
    END IF;

    UPDATE @extschema@.outbox_events x
       SET status = CASE WHEN u.held IS NOT NULL THEN 'processing' WHEN u.parked IS NOT NULL THEN 'pending' ELSE 'processed' END,
           processed_at = CASE WHEN u.held IS NULL AND u.parked IS NULL THEN clock_timestamp() END,
           claim_token = CASE WHEN u.held IS NOT NULL THEN token END,
           listed = u.parked IS NOT NULL
      FROM unnest(v_ids, v_held, v_parked) AS u (id, held, parked) WHERE x.id BETWEEN u.id AND u.id;
    seen := coalesce(cardinality(v_ids), 0);
    IF v_parked IS NULL THEN
        ids := v_ids;
        held := v_held;
        RETURN;
    END IF;
    SELECT array_agg(u.id) FILTER (WHERE u.held IS NOT NULL), array_agg(u.held) FILTER (WHERE u.held IS NOT NULL),
           count(*) FILTER (WHERE u.held IS NULL AND u.parked IS NULL), coalesce(bool_or(u.parked IS NOT NULL), false)
      INTO ids, held, unrouted, parked
      FROM unnest(v_ids, v_held, v_parked) AS u (id, held, parked);
    IF parked THEN
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, next_attempt_at)
        SELECT p.id, u.name, p.key, 'pending',
               CASE WHEN p.key IS NULL OR (NOT u.behind AND row_number() OVER (PARTITION BY u.name, p.key ORDER BY p.id) = 1)
                    THEN clock_timestamp() END
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

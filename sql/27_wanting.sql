-- Who wants an event. A destination does when one of its patterns matches the type, it has no tenant or the event's, and it
-- has no filter or the event passes it. What this costs follows from how many want the event, not from how many exist.
--
-- Many events of a claim share type and tenant. Those who may want them are looked up once for each such kind of event.

-- No settings of its own, so that the planner can merge it into the query that uses it.
-- A pattern that is * alone leaves out what pg_outbox itself says of destinations.
CREATE FUNCTION outbox._matches(event_type text, like_pattern text) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$
    SELECT $1 LIKE $2 AND ($2 <> '%' OR $1 NOT LIKE 'outbox.%')
$$;
COMMENT ON FUNCTION outbox._matches(text, text) IS 'whether a pattern of a destination matches the type';

-- No settings of its own, so that the planner can merge it into the query that uses it.
CREATE FUNCTION outbox._wanting(event_type text, tenant_id text) RETURNS SETOF outbox.destination
    LANGUAGE sql STABLE ROWS 2
AS $$
    SELECT d.*
      FROM (SELECT i.destination FROM outbox.interest i
             WHERE i.tenant_id = $2 AND i.head = ANY (outbox._heads($1)) AND outbox._matches($1, i.like_pattern)
            UNION
            SELECT i.destination FROM outbox.interest i
             WHERE i.tenant_id IS NULL AND i.head = ANY (outbox._heads($1)) AND outbox._matches($1, i.like_pattern)) w
     CROSS JOIN LATERAL (SELECT * FROM outbox.destination x WHERE x.name = w.destination OFFSET 0) d
$$;
COMMENT ON FUNCTION outbox._wanting(text, text) IS 'the destinations that want events of this type and tenant, filters apart';

-- An error is "no": no event may hold up others, whatever it holds.
CREATE FUNCTION outbox._passes(v_filter jsonpath, v_id bigint) RETURNS boolean
    LANGUAGE plpgsql STABLE SET enable_seqscan = off SET timezone = 'UTC'
AS $$
BEGIN
    RETURN (SELECT coalesce(jsonb_path_query_first_tz(e.event_data, v_filter,
                       jsonb_build_object('metadata', e.metadata, 'event_type', e.event_type,
                                          'aggregate_type', e.aggregate_type, 'aggregate_id', e.aggregate_id,
                                          'tenant_id', e.tenant_id), true) NOT IN ('null', 'false'), false)
              FROM @extschema@.outbox_events e WHERE e.id = v_id);
EXCEPTION WHEN OTHERS THEN
    RETURN false;
END
$$;
COMMENT ON FUNCTION outbox._passes(jsonpath, bigint) IS
    'whether the first result of a destination''s filter on the event is neither nothing, null nor false';

-- No settings of its own, so that the planner can merge it into the query that uses it.
CREATE FUNCTION outbox._wants(destination text, id bigint, event_type text, tenant_id text) RETURNS boolean
    LANGUAGE sql STABLE
AS $$
    SELECT $1 = ''
        OR EXISTS (SELECT FROM outbox.interest i
                    CROSS JOIN LATERAL (SELECT x.filter FROM outbox.destination x WHERE x.name = i.destination OFFSET 0) d
                    WHERE i.destination = $1 AND outbox._matches($3, i.like_pattern)
                      AND (i.tenant_id IS NULL OR i.tenant_id = $4)
                      AND CASE WHEN d.filter IS NULL THEN true ELSE outbox._passes(d.filter, $2) END)
$$;
COMMENT ON FUNCTION outbox._wants(text, bigint, text, text) IS
    'whether one destination wants the event; '''' stands for a consumer while there is no destination';

CREATE FUNCTION outbox._put_interest(name text) RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    DELETE FROM outbox.interest i WHERE i.destination = _put_interest.name;
    INSERT INTO outbox.interest (destination, like_pattern, head, tenant_id)
    SELECT DISTINCT d.name, outbox._like_pattern(p), outbox._head(p), d.tenant_id
      FROM outbox.destination d CROSS JOIN LATERAL unnest(d.event_types) AS p
     WHERE d.name = _put_interest.name;
END
$$;
COMMENT ON FUNCTION outbox._put_interest(text) IS 'enters a destination''s patterns into outbox.interest';

-- For many events at once: each with each destination that wants it.
CREATE FUNCTION outbox._routes(v_ids bigint[])
    RETURNS TABLE (id bigint, ordering_key bigint, destination text, since_token bigint)
    LANGUAGE plpgsql STABLE
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH kind AS MATERIALIZED (
        SELECT e.event_type, e.tenant_id, array_agg(e.id) AS ids,
               array_agg(outbox._ordering_key(e.aggregate_type, e.aggregate_id)) AS keys
          FROM @extschema@.outbox_events e WHERE e.id = ANY (v_ids)
         GROUP BY e.event_type, e.tenant_id
    ), menu AS MATERIALIZED (
        SELECT k.ids, k.keys, w.names, w.filters, w.tokens
          FROM kind k
         CROSS JOIN LATERAL (SELECT array_agg(d.name) AS names, array_agg(d.filter) AS filters,
                                    array_agg(d.since_token) AS tokens
                               FROM outbox._wanting(k.event_type, k.tenant_id) d) w
    )
    SELECT e.id, e.key, d.name, d.token
      FROM menu m
     CROSS JOIN LATERAL unnest(m.ids, m.keys) AS e (id, key)
     CROSS JOIN LATERAL unnest(m.names, m.filters, m.tokens) AS d (name, filter, token)
     WHERE CASE WHEN d.filter IS NULL THEN true ELSE outbox._passes(d.filter, e.id) END;
END
$$;
COMMENT ON FUNCTION outbox._routes(bigint[]) IS 'each of these events with each destination that wants it';

CREATE FUNCTION outbox._routes_or_nobody(v_ids bigint[]) RETURNS TABLE (id bigint, ordering_key bigint, destination text)
    LANGUAGE plpgsql STABLE SET enable_seqscan = off
AS $$
#variable_conflict use_column
BEGIN
    IF EXISTS (SELECT FROM outbox.destination) THEN
        RETURN QUERY SELECT r.id, r.ordering_key, r.destination FROM outbox._routes(v_ids) r;
    ELSE
        RETURN QUERY SELECT e.id, outbox._ordering_key(e.aggregate_type, e.aggregate_id), ''
                       FROM @extschema@.outbox_events e WHERE e.id = ANY (v_ids);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._routes_or_nobody(bigint[]) IS
    'each of these events with each destination that wants it, or with '''' while there is no destination';

-- The moments at which something is due, kept beside each destination: a claim asks those alone that have something due.
-- outbox._find_due() moves them on, when a claim has looked.
CREATE FUNCTION outbox._note_due() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    UPDATE outbox.destination d SET next_due = n.at
      FROM (SELECT c.destination, min(c.next_attempt_at) AS at FROM changed c
             WHERE c.status = 'pending' AND c.next_attempt_at IS NOT NULL GROUP BY c.destination) n
     WHERE d.name = n.destination AND (d.next_due IS NULL OR d.next_due > n.at);
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._note_due() IS 'a delivery is due earlier than any other of its destination';

CREATE TRIGGER note_due_insert AFTER INSERT ON outbox.delivery
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION outbox._note_due();
CREATE TRIGGER note_due_update AFTER UPDATE ON outbox.delivery
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION outbox._note_due();

-- How many deliveries each destination has. Whoever changes deliveries holds the claim lock, so nobody waits for these rows.
-- What comes with a restore is counted when it is complete, by outbox._recount_deliveries().
CREATE FUNCTION outbox._tally_insert() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off
AS $$
BEGIN
    INSERT INTO outbox.tally AS t (destination, waiting, dead)
    SELECT c.destination, count(*) FILTER (WHERE c.status <> 'failed'), count(*) FILTER (WHERE c.status = 'failed')
      FROM changed c GROUP BY c.destination
    ON CONFLICT ON CONSTRAINT tally_pkey
    DO UPDATE SET waiting = t.waiting + excluded.waiting, dead = t.dead + excluded.dead;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._tally_insert() IS 'counts deliveries that were listed';

CREATE FUNCTION outbox._tally_update() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off
AS $$
BEGIN
    -- Claims and retries change no count.
    IF EXISTS (SELECT FROM changed c WHERE c.status = 'failed') OR EXISTS (SELECT FROM before b WHERE b.status = 'failed') THEN
        UPDATE outbox.tally t SET waiting = t.waiting - n.died, dead = t.dead + n.died
          FROM (SELECT u.destination, sum(u.n) AS died
                  FROM (SELECT c.destination, 1 AS n FROM changed c WHERE c.status = 'failed'
                        UNION ALL SELECT b.destination, -1 FROM before b WHERE b.status = 'failed') u
                 GROUP BY u.destination) n
         WHERE t.destination = n.destination AND n.died <> 0;
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._tally_update() IS 'counts deliveries that became dead letters, or are owed again';

CREATE FUNCTION outbox._tally_delete() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off
AS $$
BEGIN
    UPDATE outbox.tally t SET waiting = t.waiting - n.waiting, dead = t.dead - n.dead
      FROM (SELECT b.destination, count(*) FILTER (WHERE b.status <> 'failed') AS waiting,
                   count(*) FILTER (WHERE b.status = 'failed') AS dead
              FROM before b GROUP BY b.destination) n
     WHERE t.destination = n.destination;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._tally_delete() IS 'counts deliveries that were made, purged or removed';

CREATE TRIGGER tally_insert AFTER INSERT ON outbox.delivery
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT WHEN (current_user = 'outbox_owner')
    EXECUTE FUNCTION outbox._tally_insert();
CREATE TRIGGER tally_update AFTER UPDATE ON outbox.delivery
    REFERENCING OLD TABLE AS before NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION outbox._tally_update();
CREATE TRIGGER tally_delete AFTER DELETE ON outbox.delivery
    REFERENCING OLD TABLE AS before FOR EACH STATEMENT EXECUTE FUNCTION outbox._tally_delete();

CREATE FUNCTION outbox._recount_deliveries() RETURNS void
    LANGUAGE plpgsql SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    DELETE FROM outbox.tally;
    INSERT INTO outbox.tally (destination, waiting, dead)
    SELECT d.destination, count(*) FILTER (WHERE d.status <> 'failed'), count(*) FILTER (WHERE d.status = 'failed')
      FROM outbox.delivery d GROUP BY d.destination;
END
$$;
COMMENT ON FUNCTION outbox._recount_deliveries() IS 'counts the deliveries of each destination anew';

CREATE FUNCTION outbox._find_due(v_destinations text[]) RETURNS void
    LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
BEGIN
    UPDATE outbox.destination d SET next_due = f.at
      FROM (SELECT n.name, (SELECT x.next_attempt_at FROM outbox.delivery x
                             WHERE x.destination = n.name AND x.status = 'pending' AND x.next_attempt_at IS NOT NULL
                             ORDER BY x.next_attempt_at LIMIT 1) AS at
              FROM (SELECT DISTINCT unnest(v_destinations) AS name) n) f
     WHERE d.name = f.name AND d.next_due IS DISTINCT FROM f.at;
END
$$;
COMMENT ON FUNCTION outbox._find_due(text[]) IS 'finds anew when the next delivery of each destination is due';

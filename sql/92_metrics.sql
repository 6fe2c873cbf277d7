-- What relays show to Prometheus. Asked at a scrape, never between. Deliveries are counted beforehand (outbox.tally); of what
-- is not listed, and of what is due, only the first are looked at, so that a long backlog costs no more than a short one.

-- What is owed without being listed: events that are fresh or claimed, once they have waited for a second; until then they
-- are on their way. Looks at so many of them, the oldest first, that they make at most some thousand pairs with destinations.
CREATE FUNCTION outbox._unlisted(OUT destination text, OUT waiting bigint, OUT since timestamptz) RETURNS SETOF record
    LANGUAGE plpgsql VOLATILE
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_before timestamptz := clock_timestamp() - interval '1 second';
    v_low_water bigint := outbox._low_water(false);
    v_most bigint := greatest(1, least(1000, 20000 / greatest(1, (SELECT count(*) FROM outbox.destination))));
    v_first bigint;
    v_ids bigint[];
BEGIN
    v_ids := ARRAY(SELECT e.id
                     FROM (SELECT c.token, i.id FROM outbox.claims c CROSS JOIN LATERAL unnest(c.ids) AS i (id)
                            ORDER BY c.token LIMIT v_most) h
                    CROSS JOIN LATERAL (SELECT x.id FROM @extschema@.outbox_events x
                                         WHERE x.id = h.id AND x.claim_token = h.token
                                           AND greatest(x.created_at, x.available_at) < v_before OFFSET 0) e);
    SELECT e.id INTO v_first FROM @extschema@.outbox_events e
     WHERE e.id >= v_low_water AND e.status = 'pending' AND NOT e.listed AND e.available_at IS NULL ORDER BY e.id LIMIT 1;
    IF EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = v_first AND e.created_at < v_before) THEN
        v_ids := v_ids || ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                                 WHERE e.id >= v_first AND e.status = 'pending' AND NOT e.listed AND e.available_at IS NULL
                                 ORDER BY e.id LIMIT v_most);
    END IF;
    IF v_ids = '{}' THEN
        RETURN;
    END IF;
    RETURN QUERY
    SELECT r.destination, count(*), min(greatest(e.created_at, e.available_at))
      FROM outbox._routes_or_nobody(v_ids) r
     CROSS JOIN LATERAL (SELECT x.created_at, x.available_at FROM @extschema@.outbox_events x WHERE x.id = r.id OFFSET 0) e
     -- What is listed is not the claim's.
     WHERE NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = r.id AND d.destination = r.destination)
     GROUP BY r.destination;
END
$$;
COMMENT ON FUNCTION outbox._unlisted() IS 'what the first fresh and claimed events are owed to whom, if they have waited for a second';

-- Since when the first delivery could have been made that was not: neither scheduled for later, nor held back by a pause, a
-- disablement or an open circuit, nor behind another one.
-- unlisted: the rows of outbox._unlisted().
CREATE FUNCTION outbox._deliverable_since(unlisted jsonb) RETURNS timestamptz
    LANGUAGE plpgsql VOLATILE
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    RETURN least(
        (SELECT min(f.since) FROM jsonb_to_recordset(unlisted) AS f (destination text, since timestamptz)
          WHERE f.destination = ''
             OR EXISTS (SELECT FROM outbox.destination t
                         WHERE t.name = f.destination AND NOT t.paused AND t.disabled_reason IS NULL
                           AND t.circuit_failures = 0 AND t.unable_at IS NULL)),
        -- It may be scheduled for any moment of the past.
        (SELECT greatest(e.available_at, e.created_at) FROM @extschema@.outbox_events e
          WHERE e.available_at <= v_now AND e.available_at IS NOT NULL AND NOT e.routed AND e.status = 'pending' AND NOT e.listed
          ORDER BY e.available_at LIMIT 1),
        (SELECT d.next_attempt_at FROM outbox.delivery d
          WHERE d.destination = '' AND d.status = 'pending' AND d.next_attempt_at <= v_now
          ORDER BY d.next_attempt_at LIMIT 1),
        (SELECT min(x.next_attempt_at)
           FROM outbox.destination t
          CROSS JOIN LATERAL (SELECT d.next_attempt_at FROM outbox.delivery d
                               WHERE d.destination = t.name AND d.status = 'pending' AND d.next_attempt_at <= v_now
                               ORDER BY d.next_attempt_at LIMIT 1) x
          WHERE t.ready_at <= v_now AND t.circuit_failures = 0 AND t.unable_at IS NULL));
END
$$;
COMMENT ON FUNCTION outbox._deliverable_since(jsonb) IS 'since when something could be delivered that was not; null: nothing waits';

-- A row for each of at most so many destinations (most), and one for each state of the others, with name null. Those that the
-- caller names come first, then those that are in trouble or owed something; the rest is named only if there is room for all.
-- unlisted: the rows of outbox._unlisted().
CREATE FUNCTION outbox._destination_figures(unlisted jsonb, named text[], most int)
    RETURNS TABLE (name text, state text, destinations bigint, waiting bigint, dead bigint, oldest_s float8)
    LANGUAGE plpgsql VOLATILE
    SET enable_seqscan = off SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    -- Deliveries of one destination that are looked at for the oldest.
    v_look bigint := greatest(1, least(100, 10000 / greatest(1, (SELECT count(*) FROM outbox.tally t WHERE t.waiting > 0))));
BEGIN
    RETURN QUERY
    WITH figures AS MATERIALIZED (
        SELECT v.name, v.state, greatest(coalesce(t.waiting, 0), 0) + coalesce(f.waiting, 0) AS waiting,
               greatest(coalesce(t.dead, 0), 0) AS dead, f.since, coalesce(t.waiting, 0) > 0 AS listed
          FROM outbox.destinations v
          LEFT JOIN outbox.tally t ON t.destination = v.name
          LEFT JOIN jsonb_to_recordset(unlisted) AS f (destination text, waiting bigint, since timestamptz)
                 ON f.destination = v.name
    ), placed AS MATERIALIZED (
        SELECT f.*, row_number() OVER (ORDER BY f.name = ANY (named) DESC, f.state <> 'active' OR f.waiting + f.dead > 0 DESC, f.name)
                        <= most AND (count(*) OVER () <= most OR f.name = ANY (named) OR f.state <> 'active' OR f.waiting + f.dead > 0)
                    AS is_named
          FROM figures f
    )
    SELECT CASE WHEN p.is_named THEN p.name END, p.state, count(*), sum(p.waiting)::bigint, sum(p.dead)::bigint,
           extract(epoch FROM v_now - min(least(p.since, o.since)))::float8
      FROM placed p
      LEFT JOIN LATERAL (
           SELECT min(x.owed_since) AS since
             FROM ((SELECT d.owed_since FROM outbox.delivery d
                     WHERE d.destination = p.name AND d.status = 'pending' AND d.next_attempt_at IS NOT NULL
                     ORDER BY d.next_attempt_at, d.id LIMIT v_look)
                   UNION ALL
                   (SELECT d.owed_since FROM outbox.delivery d
                     WHERE d.destination = p.name AND d.claim_token IS NOT NULL LIMIT v_look)) x) o ON p.listed
     GROUP BY 1, 2;
END
$$;
COMMENT ON FUNCTION outbox._destination_figures(jsonb, text[], int) IS 'what each destination is owed, and in which state it is';

CREATE FUNCTION outbox.metrics(named text[] DEFAULT '{}', most int DEFAULT 100) RETURNS jsonb
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    -- Looked for once: this is what a scrape costs.
    v_unlisted jsonb := (SELECT coalesce(jsonb_agg(to_jsonb(u)), '[]') FROM outbox._unlisted() u);
BEGIN
    RETURN (
    SELECT jsonb_build_object(
               'pending', s.pending, 'processing', s.processing, 'failed', s.failed,
               'oldest_pending_s', extract(epoch FROM s.oldest_pending)::float8,
               'deliverable_s', greatest(0, extract(epoch FROM clock_timestamp() - outbox._deliverable_since(v_unlisted)))::float8,
               'vacuum', (SELECT jsonb_build_object('held_back', coalesce(bool_or(h.too_long), false),
                                                    'transaction_s', extract(epoch FROM clock_timestamp() - min(h.since))::float8)
                            FROM outbox._vacuum_holders() h),
               'destinations', (SELECT coalesce(jsonb_agg(to_jsonb(d)), '[]')
                                  FROM outbox._destination_figures(v_unlisted, coalesce(named, '{}'), coalesce(most, 100)) d))
      FROM outbox.stats() s);
END
$$;
COMMENT ON FUNCTION outbox.metrics(text[], int) IS
    'the figures of a relay''s /metrics that only the database knows; most: so many destinations by name, those named first';

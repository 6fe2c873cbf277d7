-- The books: what a claim still holds, what an event's deliveries say of it, and how a claim of whole events becomes a
-- list of deliveries.

-- Takes one event or delivery off the books for each token. A claim's row goes when the claim holds nothing.
CREATE FUNCTION outbox._let_go(tokens bigint[]) RETURNS void
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_less record;
    v_closed int;
BEGIN
    IF tokens IS NULL THEN
        RETURN;
    END IF;
    SELECT array_agg(c.at) AS at, array_agg(l.n) AS n, bool_or(c.held > l.n) AS kept
      INTO v_less
      FROM (SELECT t.token, count(*) AS n FROM unnest(tokens) AS t (token) GROUP BY t.token) l
     CROSS JOIN LATERAL (SELECT x.ctid AS at, x.held FROM outbox.claims x WHERE x.token = l.token OFFSET 0) c;
    DELETE FROM outbox.claims c
     WHERE c.ctid = ANY (v_less.at) AND c.held <= v_less.n[array_position(v_less.at, c.ctid)];
    GET DIAGNOSTICS v_closed = ROW_COUNT;
    PERFORM outbox._open_claims(-v_closed, NULL) WHERE v_closed > 0;
    IF v_less.kept THEN
        UPDATE outbox.claims c SET held = c.held - v_less.n[array_position(v_less.at, c.ctid)] WHERE c.ctid = ANY (v_less.at);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._let_go(bigint[]) IS 'takes one event or delivery off the books for each token';

CREATE FUNCTION outbox._rest(v_id bigint) RETURNS text
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    RETURN (
    SELECT CASE WHEN bool_or(d.status = 'processing') THEN 'processing'
                WHEN bool_or(d.status = 'pending') THEN 'pending'
                WHEN bool_or(d.status = 'failed') THEN 'failed'
                ELSE 'processed' END
      FROM outbox.delivery d WHERE d.id = v_id);
END
$$;
COMMENT ON FUNCTION outbox._rest(bigint) IS 'the status that follows from an event''s deliveries';

-- A listed event's status follows from its deliveries. If the application has locked the row, the status waits.
CREATE FUNCTION outbox._refresh(v_ids bigint[]) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_locked bigint[] := outbox._locked(v_ids);
BEGIN
    UPDATE @extschema@.outbox_events e
       SET status = s.status, processed_at = CASE WHEN s.status = 'processed' THEN clock_timestamp() END
      FROM (SELECT i.id,
                   CASE WHEN bool_or(d.status = 'processing') THEN 'processing'
                        WHEN bool_or(d.status = 'pending') THEN 'pending'
                        WHEN bool_or(d.status = 'failed') THEN 'failed'
                        ELSE 'processed' END AS status
              FROM (SELECT DISTINCT unnest(v_ids) AS id) i
              LEFT JOIN LATERAL (SELECT x.status FROM outbox.delivery x WHERE x.id = i.id OFFSET 0) d ON true
             WHERE i.id <> ALL (v_locked)
             GROUP BY i.id) s
     WHERE e.id BETWEEN s.id AND s.id AND e.listed AND e.claim_token IS NULL AND e.status <> s.status;
    IF v_locked <> '{}' THEN
        INSERT INTO outbox.touched (id) SELECT unnest(v_locked);
        PERFORM outbox._look_again();
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._refresh(bigint[]) IS 'sets the status of listed events from their deliveries';

CREATE FUNCTION outbox._refresh_all() RETURNS void
    LANGUAGE plpgsql SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    PERFORM outbox._refresh(ARRAY(
        SELECT e.id FROM @extschema@.outbox_events e
          JOIN (SELECT d.id, CASE WHEN bool_or(d.status = 'processing') THEN 'processing'
                                  WHEN bool_or(d.status = 'pending') THEN 'pending' ELSE 'failed' END AS status
                  FROM outbox.delivery d GROUP BY d.id) s ON s.id = e.id
         WHERE e.claim_token IS NULL AND e.listed AND e.status <> s.status));
END
$$;
COMMENT ON FUNCTION outbox._refresh_all() IS 'sets the status of all events that have deliveries';

-- Turns events that are claimed whole into rows of outbox.delivery, one for each destination that the claim holds.
CREATE FUNCTION outbox._list(v_ids bigint[]) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_locked bigint[] := outbox._locked(v_ids);
    v_unwanted bigint[];
    v_closed int;
BEGIN
    WITH target AS MATERIALIZED (
        SELECT e.id, e.claim_token, outbox._ordering_key(e.aggregate_type, e.aggregate_id) AS key
          FROM @extschema@.outbox_events e
         WHERE e.id = ANY (v_ids) AND e.id <> ALL (v_locked) AND e.status = 'processing' AND e.claim_token IS NOT NULL
    ), route AS MATERIALIZED (
        -- A destination that was added later is not part of the claim. One sort, where a join would compare all with all.
        SELECT u.id, u.destination, u.ordering_key, u.token, u.since_token < u.token AS held,
               count(*) FILTER (WHERE u.since_token < u.token) OVER (PARTITION BY u.id) AS holders
          FROM (SELECT r.id, r.destination, r.ordering_key, r.since_token, max(r.token) OVER (PARTITION BY r.id) AS token
                  FROM (SELECT t.id, '' AS destination, t.key AS ordering_key, NULL::bigint AS since_token, t.claim_token AS token
                          FROM target t
                        UNION ALL
                        SELECT w.id, w.destination, w.ordering_key, w.since_token, NULL
                          FROM outbox._routes(ARRAY(SELECT t.id FROM target t)) w) r) u
    ), listed AS (
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, claim_token)
        SELECT r.id, r.destination, r.ordering_key, 'processing', r.token
          FROM route r WHERE r.held OR (r.destination = '' AND r.holders = 0)
        ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING
        RETURNING id, claim_token
    ), marked AS (
        UPDATE @extschema@.outbox_events e SET claim_token = NULL, listed = true
         WHERE e.id = ANY (ARRAY(SELECT t.id FROM target t))
    ), more AS MATERIALIZED (
        SELECT u.claim_token, sum(u.n) AS n
          FROM (SELECT claim_token, 1 AS n FROM listed UNION ALL SELECT claim_token, -1 FROM target) u
         GROUP BY u.claim_token
    ), found AS MATERIALIZED (
        SELECT m.claim_token AS token, m.n, c.at, c.held + m.n <= 0 AS empty
          FROM more m
         CROSS JOIN LATERAL (SELECT x.ctid AS at, x.held FROM outbox.claims x WHERE x.token = m.claim_token OFFSET 0) c
    ), closed AS (
        DELETE FROM outbox.claims c WHERE c.ctid = ANY (ARRAY(SELECT f.at FROM found f WHERE f.empty)) RETURNING 1
    ), recounted AS (
        UPDATE outbox.claims c SET held = c.held + (SELECT f.n FROM found f WHERE f.token = c.token)
         WHERE c.ctid = ANY (ARRAY(SELECT f.at FROM found f WHERE NOT f.empty))
    )
    SELECT array_agg(t.id), (SELECT count(*) FROM closed)
      INTO v_unwanted, v_closed FROM target t WHERE NOT EXISTS (SELECT FROM listed l WHERE l.id = t.id);
    PERFORM outbox._open_claims(-v_closed, NULL) WHERE v_closed > 0;
    -- Events with no delivery left: every destination that they were claimed for was removed.
    PERFORM outbox._refresh(v_unwanted) WHERE v_unwanted IS NOT NULL;
END
$$;
COMMENT ON FUNCTION outbox._list(bigint[]) IS 'lists what claims hold of these events in outbox.delivery';

-- Lists what claims hold of these events and of later ones with the same ordering keys, once for all that a settlement
-- reports: an event that is not delivered takes back those behind it.
CREATE FUNCTION outbox._list_keys(v_tokens bigint[], v_ids bigint[]) RETURNS void
    LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off
    SET enable_mergejoin = off SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    PERFORM outbox._list(ARRAY(
        WITH given AS MATERIALIZED (
            SELECT s.token, e.id, e.claim_token, outbox._ordering_key(e.aggregate_type, e.aggregate_id) AS key
              FROM unnest(v_tokens, v_ids) AS s (token, id)
             CROSS JOIN LATERAL (SELECT x.* FROM @extschema@.outbox_events x WHERE x.id = s.id OFFSET 0) e
        )
        SELECT g.id FROM given g WHERE g.claim_token = g.token
        UNION
        SELECT e.id
          FROM outbox.claims c CROSS JOIN LATERAL unnest(c.ids) AS i (id)
         CROSS JOIN LATERAL (SELECT x.* FROM @extschema@.outbox_events x WHERE x.id = i.id OFFSET 0) e
         WHERE c.token = ANY (ARRAY(SELECT DISTINCT g.token FROM given g WHERE g.key IS NOT NULL)) AND e.claim_token = c.token
           AND outbox._ordering_key(e.aggregate_type, e.aggregate_id)
               = ANY (ARRAY(SELECT DISTINCT g.key FROM given g WHERE g.key IS NOT NULL))));
END
$$;
COMMENT ON FUNCTION outbox._list_keys(bigint[], bigint[]) IS 'lists what claims hold of these events and of those behind them';

CREATE FUNCTION outbox._list_in_flight() RETURNS void
    LANGUAGE plpgsql
    SET enable_seqscan = off SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    PERFORM outbox._list(ARRAY(SELECT i.id FROM outbox.claims c CROSS JOIN LATERAL unnest(c.ids) AS i (id)));
END
$$;
COMMENT ON FUNCTION outbox._list_in_flight() IS 'lists what all claims hold, before a destination begins to want other events';

-- After deliveries ended or were given back: updates their claims, those that waited for them, and their events.
CREATE FUNCTION outbox._left_claim(v_ids bigint[], v_destinations text[], v_keys bigint[], v_tokens bigint[]) RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM outbox._let_go(v_tokens);
    PERFORM outbox._promote(v_destinations, v_keys);
    PERFORM outbox._refresh(v_ids);
END
$$;
COMMENT ON FUNCTION outbox._left_claim(bigint[], text[], bigint[], bigint[]) IS 'updates the books after deliveries left a claim';

-- After a delivery failed, takes back the later ones with its ordering key that the same claim holds: they must not be
-- delivered before it. No other claim can hold any.
CREATE FUNCTION outbox._take_back(v_token bigint, v_destination text, v_key bigint, v_id bigint) RETURNS void
    LANGUAGE plpgsql SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_back record;
BEGIN
    WITH back AS (
        UPDATE outbox.delivery d SET status = 'pending', claim_token = NULL, next_attempt_at = NULL
         WHERE d.destination = v_destination AND d.ordering_key = v_key AND d.place > v_id
           AND d.claim_token IS NOT DISTINCT FROM v_token
        RETURNING d.id
    )
    SELECT array_agg(id) AS ids, array_agg(v_token) AS tokens INTO v_back FROM back;
    PERFORM outbox._let_go(v_back.tokens);
    PERFORM outbox._refresh(v_back.ids);
END
$$;
COMMENT ON FUNCTION outbox._take_back(bigint, text, bigint, bigint) IS 'takes later events of an ordering key back, to wait for one that failed';

-- Ends a settlement: wakes consumers that wait for one.
CREATE FUNCTION outbox._settled(v_changed boolean) RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    IF v_changed AND outbox._is_waiting() THEN
        PERFORM outbox._waiting(false);
        PERFORM outbox._wake('released');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._settled(boolean) IS 'ends a settlement';

CREATE FUNCTION outbox._claim_ids(v_token bigint) RETURNS bigint[]
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    RETURN coalesce((SELECT c.ids FROM outbox.claims c WHERE c.token = v_token), '{}');
END
$$;
COMMENT ON FUNCTION outbox._claim_ids(bigint) IS 'all events that a claim handed out';

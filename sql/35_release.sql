-- Giving back: events are owed again as if they had never been handed out. No attempt is used.

-- Gives back everything that these claims hold. Events that the application has locked follow when they are free: until then
-- the claim's row stays, with a lease that is over. So it does while outcomes are postponed: what was reported once counts,
-- even if the session has ended since, or the server.
CREATE FUNCTION outbox._release(v_tokens bigint[]) RETURNS bigint
    LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_held bigint[];
    v_locked bigint[];
    v_late CONSTANT bigint[] := ARRAY(SELECT p.claim_token FROM outbox.postponed p WHERE p.claim_token = ANY (v_tokens));
    v_whole record;
    v_back record;
    v_empty int;
BEGIN
    SELECT array_agg(i) INTO v_held FROM outbox.claims c, unnest(c.ids) AS i WHERE c.token = ANY (v_tokens);
    v_locked := outbox._locked(v_held)
                || ARRAY(SELECT p.id FROM outbox.postponed p WHERE p.claim_token = ANY (v_late));
    PERFORM outbox._list(ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                                  WHERE e.id = ANY (v_held) AND e.id <> ALL (v_locked) AND e.claim_token = ANY (v_tokens)
                                    AND e.listed));
    SELECT array_agg(e.id) AS ids, array_agg(e.claim_token) AS tokens INTO v_whole
      FROM @extschema@.outbox_events e
     WHERE e.id = ANY (v_held) AND e.id <> ALL (v_locked) AND e.claim_token = ANY (v_tokens) AND e.status = 'processing';
    UPDATE @extschema@.outbox_events e SET status = 'pending', claim_token = NULL WHERE e.id = ANY (v_whole.ids);
    PERFORM outbox._let_go(v_whole.tokens);
    SELECT array_agg(d.id) AS ids, array_agg(d.destination) AS destinations, array_agg(d.ordering_key) AS keys,
           array_agg(d.claim_token) AS tokens, count(DISTINCT d.id) AS events
      INTO v_back
      -- OFFSET 0: for count(DISTINCT) PostgreSQL 16 and later may walk the whole primary key, which is in its order.
      FROM (SELECT x.id, x.destination, x.ordering_key, x.claim_token FROM outbox.delivery x
             WHERE x.claim_token = ANY (v_tokens)
               AND NOT EXISTS (SELECT FROM outbox.postponed p WHERE p.claim_token = x.claim_token AND p.id = x.id) OFFSET 0) d;
    UPDATE outbox.delivery d SET status = 'pending', claim_token = NULL, next_attempt_at = clock_timestamp()
     WHERE d.claim_token = ANY (v_tokens)
       AND NOT EXISTS (SELECT FROM outbox.postponed p WHERE p.claim_token = d.claim_token AND p.id = d.id);
    IF v_back.ids IS NOT NULL THEN
        PERFORM outbox._left_claim(v_back.ids, v_back.destinations, v_back.keys, v_back.tokens);
    END IF;
    UPDATE outbox.claims c SET attachment = NULL, lease_until = clock_timestamp()
     WHERE c.token = ANY (v_tokens) AND c.token = ANY (v_late || ARRAY(SELECT e.claim_token FROM @extschema@.outbox_events e
                                                                       WHERE e.id = ANY (v_locked)));
    IF FOUND THEN
        PERFORM outbox._open_claims(0, clock_timestamp() + interval '250 milliseconds');
    END IF;
    WITH gone AS (
        DELETE FROM outbox.claims c
         WHERE c.token = ANY (v_tokens)
           AND c.token <> ALL (v_late || ARRAY(SELECT e.claim_token FROM @extschema@.outbox_events e
                                                WHERE e.id = ANY (v_locked) AND e.claim_token IS NOT NULL))
        RETURNING 1
    )
    SELECT count(*) INTO v_empty FROM gone;
    PERFORM outbox._open_claims(-v_empty, NULL) WHERE v_empty > 0;
    IF v_whole.ids IS NOT NULL OR v_back.ids IS NOT NULL THEN
        PERFORM outbox._wake('released');
    END IF;
    RETURN coalesce(cardinality(v_whole.ids), 0) + v_back.events;
END
$$;
COMMENT ON FUNCTION outbox._release(bigint[]) IS 'gives back all that the claims hold';

-- Gives back one delivery that the consumer has no room for.
CREATE FUNCTION outbox._release_one(v_token bigint, v_id bigint, v_destination text) RETURNS boolean
    LANGUAGE plpgsql SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_key bigint;
BEGIN
    UPDATE outbox.delivery d SET status = 'pending', claim_token = NULL, next_attempt_at = clock_timestamp()
     WHERE d.id = v_id AND d.destination = v_destination AND d.claim_token IS NOT DISTINCT FROM v_token AND v_token IS NOT NULL
    RETURNING d.ordering_key INTO v_key;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF v_key IS NOT NULL THEN
        PERFORM outbox._take_back(v_token, v_destination, v_key, v_id);
    END IF;
    PERFORM outbox._left_claim(ARRAY[v_id], ARRAY[v_destination], ARRAY[v_key], ARRAY[v_token]);
    PERFORM outbox._wake('released');
    RETURN true;
END
$$;
COMMENT ON FUNCTION outbox._release_one(bigint, bigint, text) IS 'gives back one delivery; uses no attempt';

-- Releases each claim by itself if they can't be released together. Returns SQLSTATE and message of the obstacle.
CREATE FUNCTION outbox._release_apart(v_tokens bigint[]) RETURNS text
    LANGUAGE plpgsql
AS $$
DECLARE
    v_token bigint;
    v_error text;
BEGIN
    BEGIN
        PERFORM outbox._release(v_tokens);
        RETURN NULL;
    EXCEPTION WHEN OTHERS THEN
        v_error := SQLSTATE || ' ' || SQLERRM;
    END;
    FOREACH v_token IN ARRAY v_tokens LOOP
        EXIT WHEN cardinality(v_tokens) = 1;
        BEGIN
            PERFORM outbox._release(ARRAY[v_token]);
        EXCEPTION WHEN OTHERS THEN
            v_error := SQLSTATE || ' ' || SQLERRM;
            -- This obstacle was waited for already.
            PERFORM set_config('lock_timeout', '1ms', true);
        END;
    END LOOP;
    RETURN v_error;
END
$$;
COMMENT ON FUNCTION outbox._release_apart(bigint[]) IS 'releases as many of these claims as can be released';

-- No session survives the server, so claims of earlier starts are free. A crash may have lost claims whose consumer did not
-- wait for the disk: the sequence jumps past their tokens, on disk before the first new token is given out.
CREATE FUNCTION outbox._forget_earlier_starts() RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM outbox._release(ARRAY(SELECT c.token FROM outbox.claims c WHERE c.boot <> outbox._boot()))
      WHERE EXISTS (SELECT FROM outbox.claims c WHERE c.boot <> outbox._boot());
    PERFORM outbox._commit_to_disk();
    PERFORM setval('outbox.claim_token_seq', nextval('outbox.claim_token_seq') + 100000);
END
$$;
COMMENT ON FUNCTION outbox._forget_earlier_starts() IS 'ends all claims of earlier starts of the server';

-- Looks after events that the application deleted or rescheduled, and after those whose status was left for later.
CREATE FUNCTION outbox._look_after_touched() RETURNS void
    LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_batch CONSTANT int := 5000;   -- at a time: others wait for the lock
    v_touched record;
    v_gone record;
BEGIN
    WITH taken AS (
        DELETE FROM outbox.touched t WHERE t.ctid = ANY (ARRAY(SELECT x.ctid FROM outbox.touched x LIMIT v_batch))
        RETURNING t.id, t.ordering_key, t.claim_token
    )
    SELECT array_agg(t.id) AS ids, array_agg(t.ordering_key) FILTER (WHERE t.ordering_key IS NOT NULL) AS keys,
           array_agg(t.claim_token) FILTER (WHERE t.claim_token IS NOT NULL) AS tokens, count(*) AS n
      INTO v_touched FROM taken t;
    IF v_touched.n = 0 THEN
        RETURN;
    END IF;
    WITH gone AS (
        DELETE FROM outbox.delivery d
         WHERE d.id = ANY (v_touched.ids) AND NOT EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = d.id)
        RETURNING d.ordering_key, d.claim_token
    )
    SELECT array_agg(g.ordering_key) AS keys, array_agg(g.claim_token) FILTER (WHERE g.claim_token IS NOT NULL) AS tokens
      INTO v_gone FROM gone g;
    PERFORM outbox._let_go(v_touched.tokens || v_gone.tokens);
    PERFORM outbox._promote_keys(v_touched.keys || v_gone.keys);
    PERFORM outbox._refresh(v_touched.ids);
    PERFORM outbox._settled(true);
    PERFORM outbox._wake_at(clock_timestamp()) WHERE v_touched.n = v_batch;
END
$$;
COMMENT ON FUNCTION outbox._look_after_touched() IS
    'removes the deliveries of deleted events and promotes the events that waited for them';

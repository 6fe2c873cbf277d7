-- The claim itself: what a consumer calls.

-- What a claim knows while it runs.
CREATE TYPE outbox.claim_state AS (
    token            bigint,
    scope            outbox.claim_scope,
    serve            boolean,   -- one of them takes any number of events
    probe            boolean,   -- the circuit of one of them is half open
    low_water        bigint,    -- no fresh or claimed event is below
    high_water       bigint,    -- no claimed event is above, when this claim began
    room             int,       -- so many more events may be handed out
    owed             bigint,    -- deliveries of the fresh events that were looked at
    parked           boolean,   -- some of them were parked: one may be the probe of a circuit that is half open
    ids              bigint[],  -- events that were taken whole ...
    held             text[],    -- ... and for which destinations, each an array as text
    due_ids          bigint[],  -- deliveries that were taken one by one ...
    due_destinations text[],    -- ... each for one destination
    unrouted_left    boolean,   -- scheduled events are due that are not routed yet
    exhausted        boolean,   -- every fresh event was looked at
    waiting          boolean,   -- some can't go before a claim ends
    stuck            boolean,   -- some can't go before another transaction ends
    listed           boolean,   -- what claims hold was listed meanwhile
    more             boolean,   -- another claim would find more
    unrouted         bigint     -- events that no destination wanted
);
COMMENT ON TYPE outbox.claim_state IS 'what a claim knows while it runs; internal';

-- Catches up before a claim looks: after a start of the server, after deletes, when the first destination was added, when
-- scheduled events are due. Returns whether some of these are left unrouted.
CREATE FUNCTION outbox._catch_up_first(max_events int) RETURNS boolean
    LANGUAGE plpgsql
AS $$
DECLARE
    v_least CONSTANT int := 500;    -- routed at a time: most claims ask for fewer, and the others' events wait too
    v_now CONSTANT timestamptz := clock_timestamp();
BEGIN
    IF NOT outbox._is_recovered() THEN
        PERFORM outbox._forget_earlier_starts();
    END IF;
    IF EXISTS (SELECT FROM outbox.touched) THEN
        PERFORM outbox._look_after_touched();
    END IF;
    IF EXISTS (SELECT FROM outbox.delivery d
                WHERE d.destination = '' AND d.status = 'pending' AND d.next_attempt_at IS NOT NULL)
       AND EXISTS (SELECT FROM outbox.destination) THEN
        PERFORM outbox._give_to_destinations();
    END IF;
    IF NOT EXISTS (SELECT FROM @extschema@.outbox_events e
                    WHERE e.available_at <= v_now AND e.available_at IS NOT NULL AND NOT e.routed
                      AND e.status = 'pending' AND NOT e.listed) THEN
        RETURN false;
    END IF;
    RETURN outbox._route_due(greatest(max_events, v_least), v_now);
END
$$;
COMMENT ON FUNCTION outbox._catch_up_first(int) IS 'catches up before a claim looks; part of outbox.claim';

-- Token and marks. The token is null when none of the destinations can be served now.
CREATE FUNCTION outbox._begin(v_scope outbox.claim_scope, max_events int) RETURNS outbox.claim_state
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_far CONSTANT bigint := 20000;     -- a walk of so many events costs more than listing what makes it so long
    v_near CONSTANT bigint := 10000;
    c outbox.claim_state;
BEGIN
    c.scope := v_scope;
    SELECT s.serve, s.probe INTO c.serve, c.probe FROM outbox._may_serve(v_scope) s;
    IF NOT (c.serve OR c.probe) THEN
        RETURN c;
    END IF;
    c.token := outbox._new_token();
    c.high_water := coalesce(outbox._high_water(), (SELECT max(e.id) FROM @extschema@.outbox_events e), 0);
    -- A statement of its own: the rows that lowered the mark are visible to a snapshot taken after this one.
    c.low_water := outbox._low_water(true);
    c.low_water := outbox._advance_low_water(c.low_water);
    -- A claim that is kept for long must not make every later walk longer.
    IF outbox._is_recovered() AND c.low_water < greatest(c.high_water, -9223372036854755808) - v_far THEN
        PERFORM outbox._list(ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                                    WHERE e.id BETWEEN c.low_water AND c.high_water - v_near AND e.claim_token IS NOT NULL));
        c.low_water := outbox._advance_low_water(c.low_water);
    END IF;
    c.room := max_events;
    c.owed := 0;
    c.parked := false;
    c.ids := '{}';
    c.held := '{}';
    c.due_ids := '{}';
    c.due_destinations := '{}';
    c.exhausted := false;
    c.waiting := false;
    c.stuck := false;
    c.listed := false;
    c.more := false;
    c.unrouted := 0;
    RETURN c;
END
$$;
COMMENT ON FUNCTION outbox._begin(outbox.claim_scope, int) IS 'token and marks of a claim; part of outbox.claim';

-- Takes fresh events until v_reserve of the room is left. Any number of events that can't go now may stand in front of those
-- that can: the window grows until it sees past them. Events that only others want are parked batch by batch; events for
-- the destinations that are served go first, and the kinds that only others want are passed meanwhile.
CREATE FUNCTION outbox._take_fresh(c outbox.claim_state, v_reserve int) RETURNS outbox.claim_state
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_batches CONSTANT int := 8;    -- at most so many in one claim: others wait for the lock
    v_growths CONSTANT int := 30;
    v_many CONSTANT int := 200;     -- behind events in flight: listing those costs less than walking past these
    v_most CONSTANT bigint := 20000;    -- deliveries in one claim: an event may have thousands
    v_decide CONSTANT bigint := 500;    -- at a time, when the first events are not for this claim
    v_beyond bigint := 200;         -- looked at beyond what is decided on
    v_asked int;
    v_decided bigint;
    v_passed jsonb;
    v_served_first boolean := false;
    v_listed boolean := false;
    f record;
BEGIN
    FOR i IN 1..v_growths LOOP
        EXIT WHEN c.exhausted OR c.room <= v_reserve OR c.owed >= v_most;
        v_asked := CASE WHEN c.serve THEN c.room - v_reserve ELSE 1 END;
        v_decided := CASE WHEN c.serve AND i = 1 THEN v_asked ELSE greatest(v_asked, v_decide) END;
        SELECT * INTO f
          FROM outbox._claim_fresh(c.token, c.scope, c.low_water, c.high_water, v_asked, v_decided, v_decided + v_beyond,
                                   c.unrouted_left, v_passed, v_most - c.owed);
        c.owed := c.owed + f.owed;
        c.parked := c.parked OR f.parked;
        c.exhausted := NOT c.serve OR (v_passed IS NULL AND NOT f."full");
        c.ids := c.ids || f.ids;
        c.held := c.held || f.held;
        c.room := c.room - coalesce(cardinality(f.ids), 0);
        c.waiting := c.waiting OR f.behind > 0;
        c.stuck := c.stuck OR f.stuck > 0;
        c.unrouted := c.unrouted + f.unrouted;
        IF c.serve AND NOT v_listed AND f.seen < v_asked AND f.behind - f.stuck >= v_many THEN
            PERFORM outbox._list(ARRAY(SELECT x.id FROM outbox._in_flight(c.low_water, c.high_water) x));
            c.exhausted := false;
            c.listed := true;
            v_listed := true;
        ELSIF f."full" AND f.seen < v_asked THEN
            v_beyond := 2 * v_beyond + f.behind;
        ELSIF i >= v_batches THEN
            EXIT;
        ELSIF c.serve AND NOT v_served_first AND 2 * coalesce(cardinality(f.ids), 0) < f.seen THEN
            v_passed := coalesce(v_passed, '{}') || outbox._names(f.unserved);
        ELSE
            v_served_first := v_passed IS NOT NULL;
            v_passed := NULL;
        END IF;
    END LOOP;
    RETURN c;
END
$$;
COMMENT ON FUNCTION outbox._take_fresh(outbox.claim_state, int) IS 'takes fresh events; part of outbox.claim';

-- Takes deliveries that are due.
CREATE FUNCTION outbox._take_due(c outbox.claim_state) RETURNS outbox.claim_state
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_high_water CONSTANT bigint := outbox._new_high_water(c);
    d record;
BEGIN
    SELECT * INTO d FROM outbox._claim_due(c.token, c.scope, c.low_water, v_high_water, c.room, c.unrouted_left);
    c.due_ids := c.due_ids || d.ids;
    c.due_destinations := c.due_destinations || d.destinations;
    c.room := c.room - coalesce(cardinality(d.ids), 0);
    c.more := d.more;
    IF d.busy IS NOT NULL THEN
        c.waiting := true;
        c.listed := true;
        PERFORM outbox._list(ARRAY(SELECT f.id FROM outbox._in_flight(c.low_water, v_high_water) f WHERE f.key = ANY (d.busy)));
    END IF;
    IF d.ids IS NOT NULL THEN
        -- Claims that hold these events for other destinations are listed now, while the two can be told apart.
        c.listed := true;
        PERFORM outbox._list(ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                                    WHERE e.id = ANY (d.ids) AND e.claim_token IS NOT NULL));
    END IF;
    RETURN c;
END
$$;
COMMENT ON FUNCTION outbox._take_due(outbox.claim_state) IS 'takes due deliveries; part of outbox.claim';

CREATE FUNCTION outbox._new_high_water(c outbox.claim_state) RETURNS bigint
    LANGUAGE plpgsql IMMUTABLE
AS $$
BEGIN
    RETURN greatest(c.high_water, (SELECT max(i) FROM unnest(c.ids) AS i));
END
$$;
COMMENT ON FUNCTION outbox._new_high_water(outbox.claim_state) IS 'no claimed event is above, with those that were taken';

-- Ends a claim: announces what is left and enters what was taken. Returns how many whole events and single deliveries it
-- holds.
CREATE FUNCTION outbox._enter(c outbox.claim_state, lease interval) RETURNS int
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_held int := cardinality(c.ids) + cardinality(c.due_ids);
BEGIN
    PERFORM outbox._wake('due') WHERE c.more OR (NOT c.exhausted AND c.room > 0);
    PERFORM outbox._look_again() WHERE c.stuck;
    PERFORM outbox._waiting(c.waiting);
    PERFORM outbox._count_unrouted(c.unrouted) WHERE c.unrouted > 0;
    PERFORM outbox._set_water(c.low_water, outbox._new_high_water(c));
    IF v_held > 0 AND c.listed THEN
        v_held := (SELECT count(*) FROM @extschema@.outbox_events e WHERE e.id = ANY (c.ids) AND e.claim_token = c.token)
                + (SELECT count(*) FROM outbox.delivery d WHERE d.claim_token = c.token);
    END IF;
    IF v_held > 0 THEN
        INSERT INTO outbox.claims (token, attachment, boot, lease_until, ids, held)
        VALUES (c.token, outbox._attachment(), outbox._boot(), clock_timestamp() + lease, c.ids || c.due_ids, v_held);
        PERFORM outbox._open_claims(1, clock_timestamp() + lease);
    END IF;
    RETURN v_held;
END
$$;
COMMENT ON FUNCTION outbox._enter(outbox.claim_state, interval) IS 'ends a claim: its row in the books; part of outbox.claim';

-- The claim, step by step. Fresh events come first, then due deliveries, for which half of the room is kept; fresh events get
-- what they leave. Returns the events with their destinations, each list as the text of an array. The caller has pinned the
-- settings.
CREATE FUNCTION outbox._claim(
    max_events int, scope outbox.claim_scope, lease interval, OUT token bigint, OUT ids bigint[], OUT held text[])
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_rounds CONSTANT int := 4;     -- what waits for others may have taken the place of what can go
    c outbox.claim_state;
    v_left boolean;
    v_due boolean;
BEGIN
    PERFORM outbox._check_claim(max_events, lease);
    PERFORM outbox._lock();
    v_left := outbox._catch_up_first(max_events);
    c := outbox._begin(scope, max_events);
    IF c.token IS NULL THEN
        RETURN;
    END IF;
    c.unrouted_left := v_left;
    v_due := outbox._is_due(scope);
    c := outbox._take_fresh(c, CASE WHEN v_due THEN greatest(max_events / 2, (random() < 0.5)::int) ELSE 0 END);
    IF c.room > 0 AND (v_due OR (c.parked AND outbox._is_due(scope))) THEN
        FOR i IN 1..v_rounds LOOP
            c := outbox._take_due(c);
            EXIT WHEN NOT c.more OR c.room <= 0;
        END LOOP;
        c := outbox._take_fresh(c, 0);
    END IF;
    IF outbox._enter(c, lease) = 0 THEN
        RETURN;
    END IF;
    token := c.token;
    ids := c.ids;
    held := c.held;
    IF cardinality(c.due_ids) > 0 THEN
        SELECT array_agg(u.id), array_agg(u.destinations::text) INTO ids, held
          FROM (SELECT x.id, array_agg(x.destination ORDER BY x.destination) AS destinations
                  FROM (SELECT f.id, unnest(f.held::text[]) AS destination FROM unnest(c.ids, c.held) AS f (id, held)
                        UNION ALL
                        SELECT d.id, d.destination FROM unnest(c.due_ids, c.due_destinations) AS d (id, destination)) x
                 GROUP BY x.id) u;
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._claim(int, outbox.claim_scope, interval) IS 'what outbox.claim and outbox.claim_refs share';

-- No settings of its own, so that the planner can merge it into the query that uses it.
CREATE FUNCTION outbox._handed_out(ids bigint[], held text[], token bigint) RETURNS SETOF outbox.claimed_event
    LANGUAGE sql STABLE ROWS 100
AS $$
    SELECT e.id, e.event_id, e.event_type, e.event_version, e.aggregate_type, e.aggregate_id, e.tenant_id,
           e.event_data, e.metadata, e.created_at, e.retry_count, array_remove(h.held::text[], ''), $3
      FROM unnest($1, $2) AS h (id, held)
     CROSS JOIN LATERAL (SELECT x.* FROM @extschema@.outbox_events x WHERE x.id = h.id OFFSET 0) e
     ORDER BY e.id
$$;
COMMENT ON FUNCTION outbox._handed_out(bigint[], text[], bigint) IS 'what a claim hands out, oldest first';

CREATE FUNCTION outbox.claim(
    max_events int DEFAULT 100, destinations text[] DEFAULT NULL, lease interval DEFAULT '1 minute')
    RETURNS SETOF outbox.claimed_event
    LANGUAGE plpgsql SECURITY DEFINER ROWS 100
    SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0 SET lock_timeout = 0
AS $$
#variable_conflict use_column
DECLARE
    v_claim record;
BEGIN
    SELECT * INTO v_claim
      FROM outbox._claim(claim.max_events, ROW(outbox._names(claim.destinations), NULL, NULL, NULL)::outbox.claim_scope, claim.lease);
    RETURN QUERY SELECT * FROM outbox._handed_out(v_claim.ids, v_claim.held, v_claim.token);
END
$$;
COMMENT ON FUNCTION outbox.claim(int, text[], interval) IS
    'hands out up to max_events events, oldest first, to be settled with ack, fail, reject or release before the lease ends';

-- For a consumer whose claim failed because an event can't be sent to it: a text longer than 1 GB, or bytes that its encoding
-- lacks. It claims with this function and then asks for each event by itself.
CREATE FUNCTION outbox.claim_refs(
    max_events int DEFAULT 100, destinations text[] DEFAULT NULL, lease interval DEFAULT '1 minute')
    RETURNS SETOF outbox.claimed_ref
    LANGUAGE plpgsql SECURITY DEFINER ROWS 100
    SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0 SET lock_timeout = 0
AS $$
#variable_conflict use_column
DECLARE
    v_claim record;
BEGIN
    SELECT * INTO v_claim
      FROM outbox._claim(claim_refs.max_events, ROW(outbox._names(claim_refs.destinations), NULL, NULL, NULL)::outbox.claim_scope, claim_refs.lease);
    RETURN QUERY SELECT h.id, h.event_id, h.retry_count, h.destinations, h.claim_token
                   FROM outbox._handed_out(v_claim.ids, v_claim.held, v_claim.token) h;
END
$$;
COMMENT ON FUNCTION outbox.claim_refs(int, text[], interval) IS
    'as outbox.claim, without what the events hold: see outbox.claimed';

-- The relay says what it does not ask for, rather than naming thousands of destinations in each claim.
CREATE FUNCTION outbox._scope(passed text[], patterns text[], brokers text[], only_names text[]) RETURNS outbox.claim_scope
    LANGUAGE plpgsql IMMUTABLE
AS $$
BEGIN
    RETURN ROW(outbox._names(only_names), outbox._names(passed), patterns, coalesce(brokers, '{}'))::outbox.claim_scope;
END
$$;
COMMENT ON FUNCTION outbox._scope(text[], text[], text[], text[]) IS 'what a relay serves';

CREATE FUNCTION outbox.claim_for(
    max_events int, lease interval, passed text[] DEFAULT '{}', patterns text[] DEFAULT NULL, brokers text[] DEFAULT '{}',
    only_names text[] DEFAULT NULL)
    RETURNS SETOF outbox.claimed_event
    LANGUAGE plpgsql SECURITY DEFINER ROWS 100
    SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0 SET lock_timeout = 0
AS $$
#variable_conflict use_column
DECLARE
    v_claim record;
BEGIN
    SELECT * INTO v_claim
      FROM outbox._claim(claim_for.max_events, outbox._scope(claim_for.passed, claim_for.patterns, claim_for.brokers, claim_for.only_names), claim_for.lease);
    RETURN QUERY SELECT * FROM outbox._handed_out(v_claim.ids, v_claim.held, v_claim.token);
END
$$;
COMMENT ON FUNCTION outbox.claim_for(int, interval, text[], text[], text[], text[]) IS
    'as outbox.claim, for webhooks and the RabbitMQ destinations of these brokers: those whose names match one of the LIKE patterns (null: all), are among only_names (null: all) and not passed';

CREATE FUNCTION outbox.claim_refs_for(
    max_events int, lease interval, passed text[] DEFAULT '{}', patterns text[] DEFAULT NULL, brokers text[] DEFAULT '{}',
    only_names text[] DEFAULT NULL)
    RETURNS SETOF outbox.claimed_ref
    LANGUAGE plpgsql SECURITY DEFINER ROWS 100
    SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0 SET lock_timeout = 0
AS $$
#variable_conflict use_column
DECLARE
    v_claim record;
BEGIN
    SELECT * INTO v_claim
      FROM outbox._claim(claim_refs_for.max_events, outbox._scope(claim_refs_for.passed, claim_refs_for.patterns, claim_refs_for.brokers, claim_refs_for.only_names), claim_refs_for.lease);
    RETURN QUERY SELECT h.id, h.event_id, h.retry_count, h.destinations, h.claim_token
                   FROM outbox._handed_out(v_claim.ids, v_claim.held, v_claim.token) h;
END
$$;
COMMENT ON FUNCTION outbox.claim_refs_for(int, interval, text[], text[], text[], text[]) IS
    'as outbox.claim_for, without what the events hold: see outbox.claimed';

CREATE FUNCTION outbox.claimed(claim_token bigint, id bigint) RETURNS SETOF outbox.claimed_event
    LANGUAGE plpgsql STABLE SECURITY DEFINER ROWS 1
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT e.id, e.event_id, e.event_type, e.event_version, e.aggregate_type, e.aggregate_id, e.tenant_id,
           e.event_data, e.metadata, e.created_at, e.retry_count,
           ARRAY(SELECT d.destination FROM outbox.delivery d
                  WHERE d.id = e.id AND d.claim_token = claimed.claim_token AND d.destination <> '' ORDER BY 1),
           claimed.claim_token
      FROM @extschema@.outbox_events e
     WHERE e.id = claimed.id
       AND (e.claim_token = claimed.claim_token
            OR EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id AND d.claim_token = claimed.claim_token));
END
$$;
COMMENT ON FUNCTION outbox.claimed(bigint, bigint) IS
    'one event that an open claim holds; destinations are those that are listed: the claim''s own answer names all';

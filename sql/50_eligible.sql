-- What a claim may hand out: to whom, from where on, and under which token.

CREATE FUNCTION outbox._check_claim(max_events int, lease interval) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION USING ERRCODE = 'read_only_sql_transaction',
            MESSAGE = 'cannot claim events on a standby',
            HINT = 'Connect to the primary, for example with target_session_attrs=read-write.';
    ELSIF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION USING ERRCODE = 'feature_not_supported',
            MESSAGE = format('cannot claim events in a %s transaction', current_setting('transaction_isolation')),
            DETAIL = 'Its snapshot may be older than what other consumers have claimed meanwhile.',
            HINT = 'Claim in a READ COMMITTED transaction, for example with SET default_transaction_isolation.';
    ELSIF max_events IS NULL OR max_events < 1 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('max_events must be at least 1, not %s', coalesce(max_events::text, 'null')),
            HINT = 'Ask for as many events as you can work on before the lease ends.';
    ELSIF lease IS NULL OR lease <= interval '0' OR lease > interval '100 years' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'lease must be above zero and at most 100 years',
            HINT = 'A claim is released when its lease ends; the default is 1 minute.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_claim(int, interval) IS 'an error for arguments that make no claim';

-- The destinations that a consumer serves.
CREATE TYPE outbox.claim_scope AS (
    names    jsonb,     -- an object with their names; null: all
    passed   jsonb,     -- an object with the names of those that are left out
    patterns text[],    -- LIKE patterns of their names; null: all
    brokers  text[]     -- the brokers of RabbitMQ destinations; null: all, and the consumer may be one without any destination
);
COMMENT ON TYPE outbox.claim_scope IS 'the destinations that a consumer serves; internal';

-- Objects, because finding a name among thousands must not look at all of them. In PL/pgSQL: an SQL function with a query
-- in it is planned anew by each claim.
CREATE FUNCTION outbox._names(names text[]) RETURNS jsonb
    LANGUAGE plpgsql IMMUTABLE
AS $$
BEGIN
    RETURN CASE WHEN names IS NULL THEN NULL
                WHEN names = '{}' THEN '{}'
                ELSE (SELECT coalesce(jsonb_object_agg(n, true), '{}') FROM unnest(names) AS n WHERE n IS NOT NULL) END;
END
$$;
COMMENT ON FUNCTION outbox._names(text[]) IS 'an object with these names';

-- No settings of its own, so that the planner can merge it into the query that uses it.
CREATE FUNCTION outbox._serves(scope outbox.claim_scope, name text, broker text) RETURNS boolean
    LANGUAGE sql IMMUTABLE
AS $$
    SELECT coalesce(scope.names ? name, true) AND NOT coalesce(scope.passed ? name, false)
       AND coalesce(name LIKE ANY (scope.patterns), true)
       AND (broker IS NULL OR coalesce(broker = ANY (scope.brokers), true))
$$;
COMMENT ON FUNCTION outbox._serves(outbox.claim_scope, text, text) IS 'whether the consumer serves this destination';

CREATE FUNCTION outbox._takes_all(scope outbox.claim_scope) RETURNS boolean
    LANGUAGE sql IMMUTABLE
RETURN (scope).names IS NULL AND (scope).brokers IS NULL;
COMMENT ON FUNCTION outbox._takes_all(outbox.claim_scope) IS
    'whether a consumer gets events while there is no destination: one of the application''s own, which names none';

-- A destination that may want events of one kind, and what a claim may do for it.
CREATE TYPE outbox.eligible AS (
    name      text,
    filter    jsonpath,
    serve     boolean,  -- the claim may hand out any number of events
    elsewhere boolean,  -- it may hand out none, but another consumer may serve the destination now
    blocks    boolean   -- its dead letters hold up later events
);
COMMENT ON TYPE outbox.eligible IS 'a destination that may want events of one kind, and what a claim may do for it; internal';

-- No settings of its own, so that the planner can merge it into the query that uses it.
-- While there is no destination, '' stands for a consumer of the application's own.
CREATE FUNCTION outbox._eligible(scope outbox.claim_scope, event_type text, tenant_id text) RETURNS SETOF outbox.eligible
    LANGUAGE sql STABLE ROWS 2
AS $$
    SELECT d.name, d.filter, m.active AND m.mine AND d.circuit_failures = 0,
           m.active AND NOT m.mine AND coalesce(d.circuit_open_until, '-infinity') <= clock_timestamp(), d.blocks
      FROM outbox._wanting($2, $3) d,
           LATERAL (SELECT outbox._serves($1, d.name, d.broker), NOT d.paused AND d.disabled_reason IS NULL) AS m (mine, active)
    UNION ALL
    SELECT '', NULL, true, false, false
     WHERE outbox._takes_all($1) AND NOT EXISTS (SELECT FROM outbox.destination)
$$;
COMMENT ON FUNCTION outbox._eligible(outbox.claim_scope, text, text) IS
    'the destinations that may want events of this type and tenant, and what a claim may do for each';

-- No settings of its own, so that the planner can merge it into the query that uses it.
-- The destinations that have something due which this claim may hand out, those that have waited longest first. probe: one
-- delivery, because the circuit is half open.
CREATE FUNCTION outbox._with_due(scope outbox.claim_scope, moment timestamptz)
    RETURNS TABLE (name text, blocks boolean, probe boolean)
    LANGUAGE sql STABLE ROWS 10
AS $$
    (SELECT d.name, d.blocks, d.circuit_failures > 0
       FROM outbox.destination d
      WHERE d.ready_at <= $2 AND outbox._serves($1, d.name, d.broker)
        AND (d.circuit_failures = 0
             OR NOT EXISTS (SELECT FROM outbox.delivery x WHERE x.claim_token IS NOT NULL AND x.destination = d.name))
      ORDER BY d.ready_at)
    UNION ALL
    SELECT '', false, false
     WHERE outbox._takes_all($1) AND NOT EXISTS (SELECT FROM outbox.destination)
$$;
COMMENT ON FUNCTION outbox._with_due(outbox.claim_scope, timestamptz) IS
    'the destinations that have something due which a claim may hand out';

-- Whether a claim can hand out anything: some destination that the consumer serves takes any number of events (serve) or a
-- single one (probe).
CREATE FUNCTION outbox._may_serve(scope outbox.claim_scope, OUT serve boolean, OUT probe boolean)
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    IF scope.names IS NOT NULL THEN
        SELECT coalesce(bool_or(d.circuit_failures = 0), false),
               coalesce(bool_or(d.circuit_failures > 0 AND coalesce(d.circuit_open_until, '-infinity') <= clock_timestamp()), false)
          INTO serve, probe
          FROM jsonb_object_keys(scope.names) AS n (name)
         CROSS JOIN LATERAL (SELECT x.* FROM outbox.destination x WHERE x.name = n.name OFFSET 0) d
         WHERE NOT d.paused AND d.disabled_reason IS NULL AND outbox._serves(scope, d.name, d.broker);
        RETURN;
    END IF;
    serve := EXISTS (SELECT FROM outbox.destination d
                      WHERE d.circuit_failures = 0 AND NOT d.paused AND d.disabled_reason IS NULL
                        AND outbox._serves(scope, d.name, d.broker))
             OR (outbox._takes_all(scope) AND NOT EXISTS (SELECT FROM outbox.destination));
    probe := NOT serve
             AND EXISTS (SELECT FROM outbox.destination d
                          WHERE d.circuit_failures > 0 AND NOT d.paused AND d.disabled_reason IS NULL
                            AND coalesce(d.circuit_open_until, '-infinity') <= clock_timestamp()
                            AND outbox._serves(scope, d.name, d.broker));
END
$$;
COMMENT ON FUNCTION outbox._may_serve(outbox.claim_scope) IS 'whether a claim can hand out anything';

-- No settings of its own, so that the planner can merge it into the query that uses it.
-- In flight: claimed whole. Fresh events with their ordering keys wait; they stay fresh and are found again.
CREATE FUNCTION outbox._in_flight(low_water bigint, high_water bigint) RETURNS TABLE (id bigint, key bigint)
    LANGUAGE sql STABLE ROWS 100
AS $$
    SELECT e.id, outbox._ordering_key(e.aggregate_type, e.aggregate_id)
      FROM @extschema@.outbox_events e
     WHERE e.id BETWEEN low_water AND high_water AND e.status = 'processing' AND e.claim_token IS NOT NULL
       AND e.aggregate_id IS NOT NULL
$$;
COMMENT ON FUNCTION outbox._in_flight(bigint, bigint) IS 'events that are claimed whole and have an ordering key';

CREATE FUNCTION outbox._advance_low_water(low_water bigint) RETURNS bigint
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    RETURN coalesce(
        (SELECT e.id FROM @extschema@.outbox_events e
          WHERE e.id >= low_water AND ((e.status = 'pending' AND NOT e.listed AND e.available_at IS NULL)
                                  OR (e.status = 'processing' AND e.claim_token IS NOT NULL))
          ORDER BY e.id LIMIT 1),
        (SELECT least(e.id, 9223372036854775806) + 1 FROM @extschema@.outbox_events e WHERE e.id >= low_water ORDER BY e.id DESC LIMIT 1),
        low_water);
END
$$;
COMMENT ON FUNCTION outbox._advance_low_water(bigint) IS 'the lowest fresh or claimed event from the low-water mark on';

-- Tokens always rise, even when the sequence does not (a restore sets it back, a subscription never sets it). So an answer
-- to an old claim can't settle a new one, and each destination is older than the claims that serve it.
CREATE FUNCTION outbox._new_token() RETURNS bigint
    LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    v_token bigint := nextval('outbox.claim_token_seq');
    v_floor bigint := greatest(outbox._last_token(), (SELECT max(d.since_token) FROM outbox.destination d));
BEGIN
    IF v_token <= v_floor THEN
        v_token := setval('outbox.claim_token_seq', v_floor + 1);
    END IF;
    PERFORM outbox._note_token(v_token);
    RETURN v_token;
END
$$;
COMMENT ON FUNCTION outbox._new_token() IS 'a token higher than any before; for the holder of the claim lock';

CREATE FUNCTION outbox._is_due(scope outbox.claim_scope) RETURNS boolean
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v_now CONSTANT timestamptz := clock_timestamp();
BEGIN
    RETURN EXISTS (SELECT FROM outbox._with_due(scope, v_now) l
                    WHERE l.name <> '' OR EXISTS (SELECT FROM outbox.delivery d
                                                   WHERE d.destination = '' AND d.status = 'pending' AND d.next_attempt_at <= v_now));
END
$$;
COMMENT ON FUNCTION outbox._is_due(outbox.claim_scope) IS 'whether a delivery is due that a claim may hand out';

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

-- No settings of its own, so that the planner can merge it into the query that uses it.
-- The destinations that this claim may hand events out for. serve: any number; probe: one, because the circuit is half
-- open; elsewhere: none, but another consumer may serve it now. While there is no destination, '' stands for a consumer of
-- the application's own, which names none.
CREATE FUNCTION outbox._eligible(served text[])
    RETURNS TABLE (name text, like_patterns text[], serve boolean, probe boolean, elsewhere boolean, blocks boolean)
    LANGUAGE sql STABLE ROWS 10
AS $$
    SELECT d.name, d.like_patterns, m.active AND m.mine AND d.circuit_failures = 0,
           m.active AND m.mine AND d.circuit_failures > 0
             AND coalesce(d.circuit_open_until, '-infinity') <= clock_timestamp()
             -- Few deliveries are in flight; a destination may have millions.
             AND NOT EXISTS (SELECT FROM outbox.delivery x WHERE x.claim_token > 0 AND x.destination || '' = d.name),
           m.active AND NOT m.mine AND coalesce(d.circuit_open_until, '-infinity') <= clock_timestamp(),
           coalesce(d.settings ->> 'on_failure', 'skip') = 'block'
      FROM outbox.destination d,
           LATERAL (SELECT served IS NULL OR d.name = ANY (served), NOT d.paused AND d.disabled_reason IS NULL) AS m (mine, active)
    UNION ALL
    SELECT '', ARRAY['%'], true, false, false, false
     WHERE served IS NULL AND NOT EXISTS (SELECT FROM outbox.destination)
$$;
COMMENT ON FUNCTION outbox._eligible(text[]) IS 'the destinations and what a claim may hand out for each';

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

CREATE FUNCTION outbox._is_due(served text[]) RETURNS boolean
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v_now CONSTANT timestamptz := clock_timestamp();
BEGIN
    RETURN EXISTS (SELECT FROM outbox._eligible(served) l
                    CROSS JOIN LATERAL (SELECT FROM outbox.delivery d
                                         WHERE d.destination = l.name AND d.status = 'pending'
                                           AND d.next_attempt_at <= v_now LIMIT 1) d
                    WHERE l.serve OR l.probe);
END
$$;
COMMENT ON FUNCTION outbox._is_due(text[]) IS 'whether a delivery is due that a claim may hand out';

-- What the background worker calls when a moment has come or a session has ended, each in a transaction of its own. The
-- worker sets a short lock_timeout and tries again what fails; what it announces waits for none of this.

CREATE FUNCTION outbox._next_due() RETURNS timestamptz
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    RETURN least(
        (SELECT d.ready_at FROM outbox.destination d WHERE d.ready_at > now() ORDER BY d.ready_at LIMIT 1),
        -- Where something is due already, more may be due later.
        (SELECT min(x.next_attempt_at)
           FROM outbox.destination t
          CROSS JOIN LATERAL (SELECT d.next_attempt_at FROM outbox.delivery d
                               WHERE d.destination = t.name AND d.status = 'pending' AND d.next_attempt_at > now()
                               ORDER BY d.next_attempt_at LIMIT 1) x
          WHERE t.ready_at <= now()),
        (SELECT d.next_attempt_at FROM outbox.delivery d
          WHERE d.destination = '' AND d.status = 'pending' AND d.next_attempt_at > now() ORDER BY d.next_attempt_at LIMIT 1),
        (SELECT e.available_at FROM @extschema@.outbox_events e
          WHERE e.available_at > now() AND e.available_at IS NOT NULL AND NOT e.routed AND e.status = 'pending'
          ORDER BY e.available_at LIMIT 1),
        outbox._secrets_end());
END
$$;
COMMENT ON FUNCTION outbox._next_due() IS 'the next moment at which something is due; null: nothing is';

-- The timer fired. Takes no claim lock: a consumer that claims and stays in its transaction holds up no wake-up.
CREATE FUNCTION outbox._due() RETURNS timestamptz
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    IF EXISTS (SELECT FROM outbox.destination d WHERE d.ready_at <= v_now)
       OR EXISTS (SELECT FROM outbox.delivery d
                   WHERE d.destination = '' AND d.status = 'pending' AND d.next_attempt_at <= v_now)
       OR EXISTS (SELECT FROM @extschema@.outbox_events e
                   WHERE e.available_at <= v_now AND e.available_at IS NOT NULL AND NOT e.routed AND e.status = 'pending')
       -- A claim may have left events behind a row that the application had locked.
       OR outbox._is_waiting() THEN
        PERFORM outbox._wake('due');
    END IF;
    IF outbox._forget_secrets(v_now) THEN
        PERFORM pg_notify('outbox_destinations', '');
    END IF;
    RETURN least(outbox._next_due(), outbox._forget_seen(v_now));
END
$$;
COMMENT ON FUNCTION outbox._due() IS 'wakes consumers for what is due, forgets what is old, and returns when the next thing is due';

-- Does the work that was left for later and releases claims whose lease is over. Takes the claim lock only if there are any.
-- Returns SQLSTATE and message of an obstacle.
CREATE FUNCTION outbox._end_leases() RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_error text;
BEGIN
    IF EXISTS (SELECT FROM outbox.claims c WHERE c.lease_until <= v_now)
       OR EXISTS (SELECT FROM outbox.touched) OR EXISTS (SELECT FROM outbox.postponed) THEN
        PERFORM outbox._lock();
        PERFORM outbox._catch_up();
        v_error := outbox._release_apart(ARRAY(SELECT c.token FROM outbox.claims c WHERE c.lease_until <= v_now));
    END IF;
    PERFORM outbox._open_claims(0, (SELECT min(c.lease_until) FROM outbox.claims c WHERE c.lease_until > v_now));
    RETURN v_error;
END
$$;
COMMENT ON FUNCTION outbox._end_leases() IS 'does the work that was left for later and releases claims whose lease is over';

-- released: the attachments that hold nothing any more. error: SQLSTATE and message of an obstacle to the others.
CREATE FUNCTION outbox._release_attachments(v_attachments bigint[], OUT released bigint[], OUT error text)
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_tokens bigint[] := ARRAY(SELECT c.token FROM outbox.claims c WHERE c.attachment = ANY (v_attachments));
BEGIN
    -- An attachment that has ended claims nothing more: its claims are visible without the lock.
    IF cardinality(v_tokens) > 0 THEN
        PERFORM outbox._lock();
        error := outbox._release_apart(v_tokens);
    END IF;
    released := ARRAY(SELECT a.id FROM unnest(v_attachments) AS a (id)
                       WHERE NOT EXISTS (SELECT FROM outbox.claims c WHERE c.attachment = a.id));
END
$$;
COMMENT ON FUNCTION outbox._release_attachments(bigint[]) IS 'releases the claims of sessions that ended';

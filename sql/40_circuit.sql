-- The circuit breaker of each destination. Closed: deliveries flow. Open until a moment: nothing is handed out, nothing
-- uses an attempt. Half open after that moment: one event probes; success closes the circuit, failure opens it for longer.
--
-- The circuit belongs to the destination. A relay that can't serve it has a problem of its own: the operator sees it as long
-- as nobody delivers there, and nobody else waits for it.

-- Relays read the destinations again, and claim what may have become deliverable. The worker looks anew at what is due when.
CREATE FUNCTION outbox._destinations_changed(name text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._promote_all(name);
    PERFORM pg_notify('outbox_destinations', name);
    PERFORM outbox._wake('due');
    PERFORM outbox._wake_at(clock_timestamp());
END
$$;
COMMENT ON FUNCTION outbox._destinations_changed(text) IS 'tells the relays that a destination changed';

-- Whether somebody other than this session has just delivered there: then what failed here is not the destination's fault.
CREATE FUNCTION outbox._answers_others(v_destination text) RETURNS boolean
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    RETURN EXISTS (SELECT FROM outbox.destination t
                    WHERE t.name = v_destination AND t.last_success_by <> pg_backend_pid()
                      AND t.last_success_at > clock_timestamp() - interval '5 seconds');
END
$$;
COMMENT ON FUNCTION outbox._answers_others(text) IS 'another session has delivered to the destination within seconds';

CREATE FUNCTION outbox._open_circuit(v_destination text, v_error text, v_retry_in interval, v_cause bigint) RETURNS void
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_open record;
BEGIN
    UPDATE outbox.destination t
       SET circuit_failures = t.circuit_failures + 1, last_error = v_error,
           circuit_open_until = clock_timestamp()
               + coalesce(v_retry_in, (0.5 + random() / 2) * least(interval '30 seconds',
                                           interval '250 milliseconds' * power(2, least(t.circuit_failures, 20))))
     WHERE t.name = v_destination AND coalesce(t.circuit_open_until, '-infinity') <= clock_timestamp()
    RETURNING t.circuit_open_until, t.circuit_failures, t.kind, t.tenant_id INTO v_open;
    PERFORM outbox._wake_at(v_open.circuit_open_until);
    IF v_open.circuit_failures = 1
       AND outbox._tell('outbox.destination.opened', v_destination, v_open.tenant_id, v_cause,
                        jsonb_build_object('kind', v_open.kind, 'reason', v_error)) THEN
        UPDATE outbox.destination t SET opening_told = true WHERE t.name = v_destination;
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._open_circuit(text, text, interval, bigint) IS
    'a destination is down as a whole: it is left alone for a while, longer each time (up to 30 s)';

-- A success while the circuit is open was under way before: it does not end the pause that a receiver asked for.
CREATE FUNCTION outbox._close_circuits(v_destinations text[]) RETURNS void
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_closed text[];
BEGIN
    WITH closed AS (
        UPDATE outbox.destination t SET circuit_failures = 0, circuit_open_until = NULL
         WHERE t.name = ANY (v_destinations) AND t.circuit_failures > 0
           AND coalesce(t.circuit_open_until, '-infinity') <= clock_timestamp()
        RETURNING t.name
    )
    SELECT array_agg(c.name) INTO v_closed FROM closed c;
    IF v_closed IS NOT NULL THEN
        PERFORM outbox._wake('due');
        PERFORM outbox._tell_closed(c) FROM unnest(v_closed) AS c;
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._close_circuits(text[]) IS 'a destination answered: its deliveries flow again';

-- Relays report successes now and then, not each one.
CREATE FUNCTION outbox._answered(v_destinations text[]) RETURNS void
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
BEGIN
    UPDATE outbox.destination t
       SET last_success_at = clock_timestamp(), last_success_by = pg_backend_pid(), failing_since = NULL, unable_at = NULL
     WHERE t.name = ANY (v_destinations);
    PERFORM outbox._close_circuits(v_destinations);
END
$$;
COMMENT ON FUNCTION outbox._answered(text[]) IS 'notes that destinations take deliveries';

CREATE FUNCTION outbox._note_unable(v_destinations text[], v_error text) RETURNS void
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
BEGIN
    UPDATE outbox.destination t SET unable_at = clock_timestamp(), last_error = v_error
     WHERE t.name = ANY (v_destinations) AND NOT outbox._answers_others(t.name)
       AND (t.unable_at IS NULL OR t.last_error IS DISTINCT FROM v_error);
END
$$;
COMMENT ON FUNCTION outbox._note_unable(text[], text) IS
    'a relay can''t serve the destinations: shown unless another one has just delivered there';

-- Relays report successes; other consumers may just settle events. So this looks at a bounded number of the latest events
-- before a destination is disabled.
CREATE FUNCTION outbox._has_delivered_since(v_destination text, v_since timestamptz) RETURNS boolean
    LANGUAGE plpgsql STABLE SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM (SELECT e.id, e.event_type, e.tenant_id, e.status, e.processed_at FROM @extschema@.outbox_events e
                      ORDER BY e.id DESC LIMIT 1000) e
         WHERE e.status = 'processed' AND e.processed_at > v_since
           AND outbox._wants(v_destination, e.id, e.event_type, e.tenant_id));
END
$$;
COMMENT ON FUNCTION outbox._has_delivered_since(text, timestamptz) IS 'an event that the destination wants was processed lately';

CREATE FUNCTION outbox._disable(v_destination text, v_reason text, v_cause bigint) RETURNS void
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_disabled record;
BEGIN
    UPDATE outbox.destination t SET disabled_reason = coalesce(v_reason, 'gone'), last_error = v_reason
     WHERE t.name = v_destination AND t.disabled_reason IS NULL
    RETURNING t.kind, t.tenant_id, t.disabled_reason INTO v_disabled;
    IF FOUND THEN
        PERFORM outbox._tell('outbox.destination.disabled', v_destination, v_disabled.tenant_id, v_cause,
                             jsonb_build_object('kind', v_disabled.kind, 'reason', v_disabled.disabled_reason));
    END IF;
    PERFORM outbox._destinations_changed(v_destination);
END
$$;
COMMENT ON FUNCTION outbox._disable(text, text, bigint) IS
    'a destination asked not to be called again, or has not answered for too long; outbox.resume() ends that';

-- The time counts from the first failure since the last success: a destination that never answers is disabled in the end.
CREATE FUNCTION outbox._note_failure(v_destination text, v_kind text, v_settings jsonb, v_error text, v_cause bigint)
    RETURNS void
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_limit interval := outbox._span(v_settings, 'disable_after', CASE v_kind WHEN 'webhook' THEN interval '5 days' END);
    v_since timestamptz;
BEGIN
    UPDATE outbox.destination t SET failing_since = clock_timestamp()
     WHERE t.name = v_destination AND t.failing_since IS NULL;
    SELECT t.failing_since INTO v_since FROM outbox.destination t WHERE t.name = v_destination;
    IF v_limit IS NULL OR clock_timestamp() - v_since < v_limit THEN
        RETURN;
    ELSIF outbox._has_delivered_since(v_destination, v_since) THEN
        UPDATE outbox.destination t SET failing_since = clock_timestamp() WHERE t.name = v_destination;
    ELSE
        PERFORM outbox._disable(v_destination, format('no success since %s: %s',
                                                      to_char(v_since AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'), v_error),
                                v_cause);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._note_failure(text, text, jsonb, text, bigint) IS
    'an attempt failed: after settings.disable_after without a success the destination is disabled';

-- Decides what a failed delivery of the event v_cause means for its destination.
CREATE FUNCTION outbox._blame(
    v_destination text, v_kind text, v_settings jsonb, v_what text, v_error text, v_retry_in interval, v_cause bigint)
    RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    IF v_what = 'unable' THEN
        PERFORM outbox._note_unable(ARRAY[v_destination], v_error);
        PERFORM outbox._wake('released');
        RETURN;
    ELSIF v_what IN ('unavailable', 'throttled') THEN
        PERFORM outbox._open_circuit(v_destination, v_error, v_retry_in, v_cause);
    ELSE
        PERFORM outbox._close_circuits(ARRAY[v_destination]);
    END IF;
    IF v_what <> 'rejected' AND v_kind IS NOT NULL THEN
        PERFORM outbox._note_failure(v_destination, v_kind, v_settings, v_error, v_cause);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._blame(text, text, jsonb, text, text, interval, bigint) IS 'what a failed delivery means for its destination';

CREATE FUNCTION outbox.destination_unable(names text[], error text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
BEGIN
    PERFORM outbox._lock();
    PERFORM outbox._note_unable(names, error);
END
$$;
COMMENT ON FUNCTION outbox.destination_unable(text[], text) IS
    'reports that this consumer can''t serve these destinations; their events stay for others';

-- Half open, not closed: the destination's next answer decides.
CREATE FUNCTION outbox.destination_back(names text[]) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
#variable_conflict use_column
BEGIN
    PERFORM outbox._lock();
    UPDATE outbox.destination t SET circuit_open_until = least(t.circuit_open_until, clock_timestamp()), unable_at = NULL
     WHERE t.name = ANY (names) AND (t.circuit_open_until > clock_timestamp() OR t.unable_at IS NOT NULL);
    IF FOUND THEN
        PERFORM outbox._wake('due');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox.destination_back(text[]) IS
    'reports that this consumer reaches these destinations again: an open circuit becomes half open';

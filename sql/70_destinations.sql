-- Destinations: their properties, who may see these, and how an operator changes them. Each change is announced on the
-- channel outbox_destinations, so that running relays take it up at once.

CREATE FUNCTION outbox._require_destination(name text) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM outbox.destination d WHERE d.name = _require_destination.name) THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_object',
            MESSAGE = format('destination %s does not exist', coalesce(quote_ident(name), 'null')),
            HINT = 'See the view outbox.destinations.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._require_destination(text) IS 'an error unless there is such a destination';

CREATE FUNCTION outbox.relay_destinations(names text[] DEFAULT NULL)
    RETURNS TABLE (name text, kind text, exchange text, routing_key text, url text, settings jsonb, secrets text[],
                   max_attempts int)
    LANGUAGE sql STABLE SECURITY DEFINER ROWS 10 SET search_path = pg_catalog, pg_temp
AS $$
    SELECT d.name, d.kind, d.exchange, d.routing_key, h.url,
           r.settings || (SELECT coalesce(jsonb_object_agg(k, extract(epoch FROM outbox._span(r.settings, k, NULL))), '{}')
                            FROM unnest(ARRAY['timeout', 'connect_timeout']) AS k WHERE r.settings ? k),
           ARRAY(SELECT s.secret FROM outbox.secret s
                  WHERE s.destination = d.name AND coalesce(s.expires_at, 'infinity') > clock_timestamp()
                  ORDER BY s.expires_at DESC NULLS FIRST),
           outbox._max_attempts(r.settings)
      FROM outbox.destination d LEFT JOIN outbox.hidden h ON h.destination = d.name
     CROSS JOIN LATERAL (SELECT coalesce(h.settings, d.settings)) AS r (settings)
     WHERE d.disabled_reason IS NULL AND (relay_destinations.names IS NULL OR d.name = ANY (relay_destinations.names))
     ORDER BY d.name
$$;
COMMENT ON FUNCTION outbox.relay_destinations(text[]) IS
    'destinations (null: all) with their secrets, the current one first, and their timeouts in seconds; for the relay''s role alone';

-- Not current_user, which is the owner of the function that asks.
CREATE FUNCTION outbox._caller_reads_secrets() RETURNS boolean
    LANGUAGE sql STABLE
RETURN has_function_privilege(coalesce(nullif(current_setting('role'), 'none'), session_user)::name,
                              'outbox.relay_destinations(text[])', 'EXECUTE');
COMMENT ON FUNCTION outbox._caller_reads_secrets() IS 'whether the session''s role may see secrets that others made';

-- outbox_keeper has no right to the table of events, which outbox._lock() locks too.
CREATE FUNCTION outbox._lock_for_secrets() RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._lock();
END
$$;
COMMENT ON FUNCTION outbox._lock_for_secrets() IS 'changes of secrets run one at a time, until commit';

CREATE FUNCTION outbox._forget_secrets(before timestamptz) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- A session that has a secret locked changes it and sets the timer itself.
    DELETE FROM outbox.secret s
     WHERE s.ctid = ANY (ARRAY(SELECT x.ctid FROM outbox.secret x
                                WHERE x.expires_at <= least(before, clock_timestamp()) FOR UPDATE SKIP LOCKED));
    RETURN FOUND;
END
$$;
COMMENT ON FUNCTION outbox._forget_secrets(timestamptz) IS 'removes secrets whose grace has ended; whether there were any';

CREATE FUNCTION outbox._secrets_end() RETURNS timestamptz
    LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT min(s.expires_at) FROM outbox.secret s WHERE s.expires_at > now());
END
$$;
COMMENT ON FUNCTION outbox._secrets_end() IS 'when the first grace ends; null: no secret is being replaced';

-- Adds the destination, or changes the one of that name: its deliveries, its secret and its place stay.
CREATE FUNCTION outbox._put_destination(
    name text, kind text, event_types text[], settings jsonb, exchange text, routing_key text, url text, tenant_id text,
    filter jsonpath) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_old outbox.destination;
BEGIN
    IF coalesce(_put_destination.name, '') !~ '^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('invalid destination name %s', coalesce(quote_literal(_put_destination.name), 'null')),
            HINT = 'Use 1 to 63 letters, digits, dots, dashes and underscores.';
    END IF;
    PERFORM outbox._check_patterns(_put_destination.event_types);
    PERFORM outbox._check_settings(_put_destination.kind, _put_destination.settings);
    PERFORM outbox._check_tenant(_put_destination.tenant_id);
    PERFORM outbox._check_filter(_put_destination.filter);
    PERFORM outbox._lock();
    SELECT * INTO v_old FROM outbox.destination d WHERE d.name = _put_destination.name;
    IF v_old.kind <> _put_destination.kind THEN
        RAISE EXCEPTION USING ERRCODE = 'duplicate_object',
            MESSAGE = format('destination %I exists already, of kind %s', v_old.name, v_old.kind),
            HINT = 'Remove it first with outbox.remove_destination(), or choose another name.';
    END IF;
    -- Claims in flight were made by what it wanted before.
    IF v_old.name IS NOT NULL
       AND (v_old.event_types, v_old.tenant_id, v_old.filter::text)
           IS DISTINCT FROM (_put_destination.event_types, _put_destination.tenant_id, _put_destination.filter::text) THEN
        PERFORM outbox._list_in_flight();
    END IF;
    INSERT INTO outbox.destination AS d
           (name, kind, event_types, tenant_id, filter, exchange, routing_key, url, broker, settings, since_token)
    VALUES (_put_destination.name, _put_destination.kind, _put_destination.event_types, _put_destination.tenant_id,
            _put_destination.filter, _put_destination.exchange, _put_destination.routing_key,
            outbox._shown_url(_put_destination.url),
            CASE _put_destination.kind WHEN 'rabbitmq' THEN coalesce(_put_destination.settings ->> 'broker', 'default') END,
            outbox._shown_settings(_put_destination.settings), outbox._new_token())
    ON CONFLICT ON CONSTRAINT destination_pkey DO UPDATE
       SET event_types = excluded.event_types, tenant_id = excluded.tenant_id, filter = excluded.filter,
           exchange = excluded.exchange, routing_key = excluded.routing_key, url = excluded.url, broker = excluded.broker,
           settings = excluded.settings, disabled_reason = NULL, circuit_failures = 0, circuit_open_until = NULL, failing_since = NULL, unable_at = NULL;
    PERFORM outbox._put_interest(_put_destination.name);
    PERFORM outbox._give_to_destinations();
    PERFORM outbox._destinations_changed(_put_destination.name);
END
$$;
COMMENT ON FUNCTION outbox._put_destination(text, text, text[], jsonb, text, text, text, text, jsonpath) IS 'adds or changes a destination';

CREATE FUNCTION outbox.add_rabbitmq(
    name text, exchange text DEFAULT 'outbox_events', routing_key text DEFAULT '{event_type}',
    event_types text[] DEFAULT '{*}', settings jsonb DEFAULT '{}', tenant_id text DEFAULT NULL,
    filter jsonpath DEFAULT NULL) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF exchange IS NULL OR coalesce(routing_key, '') = ''
       OR greatest(octet_length(outbox._fixed_text(exchange)), octet_length(outbox._fixed_text(routing_key))) > 255 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'exchange and routing_key must have at most 255 bytes and routing_key must not be empty',
            HINT = 'The exchange '''' is RabbitMQ''s default exchange: its routing key is the name of a queue.';
    END IF;
    PERFORM outbox._check_template(routing_key);
    PERFORM outbox._check_template(exchange);
    IF settings ->> 'declare' = 'queue' AND coalesce(settings ->> 'queue', name) LIKE 'amq.%' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'RabbitMQ keeps names of queues that begin with amq. to itself',
            HINT = 'Name the queue with settings.queue.';
    END IF;
    PERFORM outbox._put_destination(name, 'rabbitmq', event_types, settings, exchange, routing_key, NULL, tenant_id, filter);
END
$$;
COMMENT ON FUNCTION outbox.add_rabbitmq(text, text, text, text[], jsonb, text, jsonpath) IS
    'adds or changes a RabbitMQ destination; exchange and routing_key are templates';

CREATE FUNCTION outbox.add_webhook(
    name text, url text, event_types text[] DEFAULT '{*}', secret text DEFAULT NULL, settings jsonb DEFAULT '{}',
    tenant_id text DEFAULT NULL, filter jsonpath DEFAULT NULL) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_secret text;
BEGIN
    PERFORM outbox._check_url(url);
    PERFORM outbox._check_secret(secret);
    PERFORM outbox._put_destination(name, 'webhook', event_types, settings, NULL, NULL, url, tenant_id, filter);
    INSERT INTO outbox.hidden (destination, url, settings)
    VALUES (add_webhook.name, add_webhook.url, add_webhook.settings)
    ON CONFLICT ON CONSTRAINT hidden_pkey DO UPDATE SET url = excluded.url, settings = excluded.settings;
    SELECT s.secret INTO v_secret FROM outbox.secret s WHERE s.destination = add_webhook.name AND s.expires_at IS NULL;
    IF v_secret IS NULL OR v_secret <> add_webhook.secret THEN
        DELETE FROM outbox.secret s WHERE s.destination = add_webhook.name;
        v_secret := coalesce(add_webhook.secret, outbox._new_secret());
        INSERT INTO outbox.secret (destination, secret) VALUES (add_webhook.name, v_secret);
        RETURN v_secret;
    END IF;
    RETURN CASE WHEN add_webhook.secret IS NOT NULL OR outbox._caller_reads_secrets() THEN v_secret END;
END
$$;
COMMENT ON FUNCTION outbox.add_webhook(text, text, text[], text, jsonb, text, jsonpath) IS
    'adds or changes a webhook and returns its signing secret; null: the present one stays, and is not the caller''s to see';

CREATE FUNCTION outbox.rotate_secret(name text, grace interval DEFAULT '24 hours') RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_secret text := outbox._new_secret();
BEGIN
    PERFORM outbox._require_destination(name);
    PERFORM outbox._lock_for_secrets();
    IF NOT EXISTS (SELECT FROM outbox.secret s WHERE s.destination = name) THEN
        RAISE EXCEPTION USING ERRCODE = 'wrong_object_type', MESSAGE = format('destination %I has no signing secret', name),
            HINT = 'Only webhooks are signed.';
    ELSIF grace IS NULL OR grace NOT BETWEEN interval '0' AND interval '3660 days' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'grace must not be negative or null, nor longer than 3660 days',
            HINT = 'It is how long the secret before signs too; 0 drops it at once.';
    END IF;
    DELETE FROM outbox.secret s WHERE s.destination = name AND s.expires_at IS NOT NULL;
    UPDATE outbox.secret s SET expires_at = clock_timestamp() + grace WHERE s.destination = name;
    INSERT INTO outbox.secret (destination, secret) VALUES (name, v_secret);
    PERFORM outbox._wake_at(clock_timestamp() + grace);
    PERFORM outbox._destinations_changed(name);
    RETURN v_secret;
END
$$;
COMMENT ON FUNCTION outbox.rotate_secret(text, interval) IS
    'a new signing secret for a webhook; the one before signs too until the grace ends';

CREATE FUNCTION outbox.pause(name text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._require_destination(name);
    PERFORM outbox._lock();
    UPDATE outbox.destination d SET paused = true WHERE d.name = pause.name;
    PERFORM outbox._destinations_changed(name);
END
$$;
COMMENT ON FUNCTION outbox.pause(text) IS 'holds back a destination''s deliveries; what is claimed already is still delivered';

CREATE FUNCTION outbox.resume(name text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._require_destination(name);
    PERFORM outbox._lock();
    UPDATE outbox.destination d
       SET paused = false, disabled_reason = NULL, circuit_failures = 0, circuit_open_until = NULL, failing_since = NULL,
           unable_at = NULL
     WHERE d.name = resume.name;
    PERFORM outbox._destinations_changed(name);
END
$$;
COMMENT ON FUNCTION outbox.resume(text) IS 'ends a pause, a disablement or an open circuit: deliveries go on at once';

CREATE FUNCTION outbox.remove_destination(name text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_gone record;
BEGIN
    PERFORM outbox._require_destination(name);
    PERFORM outbox._lock();
    DELETE FROM outbox.destination d WHERE d.name = remove_destination.name;
    WITH gone AS (
        DELETE FROM outbox.delivery d WHERE d.destination = remove_destination.name RETURNING d.id, d.claim_token
    )
    SELECT array_agg(g.id) AS ids, array_agg(g.claim_token) FILTER (WHERE g.claim_token IS NOT NULL) AS tokens
      INTO v_gone FROM gone g;
    PERFORM outbox._let_go(v_gone.tokens);
    PERFORM outbox._refresh(v_gone.ids);
    PERFORM pg_notify('outbox_destinations', name);
    PERFORM outbox._wake('due');
END
$$;
COMMENT ON FUNCTION outbox.remove_destination(text) IS 'removes a destination with its outstanding and dead deliveries';

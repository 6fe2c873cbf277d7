-- Destinations: what is known of each, who may see it, and how an operator changes it. Each change is announced on the
-- channel outbox_destinations, so that running relays take it up at once.

CREATE FUNCTION outbox._like_patterns(patterns text[]) RETURNS text[]
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN (SELECT array_agg(replace(replace(replace(replace(p, '\', '\\'), '%', '\%'), '_', '\_'), '*', '%'))
          FROM unnest(patterns) AS p);
COMMENT ON FUNCTION outbox._like_patterns(text[]) IS 'patterns whose * stands for any run of characters, as LIKE patterns';

-- A duration in settings: seconds as a number, or an interval as text.
CREATE FUNCTION outbox._duration(settings jsonb, key text, fallback interval) RETURNS interval
    LANGUAGE sql STABLE PARALLEL SAFE
RETURN CASE jsonb_typeof(settings -> key)
           WHEN 'number' THEN make_interval(secs => (settings ->> key)::float8)
           WHEN 'string' THEN (settings ->> key)::interval
           ELSE fallback END;
COMMENT ON FUNCTION outbox._duration(jsonb, text, interval) IS 'a duration of the settings, or the fallback';

CREATE FUNCTION outbox._max_attempts(settings jsonb) RETURNS int
    LANGUAGE sql STABLE PARALLEL SAFE
RETURN coalesce((settings ->> 'max_attempts')::int, 15);
COMMENT ON FUNCTION outbox._max_attempts(jsonb) IS 'attempts before a delivery is a dead letter (default 15)';

-- Exponential backoff with full jitter: a uniform draw from 0 to min(cap, base * 2^(attempts - 1)).
-- Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
CREATE FUNCTION outbox._backoff(attempts int, base interval, cap interval) RETURNS interval
    LANGUAGE sql VOLATILE PARALLEL SAFE
RETURN make_interval(secs => random() * least(extract(epoch FROM cap)::float8,
                                              extract(epoch FROM base)::float8 * power(2::float8, least(attempts - 1, 30)::float8)));
COMMENT ON FUNCTION outbox._backoff(int, interval, interval) IS 'how long to wait after so many failed attempts';

CREATE FUNCTION outbox._new_secret() RETURNS text
    LANGUAGE sql VOLATILE
RETURN 'whsec_' || encode(substr(uuid_send(gen_random_uuid()), 1, 6) || substr(uuid_send(gen_random_uuid()), 10, 7)
                || substr(uuid_send(gen_random_uuid()), 1, 6) || substr(uuid_send(gen_random_uuid()), 10, 7)
                || substr(uuid_send(gen_random_uuid()), 1, 6), 'base64');
COMMENT ON FUNCTION outbox._new_secret() IS 'a signing secret of 32 bytes from PostgreSQL''s strong random source';

CREATE FUNCTION outbox._check_patterns(event_types text[]) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF coalesce(cardinality(event_types), 0) = 0 OR array_position(event_types, NULL) IS NOT NULL
       OR array_position(event_types, '') IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'event_types must hold at least one pattern, none of them null or empty',
            HINT = 'Use ''{*}'' for all events, or patterns such as ''{contact.*,order.created}''.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_patterns(text[]) IS 'an error unless the patterns make sense';

-- A name is a token of RFC 9110; a value is visible ASCII with spaces and tabs. Errors show no value.
CREATE FUNCTION outbox._check_headers(headers jsonb) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_reserved CONSTANT text := '^(host|content-length|content-type|transfer-encoding|connection|webhook-.*)$';
    v_name text;
    v_value jsonb;
BEGIN
    IF jsonb_typeof(headers) <> 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.headers must be a JSON object of header names and values',
            HINT = 'For example {"headers": {"Authorization": "Bearer …"}}.';
    END IF;
    FOR v_name, v_value IN SELECT h.key, h.value FROM jsonb_each(headers) h LOOP
        IF v_name !~ '^[A-Za-z0-9!#$%&''*+.^_`|~-]+$' OR v_name ~* v_reserved THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('settings.headers can''t set %L', v_name),
                HINT = 'Content-type, length, host, connection and webhook-* are set by the relay.';
        ELSIF jsonb_typeof(v_value) NOT IN ('string', 'number', 'boolean') OR (v_value #>> '{}') !~ '^[\t -~]*$' THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('settings.headers: the value of %s must be text of visible ASCII characters', v_name),
                HINT = 'Encode anything else, for example as base64.';
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._check_headers(jsonb) IS 'an error for a header that a webhook request can''t carry';

CREATE FUNCTION outbox._check_settings(kind text, settings jsonb) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_known CONSTANT text[] := ARRAY['max_attempts', 'base', 'cap', 'on_failure', 'concurrency', 'timeout']
        || CASE kind WHEN 'webhook' THEN ARRAY['connect_timeout', 'headers', 'format']
                     ELSE ARRAY['declare', 'queue', 'queue_type', 'exchange_type'] END;
    v_key text;
BEGIN
    IF settings IS NULL OR jsonb_typeof(settings) <> 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'settings must be a JSON object',
            HINT = 'Use ''{}'' for the defaults.';
    END IF;
    IF coalesce(settings ->> 'on_failure', 'skip') NOT IN ('skip', 'block') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('settings.on_failure must be skip or block, not %L', settings ->> 'on_failure'),
            HINT = 'skip: after a dead letter its aggregate goes on; block: it waits for an operator.';
    END IF;
    IF settings ? 'max_attempts' AND coalesce(settings ->> 'max_attempts', '') !~ '^[1-9][0-9]{0,5}$' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.max_attempts must be a whole number from 1 to 999999',
            HINT = 'Leave it out for the default of 15.';
    END IF;
    FOREACH v_key IN ARRAY ARRAY['base', 'cap', 'timeout', 'connect_timeout'] LOOP
        IF outbox._duration(settings, v_key, '1 second') <= interval '0' OR jsonb_typeof(settings -> v_key) NOT IN ('number', 'string') THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('settings.%s must be a duration above zero', v_key),
                HINT = 'Give seconds as a number, or an interval such as "5 minutes".';
        END IF;
    END LOOP;
    IF settings ? 'concurrency' AND (jsonb_typeof(settings -> 'concurrency') <> 'number'
                                     OR settings ->> 'concurrency' !~ '^[1-9][0-9]{0,4}$') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.concurrency must be a whole number from 1 to 99999',
            HINT = 'It is how many attempts of one relay may be under way at once.';
    ELSIF coalesce(settings ->> 'declare', 'exchange') NOT IN ('none', 'exchange', 'queue') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('settings.declare must be none, exchange or queue, not %L', settings ->> 'declare'),
            HINT = 'It is what the relay makes if it is missing; queue: the exchange too.';
    ELSIF coalesce(settings ->> 'exchange_type', 'topic') !~ '^(topic|direct|fanout|headers|x-[a-z0-9-]{1,60})$' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('unknown settings.exchange_type %L', settings ->> 'exchange_type'),
            HINT = 'Use topic, direct, fanout, headers, or the x-… type of a plugin that RabbitMQ has.';
    ELSIF coalesce(settings ->> 'queue_type', 'quorum') NOT IN ('quorum', 'classic') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('settings.queue_type must be quorum or classic, not %L', settings ->> 'queue_type'),
            HINT = 'For a queue of another kind declare it yourself, with "declare": "exchange" or "none".';
    ELSIF settings ? 'queue' AND (jsonb_typeof(settings -> 'queue') <> 'string'
                                  OR octet_length(settings ->> 'queue') NOT BETWEEN 1 AND 255) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.queue must be text of 1 to 255 bytes',
            HINT = 'Leave it out to name the queue like the destination.';
    ELSIF coalesce(settings ->> 'format', 'standard') NOT IN ('standard', 'cloudevents') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('settings.format must be standard or cloudevents, not %L', settings ->> 'format'),
            HINT = 'cloudevents: CloudEvents 1.0 in structured mode.';
    END IF;
    PERFORM outbox._check_headers(settings -> 'headers') WHERE settings ? 'headers';
    FOR v_key IN SELECT k FROM jsonb_object_keys(settings) AS k WHERE k <> ALL (v_known) LOOP
        RAISE WARNING USING MESSAGE = format('settings.%s is not a setting of a %s destination and has no effect', v_key, kind);
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._check_settings(text, jsonb) IS 'an error for a setting of the wrong shape, a warning for an unknown one';

-- Adds the destination, or changes the one of that name: its deliveries, its secret and its place stay.
CREATE FUNCTION outbox._put_destination(
    name text, kind text, event_types text[], settings jsonb, exchange text, routing_key text, url text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
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
    PERFORM outbox._lock();
    SELECT * INTO v_old FROM outbox.destination d WHERE d.name = _put_destination.name;
    IF v_old.kind <> _put_destination.kind THEN
        RAISE EXCEPTION USING ERRCODE = 'duplicate_object',
            MESSAGE = format('destination %I exists already, of kind %s', v_old.name, v_old.kind),
            HINT = 'Remove it first with outbox.remove_destination(), or choose another name.';
    END IF;
    -- What is in flight was handed out by the old patterns.
    IF v_old.event_types <> _put_destination.event_types THEN
        PERFORM outbox._list_in_flight();
    END IF;
    INSERT INTO outbox.destination AS d
           (name, kind, event_types, like_patterns, exchange, routing_key, url, settings, since_token)
    VALUES (_put_destination.name, _put_destination.kind, _put_destination.event_types,
            outbox._like_patterns(_put_destination.event_types), _put_destination.exchange,
            _put_destination.routing_key, _put_destination.url, _put_destination.settings,
            outbox._new_token())
    ON CONFLICT ON CONSTRAINT destination_pkey DO UPDATE
       SET event_types = excluded.event_types, like_patterns = excluded.like_patterns, exchange = excluded.exchange,
           routing_key = excluded.routing_key, url = excluded.url, settings = excluded.settings,
           disabled_reason = NULL, circuit_failures = 0, circuit_open_until = NULL;
    PERFORM outbox._give_to_destinations();
    PERFORM outbox._destinations_changed(_put_destination.name);
END
$$;
COMMENT ON FUNCTION outbox._put_destination(text, text, text[], jsonb, text, text, text) IS 'adds or changes a destination';

-- Relays read the destinations again, and claim what may have become deliverable. The worker looks anew at what is due when.
CREATE FUNCTION outbox._destinations_changed(name text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._promote_all(name);
    PERFORM pg_notify('outbox_destinations', name);
    PERFORM outbox._wake('due');
    PERFORM outbox._timer(clock_timestamp());
END
$$;
COMMENT ON FUNCTION outbox._destinations_changed(text) IS 'tells the relays that a destination changed';

CREATE FUNCTION outbox.add_rabbitmq(
    name text, exchange text DEFAULT 'outbox_events', routing_key text DEFAULT '{event_type}',
    event_types text[] DEFAULT '{*}', settings jsonb DEFAULT '{}') RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF exchange IS NULL OR octet_length(exchange) > 255 OR coalesce(routing_key, '') = '' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'exchange must have at most 255 bytes and routing_key must not be empty',
            HINT = 'The exchange '''' is RabbitMQ''s default exchange: its routing key is the name of a queue.';
    END IF;
    PERFORM outbox._check_template(routing_key);
    PERFORM outbox._check_template(exchange);
    PERFORM outbox._put_destination(name, 'rabbitmq', event_types, settings, exchange, routing_key, NULL);
END
$$;
COMMENT ON FUNCTION outbox.add_rabbitmq(text, text, text, text[], jsonb) IS
    'adds or changes a RabbitMQ destination; exchange and routing_key are templates';

CREATE FUNCTION outbox._check_template(template text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF regexp_replace(template, '\{(event_type|aggregate_type|aggregate_id|tenant_id|metadata\.[^{}]+)\}', '', 'g') ~ '[{}]' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('invalid template %L', template),
            HINT = 'Placeholders are {event_type}, {aggregate_type}, {aggregate_id}, {tenant_id} and {metadata.key}.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_template(text) IS 'an error for an unknown placeholder';

CREATE FUNCTION outbox.add_webhook(
    name text, url text, event_types text[] DEFAULT '{*}', secret text DEFAULT NULL, settings jsonb DEFAULT '{}')
    RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_secret text;
BEGIN
    PERFORM outbox._check_url(url);
    PERFORM outbox._check_secret(secret);
    PERFORM outbox._put_destination(name, 'webhook', event_types, settings, NULL, NULL, url);
    SELECT s.secret INTO v_secret FROM outbox.secret s WHERE s.destination = add_webhook.name AND s.expires_at IS NULL;
    IF v_secret IS NULL OR v_secret <> add_webhook.secret THEN
        DELETE FROM outbox.secret s WHERE s.destination = add_webhook.name;
        v_secret := coalesce(add_webhook.secret, outbox._new_secret());
        INSERT INTO outbox.secret (destination, secret) VALUES (add_webhook.name, v_secret);
    END IF;
    RETURN v_secret;
END
$$;
COMMENT ON FUNCTION outbox.add_webhook(text, text, text[], text, jsonb) IS
    'adds or changes a webhook and returns its signing secret';

-- The addresses behind the name are the relay's to judge, at the moment it connects.
CREATE FUNCTION outbox._check_url(url text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_port text := substring(url FROM '^[A-Za-z]+://(?:\[[^]]*\]|[^][/?#:]*):([0-9]+)');
BEGIN
    IF v_port::numeric NOT BETWEEN 1 AND 65535 OR coalesce(url, '') !~* '^https?://(\[[0-9a-f:.]+\]|[^][/?#@:\s\\]+)(:[0-9]{1,5})?([/?#]\S*)?$' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'malformed webhook URL',
            HINT = 'Use http:// or https://, a host, and no user name or password, for example https://example.com/hook.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_url(text) IS 'an error unless the URL has the form of a webhook''s; the message does not show it';

CREATE FUNCTION outbox._check_secret(secret text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_length int;
BEGIN
    IF secret IS NULL THEN
        RETURN;
    END IF;
    BEGIN
        v_length := octet_length(decode(substr(secret, 7), 'base64'));
    EXCEPTION WHEN invalid_parameter_value THEN
        v_length := 0;
    END;
    IF secret !~ '^whsec_[A-Za-z0-9+/]+={0,2}$' OR v_length NOT BETWEEN 24 AND 64 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'malformed signing secret',
            HINT = 'Use whsec_ and the base64 of 24 to 64 random bytes, or null to have one made.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_secret(text) IS 'an error unless the secret is one of Standard Webhooks; the message does not show it';

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

CREATE FUNCTION outbox.rotate_secret(name text, grace interval DEFAULT '24 hours') RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_secret text := outbox._new_secret();
BEGIN
    PERFORM outbox._require_destination(name);
    IF NOT EXISTS (SELECT FROM outbox.secret s WHERE s.destination = name) THEN
        RAISE EXCEPTION USING ERRCODE = 'wrong_object_type', MESSAGE = format('destination %I has no signing secret', name),
            HINT = 'Only webhooks are signed.';
    ELSIF grace IS NULL OR grace < interval '0' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'grace must not be negative or null',
            HINT = 'It is how long the secret before signs too; 0 drops it at once.';
    END IF;
    DELETE FROM outbox.secret s WHERE s.destination = name AND s.expires_at IS NOT NULL;
    UPDATE outbox.secret s SET expires_at = clock_timestamp() + grace WHERE s.destination = name;
    INSERT INTO outbox.secret (destination, secret) VALUES (name, v_secret);
    PERFORM outbox._timer(clock_timestamp() + grace);
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
       SET paused = false, disabled_reason = NULL, circuit_failures = 0, circuit_open_until = NULL
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

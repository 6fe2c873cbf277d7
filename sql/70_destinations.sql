-- Destinations: their properties, who may see these, and how an operator changes them. Each change is announced on the
-- channel outbox_destinations, so that running relays take it up at once.

CREATE FUNCTION outbox._require_destination(name text) RETURNS void
    LANGUAGE plpgsql STABLE
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

CREATE FUNCTION outbox._try_anew(v_destination text) RETURNS void
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
BEGIN
    UPDATE outbox.destination t
       SET disabled_reason = NULL, circuit_failures = 0, circuit_open_until = NULL, failing_since = NULL, unable_at = NULL
     WHERE t.name = v_destination;
    PERFORM outbox._tell_closed(v_destination);
END
$$;
COMMENT ON FUNCTION outbox._try_anew(text) IS 'enables a destination and closes its circuit';

-- Adds the destination, or changes the one of that name: its deliveries, its secret and its place stay. anew: it is tried
-- again, whatever it has answered before.
CREATE FUNCTION outbox._put_destination(
    name text, kind text, event_types text[], settings jsonb, exchange text, routing_key text, url text, tenant_id text,
    filter jsonpath, v_anew boolean) RETURNS void
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
           settings = excluded.settings;
    PERFORM outbox._try_anew(_put_destination.name) WHERE v_anew;
    PERFORM outbox._put_interest(_put_destination.name);
    PERFORM outbox._give_to_destinations();
    PERFORM outbox._destinations_changed(_put_destination.name);
END
$$;
COMMENT ON FUNCTION outbox._put_destination(text, text, text[], jsonb, text, text, text, text, jsonpath, boolean) IS
    'adds or changes a destination';

CREATE FUNCTION outbox._put_rabbitmq(
    name text, exchange text, routing_key text, event_types text[], settings jsonb, tenant_id text, filter jsonpath,
    v_anew boolean) RETURNS void
    LANGUAGE plpgsql
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
    PERFORM outbox._put_destination(name, 'rabbitmq', event_types, settings, exchange, routing_key, NULL, tenant_id, filter,
                                    v_anew);
END
$$;
COMMENT ON FUNCTION outbox._put_rabbitmq(text, text, text, text[], jsonb, text, jsonpath, boolean) IS
    'adds or changes a RabbitMQ destination';

CREATE FUNCTION outbox.add_rabbitmq(
    name text, exchange text DEFAULT 'outbox_events', routing_key text DEFAULT '{event_type}',
    event_types text[] DEFAULT '{*}', settings jsonb DEFAULT '{}', tenant_id text DEFAULT NULL,
    filter jsonpath DEFAULT NULL) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._put_rabbitmq(name, exchange, routing_key, event_types, settings, tenant_id, filter, true);
END
$$;
COMMENT ON FUNCTION outbox.add_rabbitmq(text, text, text, text[], jsonb, text, jsonpath) IS
    'adds or changes a RabbitMQ destination; exchange and routing_key are templates';

-- For functions of outbox_keeper, which alone may read and write secrets.
CREATE FUNCTION outbox._put_secret(destination text, given text, settings jsonb) RETURNS text
    LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    v_secret text;
    v_shown text;
BEGIN
    -- Those that were made for another settings.signature.
    DELETE FROM outbox.secret s
     WHERE s.destination = _put_secret.destination AND NOT outbox._is_secret(s.secret, _put_secret.settings);
    SELECT s.secret INTO v_secret FROM outbox.secret s
     WHERE s.destination = _put_secret.destination AND s.expires_at IS NULL;
    IF v_secret = given OR v_secret IS NOT NULL AND given IS NULL THEN
        v_shown := outbox._shown_secret(v_secret, settings);
        RETURN CASE WHEN given IS NOT NULL OR v_shown <> v_secret OR outbox._caller_reads_secrets() THEN v_shown END;
    END IF;
    DELETE FROM outbox.secret s WHERE s.destination = _put_secret.destination;
    v_secret := coalesce(given, outbox._new_secret(settings));
    INSERT INTO outbox.secret (destination, secret) SELECT _put_secret.destination, v_secret WHERE v_secret IS NOT NULL;
    RETURN outbox._shown_secret(v_secret, settings);
END
$$;
COMMENT ON FUNCTION outbox._put_secret(text, text, jsonb) IS
    'the webhook is signed with the given secret, with its present one or with a new one; what the receiver has to know, if the caller may';

CREATE FUNCTION outbox._put_webhook(
    name text, url text, event_types text[], settings jsonb, tenant_id text, filter jsonpath, v_anew boolean) RETURNS void
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
BEGIN
    PERFORM outbox._check_url(url);
    PERFORM outbox._put_destination(name, 'webhook', event_types, settings, NULL, NULL, url, tenant_id, filter, v_anew);
    INSERT INTO outbox.hidden (destination, url, settings)
    VALUES (_put_webhook.name, _put_webhook.url, _put_webhook.settings)
    ON CONFLICT ON CONSTRAINT hidden_pkey DO UPDATE SET url = excluded.url, settings = excluded.settings;
END
$$;
COMMENT ON FUNCTION outbox._put_webhook(text, text, text[], jsonb, text, jsonpath, boolean) IS
    'adds or changes a webhook, but for its secret';

CREATE FUNCTION outbox.add_webhook(
    name text, url text, event_types text[] DEFAULT '{*}', secret text DEFAULT NULL, settings jsonb DEFAULT '{}',
    tenant_id text DEFAULT NULL, filter jsonpath DEFAULT NULL) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    PERFORM outbox._check_secret(secret, settings);
    PERFORM outbox._put_webhook(name, url, event_types, settings, tenant_id, filter, true);
    RETURN outbox._put_secret(add_webhook.name, add_webhook.secret, add_webhook.settings);
END
$$;
COMMENT ON FUNCTION outbox.add_webhook(text, text, text[], text, jsonb, text, jsonpath) IS
    'adds or changes a webhook and returns its signing secret, or its public key; null: it has none, or the present one stays and is not the caller''s to see';

-- Source: RFC 7396, JSON Merge Patch, section 2.
CREATE FUNCTION outbox._merge_patch(target jsonb, patch jsonb) RETURNS jsonb
    LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    v_merged jsonb := CASE WHEN jsonb_typeof(target) = 'object' THEN target ELSE '{}' END;
    v_key text;
    v_value jsonb;
BEGIN
    IF jsonb_typeof(patch) <> 'object' THEN
        RETURN patch;
    END IF;
    FOR v_key, v_value IN SELECT p.key, p.value FROM jsonb_each(patch) p LOOP
        IF v_value = 'null' THEN
            v_merged := v_merged - v_key;
        ELSE
            v_merged := v_merged || jsonb_build_object(v_key, outbox._merge_patch(v_merged -> v_key, v_value));
        END IF;
    END LOOP;
    RETURN v_merged;
END
$$;
COMMENT ON FUNCTION outbox._merge_patch(jsonb, jsonb) IS 'the target with what a JSON Merge Patch changes';

-- Errors show no value: one may hold a token.
CREATE FUNCTION outbox._check_changes(kind text, changes jsonb) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    v_known CONSTANT text[] := ARRAY['event_types', 'tenant_id', 'filter', 'settings']
        || CASE kind WHEN 'webhook' THEN ARRAY['url'] ELSE ARRAY['exchange', 'routing_key'] END;
    v_key text;
    v_value jsonb;
BEGIN
    IF coalesce(jsonb_typeof(changes), 'null') <> 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'changes must be a JSON object',
            HINT = 'For example {"event_types": ["order.*"], "settings": {"max_attempts": 5, "base": null}}.';
    END IF;
    FOR v_key, v_value IN SELECT c.key, c.value FROM jsonb_each(changes) c LOOP
        IF v_key <> ALL (v_known) THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('unknown key %L in the changes of a %s destination', v_key, kind),
                HINT = format('Keys are %s.', array_to_string(v_known, ', '));
        ELSIF v_key = 'event_types' AND jsonb_typeof(v_value) <> 'null'
              AND (jsonb_typeof(v_value) <> 'array' OR jsonb_path_exists(v_value, 'strict $[*] ? (@.type() <> "string")')) THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'event_types must be a JSON array of texts',
                HINT = 'For example {"event_types": ["order.*", "invoice.paid"]}.';
        ELSIF v_key NOT IN ('event_types', 'settings') AND jsonb_typeof(v_value) NOT IN ('string', 'null') THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = format('%s must be a text or null', v_key),
                HINT = 'Null removes it, or brings back its default.';
        END IF;
    END LOOP;
    -- A setting that is stored and unknown, because outbox.add_webhook() only warns of it, can be removed.
    FOR v_key IN SELECT c.key FROM jsonb_each(CASE jsonb_typeof(changes -> 'settings') WHEN 'object' THEN changes -> 'settings' ELSE '{}' END) c
                  WHERE c.value <> 'null' AND c.key <> ALL (outbox._known_settings(kind)) LOOP
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('unknown key %L in the settings of a %s destination', v_key, kind),
            HINT = format('Keys are %s.', array_to_string(outbox._known_settings(kind), ', '));
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._check_changes(text, jsonb) IS 'an error for changes that no destination of this kind can have';

-- What views hide is merged as it is stored.
CREATE FUNCTION outbox.alter_destination(name text, changes jsonb) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_wants CONSTANT text[] := ARRAY['event_types', 'tenant_id', 'filter'];
    v_kind text;
    v_old jsonb;
    v_new jsonb;
    v_types text[];
    v_settings jsonb;
    v_anew boolean;
BEGIN
    PERFORM outbox._require_destination(name);
    PERFORM outbox._lock_for_secrets();
    PERFORM outbox._require_destination(name);
    SELECT d.kind, jsonb_strip_nulls(jsonb_build_object('url', h.url, 'exchange', d.exchange, 'routing_key', d.routing_key,
                                                        'tenant_id', d.tenant_id, 'filter', d.filter::text))
                   || jsonb_build_object('event_types', to_jsonb(d.event_types), 'settings', coalesce(h.settings, d.settings))
      INTO v_kind, v_old
      FROM outbox.destination d LEFT JOIN outbox.hidden h ON h.destination = d.name
     WHERE d.name = alter_destination.name;
    PERFORM outbox._check_changes(v_kind, changes);
    v_new := outbox._merge_patch(v_old, changes);
    -- Another address, or another way to call it, may be answered otherwise. What it wants says nothing of that.
    v_anew := v_new - v_wants <> v_old - v_wants;
    v_types := CASE WHEN v_new ? 'event_types' THEN ARRAY(SELECT jsonb_array_elements_text(v_new -> 'event_types')) ELSE '{*}' END;
    v_settings := coalesce(v_new -> 'settings', '{}');
    IF v_kind = 'webhook' THEN
        PERFORM outbox._put_webhook(name, v_new ->> 'url', v_types, v_settings, v_new ->> 'tenant_id',
                                    (v_new ->> 'filter')::jsonpath, v_anew);
        -- Another settings.signature needs a secret of another kind: outbox.rotate_secret() makes one that is shown.
        PERFORM outbox._put_secret(name, NULL, v_settings);
    ELSE
        PERFORM outbox._put_rabbitmq(name, coalesce(v_new ->> 'exchange', 'outbox_events'),
                                     coalesce(v_new ->> 'routing_key', '{event_type}'), v_types, v_settings,
                                     v_new ->> 'tenant_id', (v_new ->> 'filter')::jsonpath, v_anew);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox.alter_destination(text, jsonb) IS
    'changes a destination by a JSON Merge Patch: what is not named stays, null removes or brings back the default';

CREATE FUNCTION outbox.rotate_secret(name text, grace interval DEFAULT '24 hours') RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_settings jsonb;
    v_secret text;
BEGIN
    PERFORM outbox._require_destination(name);
    PERFORM outbox._lock_for_secrets();
    IF NOT EXISTS (SELECT FROM outbox.secret s WHERE s.destination = name) THEN
        RAISE EXCEPTION USING ERRCODE = 'wrong_object_type', MESSAGE = format('destination %I has no signing secret', name),
            HINT = 'Webhooks are signed, unless settings.signature is none.';
    ELSIF grace IS NULL OR grace NOT BETWEEN interval '0' AND interval '3660 days' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'grace must not be negative or null, nor longer than 3660 days',
            HINT = 'It is how long the secret before signs too; 0 drops it at once.';
    END IF;
    DELETE FROM outbox.secret s WHERE s.destination = name AND s.expires_at IS NOT NULL;
    UPDATE outbox.secret s SET expires_at = clock_timestamp() + grace WHERE s.destination = name;
    SELECT h.settings INTO v_settings FROM outbox.hidden h WHERE h.destination = name;
    v_secret := outbox._new_secret(v_settings);
    INSERT INTO outbox.secret (destination, secret) VALUES (name, v_secret);
    PERFORM outbox._wake_at(clock_timestamp() + grace);
    PERFORM outbox._destinations_changed(name);
    RETURN outbox._shown_secret(v_secret, v_settings);
END
$$;
COMMENT ON FUNCTION outbox.rotate_secret(text, interval) IS
    'a new signing secret, or key pair, for a webhook, of which it returns what the receiver has to know; the one before signs too until the grace ends';

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
    UPDATE outbox.destination d SET paused = false WHERE d.name = resume.name;
    PERFORM outbox._try_anew(name);
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
    DELETE FROM outbox.tally t WHERE t.destination = remove_destination.name;
    PERFORM outbox._let_go(v_gone.tokens);
    PERFORM outbox._refresh(v_gone.ids);
    PERFORM pg_notify('outbox_destinations', name);
    PERFORM outbox._wake('due');
END
$$;
COMMENT ON FUNCTION outbox.remove_destination(text) IS 'removes a destination with its outstanding and dead deliveries';

CREATE FUNCTION outbox.send_test(name text) RETURNS uuid
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET lock_timeout = 0
AS $$
DECLARE
    v_event record;
BEGIN
    PERFORM outbox._require_destination(name);
    PERFORM outbox._lock();
    PERFORM outbox._require_destination(name);
    INSERT INTO @extschema@.outbox_events AS e (event_type, event_data)
    VALUES ('outbox.test', jsonb_build_object('destination', name, 'sent_at',
                to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')))
    RETURNING e.id, e.event_id INTO v_event;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state', MESSAGE = 'the test event was not inserted',
            DETAIL = 'A trigger that others added to outbox_events kept it out.',
            HINT = 'See the check foreign_objects of outbox.health().';
    END IF;
    UPDATE @extschema@.outbox_events e SET listed = true, routed = e.available_at IS NOT NULL WHERE e.id = v_event.id;
    INSERT INTO outbox.delivery (id, destination, status, next_attempt_at)
    VALUES (v_event.id, name, 'pending', clock_timestamp());
    RETURN v_event.event_id;
END
$$;
COMMENT ON FUNCTION outbox.send_test(text) IS
    'an event of type outbox.test, owed to this destination alone, whatever it wants; returns its event_id';

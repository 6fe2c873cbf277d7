-- What an operator writes: patterns, durations, templates, headers, addresses and secrets. Each is read or checked here.

CREATE FUNCTION outbox._like_pattern(pattern text) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN replace(replace(replace(regexp_replace(replace(pattern, '\', '\\'), '\*+', '*', 'g'), '%', '\%'), '_', '\_'), '*', '%');
COMMENT ON FUNCTION outbox._like_pattern(text) IS 'a pattern whose * stands for any run of characters, as a LIKE pattern';

-- What every type that matches a pattern begins with, up to the end of a word: an event's type has few such beginnings, and an
-- index finds the patterns of each.
CREATE FUNCTION outbox._without_word(value text) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN rtrim(value, 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789');
COMMENT ON FUNCTION outbox._without_word(text) IS 'the text without the word at its end';

CREATE FUNCTION outbox._head(pattern text) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE WHEN strpos(pattern, '*') = 0 THEN left(pattern, 200)
            ELSE outbox._without_word(left(split_part(pattern, '*', 1), 200)) END;
COMMENT ON FUNCTION outbox._head(text) IS 'what every type that matches the pattern begins with, up to the end of a word';

CREATE FUNCTION outbox._heads(event_type text) RETURNS text[]
    LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
AS $$
DECLARE
    v_heads text[] := ARRAY['', left(event_type, 200)];
    v_rest text := left(event_type, 200);
BEGIN
    LOOP
        v_rest := outbox._without_word(v_rest);
        EXIT WHEN v_rest = '';
        v_heads := v_heads || v_rest;
        v_rest := left(v_rest, -1);
    END LOOP;
    RETURN v_heads;
END
$$;
COMMENT ON FUNCTION outbox._heads(text) IS 'what patterns that match the type may have for a head';

-- A filter is evaluated on event_data, with the event's other fields as variables.
CREATE FUNCTION outbox._check_filter(filter jsonpath) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    v_known CONSTANT text[] := ARRAY['metadata', 'event_type', 'aggregate_type', 'aggregate_id', 'tenant_id'];
    v_variable text;
BEGIN
    IF octet_length(filter::text) > 8000 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'a filter must have at most 8000 bytes',
            HINT = 'Filter by event_types, or in the receiver.';
    END IF;
    -- As PostgreSQL prints a path, each variable is $ and a quoted name; other quoted texts have no $ before them.
    FOR v_variable IN
        SELECT substr(m.found[1], 3, length(m.found[1]) - 3)
          FROM regexp_matches(filter::text, '(\$?"(?:[^"\\]|\\.)*")', 'g') AS m (found) WHERE m.found[1] LIKE '$%'
    LOOP
        IF v_variable <> ALL (v_known) THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('unknown variable $%s in a filter', v_variable),
                HINT = 'Variables are $metadata, $event_type, $aggregate_type, $aggregate_id and $tenant_id.';
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._check_filter(jsonpath) IS 'an error for a filter with an unknown variable';

CREATE FUNCTION outbox._check_tenant(tenant_id text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
AS $$
BEGIN
    IF tenant_id = '' OR octet_length(tenant_id) > 1000 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'tenant_id must have 1 to 1000 bytes',
            HINT = 'Leave it out (null) for events of any tenant.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_tenant(text) IS 'an error for a tenant that no destination can have';

-- A duration in settings: seconds as a number, or an interval as text.
CREATE FUNCTION outbox._duration(settings jsonb, key text, fallback interval) RETURNS interval
    LANGUAGE sql STABLE PARALLEL SAFE
RETURN CASE jsonb_typeof(settings -> key)
           WHEN 'number' THEN make_interval(secs => (settings ->> key)::float8)
           WHEN 'string' THEN (settings ->> key)::interval
           ELSE fallback END;
COMMENT ON FUNCTION outbox._duration(jsonb, text, interval) IS 'a duration of the settings, or the fallback';

-- The same for whoever must not fail, whatever a row holds: at least nothing, at most a century. Null: never.
CREATE FUNCTION outbox._span(settings jsonb, key text, fallback interval) RETURNS interval
    LANGUAGE sql STABLE PARALLEL SAFE
RETURN CASE WHEN settings ->> key = 'never' THEN NULL
            WHEN jsonb_typeof(settings -> key) = 'number'
            THEN make_interval(secs => greatest(0, least((settings ->> key)::numeric, 3e9))::float8)
            ELSE greatest(interval '0', least(outbox._duration(settings, key, fallback), interval '100 years')) END;
COMMENT ON FUNCTION outbox._span(jsonb, text, interval) IS 'a duration of the settings within bounds, or the fallback; null: never';

CREATE FUNCTION outbox._max_attempts(settings jsonb) RETURNS int
    LANGUAGE sql STABLE PARALLEL SAFE
RETURN CASE WHEN jsonb_typeof(settings -> 'schedule') = 'array' THEN jsonb_array_length(settings -> 'schedule') + 1
            ELSE coalesce((settings ->> 'max_attempts')::int, 15) END;
COMMENT ON FUNCTION outbox._max_attempts(jsonb) IS
    'attempts before a delivery is a dead letter: one more than the schedule has waits, else settings.max_attempts (default 15)';

-- Exponential backoff with full jitter: a uniform draw from 0 to min(cap, base * 2^(attempts - 1)).
-- Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
CREATE FUNCTION outbox._backoff(attempts int, base interval, cap interval) RETURNS interval
    LANGUAGE sql VOLATILE PARALLEL SAFE
RETURN make_interval(secs => random() * least(extract(epoch FROM cap)::float8,
                                              extract(epoch FROM base)::float8 * power(2::float8, least(attempts - 1, 30)::float8)));
COMMENT ON FUNCTION outbox._backoff(int, interval, interval) IS 'how long to wait after so many failed attempts';

CREATE FUNCTION outbox._retry_in(kind text, settings jsonb, attempts int) RETURNS interval
    LANGUAGE sql VOLATILE
RETURN CASE WHEN jsonb_typeof(settings -> 'schedule' -> (attempts - 1)) IN ('number', 'string')
            THEN outbox._span(jsonb_build_object('wait', settings -> 'schedule' -> (attempts - 1)), 'wait', NULL)
            ELSE outbox._backoff(attempts,
                outbox._span(settings, 'base', CASE kind WHEN 'webhook' THEN interval '5 seconds' ELSE interval '1 second' END),
                outbox._span(settings, 'cap', CASE kind WHEN 'webhook' THEN interval '6 hours' ELSE interval '5 minutes' END)) END;
COMMENT ON FUNCTION outbox._retry_in(text, jsonb, int) IS
    'a destination''s wait after so many attempts: of its schedule, else the backoff (base 5 s and cap 6 h for webhooks, 1 s and 5 min for all else)';

CREATE FUNCTION outbox._is_given_up(kind text, settings jsonb, owed_since timestamptz) RETURNS boolean
    LANGUAGE sql VOLATILE
RETURN coalesce(clock_timestamp() - owed_since
                >= outbox._span(settings, 'give_up_after', CASE kind WHEN 'webhook' THEN interval '3 days' END), false);
COMMENT ON FUNCTION outbox._is_given_up(text, jsonb, timestamptz) IS
    'owed for longer than settings.give_up_after (webhooks 3 days, all else for ever): the next failure is the last';

CREATE FUNCTION outbox._check_patterns(event_types text[]) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
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
    LANGUAGE plpgsql IMMUTABLE
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
    ELSIF (SELECT count(*) > 100 OR max(octet_length(h.key)) > 200 OR max(octet_length(h.value #>> '{}')) > 8000
             FROM jsonb_each(headers) h) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.headers must be at most 100 headers, names of 200 and values of 8000 characters',
            HINT = 'Receivers refuse larger ones.';
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

CREATE FUNCTION outbox._check_duration(settings jsonb, key text, shortest interval, longest interval) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v_type text := jsonb_typeof(settings -> key);
    v_wrong boolean := false;
BEGIN
    IF v_type IS NULL THEN
        RETURN;
    ELSIF v_type = 'number' THEN
        v_wrong := (settings ->> key)::numeric NOT BETWEEN extract(epoch FROM shortest) AND extract(epoch FROM longest);
    ELSIF v_type = 'string' THEN
        v_wrong := (settings ->> key)::interval NOT BETWEEN shortest AND longest;
    END IF;
    IF v_wrong OR v_type NOT IN ('number', 'string') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('settings.%s must be a duration above zero, from %s to %s', key, shortest, longest),
            HINT = 'Give seconds as a number, or an interval such as "5 minutes".';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_duration(jsonb, text, interval, interval) IS 'an error for a duration that nothing can be timed with';

CREATE FUNCTION outbox._check_durations(settings jsonb) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    PERFORM outbox._check_duration(settings, k, interval '1 millisecond', interval '1 day')
       FROM unnest(ARRAY['timeout', 'connect_timeout']) AS k;
    PERFORM outbox._check_duration(settings, k, interval '1 millisecond', interval '366 days')
       FROM unnest(ARRAY['base', 'cap']) AS k;
    PERFORM outbox._check_duration(settings, k, interval '1 second', interval '3660 days')
       FROM unnest(ARRAY['give_up_after', 'disable_after']) AS k WHERE settings ->> k IS DISTINCT FROM 'never';
    IF NOT settings ? 'schedule' THEN
        RETURN;
    ELSIF jsonb_typeof(settings -> 'schedule') <> 'array' OR jsonb_array_length(settings -> 'schedule') > 1000 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.schedule must be a list of at most 1000 durations',
            HINT = 'These are the waits between attempts, for example {"schedule": ["5 s", "5 min", "2 h"]}.';
    END IF;
    PERFORM outbox._check_duration(jsonb_build_object('schedule', w), 'schedule', interval '1 millisecond', interval '366 days')
       FROM jsonb_array_elements(settings -> 'schedule') AS w;
END
$$;
COMMENT ON FUNCTION outbox._check_durations(jsonb) IS 'an error for a duration of the settings that is out of bounds';

-- Source: RFC 3986, section 4.1 and appendix B. In turn: its characters; one fragment; a scheme, or no colon before the first
-- slash; a host and a port; brackets around a host alone.
CREATE FUNCTION outbox._is_uri_reference(uri text) RETURNS boolean
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN uri ~* '^([a-z0-9._~:/?#@!$&''()*+,;=-]|\[|\]|%[0-9a-f][0-9a-f])+$'
   AND uri !~ '#.*#'
   AND uri ~* '^([a-z][a-z0-9+.-]*:|[^:/?#]*([/?#]|$))'
   AND coalesce(regexp_replace(substring(uri FROM '^(?:[^:/?#]*:)?//([^/?#]*)'), '^.*@', '')
                ~* '^(\[[0-9a-f:.]+\]|[^]:[]*)(:[0-9]*)?$', true)
   AND regexp_replace(uri, '^([^:/?#]*:)?//[^/?#]*', '') !~ '[][]';
COMMENT ON FUNCTION outbox._is_uri_reference(text) IS 'whether the text is a URI or a relative reference';

-- What goes out of an event, and how it is written.
CREATE FUNCTION outbox._check_message(kind text, settings jsonb) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v_formats CONSTANT text[] := CASE kind WHEN 'webhook' THEN '{standard,data,cloudevents,cloudevents-binary}'
                                           ELSE '{data,cloudevents,cloudevents-binary}' END;
BEGIN
    IF coalesce(settings ->> 'format', 'data') <> ALL (v_formats) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('settings.format of a %s destination must be one of %s, not %L', kind,
                             array_to_string(v_formats, ', '), settings ->> 'format'),
            HINT = 'data: event_data alone; cloudevents: CloudEvents 1.0 in structured mode; cloudevents-binary: in binary mode.';
    ELSIF settings ? 'source' AND (jsonb_typeof(settings -> 'source') <> 'string'
                                   OR octet_length(settings ->> 'source') NOT BETWEEN 1 AND 2000
                                   OR NOT outbox._is_uri_reference(settings ->> 'source')) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.source must be a URI reference of 1 to 2000 bytes',
            HINT = 'For example "https://shop.example/orders", "urn:shop:orders" or "/orders".';
    ELSIF settings ? 'metadata' AND (jsonb_typeof(settings -> 'metadata') <> 'array'
                                     OR jsonb_array_length(settings -> 'metadata') > 100
                                     OR EXISTS (SELECT FROM jsonb_array_elements(settings -> 'metadata') AS p
                                                 WHERE jsonb_typeof(p) <> 'string')) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.metadata must be a list of at most 100 patterns',
            HINT = 'They name the members of metadata that go along, for example {"metadata": ["region", "x-*"]}.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_message(text, jsonb) IS 'an error for settings by which no event can be written';

CREATE FUNCTION outbox._check_signature(settings jsonb) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v_reserved CONSTANT text := '^(host|content-length|content-type|transfer-encoding|connection|webhook-(id|timestamp))$';
BEGIN
    IF coalesce(settings ->> 'signature', 'standard') NOT IN ('standard', 'ed25519', 'hex', 'none') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('settings.signature must be standard, ed25519, hex or none, not %L', settings ->> 'signature'),
            HINT = 'standard and ed25519: Standard Webhooks, symmetric and asymmetric; hex: HMAC-SHA256 of the body, as many receivers know it.';
    ELSIF settings ? 'signature_header' AND (jsonb_typeof(settings -> 'signature_header') <> 'string'
                                             OR settings ->> 'signature_header' !~ '^[A-Za-z0-9!#$%&''*+.^_`|~-]{1,200}$'
                                             OR settings ->> 'signature_header' ~* v_reserved) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.signature_header must be the name of a header, and none that the relay sets otherwise',
            HINT = 'For example "X-Hub-Signature-256"; the default is X-Signature-256.';
    ELSIF settings ? 'signature_prefix' AND (jsonb_typeof(settings -> 'signature_prefix') <> 'string'
                                             OR settings ->> 'signature_prefix' !~ '^([!-~][ -~]{0,99})?$') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.signature_prefix must be up to 100 visible ASCII characters',
            HINT = 'It stands before the hexadecimal digits; the default is sha256=.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_signature(jsonb) IS 'an error for settings by which no webhook can be signed';

CREATE FUNCTION outbox._check_rabbitmq_settings(settings jsonb) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    IF coalesce(settings ->> 'declare', 'exchange') NOT IN ('none', 'exchange', 'queue') THEN
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
    ELSIF settings ? 'broker' AND (jsonb_typeof(settings -> 'broker') <> 'string'
                                   OR settings ->> 'broker' !~ '^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.broker must be a name of 1 to 63 letters, digits, dots, dashes and underscores',
            HINT = 'It is a name from the relays'' AMQP_URL, NAME=URL; the default is default.';
    ELSIF settings ? 'queue' AND (jsonb_typeof(settings -> 'queue') <> 'string'
                                  OR octet_length(settings ->> 'queue') NOT BETWEEN 1 AND 255
                                  OR settings ->> 'queue' ~ '^amq\.|[[:cntrl:]]') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.queue must be text of 1 to 255 bytes, without control characters, that does not begin with amq.',
            HINT = 'Leave it out to name the queue like the destination.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_rabbitmq_settings(jsonb) IS 'an error for a setting that no RabbitMQ destination can have';

CREATE FUNCTION outbox._known_settings(kind text) RETURNS text[]
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN ARRAY['max_attempts', 'base', 'cap', 'schedule', 'on_failure', 'concurrency', 'timeout', 'give_up_after', 'disable_after',
             'format', 'source', 'metadata']
    || CASE kind WHEN 'webhook' THEN ARRAY['connect_timeout', 'headers', 'signature', 'signature_header', 'signature_prefix',
                                           'proxy', 'ca_certificate', 'client_certificate', 'client_key']
                 ELSE ARRAY['broker', 'declare', 'queue', 'queue_type', 'exchange_type'] END;
COMMENT ON FUNCTION outbox._known_settings(text) IS 'the keys of settings that a destination of this kind can have';

CREATE FUNCTION outbox._check_settings(kind text, settings jsonb) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v_key text;
BEGIN
    IF settings IS NULL OR jsonb_typeof(settings) <> 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'settings must be a JSON object',
            HINT = 'Use ''{}'' for the defaults.';
    ELSIF coalesce(settings ->> 'on_failure', 'skip') NOT IN ('skip', 'block') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('settings.on_failure must be skip or block, not %L', settings ->> 'on_failure'),
            HINT = 'skip: after a dead letter its aggregate goes on; block: it waits for an operator.';
    ELSIF settings ? 'max_attempts' AND coalesce(settings ->> 'max_attempts', '') !~ '^[1-9][0-9]{0,5}$' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.max_attempts must be a whole number from 1 to 999999',
            HINT = 'Leave it out for the default of 15.';
    ELSIF settings ? 'concurrency' AND (jsonb_typeof(settings -> 'concurrency') <> 'number'
                                        OR settings ->> 'concurrency' !~ '^[1-9][0-9]{0,4}$') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.concurrency must be a whole number from 1 to 99999',
            HINT = 'It is how many attempts of one relay may be under way at once.';
    END IF;
    PERFORM outbox._check_durations(settings);
    PERFORM outbox._check_message(kind, settings);
    PERFORM outbox._check_signature(settings);
    PERFORM outbox._check_proxy(settings);
    PERFORM outbox._check_tls(settings);
    PERFORM outbox._check_rabbitmq_settings(settings);
    PERFORM outbox._check_headers(settings -> 'headers') WHERE settings ? 'headers';
    FOR v_key IN SELECT k FROM jsonb_object_keys(settings) AS k WHERE k <> ALL (outbox._known_settings(kind)) LOOP
        RAISE WARNING USING MESSAGE = format('settings.%s is not a setting of a %s destination and has no effect', v_key, kind);
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._check_settings(text, jsonb) IS 'an error for a setting of the wrong shape, a warning for an unknown one';

CREATE FUNCTION outbox._fixed_text(template text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN regexp_replace(template, '\{[^{}]*\}', '', 'g');
COMMENT ON FUNCTION outbox._fixed_text(text) IS 'what a template yields for an event that has nothing';

CREATE FUNCTION outbox._check_template(template text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
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

-- One to four numbers, decimal, octal or hexadecimal; the last fills what the others leave.
CREATE FUNCTION outbox._is_ipv4(parts text[]) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    v_value numeric;
    v_last CONSTANT int := cardinality(parts);
BEGIN
    FOR i IN 1..v_last LOOP
        v_value := CASE WHEN parts[i] ~* '^0x[0-9a-f]{0,12}$'
                        THEN ('x' || lpad(substr(parts[i], 3), 16, '0'))::bit(64)::bigint
                        WHEN parts[i] ~ '^0[0-7]{1,20}$'
                        THEN (SELECT sum(d::int * 8::numeric ^ (n - 1))
                                FROM regexp_split_to_table(reverse(substr(parts[i], 2)), '') WITH ORDINALITY AS x (d, n))
                        WHEN parts[i] ~ '^(0|[1-9][0-9]{0,12})$' THEN parts[i]::numeric END;
        IF v_value IS NULL OR v_value >= (CASE WHEN i < v_last THEN 256 ELSE 256::numeric ^ (5 - v_last) END) THEN
            RETURN false;
        END IF;
    END LOOP;
    RETURN v_last <= 4;
END
$$;
COMMENT ON FUNCTION outbox._is_ipv4(text[]) IS 'whether these numbers are an IPv4 address as clients of HTTP read it';

-- A name, or an address in a form that a client of HTTP knows.
-- Source: URL Living Standard (WHATWG), host parsing: what ends in a number is an IPv4 address.
CREATE FUNCTION outbox._is_host(host text) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    v_labels text[] := string_to_array(rtrim(host, '.'), '.');
BEGIN
    IF host LIKE '[%' THEN
        RETURN family(trim(host, '[]')::inet) = 6;
    ELSIF host !~ '^[[:ascii:]]*$' THEN
        -- Names in other scripts are the relay's to write in ASCII.
        RETURN octet_length(host) <= 253 AND host !~ '[%<>^|"`{}[:cntrl:]]' AND host !~ '^\.|\.\.';
    ELSIF v_labels[cardinality(v_labels)] ~* '^([0-9]+|0x[0-9a-f]*)$' THEN
        RETURN outbox._is_ipv4(v_labels);
    END IF;
    RETURN length(host) <= 253 AND host ~* '^([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.?$';
EXCEPTION WHEN invalid_text_representation THEN
    RETURN false;
END
$$;
COMMENT ON FUNCTION outbox._is_host(text) IS 'whether a client of HTTP can look for this host';

-- The addresses behind the name are the relay's to judge, at the moment it connects.
CREATE FUNCTION outbox._check_url(url text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    v_parts text[] := regexp_match(url, '^https?://(\[[0-9a-f:.]+\]|[^][/?#@:\s\\]+)(?::([0-9]{1,5}))?(?:[/?#]\S*)?$', 'i');
BEGIN
    IF v_parts IS NULL OR octet_length(url) > 8000 OR v_parts[2]::int NOT BETWEEN 1 AND 65535
       OR NOT outbox._is_host(v_parts[1]) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'malformed webhook URL',
            HINT = 'Use http:// or https://, a host, and no user name or password, for example https://example.com/hook.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_url(text) IS 'an error unless the URL has the form of a webhook''s; the message does not show it';

-- A proxy's address is the relay's to judge, like that of a webhook.
CREATE FUNCTION outbox._check_proxy(settings jsonb) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v_parts text[] := regexp_match(settings ->> 'proxy',
        '^https?://(?:[!-~]*@)?(\[[0-9a-f:.]+\]|[^][/?#@:\s\\]+)(?::([0-9]{1,5}))?/?$', 'i');
BEGIN
    IF NOT settings ? 'proxy' OR settings -> 'proxy' = '"none"' THEN
        RETURN;
    ELSIF jsonb_typeof(settings -> 'proxy') <> 'string' OR v_parts IS NULL OR octet_length(settings ->> 'proxy') > 2000
          OR v_parts[2]::int NOT BETWEEN 1 AND 65535 OR NOT outbox._is_host(v_parts[1])
          OR settings ->> 'proxy' ~ '//[^@]*[/?#\\][^@]*@|@.*@|%(?![0-9A-Fa-f]{2})' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.proxy must be the URL of an HTTP proxy, or none',
            HINT = 'For example "http://proxy.example:3128" or "https://user:password@proxy.example"; none: not that of the relay either.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_proxy(jsonb) IS 'an error for a proxy that no relay can use; the message does not show it';

-- Source: RFC 7468. What else the text holds is left to whoever reads it.
CREATE FUNCTION outbox._pem_blocks(pem text, labels text[]) RETURNS int
    LANGUAGE plpgsql IMMUTABLE STRICT
AS $$
DECLARE
    v_found int := 0;
    v_block text[];
    v_der bytea;
BEGIN
    FOR v_block IN SELECT regexp_matches(pem, '^-----BEGIN ([A-Z0-9 ]+)-----\r?\n([A-Za-z0-9+/=\s]*)^-----END \1-----', 'gn') LOOP
        CONTINUE WHEN v_block[1] <> ALL (labels);
        v_der := decode(v_block[2], 'base64');
        -- A SEQUENCE that says how long it is.
        IF length(v_der) < 2 OR get_byte(v_der, 0) <> 48
           OR length(v_der) <> (CASE get_byte(v_der, 1)
                                    WHEN 129 THEN 3 + get_byte(v_der, 2)
                                    WHEN 130 THEN 4 + get_byte(v_der, 2) * 256 + get_byte(v_der, 3)
                                    ELSE 2 + get_byte(v_der, 1) END) THEN
            RETURN NULL;
        END IF;
        v_found := v_found + 1;
    END LOOP;
    RETURN v_found;
EXCEPTION WHEN invalid_parameter_value OR array_subscript_error THEN
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._pem_blocks(text, text[]) IS 'how many blocks with these labels a text in PEM holds; null: one is malformed';

CREATE FUNCTION outbox._check_tls(settings jsonb) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v_key text;
BEGIN
    FOREACH v_key IN ARRAY ARRAY['ca_certificate', 'client_certificate', 'client_key'] LOOP
        CONTINUE WHEN NOT settings ? v_key;
        IF jsonb_typeof(settings -> v_key) <> 'string' OR octet_length(settings ->> v_key) > 200000
           OR (CASE v_key
                   WHEN 'client_key'
                   THEN outbox._pem_blocks(settings ->> v_key, '{PRIVATE KEY,RSA PRIVATE KEY,EC PRIVATE KEY}')
                        IS DISTINCT FROM 1
                   ELSE coalesce(outbox._pem_blocks(settings ->> v_key, '{CERTIFICATE}'), 0) = 0 END) THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = CASE v_key WHEN 'client_key' THEN 'settings.client_key must be one private key in PEM, not encrypted'
                                     ELSE format('settings.%s must be certificates in PEM', v_key) END,
                HINT = 'It is the text of the file, with its lines -----BEGIN …----- and -----END …-----.';
        END IF;
    END LOOP;
    IF settings ? 'client_certificate' <> settings ? 'client_key' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.client_certificate and settings.client_key go together',
            HINT = 'The receiver sees the certificate; the key proves that it is the relay''s.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_tls(jsonb) IS 'an error for certificates and keys that are none; the message does not show them';

CREATE FUNCTION outbox._random_key() RETURNS bytea
    LANGUAGE sql VOLATILE
RETURN substr(uuid_send(gen_random_uuid()), 1, 6) || substr(uuid_send(gen_random_uuid()), 10, 7)
    || substr(uuid_send(gen_random_uuid()), 1, 6) || substr(uuid_send(gen_random_uuid()), 10, 7)
    || substr(uuid_send(gen_random_uuid()), 1, 6);
COMMENT ON FUNCTION outbox._random_key() IS '32 bytes from PostgreSQL''s strong random source';

CREATE FUNCTION outbox._signature(settings jsonb) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN coalesce(settings ->> 'signature', 'standard');
COMMENT ON FUNCTION outbox._signature(jsonb) IS 'how a webhook is signed: standard, ed25519, hex or none';

CREATE FUNCTION outbox._new_secret(settings jsonb) RETURNS text
    LANGUAGE sql VOLATILE
RETURN CASE outbox._signature(settings)
           WHEN 'none' THEN NULL
           WHEN 'ed25519' THEN 'whsk_' || encode(outbox._random_key(), 'base64')
           ELSE 'whsec_' || encode(outbox._random_key(), 'base64') END;
COMMENT ON FUNCTION outbox._new_secret(jsonb) IS 'a signing secret, or a private key, for these settings; null: they need none';

CREATE FUNCTION outbox._key_in(secret text, prefix text) RETURNS bytea
    LANGUAGE plpgsql IMMUTABLE STRICT
AS $$
DECLARE
    v_text CONSTANT text := substr(secret, length(prefix) + 1);
    v_key bytea;
BEGIN
    v_key := decode(v_text, 'base64');
    RETURN CASE WHEN secret = prefix || replace(encode(v_key, 'base64'), E'\n', '') THEN v_key END;
EXCEPTION WHEN invalid_parameter_value THEN
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._key_in(text, text) IS 'the bytes of a secret with this prefix; null: it is not that and proper base64';

-- A private key is the 32 bytes of RFC 8032, or these and its public key.
CREATE FUNCTION outbox._public_key(secret text) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT
RETURN (SELECT 'whpk_' || encode(p.key, 'base64')
          FROM outbox._key_in(secret, 'whsk_') AS k (key)
         CROSS JOIN outbox._ed25519_public_key(substr(k.key, 1, 32)) AS p (key)
         WHERE length(k.key) = 32 OR substr(k.key, 33) = p.key);
COMMENT ON FUNCTION outbox._public_key(text) IS 'whpk_ and the public key for whsk_ and a private one; null: it is none';

CREATE FUNCTION outbox._is_secret(secret text, settings jsonb) RETURNS boolean
    LANGUAGE sql IMMUTABLE
RETURN CASE outbox._signature(settings)
           WHEN 'none' THEN false
           WHEN 'hex' THEN length(secret) BETWEEN 8 AND 128
           WHEN 'ed25519' THEN outbox._public_key(secret) IS NOT NULL
           ELSE coalesce(length(outbox._key_in(secret, 'whsec_')) BETWEEN 24 AND 64, false) END;
COMMENT ON FUNCTION outbox._is_secret(text, jsonb) IS 'whether a webhook with these settings can be signed with this';

CREATE FUNCTION outbox._check_secret(secret text, settings jsonb) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
AS $$
BEGIN
    IF secret IS NULL OR outbox._is_secret(secret, settings) THEN
        RETURN;
    ELSIF outbox._signature(settings) = 'none' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'a webhook that is not signed has no secret',
            HINT = 'Leave it out, or choose another settings.signature than none.';
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
        MESSAGE = 'malformed signing secret',
        HINT = CASE outbox._signature(settings)
                   WHEN 'hex' THEN 'Use 8 to 128 characters, or null to have one made.'
                   WHEN 'ed25519' THEN 'Use whsk_ and the base64 of a private key of 32 or 64 bytes, or null to have a key pair made.'
                   ELSE 'Use whsec_ and the base64 of 24 to 64 random bytes, or null to have one made.' END;
END
$$;
COMMENT ON FUNCTION outbox._check_secret(text, jsonb) IS
    'an error unless a webhook with these settings can be signed with this; the message does not show it';

CREATE FUNCTION outbox._shown_secret(secret text, settings jsonb) RETURNS text
    LANGUAGE sql IMMUTABLE
RETURN CASE outbox._signature(settings) WHEN 'ed25519' THEN outbox._public_key(secret) ELSE secret END;
COMMENT ON FUNCTION outbox._shown_secret(text, jsonb) IS 'what the receiver has to know: the secret, or the public key';

CREATE FUNCTION outbox._shown_settings(settings jsonb) RETURNS jsonb
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN (SELECT coalesce(jsonb_object_agg(s.key, CASE
            WHEN s.key = 'headers' AND jsonb_typeof(s.value) = 'object'
                THEN (SELECT coalesce(jsonb_object_agg(k, '…'), '{}') FROM jsonb_object_keys(s.value) AS k)
            WHEN s.key = 'client_key' THEN '"…"'
            WHEN s.key = 'proxy' THEN to_jsonb(regexp_replace(s.value #>> '{}', '//.*@', '//…@'))
            ELSE s.value END), '{}')
          FROM jsonb_each(settings) AS s);
COMMENT ON FUNCTION outbox._shown_settings(jsonb) IS 'the settings, with names alone of what is hidden';

CREATE FUNCTION outbox._shown_url(url text) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN regexp_replace(url, '\?.*$', '?…');
COMMENT ON FUNCTION outbox._shown_url(text) IS 'the URL without its query, which may hold a token';

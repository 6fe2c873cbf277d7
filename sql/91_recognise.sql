-- Moving in, first part: what the columns of an application's own outbox table mean, and the expressions that take a row
-- from there to outbox_events ("taken") and back ("shown"). A superuser runs this; nothing here changes anything.
--
-- The application's casts and functions must not run with more rights than the application's. So a value whose type is not
-- PostgreSQL's own is read as its text, by its output function, and turned back only by whoever reads the view.

-- What a word in a column of states stands for. null: not known.
CREATE FUNCTION outbox._status_of_word(word text) RETURNS text
    LANGUAGE sql IMMUTABLE
RETURN CASE WHEN replace(replace(lower(word), '-', '_'), ' ', '_') IN (
                     'pending', 'new', 'created', 'queued', 'ready', 'scheduled', 'waiting', 'open', 'unsent', 'unprocessed',
                     'unpublished', 'not_sent', 'not_published', 'retry', 'retrying', 'to_send', 'init', 'initial') THEN 'pending'
            WHEN replace(replace(lower(word), '-', '_'), ' ', '_') IN (
                     'processing', 'in_progress', 'inprogress', 'in_flight', 'claimed', 'locked', 'running', 'sending',
                     'publishing', 'started') THEN 'processing'
            WHEN replace(replace(lower(word), '-', '_'), ' ', '_') IN (
                     'processed', 'sent', 'published', 'done', 'completed', 'complete', 'delivered', 'dispatched', 'success',
                     'succeeded', 'finished', 'acked', 'acknowledged') THEN 'processed'
            WHEN replace(replace(lower(word), '-', '_'), ' ', '_') IN (
                     'failed', 'failure', 'error', 'errored', 'dead', 'dead_letter', 'deadletter', 'rejected', 'abandoned')
                 THEN 'failed' END;
COMMENT ON FUNCTION outbox._status_of_word(text) IS 'the status that a word of an application''s own table stands for; null: not known';

-- The names by which a column of outbox_events is known elsewhere, the most telling first; underscores and case are passed.
-- id: the table's own key, where that is not the event_id. claim_token, listed, routed: pg_outbox's own, if all are there.
CREATE FUNCTION outbox._known_names() RETURNS TABLE (ours text, names text[], types text[])
    LANGUAGE sql IMMUTABLE
AS $$
    VALUES ('event_id', ARRAY['eventid', 'messageid', 'eventuuid'], ARRAY['uuid', 'text', 'varchar', 'bpchar']),
           ('event_type', ARRAY['eventtype', 'type', 'eventname', 'messagetype', 'topic'], NULL),
           ('event_version', ARRAY['eventversion', 'schemaversion'], NULL),
           ('aggregate_type', ARRAY['aggregatetype', 'aggregate', 'entitytype'], NULL),
           ('aggregate_id', ARRAY['aggregateid', 'entityid'], NULL),
           ('tenant_id', ARRAY['tenantid', 'tenant'], NULL),
           ('event_data', ARRAY['eventdata', 'payload', 'eventpayload', 'data', 'body', 'message'],
            ARRAY['jsonb', 'json', 'text', 'varchar']),
           ('metadata', ARRAY['metadata', 'headers', 'meta'], ARRAY['jsonb', 'json']),
           ('created_at', ARRAY['createdat', 'occurredat', 'occurredon', 'createdon', 'insertedat', 'eventtime', 'timestamp',
                                'created'], ARRAY['timestamptz', 'timestamp']),
           ('available_at', ARRAY['availableat', 'scheduledat', 'scheduledfor', 'visibleat', 'notbefore', 'deliverafter',
                                  'nextattemptat', 'nextretryat', 'processafter'], ARRAY['timestamptz', 'timestamp']),
           ('status', ARRAY['status', 'state', 'eventstatus', 'processed', 'published', 'sent', 'isprocessed', 'ispublished',
                            'issent'], ARRAY['text', 'varchar', 'bpchar', 'enum', 'bool']),
           ('retry_count', ARRAY['retrycount', 'retries', 'attempts', 'attemptcount', 'attempt', 'tries', 'numretries'],
            ARRAY['int2', 'int4', 'int8']),
           ('last_error', ARRAY['lasterror', 'error', 'errormessage', 'failurereason'], ARRAY['text', 'varchar']),
           ('processed_at', ARRAY['processedat', 'publishedat', 'sentat', 'dispatchedat', 'deliveredat', 'completedat'],
            ARRAY['timestamptz', 'timestamp']),
           ('id', ARRAY['id'], NULL),
           ('claim_token', ARRAY['claimtoken'], ARRAY['int8']), ('listed', ARRAY['listed'], ARRAY['bool']),
           ('routed', ARRAY['routed'], ARRAY['bool'])
$$;
COMMENT ON FUNCTION outbox._known_names() IS 'the names and types by which the columns of outbox_events are known in other tables';

-- The columns of a table, with what each stands for. builtin: the name of the type beneath domains if it is PostgreSQL's
-- own, 'enum' for any enumeration.
CREATE TYPE outbox.adopted_column AS (
    name        name,
    "number"    int,
    type        text,
    builtin     text,
    own_type    boolean,
    is_array    boolean,
    "collation" text,
    required    boolean,
    filled      boolean,
    identity    boolean,
    generated   text,
    "default"   text,
    ours        text
);
COMMENT ON TYPE outbox.adopted_column IS 'a column of an application''s own outbox table; ours: what it stands for, null: it is kept in metadata';

CREATE FUNCTION outbox._columns_of(source regclass) RETURNS SETOF outbox.adopted_column
    LANGUAGE sql STABLE
AS $$
    SELECT a.attname, a.attnum::int, format_type(a.atttypid, a.atttypmod),
           CASE WHEN b.typtype = 'e' THEN 'enum' WHEN b.typnamespace = 'pg_catalog'::regnamespace THEN b.typname::text END,
           t.typnamespace = 'pg_catalog'::regnamespace, t.typcategory = 'A',
           CASE WHEN a.attcollation NOT IN (0, t.typcollation) THEN format('%I.%I', n.nspname, c.collname) END,
           a.attnotnull, a.atthasdef OR a.attidentity <> '', a.attidentity <> '',
           CASE WHEN a.attgenerated <> '' THEN pg_get_expr(d.adbin, d.adrelid) END,
           CASE WHEN a.attgenerated = '' THEN pg_get_expr(d.adbin, d.adrelid) END, NULL::text
      FROM pg_attribute a
      JOIN pg_type t ON t.oid = a.atttypid
      JOIN pg_type b ON b.oid = CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.oid END
      LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
      LEFT JOIN pg_collation c ON c.oid = a.attcollation
      LEFT JOIN pg_namespace n ON n.oid = c.collnamespace
     WHERE a.attrelid = source AND a.attnum > 0 AND NOT a.attisdropped
     ORDER BY a.attnum
$$;
COMMENT ON FUNCTION outbox._columns_of(regclass) IS 'the columns of a table, before anybody said what they stand for';

CREATE FUNCTION outbox._cannot_adopt(column_name name, source regclass, why text, hint text) RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
        MESSAGE = format('column %I of %s can''t be taken over: %s', column_name, source, why), HINT = hint;
END
$$;
COMMENT ON FUNCTION outbox._cannot_adopt(name, regclass, text, text) IS 'raises the error of a column that can''t be mapped';

CREATE FUNCTION outbox._check_mapping(source regclass, columns jsonb) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v record;
BEGIN
    IF jsonb_typeof(columns) IS DISTINCT FROM 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'columns must be a JSON object',
            HINT = 'For example ''{"event_type": "topic", "event_data": "content"}'': our name first, then the table''s.';
    END IF;
    FOR v IN SELECT m.key AS ours, m.value AS theirs, m.value #>> '{}' AS name FROM jsonb_each(columns) m LOOP
        IF NOT EXISTS (SELECT FROM outbox._known_names() k WHERE k.ours = v.ours) THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('columns: there is no column %I to map', v.ours),
                HINT = 'These can be mapped: ' || (SELECT string_agg(k.ours, ', ') FROM outbox._known_names() k) || '.';
        ELSIF jsonb_typeof(v.theirs) = 'null' THEN
            CONTINUE;
        ELSIF jsonb_typeof(v.theirs) <> 'string'
              OR NOT EXISTS (SELECT FROM outbox._columns_of(source) c WHERE c.name = v.name) THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('columns: %s has no column %s for %I', source, v.theirs, v.ours),
                HINT = 'Name a column of the table as it is written there, or null for none.';
        ELSIF (SELECT count(*) FROM jsonb_each(columns) m WHERE m.value = v.theirs) > 1 THEN
            PERFORM outbox._cannot_adopt(v.name, source, 'columns names it twice', 'Map each column once.');
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._check_mapping(regclass, jsonb) IS 'refuses a mapping that names what is not there';

-- What is named in "columns" comes first, then the known names. A known name of a type that does not fit is passed, unless
-- nothing else can hold what must be there.
CREATE FUNCTION outbox._recognise(source regclass, columns jsonb) RETURNS SETOF outbox.adopted_column
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v_found outbox.adopted_column[] := ARRAY(SELECT c FROM outbox._columns_of(source) c);
    v_named text[];
    v_pick outbox.adopted_column;
    v record;
BEGIN
    PERFORM outbox._check_mapping(source, columns);
    v_named := ARRAY(SELECT m.value FROM jsonb_each_text(columns) m WHERE m.value IS NOT NULL);
    FOR v IN SELECT k.ours, k.names, k.types, columns ->> k.ours AS named, columns ? k.ours AS given FROM outbox._known_names() k LOOP
        SELECT c.* INTO v_pick
          FROM unnest(v_found) c
         WHERE c.ours IS NULL
           AND CASE WHEN v.given THEN c.name = v.named
                    WHEN c.generated IS NOT NULL OR c.builtin <> ALL (v.types) OR c.name = ANY (v_named) THEN false
                    -- A UUID or text that identifies, where there is no event_id of its own, is the event_id.
                    ELSE replace(lower(c.name), '_', '') = ANY (v.names || CASE v.ours WHEN 'event_id' THEN 'id' END) END
         ORDER BY coalesce(array_position(v.names, replace(lower(c.name), '_', '')), 1000), c.number LIMIT 1;
        CONTINUE WHEN NOT FOUND;
        IF v_pick.generated IS NOT NULL OR coalesce(v_pick.builtin, 'none') <> ALL (v.types) THEN
            PERFORM outbox._cannot_adopt(v_pick.name, source,
                format('type %s does not fit %s', v_pick.type, v.ours), 'These types do: ' || array_to_string(v.types, ', ') || '.');
        END IF;
        v_pick.ours := v.ours;
        v_found := ARRAY(SELECT c FROM unnest(v_found) c WHERE c.number <> v_pick.number) || v_pick;
    END LOOP;
    IF (SELECT count(*) FROM unnest(v_found) c WHERE c.ours IN ('claim_token', 'listed', 'routed')) < 3 THEN
        FOR i IN 1..cardinality(v_found) LOOP
            v_found[i].ours := nullif(nullif(nullif(v_found[i].ours, 'claim_token'), 'listed'), 'routed');
        END LOOP;
    END IF;
    FOR v IN SELECT k.ours, k.names, k.types FROM outbox._known_names() k
              WHERE k.ours IN ('event_type', 'event_data', 'status')
                AND NOT EXISTS (SELECT FROM unnest(v_found) c WHERE c.ours = k.ours) AND NOT columns ? k.ours LOOP
        -- It has the right name and the wrong type.
        PERFORM outbox._cannot_adopt(c.name, source, format('type %s does not fit %s', c.type, v.ours),
                    'These types do: ' || array_to_string(v.types, ', ') || '. Or name another column: adopt(…, columns => ''{"'
                    || v.ours || '": "…"}'').')
           FROM unnest(v_found) c WHERE c.ours IS NULL AND replace(lower(c.name), '_', '') = ANY (v.names);
    END LOOP;
    FOR v IN SELECT o AS ours FROM unnest(ARRAY['event_type', 'event_data']) o
              WHERE NOT EXISTS (SELECT FROM unnest(v_found) c WHERE c.ours = o) LOOP
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('%s has no column that is known to hold the %s', source, v.ours),
            HINT = format('Name it: outbox.adopt(%L, columns => ''{"%s": "…"}'').', source, v.ours);
    END LOOP;
    RETURN QUERY SELECT * FROM unnest(v_found) c ORDER BY c.number;
END
$$;
COMMENT ON FUNCTION outbox._recognise(regclass, jsonb) IS 'the columns of a table with what each stands for; an error for what can''t be mapped';

-- A value as text. r: the row.
CREATE FUNCTION outbox._as_text(c outbox.adopted_column, r text) RETURNS text
    LANGUAGE sql IMMUTABLE
RETURN CASE WHEN c.own_type THEN format('%s.%I::text', r, c.name)
            ELSE format('CASE WHEN %1$s.%2$I IS NOT NULL THEN format(''%%s'', %1$s.%2$I) END', r, c.name) END;
COMMENT ON FUNCTION outbox._as_text(outbox.adopted_column, text) IS 'expression: a column''s value as text';

-- How a value is kept in metadata: numbers, booleans, JSON and PostgreSQL's arrays as such, anything else as its text.
CREATE FUNCTION outbox._as_kept(c outbox.adopted_column, r text) RETURNS text
    LANGUAGE sql IMMUTABLE
RETURN format('CASE WHEN %s.%I IS NOT NULL THEN pg_catalog.jsonb_build_object(%L, %s) ELSE ''{}''::jsonb END', r, c.name, c.name,
              CASE WHEN c.own_type THEN format('%s.%I', r, c.name) ELSE outbox._as_text(c, r) END);
COMMENT ON FUNCTION outbox._as_kept(outbox.adopted_column, text) IS 'expression: a JSON object of a column that has no counterpart, empty if it is null';

CREATE FUNCTION outbox._kept_names(columns outbox.adopted_column[]) RETURNS text[]
    LANGUAGE sql IMMUTABLE
AS $$
    SELECT coalesce(array_agg(c.name::text ORDER BY c.number), '{}') FROM unnest(columns) c
     WHERE c.generated IS NULL AND (c.ours IS NULL OR c.ours = 'id' OR (c.ours = 'available_at' AND (c.filled OR c.required)))
$$;
COMMENT ON FUNCTION outbox._kept_names(outbox.adopted_column[]) IS 'the columns that metadata keeps';

-- An application's metadata that has one of the names already, or is no object, is kept whole beside them.
-- In PL/pgSQL, whose expressions are prepared once in a session: a view's INSERT calls it for each row.
CREATE FUNCTION outbox._joined_metadata(own jsonb, kept jsonb, names text[], empty_is_null boolean) RETURNS jsonb
    LANGUAGE plpgsql IMMUTABLE
AS $$
BEGIN
    IF own IS NULL AND empty_is_null THEN
        RETURN kept;
    ELSIF jsonb_typeof(own) = 'object' AND NOT own ?| (names || '_adopted'::text) AND NOT (own = '{}' AND empty_is_null) THEN
        RETURN own || kept;
    END IF;
    RETURN CASE jsonb_typeof(own) WHEN 'object' THEN own ELSE '{}' END || kept
        || jsonb_build_object('_adopted', jsonb_build_object('metadata', own));
END
$$;
COMMENT ON FUNCTION outbox._joined_metadata(jsonb, jsonb, text[], boolean) IS 'the application''s metadata and what is kept beside it';

-- The value of a column of outbox_events, from a row r of the application's. null: the table has nothing of the kind.
-- statuses: the words of its status column with what they stand for. zone: of timestamps without one.
CREATE FUNCTION outbox._taken(columns outbox.adopted_column[], what text, r text, statuses jsonb, zone text) RETURNS text
    LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    c outbox.adopted_column;
    v_names text[] := outbox._kept_names(columns);
    v_kept text;
    v_text text;
BEGIN
    SELECT x.* INTO c FROM unnest(columns) x WHERE x.ours = what;
    IF c.name IS NOT NULL THEN
        v_text := outbox._as_text(c, r);
    END IF;
    IF what = 'metadata' THEN
        v_kept := coalesce((SELECT string_agg(outbox._as_kept(k, r), ' || ' ORDER BY k.number)
                              FROM unnest(columns) k WHERE k.name = ANY (v_names)), '''{}''::jsonb');
        RETURN CASE WHEN c.name IS NULL THEN v_kept
                    ELSE format('outbox._joined_metadata(%s::jsonb, %s, %L, %L)', v_text, v_kept, v_names, NOT c.required) END;
    ELSIF what = 'status' THEN
        IF c.name IS NULL THEN
            RETURN (SELECT format('CASE WHEN %s.%I IS NULL THEN ''pending'' ELSE ''processed'' END', r, x.name)
                      FROM unnest(columns) x WHERE x.ours = 'processed_at');
        ELSIF c.builtin = 'bool' THEN
            RETURN format('CASE WHEN %s.%I THEN ''processed'' ELSE ''pending'' END', r, c.name);
        END IF;
        RETURN format('CASE WHEN %1$s.%2$I IS NULL THEN ''pending'' ELSE coalesce(%3$L::jsonb ->> %4$s, outbox._status_of_word(%4$s)) END',
                      r, c.name, statuses, v_text);
    ELSIF c.name IS NULL THEN
        RETURN NULL;
    ELSIF what = 'event_id' THEN
        RETURN CASE WHEN c.builtin = 'uuid' AND c.own_type THEN format('%s.%I', r, c.name) ELSE v_text || '::uuid' END;
    ELSIF what = 'event_data' THEN
        RETURN format('coalesce(%s, ''null'')', CASE WHEN c.builtin = 'jsonb' AND c.own_type THEN format('%s.%I', r, c.name)
                                                      ELSE v_text || '::jsonb' END);
    ELSIF what = 'retry_count' THEN
        RETURN format('coalesce(%s::int, 0)', v_text);
    ELSIF what IN ('created_at', 'available_at', 'processed_at') THEN
        v_text := CASE WHEN NOT c.own_type THEN format('%s::%s', v_text, c.builtin) ELSE format('%s.%I', r, c.name) END
                  || CASE WHEN c.builtin = 'timestamp' THEN format(' AT TIME ZONE %L', zone) ELSE '' END;
        IF what = 'available_at' AND c.name = ANY (v_names) THEN
            -- A column that always has a value says "at once" with a moment that has passed.
            v_text := format('CASE WHEN %1$s > pg_catalog.clock_timestamp() THEN %1$s END', v_text);
        END IF;
    END IF;
    RETURN v_text;
END
$$;
COMMENT ON FUNCTION outbox._taken(outbox.adopted_column[], text, text, jsonb, text) IS
    'expression: a value of outbox_events, from a row of the application''s table';

-- The name of the column of outbox.adopted_event that holds the table's own key.
CREATE FUNCTION outbox._key_column(c outbox.adopted_column) RETURNS text
    LANGUAGE sql IMMUTABLE
RETURN CASE WHEN NOT c.own_type THEN 'key_text' WHEN c.builtin IN ('int2', 'int4') THEN 'key_int'
            WHEN c.builtin = 'int8' THEN 'key_bigint' WHEN c.builtin = 'uuid' THEN 'key_uuid' ELSE 'key_text' END;
COMMENT ON FUNCTION outbox._key_column(outbox.adopted_column) IS 'where outbox.adopted_event holds a key of this type';

CREATE FUNCTION outbox._key_value(c outbox.adopted_column, r text) RETURNS text
    LANGUAGE sql IMMUTABLE
RETURN CASE outbox._key_column(c) WHEN 'key_text' THEN outbox._as_text(c, r) ELSE format('%s.%I', r, c.name) END;
COMMENT ON FUNCTION outbox._key_value(outbox.adopted_column, text) IS 'expression: the table''s own key as outbox.adopted_event holds it';

-- The value of a column of the application's, from rows e of outbox_events and a of outbox.adopted_event. words: for each
-- status the word of this table.
CREATE FUNCTION outbox._shown(columns outbox.adopted_column[], c outbox.adopted_column, words jsonb, zone text) RETURNS text
    LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    v_names text[] := outbox._kept_names(columns);
    v_text text;
BEGIN
    IF c.ours = 'id' THEN
        v_text := 'a.' || outbox._key_column(c);
    ELSIF c.ours IN ('claim_token', 'listed', 'routed') THEN
        v_text := CASE c.ours WHEN 'claim_token' THEN 'NULL' ELSE 'false' END;
    ELSIF c.ours = 'metadata' THEN
        v_text := format('CASE WHEN e.metadata ? ''_adopted'' THEN e.metadata #> ''{_adopted,metadata}'' ELSE %s END',
                         CASE WHEN c.required THEN format('e.metadata - %L::text[]', v_names)
                              ELSE format('nullif(e.metadata - %L::text[], ''{}'')', v_names) END);
    ELSIF c.ours IS NULL OR c.name = ANY (v_names) THEN
        IF c.own_type AND c.is_array THEN
            v_text := format('(SELECT r.v FROM jsonb_to_record(jsonb_build_object(''v'', e.metadata -> %L)) AS r (v %s))', c.name, c.type);
        ELSIF c.own_type AND c.builtin IN ('json', 'jsonb') THEN
            v_text := format('(e.metadata -> %L)', c.name);
        ELSE
            v_text := format('(e.metadata ->> %L)', c.name);
        END IF;
    ELSIF c.ours = 'status' AND c.builtin = 'bool' THEN
        v_text := '(e.status = ''processed'')';
    ELSIF c.ours = 'status' THEN
        v_text := format('(%L::jsonb ->> e.status)', words);
    ELSIF c.ours IN ('created_at', 'available_at', 'processed_at') AND c.builtin = 'timestamp' THEN
        v_text := format('(e.%I AT TIME ZONE %L)', c.ours, zone);
    ELSIF c.ours = 'event_data' AND NOT c.required THEN
        v_text := 'nullif(e.event_data, ''null'')';
    ELSE
        v_text := format('e.%I', c.ours);
    END IF;
    RETURN format('(%s)::%s%s', v_text, c.type, ' COLLATE ' || c."collation");
END
$$;
COMMENT ON FUNCTION outbox._shown(outbox.adopted_column[], outbox.adopted_column, jsonb, text) IS
    'expression: a value of the application''s table, from an event';

CREATE FUNCTION outbox._as_owner(statement text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_result text;
BEGIN
    EXECUTE statement INTO v_result;
    RETURN v_result;
END
$$;
COMMENT ON FUNCTION outbox._as_owner(text) IS 'runs a query that a superuser made, as outbox_owner; returns its first value';

-- The words of a status column with what they stand for. Reads one entry for each word if an index begins with the column,
-- else the table.
CREATE FUNCTION outbox._words_of(source regclass, c outbox.adopted_column) RETURNS jsonb
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v_checked text[];
    v_used text[];
    v_indexed CONSTANT boolean := EXISTS (SELECT FROM pg_index i WHERE i.indrelid = source AND i.indpred IS NULL
                                             AND i.indkey[0] = c.number AND i.indisvalid);
    v record;
BEGIN
    v_used := outbox._as_owner(CASE WHEN v_indexed THEN format(
        'WITH RECURSIVE w (word) AS ((SELECT s.%1$I FROM %2$s s WHERE s.%1$I IS NOT NULL ORDER BY 1 LIMIT 1) UNION ALL '
        'SELECT (SELECT s.%1$I FROM %2$s s WHERE s.%1$I > w.word ORDER BY 1 LIMIT 1) FROM w WHERE w.word IS NOT NULL) '
        'SELECT array_agg(format(''%%s'', w.word)) FROM w WHERE w.word IS NOT NULL', c.name, source)
        ELSE format('SELECT array_agg(format(''%%s'', w.word)) FROM (SELECT DISTINCT s.%1$I AS word FROM %2$s s WHERE s.%1$I IS NOT NULL) w',
                    c.name, source) END);
    SELECT array_agg(m[1]) INTO v_checked
      FROM pg_constraint k CROSS JOIN LATERAL regexp_matches(pg_get_constraintdef(k.oid), '''([^'']*)''', 'g') m
     WHERE k.conrelid = source AND k.contype = 'c' AND k.conkey = ARRAY[c.number::smallint];
    IF c.builtin = 'enum' THEN
        SELECT array_agg(e.enumlabel::text) INTO v_checked
          FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_enum e ON e.enumtypid IN (t.oid, t.typbasetype)
         WHERE a.attrelid = source AND a.attname = c.name;
    END IF;
    FOR v IN SELECT u AS word FROM unnest(v_used) u WHERE outbox._status_of_word(u) IS NULL LOOP
        PERFORM outbox._cannot_adopt(c.name, source, format('nothing is known of the status %L', v.word),
            'Write pending, processed or failed there, or map another column: adopt(…, columns => ''{"status": "…"}'').');
    END LOOP;
    v_used := v_used || v_checked || substring(c."default" FROM '^''([^'']*)''');
    -- What nothing forbids is written as the other words are.
    IF v_checked IS NULL THEN
        v_used := v_used || ARRAY(
            SELECT CASE WHEN EXISTS (SELECT FROM unnest(v_used) u WHERE u = upper(u) AND u <> lower(u)) THEN upper(o) ELSE o END
              FROM unnest(ARRAY['pending', 'processing', 'processed', 'failed']) o
             WHERE NOT EXISTS (SELECT FROM unnest(v_used) u WHERE outbox._status_of_word(u) = o)
               AND length(o) <= coalesce(substring(c.type FROM '\((\d+)\)')::int, length(o)));
    END IF;
    RETURN (SELECT coalesce(jsonb_object_agg(u, outbox._status_of_word(u)), '{}')
              FROM unnest(v_used) u WHERE outbox._status_of_word(u) IS NOT NULL);
END
$$;
COMMENT ON FUNCTION outbox._words_of(regclass, outbox.adopted_column) IS 'the words of a status column, and what each stands for';

-- For each status the table's own word: its default, the word itself, or the first of its synonyms. A table that has no word
-- for it shows it as pending.
CREATE FUNCTION outbox._word_for(statuses jsonb, preferred text) RETURNS jsonb
    LANGUAGE sql IMMUTABLE
AS $$
    SELECT jsonb_object_agg(o.ours, coalesce(
               (SELECT w.key FROM jsonb_each_text(statuses) w WHERE w.value = o.ours
                 ORDER BY w.key IS DISTINCT FROM preferred, lower(w.key) <> o.ours, w.key LIMIT 1),
               (SELECT w.key FROM jsonb_each_text(statuses) w WHERE w.value = 'pending'
                 ORDER BY w.key IS DISTINCT FROM preferred, lower(w.key) <> 'pending', w.key LIMIT 1)))
      FROM unnest(ARRAY['pending', 'processing', 'processed', 'failed']) AS o (ours)
$$;
COMMENT ON FUNCTION outbox._word_for(jsonb, text) IS 'for each status, the word of an application''s own table';

-- A condition on rows r of the old table, such that an index on its status column can serve.
CREATE FUNCTION outbox._has_status(columns outbox.adopted_column[], r text, statuses jsonb, wanted text[]) RETURNS text
    LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    c outbox.adopted_column;
BEGIN
    SELECT x.* INTO c FROM unnest(columns) x WHERE x.ours IN ('status', 'processed_at') ORDER BY x.ours DESC LIMIT 1;
    IF c.name IS NULL THEN
        RETURN ('pending' = ANY (wanted))::text;
    ELSIF c.ours = 'processed_at' THEN
        RETURN CASE WHEN 'pending' = ANY (wanted) THEN format('%s.%I IS NULL', r, c.name) ELSE 'false' END;
    ELSIF c.builtin = 'bool' THEN
        RETURN CASE WHEN NOT 'pending' = ANY (wanted) THEN 'false' WHEN c.required THEN format('NOT %s.%I', r, c.name)
                    ELSE format('%s.%I IS NOT TRUE', r, c.name) END;
    END IF;
    RETURN '(' || concat_ws(' OR ',
        (SELECT format('%s.%I IN (%s)', r, c.name, string_agg(quote_literal(w.key), ', '))
           FROM jsonb_each_text(statuses) w WHERE w.value = ANY (wanted)),
        CASE WHEN 'pending' = ANY (wanted) AND NOT c.required THEN format('%s.%I IS NULL', r, c.name) END,
        'false') || ')';
END
$$;
COMMENT ON FUNCTION outbox._has_status(outbox.adopted_column[], text, jsonb, text[]) IS 'condition: rows of the old table with one of these statuses';

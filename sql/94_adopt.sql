-- Moving in, third part: outbox.adopt() takes over an application's own outbox table, and outbox.release_adopted() gives it
-- back. One transaction each, while the application runs.
--
-- What a session has parsed or prepared is parsed anew, by name, when the old table's lock is released: it finds the view.
-- Rows move as outbox_owner does it, because triggers on either table may be anybody's: see 00_schema.sql.

-- What would go on using the old table, or can't be carried over. views: simple views, which are made anew.
CREATE FUNCTION outbox._dependents(relation regclass, OUT views oid[], OUT others text)
    LANGUAGE sql STABLE
AS $$
    WITH RECURSIVE part (oid) AS (
        SELECT relation::oid UNION SELECT i.inhrelid FROM pg_inherits i JOIN part p ON p.oid = i.inhparent
    ), dependent AS (
        SELECT DISTINCT d.classid, d.objid, r.ev_class, v.relkind
          FROM pg_depend d
          LEFT JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
          LEFT JOIN pg_class v ON v.oid = r.ev_class
         WHERE d.deptype = 'n' AND r.ev_class IS DISTINCT FROM relation
           AND ((d.refclassid = 'pg_class'::regclass AND d.refobjid IN (SELECT p.oid FROM part p))
                OR (d.refclassid = 'pg_type'::regclass
                    AND d.refobjid IN (SELECT t.oid FROM pg_type t JOIN pg_type b ON t.oid IN (b.oid, b.typarray)
                                        WHERE b.typrelid IN (SELECT p.oid FROM part p))))
           -- What is the table's own.
           AND NOT (d.classid = 'pg_trigger'::regclass
                    AND EXISTS (SELECT FROM pg_trigger t WHERE t.oid = d.objid AND t.tgrelid IN (SELECT p.oid FROM part p)))
           AND NOT (d.classid = 'pg_constraint'::regclass
                    AND EXISTS (SELECT FROM pg_constraint c
                                 WHERE c.oid = d.objid AND c.conrelid IN (SELECT p.oid FROM part p)
                                   AND c.confrelid NOT IN (SELECT p.oid FROM part p)))
           AND NOT (d.classid = 'pg_attrdef'::regclass
                    AND EXISTS (SELECT FROM pg_attrdef f WHERE f.oid = d.objid AND f.adrelid IN (SELECT p.oid FROM part p)))
           AND NOT (d.classid = 'pg_class'::regclass AND d.objid IN (SELECT p.oid FROM part p))
    )
    SELECT array_agg(DISTINCT d.ev_class) FILTER (WHERE d.relkind = 'v'),
           string_agg(DISTINCT CASE WHEN d.ev_class IS NULL THEN pg_describe_object(d.classid, d.objid, 0)
                                    ELSE pg_describe_object('pg_class'::regclass, d.ev_class, 0) END, ', ')
               FILTER (WHERE d.relkind IS DISTINCT FROM 'v')
      FROM dependent d
$$;
COMMENT ON FUNCTION outbox._dependents(regclass) IS 'what depends on a table or view: views that can be made anew, and others';

CREATE FUNCTION outbox._view_statements(views oid[]) RETURNS text[]
    LANGUAGE sql STABLE
AS $$
    SELECT coalesce(array_agg(format('CREATE OR REPLACE VIEW %s%s AS %s', c.oid::regclass,
                                     ' WITH (' || array_to_string(c.reloptions, ', ') || ')', pg_get_viewdef(c.oid))), '{}')
      FROM pg_class c WHERE c.oid = ANY (views)
$$;
COMMENT ON FUNCTION outbox._view_statements(oid[]) IS 'statements that make these views anew, over what has the names then';

CREATE FUNCTION outbox._refuse_dependents(relation regclass) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v_others CONSTANT text := (SELECT d.others FROM outbox._dependents(relation) d);
BEGIN
    IF v_others IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'dependent_objects_still_exist',
            MESSAGE = format('%s can''t be replaced: other objects depend on it', relation), DETAIL = v_others || '.',
            HINT = 'Drop them, or let them name it in a way that is looked up when they run.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._refuse_dependents(regclass) IS 'refuses a relation that others hold on to, foreign keys among them';

CREATE FUNCTION outbox._check_source(source regclass) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v record;
    v_why text;
BEGIN
    SELECT c.*, n.nspname INTO v FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = source;
    v_why := CASE
        WHEN v.oid IS NULL THEN 'it does not exist'
        WHEN v.oid = '@extschema@.outbox_events'::regclass OR v.nspname = 'outbox' THEN 'it is pg_outbox''s own'
        WHEN v.relkind = 'v' AND EXISTS (SELECT FROM outbox.adopted a WHERE a.relation = format('%I.%I', v.nspname, v.relname))
             THEN 'that was done already'
        WHEN v.relkind NOT IN ('r', 'p') OR v.relpersistence = 't' THEN 'it is not an ordinary table'
        WHEN v.relispartition OR EXISTS (SELECT FROM pg_inherits i
                                          WHERE i.inhrelid = v.oid OR (i.inhparent = v.oid AND v.relkind = 'r'))
             THEN 'it is a part of another table, or others inherit from it'
        WHEN v.relrowsecurity THEN 'it has row-level security, which views have not'
        WHEN EXISTS (SELECT FROM pg_rewrite r WHERE r.ev_class = v.oid) THEN 'it has rules'
        WHEN octet_length(v.relname || '_before') > 63 THEN 'its name is too long to have _before at its end'
        WHEN to_regclass(format('%I.%I', v.nspname, v.relname || '_before')) IS NOT NULL
             THEN format('%I.%I exists already', v.nspname, v.relname || '_before') END;
    IF v_why IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('%s can''t be taken over: %s', source, v_why),
            HINT = 'outbox.adopt() takes an application''s own table, whose name is then a view''s.';
    END IF;
    PERFORM outbox._refuse_dependents(source);
END
$$;
COMMENT ON FUNCTION outbox._check_source(regclass) IS 'refuses what can''t be taken over as a whole';

-- The keys stay unique: the event_id, and the table's own key. Nothing would hold any other uniqueness.
CREATE FUNCTION outbox._check_unique(source regclass, columns outbox.adopted_column[]) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v record;
BEGIN
    FOR v IN SELECT i.indexrelid::regclass AS name, (SELECT c.name FROM unnest(columns) c WHERE c.number = i.indkey[0]) AS first
               FROM pg_index i
              WHERE i.indrelid = source AND (i.indisunique OR i.indisexclusion)
                AND NOT EXISTS (SELECT FROM unnest(columns) c
                                 WHERE c.ours IN ('event_id', 'id') AND c.number = ANY (i.indkey::int[])) LOOP
        PERFORM outbox._cannot_adopt(coalesce(v.first, '?'), source, format('%s would not hold for new events', v.name),
                                     'If the application does not rely on it, drop it first.');
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._check_unique(regclass, outbox.adopted_column[]) IS 'refuses a uniqueness that nothing would hold';

CREATE FUNCTION outbox._execute_all(statements text[]) RETURNS void
    LANGUAGE plpgsql
AS $$
DECLARE
    v_statement text;
BEGIN
    FOREACH v_statement IN ARRAY statements LOOP
        EXECUTE v_statement;
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._execute_all(text[]) IS 'executes statements, in their order';

-- Drops the triggers of a table and returns the statements that make them again.
CREATE FUNCTION outbox._drop_triggers(source regclass) RETURNS text[]
    LANGUAGE plpgsql
AS $$
DECLARE
    v record;
    v_statements text[] := '{}';
BEGIN
    FOR v IN WITH RECURSIVE part (oid) AS (
                 SELECT source::oid UNION SELECT i.inhrelid FROM pg_inherits i JOIN part p ON p.oid = i.inhparent)
             SELECT t.oid, t.tgname, t.tgrelid::regclass AS relation, t.tgenabled, obj_description(t.oid, 'pg_trigger') AS comment
               FROM pg_trigger t JOIN part p ON p.oid = t.tgrelid
              WHERE NOT t.tgisinternal AND t.tgparentid = 0 ORDER BY t.tgrelid, t.tgname LOOP
        v_statements := v_statements || pg_get_triggerdef(v.oid) || CASE WHEN v.tgenabled <> 'O' THEN
            format('ALTER TABLE %s %s TRIGGER %I', v.relation, CASE v.tgenabled WHEN 'D' THEN 'DISABLE' WHEN 'R' THEN 'ENABLE REPLICA'
                       ELSE 'ENABLE ALWAYS' END, v.tgname) END
            || CASE WHEN v.comment IS NOT NULL THEN
            format('COMMENT ON TRIGGER %I ON %s IS %L', v.tgname, v.relation, v.comment) END;
        EXECUTE format('DROP TRIGGER %I ON %s', v.tgname, v.relation);
    END LOOP;
    RETURN array_remove(v_statements, NULL);
END
$$;
COMMENT ON FUNCTION outbox._drop_triggers(regclass) IS 'drops the triggers of a table; returns the statements that make them again';

-- The query that moves rows from the old table, in their order: by a key that counts up, else by time, else as they lie there.
CREATE FUNCTION outbox._move_query(
    n int, before regclass, columns outbox.adopted_column[], statuses jsonb, zone text, condition text, to_dead text) RETURNS text
    LANGUAGE plpgsql STABLE
AS $make$
DECLARE
    v_key outbox.adopted_column;
    v_order text;
    v_fields text;
    v_values text;
BEGIN
    SELECT x.* INTO v_key FROM unnest(columns) x WHERE x.ours = 'id';
    SELECT quote_ident(x.name) INTO v_order FROM unnest(columns) x
     WHERE (x.ours = 'id' AND x.builtin IN ('int2', 'int4', 'int8', 'numeric')) OR x.ours = 'created_at'
     ORDER BY x.ours DESC LIMIT 1;
    SELECT string_agg(', ' || t.field, '' ORDER BY t.field), string_agg(', ' || t.value, '' ORDER BY t.field) INTO v_fields, v_values
      FROM (SELECT f AS field, outbox._taken(columns, f, 's', statuses, zone) AS value
              FROM unnest(ARRAY['event_type', 'event_version', 'aggregate_type', 'aggregate_id', 'tenant_id', 'event_data',
                                'metadata', 'available_at', 'retry_count', 'last_error']) f) t
     WHERE t.value IS NOT NULL;
    RETURN format($$
WITH moved AS MATERIALIZED (
    DELETE FROM %1$s b WHERE %2$s RETURNING b.tableoid AS "its table", b.ctid AS "its place", b.*
), numbered AS MATERIALIZED (
    SELECT nextval(%3$L) AS "its event", s.*
      FROM (SELECT m.* FROM moved m ORDER BY %4$s"its table", "its place") s
), event AS (
    INSERT INTO @extschema@.outbox_events (id, event_id, created_at, status, listed, routed%5$s)
    SELECT d."its event", d."its event_id", d."its created_at", d."its status", d."its status" = 'failed',
           d."its status" = 'failed' AND d.available_at IS NOT NULL%6$s
      FROM (SELECT s."its event", coalesce(%7$s, outbox.uuid_v7()) AS "its event_id",
                   coalesce(%8$s, clock_timestamp()) AS "its created_at",
                   CASE WHEN %9$s THEN 'failed' ELSE 'pending' END AS "its status"%10$s
              FROM numbered s) d
), known AS (
    INSERT INTO outbox.adopted_event (event, source%11$s) SELECT s."its event", %12$s%13$s FROM numbered s
)
SELECT count(*) FROM numbered$$,
        before, condition, pg_get_serial_sequence('@extschema@.outbox_events', 'id'), v_order || ', ',
        v_fields, (SELECT string_agg(', d.' || f, '' ORDER BY o) FROM unnest(string_to_array(substr(v_fields, 3), ', ')) WITH ORDINALITY u (f, o)),
        coalesce(outbox._taken(columns, 'event_id', 's', statuses, zone), 'NULL'),
        coalesce(outbox._taken(columns, 'created_at', 's', statuses, zone), 'NULL'), to_dead,
        (SELECT string_agg(format(', %s AS %I', outbox._taken(columns, f, 's', statuses, zone), f), '' ORDER BY o)
           FROM unnest(string_to_array(substr(v_fields, 3), ', ')) WITH ORDINALITY u (f, o))
            || CASE WHEN v_fields LIKE '%available_at%' THEN '' ELSE ', NULL AS available_at' END,
        CASE WHEN v_key.name IS NULL THEN '' ELSE ', ' || outbox._key_column(v_key) END, n,
        CASE WHEN v_key.name IS NULL THEN '' ELSE ', ' || outbox._key_value(v_key, 's') END);
END
$make$;
COMMENT ON FUNCTION outbox._move_query(int, regclass, outbox.adopted_column[], jsonb, text, text, text) IS
    'the query that moves rows from the old table to outbox_events, and returns how many';

-- Moves them, or says which column is in the way.
CREATE FUNCTION outbox._move(
    n int, source text, before regclass, columns outbox.adopted_column[], statuses jsonb, zone text, failed text) RETURNS bigint
    LANGUAGE plpgsql SET datestyle = 'ISO, YMD' SET intervalstyle = postgres
AS $$
DECLARE
    v_condition CONSTANT text := outbox._has_status(columns, 'b', statuses,
        ARRAY['pending', 'processing'] || CASE failed WHEN 'leave' THEN '{}' ELSE ARRAY['failed'] END);
    v_message text;
    v_name text;
    v_constraint text;
    c outbox.adopted_column;
BEGIN
    RETURN outbox._as_owner(outbox._move_query(n, before, columns, statuses, zone, v_condition,
        CASE failed WHEN 'dead' THEN outbox._has_status(columns, 's', statuses, '{failed}') ELSE 'false' END));
EXCEPTION WHEN data_exception OR integrity_constraint_violation THEN
    GET STACKED DIAGNOSTICS v_message = MESSAGE_TEXT, v_name = COLUMN_NAME, v_constraint = CONSTRAINT_NAME;
    v_name := coalesce(nullif(v_name, ''), CASE
        WHEN v_constraint LIKE 'adopted_event_key%' THEN 'id'
        ELSE substring(v_constraint FROM '^outbox_events_(event_id|event_type|created_at)_') END);
    -- A value that can't be converted tells of no column: each is tried alone.
    FOR c IN SELECT x.* FROM unnest(columns) x WHERE x.ours IS NOT NULL AND v_name IS NULL LOOP
        BEGIN
            PERFORM outbox._as_owner(format('SELECT count(x.v) FROM (SELECT %s AS v FROM %s b WHERE %s OFFSET 0) x',
                        coalesce(outbox._taken(columns, CASE c.ours WHEN 'id' THEN 'metadata' ELSE c.ours END, 'b', statuses, zone), 'NULL'),
                        before, v_condition));
        EXCEPTION WHEN data_exception THEN
            v_name := c.ours;
            v_message := SQLERRM;
        END;
    END LOOP;
    SELECT x.* INTO c FROM unnest(columns) x WHERE x.ours = v_name;
    PERFORM outbox._cannot_adopt(coalesce(c.name, v_name, '?'), source::regclass, v_message,
                                 'Mend the rows that are outstanding, or name another column: adopt(…, columns => ''{…}'').');
END
$$;
COMMENT ON FUNCTION outbox._move(int, text, regclass, outbox.adopted_column[], jsonb, text, text) IS
    'moves what is outstanding to outbox_events; returns how many events that are';

-- Dead letters, at each destination that wants them, or at none yet.
CREATE FUNCTION outbox._bury(n int) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
DECLARE
    v_ids CONSTANT bigint[] := ARRAY(SELECT e.id FROM outbox.adopted_event a JOIN @extschema@.outbox_events e ON e.id = a.event
                                      WHERE a.source = n AND e.status = 'failed');
BEGIN
    IF v_ids = '{}' THEN
        RETURN;
    END IF;
    PERFORM outbox._lock();
    INSERT INTO outbox.delivery (id, destination, ordering_key, status, attempts, last_error)
    SELECT e.id, coalesce(r.destination, ''), outbox._ordering_key(e.aggregate_type, e.aggregate_id), 'failed',
           e.retry_count, e.last_error
      FROM @extschema@.outbox_events e LEFT JOIN outbox._routes_or_nobody(v_ids) r ON r.id = e.id
     WHERE e.id = ANY (v_ids);
END
$$;
COMMENT ON FUNCTION outbox._bury(int) IS 'makes dead letters of the failed events of a table that is taken over';

CREATE FUNCTION outbox._warn_of_losses(relation text, before regclass) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v record;
BEGIN
    FOR v IN SELECT format('foreign key %I', k.conname) AS what, 'does not hold for new events' AS why
               FROM pg_constraint k WHERE k.conrelid = before AND k.contype = 'f'
             UNION ALL
             SELECT format('publication %I', p.pubname), 'has no new rows of this table'
               FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE r.prrelid = before LOOP
        RAISE WARNING '% of % %', v.what, relation, v.why;
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._warn_of_losses(text, regclass) IS 'warns of what a view can''t do for a table';

CREATE FUNCTION outbox._check_isolation(what text) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('%s must be called in a READ COMMITTED transaction', what),
            DETAIL = 'It waits for the table, and has to see what was committed meanwhile.',
            HINT = 'BEGIN ISOLATION LEVEL READ COMMITTED;';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_isolation(text) IS 'refuses a transaction that does not see what was committed while it waited';

CREATE FUNCTION outbox.adopt(source regclass, columns jsonb DEFAULT '{}', failed text DEFAULT 'dead') RETURNS bigint
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_zone CONSTANT text := current_setting('TimeZone');
    v_relation text;
    v_name name;
    v_n int;
    v_columns outbox.adopted_column[];
    v_status outbox.adopted_column;
    v_statuses jsonb := '{}';
    v_words jsonb := '{}';
    v_views text[];
    v_triggers text[];
    v_before text;
    v_count bigint;
BEGIN
    IF failed IS NULL OR failed NOT IN ('dead', 'retry', 'leave') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = format('failed must not be %L', failed),
            HINT = 'dead: dead letters; retry: owed again; leave: they stay in the old table.';
    END IF;
    PERFORM outbox._check_isolation('outbox.adopt()');
    PERFORM outbox._check_source(source);
    SELECT format('%I.%I', s.nspname, c.relname), c.relname, format('%I.%I', s.nspname, c.relname || '_before')
      INTO v_relation, v_name, v_before FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace WHERE c.oid = source;
    -- One at a time. What takes long and needs no more is done while the application still writes.
    LOCK TABLE outbox.adopted IN SHARE ROW EXCLUSIVE MODE;
    EXECUTE format('LOCK TABLE %s IN SHARE UPDATE EXCLUSIVE MODE', v_relation);
    v_columns := ARRAY(SELECT r FROM outbox._recognise(source, columns) r);
    PERFORM outbox._check_unique(source, v_columns);
    PERFORM outbox._grant_owner(source);
    SELECT c.* INTO v_status FROM unnest(v_columns) c WHERE c.ours IN ('status', 'processed_at') ORDER BY c.ours DESC LIMIT 1;
    IF v_status.ours = 'status' AND v_status.builtin <> 'bool' THEN
        v_statuses := outbox._words_of(source, v_status);
        v_words := outbox._word_for(v_statuses, substring(v_status."default" FROM '^''([^'']*)'''));
    END IF;
    EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', v_relation);
    IF to_regclass(v_relation) IS DISTINCT FROM source
       OR v_columns IS DISTINCT FROM ARRAY(SELECT r FROM outbox._recognise(source, columns) r) THEN
        RAISE EXCEPTION USING ERRCODE = 'object_in_use', MESSAGE = format('%s was changed meanwhile', v_relation), HINT = 'Try again.';
    END IF;
    PERFORM outbox._check_source(source);
    v_n := (SELECT coalesce(max(a.source), 0) + 1 FROM outbox.adopted a);
    v_views := outbox._view_statements((SELECT d.views FROM outbox._dependents(source) d));
    v_triggers := outbox._drop_triggers(source);
    EXECUTE format('ALTER TABLE %s RENAME TO %I', v_relation, v_name || '_before');
    PERFORM outbox._make_views(v_n, v_relation, source, v_columns, v_words, v_zone);
    PERFORM outbox._make_check(v_n, v_relation, source, v_columns);
    PERFORM outbox._make_triggers(v_n, v_relation, source, v_columns, v_statuses, v_zone);
    PERFORM outbox._close_adopted(v_n, v_relation, source);
    PERFORM outbox._execute_all(v_views);
    INSERT INTO outbox.adopted (source, relation, before, status_column, words, triggers)
    VALUES (v_n, v_relation, v_before, v_status.name, v_words, v_triggers);
    v_count := outbox._move(v_n, v_relation, source, v_columns, v_statuses, v_zone, failed);
    PERFORM outbox._warn_of_losses(v_relation, source);
    PERFORM outbox._bury(v_n);
    RETURN v_count;
END
$$;
COMMENT ON FUNCTION outbox.adopt(regclass, jsonb, text) IS
    'takes over an application''s own outbox table: a view stands in its place; returns the number of events taken over';

CREATE FUNCTION outbox.release_adopted(source regclass) RETURNS bigint
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_timeout CONSTANT text := current_setting('lock_timeout');
    v_relation CONSTANT text := (SELECT format('%I.%I', s.nspname, c.relname) FROM pg_class c
                                   JOIN pg_namespace s ON s.oid = c.relnamespace WHERE c.oid = source);
    v outbox.adopted;
    v_before regclass;
    v_views text[];
    v_names text;
    v_values text;
    v_count bigint;
BEGIN
    PERFORM outbox._check_isolation('outbox.release_adopted()');
    LOCK TABLE outbox.adopted IN SHARE ROW EXCLUSIVE MODE;
    SELECT a.* INTO v FROM outbox.adopted a WHERE a.relation = v_relation;
    v_before := to_regclass(v.before);
    IF v_before IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_object',
            MESSAGE = format('%s was not taken over by outbox.adopt()', coalesce(v_relation, source::text)),
            HINT = 'SELECT relation FROM outbox.adopted;';
    END IF;
    PERFORM outbox._refuse_dependents(source);
    v_views := outbox._view_statements((SELECT d.views FROM outbox._dependents(source) d));
    -- Takes the view's lock: whoever waits for it will find the table. The locks of rows come before the claim lock, whose
    -- holder waits for none.
    EXECUTE format('ALTER VIEW %s RENAME TO %I', v_relation, 'released_' || v.source);
    EXECUTE format('ALTER TABLE %s RENAME TO %I', v_before, (parse_ident(v.relation))[2]);
    EXECUTE format('DROP TRIGGER takes_no_new_rows ON %s', v_before);
    PERFORM FROM @extschema@.outbox_events e JOIN outbox.adopted_event a ON a.event = e.id WHERE a.source = v.source FOR UPDATE OF e;
    PERFORM outbox._lock();
    PERFORM set_config('lock_timeout', v_timeout, true);
    SELECT string_agg(quote_ident(c.name), ', ' ORDER BY c.number),
           string_agg(CASE WHEN c.name = v.status_column AND c.builtin <> ALL (ARRAY['bool', 'timestamptz', 'timestamp'])
                           THEN format('CASE s."its status" WHEN ''processing'' THEN %L ELSE s.%I END', v.words ->> 'pending', c.name)
                           ELSE format('s.%I', c.name) END, ', ' ORDER BY c.number)
      INTO v_names, v_values FROM outbox._columns_of(v_before) c WHERE c.generated IS NULL;
    EXECUTE format('GRANT INSERT ON %s TO outbox_owner', v_before);
    -- A table that says of no row that it was sent gets back what was not.
    v_count := outbox._as_owner(format(
        'WITH back AS (INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE SELECT %s FROM outbox.adopted_%s s WHERE %s ORDER BY s."its event" RETURNING 1) '
        'SELECT count(*) FROM back', v_before, v_names, v_values, v.source,
        CASE WHEN v.status_column IS NULL THEN 's."its status" <> ''processed''' ELSE 'true' END));
    PERFORM outbox._as_owner(format('WITH gone AS (DELETE FROM @extschema@.outbox_events e USING outbox.adopted_event a '
        'WHERE a.event = e.id AND a.source = %s RETURNING 1) SELECT count(*) FROM gone', v.source));
    PERFORM outbox._execute_all(v_views);
    PERFORM outbox._copy_grants(source, v_before);
    PERFORM outbox._execute_all(v.triggers);
    EXECUTE format('DROP VIEW %s', source);
    EXECUTE format('DROP VIEW outbox.adopted_%s', v.source);
    EXECUTE format('DROP FUNCTION outbox.adopted_%1$s_check(), outbox.adopted_%1$s_insert(), outbox.adopted_%1$s_change()', v.source);
    DELETE FROM outbox.adopted a WHERE a.source = v.source;
    DELETE FROM outbox.adopted_event a WHERE a.source = v.source;
    RETURN v_count;
END
$$;
COMMENT ON FUNCTION outbox.release_adopted(regclass) IS
    'undoes outbox.adopt(): the table is back, with what was processed meanwhile and what is outstanding; returns how many rows those are';

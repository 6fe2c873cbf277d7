-- Moving in, second part: outbox.adopt() puts a view in the place of an application's own outbox table, and
-- outbox.release_adopted() undoes it. One transaction each, while the application runs.
--
--   the old table     is renamed to NAME_before, keeps what was processed, and takes no new rows
--   outbox.adopted_N  a view: the events of this table in outbox_events, in the table's own columns
--   the new view      has the table's name, columns, defaults and grants: outbox.adopted_N and NAME_before together
--   its triggers      adopted_N_check, as the application: generated columns, NOT NULL, CHECK;
--                     adopted_N_insert and adopted_N_change, as outbox_owner: they write outbox_events
--
-- What a session has parsed or prepared is parsed anew, by name, when the old table's lock is released: it finds the view.
--
-- Rows move as outbox_owner does it, because triggers on either table may be anybody's: see 00_schema.sql.

CREATE FUNCTION outbox._as_owner(statement text) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_result bigint;
BEGIN
    EXECUTE statement INTO v_result;
    RETURN v_result;
END
$$;
COMMENT ON FUNCTION outbox._as_owner(text) IS 'runs a query that a superuser made, as outbox_owner; returns its first value';

CREATE FUNCTION outbox._refuse_row() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
        MESSAGE = format('%I.%I takes no new rows', TG_TABLE_SCHEMA, TG_TABLE_NAME),
        DETAIL = 'It keeps what was processed before pg_outbox took it over.',
        HINT = format('Insert into %s.', TG_ARGV[0]);
END
$$;
COMMENT ON FUNCTION outbox._refuse_row() IS 'keeps new rows out of a table that was taken over';

-- What would go on using the old table, or can't be carried over. views: simple views, which are made anew.
CREATE FUNCTION outbox._dependents(relation regclass, OUT views oid[], OUT others text)
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
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
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce(array_agg(format('CREATE OR REPLACE VIEW %s%s AS %s', c.oid::regclass,
                                     ' WITH (' || array_to_string(c.reloptions, ', ') || ')', pg_get_viewdef(c.oid))), '{}')
      FROM pg_class c WHERE c.oid = ANY (views)
$$;
COMMENT ON FUNCTION outbox._view_statements(oid[]) IS 'statements that make these views anew, over what has the names then';

CREATE FUNCTION outbox._refuse_dependents(relation regclass) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
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
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
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
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
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

-- The words of a status column with what they stand for. Reads one entry for each word if an index begins with the column,
-- else the table.
CREATE FUNCTION outbox._words_of(source regclass, c outbox.adopted_column) RETURNS jsonb
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_checked text[];
    v_used text[];
    v_indexed CONSTANT boolean := EXISTS (SELECT FROM pg_index i WHERE i.indrelid = source AND i.indpred IS NULL
                                             AND i.indkey[0] = c.number AND i.indisvalid);
    v record;
BEGIN
    EXECUTE CASE WHEN v_indexed THEN format(
        'WITH RECURSIVE w (word) AS ((SELECT s.%1$I FROM %2$s s WHERE s.%1$I IS NOT NULL ORDER BY 1 LIMIT 1) UNION ALL '
        'SELECT (SELECT s.%1$I FROM %2$s s WHERE s.%1$I > w.word ORDER BY 1 LIMIT 1) FROM w WHERE w.word IS NOT NULL) '
        'SELECT array_agg(format(''%%s'', w.word)) FROM w WHERE w.word IS NOT NULL', c.name, source)
        ELSE format('SELECT array_agg(format(''%%s'', w.word)) FROM (SELECT DISTINCT s.%1$I AS word FROM %2$s s WHERE s.%1$I IS NOT NULL) w',
                    c.name, source) END INTO v_used;
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
             WHERE NOT EXISTS (SELECT FROM unnest(v_used) u WHERE outbox._status_of_word(u) = o));
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

CREATE FUNCTION outbox._execute_all(statements text[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
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
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
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

-- Whoever has a privilege on the one has it on the other, and nobody else has.
CREATE FUNCTION outbox._copy_grants(from_relation regclass, to_relation regclass) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_owner CONSTANT oid := (SELECT c.relowner FROM pg_class c WHERE c.oid = to_relation);
    v record;
BEGIN
    FOR v IN SELECT DISTINCT x.grantee FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) x
              WHERE c.oid = to_relation AND x.grantee <> v_owner LOOP
        EXECUTE format('REVOKE ALL ON %s FROM %s CASCADE', to_relation, CASE v.grantee WHEN 0 THEN 'PUBLIC' ELSE v.grantee::regrole::text END);
    END LOOP;
    FOR v IN SELECT x.grantee, x.privilege_type, x.is_grantable, NULL::name AS name
               FROM pg_class c CROSS JOIN LATERAL aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) x
              WHERE c.oid = from_relation
             UNION ALL
             SELECT x.grantee, x.privilege_type, x.is_grantable, a.attname
               FROM pg_attribute a CROSS JOIN LATERAL aclexplode(a.attacl) x
              WHERE a.attrelid = from_relation AND NOT a.attisdropped LOOP
        CONTINUE WHEN v.grantee IN (v_owner, 'outbox_owner'::regrole);
        EXECUTE format('GRANT %s%s ON %s TO %s%s', v.privilege_type, CASE WHEN v.name IS NULL THEN '' ELSE format(' (%I)', v.name) END, to_relation,
                       CASE v.grantee WHEN 0 THEN 'PUBLIC' ELSE v.grantee::regrole::text END,
                       CASE WHEN v.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._copy_grants(regclass, regclass) IS 'gives one relation the grants of another';

-- The statements that make the view outbox.adopted_N and the one in the old table's place. "event", "event status": for
-- release_adopted().
CREATE FUNCTION outbox._make_views(n int, relation text, before regclass, columns outbox.adopted_column[], words jsonb, zone text)
    RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_names CONSTANT text := (SELECT string_agg(quote_ident(c.name), ', ' ORDER BY c.number) FROM unnest(columns) c);
    v record;
BEGIN
    EXECUTE format('CREATE VIEW outbox.adopted_%s AS SELECT %s, "event", "event status" FROM (SELECT %s, e.id AS "event", '
                   'e.status AS "event status" FROM outbox.adopted_event a JOIN @extschema@.outbox_events e ON e.id = a.event '
                   'WHERE a.source = %s) s', n,
        (SELECT string_agg(CASE WHEN c.generated IS NULL THEN quote_ident(c.name)
                                ELSE format('(%s)::%s AS %I', c.generated, c.type, c.name) END, ', ' ORDER BY c.number) FROM unnest(columns) c),
        (SELECT string_agg(format('%s AS %I', outbox._shown(columns, c, words, zone), c.name), ', ' ORDER BY c.number)
           FROM unnest(columns) c WHERE c.generated IS NULL), n);
    EXECUTE format('CREATE VIEW %s AS SELECT %s FROM outbox.adopted_%s UNION ALL SELECT %s FROM %s', relation, v_names, n, v_names, before);
    FOR v IN SELECT c.name, c."default" FROM unnest(columns) c WHERE c."default" IS NOT NULL LOOP
        EXECUTE format('ALTER VIEW %s ALTER COLUMN %I SET DEFAULT %s', relation, v.name, v."default");
    END LOOP;
    FOR v IN SELECT d.objsubid, d.description, a.attname FROM pg_description d
               LEFT JOIN pg_attribute a ON a.attrelid = d.objoid AND a.attnum = d.objsubid
              WHERE d.objoid = before AND d.classoid = 'pg_class'::regclass LOOP
        EXECUTE format('COMMENT ON %s IS %L', CASE v.objsubid WHEN 0 THEN 'VIEW ' || relation
                                                   ELSE format('COLUMN %s.%I', relation, v.attname) END, v.description);
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._make_views(int, text, regclass, outbox.adopted_column[], jsonb, text) IS
    'makes the view of a table''s events, and the one that takes the table''s name';

-- What the table itself would have done with a row, with the rights of whoever writes: generated columns, NOT NULL, CHECK.
CREATE FUNCTION outbox._make_check(n int, relation text, before regclass, columns outbox.adopted_column[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $make$
DECLARE
    v_name CONSTANT text := (parse_ident(relation))[2];
    v_body CONSTANT text := (
        SELECT string_agg(x.text, '' ORDER BY x.step, x.place) FROM (
            SELECT 1 AS step, c.number AS place, format($$
    NEW.%I := (SELECT %s FROM (SELECT NEW.*) n);$$, c.name, c.generated) AS text
              FROM unnest(columns) c WHERE c.generated IS NOT NULL
            UNION ALL
            -- An identity column is filled later, by whoever has the right to its sequence.
            SELECT 2, c.number, format($$
    IF NEW.%1$I IS NULL THEN
        RAISE not_null_violation USING SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME, COLUMN = %1$L, MESSAGE = %2$L;
    END IF;$$, c.name, format('null value in column "%s" of relation "%s" violates not-null constraint', c.name, v_name))
              FROM unnest(columns) c WHERE c.required AND NOT c.identity AND c.generated IS NULL
            UNION ALL
            SELECT 3, row_number() OVER (ORDER BY k.conname), format($$
    IF NOT (SELECT %1$s FROM (SELECT NEW.*) n) THEN
        RAISE check_violation USING SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME, CONSTRAINT = %2$L, MESSAGE = %3$L;
    END IF;$$, pg_get_expr(k.conbin, k.conrelid), k.conname,
                   format('new row for relation "%s" violates check constraint "%s"', v_name, k.conname))
              FROM pg_constraint k WHERE k.conrelid = before AND k.contype = 'c') x);
BEGIN
    EXECUTE format('CREATE FUNCTION outbox.adopted_%s_check() RETURNS trigger LANGUAGE plpgsql AS %L', n, format($$
#variable_conflict use_column
BEGIN%s
    RETURN NEW;
END
$$, v_body));
    EXECUTE format('CREATE TRIGGER adopted_%1$s_check INSTEAD OF INSERT OR UPDATE ON %2$s FOR EACH ROW '
                   'EXECUTE FUNCTION outbox.adopted_%1$s_check()', n, relation);
END
$make$;
COMMENT ON FUNCTION outbox._make_check(int, text, regclass, outbox.adopted_column[]) IS
    'makes the trigger that does for a new row what the table did';

CREATE FUNCTION outbox._refuse_status(relation name) RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
        MESSAGE = format('a row of %I can''t be given this status', relation),
        HINT = 'A new event is pending: deliveries decide what becomes of it.';
END
$$;
COMMENT ON FUNCTION outbox._refuse_status(name) IS 'refuses an event that is new and dead, or of an unknown status';

CREATE FUNCTION outbox._refuse_change(relation name, what text) RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
        MESSAGE = format('%s of an event in %I can''t be changed so', what, relation),
        DETAIL = 'pg_outbox delivers it: claims and settlements decide its status.',
        HINT = 'Stop the job that polls this table. outbox.replay() delivers an event again; a DELETE takes it back.';
END
$$;
COMMENT ON FUNCTION outbox._refuse_change(name, text) IS 'refuses an UPDATE that the deliveries of an event contradict';

-- The statements that add an event from the row NEW.
CREATE FUNCTION outbox._insert_statements(n int, before regclass, columns outbox.adopted_column[], statuses jsonb, zone text)
    RETURNS text
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $make$
DECLARE
    v_key outbox.adopted_column;
    v_filled text;
    v_unique text;
    v_fields text;
    v_values text;
    v_status CONSTANT text := outbox._taken(columns, 'status', 'NEW', statuses, zone);
BEGIN
    SELECT x.* INTO v_key FROM unnest(columns) x WHERE x.ours = 'id';
    SELECT string_agg(CASE
        WHEN c.identity THEN format($$
    NEW.%1$I := coalesce(NEW.%1$I, nextval(%2$L));$$, c.name, pg_get_serial_sequence(before::text, c.name))
        WHEN c.ours = 'event_id' THEN format($$
    NEW.%I := v_event_id;$$, c.name)
        WHEN c.ours = 'created_at' THEN format($$
    NEW.%1$I := coalesce(NEW.%1$I, v_created_at%2$s);$$, c.name, CASE c.builtin WHEN 'timestamp' THEN format(' AT TIME ZONE %L', zone) END)
        END, '' ORDER BY c.number) INTO v_filled FROM unnest(columns) c;
    -- A key that was used before is used up.
    SELECT string_agg(format($$
    IF EXISTS (SELECT FROM %1$s b WHERE b.%2$I = NEW.%2$I) THEN
        RAISE unique_violation USING SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME, COLUMN = %2$L, MESSAGE = %3$L;
    END IF;$$, before, c.name, format('duplicate key value in column "%s"', c.name)), '' ORDER BY c.number) INTO v_unique
      FROM unnest(columns) c
     WHERE c.ours IN ('event_id', 'id')
       AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = before AND i.indisunique AND i.indkey[0] = c.number);
    SELECT string_agg(', ' || t.field, '' ORDER BY t.field), string_agg(', ' || t.value, '' ORDER BY t.field) INTO v_fields, v_values
      FROM (SELECT f AS field, outbox._taken(columns, f, 'NEW', statuses, zone) AS value
              FROM unnest(ARRAY['event_type', 'event_version', 'aggregate_type', 'aggregate_id', 'tenant_id', 'event_data',
                                'metadata', 'available_at', 'retry_count', 'last_error']) f) t
     WHERE t.value IS NOT NULL;
    RETURN format($$
    v_status := coalesce(%1$s, 'unknown');
    IF v_status NOT IN ('pending', 'processing', 'processed') THEN
        PERFORM outbox._refuse_status(TG_TABLE_NAME);
    END IF;
    v_event_id := coalesce(%2$s, outbox.uuid_v7());
    v_created_at := coalesce(%3$s, clock_timestamp());%4$s%5$s
    v_status := CASE v_status WHEN 'processed' THEN 'processed' ELSE 'pending' END;
    INSERT INTO @extschema@.outbox_events (event_id, created_at, status, processed_at%6$s)
    VALUES (v_event_id, v_created_at, v_status, CASE v_status WHEN 'processed' THEN coalesce(%7$s, clock_timestamp()) END%8$s)
    RETURNING id INTO v_id;
    INSERT INTO outbox.adopted_event (event, source%9$s) VALUES (v_id, %10$s%11$s);$$,
        coalesce(v_status, '''pending'''), coalesce(outbox._taken(columns, 'event_id', 'NEW', statuses, zone), 'NULL'),
        coalesce(outbox._taken(columns, 'created_at', 'NEW', statuses, zone), 'NULL'), v_filled, v_unique, v_fields,
        coalesce(outbox._taken(columns, 'processed_at', 'NEW', statuses, zone), 'NULL'), v_values,
        CASE WHEN v_status IS NULL THEN ', added' ELSE '' END
            || CASE WHEN v_key.name IS NOT NULL THEN ', ' || outbox._key_column(v_key) ELSE '' END, n,
        CASE WHEN v_status IS NULL THEN ', pg_current_xact_id()' ELSE '' END
            || CASE WHEN v_key.name IS NULL THEN '' ELSE ', ' || outbox._key_value(v_key, 'NEW') END);
END
$make$;
COMMENT ON FUNCTION outbox._insert_statements(int, regclass, outbox.adopted_column[], jsonb, text) IS
    'the statements of a trigger that add an event from the row NEW';

-- UPDATE and DELETE of the row OLD. What an event holds can be changed, and its status as far as an UPDATE of outbox_events
-- can. A row of the old table that becomes outstanding again moves. In a table that says of no row that it was sent, a DELETE
-- does not take back what the same transaction inserted: so does Debezium understand it.
CREATE FUNCTION outbox._change_statements(n int, before regclass, columns outbox.adopted_column[], statuses jsonb, zone text)
    RETURNS text
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $make$
DECLARE
    v_key outbox.adopted_column;
    v_status CONSTANT text := outbox._taken(columns, 'status', 'NEW', statuses, zone);
    v_processed_at CONSTANT text := coalesce(outbox._taken(columns, 'processed_at', 'NEW', statuses, zone), 'NULL');
BEGIN
    SELECT x.* INTO v_key FROM unnest(columns) x WHERE x.ours IN ('id', 'event_id') ORDER BY x.ours DESC LIMIT 1;
    IF v_key.name IS NULL THEN
        RETURN $$
    PERFORM outbox._refuse_change(TG_TABLE_NAME, 'a row without a key');$$;
    END IF;
    RETURN format($$
    SELECT e.id, e.status, e.listed OR e.claim_token IS NOT NULL AS given, a.added INTO v_event
      FROM outbox.adopted_event a JOIN @extschema@.outbox_events e ON e.id = a.event
     WHERE a.source = %s AND %s FOR UPDATE OF e;
    v_live := FOUND;
    IF TG_OP = 'DELETE' THEN
        IF NOT v_live THEN
            DELETE FROM %s b WHERE b.%I = OLD.%4$I;
        ELSIF v_event.status = 'processed' OR v_event.added IS DISTINCT FROM pg_current_xact_id() THEN
            DELETE FROM @extschema@.outbox_events e WHERE e.id = v_event.id;
        END IF;
        RETURN OLD;
    END IF;$$, n,
        CASE v_key.ours WHEN 'event_id' THEN 'e.event_id = ' || outbox._taken(columns, 'event_id', 'OLD', statuses, zone)
                        ELSE format('a.%s = %s', outbox._key_column(v_key), outbox._key_value(v_key, 'OLD')) END, before, v_key.name)
    || format($$
    v_status := coalesce(%s, 'unknown');
    IF v_live THEN
        IF %s THEN
            PERFORM outbox._refuse_change(TG_TABLE_NAME, 'key, type, aggregate, tenant and time');
        ELSIF v_status <> coalesce(%s, 'unknown') AND (v_event.given OR v_status NOT IN ('pending', 'processed')) THEN
            PERFORM outbox._refuse_change(TG_TABLE_NAME, 'status');
        END IF;
        UPDATE @extschema@.outbox_events e SET %s WHERE e.id = v_event.id;
        IF NOT v_event.given AND v_status <> v_event.status AND v_status IN ('pending', 'processed') THEN
            UPDATE @extschema@.outbox_events e
               SET status = v_status, processed_at = CASE v_status WHEN 'processed' THEN coalesce(%s, clock_timestamp()) END
             WHERE e.id = v_event.id;
        END IF;
        RETURN NEW;
    END IF;$$, coalesce(v_status, 'v_event.status'),
        (SELECT string_agg(format('%s IS DISTINCT FROM %s', outbox._as_text(c, 'NEW'), outbox._as_text(c, 'OLD')), ' OR ' ORDER BY c.number)
           FROM unnest(columns) c
          WHERE c.ours IN ('id', 'event_id', 'event_type', 'aggregate_type', 'aggregate_id', 'tenant_id', 'available_at')),
        coalesce(outbox._taken(columns, 'status', 'OLD', statuses, zone), 'v_event.status'),
        (SELECT string_agg(format('%s = %s', o, outbox._taken(columns, o, 'NEW', statuses, zone)), ', ')
           FROM unnest(ARRAY['event_version', 'event_data', 'metadata', 'created_at', 'retry_count', 'last_error']) o
          WHERE outbox._taken(columns, o, 'NEW', statuses, zone) IS NOT NULL), v_processed_at)
    || CASE WHEN v_status IS NULL THEN '' ELSE format($$
    IF v_status IN ('pending', 'processing') THEN
        DELETE FROM %s b WHERE b.%I = OLD.%2$I;%s
        RETURN NEW;
    END IF;$$, before, v_key.name, outbox._insert_statements(n, before, columns, statuses, zone)) END
    || format($$
    UPDATE %s b SET %s WHERE b.%I = OLD.%3$I;$$, before,
        (SELECT string_agg(format('%1$I = NEW.%1$I', c.name), ', ' ORDER BY c.number) FROM unnest(columns) c
          WHERE c.generated IS NULL AND NOT c.identity), v_key.name);
END
$make$;
COMMENT ON FUNCTION outbox._change_statements(int, regclass, outbox.adopted_column[], jsonb, text) IS
    'the statements of a trigger that change or delete the row OLD';

-- The insert is not in the guarded language, for the reason that outbox.publish() is not.
CREATE FUNCTION outbox._make_triggers(n int, relation text, before regclass, columns outbox.adopted_column[], statuses jsonb, zone text)
    RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $make$
DECLARE
    v record;
BEGIN
    FOR v IN SELECT * FROM (VALUES
            ('insert', 'INSERT', 'plpgsql', outbox._insert_statements(n, before, columns, statuses, zone)),
            ('change', 'UPDATE OR DELETE', 'outbox_plpgsql', outbox._change_statements(n, before, columns, statuses, zone)))
            AS x (name, events, language, body) LOOP
        EXECUTE format('CREATE FUNCTION outbox.adopted_%s_%s() RETURNS trigger LANGUAGE %s SECURITY DEFINER '
                       'SET search_path = pg_catalog, pg_temp SET intervalstyle = postgres AS %L', n, v.name, v.language, format($$
DECLARE
    v_id bigint;
    v_event_id uuid;
    v_created_at timestamptz;
    v_status text;
    v_event record;
    v_live boolean;
BEGIN%s
    RETURN NEW;
END
$$, v.body));
        EXECUTE format('CREATE TRIGGER adopted_%1$s_%2$s INSTEAD OF %3$s ON %4$s FOR EACH ROW '
                       'EXECUTE FUNCTION outbox.adopted_%1$s_%2$s()', n, v.name, v.events, relation);
    END LOOP;
    EXECUTE format('CREATE TRIGGER takes_no_new_rows BEFORE INSERT ON %s FOR EACH ROW EXECUTE FUNCTION outbox._refuse_row(%L)',
                   before, relation);
END
$make$;
COMMENT ON FUNCTION outbox._make_triggers(int, text, regclass, outbox.adopted_column[], jsonb, text) IS
    'makes the triggers of the view, and the one that keeps new rows out of the old table';

-- Default privileges may have given the new objects to anybody. The old owner may do with the view what can be done with a
-- view, and hand that on.
CREATE FUNCTION outbox._close_adopted(n int, relation text, before regclass) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_schema CONSTANT name := (SELECT s.nspname FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace WHERE c.oid = before);
    v_view CONSTANT text := format('outbox.adopted_%s', n);
    v_sequence text;
BEGIN
    EXECUTE format('REVOKE ALL ON FUNCTION %1$s_check(), %1$s_insert(), %1$s_change() FROM PUBLIC', v_view);
    EXECUTE format('ALTER FUNCTION %s_insert() OWNER TO outbox_owner', v_view);
    EXECUTE format('ALTER FUNCTION %s_change() OWNER TO outbox_owner', v_view);
    EXECUTE format('ALTER VIEW %s OWNER TO outbox_owner', v_view);
    EXECUTE format('ALTER VIEW %s OWNER TO outbox_owner', relation);
    PERFORM outbox._copy_grants(NULL, v_view::regclass);
    PERFORM outbox._copy_grants(before, relation::regclass);
    EXECUTE format('GRANT ALL ON %s TO %s WITH GRANT OPTION', relation,
                   (SELECT c.relowner::regrole FROM pg_class c WHERE c.oid = before AND c.relowner <> 'outbox_owner'::regrole));
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO outbox_owner', v_schema);
    EXECUTE format('GRANT SELECT, UPDATE, DELETE ON %s TO outbox_owner', before);
    FOR v_sequence IN SELECT pg_get_serial_sequence(before::text, a.attname) FROM pg_attribute a
                       WHERE a.attrelid = before AND a.attidentity <> '' LOOP
        EXECUTE format('GRANT USAGE ON SEQUENCE %s TO outbox_owner', v_sequence);
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._close_adopted(int, text, regclass) IS 'gives what adopt() made its owners and the old table''s grants';

-- The query that moves rows from the old table, in their order: by a key that counts up, else by time, else as they lie there.
CREATE FUNCTION outbox._move_query(
    n int, before regclass, columns outbox.adopted_column[], statuses jsonb, zone text, condition text, to_dead text) RETURNS text
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
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
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET intervalstyle = postgres
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
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v record;
BEGIN
    FOR v IN SELECT format('foreign key %I', k.conname) AS what, 'does not hold for new events' AS why
               FROM pg_constraint k WHERE k.conrelid = before AND k.contype = 'f'
             UNION ALL
             SELECT format('publication %I', p.pubname), 'has no new rows of this table'
               FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE r.prrelid = before LOOP
        RAISE WARNING USING MESSAGE = format('%s of %s %s', v.what, relation, v.why), ERRCODE = 'warning';
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
                           THEN format('CASE s."event status" WHEN ''processing'' THEN %L ELSE s.%I END', v.words ->> 'pending', c.name)
                           ELSE format('s.%I', c.name) END, ', ' ORDER BY c.number)
      INTO v_names, v_values FROM outbox._columns_of(v_before) c WHERE c.generated IS NULL;
    EXECUTE format('GRANT INSERT ON %s TO outbox_owner', v_before);
    -- A table that says of no row that it was sent gets back what was not.
    v_count := outbox._as_owner(format(
        'WITH back AS (INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE SELECT %s FROM outbox.adopted_%s s WHERE %s ORDER BY s."event" RETURNING 1) '
        'SELECT count(*) FROM back', v_before, v_names, v_values, v.source,
        CASE WHEN v.status_column IS NULL THEN 's."event status" <> ''processed''' ELSE 'true' END));
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

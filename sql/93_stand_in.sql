-- Moving in, second part: what stands in the place of the application's table.
--
--   the old table     is renamed to NAME_before, keeps what was processed, and takes no new rows
--   outbox.adopted_N  a view: the events of this table in outbox_events, in the table's own columns
--   the new view      has the table's name, columns, defaults and grants: outbox.adopted_N and NAME_before together
--   its triggers      adopted_N_check, as the application: generated columns, NOT NULL, CHECK;
--                     adopted_N_insert and adopted_N_change, as outbox_owner: they write outbox_events

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

-- Whoever has a privilege on the one has it on the other, and nobody else has.
CREATE FUNCTION outbox._copy_grants(from_relation regclass, to_relation regclass) RETURNS void
    LANGUAGE plpgsql
AS $$
DECLARE
    v_owner CONSTANT oid := (SELECT c.relowner FROM pg_class c WHERE c.oid = to_relation);
    v record;
BEGIN
    -- This takes those of columns too.
    FOR v IN SELECT x.grantee FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) x
              WHERE c.oid = to_relation AND x.grantee <> v_owner
             UNION
             SELECT x.grantee FROM pg_attribute a CROSS JOIN LATERAL aclexplode(a.attacl) x
              WHERE a.attrelid = to_relation AND x.grantee <> v_owner LOOP
        EXECUTE format('REVOKE ALL ON %s FROM %s CASCADE', to_relation,
                       CASE v.grantee WHEN 0 THEN 'PUBLIC' ELSE v.grantee::regrole::text END);
    END LOOP;
    FOR v IN SELECT x.grantee, x.privilege_type, x.is_grantable, NULL::name AS name
               FROM pg_class c CROSS JOIN LATERAL aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) x
              WHERE c.oid = from_relation
             UNION ALL
             SELECT x.grantee, x.privilege_type, x.is_grantable, a.attname
               FROM pg_attribute a CROSS JOIN LATERAL aclexplode(a.attacl) x
              WHERE a.attrelid = from_relation AND NOT a.attisdropped LOOP
        CONTINUE WHEN v.grantee IN (v_owner, 'outbox_owner'::regrole);
        EXECUTE format('GRANT %s%s ON %s TO %s%s', v.privilege_type,
                       CASE WHEN v.name IS NULL THEN '' ELSE format(' (%I)', v.name) END, to_relation,
                       CASE v.grantee WHEN 0 THEN 'PUBLIC' ELSE v.grantee::regrole::text END,
                       CASE WHEN v.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._copy_grants(regclass, regclass) IS 'gives one relation the grants of another';

-- The statements that make the view outbox.adopted_N and the one in the old table's place. "its event", "its status": for
-- release_adopted().
CREATE FUNCTION outbox._make_views(n int, relation text, before regclass, columns outbox.adopted_column[], words jsonb, zone text)
    RETURNS void
    LANGUAGE plpgsql
AS $$
DECLARE
    v_names CONSTANT text := (SELECT string_agg(quote_ident(c.name), ', ' ORDER BY c.number) FROM unnest(columns) c);
    v record;
BEGIN
    EXECUTE format('CREATE VIEW outbox.adopted_%s AS SELECT %s, "its event", "its status" FROM (SELECT %s, e.id AS "its event", '
                   'e.status AS "its status" FROM outbox.adopted_event a JOIN @extschema@.outbox_events e ON e.id = a.event '
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
    LANGUAGE plpgsql
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
        MESSAGE = format('%s in %I can''t be changed', what, relation),
        DETAIL = 'pg_outbox delivers it: claims and settlements decide its status.',
        HINT = 'Stop the job that polls this table. outbox.replay() delivers an event again; a DELETE takes it back.';
END
$$;
COMMENT ON FUNCTION outbox._refuse_change(name, text) IS 'refuses an UPDATE that the deliveries of an event contradict';

-- The statements that add an event from the row NEW.
CREATE FUNCTION outbox._insert_statements(n int, before regclass, columns outbox.adopted_column[], statuses jsonb, zone text)
    RETURNS text
    LANGUAGE plpgsql STABLE
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
    LANGUAGE plpgsql STABLE
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
            PERFORM outbox._refuse_change(TG_TABLE_NAME, 'key, type, aggregate, tenant and time of an event');
        ELSIF v_status <> coalesce(%s, 'unknown') AND (v_event.given OR v_status NOT IN ('pending', 'processed')) THEN
            PERFORM outbox._refuse_change(TG_TABLE_NAME, 'this status of an event');
        END IF;
        UPDATE @extschema@.outbox_events e SET %s WHERE e.id = v_event.id;
        IF NOT v_event.given AND v_status <> v_event.status AND v_status IN ('pending', 'processed') THEN
            UPDATE @extschema@.outbox_events e
               SET status = v_status, processed_at = CASE v_status WHEN 'processed' THEN coalesce(%s, clock_timestamp()) END
             WHERE e.id = v_event.id;
        END IF;
        RETURN NEW;
    END IF;$$, coalesce(v_status, 'v_event.status'),
        (SELECT string_agg(format('(%s) IS DISTINCT FROM (%s)', outbox._as_text(c, 'NEW'), outbox._as_text(c, 'OLD')), ' OR ' ORDER BY c.number)
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
    LANGUAGE plpgsql
AS $make$
DECLARE
    v record;
BEGIN
    FOR v IN SELECT * FROM (VALUES
            ('insert', 'INSERT', 'plpgsql', outbox._insert_statements(n, before, columns, statuses, zone)),
            ('change', 'UPDATE OR DELETE', 'outbox_plpgsql', outbox._change_statements(n, before, columns, statuses, zone)))
            AS x (name, events, language, body) LOOP
        EXECUTE format('CREATE FUNCTION outbox.adopted_%s_%s() RETURNS trigger LANGUAGE %s SECURITY DEFINER '
                       'SET search_path = pg_catalog, pg_temp SET datestyle = ''ISO, YMD'' SET intervalstyle = postgres AS %L', n, v.name, v.language, format($$
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

-- What outbox_owner needs, to look at the table and to move its rows.
CREATE FUNCTION outbox._grant_owner(source regclass) RETURNS void
    LANGUAGE plpgsql
AS $$
DECLARE
    v_sequence text;
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO outbox_owner',
                   (SELECT s.nspname FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace WHERE c.oid = source));
    EXECUTE format('GRANT SELECT, UPDATE, DELETE ON %s TO outbox_owner', source);
    FOR v_sequence IN SELECT pg_get_serial_sequence(source::text, a.attname) FROM pg_attribute a
                       WHERE a.attrelid = source AND a.attidentity <> '' LOOP
        EXECUTE format('GRANT USAGE ON SEQUENCE %s TO outbox_owner', v_sequence);
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._grant_owner(regclass) IS 'grants outbox_owner what taking over a table needs';

-- Default privileges may have given the new objects to anybody. The old owner may do with the view what can be done with a
-- view, and hand that on.
CREATE FUNCTION outbox._close_adopted(n int, relation text, before regclass) RETURNS void
    LANGUAGE plpgsql
AS $$
DECLARE
    v_view CONSTANT text := format('outbox.adopted_%s', n);
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
END
$$;
COMMENT ON FUNCTION outbox._close_adopted(int, text, regclass) IS 'gives what adopt() made its owners and the old table''s grants';

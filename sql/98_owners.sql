-- Whose everything is, and that nobody else has a right to it. Install and upgrade scripts end with this.

CREATE FUNCTION outbox._owner_of(kind text, definer boolean, identity text) RETURNS name
    LANGUAGE sql IMMUTABLE
RETURN CASE WHEN kind IN ('function', 'view', 'table') AND identity LIKE ANY (ARRAY[
                     'outbox.secret', 'outbox.hidden', 'outbox.destinations', 'outbox.relay\_destinations(%',
                     'outbox.add\_webhook(%', 'outbox.alter\_destination(%', 'outbox.rotate\_secret(%', 'outbox.\_forget\_secrets(%',
                     'outbox.\_secrets\_end(%', 'outbox.\_sessions(%']) THEN 'outbox_keeper'
            WHEN kind IN ('table', 'view', 'sequence') OR definer THEN 'outbox_owner' END;
COMMENT ON FUNCTION outbox._owner_of(text, boolean, text) IS 'whose a member of the extension is to be; null: it stays as it is';

-- closed: this was done before, and what was granted since then stays. (pg_upgrade forgets initial privileges that are
-- PostgreSQL's defaults for the owner.)
CREATE FUNCTION outbox._members(
    OUT kind text, OUT identity text, OUT object oid, OUT definer boolean, OUT guardable boolean, OUT follows boolean,
    OUT owner oid, OUT acl aclitem[], OUT closed boolean) RETURNS SETOF record
    LANGUAGE sql STABLE
AS $$
    SELECT i.type, i.identity, d.objid, coalesce(p.prosecdef, false),
           coalesce(p.prosecdef AND l.lanname = 'plpgsql', false),
           EXISTS (SELECT FROM pg_depend f WHERE f.classid = d.classid AND f.objid = d.objid AND f.deptype = 'i'),
           coalesce(p.proowner, c.relowner, t.typowner, n.nspowner),
           CASE WHEN p.oid IS NOT NULL THEN coalesce(p.proacl, acldefault('f', p.proowner))
                WHEN c.oid IS NOT NULL
                     THEN coalesce(c.relacl, acldefault(CASE c.relkind WHEN 'S' THEN 's'::"char" ELSE 'r' END, c.relowner))
                WHEN t.oid IS NOT NULL THEN coalesce(t.typacl, acldefault('T', t.typowner))
                ELSE coalesce(n.nspacl, acldefault('n', n.nspowner)) END,
           coalesce(p.proowner, c.relowner) IN ('outbox_owner'::regrole, 'outbox_keeper'::regrole)
             OR EXISTS (SELECT FROM pg_init_privs v
                         WHERE v.classoid = d.classid AND v.objoid = d.objid AND v.objsubid = 0 AND v.privtype = 'e')
      FROM pg_depend d
      JOIN pg_extension x ON x.oid = d.refobjid AND x.extname = 'pg_outbox'
     CROSS JOIN LATERAL pg_identify_object(d.classid, d.objid, 0) i
      LEFT JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
      LEFT JOIN pg_language l ON l.oid = p.prolang
      LEFT JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid
      LEFT JOIN pg_type t ON d.classid = 'pg_type'::regclass AND t.oid = d.objid
      LEFT JOIN pg_namespace n ON d.classid = 'pg_namespace'::regclass AND n.oid = d.objid
     WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
       AND i.type IN ('function', 'table', 'view', 'sequence', 'type', 'schema')
       -- An array has its element's privileges; from PostgreSQL 18 on it is a member too.
       AND t.typcategory IS DISTINCT FROM 'A'
       -- The row type of a table or view is a member from PostgreSQL 17 on. Were its privileges others than at first, pg_dump
       -- would warn of it each time.
       AND NOT EXISTS (SELECT FROM pg_class r WHERE r.oid = t.typrelid AND r.relkind <> 'c')
$$;
COMMENT ON FUNCTION outbox._members() IS 'the objects of the extension that have privileges';

-- Default privileges may have granted the new objects to anybody: each right is taken back from each who has it, PUBLIC
-- included. What runs with its caller's rights is then for the two owners, who call it.
CREATE FUNCTION outbox._close() RETURNS void
    LANGUAGE plpgsql SET check_function_bodies = off
AS $$
DECLARE
    v_superusers CONSTANT text := '^outbox\.(grant_.*|_grant_apart|_grant_again|_close|_members|_owner_of|adopt|release_adopted)\(';
    v record;
    v_object text;
    v_grantee oid;
BEGIN
    FOR v IN SELECT m.*, outbox._owner_of(m.kind, m.definer, m.identity) AS wanted FROM outbox._members() m LOOP
        v_object := format('%s %s', CASE v.kind WHEN 'view' THEN 'table' ELSE v.kind END, v.identity);
        IF v.guardable AND v.identity NOT LIKE 'outbox.publish(%' THEN
            EXECUTE regexp_replace(pg_get_functiondef(v.object), '\n LANGUAGE plpgsql\n', E'\n LANGUAGE outbox_plpgsql\n');
        END IF;
        -- To give a table to its owner again would still wait for everybody who reads or writes it.
        IF v.wanted IS NOT NULL AND NOT v.follows AND v.owner <> to_regrole(v.wanted::text) THEN
            EXECUTE format('ALTER %s OWNER TO %I', v_object, v.wanted);
        END IF;
        CONTINUE WHEN v.closed;
        FOR v_grantee IN SELECT DISTINCT a.grantee FROM aclexplode(v.acl) a WHERE a.grantee NOT IN (v.owner, 0) LOOP
            EXECUTE format('REVOKE ALL ON %s FROM %s CASCADE', v_object, v_grantee::regrole);
        END LOOP;
        -- Also where PUBLIC has none: pg_dump is to know with which privileges the object began.
        EXECUTE format('REVOKE ALL ON %s FROM PUBLIC', v_object);
        IF v.kind = 'function' AND NOT v.definer AND v.identity !~ v_superusers THEN
            EXECUTE format('GRANT EXECUTE ON %s TO outbox_owner, outbox_keeper', v_object);
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._close() IS
    'gives new objects their owners, puts definers under guard, and takes all privileges from everybody else';

-- What pg_dump is to see, as all that was granted to roles of the operator's own: see outbox._grant_apart().
CREATE FUNCTION outbox._grant_again() RETURNS void
    LANGUAGE plpgsql
AS $$
DECLARE
    v record;
BEGIN
    FOR v IN SELECT part.grants, a.grantee::regrole AS role
               FROM (VALUES ('outbox.grant_producer', 'outbox.publish'), ('outbox.grant_relay', 'outbox.relay_destinations'),
                            ('outbox.grant_monitor', 'outbox.health'), ('outbox.grant_operator', 'outbox.remove_destination'))
                    AS part (grants, sign)
               JOIN pg_proc p ON p.oid = part.sign::regproc
              CROSS JOIN LATERAL aclexplode(p.proacl) a
              WHERE a.grantee NOT IN (0, p.proowner, 'outbox_owner'::regrole, 'outbox_keeper'::regrole)
              ORDER BY 1, 2 LOOP
        PERFORM outbox._grant_apart(format('SELECT %s(%L)', v.grants, v.role));
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._grant_again() IS
    'for an upgrade: grants producers, relays, monitors and operators what their part takes by now';

SELECT outbox._close();

-- What the owners need of each other.
GRANT USAGE ON SCHEMA outbox TO outbox_owner, outbox_keeper;
GRANT SELECT ON outbox.destination TO outbox_keeper;
GRANT EXECUTE ON FUNCTION outbox._put_destination, outbox._destinations_changed, outbox._lock_for_secrets TO outbox_keeper;
GRANT SELECT ON outbox.destinations TO outbox_owner;
GRANT EXECUTE ON FUNCTION outbox._forget_secrets, outbox._secrets_end, outbox._sessions TO outbox_owner;

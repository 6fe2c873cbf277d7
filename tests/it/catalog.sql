-- What an extension consists of, a line for each object and property, to compare one database with another.
WITH member AS (
    SELECT d.classid, d.objid, i.type, i.identity
      FROM pg_depend d
      JOIN pg_extension x ON x.oid = d.refobjid AND x.extname = 'pg_outbox'
     CROSS JOIN LATERAL pg_identify_object(d.classid, d.objid, 0) i
     WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
), relation AS (
    SELECT m.identity, c.* FROM member m JOIN pg_class c ON m.classid = 'pg_class'::regclass AND c.oid = m.objid
    UNION ALL
    SELECT m.identity, c.*
      FROM member m JOIN pg_type t ON m.classid = 'pg_type'::regclass AND t.oid = m.objid
      JOIN pg_class c ON c.oid = t.typrelid AND c.relkind = 'c'
)
SELECT format('%s %s %s: %s', type, identity, property, coalesce(value, '(none)')) AS line FROM (
    SELECT m.type, m.identity, 'comment' AS property, obj_description(m.objid, m.classid::regclass::name) AS value FROM member m
    UNION ALL
    SELECT m.type, m.identity, 'privileges at first', (
        SELECT string_agg(format('%s=%s/%s', a.grantee::regrole, a.privilege_type, a.grantor::regrole), ' '
                          ORDER BY a.grantee::regrole::text, a.privilege_type)
          FROM pg_init_privs v CROSS JOIN LATERAL aclexplode(v.initprivs) a
         WHERE v.classoid = m.classid AND v.objoid = m.objid)
      FROM member m
    UNION ALL
    SELECT 'function', m.identity, property.name, property.value
      FROM member m JOIN pg_proc p ON m.classid = 'pg_proc'::regclass AND p.oid = m.objid
     CROSS JOIN LATERAL (VALUES
        ('definition', pg_get_functiondef(p.oid)), ('owner', p.proowner::regrole::text),
        ('privileges', (SELECT string_agg(format('%s=%s/%s', a.grantee::regrole, a.privilege_type, a.grantor::regrole), ' '
                                          ORDER BY a.grantee::regrole::text, a.privilege_type) FROM aclexplode(p.proacl) a))
     ) AS property (name, value)
    UNION ALL
    SELECT 'relation', r.identity, property.name, property.value
      FROM relation r
     CROSS JOIN LATERAL (VALUES
        ('owner', r.relowner::regrole::text), ('kind', r.relkind::text), ('options', r.reloptions::text),
        ('row security', r.relrowsecurity::text), ('view', CASE r.relkind WHEN 'v' THEN pg_get_viewdef(r.oid) END),
        ('privileges', (SELECT string_agg(format('%s=%s/%s', a.grantee::regrole, a.privilege_type, a.grantor::regrole), ' '
                                          ORDER BY a.grantee::regrole::text, a.privilege_type) FROM aclexplode(r.relacl) a)),
        ('configuration', (SELECT format('%s %L', n > 0, x.extcondition[n])
                             FROM pg_extension x CROSS JOIN LATERAL array_position(x.extconfig, r.oid) n
                            WHERE x.extname = 'pg_outbox'))
     ) AS property (name, value)
    UNION ALL
    SELECT 'column', format('%s.%I', r.identity, a.attname), property.name, property.value
      FROM relation r JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
      LEFT JOIN pg_attrdef f ON f.adrelid = r.oid AND f.adnum = a.attnum
     CROSS JOIN LATERAL (VALUES
        ('type', format_type(a.atttypid, a.atttypmod)), ('not null', a.attnotnull::text), ('storage', a.attstorage::text),
        ('identity', a.attidentity::text), ('generated', a.attgenerated::text), ('default', pg_get_expr(f.adbin, f.adrelid)),
        ('privileges', a.attacl::text), ('comment', col_description(r.oid, a.attnum))
     ) AS property (name, value)
    UNION ALL
    SELECT 'constraint', format('%s.%I', r.identity, k.conname), 'definition', pg_get_constraintdef(k.oid)
      FROM relation r JOIN pg_constraint k ON k.conrelid = r.oid
    UNION ALL
    SELECT 'index', format('%s.%s', r.identity, i.indexrelid::regclass), 'definition', pg_get_indexdef(i.indexrelid)
      FROM relation r JOIN pg_index i ON i.indrelid = r.oid
    UNION ALL
    SELECT 'trigger', format('%s.%I', r.identity, t.tgname), 'definition', pg_get_triggerdef(t.oid) || t.tgenabled::text
      FROM relation r JOIN pg_trigger t ON t.tgrelid = r.oid AND NOT t.tgisinternal
    UNION ALL
    SELECT 'event trigger', e.evtname, 'definition',
           format('%s %s %s %s %s', e.evtevent, e.evtowner::regrole, e.evtfoid::regproc, e.evtenabled, e.evttags)
      FROM member m JOIN pg_event_trigger e ON m.classid = 'pg_event_trigger'::regclass AND e.oid = m.objid
    UNION ALL
    SELECT 'language', l.lanname, 'definition',
           format('%s %s %s %s %s', l.lanowner::regrole, l.lanplcallfoid::regproc, l.laninline, l.lanvalidator, l.lanacl)
      FROM member m JOIN pg_language l ON m.classid = 'pg_language'::regclass AND l.oid = m.objid
) AS x ORDER BY line

-- Health: what is wrong, and what to do about it.

-- Without query texts and client addresses.
CREATE FUNCTION outbox._sessions()
    RETURNS TABLE (pid int, datname name, usename name, application_name text, backend_type text, state text,
                   wait_event_type text, wait_event text, xact_start timestamptz, query_start timestamptz,
                   state_change timestamptz, backend_xid xid, backend_xmin xid)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT a.pid, a.datname, a.usename, a.application_name, a.backend_type, a.state, a.wait_event_type, a.wait_event,
           a.xact_start, a.query_start, a.state_change, a.backend_xid, a.backend_xmin
      FROM pg_stat_activity a
$$;
COMMENT ON FUNCTION outbox._sessions() IS 'the sessions of the server, for which the owner of health() has no rights of its own';

-- Objects of others on the extension's tables. essential: one that changes what happens there; the others can only keep
-- events from being removed.
CREATE FUNCTION outbox._foreign_objects(OUT what text, OUT essential boolean) RETURNS SETOF record
    LANGUAGE sql STABLE
AS $$
    WITH own AS MATERIALIZED (
        SELECT d.classid, d.objid FROM pg_depend d JOIN pg_extension x ON x.oid = d.refobjid
         WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e' AND x.extname = 'pg_outbox'
    ), tab AS MATERIALIZED (
        SELECT c.oid, c.relrowsecurity, c.relforcerowsecurity, c.relowner = 'outbox_keeper'::regrole AS secret
          FROM own o JOIN pg_class c ON c.oid = o.objid WHERE o.classid = 'pg_class'::regclass AND c.relkind = 'r'
    )
    SELECT format('%strigger %I on %s (function %s of %s)', CASE WHEN t.tgdeferrable THEN 'deferrable ' END, t.tgname,
                  t.tgrelid::regclass, p.oid::regprocedure, p.proowner::regrole), true
      FROM pg_trigger t JOIN tab ON tab.oid = t.tgrelid JOIN pg_proc p ON p.oid = t.tgfoid
     WHERE NOT t.tgisinternal AND NOT EXISTS (SELECT FROM own o WHERE o.classid = 'pg_proc'::regclass AND o.objid = p.oid)
    UNION ALL
    SELECT format('rule %I on %s', r.rulename, r.ev_class::regclass), true
      FROM pg_rewrite r JOIN tab ON tab.oid = r.ev_class
    UNION ALL
    SELECT format('policy %I on %s', p.polname, p.polrelid::regclass), true
      FROM pg_policy p JOIN tab ON tab.oid = p.polrelid
    UNION ALL
    SELECT format('row security of %s', tab.oid::regclass), true
      FROM tab WHERE tab.relforcerowsecurity OR tab.relrowsecurity <> tab.secret
    UNION ALL
    SELECT format('%s inherits from %s', i.inhrelid::regclass, i.inhparent::regclass), true
      FROM pg_inherits i WHERE EXISTS (SELECT FROM tab WHERE tab.oid IN (i.inhrelid, i.inhparent))
    UNION ALL
    SELECT format('deferrable constraint %I on %s', c.conname, c.conrelid::regclass), true
      FROM pg_constraint c JOIN tab ON tab.oid = c.conrelid WHERE c.condeferrable AND c.contype <> 't'
    UNION ALL
    SELECT format('foreign key %I of %s', c.conname, c.conrelid::regclass), false
      FROM pg_constraint c JOIN tab ON tab.oid = c.confrelid
     WHERE c.contype = 'f' AND NOT EXISTS (SELECT FROM tab x WHERE x.oid = c.conrelid)
$$;
COMMENT ON FUNCTION outbox._foreign_objects() IS 'triggers, rules, policies, children and foreign keys that others made';

-- too_long: dead rows pile up because of it. since null: it is no transaction, and does not end by itself.
CREATE FUNCTION outbox._vacuum_holders(OUT detail text, OUT since timestamptz, OUT too_long boolean) RETURNS SETOF record
    LANGUAGE sql STABLE
AS $$
    SELECT h.detail, h.since, coalesce(h.since < clock_timestamp() - interval '5 minutes', true)
      FROM (
        SELECT format('pid %s (%s), transaction open for %s', a.pid, coalesce(nullif(a.application_name, ''), a.backend_type),
                      clock_timestamp() - a.xact_start) AS detail, a.xact_start AS since
          FROM outbox._sessions() a
         WHERE (a.backend_xmin IS NOT NULL OR a.backend_xid IS NOT NULL) AND a.pid <> pg_backend_pid()
           AND a.datname = current_database()
        UNION ALL
        SELECT format('standby %s (pid %s), by hot_standby_feedback', coalesce(nullif(a.application_name, ''), '?'), a.pid), NULL
          FROM outbox._sessions() a WHERE a.backend_type = 'walsender' AND age(a.backend_xmin) > 1000000
        UNION ALL
        SELECT format('prepared transaction %s', p.gid), p.prepared FROM pg_prepared_xacts p
        UNION ALL
        SELECT format('replication slot %s', s.slot_name), NULL FROM pg_replication_slots s
         WHERE (s.xmin IS NOT NULL OR s.catalog_xmin IS NOT NULL)
           AND (NOT s.active OR greatest(age(s.xmin), age(s.catalog_xmin)) > 1000000)
      ) AS h (detail, since)
$$;
COMMENT ON FUNCTION outbox._vacuum_holders() IS 'who keeps vacuum from removing dead rows of this database';

CREATE FUNCTION outbox.health(OUT check_name text, OUT ok boolean, OUT detail text, OUT hint text) RETURNS SETOF record
    LANGUAGE plpgsql SECURITY DEFINER ROWS 11 SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_stats record;
    v_version text := (SELECT x.extversion FROM pg_extension x WHERE x.extname = 'pg_outbox');
    v_disabled text;
    v_usage float8 := pg_notification_queue_usage();
BEGIN
    SELECT * INTO v_stats FROM outbox.stats();
    RETURN QUERY SELECT 'preload', outbox._preloaded(), 'library in shared_preload_libraries',
        'Add pg_outbox to shared_preload_libraries and restart PostgreSQL.';
    RETURN QUERY SELECT 'versions', outbox._library_version() = v_version,
        format('library %s, SQL %s', outbox._library_version(), v_version),
        'Restart PostgreSQL after installing a new library, then run ALTER EXTENSION pg_outbox UPDATE.';
    RETURN QUERY SELECT 'worker', coalesce(v_stats.worker_pid, 0) <> 0,
        coalesce('pid ' || nullif(v_stats.worker_pid, 0) || ', ', '') || coalesce(v_stats.worker_state, 'no worker'),
        'See the server log; max_worker_processes must leave room for a launcher and one worker a database.';
    SELECT string_agg(t.tgname, ', ') INTO v_disabled
      FROM pg_trigger t
     WHERE t.tgrelid = '@extschema@.outbox_events'::regclass AND t.tgname IN ('after_outbox_insert', 'after_outbox_change')
       AND t.tgenabled NOT IN ('O', 'A');
    RETURN QUERY SELECT 'trigger', v_disabled IS NULL, coalesce('disabled: ' || v_disabled, 'enabled'),
        'ALTER TABLE outbox_events ENABLE TRIGGER after_outbox_insert;';
    RETURN QUERY SELECT 'foreign_objects', coalesce(NOT bool_or(f.essential), true),
        coalesce(string_agg(f.what, '; ' ORDER BY f.essential DESC, f.what), 'none'),
        'What runs in claims and in the worker runs as outbox_owner: drop what is not wanted, and revoke TRIGGER and '
        'REFERENCES on outbox_events. Foreign keys keep the events that they point to.'
      FROM outbox._foreign_objects() f;
    RETURN QUERY SELECT 'consumers', coalesce(v_stats.consumers, 0) > 0,
        coalesce((SELECT string_agg(format('%s (pid %s)', a.consumer, a.pid), ', ') FROM outbox._attachments() a), 'none attached'),
        'Start outbox-relay with DATABASE_URL set to this database.';
    RETURN QUERY SELECT 'oldest_pending', coalesce(v_stats.oldest_pending, interval '0') < interval '1 minute',
        CASE WHEN v_stats.oldest_pending IS NULL THEN 'nothing waits'
             ELSE format('%s pending, the oldest for %s', v_stats.pending, v_stats.oldest_pending) END,
        'Look at outbox.destinations for one that is paused or down, and at last_error in outbox.deliveries.';
    RETURN QUERY SELECT 'destinations', count(*) FILTER (WHERE d.circuit_failures > 0 OR d.unable_at IS NOT NULL OR d.disabled_reason IS NOT NULL) = 0,
        coalesce(string_agg(format('%s: %s', d.name, coalesce('disabled, ' || d.disabled_reason, d.last_error)), '; ')
                     FILTER (WHERE d.circuit_failures > 0 OR d.unable_at IS NOT NULL OR d.disabled_reason IS NOT NULL), format('%s, none down', count(*))),
        'Mend the destination; outbox.resume(name) tries it at once.'
      FROM outbox.destination d;
    RETURN QUERY SELECT 'dead_letters', v_stats.failed = 0, format('%s failed', v_stats.failed),
        'See outbox.deliveries; outbox.replay_failed() tries again, outbox.purge_failed() removes.';
    RETURN QUERY SELECT 'restore', count(*) = 0,
        coalesce(string_agg(format('%s: %s', x.kind, x.found), '; '), 'nothing contradicts itself'),
        'Wait until the restore is complete; then run outbox.repair().'
      FROM outbox.contradiction x;
    RETURN QUERY
        SELECT 'vacuum', NOT coalesce(bool_or(h.too_long), false),
               coalesce((array_agg(h.detail ORDER BY h.since NULLS FIRST))[1], 'nobody holds it back'),
               'End the oldest transaction or drop the unused slot: vacuum can''t remove dead rows before that.'
          FROM outbox._vacuum_holders() h;
    RETURN QUERY
        WITH turn AS (
            SELECT l.pid, p.gid, l.granted, l.mode, coalesce(a.xact_start, p.prepared) AS since,
                   format('%s (%s), %s', coalesce('pid ' || l.pid, 'prepared transaction ' || p.gid),
                          coalesce(nullif(a.application_name, ''), a.backend_type, 'no session'),
                          CASE WHEN a.wait_event_type = 'Lock' THEN 'waiting for pid '
                                    || coalesce((SELECT string_agg(b.pid || ' (' || x.state || ')', ', ')
                                                   FROM unnest(pg_blocking_pids(l.pid)) AS b (pid)
                                                   LEFT JOIN outbox._sessions() x ON x.pid = b.pid), '?')
                               ELSE coalesce(a.state, 'prepared') END) AS who
              FROM pg_locks l
              LEFT JOIN outbox._sessions() a ON a.pid = l.pid
              LEFT JOIN pg_prepared_xacts p ON l.virtualtransaction = '-1/' || p.transaction
             WHERE l.locktype = 'relation' AND l.relation = 'outbox.claim_lock'::regclass AND l.mode <> 'AccessShareLock'
               AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
        )
        SELECT 'claims_lock', count(*) FILTER (WHERE t.granted AND t.since < clock_timestamp() - interval '2 seconds') = 0,
               coalesce((array_agg(format('held by %s, since %s', t.who, t.since) ORDER BY t.since) FILTER (WHERE t.granted))[1]
                            || format(', %s wait', count(*) FILTER (WHERE NOT t.granted)),
                        'nobody holds it'),
               'Claims, settlements and releases take turns: end that transaction, or the one that it waits for.'
          FROM turn t;
    RETURN QUERY SELECT 'notification_queue', v_usage < 0.5, format('%s %% in use', round((v_usage * 100)::numeric, 1)),
        'A session that listens sits in a long transaction: see pg_stat_activity.';
END
$$;
COMMENT ON FUNCTION outbox.health() IS 'one row for each check: whether it is well, what was found, and what to do if it is not';

-- What is wrong, and what to do about it.

CREATE FUNCTION outbox.health(OUT check_name text, OUT ok boolean, OUT detail text, OUT hint text) RETURNS SETOF record
    LANGUAGE plpgsql SECURITY DEFINER ROWS 10 SET search_path = pg_catalog, pg_temp
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
    RETURN QUERY SELECT 'consumers', coalesce(v_stats.consumers, 0) > 0,
        coalesce((SELECT string_agg(format('%s (pid %s)', a.consumer, a.pid), ', ') FROM outbox._attachments() a), 'none attached'),
        'Start outbox-relay with DATABASE_URL set to this database.';
    RETURN QUERY SELECT 'oldest_pending', coalesce(v_stats.oldest_pending, interval '0') < interval '1 minute',
        CASE WHEN v_stats.oldest_pending IS NULL THEN 'nothing waits'
             ELSE format('%s pending, the oldest for %s', v_stats.pending, v_stats.oldest_pending) END,
        'Look at outbox.destinations for one that is paused or down, and at last_error in outbox.deliveries.';
    RETURN QUERY SELECT 'destinations', count(*) FILTER (WHERE d.circuit_failures > 0 OR d.disabled_reason IS NOT NULL) = 0,
        coalesce(string_agg(format('%s: %s', d.name, coalesce('disabled, ' || d.disabled_reason, d.last_error)), '; ')
                     FILTER (WHERE d.circuit_failures > 0 OR d.disabled_reason IS NOT NULL), format('%s, none down', count(*))),
        'Mend the destination; outbox.resume(name) tries it at once.'
      FROM outbox.destination d;
    RETURN QUERY SELECT 'dead_letters', v_stats.failed = 0, format('%s failed', v_stats.failed),
        'See outbox.deliveries; outbox.replay_failed() tries again, outbox.purge_failed() removes.';
    RETURN QUERY SELECT 'restore', count(*) = 0,
        coalesce(string_agg(format('%s: %s', x.kind, x.found), '; '), 'nothing contradicts itself'),
        'Wait until the restore is complete; then run outbox.repair().'
      FROM outbox.contradiction x;
    RETURN QUERY
        WITH holder AS (
            SELECT format('pid %s (%s), transaction open for %s', a.pid, coalesce(nullif(a.application_name, ''), a.backend_type),
                          clock_timestamp() - a.xact_start) AS detail, a.xact_start AS since
              FROM pg_stat_activity a
             WHERE (a.backend_xmin IS NOT NULL OR a.backend_xid IS NOT NULL) AND a.pid <> pg_backend_pid()
               AND a.datname = current_database()
            UNION ALL
            SELECT format('standby %s (pid %s), by hot_standby_feedback', coalesce(nullif(a.application_name, ''), '?'), a.pid), NULL
              FROM pg_stat_activity a WHERE a.backend_type = 'walsender' AND age(a.backend_xmin) > 1000000
            UNION ALL
            SELECT format('prepared transaction %s', p.gid), p.prepared FROM pg_prepared_xacts p
            UNION ALL
            SELECT format('replication slot %s', s.slot_name), NULL FROM pg_replication_slots s
             WHERE (s.xmin IS NOT NULL OR s.catalog_xmin IS NOT NULL)
               AND (NOT s.active OR greatest(age(s.xmin), age(s.catalog_xmin)) > 1000000)
        )
        SELECT 'vacuum', count(*) FILTER (WHERE h.since IS NULL OR h.since < clock_timestamp() - interval '5 minutes') = 0,
               coalesce((array_agg(h.detail ORDER BY h.since NULLS FIRST))[1], 'nobody holds it back'),
               'End the oldest transaction or drop the unused slot: vacuum can''t remove dead rows before that.'
          FROM holder h;
    RETURN QUERY SELECT 'notification_queue', v_usage < 0.5, format('%s %% in use', round((v_usage * 100)::numeric, 1)),
        'A session that listens sits in a long transaction: see pg_stat_activity.';
END
$$;
COMMENT ON FUNCTION outbox.health() IS 'one row a check: whether it is well, what was seen, what to do if not';

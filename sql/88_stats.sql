-- Statistics, at a price that does not depend on the number of events.

CREATE FUNCTION outbox._oldest_pending() RETURNS interval
    LANGUAGE plpgsql VOLATILE
    SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off
    SET enable_mergejoin = off SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_low_water bigint := outbox._low_water(false);
BEGIN
    RETURN clock_timestamp() - least(
        (SELECT e.created_at FROM @extschema@.outbox_events e
          WHERE e.id >= v_low_water AND e.status = 'pending' AND NOT e.listed AND e.available_at IS NULL ORDER BY e.id LIMIT 1),
        (SELECT greatest(e.available_at, e.created_at) FROM @extschema@.outbox_events e
          WHERE e.available_at <= clock_timestamp() AND e.available_at IS NOT NULL AND NOT e.routed
            AND e.status = 'pending' AND NOT e.listed
          ORDER BY e.available_at LIMIT 1),
        (SELECT min(x.created_at)
           FROM (SELECT t.name FROM outbox.destination t WHERE t.next_due IS NOT NULL UNION ALL SELECT '') t
          CROSS JOIN LATERAL (
                SELECT e.created_at
                  FROM (SELECT d.id FROM outbox.delivery d
                         WHERE d.destination = t.name AND d.status = 'pending' AND d.next_attempt_at IS NOT NULL
                         ORDER BY d.next_attempt_at, d.id LIMIT 100) d
                 CROSS JOIN LATERAL (SELECT y.created_at FROM @extschema@.outbox_events y WHERE y.id = d.id OFFSET 0) e) x));
END
$$;
COMMENT ON FUNCTION outbox._oldest_pending() IS 'age of the oldest event that waits and is not scheduled for later';

CREATE FUNCTION outbox.stats(
    OUT pending bigint, OUT processing bigint, OUT processed bigint, OUT failed bigint, OUT oldest_pending interval,
    OUT total_published bigint, OUT total_processed bigint, OUT total_failed bigint, OUT total_unrouted bigint,
    OUT total_notifications bigint, OUT latency_p50 interval, OUT latency_p95 interval, OUT latency_p99 interval,
    OUT consumers int, OUT worker_pid int, OUT worker_state text, OUT since timestamptz) RETURNS SETOF record
    LANGUAGE plpgsql SECURITY DEFINER ROWS 1 SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT c.pending, c.processing, c.processed, c.failed,
           CASE WHEN c.pending > 0 THEN outbox._oldest_pending() END,
           c.total_published, c.total_processed, c.total_failed, c.total_unrouted, c.total_notifications,
           make_interval(secs => c.latency_p50_s), make_interval(secs => c.latency_p95_s),
           make_interval(secs => c.latency_p99_s),
           (SELECT count(*)::int FROM outbox._attachments()), c.worker_pid, coalesce(c.worker_state, 'none'), c.since
      FROM (SELECT) AS one_row LEFT JOIN outbox._counters() c ON true;
END
$$;
COMMENT ON FUNCTION outbox.stats() IS
    'one row: events by status, age of the oldest pending, totals since the server started, commit-to-processed latency';

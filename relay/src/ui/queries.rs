//! What the page asks of PostgreSQL. The server puts the JSON together, and every number that could have more digits than a
//! browser keeps travels as a text. However much there is, each answer is bounded.

use tokio_postgres::Row;

use crate::error::{Error, Result};

/// The JSON text that a query of one value gave.
pub fn text(rows: &[Row]) -> Result<String> {
    let row = rows.first().ok_or_else(|| Error::Server("PostgreSQL answered without a row".into()))?;
    row.try_get::<_, Option<String>>(0)?.ok_or_else(|| Error::Server("PostgreSQL answered without a value".into()))
}

/// What the role may do here, and who it is.
pub const ROLE: &str = "SELECT json_build_object('role', current_user, 'may', \
       (SELECT coalesce(json_object_agg(f.name, f.may), '{}') FROM ( \
          SELECT p.proname AS name, bool_or(has_function_privilege(p.oid, 'EXECUTE')) AS may \
            FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace \
           WHERE n.nspname = 'outbox' AND p.proname = ANY ('{pause,resume,send_test,rotate_secret,replay,purge,replay_failed,purge_failed}') \
           GROUP BY 1) f))::text";

pub const STATS: &str = "SELECT json_build_object('pending', s.pending::text, 'processing', s.processing::text, \
       'processed', s.processed::text, 'dead', s.failed::text, 'published', s.total_published::text, \
       'unrouted', s.total_unrouted::text, 'oldest_s', extract(epoch FROM s.oldest_pending)::float8, \
       'p50_s', extract(epoch FROM s.latency_p50)::float8, 'p95_s', extract(epoch FROM s.latency_p95)::float8, \
       'p99_s', extract(epoch FROM s.latency_p99)::float8, 'consumers', s.consumers, 'worker', s.worker_state, \
       'since', s.since, 'at', clock_timestamp())::text FROM outbox.stats() s";

pub const HEALTH: &str = "SELECT coalesce(json_agg(json_build_object('check', h.check_name, 'ok', h.ok, 'detail', h.detail, \
       'hint', h.hint) ORDER BY h.ok), '[]')::text FROM outbox.health() h";

/// Those that don't deliver first. Their deliveries are counted as far as 10,000 in all.
pub const DESTINATIONS: &str = "WITH listed AS MATERIALIZED ( \
         SELECT d.destination, d.status FROM outbox.deliveries d WHERE d.status <> 'scheduled' LIMIT 10001 \
     ), counted AS ( \
         SELECT s.destination, count(*) FILTER (WHERE s.status = 'failed') AS dead, \
                count(*) FILTER (WHERE s.status <> 'failed') AS waiting FROM listed s GROUP BY 1 \
     ), shown AS ( \
         SELECT d.name, d.kind, d.state, d.event_types, d.tenant_id, d.filter::text AS filter, d.exchange, d.routing_key, d.url, \
                d.settings::text AS settings, d.circuit_open_until AS open_until, d.last_error, d.rotating, \
                coalesce(c.dead, 0) AS dead, coalesce(c.waiting, 0) AS waiting \
           FROM outbox.destinations d LEFT JOIN counted c ON c.destination = d.name \
          WHERE $1::text = '' OR position(lower($1) IN lower(d.name)) > 0 \
          ORDER BY d.state = 'active', d.name LIMIT 501 \
     ) \
     SELECT json_build_object('rows', coalesce((SELECT json_agg(s) FROM shown s), '[]'), 'at', clock_timestamp(), \
            'counted_all', (SELECT count(*) <= 10000 FROM listed))::text";

/// Dead letters that a filter selects as outbox.replay_failed() does: destination, type, error, since, until; at most so
/// many, and those of 5,000 in groups.
pub const DEAD: &str = "WITH dead AS MATERIALIZED ( \
         SELECT d.event::text AS id, d.event_id, d.event_type, d.aggregate_type, d.aggregate_id, d.destination, d.attempts, \
                left(d.last_error, 2000) AS last_error, d.created_at \
           FROM outbox.deliveries d \
          WHERE d.status = 'failed' AND ($1::text = '' OR d.destination = $1) \
            AND ($2::text = '' OR d.event_type LIKE \
                 replace(replace(replace(replace($2, '\\', '\\\\'), '%', '\\%'), '_', '\\_'), '*', '%')) \
            AND ($3::text IN ('', '*') OR d.last_error LIKE \
                 replace(replace(replace(replace($3, '\\', '\\\\'), '%', '\\%'), '_', '\\_'), '*', '%')) \
            AND (nullif($4::text, '') IS NULL OR d.created_at >= nullif($4, '')::timestamptz) \
            AND (nullif($5::text, '') IS NULL OR d.created_at < nullif($5, '')::timestamptz) \
          ORDER BY d.event DESC LIMIT 5001 \
     ) \
     SELECT json_build_object('at', clock_timestamp(), 'found', (SELECT count(*) FROM dead), \
            'rows', coalesce((SELECT json_agg(r) FROM (SELECT * FROM dead LIMIT 200) r), '[]'), \
            'groups', coalesce((SELECT json_agg(g) FROM ( \
                SELECT x.destination, x.event_type, left(x.last_error, 300) AS last_error, count(*) AS count, \
                       max(x.created_at) AS last FROM dead x GROUP BY 1, 2, 3 ORDER BY 4 DESC, 5 DESC LIMIT 12) g), '[]'))::text";

/// What is outstanding: aggregates that wait for one of their events, deliveries that are due again, scheduled events.
pub const WAITING: &str = "WITH listed AS MATERIALIZED ( \
         SELECT d.event, d.event_id, d.event_type, d.aggregate_type, d.aggregate_id, d.destination, d.status, d.attempts, \
                d.next_attempt_at, left(d.last_error, 2000) AS last_error, d.created_at \
           FROM outbox.deliveries d WHERE d.status <> 'scheduled' LIMIT 10001 \
     ), waits AS ( \
         SELECT s.destination, s.aggregate_type, s.aggregate_id, min(s.event) AS first, \
                count(*) FILTER (WHERE s.status = 'pending' AND s.next_attempt_at IS NULL) AS behind \
           FROM listed s WHERE s.aggregate_id IS NOT NULL GROUP BY 1, 2, 3 \
         HAVING bool_or(s.status = 'pending' AND s.next_attempt_at IS NULL) ORDER BY 5 DESC LIMIT 100 \
     ), blocked AS ( \
         SELECT w.destination, w.aggregate_type, w.aggregate_id, w.behind, s.event_id, s.event_type, s.status, s.attempts, \
                s.next_attempt_at, s.last_error \
           FROM waits w JOIN listed s ON s.event = w.first AND s.destination = w.destination ORDER BY w.behind DESC \
     ), due AS ( \
         SELECT s.event::text AS id, s.event_id, s.event_type, s.aggregate_type, s.aggregate_id, s.destination, s.status, \
                s.attempts, s.next_attempt_at, s.last_error, s.created_at \
           FROM listed s WHERE s.status = 'processing' OR s.status = 'pending' AND s.next_attempt_at IS NOT NULL \
          ORDER BY s.next_attempt_at NULLS FIRST, s.event LIMIT 200 \
     ), scheduled AS ( \
         SELECT d.event_id, d.event_type, d.aggregate_type, d.aggregate_id, d.next_attempt_at, d.created_at \
           FROM outbox.deliveries d WHERE d.status = 'scheduled' ORDER BY d.next_attempt_at LIMIT 200 \
     ) \
     SELECT json_build_object('at', clock_timestamp(), 'all', (SELECT count(*) <= 10000 FROM listed), \
            'blocked', coalesce((SELECT json_agg(b) FROM blocked b), '[]'), \
            'due', coalesce((SELECT json_agg(d) FROM due d), '[]'), \
            'scheduled', coalesce((SELECT json_agg(s) FROM scheduled s), '[]'))::text";

/// One event; null when there is none. Payload and metadata are texts, as PostgreSQL prints them.
pub const EVENT: &str = "SELECT json_build_object('at', clock_timestamp(), 'event', \
       CASE WHEN e.event IS NULL THEN NULL ELSE \
           ((e.event - ARRAY['event_data', 'metadata', 'destinations']) \
            || jsonb_build_object('id', e.event ->> 'id', 'event_data', jsonb_pretty(e.event -> 'event_data'), \
                                  'metadata', jsonb_pretty(e.event -> 'metadata'), \
                                  'destinations', e.event -> 'destinations')) END)::text \
     FROM (SELECT outbox.event($1::text::uuid) AS event) e";

pub const PAUSE: &str = "SELECT outbox.pause($1::text)";
pub const RESUME: &str = "SELECT outbox.resume($1::text)";
pub const SEND_TEST: &str = "SELECT outbox.send_test($1::text)::text";
pub const ROTATE: &str = "SELECT outbox.rotate_secret($1::text)";
pub const REPLAY: &str = "SELECT outbox.replay($1::text::uuid, nullif($2::text, ''))::text";
pub const PURGE: &str = "SELECT outbox.purge($1::text::uuid, nullif($2::text, ''))::text";

/// Destination, type, error, since, until, and whether to count only.
pub const REPLAY_FAILED: &str = "SELECT outbox.replay_failed(destination => nullif($1::text, ''), \
       event_types => coalesce(nullif($2::text, ''), '*'), error => coalesce(nullif($3::text, ''), '*'), \
       since => nullif($4::text, '')::timestamptz, until => nullif($5::text, '')::timestamptz, dry_run => $6::bool)::text";

/// The same without a beginning: outbox.purge_failed() knows an age alone.
pub const PURGE_FAILED: &str = "SELECT outbox.purge_failed(destination => nullif($1::text, ''), \
       event_types => coalesce(nullif($2::text, ''), '*'), error => coalesce(nullif($3::text, ''), '*'), \
       older_than => coalesce(clock_timestamp() - nullif($4::text, '')::timestamptz, interval '0'), dry_run => $5::bool)::text";

-- What only the library can do: notes that take effect at commit, shared memory, sessions. A note is dropped when its
-- transaction or savepoint rolls back. No rule of delivery is decided here.

CREATE FUNCTION outbox._low_water(take_over boolean) RETURNS bigint
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'low_water_wrapper';
COMMENT ON FUNCTION outbox._low_water(boolean) IS
    'every fresh or claimed event has this id or a higher one; true: for a claim, which holds the lock';

CREATE FUNCTION outbox._is_recovered() RETURNS boolean LANGUAGE c AS 'MODULE_PATHNAME', 'is_recovered_wrapper';
COMMENT ON FUNCTION outbox._is_recovered() IS 'whether the worker has looked through the tables since the server started';

CREATE FUNCTION outbox._high_water() RETURNS bigint LANGUAGE c AS 'MODULE_PATHNAME', 'high_water_wrapper';
COMMENT ON FUNCTION outbox._high_water() IS 'no claimed event has a higher id; null: not known before recovery';

CREATE FUNCTION outbox._set_water(low_water bigint, high_water bigint) RETURNS void
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'set_water_wrapper';
COMMENT ON FUNCTION outbox._set_water(bigint, bigint) IS 'at commit: the low-water and the high-water mark';

CREATE FUNCTION outbox._last_token() RETURNS bigint LANGUAGE c AS 'MODULE_PATHNAME', 'last_token_wrapper';
COMMENT ON FUNCTION outbox._last_token() IS 'no claim has a higher token; no less than the microseconds at which the server started';

CREATE FUNCTION outbox._note_token(token bigint) RETURNS void LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'note_token_wrapper';
COMMENT ON FUNCTION outbox._note_token(bigint) IS 'this token is given out, whether or not the transaction commits';

CREATE FUNCTION outbox._wake_at(at timestamptz) RETURNS void LANGUAGE c AS 'MODULE_PATHNAME', 'wake_at_wrapper';
COMMENT ON FUNCTION outbox._wake_at(timestamptz) IS 'at commit: has the worker wake at that moment or earlier; null: does nothing';

CREATE FUNCTION outbox._open_claims(delta int, lease_until timestamptz) RETURNS void
    LANGUAGE c AS 'MODULE_PATHNAME', 'open_claims_wrapper';
COMMENT ON FUNCTION outbox._open_claims(int, timestamptz) IS 'at commit: adds delta to the open claims and brings the lease timer forward to lease_until';

CREATE FUNCTION outbox._wake(reason text) RETURNS void LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'wake_wrapper';
COMMENT ON FUNCTION outbox._wake(text) IS 'at commit: the worker sends a wake-up with this reason';

CREATE FUNCTION outbox._waiting(waiting boolean) RETURNS void LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'waiting_wrapper';
COMMENT ON FUNCTION outbox._waiting(boolean) IS 'at commit: whether the last claim left events behind others in flight';

CREATE FUNCTION outbox._is_waiting() RETURNS boolean LANGUAGE c AS 'MODULE_PATHNAME', 'is_waiting_wrapper';
COMMENT ON FUNCTION outbox._is_waiting() IS 'whether a settlement is to wake consumers';

CREATE FUNCTION outbox._commit_to_disk() RETURNS void LANGUAGE c AS 'MODULE_PATHNAME', 'commit_to_disk_wrapper';
COMMENT ON FUNCTION outbox._commit_to_disk() IS 'this transaction''s commit waits for the disk, whatever synchronous_commit says';

CREATE FUNCTION outbox._count_unrouted(n bigint) RETURNS void LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'count_unrouted_wrapper';
COMMENT ON FUNCTION outbox._count_unrouted(bigint) IS 'at commit: counts events that no destination wanted';

CREATE FUNCTION outbox.attach(consumer text) RETURNS void LANGUAGE c AS 'MODULE_PATHNAME', 'attach_wrapper';
COMMENT ON FUNCTION outbox.attach(text) IS
    'ties this session''s later claims to the session: they are released the moment it ends, in whatever way';

CREATE FUNCTION outbox.detach() RETURNS boolean LANGUAGE c AS 'MODULE_PATHNAME', 'detach_wrapper';
COMMENT ON FUNCTION outbox.detach() IS
    'ends the attachment at once, as the session''s end or DISCARD ALL does: its claims are released; false: there was none';

CREATE FUNCTION outbox._attachment() RETURNS bigint LANGUAGE c AS 'MODULE_PATHNAME', 'attachment_wrapper';
COMMENT ON FUNCTION outbox._attachment() IS 'this session''s attachment; null: not attached';

CREATE FUNCTION outbox._attachments(
    OUT attachment bigint, OUT pid int, OUT consumer text, OUT attached_at timestamptz) RETURNS SETOF record
    LANGUAGE c AS 'MODULE_PATHNAME', 'attachments_wrapper';
COMMENT ON FUNCTION outbox._attachments() IS 'the attached sessions of this database';

CREATE FUNCTION outbox._boot() RETURNS bigint LANGUAGE c AS 'MODULE_PATHNAME', 'boot_wrapper';
COMMENT ON FUNCTION outbox._boot() IS 'which start of the server this is';

CREATE FUNCTION outbox._counters(
    OUT pending bigint, OUT processing bigint, OUT processed bigint, OUT failed bigint,
    OUT total_published bigint, OUT total_processed bigint, OUT total_failed bigint, OUT total_unrouted bigint,
    OUT total_notifications bigint,
    OUT latency_p50_s float8, OUT latency_p95_s float8, OUT latency_p99_s float8,
    OUT worker_pid int, OUT worker_state text, OUT recovered boolean, OUT since timestamptz, OUT waiting_ids int)
    RETURNS SETOF record LANGUAGE c AS 'MODULE_PATHNAME', 'counters_wrapper';
COMMENT ON FUNCTION outbox._counters() IS 'counters of this database, from shared memory';

CREATE FUNCTION outbox._recovered(
    low_water bigint, high_water bigint, pending bigint, processing bigint, processed bigint, failed bigint, open_claims bigint)
    RETURNS void
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'recovered_wrapper';
COMMENT ON FUNCTION outbox._recovered(bigint, bigint, bigint, bigint, bigint, bigint, bigint) IS
    'at commit: the marks, the counted events and the open claims, as recovery found them';

CREATE FUNCTION outbox._count_begin() RETURNS void LANGUAGE c AS 'MODULE_PATHNAME', 'count_begin_wrapper';
COMMENT ON FUNCTION outbox._count_begin() IS 'the next query that counts events is about to choose its snapshot';

-- Stable, so that the query that counts asks once, before its first row.
CREATE FUNCTION outbox._count_from_here(in_any_case boolean) RETURNS boolean STABLE
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'count_from_here_wrapper';
COMMENT ON FUNCTION outbox._count_from_here(boolean) IS
    'from now on commits that this query does not see are counted; false: one came in between, count again';

CREATE FUNCTION outbox._latencies() RETURNS float8[] LANGUAGE c AS 'MODULE_PATHNAME', 'latencies_wrapper';
COMMENT ON FUNCTION outbox._latencies() IS
    'seconds from when each event that this transaction processed could be delivered; accurate to within 19 %';

CREATE FUNCTION outbox._raw_size(value jsonb) RETURNS bigint
    LANGUAGE c STRICT STABLE AS 'MODULE_PATHNAME', 'outbox_raw_size';
COMMENT ON FUNCTION outbox._raw_size(jsonb) IS 'bytes of a value when it is not compressed; does not fetch it';

CREATE FUNCTION outbox._ed25519_public_key(private_key bytea) RETURNS bytea
    LANGUAGE c STRICT IMMUTABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'ed25519_public_key_wrapper';
COMMENT ON FUNCTION outbox._ed25519_public_key(bytea) IS 'the public key that belongs to 32 random bytes; null: these are none';

CREATE FUNCTION outbox._library_version() RETURNS text LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'library_version_wrapper';
COMMENT ON FUNCTION outbox._library_version() IS 'version of the loaded library';

CREATE FUNCTION outbox._launch() RETURNS void LANGUAGE c AS 'MODULE_PATHNAME', 'launch_wrapper';
COMMENT ON FUNCTION outbox._launch() IS 'at commit: the launcher starts this database''s worker';

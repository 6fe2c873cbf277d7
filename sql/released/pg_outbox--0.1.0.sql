-- pg_outbox: the schema that holds everything but the table of events.
--
-- The files of this folder, in the order of their names, are the install script. A file calls only those before it:
--   00 schema          the schema, the roles, the language of definers
--   10 tables          what is stored
--   15 library         what only the library can do
--   20 settings        what operators write: patterns, durations, templates, addresses, secrets
--   25 order           the claim lock, the ordering key, what an event waits for
--   27 wanting         who wants an event, and where something is due
--   30 books           what claims hold and what deliveries say
--   35 release         giving back
--   38 own events      what is said of destinations and dead letters
--   40 circuit         whose fault a failure is, and the circuit breaker
--   45 trigger         what a change of the table means
--   48 publish         for producers who prefer a call
--   50 eligible        what a claim may hand out
--   52 claim fresh     events that were never looked at
--   54 claim due       scheduled events and deliveries that are due
--   56 claim           the claim itself
--   60 delivered       settling what was delivered
--   62 failed          settling what was not
--   64 settle          what consumers call to settle
--   70 destinations    what operators call to change destinations
--   72 dead letters    replay and purge
--   74 backfill        events from before a destination was added
--   76 inbox           what a consumer has seen
--   80 recovery        after a start and after a restore
--   82 timers          what the worker does when a moment has come
--   84 retention       removing what is old
--   86 announce        what a notification says
--   91 recognise       what the columns of an application's own outbox table mean
--   93 stand in        the view that stands in such a table's place
--   94 adopt           taking over such a table, and giving it back
--   88 stats   89 health   90 views   92 relay   95 grants   98 owners   99 start

\echo Use "CREATE EXTENSION pg_outbox" to load this file. \quit

-- Nothing in the schema of the events may take the place of what PostgreSQL provides.
SET LOCAL search_path = pg_catalog, pg_temp;

CREATE SCHEMA outbox;
COMMENT ON SCHEMA outbox IS 'pg_outbox: claims, settlements, destinations, operations';

-- Fails, with a hint, unless the library is in shared_preload_libraries.
CREATE FUNCTION outbox._preloaded() RETURNS boolean
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'preloaded_wrapper';
COMMENT ON FUNCTION outbox._preloaded() IS 'whether the library was preloaded with the server';

DO $$
BEGIN
    IF NOT outbox._preloaded() THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = 'pg_outbox must be loaded via shared_preload_libraries',
            HINT = 'Add pg_outbox to shared_preload_libraries and restart PostgreSQL.';
    END IF;
END
$$;

-- Who owns what. Triggers on outbox_events may be anybody's to whom it was granted, and they run with the rights of the
-- function that changed the row. So
--   outbox_owner   owns the tables and each SECURITY DEFINER function: it can do no more than what these do
--   outbox_keeper  owns secrets, and the few functions that read or write them, none of which touches outbox_events
--   the superuser that creates the extension owns the rest, which runs with the rights of its caller
-- 98_owners.sql hands them over. The roles are the cluster's: databases share them, and DROP EXTENSION leaves them.
DO $$
DECLARE
    v_role text;
    v_why text;
BEGIN
    FOREACH v_role IN ARRAY ARRAY['outbox_owner', 'outbox_keeper'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles r WHERE r.rolname = v_role) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', v_role);
            EXCEPTION WHEN duplicate_object OR unique_violation THEN
                NULL;   -- made in another database at the same moment
            END;
        END IF;
        -- Whoever may create roles could have made it first, and kept a hold of it.
        SELECT CASE WHEN r.rolsuper THEN 'is a superuser'
                    WHEN r.rolcanlogin THEN 'may log in'
                    WHEN r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR r.rolbypassrls
                         THEN 'has CREATEROLE, CREATEDB, REPLICATION or BYPASSRLS'
                    WHEN m.above IS NOT NULL THEN format('is a member of %s', m.above)
                    WHEN m.below IS NOT NULL THEN format('has %s for a member', m.below) END
          INTO v_why
          FROM pg_roles r
         CROSS JOIN LATERAL (
               SELECT string_agg(m.roleid::regrole::text, ', ') FILTER (
                          WHERE m.member = r.oid AND NOT (v_role = 'outbox_keeper' AND m.roleid = 'pg_read_all_stats'::regrole))
                          AS above,
                      string_agg(m.member::regrole::text, ', ') FILTER (
                          WHERE m.roleid = r.oid AND NOT b.rolsuper AND (m.admin_option OR NOT coalesce(g.rolsuper, false)))
                          AS below
                 FROM pg_auth_members m
                 LEFT JOIN pg_roles b ON b.oid = m.member
                 LEFT JOIN pg_roles g ON g.oid = m.grantor
                WHERE r.oid IN (m.roleid, m.member)) m
         WHERE r.rolname = v_role;
        IF v_why IS NOT NULL THEN
            RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = format('role %s exists already and %s', v_role, v_why),
                DETAIL = 'pg_outbox owns its objects by this role, which nobody must be able to become.',
                HINT = format('Rename it or drop it, or take that away: ALTER ROLE %1$s NOLOGIN NOSUPERUSER NOCREATEROLE '
                              'NOCREATEDB NOREPLICATION NOBYPASSRLS; REVOKE … FROM %1$s; REVOKE %1$s FROM …;', v_role);
        END IF;
    END LOOP;
    -- For outbox.health(): who holds back vacuum.
    IF NOT EXISTS (SELECT FROM pg_auth_members m
                    WHERE m.roleid = 'pg_read_all_stats'::regrole AND m.member = 'outbox_keeper'::regrole) THEN
        GRANT pg_read_all_stats TO outbox_keeper;
    END IF;
END
$$;

CREATE FUNCTION outbox._grant_apart(statement text) RETURNS void
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'grant_apart_wrapper';
COMMENT ON FUNCTION outbox._grant_apart(text) IS 'grants what pg_dump is to see, on an object that is not the extension''s';

-- PUBLIC may lose this right.
SELECT outbox._grant_apart('GRANT USAGE ON SCHEMA @extschema@ TO outbox_owner');

-- PL/pgSQL for SECURITY DEFINER functions: what a foreign trigger does inside of one ends with it. Nothing is deferred to
-- the commit, which is the caller's; no setting stays.
CREATE FUNCTION outbox._guarded_call() RETURNS language_handler LANGUAGE c AS 'MODULE_PATHNAME', 'guarded_call';
COMMENT ON FUNCTION outbox._guarded_call() IS 'runs a function in the language outbox_plpgsql';

-- No validator: a function comes to it from plpgsql, and pg_upgrade can't name one that is another extension's.
CREATE LANGUAGE outbox_plpgsql HANDLER outbox._guarded_call;
COMMENT ON LANGUAGE outbox_plpgsql IS
    'PL/pgSQL in a security-restricted operation: no deferred triggers, no settings that outlive the call';
-- The tables. The application writes outbox_events; the functions of this schema alone write the rest. A DBA can read all
-- of them.
--
-- Each event is in exactly one of these states. Constraints hold what a row alone can tell.
--   fresh      pending, not listed, no available_at: owed to every destination that wants it. A walk of the primary key from
--              the low-water mark finds it.
--   scheduled  pending, not listed, available_at set, not routed: the same, but not before that moment. An index of its own
--              finds it; the walk passes it.
--   claimed    processing, with a claim_token: the claim holds every destination that has no row in outbox.delivery
--   listed     listed, no claim_token: owed exactly to the destinations that outbox.delivery lists
--   settled    processed or failed
-- No index has status in its key or predicate, so that claiming and settling are HOT updates.

CREATE FUNCTION outbox.uuid_v7() RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL SAFE AS 'MODULE_PATHNAME', 'uuid_v7_wrapper';
COMMENT ON FUNCTION outbox.uuid_v7() IS 'a new UUID, version 7 of RFC 9562';

CREATE TABLE @extschema@.outbox_events (
    id             bigint GENERATED BY DEFAULT AS IDENTITY (CACHE 1) PRIMARY KEY,
    event_id       uuid NOT NULL DEFAULT outbox.uuid_v7() CONSTRAINT outbox_events_event_id_key UNIQUE,
    event_type     text NOT NULL CONSTRAINT outbox_events_event_type_not_empty CHECK (event_type <> ''),
    event_version  text NOT NULL DEFAULT 'v1',
    aggregate_type text,
    aggregate_id   text,
    tenant_id      text,
    event_data     jsonb NOT NULL,
    metadata       jsonb NOT NULL DEFAULT '{}',
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp()
        CONSTRAINT outbox_events_created_at_finite CHECK (isfinite(created_at)),
    available_at   timestamptz,
    status         text NOT NULL DEFAULT 'pending'
        CONSTRAINT outbox_events_status_known CHECK (status IN ('pending', 'processing', 'processed', 'failed')),
    retry_count    int NOT NULL DEFAULT 0,
    last_error     text,
    processed_at   timestamptz,
    claim_token    bigint,
    listed         boolean NOT NULL DEFAULT false,
    routed         boolean NOT NULL DEFAULT false,
    CONSTRAINT outbox_events_token_only_while_processing CHECK (claim_token IS NULL OR status = 'processing'),
    CONSTRAINT outbox_events_processing_is_claimed CHECK (status <> 'processing' OR claim_token IS NOT NULL OR listed),
    CONSTRAINT outbox_events_routed_was_scheduled CHECK (NOT routed OR available_at IS NOT NULL)
) WITH (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.05);

COMMENT ON TABLE @extschema@.outbox_events IS 'events to publish: insert one in the transaction that changes the data';
COMMENT ON COLUMN @extschema@.outbox_events.id IS 'order of delivery within an aggregate';
COMMENT ON COLUMN @extschema@.outbox_events.event_id IS 'identity for consumers, the same on every attempt';
COMMENT ON COLUMN @extschema@.outbox_events.available_at IS 'not to be delivered before; null: at once';
COMMENT ON COLUMN @extschema@.outbox_events.status IS 'pending, processing, processed or failed (a dead letter)';
COMMENT ON COLUMN @extschema@.outbox_events.claim_token IS 'the claim that holds the event; internal';
COMMENT ON COLUMN @extschema@.outbox_events.listed IS 'what is owed is listed in outbox.deliveries; internal';
COMMENT ON COLUMN @extschema@.outbox_events.routed IS 'a scheduled event whose time has come was given to its destinations; internal';

-- These indexes hold scheduled events only, and each event leaves them once: all other updates stay HOT. The second one
-- spells out outbox._ordering_key(), so that a producer needs no right to that function.
CREATE INDEX outbox_events_scheduled ON @extschema@.outbox_events (available_at, id)
    WHERE available_at IS NOT NULL AND NOT routed;
CREATE INDEX outbox_events_scheduled_order ON @extschema@.outbox_events
    ((CASE WHEN aggregate_id IS NOT NULL
           THEN hashtextextended(coalesce(aggregate_type, '') || chr(31) || aggregate_id, 0::bigint) END), id)
    WHERE available_at IS NOT NULL AND NOT routed;

-- Tokens rise: a token tells whether its claim is older than a destination.
CREATE SEQUENCE outbox.claim_token_seq;

CREATE TABLE outbox.destination (
    name               text PRIMARY KEY
        CONSTRAINT destination_name_valid CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$'),
    kind               text NOT NULL CONSTRAINT destination_kind_known CHECK (kind IN ('rabbitmq', 'webhook')),
    event_types        text[] NOT NULL,
    tenant_id          text,
    filter             jsonpath,
    exchange           text,
    routing_key        text,
    url                text,
    broker             text,
    settings           jsonb NOT NULL DEFAULT '{}',
    blocks             boolean NOT NULL GENERATED ALWAYS AS (coalesce(settings ->> 'on_failure' = 'block', false)) STORED,
    paused             boolean NOT NULL DEFAULT false,
    disabled_reason    text,
    circuit_failures   int NOT NULL DEFAULT 0,
    circuit_open_until timestamptz,
    opening_told       boolean NOT NULL DEFAULT false,
    last_error         text,
    last_success_at    timestamptz,
    last_success_by    int,
    failing_since      timestamptz,
    unable_at          timestamptz,
    next_due           timestamptz,
    ready_at           timestamptz GENERATED ALWAYS AS (
        CASE WHEN next_due IS NOT NULL AND NOT paused AND disabled_reason IS NULL
             THEN greatest(next_due, circuit_open_until) END) STORED,
    since_token        bigint NOT NULL,
    created_at         timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT destination_has_address CHECK (
        CASE kind WHEN 'webhook' THEN url IS NOT NULL AND broker IS NULL
                  ELSE exchange IS NOT NULL AND routing_key IS NOT NULL AND broker IS NOT NULL END)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);
COMMENT ON TABLE outbox.destination IS 'where events go, without anything secret; read it through the view outbox.destinations';

COMMENT ON COLUMN outbox.destination.last_success_at IS 'a delivery succeeded then, or up to some seconds later';
COMMENT ON COLUMN outbox.destination.last_success_by IS 'process ID of the session that said so';
COMMENT ON COLUMN outbox.destination.failing_since IS 'the first failure since the last success';
COMMENT ON COLUMN outbox.destination.unable_at IS 'a relay could not serve it then, and nobody has delivered since';
COMMENT ON COLUMN outbox.destination.opening_told IS 'an event said that its circuit opened, and none yet that it closed';
COMMENT ON COLUMN outbox.destination.tenant_id IS 'wants events of this tenant only; null: of any, and of none';
COMMENT ON COLUMN outbox.destination.filter IS 'wants events whose event_data passes it; null: all';
COMMENT ON COLUMN outbox.destination.broker IS 'the broker of a RabbitMQ destination, by the name that relays give it';
COMMENT ON COLUMN outbox.destination.next_due IS 'none of its deliveries is due before; null: none is listed with a moment';
COMMENT ON COLUMN outbox.destination.ready_at IS 'a claim may find something due from then on; null: not before something changes';

-- What is due, and when, is found here: however many destinations there are, only those with something due are touched.
CREATE INDEX destination_ready ON outbox.destination (ready_at) WHERE ready_at IS NOT NULL;
CREATE INDEX destination_since ON outbox.destination (since_token);

-- The patterns of destinations, in a form in which those that an event matches are found without looking at the others: see
-- outbox._wanting(). Not dumped: it follows from the destinations that a restore brings.
CREATE TABLE outbox.interest (
    destination  text NOT NULL REFERENCES outbox.destination (name) ON DELETE CASCADE,
    like_pattern text NOT NULL,
    head         text NOT NULL,
    tenant_id    text,
    PRIMARY KEY (destination, like_pattern)
);
CREATE INDEX interest_match ON outbox.interest (tenant_id, head);
COMMENT ON TABLE outbox.interest IS 'what destinations want: a row for each of their patterns, with their tenant';
COMMENT ON COLUMN outbox.interest.head IS 'what every matching type begins with: outbox._head() of the pattern';

-- Apart from outbox.destination, so that no query on destinations can show a secret by accident.
CREATE TABLE outbox.secret (
    destination text NOT NULL REFERENCES outbox.destination (name) ON DELETE CASCADE,
    secret      text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at  timestamptz,
    PRIMARY KEY (destination, secret)
);
CREATE UNIQUE INDEX secret_current ON outbox.secret (destination) WHERE expires_at IS NULL;
CREATE INDEX secret_ends ON outbox.secret (expires_at) WHERE expires_at IS NOT NULL;
COMMENT ON TABLE outbox.secret IS 'signing secrets of webhooks; expires_at null: the current one';

-- Everything that the relay needs for a request. The URL stands beside the headers, so that nobody who may not read a token
-- can have it sent elsewhere; outbox.destination has a copy for the views and for the rules of delivery.
CREATE TABLE outbox.hidden (
    destination text PRIMARY KEY REFERENCES outbox.destination (name) ON DELETE CASCADE,
    url         text NOT NULL,
    settings    jsonb NOT NULL
);
COMMENT ON TABLE outbox.hidden IS 'URL and settings of webhooks as they were given, with what views do not show';

-- No policy: only their owner reads and writes them, and pg_read_all_data and pg_write_all_data do not.
ALTER TABLE outbox.secret ENABLE ROW LEVEL SECURITY;
ALTER TABLE outbox.hidden ENABLE ROW LEVEL SECURITY;

-- The exceptions: deliveries that did not happen at the first claim, and dead letters. The destination '' stands for "no
-- destination yet", while a consumer of the application's own gets the events.
CREATE TABLE outbox.delivery (
    id              bigint NOT NULL,
    destination     text NOT NULL,
    ordering_key   bigint,
    status          text NOT NULL
        CONSTRAINT delivery_status_known CHECK (status IN ('pending', 'processing', 'failed')),
    attempts        int NOT NULL DEFAULT 0,
    next_attempt_at timestamptz,
    last_error      text,
    claim_token     bigint,
    owed_since      timestamptz NOT NULL DEFAULT clock_timestamp(),
    place           bigint GENERATED ALWAYS AS (id) STORED,
    PRIMARY KEY (id, destination),
    CONSTRAINT delivery_claimed_by_token CHECK ((status = 'processing') = (claim_token IS NOT NULL)),
    CONSTRAINT delivery_next_attempt_only_while_pending CHECK (next_attempt_at IS NULL OR status = 'pending')
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);
COMMENT ON TABLE outbox.delivery IS 'outstanding and dead deliveries; read it through the view outbox.deliveries';
COMMENT ON COLUMN outbox.delivery.owed_since IS 'when the delivery was listed or replayed: settings.give_up_after begins then';
COMMENT ON COLUMN outbox.delivery.next_attempt_at IS
    'due then; null while it waits for an earlier event with its ordering key';

COMMENT ON COLUMN outbox.delivery.place IS
    'the id again, for the order within an ordering key: only delivery_order can sort by it, whatever the planner believes of an empty table';

CREATE INDEX delivery_due ON outbox.delivery (destination, next_attempt_at, id)
    WHERE status = 'pending' AND next_attempt_at IS NOT NULL;
CREATE INDEX delivery_order ON outbox.delivery (ordering_key, destination, place) WHERE ordering_key IS NOT NULL;
CREATE INDEX delivery_claim ON outbox.delivery (claim_token) WHERE claim_token IS NOT NULL;
CREATE INDEX delivery_in_flight ON outbox.delivery (destination) WHERE claim_token IS NOT NULL;
CREATE INDEX delivery_dead ON outbox.delivery (id) WHERE status = 'failed';

CREATE TABLE outbox.claims (
    token       bigint PRIMARY KEY,
    attachment  bigint,
    boot        bigint NOT NULL,
    lease_until timestamptz NOT NULL,
    ids         bigint[] NOT NULL,
    held        int NOT NULL CONSTRAINT claims_holds_something CHECK (held > 0)
) WITH (fillfactor = 50);
COMMENT ON TABLE outbox.claims IS 'claims that still hold something, with their session and the end of their lease';
COMMENT ON COLUMN outbox.claims.held IS 'whole events and single deliveries not settled yet; the row goes at 0';

-- Not an advisory lock, which any role could take and keep. Not a table, which ANALYZE and VACUUM lock.
CREATE VIEW outbox.claim_lock AS SELECT true AS one_at_a_time;
COMMENT ON VIEW outbox.claim_lock IS 'the claim lock: the transaction that holds it may claim and settle';

-- Work that is left for later. The application's own transactions must not wait for the claim lock: their triggers add a row
-- here. A settlement that meets an event locked by the application does the same. outbox._catch_up() does the work.
CREATE TABLE outbox.touched (
    id            bigint NOT NULL,
    ordering_key bigint,
    claim_token   bigint
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
COMMENT ON TABLE outbox.touched IS 'events that were deleted, rescheduled or locked, and still have to be looked after';

-- Outcomes that were reported while another transaction had the event's row locked.
CREATE TABLE outbox.postponed (
    claim_token bigint NOT NULL,
    id          bigint NOT NULL,
    exception   jsonb
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
COMMENT ON TABLE outbox.postponed IS 'outcomes still to be settled; exception null: delivered to all that the claim handed out';

-- What consumers have seen: see outbox.first_time().
CREATE TABLE outbox.inbox (
    consumer text NOT NULL,
    event_id uuid NOT NULL,
    seen_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (consumer, event_id)
) WITH (autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX inbox_seen ON outbox.inbox (seen_at);
COMMENT ON TABLE outbox.inbox IS 'which events a consumer has seen; forgotten after outbox.inbox_retention';

CREATE TABLE outbox.contradiction (
    kind  text PRIMARY KEY,
    found bigint NOT NULL
);
COMMENT ON TABLE outbox.contradiction IS 'contradictions that recovery found; a restore has some until it is complete; see outbox.repair()';

-- Tables of the application's own that outbox.adopt() took over, and the events that came from them or through the views in
-- their places. One of the keys is set, unless the table has none but the event_id.
CREATE TABLE outbox.adopted (
    source        int PRIMARY KEY,
    relation      text NOT NULL UNIQUE,
    before        text NOT NULL,
    status_column text,
    words         jsonb NOT NULL,
    triggers      text[] NOT NULL,
    adopted_at    timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE outbox.adopted IS 'tables that outbox.adopt() took over, with what outbox.release_adopted() needs';
COMMENT ON COLUMN outbox.adopted.before IS 'the old table''s name now';
COMMENT ON COLUMN outbox.adopted.words IS 'for each status, the word of that table';
COMMENT ON COLUMN outbox.adopted.triggers IS 'statements that make the old table''s triggers again';

CREATE TABLE outbox.adopted_event (
    event      bigint PRIMARY KEY,
    source     int NOT NULL,
    added      xid8,
    key_int    int,
    key_bigint bigint,
    key_uuid   uuid,
    key_text   text
);
CREATE UNIQUE INDEX adopted_event_key_int ON outbox.adopted_event (key_int, source) WHERE key_int IS NOT NULL;
CREATE UNIQUE INDEX adopted_event_key_bigint ON outbox.adopted_event (key_bigint, source) WHERE key_bigint IS NOT NULL;
CREATE UNIQUE INDEX adopted_event_key_uuid ON outbox.adopted_event (key_uuid, source) WHERE key_uuid IS NOT NULL;
CREATE UNIQUE INDEX adopted_event_key_text ON outbox.adopted_event (key_text, source) WHERE key_text IS NOT NULL;
COMMENT ON TABLE outbox.adopted_event IS 'which events belong to a table that was taken over, by its own key';
COMMENT ON COLUMN outbox.adopted_event.added IS 'the transaction that inserted it, if the table has no status: see outbox._change_statements()';

CREATE TYPE outbox.claimed_event AS (
    id             bigint,
    event_id       uuid,
    event_type     text,
    event_version  text,
    aggregate_type text,
    aggregate_id   text,
    tenant_id      text,
    event_data     jsonb,
    metadata       jsonb,
    created_at     timestamptz,
    retry_count    int,
    destinations   text[],
    claim_token    bigint
);
COMMENT ON TYPE outbox.claimed_event IS 'one event handed out by outbox.claim';

CREATE TYPE outbox.claimed_ref AS (
    id           bigint,
    event_id     uuid,
    retry_count  int,
    destinations text[],
    claim_token  bigint
);
COMMENT ON TYPE outbox.claimed_ref IS 'one event handed out by outbox.claim_refs';

SELECT pg_catalog.pg_extension_config_dump('@extschema@.outbox_events', '');
SELECT pg_catalog.pg_extension_config_dump(pg_catalog.pg_get_serial_sequence('@extschema@.outbox_events', 'id')::regclass, '');
SELECT pg_catalog.pg_extension_config_dump('outbox.claim_token_seq', '');
SELECT pg_catalog.pg_extension_config_dump('outbox.destination', '');
SELECT pg_catalog.pg_extension_config_dump('outbox.secret', '');
SELECT pg_catalog.pg_extension_config_dump('outbox.hidden', '');
SELECT pg_catalog.pg_extension_config_dump('outbox.delivery', '');
SELECT pg_catalog.pg_extension_config_dump('outbox.inbox', '');
SELECT pg_catalog.pg_extension_config_dump('outbox.adopted', '');
SELECT pg_catalog.pg_extension_config_dump('outbox.adopted_event', '');
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
-- What an operator writes: patterns, durations, templates, headers, addresses and secrets. Each is read or checked here.

CREATE FUNCTION outbox._like_pattern(pattern text) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN replace(replace(replace(regexp_replace(replace(pattern, '\', '\\'), '\*+', '*', 'g'), '%', '\%'), '_', '\_'), '*', '%');
COMMENT ON FUNCTION outbox._like_pattern(text) IS 'a pattern whose * stands for any run of characters, as a LIKE pattern';

-- What every type that matches a pattern begins with, up to the end of a word: an event's type has few such beginnings, and an
-- index finds the patterns of each.
CREATE FUNCTION outbox._without_word(value text) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN rtrim(value, 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789');
COMMENT ON FUNCTION outbox._without_word(text) IS 'the text without the word at its end';

CREATE FUNCTION outbox._head(pattern text) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE WHEN strpos(pattern, '*') = 0 THEN left(pattern, 200)
            ELSE outbox._without_word(left(split_part(pattern, '*', 1), 200)) END;
COMMENT ON FUNCTION outbox._head(text) IS 'what every type that matches the pattern begins with, up to the end of a word';

CREATE FUNCTION outbox._heads(event_type text) RETURNS text[]
    LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE
AS $$
DECLARE
    v_heads text[] := ARRAY['', left(event_type, 200)];
    v_rest text := left(event_type, 200);
BEGIN
    LOOP
        v_rest := outbox._without_word(v_rest);
        EXIT WHEN v_rest = '';
        v_heads := v_heads || v_rest;
        v_rest := left(v_rest, -1);
    END LOOP;
    RETURN v_heads;
END
$$;
COMMENT ON FUNCTION outbox._heads(text) IS 'what patterns that match the type may have for a head';

-- A filter is evaluated on event_data, with the event's other fields as variables.
CREATE FUNCTION outbox._check_filter(filter jsonpath) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_known CONSTANT text[] := ARRAY['metadata', 'event_type', 'aggregate_type', 'aggregate_id', 'tenant_id'];
    v_variable text;
BEGIN
    IF octet_length(filter::text) > 8000 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'a filter must have at most 8000 bytes',
            HINT = 'Filter by event_types, or in the receiver.';
    END IF;
    -- As PostgreSQL prints a path, each variable is $ and a quoted name; other quoted texts have no $ before them.
    FOR v_variable IN
        SELECT substr(m.found[1], 3, length(m.found[1]) - 3)
          FROM regexp_matches(filter::text, '(\$?"(?:[^"\\]|\\.)*")', 'g') AS m (found) WHERE m.found[1] LIKE '$%'
    LOOP
        IF v_variable <> ALL (v_known) THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('unknown variable $%s in a filter', v_variable),
                HINT = 'Variables are $metadata, $event_type, $aggregate_type, $aggregate_id and $tenant_id.';
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._check_filter(jsonpath) IS 'an error for a filter with an unknown variable';

CREATE FUNCTION outbox._check_tenant(tenant_id text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF tenant_id = '' OR octet_length(tenant_id) > 1000 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'tenant_id must have 1 to 1000 bytes',
            HINT = 'Leave it out (null) for events of any tenant.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_tenant(text) IS 'an error for a tenant that no destination can have';

-- A duration in settings: seconds as a number, or an interval as text.
CREATE FUNCTION outbox._duration(settings jsonb, key text, fallback interval) RETURNS interval
    LANGUAGE sql STABLE PARALLEL SAFE
RETURN CASE jsonb_typeof(settings -> key)
           WHEN 'number' THEN make_interval(secs => (settings ->> key)::float8)
           WHEN 'string' THEN (settings ->> key)::interval
           ELSE fallback END;
COMMENT ON FUNCTION outbox._duration(jsonb, text, interval) IS 'a duration of the settings, or the fallback';

-- The same for whoever must not fail, whatever a row holds: at least nothing, at most a century. Null: never.
CREATE FUNCTION outbox._span(settings jsonb, key text, fallback interval) RETURNS interval
    LANGUAGE sql STABLE PARALLEL SAFE
RETURN CASE WHEN settings ->> key = 'never' THEN NULL
            WHEN jsonb_typeof(settings -> key) = 'number'
            THEN make_interval(secs => greatest(0, least((settings ->> key)::numeric, 3e9))::float8)
            ELSE greatest(interval '0', least(outbox._duration(settings, key, fallback), interval '100 years')) END;
COMMENT ON FUNCTION outbox._span(jsonb, text, interval) IS 'a duration of the settings within bounds, or the fallback; null: never';

CREATE FUNCTION outbox._max_attempts(settings jsonb) RETURNS int
    LANGUAGE sql STABLE PARALLEL SAFE
RETURN CASE WHEN jsonb_typeof(settings -> 'schedule') = 'array' THEN jsonb_array_length(settings -> 'schedule') + 1
            ELSE coalesce((settings ->> 'max_attempts')::int, 15) END;
COMMENT ON FUNCTION outbox._max_attempts(jsonb) IS
    'attempts before a delivery is a dead letter: one more than the schedule has waits, else settings.max_attempts (default 15)';

-- Exponential backoff with full jitter: a uniform draw from 0 to min(cap, base * 2^(attempts - 1)).
-- Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
CREATE FUNCTION outbox._backoff(attempts int, base interval, cap interval) RETURNS interval
    LANGUAGE sql VOLATILE PARALLEL SAFE
RETURN make_interval(secs => random() * least(extract(epoch FROM cap)::float8,
                                              extract(epoch FROM base)::float8 * power(2::float8, least(attempts - 1, 30)::float8)));
COMMENT ON FUNCTION outbox._backoff(int, interval, interval) IS 'how long to wait after so many failed attempts';

CREATE FUNCTION outbox._retry_in(kind text, settings jsonb, attempts int) RETURNS interval
    LANGUAGE sql VOLATILE
RETURN CASE WHEN jsonb_typeof(settings -> 'schedule' -> (attempts - 1)) IN ('number', 'string')
            THEN outbox._span(jsonb_build_object('wait', settings -> 'schedule' -> (attempts - 1)), 'wait', NULL)
            ELSE outbox._backoff(attempts,
                outbox._span(settings, 'base', CASE kind WHEN 'webhook' THEN interval '5 seconds' ELSE interval '1 second' END),
                outbox._span(settings, 'cap', CASE kind WHEN 'webhook' THEN interval '6 hours' ELSE interval '5 minutes' END)) END;
COMMENT ON FUNCTION outbox._retry_in(text, jsonb, int) IS
    'a destination''s wait after so many attempts: of its schedule, else the backoff (base 5 s and cap 6 h for webhooks, 1 s and 5 min for all else)';

CREATE FUNCTION outbox._is_given_up(kind text, settings jsonb, owed_since timestamptz) RETURNS boolean
    LANGUAGE sql VOLATILE
RETURN coalesce(clock_timestamp() - owed_since
                >= outbox._span(settings, 'give_up_after', CASE kind WHEN 'webhook' THEN interval '3 days' END), false);
COMMENT ON FUNCTION outbox._is_given_up(text, jsonb, timestamptz) IS
    'owed for longer than settings.give_up_after (webhooks 3 days, all else for ever): the next failure is the last';

CREATE FUNCTION outbox._check_patterns(event_types text[]) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF coalesce(cardinality(event_types), 0) = 0 OR array_position(event_types, NULL) IS NOT NULL
       OR array_position(event_types, '') IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'event_types must hold at least one pattern, none of them null or empty',
            HINT = 'Use ''{*}'' for all events, or patterns such as ''{contact.*,order.created}''.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_patterns(text[]) IS 'an error unless the patterns make sense';

-- A name is a token of RFC 9110; a value is visible ASCII with spaces and tabs. Errors show no value.
CREATE FUNCTION outbox._check_headers(headers jsonb) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_reserved CONSTANT text := '^(host|content-length|content-type|transfer-encoding|connection|webhook-.*)$';
    v_name text;
    v_value jsonb;
BEGIN
    IF jsonb_typeof(headers) <> 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.headers must be a JSON object of header names and values',
            HINT = 'For example {"headers": {"Authorization": "Bearer …"}}.';
    ELSIF (SELECT count(*) > 100 OR max(octet_length(h.key)) > 200 OR max(octet_length(h.value #>> '{}')) > 8000
             FROM jsonb_each(headers) h) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.headers must be at most 100 headers, names of 200 and values of 8000 characters',
            HINT = 'Receivers refuse larger ones.';
    END IF;
    FOR v_name, v_value IN SELECT h.key, h.value FROM jsonb_each(headers) h LOOP
        IF v_name !~ '^[A-Za-z0-9!#$%&''*+.^_`|~-]+$' OR v_name ~* v_reserved THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('settings.headers can''t set %L', v_name),
                HINT = 'Content-type, length, host, connection and webhook-* are set by the relay.';
        ELSIF jsonb_typeof(v_value) NOT IN ('string', 'number', 'boolean') OR (v_value #>> '{}') !~ '^[\t -~]*$' THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('settings.headers: the value of %s must be text of visible ASCII characters', v_name),
                HINT = 'Encode anything else, for example as base64.';
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._check_headers(jsonb) IS 'an error for a header that a webhook request can''t carry';

CREATE FUNCTION outbox._check_duration(settings jsonb, key text, shortest interval, longest interval) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_type text := jsonb_typeof(settings -> key);
    v_wrong boolean := false;
BEGIN
    IF v_type IS NULL THEN
        RETURN;
    ELSIF v_type = 'number' THEN
        v_wrong := (settings ->> key)::numeric NOT BETWEEN extract(epoch FROM shortest) AND extract(epoch FROM longest);
    ELSIF v_type = 'string' THEN
        v_wrong := (settings ->> key)::interval NOT BETWEEN shortest AND longest;
    END IF;
    IF v_wrong OR v_type NOT IN ('number', 'string') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('settings.%s must be a duration above zero, from %s to %s', key, shortest, longest),
            HINT = 'Give seconds as a number, or an interval such as "5 minutes".';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_duration(jsonb, text, interval, interval) IS 'an error for a duration that nothing can be timed with';

CREATE FUNCTION outbox._check_durations(settings jsonb) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._check_duration(settings, k, interval '1 millisecond', interval '1 day')
       FROM unnest(ARRAY['timeout', 'connect_timeout']) AS k;
    PERFORM outbox._check_duration(settings, k, interval '1 millisecond', interval '366 days')
       FROM unnest(ARRAY['base', 'cap']) AS k;
    PERFORM outbox._check_duration(settings, k, interval '1 second', interval '3660 days')
       FROM unnest(ARRAY['give_up_after', 'disable_after']) AS k WHERE settings ->> k IS DISTINCT FROM 'never';
    IF NOT settings ? 'schedule' THEN
        RETURN;
    ELSIF jsonb_typeof(settings -> 'schedule') <> 'array' OR jsonb_array_length(settings -> 'schedule') > 1000 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.schedule must be a list of at most 1000 durations',
            HINT = 'These are the waits between attempts, for example {"schedule": ["5 s", "5 min", "2 h"]}.';
    END IF;
    PERFORM outbox._check_duration(jsonb_build_object('schedule', w), 'schedule', interval '1 millisecond', interval '366 days')
       FROM jsonb_array_elements(settings -> 'schedule') AS w;
END
$$;
COMMENT ON FUNCTION outbox._check_durations(jsonb) IS 'an error for a duration of the settings that is out of bounds';

-- Source: RFC 3986, section 4.1 and appendix B. In turn: its characters; one fragment; a scheme, or no colon before the first
-- slash; a host and a port; brackets around a host alone.
CREATE FUNCTION outbox._is_uri_reference(uri text) RETURNS boolean
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN uri ~* '^([a-z0-9._~:/?#@!$&''()*+,;=-]|\[|\]|%[0-9a-f][0-9a-f])+$'
   AND uri !~ '#.*#'
   AND uri ~* '^([a-z][a-z0-9+.-]*:|[^:/?#]*([/?#]|$))'
   AND coalesce(regexp_replace(substring(uri FROM '^(?:[^:/?#]*:)?//([^/?#]*)'), '^.*@', '')
                ~* '^(\[[0-9a-f:.]+\]|[^]:[]*)(:[0-9]*)?$', true)
   AND regexp_replace(uri, '^([^:/?#]*:)?//[^/?#]*', '') !~ '[][]';
COMMENT ON FUNCTION outbox._is_uri_reference(text) IS 'whether the text is a URI or a relative reference';

-- What goes out of an event, and how it is written.
CREATE FUNCTION outbox._check_message(kind text, settings jsonb) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_formats CONSTANT text[] := CASE kind WHEN 'webhook' THEN '{standard,data,cloudevents,cloudevents-binary}'
                                           ELSE '{data,cloudevents,cloudevents-binary}' END;
BEGIN
    IF coalesce(settings ->> 'format', 'data') <> ALL (v_formats) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('settings.format of a %s destination must be one of %s, not %L', kind,
                             array_to_string(v_formats, ', '), settings ->> 'format'),
            HINT = 'data: event_data alone; cloudevents: CloudEvents 1.0 in structured mode; cloudevents-binary: in binary mode.';
    ELSIF settings ? 'source' AND (jsonb_typeof(settings -> 'source') <> 'string'
                                   OR octet_length(settings ->> 'source') NOT BETWEEN 1 AND 2000
                                   OR NOT outbox._is_uri_reference(settings ->> 'source')) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.source must be a URI reference of 1 to 2000 bytes',
            HINT = 'For example "https://shop.example/orders", "urn:shop:orders" or "/orders".';
    ELSIF settings ? 'metadata' AND (jsonb_typeof(settings -> 'metadata') <> 'array'
                                     OR jsonb_array_length(settings -> 'metadata') > 100
                                     OR EXISTS (SELECT FROM jsonb_array_elements(settings -> 'metadata') AS p
                                                 WHERE jsonb_typeof(p) <> 'string')) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.metadata must be a list of at most 100 patterns',
            HINT = 'They name the members of metadata that go along, for example {"metadata": ["region", "x-*"]}.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_message(text, jsonb) IS 'an error for settings by which no event can be written';

CREATE FUNCTION outbox._check_signature(settings jsonb) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_reserved CONSTANT text := '^(host|content-length|content-type|transfer-encoding|connection|webhook-(id|timestamp))$';
BEGIN
    IF coalesce(settings ->> 'signature', 'standard') NOT IN ('standard', 'ed25519', 'hex', 'none') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('settings.signature must be standard, ed25519, hex or none, not %L', settings ->> 'signature'),
            HINT = 'standard and ed25519: Standard Webhooks, symmetric and asymmetric; hex: HMAC-SHA256 of the body, as many receivers know it.';
    ELSIF settings ? 'signature_header' AND (jsonb_typeof(settings -> 'signature_header') <> 'string'
                                             OR settings ->> 'signature_header' !~ '^[A-Za-z0-9!#$%&''*+.^_`|~-]{1,200}$'
                                             OR settings ->> 'signature_header' ~* v_reserved) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.signature_header must be the name of a header, and none that the relay sets otherwise',
            HINT = 'For example "X-Hub-Signature-256"; the default is X-Signature-256.';
    ELSIF settings ? 'signature_prefix' AND (jsonb_typeof(settings -> 'signature_prefix') <> 'string'
                                             OR settings ->> 'signature_prefix' !~ '^([!-~][ -~]{0,99})?$') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.signature_prefix must be up to 100 visible ASCII characters',
            HINT = 'It stands before the hexadecimal digits; the default is sha256=.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_signature(jsonb) IS 'an error for settings by which no webhook can be signed';

CREATE FUNCTION outbox._check_rabbitmq_settings(settings jsonb) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF coalesce(settings ->> 'declare', 'exchange') NOT IN ('none', 'exchange', 'queue') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('settings.declare must be none, exchange or queue, not %L', settings ->> 'declare'),
            HINT = 'It is what the relay makes if it is missing; queue: the exchange too.';
    ELSIF coalesce(settings ->> 'exchange_type', 'topic') !~ '^(topic|direct|fanout|headers|x-[a-z0-9-]{1,60})$' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('unknown settings.exchange_type %L', settings ->> 'exchange_type'),
            HINT = 'Use topic, direct, fanout, headers, or the x-… type of a plugin that RabbitMQ has.';
    ELSIF coalesce(settings ->> 'queue_type', 'quorum') NOT IN ('quorum', 'classic') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('settings.queue_type must be quorum or classic, not %L', settings ->> 'queue_type'),
            HINT = 'For a queue of another kind declare it yourself, with "declare": "exchange" or "none".';
    ELSIF settings ? 'broker' AND (jsonb_typeof(settings -> 'broker') <> 'string'
                                   OR settings ->> 'broker' !~ '^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.broker must be a name of 1 to 63 letters, digits, dots, dashes and underscores',
            HINT = 'It is a name from the relays'' AMQP_URL, NAME=URL; the default is default.';
    ELSIF settings ? 'queue' AND (jsonb_typeof(settings -> 'queue') <> 'string'
                                  OR octet_length(settings ->> 'queue') NOT BETWEEN 1 AND 255
                                  OR settings ->> 'queue' ~ '^amq\.|[[:cntrl:]]') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.queue must be text of 1 to 255 bytes, without control characters, that does not begin with amq.',
            HINT = 'Leave it out to name the queue like the destination.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_rabbitmq_settings(jsonb) IS 'an error for a setting that no RabbitMQ destination can have';

CREATE FUNCTION outbox._check_settings(kind text, settings jsonb) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_known CONSTANT text[] := ARRAY['max_attempts', 'base', 'cap', 'schedule', 'on_failure', 'concurrency', 'timeout', 'give_up_after',
                                     'disable_after', 'format', 'source', 'metadata']
        || CASE kind WHEN 'webhook' THEN ARRAY['connect_timeout', 'headers', 'signature', 'signature_header',
                                                   'signature_prefix', 'proxy', 'ca_certificate', 'client_certificate',
                                                   'client_key']
                     ELSE ARRAY['broker', 'declare', 'queue', 'queue_type', 'exchange_type'] END;
    v_key text;
BEGIN
    IF settings IS NULL OR jsonb_typeof(settings) <> 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'settings must be a JSON object',
            HINT = 'Use ''{}'' for the defaults.';
    ELSIF coalesce(settings ->> 'on_failure', 'skip') NOT IN ('skip', 'block') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('settings.on_failure must be skip or block, not %L', settings ->> 'on_failure'),
            HINT = 'skip: after a dead letter its aggregate goes on; block: it waits for an operator.';
    ELSIF settings ? 'max_attempts' AND coalesce(settings ->> 'max_attempts', '') !~ '^[1-9][0-9]{0,5}$' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.max_attempts must be a whole number from 1 to 999999',
            HINT = 'Leave it out for the default of 15.';
    ELSIF settings ? 'concurrency' AND (jsonb_typeof(settings -> 'concurrency') <> 'number'
                                        OR settings ->> 'concurrency' !~ '^[1-9][0-9]{0,4}$') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.concurrency must be a whole number from 1 to 99999',
            HINT = 'It is how many attempts of one relay may be under way at once.';
    END IF;
    PERFORM outbox._check_durations(settings);
    PERFORM outbox._check_message(kind, settings);
    PERFORM outbox._check_signature(settings);
    PERFORM outbox._check_proxy(settings);
    PERFORM outbox._check_tls(settings);
    PERFORM outbox._check_rabbitmq_settings(settings);
    PERFORM outbox._check_headers(settings -> 'headers') WHERE settings ? 'headers';
    FOR v_key IN SELECT k FROM jsonb_object_keys(settings) AS k WHERE k <> ALL (v_known) LOOP
        RAISE WARNING USING MESSAGE = format('settings.%s is not a setting of a %s destination and has no effect', v_key, kind);
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._check_settings(text, jsonb) IS 'an error for a setting of the wrong shape, a warning for an unknown one';

CREATE FUNCTION outbox._fixed_text(template text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN regexp_replace(template, '\{[^{}]*\}', '', 'g');
COMMENT ON FUNCTION outbox._fixed_text(text) IS 'what a template yields for an event that has nothing';

CREATE FUNCTION outbox._check_template(template text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF regexp_replace(template, '\{(event_type|aggregate_type|aggregate_id|tenant_id|metadata\.[^{}]+)\}', '', 'g') ~ '[{}]' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('invalid template %L', template),
            HINT = 'Placeholders are {event_type}, {aggregate_type}, {aggregate_id}, {tenant_id} and {metadata.key}.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_template(text) IS 'an error for an unknown placeholder';

-- One to four numbers, decimal, octal or hexadecimal; the last fills what the others leave.
CREATE FUNCTION outbox._is_ipv4(parts text[]) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_value numeric;
    v_last CONSTANT int := cardinality(parts);
BEGIN
    FOR i IN 1..v_last LOOP
        v_value := CASE WHEN parts[i] ~* '^0x[0-9a-f]{0,12}$'
                        THEN ('x' || lpad(substr(parts[i], 3), 16, '0'))::bit(64)::bigint
                        WHEN parts[i] ~ '^0[0-7]{1,20}$'
                        THEN (SELECT sum(d::int * 8::numeric ^ (n - 1))
                                FROM regexp_split_to_table(reverse(substr(parts[i], 2)), '') WITH ORDINALITY AS x (d, n))
                        WHEN parts[i] ~ '^(0|[1-9][0-9]{0,12})$' THEN parts[i]::numeric END;
        IF v_value IS NULL OR v_value >= (CASE WHEN i < v_last THEN 256 ELSE 256::numeric ^ (5 - v_last) END) THEN
            RETURN false;
        END IF;
    END LOOP;
    RETURN v_last <= 4;
END
$$;
COMMENT ON FUNCTION outbox._is_ipv4(text[]) IS 'whether these numbers are an IPv4 address as clients of HTTP read it';

-- A name, or an address in a form that a client of HTTP knows.
-- Source: URL Living Standard (WHATWG), host parsing: what ends in a number is an IPv4 address.
CREATE FUNCTION outbox._is_host(host text) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_labels text[] := string_to_array(rtrim(host, '.'), '.');
BEGIN
    IF host LIKE '[%' THEN
        RETURN family(trim(host, '[]')::inet) = 6;
    ELSIF host !~ '^[[:ascii:]]*$' THEN
        -- Names in other scripts are the relay's to write in ASCII.
        RETURN octet_length(host) <= 253 AND host !~ '[%<>^|"`{}[:cntrl:]]' AND host !~ '^\.|\.\.';
    ELSIF v_labels[cardinality(v_labels)] ~* '^([0-9]+|0x[0-9a-f]*)$' THEN
        RETURN outbox._is_ipv4(v_labels);
    END IF;
    RETURN length(host) <= 253 AND host ~* '^([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.?$';
EXCEPTION WHEN invalid_text_representation THEN
    RETURN false;
END
$$;
COMMENT ON FUNCTION outbox._is_host(text) IS 'whether a client of HTTP can look for this host';

-- The addresses behind the name are the relay's to judge, at the moment it connects.
CREATE FUNCTION outbox._check_url(url text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_parts text[] := regexp_match(url, '^https?://(\[[0-9a-f:.]+\]|[^][/?#@:\s\\]+)(?::([0-9]{1,5}))?(?:[/?#]\S*)?$', 'i');
BEGIN
    IF v_parts IS NULL OR octet_length(url) > 8000 OR v_parts[2]::int NOT BETWEEN 1 AND 65535
       OR NOT outbox._is_host(v_parts[1]) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'malformed webhook URL',
            HINT = 'Use http:// or https://, a host, and no user name or password, for example https://example.com/hook.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_url(text) IS 'an error unless the URL has the form of a webhook''s; the message does not show it';

-- A proxy's address is the relay's to judge, like that of a webhook.
CREATE FUNCTION outbox._check_proxy(settings jsonb) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_parts text[] := regexp_match(settings ->> 'proxy',
        '^https?://(?:[!-~]*@)?(\[[0-9a-f:.]+\]|[^][/?#@:\s\\]+)(?::([0-9]{1,5}))?/?$', 'i');
BEGIN
    IF NOT settings ? 'proxy' OR settings -> 'proxy' = '"none"' THEN
        RETURN;
    ELSIF jsonb_typeof(settings -> 'proxy') <> 'string' OR v_parts IS NULL OR octet_length(settings ->> 'proxy') > 2000
          OR v_parts[2]::int NOT BETWEEN 1 AND 65535 OR NOT outbox._is_host(v_parts[1])
          OR settings ->> 'proxy' ~ '//[^@]*[/?#\\][^@]*@|@.*@|%(?![0-9A-Fa-f]{2})' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.proxy must be the URL of an HTTP proxy, or none',
            HINT = 'For example "http://proxy.example:3128" or "https://user:password@proxy.example"; none: not that of the relay either.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_proxy(jsonb) IS 'an error for a proxy that no relay can use; the message does not show it';

-- Source: RFC 7468. What else the text holds is left to whoever reads it.
CREATE FUNCTION outbox._pem_blocks(pem text, labels text[]) RETURNS int
    LANGUAGE plpgsql IMMUTABLE STRICT SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_found int := 0;
    v_block text[];
    v_der bytea;
BEGIN
    FOR v_block IN SELECT regexp_matches(pem, '^-----BEGIN ([A-Z0-9 ]+)-----\r?\n([A-Za-z0-9+/=\s]*)^-----END \1-----', 'gn') LOOP
        CONTINUE WHEN v_block[1] <> ALL (labels);
        v_der := decode(v_block[2], 'base64');
        -- A SEQUENCE that says how long it is.
        IF length(v_der) < 2 OR get_byte(v_der, 0) <> 48
           OR length(v_der) <> (CASE get_byte(v_der, 1)
                                    WHEN 129 THEN 3 + get_byte(v_der, 2)
                                    WHEN 130 THEN 4 + get_byte(v_der, 2) * 256 + get_byte(v_der, 3)
                                    ELSE 2 + get_byte(v_der, 1) END) THEN
            RETURN NULL;
        END IF;
        v_found := v_found + 1;
    END LOOP;
    RETURN v_found;
EXCEPTION WHEN invalid_parameter_value OR array_subscript_error THEN
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._pem_blocks(text, text[]) IS 'how many blocks with these labels a text in PEM holds; null: one is malformed';

CREATE FUNCTION outbox._check_tls(settings jsonb) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_key text;
BEGIN
    FOREACH v_key IN ARRAY ARRAY['ca_certificate', 'client_certificate', 'client_key'] LOOP
        CONTINUE WHEN NOT settings ? v_key;
        IF jsonb_typeof(settings -> v_key) <> 'string' OR octet_length(settings ->> v_key) > 200000
           OR (CASE v_key
                   WHEN 'client_key'
                   THEN outbox._pem_blocks(settings ->> v_key, '{PRIVATE KEY,RSA PRIVATE KEY,EC PRIVATE KEY}')
                        IS DISTINCT FROM 1
                   ELSE coalesce(outbox._pem_blocks(settings ->> v_key, '{CERTIFICATE}'), 0) = 0 END) THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = CASE v_key WHEN 'client_key' THEN 'settings.client_key must be one private key in PEM, not encrypted'
                                     ELSE format('settings.%s must be certificates in PEM', v_key) END,
                HINT = 'It is the text of the file, with its lines -----BEGIN …----- and -----END …-----.';
        END IF;
    END LOOP;
    IF settings ? 'client_certificate' <> settings ? 'client_key' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'settings.client_certificate and settings.client_key go together',
            HINT = 'The receiver sees the certificate; the key proves that it is the relay''s.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_tls(jsonb) IS 'an error for certificates and keys that are none; the message does not show them';

CREATE FUNCTION outbox._random_key() RETURNS bytea
    LANGUAGE sql VOLATILE
RETURN substr(uuid_send(gen_random_uuid()), 1, 6) || substr(uuid_send(gen_random_uuid()), 10, 7)
    || substr(uuid_send(gen_random_uuid()), 1, 6) || substr(uuid_send(gen_random_uuid()), 10, 7)
    || substr(uuid_send(gen_random_uuid()), 1, 6);
COMMENT ON FUNCTION outbox._random_key() IS '32 bytes from PostgreSQL''s strong random source';

CREATE FUNCTION outbox._signature(settings jsonb) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN coalesce(settings ->> 'signature', 'standard');
COMMENT ON FUNCTION outbox._signature(jsonb) IS 'how a webhook is signed: standard, ed25519, hex or none';

CREATE FUNCTION outbox._new_secret(settings jsonb) RETURNS text
    LANGUAGE sql VOLATILE
RETURN CASE outbox._signature(settings)
           WHEN 'none' THEN NULL
           WHEN 'ed25519' THEN 'whsk_' || encode(outbox._random_key(), 'base64')
           ELSE 'whsec_' || encode(outbox._random_key(), 'base64') END;
COMMENT ON FUNCTION outbox._new_secret(jsonb) IS 'a signing secret, or a private key, for these settings; null: they need none';

CREATE FUNCTION outbox._key_in(secret text, prefix text) RETURNS bytea
    LANGUAGE plpgsql IMMUTABLE STRICT SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_text CONSTANT text := substr(secret, length(prefix) + 1);
    v_key bytea;
BEGIN
    v_key := decode(v_text, 'base64');
    RETURN CASE WHEN secret = prefix || replace(encode(v_key, 'base64'), E'\n', '') THEN v_key END;
EXCEPTION WHEN invalid_parameter_value THEN
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._key_in(text, text) IS 'the bytes of a secret with this prefix; null: it is not that and proper base64';

-- A private key is the 32 bytes of RFC 8032, or these and its public key.
CREATE FUNCTION outbox._public_key(secret text) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT
RETURN (SELECT 'whpk_' || encode(p.key, 'base64')
          FROM outbox._key_in(secret, 'whsk_') AS k (key)
         CROSS JOIN outbox._ed25519_public_key(substr(k.key, 1, 32)) AS p (key)
         WHERE length(k.key) = 32 OR substr(k.key, 33) = p.key);
COMMENT ON FUNCTION outbox._public_key(text) IS 'whpk_ and the public key for whsk_ and a private one; null: it is none';

CREATE FUNCTION outbox._is_secret(secret text, settings jsonb) RETURNS boolean
    LANGUAGE sql IMMUTABLE
RETURN CASE outbox._signature(settings)
           WHEN 'none' THEN false
           WHEN 'hex' THEN length(secret) BETWEEN 8 AND 128
           WHEN 'ed25519' THEN outbox._public_key(secret) IS NOT NULL
           ELSE coalesce(length(outbox._key_in(secret, 'whsec_')) BETWEEN 24 AND 64, false) END;
COMMENT ON FUNCTION outbox._is_secret(text, jsonb) IS 'whether a webhook with these settings can be signed with this';

CREATE FUNCTION outbox._check_secret(secret text, settings jsonb) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF secret IS NULL OR outbox._is_secret(secret, settings) THEN
        RETURN;
    ELSIF outbox._signature(settings) = 'none' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'a webhook that is not signed has no secret',
            HINT = 'Leave it out, or choose another settings.signature than none.';
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
        MESSAGE = 'malformed signing secret',
        HINT = CASE outbox._signature(settings)
                   WHEN 'hex' THEN 'Use 8 to 128 characters, or null to have one made.'
                   WHEN 'ed25519' THEN 'Use whsk_ and the base64 of a private key of 32 or 64 bytes, or null to have a key pair made.'
                   ELSE 'Use whsec_ and the base64 of 24 to 64 random bytes, or null to have one made.' END;
END
$$;
COMMENT ON FUNCTION outbox._check_secret(text, jsonb) IS
    'an error unless a webhook with these settings can be signed with this; the message does not show it';

CREATE FUNCTION outbox._shown_secret(secret text, settings jsonb) RETURNS text
    LANGUAGE sql IMMUTABLE
RETURN CASE outbox._signature(settings) WHEN 'ed25519' THEN outbox._public_key(secret) ELSE secret END;
COMMENT ON FUNCTION outbox._shown_secret(text, jsonb) IS 'what the receiver has to know: the secret, or the public key';

CREATE FUNCTION outbox._shown_settings(settings jsonb) RETURNS jsonb
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN (SELECT coalesce(jsonb_object_agg(s.key, CASE
            WHEN s.key = 'headers' AND jsonb_typeof(s.value) = 'object'
                THEN (SELECT coalesce(jsonb_object_agg(k, '…'), '{}') FROM jsonb_object_keys(s.value) AS k)
            WHEN s.key = 'client_key' THEN '"…"'
            WHEN s.key = 'proxy' THEN to_jsonb(regexp_replace(s.value #>> '{}', '//.*@', '//…@'))
            ELSE s.value END), '{}')
          FROM jsonb_each(settings) AS s);
COMMENT ON FUNCTION outbox._shown_settings(jsonb) IS 'the settings, with names alone of what is hidden';

CREATE FUNCTION outbox._shown_url(url text) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN regexp_replace(url, '\?.*$', '?…');
COMMENT ON FUNCTION outbox._shown_url(text) IS 'the URL without its query, which may hold a token';
-- Order. One claim or settlement runs at a time: each takes the same lock and holds it to its commit. That alone makes
-- the rules below simple, because nothing they read can change under them.
--
-- Plans are kept for a session's life, and most are made while the tables are empty or their statistics say so. So no
-- statement leaves the order of its joins to chance: rows are found by the key that a LATERAL ... OFFSET 0 hands to the
-- table, and deliveries and claims are changed by the ctid that was found (nobody else changes them meanwhile). An UPDATE
-- that joins says "e.id BETWEEN p.id AND p.id": with "=" the planner may walk the whole primary key for a merge that never
-- comes, when it takes the table for empty.
--
-- No claim or settlement waits for a row of outbox_events that the application has locked: see outbox._locked().
--
-- For each destination and ordering key: an event is handed out only when no earlier one is outstanding elsewhere and no
-- other claim holds one. Within a claim the consumer keeps the order of id.

-- Locks the table of events before anybody locks a delivery: a TRUNCATE holds the first and then wants the second.
CREATE FUNCTION outbox._lock() RETURNS void
    LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    LOCK TABLE outbox.claim_lock IN EXCLUSIVE MODE;
    LOCK TABLE @extschema@.outbox_events IN ROW EXCLUSIVE MODE;
    -- Others wait for this lock: no statement of its holder may wait long. Ends with the calling function, if that sets
    -- lock_timeout, or with the transaction.
    PERFORM set_config('lock_timeout', '2s', true);
END
$$;
COMMENT ON FUNCTION outbox._lock() IS 'claims and settlements run one at a time, until commit';

-- A hash: two aggregates that share one wait for each other, and lose nothing.
CREATE FUNCTION outbox._ordering_key(aggregate_type text, aggregate_id text) RETURNS bigint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE WHEN aggregate_id IS NOT NULL
            THEN hashtextextended(coalesce(aggregate_type, '') || chr(31) || aggregate_id, 0::bigint) END;
COMMENT ON FUNCTION outbox._ordering_key(text, text) IS 'what orders events: those with the same key go out one by one; null: no order';

-- A row that nobody has locked or changed has no xmax: the common case is one look-up. A row with an xmax may be free again.
-- Another transaction can still lock the row before this one changes it: lock_timeout ends that wait, see outbox._lock().
CREATE FUNCTION outbox._locked(v_ids bigint[]) RETURNS bigint[]
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_touched bigint[];
BEGIN
    v_touched := ARRAY(SELECT x.id FROM unnest(v_ids) AS i (id)
                        CROSS JOIN LATERAL (SELECT e.id FROM @extschema@.outbox_events e
                                             WHERE e.id = i.id AND e.xmax <> 0 OFFSET 0) x);
    IF cardinality(v_touched) = 0 THEN
        RETURN '{}';
    END IF;
    RETURN ARRAY(SELECT unnest(v_touched)
                 EXCEPT
                 SELECT x.id FROM (SELECT e.id FROM @extschema@.outbox_events e
                                    WHERE e.id = ANY (v_touched) FOR NO KEY UPDATE SKIP LOCKED) x);
END
$$;
COMMENT ON FUNCTION outbox._locked(bigint[]) IS
    'those of these events whose rows another transaction has locked; the others stay free until this one ends';

-- The interval at which rows that were locked are looked at again.
CREATE FUNCTION outbox._look_again() RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM outbox._wake_at(clock_timestamp() + interval '250 milliseconds');
END
$$;
COMMENT ON FUNCTION outbox._look_again() IS 'at commit: has the worker look at locked events again shortly';

-- Scheduled events that are due and not routed yet, because more fell due at once than one claim routes.
-- No settings of its own, so that the planner can merge it into the query that uses it.
CREATE FUNCTION outbox._unrouted_ahead(key bigint, moment timestamptz) RETURNS TABLE (id bigint, event_type text, tenant_id text)
    LANGUAGE sql STABLE ROWS 1
AS $$
    SELECT e.id, e.event_type, e.tenant_id
      FROM @extschema@.outbox_events e
     WHERE CASE WHEN e.aggregate_id IS NOT NULL
                THEN hashtextextended(coalesce(e.aggregate_type, '') || chr(31) || e.aggregate_id, 0::bigint) END = key
       AND e.available_at IS NOT NULL AND NOT e.routed AND e.available_at <= moment
       AND e.status = 'pending' AND NOT e.listed
$$;
COMMENT ON FUNCTION outbox._unrouted_ahead(bigint, timestamptz) IS 'scheduled events with this ordering key that are due and not routed yet';

-- The rule of order at one destination: the deliveries that an event waits for. These are the earlier ones with its ordering
-- key, and any that is in flight: two consumers never have events with the same key at once. blocks: dead letters count.
-- No settings of its own, so that the planner can merge it into the query that uses it.
CREATE FUNCTION outbox._ahead(destination text, key bigint, id bigint, blocks boolean) RETURNS TABLE (event bigint)
    LANGUAGE sql STABLE ROWS 1
AS $$
    SELECT d.id
      FROM outbox.delivery d
     WHERE d.destination = $1 AND d.ordering_key = $2 AND d.place <> $3
       AND (d.status = 'processing'
            OR (d.place < $3 AND (d.status = 'pending' OR (d.status = 'failed' AND $4))))
$$;
COMMENT ON FUNCTION outbox._ahead(text, bigint, bigint, boolean) IS 'the deliveries that an event waits for at a destination';

-- The first event of each key that waits for nothing but those ahead becomes due, when there are none.
CREATE FUNCTION outbox._promote(v_destinations text[], v_keys bigint[]) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
BEGIN
    UPDATE outbox.delivery d SET next_attempt_at = clock_timestamp()
     WHERE d.ctid = ANY (ARRAY(
           SELECT h.at
             FROM (SELECT DISTINCT k.destination, k.key,
                          EXISTS (SELECT FROM outbox.destination t WHERE t.name = k.destination AND t.blocks) AS blocks
                     FROM unnest(v_destinations, v_keys) AS k (destination, key)) k
            CROSS JOIN LATERAL (
                  SELECT x.id, x.ctid AS at, x.next_attempt_at FROM outbox.delivery x
                   WHERE x.destination = k.destination AND x.ordering_key = k.key AND x.status = 'pending'
                   ORDER BY x.place LIMIT 1) h
            WHERE h.next_attempt_at IS NULL
              AND NOT EXISTS (SELECT FROM outbox._ahead(k.destination, k.key, h.id, k.blocks))));
    IF FOUND THEN
        PERFORM outbox._wake('due');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._promote(text[], bigint[]) IS 'makes the next event of each key due, after one of them was settled or given back';

-- Hops from destination to destination in the index: a key may have many deliveries.
CREATE FUNCTION outbox._promote_keys(v_keys bigint[]) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_found record;
BEGIN
    WITH RECURSIVE held_up (key, destination) AS (
        SELECT k.key, (SELECT min(d.destination) FROM outbox.delivery d WHERE d.ordering_key = k.key)
          FROM (SELECT DISTINCT unnest(v_keys) AS key) k
        UNION ALL
        SELECT l.key, (SELECT min(d.destination) FROM outbox.delivery d
                        WHERE d.ordering_key = l.key AND d.destination > l.destination)
          FROM held_up l WHERE l.destination IS NOT NULL
    )
    SELECT array_agg(l.destination) AS destinations, array_agg(l.key) AS keys
      INTO v_found FROM held_up l WHERE l.destination IS NOT NULL;
    PERFORM outbox._promote(v_found.destinations, v_found.keys) WHERE v_found.keys IS NOT NULL;
END
$$;
COMMENT ON FUNCTION outbox._promote_keys(bigint[]) IS 'makes the next event of each key due, at each destination';

CREATE FUNCTION outbox._promote_all(v_destination text) RETURNS void
    LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT outbox._promote(array_agg(v_destination), array_agg(k.ordering_key))
      FROM (SELECT DISTINCT d.ordering_key FROM outbox.delivery d
             WHERE d.destination = v_destination AND d.ordering_key IS NOT NULL
               AND (d.status = 'failed' OR (d.status = 'pending' AND d.next_attempt_at IS NULL))) k
$$;
COMMENT ON FUNCTION outbox._promote_all(text) IS 'makes the next event of each key due at one destination, after it changed';
-- Who wants an event. A destination does when one of its patterns matches the type, it has no tenant or the event's, and it
-- has no filter or the event passes it. What this costs follows from how many want the event, not from how many exist.
--
-- Many events of a claim share type and tenant. Those who may want them are looked up once for each such kind of event.

-- No settings of its own, so that the planner can merge it into the query that uses it.
-- A pattern that is * alone leaves out what pg_outbox itself says of destinations.
CREATE FUNCTION outbox._matches(event_type text, like_pattern text) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$
    SELECT $1 LIKE $2 AND ($2 <> '%' OR $1 NOT LIKE 'outbox.%')
$$;
COMMENT ON FUNCTION outbox._matches(text, text) IS 'whether a pattern of a destination matches the type';

-- No settings of its own, so that the planner can merge it into the query that uses it.
CREATE FUNCTION outbox._wanting(event_type text, tenant_id text) RETURNS SETOF outbox.destination
    LANGUAGE sql STABLE ROWS 2
AS $$
    SELECT d.*
      FROM (SELECT i.destination FROM outbox.interest i
             WHERE i.tenant_id = $2 AND i.head = ANY (outbox._heads($1)) AND outbox._matches($1, i.like_pattern)
            UNION
            SELECT i.destination FROM outbox.interest i
             WHERE i.tenant_id IS NULL AND i.head = ANY (outbox._heads($1)) AND outbox._matches($1, i.like_pattern)) w
     CROSS JOIN LATERAL (SELECT * FROM outbox.destination x WHERE x.name = w.destination OFFSET 0) d
$$;
COMMENT ON FUNCTION outbox._wanting(text, text) IS 'the destinations that want events of this type and tenant, filters apart';

-- An error is "no": no event may hold up others, whatever it holds.
CREATE FUNCTION outbox._passes(v_filter jsonpath, v_id bigint) RETURNS boolean
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET timezone = 'UTC'
AS $$
BEGIN
    RETURN (SELECT coalesce(jsonb_path_query_first_tz(e.event_data, v_filter,
                       jsonb_build_object('metadata', e.metadata, 'event_type', e.event_type,
                                          'aggregate_type', e.aggregate_type, 'aggregate_id', e.aggregate_id,
                                          'tenant_id', e.tenant_id), true) NOT IN ('null', 'false'), false)
              FROM @extschema@.outbox_events e WHERE e.id = v_id);
EXCEPTION WHEN OTHERS THEN
    RETURN false;
END
$$;
COMMENT ON FUNCTION outbox._passes(jsonpath, bigint) IS
    'whether the first result of a destination''s filter on the event is neither nothing, null nor false';

-- No settings of its own, so that the planner can merge it into the query that uses it.
CREATE FUNCTION outbox._wants(destination text, id bigint, event_type text, tenant_id text) RETURNS boolean
    LANGUAGE sql STABLE
AS $$
    SELECT $1 = ''
        OR EXISTS (SELECT FROM outbox.interest i
                    CROSS JOIN LATERAL (SELECT x.filter FROM outbox.destination x WHERE x.name = i.destination OFFSET 0) d
                    WHERE i.destination = $1 AND outbox._matches($3, i.like_pattern)
                      AND (i.tenant_id IS NULL OR i.tenant_id = $4)
                      AND CASE WHEN d.filter IS NULL THEN true ELSE outbox._passes(d.filter, $2) END)
$$;
COMMENT ON FUNCTION outbox._wants(text, bigint, text, text) IS
    'whether one destination wants the event; '''' stands for a consumer while there is no destination';

CREATE FUNCTION outbox._put_interest(name text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM outbox.interest i WHERE i.destination = _put_interest.name;
    INSERT INTO outbox.interest (destination, like_pattern, head, tenant_id)
    SELECT DISTINCT d.name, outbox._like_pattern(p), outbox._head(p), d.tenant_id
      FROM outbox.destination d CROSS JOIN LATERAL unnest(d.event_types) AS p
     WHERE d.name = _put_interest.name;
END
$$;
COMMENT ON FUNCTION outbox._put_interest(text) IS 'enters a destination''s patterns into outbox.interest';

-- For many events at once: each with each destination that wants it.
CREATE FUNCTION outbox._routes(v_ids bigint[])
    RETURNS TABLE (id bigint, ordering_key bigint, destination text, since_token bigint)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH kind AS MATERIALIZED (
        SELECT e.event_type, e.tenant_id, array_agg(e.id) AS ids,
               array_agg(outbox._ordering_key(e.aggregate_type, e.aggregate_id)) AS keys
          FROM @extschema@.outbox_events e WHERE e.id = ANY (v_ids)
         GROUP BY e.event_type, e.tenant_id
    ), menu AS MATERIALIZED (
        SELECT k.ids, k.keys, w.names, w.filters, w.tokens
          FROM kind k
         CROSS JOIN LATERAL (SELECT array_agg(d.name) AS names, array_agg(d.filter) AS filters,
                                    array_agg(d.since_token) AS tokens
                               FROM outbox._wanting(k.event_type, k.tenant_id) d) w
    )
    SELECT e.id, e.key, d.name, d.token
      FROM menu m
     CROSS JOIN LATERAL unnest(m.ids, m.keys) AS e (id, key)
     CROSS JOIN LATERAL unnest(m.names, m.filters, m.tokens) AS d (name, filter, token)
     WHERE CASE WHEN d.filter IS NULL THEN true ELSE outbox._passes(d.filter, e.id) END;
END
$$;
COMMENT ON FUNCTION outbox._routes(bigint[]) IS 'each of these events with each destination that wants it';

CREATE FUNCTION outbox._routes_or_nobody(v_ids bigint[]) RETURNS TABLE (id bigint, ordering_key bigint, destination text)
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
AS $$
#variable_conflict use_column
BEGIN
    IF EXISTS (SELECT FROM outbox.destination) THEN
        RETURN QUERY SELECT r.id, r.ordering_key, r.destination FROM outbox._routes(v_ids) r;
    ELSE
        RETURN QUERY SELECT e.id, outbox._ordering_key(e.aggregate_type, e.aggregate_id), ''
                       FROM @extschema@.outbox_events e WHERE e.id = ANY (v_ids);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._routes_or_nobody(bigint[]) IS
    'each of these events with each destination that wants it, or with '''' while there is no destination';

-- The moments at which something is due, kept beside each destination: a claim asks those alone that have something due.
-- outbox._find_due() moves them on, when a claim has looked.
CREATE FUNCTION outbox._note_due() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    UPDATE outbox.destination d SET next_due = n.at
      FROM (SELECT c.destination, min(c.next_attempt_at) AS at FROM changed c
             WHERE c.status = 'pending' AND c.next_attempt_at IS NOT NULL GROUP BY c.destination) n
     WHERE d.name = n.destination AND (d.next_due IS NULL OR d.next_due > n.at);
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._note_due() IS 'a delivery is due earlier than any other of its destination';

CREATE TRIGGER note_due_insert AFTER INSERT ON outbox.delivery
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION outbox._note_due();
CREATE TRIGGER note_due_update AFTER UPDATE ON outbox.delivery
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION outbox._note_due();

CREATE FUNCTION outbox._find_due(v_destinations text[]) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
BEGIN
    UPDATE outbox.destination d SET next_due = f.at
      FROM (SELECT n.name, (SELECT x.next_attempt_at FROM outbox.delivery x
                             WHERE x.destination = n.name AND x.status = 'pending' AND x.next_attempt_at IS NOT NULL
                             ORDER BY x.next_attempt_at LIMIT 1) AS at
              FROM (SELECT DISTINCT unnest(v_destinations) AS name) n) f
     WHERE d.name = f.name AND d.next_due IS DISTINCT FROM f.at;
END
$$;
COMMENT ON FUNCTION outbox._find_due(text[]) IS 'finds anew when the next delivery of each destination is due';
-- The books: what a claim still holds, what an event's deliveries say of it, and how a claim of whole events becomes a
-- list of deliveries.

-- Takes one event or delivery off the books for each token. A claim's row goes when the claim holds nothing.
CREATE FUNCTION outbox._let_go(tokens bigint[]) RETURNS void
    LANGUAGE plpgsql
AS $$
DECLARE
    v_closed int;
BEGIN
    IF tokens IS NULL THEN
        RETURN;
    END IF;
    WITH less AS MATERIALIZED (
        SELECT t.token, count(*) AS n FROM unnest(tokens) AS t (token) GROUP BY t.token
    ), found AS MATERIALIZED (
        SELECT l.token, l.n, c.at, c.held <= l.n AS empty
          FROM less l
         CROSS JOIN LATERAL (SELECT x.ctid AS at, x.held FROM outbox.claims x WHERE x.token = l.token OFFSET 0) c
    ), closed AS (
        DELETE FROM outbox.claims c WHERE c.ctid = ANY (ARRAY(SELECT f.at FROM found f WHERE f.empty)) RETURNING 1
    ), kept AS (
        UPDATE outbox.claims c SET held = c.held - (SELECT f.n FROM found f WHERE f.token = c.token)
         WHERE c.ctid = ANY (ARRAY(SELECT f.at FROM found f WHERE NOT f.empty))
    )
    SELECT count(*) INTO v_closed FROM closed;
    IF v_closed > 0 THEN
        PERFORM outbox._open_claims(-v_closed, NULL);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._let_go(bigint[]) IS 'takes one event or delivery off the books for each token';

CREATE FUNCTION outbox._rest(v_id bigint) RETURNS text
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (
    SELECT CASE WHEN bool_or(d.status = 'processing') THEN 'processing'
                WHEN bool_or(d.status = 'pending') THEN 'pending'
                WHEN bool_or(d.status = 'failed') THEN 'failed'
                ELSE 'processed' END
      FROM outbox.delivery d WHERE d.id = v_id);
END
$$;
COMMENT ON FUNCTION outbox._rest(bigint) IS 'the status that follows from an event''s deliveries';

-- A listed event's status follows from its deliveries. If the application has locked the row, the status waits.
CREATE FUNCTION outbox._refresh(v_ids bigint[]) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_locked bigint[] := outbox._locked(v_ids);
BEGIN
    UPDATE @extschema@.outbox_events e
       SET status = s.status, processed_at = CASE WHEN s.status = 'processed' THEN clock_timestamp() END
      FROM (SELECT i.id,
                   CASE WHEN bool_or(d.status = 'processing') THEN 'processing'
                        WHEN bool_or(d.status = 'pending') THEN 'pending'
                        WHEN bool_or(d.status = 'failed') THEN 'failed'
                        ELSE 'processed' END AS status
              FROM (SELECT DISTINCT unnest(v_ids) AS id) i
              LEFT JOIN LATERAL (SELECT x.status FROM outbox.delivery x WHERE x.id = i.id OFFSET 0) d ON true
             WHERE i.id <> ALL (v_locked)
             GROUP BY i.id) s
     WHERE e.id BETWEEN s.id AND s.id AND e.listed AND e.claim_token IS NULL AND e.status <> s.status;
    IF v_locked <> '{}' THEN
        INSERT INTO outbox.touched (id) SELECT unnest(v_locked);
        PERFORM outbox._look_again();
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._refresh(bigint[]) IS 'sets the status of listed events from their deliveries';

CREATE FUNCTION outbox._refresh_all() RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    PERFORM outbox._refresh(ARRAY(
        SELECT e.id FROM @extschema@.outbox_events e
          JOIN (SELECT d.id, CASE WHEN bool_or(d.status = 'processing') THEN 'processing'
                                  WHEN bool_or(d.status = 'pending') THEN 'pending' ELSE 'failed' END AS status
                  FROM outbox.delivery d GROUP BY d.id) s ON s.id = e.id
         WHERE e.claim_token IS NULL AND e.listed AND e.status <> s.status));
END
$$;
COMMENT ON FUNCTION outbox._refresh_all() IS 'sets the status of all events that have deliveries';

-- Turns events that are claimed whole into rows of outbox.delivery, one for each destination that the claim holds.
CREATE FUNCTION outbox._list(v_ids bigint[]) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_locked bigint[] := outbox._locked(v_ids);
    v_unwanted bigint[];
    v_closed int;
BEGIN
    WITH target AS MATERIALIZED (
        SELECT e.id, e.claim_token, outbox._ordering_key(e.aggregate_type, e.aggregate_id) AS key
          FROM @extschema@.outbox_events e
         WHERE e.id = ANY (v_ids) AND e.id <> ALL (v_locked) AND e.status = 'processing' AND e.claim_token IS NOT NULL
    ), route AS MATERIALIZED (
        -- A destination that was added later is not part of the claim. One sort, where a join would compare all with all.
        SELECT u.id, u.destination, u.ordering_key, u.token, u.since_token < u.token AS held,
               count(*) FILTER (WHERE u.since_token < u.token) OVER (PARTITION BY u.id) AS holders
          FROM (SELECT r.id, r.destination, r.ordering_key, r.since_token, max(r.token) OVER (PARTITION BY r.id) AS token
                  FROM (SELECT t.id, '' AS destination, t.key AS ordering_key, NULL::bigint AS since_token, t.claim_token AS token
                          FROM target t
                        UNION ALL
                        SELECT w.id, w.destination, w.ordering_key, w.since_token, NULL
                          FROM outbox._routes(ARRAY(SELECT t.id FROM target t)) w) r) u
    ), listed AS (
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, claim_token)
        SELECT r.id, r.destination, r.ordering_key, 'processing', r.token
          FROM route r WHERE r.held OR (r.destination = '' AND r.holders = 0)
        ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING
        RETURNING id, claim_token
    ), marked AS (
        UPDATE @extschema@.outbox_events e SET claim_token = NULL, listed = true
         WHERE e.id = ANY (ARRAY(SELECT t.id FROM target t))
    ), more AS MATERIALIZED (
        SELECT u.claim_token, sum(u.n) AS n
          FROM (SELECT claim_token, 1 AS n FROM listed UNION ALL SELECT claim_token, -1 FROM target) u
         GROUP BY u.claim_token
    ), found AS MATERIALIZED (
        SELECT m.claim_token AS token, m.n, c.at, c.held + m.n <= 0 AS empty
          FROM more m
         CROSS JOIN LATERAL (SELECT x.ctid AS at, x.held FROM outbox.claims x WHERE x.token = m.claim_token OFFSET 0) c
    ), closed AS (
        DELETE FROM outbox.claims c WHERE c.ctid = ANY (ARRAY(SELECT f.at FROM found f WHERE f.empty)) RETURNING 1
    ), recounted AS (
        UPDATE outbox.claims c SET held = c.held + (SELECT f.n FROM found f WHERE f.token = c.token)
         WHERE c.ctid = ANY (ARRAY(SELECT f.at FROM found f WHERE NOT f.empty))
    )
    SELECT array_agg(t.id), (SELECT count(*) FROM closed)
      INTO v_unwanted, v_closed FROM target t WHERE NOT EXISTS (SELECT FROM listed l WHERE l.id = t.id);
    PERFORM outbox._open_claims(-v_closed, NULL) WHERE v_closed > 0;
    -- Events with no delivery left: every destination that they were claimed for was removed.
    PERFORM outbox._refresh(v_unwanted) WHERE v_unwanted IS NOT NULL;
END
$$;
COMMENT ON FUNCTION outbox._list(bigint[]) IS 'lists what claims hold of these events in outbox.delivery';

-- Lists what claims hold of these events and of later ones with the same ordering keys, once for all that a settlement
-- reports: an event that is not delivered takes back those behind it.
CREATE FUNCTION outbox._list_keys(v_tokens bigint[], v_ids bigint[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off
    SET enable_mergejoin = off SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    PERFORM outbox._list(ARRAY(
        WITH given AS MATERIALIZED (
            SELECT s.token, e.id, e.claim_token, outbox._ordering_key(e.aggregate_type, e.aggregate_id) AS key
              FROM unnest(v_tokens, v_ids) AS s (token, id)
             CROSS JOIN LATERAL (SELECT x.* FROM @extschema@.outbox_events x WHERE x.id = s.id OFFSET 0) e
        )
        SELECT g.id FROM given g WHERE g.claim_token = g.token
        UNION
        SELECT e.id
          FROM outbox.claims c CROSS JOIN LATERAL unnest(c.ids) AS i (id)
         CROSS JOIN LATERAL (SELECT x.* FROM @extschema@.outbox_events x WHERE x.id = i.id OFFSET 0) e
         WHERE c.token = ANY (ARRAY(SELECT DISTINCT g.token FROM given g WHERE g.key IS NOT NULL)) AND e.claim_token = c.token
           AND outbox._ordering_key(e.aggregate_type, e.aggregate_id)
               = ANY (ARRAY(SELECT DISTINCT g.key FROM given g WHERE g.key IS NOT NULL))));
END
$$;
COMMENT ON FUNCTION outbox._list_keys(bigint[], bigint[]) IS 'lists what claims hold of these events and of those behind them';

CREATE FUNCTION outbox._list_in_flight() RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    PERFORM outbox._list(ARRAY(SELECT i.id FROM outbox.claims c CROSS JOIN LATERAL unnest(c.ids) AS i (id)));
END
$$;
COMMENT ON FUNCTION outbox._list_in_flight() IS 'lists what all claims hold, before a destination begins to want other events';

-- After deliveries ended or were given back: updates their claims, those that waited for them, and their events.
CREATE FUNCTION outbox._left_claim(v_ids bigint[], v_destinations text[], v_keys bigint[], v_tokens bigint[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._let_go(v_tokens);
    PERFORM outbox._promote(v_destinations, v_keys);
    PERFORM outbox._refresh(v_ids);
END
$$;
COMMENT ON FUNCTION outbox._left_claim(bigint[], text[], bigint[], bigint[]) IS 'updates the books after deliveries left a claim';

-- After a delivery failed, takes back the later ones with its ordering key that the same claim holds: they must not be
-- delivered before it. No other claim can hold any.
CREATE FUNCTION outbox._take_back(v_token bigint, v_destination text, v_key bigint, v_id bigint) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_back record;
BEGIN
    WITH back AS (
        UPDATE outbox.delivery d SET status = 'pending', claim_token = NULL, next_attempt_at = NULL
         WHERE d.destination = v_destination AND d.ordering_key = v_key AND d.place > v_id
           AND d.claim_token IS NOT DISTINCT FROM v_token
        RETURNING d.id
    )
    SELECT array_agg(id) AS ids, array_agg(v_token) AS tokens INTO v_back FROM back;
    PERFORM outbox._let_go(v_back.tokens);
    PERFORM outbox._refresh(v_back.ids);
END
$$;
COMMENT ON FUNCTION outbox._take_back(bigint, text, bigint, bigint) IS 'takes later events of an ordering key back, to wait for one that failed';

-- Ends a settlement: wakes consumers that wait for one.
CREATE FUNCTION outbox._settled(v_changed boolean) RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    IF v_changed AND outbox._is_waiting() THEN
        PERFORM outbox._waiting(false);
        PERFORM outbox._wake('released');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._settled(boolean) IS 'ends a settlement';

CREATE FUNCTION outbox._claim_ids(v_token bigint) RETURNS bigint[]
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN coalesce((SELECT c.ids FROM outbox.claims c WHERE c.token = v_token), '{}');
END
$$;
COMMENT ON FUNCTION outbox._claim_ids(bigint) IS 'all events that a claim handed out';
-- Giving back: events are owed again as if they had never been handed out. No attempt is used.

-- Gives back everything that these claims hold. Events that the application has locked follow when they are free: until then
-- the claim's row stays, with a lease that is over.
CREATE FUNCTION outbox._release(v_tokens bigint[]) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_held bigint[];
    v_locked bigint[];
    v_whole record;
    v_back record;
    v_empty int;
BEGIN
    SELECT array_agg(i) INTO v_held FROM outbox.claims c, unnest(c.ids) AS i WHERE c.token = ANY (v_tokens);
    v_locked := outbox._locked(v_held);
    PERFORM outbox._list(ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                                  WHERE e.id = ANY (v_held) AND e.id <> ALL (v_locked) AND e.claim_token = ANY (v_tokens)
                                    AND e.listed));
    SELECT array_agg(e.id) AS ids, array_agg(e.claim_token) AS tokens INTO v_whole
      FROM @extschema@.outbox_events e
     WHERE e.id = ANY (v_held) AND e.id <> ALL (v_locked) AND e.claim_token = ANY (v_tokens) AND e.status = 'processing';
    UPDATE @extschema@.outbox_events e SET status = 'pending', claim_token = NULL WHERE e.id = ANY (v_whole.ids);
    PERFORM outbox._let_go(v_whole.tokens);
    SELECT array_agg(d.id) AS ids, array_agg(d.destination) AS destinations, array_agg(d.ordering_key) AS keys,
           array_agg(d.claim_token) AS tokens, count(DISTINCT d.id) AS events
      INTO v_back FROM outbox.delivery d WHERE d.claim_token = ANY (v_tokens);
    UPDATE outbox.delivery d SET status = 'pending', claim_token = NULL, next_attempt_at = clock_timestamp()
     WHERE d.claim_token = ANY (v_tokens);
    IF v_back.ids IS NOT NULL THEN
        PERFORM outbox._left_claim(v_back.ids, v_back.destinations, v_back.keys, v_back.tokens);
    END IF;
    UPDATE outbox.claims c SET attachment = NULL, lease_until = clock_timestamp()
     WHERE c.token = ANY (v_tokens) AND c.token = ANY (ARRAY(SELECT e.claim_token FROM @extschema@.outbox_events e
                                                             WHERE e.id = ANY (v_locked)));
    IF FOUND THEN
        PERFORM outbox._open_claims(0, clock_timestamp() + interval '250 milliseconds');
    END IF;
    WITH gone AS (
        DELETE FROM outbox.claims c
         WHERE c.token = ANY (v_tokens)
           AND c.token <> ALL (ARRAY(SELECT e.claim_token FROM @extschema@.outbox_events e
                                      WHERE e.id = ANY (v_locked) AND e.claim_token IS NOT NULL))
        RETURNING 1
    )
    SELECT count(*) INTO v_empty FROM gone;
    PERFORM outbox._open_claims(-v_empty, NULL) WHERE v_empty > 0;
    IF v_whole.ids IS NOT NULL OR v_back.ids IS NOT NULL THEN
        PERFORM outbox._wake('released');
    END IF;
    RETURN coalesce(cardinality(v_whole.ids), 0) + v_back.events;
END
$$;
COMMENT ON FUNCTION outbox._release(bigint[]) IS 'gives back all that the claims hold';

-- Gives back one delivery that the consumer has no room for.
CREATE FUNCTION outbox._release_one(v_token bigint, v_id bigint, v_destination text) RETURNS boolean
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_key bigint;
BEGIN
    UPDATE outbox.delivery d SET status = 'pending', claim_token = NULL, next_attempt_at = clock_timestamp()
     WHERE d.id = v_id AND d.destination = v_destination AND d.claim_token IS NOT DISTINCT FROM v_token AND v_token IS NOT NULL
    RETURNING d.ordering_key INTO v_key;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF v_key IS NOT NULL THEN
        PERFORM outbox._take_back(v_token, v_destination, v_key, v_id);
    END IF;
    PERFORM outbox._left_claim(ARRAY[v_id], ARRAY[v_destination], ARRAY[v_key], ARRAY[v_token]);
    PERFORM outbox._wake('released');
    RETURN true;
END
$$;
COMMENT ON FUNCTION outbox._release_one(bigint, bigint, text) IS 'gives back one delivery; uses no attempt';

-- Releases each claim by itself if they can't be released together. Returns SQLSTATE and message of the obstacle.
CREATE FUNCTION outbox._release_apart(v_tokens bigint[]) RETURNS text
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_token bigint;
    v_error text;
BEGIN
    BEGIN
        PERFORM outbox._release(v_tokens);
        RETURN NULL;
    EXCEPTION WHEN OTHERS THEN
        v_error := SQLSTATE || ' ' || SQLERRM;
    END;
    FOREACH v_token IN ARRAY v_tokens LOOP
        EXIT WHEN cardinality(v_tokens) = 1;
        BEGIN
            PERFORM outbox._release(ARRAY[v_token]);
        EXCEPTION WHEN OTHERS THEN
            v_error := SQLSTATE || ' ' || SQLERRM;
            -- This obstacle was waited for already.
            PERFORM set_config('lock_timeout', '1ms', true);
        END;
    END LOOP;
    RETURN v_error;
END
$$;
COMMENT ON FUNCTION outbox._release_apart(bigint[]) IS 'releases as many of these claims as can be released';

-- No session survives the server, so claims of earlier starts are free. A crash may have lost claims whose consumer did not
-- wait for the disk: the sequence jumps past their tokens, on disk before the first new token is given out.
CREATE FUNCTION outbox._forget_earlier_starts() RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._release(ARRAY(SELECT c.token FROM outbox.claims c WHERE c.boot <> outbox._boot()))
      WHERE EXISTS (SELECT FROM outbox.claims c WHERE c.boot <> outbox._boot());
    PERFORM outbox._commit_to_disk();
    PERFORM setval('outbox.claim_token_seq', nextval('outbox.claim_token_seq') + 100000);
END
$$;
COMMENT ON FUNCTION outbox._forget_earlier_starts() IS 'ends all claims of earlier starts of the server';

-- Looks after events that the application deleted or rescheduled, and after those whose status was left for later.
CREATE FUNCTION outbox._look_after_touched() RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_batch CONSTANT int := 5000;   -- at a time: others wait for the lock
    v_touched record;
    v_gone record;
BEGIN
    WITH taken AS (
        DELETE FROM outbox.touched t WHERE t.ctid = ANY (ARRAY(SELECT x.ctid FROM outbox.touched x LIMIT v_batch))
        RETURNING t.id, t.ordering_key, t.claim_token
    )
    SELECT array_agg(t.id) AS ids, array_agg(t.ordering_key) FILTER (WHERE t.ordering_key IS NOT NULL) AS keys,
           array_agg(t.claim_token) FILTER (WHERE t.claim_token IS NOT NULL) AS tokens, count(*) AS n
      INTO v_touched FROM taken t;
    IF v_touched.n = 0 THEN
        RETURN;
    END IF;
    WITH gone AS (
        DELETE FROM outbox.delivery d
         WHERE d.id = ANY (v_touched.ids) AND NOT EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = d.id)
        RETURNING d.ordering_key, d.claim_token
    )
    SELECT array_agg(g.ordering_key) AS keys, array_agg(g.claim_token) FILTER (WHERE g.claim_token IS NOT NULL) AS tokens
      INTO v_gone FROM gone g;
    PERFORM outbox._let_go(v_touched.tokens || v_gone.tokens);
    PERFORM outbox._promote_keys(v_touched.keys || v_gone.keys);
    PERFORM outbox._refresh(v_touched.ids);
    PERFORM outbox._settled(true);
    PERFORM outbox._wake_at(clock_timestamp()) WHERE v_touched.n = v_batch;
END
$$;
COMMENT ON FUNCTION outbox._look_after_touched() IS
    'removes the deliveries of deleted events and promotes the events that waited for them';
-- Own events: what pg_outbox itself says of destinations and dead letters. Their types begin with outbox. and they are
-- inserted by the transaction that changes the state, like any other event, if some destination names their type.
--
-- Nothing is said of deliveries of own events, or two receivers that fail could keep each other busy for ever.

-- cause: the event whose delivery changed the state. An insert that fails is a warning: the caller settles what others wait
-- for. Returns whether the event was inserted.
CREATE FUNCTION outbox._tell(v_type text, v_destination text, v_tenant_id text, v_cause bigint, v_data jsonb) RETURNS boolean
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_is_of_destination CONSTANT boolean := v_type LIKE 'outbox.destination.%';
BEGIN
    IF NOT EXISTS (SELECT FROM outbox._wanting(v_type, v_tenant_id))
       OR EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = v_cause AND e.event_type LIKE 'outbox.%') THEN
        RETURN false;
    END IF;
    BEGIN
        INSERT INTO @extschema@.outbox_events (event_type, aggregate_type, aggregate_id, tenant_id, event_data)
        VALUES (v_type, CASE WHEN v_is_of_destination THEN 'outbox.destination' END,
                CASE WHEN v_is_of_destination THEN v_destination END, v_tenant_id,
                jsonb_build_object('destination', v_destination) || v_data);
        RETURN FOUND;
    EXCEPTION WHEN OTHERS THEN
        RAISE WARNING USING MESSAGE = format('event %s about destination %s was not inserted: %s', v_type, v_destination, SQLERRM),
            HINT = 'See the check foreign_objects of outbox.health() for triggers that others added.';
        RETURN false;
    END;
END
$$;
COMMENT ON FUNCTION outbox._tell(text, text, text, bigint, jsonb) IS
    'inserts an event about a destination, if some destination names its type';

-- Says that a circuit closed if its opening was said, however it closed.
CREATE FUNCTION outbox._tell_closed(v_destination text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_told record;
BEGIN
    UPDATE outbox.destination t SET opening_told = false WHERE t.name = v_destination AND t.opening_told
    RETURNING t.kind, t.tenant_id INTO v_told;
    IF FOUND THEN
        PERFORM outbox._tell('outbox.destination.closed', v_destination, v_told.tenant_id, NULL,
                             jsonb_build_object('kind', v_told.kind));
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._tell_closed(text) IS 'a circuit closed: says so if its opening was said';
-- The circuit breaker of each destination. Closed: deliveries flow. Open until a moment: nothing is handed out, nothing
-- uses an attempt. Half open after that moment: one event probes; success closes the circuit, failure opens it for longer.
--
-- The circuit belongs to the destination. A relay that can't serve it has a problem of its own: the operator sees it as long
-- as nobody delivers there, and nobody else waits for it.

-- Relays read the destinations again, and claim what may have become deliverable. The worker looks anew at what is due when.
CREATE FUNCTION outbox._destinations_changed(name text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._promote_all(name);
    PERFORM pg_notify('outbox_destinations', name);
    PERFORM outbox._wake('due');
    PERFORM outbox._wake_at(clock_timestamp());
END
$$;
COMMENT ON FUNCTION outbox._destinations_changed(text) IS 'tells the relays that a destination changed';

-- Whether somebody other than this session has just delivered there: then what failed here is not the destination's fault.
CREATE FUNCTION outbox._answers_others(v_destination text) RETURNS boolean
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN EXISTS (SELECT FROM outbox.destination t
                    WHERE t.name = v_destination AND t.last_success_by <> pg_backend_pid()
                      AND t.last_success_at > clock_timestamp() - interval '5 seconds');
END
$$;
COMMENT ON FUNCTION outbox._answers_others(text) IS 'another session has delivered to the destination within seconds';

CREATE FUNCTION outbox._open_circuit(v_destination text, v_error text, v_retry_in interval, v_cause bigint) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_open record;
BEGIN
    UPDATE outbox.destination t
       SET circuit_failures = t.circuit_failures + 1, last_error = v_error,
           circuit_open_until = clock_timestamp()
               + coalesce(v_retry_in, (0.5 + random() / 2) * least(interval '30 seconds',
                                           interval '250 milliseconds' * power(2, least(t.circuit_failures, 20))))
     WHERE t.name = v_destination AND coalesce(t.circuit_open_until, '-infinity') <= clock_timestamp()
    RETURNING t.circuit_open_until, t.circuit_failures, t.kind, t.tenant_id INTO v_open;
    PERFORM outbox._wake_at(v_open.circuit_open_until);
    IF v_open.circuit_failures = 1
       AND outbox._tell('outbox.destination.opened', v_destination, v_open.tenant_id, v_cause,
                        jsonb_build_object('kind', v_open.kind, 'reason', v_error)) THEN
        UPDATE outbox.destination t SET opening_told = true WHERE t.name = v_destination;
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._open_circuit(text, text, interval, bigint) IS
    'a destination is down as a whole: it is left alone for a while, longer each time (up to 30 s)';

-- A success while the circuit is open was under way before: it does not end the pause that a receiver asked for.
CREATE FUNCTION outbox._close_circuits(v_destinations text[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_closed text[];
BEGIN
    WITH closed AS (
        UPDATE outbox.destination t SET circuit_failures = 0, circuit_open_until = NULL
         WHERE t.name = ANY (v_destinations) AND t.circuit_failures > 0
           AND coalesce(t.circuit_open_until, '-infinity') <= clock_timestamp()
        RETURNING t.name
    )
    SELECT array_agg(c.name) INTO v_closed FROM closed c;
    IF v_closed IS NOT NULL THEN
        PERFORM outbox._wake('due');
        PERFORM outbox._tell_closed(c) FROM unnest(v_closed) AS c;
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._close_circuits(text[]) IS 'a destination answered: its deliveries flow again';

-- Relays report successes now and then, not each one.
CREATE FUNCTION outbox._answered(v_destinations text[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE outbox.destination t
       SET last_success_at = clock_timestamp(), last_success_by = pg_backend_pid(), failing_since = NULL, unable_at = NULL
     WHERE t.name = ANY (v_destinations);
    PERFORM outbox._close_circuits(v_destinations);
END
$$;
COMMENT ON FUNCTION outbox._answered(text[]) IS 'notes that destinations take deliveries';

CREATE FUNCTION outbox._note_unable(v_destinations text[], v_error text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE outbox.destination t SET unable_at = clock_timestamp(), last_error = v_error
     WHERE t.name = ANY (v_destinations) AND NOT outbox._answers_others(t.name)
       AND (t.unable_at IS NULL OR t.last_error IS DISTINCT FROM v_error);
END
$$;
COMMENT ON FUNCTION outbox._note_unable(text[], text) IS
    'a relay can''t serve the destinations: shown unless another one has just delivered there';

-- Relays report successes; other consumers may just settle events. So this looks at a bounded number of the latest events
-- before a destination is disabled.
CREATE FUNCTION outbox._has_delivered_since(v_destination text, v_since timestamptz) RETURNS boolean
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM (SELECT e.id, e.event_type, e.tenant_id, e.status, e.processed_at FROM @extschema@.outbox_events e
                      ORDER BY e.id DESC LIMIT 1000) e
         WHERE e.status = 'processed' AND e.processed_at > v_since
           AND outbox._wants(v_destination, e.id, e.event_type, e.tenant_id));
END
$$;
COMMENT ON FUNCTION outbox._has_delivered_since(text, timestamptz) IS 'an event that the destination wants was processed lately';

CREATE FUNCTION outbox._disable(v_destination text, v_reason text, v_cause bigint) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_disabled record;
BEGIN
    UPDATE outbox.destination t SET disabled_reason = coalesce(v_reason, 'gone'), last_error = v_reason
     WHERE t.name = v_destination AND t.disabled_reason IS NULL
    RETURNING t.kind, t.tenant_id, t.disabled_reason INTO v_disabled;
    IF FOUND THEN
        PERFORM outbox._tell('outbox.destination.disabled', v_destination, v_disabled.tenant_id, v_cause,
                             jsonb_build_object('kind', v_disabled.kind, 'reason', v_disabled.disabled_reason));
    END IF;
    PERFORM outbox._destinations_changed(v_destination);
END
$$;
COMMENT ON FUNCTION outbox._disable(text, text, bigint) IS
    'a destination asked not to be called again, or has not answered for too long; outbox.resume() ends that';

-- The time counts from the first failure since the last success: a destination that never answers is disabled in the end.
CREATE FUNCTION outbox._note_failure(v_destination text, v_kind text, v_settings jsonb, v_error text, v_cause bigint)
    RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_limit interval := outbox._span(v_settings, 'disable_after', CASE v_kind WHEN 'webhook' THEN interval '5 days' END);
    v_since timestamptz;
BEGIN
    UPDATE outbox.destination t SET failing_since = clock_timestamp()
     WHERE t.name = v_destination AND t.failing_since IS NULL;
    SELECT t.failing_since INTO v_since FROM outbox.destination t WHERE t.name = v_destination;
    IF v_limit IS NULL OR clock_timestamp() - v_since < v_limit THEN
        RETURN;
    ELSIF outbox._has_delivered_since(v_destination, v_since) THEN
        UPDATE outbox.destination t SET failing_since = clock_timestamp() WHERE t.name = v_destination;
    ELSE
        PERFORM outbox._disable(v_destination, format('no success since %s: %s',
                                                      to_char(v_since AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'), v_error),
                                v_cause);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._note_failure(text, text, jsonb, text, bigint) IS
    'an attempt failed: after settings.disable_after without a success the destination is disabled';

-- Decides what a failed delivery of the event v_cause means for its destination.
CREATE FUNCTION outbox._blame(
    v_destination text, v_kind text, v_settings jsonb, v_what text, v_error text, v_retry_in interval, v_cause bigint)
    RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF v_what = 'unable' THEN
        PERFORM outbox._note_unable(ARRAY[v_destination], v_error);
        PERFORM outbox._wake('released');
        RETURN;
    ELSIF v_what IN ('unavailable', 'throttled') THEN
        PERFORM outbox._open_circuit(v_destination, v_error, v_retry_in, v_cause);
    ELSE
        PERFORM outbox._close_circuits(ARRAY[v_destination]);
    END IF;
    IF v_what <> 'rejected' AND v_kind IS NOT NULL THEN
        PERFORM outbox._note_failure(v_destination, v_kind, v_settings, v_error, v_cause);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._blame(text, text, jsonb, text, text, interval, bigint) IS 'what a failed delivery means for its destination';

CREATE FUNCTION outbox.destination_unable(names text[], error text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
BEGIN
    PERFORM outbox._lock();
    PERFORM outbox._note_unable(names, error);
END
$$;
COMMENT ON FUNCTION outbox.destination_unable(text[], text) IS
    'reports that this consumer can''t serve these destinations; their events stay for others';

-- Half open, not closed: the destination's next answer decides.
CREATE FUNCTION outbox.destination_back(names text[]) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
#variable_conflict use_column
BEGIN
    PERFORM outbox._lock();
    UPDATE outbox.destination t SET circuit_open_until = least(t.circuit_open_until, clock_timestamp()), unable_at = NULL
     WHERE t.name = ANY (names) AND (t.circuit_open_until > clock_timestamp() OR t.unable_at IS NOT NULL);
    IF FOUND THEN
        PERFORM outbox._wake('due');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox.destination_back(text[]) IS
    'reports that this consumer reaches these destinations again: an open circuit becomes half open';
-- The triggers of outbox_events. The row triggers leave notes in the backend's memory and touch no table; they neither
-- fail nor wait. NOTIFY is never called here: the worker does that after the commit.

CREATE FUNCTION @extschema@.notify_outbox_event() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'notify_outbox_event';
COMMENT ON FUNCTION @extschema@.notify_outbox_event() IS 'notes a new event, for the worker to announce after the commit';

CREATE TRIGGER after_outbox_insert AFTER INSERT ON @extschema@.outbox_events
    FOR EACH ROW EXECUTE FUNCTION @extschema@.notify_outbox_event();

CREATE FUNCTION outbox._track_change() RETURNS trigger LANGUAGE c AS 'MODULE_PATHNAME', 'track_outbox_change';
COMMENT ON FUNCTION outbox._track_change() IS 'keeps the counters and the low-water mark right, whoever changes a row';

CREATE TRIGGER after_outbox_change AFTER UPDATE OF status, available_at OR DELETE ON @extschema@.outbox_events
    FOR EACH ROW EXECUTE FUNCTION outbox._track_change();

CREATE TRIGGER after_outbox_truncate AFTER TRUNCATE ON @extschema@.outbox_events
    FOR EACH STATEMENT EXECUTE FUNCTION outbox._track_change();

-- Stands in for a foreign key, whose check would lock the event's row for each parked delivery. A DELETE and a claim don't
-- wait for each other: the deliveries are removed after the commit, see outbox._catch_up().
CREATE FUNCTION outbox._note_gone() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
AS $$
BEGIN
    INSERT INTO outbox.touched (id, ordering_key, claim_token)
    SELECT g.id, outbox._ordering_key(g.aggregate_type, g.aggregate_id), g.claim_token
      FROM gone g
     WHERE g.status <> 'processed' AND (g.listed OR g.claim_token IS NOT NULL OR g.available_at IS NOT NULL);
    IF FOUND THEN
        PERFORM outbox._wake_at(clock_timestamp());
    END IF;
    IF EXISTS (SELECT FROM outbox.adopted) THEN
        DELETE FROM outbox.adopted_event a WHERE a.event = ANY (ARRAY(SELECT g.id FROM gone g));
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._note_gone() IS 'notes deleted events, for the worker to remove their deliveries';

CREATE TRIGGER after_outbox_delete AFTER DELETE ON @extschema@.outbox_events
    REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION outbox._note_gone();

-- At once, because ids may begin anew. Nobody can have a delivery locked now: that takes a lock on the table of events.
CREATE FUNCTION outbox._forget_deliveries() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM outbox.delivery;
    DELETE FROM outbox.claims;
    DELETE FROM outbox.touched;
    DELETE FROM outbox.postponed;
    DELETE FROM outbox.adopted_event;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._forget_deliveries() IS 'all deliveries go with all events';

CREATE TRIGGER after_outbox_truncate_deliveries AFTER TRUNCATE ON @extschema@.outbox_events
    FOR EACH STATEMENT EXECUTE FUNCTION outbox._forget_deliveries();

-- Decides what an edit by hand means. The payload may change at any time: the next attempt sends it. Type, aggregate, tenant
-- and available_at may change until the event is given to its destinations. While no delivery is listed and no claim holds
-- the event, 'processed' takes it as delivered and 'pending' owes it to all that want it. Otherwise claims and settlements
-- decide its state, and an edit of it is refused.
CREATE FUNCTION outbox._guard_edit() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NEW.status <> OLD.status
       AND (OLD.listed OR OLD.claim_token IS NOT NULL OR NEW.status NOT IN ('pending', 'processed')) THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('status of outbox event %s can''t be changed from %s to %s by an UPDATE', OLD.id, OLD.status, NEW.status),
            HINT = 'Use outbox.replay() to deliver it again, claim and ack to take it as delivered, or delete the event.';
    ELSIF (NEW.id, NEW.event_id, NEW.listed, NEW.routed) <> (OLD.id, OLD.event_id, OLD.listed, OLD.routed)
          OR NEW.claim_token IS DISTINCT FROM OLD.claim_token THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('id, event_id, claim_token, listed and routed of outbox event %s can''t be changed', OLD.id),
            HINT = 'Insert another event in its place.';
    ELSIF OLD.status <> 'processed' AND (OLD.status <> 'pending' OR OLD.listed)
          AND (NEW.event_type, NEW.aggregate_type, NEW.aggregate_id, NEW.tenant_id, NEW.available_at)
              IS DISTINCT FROM (OLD.event_type, OLD.aggregate_type, OLD.aggregate_id, OLD.tenant_id, OLD.available_at) THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('type, aggregate, tenant and available_at of outbox event %s can''t be changed any more', OLD.id),
            DETAIL = 'It has been given to its destinations.',
            HINT = 'Delete the event and insert another one, or change event_data and metadata alone.';
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._guard_edit() IS 'refuses an edit by hand that the event''s state contradicts';

CREATE TRIGGER guard_outbox_edit
    AFTER UPDATE OF id, event_id, event_type, aggregate_type, aggregate_id, tenant_id, available_at, status, claim_token,
                    listed, routed ON @extschema@.outbox_events
    FOR EACH ROW
    WHEN (current_user <> 'outbox_owner'
          AND (OLD.id, OLD.event_id, OLD.event_type, OLD.aggregate_type, OLD.aggregate_id, OLD.tenant_id, OLD.available_at,
               OLD.status, OLD.claim_token, OLD.listed, OLD.routed)
              IS DISTINCT FROM
              (NEW.id, NEW.event_id, NEW.event_type, NEW.aggregate_type, NEW.aggregate_id, NEW.tenant_id, NEW.available_at,
               NEW.status, NEW.claim_token, NEW.listed, NEW.routed))
    EXECUTE FUNCTION outbox._guard_edit();

-- A row that these functions did not add comes with a restore. A delivery that recovery has made already from its event
-- stays as it is; the worker looks at all others.
CREATE FUNCTION outbox._admit_delivery() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM outbox.delivery d WHERE d.id = NEW.id AND d.destination = NEW.destination) THEN
        RETURN NULL;
    ELSIF NEW.status = 'processing' THEN
        NEW.status := 'pending';
        NEW.claim_token := NULL;
        NEW.next_attempt_at := clock_timestamp();
    END IF;
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION outbox._admit_delivery() IS 'takes in a delivery that comes with a restore';

CREATE TRIGGER before_restored_delivery BEFORE INSERT ON outbox.delivery
    FOR EACH ROW WHEN (current_user <> 'outbox_owner') EXECUTE FUNCTION outbox._admit_delivery();

CREATE TRIGGER after_restored_delivery AFTER INSERT ON outbox.delivery
    FOR EACH STATEMENT WHEN (current_user <> 'outbox_owner') EXECUTE FUNCTION outbox._track_change();

-- In the same transaction, so that no claim sees a destination that wants nothing.
CREATE FUNCTION outbox._restore_interest() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._put_interest(NEW.name);
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._restore_interest() IS 'enters the patterns of a destination that comes with a restore';

CREATE TRIGGER put_restored_interest AFTER INSERT ON outbox.destination
    FOR EACH ROW WHEN (current_user <> 'outbox_owner') EXECUTE FUNCTION outbox._restore_interest();

CREATE TRIGGER after_restored_destination AFTER INSERT ON outbox.destination
    FOR EACH STATEMENT WHEN (current_user <> 'outbox_owner') EXECUTE FUNCTION outbox._track_change();

-- The worker has no timer for what came with a restore.
CREATE TRIGGER after_restored_inbox AFTER INSERT ON outbox.inbox
    FOR EACH STATEMENT WHEN (current_user <> 'outbox_owner') EXECUTE FUNCTION outbox._track_change();

-- The functions name the table and its columns, so these names stay.
CREATE FUNCTION outbox._guard_names() RETURNS event_trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regnamespace('outbox') IS NULL OR (
        SELECT count(*)
          FROM pg_class c
          JOIN pg_attribute a ON a.attrelid = c.oid AND NOT a.attisdropped
          JOIN (VALUES ('id', 'int8'), ('event_id', 'uuid'), ('event_type', 'text'), ('event_version', 'text'),
                       ('aggregate_type', 'text'), ('aggregate_id', 'text'), ('tenant_id', 'text'), ('event_data', 'jsonb'),
                       ('metadata', 'jsonb'), ('created_at', 'timestamptz'), ('available_at', 'timestamptz'),
                       ('status', 'text'), ('retry_count', 'int4'), ('last_error', 'text'), ('processed_at', 'timestamptz'),
                       ('claim_token', 'int8'), ('listed', 'bool'), ('routed', 'bool')) AS k (name, type)
            ON a.attname = k.name AND a.atttypid = k.type::regtype
         WHERE c.relnamespace = to_regnamespace('@extschema@') AND c.relname = 'outbox_events' AND c.relkind = 'r') < 18 THEN
        RAISE EXCEPTION USING ERRCODE = 'dependent_objects_still_exist',
            MESSAGE = 'outbox_events, its columns and its schema can''t be renamed, moved or changed in type',
            DETAIL = 'The functions of pg_outbox name them.',
            HINT = 'To have the table in another schema: CREATE EXTENSION pg_outbox SCHEMA … in a new database, or after DROP EXTENSION.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._guard_names() IS 'refuses a change of the names that the functions rely on';

CREATE EVENT TRIGGER outbox_guard_names ON ddl_command_end
    WHEN TAG IN ('ALTER TABLE', 'ALTER SCHEMA', 'ALTER INDEX', 'ALTER VIEW', 'ALTER MATERIALIZED VIEW', 'ALTER SEQUENCE', 'ALTER FOREIGN TABLE')
    EXECUTE FUNCTION outbox._guard_names();
-- For producers who prefer a call to an INSERT.

CREATE FUNCTION outbox.publish(
    event_type text, event_data jsonb, aggregate_type text DEFAULT NULL, aggregate_id text DEFAULT NULL,
    metadata jsonb DEFAULT '{}', available_at timestamptz DEFAULT NULL, event_id uuid DEFAULT NULL,
    event_version text DEFAULT 'v1', tenant_id text DEFAULT NULL) RETURNS uuid
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_event_id uuid := coalesce(event_id, outbox.uuid_v7());
BEGIN
    IF coalesce(event_type, '') = '' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'event_type must not be null or empty',
            HINT = 'Name the event in the past tense, for example ''contact.created''.';
    ELSIF event_data IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'event_data must not be null',
            HINT = 'Pass ''{}''::jsonb for an event without data.';
    END IF;
    INSERT INTO @extschema@.outbox_events
           (event_id, event_type, event_version, aggregate_type, aggregate_id, tenant_id, event_data, metadata, available_at)
    VALUES (v_event_id, publish.event_type, coalesce(publish.event_version, 'v1'), publish.aggregate_type,
            publish.aggregate_id, publish.tenant_id, publish.event_data, coalesce(publish.metadata, '{}'),
            publish.available_at);
    RETURN v_event_id;
END
$$;
COMMENT ON FUNCTION outbox.publish(text, jsonb, text, text, jsonb, timestamptz, uuid, text, text) IS
    'inserts an event into outbox_events and returns its event_id';
-- What a claim may hand out: to whom, from where on, and under which token.

CREATE FUNCTION outbox._check_claim(max_events int, lease interval) RETURNS void
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION USING ERRCODE = 'read_only_sql_transaction',
            MESSAGE = 'cannot claim events on a standby',
            HINT = 'Connect to the primary, for example with target_session_attrs=read-write.';
    ELSIF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION USING ERRCODE = 'feature_not_supported',
            MESSAGE = format('cannot claim events in a %s transaction', current_setting('transaction_isolation')),
            DETAIL = 'Its snapshot may be older than what other consumers have claimed meanwhile.',
            HINT = 'Claim in a READ COMMITTED transaction, for example with SET default_transaction_isolation.';
    ELSIF max_events IS NULL OR max_events < 1 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('max_events must be at least 1, not %s', coalesce(max_events::text, 'null')),
            HINT = 'Ask for as many events as you can work on before the lease ends.';
    ELSIF lease IS NULL OR lease <= interval '0' OR lease > interval '100 years' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'lease must be above zero and at most 100 years',
            HINT = 'A claim is released when its lease ends; the default is 1 minute.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_claim(int, interval) IS 'an error for arguments that make no claim';

-- The destinations that a consumer serves.
CREATE TYPE outbox.claim_scope AS (
    names    jsonb,     -- an object with their names; null: all
    passed   jsonb,     -- an object with the names of those that are left out
    patterns text[],    -- LIKE patterns of their names; null: all
    brokers  text[]     -- the brokers of RabbitMQ destinations; null: all, and the consumer may be one without any destination
);
COMMENT ON TYPE outbox.claim_scope IS 'the destinations that a consumer serves; internal';

-- Objects, because finding a name among thousands must not look at all of them. In PL/pgSQL: an SQL function with a query
-- in it is planned anew by each claim.
CREATE FUNCTION outbox._names(names text[]) RETURNS jsonb
    LANGUAGE plpgsql IMMUTABLE
AS $$
BEGIN
    RETURN CASE WHEN names IS NULL THEN NULL
                WHEN names = '{}' THEN '{}'
                ELSE (SELECT coalesce(jsonb_object_agg(n, true), '{}') FROM unnest(names) AS n WHERE n IS NOT NULL) END;
END
$$;
COMMENT ON FUNCTION outbox._names(text[]) IS 'an object with these names';

-- No settings of its own, so that the planner can merge it into the query that uses it.
CREATE FUNCTION outbox._serves(scope outbox.claim_scope, name text, broker text) RETURNS boolean
    LANGUAGE sql IMMUTABLE
AS $$
    SELECT coalesce(scope.names ? name, true) AND NOT coalesce(scope.passed ? name, false)
       AND coalesce(name LIKE ANY (scope.patterns), true)
       AND (broker IS NULL OR coalesce(broker = ANY (scope.brokers), true))
$$;
COMMENT ON FUNCTION outbox._serves(outbox.claim_scope, text, text) IS 'whether the consumer serves this destination';

CREATE FUNCTION outbox._takes_all(scope outbox.claim_scope) RETURNS boolean
    LANGUAGE sql IMMUTABLE
RETURN (scope).names IS NULL AND (scope).brokers IS NULL;
COMMENT ON FUNCTION outbox._takes_all(outbox.claim_scope) IS
    'whether a consumer gets events while there is no destination: one of the application''s own, which names none';

-- No settings of its own, so that the planner can merge it into the query that uses it.
-- The destinations that may want events of one kind, and what this claim may do for each. serve: hand out any number of
-- events; elsewhere: none, but another consumer may serve it now. While there is no destination, '' stands for a consumer of
-- the application's own.
CREATE FUNCTION outbox._eligible(scope outbox.claim_scope, event_type text, tenant_id text)
    RETURNS TABLE (name text, filter jsonpath, serve boolean, elsewhere boolean, blocks boolean)
    LANGUAGE sql STABLE ROWS 2
AS $$
    SELECT d.name, d.filter, m.active AND m.mine AND d.circuit_failures = 0,
           m.active AND NOT m.mine AND coalesce(d.circuit_open_until, '-infinity') <= clock_timestamp(), d.blocks
      FROM outbox._wanting($2, $3) d,
           LATERAL (SELECT outbox._serves($1, d.name, d.broker), NOT d.paused AND d.disabled_reason IS NULL) AS m (mine, active)
    UNION ALL
    SELECT '', NULL, true, false, false
     WHERE outbox._takes_all($1) AND NOT EXISTS (SELECT FROM outbox.destination)
$$;
COMMENT ON FUNCTION outbox._eligible(outbox.claim_scope, text, text) IS
    'the destinations that may want events of this type and tenant, and what a claim may do for each';

-- No settings of its own, so that the planner can merge it into the query that uses it.
-- The destinations that have something due which this claim may hand out, those that have waited longest first. probe: one
-- delivery, because the circuit is half open.
CREATE FUNCTION outbox._with_due(scope outbox.claim_scope, moment timestamptz)
    RETURNS TABLE (name text, blocks boolean, probe boolean)
    LANGUAGE sql STABLE ROWS 10
AS $$
    (SELECT d.name, d.blocks, d.circuit_failures > 0
       FROM outbox.destination d
      WHERE d.ready_at <= $2 AND outbox._serves($1, d.name, d.broker)
        AND (d.circuit_failures = 0
             OR NOT EXISTS (SELECT FROM outbox.delivery x WHERE x.claim_token IS NOT NULL AND x.destination = d.name))
      ORDER BY d.ready_at)
    UNION ALL
    SELECT '', false, false
     WHERE outbox._takes_all($1) AND NOT EXISTS (SELECT FROM outbox.destination)
$$;
COMMENT ON FUNCTION outbox._with_due(outbox.claim_scope, timestamptz) IS
    'the destinations that have something due which a claim may hand out';

-- Whether a claim can hand out anything: some destination that the consumer serves takes any number of events (serve) or a
-- single one (probe).
CREATE FUNCTION outbox._may_serve(scope outbox.claim_scope, OUT serve boolean, OUT probe boolean)
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    IF scope.names IS NOT NULL THEN
        SELECT coalesce(bool_or(d.circuit_failures = 0), false),
               coalesce(bool_or(d.circuit_failures > 0 AND coalesce(d.circuit_open_until, '-infinity') <= clock_timestamp()), false)
          INTO serve, probe
          FROM jsonb_object_keys(scope.names) AS n (name)
         CROSS JOIN LATERAL (SELECT x.* FROM outbox.destination x WHERE x.name = n.name OFFSET 0) d
         WHERE NOT d.paused AND d.disabled_reason IS NULL AND outbox._serves(scope, d.name, d.broker);
        RETURN;
    END IF;
    serve := EXISTS (SELECT FROM outbox.destination d
                      WHERE d.circuit_failures = 0 AND NOT d.paused AND d.disabled_reason IS NULL
                        AND outbox._serves(scope, d.name, d.broker))
             OR (outbox._takes_all(scope) AND NOT EXISTS (SELECT FROM outbox.destination));
    probe := NOT serve
             AND EXISTS (SELECT FROM outbox.destination d
                          WHERE d.circuit_failures > 0 AND NOT d.paused AND d.disabled_reason IS NULL
                            AND coalesce(d.circuit_open_until, '-infinity') <= clock_timestamp()
                            AND outbox._serves(scope, d.name, d.broker));
END
$$;
COMMENT ON FUNCTION outbox._may_serve(outbox.claim_scope) IS 'whether a claim can hand out anything';

-- No settings of its own, so that the planner can merge it into the query that uses it.
-- In flight: claimed whole. Fresh events with their ordering keys wait; they stay fresh and are found again.
CREATE FUNCTION outbox._in_flight(low_water bigint, high_water bigint) RETURNS TABLE (id bigint, key bigint)
    LANGUAGE sql STABLE ROWS 100
AS $$
    SELECT e.id, outbox._ordering_key(e.aggregate_type, e.aggregate_id)
      FROM @extschema@.outbox_events e
     WHERE e.id BETWEEN low_water AND high_water AND e.status = 'processing' AND e.claim_token IS NOT NULL
       AND e.aggregate_id IS NOT NULL
$$;
COMMENT ON FUNCTION outbox._in_flight(bigint, bigint) IS 'events that are claimed whole and have an ordering key';

CREATE FUNCTION outbox._advance_low_water(low_water bigint) RETURNS bigint
    LANGUAGE plpgsql STABLE
AS $$
BEGIN
    RETURN coalesce(
        (SELECT e.id FROM @extschema@.outbox_events e
          WHERE e.id >= low_water AND ((e.status = 'pending' AND NOT e.listed AND e.available_at IS NULL)
                                  OR (e.status = 'processing' AND e.claim_token IS NOT NULL))
          ORDER BY e.id LIMIT 1),
        (SELECT least(e.id, 9223372036854775806) + 1 FROM @extschema@.outbox_events e WHERE e.id >= low_water ORDER BY e.id DESC LIMIT 1),
        low_water);
END
$$;
COMMENT ON FUNCTION outbox._advance_low_water(bigint) IS 'the lowest fresh or claimed event from the low-water mark on';

-- Tokens always rise, even when the sequence does not (a restore sets it back, a subscription never sets it). So an answer
-- to an old claim can't settle a new one, and each destination is older than the claims that serve it.
CREATE FUNCTION outbox._new_token() RETURNS bigint
    LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    v_token bigint := nextval('outbox.claim_token_seq');
    v_floor bigint := greatest(outbox._last_token(), (SELECT max(d.since_token) FROM outbox.destination d));
BEGIN
    IF v_token <= v_floor THEN
        v_token := setval('outbox.claim_token_seq', v_floor + 1);
    END IF;
    PERFORM outbox._note_token(v_token);
    RETURN v_token;
END
$$;
COMMENT ON FUNCTION outbox._new_token() IS 'a token higher than any before; for the holder of the claim lock';

CREATE FUNCTION outbox._is_due(scope outbox.claim_scope) RETURNS boolean
    LANGUAGE plpgsql STABLE
AS $$
DECLARE
    v_now CONSTANT timestamptz := clock_timestamp();
BEGIN
    RETURN EXISTS (SELECT FROM outbox._with_due(scope, v_now) l
                    WHERE l.name <> '' OR EXISTS (SELECT FROM outbox.delivery d
                                                   WHERE d.destination = '' AND d.status = 'pending' AND d.next_attempt_at <= v_now));
END
$$;
COMMENT ON FUNCTION outbox._is_due(outbox.claim_scope) IS 'whether a delivery is due that a claim may hand out';
-- The common path of a claim: fresh events, found by walking the primary key from the low-water mark.

CREATE FUNCTION outbox._kind(event_type text, tenant_id text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN event_type || coalesce(chr(31) || tenant_id, '');
COMMENT ON FUNCTION outbox._kind(text, text) IS 'names the kind of an event: those of a kind have the same type and tenant';

-- Decides for each fresh event and each destination that wants it: this claim holds it, or it is parked in outbox.delivery,
-- because the destination can't be served or the event waits for another one there.
-- (An event that waits is ahead of the later ones of its key: none of them passes a parked one.) Events whose row another
-- transaction has locked can't go now, nor can those with the ordering key of a locked event or of one in flight.
-- max_events: of the kinds that this claim serves. decide: of all kinds. unrouted_left: some scheduled events are due and not
-- routed. passed: kinds of events that are not looked at. most: at about so many deliveries a claim stops, because an event may
-- have thousands.
-- seen: events that were decided on. full: there may be more, behind the window or within. behind: events that can't go now.
-- stuck: the locked ones among these. owed: deliveries that were decided on. unserved: kinds that only others serve.
CREATE FUNCTION outbox._claim_fresh(
    token bigint, scope outbox.claim_scope, low_water bigint, high_water bigint, max_events int, decide bigint,
    window_size bigint, unrouted_left boolean, passed jsonb, most bigint,
    OUT ids bigint[], OUT held text[], OUT seen bigint, OUT "full" boolean, OUT behind bigint, OUT stuck bigint,
    OUT unrouted bigint, OUT owed bigint, OUT parked boolean, OUT unserved text[])
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_elsewhere boolean;
    v_ids bigint[];
    v_keys bigint[];
    v_parked text[];     -- for each of them its destinations, an array as text ...
    v_behind text[];     -- ... and whether it is behind another one there
BEGIN
    WITH candidate AS MATERIALIZED (
        SELECT e.id, e.event_type, e.tenant_id, outbox._ordering_key(e.aggregate_type, e.aggregate_id) AS key,
               e.xmax <> 0 AS touched
          FROM @extschema@.outbox_events e
         WHERE e.id >= low_water AND e.status = 'pending' AND NOT e.listed AND e.available_at IS NULL
           AND (passed IS NULL OR NOT passed ? outbox._kind(e.event_type, e.tenant_id))
         ORDER BY e.id LIMIT window_size
    ), lockable AS MATERIALIZED (
        SELECT e.id FROM @extschema@.outbox_events e
         WHERE e.id = ANY (ARRAY(SELECT c.id FROM candidate c WHERE c.touched)) FOR NO KEY UPDATE SKIP LOCKED
    ), judged AS MATERIALIZED (
        SELECT c.*, c.touched AND (c.id IN (SELECT l.id FROM lockable l)) IS NOT TRUE AS locked
          FROM candidate c
    ), busy AS MATERIALIZED (
        SELECT f.key FROM outbox._in_flight(low_water, high_water) f
        UNION ALL
        SELECT j.key FROM judged j WHERE j.locked
    ), marked AS MATERIALIZED (
        SELECT j.*, j.locked OR (j.key IS NOT NULL AND j.key IN (SELECT b.key FROM busy b)) AS waits
          FROM judged j
    ), ready AS MATERIALIZED (
        SELECT m.id, m.event_type, m.tenant_id, m.key FROM marked m WHERE NOT m.waits ORDER BY m.id LIMIT decide
    ), kind AS MATERIALIZED (
        SELECT r.event_type, r.tenant_id, array_agg(r.id) AS ids, array_agg(r.key) AS keys
          FROM ready r GROUP BY r.event_type, r.tenant_id
    ), menu AS MATERIALIZED (
        SELECT k.*, w.*
          FROM kind k
         CROSS JOIN LATERAL (
               SELECT array_agg(l.name) AS names, array_agg(l.filter) AS filters, array_agg(l.serve) AS serves,
                      array_agg(l.elsewhere) AS elsewheres, array_agg(l.blocks) AS blocks,
                      coalesce(bool_or(l.serve), false) AS served, count(*) AS n
                 FROM (SELECT * FROM outbox._eligible(scope, k.event_type, k.tenant_id) ORDER BY 1) l) w
    ), within AS MATERIALIZED (
        SELECT max(u.id) AS last
          FROM (SELECT e.id, sum(m.n) OVER up_to - m.n AS deliveries, count(*) FILTER (WHERE m.served) OVER up_to AS served
                  FROM menu m CROSS JOIN LATERAL unnest(m.ids) AS e (id) WINDOW up_to AS (ORDER BY e.id)) u
         WHERE u.deliveries < most AND u.served <= max_events
    ), plan AS MATERIALIZED (
        SELECT e.id, e.key, w.wanted, w.held, w.parked, w.behind, w.elsewhere
          FROM menu m
         CROSS JOIN LATERAL unnest(m.ids, m.keys) AS e (id, key)
         CROSS JOIN LATERAL (
               SELECT count(*) AS wanted, array_agg(x.name) FILTER (WHERE x.serve AND NOT x.behind) AS held,
                      array_agg(x.name) FILTER (WHERE x.behind OR NOT x.serve) AS parked,
                      array_agg(x.behind) FILTER (WHERE x.behind OR NOT x.serve) AS behind,
                      bool_or(x.elsewhere AND NOT x.behind) AS elsewhere
                 FROM (SELECT l.name, l.serve, l.elsewhere, e.key IS NOT NULL AND (EXISTS (
                              SELECT FROM outbox._ahead(l.name, e.key, e.id, l.blocks))
                              OR (unrouted_left AND EXISTS (
                              SELECT FROM outbox._unrouted_ahead(e.key, v_now) s
                               WHERE s.id < e.id AND outbox._wants(l.name, s.id, s.event_type, s.tenant_id)))) AS behind
                         FROM unnest(m.names, m.filters, m.serves, m.elsewheres, m.blocks)
                              AS l (name, filter, serve, elsewhere, blocks)
                        WHERE CASE WHEN l.filter IS NULL THEN true ELSE outbox._passes(l.filter, e.id) END
                       OFFSET 0) x) w
         WHERE e.id <= (SELECT x.last FROM within x)
    ), moved AS (
        UPDATE @extschema@.outbox_events e
           SET status = CASE WHEN p.wanted = 0 THEN 'processed' WHEN p.held IS NULL THEN 'pending' ELSE 'processing' END,
               processed_at = CASE WHEN p.wanted = 0 THEN v_now END,
               claim_token = CASE WHEN p.held IS NOT NULL THEN token END,
               listed = p.parked IS NOT NULL
          FROM plan p WHERE e.id BETWEEN p.id AND p.id AND e.status = 'pending' AND NOT e.listed
        RETURNING p.*
    )
    SELECT array_agg(m.id ORDER BY m.id) FILTER (WHERE m.held IS NOT NULL),
           array_agg(m.held::text ORDER BY m.id) FILTER (WHERE m.held IS NOT NULL),
           count(*), count(*) FILTER (WHERE m.wanted = 0), bool_or(m.elsewhere), coalesce(sum(m.wanted), 0),
           (SELECT count(*) FROM candidate) >= window_size
               OR (SELECT count(*) FROM marked k WHERE NOT k.waits) > (SELECT count(*) FROM plan),
           (SELECT count(*) FROM marked k WHERE k.waits), (SELECT count(*) FROM marked k WHERE k.locked),
           (SELECT array_agg(outbox._kind(k.event_type, k.tenant_id)) FROM menu k WHERE NOT k.served),
           array_agg(m.id) FILTER (WHERE m.parked IS NOT NULL), array_agg(m.key) FILTER (WHERE m.parked IS NOT NULL),
           array_agg(m.parked::text) FILTER (WHERE m.parked IS NOT NULL),
           array_agg(m.behind::text) FILTER (WHERE m.parked IS NOT NULL)
      INTO ids, held, seen, unrouted, v_elsewhere, owed, "full", behind, stuck, unserved,
           v_ids, v_keys, v_parked, v_behind
      FROM moved m;
    parked := v_ids IS NOT NULL;
    IF parked THEN
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, next_attempt_at)
        SELECT p.id, u.name, p.key, 'pending',
               CASE WHEN p.key IS NULL OR (NOT u.behind AND row_number() OVER (PARTITION BY u.name, p.key ORDER BY p.id) = 1)
                    THEN v_now END
          FROM unnest(v_ids, v_keys, v_parked, v_behind) AS p (id, key, parked, behind)
         CROSS JOIN LATERAL unnest(p.parked::text[], p.behind::boolean[]) AS u (name, behind)
        ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING;
    END IF;
    IF v_elsewhere THEN
        PERFORM outbox._wake('due');
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._claim_fresh(bigint, outbox.claim_scope, bigint, bigint, int, bigint, bigint, boolean, jsonb, bigint) IS
    'claims fresh events; part of outbox.claim';
-- The other path of a claim: deliveries that are due again.

-- Owes scheduled events whose time has come to each destination that wants them. The next claims route the rest; until
-- then outbox._unrouted_ahead() finds them. A destination may not want an event that others waited for: these are promoted.
CREATE FUNCTION outbox._route_due(max_events int, v_now timestamptz) RETURNS boolean
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_ids bigint[];
    v_keys bigint[];
    v_unrouted bigint;
BEGIN
    v_ids := ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                    WHERE e.available_at <= v_now AND e.available_at IS NOT NULL AND NOT e.routed
                      AND e.status = 'pending' AND NOT e.listed
                    ORDER BY e.available_at, e.id LIMIT max_events FOR NO KEY UPDATE SKIP LOCKED);
    IF cardinality(v_ids) > 0 THEN
        UPDATE @extschema@.outbox_events e SET routed = true, listed = true WHERE e.id = ANY (v_ids);
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, next_attempt_at)
        SELECT r.id, r.destination, r.ordering_key, 'pending', v_now FROM outbox._routes_or_nobody(v_ids) r
        ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING;
        v_keys := ARRAY(SELECT DISTINCT outbox._ordering_key(e.aggregate_type, e.aggregate_id)
                          FROM @extschema@.outbox_events e WHERE e.id = ANY (v_ids) AND e.aggregate_id IS NOT NULL);
        v_unrouted := (SELECT count(*) FROM unnest(v_ids) AS i (id)
                        WHERE NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = i.id));
        UPDATE @extschema@.outbox_events e SET status = 'processed', processed_at = clock_timestamp()
         WHERE v_unrouted > 0 AND e.id = ANY (v_ids) AND e.status = 'pending'
           AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id);
        PERFORM outbox._count_unrouted(v_unrouted) WHERE v_unrouted > 0;
        PERFORM outbox._promote_keys(v_keys);
        PERFORM outbox._wake('due');    -- for those that serve other destinations, and for what there was no room for
    END IF;
    -- Events are left if there are more than one claim routes, or if others have locked them.
    IF NOT EXISTS (SELECT FROM @extschema@.outbox_events e
                    WHERE e.available_at <= v_now AND e.available_at IS NOT NULL AND NOT e.routed
                      AND e.status = 'pending' AND NOT e.listed) THEN
        RETURN false;
    END IF;
    PERFORM outbox._look_again();
    RETURN true;
END
$$;
COMMENT ON FUNCTION outbox._route_due(int, timestamptz) IS
    'turns scheduled events whose time has come into deliveries; whether some are left; part of outbox.claim';

-- Owes events to each destination that wants them, with their attempts and schedule, if they were owed while there was no
-- destination or to one that was removed in flight. All at once: fresh events with the same ordering keys come later.
CREATE FUNCTION outbox._give_to_destinations() RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_ids bigint[];
    v_keys bigint[];
BEGIN
    IF NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.destination = '' AND d.status IN ('pending', 'failed')) THEN
        RETURN;
    END IF;
    WITH given AS (
        DELETE FROM outbox.delivery d WHERE d.destination = '' AND d.status IN ('pending', 'failed')
        RETURNING d.*
    ), listed AS (
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, attempts, next_attempt_at, last_error)
        SELECT g.id, r.destination, g.ordering_key, g.status, g.attempts, g.next_attempt_at, g.last_error
          FROM given g JOIN outbox._routes(ARRAY(SELECT x.id FROM given x)) r ON r.id = g.id
        ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING
    )
    SELECT array_agg(g.id), array_agg(DISTINCT g.ordering_key) FILTER (WHERE g.ordering_key IS NOT NULL)
      INTO v_ids, v_keys FROM given g;
    PERFORM outbox._promote_keys(v_keys);
    PERFORM outbox._refresh(v_ids);
END
$$;
COMMENT ON FUNCTION outbox._give_to_destinations() IS 'events that waited for the first destination are owed to those that want them';

-- Takes due deliveries of the destinations that this claim may serve, oldest due first, each with those that wait directly
-- behind it. One that is due while another is ahead of it waits again. Fresh events that appeared late, with a lower id than
-- a delivery of their ordering key, are listed. One whose event another transaction has locked is put off for a moment; one
-- whose event is not there (a restore may still bring it) leaves the way until recovery finds the event.
-- busy: ordering keys that wait for an event claimed whole. more: another claim is needed.
CREATE FUNCTION outbox._claim_due(
    v_token bigint, scope outbox.claim_scope, low_water bigint, high_water bigint, max_events int, unrouted_left boolean,
    OUT ids bigint[], OUT destinations text[], OUT busy bigint[], OUT more boolean)
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_lanes CONSTANT int := 100;    -- destinations looked at, if fewer deliveries were asked for
    v_now timestamptz := clock_timestamp();
    v_put_off boolean;
    v_looked_at text[];
BEGIN
    WITH lane AS MATERIALIZED (
        SELECT * FROM outbox._with_due(scope, v_now) LIMIT greatest(max_events, v_lanes)
    ), found AS MATERIALIZED (
        SELECT l.name, l.blocks, l.probe, x.id, x.ordering_key AS key, x.at,
               (SELECT e.xmax <> 0 FROM @extschema@.outbox_events e WHERE e.id = x.id) AS touched
          FROM lane l
         CROSS JOIN LATERAL (
               SELECT d.id, d.ordering_key, d.ctid AS at FROM outbox.delivery d
                WHERE d.destination = l.name AND d.status = 'pending' AND d.next_attempt_at <= v_now
                ORDER BY d.next_attempt_at, d.id LIMIT CASE WHEN l.probe THEN 1 ELSE max_events END) x
    ), lockable AS MATERIALIZED (
        SELECT e.id FROM @extschema@.outbox_events e
         WHERE e.id = ANY (ARRAY(SELECT f.id FROM found f WHERE f.touched)) FOR NO KEY UPDATE SKIP LOCKED
    ), due AS MATERIALIZED (
        SELECT f.* FROM found f WHERE NOT f.touched OR (f.id IN (SELECT l.id FROM lockable l)) IS TRUE
    ), put_off AS (
        UPDATE outbox.delivery d
           SET next_attempt_at = CASE WHEN d.ctid = ANY (ARRAY(SELECT f.at FROM found f WHERE f.touched IS NOT NULL))
                                      THEN v_now + interval '250 milliseconds' END
         WHERE d.ctid = ANY (ARRAY(SELECT f.at FROM found f
                                    WHERE f.touched IS NULL OR (f.touched AND (f.id IN (SELECT l.id FROM lockable l)) IS NOT TRUE)))
        RETURNING 1
    ), whole AS MATERIALIZED (
        SELECT array_agg(DISTINCT f.key) AS keys FROM outbox._in_flight(low_water, high_water) f WHERE EXISTS (SELECT FROM due)
    ), last AS MATERIALIZED (
        SELECT k.name, k.key, (SELECT max(y.place) FROM outbox.delivery y
                                WHERE y.destination = k.name AND y.ordering_key = k.key) AS id
          FROM (SELECT DISTINCT d.name, d.key FROM due d WHERE d.key IS NOT NULL) k
    ), late AS MATERIALIZED (
        -- One sort, where a join would compare each fresh event with each key.
        SELECT u.id, u.touched
          FROM (SELECT f.id, f.touched, max(f.last) OVER (PARTITION BY f.key) AS last
                  FROM (SELECT e.id, outbox._ordering_key(e.aggregate_type, e.aggregate_id) AS key, NULL::bigint AS last,
                               e.xmax <> 0 AS touched
                          FROM @extschema@.outbox_events e
                         WHERE e.id >= low_water AND e.id < (SELECT max(t.id) FROM last t) AND e.status = 'pending' AND NOT e.listed
                           AND e.aggregate_id IS NOT NULL AND e.available_at IS NULL
                        UNION ALL SELECT NULL, t.key, t.id, false FROM last t) f) u
         WHERE u.id < u.last
    ), late_at AS MATERIALIZED (
        SELECT r.id, r.destination AS name, r.ordering_key AS key, false AS touched
          FROM outbox._routes_or_nobody(ARRAY(SELECT t.id FROM late t WHERE NOT t.touched)) r
        UNION ALL
        SELECT r.id, r.destination, r.ordering_key, true
          FROM outbox._routes_or_nobody(ARRAY(SELECT t.id FROM late t WHERE t.touched)) r
    ), listed AS (
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, next_attempt_at)
        SELECT t.id, t.name, t.key, 'pending', v_now FROM late_at t WHERE NOT t.touched
        ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING
    ), lined_up AS (
        UPDATE @extschema@.outbox_events e SET listed = true
         WHERE e.id = ANY (ARRAY(SELECT DISTINCT t.id FROM late_at t WHERE NOT t.touched))
    ), judged AS MATERIALIZED (
        SELECT d.*, coalesce(d.key = ANY (coalesce((SELECT w.keys FROM whole w), '{}')), false) AS busy,
               d.key IS NOT NULL AND (EXISTS (SELECT FROM outbox._ahead(d.name, d.key, d.id, d.blocks))
                   OR EXISTS (SELECT FROM late_at t WHERE t.name = d.name AND t.key = d.key AND t.id < d.id)
                   OR (unrouted_left AND EXISTS (SELECT FROM outbox._unrouted_ahead(d.key, v_now) s
                                                  WHERE s.id < d.id AND outbox._wants(d.name, s.id, s.event_type, s.tenant_id)))) AS behind
          FROM due d
    ), with_followers AS (
        SELECT j.name, j.id, j.at FROM judged j WHERE NOT j.busy AND NOT j.behind
        UNION ALL
        SELECT j.name, y.id, y.at
          FROM judged j
         CROSS JOIN LATERAL (
               SELECT z.id, z.at, bool_and(z.status = 'pending' AND coalesce(z.next_attempt_at <= v_now, true)
                                             AND coalesce(z.free, false)) OVER (ORDER BY z.id) AS waits
                 FROM (SELECT y.id, y.ctid AS at, y.status, y.next_attempt_at,
                              (SELECT e.xmax = 0 FROM @extschema@.outbox_events e WHERE e.id = y.id) AS free
                         FROM outbox.delivery y
                        WHERE y.destination = j.name AND y.ordering_key = j.key AND y.place > j.id
                          AND (y.status <> 'failed' OR j.blocks)
                        ORDER BY y.place LIMIT 50 + max_events / (SELECT count(*) FROM due)) z) y
         WHERE NOT j.busy AND NOT j.behind AND NOT j.probe AND j.key IS NOT NULL AND y.waits
           AND NOT EXISTS (SELECT FROM late_at t WHERE t.name = j.name AND t.key = j.key AND t.id < y.id)
           AND NOT (unrouted_left AND EXISTS (SELECT FROM outbox._unrouted_ahead(j.key, v_now) s
                                               WHERE s.id < y.id AND outbox._wants(j.name, s.id, s.event_type, s.tenant_id)))
    ), chosen AS MATERIALIZED (
        -- The first of each destination, then the second of each.
        SELECT l.name, l.id, l.at
          FROM (SELECT f.*, row_number() OVER (PARTITION BY f.name ORDER BY f.id) AS n FROM with_followers f) l
         ORDER BY l.n, l.id, l.name LIMIT max_events
    ), taken AS (
        UPDATE outbox.delivery d SET status = 'processing', claim_token = v_token, next_attempt_at = NULL
         WHERE d.ctid = ANY (ARRAY(SELECT c.at FROM chosen c))
    ), put_back AS (
        -- A fresh event that another transaction has locked is not listed, and nothing tells when it is free.
        UPDATE outbox.delivery d
           SET next_attempt_at = CASE WHEN d.ctid = ANY (ARRAY(
                   SELECT j.at FROM judged j JOIN late_at t ON t.touched AND t.name = j.name AND t.key = j.key AND t.id < j.id))
                   THEN v_now + interval '250 milliseconds' END
         WHERE d.ctid = ANY (ARRAY(SELECT j.at FROM judged j
                                    WHERE j.behind AND NOT EXISTS (SELECT FROM chosen c WHERE c.at = j.at)))
    ), marked AS (
        UPDATE @extschema@.outbox_events e SET status = 'processing'
         WHERE e.id = ANY (ARRAY(SELECT DISTINCT c.id FROM chosen c)) AND e.status = 'pending'
    )
    SELECT array_agg(c.id), array_agg(c.name), EXISTS (SELECT FROM put_off) OR EXISTS (SELECT FROM late_at t WHERE t.touched),
           (SELECT array_agg(DISTINCT j.key) FROM judged j WHERE j.busy AND NOT j.behind),
           -- Deliveries that were put back, took a probe's place or were just listed used up the room of others.
           (count(*) < max_events AND ((SELECT count(*) FROM found) >= max_events
                                       OR EXISTS (SELECT FROM judged j WHERE j.probe AND j.behind)))
           OR EXISTS (SELECT FROM late_at t WHERE NOT t.touched) OR EXISTS (SELECT FROM judged j WHERE j.busy AND NOT j.behind)
           OR (SELECT count(*) FROM lane) >= greatest(max_events, v_lanes),
           (SELECT array_agg(l.name) FROM lane l WHERE l.name <> '')
      INTO ids, destinations, v_put_off, busy, more, v_looked_at
      FROM chosen c;
    PERFORM outbox._find_due(v_looked_at) WHERE v_looked_at IS NOT NULL;
    IF v_put_off THEN
        more := true;
        PERFORM outbox._look_again();
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._claim_due(bigint, outbox.claim_scope, bigint, bigint, int, boolean) IS 'claims due deliveries; part of outbox.claim';
-- The claim itself: what a consumer calls.

-- What a claim knows while it runs.
CREATE TYPE outbox.claim_state AS (
    token            bigint,
    scope            outbox.claim_scope,
    serve            boolean,   -- one of them takes any number of events
    probe            boolean,   -- the circuit of one of them is half open
    low_water        bigint,    -- no fresh or claimed event is below
    high_water       bigint,    -- no claimed event is above, when this claim began
    room             int,       -- so many more events may be handed out
    owed             bigint,    -- deliveries of the fresh events that were looked at
    parked           boolean,   -- some of them were parked: one may be the probe of a circuit that is half open
    ids              bigint[],  -- events that were taken whole ...
    held             text[],    -- ... and for which destinations, each an array as text
    due_ids          bigint[],  -- deliveries that were taken one by one ...
    due_destinations text[],    -- ... each for one destination
    unrouted_left    boolean,   -- scheduled events are due that are not routed yet
    exhausted        boolean,   -- every fresh event was looked at
    waiting          boolean,   -- some can't go before a claim ends
    stuck            boolean,   -- some can't go before another transaction ends
    listed           boolean,   -- what claims hold was listed meanwhile
    more             boolean,   -- another claim would find more
    unrouted         bigint     -- events that no destination wanted
);
COMMENT ON TYPE outbox.claim_state IS 'what a claim knows while it runs; internal';

-- Catches up before a claim looks: after a start of the server, after deletes, when the first destination was added, when
-- scheduled events are due. Returns whether some of these are left unrouted.
CREATE FUNCTION outbox._catch_up_first(max_events int) RETURNS boolean
    LANGUAGE plpgsql
AS $$
DECLARE
    v_least CONSTANT int := 500;    -- routed at a time: most claims ask for fewer, and the others' events wait too
    v_now CONSTANT timestamptz := clock_timestamp();
BEGIN
    IF NOT outbox._is_recovered() THEN
        PERFORM outbox._forget_earlier_starts();
    END IF;
    IF EXISTS (SELECT FROM outbox.touched) THEN
        PERFORM outbox._look_after_touched();
    END IF;
    IF EXISTS (SELECT FROM outbox.delivery d
                WHERE d.destination = '' AND d.status = 'pending' AND d.next_attempt_at IS NOT NULL)
       AND EXISTS (SELECT FROM outbox.destination) THEN
        PERFORM outbox._give_to_destinations();
    END IF;
    IF NOT EXISTS (SELECT FROM @extschema@.outbox_events e
                    WHERE e.available_at <= v_now AND e.available_at IS NOT NULL AND NOT e.routed
                      AND e.status = 'pending' AND NOT e.listed) THEN
        RETURN false;
    END IF;
    RETURN outbox._route_due(greatest(max_events, v_least), v_now);
END
$$;
COMMENT ON FUNCTION outbox._catch_up_first(int) IS 'catches up before a claim looks; part of outbox.claim';

-- Token and marks. The token is null when none of the destinations can be served now.
CREATE FUNCTION outbox._begin(v_scope outbox.claim_scope, max_events int) RETURNS outbox.claim_state
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_far CONSTANT bigint := 20000;     -- a walk of so many events costs more than listing what makes it so long
    v_near CONSTANT bigint := 10000;
    c outbox.claim_state;
BEGIN
    c.scope := v_scope;
    SELECT s.serve, s.probe INTO c.serve, c.probe FROM outbox._may_serve(v_scope) s;
    IF NOT (c.serve OR c.probe) THEN
        RETURN c;
    END IF;
    c.token := outbox._new_token();
    c.high_water := coalesce(outbox._high_water(), (SELECT max(e.id) FROM @extschema@.outbox_events e), 0);
    -- A statement of its own: the rows that lowered the mark are visible to a snapshot taken after this one.
    c.low_water := outbox._low_water(true);
    c.low_water := outbox._advance_low_water(c.low_water);
    -- A claim that is kept for long must not make every later walk longer.
    IF outbox._is_recovered() AND c.low_water < greatest(c.high_water, -9223372036854755808) - v_far THEN
        PERFORM outbox._list(ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                                    WHERE e.id BETWEEN c.low_water AND c.high_water - v_near AND e.claim_token IS NOT NULL));
        c.low_water := outbox._advance_low_water(c.low_water);
    END IF;
    c.room := max_events;
    c.owed := 0;
    c.parked := false;
    c.ids := '{}';
    c.held := '{}';
    c.due_ids := '{}';
    c.due_destinations := '{}';
    c.exhausted := false;
    c.waiting := false;
    c.stuck := false;
    c.listed := false;
    c.more := false;
    c.unrouted := 0;
    RETURN c;
END
$$;
COMMENT ON FUNCTION outbox._begin(outbox.claim_scope, int) IS 'token and marks of a claim; part of outbox.claim';

-- Takes fresh events until v_reserve of the room is left. Any number of events that can't go now may stand in front of those
-- that can: the window grows until it sees past them. Events that only others want are parked batch by batch; events for
-- the destinations that are served go first, and the kinds that only others want are passed meanwhile.
CREATE FUNCTION outbox._take_fresh(c outbox.claim_state, v_reserve int) RETURNS outbox.claim_state
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_batches CONSTANT int := 8;    -- at most so many in one claim: others wait for the lock
    v_growths CONSTANT int := 30;
    v_many CONSTANT int := 200;     -- behind events in flight: listing those costs less than walking past these
    v_most CONSTANT bigint := 20000;    -- deliveries in one claim: an event may have thousands
    v_decide CONSTANT bigint := 500;    -- at a time, when the first events are not for this claim
    v_beyond bigint := 200;         -- looked at beyond what is decided on
    v_asked int;
    v_decided bigint;
    v_passed jsonb;
    v_served_first boolean := false;
    v_listed boolean := false;
    f record;
BEGIN
    FOR i IN 1..v_growths LOOP
        EXIT WHEN c.exhausted OR c.room <= v_reserve OR c.owed >= v_most;
        v_asked := CASE WHEN c.serve THEN c.room - v_reserve ELSE 1 END;
        v_decided := CASE WHEN c.serve AND i = 1 THEN v_asked ELSE greatest(v_asked, v_decide) END;
        SELECT * INTO f
          FROM outbox._claim_fresh(c.token, c.scope, c.low_water, c.high_water, v_asked, v_decided, v_decided + v_beyond,
                                   c.unrouted_left, v_passed, v_most - c.owed);
        c.owed := c.owed + f.owed;
        c.parked := c.parked OR f.parked;
        c.exhausted := NOT c.serve OR (v_passed IS NULL AND NOT f."full");
        c.ids := c.ids || f.ids;
        c.held := c.held || f.held;
        c.room := c.room - coalesce(cardinality(f.ids), 0);
        c.waiting := c.waiting OR f.behind > 0;
        c.stuck := c.stuck OR f.stuck > 0;
        c.unrouted := c.unrouted + f.unrouted;
        IF c.serve AND NOT v_listed AND f.seen < v_asked AND f.behind - f.stuck >= v_many THEN
            PERFORM outbox._list(ARRAY(SELECT x.id FROM outbox._in_flight(c.low_water, c.high_water) x));
            c.exhausted := false;
            c.listed := true;
            v_listed := true;
        ELSIF f."full" AND f.seen < v_asked THEN
            v_beyond := 2 * v_beyond + f.behind;
        ELSIF i >= v_batches THEN
            EXIT;
        ELSIF c.serve AND NOT v_served_first AND 2 * coalesce(cardinality(f.ids), 0) < f.seen THEN
            v_passed := coalesce(v_passed, '{}') || outbox._names(f.unserved);
        ELSE
            v_served_first := v_passed IS NOT NULL;
            v_passed := NULL;
        END IF;
    END LOOP;
    RETURN c;
END
$$;
COMMENT ON FUNCTION outbox._take_fresh(outbox.claim_state, int) IS 'takes fresh events; part of outbox.claim';

-- Takes deliveries that are due.
CREATE FUNCTION outbox._take_due(c outbox.claim_state) RETURNS outbox.claim_state
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_high_water CONSTANT bigint := outbox._new_high_water(c);
    d record;
BEGIN
    SELECT * INTO d FROM outbox._claim_due(c.token, c.scope, c.low_water, v_high_water, c.room, c.unrouted_left);
    c.due_ids := c.due_ids || d.ids;
    c.due_destinations := c.due_destinations || d.destinations;
    c.room := c.room - coalesce(cardinality(d.ids), 0);
    c.more := d.more;
    IF d.busy IS NOT NULL THEN
        c.waiting := true;
        c.listed := true;
        PERFORM outbox._list(ARRAY(SELECT f.id FROM outbox._in_flight(c.low_water, v_high_water) f WHERE f.key = ANY (d.busy)));
    END IF;
    IF d.ids IS NOT NULL THEN
        -- Claims that hold these events for other destinations are listed now, while the two can be told apart.
        c.listed := true;
        PERFORM outbox._list(ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                                    WHERE e.id = ANY (d.ids) AND e.claim_token IS NOT NULL));
    END IF;
    RETURN c;
END
$$;
COMMENT ON FUNCTION outbox._take_due(outbox.claim_state) IS 'takes due deliveries; part of outbox.claim';

CREATE FUNCTION outbox._new_high_water(c outbox.claim_state) RETURNS bigint
    LANGUAGE plpgsql IMMUTABLE
AS $$
BEGIN
    RETURN greatest(c.high_water, (SELECT max(i) FROM unnest(c.ids) AS i));
END
$$;
COMMENT ON FUNCTION outbox._new_high_water(outbox.claim_state) IS 'no claimed event is above, with those that were taken';

-- Ends a claim: announces what is left and enters what was taken. Returns how many whole events and single deliveries it
-- holds.
CREATE FUNCTION outbox._enter(c outbox.claim_state, lease interval) RETURNS int
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_held int := cardinality(c.ids) + cardinality(c.due_ids);
BEGIN
    PERFORM outbox._wake('due') WHERE c.more OR (NOT c.exhausted AND c.room > 0);
    PERFORM outbox._look_again() WHERE c.stuck;
    PERFORM outbox._waiting(c.waiting);
    PERFORM outbox._count_unrouted(c.unrouted) WHERE c.unrouted > 0;
    PERFORM outbox._set_water(c.low_water, outbox._new_high_water(c));
    IF v_held > 0 AND c.listed THEN
        v_held := (SELECT count(*) FROM @extschema@.outbox_events e WHERE e.id = ANY (c.ids) AND e.claim_token = c.token)
                + (SELECT count(*) FROM outbox.delivery d WHERE d.claim_token = c.token);
    END IF;
    IF v_held > 0 THEN
        INSERT INTO outbox.claims (token, attachment, boot, lease_until, ids, held)
        VALUES (c.token, outbox._attachment(), outbox._boot(), clock_timestamp() + lease, c.ids || c.due_ids, v_held);
        PERFORM outbox._open_claims(1, clock_timestamp() + lease);
    END IF;
    RETURN v_held;
END
$$;
COMMENT ON FUNCTION outbox._enter(outbox.claim_state, interval) IS 'ends a claim: its row in the books; part of outbox.claim';

-- The claim, step by step. Fresh events come first, then due deliveries, for which half of the room is kept; fresh events get
-- what they leave. Returns the events with their destinations, each list as the text of an array. The caller has pinned the
-- settings.
CREATE FUNCTION outbox._claim(
    max_events int, scope outbox.claim_scope, lease interval, OUT token bigint, OUT ids bigint[], OUT held text[])
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_rounds CONSTANT int := 4;     -- what waits for others may have taken the place of what can go
    c outbox.claim_state;
    v_left boolean;
    v_due boolean;
BEGIN
    PERFORM outbox._check_claim(max_events, lease);
    PERFORM outbox._lock();
    v_left := outbox._catch_up_first(max_events);
    c := outbox._begin(scope, max_events);
    IF c.token IS NULL THEN
        RETURN;
    END IF;
    c.unrouted_left := v_left;
    v_due := outbox._is_due(scope);
    c := outbox._take_fresh(c, CASE WHEN v_due THEN greatest(max_events / 2, (random() < 0.5)::int) ELSE 0 END);
    IF c.room > 0 AND (v_due OR (c.parked AND outbox._is_due(scope))) THEN
        FOR i IN 1..v_rounds LOOP
            c := outbox._take_due(c);
            EXIT WHEN NOT c.more OR c.room <= 0;
        END LOOP;
        c := outbox._take_fresh(c, 0);
    END IF;
    IF outbox._enter(c, lease) = 0 THEN
        RETURN;
    END IF;
    token := c.token;
    ids := c.ids;
    held := c.held;
    IF cardinality(c.due_ids) > 0 THEN
        SELECT array_agg(u.id), array_agg(u.destinations::text) INTO ids, held
          FROM (SELECT x.id, array_agg(x.destination ORDER BY x.destination) AS destinations
                  FROM (SELECT f.id, unnest(f.held::text[]) AS destination FROM unnest(c.ids, c.held) AS f (id, held)
                        UNION ALL
                        SELECT d.id, d.destination FROM unnest(c.due_ids, c.due_destinations) AS d (id, destination)) x
                 GROUP BY x.id) u;
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._claim(int, outbox.claim_scope, interval) IS 'what outbox.claim and outbox.claim_refs share';

-- No settings of its own, so that the planner can merge it into the query that uses it.
CREATE FUNCTION outbox._handed_out(ids bigint[], held text[], token bigint) RETURNS SETOF outbox.claimed_event
    LANGUAGE sql STABLE ROWS 100
AS $$
    SELECT e.id, e.event_id, e.event_type, e.event_version, e.aggregate_type, e.aggregate_id, e.tenant_id,
           e.event_data, e.metadata, e.created_at, e.retry_count, array_remove(h.held::text[], ''), $3
      FROM unnest($1, $2) AS h (id, held)
     CROSS JOIN LATERAL (SELECT x.* FROM @extschema@.outbox_events x WHERE x.id = h.id OFFSET 0) e
     ORDER BY e.id
$$;
COMMENT ON FUNCTION outbox._handed_out(bigint[], text[], bigint) IS 'what a claim hands out, oldest first';

CREATE FUNCTION outbox.claim(
    max_events int DEFAULT 100, destinations text[] DEFAULT NULL, lease interval DEFAULT '1 minute')
    RETURNS SETOF outbox.claimed_event
    LANGUAGE plpgsql SECURITY DEFINER ROWS 100
    SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0 SET lock_timeout = 0
AS $$
#variable_conflict use_column
DECLARE
    v_claim record;
BEGIN
    SELECT * INTO v_claim
      FROM outbox._claim(claim.max_events, ROW(outbox._names(claim.destinations), NULL, NULL, NULL)::outbox.claim_scope, claim.lease);
    RETURN QUERY SELECT * FROM outbox._handed_out(v_claim.ids, v_claim.held, v_claim.token);
END
$$;
COMMENT ON FUNCTION outbox.claim(int, text[], interval) IS
    'hands out up to max_events events, oldest first, to be settled with ack, fail, reject or release before the lease ends';

-- For a consumer whose claim failed because an event can't be sent to it: a text longer than 1 GB, or bytes that its encoding
-- lacks. It claims with this function and then asks for each event by itself.
CREATE FUNCTION outbox.claim_refs(
    max_events int DEFAULT 100, destinations text[] DEFAULT NULL, lease interval DEFAULT '1 minute')
    RETURNS SETOF outbox.claimed_ref
    LANGUAGE plpgsql SECURITY DEFINER ROWS 100
    SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0 SET lock_timeout = 0
AS $$
#variable_conflict use_column
DECLARE
    v_claim record;
BEGIN
    SELECT * INTO v_claim
      FROM outbox._claim(claim_refs.max_events, ROW(outbox._names(claim_refs.destinations), NULL, NULL, NULL)::outbox.claim_scope, claim_refs.lease);
    RETURN QUERY SELECT h.id, h.event_id, h.retry_count, h.destinations, h.claim_token
                   FROM outbox._handed_out(v_claim.ids, v_claim.held, v_claim.token) h;
END
$$;
COMMENT ON FUNCTION outbox.claim_refs(int, text[], interval) IS
    'as outbox.claim, without what the events hold: see outbox.claimed';

-- The relay says what it does not ask for, rather than naming thousands of destinations in each claim.
CREATE FUNCTION outbox._scope(passed text[], patterns text[], brokers text[], only_names text[]) RETURNS outbox.claim_scope
    LANGUAGE plpgsql IMMUTABLE
AS $$
BEGIN
    RETURN ROW(outbox._names(only_names), outbox._names(passed), patterns, coalesce(brokers, '{}'))::outbox.claim_scope;
END
$$;
COMMENT ON FUNCTION outbox._scope(text[], text[], text[], text[]) IS 'what a relay serves';

CREATE FUNCTION outbox.claim_for(
    max_events int, lease interval, passed text[] DEFAULT '{}', patterns text[] DEFAULT NULL, brokers text[] DEFAULT '{}',
    only_names text[] DEFAULT NULL)
    RETURNS SETOF outbox.claimed_event
    LANGUAGE plpgsql SECURITY DEFINER ROWS 100
    SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0 SET lock_timeout = 0
AS $$
#variable_conflict use_column
DECLARE
    v_claim record;
BEGIN
    SELECT * INTO v_claim
      FROM outbox._claim(claim_for.max_events, outbox._scope(claim_for.passed, claim_for.patterns, claim_for.brokers, claim_for.only_names), claim_for.lease);
    RETURN QUERY SELECT * FROM outbox._handed_out(v_claim.ids, v_claim.held, v_claim.token);
END
$$;
COMMENT ON FUNCTION outbox.claim_for(int, interval, text[], text[], text[], text[]) IS
    'as outbox.claim, for webhooks and the RabbitMQ destinations of these brokers: those whose names match one of the LIKE patterns (null: all), are among only_names (null: all) and not passed';

CREATE FUNCTION outbox.claim_refs_for(
    max_events int, lease interval, passed text[] DEFAULT '{}', patterns text[] DEFAULT NULL, brokers text[] DEFAULT '{}',
    only_names text[] DEFAULT NULL)
    RETURNS SETOF outbox.claimed_ref
    LANGUAGE plpgsql SECURITY DEFINER ROWS 100
    SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0 SET lock_timeout = 0
AS $$
#variable_conflict use_column
DECLARE
    v_claim record;
BEGIN
    SELECT * INTO v_claim
      FROM outbox._claim(claim_refs_for.max_events, outbox._scope(claim_refs_for.passed, claim_refs_for.patterns, claim_refs_for.brokers, claim_refs_for.only_names), claim_refs_for.lease);
    RETURN QUERY SELECT h.id, h.event_id, h.retry_count, h.destinations, h.claim_token
                   FROM outbox._handed_out(v_claim.ids, v_claim.held, v_claim.token) h;
END
$$;
COMMENT ON FUNCTION outbox.claim_refs_for(int, interval, text[], text[], text[], text[]) IS
    'as outbox.claim_for, without what the events hold: see outbox.claimed';

CREATE FUNCTION outbox.claimed(claim_token bigint, id bigint) RETURNS SETOF outbox.claimed_event
    LANGUAGE plpgsql STABLE SECURITY DEFINER ROWS 1
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT e.id, e.event_id, e.event_type, e.event_version, e.aggregate_type, e.aggregate_id, e.tenant_id,
           e.event_data, e.metadata, e.created_at, e.retry_count,
           ARRAY(SELECT d.destination FROM outbox.delivery d
                  WHERE d.id = e.id AND d.claim_token = claimed.claim_token AND d.destination <> '' ORDER BY 1),
           claimed.claim_token
      FROM @extschema@.outbox_events e
     WHERE e.id = claimed.id
       AND (e.claim_token = claimed.claim_token
            OR EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id AND d.claim_token = claimed.claim_token));
END
$$;
COMMENT ON FUNCTION outbox.claimed(bigint, bigint) IS
    'one event that an open claim holds; destinations are those that are listed: the claim''s own answer names all';
-- Settling what was delivered.

-- Events that reached every destination of their claim. The common case changes one row, the event's.
CREATE FUNCTION outbox._delivered(v_tokens bigint[], v_ids bigint[]) RETURNS bigint
    LANGUAGE plpgsql
AS $$
#variable_conflict use_column
DECLARE
    v_done bigint[];
    v_gone record;
BEGIN
    WITH done AS (
        UPDATE @extschema@.outbox_events e
           SET status = CASE WHEN e.listed THEN outbox._rest(e.id) ELSE 'processed' END,
               processed_at = CASE WHEN e.listed AND outbox._rest(e.id) <> 'processed' THEN NULL ELSE clock_timestamp() END,
               claim_token = NULL
          FROM unnest(v_tokens, v_ids) AS s (token, id)
         WHERE e.id BETWEEN s.id AND s.id AND e.claim_token = s.token AND e.status = 'processing'
        RETURNING s.token
    )
    SELECT array_agg(token) INTO v_done FROM done;
    PERFORM outbox._let_go(v_done);
    IF coalesce(cardinality(v_done), 0) = cardinality(v_ids) THEN
        RETURN coalesce(cardinality(v_done), 0);
    END IF;
    WITH gone AS (
        DELETE FROM outbox.delivery d
         WHERE d.ctid = ANY (ARRAY(
               SELECT x.at FROM unnest(v_tokens, v_ids) AS s (token, id)
                CROSS JOIN LATERAL (SELECT y.ctid AS at FROM outbox.delivery y
                                     WHERE y.id = s.id AND y.claim_token IS NOT DISTINCT FROM s.token OFFSET 0) x
                WHERE s.token IS NOT NULL))
        RETURNING d.id, d.destination, d.ordering_key, d.claim_token
    )
    SELECT array_agg(id) AS ids, array_agg(destination) AS destinations, array_agg(ordering_key) AS keys,
           array_agg(claim_token) AS tokens, count(DISTINCT id) AS events
      INTO v_gone FROM gone;
    IF v_gone.ids IS NOT NULL THEN
        PERFORM outbox._left_claim(v_gone.ids, v_gone.destinations, v_gone.keys, v_gone.tokens);
        PERFORM outbox._close_circuits(v_gone.destinations);
    END IF;
    RETURN coalesce(cardinality(v_done), 0) + v_gone.events;
END
$$;
COMMENT ON FUNCTION outbox._delivered(bigint[], bigint[]) IS 'settles events delivered to all that their claim handed out';

-- Exceptions with the outcome delivered: one destination has the event while another is still at work or failed.
CREATE FUNCTION outbox._delivered_to(v_exceptions jsonb) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_ids bigint[];
    v_tokens bigint[];
    v_destinations text[];
    v_gone record;
BEGIN
    SELECT array_agg(x.id), array_agg(x.token), array_agg(x.destination) INTO v_ids, v_tokens, v_destinations
      FROM jsonb_to_recordset(v_exceptions) AS x (token bigint, id bigint, destination text, outcome text)
     WHERE x.outcome = 'delivered';
    IF v_ids IS NULL THEN
        RETURN 0;
    END IF;
    WITH gone AS (
        DELETE FROM outbox.delivery d
         WHERE d.ctid = ANY (ARRAY(
               SELECT x.at FROM unnest(v_tokens, v_ids, v_destinations) AS s (token, id, destination)
                CROSS JOIN LATERAL (SELECT y.ctid AS at FROM outbox.delivery y
                                     WHERE y.id = s.id AND y.destination = s.destination
                                       AND y.claim_token IS NOT DISTINCT FROM s.token OFFSET 0) x
                WHERE s.token IS NOT NULL))
        RETURNING d.id, d.destination, d.ordering_key, d.claim_token
    )
    SELECT array_agg(id) AS ids, array_agg(destination) AS destinations, array_agg(ordering_key) AS keys,
           array_agg(claim_token) AS tokens, count(*) AS n
      INTO v_gone FROM gone;
    IF v_gone.n > 0 THEN
        PERFORM outbox._left_claim(v_gone.ids, v_gone.destinations, v_gone.keys, v_gone.tokens);
        PERFORM outbox._close_circuits(v_gone.destinations);
    END IF;
    RETURN v_gone.n;
END
$$;
COMMENT ON FUNCTION outbox._delivered_to(jsonb) IS 'settles single deliveries that succeeded';
-- Settling what was not delivered: a retry, a dead letter, or another try when the destination is back.

-- Whose fault is it?
--   failed       the event's, perhaps: uses an attempt
--   rejected     the event's: a dead letter
--   unavailable  the destination's, as far as one consumer sees: its circuit opens, unless another has just delivered there
--   throttled    the destination's, as it says itself: its circuit opens
--   unable       the consumer's: the event is given back, for others
CREATE FUNCTION outbox._failed(
    v_token bigint, v_id bigint, v_destination text, v_outcome text, v_error text, v_retry_in interval) RETURNS boolean
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_row record;
    v_what text;
    v_attempts int;
    v_dead boolean;
    v_next timestamptz;
    v_any boolean := false;
BEGIN
    FOR v_row IN
        SELECT d.destination, d.ordering_key, d.attempts, d.owed_since, coalesce(t.settings, '{}') AS settings, t.kind
          FROM outbox.delivery d LEFT JOIN outbox.destination t ON t.name = d.destination
         WHERE d.id = v_id AND d.claim_token IS NOT DISTINCT FROM v_token AND v_token IS NOT NULL AND (v_destination IS NULL OR d.destination = v_destination)
    LOOP
        v_any := true;
        v_what := CASE WHEN v_outcome = 'unavailable' AND outbox._answers_others(v_row.destination) THEN 'unable'
                       ELSE v_outcome END;
        v_attempts := v_row.attempts + (v_what IN ('failed', 'rejected'))::int;
        v_dead := v_what = 'rejected'
                  OR (v_what = 'failed' AND v_attempts >= outbox._max_attempts(v_row.settings))
                  OR (v_what <> 'unable' AND outbox._is_given_up(v_row.kind, v_row.settings, v_row.owed_since));
        v_next := CASE WHEN v_dead THEN NULL
                       WHEN v_what <> 'failed' THEN clock_timestamp()
                       ELSE clock_timestamp() + least(interval '366 days',
                                coalesce(v_retry_in, outbox._retry_in(v_row.kind, v_row.settings, v_attempts))) END;
        UPDATE outbox.delivery d
           SET status = CASE WHEN v_dead THEN 'failed' ELSE 'pending' END, attempts = v_attempts,
               next_attempt_at = v_next, last_error = v_error, claim_token = NULL
         WHERE d.id = v_id AND d.destination = v_row.destination;
        UPDATE @extschema@.outbox_events e
           SET last_error = v_error, retry_count = greatest(e.retry_count, v_attempts) WHERE e.id = v_id;
        IF v_row.ordering_key IS NOT NULL
           AND (NOT v_dead OR v_row.settings ->> 'on_failure' = 'block') THEN
            PERFORM outbox._take_back(v_token, v_row.destination, v_row.ordering_key, v_id);
        END IF;
        PERFORM outbox._left_claim(ARRAY[v_id], ARRAY[v_row.destination], ARRAY[v_row.ordering_key], ARRAY[v_token]);
        PERFORM outbox._wake_at(v_next);
        PERFORM outbox._blame(v_row.destination, v_row.kind, v_row.settings, v_what, v_error, v_retry_in, v_id);
        IF v_dead THEN
            PERFORM outbox._tell('outbox.event.dead', v_row.destination, e.tenant_id, v_id,
                                 jsonb_build_object('reason', v_error, 'attempts', v_attempts, 'id', e.id, 'event_id', e.event_id,
                                                    'event_type', e.event_type, 'aggregate_type', e.aggregate_type,
                                                    'aggregate_id', e.aggregate_id))
               FROM @extschema@.outbox_events e WHERE e.id = v_id;
        END IF;
    END LOOP;
    RETURN v_any;
END
$$;
COMMENT ON FUNCTION outbox._failed(bigint, bigint, text, text, text, interval) IS
    'settles an event that did not get through to one destination, or to all that the token holds';
-- Settling: consumers report the outcomes of claimed events. Each function changes only what the given token still holds. It
-- takes the claim lock, so that a claim sees a settlement whole or not at all. (Statements that know a delivery's key compare
-- its token with IS NOT DISTINCT FROM: with "=" the planner may look through everything that the token holds instead.)

-- Keeps the outcome of an event that the application has locked, and settles it when the row is free. Until then the claim
-- holds the event, and nobody waits.
CREATE FUNCTION outbox._postpone(
    INOUT tokens bigint[], INOUT ids bigint[], INOUT exceptions jsonb, OUT postponed bigint)
    LANGUAGE plpgsql
AS $$
#variable_conflict use_variable
DECLARE
    v_locked bigint[] := outbox._locked(ids || ARRAY(SELECT x.id FROM jsonb_to_recordset(exceptions) AS x (id bigint)));
BEGIN
    postponed := 0;
    IF v_locked = '{}' THEN
        RETURN;
    END IF;
    WITH late AS (
        SELECT s.token, s.id, NULL::jsonb AS exception FROM unnest(tokens, ids) AS s (token, id) WHERE s.id = ANY (v_locked)
        UNION ALL
        SELECT (x.value ->> 'token')::bigint, (x.value ->> 'id')::bigint, x.value
          FROM jsonb_array_elements(exceptions) AS x WHERE (x.value ->> 'id')::bigint = ANY (v_locked)
    ), kept AS (
        INSERT INTO outbox.postponed (claim_token, id, exception)
        SELECT l.token, l.id, l.exception FROM late l
         WHERE EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = l.id AND e.claim_token = l.token)
            OR EXISTS (SELECT FROM outbox.delivery d WHERE d.id = l.id AND d.claim_token = l.token)
        RETURNING 1
    )
    SELECT count(*) INTO postponed FROM kept;
    SELECT coalesce(array_agg(s.token), '{}'), coalesce(array_agg(s.id), '{}') INTO tokens, ids
      FROM unnest(tokens, ids) AS s (token, id) WHERE s.id <> ALL (v_locked);
    exceptions := (SELECT coalesce(jsonb_agg(x.value), '[]') FROM jsonb_array_elements(exceptions) AS x
                    WHERE (x.value ->> 'id')::bigint <> ALL (v_locked));
    PERFORM outbox._look_again();
END
$$;
COMMENT ON FUNCTION outbox._postpone(bigint[], bigint[], jsonb) IS 'keeps the outcomes of locked events for later and returns the others';

CREATE FUNCTION outbox._postpone_one(
    v_token bigint, v_id bigint, v_destination text, v_outcome text, v_error text, v_retry_in interval) RETURNS boolean
    LANGUAGE plpgsql
AS $$
BEGIN
    RETURN p.postponed > 0
      FROM outbox._postpone('{}', '{}', jsonb_build_array(jsonb_build_object(
               'token', v_token, 'id', v_id, 'destination', v_destination, 'outcome', v_outcome, 'error', v_error,
               'retry_in', extract(epoch FROM v_retry_in)))) p;
END
$$;
COMMENT ON FUNCTION outbox._postpone_one(bigint, bigint, text, text, text, interval) IS 'keeps one outcome for later if its event is locked; whether it did';

-- The relay's call: reports all outcomes since the last one.
CREATE FUNCTION outbox.settle(
    tokens bigint[], ids bigint[], exceptions jsonb DEFAULT '[]', OUT settled bigint, OUT latencies float8[])
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0 SET lock_timeout = 0
AS $$
#variable_conflict use_column
DECLARE
    v_count bigint := 0;
    v_row record;
    v_changed boolean;
BEGIN
    IF tokens IS NULL OR ids IS NULL OR cardinality(tokens) <> cardinality(ids)
       OR coalesce(jsonb_typeof(exceptions), '') <> 'array' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'tokens and ids must be arrays of one length and exceptions a JSON array',
            HINT = 'Each id goes with the claim_token that it was handed out with.';
    END IF;
    PERFORM outbox._lock();
    SELECT p.tokens, p.ids, p.exceptions, p.postponed INTO tokens, ids, exceptions, v_count
      FROM outbox._postpone(tokens, ids, exceptions) p;
    IF cardinality(ids) > 0 THEN
        v_count := v_count + outbox._delivered(tokens, ids);
    END IF;
    IF exceptions <> '[]' THEN
        PERFORM outbox._list(ARRAY(SELECT h.id FROM jsonb_to_recordset(exceptions) AS x (token bigint, id bigint)
                                      CROSS JOIN LATERAL (SELECT e.id FROM @extschema@.outbox_events e
                                                           WHERE e.id = x.id AND e.claim_token = x.token OFFSET 0) h));
        PERFORM outbox._list_keys(array_agg(x.token), array_agg(x.id))
           FROM jsonb_to_recordset(exceptions) AS x (token bigint, id bigint, outcome text)
          WHERE x.outcome IS DISTINCT FROM 'delivered' AND x.outcome IS DISTINCT FROM 'answered' HAVING count(*) > 0;
        v_count := v_count + outbox._delivered_to(exceptions);
        PERFORM outbox._answered(array_agg(DISTINCT x.destination))
           FROM jsonb_to_recordset(exceptions) AS x (destination text, outcome text)
          WHERE x.outcome = 'answered' HAVING count(*) > 0;
        FOR v_row IN
            SELECT x.token, x.id, x.destination, x.outcome, x.error,
                   make_interval(secs => CASE WHEN x.retry_in IS NOT NULL THEN least(greatest(x.retry_in, 0), 1e8) END) AS retry_in
              FROM jsonb_to_recordset(exceptions)
                   AS x (token bigint, id bigint, destination text, outcome text, error text, retry_in float8)
             WHERE x.outcome IS DISTINCT FROM 'delivered' AND x.outcome IS DISTINCT FROM 'answered' ORDER BY x.id
        LOOP
            CASE v_row.outcome
            WHEN 'failed', 'rejected', 'unavailable', 'throttled', 'unable' THEN
                v_changed := outbox._failed(v_row.token, v_row.id, v_row.destination, v_row.outcome, v_row.error, v_row.retry_in);
            WHEN 'gone' THEN
                v_changed := outbox._failed(v_row.token, v_row.id, v_row.destination, 'rejected', v_row.error, NULL);
                PERFORM outbox._disable(v_row.destination, v_row.error, v_row.id) WHERE v_changed;
            WHEN 'released' THEN
                v_changed := outbox._release_one(v_row.token, v_row.id, v_row.destination);
            ELSE
                RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                    MESSAGE = format('unknown outcome %s', coalesce(quote_literal(v_row.outcome), 'null')),
                    HINT = 'Outcomes are delivered, failed, rejected, unavailable, throttled, unable, gone, released and answered.';
            END CASE;
            v_count := v_count + v_changed::int;
        END LOOP;
    END IF;
    PERFORM outbox._settled(v_count > 0);
    settled := v_count;
    latencies := outbox._latencies();
END
$$;
COMMENT ON FUNCTION outbox.settle(bigint[], bigint[], jsonb) IS
    'settles events of many claims at once; exceptions: those that did not reach every destination. Returns how many the tokens held, and the seconds from when each event that is processed now could be delivered';

CREATE FUNCTION outbox.ack(claim_token bigint, ids bigint[] DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0 SET lock_timeout = 0
AS $$
DECLARE
    v_ids bigint[];
    v_late record;
    v_count bigint;
BEGIN
    PERFORM outbox._lock();
    v_ids := ARRAY(SELECT DISTINCT unnest(coalesce(ack.ids, outbox._claim_ids(ack.claim_token))));
    SELECT * INTO v_late FROM outbox._postpone(array_fill(ack.claim_token, ARRAY[cardinality(v_ids)]), v_ids, '[]');
    v_count := v_late.postponed + outbox._delivered(v_late.tokens, v_late.ids);
    PERFORM outbox._settled(v_count > 0);
    RETURN v_count;
END
$$;
COMMENT ON FUNCTION outbox.ack(bigint, bigint[]) IS
    'settles events as delivered (null: all that the claim holds) and returns how many the token held';

CREATE FUNCTION outbox.fail(
    claim_token bigint, id bigint, error text, retry_in interval DEFAULT NULL, destination text DEFAULT NULL)
    RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
DECLARE
    v_changed boolean;
BEGIN
    IF fail.retry_in < interval '0' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'retry_in must not be negative',
            HINT = 'Leave it out for the destination''s own backoff.';
    END IF;
    PERFORM outbox._lock();
    IF outbox._postpone_one(fail.claim_token, fail.id, fail.destination, 'failed', fail.error, fail.retry_in) THEN
        RETURN true;
    END IF;
    PERFORM outbox._list_keys(ARRAY[fail.claim_token], ARRAY[fail.id]);
    v_changed := outbox._failed(fail.claim_token, fail.id, fail.destination, 'failed', fail.error, fail.retry_in);
    PERFORM outbox._settled(v_changed);
    RETURN v_changed;
END
$$;
COMMENT ON FUNCTION outbox.fail(bigint, bigint, text, interval, text) IS
    'an attempt failed: try again later, or a dead letter after the last attempt (destination null: all that are held)';

CREATE FUNCTION outbox.reject(claim_token bigint, id bigint, error text, destination text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
DECLARE
    v_changed boolean;
BEGIN
    PERFORM outbox._lock();
    IF outbox._postpone_one(reject.claim_token, reject.id, reject.destination, 'rejected', reject.error, NULL) THEN
        RETURN true;
    END IF;
    PERFORM outbox._list_keys(ARRAY[reject.claim_token], ARRAY[reject.id]);
    v_changed := outbox._failed(reject.claim_token, reject.id, reject.destination, 'rejected', reject.error, NULL);
    PERFORM outbox._settled(v_changed);
    RETURN v_changed;
END
$$;
COMMENT ON FUNCTION outbox.reject(bigint, bigint, text, text) IS 'gives an event up: a dead letter at once';

CREATE FUNCTION outbox.release(claim_token bigint) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
DECLARE
    v_count bigint;
BEGIN
    PERFORM outbox._lock();
    v_count := outbox._release(ARRAY[release.claim_token]);
    PERFORM outbox._settled(v_count > 0);
    RETURN v_count;
END
$$;
COMMENT ON FUNCTION outbox.release(bigint) IS 'gives back all that the claim still holds; uses no attempt';

CREATE FUNCTION outbox.renew(tokens bigint[], lease interval DEFAULT '1 minute') RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
DECLARE
    v_count bigint;
BEGIN
    PERFORM outbox._check_claim(1, lease);
    PERFORM outbox._lock();
    UPDATE outbox.claims c SET lease_until = clock_timestamp() + renew.lease WHERE c.token = ANY (renew.tokens);
    GET DIAGNOSTICS v_count = ROW_COUNT;
    PERFORM outbox._open_claims(0, clock_timestamp() + renew.lease) WHERE v_count > 0;
    RETURN v_count;
END
$$;
COMMENT ON FUNCTION outbox.renew(bigint[], interval) IS 'the lease of open claims starts anew; returns how many were open';

-- Does the work that was left for later. For the worker, under the claim lock.
CREATE FUNCTION outbox._catch_up() RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_late record;
BEGIN
    WITH late AS (DELETE FROM outbox.postponed RETURNING claim_token, id, exception)
    SELECT coalesce(array_agg(l.claim_token) FILTER (WHERE l.exception IS NULL), '{}') AS tokens,
           coalesce(array_agg(l.id) FILTER (WHERE l.exception IS NULL), '{}') AS ids,
           coalesce(jsonb_agg(l.exception) FILTER (WHERE l.exception IS NOT NULL), '[]') AS exceptions, count(*) AS n
      INTO v_late FROM late l;
    PERFORM outbox.settle(v_late.tokens, v_late.ids, v_late.exceptions) WHERE v_late.n > 0;
    PERFORM outbox._look_after_touched();
END
$$;
COMMENT ON FUNCTION outbox._catch_up() IS 'settles postponed outcomes and looks after touched events';
-- Destinations: their properties, who may see these, and how an operator changes them. Each change is announced on the
-- channel outbox_destinations, so that running relays take it up at once.

CREATE FUNCTION outbox._require_destination(name text) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM outbox.destination d WHERE d.name = _require_destination.name) THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_object',
            MESSAGE = format('destination %s does not exist', coalesce(quote_ident(name), 'null')),
            HINT = 'See the view outbox.destinations.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._require_destination(text) IS 'an error unless there is such a destination';

CREATE FUNCTION outbox.relay_destinations(names text[] DEFAULT NULL)
    RETURNS TABLE (name text, kind text, exchange text, routing_key text, url text, settings jsonb, secrets text[],
                   max_attempts int)
    LANGUAGE sql STABLE SECURITY DEFINER ROWS 10 SET search_path = pg_catalog, pg_temp
AS $$
    SELECT d.name, d.kind, d.exchange, d.routing_key, h.url,
           r.settings || (SELECT coalesce(jsonb_object_agg(k, extract(epoch FROM outbox._span(r.settings, k, NULL))), '{}')
                            FROM unnest(ARRAY['timeout', 'connect_timeout']) AS k WHERE r.settings ? k),
           ARRAY(SELECT s.secret FROM outbox.secret s
                  WHERE s.destination = d.name AND coalesce(s.expires_at, 'infinity') > clock_timestamp()
                  ORDER BY s.expires_at DESC NULLS FIRST),
           outbox._max_attempts(r.settings)
      FROM outbox.destination d LEFT JOIN outbox.hidden h ON h.destination = d.name
     CROSS JOIN LATERAL (SELECT coalesce(h.settings, d.settings)) AS r (settings)
     WHERE d.disabled_reason IS NULL AND (relay_destinations.names IS NULL OR d.name = ANY (relay_destinations.names))
     ORDER BY d.name
$$;
COMMENT ON FUNCTION outbox.relay_destinations(text[]) IS
    'destinations (null: all) with their secrets, the current one first, and their timeouts in seconds; for the relay''s role alone';

-- Not current_user, which is the owner of the function that asks.
CREATE FUNCTION outbox._caller_reads_secrets() RETURNS boolean
    LANGUAGE sql STABLE
RETURN has_function_privilege(coalesce(nullif(current_setting('role'), 'none'), session_user)::name,
                              'outbox.relay_destinations(text[])', 'EXECUTE');
COMMENT ON FUNCTION outbox._caller_reads_secrets() IS 'whether the session''s role may see secrets that others made';

-- outbox_keeper has no right to the table of events, which outbox._lock() locks too.
CREATE FUNCTION outbox._lock_for_secrets() RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._lock();
END
$$;
COMMENT ON FUNCTION outbox._lock_for_secrets() IS 'changes of secrets run one at a time, until commit';

CREATE FUNCTION outbox._forget_secrets(before timestamptz) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- A session that has a secret locked changes it and sets the timer itself.
    DELETE FROM outbox.secret s
     WHERE s.ctid = ANY (ARRAY(SELECT x.ctid FROM outbox.secret x
                                WHERE x.expires_at <= least(before, clock_timestamp()) FOR UPDATE SKIP LOCKED));
    RETURN FOUND;
END
$$;
COMMENT ON FUNCTION outbox._forget_secrets(timestamptz) IS 'removes secrets whose grace has ended; whether there were any';

CREATE FUNCTION outbox._secrets_end() RETURNS timestamptz
    LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT min(s.expires_at) FROM outbox.secret s WHERE s.expires_at > now());
END
$$;
COMMENT ON FUNCTION outbox._secrets_end() IS 'when the first grace ends; null: no secret is being replaced';

CREATE FUNCTION outbox._try_anew(v_destination text) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE outbox.destination t
       SET disabled_reason = NULL, circuit_failures = 0, circuit_open_until = NULL, failing_since = NULL, unable_at = NULL
     WHERE t.name = v_destination;
    PERFORM outbox._tell_closed(v_destination);
END
$$;
COMMENT ON FUNCTION outbox._try_anew(text) IS 'enables a destination and closes its circuit';

-- Adds the destination, or changes the one of that name: its deliveries, its secret and its place stay. anew: it is tried
-- again, whatever it has answered before.
CREATE FUNCTION outbox._put_destination(
    name text, kind text, event_types text[], settings jsonb, exchange text, routing_key text, url text, tenant_id text,
    filter jsonpath, v_anew boolean) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    v_old outbox.destination;
BEGIN
    IF coalesce(_put_destination.name, '') !~ '^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('invalid destination name %s', coalesce(quote_literal(_put_destination.name), 'null')),
            HINT = 'Use 1 to 63 letters, digits, dots, dashes and underscores.';
    END IF;
    PERFORM outbox._check_patterns(_put_destination.event_types);
    PERFORM outbox._check_settings(_put_destination.kind, _put_destination.settings);
    PERFORM outbox._check_tenant(_put_destination.tenant_id);
    PERFORM outbox._check_filter(_put_destination.filter);
    PERFORM outbox._lock();
    SELECT * INTO v_old FROM outbox.destination d WHERE d.name = _put_destination.name;
    IF v_old.kind <> _put_destination.kind THEN
        RAISE EXCEPTION USING ERRCODE = 'duplicate_object',
            MESSAGE = format('destination %I exists already, of kind %s', v_old.name, v_old.kind),
            HINT = 'Remove it first with outbox.remove_destination(), or choose another name.';
    END IF;
    -- Claims in flight were made by what it wanted before.
    IF v_old.name IS NOT NULL
       AND (v_old.event_types, v_old.tenant_id, v_old.filter::text)
           IS DISTINCT FROM (_put_destination.event_types, _put_destination.tenant_id, _put_destination.filter::text) THEN
        PERFORM outbox._list_in_flight();
    END IF;
    INSERT INTO outbox.destination AS d
           (name, kind, event_types, tenant_id, filter, exchange, routing_key, url, broker, settings, since_token)
    VALUES (_put_destination.name, _put_destination.kind, _put_destination.event_types, _put_destination.tenant_id,
            _put_destination.filter, _put_destination.exchange, _put_destination.routing_key,
            outbox._shown_url(_put_destination.url),
            CASE _put_destination.kind WHEN 'rabbitmq' THEN coalesce(_put_destination.settings ->> 'broker', 'default') END,
            outbox._shown_settings(_put_destination.settings), outbox._new_token())
    ON CONFLICT ON CONSTRAINT destination_pkey DO UPDATE
       SET event_types = excluded.event_types, tenant_id = excluded.tenant_id, filter = excluded.filter,
           exchange = excluded.exchange, routing_key = excluded.routing_key, url = excluded.url, broker = excluded.broker,
           settings = excluded.settings;
    PERFORM outbox._try_anew(_put_destination.name) WHERE v_anew;
    PERFORM outbox._put_interest(_put_destination.name);
    PERFORM outbox._give_to_destinations();
    PERFORM outbox._destinations_changed(_put_destination.name);
END
$$;
COMMENT ON FUNCTION outbox._put_destination(text, text, text[], jsonb, text, text, text, text, jsonpath, boolean) IS
    'adds or changes a destination';

CREATE FUNCTION outbox._put_rabbitmq(
    name text, exchange text, routing_key text, event_types text[], settings jsonb, tenant_id text, filter jsonpath,
    v_anew boolean) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF exchange IS NULL OR coalesce(routing_key, '') = ''
       OR greatest(octet_length(outbox._fixed_text(exchange)), octet_length(outbox._fixed_text(routing_key))) > 255 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'exchange and routing_key must have at most 255 bytes and routing_key must not be empty',
            HINT = 'The exchange '''' is RabbitMQ''s default exchange: its routing key is the name of a queue.';
    END IF;
    PERFORM outbox._check_template(routing_key);
    PERFORM outbox._check_template(exchange);
    IF settings ->> 'declare' = 'queue' AND coalesce(settings ->> 'queue', name) LIKE 'amq.%' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'RabbitMQ keeps names of queues that begin with amq. to itself',
            HINT = 'Name the queue with settings.queue.';
    END IF;
    PERFORM outbox._put_destination(name, 'rabbitmq', event_types, settings, exchange, routing_key, NULL, tenant_id, filter,
                                    v_anew);
END
$$;
COMMENT ON FUNCTION outbox._put_rabbitmq(text, text, text, text[], jsonb, text, jsonpath, boolean) IS
    'adds or changes a RabbitMQ destination';

CREATE FUNCTION outbox.add_rabbitmq(
    name text, exchange text DEFAULT 'outbox_events', routing_key text DEFAULT '{event_type}',
    event_types text[] DEFAULT '{*}', settings jsonb DEFAULT '{}', tenant_id text DEFAULT NULL,
    filter jsonpath DEFAULT NULL) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._put_rabbitmq(name, exchange, routing_key, event_types, settings, tenant_id, filter, true);
END
$$;
COMMENT ON FUNCTION outbox.add_rabbitmq(text, text, text, text[], jsonb, text, jsonpath) IS
    'adds or changes a RabbitMQ destination; exchange and routing_key are templates';

-- For functions of outbox_keeper, which alone may read and write secrets.
CREATE FUNCTION outbox._put_secret(destination text, given text, settings jsonb) RETURNS text
    LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_secret text;
    v_shown text;
BEGIN
    -- Those that were made for another settings.signature.
    DELETE FROM outbox.secret s
     WHERE s.destination = _put_secret.destination AND NOT outbox._is_secret(s.secret, _put_secret.settings);
    SELECT s.secret INTO v_secret FROM outbox.secret s
     WHERE s.destination = _put_secret.destination AND s.expires_at IS NULL;
    IF v_secret = given OR v_secret IS NOT NULL AND given IS NULL THEN
        v_shown := outbox._shown_secret(v_secret, settings);
        RETURN CASE WHEN given IS NOT NULL OR v_shown <> v_secret OR outbox._caller_reads_secrets() THEN v_shown END;
    END IF;
    DELETE FROM outbox.secret s WHERE s.destination = _put_secret.destination;
    v_secret := coalesce(given, outbox._new_secret(settings));
    INSERT INTO outbox.secret (destination, secret) SELECT _put_secret.destination, v_secret WHERE v_secret IS NOT NULL;
    RETURN outbox._shown_secret(v_secret, settings);
END
$$;
COMMENT ON FUNCTION outbox._put_secret(text, text, jsonb) IS
    'the webhook is signed with the given secret, with its present one or with a new one; what the receiver has to know, if the caller may';

CREATE FUNCTION outbox._put_webhook(
    name text, url text, event_types text[], settings jsonb, tenant_id text, filter jsonpath, v_anew boolean) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    PERFORM outbox._check_url(url);
    PERFORM outbox._put_destination(name, 'webhook', event_types, settings, NULL, NULL, url, tenant_id, filter, v_anew);
    INSERT INTO outbox.hidden (destination, url, settings)
    VALUES (_put_webhook.name, _put_webhook.url, _put_webhook.settings)
    ON CONFLICT ON CONSTRAINT hidden_pkey DO UPDATE SET url = excluded.url, settings = excluded.settings;
END
$$;
COMMENT ON FUNCTION outbox._put_webhook(text, text, text[], jsonb, text, jsonpath, boolean) IS
    'adds or changes a webhook, but for its secret';

CREATE FUNCTION outbox.add_webhook(
    name text, url text, event_types text[] DEFAULT '{*}', secret text DEFAULT NULL, settings jsonb DEFAULT '{}',
    tenant_id text DEFAULT NULL, filter jsonpath DEFAULT NULL) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    PERFORM outbox._check_secret(secret, settings);
    PERFORM outbox._put_webhook(name, url, event_types, settings, tenant_id, filter, true);
    RETURN outbox._put_secret(add_webhook.name, add_webhook.secret, add_webhook.settings);
END
$$;
COMMENT ON FUNCTION outbox.add_webhook(text, text, text[], text, jsonb, text, jsonpath) IS
    'adds or changes a webhook and returns its signing secret, or its public key; null: it has none, or the present one stays and is not the caller''s to see';

-- Source: RFC 7396, JSON Merge Patch, section 2.
CREATE FUNCTION outbox._merge_patch(target jsonb, patch jsonb) RETURNS jsonb
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_merged jsonb := CASE WHEN jsonb_typeof(target) = 'object' THEN target ELSE '{}' END;
    v_key text;
    v_value jsonb;
BEGIN
    IF jsonb_typeof(patch) <> 'object' THEN
        RETURN patch;
    END IF;
    FOR v_key, v_value IN SELECT p.key, p.value FROM jsonb_each(patch) p LOOP
        IF v_value = 'null' THEN
            v_merged := v_merged - v_key;
        ELSE
            v_merged := v_merged || jsonb_build_object(v_key, outbox._merge_patch(v_merged -> v_key, v_value));
        END IF;
    END LOOP;
    RETURN v_merged;
END
$$;
COMMENT ON FUNCTION outbox._merge_patch(jsonb, jsonb) IS 'the target with what a JSON Merge Patch changes';

-- Errors show no value: one may hold a token.
CREATE FUNCTION outbox._check_changes(kind text, changes jsonb) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_known CONSTANT text[] := ARRAY['event_types', 'tenant_id', 'filter', 'settings']
        || CASE kind WHEN 'webhook' THEN ARRAY['url'] ELSE ARRAY['exchange', 'routing_key'] END;
    v_key text;
    v_value jsonb;
BEGIN
    IF coalesce(jsonb_typeof(changes), 'null') <> 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'changes must be a JSON object',
            HINT = 'For example {"event_types": ["order.*"], "settings": {"max_attempts": 5, "base": null}}.';
    END IF;
    FOR v_key, v_value IN SELECT c.key, c.value FROM jsonb_each(changes) c LOOP
        IF v_key <> ALL (v_known) THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('unknown key %L in the changes of a %s destination', v_key, kind),
                HINT = format('Keys are %s.', array_to_string(v_known, ', '));
        ELSIF v_key = 'event_types' AND jsonb_typeof(v_value) <> 'null'
              AND (jsonb_typeof(v_value) <> 'array' OR jsonb_path_exists(v_value, 'strict $[*] ? (@.type() <> "string")')) THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'event_types must be a JSON array of texts',
                HINT = 'For example {"event_types": ["order.*", "invoice.paid"]}.';
        ELSIF v_key NOT IN ('event_types', 'settings') AND jsonb_typeof(v_value) NOT IN ('string', 'null') THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = format('%s must be a text or null', v_key),
                HINT = 'Null removes it, or brings back its default.';
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._check_changes(text, jsonb) IS 'an error for changes that no destination of this kind can have';

-- What views hide is merged as it is stored.
CREATE FUNCTION outbox.alter_destination(name text, changes jsonb) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_wants CONSTANT text[] := ARRAY['event_types', 'tenant_id', 'filter'];
    v_kind text;
    v_old jsonb;
    v_new jsonb;
    v_types text[];
    v_settings jsonb;
    v_anew boolean;
BEGIN
    PERFORM outbox._require_destination(name);
    PERFORM outbox._lock_for_secrets();
    PERFORM outbox._require_destination(name);
    SELECT d.kind, jsonb_strip_nulls(jsonb_build_object('url', h.url, 'exchange', d.exchange, 'routing_key', d.routing_key,
                                                        'tenant_id', d.tenant_id, 'filter', d.filter::text))
                   || jsonb_build_object('event_types', to_jsonb(d.event_types), 'settings', coalesce(h.settings, d.settings))
      INTO v_kind, v_old
      FROM outbox.destination d LEFT JOIN outbox.hidden h ON h.destination = d.name
     WHERE d.name = alter_destination.name;
    PERFORM outbox._check_changes(v_kind, changes);
    v_new := outbox._merge_patch(v_old, changes);
    -- Another address, or another way to call it, may be answered otherwise. What it wants says nothing of that.
    v_anew := v_new - v_wants <> v_old - v_wants;
    v_types := CASE WHEN v_new ? 'event_types' THEN ARRAY(SELECT jsonb_array_elements_text(v_new -> 'event_types')) ELSE '{*}' END;
    v_settings := coalesce(v_new -> 'settings', '{}');
    IF v_kind = 'webhook' THEN
        PERFORM outbox._put_webhook(name, v_new ->> 'url', v_types, v_settings, v_new ->> 'tenant_id',
                                    (v_new ->> 'filter')::jsonpath, v_anew);
        -- Another settings.signature needs a secret of another kind: outbox.rotate_secret() makes one that is shown.
        PERFORM outbox._put_secret(name, NULL, v_settings);
    ELSE
        PERFORM outbox._put_rabbitmq(name, coalesce(v_new ->> 'exchange', 'outbox_events'),
                                     coalesce(v_new ->> 'routing_key', '{event_type}'), v_types, v_settings,
                                     v_new ->> 'tenant_id', (v_new ->> 'filter')::jsonpath, v_anew);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox.alter_destination(text, jsonb) IS
    'changes a destination by a JSON Merge Patch: what is not named stays, null removes or brings back the default';

CREATE FUNCTION outbox.rotate_secret(name text, grace interval DEFAULT '24 hours') RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_settings jsonb;
    v_secret text;
BEGIN
    PERFORM outbox._require_destination(name);
    PERFORM outbox._lock_for_secrets();
    IF NOT EXISTS (SELECT FROM outbox.secret s WHERE s.destination = name) THEN
        RAISE EXCEPTION USING ERRCODE = 'wrong_object_type', MESSAGE = format('destination %I has no signing secret', name),
            HINT = 'Webhooks are signed, unless settings.signature is none.';
    ELSIF grace IS NULL OR grace NOT BETWEEN interval '0' AND interval '3660 days' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'grace must not be negative or null, nor longer than 3660 days',
            HINT = 'It is how long the secret before signs too; 0 drops it at once.';
    END IF;
    DELETE FROM outbox.secret s WHERE s.destination = name AND s.expires_at IS NOT NULL;
    UPDATE outbox.secret s SET expires_at = clock_timestamp() + grace WHERE s.destination = name;
    SELECT h.settings INTO v_settings FROM outbox.hidden h WHERE h.destination = name;
    v_secret := outbox._new_secret(v_settings);
    INSERT INTO outbox.secret (destination, secret) VALUES (name, v_secret);
    PERFORM outbox._wake_at(clock_timestamp() + grace);
    PERFORM outbox._destinations_changed(name);
    RETURN outbox._shown_secret(v_secret, v_settings);
END
$$;
COMMENT ON FUNCTION outbox.rotate_secret(text, interval) IS
    'a new signing secret, or key pair, for a webhook, of which it returns what the receiver has to know; the one before signs too until the grace ends';

CREATE FUNCTION outbox.pause(name text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._require_destination(name);
    PERFORM outbox._lock();
    UPDATE outbox.destination d SET paused = true WHERE d.name = pause.name;
    PERFORM outbox._destinations_changed(name);
END
$$;
COMMENT ON FUNCTION outbox.pause(text) IS 'holds back a destination''s deliveries; what is claimed already is still delivered';

CREATE FUNCTION outbox.resume(name text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._require_destination(name);
    PERFORM outbox._lock();
    UPDATE outbox.destination d SET paused = false WHERE d.name = resume.name;
    PERFORM outbox._try_anew(name);
    PERFORM outbox._destinations_changed(name);
END
$$;
COMMENT ON FUNCTION outbox.resume(text) IS 'ends a pause, a disablement or an open circuit: deliveries go on at once';

CREATE FUNCTION outbox.remove_destination(name text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_gone record;
BEGIN
    PERFORM outbox._require_destination(name);
    PERFORM outbox._lock();
    DELETE FROM outbox.destination d WHERE d.name = remove_destination.name;
    WITH gone AS (
        DELETE FROM outbox.delivery d WHERE d.destination = remove_destination.name RETURNING d.id, d.claim_token
    )
    SELECT array_agg(g.id) AS ids, array_agg(g.claim_token) FILTER (WHERE g.claim_token IS NOT NULL) AS tokens
      INTO v_gone FROM gone g;
    PERFORM outbox._let_go(v_gone.tokens);
    PERFORM outbox._refresh(v_gone.ids);
    PERFORM pg_notify('outbox_destinations', name);
    PERFORM outbox._wake('due');
END
$$;
COMMENT ON FUNCTION outbox.remove_destination(text) IS 'removes a destination with its outstanding and dead deliveries';

CREATE FUNCTION outbox.send_test(name text) RETURNS uuid
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET lock_timeout = 0
AS $$
DECLARE
    v_event record;
BEGIN
    PERFORM outbox._require_destination(name);
    PERFORM outbox._lock();
    PERFORM outbox._require_destination(name);
    INSERT INTO @extschema@.outbox_events AS e (event_type, event_data)
    VALUES ('outbox.test', jsonb_build_object('destination', name, 'sent_at',
                to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')))
    RETURNING e.id, e.event_id INTO v_event;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state', MESSAGE = 'the test event was not inserted',
            DETAIL = 'A trigger that others added to outbox_events kept it out.',
            HINT = 'See the check foreign_objects of outbox.health().';
    END IF;
    UPDATE @extschema@.outbox_events e SET listed = true, routed = e.available_at IS NOT NULL WHERE e.id = v_event.id;
    INSERT INTO outbox.delivery (id, destination, status, next_attempt_at)
    VALUES (v_event.id, name, 'pending', clock_timestamp());
    RETURN v_event.event_id;
END
$$;
COMMENT ON FUNCTION outbox.send_test(text) IS
    'an event of type outbox.test, owed to this destination alone, whatever it wants; returns its event_id';
-- Dead letters: another try for what was given up on, or once more for what was delivered; and removing them.

CREATE FUNCTION outbox._owed_again(v_ids bigint[]) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    UPDATE @extschema@.outbox_events e SET listed = true, routed = e.available_at IS NOT NULL
     WHERE e.id = ANY (v_ids) AND NOT e.listed;
    PERFORM outbox._refresh(v_ids);
    PERFORM outbox._wake('due');
END
$$;
COMMENT ON FUNCTION outbox._owed_again(bigint[]) IS 'events with new deliveries are pending again';

-- Owes an event again to one destination, or (null) to each that gave it up; a processed event, to each that wants it.
CREATE FUNCTION outbox.replay(event_id uuid, destination text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET lock_timeout = 0
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_event record;
    v_changed bigint;
BEGIN
    PERFORM outbox._require_destination(replay.destination) WHERE replay.destination IS NOT NULL;
    -- Locks the row first: the holder of the claim lock must not wait for one. Retention, which takes no claim lock, passes
    -- it meanwhile.
    PERFORM FROM @extschema@.outbox_events e WHERE e.event_id = replay.event_id FOR UPDATE;
    PERFORM outbox._lock();
    SELECT e.id, e.event_type, e.status, e.claim_token, outbox._ordering_key(e.aggregate_type, e.aggregate_id) AS key,
           e.status = 'failed' OR EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id AND d.status = 'failed') AS dead
      INTO v_event FROM @extschema@.outbox_events e WHERE e.event_id = replay.event_id;
    IF NOT FOUND OR NOT (v_event.dead OR v_event.status = 'processed') THEN
        RETURN false;
    END IF;
    WITH again AS (
        UPDATE outbox.delivery d SET status = 'pending', attempts = 0, next_attempt_at = clock_timestamp(), owed_since = clock_timestamp()
         WHERE d.id = v_event.id AND d.status = 'failed'
           AND (replay.destination IS NULL OR d.destination = replay.destination)
        RETURNING 1
    ), anew AS (
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, next_attempt_at)
        SELECT v_event.id, t.name, v_event.key, 'pending', clock_timestamp()
          FROM (SELECT replay.destination AS name WHERE replay.destination IS NOT NULL AND v_event.claim_token IS NULL
                UNION
                SELECT r.destination FROM outbox._routes_or_nobody(ARRAY[v_event.id]) r
                 WHERE replay.destination IS NULL AND NOT v_event.dead) t
        ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING
        RETURNING 1
    )
    SELECT (SELECT count(*) FROM again) + (SELECT count(*) FROM anew) INTO v_changed;
    IF v_changed > 0 THEN
        PERFORM outbox._owed_again(ARRAY[v_event.id]);
    END IF;
    RETURN v_changed > 0;
END
$$;
COMMENT ON FUNCTION outbox.replay(uuid, text) IS
    'owes an event again: a dead letter to those that gave it up, a processed one to all that want it, or to one destination';

-- Null stands for no restriction, wherever an operator narrows down what is replayed or purged.
CREATE FUNCTION outbox._check_selection(event_types text, destination text, error text, max_events int) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._check_patterns(ARRAY[coalesce(event_types, '*')]);
    PERFORM outbox._require_destination(destination) WHERE destination IS NOT NULL;
    IF error = '' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'error must not be empty',
            HINT = 'Use ''*'' for all errors, or a pattern such as ''*timeout*''.';
    ELSIF max_events < 1 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('max_events must be at least 1, not %s', max_events),
            HINT = 'Leave it out for all events, or ask with dry_run how many there are.';
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._check_selection(text, text, text, int) IS 'an error for a selection of events that makes no sense';

-- No settings of its own, so that the planner can merge it into the query that uses it.
CREATE FUNCTION outbox._dead(event_types text, destination text, since timestamptz, until timestamptz, error text)
    RETURNS TABLE (id bigint, at tid)
    LANGUAGE sql STABLE
AS $$
    SELECT d.id, d.ctid
      FROM outbox.delivery d JOIN @extschema@.outbox_events e ON e.id = d.id
     WHERE d.status = 'failed' AND e.event_type LIKE outbox._like_pattern(coalesce($1, '*'))
       AND ($2 IS NULL OR d.destination = $2) AND ($3 IS NULL OR e.created_at >= $3) AND ($4 IS NULL OR e.created_at < $4)
       AND (coalesce($5, '*') = '*' OR d.last_error LIKE outbox._like_pattern($5))
$$;
COMMENT ON FUNCTION outbox._dead(text, text, timestamptz, timestamptz, text) IS
    'the dead letters of events of these types, created from since on and before until, with such an error';

CREATE FUNCTION outbox.replay_failed(
    event_types text DEFAULT '*', destination text DEFAULT NULL, since timestamptz DEFAULT NULL,
    until timestamptz DEFAULT NULL, error text DEFAULT '*', max_events int DEFAULT NULL, dry_run boolean DEFAULT false)
    RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_ids bigint[];
BEGIN
    PERFORM outbox._check_selection(replay_failed.event_types, replay_failed.destination, replay_failed.error, replay_failed.max_events);
    IF dry_run IS DISTINCT FROM false THEN
        RETURN (SELECT count(*) FROM (
            SELECT DISTINCT f.id FROM outbox._dead(replay_failed.event_types, replay_failed.destination, replay_failed.since,
                                                   replay_failed.until, replay_failed.error) f
             LIMIT replay_failed.max_events) x);
    END IF;
    PERFORM outbox._lock();
    WITH dead AS MATERIALIZED (
        SELECT f.id, f.at FROM outbox._dead(replay_failed.event_types, replay_failed.destination, replay_failed.since,
                                               replay_failed.until, replay_failed.error) f
    ), oldest AS MATERIALIZED (
        SELECT DISTINCT f.id FROM dead f ORDER BY f.id LIMIT replay_failed.max_events
    ), again AS (
        UPDATE outbox.delivery d SET status = 'pending', attempts = 0, next_attempt_at = clock_timestamp(), owed_since = clock_timestamp()
         WHERE d.ctid = ANY (ARRAY(SELECT f.at FROM dead f WHERE f.id <= (SELECT max(o.id) FROM oldest o)))
    )
    SELECT array_agg(o.id) INTO v_ids FROM oldest o;
    IF v_ids IS NOT NULL THEN
        PERFORM outbox._owed_again(v_ids);
    END IF;
    RETURN coalesce(cardinality(v_ids), 0);
END
$$;
COMMENT ON FUNCTION outbox.replay_failed(text, text, timestamptz, timestamptz, text, int, boolean) IS
    'owes dead letters again, those of the oldest events first; returns the number of events; dry_run: the number alone';

-- Another destination may still be owed the event, or have given it up too: then the event stays.
CREATE FUNCTION outbox.purge_failed(
    older_than interval DEFAULT '0', event_types text DEFAULT '*', destination text DEFAULT NULL, error text DEFAULT '*',
    dry_run boolean DEFAULT false) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_until timestamptz := CASE WHEN older_than > interval '0' THEN clock_timestamp() - older_than END;
    v_gone record;
BEGIN
    PERFORM outbox._check_selection(purge_failed.event_types, purge_failed.destination, purge_failed.error, NULL);
    IF dry_run IS DISTINCT FROM false THEN
        RETURN (SELECT count(DISTINCT f.id) FROM outbox._dead(purge_failed.event_types, purge_failed.destination, NULL, v_until,
                                                              purge_failed.error) f);
    END IF;
    PERFORM outbox._lock();
    -- Checks must not be left to the commit, which is the caller's.
    IF EXISTS (SELECT FROM pg_constraint c
                WHERE c.confrelid = '@extschema@.outbox_events'::regclass AND c.contype = 'f' AND c.condeferrable) THEN
        SET CONSTRAINTS ALL IMMEDIATE;
    END IF;
    WITH dead AS MATERIALIZED (
        SELECT f.id, f.at FROM outbox._dead(purge_failed.event_types, purge_failed.destination, NULL, v_until, purge_failed.error) f
    ), free AS MATERIALIZED (
        SELECT e.id FROM @extschema@.outbox_events e WHERE e.id = ANY (ARRAY(SELECT f.id FROM dead f)) FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM outbox.delivery d
         WHERE d.ctid = ANY (ARRAY(SELECT f.at FROM dead f WHERE f.id IN (SELECT x.id FROM free x)))
        RETURNING d.id, d.destination, d.ordering_key
    )
    SELECT array_agg(g.id) AS ids, array_agg(g.destination) AS destinations, array_agg(g.ordering_key) AS keys,
           count(DISTINCT g.id) AS events, (SELECT count(DISTINCT f.id) FROM dead f) - count(DISTINCT g.id) AS locked
      INTO v_gone FROM gone g;
    IF v_gone.locked > 0 THEN
        RAISE WARNING USING MESSAGE = format('dead letters of %s events stay, because other transactions have the events locked',
                                             v_gone.locked),
            HINT = 'Purge again when these transactions have ended.';
    END IF;
    DELETE FROM @extschema@.outbox_events e
     WHERE e.id = ANY (v_gone.ids) AND e.listed AND e.claim_token IS NULL
       AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id);
    PERFORM outbox._refresh(v_gone.ids);
    PERFORM outbox._promote(v_gone.destinations, v_gone.keys);
    RETURN v_gone.events;
END
$$;
COMMENT ON FUNCTION outbox.purge_failed(interval, text, text, text, boolean) IS
    'removes dead letters of events created longer ago, and the events that nobody else is owed or gave up; returns the number of events; dry_run: the number alone';

-- Removes one event's dead letters, or the one of a destination; the event too, when nobody else is owed or gave it up.
CREATE FUNCTION outbox.purge(event_id uuid, destination text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0 SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_id bigint;
    v_gone record;
BEGIN
    PERFORM outbox._require_destination(purge.destination) WHERE purge.destination IS NOT NULL;
    -- Locks the row first: the holder of the claim lock must not wait for one.
    SELECT e.id INTO v_id FROM @extschema@.outbox_events e WHERE e.event_id = purge.event_id FOR UPDATE;
    PERFORM outbox._lock();
    -- Checks must not be left to the commit, which is the caller's.
    IF EXISTS (SELECT FROM pg_constraint c
                WHERE c.confrelid = '@extschema@.outbox_events'::regclass AND c.contype = 'f' AND c.condeferrable) THEN
        SET CONSTRAINTS ALL IMMEDIATE;
    END IF;
    WITH gone AS (
        DELETE FROM outbox.delivery d
         WHERE d.id = v_id AND d.status = 'failed' AND (purge.destination IS NULL OR d.destination = purge.destination)
        RETURNING d.destination, d.ordering_key
    )
    SELECT array_agg(g.destination) AS destinations, array_agg(g.ordering_key) AS keys INTO v_gone FROM gone g;
    IF v_gone.destinations IS NULL THEN
        RETURN false;
    END IF;
    DELETE FROM @extschema@.outbox_events e
     WHERE e.id = v_id AND e.listed AND e.claim_token IS NULL
       AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id);
    PERFORM outbox._refresh(ARRAY[v_id]);
    PERFORM outbox._promote(v_gone.destinations, v_gone.keys);
    RETURN true;
END
$$;
COMMENT ON FUNCTION outbox.purge(uuid, text) IS
    'removes the dead letters of one event, or that of one destination, and the event if nobody else is owed or gave it up';
-- Backfill: a destination is owed the events that it would have had.

-- The events that a destination wants and is not going to get by itself: fresh and scheduled ones go to it anyway, and so does
-- what a claim holds for it. What it was delivered is not recorded, so those events are among them.
CREATE FUNCTION outbox._missed(
    v_destination text, v_event_types text, v_since timestamptz, v_until timestamptz, v_max_events int) RETURNS bigint[]
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_like CONSTANT text := outbox._like_pattern(coalesce(v_event_types, '*'));
    v_since_token CONSTANT bigint := (SELECT d.since_token FROM outbox.destination d WHERE d.name = v_destination);
BEGIN
    RETURN ARRAY(
        SELECT e.id FROM @extschema@.outbox_events e
         WHERE (e.status IN ('processed', 'failed') OR e.listed OR e.claim_token < v_since_token)
           AND (e.claim_token IS NULL OR e.claim_token < v_since_token)
           AND e.event_type LIKE v_like
           AND (v_since IS NULL OR e.created_at >= v_since) AND (v_until IS NULL OR e.created_at < v_until)
           AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id AND d.destination = v_destination)
           AND outbox._wants(v_destination, e.id, e.event_type, e.tenant_id)
         ORDER BY e.id LIMIT v_max_events);
END
$$;
COMMENT ON FUNCTION outbox._missed(text, text, timestamptz, timestamptz, int) IS
    'the events, oldest first, that a destination wants and is not going to get by itself';

-- Owes these events to the destination, unless they changed meanwhile. For the holder of the claim lock. Returns how many
-- it owed.
CREATE FUNCTION outbox._owe(v_destination text, v_ids bigint[]) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_blocks CONSTANT boolean := (SELECT d.blocks FROM outbox.destination d WHERE d.name = v_destination);
    v_now CONSTANT timestamptz := clock_timestamp();
    v_owed bigint;
BEGIN
    WITH free AS MATERIALIZED (
        SELECT e.id FROM @extschema@.outbox_events e
         WHERE e.id = ANY (v_ids) AND e.claim_token IS NULL AND (e.listed OR e.status = 'processed')
           AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id AND d.destination = v_destination)
           FOR NO KEY UPDATE OF e SKIP LOCKED
    ), owed AS (
        UPDATE @extschema@.outbox_events e
           SET listed = true, routed = e.available_at IS NOT NULL,
               status = CASE WHEN e.status IN ('processed', 'failed') THEN 'pending' ELSE e.status END,
               processed_at = CASE WHEN e.status = 'processed' THEN NULL ELSE e.processed_at END
         WHERE e.id = ANY (ARRAY(SELECT f.id FROM free f))
        RETURNING e.id, outbox._ordering_key(e.aggregate_type, e.aggregate_id) AS key
    ), listed AS (
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, next_attempt_at)
        SELECT o.id, v_destination, o.key, 'pending',
               CASE WHEN o.key IS NULL THEN v_now
                    WHEN o.nth = 1 AND NOT EXISTS (SELECT FROM outbox._ahead(v_destination, o.key, o.id, v_blocks)) THEN v_now END
          FROM (SELECT x.id, x.key, row_number() OVER (PARTITION BY x.key ORDER BY x.id) AS nth FROM owed x) o
        RETURNING 1
    )
    SELECT count(*) INTO v_owed FROM listed;
    RETURN v_owed;
END
$$;
COMMENT ON FUNCTION outbox._owe(text, bigint[]) IS 'owes settled events, and listed ones, to one more destination';

-- Looks for the events before it takes the claim lock, and holds the lock while it owes them.
CREATE FUNCTION outbox.backfill(
    destination text, event_types text DEFAULT '*', since timestamptz DEFAULT NULL, until timestamptz DEFAULT NULL,
    max_events int DEFAULT NULL, dry_run boolean DEFAULT false) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
#variable_conflict use_column
DECLARE
    v_batch CONSTANT int := 5000;
    v_ids bigint[];
    v_owed bigint := 0;
BEGIN
    PERFORM outbox._check_selection(backfill.event_types, NULL, NULL, backfill.max_events);
    PERFORM outbox._require_destination(backfill.destination);
    v_ids := outbox._missed(backfill.destination, backfill.event_types, backfill.since, backfill.until, backfill.max_events);
    IF dry_run IS DISTINCT FROM false OR v_ids = '{}' THEN
        RETURN cardinality(v_ids);
    END IF;
    PERFORM outbox._lock();
    PERFORM outbox._require_destination(backfill.destination);
    -- What is claimed whole can be owed to one more destination when it is listed.
    PERFORM outbox._list_in_flight();
    FOR v_first IN 1..cardinality(v_ids) BY v_batch LOOP
        v_owed := v_owed + outbox._owe(backfill.destination, v_ids[v_first:v_first + v_batch - 1]);
    END LOOP;
    IF v_owed < cardinality(v_ids) THEN
        RAISE WARNING USING MESSAGE = format('%s of these events are locked by other transactions, or changed meanwhile, and were left out',
                                             cardinality(v_ids) - v_owed),
            HINT = 'Backfill again for them: what is owed already is not owed twice.';
    END IF;
    PERFORM outbox._wake('due');
    RETURN v_owed;
END
$$;
COMMENT ON FUNCTION outbox.backfill(text, text, timestamptz, timestamptz, int, boolean) IS
    'owes a destination the events that it would have had, as long as they are kept, oldest first; returns their number; dry_run: the number alone';
-- The inbox of consumers: which events they have seen, so that an event that arrives twice is worked on once.

CREATE FUNCTION outbox._inbox_retention() RETURNS interval
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN nullif(current_setting('outbox.inbox_retention'), '-1')::interval;
END
$$;
COMMENT ON FUNCTION outbox._inbox_retention() IS 'how long the inbox remembers an event; null: for ever';

-- Whoever inserts the same pair meanwhile is waited for: if that transaction rolls back, this is the first time.
CREATE FUNCTION outbox.first_time(consumer text, event_id uuid) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_now CONSTANT timestamptz := clock_timestamp();
BEGIN
    IF consumer IS NULL OR event_id IS NULL OR octet_length(consumer) NOT BETWEEN 1 AND 1000 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'consumer must have 1 to 1000 bytes, and event_id must not be null',
            HINT = 'Name what is done with the event, for example ''invoicing'': each consumer has a first time of its own.';
    END IF;
    INSERT INTO outbox.inbox (consumer, event_id, seen_at) VALUES (first_time.consumer, first_time.event_id, v_now)
    ON CONFLICT ON CONSTRAINT inbox_pkey DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM outbox._wake_at(v_now + outbox._inbox_retention());
    RETURN true;
END
$$;
COMMENT ON FUNCTION outbox.first_time(text, uuid) IS
    'true the first time that a consumer sees an event in a transaction that commits; false ever after';

-- Removes a batch of what is old enough, and returns when to come back: at the moment when the next is, or after a rest.
CREATE FUNCTION outbox._forget_seen(v_now timestamptz) RETURNS timestamptz
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_batch CONSTANT int := 1000;
    v_kept CONSTANT interval := outbox._inbox_retention();
    v_rest interval := interval '1 second';
    v_removed int;
    v_oldest timestamptz;
BEGIN
    IF v_kept IS NULL THEN
        RETURN NULL;
    END IF;
    DELETE FROM outbox.inbox i
     WHERE i.ctid = ANY (ARRAY(SELECT x.ctid FROM outbox.inbox x WHERE x.seen_at <= v_now - v_kept
                                ORDER BY x.seen_at LIMIT v_batch FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS v_removed = ROW_COUNT;
    IF v_removed = v_batch THEN
        v_rest := interval '50 milliseconds';
    END IF;
    SELECT x.seen_at INTO v_oldest FROM outbox.inbox x ORDER BY x.seen_at LIMIT 1;
    -- One by one only where they are rare: a stream of them goes once a second.
    RETURN CASE WHEN v_oldest IS NULL THEN NULL
                WHEN v_removed > 0 THEN greatest(v_oldest + v_kept, v_now + v_rest)
                ELSE greatest(v_oldest + v_kept, CASE WHEN v_oldest + v_kept <= v_now THEN v_now + v_rest END) END;
END
$$;
COMMENT ON FUNCTION outbox._forget_seen(timestamptz) IS 'removes what the inbox has remembered long enough; returns when to come back';
-- Recovery: everything in shared memory follows from the tables, when the worker starts and after rows arrived with a
-- status of their own.

-- Mends rows that came with a restore or were copied by hand, in any order and any number of transactions. A missing row may
-- still be on its way, so nothing follows from it. The rows that are there tell that
--   an event of an unknown claim is given back; if it is listed, every destination that wants it is owed it
--   a delivery of an unknown claim is given back
--   a delivery that waits for nothing is due, and an event's status follows from its deliveries
-- Contradictions are counted for outbox.health() and left to outbox.repair().
CREATE FUNCTION outbox._mend() RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_locked bigint[];
    v_unknown bigint[];
BEGIN
    -- Each destination has a row here for each of its patterns.
    PERFORM outbox._put_interest(d.name) FROM outbox.destination d
      WHERE NOT EXISTS (SELECT FROM outbox.interest i WHERE i.destination = d.name);
    v_unknown := ARRAY(SELECT e.id FROM @extschema@.outbox_events e
                        WHERE e.claim_token IS NOT NULL
                          AND NOT EXISTS (SELECT FROM outbox.claims c WHERE c.token = e.claim_token));
    v_locked := outbox._locked(v_unknown);
    WITH lost AS (
        UPDATE @extschema@.outbox_events e SET claim_token = NULL
         WHERE e.id = ANY (v_unknown) AND e.id <> ALL (v_locked) AND e.listed AND e.status = 'processing'
           AND EXISTS (SELECT FROM outbox.destination)
        RETURNING e.id
    )
    INSERT INTO outbox.delivery (id, destination, ordering_key, status, next_attempt_at)
    SELECT r.id, r.destination, r.ordering_key, 'pending', clock_timestamp()
      FROM outbox._routes(ARRAY(SELECT l.id FROM lost l)) r
    ON CONFLICT ON CONSTRAINT delivery_pkey DO NOTHING;
    UPDATE @extschema@.outbox_events e
       SET status = CASE e.status WHEN 'processing' THEN 'pending' ELSE e.status END, claim_token = NULL
     WHERE e.id = ANY (v_unknown) AND e.id <> ALL (v_locked) AND NOT e.listed;
    UPDATE @extschema@.outbox_events e SET routed = true
     WHERE e.available_at IS NOT NULL AND NOT e.routed AND (e.status <> 'pending' OR e.listed) AND e.id <> ALL (v_locked);
    UPDATE outbox.delivery d SET status = 'pending', claim_token = NULL, next_attempt_at = clock_timestamp()
     WHERE d.status = 'processing' AND NOT EXISTS (SELECT FROM outbox.claims c WHERE c.token = d.claim_token);
    UPDATE outbox.delivery d SET next_attempt_at = clock_timestamp()
     WHERE d.status = 'pending' AND d.next_attempt_at IS NULL AND d.ordering_key IS NULL
       AND EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = d.id);
    PERFORM outbox._promote_keys(ARRAY(SELECT DISTINCT d.ordering_key FROM outbox.delivery d
                                         WHERE d.status = 'pending' AND d.next_attempt_at IS NULL
                                           AND d.ordering_key IS NOT NULL
                                           AND EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = d.id)));
    PERFORM outbox._find_due(ARRAY(SELECT d.name FROM outbox.destination d));
    PERFORM outbox._refresh_all();
    PERFORM outbox._look_again() WHERE v_locked <> '{}';
    DELETE FROM outbox.contradiction;
    INSERT INTO outbox.contradiction (kind, found)
    SELECT x.kind, x.n FROM (
        SELECT 'event without delivery' AS kind, count(*) AS n FROM @extschema@.outbox_events e
         WHERE e.status IN ('pending', 'processing') AND e.listed AND e.claim_token IS NULL
           AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id)
        UNION ALL
        SELECT 'delivery without event', count(*) FROM outbox.delivery d
         WHERE NOT EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = d.id)) x
     WHERE x.n > 0;
END
$$;
COMMENT ON FUNCTION outbox._mend() IS 'mends rows that came with a restore and counts contradictions';

-- Rebuilds shared memory when the worker starts and after a restore. Returns when to look for what is due: at once. v_count:
-- counts the events, because shared memory is new; after a worker alone has restarted, the counters are right. Writers go on:
-- their rows are added to the count.
CREATE FUNCTION outbox._recover(v_count boolean) RETURNS timestamptz
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = on SET enable_hashjoin = on
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_counts record;
BEGIN
    PERFORM outbox._lock();
    PERFORM outbox._release(ARRAY(
        SELECT c.token FROM outbox.claims c
         WHERE c.boot <> outbox._boot()
            OR (c.attachment IS NOT NULL AND NOT EXISTS (SELECT FROM outbox._attachments() a WHERE a.attachment = c.attachment))));
    IF NOT v_count THEN
        RETURN clock_timestamp();
    END IF;
    PERFORM outbox._forget_earlier_starts();
    PERFORM outbox._mend();
    -- If a commit came in at each try, the last count is nearly right, and the worker counts again.
    FOR v_try IN 1..100 LOOP
        PERFORM outbox._count_begin();
        SELECT count(*) FILTER (WHERE e.status = 'pending') AS pending,
               count(*) FILTER (WHERE e.status = 'processing') AS processing,
               count(*) FILTER (WHERE e.status = 'processed') AS processed,
               count(*) FILTER (WHERE e.status = 'failed') AS failed,
               min(e.id) FILTER (WHERE (e.status = 'pending' AND NOT e.listed) OR e.claim_token IS NOT NULL) AS low_water,
               max(e.id) FILTER (WHERE e.claim_token IS NOT NULL) AS high_water, CASE WHEN max(e.id) < 9223372036854775807 THEN max(e.id) + 1 ELSE max(e.id) END AS past_all
          INTO v_counts FROM @extschema@.outbox_events e
         WHERE outbox._count_from_here(v_try = 100);
        EXIT WHEN outbox._count_from_here(false);
    END LOOP;
    PERFORM outbox._recovered(coalesce(v_counts.low_water, v_counts.past_all, 1), coalesce(v_counts.high_water, 0),
                              v_counts.pending, v_counts.processing, v_counts.processed, v_counts.failed,
                              (SELECT count(*) FROM outbox.claims));
    RETURN clock_timestamp();
END
$$;
COMMENT ON FUNCTION outbox._recover(boolean) IS 'rebuilds shared memory from the tables and releases claims whose session has ended';

CREATE FUNCTION outbox.repair() RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
DECLARE
    v_gone record;
    v_count bigint;
BEGIN
    PERFORM outbox._lock();
    WITH gone AS (
        DELETE FROM outbox.delivery d
         WHERE NOT EXISTS (SELECT FROM @extschema@.outbox_events e WHERE e.id = d.id)
        RETURNING d.ordering_key, d.claim_token
    )
    SELECT array_agg(DISTINCT g.ordering_key) FILTER (WHERE g.ordering_key IS NOT NULL) AS keys,
           array_agg(g.claim_token) FILTER (WHERE g.claim_token IS NOT NULL) AS tokens, count(*) AS n
      INTO v_gone FROM gone g;
    PERFORM outbox._let_go(v_gone.tokens);
    PERFORM outbox._promote_keys(v_gone.keys);
    UPDATE @extschema@.outbox_events e SET status = 'pending', listed = false, routed = false
     WHERE e.status IN ('pending', 'processing') AND e.listed AND e.claim_token IS NULL
       AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id);
    GET DIAGNOSTICS v_count = ROW_COUNT;
    DELETE FROM outbox.contradiction;
    PERFORM outbox._wake('due');
    RETURN v_gone.n + v_count;
END
$$;
COMMENT ON FUNCTION outbox.repair() IS
    'after a restore is complete: removes deliveries without event, owes events without delivery to all that want them; returns how many';
-- What the background worker calls when a moment has come or a session has ended, each in a transaction of its own. The
-- worker sets a short lock_timeout and tries again what fails; what it announces waits for none of this.

CREATE FUNCTION outbox._next_due() RETURNS timestamptz
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
BEGIN
    RETURN least(
        (SELECT d.ready_at FROM outbox.destination d WHERE d.ready_at > now() ORDER BY d.ready_at LIMIT 1),
        -- Where something is due already, more may be due later.
        (SELECT min(x.next_attempt_at)
           FROM outbox.destination t
          CROSS JOIN LATERAL (SELECT d.next_attempt_at FROM outbox.delivery d
                               WHERE d.destination = t.name AND d.status = 'pending' AND d.next_attempt_at > now()
                               ORDER BY d.next_attempt_at LIMIT 1) x
          WHERE t.ready_at <= now()),
        (SELECT d.next_attempt_at FROM outbox.delivery d
          WHERE d.destination = '' AND d.status = 'pending' AND d.next_attempt_at > now() ORDER BY d.next_attempt_at LIMIT 1),
        (SELECT e.available_at FROM @extschema@.outbox_events e
          WHERE e.available_at > now() AND e.available_at IS NOT NULL AND NOT e.routed AND e.status = 'pending'
          ORDER BY e.available_at LIMIT 1),
        outbox._secrets_end());
END
$$;
COMMENT ON FUNCTION outbox._next_due() IS 'the next moment at which something is due; null: nothing is';

-- The timer fired. Takes no claim lock: a consumer that claims and stays in its transaction holds up no wake-up.
CREATE FUNCTION outbox._due() RETURNS timestamptz
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    IF EXISTS (SELECT FROM outbox.destination d WHERE d.ready_at <= v_now)
       OR EXISTS (SELECT FROM outbox.delivery d
                   WHERE d.destination = '' AND d.status = 'pending' AND d.next_attempt_at <= v_now)
       OR EXISTS (SELECT FROM @extschema@.outbox_events e
                   WHERE e.available_at <= v_now AND e.available_at IS NOT NULL AND NOT e.routed AND e.status = 'pending')
       -- A claim may have left events behind a row that the application had locked.
       OR outbox._is_waiting() THEN
        PERFORM outbox._wake('due');
    END IF;
    IF outbox._forget_secrets(v_now) THEN
        PERFORM pg_notify('outbox_destinations', '');
    END IF;
    RETURN least(outbox._next_due(), outbox._forget_seen(v_now));
END
$$;
COMMENT ON FUNCTION outbox._due() IS 'wakes consumers for what is due, forgets what is old, and returns when the next thing is due';

-- Does the work that was left for later and releases claims whose lease is over. Takes the claim lock only if there are any.
-- Returns SQLSTATE and message of an obstacle.
CREATE FUNCTION outbox._end_leases() RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_error text;
BEGIN
    IF EXISTS (SELECT FROM outbox.claims c WHERE c.lease_until <= v_now)
       OR EXISTS (SELECT FROM outbox.touched) OR EXISTS (SELECT FROM outbox.postponed) THEN
        PERFORM outbox._lock();
        PERFORM outbox._catch_up();
        v_error := outbox._release_apart(ARRAY(SELECT c.token FROM outbox.claims c WHERE c.lease_until <= v_now));
    END IF;
    PERFORM outbox._open_claims(0, (SELECT min(c.lease_until) FROM outbox.claims c WHERE c.lease_until > v_now));
    RETURN v_error;
END
$$;
COMMENT ON FUNCTION outbox._end_leases() IS 'does the work that was left for later and releases claims whose lease is over';

-- released: the attachments that hold nothing any more. error: SQLSTATE and message of an obstacle to the others.
CREATE FUNCTION outbox._release_attachments(v_attachments bigint[], OUT released bigint[], OUT error text)
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_tokens bigint[] := ARRAY(SELECT c.token FROM outbox.claims c WHERE c.attachment = ANY (v_attachments));
BEGIN
    -- An attachment that has ended claims nothing more: its claims are visible without the lock.
    IF cardinality(v_tokens) > 0 THEN
        PERFORM outbox._lock();
        error := outbox._release_apart(v_tokens);
    END IF;
    released := ARRAY(SELECT a.id FROM unnest(v_attachments) AS a (id)
                       WHERE NOT EXISTS (SELECT FROM outbox.claims c WHERE c.attachment = a.id));
END
$$;
COMMENT ON FUNCTION outbox._release_attachments(bigint[]) IS 'releases the claims of sessions that ended';
-- Retention: processed events older than outbox.retention go, in small batches, oldest first. Dead letters stay until an
-- operator removes them.

-- Null: never (outbox.retention = -1).
CREATE FUNCTION outbox._retention() RETURNS interval
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN nullif(current_setting('outbox.retention'), '-1')::interval;
END
$$;
COMMENT ON FUNCTION outbox._retention() IS 'how long processed events are kept; null: for ever';

CREATE FUNCTION outbox._remove_unlocked(v_ids bigint[]) RETURNS void
    LANGUAGE sql
AS $$
    DELETE FROM @extschema@.outbox_events e
     WHERE e.id = ANY (ARRAY(SELECT x.id FROM @extschema@.outbox_events x
                              WHERE x.id = ANY (v_ids) AND x.status = 'processed' FOR UPDATE SKIP LOCKED))
$$;
COMMENT ON FUNCTION outbox._remove_unlocked(bigint[]) IS 'removes those of these processed events that nobody has locked';

-- Removes them together or, if that fails, one by one. Checks foreign keys here, not at the commit, to know which event they
-- keep.
CREATE FUNCTION outbox._remove_processed(v_ids bigint[]) RETURNS text
    LANGUAGE plpgsql
AS $$
DECLARE
    v_id bigint;
    v_error text;
BEGIN
    SET CONSTRAINTS ALL IMMEDIATE;
    BEGIN
        PERFORM outbox._remove_unlocked(v_ids);
        RETURN NULL;
    EXCEPTION WHEN OTHERS THEN
        v_error := SQLSTATE || ' ' || SQLERRM;
    END;
    FOREACH v_id IN ARRAY v_ids LOOP
        BEGIN
            PERFORM outbox._remove_unlocked(ARRAY[v_id]);
        EXCEPTION WHEN OTHERS THEN
            v_error := SQLSTATE || ' ' || SQLERRM;
        END;
    END LOOP;
    RETURN v_error;
END
$$;
COMMENT ON FUNCTION outbox._remove_processed(bigint[]) IS
    'removes processed events, as many as can be; returns SQLSTATE and message of what was in the way';

-- One step: looks at events from an id on, in the order of id, and removes up to v_most of those that are old enough.
-- Passes events that can't be removed (locked, referenced, kept by a trigger): the worker comes back to them. With v_most 0 the
-- first that is old enough is passed untried. Takes no lock that a claim could wait for, and waits for none.
--   last      the last id that was looked at; null: the end of the table was reached
--   skipped   the lowest id that was to go and is still there
--   young     when the first of the younger ones can go
--   error     SQLSTATE and message of what was in the way of one of them
CREATE FUNCTION outbox._retain(
    v_from bigint, v_most int, OUT last bigint, OUT skipped bigint, OUT young timestamptz, OUT error text)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_kept CONSTANT interval := outbox._retention();
    v_old_before CONSTANT timestamptz := clock_timestamp() - v_kept;
    v_window CONSTANT int := least(10000, greatest(100, 10 * v_most));
    v_seen record;
    v_batch bigint[];
BEGIN
    IF v_kept IS NULL THEN
        RETURN;
    END IF;
    SELECT count(*) AS n, max(w.id) AS last, array_agg(w.id ORDER BY w.id) FILTER (WHERE w.processed_at <= v_old_before) AS old,
           min(w.processed_at) FILTER (WHERE w.processed_at > v_old_before) AS young
      INTO v_seen
      FROM (SELECT e.id, CASE WHEN e.status = 'processed' THEN coalesce(e.processed_at, e.created_at) END AS processed_at
              FROM @extschema@.outbox_events e WHERE e.id >= v_from ORDER BY e.id LIMIT v_window) w;
    v_batch := v_seen.old[:greatest(v_most, 1)];
    IF v_most > 0 THEN
        error := outbox._remove_processed(v_batch);
    END IF;
    skipped := (SELECT min(e.id) FROM @extschema@.outbox_events e WHERE e.id = ANY (v_batch) AND e.status = 'processed');
    IF cardinality(v_seen.old) > cardinality(v_batch) THEN
        last := v_batch[cardinality(v_batch)];
        RETURN;
    END IF;
    last := CASE WHEN v_seen.n = v_window THEN v_seen.last END;
    -- A sum beyond the last timestamp means never.
    IF isfinite(v_seen.young) THEN
        young := v_seen.young + v_kept;
    END IF;
END
$$;
COMMENT ON FUNCTION outbox._retain(bigint, int) IS 'removes a batch of processed events that are older than the retention';
-- The texts of notifications.

-- Describes events for notifications, as bytes in the database's encoding, in the order of id. bodies: as the setting
-- outbox.notify_payload says; cuts: without the data, marked as truncated; shorts: the identities only. Doesn't fetch values
-- that can't fit in a notification: texts of more than 8,000 bytes, and data of more than 65,536 (stored JSON takes up to
-- five times the bytes of its text).
CREATE FUNCTION outbox._describe(v_ids bigint[], v_mode text, OUT bodies bytea[], OUT cuts bytea[], OUT shorts bytea[])
    LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    SELECT array_agg(convert_to(CASE WHEN v_mode = 'id' THEN s.open || '}'
                                     WHEN v_mode = 'metadata' THEN m.open || '}'
                                     WHEN f.fits THEN m.open || ',"metadata":' || e.metadata::text
                                                             || ',"event_data":' || e.event_data::text || '}' END,
                                getdatabaseencoding()) ORDER BY e.id),
           array_agg(CASE WHEN v_mode = 'full' THEN convert_to(m.open || ',"truncated":true}', getdatabaseencoding()) END
                     ORDER BY e.id),
           array_agg(convert_to(s.open || ',"truncated":true}', getdatabaseencoding()) ORDER BY e.id)
      INTO bodies, cuts, shorts
      FROM unnest(v_ids) AS i (id)
     CROSS JOIN LATERAL (SELECT x.* FROM @extschema@.outbox_events x WHERE x.id = i.id OFFSET 0) e
     CROSS JOIN LATERAL (SELECT '{"id":' || e.id || ',"event_id":"' || e.event_id || '"' AS open OFFSET 0) s
     CROSS JOIN LATERAL (SELECT CASE WHEN v_mode <> 'id'
                                      AND octet_length(e.event_type)::bigint + octet_length(e.event_version)
                                        + coalesce(octet_length(e.aggregate_type), 0)
                                        + coalesce(octet_length(e.aggregate_id), 0)
                                        + coalesce(octet_length(e.tenant_id), 0) <= 8000 THEN s.open
               || ',"event_type":' || to_json(e.event_type)::text
               || ',"event_version":' || to_json(e.event_version)::text
               || ',"aggregate_type":' || coalesce(to_json(e.aggregate_type)::text, 'null')
               || ',"aggregate_id":' || coalesce(to_json(e.aggregate_id)::text, 'null')
               || ',"tenant_id":' || coalesce(to_json(e.tenant_id)::text, 'null')
               || ',"created_at":"' || to_char(e.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') || '"' END AS open
                         OFFSET 0) m
     CROSS JOIN LATERAL (SELECT v_mode = 'full' AND m.open IS NOT NULL
                            AND outbox._raw_size(e.event_data) + outbox._raw_size(e.metadata) <= 65536 AS fits OFFSET 0) f;
END
$$;
COMMENT ON FUNCTION outbox._describe(bigint[], text) IS 'what a notification says of each event';
-- Statistics, at a price that does not depend on the number of events.

CREATE FUNCTION outbox._oldest_pending() RETURNS interval
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off
    SET enable_mergejoin = off SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
DECLARE
    v_low_water bigint := outbox._low_water(false);
BEGIN
    RETURN clock_timestamp() - least(
        (SELECT e.created_at FROM @extschema@.outbox_events e
          WHERE e.id >= v_low_water AND e.status = 'pending' AND NOT e.listed AND e.available_at IS NULL ORDER BY e.id LIMIT 1),
        (SELECT e.available_at FROM @extschema@.outbox_events e
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
        WITH holder AS (
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
        )
        SELECT 'vacuum', count(*) FILTER (WHERE h.since IS NULL OR h.since < clock_timestamp() - interval '5 minutes') = 0,
               coalesce((array_agg(h.detail ORDER BY h.since NULLS FIRST))[1], 'nobody holds it back'),
               'End the oldest transaction or drop the unused slot: vacuum can''t remove dead rows before that.'
          FROM holder h;
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
-- Read-only windows for operators and monitors. They show no secret.

CREATE VIEW outbox.destinations AS
SELECT d.name, d.kind, d.event_types, d.tenant_id, d.filter, d.exchange, d.routing_key, d.url, d.settings,
       CASE WHEN d.disabled_reason IS NOT NULL THEN 'disabled'
            WHEN d.paused THEN 'paused'
            WHEN d.circuit_failures = 0 AND d.unable_at IS NOT NULL THEN 'open'
            WHEN d.circuit_failures = 0 THEN 'active'
            WHEN d.circuit_open_until > clock_timestamp() THEN 'open'
            ELSE 'half-open' END AS state,
       d.circuit_failures, d.circuit_open_until, coalesce(d.disabled_reason, d.last_error) AS last_error, d.created_at,
       EXISTS (SELECT FROM outbox.secret s WHERE s.destination = d.name AND s.expires_at > clock_timestamp()) AS rotating
  FROM outbox.destination d;
COMMENT ON VIEW outbox.destinations IS
    'destinations with their state: active, paused, disabled, open (circuit breaker) or half-open; no secrets';

CREATE VIEW outbox.deliveries AS
SELECT d.id AS event, e.event_id, e.event_type, e.aggregate_type, e.aggregate_id, nullif(d.destination, '') AS destination,
       d.status, d.attempts, d.next_attempt_at, d.last_error, e.created_at
  FROM outbox.delivery d JOIN @extschema@.outbox_events e ON e.id = d.id
UNION ALL
SELECT e.id, e.event_id, e.event_type, e.aggregate_type, e.aggregate_id, NULL, 'scheduled', 0, e.available_at, NULL, e.created_at
  FROM @extschema@.outbox_events e
 WHERE e.available_at IS NOT NULL AND NOT e.routed AND e.status = 'pending' AND NOT e.listed;
COMMENT ON VIEW outbox.deliveries IS
    'what is outstanding or dead: event (id), destination (null: not routed yet), status, attempts, next_attempt_at, last_error';

-- What became of an event at each destination. Deliveries tell it while they are outstanding or dead. What was delivered has
-- none: then it follows from what the destinations want now, and from when they were added.
CREATE FUNCTION outbox.event(event_id uuid) RETURNS jsonb
    LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET timezone = 'UTC'
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_event record;
    v_fresh boolean;
    v_listed_at timestamptz;
    v_destinations jsonb;
BEGIN
    SELECT e.* INTO v_event FROM @extschema@.outbox_events e WHERE e.event_id = event.event_id;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    v_fresh := v_event.status = 'pending' AND NOT v_event.listed;
    -- A destination that was added later had no part in it.
    v_listed_at := CASE WHEN v_event.status = 'processed' THEN coalesce(v_event.processed_at, v_event.created_at)
                        ELSE (SELECT min(d.owed_since) FROM outbox.delivery d WHERE d.id = v_event.id) END;
    SELECT jsonb_object_agg(x.name, jsonb_build_object('status', x.status, 'attempts', x.attempts,
                                                       'next_attempt_at', x.next_attempt_at, 'last_error', x.last_error))
      INTO v_destinations
      FROM (SELECT d.destination AS name, d.status, d.attempts, d.next_attempt_at, d.last_error
              FROM outbox.delivery d WHERE d.id = v_event.id
            UNION ALL
            SELECT t.name, CASE WHEN v_fresh THEN 'pending' WHEN v_event.claim_token IS NOT NULL THEN 'processing' ELSE 'delivered' END,
                   CASE WHEN v_fresh OR v_event.claim_token IS NOT NULL THEN 0 END,
                   CASE WHEN v_fresh THEN v_event.available_at END, NULL
              FROM outbox.destination t
             WHERE t.name = ANY (
                   CASE WHEN v_event.event_type = 'outbox.test' AND v_event.listed
                        THEN ARRAY[v_event.event_data ->> 'destination']
                        ELSE ARRAY(SELECT r.destination FROM outbox._routes(ARRAY[v_event.id]) r) END)
               AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = v_event.id AND d.destination = t.name)
               AND CASE WHEN v_fresh THEN true
                        WHEN v_event.claim_token IS NOT NULL THEN t.since_token < v_event.claim_token
                        ELSE t.created_at <= v_listed_at END) x;
    RETURN (to_jsonb(v_event) - ARRAY['claim_token', 'listed', 'routed'])
        || jsonb_build_object('destinations', coalesce(v_destinations, '{}'));
END
$$;
COMMENT ON FUNCTION outbox.event(uuid) IS
    'the event and, by destination, what became of it: pending, processing, failed or delivered; null: no such event';
-- Moving in, first part: what the columns of an application's own outbox table mean, and the expressions that take a row
-- from there to outbox_events ("taken") and back ("shown"). A superuser runs this; nothing here changes anything.
--
-- The application's casts and functions must not run with more rights than the application's. So a value whose type is not
-- PostgreSQL's own is read as its text, by its output function, and turned back only by whoever reads the view.

-- What a word in a column of states stands for. null: not known.
CREATE FUNCTION outbox._status_of_word(word text) RETURNS text
    LANGUAGE sql IMMUTABLE
RETURN CASE WHEN replace(replace(lower(word), '-', '_'), ' ', '_') IN (
                     'pending', 'new', 'created', 'queued', 'ready', 'scheduled', 'waiting', 'open', 'unsent', 'unprocessed',
                     'unpublished', 'not_sent', 'not_published', 'retry', 'retrying', 'to_send', 'init', 'initial') THEN 'pending'
            WHEN replace(replace(lower(word), '-', '_'), ' ', '_') IN (
                     'processing', 'in_progress', 'inprogress', 'in_flight', 'claimed', 'locked', 'running', 'sending',
                     'publishing', 'started') THEN 'processing'
            WHEN replace(replace(lower(word), '-', '_'), ' ', '_') IN (
                     'processed', 'sent', 'published', 'done', 'completed', 'complete', 'delivered', 'dispatched', 'success',
                     'succeeded', 'finished', 'acked', 'acknowledged') THEN 'processed'
            WHEN replace(replace(lower(word), '-', '_'), ' ', '_') IN (
                     'failed', 'failure', 'error', 'errored', 'dead', 'dead_letter', 'deadletter', 'rejected', 'abandoned')
                 THEN 'failed' END;
COMMENT ON FUNCTION outbox._status_of_word(text) IS 'the status that a word of an application''s own table stands for; null: not known';

-- The names by which a column of outbox_events is known elsewhere, the most telling first; underscores and case are passed.
-- id: the table's own key, where that is not the event_id. claim_token, listed, routed: pg_outbox's own, if all are there.
CREATE FUNCTION outbox._known_names() RETURNS TABLE (ours text, names text[], types text[])
    LANGUAGE sql IMMUTABLE
AS $$
    VALUES ('event_id', ARRAY['eventid', 'messageid', 'eventuuid'], ARRAY['uuid', 'text', 'varchar', 'bpchar']),
           ('event_type', ARRAY['eventtype', 'type', 'eventname', 'messagetype', 'topic'], NULL),
           ('event_version', ARRAY['eventversion', 'schemaversion'], NULL),
           ('aggregate_type', ARRAY['aggregatetype', 'aggregate', 'entitytype'], NULL),
           ('aggregate_id', ARRAY['aggregateid', 'entityid'], NULL),
           ('tenant_id', ARRAY['tenantid', 'tenant'], NULL),
           ('event_data', ARRAY['eventdata', 'payload', 'eventpayload', 'data', 'body', 'message'],
            ARRAY['jsonb', 'json', 'text', 'varchar']),
           ('metadata', ARRAY['metadata', 'headers', 'meta'], ARRAY['jsonb', 'json']),
           ('created_at', ARRAY['createdat', 'occurredat', 'occurredon', 'createdon', 'insertedat', 'eventtime', 'timestamp',
                                'created'], ARRAY['timestamptz', 'timestamp']),
           ('available_at', ARRAY['availableat', 'scheduledat', 'scheduledfor', 'visibleat', 'notbefore', 'deliverafter',
                                  'nextattemptat', 'nextretryat', 'processafter'], ARRAY['timestamptz', 'timestamp']),
           ('status', ARRAY['status', 'state', 'eventstatus', 'processed', 'published', 'sent', 'isprocessed', 'ispublished',
                            'issent'], ARRAY['text', 'varchar', 'bpchar', 'enum', 'bool']),
           ('retry_count', ARRAY['retrycount', 'retries', 'attempts', 'attemptcount', 'attempt', 'tries', 'numretries'],
            ARRAY['int2', 'int4', 'int8']),
           ('last_error', ARRAY['lasterror', 'error', 'errormessage', 'failurereason'], ARRAY['text', 'varchar']),
           ('processed_at', ARRAY['processedat', 'publishedat', 'sentat', 'dispatchedat', 'deliveredat', 'completedat'],
            ARRAY['timestamptz', 'timestamp']),
           ('id', ARRAY['id'], NULL),
           ('claim_token', ARRAY['claimtoken'], ARRAY['int8']), ('listed', ARRAY['listed'], ARRAY['bool']),
           ('routed', ARRAY['routed'], ARRAY['bool'])
$$;
COMMENT ON FUNCTION outbox._known_names() IS 'the names and types by which the columns of outbox_events are known in other tables';

-- The columns of a table, with what each stands for. builtin: the name of the type beneath domains if it is PostgreSQL's
-- own, 'enum' for any enumeration.
CREATE TYPE outbox.adopted_column AS (
    name        name,
    "number"    int,
    type        text,
    builtin     text,
    own_type    boolean,
    is_array    boolean,
    "collation" text,
    required    boolean,
    filled      boolean,
    identity    boolean,
    generated   text,
    "default"   text,
    ours        text
);
COMMENT ON TYPE outbox.adopted_column IS 'a column of an application''s own outbox table; ours: what it stands for, null: it is kept in metadata';

CREATE FUNCTION outbox._columns_of(source regclass) RETURNS SETOF outbox.adopted_column
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT a.attname, a.attnum::int, format_type(a.atttypid, a.atttypmod),
           CASE WHEN b.typtype = 'e' THEN 'enum' WHEN b.typnamespace = 'pg_catalog'::regnamespace THEN b.typname::text END,
           t.typnamespace = 'pg_catalog'::regnamespace, t.typcategory = 'A',
           CASE WHEN a.attcollation NOT IN (0, t.typcollation) THEN format('%I.%I', n.nspname, c.collname) END,
           a.attnotnull, a.atthasdef OR a.attidentity <> '', a.attidentity <> '',
           CASE WHEN a.attgenerated <> '' THEN pg_get_expr(d.adbin, d.adrelid) END,
           CASE WHEN a.attgenerated = '' THEN pg_get_expr(d.adbin, d.adrelid) END, NULL::text
      FROM pg_attribute a
      JOIN pg_type t ON t.oid = a.atttypid
      JOIN pg_type b ON b.oid = CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.oid END
      LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
      LEFT JOIN pg_collation c ON c.oid = a.attcollation
      LEFT JOIN pg_namespace n ON n.oid = c.collnamespace
     WHERE a.attrelid = source AND a.attnum > 0 AND NOT a.attisdropped
     ORDER BY a.attnum
$$;
COMMENT ON FUNCTION outbox._columns_of(regclass) IS 'the columns of a table, before anybody said what they stand for';

CREATE FUNCTION outbox._cannot_adopt(column_name name, source regclass, why text, hint text) RETURNS void
    LANGUAGE plpgsql
AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
        MESSAGE = format('column %I of %s can''t be taken over: %s', column_name, source, why), HINT = hint;
END
$$;
COMMENT ON FUNCTION outbox._cannot_adopt(name, regclass, text, text) IS 'raises the error of a column that can''t be mapped';

CREATE FUNCTION outbox._check_mapping(source regclass, columns jsonb) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v record;
BEGIN
    IF jsonb_typeof(columns) IS DISTINCT FROM 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'columns must be a JSON object',
            HINT = 'For example ''{"event_type": "topic", "event_data": "content"}'': our name first, then the table''s.';
    END IF;
    FOR v IN SELECT m.key AS ours, m.value AS theirs, m.value #>> '{}' AS name FROM jsonb_each(columns) m LOOP
        IF NOT EXISTS (SELECT FROM outbox._known_names() k WHERE k.ours = v.ours) THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('columns: there is no column %I to map', v.ours),
                HINT = 'These can be mapped: ' || (SELECT string_agg(k.ours, ', ') FROM outbox._known_names() k) || '.';
        ELSIF jsonb_typeof(v.theirs) = 'null' THEN
            CONTINUE;
        ELSIF jsonb_typeof(v.theirs) <> 'string'
              OR NOT EXISTS (SELECT FROM outbox._columns_of(source) c WHERE c.name = v.name) THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('columns: %s has no column %s for %I', source, v.theirs, v.ours),
                HINT = 'Name a column of the table as it is written there, or null for none.';
        ELSIF (SELECT count(*) FROM jsonb_each(columns) m WHERE m.value = v.theirs) > 1 THEN
            PERFORM outbox._cannot_adopt(v.name, source, 'columns names it twice', 'Map each column once.');
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION outbox._check_mapping(regclass, jsonb) IS 'refuses a mapping that names what is not there';

-- What is named in "columns" comes first, then the known names. A known name of a type that does not fit is passed, unless
-- nothing else can hold what must be there.
CREATE FUNCTION outbox._recognise(source regclass, columns jsonb) RETURNS SETOF outbox.adopted_column
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_found outbox.adopted_column[] := ARRAY(SELECT c FROM outbox._columns_of(source) c);
    v_named text[];
    v_pick outbox.adopted_column;
    v record;
BEGIN
    PERFORM outbox._check_mapping(source, columns);
    v_named := ARRAY(SELECT m.value FROM jsonb_each_text(columns) m WHERE m.value IS NOT NULL);
    FOR v IN SELECT k.ours, k.names, k.types, columns ->> k.ours AS named, columns ? k.ours AS given FROM outbox._known_names() k LOOP
        SELECT c.* INTO v_pick
          FROM unnest(v_found) c
         WHERE c.ours IS NULL
           AND CASE WHEN v.given THEN c.name = v.named
                    WHEN c.generated IS NOT NULL OR c.builtin <> ALL (v.types) OR c.name = ANY (v_named) THEN false
                    -- A UUID or text that identifies, where there is no event_id of its own, is the event_id.
                    ELSE replace(lower(c.name), '_', '') = ANY (v.names || CASE v.ours WHEN 'event_id' THEN 'id' END) END
         ORDER BY coalesce(array_position(v.names, replace(lower(c.name), '_', '')), 1000), c.number LIMIT 1;
        CONTINUE WHEN NOT FOUND;
        IF v_pick.generated IS NOT NULL OR coalesce(v_pick.builtin, 'none') <> ALL (v.types) THEN
            PERFORM outbox._cannot_adopt(v_pick.name, source,
                format('type %s does not fit %s', v_pick.type, v.ours), 'These types do: ' || array_to_string(v.types, ', ') || '.');
        END IF;
        v_pick.ours := v.ours;
        v_found := ARRAY(SELECT c FROM unnest(v_found) c WHERE c.number <> v_pick.number) || v_pick;
    END LOOP;
    IF (SELECT count(*) FROM unnest(v_found) c WHERE c.ours IN ('claim_token', 'listed', 'routed')) < 3 THEN
        FOR i IN 1..cardinality(v_found) LOOP
            v_found[i].ours := nullif(nullif(nullif(v_found[i].ours, 'claim_token'), 'listed'), 'routed');
        END LOOP;
    END IF;
    FOR v IN SELECT k.ours, k.names, k.types FROM outbox._known_names() k
              WHERE k.ours IN ('event_type', 'event_data', 'status')
                AND NOT EXISTS (SELECT FROM unnest(v_found) c WHERE c.ours = k.ours) AND NOT columns ? k.ours LOOP
        -- It has the right name and the wrong type.
        PERFORM outbox._cannot_adopt(c.name, source, format('type %s does not fit %s', c.type, v.ours),
                    'These types do: ' || array_to_string(v.types, ', ') || '. Or name another column: adopt(…, columns => ''{"'
                    || v.ours || '": "…"}'').')
           FROM unnest(v_found) c WHERE c.ours IS NULL AND replace(lower(c.name), '_', '') = ANY (v.names);
    END LOOP;
    FOR v IN SELECT o AS ours FROM unnest(ARRAY['event_type', 'event_data']) o
              WHERE NOT EXISTS (SELECT FROM unnest(v_found) c WHERE c.ours = o) LOOP
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('%s has no column that is known to hold the %s', source, v.ours),
            HINT = format('Name it: outbox.adopt(%L, columns => ''{"%s": "…"}'').', source, v.ours);
    END LOOP;
    RETURN QUERY SELECT * FROM unnest(v_found) c ORDER BY c.number;
END
$$;
COMMENT ON FUNCTION outbox._recognise(regclass, jsonb) IS 'the columns of a table with what each stands for; an error for what can''t be mapped';

-- A value as text. r: the row.
CREATE FUNCTION outbox._as_text(c outbox.adopted_column, r text) RETURNS text
    LANGUAGE sql IMMUTABLE
RETURN CASE WHEN c.own_type THEN format('%s.%I::text', r, c.name)
            ELSE format('CASE WHEN %1$s.%2$I IS NOT NULL THEN format(''%%s'', %1$s.%2$I) END', r, c.name) END;
COMMENT ON FUNCTION outbox._as_text(outbox.adopted_column, text) IS 'expression: a column''s value as text';

-- How a value is kept in metadata: numbers, booleans, JSON and PostgreSQL's arrays as such, anything else as its text.
CREATE FUNCTION outbox._as_kept(c outbox.adopted_column, r text) RETURNS text
    LANGUAGE sql IMMUTABLE
RETURN format('CASE WHEN %s.%I IS NOT NULL THEN pg_catalog.jsonb_build_object(%L, %s) ELSE ''{}''::jsonb END', r, c.name, c.name,
              CASE WHEN c.own_type THEN format('%s.%I', r, c.name) ELSE outbox._as_text(c, r) END);
COMMENT ON FUNCTION outbox._as_kept(outbox.adopted_column, text) IS 'expression: a JSON object of a column that has no counterpart, empty if it is null';

CREATE FUNCTION outbox._kept_names(columns outbox.adopted_column[]) RETURNS text[]
    LANGUAGE sql IMMUTABLE
AS $$
    SELECT coalesce(array_agg(c.name::text ORDER BY c.number), '{}') FROM unnest(columns) c
     WHERE c.generated IS NULL AND (c.ours IS NULL OR c.ours = 'id' OR (c.ours = 'available_at' AND (c.filled OR c.required)))
$$;
COMMENT ON FUNCTION outbox._kept_names(outbox.adopted_column[]) IS 'the columns that metadata keeps';

-- An application's metadata that has one of the names already, or is no object, is kept whole beside them.
-- In PL/pgSQL, whose expressions are prepared once in a session: a view's INSERT calls it for each row.
CREATE FUNCTION outbox._joined_metadata(own jsonb, kept jsonb, names text[], empty_is_null boolean) RETURNS jsonb
    LANGUAGE plpgsql IMMUTABLE
AS $$
BEGIN
    IF own IS NULL AND empty_is_null THEN
        RETURN kept;
    ELSIF jsonb_typeof(own) = 'object' AND NOT own ?| (names || '_adopted'::text) AND NOT (own = '{}' AND empty_is_null) THEN
        RETURN own || kept;
    END IF;
    RETURN CASE jsonb_typeof(own) WHEN 'object' THEN own ELSE '{}' END || kept
        || jsonb_build_object('_adopted', jsonb_build_object('metadata', own));
END
$$;
COMMENT ON FUNCTION outbox._joined_metadata(jsonb, jsonb, text[], boolean) IS 'the application''s metadata and what is kept beside it';

-- The value of a column of outbox_events, from a row r of the application's. null: the table has nothing of the kind.
-- statuses: the words of its status column with what they stand for. zone: of timestamps without one.
CREATE FUNCTION outbox._taken(columns outbox.adopted_column[], what text, r text, statuses jsonb, zone text) RETURNS text
    LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    c outbox.adopted_column;
    v_names text[] := outbox._kept_names(columns);
    v_kept text;
    v_text text;
BEGIN
    SELECT x.* INTO c FROM unnest(columns) x WHERE x.ours = what;
    IF c.name IS NOT NULL THEN
        v_text := outbox._as_text(c, r);
    END IF;
    IF what = 'metadata' THEN
        v_kept := coalesce((SELECT string_agg(outbox._as_kept(k, r), ' || ' ORDER BY k.number)
                              FROM unnest(columns) k WHERE k.name = ANY (v_names)), '''{}''::jsonb');
        RETURN CASE WHEN c.name IS NULL THEN v_kept
                    ELSE format('outbox._joined_metadata(%s::jsonb, %s, %L, %L)', v_text, v_kept, v_names, NOT c.required) END;
    ELSIF what = 'status' THEN
        IF c.name IS NULL THEN
            RETURN (SELECT format('CASE WHEN %s.%I IS NULL THEN ''pending'' ELSE ''processed'' END', r, x.name)
                      FROM unnest(columns) x WHERE x.ours = 'processed_at');
        ELSIF c.builtin = 'bool' THEN
            RETURN format('CASE WHEN %s.%I THEN ''processed'' ELSE ''pending'' END', r, c.name);
        END IF;
        RETURN format('CASE WHEN %1$s.%2$I IS NULL THEN ''pending'' ELSE coalesce(%3$L::jsonb ->> %4$s, outbox._status_of_word(%4$s)) END',
                      r, c.name, statuses, v_text);
    ELSIF c.name IS NULL THEN
        RETURN NULL;
    ELSIF what = 'event_id' THEN
        RETURN CASE WHEN c.builtin = 'uuid' AND c.own_type THEN format('%s.%I', r, c.name) ELSE v_text || '::uuid' END;
    ELSIF what = 'event_data' THEN
        RETURN format('coalesce(%s, ''null'')', CASE WHEN c.builtin = 'jsonb' AND c.own_type THEN format('%s.%I', r, c.name)
                                                      ELSE v_text || '::jsonb' END);
    ELSIF what = 'retry_count' THEN
        RETURN format('coalesce(%s::int, 0)', v_text);
    ELSIF what IN ('created_at', 'available_at', 'processed_at') THEN
        v_text := CASE WHEN NOT c.own_type THEN format('%s::%s', v_text, c.builtin) ELSE format('%s.%I', r, c.name) END
                  || CASE WHEN c.builtin = 'timestamp' THEN format(' AT TIME ZONE %L', zone) ELSE '' END;
        IF what = 'available_at' AND c.name = ANY (v_names) THEN
            -- A column that always has a value says "at once" with a moment that has passed.
            v_text := format('CASE WHEN %1$s > pg_catalog.clock_timestamp() THEN %1$s END', v_text);
        END IF;
    END IF;
    RETURN v_text;
END
$$;
COMMENT ON FUNCTION outbox._taken(outbox.adopted_column[], text, text, jsonb, text) IS
    'expression: a value of outbox_events, from a row of the application''s table';

-- The name of the column of outbox.adopted_event that holds the table's own key.
CREATE FUNCTION outbox._key_column(c outbox.adopted_column) RETURNS text
    LANGUAGE sql IMMUTABLE
RETURN CASE WHEN NOT c.own_type THEN 'key_text' WHEN c.builtin IN ('int2', 'int4') THEN 'key_int'
            WHEN c.builtin = 'int8' THEN 'key_bigint' WHEN c.builtin = 'uuid' THEN 'key_uuid' ELSE 'key_text' END;
COMMENT ON FUNCTION outbox._key_column(outbox.adopted_column) IS 'where outbox.adopted_event holds a key of this type';

CREATE FUNCTION outbox._key_value(c outbox.adopted_column, r text) RETURNS text
    LANGUAGE sql IMMUTABLE
RETURN CASE outbox._key_column(c) WHEN 'key_text' THEN outbox._as_text(c, r) ELSE format('%s.%I', r, c.name) END;
COMMENT ON FUNCTION outbox._key_value(outbox.adopted_column, text) IS 'expression: the table''s own key as outbox.adopted_event holds it';

-- The value of a column of the application's, from rows e of outbox_events and a of outbox.adopted_event. words: for each
-- status the word of this table.
CREATE FUNCTION outbox._shown(columns outbox.adopted_column[], c outbox.adopted_column, words jsonb, zone text) RETURNS text
    LANGUAGE plpgsql IMMUTABLE
AS $$
DECLARE
    v_names text[] := outbox._kept_names(columns);
    v_text text;
BEGIN
    IF c.ours = 'id' THEN
        v_text := 'a.' || outbox._key_column(c);
    ELSIF c.ours IN ('claim_token', 'listed', 'routed') THEN
        v_text := CASE c.ours WHEN 'claim_token' THEN 'NULL' ELSE 'false' END;
    ELSIF c.ours = 'metadata' THEN
        v_text := format('CASE WHEN e.metadata ? ''_adopted'' THEN e.metadata #> ''{_adopted,metadata}'' ELSE %s END',
                         CASE WHEN c.required THEN format('e.metadata - %L::text[]', v_names)
                              ELSE format('nullif(e.metadata - %L::text[], ''{}'')', v_names) END);
    ELSIF c.ours IS NULL OR c.name = ANY (v_names) THEN
        IF c.own_type AND c.is_array THEN
            v_text := format('(SELECT r.v FROM jsonb_to_record(jsonb_build_object(''v'', e.metadata -> %L)) AS r (v %s))', c.name, c.type);
        ELSIF c.own_type AND c.builtin IN ('json', 'jsonb') THEN
            v_text := format('(e.metadata -> %L)', c.name);
        ELSE
            v_text := format('(e.metadata ->> %L)', c.name);
        END IF;
    ELSIF c.ours = 'status' AND c.builtin = 'bool' THEN
        v_text := '(e.status = ''processed'')';
    ELSIF c.ours = 'status' THEN
        v_text := format('(%L::jsonb ->> e.status)', words);
    ELSIF c.ours IN ('created_at', 'available_at', 'processed_at') AND c.builtin = 'timestamp' THEN
        v_text := format('(e.%I AT TIME ZONE %L)', c.ours, zone);
    ELSIF c.ours = 'event_data' AND NOT c.required THEN
        v_text := 'nullif(e.event_data, ''null'')';
    ELSE
        v_text := format('e.%I', c.ours);
    END IF;
    RETURN format('(%s)::%s%s', v_text, c.type, ' COLLATE ' || c."collation");
END
$$;
COMMENT ON FUNCTION outbox._shown(outbox.adopted_column[], outbox.adopted_column, jsonb, text) IS
    'expression: a value of the application''s table, from an event';

CREATE FUNCTION outbox._as_owner(statement text) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_result text;
BEGIN
    EXECUTE statement INTO v_result;
    RETURN v_result;
END
$$;
COMMENT ON FUNCTION outbox._as_owner(text) IS 'runs a query that a superuser made, as outbox_owner; returns its first value';

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
    v_used := outbox._as_owner(CASE WHEN v_indexed THEN format(
        'WITH RECURSIVE w (word) AS ((SELECT s.%1$I FROM %2$s s WHERE s.%1$I IS NOT NULL ORDER BY 1 LIMIT 1) UNION ALL '
        'SELECT (SELECT s.%1$I FROM %2$s s WHERE s.%1$I > w.word ORDER BY 1 LIMIT 1) FROM w WHERE w.word IS NOT NULL) '
        'SELECT array_agg(format(''%%s'', w.word)) FROM w WHERE w.word IS NOT NULL', c.name, source)
        ELSE format('SELECT array_agg(format(''%%s'', w.word)) FROM (SELECT DISTINCT s.%1$I AS word FROM %2$s s WHERE s.%1$I IS NOT NULL) w',
                    c.name, source) END);
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
             WHERE NOT EXISTS (SELECT FROM unnest(v_used) u WHERE outbox._status_of_word(u) = o)
               AND length(o) <= coalesce(substring(c.type FROM '\((\d+)\)')::int, length(o)));
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
-- What only the relay's role may call.

CREATE FUNCTION outbox.claimed_attempts(claim_token bigint)
    RETURNS TABLE (id bigint, destination text, attempts int)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT d.id, d.destination, d.attempts FROM outbox.delivery d
     WHERE d.claim_token = claimed_attempts.claim_token AND d.attempts > 0
$$;
COMMENT ON FUNCTION outbox.claimed_attempts(bigint) IS
    'of what a claim holds: the deliveries that were tried before, and how often they failed';

CREATE FUNCTION outbox.webhook_allow_networks() RETURNS text
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$ SELECT current_setting('outbox.webhook_allow_networks') $$;
COMMENT ON FUNCTION outbox.webhook_allow_networks() IS 'networks that webhooks may reach although they are not public';
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
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
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
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
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
        MESSAGE = format('%s in %I can''t be changed', what, relation),
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
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
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
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
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
-- Moving in, third part: outbox.adopt() takes over an application's own outbox table, and outbox.release_adopted() gives it
-- back. One transaction each, while the application runs.
--
-- What a session has parsed or prepared is parsed anew, by name, when the old table's lock is released: it finds the view.
-- Rows move as outbox_owner does it, because triggers on either table may be anybody's: see 00_schema.sql.

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
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET datestyle = 'ISO, YMD' SET intervalstyle = postgres
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
-- What an operator of the database grants. Superusers alone may call these: they run with their caller's rights.

CREATE FUNCTION outbox.grant_producer(role regrole, may_read boolean DEFAULT false) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox, @extschema@ TO %s', role);
    EXECUTE format('GRANT INSERT (event_id, event_type, event_version, aggregate_type, aggregate_id, tenant_id, event_data, '
                   'metadata, created_at, available_at), SELECT (id, event_id) ON @extschema@.outbox_events TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.publish, outbox.uuid_v7, outbox.first_time TO %s', role);
    IF may_read THEN
        EXECUTE format('GRANT SELECT ON @extschema@.outbox_events TO %s', role);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox.grant_producer(regrole, boolean) IS
    'may insert events and keep an inbox, and nothing else; may_read: read them too, as ORMs do after an insert';

CREATE FUNCTION outbox.grant_relay(role regrole) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT USAGE ON TYPE outbox.claimed_event, outbox.claimed_ref TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.attach, outbox.detach, outbox.claim, outbox.ack, outbox.fail, outbox.reject, '
                   'outbox.release, outbox.renew, outbox.settle, outbox.relay_destinations, outbox.claimed_attempts, outbox.claim_refs, outbox.claimed, '
                   'outbox.claim_for, outbox.claim_refs_for, '
                   'outbox.webhook_allow_networks, outbox.destination_back, outbox.destination_unable, outbox.stats, outbox.health, '
                   'outbox.event, outbox.first_time TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.destinations, outbox.deliveries TO %s', role);
END
$$;
COMMENT ON FUNCTION outbox.grant_relay(regrole) IS 'may claim and settle, read destinations with their secrets, deliveries and single events';

CREATE FUNCTION outbox.grant_monitor(role regrole) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.stats, outbox.health TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.destinations, outbox.deliveries TO %s', role);
END
$$;
COMMENT ON FUNCTION outbox.grant_monitor(regrole) IS 'may see statistics, health, destinations and deliveries';

CREATE FUNCTION outbox.grant_operator(role regrole) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox.grant_monitor(role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.replay, outbox.replay_failed, outbox.purge, outbox.purge_failed, outbox.add_rabbitmq, '
                   'outbox.add_webhook, outbox.alter_destination, outbox.send_test, outbox.pause, outbox.resume, outbox.remove_destination, outbox.rotate_secret, '
                   'outbox.backfill, outbox.event, outbox.repair TO %s', role);
END
$$;
COMMENT ON FUNCTION outbox.grant_operator(regrole) IS
    'may see what a monitor sees, replay and purge, and change destinations; sees no secret that it did not just make';
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
$$;
COMMENT ON FUNCTION outbox._members() IS 'the objects of the extension that have privileges';

-- Default privileges may have granted the new objects to anybody: each right is taken back from each who has it, PUBLIC
-- included. What runs with its caller's rights is then for the two owners, who call it.
CREATE FUNCTION outbox._close() RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET check_function_bodies = off
AS $$
DECLARE
    v_superusers CONSTANT text := '^outbox\.(grant_.*|_grant_apart|_close|_members|_owner_of|adopt|release_adopted)\(';
    v record;
    v_object text;
    v_grantee oid;
BEGIN
    FOR v IN SELECT m.*, outbox._owner_of(m.kind, m.definer, m.identity) AS wanted FROM outbox._members() m LOOP
        v_object := format('%s %s', CASE v.kind WHEN 'view' THEN 'table' ELSE v.kind END, v.identity);
        IF v.guardable AND v.identity NOT LIKE 'outbox.publish(%' THEN
            EXECUTE regexp_replace(pg_get_functiondef(v.object), '\n LANGUAGE plpgsql\n', E'\n LANGUAGE outbox_plpgsql\n');
        END IF;
        IF v.wanted IS NOT NULL AND NOT v.follows THEN
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

SELECT outbox._close();

-- What the owners need of each other.
GRANT USAGE ON SCHEMA outbox TO outbox_owner, outbox_keeper;
GRANT SELECT ON outbox.destination TO outbox_keeper;
GRANT EXECUTE ON FUNCTION outbox._put_destination, outbox._destinations_changed, outbox._lock_for_secrets TO outbox_keeper;
GRANT EXECUTE ON FUNCTION outbox._forget_secrets, outbox._secrets_end, outbox._sessions TO outbox_owner;
-- The launcher starts this database's worker when the installation commits.

SELECT outbox._launch();

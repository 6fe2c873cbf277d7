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
--   88 stats   89 health   90 views   92 metrics   92 relay   95 grants   98 owners   99 start

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

-- pg_outbox: the schema that holds everything but the table of events.
--
-- The files of this folder, in the order of their names, are the install script:
--   00 schema          10 tables           20 library functions   30 trigger
--   35 publish   40 destinations   50 claim   60 settle, failures
--   64 circuit         68 retention         70 worker             80 replay          85 stats, health
--   90 views           95 grants            99 start of the worker

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

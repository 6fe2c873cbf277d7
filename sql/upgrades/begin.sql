-- Nothing in the schema of the events may take the place of what PostgreSQL provides.
SET LOCAL search_path = pg_catalog, pg_temp;

DO $$
BEGIN
    IF outbox._library_version() <> '@version@' THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('pg_outbox can''t be updated to @version@: the server runs the library of version %s',
                             outbox._library_version()),
            HINT = 'Restart PostgreSQL, so that it loads the library that is installed now, and try again.';
    END IF;
END
$$;

-- No claim and no settlement is under way while the functions change. Whoever waits for a lock that a transaction of the
-- application holds gives up soon, and nothing has changed.
SELECT outbox._lock();

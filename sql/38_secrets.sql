-- Secrets: which parts of a destination are hidden, and what others than outbox_keeper may do about secrets without
-- seeing one.

CREATE FUNCTION outbox._shown_settings(settings jsonb) RETURNS jsonb
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE WHEN jsonb_typeof(settings -> 'headers') = 'object'
            THEN jsonb_set(settings, '{headers}', (SELECT coalesce(jsonb_object_agg(k, '…'), '{}')
                                                     FROM jsonb_object_keys(settings -> 'headers') AS k))
            ELSE settings END;
COMMENT ON FUNCTION outbox._shown_settings(jsonb) IS 'the settings, with names alone of what is hidden';

CREATE FUNCTION outbox._shown_url(url text) RETURNS text
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN regexp_replace(url, '\?.*$', '?…');
COMMENT ON FUNCTION outbox._shown_url(text) IS 'the URL without its query, which may hold a token';

CREATE FUNCTION outbox._forget_secrets(before timestamptz) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Who has one locked changes it, and sets a timer for what it becomes.
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

-- outbox_keeper has no right to what claims lock.
CREATE FUNCTION outbox._lock_for_secrets() RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox._lock();
END
$$;
COMMENT ON FUNCTION outbox._lock_for_secrets() IS 'changes of secrets run one at a time, until commit';

-- Not current_user, which is the owner of the function that asks.
CREATE FUNCTION outbox._caller_reads_secrets() RETURNS boolean
    LANGUAGE sql STABLE
RETURN has_function_privilege(coalesce(nullif(current_setting('role'), 'none'), session_user)::name,
                              'outbox.relay_destinations()', 'EXECUTE');
COMMENT ON FUNCTION outbox._caller_reads_secrets() IS 'whether the session''s role may see secrets that others made';

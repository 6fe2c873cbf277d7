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

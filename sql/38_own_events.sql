-- Own events: what pg_outbox itself says of destinations and dead letters. Their types begin with outbox. and they are
-- inserted by the transaction that changes the state, like any other event, if some destination names their type.
--
-- Nothing is said of deliveries of own events, or two receivers that fail could keep each other busy for ever.

-- cause: the event whose delivery changed the state. An insert that fails is a warning: the caller settles what others wait
-- for. Returns whether the event was inserted.
CREATE FUNCTION outbox._tell(v_type text, v_destination text, v_tenant_id text, v_cause bigint, v_data jsonb) RETURNS boolean
    LANGUAGE plpgsql SET enable_seqscan = off
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
    LANGUAGE plpgsql
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

-- The triggers of outbox_events. The row triggers leave notes in the backend's memory and touch no table; they neither
-- fail nor wait. NOTIFY is never called here: the worker does that after the commit.

CREATE FUNCTION @extschema@.notify_outbox_event() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'notify_outbox_event';
COMMENT ON FUNCTION @extschema@.notify_outbox_event() IS 'notes a new event, for the worker to announce after the commit';

CREATE TRIGGER after_outbox_insert AFTER INSERT ON @extschema@.outbox_events
    FOR EACH ROW EXECUTE FUNCTION @extschema@.notify_outbox_event();

-- From the setting outbox.traceparent, else from the comment of the statement. It changes the metadata of the row alone, and
-- only if there is a context that is valid.
CREATE FUNCTION outbox._take_trace_context() RETURNS trigger LANGUAGE c AS 'MODULE_PATHNAME', 'take_trace_context';
COMMENT ON FUNCTION outbox._take_trace_context() IS 'adds the statement''s trace context to the metadata of an event that has none';

CREATE TRIGGER before_outbox_insert BEFORE INSERT ON @extschema@.outbox_events
    FOR EACH ROW EXECUTE FUNCTION outbox._take_trace_context();

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

-- The condition is short: PostgreSQL reads it anew in each statement, those of claims too.
CREATE TRIGGER guard_outbox_edit
    AFTER UPDATE OF id, event_id, event_type, aggregate_type, aggregate_id, tenant_id, available_at, status, claim_token,
                    listed, routed ON @extschema@.outbox_events
    FOR EACH ROW WHEN (current_user <> 'outbox_owner') EXECUTE FUNCTION outbox._guard_edit();

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

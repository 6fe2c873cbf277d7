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

-- In place of a foreign key, whose check would cost each parked delivery a row lock on its event. A DELETE waits for no
-- claim, and none waits for it: what follows from it is done after its commit, see outbox._catch_up().
CREATE FUNCTION outbox._note_gone() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO outbox.touched (id, aggregate_key, claim_token)
    SELECT g.id, outbox._aggregate_key(g.aggregate_type, g.aggregate_id), g.claim_token
      FROM gone g
     WHERE g.status <> 'processed' AND (g.expanded OR g.claim_token IS NOT NULL OR g.available_at IS NOT NULL);
    IF FOUND THEN
        PERFORM outbox._timer(clock_timestamp());
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._note_gone() IS 'notes deleted events whose deliveries and lines are to be looked after';

CREATE TRIGGER after_outbox_delete AFTER DELETE ON @extschema@.outbox_events
    REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION outbox._note_gone();

-- Not left for later: ids may begin anew. Whoever has locked a delivery holds a lock on the table of events, so there is
-- nobody to wait for.
CREATE FUNCTION outbox._forget_deliveries() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    DELETE FROM outbox.delivery;
    DELETE FROM outbox.claims;
    DELETE FROM outbox.touched;
    DELETE FROM outbox.postponed;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._forget_deliveries() IS 'all deliveries go with all events';

CREATE TRIGGER after_outbox_truncate_deliveries AFTER TRUNCATE ON @extschema@.outbox_events
    FOR EACH STATEMENT EXECUTE FUNCTION outbox._forget_deliveries();

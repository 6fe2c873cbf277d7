-- The triggers of outbox_events. The row triggers leave notes in the backend's memory and touch no table; they neither
-- fail nor wait. NOTIFY is never called here: the worker does that after the commit.

CREATE FUNCTION @extschema@.notify_outbox_event() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'notify_outbox_event';
COMMENT ON FUNCTION @extschema@.notify_outbox_event() IS 'notes a new event, for the worker to announce after the commit';

CREATE TRIGGER after_outbox_insert AFTER INSERT ON @extschema@.outbox_events
    FOR EACH ROW EXECUTE FUNCTION @extschema@.notify_outbox_event();

CREATE FUNCTION outbox._track_change() RETURNS trigger LANGUAGE c AS 'MODULE_PATHNAME', 'track_outbox_change';
COMMENT ON FUNCTION outbox._track_change() IS 'keeps the counters and the low-water mark right, whoever changes a row';

CREATE TRIGGER after_outbox_change AFTER UPDATE OF status OR DELETE ON @extschema@.outbox_events
    FOR EACH ROW EXECUTE FUNCTION outbox._track_change();

CREATE TRIGGER after_outbox_truncate AFTER TRUNCATE ON @extschema@.outbox_events
    FOR EACH STATEMENT EXECUTE FUNCTION outbox._track_change();

-- In place of a foreign key, whose check would cost each parked delivery a row lock on its event.
CREATE FUNCTION outbox._forget_deliveries() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_gone record;
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        DELETE FROM outbox.delivery;
        RETURN NULL;
    END IF;
    WITH left_behind AS (
        DELETE FROM outbox.delivery d USING gone g WHERE d.id = g.id AND g.expanded
        RETURNING d.destination, d.aggregate_key, d.claim_token
    )
    SELECT array_agg(l.destination) AS destinations, array_agg(l.aggregate_key) AS keys,
           array_agg(l.claim_token) FILTER (WHERE l.claim_token IS NOT NULL) AS tokens
      INTO v_gone FROM left_behind l;
    IF v_gone.destinations IS NOT NULL THEN
        PERFORM outbox._let_go(v_gone.tokens);
        PERFORM outbox._promote(v_gone.destinations, v_gone.keys);
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION outbox._forget_deliveries() IS 'deliveries go with their event, and the lines that they stood in move on';

CREATE TRIGGER after_outbox_delete AFTER DELETE ON @extschema@.outbox_events
    REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION outbox._forget_deliveries();

CREATE TRIGGER after_outbox_truncate_deliveries AFTER TRUNCATE ON @extschema@.outbox_events
    FOR EACH STATEMENT EXECUTE FUNCTION outbox._forget_deliveries();

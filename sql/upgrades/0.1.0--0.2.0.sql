-- From 0.1.0 to 0.2.0.

-- New triggers need a lock on the table of the events. Whoever writes events must not wait behind an upgrade that waits.
SET LOCAL lock_timeout = '3s';

-- Deliveries are counted for the metrics.
CREATE TABLE outbox.tally (
    destination text PRIMARY KEY,
    waiting     bigint NOT NULL,
    dead        bigint NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- It also returns what is a dead letter now.
DROP FUNCTION outbox.settle(bigint[], bigint[], jsonb);

-- The same rules of the table, in a form that costs an INSERT half as much.
CREATE DOMAIN outbox.event_status AS text
    CONSTRAINT status_known CHECK (VALUE IN ('pending', 'processing', 'processed', 'failed'));
ALTER TABLE @extschema@.outbox_events
    DROP CONSTRAINT outbox_events_status_known,
    DROP CONSTRAINT outbox_events_token_only_while_processing,
    DROP CONSTRAINT outbox_events_processing_is_claimed,
    ADD CONSTRAINT outbox_events_status_known CHECK (status::outbox.event_status IS NOT NULL),
    ADD CONSTRAINT outbox_events_token_while_processing CHECK (
        CASE WHEN status = 'processing' THEN claim_token IS NOT NULL OR listed ELSE claim_token IS NULL END);
DROP TRIGGER guard_outbox_edit ON @extschema@.outbox_events;

-- A claim passes on whom it may serve.
DROP FUNCTION outbox._eligible(outbox.claim_scope, text, text);
CREATE TYPE outbox.eligible AS (
    name      text,
    filter    jsonpath,
    serve     boolean,
    elsewhere boolean,
    blocks    boolean
);
CREATE TYPE outbox.kind_wanted AS (
    ids    bigint[],
    keys   bigint[],
    wanted outbox.eligible[]
);

\layers

-- From PostgreSQL 17 on 0.1.0 took the privileges on row types of tables and views, and pg_dump warned of each.
DO $$
DECLARE
    v record;
BEGIN
    FOR v IN SELECT t.oid, t.oid::regtype AS name
               FROM pg_depend d JOIN pg_extension x ON x.oid = d.refobjid AND x.extname = 'pg_outbox'
               JOIN pg_type t ON d.classid = 'pg_type'::regclass AND t.oid = d.objid
               JOIN pg_class r ON r.oid = t.typrelid AND r.relkind <> 'c'
              WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e' LOOP
        EXECUTE format('GRANT USAGE ON TYPE %s TO PUBLIC', v.name);
        DELETE FROM pg_init_privs i WHERE i.classoid = 'pg_type'::regclass AND i.objoid = v.oid;
    END LOOP;
END
$$;

CREATE TRIGGER tally_insert AFTER INSERT ON outbox.delivery
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT WHEN (current_user = 'outbox_owner')
    EXECUTE FUNCTION outbox._tally_insert();
CREATE TRIGGER tally_update AFTER UPDATE ON outbox.delivery
    REFERENCING OLD TABLE AS before NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION outbox._tally_update();
CREATE TRIGGER tally_delete AFTER DELETE ON outbox.delivery
    REFERENCING OLD TABLE AS before FOR EACH STATEMENT EXECUTE FUNCTION outbox._tally_delete();
SELECT outbox._recount_deliveries();

CREATE TRIGGER before_outbox_insert BEFORE INSERT ON @extschema@.outbox_events
    FOR EACH ROW EXECUTE FUNCTION outbox._take_trace_context();

CREATE TRIGGER guard_outbox_edit
    AFTER UPDATE OF id, event_id, event_type, aggregate_type, aggregate_id, tenant_id, available_at, status, claim_token,
                    listed, routed ON @extschema@.outbox_events
    FOR EACH ROW WHEN (current_user <> 'outbox_owner') EXECUTE FUNCTION outbox._guard_edit();

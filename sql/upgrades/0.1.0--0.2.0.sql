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

-- Nothing is for PUBLIC; an operator grants what a role needs.

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA outbox FROM PUBLIC;
REVOKE ALL ON FUNCTION @extschema@.notify_outbox_event() FROM PUBLIC;
REVOKE ALL ON SCHEMA outbox FROM PUBLIC;

CREATE FUNCTION outbox.grant_producer(role regrole) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox, @extschema@ TO %s', role);
    EXECUTE format('GRANT INSERT (event_id, event_type, event_version, aggregate_type, aggregate_id, tenant_id, event_data, '
                   'metadata, created_at, available_at), SELECT (id, event_id) ON @extschema@.outbox_events TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.publish, outbox.uuid_v7 TO %s', role);
END
$$;
COMMENT ON FUNCTION outbox.grant_producer(regrole) IS 'may insert events, and nothing else';

CREATE FUNCTION outbox.grant_relay(role regrole) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.attach, outbox.claim, outbox.ack, outbox.fail, outbox.reject, '
                   'outbox.release, outbox.renew, outbox.settle, outbox.relay_destinations, outbox.claimed_attempts, outbox.claim_refs, outbox.claimed, '
                   'outbox.webhook_allow_networks, outbox.stats, outbox.health TO %s', role);
END
$$;
COMMENT ON FUNCTION outbox.grant_relay(regrole) IS 'may claim and settle, and read destinations with their secrets';

CREATE FUNCTION outbox.grant_monitor(role regrole) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.stats, outbox.health TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.destinations, outbox.deliveries TO %s', role);
END
$$;
COMMENT ON FUNCTION outbox.grant_monitor(regrole) IS 'may see statistics, health, destinations and deliveries';

REVOKE ALL ON FUNCTION outbox.grant_producer(regrole), outbox.grant_relay(regrole), outbox.grant_monitor(regrole) FROM PUBLIC;

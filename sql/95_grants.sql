-- What an operator of the database grants. Superusers alone may call these: they run with their caller's rights.

CREATE FUNCTION outbox.grant_producer(role regrole, may_read boolean DEFAULT false) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox, @extschema@ TO %s', role);
    EXECUTE format('GRANT INSERT (event_id, event_type, event_version, aggregate_type, aggregate_id, tenant_id, event_data, '
                   'metadata, created_at, available_at), SELECT (id, event_id) ON @extschema@.outbox_events TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.publish, outbox.uuid_v7, outbox.first_time TO %s', role);
    IF may_read THEN
        EXECUTE format('GRANT SELECT ON @extschema@.outbox_events TO %s', role);
    END IF;
END
$$;
COMMENT ON FUNCTION outbox.grant_producer(regrole, boolean) IS
    'may insert events and keep an inbox, and nothing else; may_read: read them too, as ORMs do after an insert';

CREATE FUNCTION outbox.grant_relay(role regrole) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT USAGE ON TYPE outbox.claimed_event, outbox.claimed_ref TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.attach, outbox.detach, outbox.claim, outbox.ack, outbox.fail, outbox.reject, '
                   'outbox.release, outbox.renew, outbox.settle, outbox.relay_destinations, outbox.claimed_attempts, outbox.claim_refs, outbox.claimed, '
                   'outbox.claim_for, outbox.claim_refs_for, '
                   'outbox.webhook_allow_networks, outbox.destination_back, outbox.destination_unable, outbox.stats, outbox.health, outbox.metrics, '
                   'outbox.event, outbox.first_time TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.destinations, outbox.deliveries TO %s', role);
END
$$;
COMMENT ON FUNCTION outbox.grant_relay(regrole) IS 'may claim and settle, read destinations with their secrets, deliveries and single events';

CREATE FUNCTION outbox.grant_monitor(role regrole) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA outbox TO %s', role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.stats, outbox.health, outbox.metrics TO %s', role);
    EXECUTE format('GRANT SELECT ON outbox.destinations, outbox.deliveries TO %s', role);
END
$$;
COMMENT ON FUNCTION outbox.grant_monitor(regrole) IS 'may see statistics, health, destinations and deliveries';

CREATE FUNCTION outbox.grant_operator(role regrole) RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM outbox.grant_monitor(role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION outbox.replay, outbox.replay_failed, outbox.purge, outbox.purge_failed, outbox.add_rabbitmq, '
                   'outbox.add_webhook, outbox.alter_destination, outbox.send_test, outbox.pause, outbox.resume, outbox.remove_destination, outbox.rotate_secret, '
                   'outbox.backfill, outbox.event, outbox.repair TO %s', role);
END
$$;
COMMENT ON FUNCTION outbox.grant_operator(regrole) IS
    'may see what a monitor sees, replay and purge, and change destinations; sees no secret that it did not just make';

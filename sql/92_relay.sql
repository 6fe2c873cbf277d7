-- What only the relay's role may call.

CREATE FUNCTION outbox.relay_destinations()
    RETURNS TABLE (name text, kind text, exchange text, routing_key text, url text, settings jsonb, secrets text[],
                   max_attempts int)
    LANGUAGE sql STABLE SECURITY DEFINER ROWS 10 SET search_path = pg_catalog, pg_temp
AS $$
    SELECT d.name, d.kind, d.exchange, d.routing_key, d.url,
           d.settings || (SELECT coalesce(jsonb_object_agg(k, extract(epoch FROM outbox._duration(d.settings, k, NULL))), '{}')
                            FROM unnest(ARRAY['timeout', 'connect_timeout']) AS k WHERE d.settings ? k),
           ARRAY(SELECT s.secret FROM outbox.secret s
                  WHERE s.destination = d.name AND coalesce(s.expires_at, 'infinity') > clock_timestamp()
                  ORDER BY s.expires_at DESC NULLS FIRST),
           outbox._max_attempts(d.settings)
      FROM outbox.destination d WHERE d.disabled_reason IS NULL
     ORDER BY d.name
$$;
COMMENT ON FUNCTION outbox.relay_destinations() IS
    'destinations with their secrets, the current one first, and their timeouts in seconds; for the relay''s role alone';

CREATE FUNCTION outbox.claimed_attempts(claim_token bigint)
    RETURNS TABLE (id bigint, destination text, attempts int)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT d.id, d.destination, d.attempts FROM outbox.delivery d
     WHERE d.claim_token = claimed_attempts.claim_token AND d.attempts > 0
$$;
COMMENT ON FUNCTION outbox.claimed_attempts(bigint) IS
    'of what a claim holds: the deliveries that were tried before, and how often they failed';

CREATE FUNCTION outbox.webhook_allow_networks() RETURNS text
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$ SELECT current_setting('outbox.webhook_allow_networks') $$;
COMMENT ON FUNCTION outbox.webhook_allow_networks() IS 'networks that webhooks may reach although they are not public';

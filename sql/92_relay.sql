-- What only the relay's role may call.

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

-- Backfill: a destination is owed the events that it would have had.

-- The events that a destination wants and is not going to get by itself: fresh and scheduled ones go to it anyway, and so does
-- what a claim holds for it. What it was delivered is not recorded, so those events are among them.
CREATE FUNCTION outbox._missed(
    v_destination text, v_event_types text, v_since timestamptz, v_until timestamptz, v_max_events int) RETURNS bigint[]
    LANGUAGE plpgsql STABLE
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_like CONSTANT text := outbox._like_pattern(coalesce(v_event_types, '*'));
    v_since_token CONSTANT bigint := (SELECT d.since_token FROM outbox.destination d WHERE d.name = v_destination);
BEGIN
    RETURN ARRAY(
        SELECT e.id FROM @extschema@.outbox_events e
         WHERE (e.status IN ('processed', 'failed') OR e.listed OR e.claim_token < v_since_token)
           AND (e.claim_token IS NULL OR e.claim_token < v_since_token)
           AND e.event_type LIKE v_like
           AND (v_since IS NULL OR e.created_at >= v_since) AND (v_until IS NULL OR e.created_at < v_until)
           AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id AND d.destination = v_destination)
           AND outbox._wants(v_destination, e.id, e.event_type, e.tenant_id)
         ORDER BY e.id LIMIT v_max_events);
END
$$;
COMMENT ON FUNCTION outbox._missed(text, text, timestamptz, timestamptz, int) IS
    'the events, oldest first, that a destination wants and is not going to get by itself';

-- Owes these events to the destination, unless they changed meanwhile. For the holder of the claim lock. Returns how many
-- it owed.
CREATE FUNCTION outbox._owe(v_destination text, v_ids bigint[]) RETURNS bigint
    LANGUAGE plpgsql
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_blocks CONSTANT boolean := (SELECT d.blocks FROM outbox.destination d WHERE d.name = v_destination);
    v_now CONSTANT timestamptz := clock_timestamp();
    v_owed bigint;
BEGIN
    WITH free AS MATERIALIZED (
        SELECT e.id FROM @extschema@.outbox_events e
         WHERE e.id = ANY (v_ids) AND e.claim_token IS NULL AND (e.listed OR e.status = 'processed')
           AND NOT EXISTS (SELECT FROM outbox.delivery d WHERE d.id = e.id AND d.destination = v_destination)
           FOR NO KEY UPDATE OF e SKIP LOCKED
    ), owed AS (
        UPDATE @extschema@.outbox_events e
           SET listed = true, routed = e.available_at IS NOT NULL,
               status = CASE WHEN e.status IN ('processed', 'failed') THEN 'pending' ELSE e.status END,
               processed_at = CASE WHEN e.status = 'processed' THEN NULL ELSE e.processed_at END
         WHERE e.id = ANY (ARRAY(SELECT f.id FROM free f))
        RETURNING e.id, outbox._ordering_key(e.aggregate_type, e.aggregate_id) AS key
    ), listed AS (
        INSERT INTO outbox.delivery (id, destination, ordering_key, status, next_attempt_at)
        SELECT o.id, v_destination, o.key, 'pending',
               CASE WHEN o.key IS NULL THEN v_now
                    WHEN o.nth = 1 AND NOT EXISTS (SELECT FROM outbox._ahead(v_destination, o.key, o.id, v_blocks)) THEN v_now END
          FROM (SELECT x.id, x.key, row_number() OVER (PARTITION BY x.key ORDER BY x.id) AS nth FROM owed x) o
        RETURNING 1
    )
    SELECT count(*) INTO v_owed FROM listed;
    RETURN v_owed;
END
$$;
COMMENT ON FUNCTION outbox._owe(text, bigint[]) IS 'owes settled events, and listed ones, to one more destination';

-- Looks for the events before it takes the claim lock, and holds the lock while it owes them.
CREATE FUNCTION outbox.backfill(
    destination text, event_types text DEFAULT '*', since timestamptz DEFAULT NULL, until timestamptz DEFAULT NULL,
    max_events int DEFAULT NULL, dry_run boolean DEFAULT false) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = 0
AS $$
#variable_conflict use_column
DECLARE
    v_batch CONSTANT int := 5000;
    v_ids bigint[];
    v_owed bigint := 0;
BEGIN
    PERFORM outbox._check_selection(backfill.event_types, NULL, NULL, backfill.max_events);
    PERFORM outbox._require_destination(backfill.destination);
    v_ids := outbox._missed(backfill.destination, backfill.event_types, backfill.since, backfill.until, backfill.max_events);
    IF dry_run IS DISTINCT FROM false OR v_ids = '{}' THEN
        RETURN cardinality(v_ids);
    END IF;
    PERFORM outbox._lock();
    PERFORM outbox._require_destination(backfill.destination);
    -- What is claimed whole can be owed to one more destination when it is listed.
    PERFORM outbox._list_in_flight();
    FOR v_first IN 1..cardinality(v_ids) BY v_batch LOOP
        v_owed := v_owed + outbox._owe(backfill.destination, v_ids[v_first:v_first + v_batch - 1]);
    END LOOP;
    IF v_owed < cardinality(v_ids) THEN
        RAISE WARNING USING MESSAGE = format('%s of these events are locked by other transactions, or changed meanwhile, and were left out',
                                             cardinality(v_ids) - v_owed),
            HINT = 'Backfill again for them: what is owed already is not owed twice.';
    END IF;
    PERFORM outbox._wake('due');
    RETURN v_owed;
END
$$;
COMMENT ON FUNCTION outbox.backfill(text, text, timestamptz, timestamptz, int, boolean) IS
    'owes a destination the events that it would have had, as long as they are kept, oldest first; returns their number; dry_run: the number alone';

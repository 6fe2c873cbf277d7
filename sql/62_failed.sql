-- Settling what was not delivered: a retry, a dead letter, or another try when the destination is back.

-- Whose fault is it?
--   failed       the event's, perhaps: uses an attempt
--   rejected     the event's: a dead letter
--   unavailable  the destination's, as far as one consumer sees: its circuit opens, unless another has just delivered there
--   throttled    the destination's, as it says itself: its circuit opens
--   unable       the consumer's: the event is given back, for others
CREATE FUNCTION outbox._failed(
    v_token bigint, v_id bigint, v_destination text, v_outcome text, v_error text, v_retry_in interval) RETURNS boolean
    LANGUAGE plpgsql SET enable_seqscan = off
    SET jit = off SET max_parallel_workers_per_gather = 0
AS $$
#variable_conflict use_column
DECLARE
    v_row record;
    v_what text;
    v_attempts int;
    v_dead boolean;
    v_next timestamptz;
    v_any boolean := false;
BEGIN
    FOR v_row IN
        SELECT d.destination, d.ordering_key, d.attempts, d.owed_since, coalesce(t.settings, '{}') AS settings, t.kind
          FROM outbox.delivery d LEFT JOIN outbox.destination t ON t.name = d.destination
         WHERE d.id = v_id AND d.claim_token IS NOT DISTINCT FROM v_token AND v_token IS NOT NULL AND (v_destination IS NULL OR d.destination = v_destination)
    LOOP
        v_any := true;
        v_what := CASE WHEN v_outcome = 'unavailable' AND outbox._answers_others(v_row.destination) THEN 'unable'
                       ELSE v_outcome END;
        v_attempts := v_row.attempts + (v_what IN ('failed', 'rejected'))::int;
        v_dead := v_what = 'rejected'
                  OR (v_what = 'failed' AND v_attempts >= outbox._max_attempts(v_row.settings))
                  OR (v_what <> 'unable' AND outbox._is_given_up(v_row.kind, v_row.settings, v_row.owed_since));
        v_next := CASE WHEN v_dead THEN NULL
                       WHEN v_what <> 'failed' THEN clock_timestamp()
                       ELSE clock_timestamp() + least(interval '366 days',
                                coalesce(v_retry_in, outbox._retry_in(v_row.kind, v_row.settings, v_attempts))) END;
        UPDATE outbox.delivery d
           SET status = CASE WHEN v_dead THEN 'failed' ELSE 'pending' END, attempts = v_attempts,
               next_attempt_at = v_next, last_error = v_error, claim_token = NULL
         WHERE d.id = v_id AND d.destination = v_row.destination;
        UPDATE @extschema@.outbox_events e
           SET last_error = v_error, retry_count = greatest(e.retry_count, v_attempts) WHERE e.id = v_id;
        IF v_row.ordering_key IS NOT NULL
           AND (NOT v_dead OR v_row.settings ->> 'on_failure' = 'block') THEN
            PERFORM outbox._take_back(v_token, v_row.destination, v_row.ordering_key, v_id);
        END IF;
        PERFORM outbox._left_claim(ARRAY[v_id], ARRAY[v_row.destination], ARRAY[v_row.ordering_key], ARRAY[v_token]);
        PERFORM outbox._wake_at(v_next);
        PERFORM outbox._blame(v_row.destination, v_row.kind, v_row.settings, v_what, v_error, v_retry_in, v_id);
        IF v_dead THEN
            PERFORM outbox._tell('outbox.event.dead', v_row.destination, e.tenant_id, v_id,
                                 jsonb_build_object('reason', v_error, 'attempts', v_attempts, 'id', e.id, 'event_id', e.event_id,
                                                    'event_type', e.event_type, 'aggregate_type', e.aggregate_type,
                                                    'aggregate_id', e.aggregate_id))
               FROM @extschema@.outbox_events e WHERE e.id = v_id;
        END IF;
    END LOOP;
    RETURN v_any;
END
$$;
COMMENT ON FUNCTION outbox._failed(bigint, bigint, text, text, text, interval) IS
    'settles an event that did not get through to one destination, or to all that the token holds';

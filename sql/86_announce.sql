-- The texts of notifications.

-- Describes events for notifications, as bytes in the database's encoding, in the order of id. bodies: as the setting
-- outbox.notify_payload says; cuts: without the data, marked as truncated; shorts: the identities only. Doesn't fetch values
-- that can't fit in a notification: texts of more than 8,000 bytes, and data of more than 65,536 (stored JSON takes up to
-- five times the bytes of its text).
CREATE FUNCTION outbox._describe(v_ids bigint[], v_mode text, OUT bodies bytea[], OUT cuts bytea[], OUT shorts bytea[])
    LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    SELECT array_agg(convert_to(CASE WHEN v_mode = 'id' THEN s.open || '}'
                                     WHEN v_mode = 'metadata' THEN m.open || '}'
                                     WHEN f.fits THEN m.open || ',"metadata":' || e.metadata::text
                                                             || ',"event_data":' || e.event_data::text || '}' END,
                                getdatabaseencoding()) ORDER BY e.id),
           array_agg(CASE WHEN v_mode = 'full' THEN convert_to(m.open || ',"truncated":true}', getdatabaseencoding()) END
                     ORDER BY e.id),
           array_agg(convert_to(s.open || ',"truncated":true}', getdatabaseencoding()) ORDER BY e.id)
      INTO bodies, cuts, shorts
      FROM unnest(v_ids) AS i (id)
     CROSS JOIN LATERAL (SELECT x.* FROM @extschema@.outbox_events x WHERE x.id = i.id OFFSET 0) e
     CROSS JOIN LATERAL (SELECT '{"id":' || e.id || ',"event_id":"' || e.event_id || '"' AS open OFFSET 0) s
     CROSS JOIN LATERAL (SELECT CASE WHEN v_mode <> 'id'
                                      AND octet_length(e.event_type)::bigint + octet_length(e.event_version)
                                        + coalesce(octet_length(e.aggregate_type), 0)
                                        + coalesce(octet_length(e.aggregate_id), 0)
                                        + coalesce(octet_length(e.tenant_id), 0) <= 8000 THEN s.open
               || ',"event_type":' || to_json(e.event_type)::text
               || ',"event_version":' || to_json(e.event_version)::text
               || ',"aggregate_type":' || coalesce(to_json(e.aggregate_type)::text, 'null')
               || ',"aggregate_id":' || coalesce(to_json(e.aggregate_id)::text, 'null')
               || ',"tenant_id":' || coalesce(to_json(e.tenant_id)::text, 'null')
               || ',"created_at":"' || to_char(e.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') || '"' END AS open
                         OFFSET 0) m
     CROSS JOIN LATERAL (SELECT v_mode = 'full' AND m.open IS NOT NULL
                            AND outbox._raw_size(e.event_data) + outbox._raw_size(e.metadata) <= 65536 AS fits OFFSET 0) f;
END
$$;
COMMENT ON FUNCTION outbox._describe(bigint[], text) IS 'what a notification says of each event';

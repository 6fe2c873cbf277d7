//! Moving in: an application's own outbox table is taken over, and given back, while the application writes; nothing is
//! lost, nothing is sent twice, and what the application and its operators run goes on unchanged.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use outbox_tests::cluster::Cluster;
use outbox_tests::orm;
use outbox_tests::process::run;
use outbox_tests::receiver::Receiver;
use outbox_tests::relay::Relay;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use tokio_postgres::SimpleQueryMessage;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

/// The usual home-made table, with a trigger that notifies, a view on it and rows in each state.
const HOME_MADE: &str = r#"
CREATE TABLE public.outbox_events (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    event_id uuid NOT NULL UNIQUE DEFAULT gen_random_uuid(),
    aggregate_id uuid NOT NULL,
    aggregate_type varchar(50) NOT NULL,
    event_type varchar(100) NOT NULL,
    event_data jsonb NOT NULL,
    status varchar(20) NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'processing', 'processed', 'failed')),
    retry_count int NOT NULL DEFAULT 0,
    last_error text,
    user_id uuid,
    tags text[],
    amount numeric(10,2) CONSTRAINT amount_is_positive CHECK (amount > 0),
    metadata jsonb DEFAULT '{}',
    created_at timestamp NOT NULL DEFAULT now(),
    processed_at timestamp,
    seq bigserial,
    length int GENERATED ALWAYS AS (length(event_type)) STORED
);
COMMENT ON TABLE public.outbox_events IS 'ours';
CREATE INDEX ON public.outbox_events (status);
CREATE FUNCTION notify_outbox_event() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_notify('outbox_events', NEW.id::text); RETURN NEW; END $$;
CREATE TRIGGER after_outbox_insert AFTER INSERT ON public.outbox_events
    FOR EACH ROW EXECUTE FUNCTION notify_outbox_event();
CREATE TRIGGER switched_off AFTER INSERT ON public.outbox_events
    FOR EACH ROW EXECUTE FUNCTION notify_outbox_event();
ALTER TABLE public.outbox_events DISABLE TRIGGER switched_off;
CREATE VIEW public.stuck AS SELECT id, event_type FROM public.outbox_events WHERE status = 'pending';
INSERT INTO public.outbox_events (aggregate_id, aggregate_type, event_type, event_data, status, last_error, user_id, tags,
                                  amount, metadata, created_at, processed_at)
SELECT gen_random_uuid(), 'contact', 'contact.n' || n, jsonb_build_object('n', n),
       (ARRAY['processed', 'pending', 'processing', 'failed'])[1 + n % 4], CASE n % 4 WHEN 3 THEN 'no route' END,
       gen_random_uuid(), ARRAY['a', 'b,"c'], 1.50, (ARRAY['{}', '{"user_id": "mine"}', NULL, '[1]'])[1 + n % 4]::jsonb,
       now() - (100 - n) * interval '1 min', CASE n % 4 WHEN 0 THEN now() END
  FROM generate_series(1, 20) AS n;
CREATE TABLE public.snapshot AS TABLE public.outbox_events;
"#;

/// A database with these tables and the extension in a schema of its own.
async fn moved_in(tables: &str) -> Result<(&'static Cluster, String, Session)> {
    let cluster = Cluster::shared().await?;
    let database = cluster.empty_database().await?;
    let session = cluster.connect(&database).await?;
    session.batch_execute(tables).await?;
    session.batch_execute("CREATE SCHEMA events; CREATE EXTENSION pg_outbox SCHEMA events").await?;
    session.until("SELECT worker_pid IS NOT NULL FROM outbox.stats()", LONG).await?;
    Ok((cluster, database, session))
}

async fn adopt(session: &Session, arguments: &str) -> Result<i64> {
    session.one(&format!("SELECT outbox.adopt({arguments})")).await
}

async fn release(session: &Session, name: &str) -> Result<i64> {
    session.one(&format!("SELECT outbox.release_adopted('{name}')")).await
}

/// Rows that two queries do not have in common.
async fn differing(session: &Session, one: &str, other: &str) -> Result<i64> {
    session
        .one(&format!(
            "WITH a AS MATERIALIZED ({one}), b AS MATERIALIZED ({other})
             SELECT (SELECT count(*) FROM (SELECT * FROM a EXCEPT ALL SELECT * FROM b) x)
                  + (SELECT count(*) FROM (SELECT * FROM b EXCEPT ALL SELECT * FROM a) x)"
        ))
        .await
}

async fn refused(session: &Session, statement: &str, code: SqlState, says: &str) -> Result<()> {
    let error = session.batch_execute(statement).await.err().with_context(|| format!("{statement} was allowed"))?;
    let error = error.as_db_error().context("an error of the server")?;
    ensure!(error.code() == &code && error.message().contains(says), "{statement}: {error:?}");
    Ok(())
}

const INSERT: &str = "INSERT INTO public.outbox_events (aggregate_id, aggregate_type, event_type, event_data)
                      VALUES (gen_random_uuid(), 'contact', 'contact.new', '{}')";

#[tokio::test]
async fn a_home_made_table_moves_in_as_it_was() -> Result<()> {
    let (_, _, session) = moved_in(HOME_MADE).await?;
    assert_eq!(adopt(&session, "'public.outbox_events'").await?, 15);
    let shown = "SELECT s.*, CASE s.status WHEN 'processing' THEN 'pending' ELSE s.status END AS status_now";
    let unchanged =
        "id, event_id, aggregate_id, aggregate_type, event_type, event_data, status_now, retry_count, last_error,
                     user_id, tags, amount, metadata, created_at, processed_at, seq, length";
    let before = format!("SELECT {unchanged} FROM ({shown} FROM snapshot s) s");
    let now = format!("SELECT {unchanged} FROM ({shown} FROM outbox_events s) s");
    assert_eq!(differing(&session, &before, &now).await?, 0, "each row is as it was");
    assert_eq!(session.one::<i64>("SELECT count(*) FROM outbox_events_before WHERE status = 'processed'").await?, 5);
    assert_eq!(session.one::<i64>("SELECT count(*) FROM outbox_events_before").await?, 5);
    let order = "SELECT string_agg(event_type, ' ' ORDER BY";
    let claimed: String = session.one(&format!("{order} id) FROM outbox.claim(100)")).await?;
    let expected: String =
        session.one(&format!("{order} created_at) FROM snapshot WHERE status IN ('pending', 'processing')")).await?;
    assert_eq!(claimed, expected, "in their order");
    assert_eq!(
        differing(
            &session,
            "SELECT event_id FROM snapshot WHERE status <> 'processed'",
            "SELECT event_id FROM events.outbox_events"
        )
        .await?,
        0
    );
    assert_eq!(
        session
            .one::<String>(
                "SELECT string_agg(DISTINCT status || last_error, ' ') FROM outbox.deliveries WHERE status = 'failed'"
            )
            .await?,
        "failedno route",
        "dead letters"
    );
    let triggers: String = session
        .one("SELECT string_agg(event_object_schema, ' ') FROM information_schema.triggers WHERE trigger_name = 'after_outbox_insert'")
        .await?;
    assert_eq!(triggers, "events");
    let by_key = "SELECT count(*) FROM outbox_events o JOIN snapshot s ON o.id = s.id AND o.event_id = s.event_id";
    assert_eq!(session.one::<i64>(by_key).await?, 20);
    assert_eq!(session.one::<i64>("SELECT count(*) FROM stuck").await?, 0, "all that was pending is claimed");
    assert_eq!(session.one::<String>("SELECT obj_description('outbox_events'::regclass)").await?, "ours");
    assert_eq!(session.one::<String>("SELECT metadata ->> 'amount' FROM events.outbox_events LIMIT 1").await?, "1.50");
    let unwell: Option<String> = session
        .one("SELECT string_agg(check_name, ' ') FROM outbox.health() WHERE NOT ok AND check_name NOT IN ('consumers', 'dead_letters', 'oldest_pending')")
        .await?;
    assert_eq!(unwell, None);
    Ok(())
}

#[tokio::test]
async fn the_application_writes_as_before() -> Result<()> {
    let (cluster, database, session) = moved_in(HOME_MADE).await?;
    let role = format!("app_{database}");
    session
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'secret';
             GRANT SELECT, INSERT ON outbox_events TO {role}; GRANT UPDATE (event_data, status), DELETE ON outbox_events TO {role};
             GRANT USAGE ON SEQUENCE outbox_events_seq_seq TO {role}"
        ))
        .await?;
    adopt(&session, "'public.outbox_events'").await?;
    let app = Session::open(&cluster.url_as(&role, "secret", &database)).await?;
    let row =
        app.query_one(&format!("{INSERT} RETURNING id, event_id, seq, status, length, created_at::text"), &[]).await?;
    let (id, event_id): (Uuid, Uuid) = (row.get(0), row.get(1));
    assert_eq!((row.get::<_, i64>(2), row.get::<_, &str>(3), row.get::<_, i32>(4)), (21, "pending", 11), "defaults");
    let found: String = app
        .one(&format!("SELECT created_at::text FROM outbox_events WHERE id = '{id}' AND event_id = '{event_id}'"))
        .await?;
    assert_eq!(found, row.get::<_, &str>(5), "RETURNING tells what is stored");
    let full = "INSERT INTO outbox_events (id, event_id, aggregate_id, aggregate_type, event_type, event_data, status, retry_count,
                    user_id, tags, amount, metadata, created_at)
                SELECT gen_random_uuid(), gen_random_uuid(), aggregate_id, aggregate_type, 'contact.copy', event_data, 'pending', 3,
                    user_id, tags, amount, '{\"tags\": 7}', created_at FROM outbox_events WHERE event_type = 'contact.n1' RETURNING *";
    assert_eq!(app.query(full, &[]).await?.len(), 1);
    let same = "SELECT tags, amount, user_id, created_at FROM outbox_events WHERE event_type = ";
    assert_eq!(differing(&session, &format!("{same} 'contact.n1'"), &format!("{same} 'contact.copy'")).await?, 0);
    assert_eq!(
        session.one::<String>("SELECT metadata::text FROM outbox_events WHERE event_type = 'contact.copy'").await?,
        r#"{"tags": 7}"#
    );
    app.execute("UPDATE outbox_events SET event_data = '{\"mended\": true}' WHERE id = $1", &[&id]).await?;
    let data = format!("SELECT event_data::text FROM events.outbox_events WHERE event_id = '{event_id}'");
    assert_eq!(session.one::<String>(&data).await?, r#"{"mended": true}"#);
    let state = SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE;
    refused(
        &app,
        "UPDATE outbox_events SET status = 'processing' WHERE event_type = 'contact.copy'",
        state.clone(),
        "status",
    )
    .await?;
    app.execute("UPDATE outbox_events SET status = 'processed' WHERE id = $1", &[&id]).await?;
    app.execute("UPDATE outbox_events SET status = 'pending' WHERE event_type = 'contact.n4'", &[]).await?;
    assert_eq!(app.execute("DELETE FROM outbox_events WHERE event_type = 'contact.n8'", &[]).await?, 1);
    assert_eq!(app.execute("DELETE FROM outbox_events WHERE event_type = 'contact.n9'", &[]).await?, 1);
    let claimed: String =
        session.one("SELECT string_agg(event_type, ' ' ORDER BY event_type) FROM outbox.claim(100)").await?;
    assert!(
        claimed.starts_with("contact.copy contact.n1 ") && claimed.contains(" contact.n4 ") && !claimed.contains("n9"),
        "{claimed}"
    );
    assert!(!claimed.contains("contact.new"), "it was taken as delivered: {claimed}");

    refused(
        &app,
        "UPDATE outbox_events SET status = 'processed' WHERE event_type = 'contact.n1'",
        state.clone(),
        "status",
    )
    .await?;
    refused(
        &session,
        "UPDATE outbox_events SET event_type = 'x' WHERE event_type = 'contact.copy'",
        state.clone(),
        "type",
    )
    .await?;
    refused(
        &session,
        "INSERT INTO outbox_events_before SELECT * FROM outbox_events_before",
        SqlState::GENERATED_ALWAYS,
        "length",
    )
    .await?;
    refused(&session, "INSERT INTO outbox_events_before DEFAULT VALUES", state, "no new rows").await?;
    let typed = |columns: &str, values: &str| {
        format!(
            "INSERT INTO outbox_events (aggregate_id, aggregate_type, event_type, event_data{columns}) VALUES (gen_random_uuid(), 'c', 't', '{{}}'{values})"
        )
    };
    refused(&app, &typed(", amount", ", -1"), SqlState::CHECK_VIOLATION, "amount_is_positive").await?;
    refused(&app, &typed(", created_at", ", NULL"), SqlState::NOT_NULL_VIOLATION, "created_at").await?;
    refused(&app, &typed(", status", ", 'failed'"), SqlState::INVALID_PARAMETER_VALUE, "status").await?;
    for key in ["id", "event_id"] {
        for with in ["contact.n4", "contact.n12"] {
            let taken = format!(", (SELECT {key} FROM outbox_events WHERE event_type = '{with}')");
            refused(&app, &typed(&format!(", {key}"), &taken), SqlState::UNIQUE_VIOLATION, "duplicate").await?;
        }
    }
    let denied = SqlState::INSUFFICIENT_PRIVILEGE;
    refused(&app, "UPDATE outbox_events SET last_error = 'x'", denied.clone(), "permission").await?;
    refused(&app, "SELECT * FROM events.outbox_events", denied.clone(), "permission").await?;
    refused(&app, "SELECT * FROM outbox.adopted_1", denied.clone(), "permission").await?;
    refused(&app, "SELECT outbox.release_adopted('outbox_events')", denied, "permission").await?;
    Ok(())
}

#[tokio::test]
async fn the_table_comes_back_with_what_happened_meanwhile() -> Result<()> {
    let (_, _, session) = moved_in(HOME_MADE).await?;
    session.batch_execute("CREATE ROLE late_reader").await?;
    let definitions = "SELECT pg_get_triggerdef(oid), tgenabled FROM pg_trigger WHERE tgrelid = 'outbox_events'::regclass AND NOT tgisinternal";
    session.batch_execute(&format!("CREATE TABLE triggers AS {definitions}")).await?;
    adopt(&session, "'public.outbox_events'").await?;
    let token: i64 = session.one("SELECT min(claim_token) FROM outbox.claim(5)").await?;
    session.execute(&format!("SELECT outbox.ack({token})"), &[]).await?;
    session.batch_execute(INSERT).await?;
    session.batch_execute("SELECT FROM outbox.claim(1); GRANT SELECT ON outbox_events TO late_reader").await?;
    session.batch_execute("CREATE TABLE shown AS TABLE outbox_events").await?;
    assert_eq!(release(&session, "public.outbox_events").await?, 16);
    let as_shown =
        "SELECT id, event_id, event_type, event_data, replace(status, 'processing', 'pending'), user_id, tags, amount,
                           metadata, created_at, processed_at, seq FROM";
    assert_eq!(differing(&session, &format!("{as_shown} shown"), &format!("{as_shown} outbox_events")).await?, 0);
    let counts = "SELECT string_agg(status || n, ' ' ORDER BY status) FROM (SELECT status, count(*) AS n FROM outbox_events GROUP BY status) c";
    assert_eq!(session.one::<String>(counts).await?, "failed5 pending6 processed10");
    assert_eq!(differing(&session, "TABLE triggers", definitions).await?, 0);
    assert_eq!(
        session.one::<String>("SELECT relkind::text FROM pg_class WHERE oid = 'outbox_events'::regclass").await?,
        "r"
    );
    assert_eq!(session.one::<i64>("SELECT count(*) FROM events.outbox_events").await?, 0);
    assert_eq!(session.one::<i64>("SELECT count(*) FROM stuck").await?, 6);
    assert!(session.one::<bool>("SELECT has_table_privilege('late_reader', 'outbox_events', 'SELECT')").await?);
    let left = "SELECT (SELECT count(*) FROM pg_proc WHERE proname ~ '^adopted_[0-9]') + (SELECT count(*) FROM pg_class WHERE relname ~ '^adopted_[0-9]')";
    assert_eq!(session.one::<i64>(left).await?, 0, "nothing is left of it");
    session.until("SELECT NOT EXISTS (SELECT FROM outbox.delivery)", LONG).await?;
    assert_eq!(session.execute(INSERT, &[]).await?, 1);
    assert_eq!(adopt(&session, "'public.outbox_events', failed => 'retry'").await?, 12);
    assert_eq!(release(&session, "outbox_events").await?, 12);
    assert_eq!(adopt(&session, "'public.outbox_events', failed => 'leave'").await?, 12);
    session.batch_execute("DROP ROLE IF EXISTS nobody; REVOKE ALL ON outbox_events, outbox_events_before FROM late_reader; DROP ROLE late_reader").await?;
    Ok(())
}

/// What sessions have parsed, prepared or begun to wait for must not reach the old table, in either direction.
#[tokio::test]
async fn whoever_waits_for_the_table_finds_the_view() -> Result<()> {
    let (cluster, database, session) = moved_in(HOME_MADE).await?;
    session.batch_execute(&format!("CREATE PROCEDURE add() LANGUAGE plpgsql AS $$ BEGIN {INSERT}; END $$")).await?;
    let prepared = cluster.connect(&database).await?;
    let statement = prepared.prepare(&format!("{INSERT} RETURNING id")).await?;
    for _ in 0..7 {
        prepared.query_one(&statement, &[]).await?;
    }
    let waiters =
        [cluster.connect(&database).await?, cluster.connect(&database).await?, cluster.connect(&database).await?];
    for waiter in &waiters {
        waiter.batch_execute("CALL add(); SET plan_cache_mode = force_generic_plan").await?;
        waiter.batch_execute(&format!("PREPARE p AS {INSERT}; EXECUTE p")).await?;
    }
    for (call, inserted) in [
        ("SELECT outbox.adopt('outbox_events')", "events.outbox_events"),
        ("SELECT outbox.release_adopted('outbox_events')", "outbox_events"),
    ] {
        let before: i64 = session.one(&format!("SELECT count(*) FROM {inserted}")).await.unwrap_or(0);
        session.batch_execute(&format!("BEGIN; {call}")).await?;
        let waiting = async {
            let all = async {
                let (a, b, c, d) = tokio::join!(
                    waiters[0].batch_execute(INSERT),
                    waiters[1].batch_execute("EXECUTE p"),
                    waiters[2].batch_execute("CALL add()"),
                    prepared.query_one(&statement, &[])
                );
                for inserted in [a, b, c] {
                    inserted?;
                }
                d?;
                anyhow::Ok(())
            };
            let commit = async {
                let watcher = cluster.connect(&database).await?;
                watcher.until("SELECT count(*) = 4 FROM pg_locks WHERE NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())", LONG).await?;
                session.batch_execute("COMMIT").await?;
                anyhow::Ok(())
            };
            let (all, commit) = tokio::join!(all, commit);
            commit?;
            all
        };
        waiting.await?;
        let after: i64 =
            session.one(&format!("SELECT count(*) FROM {inserted} WHERE event_type = 'contact.new'")).await?;
        let expected = if before == 0 { 4 + 13 } else { 4 + 17 };
        assert_eq!(after, expected, "{call}: {before} before");
    }
    Ok(())
}

#[tokio::test]
async fn nothing_is_lost_or_doubled_while_the_application_writes() -> Result<()> {
    let (cluster, database, session) = moved_in(HOME_MADE).await?;
    session.batch_execute("CREATE TABLE written (event_id uuid)").await?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for _ in 0..4 {
        let (session, stop) = (cluster.connect(&database).await?, stop.clone());
        writers.push(tokio::spawn(async move {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                let written =
                    format!("WITH new AS ({INSERT} RETURNING event_id) INSERT INTO written SELECT event_id FROM new");
                session.batch_execute("BEGIN").await?;
                session.batch_execute(INSERT).await?;
                session.batch_execute("SAVEPOINT s").await?;
                session.batch_execute(INSERT).await?;
                session.batch_execute("ROLLBACK TO s").await?;
                let id: Uuid = session.query_one(&format!("{INSERT} RETURNING event_id"), &[]).await?.get(0);
                session.execute("INSERT INTO written VALUES ($1)", &[&id]).await?;
                session.batch_execute("COMMIT").await?;
                session.batch_execute(&written).await?;
                count += 3;
            }
            anyhow::Ok(count)
        }));
    }
    let mut rounds = 0;
    let both = "SELECT count(*) FROM outbox_events WHERE event_type = 'contact.new'";
    let result = async {
        for _ in 0..5 {
            session.until(&format!("SELECT ({both}) > {}", 40 * (rounds + 1)), LONG).await?;
            adopt(&session, "'outbox_events'").await?;
            session.until(&format!("SELECT ({both}) > {}", 40 * (rounds + 2)), LONG).await?;
            let token: Option<i64> = session.one("SELECT min(claim_token) FROM outbox.claim(20)").await?;
            session.execute(&format!("SELECT outbox.ack({})", token.context("a claim")?), &[]).await?;
            release(&session, "outbox_events").await?;
            rounds += 2;
        }
        adopt(&session, "'outbox_events'").await
    }
    .await;
    stop.store(true, Ordering::Relaxed);
    let mut expected = 0;
    for writer in writers {
        expected += writer.await??;
    }
    result?;
    assert_eq!(session.one::<i64>(both).await?, expected);
    let missing = "SELECT count(*) FROM written w WHERE (SELECT count(*) FROM outbox_events o WHERE o.event_id = w.event_id) <> 1";
    assert_eq!(session.one::<i64>(missing).await?, 0);
    let doubled = "SELECT count(*) FROM outbox_events_before b JOIN events.outbox_events e USING (event_id)";
    assert_eq!(session.one::<i64>(doubled).await?, 0);
    let owed = "SELECT count(*) FROM outbox_events_before WHERE status <> 'processed'";
    assert_eq!(session.one::<i64>(owed).await?, 0);
    Ok(())
}

/// The application's code must not run with more rights than before, and its owner keeps what it could do.
#[tokio::test]
async fn the_table_s_owner_gains_nothing_and_loses_nothing() -> Result<()> {
    let (cluster, database, session) = moved_in("").await?;
    let (owner, reader) = (format!("owner_{database}"), format!("reader_{database}"));
    session
        .batch_execute(&format!(
            "CREATE ROLE {owner} LOGIN PASSWORD 'secret'; CREATE ROLE {reader}; GRANT CREATE ON SCHEMA public TO {owner};
             CREATE TABLE public.ran (who text); GRANT INSERT ON ran TO PUBLIC; SET ROLE {owner};
             CREATE FUNCTION public.note(what text) RETURNS void LANGUAGE sql AS
                 $$ INSERT INTO public.ran VALUES (what || ' ' || current_user) $$;
             CREATE FUNCTION public.tell(what text, v text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS
                 $$ BEGIN PERFORM public.note(what); RETURN v; END $$;
             CREATE FUNCTION public.fire() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM public.tell('trigger', NULL); RETURN coalesce(NEW, OLD); END $$;
             CREATE TYPE public.kind AS ENUM ('a', 'b');
             CREATE FUNCTION public.cast_kind(kind) RETURNS text LANGUAGE plpgsql IMMUTABLE AS
                 $$ BEGIN RETURN public.tell('cast', 'a'); END $$;
             CREATE CAST (kind AS text) WITH FUNCTION public.cast_kind(kind);
             CREATE TABLE public.box (id serial PRIMARY KEY, event_type kind NOT NULL, payload jsonb NOT NULL, status kind,
                 own text DEFAULT public.tell('default', 'x') CHECK (public.tell('check', own) IS NOT NULL),
                 made text GENERATED ALWAYS AS (public.tell('generated', 'y')) STORED);
             ALTER TABLE public.box DROP COLUMN status;
             CREATE INDEX ON public.box (public.tell('index', own)) WHERE public.tell('predicate', own) IS NOT NULL;
             CREATE TRIGGER fire BEFORE INSERT OR UPDATE OR DELETE ON public.box FOR EACH ROW EXECUTE FUNCTION public.fire();
             INSERT INTO public.box (event_type, payload) VALUES ('a', '{{}}'), ('b', '{{}}');
             RESET ROLE; DELETE FROM ran"
        ))
        .await?;
    adopt(&session, "'box'").await?;
    let app = Session::open(&cluster.url_as(&owner, "secret", &database)).await?;
    app.batch_execute(&format!(
        "INSERT INTO box (event_type, payload) VALUES ('a', '{{}}'); GRANT SELECT ON box TO {reader}"
    ))
    .await?;
    app.batch_execute(
        "UPDATE box SET payload = '{}' WHERE id = 3; SELECT count(*) FROM box; DELETE FROM box WHERE id = 3",
    )
    .await?;
    assert!(session.one::<bool>(&format!("SELECT has_table_privilege('{reader}', 'box', 'SELECT')")).await?);
    release(&session, "box").await?;
    app.batch_execute("INSERT INTO box (event_type, payload) VALUES ('a', '{}')").await?;
    let ran: Option<String> = session
        .one(&format!("SELECT string_agg(DISTINCT who, ', ') FROM ran WHERE who NOT LIKE '% {owner}' AND who NOT LIKE '% outbox_owner'"))
        .await?;
    assert_eq!(ran, None, "code of the application ran with other rights");
    let defaults: i64 = session.one(&format!("SELECT count(*) FROM ran WHERE who = 'default {owner}'")).await?;
    assert_eq!(defaults, 2);
    session.batch_execute(&format!("DROP OWNED BY {owner}, {reader} CASCADE; DROP ROLE {owner}, {reader}")).await?;
    Ok(())
}

#[tokio::test]
async fn debezium_s_table_moves_in() -> Result<()> {
    let (_, _, session) = moved_in(
        "CREATE TABLE outbox (id uuid PRIMARY KEY, aggregatetype varchar(255) NOT NULL, aggregateid varchar(255) NOT NULL,
                              type varchar(255) NOT NULL, payload jsonb);
         INSERT INTO outbox SELECT gen_random_uuid(), 'order', n::text, 'placed', CASE WHEN n > 1 THEN '{}'::jsonb END
           FROM generate_series(1, 3) AS n;
         CREATE TABLE snapshot AS TABLE outbox;",
    )
    .await?;
    assert_eq!(adopt(&session, "'outbox'").await?, 3);
    assert_eq!(differing(&session, "TABLE snapshot", "TABLE outbox").await?, 0);
    let events = "SELECT event_id, aggregate_type, aggregate_id, event_type FROM events.outbox_events";
    assert_eq!(differing(&session, "SELECT id, aggregatetype, aggregateid, type FROM snapshot", events).await?, 0);
    // So Debezium's users do it: what reads the write-ahead log has seen the row.
    session
        .batch_execute(
            "BEGIN; SAVEPOINT s; INSERT INTO outbox VALUES ('00000000-0000-0000-0000-000000000001', 'order', '9', 'placed', '{}');
             RELEASE s; DELETE FROM outbox WHERE aggregateid = '9'; COMMIT",
        )
        .await?;
    assert_eq!(session.one::<i64>("SELECT count(*) FROM events.outbox_events WHERE aggregate_id = '9'").await?, 1);
    assert_eq!(session.execute("DELETE FROM outbox WHERE aggregateid = '3'", &[]).await?, 1);
    let token: i64 = session.one("SELECT min(claim_token) FROM outbox.claim(1)").await?;
    session.execute(&format!("SELECT outbox.ack({token})"), &[]).await?;
    assert_eq!(release(&session, "outbox").await?, 2, "the table can't say that one was sent");
    assert_eq!(session.one::<String>("SELECT string_agg(aggregateid, ' ' ORDER BY 1) FROM outbox").await?, "2 9");
    Ok(())
}

#[tokio::test]
async fn values_of_all_types_come_back() -> Result<()> {
    let (_, _, session) = moved_in(
        r#"CREATE TYPE state AS ENUM ('NEW', 'SENT', 'ERROR');
           CREATE TYPE pair AS (a int, b text, c date);
           CREATE DOMAIN address AS text CHECK (VALUE LIKE '%@%');
           CREATE TABLE "Messages" (id serial PRIMARY KEY, topic text NOT NULL, payload jsonb, "eventState" state DEFAULT 'NEW',
               sent_at timestamptz, who address, p pair, states state[], i interval, b bytea, j json, f float8, d date,
               r int4range, event text, n date[], "name" varchar(20) COLLATE "C", headers jsonb, "timestamp" timestamp(3) NOT NULL DEFAULT now());
           SET timezone = 'Asia/Kathmandu';
           INSERT INTO "Messages" (topic, payload, "eventState", who, p, states, i, b, j, f, d, r, event, n, "name", headers)
           SELECT 't', jsonb_build_object('n', n), (ARRAY['NEW', 'SENT', 'ERROR']::state[])[1 + n % 3], 'a@b', ROW(n, 'x"y', '2026-02-03')::pair,
                  '{NEW,SENT}', '1 day -00:03', '\xdead', 'null', 'Infinity', '0044-03-15 BC', '[1,5)', 'e', '{2026-02-03,NULL}', 'ä',
                  (ARRAY['{"who": "me"}', '{}', NULL])[1 + n % 3]::jsonb
             FROM generate_series(1, 6) AS n;
           CREATE TABLE snapshot AS TABLE "Messages";"#,
    )
    .await?;
    assert_eq!(adopt(&session, r#"'"Messages"', columns => '{"status": "eventState"}', failed => 'retry'"#).await?, 4);
    session
        .batch_execute("SET timezone = 'America/New_York'; SET intervalstyle = sql_standard; SET datestyle = german")
        .await?;
    let text = |table: &str| format!(r#"SELECT replace(m::text, 'ERROR,', 'NEW,') FROM {table} m"#);
    assert_eq!(differing(&session, &text("snapshot"), &text(r#""Messages""#)).await?, 0);
    let types = |table: &str| {
        format!(
            "SELECT attname, format_type(atttypid, atttypmod), attcollation FROM pg_attribute WHERE attrelid = '{table}'::regclass AND attnum > 0 ORDER BY attnum"
        )
    };
    assert_eq!(differing(&session, &types(r#""Messages""#), &types(r#""Messages_before""#)).await?, 0);
    let inserted: i32 =
        session.one(r#"INSERT INTO "Messages" (topic, payload) VALUES ('t', '{}') RETURNING id"#).await?;
    assert_eq!(inserted, 7);
    let plan: Vec<String> = session
        .query(r#"EXPLAIN SELECT * FROM "Messages" WHERE id = 3"#, &[])
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!(plan.join(" ").contains("adopted_event_key_int") && !plan.join(" ").contains("Seq Scan"), "{plan:?}");
    assert_eq!(release(&session, r#""Messages""#).await?, 5);
    session.batch_execute("SET timezone = 'Asia/Kathmandu'").await?;
    let back = format!("{} WHERE id < 7", text(r#""Messages""#));
    assert_eq!(differing(&session, &text("snapshot"), &back).await?, 0);
    Ok(())
}

#[tokio::test]
async fn other_layouts_move_in_and_out() -> Result<()> {
    let (_, _, session) = moved_in("CREATE SCHEMA app").await?;
    session
        .batch_execute(
            "CREATE TABLE app.outbox_events (LIKE events.outbox_events INCLUDING ALL);
             INSERT INTO app.outbox_events (event_type, event_data, status, available_at, metadata)
             VALUES ('a', '{}', 'pending', NULL, '{\"x\": 1}'), ('b', '{}', 'processed', NULL, '{}'),
                    ('c', '{}', 'pending', now() + interval '1 day', '{\"id\": 7}');
             CREATE TABLE flags (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, event_name text, body json,
                 published boolean NOT NULL DEFAULT false, scheduled_at timestamptz NOT NULL DEFAULT now());
             INSERT INTO flags (event_name, body, published) VALUES ('a', '{}', false), ('b', '{}', true);
             CREATE TABLE parts (id bigserial, event_type text NOT NULL, payload text NOT NULL,
                 created_at timestamptz NOT NULL DEFAULT now(), published_at timestamptz, PRIMARY KEY (id, created_at))
                 PARTITION BY RANGE (created_at);
             CREATE TABLE part PARTITION OF parts DEFAULT;
             INSERT INTO parts (event_type, payload, published_at) VALUES ('a', '{}', NULL), ('b', '{}', now()), ('c', '{}', NULL);",
        )
        .await?;
    for (name, outstanding, insert) in [
        ("app.outbox_events", 2, "(event_type, event_data) VALUES ('new', '{}')"),
        ("public.flags", 1, "(event_name, body) VALUES ('new', '{}')"),
        ("public.parts", 2, "(event_type, payload) VALUES ('new', '{}')"),
    ] {
        session.batch_execute(&format!("DROP TABLE IF EXISTS snapshot; CREATE TABLE snapshot AS TABLE {name}")).await?;
        let rows = |table: &str| format!("SELECT x::text FROM {table} x");
        assert_eq!(adopt(&session, &format!("'{name}'")).await?, outstanding, "{name}");
        assert_eq!(differing(&session, &rows("snapshot"), &rows(name)).await?, 0, "{name}");
        let id: i64 = session.one(&format!("INSERT INTO {name} {insert} RETURNING id")).await?;
        let found: i64 = session.one(&format!("SELECT count(*) FROM {name} WHERE id = {id}")).await?;
        assert_eq!(found, 1, "{name}");
        let token: i64 = session.one("SELECT min(claim_token) FROM outbox.claim(1)").await?;
        session.execute(&format!("SELECT outbox.ack({token})"), &[]).await?;
        assert_eq!(release(&session, name).await?, outstanding + 1, "{name}");
        let next: i64 = session.one(&format!("INSERT INTO {name} {insert} RETURNING id")).await?;
        assert_eq!(next, id + 1, "{name}");
        assert_eq!(adopt(&session, &format!("'{name}'")).await?, outstanding + 1, "{name}: one was sent, one is new");
        session.batch_execute("DELETE FROM events.outbox_events").await?;
        assert_eq!(session.one::<i64>("SELECT count(*) FROM outbox.adopted_event").await?, 0);
    }
    Ok(())
}

#[tokio::test]
async fn what_can_not_be_mapped_is_named_and_nothing_has_changed() -> Result<()> {
    let (_, _, session) = moved_in("CREATE TABLE t (id int)").await?;
    let invalid = SqlState::INVALID_PARAMETER_VALUE;
    let held = SqlState::DEPENDENT_OBJECTS_STILL_EXIST;
    let state = SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE;
    let good = "id uuid PRIMARY KEY, event_type text, payload jsonb, status text";
    for (columns, more, arguments, code, says) in [
        ("id uuid, event_type text, payload bytea", "", "", &invalid, "payload"),
        ("id uuid, payload jsonb", "", "", &invalid, "event_type"),
        ("id uuid, event_type text, payload jsonb, status int", "", "", &invalid, "status"),
        (good, "INSERT INTO t VALUES (gen_random_uuid(), 'a', '1', 'weird')", "", &invalid, "'weird'"),
        (
            good,
            "INSERT INTO t VALUES (gen_random_uuid(), NULL, '1', 'pending')",
            "",
            &invalid,
            "column event_type of s.t",
        ),
        (
            good,
            "INSERT INTO t VALUES (gen_random_uuid(), '', '1', 'pending')",
            "",
            &invalid,
            "column event_type of s.t",
        ),
        (
            "event_id text, event_type text, body text",
            "INSERT INTO t VALUES ('x', 'a', '{}')",
            "",
            &invalid,
            "column event_id",
        ),
        (
            "event_id uuid, event_type text, body text",
            "INSERT INTO t VALUES (gen_random_uuid(), 'a', 'x')",
            "",
            &invalid,
            "column body",
        ),
        (
            "event_id uuid, event_type text, body text",
            "INSERT INTO t SELECT event_id, 'a', '1' FROM gen_random_uuid() event_id, generate_series(1, 2)",
            "",
            &invalid,
            "column event_id",
        ),
        (
            "id int, event_type text, body text",
            "INSERT INTO t VALUES (1, 'a', '1'), (1, 'a', '1')",
            "",
            &invalid,
            "column id",
        ),
        ("id uuid, event_type text, body text, k text UNIQUE", "", "", &invalid, "column k"),
        (good, "", ", columns => '{\"nope\": \"id\"}'", &invalid, "nope"),
        (good, "", ", columns => '{\"event_type\": \"nope\"}'", &invalid, "nope"),
        (good, "", ", columns => '{\"event_data\": \"id\"}'", &invalid, "column id"),
        (good, "", ", columns => '[]'", &invalid, "columns"),
        (good, "", ", failed => 'no'", &invalid, "failed"),
        (good, "CREATE TABLE u (t uuid REFERENCES t)", "", &held, "depend"),
        (good, "CREATE MATERIALIZED VIEW u AS TABLE t", "", &held, "depend"),
        (good, "CREATE FUNCTION f(t) RETURNS int LANGUAGE sql AS 'SELECT 1'", "", &held, "depend"),
        (good, "ALTER TABLE t ENABLE ROW LEVEL SECURITY", "", &state, "row-level security"),
        (good, "CREATE TABLE t_before ()", "", &state, "t_before"),
        (good, "CREATE RULE r AS ON DELETE TO t DO INSTEAD NOTHING", "", &state, "rules"),
    ] {
        session
            .batch_execute(&format!("CREATE SCHEMA s; SET search_path = s; CREATE TABLE t ({columns}); {more}"))
            .await?;
        let rows = "SELECT count(*) FROM t";
        let before: i64 = session.one(rows).await?;
        refused(&session, &format!("SELECT outbox.adopt('t'{arguments})"), code.clone(), says).await?;
        let kind: String = session.one("SELECT relkind::text FROM pg_class WHERE oid = 't'::regclass").await?;
        assert_eq!(kind, "r", "{columns}: {more}");
        assert_eq!(session.one::<i64>(rows).await?, before);
        session.batch_execute("SET search_path = public; DROP SCHEMA s CASCADE").await?;
    }
    session.batch_execute(&format!("DROP TABLE t; CREATE TABLE t ({good})")).await?;
    session.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
    refused(&session, "SELECT outbox.adopt('t')", state.clone(), "READ COMMITTED").await?;
    session.batch_execute("ROLLBACK").await?;
    refused(&session, "SELECT outbox.adopt('events.outbox_events')", state.clone(), "own").await?;
    refused(&session, "SELECT outbox.release_adopted('t')", SqlState::UNDEFINED_OBJECT, "t was not taken over").await?;
    // What it only warns of.
    session
        .batch_execute(
            "CREATE TABLE u (id int PRIMARY KEY); ALTER TABLE t ADD COLUMN u int REFERENCES u; CREATE PUBLICATION p FOR TABLE t",
        )
        .await?;
    adopt(&session, "'t'").await?;
    refused(&session, "SELECT outbox.adopt('t')", state, "already").await?;
    refused(&session, "DROP EXTENSION pg_outbox", held, "depend").await?;
    Ok(())
}

#[tokio::test]
async fn what_was_outstanding_and_what_is_new_is_delivered() -> Result<()> {
    let (cluster, database, session) = moved_in(HOME_MADE).await?;
    let receiver = Receiver::start()?;
    session.execute("SELECT outbox.add_webhook('hook', $1)", &[&receiver.url("/")]).await?;
    let _relay = Relay::start(cluster, &database, None).await?;
    assert_eq!(adopt(&session, "'outbox_events'").await?, 15);
    session.batch_execute(INSERT).await?;
    session.until("SELECT count(*) = 16 FROM outbox_events WHERE status = 'processed'", LONG).await?;
    assert_eq!(receiver.count(), 11, "ten that were outstanding and one that is new, each once");
    assert_eq!(session.one::<i64>("SELECT outbox.replay_failed()").await?, 5);
    session.until("SELECT bool_and(status = 'processed') FROM outbox_events", LONG).await?;
    Ok(())
}

#[tokio::test]
async fn what_moved_in_survives_a_dump() -> Result<()> {
    let (cluster, database, session) = moved_in(HOME_MADE).await?;
    adopt(&session, "'outbox_events'").await?;
    session.batch_execute(INSERT).await?;
    session.batch_execute("CREATE TABLE shown AS TABLE outbox_events").await?;
    let path = cluster.dir().join(format!("{database}.dump"));
    let path = path.to_str().context("a path")?;
    let mut dump = cluster.client("pg_dump")?;
    dump.args(["--format", "custom", "--file", path, &cluster.url(&database)]);
    run(dump)?;
    let copy = cluster.empty_database().await?;
    let mut restore = cluster.client("pg_restore")?;
    restore.args(["--exit-on-error", "--dbname", &cluster.url(&copy), path]);
    run(restore)?;
    let session = cluster.connect(&copy).await?;
    assert_eq!(differing(&session, "TABLE shown", "TABLE outbox_events").await?, 0);
    let row = session.query_one(&format!("{INSERT} RETURNING seq"), &[]).await?;
    assert_eq!(row.get::<_, i64>(0), 22);
    assert_eq!(session.one::<i64>("SELECT count(*) FROM outbox.claim(100)").await?, 12);
    assert_eq!(release(&session, "outbox_events").await?, 17);
    let triggers = "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'outbox_events'::regclass AND NOT tgisinternal";
    assert_eq!(session.one::<i64>(triggers).await?, 2);
    Ok(())
}

/// psycopg, SQLAlchemy and a poller's statements, as Python programs send them.
#[tokio::test]
async fn an_orm_goes_on_as_before() -> Result<()> {
    let (cluster, database, session) = moved_in(HOME_MADE).await?;
    let url = cluster.url(&database);
    let before = orm::session(&url)?;
    adopt(&session, "'outbox_events'").await?;
    assert_eq!(orm::session(&url)?, before);
    release(&session, "outbox_events").await?;
    assert_eq!(orm::session(&url)?, before);
    Ok(())
}

/// The statements that GORM and Hibernate send, prepared before the table moved in and executed after it.
#[tokio::test]
async fn prepared_statements_of_gorm_and_hibernate_go_on_as_before() -> Result<()> {
    let (_, _, session) = moved_in(HOME_MADE).await?;
    let gorm = r#"INSERT INTO "outbox_events" ("aggregate_id","aggregate_type","event_type","event_data","status","retry_count",
                  "last_error","created_at","processed_at") VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9) RETURNING "#;
    let values = "(gen_random_uuid(),'contact','gorm.many','{}','pending',0,NULL,'2026-01-02 03:04:05',NULL)";
    let columns = gorm.split_once("VALUES").context("an INSERT")?.0;
    let hibernate = "insert into outbox_events (aggregate_id,aggregate_type,amount,created_at,event_data,event_id,event_type,
                     last_error,processed_at,retry_count,status,id) values ($1,$2,$3,$4,cast($5 as jsonb),$6,$7,$8,$9,$10,$11,$12)";
    let identity = "insert into outbox_events (aggregate_id,aggregate_type,event_data,event_type)
                    values ($1,$2,cast($3 as jsonb),$4) returning ";
    let ones = [
        "EXECUTE gorm_id(gen_random_uuid(),'contact','gorm.id','{}','pending',0,NULL,'2026-01-02 03:04:05',NULL)",
        "EXECUTE gorm_all(gen_random_uuid(),'contact','gorm.all','{}','pending',0,NULL,'2026-01-02 03:04:05',NULL)",
        "EXECUTE gorm_many",
        "EXECUTE gorm_ignoring",
        "EXECUTE gorm_find('gorm.all')",
        "EXECUTE hibernate(gen_random_uuid(),'contact',1.5,'2026-01-02 03:04:05','{\"n\": 1}',gen_random_uuid(),'hibernate',
                           NULL,NULL,0,'pending',gen_random_uuid())"
            ,
        "EXECUTE hibernate_all(gen_random_uuid(),'contact','{}','hibernate.all')",
        "EXECUTE hibernate_keys(gen_random_uuid(),'contact','{}','hibernate.keys')",
        "EXECUTE hibernate_poll('pending',3)",
        "EXECUTE hibernate_update('{\"n\": 2}',1,'e','pending')"
            ,
        "EXECUTE hibernate_nextval",
    ];
    session
        .batch_execute(&format!(
            r#"PREPARE gorm_id (uuid,text,text,jsonb,text,int,text,timestamp,timestamp) AS {gorm} "id","event_id";
               PREPARE gorm_all (uuid,text,text,jsonb,text,int,text,timestamp,timestamp) AS {gorm} *;
               PREPARE gorm_many AS {columns} VALUES {values},{values},{values} RETURNING "id","event_id";
               PREPARE gorm_ignoring AS {columns} VALUES {values} ON CONFLICT DO NOTHING RETURNING "id";
               PREPARE gorm_find (text) AS SELECT * FROM "outbox_events" WHERE event_type = $1 ORDER BY "outbox_events"."id" LIMIT 1;
               PREPARE hibernate (uuid,varchar,numeric,timestamp,varchar,uuid,varchar,varchar,timestamp,int,varchar,uuid) AS {hibernate};
               PREPARE hibernate_all (uuid,varchar,varchar,varchar) AS {identity} *;
               PREPARE hibernate_keys (uuid,varchar,varchar,varchar) AS {identity} "id","seq";
               PREPARE hibernate_poll (varchar,int) AS select e1_0.id,e1_0.event_type from outbox_events e1_0 where e1_0.status=$1
                   order by e1_0.created_at fetch first $2 rows only for no key update skip locked;
               PREPARE hibernate_update (varchar,int,varchar,varchar) AS
                   update outbox_events set event_data=cast($1 as jsonb),retry_count=$2,last_error=$3,status=$4
                   where id=(select id from outbox_events where event_type='hibernate' order by id limit 1);
               PREPARE hibernate_nextval AS select nextval('outbox_events_seq_seq')"#
        ))
        .await?;
    // PostgreSQL keeps a plan from the sixth time on.
    let eight_times = async || -> Result<Vec<usize>> {
        let mut rows = Vec::new();
        for statement in (0..8).flat_map(|_| &ones) {
            let got = session.simple_query(statement).await.with_context(|| statement.to_owned())?;
            rows.push(got.iter().filter(|message| matches!(message, SimpleQueryMessage::Row(_))).count());
        }
        Ok(rows)
    };
    let before = eight_times().await?;
    adopt(&session, "'outbox_events'").await?;
    assert_eq!(eight_times().await?, before);
    let inserted = "SELECT count(*) FROM events.outbox_events WHERE event_type ~ '^(gorm|hibernate)'";
    assert_eq!(session.one::<i64>(inserted).await?, 2 * 8 * 9, "each is an event");
    release(&session, "outbox_events").await?;
    assert_eq!(eight_times().await?, before);
    Ok(())
}

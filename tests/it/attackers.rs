//! A role that may do everything to outbox_events (`GRANT ALL`, as frameworks and default privileges give it) must gain
//! nothing more by it: code that it attaches to the table runs as a role that can do little, or not at all.

use anyhow::{Context, Result};
use outbox_tests::cluster::Cluster;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;

const INSERT: &str = "INSERT INTO outbox_events (event_type, event_data) VALUES ('a', '{}')";

/// A server of its own, with the roles `app`, which has all on the table, and `relay`, both able to log in.
struct Scene {
    cluster: Cluster,
    database: String,
    admin: Session,
}

impl Scene {
    async fn start(settings: &[(&str, &str)]) -> Result<Scene> {
        let cluster = Cluster::with(settings).await?;
        let database = cluster.database().await?;
        let admin = cluster.connect(&database).await?;
        admin
            .batch_execute(
                "CREATE ROLE app LOGIN PASSWORD 'app'; CREATE ROLE relay LOGIN PASSWORD 'relay';
                 CREATE SCHEMA app AUTHORIZATION app; GRANT USAGE ON SCHEMA app TO PUBLIC;
                 GRANT ALL ON ALL TABLES IN SCHEMA public TO app;
                 SELECT outbox.grant_relay('relay'), outbox.grant_producer('app');",
            )
            .await?;
        Ok(Scene { cluster, database, admin })
    }

    async fn as_role(&self, role: &str) -> Result<Session> {
        Session::open(&self.cluster.url_as(role, role, &self.database)).await
    }

    /// The role `app`, after it has made the table `app.seen` and the trigger function `app.spy()`, which writes down as
    /// whom it runs.
    async fn spy(&self) -> Result<Session> {
        let app = self.as_role("app").await?;
        app.batch_execute(
            "CREATE TABLE app.seen (trigger text, operation text, who name, pid int);
             GRANT INSERT ON app.seen TO PUBLIC;
             CREATE FUNCTION app.spy() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 INSERT INTO app.seen VALUES (TG_NAME, TG_OP, current_user, pg_backend_pid());
                 RETURN coalesce(NEW, OLD);
             END $$",
        )
        .await?;
        Ok(app)
    }

    /// Runs the statement in a trigger of the application's within a claim of the relay's, and returns the SQLSTATE of its
    /// error, or null.
    async fn tried(&self, app: &Session, relay: &Session, statement: &str) -> Result<Option<String>> {
        app.batch_execute("DELETE FROM app.tried; DELETE FROM outbox_events").await?;
        app.execute("INSERT INTO app.tried (statement) VALUES ($1)", &[&statement]).await?;
        app.batch_execute(INSERT).await?;
        let claim = format!("in a claim: {statement}");
        relay.batch_execute("SELECT outbox.release(claim_token) FROM outbox.claim()").await.context(claim)?;
        app.one("SELECT nullif(min(outcome), 'done') FROM app.tried WHERE outcome IS NOT NULL").await
    }

    /// The role `app`, with a trigger that runs what `app.tried` says.
    async fn burglar(&self) -> Result<Session> {
        let app = self.as_role("app").await?;
        app.batch_execute(
            "CREATE TABLE app.tried (statement text, outcome text);
             GRANT SELECT, UPDATE ON app.tried TO PUBLIC;
             CREATE FUNCTION app.burgle() RETURNS trigger LANGUAGE plpgsql AS $$
             DECLARE
                 v_statement text := (SELECT statement FROM app.tried WHERE outcome IS NULL);
             BEGIN
                 IF v_statement IS NOT NULL THEN
                     BEGIN
                         EXECUTE v_statement;
                         UPDATE app.tried SET outcome = 'done';
                     EXCEPTION WHEN OTHERS THEN
                         UPDATE app.tried SET outcome = SQLSTATE;
                     END;
                 END IF;
                 RETURN NEW;
             END $$;
             CREATE TRIGGER burgle BEFORE UPDATE ON outbox_events FOR EACH ROW EXECUTE FUNCTION app.burgle();",
        )
        .await?;
        Ok(app)
    }
}

#[tokio::test]
async fn a_trigger_of_the_application_runs_as_nobody_more_than_the_owner_of_the_outbox() -> Result<()> {
    let scene = Scene::start(&[]).await?;
    let app = scene.spy().await?;
    for (when, level, events) in [
        ("before", "row", "INSERT OR UPDATE OR DELETE"),
        ("after", "row", "INSERT OR UPDATE OR DELETE"),
        ("before", "statement", "INSERT OR UPDATE OR DELETE OR TRUNCATE"),
        ("after", "statement", "INSERT OR UPDATE OR DELETE OR TRUNCATE"),
    ] {
        app.batch_execute(&format!(
            "CREATE TRIGGER {when}_{level} {when} {events} ON outbox_events FOR EACH {level} EXECUTE FUNCTION app.spy()"
        ))
        .await?;
    }
    let worker: i32 = scene.admin.one("SELECT worker_pid FROM outbox.stats()").await?;
    let relay = scene.as_role("relay").await?;
    for settle in [
        "outbox.ack(claim_token)",
        "outbox.fail(claim_token, id, 'no', '0')",
        "outbox.release(claim_token)",
        "outbox.settle(ARRAY[claim_token], ARRAY[id])",
        "outbox.reject(claim_token, id, 'no')",
    ] {
        app.batch_execute(INSERT).await?;
        relay.batch_execute(&format!("SELECT {settle} FROM outbox.claim()")).await.context(settle)?;
    }
    // What the worker does: an attached session that ends, a lease that ends, retention.
    app.batch_execute(INSERT).await?;
    relay.batch_execute("SELECT outbox.attach('me'); SELECT outbox.claim()").await?;
    drop(relay);
    scene.admin.until("SELECT processing = 0 FROM outbox.stats()", LONG).await?;
    scene.admin.batch_execute("SELECT outbox.claim(lease => '10 milliseconds')").await?;
    scene.admin.until("SELECT processing = 0 FROM outbox.stats()", LONG).await?;
    scene.admin.batch_execute("SELECT outbox.replay_failed(); SELECT outbox.purge_failed()").await?;
    scene.admin.batch_execute("ALTER SYSTEM SET outbox.retention = 0").await?;
    scene.admin.batch_execute("SELECT pg_reload_conf()").await?;
    let by_worker = |operation: &str| {
        format!(
            "SELECT count(*) > 0 FROM app.seen WHERE pid = {worker} AND operation = '{operation}' AND trigger = 'after_row'"
        )
    };
    scene.admin.until(&by_worker("UPDATE"), LONG).await?;
    scene.admin.until(&by_worker("DELETE"), LONG).await?;
    let who: String = scene
        .admin
        .one("SELECT string_agg(DISTINCT format('%s %s', operation, who), ', ' ORDER BY format('%s %s', operation, who)) FROM app.seen")
        .await?;
    assert_eq!(who, "DELETE outbox_owner, INSERT app, UPDATE outbox_owner");
    Ok(())
}

/// Before PostgreSQL 18 it would run at the commit, as the session's own role: the relay's, which reads secrets, or a
/// superuser's.
#[tokio::test]
async fn nothing_of_the_application_is_deferred_to_the_commit_of_a_relay_or_the_worker() -> Result<()> {
    let scene = Scene::start(&[]).await?;
    let app = scene.spy().await?;
    app.batch_execute(
        "CREATE TABLE app.other (n int); GRANT INSERT ON app.other TO PUBLIC;
         CREATE CONSTRAINT TRIGGER spy AFTER INSERT ON app.other DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION app.spy();
         CREATE FUNCTION app.touch() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN INSERT INTO app.other VALUES (1); RETURN coalesce(NEW, OLD); END $$;",
    )
    .await?;
    let relay = scene.as_role("relay").await?;
    for trigger in [
        "CREATE CONSTRAINT TRIGGER late AFTER UPDATE OR DELETE ON outbox_events DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW EXECUTE FUNCTION app.spy()",
        "CREATE TRIGGER late BEFORE UPDATE OR DELETE ON outbox_events FOR EACH ROW EXECUTE FUNCTION app.touch()",
    ] {
        app.batch_execute(INSERT).await?;
        relay.batch_execute("SELECT outbox.claim(lease => '300 milliseconds')").await?;
        app.batch_execute(INSERT).await?;
        app.batch_execute(trigger).await?;
        for session in [&relay, &scene.admin] {
            let error = session.batch_execute("SELECT outbox.claim()").await.expect_err(trigger);
            assert_eq!(error.code().map(|code| code.code()), Some("42501"), "{error:?}");
        }
        // The worker wants to release what the lease held.
        let due = "SELECT clock_timestamp() > max(lease_until) + interval '200 milliseconds' FROM outbox.claims";
        scene.admin.until(due, LONG).await?;
        let seen: Option<String> = scene.admin.one("SELECT string_agg(DISTINCT who, ', ') FROM app.seen").await?;
        assert_eq!(seen, None, "{trigger}");
        scene.admin.batch_execute("DROP TRIGGER late ON outbox_events").await?;
        scene.admin.until("SELECT processing = 0 AND pending > 0 FROM outbox.stats()", LONG).await?;
        relay.batch_execute("SELECT outbox.ack(claim_token) FROM outbox.claim()").await?;
    }
    Ok(())
}

#[tokio::test]
async fn code_in_a_trigger_can_neither_become_more_nor_change_what_others_call_nor_read_a_secret() -> Result<()> {
    let scene = Scene::start(&[]).await?;
    scene.admin.batch_execute("SELECT outbox.add_webhook('hook', 'https://example.com/')").await?;
    let relay = scene.as_role("relay").await?;
    let app = scene.burglar().await?;
    assert_eq!(scene.tried(&app, &relay, "SELECT 1").await?, None, "the test itself");
    for statement in [
        "SET ROLE postgres",
        "RESET ROLE",
        "SELECT set_config('role', 'postgres', false)",
        "SET SESSION AUTHORIZATION postgres",
        "RESET SESSION AUTHORIZATION",
        "SET session_replication_role = replica",
        "SET outbox.retention = 1",
        "ALTER SYSTEM SET outbox.retention = 1",
        "ALTER ROLE outbox_owner SUPERUSER",
        "ALTER ROLE outbox_owner LOGIN",
        "CREATE ROLE mine SUPERUSER",
        "GRANT outbox_owner TO app",
        "GRANT outbox_keeper TO app",
        "ALTER FUNCTION outbox.health() SECURITY INVOKER",
        "ALTER FUNCTION outbox.health() SET search_path = app",
        "ALTER FUNCTION outbox.claim(int, text[], interval) SET search_path = app",
        "ALTER FUNCTION outbox.claim(int, text[], interval) OWNER TO app",
        "ALTER FUNCTION outbox._lock() SET search_path = app",
        "CREATE OR REPLACE FUNCTION outbox.webhook_allow_networks() RETURNS text LANGUAGE sql AS $$ SELECT 'all' $$",
        "CREATE FUNCTION outbox.mine() RETURNS int LANGUAGE sql AS $$ SELECT 1 $$",
        "CREATE FUNCTION app.mine() RETURNS int LANGUAGE sql SECURITY DEFINER AS $$ SELECT 1 $$",
        "CREATE TRIGGER mine AFTER UPDATE ON outbox.delivery FOR EACH ROW EXECUTE FUNCTION app.burgle()",
        "CREATE RULE mine AS ON UPDATE TO outbox_events DO ALSO SELECT 1",
        "CREATE POLICY mine ON outbox_events",
        "ALTER TABLE outbox_events DISABLE TRIGGER ALL",
        "ALTER TABLE outbox_events OWNER TO app",
        "ALTER TABLE outbox.delivery ADD COLUMN mine int DEFAULT 1",
        "ALTER TABLE outbox.secret DISABLE ROW LEVEL SECURITY",
        "CREATE TABLE app.child () INHERITS (outbox_events)",
        "GRANT ALL ON outbox.claims TO app",
        "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA outbox TO app",
        "ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO app",
        "CREATE TEMP TABLE pg_class (oid oid)",
        "CREATE TEMP VIEW mine AS SELECT 1",
        "DECLARE mine CURSOR WITH HOLD FOR SELECT 1",
        "PREPARE mine AS SELECT 1",
        "LISTEN mine",
        "COPY (SELECT 1) TO PROGRAM 'true'",
        "SELECT pg_read_file('PG_VERSION')",
        "DO 'BEGIN EXECUTE ''ALTER FUNCTION outbox.health() SECURITY INVOKER''; END'",
        "SELECT query_to_xml('ALTER FUNCTION outbox.health() SECURITY INVOKER', true, true, '')",
        "SELECT secret FROM outbox.secret",
        "SELECT settings FROM outbox.hidden",
        "UPDATE outbox.hidden SET url = 'https://evil.example/'",
        "SELECT outbox.relay_destinations()",
        "SELECT outbox.rotate_secret('hook')",
        "SELECT outbox.add_webhook('hook', 'https://evil.example/')",
        "SELECT outbox.grant_relay('app')",
        "SELECT outbox._close()",
    ] {
        let error = scene.tried(&app, &relay, statement).await?;
        assert!(matches!(error.as_deref(), Some("42501" | "0A000")), "{statement}: {error:?}");
    }
    // What the owner of the table may change leads nowhere.
    let statement = "UPDATE outbox.destination SET url = 'https://evil.example/', settings = '{\"proxy\": \"evil\"}'";
    assert_eq!(scene.tried(&app, &relay, statement).await?, None);
    let told: String = relay.one("SELECT concat(url, settings) FROM outbox.relay_destinations()").await?;
    assert_eq!(told, "https://example.com/{}");
    Ok(())
}

#[tokio::test]
async fn a_setting_made_by_a_trigger_does_not_outlive_the_call_that_it_ran_in() -> Result<()> {
    let scene = Scene::start(&[]).await?;
    let (relay, app) = (scene.as_role("relay").await?, scene.burglar().await?);
    let settings =
        "SELECT concat_ws(' ', current_setting('search_path'), current_setting('standard_conforming_strings'),
                           current_setting('statement_timeout'), nullif(current_setting('mine.own', true), ''))";
    let before: String = relay.one(settings).await?;
    for statement in [
        "SET search_path = app, pg_catalog",
        "SET LOCAL search_path = app, pg_catalog",
        "SELECT set_config('search_path', 'app, pg_catalog', false)",
        "SET standard_conforming_strings = off",
        "SET statement_timeout = 1",
        "SELECT set_config('mine.own', 'x', false)",
    ] {
        assert_eq!(scene.tried(&app, &relay, statement).await?, None, "{statement}");
        assert_eq!(relay.one::<String>(settings).await?, before, "{statement}");
    }
    Ok(())
}

/// The check of a foreign key runs as the owner of the table that is pointed to, with casts of the one that points.
#[tokio::test]
async fn a_foreign_key_with_a_cast_of_its_own_runs_as_nobody_more_than_the_owner_of_the_outbox() -> Result<()> {
    let scene = Scene::start(&[]).await?;
    let app = scene.spy().await?;
    app.batch_execute(&format!(
        "CREATE TYPE app.mine AS (id uuid);
         CREATE FUNCTION app.cast(app.mine) RETURNS uuid LANGUAGE plpgsql AS $$
             BEGIN
                 INSERT INTO app.seen VALUES ('cast', 'CHECK', current_user, pg_backend_pid());
                 RETURN $1.id;
             END $$;
         CREATE CAST (app.mine AS uuid) WITH FUNCTION app.cast(app.mine) AS IMPLICIT;
         CREATE TABLE app.child (event app.mine REFERENCES outbox_events (event_id));
         {INSERT};
         INSERT INTO app.child SELECT row(event_id)::app.mine FROM outbox_events;"
    ))
    .await?;
    let who: String = app.one("SELECT string_agg(DISTINCT who, ', ') FROM app.seen").await?;
    assert_eq!(who, "outbox_owner");
    Ok(())
}

/// Django makes all foreign keys so.
#[tokio::test]
async fn a_foreign_key_that_is_checked_at_the_commit_stops_neither_retention_nor_a_purge() -> Result<()> {
    let scene = Scene::start(&[("outbox.retention", "0")]).await?;
    let app = scene.as_role("app").await?;
    app.batch_execute("CREATE TABLE app.child (event bigint REFERENCES outbox_events DEFERRABLE INITIALLY DEFERRED)")
        .await?;
    app.batch_execute(INSERT).await?;
    scene.admin.batch_execute("SELECT outbox.reject(claim_token, id, 'no') FROM outbox.claim()").await?;
    assert_eq!(scene.admin.one::<i64>("SELECT outbox.purge_failed()").await?, 1);
    app.batch_execute(INSERT).await?;
    scene.admin.batch_execute("SELECT outbox.ack(claim_token) FROM outbox.claim()").await?;
    scene.admin.until("SELECT count(*) = 0 FROM outbox_events", LONG).await?;
    Ok(())
}

#[tokio::test]
async fn health_names_what_others_attached_to_the_tables() -> Result<()> {
    let scene = Scene::start(&[]).await?;
    let check = "SELECT format('%s %s', ok, detail) FROM outbox.health() WHERE check_name = 'foreign_objects'";
    let app = scene.spy().await?;
    assert_eq!(scene.admin.one::<String>(check).await?, "t none");
    app.batch_execute("CREATE TABLE app.child (event uuid REFERENCES outbox_events (event_id))").await?;
    assert_eq!(scene.admin.one::<String>(check).await?, "t foreign key child_event_fkey of app.child");
    app.batch_execute("DROP TABLE app.child").await?;
    for (session, make, undo, says) in [
        (
            &app,
            "CREATE TRIGGER mine BEFORE UPDATE ON outbox_events FOR EACH ROW EXECUTE FUNCTION app.spy()",
            "DROP TRIGGER mine ON outbox_events",
            "trigger mine on public.outbox_events (function app.spy() of app)",
        ),
        (
            &app,
            "CREATE CONSTRAINT TRIGGER mine AFTER UPDATE ON outbox_events INITIALLY DEFERRED
                 FOR EACH ROW EXECUTE FUNCTION app.spy()",
            "DROP TRIGGER mine ON outbox_events",
            "deferrable trigger mine on public.outbox_events (function app.spy() of app)",
        ),
        (
            &scene.admin,
            "CREATE RULE mine AS ON INSERT TO outbox_events DO ALSO NOTIFY mine",
            "DROP RULE mine ON outbox_events",
            "rule mine on public.outbox_events",
        ),
        (
            &scene.admin,
            "CREATE POLICY mine ON outbox_events",
            "DROP POLICY mine ON outbox_events",
            "policy mine on public.outbox_events",
        ),
        (
            &scene.admin,
            "ALTER TABLE outbox_events ENABLE ROW LEVEL SECURITY",
            "ALTER TABLE outbox_events DISABLE ROW LEVEL SECURITY",
            "row security of public.outbox_events",
        ),
        (
            &scene.admin,
            "ALTER TABLE outbox.secret DISABLE ROW LEVEL SECURITY",
            "ALTER TABLE outbox.secret ENABLE ROW LEVEL SECURITY",
            "row security of outbox.secret",
        ),
        (
            &scene.admin,
            "CREATE TABLE app.child () INHERITS (outbox_events)",
            "DROP TABLE app.child",
            "app.child inherits from public.outbox_events",
        ),
        (
            &scene.admin,
            "ALTER TABLE outbox_events ADD CONSTRAINT mine UNIQUE (id, event_id) DEFERRABLE",
            "ALTER TABLE outbox_events DROP CONSTRAINT mine",
            "deferrable constraint mine on public.outbox_events",
        ),
    ] {
        session.batch_execute(make).await.context(make)?;
        assert_eq!(scene.admin.one::<String>(check).await?, format!("f {says}"), "{make}");
        scene.admin.batch_execute(undo).await.context(undo)?;
    }
    assert_eq!(scene.admin.one::<String>(check).await?, "t none");
    Ok(())
}

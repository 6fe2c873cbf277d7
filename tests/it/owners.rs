//! Who owns the extension's objects, and who reads secrets: nobody by accident.

use anyhow::{Context, Result};
use outbox_tests::cluster::Cluster;
use outbox_tests::process::run;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;

const HOOK: &str = r#"SELECT outbox.add_webhook('hook', 'https://example.com/?token=hidden-query',
                             settings => '{"headers": {"authorization": "hidden-header"}}')"#;

/// Those who have a right to an object of the extension that is not theirs.
const STRANGERS: &str = "SELECT string_agg(DISTINCT format('%s: %s', m.identity, coalesce(r.rolname, 'PUBLIC')), ', ')
      FROM outbox._members() m CROSS JOIN LATERAL aclexplode(m.acl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
     WHERE a.grantee <> m.owner AND r.rolname IS DISTINCT FROM 'outbox_owner' AND r.rolname IS DISTINCT FROM 'outbox_keeper'";

async fn refused(session: &Session, statement: &str) -> Result<()> {
    let error = session.batch_execute(statement).await.expect_err(statement);
    assert_eq!(error.code().map(|code| code.code()), Some("42501"), "{statement}: {error:?}");
    Ok(())
}

#[tokio::test]
async fn no_code_of_the_extension_runs_as_superuser() -> Result<()> {
    let cluster = Cluster::shared().await?;
    let session = cluster.connect(&cluster.database().await?).await?;
    let superusers: Option<String> = session
        .one(
            "SELECT string_agg(m.identity, ', ') FROM outbox._members() m JOIN pg_roles r ON r.oid = m.owner
              WHERE r.rolsuper AND (m.definer OR m.kind IN ('table', 'view', 'sequence'))",
        )
        .await?;
    assert_eq!(superusers, None);
    let unguarded: Option<String> = session
        .one("SELECT string_agg(m.identity, ', ') FROM outbox._members() m WHERE m.guardable AND m.identity NOT LIKE 'outbox.publish(%'")
        .await?;
    assert_eq!(unguarded, None, "SECURITY DEFINER in PL/pgSQL without a guard");
    let volatile: Option<String> = session
        .one(
            "SELECT string_agg(m.identity, ', ') FROM outbox._members() m JOIN pg_proc p ON p.oid = m.object
               JOIN pg_language l ON l.oid = p.prolang
              WHERE m.kind = 'function' AND m.definer AND l.lanname NOT IN ('outbox_plpgsql', 'plpgsql') AND p.provolatile = 'v'",
        )
        .await?;
    assert_eq!(volatile, None, "SECURITY DEFINER that writes, and can't be guarded");
    Ok(())
}

#[tokio::test]
async fn default_privileges_open_nothing_of_the_extension() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.empty_database().await?;
    let session = cluster.connect(&database).await?;
    session.batch_execute("CREATE ROLE curious; CREATE SCHEMA events; GRANT ALL ON SCHEMA events TO curious").await?;
    for (scope, kinds) in [
        ("", &["TABLES", "SEQUENCES", "FUNCTIONS", "TYPES", "SCHEMAS"][..]),
        ("IN SCHEMA events", &["TABLES", "FUNCTIONS"]),
    ] {
        for kind in kinds {
            let grant = format!("ALTER DEFAULT PRIVILEGES {scope} GRANT ALL ON {kind} TO curious, PUBLIC");
            session.batch_execute(&grant).await?;
        }
    }
    session.batch_execute("CREATE EXTENSION pg_outbox SCHEMA events").await?;
    session.batch_execute(HOOK).await?;
    assert_eq!(session.one::<Option<String>>(STRANGERS).await?, None);
    session
        .batch_execute("SELECT outbox.grant_producer('curious'), outbox.grant_monitor('curious'); SET ROLE curious")
        .await?;
    for statement in [
        "SELECT * FROM outbox.secret",
        "SELECT * FROM outbox.hidden",
        "SELECT * FROM outbox.destination",
        "SELECT * FROM outbox.claims",
        "SELECT event_data FROM events.outbox_events",
        "UPDATE events.outbox_events SET status = 'processed'",
        "SELECT outbox.relay_destinations()",
        "SELECT outbox.claim()",
        "SELECT outbox._due()",
        "SELECT outbox._wake('due')",
        "SELECT nextval('outbox.claim_token_seq')",
        "CREATE TABLE outbox.mine ()",
    ] {
        refused(&session, statement).await?;
    }
    Ok(())
}

/// An upgrade's new objects are closed, and what was granted on the others stays; also after pg_upgrade, which keeps no
/// initial privileges that are PostgreSQL's own defaults.
#[tokio::test]
async fn what_a_script_adds_later_is_closed_and_what_was_granted_stays() -> Result<()> {
    let cluster = Cluster::start().await?;
    let session = cluster.connect(&cluster.database().await?).await?;
    session
        .batch_execute(
            "CREATE ROLE relay; SELECT outbox.grant_relay('relay'); CREATE ROLE app; SELECT outbox.grant_producer('app');
             DELETE FROM pg_init_privs WHERE classoid = 'pg_class'::regclass;
             ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO PUBLIC; ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO PUBLIC;
             BEGIN;
             CREATE FUNCTION outbox.added() RETURNS int LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
                 AS 'BEGIN RETURN 1; END';
             CREATE TABLE outbox.added (n int);
             ALTER EXTENSION pg_outbox ADD FUNCTION outbox.added(); ALTER EXTENSION pg_outbox ADD TABLE outbox.added;
             DELETE FROM pg_init_privs WHERE objoid IN ('outbox.added()'::regprocedure, 'outbox.added'::regclass);
             SELECT outbox._close(); COMMIT;",
        )
        .await?;
    let added: String = session
        .one("SELECT string_agg(format('%s %s %s', kind, owner::regrole, replace(acl::text, 'xtm/', 'xt/')), ', ' ORDER BY kind)
               FROM outbox._members() WHERE identity LIKE 'outbox.added%' AND kind <> 'type'")
        .await?;
    assert_eq!(
        added,
        "function outbox_owner {outbox_owner=X/outbox_owner}, table outbox_owner {outbox_owner=arwdDxt/outbox_owner}"
    );
    session.batch_execute("SET ROLE relay; SELECT outbox.claim(); RESET ROLE; SET ROLE app").await?;
    session.batch_execute("INSERT INTO outbox_events (event_type, event_data) VALUES ('a', '{}')").await?;
    Ok(())
}

#[tokio::test]
async fn a_role_that_reads_all_data_reads_no_secret() -> Result<()> {
    let cluster = Cluster::start().await?;
    let session = cluster.connect(&cluster.database().await?).await?;
    session.batch_execute("CREATE ROLE reader; CREATE ROLE writer; GRANT pg_read_all_data TO reader").await?;
    session.batch_execute("GRANT pg_read_all_data, pg_write_all_data TO writer").await?;
    let secret: String = session.one(HOOK).await?;
    session.batch_execute("SELECT outbox.publish('a', '{}'); SET ROLE reader").await?;
    assert_eq!(session.one::<i64>("SELECT count(*) FROM outbox_events").await?, 1);
    let mut all = String::new();
    let tables = "SELECT c.oid::regclass::text FROM pg_class c WHERE c.relnamespace = 'outbox'::regnamespace AND c.relkind IN ('r', 'v')";
    for row in session.query(tables, &[]).await? {
        let table: String = row.get(0);
        let rows: Option<String> = session.one(&format!("SELECT string_agg(x::text, ' ') FROM {table} x")).await?;
        all += &rows.unwrap_or_default();
    }
    assert!(all.contains("https://example.com/?…"), "{all}");
    assert!(!all.contains(&secret) && !all.contains("hidden-"), "{all}");
    refused(&session, "SELECT outbox.relay_destinations()").await?;
    // Nor does one that writes all data send a token elsewhere.
    session
        .batch_execute(
            "SET ROLE writer; UPDATE outbox.hidden SET url = 'https://evil.example/';
             UPDATE outbox.destination SET url = 'https://evil.example/'; RESET ROLE",
        )
        .await?;
    let url: String = session.one("SELECT url FROM outbox.relay_destinations()").await?;
    assert_eq!(url, "https://example.com/?token=hidden-query");
    Ok(())
}

#[tokio::test]
async fn a_superusers_dump_holds_secrets_and_grants_and_another_role_gets_an_error_not_a_part() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    let session = cluster.connect(&database).await?;
    session
        .batch_execute(
            "CREATE ROLE reader LOGIN PASSWORD 'reader'; GRANT pg_read_all_data TO reader; CREATE ROLE relay",
        )
        .await?;
    // Privileges of the schema of the events are to be dumped although the extension grants one itself.
    session.batch_execute("REVOKE ALL ON SCHEMA public FROM PUBLIC; GRANT USAGE ON SCHEMA public TO relay").await?;
    session.batch_execute(HOOK).await?;
    session.batch_execute("SELECT outbox.grant_relay('relay')").await?;
    let path = cluster.dir().join("all.dump");
    let path = path.to_str().context("a path in UTF-8")?;
    let mut dump = cluster.client("pg_dump")?;
    dump.args(["--format=custom", "--file", path, &cluster.url(&database)]);
    run(dump)?;
    let copy = cluster.empty_database().await?;
    let mut restore = cluster.client("pg_restore")?;
    restore.args(["--exit-on-error", "--dbname", &cluster.url(&copy), path]);
    run(restore)?;
    let restored = cluster.connect(&copy).await?;
    let all = "SELECT string_agg(d::text, ' ') FROM outbox.relay_destinations() d";
    assert_eq!(restored.one::<String>(all).await?, session.one::<String>(all).await?);
    let schema = "SELECT nspacl::text FROM pg_namespace WHERE nspname = 'public'";
    assert_eq!(restored.one::<String>(schema).await?, session.one::<String>(schema).await?);
    assert_eq!(
        restored
            .one::<Option<String>>(
                "SELECT nullif(string_agg(m.identity, ', '), '') FROM outbox._members() m WHERE NOT m.closed"
            )
            .await?,
        None
    );
    restored.batch_execute("SELECT outbox.publish('a', '{}'); SET ROLE relay").await?;
    restored.until("SELECT count(*) = 1 FROM outbox.claim()", LONG).await?;

    let mut dump = cluster.client("pg_dump")?;
    dump.args(["--file", path, &cluster.url_as("reader", "reader", &database)]);
    let error = run(dump).expect_err("a dump without the secrets").to_string();
    assert!(error.contains("row-level security"), "{error}");
    let mut dump = cluster.client("pg_dump")?;
    dump.args(["--exclude-table-data=outbox.secret", "--exclude-table-data=outbox.hidden", "--file", path]);
    dump.arg(cluster.url_as("reader", "reader", &database));
    run(dump)?;
    session.batch_execute("ALTER ROLE reader BYPASSRLS").await?;
    let mut dump = cluster.client("pg_dump")?;
    dump.args(["--file", path, &cluster.url_as("reader", "reader", &database)]);
    run(dump)?;
    assert!(std::fs::read_to_string(path)?.contains("hidden-header"));
    Ok(())
}

#[tokio::test]
async fn the_outbox_works_where_public_has_no_right_to_the_schema_of_the_events() -> Result<()> {
    let cluster = Cluster::start().await?;
    let session = cluster.connect(&cluster.empty_database().await?).await?;
    session
        .batch_execute(
            "CREATE ROLE relay; CREATE ROLE producer; REVOKE ALL ON SCHEMA public FROM PUBLIC;
             CREATE EXTENSION pg_outbox; SELECT outbox.grant_relay('relay'), outbox.grant_producer('producer');
             SET ROLE producer; SELECT outbox.publish('a', '{}');
             SET ROLE relay",
        )
        .await?;
    session.until("SELECT count(*) = 1 FROM outbox.claim(lease => '10 milliseconds')", LONG).await?;
    session.until("SELECT pending = 1 FROM outbox.stats()", LONG).await?;
    Ok(())
}

/// Whoever may create roles could make them first, and use what they will own.
#[tokio::test]
async fn the_extension_refuses_an_owner_whom_somebody_can_become() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.empty_database().await?;
    let session = cluster.connect(&database).await?;
    session.batch_execute("CREATE ROLE helper CREATEROLE; CREATE ROLE mine; CREATE ROLE boss").await?;
    for role in ["outbox_owner", "outbox_keeper"] {
        for (make, why) in [
            (format!("CREATE ROLE {role} LOGIN"), "may log in"),
            (format!("CREATE ROLE {role} SUPERUSER"), "is a superuser"),
            (format!("CREATE ROLE {role} BYPASSRLS"), "BYPASSRLS"),
            (format!("CREATE ROLE {role} CREATEROLE"), "CREATEROLE"),
            (format!("CREATE ROLE {role} IN ROLE boss"), "is a member of boss"),
            (format!("SET ROLE helper; CREATE ROLE {role}; GRANT {role} TO mine; RESET ROLE"), "for a member"),
            (format!("CREATE ROLE {role} ADMIN mine"), "has mine for a member"),
        ] {
            session.batch_execute(&make).await?;
            let error = session.batch_execute("CREATE EXTENSION pg_outbox").await.expect_err(&make);
            let error = error.as_db_error().context("an error of the server")?;
            assert_eq!(error.code().code(), "55000", "{make}: {error}");
            assert!(error.message().contains(role) && error.message().contains(why), "{make}: {error}");
            assert!(error.hint().is_some_and(|hint| hint.contains("NOLOGIN")), "{make}");
            session.batch_execute(&format!("DROP ROLE {role}")).await?;
        }
    }
    // What is as the extension would have made it is taken, with members that a superuser made.
    session.batch_execute("CREATE ROLE outbox_owner; GRANT outbox_owner TO mine; CREATE EXTENSION pg_outbox").await?;
    session.batch_execute("DROP EXTENSION pg_outbox; CREATE EXTENSION pg_outbox").await?;
    // They go when nothing is theirs any more.
    session.batch_execute("DROP EXTENSION pg_outbox; DROP OWNED BY outbox_owner, outbox_keeper").await?;
    session.batch_execute("DROP ROLE outbox_owner, outbox_keeper").await?;
    Ok(())
}

#[tokio::test]
async fn an_operator_changes_destinations_and_sees_no_secret_of_others() -> Result<()> {
    let cluster = Cluster::start().await?;
    let session = cluster.connect(&cluster.database().await?).await?;
    let secret: String = session.one(HOOK).await?;
    session.batch_execute("CREATE ROLE ops; SELECT outbox.grant_operator('ops'); CREATE ROLE orm").await?;
    session.batch_execute("SELECT outbox.grant_producer('orm', may_read => true); SET ROLE ops").await?;
    let same: Option<String> = session.one("SELECT outbox.add_webhook('hook', 'https://example.com/other')").await?;
    assert_eq!(same, None, "a secret that somebody else made");
    let own: String = session.one("SELECT outbox.add_webhook('own', 'https://example.com/')").await?;
    assert!(own.starts_with("whsec_"));
    session
        .batch_execute(
            "SELECT outbox.add_rabbitmq('rabbit'); SELECT outbox.pause('hook'); SELECT outbox.resume('hook');
             SELECT outbox.remove_destination('rabbit'); SELECT outbox.replay_failed(); SELECT outbox.purge_failed();
             SELECT * FROM outbox.destinations; SELECT * FROM outbox.deliveries; SELECT * FROM outbox.health();",
        )
        .await?;
    let rotated: String = session.one("SELECT outbox.rotate_secret('hook', '0')").await?;
    assert_ne!(rotated, secret);
    for statement in
        ["SELECT outbox.relay_destinations()", "SELECT * FROM outbox.secret", "SELECT outbox.grant_relay('ops')"]
    {
        refused(&session, statement).await?;
    }
    session
        .batch_execute(
            "SET ROLE orm; INSERT INTO outbox_events (event_type, event_data) VALUES ('a', '{}') RETURNING *",
        )
        .await?;
    session.batch_execute("SELECT * FROM outbox_events").await?;
    refused(&session, "UPDATE outbox_events SET status = 'processed'").await?;
    Ok(())
}

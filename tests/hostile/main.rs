//! Random statements of the roles that others log in with: whatever a producer, a consumer or an operator says, no process of
//! the server ends, no error is an internal one, and nobody may more afterwards or has seen a secret.
//!
//! `OUTBOX_HOSTILE_SECONDS` makes it longer, `OUTBOX_HOSTILE_SEED` repeats what it printed, as far as timing allows.

mod patterns;
mod peers;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use outbox_tests::cluster::Cluster;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use tokio_postgres::SimpleQueryMessage;

/// SplitMix64: enough to choose with.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides as u64) as usize
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.roll(of.len())]
    }
}

const TEXTS: &[&str] = &[
    "''",
    "'hook'",
    "'queue'",
    "'*'",
    "'a'",
    "'outbox.event.dead'",
    "'outbox.test'",
    "NULL",
    "'%'",
    "E'\\\\'",
    "'_'",
    "'a*b*c'",
    "repeat('x', 300)",
    "repeat('ä', 70000)",
    "'😀'",
    "E'\\x01\\x1f'",
    "'https://example.com/'",
    "'http://127.0.0.1/'",
    "'ftp://x'",
    "'https://u:p@example.com:99999/'",
    "'{event_type}'",
    "'{'",
    "'{}}{'",
    "'whsec_AAAA'",
    "'; DROP TABLE x --'",
    "'$1'",
    "'%s%I%L'",
    "'outbox'",
    "'public'",
    "'postgres'",
    "'infinity'",
    "'-1'",
    "'null'",
    "repeat('*', 2000)",
    "chr(65533)",
    "E'a\\nb'",
    "'amq.gen'",
    "repeat('{tenant_id}', 500)",
];

const JSON: &[&str] = &[
    "'{}'",
    "'[]'",
    "'null'",
    "'1e400'",
    "'\"x\"'",
    "'[null]'",
    "'{\"a\":null}'",
    "'[{}]'",
    "'[1]'",
    "'[{\"token\":1,\"id\":1,\"destination\":\"hook\",\"outcome\":\"failed\"}]'",
    "'[{\"token\":9e99,\"id\":\"x\",\"outcome\":7}]'",
    "'[{\"token\":null,\"id\":null,\"outcome\":null}]'",
    "'[{\"token\":1,\"id\":1,\"outcome\":\"failed\",\"retry_in\":1e308}]'",
    "'{\"url\":null}'",
    "'{\"url\":\"https://example.com/x\"}'",
    "'{\"event_types\":[]}'",
    "'{\"event_types\":[null]}'",
    "'{\"event_types\":[\"*\",\"*\"]}'",
    "'{\"settings\":{\"max_attempts\":-1}}'",
    "'{\"settings\":null}'",
    "'{\"settings\":{\"schedule\":[\"-5 s\"]}}'",
    "'{\"settings\":{\"schedule\":[\"999999999 years\"]}}'",
    "'{\"filter\":\"$.a ? (@.b > \"}'",
    "'{\"filter\":\"$x\"}'",
    "'{\"tenant_id\":\"t\"}'",
    "'{\"unknown\":1}'",
    "'{\"max_attempts\":99999999999999999999}'",
    "'{\"on_failure\":\"block\"}'",
    "'{\"give_up_after\":\"-1 s\"}'",
    "'{\"disable_after\":\"1e9 years\"}'",
    "'{\"source\":\"\\u0001\"}'",
    "'{\"signature\":\"hex\",\"signature_prefix\":null}'",
    "'{\"headers\":{\"a\\nb\":\"c\"}}'",
    "'{\"format\":\"cloudevents\"}'",
    "'{\"timeout\":\"0 s\"}'",
    "'{\"concurrency\":0}'",
    "('[' || repeat('[', 500) || repeat(']', 500) || ']')::jsonb",
    "jsonb_build_object('big', repeat('x', 900000))",
    "'{\"traceparent\":\"00-zz-1-1\"}'",
    "'{\"traceparent\":1}'",
    "'\"\\ud83d\\ude00\"'",
];

const NUMBERS: &[&str] = &["0", "1", "-1", "2", "7", "NULL", "2147483647", "-2147483648", "100", "1000000"];
const LARGE: &[&str] =
    &["0", "1", "2", "3", "-1", "NULL", "9223372036854775807", "'-9223372036854775808'::bigint", "4611686018427387904"];
const INTERVALS: &[&str] = &[
    "'0'",
    "'1 s'",
    "'-1 s'",
    "NULL",
    "'178000000 years'",
    "'-178000000 years'",
    "'1 microsecond'",
    "'1 mon -1 day'",
    "'1 hour'",
];
const MOMENTS: &[&str] = &[
    "now()",
    "'infinity'",
    "'-infinity'",
    "NULL",
    "'4713-01-01 BC'",
    "'294276-12-31'",
    "'2000-01-01'",
    "now() + '1 s'",
];
const PATHS: &[&str] =
    &["'$'", "'$.a'", "'$.a ? (@ > 1)'", "'strict $.a.b'", "'$x'", "NULL", "'$.**'", "'1/0'", "'$.a.datetime()'"];

const NAMES: &[&str] = &[
    "outbox.notify_payload",
    "outbox.retention",
    "outbox.inbox_retention",
    "outbox.traceparent",
    "outbox.nonsense",
    "search_path",
    "role",
    "session_authorization",
    "statement_timeout",
    "lock_timeout",
    "default_transaction_isolation",
    "client_encoding",
    "timezone",
    "datestyle",
    "intervalstyle",
    "session_preload_libraries",
    "plan_cache_mode",
    "default_transaction_read_only",
    "check_function_bodies",
    "row_security",
    "bytea_output",
    "extra_float_digits",
];
const SETTINGS: &[&str] = &[
    "'full'",
    "'id'",
    "''",
    "'metadata'",
    "'0'",
    "'-1'",
    "'1 day'",
    "'postgres'",
    "'outbox_owner'",
    "'outbox_keeper'",
    "'pg_temp, outbox, public'",
    "'serializable'",
    "'repeatable read'",
    "'on'",
    "'LATIN1'",
    "'SQL_ASCII'",
    "'UTF8'",
    "'Mars/Phobos'",
    "'00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'",
    "repeat('x', 9)",
    "DEFAULT",
    "'infinity'",
    "'force_custom_plan'",
];

/// A value of that type, often an unlikely one.
fn value(dice: &mut Dice, of: &str) -> String {
    let list = |dice: &mut Dice, from: &[&str], of: &str| {
        let values: Vec<&str> = (0..dice.roll(4)).map(|_| dice.pick(from)).collect();
        if dice.roll(8) == 0 { format!("NULL::{of}") } else { format!("ARRAY[{}]::{of}", values.join(", ")) }
    };
    match of {
        "text[]" => list(dice, TEXTS, of),
        "bigint[]" => list(dice, LARGE, of),
        "text" | "name" => dice.pick(TEXTS).to_owned(),
        "jsonb" => format!("({})::jsonb", dice.pick(JSON)),
        "integer" => dice.pick(NUMBERS).to_owned(),
        "bigint" => dice.pick(LARGE).to_owned(),
        "interval" => format!("({})::interval", dice.pick(INTERVALS)),
        "timestamp with time zone" => format!("({})::timestamptz", dice.pick(MOMENTS)),
        "uuid" if dice.roll(2) == 0 => "gen_random_uuid()".to_owned(),
        "uuid" => "'00000000-0000-0000-0000-000000000000'::uuid".to_owned(),
        "boolean" => dice.pick(&["true", "false", "NULL"]).to_owned(),
        "jsonpath" => format!("({})::jsonpath", dice.pick(PATHS)),
        other => format!("NULL::{other}"),
    }
}

struct Function {
    name: String,
    /// Name and type of each argument, and how many must be given.
    arguments: Vec<(String, String)>,
    required: usize,
}

/// The functions that a role may execute.
async fn functions(admin: &Session, role: &str) -> Result<Vec<Function>> {
    let rows = admin
        .query(
            "SELECT p.proname::text, coalesce(p.proargnames[1:p.pronargs], '{}')::text[],
                    ARRAY(SELECT format_type(t.oid, NULL) FROM unnest(p.proargtypes) WITH ORDINALITY AS t (oid, n) ORDER BY n),
                    (p.pronargs - p.pronargdefaults)::int
               FROM pg_proc p
              WHERE p.pronamespace = 'outbox'::regnamespace AND p.prorettype <> 'trigger'::regtype
                AND has_function_privilege($1::text::name, p.oid, 'EXECUTE') ORDER BY p.oid::regprocedure::text",
            &[&role],
        )
        .await?;
    let function = |row: &tokio_postgres::Row| Function {
        name: row.get(0),
        arguments: row.get::<_, Vec<String>>(1).into_iter().zip(row.get::<_, Vec<String>>(2)).collect(),
        required: row.get::<_, i32>(3) as usize,
    };
    Ok(rows.iter().map(function).collect())
}

fn call(dice: &mut Dice, functions: &[Function]) -> String {
    let function = &functions[dice.roll(functions.len())];
    let mut arguments = Vec::new();
    for (n, (name, of)) in function.arguments.iter().enumerate() {
        if n < function.required || dice.roll(2) == 0 {
            arguments.push(format!("{name} => {}", value(dice, of)));
        }
    }
    format!("SELECT * FROM outbox.{}({})", function.name, arguments.join(", "))
}

const COLUMNS: &[(&str, &str)] = &[
    ("event_id", "uuid"),
    ("event_version", "text"),
    ("aggregate_type", "text"),
    ("aggregate_id", "text"),
    ("tenant_id", "text"),
    ("metadata", "jsonb"),
    ("created_at", "timestamp with time zone"),
    ("available_at", "timestamp with time zone"),
    ("id", "bigint"),
    ("status", "text"),
    ("retry_count", "integer"),
    ("claim_token", "bigint"),
    ("listed", "boolean"),
];

fn insert(dice: &mut Dice) -> String {
    let mut columns = vec!["event_type", "event_data"];
    let mut values = vec![value(dice, "text"), value(dice, "jsonb")];
    // Mostly those that a producer may name.
    let known = if dice.roll(4) == 0 { COLUMNS.len() } else { 8 };
    for (column, of) in &COLUMNS[..known] {
        if dice.roll(3) == 0 {
            columns.push(column);
            values.push(value(dice, of));
        }
    }
    let end = dice.pick(&["", "", " RETURNING id, event_id", " ON CONFLICT DO NOTHING", " RETURNING *"]);
    let rows = [1, 1, 1, 40][dice.roll(4)];
    format!(
        "INSERT INTO outbox_events ({}) SELECT {} FROM generate_series(1, {rows}){end}",
        columns.join(", "),
        values.join(", ")
    )
}

fn statement(dice: &mut Dice, functions: &[Function]) -> String {
    match dice.roll(20) {
        0..9 => call(dice, functions),
        9..14 => insert(dice),
        14 => format!("SET {} = {}", dice.pick(NAMES), dice.pick(SETTINGS)),
        15 => dice
            .pick(&[
                "BEGIN",
                "COMMIT",
                "ROLLBACK",
                "SAVEPOINT a",
                "ROLLBACK TO a",
                "RELEASE a",
                "DISCARD ALL",
                "RESET ALL",
            ])
            .to_owned(),
        16 => {
            let table = dice.pick(&[
                "secret",
                "hidden",
                "destination",
                "delivery",
                "claims",
                "inbox",
                "claim_lock",
                "deliveries",
                "interest",
            ]);
            format!(
                "{} outbox.{table}",
                dice.pick(&["SELECT * FROM", "DELETE FROM", "LOCK TABLE", "TRUNCATE", "DROP TABLE", "ANALYZE"])
            )
        }
        17 => dice
            .pick(&[
                "UPDATE outbox_events SET status = 'processed'",
                "DELETE FROM outbox_events",
                "TRUNCATE outbox_events",
                "SELECT * FROM outbox_events LIMIT 3",
                "COPY outbox_events (event_type, event_data) TO STDOUT",
                "SELECT id FROM outbox_events ORDER BY id DESC LIMIT 3 FOR UPDATE",
                "ALTER TABLE outbox_events DISABLE TRIGGER ALL",
                "CREATE TRIGGER x BEFORE INSERT ON outbox_events FOR EACH ROW EXECUTE FUNCTION notify_outbox_event()",
                "ALTER EXTENSION pg_outbox DROP TABLE outbox_events",
                "DROP EXTENSION pg_outbox",
                "SET ROLE outbox_keeper",
                "SET ROLE outbox_owner",
                "SET SESSION AUTHORIZATION postgres",
                "CREATE FUNCTION outbox.evil() RETURNS int LANGUAGE sql AS 'SELECT 1'",
                "CREATE TEMP TABLE outbox_events (event_type text, event_data jsonb)",
                "CREATE TEMP VIEW destination AS SELECT 1",
            ])
            .to_owned(),
        18 => {
            let payload = dice.pick(&[
                "''",
                "'test-payload'",
                "'{'",
                "'{\"v\":1,\"events\":[{\"id\":-1}]}'",
                "repeat('x', 7999)",
                "'{\"v\":2}'",
            ]);
            format!("SELECT pg_notify({}, {payload})", dice.pick(&["'outbox_events'", "'outbox_destinations'"]))
        }
        // Functions that nobody may call, and the trigger as if it were one.
        _ => dice
            .pick(&[
                "SELECT outbox._lock()",
                "SELECT outbox._recover(true)",
                "SELECT outbox._release(NULL)",
                "SELECT outbox._set_water(1, 1)",
                "SELECT outbox._low_water(true)",
                "SELECT outbox._count_begin()",
                "SELECT outbox.grant_operator('producer')",
                "SELECT outbox.adopt('pg_class')",
                "SELECT notify_outbox_event()",
                "SELECT outbox._attach('x')",
                "SELECT outbox._recovered(1,1,1,1,1,1,1)",
                "SELECT outbox._retain(0, 100)",
                "SELECT outbox._due()",
            ])
            .to_owned(),
    }
}

/// What a role may do, as one text.
async fn rights(admin: &Session, role: &str) -> Result<String> {
    let query = format!(
        "SELECT concat_ws(E'\\n', r.rolsuper, r.rolcreaterole, r.rolcreatedb, r.rolbypassrls, r.rolreplication,
             (SELECT string_agg(m.roleid::regrole::text, ',' ORDER BY 1) FROM pg_auth_members m WHERE m.member = r.oid),
             (SELECT string_agg(p.oid::regprocedure::text, ',' ORDER BY p.oid::regprocedure::text) FROM pg_proc p
               WHERE p.pronamespace = 'outbox'::regnamespace AND has_function_privilege(r.oid, p.oid, 'EXECUTE')),
             (SELECT string_agg(c.oid::regclass || ' ' || t.privilege, ',' ORDER BY c.oid::regclass::text, t.privilege)
                FROM pg_class c CROSS JOIN unnest('{{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}}'::text[]) AS t (privilege)
               WHERE c.relkind IN ('r', 'v') AND (c.relnamespace = 'outbox'::regnamespace OR c.relname = 'outbox_events')
                 AND has_table_privilege(r.oid, c.oid, t.privilege)),
             (SELECT count(*) FROM pg_proc p WHERE p.proowner = r.oid AND p.pronamespace = 'outbox'::regnamespace))
           FROM pg_roles r WHERE r.rolname = '{role}'"
    );
    admin.one::<String>(&query).await
}

#[derive(Default)]
struct Tally {
    tried: u32,
    refused: u32,
    done: u32,
}

/// One session's random statements until the moment, or until one shows a fault.
async fn say(
    cluster: &Cluster,
    database: &str,
    role: &str,
    functions: &[Function],
    seed: u64,
    until: Instant,
    secret: &str,
) -> Result<Tally> {
    let url = cluster.url_as(role, role, database);
    let (mut dice, mut tally) = (Dice(seed), Tally::default());
    let mut session = Session::open(&url).await?;
    while Instant::now() < until {
        if dice.roll(150) == 0 {
            session = Session::open(&url).await?;
        }
        session.batch_execute("SET statement_timeout = '3s'; SET lock_timeout = '1s'").await.ok();
        let statement = statement(&mut dice, functions);
        tally.tried += 1;
        match session.simple_query(&statement).await {
            Ok(messages) => {
                tally.done += 1;
                for message in &messages {
                    if let SimpleQueryMessage::Row(row) = message {
                        let shown = (0..row.len()).any(|n| row.get(n).is_some_and(|text| text.contains(secret)));
                        ensure!(!shown || role == "relay", "{role} saw a secret by {statement}");
                    }
                }
            }
            Err(error) => {
                tally.refused += 1;
                let Some(known) = error.as_db_error() else {
                    // A text of another client encoding is this client's to complain about.
                    ensure!(!session.is_closed(), "{role} lost its connection by {statement}: {error}");
                    continue;
                };
                let code = known.code().code();
                ensure!(!code.starts_with("XX"), "{role} met an internal error by {statement}: {known:?}");
                ensure!(!code.starts_with("57P"), "{role} was cut off by {statement}: {known:?}");
                let said = format!("{} {:?} {:?} {:?}", known.message(), known.detail(), known.hint(), known.where_());
                ensure!(!said.contains(secret), "{role} saw a secret in an error by {statement}");
                // A transaction that failed would refuse everything from now on.
                if code == "25P02" {
                    session.batch_execute("ROLLBACK").await?;
                }
            }
        }
    }
    Ok(tally)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

fn seed() -> Result<u64> {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos() as u64;
    Ok(number("OUTBOX_HOSTILE_SEED").unwrap_or(clock))
}

/// Lets all three roles talk for so long, after a statement that puts a fault in.
#[allow(clippy::disallowed_macros, reason = "for whoever reads the output of the tests")]
async fn talk(seconds: u64, fault: &str) -> Result<()> {
    let seed = seed()?;
    println!("OUTBOX_HOSTILE_SEED={seed} OUTBOX_HOSTILE_SECONDS={seconds}");

    let cluster = Cluster::with(&[("log_line_prefix", "'%e %b '"), ("max_prepared_transactions", "10")]).await?;
    let database = cluster.database().await?;
    let admin = cluster.connect(&database).await?;
    admin
        .batch_execute(
            "CREATE ROLE producer LOGIN PASSWORD 'producer'; CREATE ROLE relay LOGIN PASSWORD 'relay';
             CREATE ROLE operator LOGIN PASSWORD 'operator';
             SELECT outbox.grant_producer('producer', true), outbox.grant_relay('relay'), outbox.grant_operator('operator'),
                    outbox.grant_producer('operator');
             SELECT outbox.add_rabbitmq('queue', settings => '{\"on_failure\": \"block\"}')",
        )
        .await?;
    let secret: String = admin.one("SELECT outbox.add_webhook('hook', 'https://example.com/')").await?;
    let secret = secret.trim_start_matches("whsec_");
    admin.batch_execute(fault).await?;
    admin.until("SELECT worker_state IN ('idle', 'active') FROM outbox.stats()", LONG).await?;
    let worker =
        "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_outbox worker' AND datname = current_database()";
    let (postmaster, pid) = (cluster.postmaster()?, admin.one::<i32>(worker).await?);

    let mut before = Vec::new();
    let mut may = Vec::new();
    for role in ["producer", "relay", "operator"] {
        before.push(rights(&admin, role).await?);
        may.push(functions(&admin, role).await?);
    }
    let until = Instant::now() + Duration::from_secs(seconds);
    let talks = (0..6).map(|n| {
        let (role, may) = [("producer", &may[0]), ("relay", &may[1]), ("operator", &may[2])][n / 2];
        let (cluster, database) = (&cluster, &database);
        async move {
            let tally = say(cluster, database, role, may, seed ^ n as u64, until, secret).await;
            tally.with_context(|| format!("OUTBOX_HOSTILE_SEED={seed}, session {n}"))
        }
    });
    let tallies = futures_util::future::try_join_all(talks).await?;
    for (n, tally) in tallies.iter().enumerate() {
        println!("session {n}: {} statements, {} done, {} refused", tally.tried, tally.done, tally.refused);
        ensure!(tally.done > 0 && tally.refused > 0, "session {n} says nothing that matters");
    }

    let roles = ["producer", "relay", "operator"];
    for (role, before) in roles.iter().zip(&before) {
        ensure!(&rights(&admin, role).await? == before, "{role} may do something else now");
    }
    ensure!(
        cluster.postmaster()? == postmaster && admin.one::<i32>(worker).await? == pid,
        "the worker or the server started anew"
    );
    for line in cluster.log().lines() {
        let bad = line.starts_with("XX") || line.contains("PANIC") || line.contains("terminated by signal");
        if bad || (line.contains("pg_outbox worker") && line.contains("ERROR")) {
            bail!("OUTBOX_HOSTILE_SEED={seed}: {line}");
        }
    }
    // It still works: what is committed can be claimed and settled, and the books are right.
    admin
        .batch_execute("DELETE FROM outbox_events; SELECT outbox.remove_destination(name) FROM outbox.destinations")
        .await?;
    admin.until("SELECT NOT EXISTS (SELECT FROM outbox.touched)", LONG).await?;
    let producer = Session::open(&cluster.url_as("producer", "producer", &database)).await?;
    producer.batch_execute("SELECT outbox.publish('at.the.end', '{}')").await?;
    admin
        .until(
            "SELECT event_type = 'at.the.end' FROM (SELECT max(event_type) AS event_type FROM outbox.claim()) c",
            LONG,
        )
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_roles_say_nothing_breaks_and_nobody_gains() -> Result<()> {
    talk(number("OUTBOX_HOSTILE_SECONDS").unwrap_or(12), "").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_put_in_on_purpose_are_found() -> Result<()> {
    for (fault, words) in [
        (
            "CREATE FUNCTION outbox.evil() RETURNS text LANGUAGE sql SECURITY DEFINER
             AS 'SELECT string_agg(s::text, chr(10)) FROM outbox.secret s';
             GRANT EXECUTE ON FUNCTION outbox.evil() TO operator",
            "saw a secret",
        ),
        (
            "CREATE FUNCTION outbox.evil() RETURNS void LANGUAGE plpgsql
             AS 'BEGIN RAISE EXCEPTION USING ERRCODE = $x$XX000$x$; END';
             GRANT EXECUTE ON FUNCTION outbox.evil() TO producer",
            "internal error",
        ),
        (
            // By one session alone: two that grant at once meet PostgreSQL's own internal error, "tuple concurrently updated".
            "CREATE FUNCTION outbox.evil() RETURNS void LANGUAGE plpgsql SECURITY DEFINER
             AS 'BEGIN IF pg_try_advisory_lock(1) THEN GRANT SELECT ON outbox.delivery TO relay; END IF; END';
             GRANT EXECUTE ON FUNCTION outbox.evil() TO relay",
            "relay may do something else now",
        ),
    ] {
        let found = talk(8, fault).await.err().with_context(|| format!("not found: {words}"))?;
        ensure!(format!("{found:?}").contains(words), "found something else than {words}: {found:?}");
    }
    Ok(())
}

/// Whoever may execute the trigger functions, as by GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public, attaches them to a table
/// of its own.
#[tokio::test]
async fn a_trigger_function_on_another_table_is_an_error() -> Result<()> {
    let cluster = Cluster::start().await?;
    let database = cluster.database().await?;
    let admin = cluster.connect(&database).await?;
    let columns: Vec<String> = (1..18).map(|n| format!("c{n} bigint DEFAULT 4096")).collect();
    admin
        .batch_execute(&format!(
            "CREATE ROLE app; CREATE SCHEMA app AUTHORIZATION app;
             GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public, outbox TO app; GRANT USAGE ON SCHEMA outbox TO app;
             SET ROLE app; CREATE TABLE app.narrow (c1 int); CREATE TABLE app.wide ({})",
            columns.join(", ")
        ))
        .await?;
    let functions: Vec<String> = admin
        .query("SELECT oid::regproc::text FROM pg_proc WHERE prorettype = 'trigger'::regtype AND prolang = (SELECT oid FROM pg_language WHERE lanname = 'c') AND probin = '$libdir/pg_outbox'", &[])
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    ensure!(functions.len() == 3, "trigger functions in C: {functions:?}");
    for table in ["narrow", "wide"] {
        for function in &functions {
            admin
                .batch_execute(&format!(
                    "INSERT INTO app.{table} DEFAULT VALUES;
                     CREATE TRIGGER t AFTER INSERT OR UPDATE OR DELETE ON app.{table} FOR EACH ROW EXECUTE FUNCTION {function}()"
                ))
                .await?;
            for statement in ["INSERT INTO app.{} DEFAULT VALUES", "UPDATE app.{} SET c1 = 1", "DELETE FROM app.{}"] {
                let statement = statement.replace("{}", table);
                let error = admin.batch_execute(&statement).await.err().with_context(|| statement.clone())?;
                ensure!(error.code().is_some_and(|code| code.code() == "39P01"), "{statement}: {error:?}");
            }
            admin.batch_execute(&format!("DROP TRIGGER t ON app.{table}")).await?;
        }
    }
    // The session goes on with the table that they are for.
    admin.batch_execute("RESET ROLE; INSERT INTO outbox_events (event_type, event_data) VALUES ('a', '{}')").await?;
    admin.until("SELECT pending = 1 FROM outbox.stats()", LONG).await
}

//! Traces: the context reaches an event by itself, and each attempt to deliver is a span below it, for which the receiver's
//! own spans hang.

use std::io::Write;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use outbox_tests::broker::Broker;
use outbox_tests::receiver::{Receiver, Reply};
use outbox_tests::relay::Relay;
use outbox_tests::scratch;
use outbox_tests::session::Session;
use outbox_tests::wait::{self, LONG};
use outbox_tests::world::World;
use serde_json::Value;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// A trace context of the n-th trace.
fn context(n: u8) -> String {
    format!("00-{n:032x}-{PARENT}-01")
}

fn sampled() -> String {
    format!("00-{TRACE}-{PARENT}-01")
}

/// All spans that a collector got.
fn spans(collector: &Receiver) -> Result<Vec<Value>> {
    let mut spans = Vec::new();
    for request in collector.received() {
        let body = request.json()?;
        for scope in body["resourceSpans"][0]["scopeSpans"].as_array().context("no scopeSpans")? {
            spans.extend(scope["spans"].as_array().context("no spans")?.clone());
        }
    }
    Ok(spans)
}

async fn wait_for_spans(collector: &Receiver, count: usize) -> Result<Vec<Value>> {
    let look = async || Ok(Some(spans(collector)?).filter(|spans| spans.len() >= count));
    wait::until(&format!("{count} spans"), LONG, look).await
}

/// The value of an attribute, as text.
fn attribute<'a>(of: &'a Value, key: &str) -> Option<&'a str> {
    let all = of["attributes"].as_array()?;
    let value = &all.iter().find(|attribute| attribute["key"] == key)?["value"];
    value["stringValue"].as_str().or(value["intValue"].as_str())
}

async fn relay(world: &World<'_>, broker: Option<&Broker>, variables: &[(&str, &str)]) -> Result<Relay> {
    let amqp = broker.map(Broker::url);
    Relay::with(&world.cluster.url(&world.database), amqp.as_deref(), variables).await
}

#[tokio::test]
async fn each_attempt_is_a_span_below_its_event_and_the_receiver_hangs_below_it() -> Result<()> {
    let world = World::new().await?;
    let (collector, receiver) = (Receiver::start()?, Receiver::start()?);
    let broker = Broker::shared().await?;
    let channel = broker.channel().await?;
    let exchange = format!("traced-{}", scratch::random_hex(4)?);
    channel.bind(&exchange, "#", &exchange).await?;
    let mut queue = channel.consume(&exchange).await?;
    world.session.execute("SELECT outbox.add_rabbitmq('mq', $1)", &[&exchange]).await?;
    world.add_webhook("crm", &receiver.url("secret-path"), r#"{"base": 0.05, "cap": 0.05}"#).await?;
    receiver.reply_with(|number, _| if number == 0 { Reply::Status(500) } else { Reply::Accept });
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &*collector.url("otlp")),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=hunter%202"),
        ("OTEL_SERVICE_NAME", "orders-relay"),
        ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test"),
    ];
    let relay = relay(&world, Some(&broker), &variables).await?;
    let metadata = format!(r#"{{"traceparent": "{}", "tracestate": "a=b", "correlation_id": "c1"}}"#, sampled());
    let sql = "SELECT outbox.publish('contact.created', '{\"n\": 1}', metadata => $1::text::jsonb)::text";
    let id: String = world.session.query_one(sql, &[&metadata]).await?.get(0);
    world.processed().await?;
    let spans = wait_for_spans(&collector, 3).await?;
    assert_eq!(spans.len(), 3);

    let request = collector.received().swap_remove(0);
    assert_eq!((request.path.as_str(), request.header("content-type")), ("/otlp/v1/traces", Some("application/json")));
    assert_eq!(request.header("api-key"), Some("hunter 2"));
    let resource = &request.json()?["resourceSpans"][0]["resource"];
    assert_eq!(attribute(resource, "service.name"), Some("orders-relay"));
    assert_eq!(attribute(resource, "deployment.environment"), Some("test"));

    let of = |name: &str| spans.iter().filter(|span| span["name"] == name).collect::<Vec<_>>();
    let (to_mq, to_crm) = (of("publish mq"), of("publish crm"));
    assert_eq!((to_mq.len(), to_crm.len()), (1, 2));
    for span in &spans {
        assert_eq!(
            (&span["traceId"], &span["parentSpanId"], &span["kind"]),
            (&TRACE.into(), &PARENT.into(), &4.into())
        );
        assert_eq!((attribute(span, "messaging.message.id"), &span["traceState"]), (Some(&*id), &"a=b".into()));
        assert_eq!(attribute(span, "messaging.message.conversation_id"), Some("c1"));
        assert_eq!(attribute(span, "messaging.operation.type"), Some("send"));
        let (began, ended) = (span["startTimeUnixNano"].as_str(), span["endTimeUnixNano"].as_str());
        ensure!(began.context("no start")?.parse::<u64>()? < ended.context("no end")?.parse::<u64>()?, "{span}");
        ensure!(!span.to_string().contains("secret-path"), "{span}");
    }
    assert_eq!(attribute(to_mq[0], "messaging.system"), Some("rabbitmq"));
    assert_eq!(attribute(to_mq[0], "messaging.destination.name"), Some("mq"));
    assert_eq!(attribute(to_mq[0], "messaging.rabbitmq.destination.routing_key"), Some("contact.created"));
    let failed = to_crm.iter().find(|span| span["status"]["code"] == 2).context("no span with an error")?;
    let delivered = to_crm.iter().find(|span| span["status"]["code"].is_null()).context("no span without an error")?;
    assert_eq!(attribute(failed, "error.type"), Some("failed"));
    let status = "http.response.status_code";
    assert_eq!((attribute(failed, status), attribute(delivered, status)), (Some("500"), Some("204")));
    assert_eq!(attribute(to_mq[0], status), None);
    ensure!(failed["status"]["message"].as_str().is_some_and(|text| text.contains("500")), "{failed}");
    assert_eq!((attribute(delivered, "outbox.attempt"), attribute(delivered, "error.type")), (Some("2"), None));

    // What the receivers were told is the span of their attempt.
    let hangs_below = |span: &Value| Some(format!("00-{TRACE}-{}-01", span["spanId"].as_str()?));
    let received = receiver.received();
    assert_eq!(received[0].header("traceparent").map(str::to_owned), hangs_below(failed));
    assert_eq!(received[1].header("traceparent").map(str::to_owned), hangs_below(delivered));
    let message = queue.next(LONG).await?;
    assert_eq!(message.headers.get("traceparent").cloned(), hangs_below(to_mq[0]));
    assert_eq!(relay.metric("outbox_relay_spans_sent_total").await?, 3.0);
    assert!(!relay.log().contains("hunter"));
    Ok(())
}

#[tokio::test]
async fn a_trace_that_is_not_sampled_has_no_span_and_one_without_context_begins_one() -> Result<()> {
    let world = World::new().await?;
    let (collector, receiver) = (Receiver::start()?, Receiver::start()?);
    world.add_webhook("crm", &receiver.url("hook"), "{}").await?;
    let endpoint = collector.url("v1/own");
    let _relay = relay(&world, None, &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &endpoint)]).await?;
    let unsampled = sampled().replace("-01", "-00");
    world
        .execute(&format!("SELECT outbox.publish('a', '{{}}', metadata => '{{\"traceparent\": \"{unsampled}\"}}')"))
        .await?;
    let first = receiver.wait_for(1, LONG).await?;
    assert_eq!(first[0].header("traceparent"), Some(&*unsampled), "it goes through as it is");
    world.execute("SELECT outbox.publish('a', '{}', metadata => '{\"traceparent\": \"hunter2\"}')").await?;
    let second = receiver.wait_for(2, LONG).await?;
    let spans = wait_for_spans(&collector, 1).await?;
    assert_eq!((spans.len(), spans[0]["parentSpanId"].is_null()), (1, true));
    let expected = format!(
        "00-{}-{}-01",
        spans[0]["traceId"].as_str().unwrap_or_default(),
        spans[0]["spanId"].as_str().unwrap_or_default()
    );
    assert_eq!(second[1].header("traceparent"), Some(&*expected));
    assert_eq!(collector.received()[0].path, "/v1/own");
    Ok(())
}

#[tokio::test]
async fn a_collector_that_is_away_holds_up_nothing_and_what_it_missed_is_counted() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    world.add_webhook("crm", &receiver.url("hook"), "{}").await?;
    let port = scratch::free_port()?;
    let endpoint = format!("http://user:hunter2@127.0.0.1:{port}");
    let relay = relay(&world, None, &[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)]).await?;
    world.execute("SELECT count(outbox.publish('a', '{}')) FROM generate_series(1, 20)").await?;
    world.processed().await?;
    relay.logged("the collector takes no spans", LONG).await?;
    let dropped = async || Ok((relay.metric("outbox_relay_spans_dropped_total").await? >= 1.0).then_some(()));
    wait::until("spans to be dropped", LONG, dropped).await?;
    let collector = Receiver::on(port)?;
    world.publish("1").await?;
    relay.logged("the collector takes spans again", LONG).await?;
    ensure!(!spans(&collector)?.is_empty());
    ensure!(!relay.log().contains("hunter2"), "{}", relay.log());
    // The last ones are sent before the relay ends.
    let before = spans(&collector)?.len();
    world.publish("2").await?;
    receiver.wait_for(22, LONG).await?;
    assert!(relay.terminate(LONG).await?.success());
    assert_eq!(spans(&collector)?.len(), before + 1);
    Ok(())
}

/// The trace context of the latest event.
async fn latest(session: &Session) -> Result<Option<String>> {
    session.one("SELECT metadata ->> 'traceparent' FROM outbox_events ORDER BY id DESC LIMIT 1").await
}

#[tokio::test]
async fn an_event_takes_the_context_from_its_metadata_the_setting_or_the_comment_in_this_order() -> Result<()> {
    let world = World::new().await?;
    let session = &world.session;
    let (of_metadata, of_setting, of_comment) = (context(1), context(2), context(3));
    let comment = format!("/*action='sign_up',traceparent='{of_comment}'*/");
    let insert = "INSERT INTO outbox_events (event_type, event_data) VALUES ('a', '{}')";
    let set = format!("SET LOCAL outbox.traceparent = '{of_setting}'");
    let with_metadata = format!(
        "INSERT INTO outbox_events (event_type, event_data, metadata) VALUES ('a', '{{}}', '{{\"traceparent\": \"{of_metadata}\"}}')"
    );
    for (statements, expected) in [
        (insert.to_owned(), None),
        (format!("{insert} {comment}"), Some(&of_comment)),
        (format!("{comment} {insert}"), Some(&of_comment)),
        (format!("{insert} {comment};\n"), Some(&of_comment)),
        (format!("BEGIN; {set}; {insert}; COMMIT"), Some(&of_setting)),
        (format!("BEGIN; {set}; {insert}; COMMIT {comment}"), Some(&of_setting)),
        (format!("BEGIN; {set}; {with_metadata}; COMMIT {comment}"), Some(&of_metadata)),
        (format!("{with_metadata} {comment}"), Some(&of_metadata)),
        (format!("BEGIN; SET LOCAL outbox.traceparent = 'nonsense'; {insert}; COMMIT {comment}"), Some(&of_comment)),
        (format!("SELECT outbox.publish('a', '{{}}') {comment}"), Some(&of_comment)),
        (format!("DO $$ BEGIN {insert}; END $$ {comment}"), Some(&of_comment)),
        // The setting ended with its transaction.
        (insert.to_owned(), None),
    ] {
        session.batch_execute(&statements).await.with_context(|| statements.clone())?;
        assert_eq!(latest(session).await?.as_ref(), expected, "{statements}");
    }
    // The rest of the metadata stays.
    session
        .batch_execute(&format!(
            "INSERT INTO outbox_events (event_type, event_data, metadata) VALUES ('a', '{{}}', '{{\"n\": 1.50}}') {comment}"
        ))
        .await?;
    let metadata: String = session.one("SELECT metadata::text FROM outbox_events ORDER BY id DESC LIMIT 1").await?;
    assert_eq!(metadata, format!("{{\"n\": 1.50, \"traceparent\": \"{of_comment}\"}}"));
    for other in ["[1]", "7", "null", "\"x\""] {
        let statement = format!(
            "INSERT INTO outbox_events (event_type, event_data, metadata) VALUES ('a', '{{}}', '{other}') {comment}"
        );
        session.batch_execute(&statement).await?;
        let metadata: String = session.one("SELECT metadata::text FROM outbox_events ORDER BY id DESC LIMIT 1").await?;
        assert_eq!(metadata, other, "what is no object stays as it is");
    }
    Ok(())
}

#[tokio::test]
async fn all_rows_of_a_statement_have_its_context_however_they_come() -> Result<()> {
    let world = World::new().await?;
    let session = &world.session;
    let count = "SELECT count(*) FROM outbox_events WHERE metadata ->> 'traceparent' = ";
    // Many rows of one statement, and a statement of a megabyte.
    session
        .batch_execute(&format!(
            "INSERT INTO outbox_events (event_type, event_data) SELECT 'a', '{{}}' FROM generate_series(1, 1000) /*traceparent='{}'*/",
            context(1)
        ))
        .await?;
    let long = "x".repeat(1_000_000);
    session
        .batch_execute(&format!(
            "INSERT INTO outbox_events (event_type, event_data) VALUES ('a', '\"{long}\"'), ('b', '{{}}') /*traceparent='{}'*/",
            context(2)
        ))
        .await?;
    assert_eq!(session.one::<i64>(&format!("{count} '{}'", context(1))).await?, 1000);
    assert_eq!(session.one::<i64>(&format!("{count} '{}'", context(2))).await?, 2);

    // Prepared statements: each execution has what its own text says.
    let insert = |n: u8| {
        format!(
            "INSERT INTO outbox_events (event_type, event_data) VALUES ($1, '{{}}') /*traceparent='{}'*/",
            context(n)
        )
    };
    let (third, fourth) = (session.prepare(&insert(3)).await?, session.prepare(&insert(4)).await?);
    for statement in [&third, &fourth, &third, &third] {
        session.execute(statement, &[&"a"]).await?;
    }
    assert_eq!(session.one::<i64>(&format!("{count} '{}'", context(3))).await?, 3);
    assert_eq!(session.one::<i64>(&format!("{count} '{}'", context(4))).await?, 1);
    session.batch_execute("PREPARE p AS INSERT INTO outbox_events (event_type, event_data) VALUES ('a', '{}')").await?;
    session.batch_execute(&format!("EXECUTE p /*traceparent='{}'*/", context(5))).await?;
    assert_eq!(session.one::<i64>(&format!("{count} '{}'", context(5))).await?, 1);

    // COPY.
    let copy = format!("COPY outbox_events (event_type, event_data) FROM STDIN /*traceparent='{}'*/", context(6));
    let mut command = world.cluster.client("psql")?;
    command.args(["-Xq", "-v", "ON_ERROR_STOP=1", "-d", &world.database, "-c", &copy]).stdin(Stdio::piped());
    let mut child = command.spawn()?;
    child.stdin.take().context("no standard input")?.write_all(b"a\t{}\nb\t{}\n")?;
    ensure!(child.wait()?.success());
    assert_eq!(session.one::<i64>(&format!("{count} '{}'", context(6))).await?, 2);
    Ok(())
}

#[tokio::test]
async fn no_comment_stops_an_insert() -> Result<()> {
    let world = World::new().await?;
    let session = &world.session;
    let insert = "INSERT INTO outbox_events (event_type, event_data) VALUES ('a', '{}')";
    let good = sampled();
    for comment in [
        "/**/".to_owned(),
        "/* traceparent */".into(),
        "/*traceparent=*/".into(),
        "/*traceparent='*/".into(),
        "/*traceparent=''*/".into(),
        format!("/*traceparent='{good}*/"),
        format!("/*traceparent='{}'*/", good.to_uppercase()),
        format!("/*traceparent='{good}-01'*/"),
        format!("/*/*traceparent='{good}'*/ */"),
        format!("-- traceparent='{good}'"),
        format!("/*{},traceparent='{good}'*/", "x".repeat(5000)),
        format!("/*traceparent='00-{}-{PARENT}-01'*/", "0".repeat(32)),
        "/*traceparent='é\u{1F600}\u{1}\"\\'*/".into(),
        format!("/*{}*/", ",=''".repeat(100_000)),
    ] {
        session.batch_execute(&format!("{insert} {comment}")).await?;
        assert_eq!(latest(session).await?, None, "{}", &comment[..comment.len().min(100)]);
    }
    // Data is no comment.
    session
        .batch_execute(&format!(
            "INSERT INTO outbox_events (event_type, event_data) VALUES ('a', '\"/*traceparent=''{good}''*/\"')"
        ))
        .await?;
    assert_eq!(latest(session).await?, None);
    // An event as large as events get.
    session
        .batch_execute(&format!(
            "INSERT INTO outbox_events (event_type, event_data, metadata)
             SELECT 'a', '{{}}', jsonb_build_object('x', repeat('x', 3000000)) /*traceparent='{good}'*/"
        ))
        .await?;
    assert_eq!(latest(session).await?, None, "large metadata stays as it is");
    // In a database of another encoding the text's bytes are the client's.
    session.batch_execute("SET client_encoding = 'LATIN1'").await?;
    session.batch_execute(&format!("{insert} /*x='y',traceparent='{good}'*/")).await?;
    assert_eq!(latest(session).await?, Some(good));
    Ok(())
}

//! Texts and numbers of any shape: what SQL takes the relay can use, and what it can't costs nobody else anything.

use anyhow::{Context, Result, ensure};
use outbox_tests::relay;
use outbox_tests::wait::LONG;

use crate::rabbitmq::Site;

/// Calls whose arguments are at the edge of what can be meant. Each is refused by SQL, or no relay calls it malformed.
const CASES: [&str; 65] = [
    "add_webhook($1, 'http://example.invalid/')",
    "add_webhook($1, 'https://example.invalid:65535/x?y=z#f')",
    "add_webhook($1, 'http://example.invalid:0/')",
    "add_webhook($1, 'http://example.invalid:65536/')",
    "add_webhook($1, 'http://1.2.3.4.5/')",
    "add_webhook($1, 'http://1.2.3.256/')",
    "add_webhook($1, 'http://0x1.2/')",
    "add_webhook($1, 'http://08.1.1.1/')",
    "add_webhook($1, 'http://[::1]/')",
    "add_webhook($1, 'http://[1.2.3.4]/')",
    "add_webhook($1, 'http://[:::]/')",
    "add_webhook($1, 'http://a%20b/')",
    "add_webhook($1, 'http://a|b/')",
    "add_webhook($1, 'http://a..b/')",
    "add_webhook($1, 'http://' || repeat('a', 64) || '.example/')",
    "add_webhook($1, 'http://' || repeat('a.', 200) || 'example/')",
    "add_webhook($1, 'http://bücher.example/')",
    "add_webhook($1, 'http://example.invalid/' || repeat('a', 7000))",
    "add_webhook($1, 'http://example.invalid/' || repeat('a', 70000))",
    "add_webhook($1, 'http://example.invalid/{}|\"<>^`')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"timeout\": 1e-9}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"timeout\": 1e30}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"timeout\": 1e400}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"timeout\": \"infinity\"}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"timeout\": \"1 day\"}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"connect_timeout\": \"-1 s\"}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"headers\": {\"x\": \"a\\u007f\"}}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"headers\": {\"x\": 1e400, \"y\": true}}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"unknown\": 1e400}')",
    "add_webhook($1, 'http://example.invalid/', secret => 'whsec_' || repeat('A', 32))",
    "add_webhook($1, 'http://example.invalid/', secret => 'whsec_' || repeat('A', 33) || 'B==')",
    "add_webhook($1, 'http://example.invalid/', secret => 'whsec_' || repeat('A', 34))",
    "add_webhook($1, 'http://example.invalid/', secret => 'whsec_' || repeat('A', 32) || E'\\n')",
    "add_rabbitmq($1, routing_key => repeat('x', 256))",
    "add_rabbitmq($1, routing_key => repeat('x', 255))",
    "add_rabbitmq($1, repeat('é', 128))",
    "add_rabbitmq($1, routing_key => '{event_type')",
    "add_rabbitmq($1, routing_key => '{metadata.a b}')",
    "add_rabbitmq($1, settings => '{\"queue\": \"amq.x\", \"declare\": \"queue\"}')",
    "add_rabbitmq($1, settings => jsonb_build_object('queue', repeat('x', 256)))",
    "add_rabbitmq($1, settings => '{\"exchange_type\": \"odd\"}')",
    "add_rabbitmq($1, settings => '{\"concurrency\": 99999}')",
    "add_rabbitmq($1, settings => '{\"format\": \"cloudevents-binary\", \"source\": \"urn:x\", \"metadata\": [\"\", \"*\"]}')",
    "add_rabbitmq($1, settings => '{\"format\": null, \"metadata\": null}')",
    "add_rabbitmq($1, settings => '{\"format\": null}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"format\": null}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"signature\": null}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"signature\": \"none\", \"metadata\": []}')",
    "add_webhook($1, 'http://example.invalid/', secret => 'hunter22', settings => '{\"signature\": \"hex\"}')",
    "add_webhook($1, 'http://example.invalid/', secret => repeat('é', 128), settings => '{\"signature\": \"hex\"}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"signature\": \"hex\", \"signature_header\": \"~|x\", \"signature_prefix\": \"a  ~\"}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"signature\": \"ed25519\"}')",
    "add_webhook($1, 'http://example.invalid/', secret => 'whsk_' || repeat('A', 43) || '=', settings => '{\"signature\": \"ed25519\"}')",
    "add_webhook($1, 'http://example.invalid/', secret => 'whsk_B' || repeat('A', 42) || '=', settings => '{\"signature\": \"ed25519\"}')",
    "add_webhook($1, 'http://example.invalid/', secret => 'whsk_B' || repeat('A', 85) || '==', settings => '{\"signature\": \"ed25519\"}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"proxy\": \"http://p:1\"}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"proxy\": \"HTTPS://u<s>e\\\"r:p^w|{}`@[::1]/\"}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"proxy\": \"http://u:%zz@p\"}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"proxy\": \"http://@p\"}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"proxy\": \"http://:@p\"}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"proxy\": \"http://1.2.3.4.5\"}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"proxy\": \"http://p:99999\"}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"proxy\": \"none\", \"ca_certificate\": null}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"ca_certificate\": \"-----BEGIN CERTIFICATE----- MAA= -----END CERTIFICATE-----\"}')",
    "add_webhook($1, 'http://example.invalid/', settings => '{\"ca_certificate\": \"-----BEGIN CERTIFICATE-----\\nMAA=\\n-----END CERTIFICATE-----\"}')",
];

#[tokio::test]
async fn what_sql_takes_no_relay_calls_malformed() -> Result<()> {
    let site = Site::shared().await?;
    let mut taken = 0;
    for (n, case) in CASES.iter().enumerate() {
        let call = case.replace("$1", &format!("'case{n}'"));
        match site.session.batch_execute(&format!("SELECT outbox.{call}")).await {
            Ok(()) => taken += 1,
            Err(error) => {
                let code = error.code().map(|code| code.code().to_owned()).unwrap_or_default();
                ensure!(code.starts_with("22"), "{case}: {error:?}");
            }
        }
    }
    ensure!((12..CASES.len()).contains(&taken), "{taken} were taken");
    let relay = site.relay().await?;
    relay.logged(r#""message":"served""#, LONG).await?;
    // It ends when the database knows all that it has to say.
    ensure!(relay.terminate(LONG).await?.success());
    let wrong = "SELECT coalesce(string_agg(name || ': ' || last_error, '; '), '') FROM outbox.destinations
                  WHERE last_error LIKE 'destination %'";
    assert_eq!(site.session.one::<String>(wrong).await?, "");
    Ok(())
}

#[tokio::test]
async fn a_row_that_no_relay_can_use_costs_no_other_destination_anything() -> Result<()> {
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    let mut queue = channel.consume("all").await?;
    site.add("mq", "").await?;
    site.add("long", r#", settings => '{"declare": "queue"}'"#).await?;
    site.add("huge", "").await?;
    site.session
        .batch_execute(
            "UPDATE outbox.destination SET routing_key = repeat('x', 300) WHERE name = 'long';
             UPDATE outbox.destination SET settings = '{\"timeout\": 1e400, \"base\": 1e300, \"other\": 1e400}' WHERE name = 'huge'",
        )
        .await?;
    let relay = site.relay().await?;
    for n in 0..10 {
        let event = site.publish(&n.to_string()).await?;
        while queue.next(LONG).await?.event_id()? != event {}
    }
    site.until("SELECT bool_and(status <> 'processing') FROM outbox_events").await?;
    let mut check = relay::command(None)?;
    check.arg("check").env("DATABASE_URL", site.cluster.url(&site.database)).env("AMQP_URL", site.broker.url());
    let code = check.output()?.status.code().context("no exit code")?;
    assert!(code == 0 || code == 1, "exit code {code}");
    assert!(relay.terminate(LONG).await?.success());
    Ok(())
}

#[tokio::test]
async fn metadata_arrives_digit_for_digit() -> Result<()> {
    let site = Site::shared().await?;
    let channel = site.broker.channel().await?;
    channel.bind("outbox_events", "#", "all").await?;
    let mut queue = channel.consume("all").await?;
    site.add("mq", ", routing_key => '{metadata.n}/{metadata.big}/{metadata.tenant}'").await?;
    let _relay = site.relay().await?;
    let deep = format!("{}1{}", "[".repeat(3000), "]".repeat(3000));
    let metadata = format!(
        r#"{{"n": 1.50, "big": 12345678901234567890123, "huge": 1e400, "deep": {deep}, "tenant": "acme",
            "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}}"#
    );
    site.session
        .execute("SELECT outbox.publish('contact.created', '{}', metadata => $1::text::jsonb)", &[&metadata])
        .await?;
    let message = queue.next(LONG).await?;
    assert_eq!(message.routing_key, "1.50/12345678901234567890123/acme");
    assert!(message.headers["traceparent"].starts_with("00-4bf92f"));
    site.processed().await
}

#[tokio::test]
async fn settings_of_any_size_fail_no_settlement() -> Result<()> {
    let site = Site::shared().await?;
    let receiver = outbox_tests::receiver::Receiver::start()?;
    for name in ["good", "bad"] {
        site.session.execute("SELECT outbox.add_webhook($1, $2)", &[&name, &receiver.url(name)]).await?;
    }
    let refused = site.add("late", r#", settings => '{"base": "1000000 years"}'"#).await;
    assert!(refused.is_err_and(|error| format!("{error:#}{error:?}").contains("settings.base")));
    site.session
        .batch_execute(
            "UPDATE outbox.destination SET settings = '{\"base\": \"1000000 years\", \"cap\": \"100000 years\"}' WHERE name = 'bad'",
        )
        .await?;
    receiver.reply_with(|_, request| match request.path.ends_with("bad") {
        true => outbox_tests::receiver::Reply::Status(500),
        false => outbox_tests::receiver::Reply::Accept,
    });
    let _relay = site.relay().await?;
    site.publish("1").await?;
    site.until("SELECT count(*) = 1 AND bool_and(destination = 'bad' AND attempts = 1) FROM outbox.deliveries").await?;
    assert_eq!(receiver.received().iter().filter(|request| request.path.ends_with("good")).count(), 1);
    Ok(())
}

#[tokio::test]
async fn two_rotations_at_once_leave_one_current_secret() -> Result<()> {
    let site = Site::shared().await?;
    site.session.batch_execute("SELECT outbox.add_webhook('hook', 'http://example.invalid/')").await?;
    let (one, other) = (site.cluster.connect(&site.database).await?, site.cluster.connect(&site.database).await?);
    let rotate = "SELECT outbox.rotate_secret('hook')";
    let (a, b) = tokio::join!(one.batch_execute(rotate), other.batch_execute(rotate));
    a?;
    b?;
    let current = "SELECT count(*) FROM outbox.secret WHERE expires_at IS NULL";
    assert_eq!(site.session.one::<i64>(current).await?, 1);
    Ok(())
}

#[tokio::test]
async fn patterns_that_widen_in_flight_hold_no_event_up() -> Result<()> {
    let site = Site::shared().await?;
    site.session
        .batch_execute(
            "SELECT outbox.add_webhook('a', 'http://example.invalid/', '{other.*}');
             SELECT outbox.add_webhook('b', 'http://example.invalid/')",
        )
        .await?;
    site.publish("1").await?;
    let row = site.session.query_one("SELECT claim_token, id, destinations FROM outbox.claim(1)", &[]).await?;
    let (token, id, to): (i64, i64, Vec<String>) = (row.get(0), row.get(1), row.get(2));
    assert_eq!(to, ["b"]);
    site.session.batch_execute("SELECT outbox.add_webhook('a', 'http://example.invalid/', '{*}')").await?;
    let fail = "SELECT outbox.fail($1, $2, 'no', '1 hour')";
    assert!(site.session.query_one(fail, &[&token, &id]).await?.get::<_, bool>(0));
    let held = "SELECT count(*) FROM outbox.deliveries WHERE status = 'processing'";
    assert_eq!(site.session.one::<i64>(held).await?, 0, "nobody was handed it for a");
    assert_eq!(site.session.one::<String>("SELECT status FROM outbox_events").await?, "pending");
    Ok(())
}

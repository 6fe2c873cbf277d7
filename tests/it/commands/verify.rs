//! `verify`: of a request that a relay sent, whether its signature holds, and why not.

use anyhow::{Result, ensure};
use outbox_tests::receiver::{Received, Receiver};
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

use super::{Ran, file, run_with};

fn verify(secret: &str, headers: &str, body: &[u8], more: &[&str]) -> Result<Ran> {
    let (secret, headers, body) = (file(secret.as_bytes())?, file(headers.as_bytes())?, file(body)?);
    let arguments = ["verify", "--secret-file", &secret, "--headers", &headers, "--body", &body];
    run_with(&[&arguments[..], more].concat(), &[])
}

fn headers_of(request: &Received) -> String {
    let line = |(name, value): (&axum::http::HeaderName, &axum::http::HeaderValue)| {
        format!("{name}: {}\r\n", value.to_str().unwrap_or_default())
    };
    request.headers.iter().map(line).collect()
}

#[tokio::test]
async fn a_relays_request_holds_and_what_was_changed_is_named() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let secret = world.add_webhook("crm", &receiver.url("/"), "{}").await?;
    let _relay = world.relay().await?;
    world.publish("1").await?;
    let request = receiver.wait_for(1, LONG).await?.remove(0);
    let (headers, body) = (headers_of(&request), &request.body);
    let ran = verify(&format!("{secret}\n"), &headers, body, &[])?;
    assert_eq!((ran.code, ran.out.as_str()), (0, "ok    the signature holds\n"), "{ran:?}");
    let without = |name: &str| headers.split_inclusive('\n').filter(|line| !line.starts_with(name)).collect::<String>();
    let timestamp = request.header("webhook-timestamp").unwrap_or_default();
    let earlier = headers.replace(timestamp, "1614265330");
    let tampered = String::from_utf8_lossy(body).replace("Ada", "Bob").into_bytes();
    let with_line_end = [&body[..], b"\n"].concat();
    for (secret, headers, body, fault) in [
        (secret.as_str(), without("webhook-id"), body, "header: webhook-id is missing"),
        (&secret, without("webhook-signature"), body, "header: webhook-signature is missing"),
        (&secret, without("webhook-timestamp"), body, "header: webhook-timestamp is missing"),
        (&secret, headers.clone(), &tampered, "secret or body: "),
        (&secret, headers.clone(), &with_line_end, "body: the signature is of another body: without the white space"),
        ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", headers.clone(), body, "secret or body: "),
        ("not a secret!", headers.clone(), body, "secret: it is not whsec_ (or whpk_"),
        (&secret, earlier, body, "secret or body: "),
    ] {
        let ran = verify(secret, &headers, body, &[])?;
        ensure!(ran.code == 1 && ran.out.starts_with(&format!("FAIL  {fault}")), "{fault}: {ran:?}");
        ensure!(!ran.text().contains("whsec_M") && !ran.text().contains("not a secret"), "{ran:?}");
    }
    // What was captured some time ago.
    let old = "webhook-id: msg_p5jXN8AQM9LWM0D4loKWxJek\nwebhook-timestamp: 1614265330\n\
               webhook-signature: v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=\n";
    let (known, body) = ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", br#"{"test": 2432232314}"#);
    let ran = verify(known, old, body, &["--json"])?;
    ensure!(ran.code == 1 && ran.json()?["fault"] == "timestamp" && ran.json()?["holds"] == false, "{ran:?}");
    let ran = verify(known, old, body, &["--tolerance", "9999 days", "--json"])?;
    ensure!(ran.code == 0 && ran.json()?["holds"] == true && ran.json()?["fault"].is_null(), "{ran:?}");
    Ok(())
}

//! How webhooks are signed other than by default: asymmetrically, as older receivers expect it, or not at all.

use anyhow::{Context, Result, ensure};
use outbox_tests::receiver::{Received, Receiver};
use outbox_tests::reference::{hmac, verifies, verifies_asymmetrically};
use outbox_tests::wait::LONG;
use outbox_tests::world::World;

const HEX: &str = r#"{"signature": "hex"}"#;
const ED25519: &str = r#"{"signature": "ed25519"}"#;

/// Adds or changes the webhook; null where the caller is to know nothing.
async fn add(world: &World<'_>, url: &str, secret: Option<&str>, settings: &str) -> Result<Option<String>> {
    let sql = "SELECT outbox.add_webhook('hook', $1, secret => $2, settings => $3::text::jsonb)";
    Ok(world.session.query_one(sql, &[&url, &secret, &settings]).await?.get(0))
}

async fn next(world: &World<'_>, receiver: &Receiver) -> Result<Received> {
    let before = receiver.count();
    world.publish("1").await?;
    receiver.wait_for(before + 1, LONG).await?.pop().context("a request")
}

#[tokio::test]
async fn a_public_key_verifies_what_its_private_key_signed() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let old = add(&world, &receiver.url("hook"), None, ED25519).await?.context("a public key")?;
    ensure!(old.starts_with("whpk_") && old.len() == 5 + 44, "{old}");
    let kept: String = world.session.one("SELECT secret FROM outbox.secret").await?;
    ensure!(kept.starts_with("whsk_"), "the private key is kept where secrets are");
    // The same again is no other key, and public.
    assert_eq!(add(&world, &receiver.url("hook"), None, ED25519).await?, Some(old.clone()));
    let relay = world.relay().await?;
    let request = next(&world, &receiver).await?;
    ensure!(verifies_asymmetrically(&old, &request)?);
    let stranger = "whpk_11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=";
    ensure!(!verifies_asymmetrically(stranger, &request)?);

    let new: String = world.session.one("SELECT outbox.rotate_secret('hook')").await?;
    relay.logged(r#""message":"changed""#, LONG).await?;
    let mut request = next(&world, &receiver).await?;
    ensure!(new.starts_with("whpk_") && new != old);
    ensure!(verifies_asymmetrically(&old, &request)? && verifies_asymmetrically(&new, &request)?);
    assert_eq!(request.header("webhook-signature").map(|value| value.matches("v1a,").count()), Some(2));
    request.body.push(b' ');
    ensure!(!verifies_asymmetrically(&new, &request)?);
    ensure!(!relay.log().contains(kept.trim_start_matches("whsk_").trim_end_matches('=')));
    world.processed().await
}

#[tokio::test]
async fn a_private_key_of_ones_own_is_taken_in_both_forms() -> Result<()> {
    let world = World::new().await?;
    // The first key pair of RFC 8032, section 7.1.
    let (seed, public) =
        ("nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A=", "11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=");
    let two = |second: &str| {
        format!(
            "SELECT replace(encode(decode('{seed}', 'base64') || decode('{second}', 'base64'), 'base64'), E'\\n', '')"
        )
    };
    let both: String = world.session.one(&two(public)).await?;
    let twice: String = world.session.one(&two(seed)).await?;
    for key in [seed, &both] {
        let given = format!("whsk_{key}");
        let shown = add(&world, "https://example.com/", Some(&given), ED25519).await?;
        assert_eq!(shown, Some(format!("whpk_{public}")));
    }
    for wrong in [
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "whsk_AAAA",
        "whsk_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        &format!("whsk_{twice}"),
        &format!("whsk_{seed}\n"),
    ] {
        let error = add(&world, "https://example.com/", Some(wrong), ED25519).await.err().context("not refused")?;
        ensure!(format!("{error:?}").contains("malformed signing secret") && !format!("{error:?}").contains(wrong));
    }
    Ok(())
}

#[tokio::test]
async fn receivers_that_exist_already_find_the_digits_they_know() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let secret = "It's a Secret to Everybody ü";
    let settings = r#"{"signature": "hex", "signature_header": "X-Hub-Signature-256"}"#;
    assert_eq!(add(&world, &receiver.url("hook"), Some(secret), settings).await?.as_deref(), Some(secret));
    let relay = world.relay().await?;
    let request = next(&world, &receiver).await?;
    assert_eq!(request.header("x-hub-signature-256"), Some(&*format!("sha256={}", hmac(secret, &request)?)));
    ensure!(request.header("webhook-signature").is_none() && request.event_id().is_ok());

    // The header has room for one signature: it is that of the new secret.
    let new: String = world.session.one("SELECT outbox.rotate_secret('hook')").await?;
    relay.logged(r#""message":"changed""#, LONG).await?;
    let request = next(&world, &receiver).await?;
    assert_eq!(request.header("x-hub-signature-256"), Some(&*format!("sha256={}", hmac(&new, &request)?)));

    let settings = r#"{"signature": "hex", "signature_prefix": ""}"#;
    let kept = add(&world, &receiver.url("hook"), None, settings).await?.context("a secret")?;
    assert_eq!(kept, new, "the secret stays");
    world.processed().await
}

#[tokio::test]
async fn a_webhook_need_not_be_signed() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let none = r#"{"signature": "none"}"#;
    assert_eq!(add(&world, &receiver.url("hook"), None, none).await?, None);
    let _relay = world.relay().await?;
    let request = next(&world, &receiver).await?;
    ensure!(request.header("webhook-signature").is_none() && request.header("x-signature-256").is_none());
    ensure!(request.event_id().is_ok() && request.header("webhook-timestamp").is_some());
    let refused = world.session.execute("SELECT outbox.rotate_secret('hook')", &[]).await.err().context("refused")?;
    assert_eq!(refused.code().map(|code| code.code()), Some("42809"));
    let refused = add(&world, &receiver.url("hook"), Some("whatever it is"), none).await.err().context("refused")?;
    ensure!(format!("{refused:?}").contains("has no secret") && !format!("{refused:?}").contains("whatever"));
    world.processed().await
}

#[tokio::test]
async fn a_secret_of_another_kind_gives_way_to_a_new_one() -> Result<()> {
    let world = World::new().await?;
    let receiver = Receiver::start()?;
    let url = receiver.url("hook");
    add(&world, &url, Some("hunter22"), HEX).await?;
    let standard = add(&world, &url, None, "{}").await?.context("a new secret")?;
    ensure!(standard.starts_with("whsec_"));
    // Any text serves there, this one too.
    assert_eq!(add(&world, &url, None, HEX).await?, Some(standard.clone()));
    let public = add(&world, &url, None, ED25519).await?.context("a key pair")?;
    ensure!(public.starts_with("whpk_"));
    assert_eq!(add(&world, &url, None, r#"{"signature": "none"}"#).await?, None);
    assert_eq!(world.session.one::<i64>("SELECT count(*) FROM outbox.secret").await?, 0);
    let last = add(&world, &url, None, "{}").await?.context("a new secret")?;
    ensure!(last != standard);
    let _relay = world.relay().await?;
    ensure!(verifies(&last, &next(&world, &receiver).await?)?);
    world.execute(r#"SELECT outbox.alter_destination('hook', '{"settings": {"signature": "ed25519"}}')"#).await?;
    let public: String = world.session.one("SELECT outbox.rotate_secret('hook', '0')").await?;
    ensure!(public.starts_with("whpk_"));

    for (secret, settings) in [("short", HEX), (&*"x".repeat(129), HEX), ("hunter22", "{}")] {
        let error = add(&world, &url, Some(secret), settings).await.err().context("not refused")?;
        // Without the backtrace, in which some of these words stand.
        let error = format!("{error:#}");
        ensure!(error.contains("malformed signing secret") && !error.contains(secret), "{error}");
    }
    for settings in [
        r#"{"signature": "md5"}"#,
        r#"{"signature": "hex", "signature_header": "a b"}"#,
        r#"{"signature": "hex", "signature_header": "Webhook-Id"}"#,
        r#"{"signature": "hex", "signature_header": 7}"#,
        r#"{"signature": "hex", "signature_prefix": "a\nb"}"#,
        r#"{"signature": "hex", "signature_prefix": null}"#,
    ] {
        let error = add(&world, &url, None, settings).await.err().context("not refused")?;
        ensure!(format!("{error:?}").contains("settings.signature"), "{settings}: {error:?}");
    }
    world.processed().await
}

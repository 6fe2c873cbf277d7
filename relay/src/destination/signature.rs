//! Signatures of webhooks.
//!
//! Source: Standard Webhooks 1.0.0 (standardwebhooks.com): over `id.timestamp.body`, HMAC-SHA256 with `v1,` before its base64,
//! or Ed25519 with `v1a,`; several signatures are separated by a space. The kind `hex` is what receivers had before: the
//! digits of HMAC-SHA256 over the body alone, after a prefix, in one header.

use std::fmt::Write;

use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
use base64::{Engine, alphabet};
use hmac::{Hmac, KeyInit, Mac};
use reqwest::header::HeaderName;
use ring::signature::{ED25519, Ed25519KeyPair, UnparsedPublicKey};
use sha2::Sha256;

use super::ConfigError;
use super::body::Parts;
use super::json::Object;

/// PostgreSQL has judged the secret; what it decodes is decoded here: with or without padding, whatever the last bits are.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

const HEADER: HeaderName = HeaderName::from_static("webhook-signature");

/// How a destination's requests are signed: with which keys, the current one first.
pub enum Signer {
    Standard(Vec<Vec<u8>>),
    Ed25519(Vec<Ed25519KeyPair>),
    /// With the current key: the header has room for one signature.
    Hex {
        key: Vec<u8>,
        header: HeaderName,
        prefix: String,
    },
    Unsigned,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Signer::Standard(_) => "standard",
            Signer::Ed25519(_) => "ed25519",
            Signer::Hex { .. } => "hex",
            Signer::Unsigned => "none",
        })
    }
}

impl Signer {
    /// From a destination's settings and its secrets, the current one first. The error shows no secret.
    pub fn parse(settings: &Object, secrets: &[String]) -> Result<Self, ConfigError> {
        let kind = settings.string("signature");
        match kind.as_deref().unwrap_or("standard") {
            "none" => Ok(Signer::Unsigned),
            _ if secrets.is_empty() => Err(ConfigError("there is no secret to sign with".into())),
            "standard" => keys(secrets, "whsec_").map(Signer::Standard),
            "ed25519" => {
                let pairs = keys(secrets, "whsk_")?.into_iter().map(|key| key_pair(&key));
                pairs.collect::<Result<_, _>>().map(Signer::Ed25519)
            }
            "hex" => Ok(Signer::Hex {
                key: secrets[0].as_bytes().to_vec(),
                header: header(settings)?,
                prefix: settings.string("signature_prefix").as_deref().unwrap_or("sha256=").to_owned(),
            }),
            other => Err(ConfigError(format!("settings.signature is standard, ed25519, hex or none, not {other:?}"))),
        }
    }

    /// The header of a request, and its value; none if it is not signed.
    pub fn sign(&self, id: &str, timestamp: u64, body: &Parts) -> Option<(HeaderName, String)> {
        let signed = format!("{id}.{timestamp}.");
        let listed = |signatures: Vec<String>| Some((HEADER, signatures.join(" ")));
        match self {
            Signer::Standard(keys) => listed(
                keys.iter()
                    .map(|key| format!("v1,{}", STANDARD.encode(mac(key, signed.as_bytes(), body.slices()))))
                    .collect(),
            ),
            Signer::Ed25519(pairs) => {
                let message: Vec<u8> =
                    [signed.as_bytes()].into_iter().chain(body.slices()).flatten().copied().collect();
                listed(pairs.iter().map(|pair| format!("v1a,{}", STANDARD.encode(pair.sign(&message)))).collect())
            }
            Signer::Hex { key, header, prefix } => {
                let mut value = prefix.clone();
                for byte in mac(key, b"", body.slices()) {
                    // Writing to a string does not fail.
                    let _ = write!(value, "{byte:02x}");
                }
                Some((header.clone(), value))
            }
            Signer::Unsigned => None,
        }
    }
}

/// What a receiver has, to verify signatures with.
pub enum Key {
    Secret(Vec<u8>),
    /// Of Ed25519.
    Public(Vec<u8>),
}

impl Key {
    /// From `whsec_` or `whpk_` and base64.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let key = |prefix| Ok(keys(&[text.to_owned()], prefix)?.pop().unwrap_or_default());
        match text.starts_with("whpk_") {
            true => key("whpk_").map(Key::Public),
            false => key("whsec_").map(Key::Secret),
        }
    }

    /// The secret that is the text itself, as some take it by mistake.
    pub fn of_text(text: &str) -> Self {
        Key::Secret(text.as_bytes().to_vec())
    }

    /// What its signatures begin with.
    pub fn mark(&self) -> &'static str {
        match self {
            Key::Secret(_) => "v1,",
            Key::Public(_) => "v1a,",
        }
    }

    /// Whether a signature with its mark is of this message.
    pub fn holds(&self, signature: &str, id: &str, timestamp: u64, body: &[u8]) -> bool {
        let Some(signature) = signature.strip_prefix(self.mark()) else { return false };
        let Ok(signature) = LENIENT.decode(signature) else { return false };
        let before = format!("{id}.{timestamp}.");
        match self {
            Key::Secret(key) => mac(key, before.as_bytes(), std::iter::once(body)) == signature,
            Key::Public(key) => {
                let message = [before.as_bytes(), body].concat();
                UnparsedPublicKey::new(&ED25519, key).verify(&message, &signature).is_ok()
            }
        }
    }
}

fn keys(secrets: &[String], prefix: &str) -> Result<Vec<Vec<u8>>, ConfigError> {
    let key = |secret: &String| {
        let text: String = secret.trim().strip_prefix(prefix)?.chars().filter(|c| !c.is_whitespace()).collect();
        LENIENT.decode(text).ok()
    };
    let wrong = || ConfigError(format!("a signing secret is not {prefix} and base64"));
    secrets.iter().map(|secret| key(secret).ok_or_else(wrong)).collect()
}

/// The private key is the first half of a longer one.
fn key_pair(key: &[u8]) -> Result<Ed25519KeyPair, ConfigError> {
    let pair = key.get(..32).and_then(|seed| Ed25519KeyPair::from_seed_unchecked(seed).ok());
    pair.ok_or_else(|| ConfigError("a signing secret is no private key of Ed25519".into()))
}

fn header(settings: &Object) -> Result<HeaderName, ConfigError> {
    let name = settings.string("signature_header");
    let name = name.as_deref().unwrap_or("X-Signature-256").to_ascii_lowercase();
    HeaderName::from_bytes(name.as_bytes())
        .map_err(|_| ConfigError("settings.signature_header is no header name".into()))
}

fn mac<'a>(key: &[u8], before: &[u8], body: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    // HMAC takes keys of any length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return Vec::new() };
    mac.update(before);
    body.for_each(|part| mac.update(part));
    mac.finalize().into_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const PRIVATE: &str = "whsk_nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A=";

    fn signer(settings: &str, secrets: &[&str]) -> Result<Signer, ConfigError> {
        let secrets: Vec<String> = secrets.iter().map(|secret| (*secret).into()).collect();
        Signer::parse(&Object::new(settings), &secrets)
    }

    fn sign(settings: &str, secrets: &[&str], id: &str, timestamp: u64, body: &'static str) -> (String, String) {
        let signer = signer(settings, secrets).expect("valid secrets");
        let (header, value) = signer.sign(id, timestamp, &Parts::of(body)).expect("a signature");
        (header.to_string(), value)
    }

    /// The example of the Standard Webhooks libraries.
    #[test]
    fn the_known_message_has_the_known_signature() {
        let body = r#"{"test": 2432232314}"#;
        let signed = sign("{}", &[SECRET], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, body);
        assert_eq!(signed, ("webhook-signature".into(), "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=".into()));
    }

    /// The example of GitHub's documentation, "Validating webhook deliveries".
    #[test]
    fn the_digits_are_those_that_receivers_expect() {
        let digits = "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
        let secrets = ["It's a Secret to Everybody", "the one before"];
        let signed = sign(r#"{"signature": "hex"}"#, &secrets, "id", 1, "Hello, World!");
        assert_eq!(signed, ("x-signature-256".into(), format!("sha256={digits}")));
        let own = r#"{"signature": "hex", "signature_header": "X-Sign", "signature_prefix": ""}"#;
        assert_eq!(sign(own, &secrets, "id", 1, "Hello, World!"), ("x-sign".into(), digits.into()));
    }

    /// The first key pair of RFC 8032, section 7.1.
    #[test]
    fn the_public_key_verifies_what_the_private_one_signed() {
        let public = STANDARD.decode("11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=").expect("base64");
        let both = format!(
            "whsk_{}",
            STANDARD.encode([LENIENT.decode(&PRIVATE[5..]).expect("base64"), public.clone()].concat())
        );
        let (header, value) = sign(r#"{"signature": "ed25519"}"#, &[PRIVATE, &both], "msg", 7, "{}");
        let signatures: Vec<&str> = value.split(' ').filter_map(|one| one.strip_prefix("v1a,")).collect();
        assert_eq!((header.as_str(), signatures.len()), ("webhook-signature", 2));
        for signature in signatures {
            let signature = STANDARD.decode(signature).expect("base64");
            let key = UnparsedPublicKey::new(&ED25519, &public);
            assert!(key.verify(b"msg.7.{}", &signature).is_ok() && key.verify(b"msg.8.{}", &signature).is_err());
        }
    }

    #[test]
    fn two_keys_sign_twice() {
        let (_, value) = sign("{}", &[SECRET, "whsec_AAAA"], "a", 1, "x");
        assert_eq!(value.split(' ').filter(|s| s.starts_with("v1,")).count(), 2);
    }

    #[test]
    fn what_postgresql_decodes_is_a_key() {
        for secret in ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSx", "whsec_AB==", "whsec_AB", " whsec_AAAA\nAAAA\n"] {
            assert!(signer("{}", &[secret]).is_ok(), "{secret:?}");
        }
        for (settings, secrets) in [
            ("{}", &["whsec_!"][..]),
            ("{}", &[]),
            (r#"{"signature": "hex"}"#, &[]),
            (r#"{"signature": "ed25519"}"#, &[SECRET]),
            (r#"{"signature": "ed25519"}"#, &["whsk_AAAA"]),
            (r#"{"signature": "md5"}"#, &[SECRET]),
            (r#"{"signature": "hex", "signature_header": "a b"}"#, &[SECRET]),
        ] {
            assert!(signer(settings, secrets).is_err(), "{settings} {secrets:?}");
        }
        assert!(
            signer(r#"{"signature": "none"}"#, &[]).is_ok_and(|signer| signer.sign("a", 1, &Parts::of("")).is_none())
        );
    }

    #[test]
    fn keys_do_not_show_themselves() {
        assert_eq!(format!("{:?}", signer("{}", &[SECRET])), "Ok(standard)");
    }
}

//! Signatures of webhooks.
//!
//! Source: Standard Webhooks 1.0.0 (standardwebhooks.com), symmetric keys: `v1,` and the base64 of HMAC-SHA256 over
//! `id.timestamp.body`; several signatures are separated by a space.

use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
use base64::{Engine, alphabet};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::ConfigError;

/// PostgreSQL has judged the secret; what it decodes is decoded here: with or without padding, whatever the last bits are.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

fn key_text(secret: &str) -> String {
    let text = secret.trim().strip_prefix("whsec_").unwrap_or(secret);
    text.chars().filter(|c| !c.is_whitespace()).collect()
}

/// The keys of a destination, the current one first.
#[derive(Clone)]
pub struct Keys(Vec<Vec<u8>>);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({})", self.0.len())
    }
}

impl Keys {
    /// From secrets of the form `whsec_` and base64.
    pub fn parse(secrets: &[String]) -> Result<Self, ConfigError> {
        let key = |secret: &String| {
            LENIENT
                .decode(key_text(secret))
                .map_err(|_| ConfigError("a signing secret is not whsec_ and base64".into()))
        };
        secrets.iter().map(key).collect::<Result<_, _>>().map(Keys)
    }

    /// The one whose key is the text itself, as some take it by mistake.
    pub fn of_text(text: &str) -> Self {
        Keys(vec![text.as_bytes().to_vec()])
    }

    /// The value of the header `webhook-signature`.
    pub fn sign<'a>(&self, id: &str, timestamp: u64, body: impl Iterator<Item = &'a [u8]> + Clone) -> String {
        let signatures: Vec<String> = self.0.iter().map(|key| sign(key, id, timestamp, body.clone())).collect();
        signatures.join(" ")
    }
}

fn sign<'a>(key: &[u8], id: &str, timestamp: u64, body: impl Iterator<Item = &'a [u8]>) -> String {
    // HMAC takes keys of any length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return String::new() };
    mac.update(format!("{id}.{timestamp}.").as_bytes());
    body.for_each(|part| mac.update(part));
    format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    fn parts(body: &[u8]) -> impl Iterator<Item = &[u8]> + Clone {
        body.chunks(5)
    }

    /// The example of the Standard Webhooks libraries.
    #[test]
    fn the_known_message_has_the_known_signature() {
        let keys = Keys::parse(&[SECRET.into()]).expect("a valid secret");
        let signature = keys.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, parts(br#"{"test": 2432232314}"#));
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn two_keys_sign_twice() {
        let keys = Keys::parse(&[SECRET.into(), "whsec_AAAA".into()]).expect("valid secrets");
        assert_eq!(keys.sign("a", 1, parts(b"x")).split(' ').filter(|s| s.starts_with("v1,")).count(), 2);
    }

    #[test]
    fn what_postgresql_decodes_is_a_key() {
        for secret in ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSx", "whsec_AB==", "whsec_AB", " whsec_AAAA\nAAAA\n"] {
            assert!(Keys::parse(&[secret.into()]).is_ok(), "{secret:?}");
        }
        assert!(Keys::parse(&["whsec_!".into()]).is_err());
    }

    #[test]
    fn keys_do_not_show_themselves() {
        assert_eq!(format!("{:?}", Keys::parse(&[SECRET.into()])), "Ok(Keys(1))");
    }
}

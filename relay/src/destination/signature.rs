//! Signatures of webhooks.
//!
//! Source: Standard Webhooks 1.0.0 (standardwebhooks.com), symmetric keys: `v1,` and the base64 of HMAC-SHA256 over
//! `id.timestamp.body`; several signatures are separated by a space.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::ConfigError;

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
            STANDARD
                .decode(secret.strip_prefix("whsec_").unwrap_or(secret))
                .map_err(|_| ConfigError("a signing secret is not whsec_ and base64".into()))
        };
        secrets.iter().map(key).collect::<Result<_, _>>().map(Keys)
    }

    /// The value of the header `webhook-signature`.
    pub fn sign(&self, id: &str, timestamp: u64, body: &[u8]) -> String {
        let signatures: Vec<String> = self.0.iter().map(|key| sign(key, id, timestamp, body)).collect();
        signatures.join(" ")
    }
}

fn sign(key: &[u8], id: &str, timestamp: u64, body: &[u8]) -> String {
    // HMAC takes keys of any length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return String::new() };
    mac.update(format!("{id}.{timestamp}.").as_bytes());
    mac.update(body);
    format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    /// The example of the Standard Webhooks libraries.
    #[test]
    fn the_known_message_has_the_known_signature() {
        let keys = Keys::parse(&[SECRET.into()]).expect("a valid secret");
        let signature = keys.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, br#"{"test": 2432232314}"#);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn two_keys_sign_twice() {
        let keys = Keys::parse(&[SECRET.into(), "whsec_AAAA".into()]).expect("valid secrets");
        assert_eq!(keys.sign("a", 1, b"x").split(' ').filter(|s| s.starts_with("v1,")).count(), 2);
    }

    #[test]
    fn keys_do_not_show_themselves() {
        assert_eq!(format!("{:?}", Keys::parse(&[SECRET.into()])), "Ok(Keys(1))");
    }
}

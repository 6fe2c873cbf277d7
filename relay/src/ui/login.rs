//! Who may look: one password, sessions in memory, and wrong passwords at ten a second at most for everybody together.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use ring::rand::{SecureRandom, SystemRandom};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Between two tries, whoever makes them.
const PACE: Duration = Duration::from_millis(100);

/// A try that would have to wait longer is refused.
const PATIENCE: Duration = Duration::from_secs(5);

/// A session ends after so long, however it is used.
const LIFE: Duration = Duration::from_secs(12 * 3600);

/// Wrong passwords are told so often at most, with their number.
const TOLD: Duration = Duration::from_secs(60);

/// Sessions at once; the oldest goes.
const MOST: usize = 256;

pub struct Login {
    random: SystemRandom,
    /// Passwords are compared by their MACs under a key of this process: in constant time, whatever their lengths.
    key: [u8; 32],
    password: Vec<u8>,
    /// When the next try may be made.
    next: Mutex<Instant>,
    /// When wrong tries were told, and how many there were since.
    wrong: Mutex<(Option<Instant>, u64)>,
    /// By the hash of the token, which alone is kept: when each ends.
    sessions: Mutex<HashMap<[u8; 32], Instant>>,
}

/// What came of a try.
#[derive(Debug, PartialEq, Eq)]
pub enum Tried {
    /// The session's token.
    Right(String),
    Wrong,
    TooMany,
}

impl Login {
    pub fn new(password: &str) -> Result<Self> {
        let random = SystemRandom::new();
        let mut key = [0; 32];
        fill(&random, &mut key)?;
        let password = mac(&key, password)?.finalize().into_bytes().to_vec();
        Ok(Login {
            random,
            key,
            password,
            next: Mutex::new(Instant::now()),
            wrong: Mutex::default(),
            sessions: Mutex::default(),
        })
    }

    /// Waits for its turn, which is taken before the password is looked at: whoever does not wait for the answer gains
    /// nothing.
    pub async fn attempt(&self, password: &str) -> Result<Tried> {
        let Some(turn) = self.turn() else { return Ok(Tried::TooMany) };
        tokio::time::sleep_until(turn.into()).await;
        match mac(&self.key, password)?.verify_slice(&self.password) {
            Ok(()) => Ok(Tried::Right(self.begin()?)),
            Err(_) => Ok(Tried::Wrong),
        }
    }

    fn turn(&self) -> Option<Instant> {
        let now = Instant::now();
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = now.max(*next);
        if turn > now + PATIENCE {
            return None;
        }
        *next = turn + PACE;
        Some(turn)
    }

    /// Another wrong try; how many there were, if it is time to tell.
    pub fn wrong_tries_to_tell(&self) -> Option<u64> {
        let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        wrong.1 += 1;
        if wrong.0.is_some_and(|told| told.elapsed() < TOLD) {
            return None;
        }
        wrong.0 = Some(Instant::now());
        Some(std::mem::take(&mut wrong.1))
    }

    fn begin(&self) -> Result<String> {
        let mut token = [0; 32];
        fill(&self.random, &mut token)?;
        let token = URL_SAFE_NO_PAD.encode(token);
        let now = Instant::now();
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|_, ends| *ends > now);
        if sessions.len() >= MOST
            && let Some(oldest) = sessions.iter().min_by_key(|(_, ends)| **ends).map(|(token, _)| *token)
        {
            sessions.remove(&oldest);
        }
        sessions.insert(hash(&token), now + LIFE);
        Ok(token)
    }

    pub fn is_session(&self, token: &str) -> bool {
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.get(&hash(token)).is_some_and(|ends| *ends > Instant::now())
    }

    pub fn end(&self, token: &str) {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).remove(&hash(token));
    }

    /// Seconds that a browser keeps a session's cookie.
    pub fn life() -> u64 {
        LIFE.as_secs()
    }
}

fn fill(random: &SystemRandom, bytes: &mut [u8]) -> Result<()> {
    random.fill(bytes).map_err(|_| Error::Server("the system gives no random numbers".into()))
}

fn mac(key: &[u8], text: &str) -> Result<Hmac<Sha256>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).map_err(|error| Error::Server(error.to_string()))?;
    mac.update(text.as_bytes());
    Ok(mac)
}

fn hash(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_password_alone_begins_a_session_and_a_session_can_be_ended() {
        let login = Login::new("correct horse").unwrap();
        for wrong in ["", "correct", "correct horse ", "Correct horse"] {
            assert_eq!(login.attempt(wrong).await.unwrap(), Tried::Wrong, "{wrong:?}");
        }
        let Tried::Right(token) = login.attempt("correct horse").await.unwrap() else { panic!("refused") };
        assert!(login.is_session(&token) && !login.is_session("x") && token.len() == 43);
        login.end(&token);
        assert!(!login.is_session(&token));
    }

    #[tokio::test]
    async fn tries_are_slowed_down_for_everybody_and_giving_up_gains_nothing() {
        let login = Login::new("right").unwrap();
        let began = Instant::now();
        for _ in 0..20 {
            // Whoever asks and leaves.
            let _left = tokio::time::timeout(Duration::ZERO, login.attempt("wrong")).await;
        }
        assert!(matches!(login.attempt("right").await.unwrap(), Tried::Right(_)));
        assert!(began.elapsed() >= PACE * 20, "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn more_tries_than_anybody_could_wait_for_are_refused() {
        let login = Login::new("right").unwrap();
        while login.turn().is_some() {}
        assert_eq!(login.attempt("right").await.unwrap(), Tried::TooMany);
    }

    #[test]
    fn wrong_tries_are_told_once_and_counted() {
        let login = Login::new("right").unwrap();
        assert_eq!(login.wrong_tries_to_tell(), Some(1));
        assert!((0..100).all(|_| login.wrong_tries_to_tell().is_none()));
        login.wrong.lock().unwrap().0 = None;
        assert_eq!(login.wrong_tries_to_tell(), Some(101));
    }

    #[test]
    fn the_oldest_session_goes_when_there_are_too_many() {
        let login = Login::new("right").unwrap();
        let first = login.begin().unwrap();
        (0..MOST).for_each(|_| drop(login.begin().unwrap()));
        assert!(!login.is_session(&first));
    }
}

//! The soak's own consumers: they claim in SQL, acknowledge, fail, release, and forget.

use std::sync::Arc;

use outbox_tests::session::Session;
use outbox_tests::trace::now_us;
use uuid::Uuid;

use crate::judge::OWN;
use crate::random::Random;
use crate::record::{End, Hold};
use crate::stage::Stage;
use crate::trouble::{Trouble, connected};

/// A claim of a session that is not attached ends then.
const LEASE: i64 = 3_000_000;

pub struct Consumer {
    stage: Arc<Stage>,
    random: Random,
    number: u64,
    attached: bool,
    /// Nothing but acknowledgements.
    plain: bool,
}

/// What a claim holds, by the place of its hold in the record.
struct Held {
    id: i64,
    aggregate: Option<String>,
    place: usize,
}

impl Consumer {
    pub fn new(stage: Arc<Stage>, round: u64, number: u64) -> Self {
        let random = Random::stream(stage.seed, round * 1000 + 500 + number);
        Consumer { stage, random, number, attached: !number.is_multiple_of(3), plain: false }
    }

    pub async fn consume(mut self) {
        let url = self.stage.url();
        while self.stage.is_consuming() {
            let Some(session) = connected(&url).await else { continue };
            let trouble = match self.attach(&session).await {
                Ok(()) => self.work(&session).await.err(),
                Err(trouble) => Some(trouble),
            };
            if let Some(Trouble::Strange(what)) = trouble {
                self.stage.record.complain(format!("consumer {}: {what}", self.number));
            }
        }
    }

    async fn attach(&self, session: &Session) -> Result<(), Trouble> {
        if self.attached {
            session.batch_execute(&format!("SELECT outbox.attach('soak {}')", self.number)).await?;
        }
        Ok(())
    }

    /// Claims until the session is over, or forgotten with what it holds.
    async fn work(&mut self, session: &Session) -> Result<(), Trouble> {
        while self.stage.is_consuming() {
            self.plain = !self.stage.is_storming();
            if !self.plain && self.random.percent(1) {
                return Ok(());
            }
            match self.claim(session).await {
                Ok(0) => tokio::time::sleep(self.random.millis(50, 200)).await,
                Ok(_) => {}
                Err(Trouble::GivenUp) => return Ok(()),
                Err(trouble) => return Err(trouble),
            }
        }
        Ok(())
    }

    async fn claim(&mut self, session: &Session) -> Result<usize, Trouble> {
        let lease = if self.attached { "1 hour" } else { "3 s" };
        let most = 1 + self.random.below(30);
        let asked = now_us();
        let claim = format!(
            "SELECT id, event_id, claim_token, aggregate_id, destinations FROM outbox.claim({most}, ARRAY['{OWN}'], '{lease}')"
        );
        let rows = session.query(&claim, &[]).await?;
        let from = now_us();
        let Some(token) = rows.first().map(|row| row.get::<_, i64>(2)) else { return Ok(0) };
        let mut held = Vec::new();
        {
            let mut record = self.stage.record.lock();
            for row in &rows {
                let (event, to): (Uuid, Vec<String>) = (row.get(1), row.get(4));
                if to != [OWN] {
                    record.complaints.push(format!("{event} was handed out for {to:?} and claimed for {OWN}"));
                }
                held.push(Held { id: row.get(0), aggregate: row.get(3), place: record.holds.len() });
                record.holds.push(Hold { event, token, asked, from, until: from, end: End::Lost });
            }
        }
        let count = held.len();
        self.settle(session, token, held, asked + LEASE).await?;
        Ok(count)
    }

    async fn settle(&mut self, session: &Session, token: i64, held: Vec<Held>, lease: i64) -> Result<(), Trouble> {
        if self.plain || self.random.percent(60) {
            return self.acknowledge(session, token, &held, lease).await;
        }
        let mut left = held;
        left.sort_by_key(|held| held.id);
        while !left.is_empty() {
            tokio::time::sleep(self.random.millis(0, 40)).await;
            let one = left.remove(0);
            match self.random.below(100) {
                0..2 => return self.release(session, token, &one, &left, lease).await,
                // Forgets what it holds, which the end of the session or of the lease gives back.
                2..3 => return Err(Trouble::GivenUp),
                3..10 => {
                    self.fail(session, token, &one, lease).await?;
                    left.retain(|other| one.aggregate.is_none() || other.aggregate != one.aggregate);
                }
                10..11 => self.reject(session, token, &one, lease).await?,
                _ => self.acknowledge(session, token, std::slice::from_ref(&one), lease).await?,
            }
        }
        Ok(())
    }

    /// Whether an answer means that the hold was lost by a fault, and not without a reason.
    fn may_be_lost(&self, lease: i64) -> bool {
        !self.attached && now_us() > lease
    }

    async fn acknowledge(&self, session: &Session, token: i64, held: &[Held], lease: i64) -> Result<(), Trouble> {
        let ids: Vec<i64> = held.iter().map(|held| held.id).collect();
        let sent = now_us();
        self.end(held, None, End::PerhapsAcknowledged(sent));
        let count: i64 = session.query_one("SELECT outbox.ack($1, $2)", &[&token, &ids]).await?.get(0);
        if count == ids.len() as i64 {
            self.end(held, Some(sent), End::Acknowledged { sent, answered: now_us() });
        } else if !self.may_be_lost(lease) {
            let what = format!("consumer {}: {count} of {ids:?} of claim {token} were acknowledged", self.number);
            self.stage.record.complain(what);
        } else if count == 0 {
            self.end(held, None, End::Lost);
        }
        Ok(())
    }

    async fn fail(&mut self, session: &Session, token: i64, one: &Held, lease: i64) -> Result<(), Trouble> {
        let sent = now_us();
        let fail = format!("SELECT outbox.fail({token}, {}, 'soak', '{} ms')", one.id, self.random.below(500));
        let done = self.truth(session, &fail).await?;
        self.answered(one, sent, done, End::Returned, lease, "fail");
        Ok(())
    }

    async fn reject(&self, session: &Session, token: i64, one: &Held, lease: i64) -> Result<(), Trouble> {
        let sent = now_us();
        let done = self.truth(session, &format!("SELECT outbox.reject({token}, {}, 'soak')", one.id)).await?;
        self.answered(one, sent, done, End::Rejected, lease, "be rejected");
        Ok(())
    }

    async fn release(
        &self,
        session: &Session,
        token: i64,
        one: &Held,
        left: &[Held],
        lease: i64,
    ) -> Result<(), Trouble> {
        let sent = now_us();
        let count: i64 = session.query_one("SELECT outbox.release($1)", &[&token]).await?.get(0);
        let done = count == left.len() as i64 + 1;
        for held in left.iter().chain([one]) {
            self.answered(held, sent, done, End::Returned, lease, "be released");
        }
        Ok(())
    }

    async fn truth(&self, session: &Session, sql: &str) -> Result<bool, Trouble> {
        Ok(session.query_one(sql, &[]).await?.get(0))
    }

    fn answered(&self, one: &Held, sent: i64, done: bool, end: End, lease: i64, what: &str) {
        if done {
            self.end(std::slice::from_ref(one), Some(sent), end);
        } else if !self.may_be_lost(lease) {
            self.stage
                .record
                .complain(format!("consumer {}: event {} was held and could not {what}", self.number, one.id));
        }
    }

    fn end(&self, held: &[Held], proved: Option<i64>, end: End) {
        let mut record = self.stage.record.lock();
        for held in held {
            if let Some(hold) = record.holds.get_mut(held.place) {
                hold.end = end;
                hold.until = proved.unwrap_or(hold.until);
            }
        }
    }
}

/// How many there are.
pub const CONSUMERS: u64 = 5;

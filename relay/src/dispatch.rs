//! The relay at work during one session with PostgreSQL: claim, hand to the lanes, settle what ends, renew what takes
//! long. One task owns all of it, so there is no lock. Nothing here runs on a tick: each timer is set to the moment
//! at which something that is held is due, and with nothing held there is none.

use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::watch;
use tokio_postgres::Notification;

use crate::agenda::Agenda;
use crate::budget::{Budget, Room, Size};
use crate::config::Tuning;
use crate::dead_letters::{DeadLetter, DeadLetters, Line};
use crate::destination::{Environment, Outcome, Spec, Standing};
use crate::directory::Which;
use crate::error::{Error, Result};
use crate::lane::{Done, News};
use crate::lanes::{Ask, Given, Lanes, Taken};
use crate::lease::{Asked, Lease};
use crate::ledger::{Ended, Key, Ledger, Settlement};
use crate::metrics::Metrics;
use crate::shutdown::Shutdown;
use crate::store::{Claimed, Store, Unread, Wanted};
use crate::timer::sleep_until;
use crate::{trace, ui};

/// A server may be busy for a while: with a recovery, or with what an operator asked for.
const SHORTEST_SILENCE: Duration = Duration::from_secs(60);

/// What is unanswered for longer than any lease ends the session: all that it holds has gone to others by then.
pub fn answer_limit(tuning: &Tuning) -> Duration {
    tuning.lease.max(SHORTEST_SILENCE)
}

/// What a claim brought, and what was asked for.
struct Batch {
    asked: usize,
    wanted: Wanted,
    events: Vec<Claimed>,
    at: Asked,
}

/// What a session's queries bring back.
enum Answer {
    Claimed(Batch),
    Settled(Settlement, Vec<f64>, Vec<DeadLetter>),
    Destinations(Which, Vec<Spec>),
    Renewed(Vec<i64>, Asked),
    Told,
}

pub struct Dispatcher {
    store: Arc<Store>,
    environment: Arc<Environment>,
    tuning: Tuning,
    metrics: Metrics,
    budget: Budget,
    lanes: Lanes,
    ledger: Ledger,
    done: UnboundedReceiver<Done>,
    /// How the connection to each broker stands, from the first destination on that needs it.
    brokers: Vec<(Arc<str>, watch::Receiver<Standing>)>,
    queries: FuturesUnordered<BoxFuture<'static, Result<Answer>>>,
    agenda: Agenda<Batch>,
    /// There may be more to claim.
    more: bool,
    /// The next claim is also for destinations that lag behind.
    lagging_too: bool,
    /// When to look again although nothing happened.
    look_again: Option<Instant>,
    dead_letters: DeadLetters,
}

impl Dispatcher {
    /// Ready to catch up: the first thing it does is to read the destinations, then to claim.
    pub fn new(store: Arc<Store>, environment: Arc<Environment>, tuning: Tuning, metrics: Metrics) -> Self {
        let (ended, done) = unbounded_channel();
        let budget = Budget { max_events: tuning.max_events_in_flight, max_bytes: tuning.max_bytes_in_flight };
        let lanes = Lanes::new(tuning.max_in_flight, environment.clone(), metrics.clone(), ended);
        Dispatcher {
            store,
            environment,
            tuning,
            metrics,
            budget,
            lanes,
            ledger: Ledger::default(),
            done,
            brokers: Vec::new(),
            queries: FuturesUnordered::new(),
            agenda: Agenda::new(),
            more: true,
            lagging_too: false,
            look_again: None,
            dead_letters: DeadLetters::default(),
        }
    }

    /// Works until the session is lost (an error) or, after a shutdown, everything held is settled or given back.
    pub async fn run(&mut self, notified: &mut UnboundedReceiver<Notification>, shutdown: &Shutdown) -> Result<()> {
        let mut ended = Vec::with_capacity(512);
        loop {
            self.advance();
            if self.agenda.is_stopping() && self.ledger.is_empty() && self.queries.is_empty() {
                return Ok(());
            }
            let timer = self.next_timer();
            tokio::select! {
                biased;
                _ = self.done.recv_many(&mut ended, 512) => {
                    ended.drain(..).for_each(|done| self.delivery_ended(done));
                }
                // Before the answers: what came with a claim's answer is older than the answer.
                Some(notification) = notified.recv() => self.notified(&notification),
                Some(answer) = self.queries.next(), if !self.queries.is_empty() => self.answered(answer?),
                (broker, standing) = changed(&mut self.brokers) => self.broker_changed(&broker, standing),
                () = shutdown.requested(), if !self.agenda.is_stopping() => self.stop(),
                () = sleep_until(timer), if timer.is_some() => {}
            }
        }
    }

    /// Starts whatever can be started now.
    fn advance(&mut self) {
        let now = Instant::now();
        self.look_again = self.ledger.report_partial(now);
        self.settle();
        if let Some(which) = self.agenda.begin_reading() {
            self.read_destinations(which);
        }
        if self.agenda.may_claim() {
            let room = self.room();
            let missed = self.lanes.any_missed(self.tuning.claim_batch, &room, now);
            if self.more || missed {
                self.claim(&room, self.lagging_too || missed, now);
            }
        }
        self.renew(now);
        self.dead_letters.due(now).iter().for_each(Line::write);
        self.lanes.end_idle(now);
        if self.agenda.may_give_back() {
            self.give_back();
        }
        self.metrics.held.set(i64::try_from(self.ledger.load().events).unwrap_or(i64::MAX));
    }

    fn next_timer(&self) -> Option<Instant> {
        let next_try = self.lanes.next_try().filter(|_| self.agenda.may_claim());
        let (next_end, next_line) = (self.lanes.next_end(), self.dead_letters.next());
        let timers = [self.look_again, self.ledger.next_renewal(), next_try, next_end, next_line];
        timers.into_iter().flatten().min()
    }

    /// What is left of what the relay may hold.
    fn room(&self) -> Room {
        self.budget.room(self.ledger.load())
    }

    fn query(&mut self, query: impl Future<Output = Result<Answer>> + Send + 'static) {
        let limit = answer_limit(&self.tuning);
        self.queries.push(Box::pin(async move {
            let silent = |_| Error::Server(format!("PostgreSQL did not answer within {} s", limit.as_secs()));
            tokio::time::timeout(limit, query).await.map_err(silent)?
        }));
    }

    fn claim(&mut self, room: &Room, lagging_too: bool, now: Instant) {
        match self.lanes.ask(self.tuning.claim_batch, lagging_too, room, now) {
            Ask::Wait { until } => {
                self.look_again = [self.look_again, until].into_iter().flatten().min();
            }
            Ask::Claim { count, wanted } => {
                if wanted.only.is_none() {
                    (self.more, self.lagging_too) = (false, !self.lagging_too);
                }
                self.claim_for(count, wanted);
            }
        }
    }

    fn claim_for(&mut self, asked: usize, wanted: Wanted) {
        let (store, lease, at) = (self.store.clone(), self.tuning.lease, Asked::now());
        let bytes = self.budget.bytes_of_claim(self.ledger.load());
        self.agenda.claim_began();
        self.metrics.claims.inc();
        // Large events take their time: the limit is on silence, not on the whole.
        let silence = answer_limit(&self.tuning);
        self.queries.push(Box::pin(async move {
            let events = store.claim(asked, &wanted, lease, bytes, silence).await?;
            Ok(Answer::Claimed(Batch { asked, wanted, events, at }))
        }));
    }

    fn settle(&mut self) {
        if !self.agenda.may_settle() {
            return;
        }
        let Some(settlement) = self.ledger.settlement() else {
            return;
        };
        self.agenda.settlement_began();
        self.metrics.settlements.inc();
        let store = self.store.clone();
        self.query(async move {
            let (latencies, dead) = store.settle(&settlement.tokens, &settlement.ids, &settlement.exceptions).await?;
            Ok(Answer::Settled(settlement, latencies, dead))
        });
    }

    fn read_destinations(&mut self, which: Which) {
        let (store, environment) = (self.store.clone(), self.environment.clone());
        self.query(async move {
            environment.allow_networks_of_database(&store.webhook_allow_networks().await?);
            let specs = store.destinations(&which).await?;
            Ok(Answer::Destinations(which, specs))
        });
    }

    fn renew(&mut self, now: Instant) {
        let due = self.ledger.renew(now, now + self.tuning.lease / 3);
        if !due.is_empty() {
            let (store, lease, at) = (self.store.clone(), self.tuning.lease, Asked::now());
            self.query(async move {
                let open = store.renew(&due, lease).await?;
                Ok(Answer::Renewed(open, at))
            });
        }
    }

    fn give_back(&mut self) {
        let tokens = self.ledger.take_given_back();
        if !tokens.is_empty() {
            let store = self.store.clone();
            self.query(async move {
                store.release(&tokens).await?;
                Ok(Answer::Told)
            });
        }
    }

    fn answered(&mut self, answer: Answer) {
        match answer {
            Answer::Claimed(batch) => {
                // One that was added a moment ago: what announces it is on its way.
                let unknown = self.lanes.unknown(batch.events.iter().flat_map(|event| &event.destinations));
                if !unknown.is_empty() {
                    self.agenda.destinations_changed(Which::These(unknown));
                }
                if let Some(batch) = self.agenda.claim_answered(batch) {
                    self.claimed(batch);
                }
            }
            Answer::Settled(settlement, latencies, dead) => {
                self.agenda.settled();
                let now = Instant::now();
                dead.into_iter().filter_map(|dead| self.dead_letters.add(dead, now)).for_each(|line| line.write());
                // What was given back can be claimed now, by this relay too.
                self.more |= settlement.exceptions.iter().any(|e| e.outcome == "released");
                self.metrics.processed(&latencies);
                ui::happened();
                settlement.delivered.iter().for_each(|event_id| trace::step("settled", event_id, None));
            }
            Answer::Destinations(which, specs) => {
                let kept = self.agenda.destinations_read();
                self.more = true;
                if which == Which::All && specs.is_empty() {
                    say_that_there_is_no_destination();
                }
                let removed = self.lanes.update(&which, specs);
                self.say_why_disabled(removed);
                self.follow_brokers();
                self.tell_what_is_unable();
                if let Some(batch) = kept {
                    self.claimed(batch);
                }
            }
            Answer::Renewed(tokens, at) => self.ledger.renewed(&tokens, at, self.tuning.lease),
            Answer::Told => {}
        }
    }

    /// What is served no longer was removed, or is disabled, which an operator should see.
    fn say_why_disabled(&mut self, names: Vec<Arc<str>>) {
        if names.is_empty() {
            return;
        }
        let store = self.store.clone();
        self.query(async move {
            for (destination, reason) in store.disabled(&names).await? {
                tracing::warn!(destination, reason, "destination disabled");
            }
            Ok(Answer::Told)
        });
    }

    /// Each from the first destination on that needs it.
    fn follow_brokers(&mut self) {
        let followed = |name: &Arc<str>| self.brokers.iter().any(|(known, _)| known == name);
        let new: Vec<Arc<str>> = self.lanes.brokers().filter(|name| !followed(name)).cloned().collect();
        for name in new {
            let Some(mut broker) = self.environment.broker_standing(&name) else { continue };
            let standing = broker.borrow_and_update().clone();
            self.brokers.push((name.clone(), broker));
            self.broker_changed(&name, standing);
        }
    }

    /// What is owed to its destinations goes on at once when the connection stands; the database knows of that, and of
    /// the contrary.
    fn broker_changed(&mut self, broker: &Arc<str>, standing: Standing) {
        let back = self.lanes.broker_changed(broker, standing);
        self.more = true;
        if !back.is_empty() && !self.agenda.is_stopping() {
            let store = self.store.clone();
            self.query(async move {
                store.destinations_back(&back).await?;
                Ok(Answer::Told)
            });
        }
        self.tell_what_is_unable();
    }

    fn tell_what_is_unable(&mut self) {
        for (error, names) in self.lanes.take_reports() {
            let store = self.store.clone();
            self.query(async move {
                store.destinations_unable(&names, &error).await?;
                Ok(Answer::Told)
            });
        }
    }

    fn claimed(&mut self, Batch { asked, wanted, events, at }: Batch) {
        self.metrics.claimed.inc_by(events.len() as u64);
        // Deliveries that are due again may come several to an event, and half of the room may have been kept for them.
        let deliveries: usize = events.iter().map(|event| event.destinations.len()).sum();
        let all = deliveries * 2 < asked || events.is_empty();
        self.more |= !all;
        let given = given(&events);
        self.lanes.claimed(&wanted, events.len(), &given, all);
        let renew_at = Instant::now() + self.tuning.lease / 3;
        let lease = Arc::new(Lease::new(at, self.tuning.lease));
        let crowded = events.len() >= asked;
        events.into_iter().for_each(|event| self.hand_out(event, renew_at, &lease));
        self.lanes.flush(&wanted, &given, crowded);
    }

    fn hand_out(&mut self, claimed: Claimed, renew_at: Instant, lease: &Arc<Lease>) {
        if claimed.destinations.is_empty() {
            // There is no destination any more. Its lease ends.
            return;
        }
        let key = (claimed.token, claimed.id);
        trace::step("claimed", &claimed.event_id, None);
        let (room, size) = (self.room(), self.budget.size(claimed.size));
        let kept = if claimed.event.is_ok() { size } else { Size::default() };
        self.ledger.hold(key, claimed.destinations.len(), claimed.event_id, kept, renew_at, lease);
        let taken = match claimed.event {
            Ok(_) if self.agenda.is_stopping() => None,
            Ok(event) => Some(Taken { key, size, event: Arc::new(event), lease: lease.clone(), room }),
            Err(Unread::NoRoom) => None,
            Err(Unread::Unreadable(error)) => return self.reject(key, &claimed.destinations, &error),
        };
        for destination in &claimed.destinations {
            let attempt = claimed.attempts.get(destination).copied().unwrap_or(0) + 1;
            let given = match &taken {
                Some(taken) => self.lanes.give(destination, attempt, taken),
                None => {
                    self.lanes.refuse(destination, size);
                    false
                }
            };
            if !given {
                self.metrics.released.inc();
                self.ledger.ended(key, &destination.as_str().into(), Ended::Released, Instant::now());
            }
        }
    }

    /// What nobody can be given is a dead letter everywhere, and holds up nothing.
    fn reject(&mut self, key: Key, destinations: &[String], error: &str) {
        for destination in destinations {
            let ended = Ended::With(Outcome::Rejected { error: error.to_owned() });
            self.ledger.ended(key, &destination.as_str().into(), ended, Instant::now());
        }
    }

    fn delivery_ended(&mut self, done: Done) {
        let now = Instant::now();
        self.more |= self.lanes.ended(&done, now);
        if done.ended == Ended::Released {
            self.metrics.released.inc();
        }
        if matches!(done.news, News::Down { .. } | News::Unable(_)) {
            self.ledger.doubt(&done.destination);
        }
        self.ledger.ended(done.key, &done.destination, done.ended, now);
    }

    /// Any notification is only a wake-up, whatever its payload.
    fn notified(&mut self, notification: &Notification) {
        self.metrics.notifications.inc();
        ui::happened();
        if notification.channel() == "outbox_destinations" {
            self.agenda.destinations_changed(Which::named(notification.payload()));
        } else {
            trace::notified(notification.payload());
            self.more = true;
            self.lanes.something_came();
        }
    }

    fn stop(&mut self) {
        self.agenda.stop();
        self.ledger.stop();
        self.lanes.halt();
    }
}

fn given(events: &[Claimed]) -> Given {
    let mut given = Given::new();
    for event in events {
        for to in &event.destinations {
            if !given.contains_key(to) {
                given.insert(to.clone(), (0, 0));
            }
            if let Some((deliveries, bytes)) = given.get_mut(to) {
                (*deliveries, *bytes) = (*deliveries + 1, *bytes + event.size);
            }
        }
    }
    given
}

/// What an operator has to do first.
const NO_DESTINATION: &str = "no destination yet, so events wait: SELECT outbox.add_rabbitmq('orders') or \
     SELECT outbox.add_webhook('crm', 'https://…') adds one";

fn say_that_there_is_no_destination() {
    static SAID: Once = Once::new();
    SAID.call_once(|| tracing::info!("{NO_DESTINATION}"));
}

/// The next change of how a broker stands.
async fn changed(brokers: &mut [(Arc<str>, watch::Receiver<Standing>)]) -> (Arc<str>, Standing) {
    let change = async |(name, receiver): &mut (Arc<str>, watch::Receiver<Standing>)| match receiver.changed().await {
        Ok(()) => (name.clone(), receiver.borrow_and_update().clone()),
        Err(_) => std::future::pending().await,
    };
    let mut changes: FuturesUnordered<_> = brokers.iter_mut().map(change).collect();
    match changes.next().await {
        Some(changed) => changed,
        None => std::future::pending().await,
    }
}

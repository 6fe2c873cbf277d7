//! The destinations that this relay serves, and the lanes of those that have something to do; kept in step with the
//! database. A destination has a lane from its first delivery until a while after its last.
//!
//! A destination that is down, or that this relay can't serve, is not asked for; after a while one event is, to see
//! whether it is so still. Nobody else notices.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use crate::budget::{Room, Size};
use crate::destination::{Destination, Environment, Event, Spec, Standing};
use crate::directory::{Change, Directory, Which};
use crate::lane::{Done, Item, News, Order, Report, SharedPace};
use crate::lease::Lease;
use crate::ledger::Key;
use crate::metrics::{Metrics, Unable};
use crate::pauses::Pauses;
use crate::prepare::Preparer;
use crate::queue::OrderingKey;
use crate::served::Served;
use crate::store::Wanted;
use crate::window::Window;
use crate::windows::{Id, Plan, Question, Windows};

/// How long a lane stays after its last delivery.
const LINGER: Duration = Duration::from_secs(60);

/// Lanes that may stay although they have nothing to do.
const MOST_IDLE: usize = 500;

/// Destinations that are tried with one claim.
const TRIES: usize = 64;

/// Those that are not tried have the claims in between: however many are to be tried, an event waits for one try at most.
const BETWEEN_TRIES: Duration = Duration::from_millis(50);

/// More changes than these are not logged one by one.
const MOST_LOGGED: usize = 20;

pub struct Lanes {
    directory: Directory,
    lanes: HashMap<Id, Served>,
    by_name: HashMap<Arc<str>, Id>,
    windows: Windows,
    /// Lanes with nothing to do, and since when.
    idle: BTreeSet<(Instant, Id)>,
    /// Of destinations without a lane that were throttled.
    paces: HashMap<Arc<str>, SharedPace>,
    /// Webhooks that are left alone.
    webhooks: Pauses<LeftAlone>,
    /// RabbitMQ destinations that are left alone.
    of_broker: Pauses<LeftAlone>,
    /// Destinations that a claim handed events out for, and that could not be read.
    unserved: BTreeSet<Arc<str>>,
    /// Lanes that the present batch gave something to, or refused.
    touched: BTreeSet<Id>,
    max_in_flight: usize,
    environment: Arc<Environment>,
    metrics: Metrics,
    preparer: Preparer,
    done: UnboundedSender<Done>,
    next_id: Id,
    /// How the connections to the brokers stand, of those that any destination needs.
    brokers: BTreeMap<Arc<str>, Standing>,
    networks: u64,
    /// What the database is to be told: why this relay can't serve which destinations.
    reports: BTreeMap<String, Vec<Arc<str>>>,
    /// Nothing is tried before this moment.
    no_try_before: Option<Instant>,
}

/// What ends when a destination is no longer left alone.
#[derive(Default)]
struct LeftAlone {
    _unable: Option<Unable>,
    /// This relay has no such destination as it is configured.
    broken: bool,
}

/// What a claim brought to each destination: deliveries and their bytes.
pub type Given = HashMap<String, (usize, usize)>;

/// An event of a claim, to be given to its destinations.
pub struct Taken {
    pub key: Key,
    pub size: Size,
    pub event: Arc<Event>,
    pub lease: Arc<Lease>,
    /// What the relay had left before it took the event: the same for each of its destinations, whatever its name.
    pub room: Room,
}

/// What a claim asks for.
pub enum Ask {
    Claim { count: usize, wanted: Wanted },
    Wait { until: Option<Instant> },
}

impl Lanes {
    pub fn new(
        max_in_flight: usize,
        environment: Arc<Environment>,
        metrics: Metrics,
        done: UnboundedSender<Done>,
    ) -> Self {
        let networks = environment.generation_of_networks();
        Lanes {
            directory: Directory::default(),
            lanes: HashMap::new(),
            by_name: HashMap::new(),
            windows: Windows::default(),
            idle: BTreeSet::new(),
            paces: HashMap::new(),
            webhooks: Pauses::default(),
            of_broker: Pauses::default(),
            unserved: BTreeSet::new(),
            touched: BTreeSet::new(),
            max_in_flight,
            preparer: Preparer::new(environment.clone()),
            environment,
            metrics,
            done,
            next_id: 0,
            brokers: BTreeMap::new(),
            networks,
            reports: BTreeMap::new(),
            no_try_before: None,
        }
    }

    /// Takes up what was read: new, changed and removed destinations, and networks that may or may not be reached now.
    /// Returns those that are served no longer.
    pub fn update(&mut self, which: &Which, specs: Vec<Spec>) -> Vec<Arc<str>> {
        let (mut found, mut added, mut changed) = (BTreeSet::new(), Vec::new(), Vec::new());
        for spec in specs {
            if !self.environment.serves(&spec) {
                continue;
            }
            let name = spec.name.clone();
            found.insert(name.clone());
            self.unserved.remove(&name);
            match self.directory.put(spec) {
                Change::Added => {
                    self.take_up(&name);
                    added.push(name);
                }
                Change::Changed => {
                    self.rebuild(&name);
                    self.take_up(&name);
                    changed.push(name);
                }
                // An operator may have resumed it.
                Change::Same if self.is_left_alone(&name) => self.retry(&name),
                Change::Same => {}
            }
        }
        let removed = self.directory.remove_missing(which, &found);
        removed.iter().for_each(|name| self.remove(name));
        match which {
            Which::All => {
                self.metrics.retain(|name| self.directory.get(name).is_some());
                self.unserved.clear();
            }
            Which::These(names) => self.unserved.retain(|name| !names.contains(&**name)),
        }
        let networks = self.environment.generation_of_networks();
        if std::mem::replace(&mut self.networks, networks) != networks {
            self.networks_changed();
        }
        self.log(&added, "served");
        self.log(&changed, "changed");
        self.log(&removed, "no longer served");
        removed
    }

    fn log(&self, names: &[Arc<str>], what: &str) {
        if names.len() > MOST_LOGGED {
            tracing::info!(destinations = names.len(), "{what}");
            return;
        }
        for name in names {
            match self.directory.get(name) {
                Some(spec) => tracing::info!(destination = &**name, kind = spec.kind, "{what}"),
                None => tracing::info!(destination = &**name, "{what}"),
            }
        }
    }

    /// The destination is new, or is configured otherwise now.
    fn take_up(&mut self, name: &Arc<str>) {
        self.retry(name);
        if let Some(spec) = self.directory.get(name).filter(|spec| spec.is_rabbitmq()) {
            self.preparer.prepare(spec);
        }
    }

    /// Makes its lane, if it has one, anew from its row.
    fn rebuild(&mut self, name: &str) {
        let lane = self.by_name.get(name).and_then(|id| self.lanes.get_mut(id));
        if let (Some(lane), Some(spec)) = (lane, self.directory.get(name)) {
            let limit = lane.rebuild(spec, self.max_in_flight, &self.environment);
            self.windows.set_limit(lane.id, limit);
        }
    }

    fn remove(&mut self, name: &Arc<str>) {
        if let Some(id) = self.by_name.remove(name) {
            // It finishes what is under way.
            self.windows.set_paused(id, true);
            if let Some(lane) = self.lanes.get_mut(&id) {
                lane.retire();
            }
            if self.windows.get(id).is_none_or(|window| window.held == 0) {
                self.end(id);
            }
        }
        self.webhooks.end(name);
        self.of_broker.end(name);
        self.paces.remove(name);
        self.preparer.forget(name);
        self.metrics.forget(name);
    }

    /// Other addresses may be reached now, and connections that were made before are not used any more.
    fn networks_changed(&mut self) {
        let of_webhook = |lane: &&Served| self.directory.get(&lane.name).is_some_and(|spec| !spec.is_rabbitmq());
        let names: Vec<Arc<str>> = self.lanes.values().filter(of_webhook).map(|lane| lane.name.clone()).collect();
        names.iter().for_each(|name| self.rebuild(name));
        let left_alone: Vec<Arc<str>> = self.webhooks.names().cloned().collect();
        left_alone.iter().for_each(|name| self.retry(name));
        tracing::info!(setting = "outbox.webhook_allow_networks", "changed");
    }

    fn is_left_alone(&self, name: &str) -> bool {
        self.webhooks.contains(name) || self.of_broker.contains(name)
    }

    /// Asks for it again, as far as this relay can serve it at all.
    fn retry(&mut self, name: &Arc<str>) {
        self.ask_for(name);
        let Some(spec) = self.directory.get(name) else { return };
        let wrong = Destination::validate(spec, &self.environment).err().map(|error| error.to_string());
        let broken = wrong.is_some();
        let down = self.standing(spec).and_then(Standing::reason).map(str::to_owned);
        if let Some(why) = wrong.or(down) {
            self.leave_alone(name, broken);
            self.reports.entry(why).or_default().push(name.clone());
        }
    }

    fn pauses(&mut self, name: &str) -> &mut Pauses<LeftAlone> {
        match self.directory.get(name).is_some_and(Spec::is_rabbitmq) {
            true => &mut self.of_broker,
            false => &mut self.webhooks,
        }
    }

    /// This relay can't deliver there.
    fn leave_alone(&mut self, name: &Arc<str>, broken: bool) {
        let unable = self.metrics.unable(name);
        let now = Instant::now();
        *self.pauses(name).begin(name, now) = LeftAlone { _unable: Some(unable), broken };
        self.set_paused(name, true);
    }

    /// It is no longer left alone. Whether it was.
    fn ask_for(&mut self, name: &str) -> bool {
        let was = self.webhooks.end(name) | self.of_broker.end(name);
        self.set_paused(name, false);
        was
    }

    fn set_paused(&mut self, name: &str, paused: bool) {
        if let Some(id) = self.by_name.get(name) {
            self.windows.set_paused(*id, paused);
        }
    }

    /// The brokers that destinations name.
    pub fn brokers(&self) -> impl Iterator<Item = &Arc<str>> {
        self.directory.brokers()
    }

    /// How the broker of a destination stands; none of a webhook, or before it is followed.
    fn standing(&self, spec: &Spec) -> Option<&Standing> {
        self.brokers.get(spec.broker()?)
    }

    /// Whether deliveries to this destination need no connection, or have one.
    fn is_reachable(&self, name: &str) -> bool {
        let spec = self.directory.get(name);
        spec.is_none_or(|spec| !spec.is_rabbitmq() || self.standing(spec) == Some(&Standing::Up))
    }

    /// The connection to a broker stands otherwise now. The destinations that can be served again.
    pub fn broker_changed(&mut self, broker: &Arc<str>, standing: Standing) -> Vec<Arc<str>> {
        let of_broker = self.directory.specs().filter(|spec| spec.broker() == Some(&**broker));
        let names: Vec<Arc<str>> = of_broker.map(|spec| spec.name.clone()).collect();
        let reason = standing.reason().map(str::to_owned);
        let up = standing == Standing::Up;
        self.brokers.insert(broker.clone(), standing);
        match reason {
            Some(why) => {
                self.of_broker.something_came();
                for name in names.iter().filter(|name| !self.of_broker.contains(name)).cloned().collect::<Vec<_>>() {
                    self.leave_alone(&name, false);
                }
                if !names.is_empty() {
                    self.reports.entry(why).or_default().extend(names);
                }
                Vec::new()
            }
            None if up => {
                for name in &names {
                    if self.of_broker.get(name).is_some_and(|left| !left.broken) {
                        self.ask_for(name);
                    }
                }
                names
            }
            None => Vec::new(),
        }
    }

    /// What the database has not been told yet.
    pub fn take_reports(&mut self) -> BTreeMap<String, Vec<Arc<str>>> {
        std::mem::take(&mut self.reports)
    }

    /// Something may have come for those that are not asked for.
    pub fn something_came(&mut self) {
        self.webhooks.something_came();
        self.of_broker.something_came();
    }

    /// While it is not known how each broker is, none of their destinations is tried.
    fn brokers_are_known(&self) -> bool {
        self.brokers.values().all(|standing| *standing != Standing::Connecting)
    }

    /// When one that is not asked for is to be tried.
    pub fn next_try(&self) -> Option<Instant> {
        let of_broker = self.of_broker.next().filter(|_| self.brokers_are_known());
        let next = [self.webhooks.next(), of_broker].into_iter().flatten().min()?;
        Some(self.no_try_before.map_or(next, |moment| moment.max(next)))
    }

    /// What the next claim asks for: a try from time to time, or what the others want.
    pub fn ask(&mut self, batch: usize, lagging_too: bool, room: &Room, now: Instant) -> Ask {
        match self.try_again(room, now) {
            Some(ask) => ask,
            None => self.ask_for_all(batch, lagging_too, room, now),
        }
    }

    fn ask_for_all(&mut self, batch: usize, lagging_too: bool, room: &Room, now: Instant) -> Ask {
        let up = self.brokers.iter().filter(|(_, standing)| **standing == Standing::Up);
        let brokers: Vec<Arc<str>> = up.map(|(name, _)| name.clone()).collect();
        let left_alone: Vec<Arc<str>> = match brokers.is_empty() {
            true => Vec::new(),
            false => self.of_broker.names().filter(|name| self.is_reachable(name)).cloned().collect(),
        };
        let webhooks = self.directory.webhooks().saturating_sub(self.webhooks.len());
        let of_brokers: usize = brokers.iter().map(|name| self.directory.of_broker(name)).sum();
        let destinations = webhooks + of_brokers.saturating_sub(left_alone.len());
        match self.windows.plan(&Question { destinations, batch, lagging_too, room, now }) {
            Plan::Wait { until } => Ask::Wait { until },
            Plan::Claim { count, without } => {
                let lanes = without.iter().filter_map(|id| self.lanes.get(id)).map(|lane| &lane.name);
                let left_alone = self.webhooks.names().chain(&left_alone);
                let passed = lanes.chain(left_alone).chain(&self.unserved).cloned().collect();
                Ask::Claim { count, wanted: Wanted { passed, brokers, only: None } }
            }
        }
    }

    /// One event for each of a few destinations that could not be served, to see whether they can.
    fn try_again(&mut self, room: &Room, now: Instant) -> Option<Ask> {
        if self.no_try_before.is_some_and(|moment| now < moment) {
            return None;
        }
        let most = TRIES.min(room.events);
        let mut due = self.webhooks.take_due(now, most);
        if self.brokers_are_known() {
            due.extend(self.of_broker.take_due(now, most - due.len()));
        }
        // What is under way there will tell.
        due.retain(|name| self.held(name) == 0);
        for name in &due {
            if self.by_name.get(name).and_then(|id| self.lanes.get(id)).is_some_and(|lane| lane.broken) {
                self.rebuild(name);
            }
        }
        if due.is_empty() {
            return None;
        }
        self.no_try_before = Some(now + BETWEEN_TRIES);
        let brokers = self.environment.brokers();
        let wanted = Wanted { passed: Vec::new(), brokers, only: Some(due) };
        Some(Ask::Claim { count: wanted.only.as_ref().map_or(0, Vec::len), wanted })
    }

    fn held(&self, name: &str) -> usize {
        self.by_name.get(name).and_then(|id| self.windows.get(*id)).map_or(0, |window| window.held)
    }

    /// Whether there is something to claim for that the last claim left out.
    pub fn any_missed(&mut self, batch: usize, room: &Room, now: Instant) -> bool {
        self.windows.any_missed(batch, room) || self.next_try().is_some_and(|at| at <= now)
    }

    /// Those of these destinations that this relay does not know.
    pub fn unknown<'a>(&self, names: impl Iterator<Item = &'a String>) -> BTreeSet<String> {
        names.filter(|name| self.directory.get(name).is_none()).cloned().collect()
    }

    /// A claim brought so many events, and was all there was, or not.
    pub fn claimed(&mut self, wanted: &Wanted, events: usize, given: &Given, all: bool) {
        let mut by_lane = HashMap::new();
        for (name, brought) in given {
            if let Some(id) = self.lane(name) {
                by_lane.insert(id, *brought);
            }
        }
        match &wanted.only {
            None => {
                self.windows.brought(&by_lane, events);
                if all {
                    self.windows.all_caught_up();
                }
            }
            Some(names) if all => {
                let ids: Vec<Id> = names.iter().filter_map(|name| self.by_name.get(name)).copied().collect();
                ids.into_iter().for_each(|id| self.windows.caught_up(id));
            }
            Some(_) => {}
        }
    }

    /// The lane of a destination, which has one from now on.
    fn lane(&mut self, name: &str) -> Option<Id> {
        if let Some(id) = self.by_name.get(name) {
            return Some(*id);
        }
        let spec = self.directory.get(name)?;
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        let (pace, metrics) = (self.paces.remove(name), self.metrics.lane(name));
        let now = Instant::now();
        let (mut lane, limit) = Served::start(id, spec, self.max_in_flight, &self.environment, pace, metrics);
        lane.idle_since = Some(now);
        let mut window = Window::new(limit, self.max_in_flight);
        window.paused = self.is_left_alone(name);
        self.windows.add(id, window);
        self.by_name.insert(lane.name.clone(), id);
        self.lanes.insert(id, lane);
        self.idle.insert((now, id));
        Some(id)
    }

    /// Gives an event to one of its destinations, unless that one has no room or is not served.
    pub fn give(&mut self, to: &str, attempt: u32, taken: &Taken) -> bool {
        let Taken { key, size, event, lease, room } = taken;
        let Some(id) = self.lane(to) else {
            self.unserved.insert(to.into());
            return false;
        };
        self.touched.insert(id);
        // One shows whether it can be served again.
        let tried = self.windows.get(id).is_some_and(|window| window.paused && window.held > 0);
        if tried || !self.windows.admit(id, *size, room) {
            return false;
        }
        let Some(lane) = self.lanes.get_mut(&id) else { return false };
        if let Some(since) = lane.idle_since.take() {
            self.idle.remove(&(since, id));
        }
        let report = Report::new(lane.id, lane.name.clone(), *key, *size, self.done.clone());
        let ordering_key = ordering_key(event);
        lane.batch.push(Item { ordering_key, attempt, event: event.clone(), lease: lease.clone(), report });
        true
    }

    /// An event for it was too large to be kept.
    pub fn refuse(&mut self, destination: &str, size: Size) {
        if let Some(id) = self.lane(destination) {
            self.touched.insert(id);
            self.windows.refuse(id, size);
        }
    }

    /// Hands over what was given since the last time, and enters what came of a try.
    pub fn flush(&mut self, wanted: &Wanted, given: &Given, crowded: bool) {
        for id in std::mem::take(&mut self.touched) {
            self.windows.end_batch(id);
            if let Some(lane) = self.lanes.get_mut(&id) {
                let batch = std::mem::take(&mut lane.batch);
                if !batch.is_empty() {
                    lane.send(Order::Deliver(batch));
                }
            }
        }
        for name in wanted.only.iter().flatten() {
            if self.held(name) == 0 {
                let none = !crowded && !given.contains_key(&**name);
                self.pauses(name).tried(name, none);
            }
        }
    }

    /// A delivery has ended. Whether there may be more to claim for that reason.
    pub fn ended(&mut self, done: &Done, now: Instant) -> bool {
        let Some(lane) = self.lanes.get_mut(&done.lane) else { return false };
        let (id, name) = (lane.id, lane.name.clone());
        let held = self.windows.leave(id, done.size);
        if lane.retired {
            if held == 0 {
                self.end(id);
            }
            return false;
        }
        if held == 0 {
            lane.idle_since = Some(now);
            self.idle.insert((now, id));
        }
        let may_be_well = self.is_reachable(&name);
        match &done.news {
            News::Well if may_be_well => {
                let again = self.ask_for(&name);
                if again {
                    tracing::info!(destination = &*name, "circuit closed: it delivers again");
                }
                again
            }
            News::None | News::Well => {
                if held == 0 {
                    self.pauses(&name).tried(&name, false);
                }
                false
            }
            News::Down { error, retry_in } => {
                self.failed(&name, now, retry_in.unwrap_or_default(), error, "circuit opened");
                false
            }
            News::Unable(error) => {
                self.failed(&name, now, Duration::ZERO, error, "this relay can't deliver; others may");
                let metrics = self.metrics.clone();
                let left_alone = self.pauses(&name).begin(&name, now);
                left_alone._unable.get_or_insert_with(|| metrics.unable(&name));
                false
            }
        }
    }

    /// It is left alone for a while.
    fn failed(&mut self, name: &Arc<str>, now: Instant, at_least: Duration, error: &str, what: &str) {
        let news = self.pauses(name).failed(name, now, at_least, what);
        self.set_paused(name, true);
        if news {
            tracing::warn!(destination = &**name, reason = error, "{what}");
        }
    }

    /// When the next lane that has nothing to do goes.
    pub fn next_end(&self) -> Option<Instant> {
        self.idle.first().map(|(since, _)| *since + LINGER)
    }

    /// Ends lanes that have had nothing to do for long, or too many of them.
    pub fn end_idle(&mut self, now: Instant) {
        for _ in 0..self.idle.len() {
            let Some((since, id)) = self.idle.first().copied() else { return };
            if since + LINGER > now && self.idle.len() <= MOST_IDLE {
                return;
            }
            if self.windows.is_at_rest(id) {
                self.end(id);
            } else if let Some(lane) = self.lanes.get_mut(&id) {
                self.idle.remove(&(since, id));
                self.idle.insert((now, id));
                lane.idle_since = Some(now);
            }
        }
    }

    /// Forgets a lane that holds nothing, but not what its destination asked for.
    fn end(&mut self, id: Id) {
        self.windows.remove(id);
        let Some(lane) = self.lanes.remove(&id) else { return };
        if let Some(since) = lane.idle_since {
            self.idle.remove(&(since, id));
        }
        if !lane.retired {
            self.by_name.remove(&lane.name);
            if let Some(pace) = lane.kept_pace() {
                self.paces.insert(lane.name.clone(), pace);
            }
        }
    }

    /// Begin nothing more, anywhere.
    pub fn halt(&mut self) {
        self.lanes.values().for_each(|lane| lane.send(Order::Halt));
    }
}

/// Two aggregates with one hash would wait for each other and lose nothing.
fn ordering_key(event: &Event) -> OrderingKey {
    let id = event.aggregate_id.as_ref()?;
    let mut hasher = DefaultHasher::new();
    (event.aggregate_type.as_deref().unwrap_or(""), id).hash(&mut hasher);
    Some(hasher.finish())
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;
    use crate::budget::{Budget, Load};
    use crate::config::Config;
    use crate::destination::{Outcome, sample_event};
    use crate::lease::Asked;
    use crate::ledger::Ended;

    const BUDGET: Budget = Budget { max_events: 10_000, max_bytes: 1 << 26 };

    fn lanes() -> (Lanes, UnboundedReceiver<Done>) {
        let environment = Arc::new(Environment::new(&Config::sample()).expect("an environment"));
        let (done, ended) = unbounded_channel();
        (Lanes::new(2000, environment, Metrics::new(2).expect("metrics"), done), ended)
    }

    /// Nobody may go there, so that each delivery ends at once.
    fn webhook(name: &str) -> Spec {
        let url = Some("http://127.0.0.1:9/".to_owned());
        let secrets = vec!["whsec_C2FVsBQIhrscChlQIMV+b5sSYob7oDvG".to_owned()];
        Spec { name: name.into(), kind: "webhook".into(), url, settings: "{}".into(), secrets, ..Spec::default() }
    }

    fn room() -> Room {
        BUDGET.room(Load::default())
    }

    fn taken(id: i64) -> Taken {
        let (event, lease) = (Arc::new(sample_event()), Arc::new(Lease::new(Asked::now(), LINGER)));
        Taken { key: (1, id), size: BUDGET.size(100), event, lease, room: room() }
    }

    fn ask(lanes: &mut Lanes, now: Instant) -> Option<Wanted> {
        match lanes.ask(500, true, &room(), now) {
            Ask::Claim { wanted, .. } => Some(wanted),
            Ask::Wait { .. } => None,
        }
    }

    /// One event for this destination, which ends so.
    async fn deliver(lanes: &mut Lanes, ended: &mut UnboundedReceiver<Done>, name: &str, news: News, now: Instant) {
        let given = Given::from([(name.to_owned(), (1, 100))]);
        let wanted = Wanted::default();
        lanes.claimed(&wanted, 1, &given, true);
        assert!(lanes.give(name, 1, &taken(1)));
        lanes.flush(&wanted, &given, false);
        let done = ended.recv().await.expect("an end");
        assert!(matches!(done.news, News::Unable(_)), "{:?}", done.news);
        lanes.ended(&Done { news, ended: Ended::With(Outcome::Delivered), ..done }, now);
    }

    #[tokio::test]
    async fn a_destination_has_a_lane_from_its_first_delivery_until_a_while_after_its_last() {
        let (mut lanes, mut ended) = lanes();
        lanes.update(&Which::All, (0..1000).map(|n| webhook(&format!("w{n}"))).collect());
        let now = Instant::now();
        assert!(lanes.lanes.is_empty() && lanes.next_end().is_none() && lanes.next_try().is_none());
        assert_eq!(ask(&mut lanes, now).map(|wanted| wanted.passed), Some(vec![]));
        deliver(&mut lanes, &mut ended, "w7", News::Well, now).await;
        assert_eq!((lanes.lanes.len(), lanes.next_end()), (1, Some(now + LINGER)));
        lanes.end_idle(now + LINGER / 2);
        assert_eq!(lanes.lanes.len(), 1);
        lanes.end_idle(now + LINGER);
        assert!(lanes.lanes.is_empty() && lanes.by_name.is_empty() && lanes.next_end().is_none());
    }

    #[tokio::test]
    async fn few_lanes_stay_when_many_have_nothing_to_do() {
        let (mut lanes, mut ended) = lanes();
        lanes.update(&Which::All, (0..MOST_IDLE + 100).map(|n| webhook(&format!("w{n}"))).collect());
        let now = Instant::now();
        for n in 0..MOST_IDLE + 100 {
            deliver(&mut lanes, &mut ended, &format!("w{n}"), News::Well, now).await;
            lanes.end_idle(now);
        }
        assert_eq!(lanes.lanes.len(), MOST_IDLE);
    }

    #[tokio::test]
    async fn what_a_throttle_asked_for_outlives_the_lane() {
        let (mut lanes, mut ended) = lanes();
        lanes.update(&Which::All, vec![webhook("slow"), webhook("other")]);
        let now = Instant::now();
        let hour = Duration::from_secs(3600);
        let down = News::Down { error: "429".into(), retry_in: Some(hour) };
        deliver(&mut lanes, &mut ended, "slow", down, now).await;
        lanes.lanes[&0].pace.lock().expect("no panic").throttled(now);
        lanes.end_idle(now + LINGER);
        assert!(lanes.lanes.is_empty(), "it costs no lane");
        let passed = ask(&mut lanes, now + LINGER).expect("a claim").passed;
        assert_eq!(passed, [Arc::from("slow")]);
        assert!(lanes.next_try().is_some_and(|at| at >= now + hour));
        lanes.lane("slow");
        assert!(!lanes.lanes[&1].pace.lock().expect("no panic").is_at_rest());
        assert!(lanes.windows.get(1).is_some_and(|window| window.paused));
    }

    #[tokio::test]
    async fn those_left_alone_are_tried_together_and_with_one_event_each() {
        let (mut lanes, _ended) = lanes();
        let broken = |n: usize| Spec { url: Some("ftp://x".into()), ..webhook(&format!("w{n}")) };
        lanes.update(&Which::All, (0..100).map(broken).chain([webhook("well")]).collect());
        assert_eq!(lanes.take_reports().values().map(Vec::len).sum::<usize>(), 100);
        let now = Instant::now();
        let (first, all) = (ask(&mut lanes, now), ask(&mut lanes, now));
        let first = first.and_then(|wanted| wanted.only).expect("a try");
        assert_eq!((first.len(), all.expect("a claim").passed.len()), (TRIES, 100));
        let second = ask(&mut lanes, now + BETWEEN_TRIES).and_then(|wanted| wanted.only).expect("another try");
        assert_eq!(second.len(), 100 - TRIES);
        // The database has two events for one of them, and none for the others.
        let wanted = Wanted { only: Some(first.clone()), ..Wanted::default() };
        let given = Given::from([(first[0].to_string(), (2, 200))]);
        lanes.claimed(&wanted, 2, &given, true);
        assert!(lanes.give(&first[0], 1, &taken(1)) && !lanes.give(&first[0], 1, &taken(2)));
        lanes.flush(&wanted, &given, false);
        assert_eq!(lanes.next_try(), None, "nothing is owed to the others");
        lanes.something_came();
        assert!(lanes.next_try().is_some());
    }

    #[tokio::test]
    async fn what_is_removed_leaves_nothing_behind() {
        let (mut lanes, mut ended) = lanes();
        lanes.update(&Which::All, vec![webhook("a"), webhook("b")]);
        let now = Instant::now();
        deliver(&mut lanes, &mut ended, "a", News::Unable("no files".into()), now).await;
        lanes.update(&Which::named("a"), vec![]);
        assert!(
            lanes.lanes.is_empty() && lanes.by_name.is_empty() && lanes.idle.is_empty() && lanes.next_try().is_none()
        );
        assert!(!lanes.give("a", 1, &taken(1)), "it goes back");
        assert_eq!(ask(&mut lanes, now).map(|wanted| wanted.passed), Some(vec![Arc::from("a")]));
        lanes.update(&Which::named("a"), vec![webhook("a")]);
        assert_eq!(ask(&mut lanes, now).map(|wanted| wanted.passed), Some(vec![]));
    }
}

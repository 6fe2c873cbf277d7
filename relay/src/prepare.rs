//! What RabbitMQ destinations need before their first event, an exchange or a queue, made as soon as they are served: so
//! that consumers can start before it. A few destinations at a time, while the broker can be used; what fails is tried
//! again later.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;

use crate::backoff::Backoff;
use crate::destination::{Destination, Environment, Spec, Standing};
use crate::timer::sleep_until;

/// Destinations that are made ready at a time: each needs two channels meanwhile.
const AT_A_TIME: usize = 8;

const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);

enum Order {
    Prepare(Spec),
    Forget(Arc<str>),
}

/// Makes destinations ready until it is dropped, at each broker apart.
pub struct Preparer {
    /// By the names of brokers.
    orders: HashMap<Arc<str>, UnboundedSender<Order>>,
    environment: Arc<Environment>,
}

impl Preparer {
    pub fn new(environment: Arc<Environment>) -> Self {
        Preparer { orders: HashMap::new(), environment }
    }

    /// The destination is new or was changed.
    pub fn prepare(&mut self, spec: &Spec) {
        self.forget(&spec.name);
        let Some(broker) = spec.broker() else { return };
        if !self.orders.contains_key(broker)
            && let Some(standing) = self.environment.broker_standing(broker)
        {
            let (orders, inbox) = unbounded_channel();
            tokio::spawn(run(self.environment.clone(), standing, inbox));
            self.orders.insert(broker.into(), orders);
        }
        if let Some(orders) = self.orders.get(broker) {
            send(orders, Order::Prepare(spec.clone()));
        }
    }

    /// The destination was removed, or was another broker's.
    pub fn forget(&self, name: &Arc<str>) {
        self.orders.values().for_each(|orders| send(orders, Order::Forget(name.clone())));
    }
}

fn send(orders: &UnboundedSender<Order>, order: Order) {
    // The task ends only when this sender is dropped.
    let _ = orders.send(order);
}

async fn run(
    environment: Arc<Environment>,
    mut standing: watch::Receiver<Standing>,
    mut inbox: UnboundedReceiver<Order>,
) {
    let mut jobs = Jobs::default();
    let mut under_way = FuturesUnordered::new();
    let mut was_up = false;
    loop {
        let now = Instant::now();
        let up = *standing.borrow_and_update() == Standing::Up;
        if up && !was_up {
            jobs.all_at_once(now);
        }
        was_up = up;
        let room = |under_way: usize| up && under_way < AT_A_TIME;
        while room(under_way.len())
            && let Some((spec, number)) = jobs.take(now)
        {
            let environment = environment.clone();
            under_way.push(async move { (spec.name.clone(), number, prepare(&spec, &environment).await) });
        }
        let timer = jobs.next().filter(|_| room(under_way.len()));
        tokio::select! {
            order = inbox.recv() => match order {
                Some(Order::Prepare(spec)) => jobs.put(spec, now),
                Some(Order::Forget(name)) => jobs.remove(&name),
                None => return,
            },
            Some((name, number, prepared)) = under_way.next(), if !under_way.is_empty() => {
                if let Err(error) = &prepared {
                    tracing::debug!(destination = &*name, error, "not ready");
                }
                jobs.ended(&name, number, prepared.is_ok(), Instant::now());
            }
            Ok(()) = standing.changed() => {}
            () = sleep_until(timer), if timer.is_some() => {}
        }
    }
}

async fn prepare(spec: &Spec, environment: &Environment) -> Result<(), String> {
    match Destination::build(spec, environment) {
        Ok(destination) => destination.prepare().await,
        // It is left alone until it is changed, and shows why.
        Err(_) => Ok(()),
    }
}

/// The destinations that are not ready. Pure.
#[derive(Default)]
struct Jobs {
    all: HashMap<Arc<str>, Job>,
    due: BTreeSet<(Instant, Arc<str>)>,
    next_number: u64,
}

struct Job {
    spec: Spec,
    number: u64,
    backoff: Option<Backoff>,
    /// None while it is under way.
    due: Option<Instant>,
}

impl Jobs {
    fn put(&mut self, spec: Spec, now: Instant) {
        let name = spec.name.clone();
        self.remove(&name);
        self.next_number += 1;
        let backoff = Backoff::new(SHORTEST, LONGEST);
        self.all.insert(name.clone(), Job { spec, number: self.next_number, backoff, due: Some(now) });
        self.due.insert((now, name));
    }

    fn remove(&mut self, name: &Arc<str>) {
        if let Some(at) = self.all.remove(name).and_then(|job| job.due) {
            self.due.remove(&(at, name.clone()));
        }
    }

    fn next(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    fn take(&mut self, now: Instant) -> Option<(Spec, u64)> {
        let (_, name) = self.due.first().filter(|(at, _)| *at <= now).cloned()?;
        self.due.pop_first();
        let job = self.all.get_mut(&name)?;
        job.due = None;
        Some((job.spec.clone(), job.number))
    }

    fn ended(&mut self, name: &Arc<str>, number: u64, ready: bool, now: Instant) {
        let Some(job) = self.all.get_mut(name).filter(|job| job.number == number) else { return };
        if ready {
            self.remove(name);
            return;
        }
        let at = now + job.backoff.as_mut().map_or(LONGEST, Backoff::next);
        job.due = Some(at);
        self.due.insert((at, name.clone()));
    }

    /// The broker can be used again.
    fn all_at_once(&mut self, now: Instant) {
        let waiting: Vec<(Instant, Arc<str>)> = std::mem::take(&mut self.due).into_iter().collect();
        for (_, name) in waiting {
            if let Some(job) = self.all.get_mut(&name) {
                job.due = Some(now);
                self.due.insert((now, name));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str) -> Spec {
        Spec { name: name.into(), ..Spec::default() }
    }

    #[test]
    fn each_is_prepared_until_it_is_ready() {
        let (mut jobs, now) = (Jobs::default(), Instant::now());
        jobs.put(spec("a"), now);
        jobs.put(spec("b"), now);
        let (first, number) = jobs.take(now).expect("a job");
        jobs.ended(&first.name, number, true, now);
        let (second, number) = jobs.take(now).expect("another");
        assert!(jobs.take(now).is_none() && jobs.next().is_none());
        jobs.ended(&second.name, number, false, now);
        assert!(jobs.next().is_some_and(|at| at >= now) && jobs.all.len() == 1);
        jobs.all_at_once(now);
        assert!(jobs.take(now).is_some_and(|(spec, _)| spec.name == second.name));
    }

    #[test]
    fn what_was_changed_or_removed_meanwhile_is_not_taken_for_ready() {
        let (mut jobs, now) = (Jobs::default(), Instant::now());
        jobs.put(spec("a"), now);
        let (_, number) = jobs.take(now).expect("a job");
        jobs.put(spec("a"), now);
        jobs.ended(&"a".into(), number, true, now);
        let (_, number) = jobs.take(now).expect("the changed one");
        jobs.remove(&"a".into());
        jobs.ended(&"a".into(), number, false, now);
        assert!(jobs.all.is_empty() && jobs.due.is_empty());
    }
}

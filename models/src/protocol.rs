//! The protocol of claims and settlements, small enough to try everything that can happen.
//!
//! Each action stands for one transaction, because claims and settlements hold the claim lock until they commit; what
//! several processes do at once is in the models of the lock-free parts. Comments name the SQL function that an action or a
//! step stands for. What the contract promises is kept beside it, in fields that no function reads: see [`Ghost`].

use stateright::{Model, Property};

pub const EVENTS: usize = 3;
pub const DESTINATIONS: usize = 2;
const SESSIONS: usize = 2;

/// Attempts of a delivery before it is a dead letter.
const MAX_ATTEMPTS: u8 = 2;

pub type Token = u8;
type Set = u8;

/// "None", of the lowered mark.
const NEVER: u8 = u8::MAX;

/// One change to the protocol that makes it wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    Nothing,
    /// A settlement does not compare the token.
    NoFencing,
    /// A lease that is over is not released.
    LeaseEndIgnored,
    /// A lease is released before it is over.
    LeaseEndsEarly,
    /// A session that ended keeps what it had claimed.
    SessionEndForgotten,
    /// A parked delivery is ahead of nothing.
    ParkedIgnored,
    /// A claim holds back nothing for the events of other claims.
    InFlightIgnored,
    /// A claim looks at fresh events before it has the lock.
    ReadBeforeLock,
    /// A release gives back events, but no single deliveries.
    ReleaseForgetsDeliveries,
    /// Removing a destination leaves what claims held of it in the books.
    RemovalKeepsHeld,
    /// Removing and adding a destination again: it is taken for part of older claims.
    AddedIsClaimed,
    /// A commit does not lower the mark.
    LateSkipped,
    /// A claim that rolls back takes the lowered mark with it.
    RollbackLosesMark,
    /// After a restart the low-water mark begins behind all events.
    RestartSkipsAll,
    /// A destination that is down uses up attempts.
    OutageUsesAttempts,
    /// A claim of a due delivery does not list what other claims hold of the event.
    RestNotListed,
    /// A failure does not take back what is behind it in the claim.
    NothingTakenBack,
    /// Whoever waits for a delivery is not told that it has gone.
    NobodyPromoted,
    /// An event is processed when its claim is settled, whatever is parked.
    ParkedForgotten,
    /// Retention removes what was given up by one destination, while another is owed it.
    RemovedWhileOwed,
}

/// What may happen, and how often, so that there is an end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    pub claims: u8,
    pub rollbacks: u8,
    pub lease_ends: u8,
    pub deaths: u8,
    pub restarts: u8,
    pub failures: u8,
    pub rejections: u8,
    pub outages: u8,
    pub releases: u8,
    pub changes: u8,
    pub pauses: u8,
    pub removals: u8,
}

/// A small world.
#[derive(Debug, Clone, Copy)]
pub struct World {
    pub broken: Broken,
    /// The aggregate of each event; none: it has no order, or there is no such event.
    pub keys: [Option<u8>; EVENTS],
    pub events: usize,
    /// Destinations that are there from the beginning. Destination 0 stays.
    pub destinations: Set,
    /// The destinations that each session serves.
    pub serves: [Set; SESSIONS],
    /// Events in a claim.
    pub most: usize,
    pub budget: Budget,
}

/// A row of `outbox_events`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Row {
    /// Its id is drawn, its transaction open.
    Open,
    Fresh,
    /// Held as a whole; `parked`: by and by for some destinations, which have rows of their own.
    Claimed {
        token: Token,
        parked: bool,
    },
    Listed,
    Processed,
    Failed,
    Removed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Next {
    Now,
    /// A retry.
    Later,
    /// Behind another (`next_attempt_at` null).
    Behind,
}

/// A row of `outbox.delivery`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Delivery {
    None,
    Pending(Next),
    Processing(Token),
    Failed,
}

/// A row of `outbox.claims`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Claim {
    token: Token,
    session: usize,
    held: i8,
    end: End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum End {
    Not,
    Lease,
    Session,
    Restart,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Circuit {
    Closed,
    Open,
    HalfOpen,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Destination {
    there: bool,
    paused: bool,
    since: Token,
    circuit: Circuit,
}

/// What a consumer has in its memory: events that it was handed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InHand {
    pub token: Token,
    pub event: usize,
    pub to: usize,
    pub delivered: bool,
}

/// What was promised of each event and destination.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Ghost {
    /// Owed, once decided.
    wanted: bool,
    /// The receiver has confirmed it.
    got: bool,
    dead: bool,
    /// Claims that hold it as far as their consumers can know.
    holders: u16,
    /// Attempts that failed and were the event's fault.
    failures: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    rows: [Row; EVENTS],
    deliveries: [[Delivery; DESTINATIONS]; EVENTS],
    attempts: [[u8; DESTINATIONS]; EVENTS],
    destinations: [Destination; DESTINATIONS],
    claims: Vec<Claim>,
    hands: [Vec<InHand>; SESSIONS],
    token: Token,
    /// The marks in shared memory; the callback of these commits has not run yet.
    low_water: u8,
    lowered: u8,
    high_water: Option<u8>,
    callback: Set,
    /// What a claim saw before it had the lock; only in a broken variant.
    peeked: Option<Set>,
    left: Budget,
    ghosts: [[Ghost; DESTINATIONS]; EVENTS],
    /// The tokens from this one on were given out when the event could be seen.
    seen_from: [Token; EVENTS],
    fault: Option<Fault>,
}

/// A broken promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    HandedOutTwice,
    OutOfOrder,
    Lost,
    StaleTokenChanged,
    AttemptUsed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    Delivered,
    Failed,
    Rejected,
    Unavailable,
    Released,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// An application's COMMIT: the row can be seen.
    Commit(usize),
    /// Its callback: `commit::apply` of the extension.
    Callback(usize),
    /// `outbox.claim`.
    Claim(usize),
    /// The same in a transaction that rolls back.
    RollBack,
    /// Half of a claim in a broken variant.
    Peek,
    /// A receiver confirms.
    Deliver(usize, InHand),
    /// `outbox.ack`, and the arrays of `outbox.settle`: the event reached all that the claim was for.
    Ack(usize, Token, usize),
    /// An exception of `outbox.settle`; `outbox.fail`, `outbox.reject`.
    Settle(usize, InHand, Outcome),
    /// `outbox.release`.
    Release(usize, Token),
    /// A lease is over, as the clock has it.
    LeaseEnds(usize),
    /// The worker: `outbox._end_leases`, `outbox._release_attachments`.
    Work,
    /// A session ends, in whatever way: `session::give_up` of the extension.
    Die(usize),
    /// The server restarts.
    Restart,
    /// Time passes until a retry.
    RetryIsDue(usize, usize),
    /// Time passes until a circuit is half open.
    HalfOpen(usize),
    /// `outbox.add_rabbitmq`, `outbox.remove_destination`.
    Add(usize),
    Remove(usize),
    /// `outbox.pause`, `outbox.resume`.
    Pause(usize),
    Resume(usize),
    /// `outbox._retain`, `outbox.purge_failed`.
    Retain(usize),
}

fn bit(n: usize) -> Set {
    1 << n
}

impl World {
    fn ids(&self) -> std::ops::Range<usize> {
        0..self.events
    }

    fn same_key(&self, a: usize, b: usize) -> bool {
        self.keys[a].is_some() && self.keys[a] == self.keys[b]
    }

    fn is(&self, broken: Broken) -> bool {
        self.broken == broken
    }

    fn start(&self) -> State {
        let destination = |d| Destination {
            there: self.destinations & bit(d) != 0,
            paused: false,
            since: 0,
            circuit: Circuit::Closed,
        };
        State {
            rows: [Row::Open; EVENTS],
            deliveries: [[Delivery::None; DESTINATIONS]; EVENTS],
            attempts: [[0; DESTINATIONS]; EVENTS],
            destinations: std::array::from_fn(destination),
            claims: Vec::new(),
            hands: Default::default(),
            token: 0,
            low_water: 0,
            lowered: NEVER,
            high_water: Some(0),
            callback: 0,
            peeked: None,
            left: self.budget,
            ghosts: Default::default(),
            seen_from: [0; EVENTS],
            fault: None,
        }
    }
}

/// The functions of `sql/`.
impl State {
    fn blame(&mut self, fault: Fault) {
        self.fault.get_or_insert(fault);
    }

    /// `_let_go`.
    fn let_go(&mut self, token: Token) {
        if let Some(claim) = self.claims.iter_mut().find(|c| c.token == token) {
            claim.held -= 1;
        }
        self.claims.retain(|c| c.held > 0);
    }

    /// `_rest` and `_refresh`: the status that follows from the deliveries.
    fn rest(&self, e: usize) -> Row {
        let open = |d: &Delivery| matches!(d, Delivery::Pending(_) | Delivery::Processing(_));
        match &self.deliveries[e] {
            all if all.iter().any(open) => Row::Listed,
            all if all.contains(&Delivery::Failed) => Row::Failed,
            _ => Row::Processed,
        }
    }

    fn refresh(&mut self, e: usize) {
        if matches!(self.rows[e], Row::Listed | Row::Processed | Row::Failed) {
            let row = self.rest(e);
            self.settle_row(e, row);
        }
    }

    /// An event leaves only when nothing is owed.
    fn settle_row(&mut self, e: usize, row: Row) {
        self.rows[e] = row;
        let done =
            |g: &Ghost| !g.wanted || g.got || (row == Row::Failed && g.dead) || (row == Row::Processed && g.dead);
        if matches!(row, Row::Processed | Row::Failed) && !self.ghosts[e].iter().all(done) {
            self.blame(Fault::Lost);
        }
    }

    /// `_ahead`.
    fn is_behind(&self, world: &World, e: usize, d: usize) -> bool {
        world.ids().any(|f| {
            f != e
                && world.same_key(f, e)
                && match self.deliveries[f][d] {
                    Delivery::Processing(_) => true,
                    Delivery::Pending(_) => f < e && !world.is(Broken::ParkedIgnored),
                    _ => false,
                }
        })
    }

    /// `_promote`.
    fn promote(&mut self, world: &World, e: usize, d: usize) {
        if world.is(Broken::NobodyPromoted) {
            return;
        }
        let pending = |f: &usize| world.same_key(*f, e) && matches!(self.deliveries[*f][d], Delivery::Pending(_));
        if let Some(head) = world.ids().find(pending)
            && self.deliveries[head][d] == Delivery::Pending(Next::Behind)
            && !self.is_behind(world, head, d)
        {
            self.deliveries[head][d] = Delivery::Pending(Next::Now);
        }
    }

    /// `_left_claim`.
    fn left_claim(&mut self, world: &World, e: usize, d: usize, token: Token) {
        self.let_go(token);
        self.promote(world, e, d);
        self.refresh(e);
    }

    /// `_list`: what a claim holds as a whole becomes a row for each destination that was there when it began.
    fn list(&mut self, world: &World, e: usize) {
        let Row::Claimed { token, .. } = self.rows[e] else { return };
        self.rows[e] = Row::Listed;
        let mut more = -1;
        for d in 0..DESTINATIONS {
            let part = self.destinations[d].since < token || world.is(Broken::AddedIsClaimed);
            if self.destinations[d].there && part && self.deliveries[e][d] == Delivery::None {
                self.deliveries[e][d] = Delivery::Processing(token);
                more += 1;
            }
        }
        if let Some(claim) = self.claims.iter_mut().find(|c| c.token == token) {
            claim.held += more;
        }
        self.claims.retain(|c| c.held > 0);
        self.refresh(e);
    }

    /// `_in_flight`.
    fn is_in_flight(&self, world: &World, e: usize, high_water: u8) -> bool {
        !world.is(Broken::InFlightIgnored)
            && world.ids().any(|f| {
                let held = matches!(self.rows[f], Row::Claimed { .. });
                held && (self.low_water..=high_water).contains(&(f as u8)) && world.same_key(f, e)
            })
    }

    fn hand_out(&mut self, session: usize, token: Token, event: usize, to: usize) {
        self.hands[session].push(InHand { token, event, to, delivered: false });
        self.hands[session].sort_unstable();
        let ghost = &mut self.ghosts[event][to];
        ghost.wanted = true;
        let held = ghost.holders != 0;
        ghost.holders |= 1 << token;
        if held {
            self.blame(Fault::HandedOutTwice);
        }
    }

    /// What a claim's consumer may rely on ends: it is over, or it is told.
    fn no_longer_held(&mut self, token: Token) {
        self.ghosts.iter_mut().flatten().for_each(|g| g.holders &= !(1 << token));
    }

    fn fresh(&self, world: &World) -> Set {
        let fresh = world.ids().filter(|e| self.rows[*e] == Row::Fresh && *e as u8 >= self.low_water);
        fresh.fold(0, |all, e| all | bit(e))
    }

    fn serves(&self, world: &World, session: usize, d: usize) -> bool {
        let to = &self.destinations[d];
        to.there && !to.paused && world.serves[session] & bit(d) != 0
    }

    /// `_claim`, up to its commit.
    fn claim(&mut self, world: &World, session: usize) {
        if self.high_water.is_none() {
            self.release_where(world, |c| c.end == End::Restart);
        }
        let any =
            (0..DESTINATIONS).any(|d| self.serves(world, session, d) && self.destinations[d].circuit != Circuit::Open);
        if !any {
            return;
        }
        // `_begin`
        self.token += 1;
        let token = self.token;
        let last = world.ids().filter(|e| !matches!(self.rows[*e], Row::Open | Row::Removed)).max();
        let high_water = self.high_water.unwrap_or(last.map_or(0, |e| e as u8));
        self.low_water = self.low_water.min(std::mem::replace(&mut self.lowered, NEVER));
        let from = self.low_water;
        let outstanding = |e: &usize| *e as u8 >= from && matches!(self.rows[*e], Row::Fresh | Row::Claimed { .. });
        let past_all = last.map(|e| e as u8 + 1).filter(|past| *past > from).unwrap_or(from);
        self.low_water = world.ids().find(outstanding).map_or(past_all, |e| e as u8);
        let (mut room, mut held) = (world.most, 0);
        let is_due = world.ids().any(|e| {
            (0..DESTINATIONS)
                .any(|d| self.serves(world, session, d) && self.deliveries[e][d] == Delivery::Pending(Next::Now))
        });
        let reserve = if is_due { world.most / 2 } else { 0 };
        self.take_fresh(world, session, high_water, reserve, &mut room, &mut held);
        for _ in 0..4 {
            if room > 0 && !self.take_due(world, session, high_water, &mut room) {
                break;
            }
        }
        if room > 0 {
            self.take_fresh(world, session, high_water, 0, &mut room, &mut held);
        }
        // `_enter`
        let taken = world.ids().filter(|e| matches!(self.rows[*e], Row::Claimed { token: t, .. } if t == token));
        let new_high = taken.clone().map(|e| e as u8).max().unwrap_or(0);
        let rows = self.deliveries.iter().flatten().filter(|d| **d == Delivery::Processing(token)).count();
        let held = taken.count() + rows;
        if held > 0 {
            self.claims.push(Claim { token, session, held: held as i8, end: End::Not });
        }
        self.high_water = Some(high_water.max(new_high));
    }

    /// `_claim_fresh`.
    fn take_fresh(
        &mut self,
        world: &World,
        session: usize,
        high_water: u8,
        reserve: usize,
        room: &mut usize,
        held: &mut usize,
    ) {
        let token = self.token;
        let seen = self.peeked.take().unwrap_or_else(|| self.fresh(world));
        let busy = world.ids().filter(|e| self.is_in_flight(world, *e, high_water)).fold(0, |all, e| all | bit(e));
        let before = self.clone();
        let serves = |d: usize| before.serves(world, session, d) && before.destinations[d].circuit == Circuit::Closed;
        let any = (0..DESTINATIONS).any(serves);
        let most = if any { room.saturating_sub(reserve) } else { world.events };
        let mut first_parked: [Set; DESTINATIONS] = [0; DESTINATIONS];
        for e in world.ids().filter(|e| seen & bit(*e) != 0 && busy & bit(*e) == 0).take(most) {
            let (mut whole, mut parked) = (Vec::new(), false);
            for d in (0..DESTINATIONS).filter(|d| before.destinations[*d].there) {
                self.ghosts[e][d].wanted = true;
                let behind = before.is_behind(world, e, d);
                if serves(d) && !behind {
                    whole.push(d);
                    continue;
                }
                parked = true;
                let another = world.ids().any(|f| f < e && first_parked[d] & bit(f) != 0 && world.same_key(f, e));
                first_parked[d] |= bit(e);
                let now = world.keys[e].is_none() || (!behind && !another);
                if self.deliveries[e][d] == Delivery::None {
                    self.deliveries[e][d] = Delivery::Pending(if now { Next::Now } else { Next::Behind });
                }
            }
            if whole.is_empty() {
                self.rows[e] = Row::Listed;
                continue;
            }
            self.rows[e] = Row::Claimed { token, parked };
            whole.into_iter().for_each(|d| self.hand_out(session, token, e, d));
            *room = room.saturating_sub(1);
            *held += 1;
        }
    }

    /// `_claim_due` and what `_take_due` does with it. Whether another round may find more.
    fn take_due(&mut self, world: &World, session: usize, high_water: u8, room: &mut usize) -> bool {
        let token = self.token;
        let high_water = high_water.max(
            world
                .ids()
                .filter(|e| matches!(self.rows[*e], Row::Claimed { token: t, .. } if t == token))
                .max()
                .unwrap_or(0) as u8,
        );
        let is_due = |state: &State, e: usize, d: usize| state.deliveries[e][d] == Delivery::Pending(Next::Now);
        let mut due = Vec::new();
        for d in (0..DESTINATIONS).filter(|d| self.serves(world, session, *d)) {
            let busy = self.deliveries.iter().any(|all| matches!(all[d], Delivery::Processing(_)));
            let probe = match self.destinations[d].circuit {
                Circuit::Closed => false,
                Circuit::HalfOpen if !busy => true,
                _ => continue,
            };
            let most = if probe { 1 } else { *room };
            due.extend(world.ids().filter(|e| is_due(self, *e, d)).take(most).map(|e| (d, e, probe)));
        }
        // Fresh events that appeared late, ahead of a delivery of their key at a destination where something is due.
        let before = self.clone();
        let fresh = before.fresh(world);
        let is_late = |e: &usize| {
            let of_key = |f: usize| world.same_key(f, *e);
            fresh & bit(*e) != 0
                && due.iter().any(|(d, f, _)| {
                    of_key(*f) && world.ids().any(|g| g > *e && of_key(g) && before.deliveries[g][*d] != Delivery::None)
                })
        };
        let late: Vec<usize> = world.ids().filter(is_late).collect();
        for e in &late {
            self.rows[*e] = Row::Listed;
            for d in (0..DESTINATIONS).filter(|d| before.destinations[*d].there) {
                self.ghosts[*e][d].wanted = true;
                self.deliveries[*e][d] = Delivery::Pending(Next::Now);
            }
        }
        let overtaken = |e: usize| late.iter().any(|l| *l < e && world.same_key(*l, e));
        let (mut chosen, mut in_the_way) = (Vec::new(), Vec::new());
        for (d, e, probe) in due.iter().copied() {
            let busy = world.keys[e].is_some() && before.is_in_flight(world, e, high_water);
            let behind = world.keys[e].is_some() && (before.is_behind(world, e, d) || overtaken(e));
            if busy && !behind {
                in_the_way.extend(world.ids().filter(|f| world.same_key(*f, e)));
            }
            if behind {
                self.deliveries[e][d] = Delivery::Pending(Next::Behind);
            }
            if busy || behind {
                continue;
            }
            chosen.push((d, e));
            let followers = world.ids().filter(|f| *f > e && world.same_key(*f, e) && !probe);
            let outstanding =
                followers.filter(|f| !matches!(before.deliveries[*f][d], Delivery::None | Delivery::Failed));
            let waits = |f: &usize| matches!(before.deliveries[*f][d], Delivery::Pending(Next::Now | Next::Behind));
            chosen.extend(outstanding.take_while(waits).filter(|f| !overtaken(*f)).map(|f| (d, f)));
        }
        chosen.sort_unstable_by_key(|(d, e)| (*e, *d));
        chosen.dedup();
        chosen.truncate(*room);
        for (d, e) in &chosen {
            self.deliveries[*e][*d] = Delivery::Processing(token);
            self.hand_out(session, token, *e, *d);
            *room = room.saturating_sub(1);
        }
        in_the_way.iter().for_each(|e| self.list(world, *e));
        if !world.is(Broken::RestNotListed) {
            chosen.iter().for_each(|(_, e)| self.list(world, *e));
        }
        !late.is_empty() || !in_the_way.is_empty()
    }

    /// `_release`.
    fn release(&mut self, world: &World, token: Token) {
        for e in world.ids() {
            match self.rows[e] {
                Row::Claimed { token: t, parked: true } if t == token => self.list(world, e),
                Row::Claimed { token: t, parked: false } if t == token => {
                    self.rows[e] = Row::Fresh;
                    self.ghosts[e].iter_mut().for_each(|g| g.wanted = false);
                    self.let_go(token);
                }
                _ => {}
            }
        }
        if !world.is(Broken::ReleaseForgetsDeliveries) {
            let held: Vec<(usize, usize)> = self.held_rows(token);
            for (e, d) in &held {
                self.deliveries[*e][*d] = Delivery::Pending(Next::Now);
            }
            for (e, d) in held {
                self.left_claim(world, e, d, token);
            }
        }
        self.claims.retain(|c| c.token != token);
    }

    fn held_rows(&self, token: Token) -> Vec<(usize, usize)> {
        let all = (0..EVENTS).flat_map(|e| (0..DESTINATIONS).map(move |d| (e, d)));
        all.filter(|(e, d)| self.deliveries[*e][*d] == Delivery::Processing(token)).collect()
    }

    fn release_where(&mut self, world: &World, which: impl Fn(&Claim) -> bool) {
        let tokens: Vec<Token> = self.claims.iter().filter(|c| which(c)).map(|c| c.token).collect();
        tokens.into_iter().for_each(|token| self.release(world, token));
    }

    /// `_delivered`: whoever reports that an event reached all destinations of its claim.
    fn ack(&mut self, world: &World, token: Token, e: usize) {
        let fenced = |t: Token| t == token || world.is(Broken::NoFencing);
        if let Row::Claimed { token: t, parked } = self.rows[e]
            && fenced(t)
        {
            self.ghosts[e].iter_mut().for_each(|g| g.holders &= !(1 << token));
            let row = if parked && !world.is(Broken::ParkedForgotten) { self.rest(e) } else { Row::Processed };
            self.let_go(t);
            self.settle_row(e, row);
            return;
        }
        for d in 0..DESTINATIONS {
            self.delivered(world, token, e, d);
        }
    }

    /// `_delivered_to`.
    fn delivered(&mut self, world: &World, token: Token, e: usize, d: usize) {
        if let Delivery::Processing(t) = self.deliveries[e][d]
            && (t == token || world.is(Broken::NoFencing))
        {
            self.deliveries[e][d] = Delivery::None;
            self.ghosts[e][d].holders &= !(1 << token);
            self.left_claim(world, e, d, t);
            // `_close_circuits`
            let circuit = &mut self.destinations[d].circuit;
            if *circuit == Circuit::HalfOpen {
                *circuit = Circuit::Closed;
            }
        }
    }

    /// One exception of `settle`.
    fn except(&mut self, world: &World, token: Token, e: usize, d: usize, outcome: Outcome) {
        if let Row::Claimed { token: t, .. } = self.rows[e]
            && t == token
        {
            self.list(world, e);
        }
        if outcome == Outcome::Delivered {
            return self.delivered(world, token, e, d);
        }
        // `_list_keys`
        for f in world.ids().filter(|f| world.same_key(*f, e)) {
            if matches!(self.rows[f], Row::Claimed { token: t, .. } if t == token) {
                self.list(world, f);
            }
        }
        let Delivery::Processing(t) = self.deliveries[e][d] else { return };
        if t != token && !world.is(Broken::NoFencing) {
            return;
        }
        // `_failed`, `_release_one`
        let counts = matches!(outcome, Outcome::Failed | Outcome::Rejected);
        let used = counts || (outcome == Outcome::Unavailable && world.is(Broken::OutageUsesAttempts));
        self.attempts[e][d] += u8::from(used);
        self.ghosts[e][d].failures += u8::from(counts);
        let dead = outcome == Outcome::Rejected || (used && self.attempts[e][d] >= MAX_ATTEMPTS);
        self.ghosts[e][d].dead |= dead;
        self.ghosts[e][d].holders &= !(1 << token);
        self.deliveries[e][d] = match outcome {
            _ if dead => Delivery::Failed,
            Outcome::Failed => Delivery::Pending(Next::Later),
            _ => Delivery::Pending(Next::Now),
        };
        if outcome == Outcome::Unavailable {
            self.destinations[d].circuit = Circuit::Open;
        }
        if !dead && !world.is(Broken::NothingTakenBack) {
            self.take_back(world, t, e, d);
        }
        self.left_claim(world, e, d, t);
        if self.attempts[e][d] != self.ghosts[e][d].failures {
            self.blame(Fault::AttemptUsed);
        }
    }

    /// `_take_back`.
    fn take_back(&mut self, world: &World, token: Token, e: usize, d: usize) {
        for f in world.ids().filter(|f| *f > e && world.same_key(*f, e)) {
            if self.deliveries[f][d] == Delivery::Processing(token) {
                self.deliveries[f][d] = Delivery::Pending(Next::Behind);
                self.ghosts[f][d].holders &= !(1 << token);
                self.hands.iter_mut().for_each(|hand| hand.retain(|h| (h.token, h.event, h.to) != (token, f, d)));
                self.let_go(token);
                self.refresh(f);
            }
        }
    }

    /// `remove_destination`.
    fn remove(&mut self, world: &World, d: usize) {
        self.destinations[d] = Destination { there: false, paused: false, since: 0, circuit: Circuit::Closed };
        for e in world.ids() {
            self.ghosts[e][d] = Ghost::default();
            self.attempts[e][d] = 0;
            let gone = std::mem::replace(&mut self.deliveries[e][d], Delivery::None);
            if let Delivery::Processing(token) = gone
                && !world.is(Broken::RemovalKeepsHeld)
            {
                self.let_go(token);
            }
            if gone != Delivery::None {
                self.refresh(e);
            }
        }
    }

    fn deliver(&mut self, world: &World, session: usize, item: InHand) {
        let InHand { token, event: e, to: d, .. } = item;
        // What could be seen when the claim was made, is ahead and owed, and nobody has.
        let overtaken = world.ids().any(|f| {
            let ghost = &self.ghosts[f][d];
            let owed = match self.rows[f] {
                Row::Fresh => true,
                Row::Claimed { .. } | Row::Listed => ghost.wanted && !ghost.dead,
                _ => false,
            };
            f < e && world.same_key(f, e) && self.seen_from[f] <= token && owed && !ghost.got
        });
        if overtaken && self.callback & bit(e) == 0 {
            self.blame(Fault::OutOfOrder);
        }
        self.ghosts[e][d].got = true;
        for held in self.hands[session].iter_mut().filter(|h| **h == item) {
            held.delivered = true;
        }
        self.hands[session].sort_unstable();
    }

    fn forget(&mut self, session: usize, which: impl Fn(&InHand) -> bool) {
        self.hands[session].retain(|h| !which(h));
    }

    /// The claim of this token still holds what its consumer thinks it holds.
    fn is_current(&self, item: &InHand) -> bool {
        self.ghosts[item.event][item.to].holders & (1 << item.token) != 0
    }

    /// The tables say that the claim of this token holds the event, for this destination or as a whole.
    fn holds(&self, token: Token, e: usize, d: usize) -> bool {
        let whole = matches!(self.rows[e], Row::Claimed { token: t, .. } if t == token);
        whole || self.deliveries[e][d] == Delivery::Processing(token)
    }

    /// Ahead of it in the same claim is something that is not confirmed.
    fn is_next(&self, world: &World, session: usize, item: &InHand) -> bool {
        !self.hands[session].iter().any(|h| {
            let before = h.token == item.token && h.to == item.to && h.event < item.event;
            before && !h.delivered && world.same_key(h.event, item.event)
        })
    }

    /// What the tables mean: of each event and destination whose it is, whether a claim holds it as a whole or by a row.
    fn tables(&self) -> impl PartialEq + use<> {
        let of = |e: usize, d: usize| match self.rows[e] {
            Row::Claimed { token, .. } if self.holds_whole(token, e, d) => Delivery::Processing(token),
            _ => self.deliveries[e][d],
        };
        let row = |e: usize| match self.rows[e] {
            Row::Claimed { .. } => Row::Listed,
            row => row,
        };
        let all: [_; EVENTS] = std::array::from_fn(|e| (row(e), [of(e, 0), of(e, 1)]));
        (all, self.attempts, self.destinations)
    }

    fn holds_whole(&self, token: Token, e: usize, d: usize) -> bool {
        let part = self.destinations[d].there && self.destinations[d].since < token;
        let whole = matches!(self.rows[e], Row::Claimed { token: t, .. } if t == token);
        whole && part && self.deliveries[e][d] == Delivery::None
    }

    /// Whatever a claim holds that has not ended, its consumer was handed and has in hand.
    fn holders_know(&self) -> bool {
        self.claims.iter().filter(|c| c.end == End::Not).all(|claim| {
            (0..EVENTS).all(|e| {
                (0..DESTINATIONS).all(|d| {
                    let in_hand = |h: &InHand| (h.token, h.event, h.to) == (claim.token, e, d);
                    let held = self.holds_whole(claim.token, e, d)
                        || self.deliveries[e][d] == Delivery::Processing(claim.token);
                    !held || self.hands[claim.session].iter().any(in_hand)
                })
            })
        })
    }

    /// Each claim's row counts what carries its token, and is there as long as there is something.
    fn books_are_right(&self) -> bool {
        let whole =
            |t: Token| self.rows.iter().filter(|r| matches!(r, Row::Claimed { token, .. } if *token == t)).count();
        let held = |t: Token| (whole(t) + self.held_rows(t).len()) as i8;
        (1..=self.token).all(|t| match self.claims.iter().find(|c| c.token == t) {
            Some(claim) => claim.held == held(t),
            None => held(t) == 0,
        })
    }

    /// From here on nothing more goes wrong: whether every event that was committed is settled in the end.
    fn drains(&self, world: &World) -> bool {
        let mut state = self.clone();
        state.left = Budget { claims: u8::MAX, ..Budget::default() };
        for e in world.ids().filter(|e| self.callback & bit(*e) != 0) {
            state = world.after(&state, Action::Callback(e)).unwrap_or(state);
        }
        state.hands = Default::default();
        // A lease may be long: what has another end does not wait for it.
        for claim in state.claims.iter_mut().filter(|c| c.end == End::Not) {
            claim.end = End::Lease;
        }
        (1..=state.token).for_each(|token| state.no_longer_held(token));
        // Consumers that serve all, so that none is missing.
        let world = World { serves: [!0; SESSIONS], ..*world };
        for _ in 0..3 * EVENTS {
            state = world.after(&state, Action::Work).unwrap_or(state);
            for d in 0..DESTINATIONS {
                state.destinations[d].paused = false;
                state.destinations[d].circuit = match state.destinations[d].circuit {
                    Circuit::Open => Circuit::HalfOpen,
                    other => other,
                };
                for e in world.ids() {
                    state = world.after(&state, Action::RetryIsDue(e, d)).unwrap_or(state);
                }
            }
            if state.token >= 15 {
                return false;
            }
            state.claim(&world, 0);
            while let Some(item) = state.hands[0].iter().copied().find(|h| !h.delivered && state.is_next(&world, 0, h))
            {
                state.deliver(&world, 0, item);
            }
            while let Some(item) = state.hands[0].first().copied() {
                state = world.after(&state, Action::Settle(0, item, Outcome::Delivered)).unwrap_or(state);
            }
            let settled = |e: usize| matches!(state.rows[e], Row::Open | Row::Processed | Row::Failed | Row::Removed);
            if world.ids().all(settled) {
                return state.claims.is_empty() && state.fault.is_none();
            }
        }
        false
    }
}

impl World {
    fn after(&self, last: &State, action: Action) -> Option<State> {
        let mut s = last.clone();
        match action {
            Action::Commit(e) => {
                s.rows[e] = Row::Fresh;
                s.callback |= bit(e);
                s.seen_from[e] = NEVER;
            }
            Action::Callback(e) => {
                s.callback &= !bit(e);
                s.seen_from[e] = s.token + 1;
                if !self.is(Broken::LateSkipped) {
                    s.lowered = s.lowered.min(e as u8);
                }
            }
            Action::Peek => s.peeked = Some(s.fresh(self)),
            Action::Claim(session) => {
                s.left.claims -= 1;
                s.claim(self, session);
            }
            Action::RollBack => {
                s.left.rollbacks -= 1;
                let lowered = std::mem::replace(&mut s.lowered, NEVER);
                if !self.is(Broken::RollbackLosesMark) {
                    s.low_water = s.low_water.min(lowered);
                }
            }
            Action::Deliver(session, item) => s.deliver(self, session, item),
            Action::Ack(session, token, e) => {
                s.ack(self, token, e);
                s.forget(session, |h| (h.token, h.event) == (token, e));
                if !(0..DESTINATIONS).any(|d| last.holds(token, e, d)) && s.tables() != last.tables() {
                    s.blame(Fault::StaleTokenChanged);
                }
            }
            Action::Settle(session, item, outcome) => {
                match outcome {
                    Outcome::Failed => s.left.failures = s.left.failures.saturating_sub(1),
                    Outcome::Rejected => s.left.rejections = s.left.rejections.saturating_sub(1),
                    Outcome::Unavailable => s.left.outages = s.left.outages.saturating_sub(1),
                    Outcome::Released => s.left.releases = s.left.releases.saturating_sub(1),
                    Outcome::Delivered => {}
                }
                s.except(self, item.token, item.event, item.to, outcome);
                s.forget(session, |h| *h == item);
                if !last.holds(item.token, item.event, item.to) && s.tables() != last.tables() {
                    s.blame(Fault::StaleTokenChanged);
                }
            }
            Action::Release(session, token) => {
                s.left.releases -= 1;
                s.no_longer_held(token);
                s.release(self, token);
                s.forget(session, |h| h.token == token);
            }
            Action::LeaseEnds(n) => {
                s.left.lease_ends -= 1;
                s.claims[n].end = End::Lease;
                s.no_longer_held(s.claims[n].token);
            }
            Action::Work => s.release_where(self, |c| match c.end {
                End::Not => self.is(Broken::LeaseEndsEarly),
                End::Lease => !self.is(Broken::LeaseEndIgnored),
                End::Session => !self.is(Broken::SessionEndForgotten),
                End::Restart => true,
            }),
            Action::Die(session) => {
                s.left.deaths -= 1;
                s.hands[session].clear();
                for n in 0..s.claims.len() {
                    if s.claims[n].session == session && s.claims[n].end == End::Not {
                        s.claims[n].end = End::Session;
                        s.no_longer_held(s.claims[n].token);
                    }
                }
            }
            Action::Restart => {
                s.left.restarts -= 1;
                s.hands = Default::default();
                s.callback = 0;
                for n in 0..s.claims.len() {
                    s.claims[n].end = End::Restart;
                    s.no_longer_held(s.claims[n].token);
                }
                let from = s.token + 1;
                s.seen_from.iter_mut().filter(|seen| **seen == NEVER).for_each(|seen| *seen = from);
                s.low_water = if self.is(Broken::RestartSkipsAll) { self.events as u8 } else { 0 };
                s.lowered = NEVER;
                s.high_water = None;
            }
            Action::RetryIsDue(e, d) => {
                if s.deliveries[e][d] != Delivery::Pending(Next::Later) {
                    return None;
                }
                s.deliveries[e][d] = Delivery::Pending(Next::Now);
            }
            Action::HalfOpen(d) => s.destinations[d].circuit = Circuit::HalfOpen,
            Action::Add(d) => {
                s.left.changes -= 1;
                s.token += 1;
                s.destinations[d] =
                    Destination { there: true, paused: false, since: s.token, circuit: Circuit::Closed };
            }
            Action::Remove(d) => {
                s.left.changes -= 1;
                s.remove(self, d);
            }
            Action::Pause(d) => {
                s.left.pauses -= 1;
                s.destinations[d].paused = true;
            }
            Action::Resume(d) => s.destinations[d].paused = false,
            Action::Retain(e) => {
                s.left.removals -= 1;
                let owed = s.ghosts[e].iter().any(|g| g.wanted && !g.got && !g.dead);
                if owed {
                    s.blame(Fault::Lost);
                }
                s.rows[e] = Row::Removed;
                s.deliveries[e] = [Delivery::None; DESTINATIONS];
            }
        }
        Some(s)
    }
}

impl Model for World {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.start()]
    }

    fn actions(&self, s: &State, actions: &mut Vec<Action>) {
        if s.fault.is_some() {
            return;
        }
        for e in self.ids() {
            if s.rows[e] == Row::Open {
                actions.push(Action::Commit(e));
            }
            if s.callback & bit(e) != 0 {
                actions.push(Action::Callback(e));
            }
            let gone = match s.rows[e] {
                Row::Processed => true,
                Row::Failed => true,
                Row::Listed => self.is(Broken::RemovedWhileOwed) && s.deliveries[e].contains(&Delivery::Failed),
                _ => false,
            };
            if gone && s.left.removals > 0 {
                actions.push(Action::Retain(e));
            }
            for d in 0..DESTINATIONS {
                if s.deliveries[e][d] == Delivery::Pending(Next::Later) {
                    actions.push(Action::RetryIsDue(e, d));
                }
            }
        }
        if self.is(Broken::ReadBeforeLock) && s.peeked.is_none() {
            actions.push(Action::Peek);
        }
        for session in 0..SESSIONS {
            if s.left.claims > 0 && self.serves[session] != 0 {
                actions.push(Action::Claim(session));
            }
            if s.left.deaths > 0 && s.claims.iter().any(|c| c.session == session) {
                actions.push(Action::Die(session));
            }
            for item in &s.hands[session] {
                if item.delivered {
                    actions.push(Action::Settle(session, *item, Outcome::Delivered));
                } else if s.is_next(self, session, item) {
                    if s.is_current(item) {
                        actions.push(Action::Deliver(session, *item));
                    }
                    let left = &s.left;
                    for (outcome, left) in [
                        (Outcome::Failed, left.failures),
                        (Outcome::Rejected, left.rejections),
                        (Outcome::Unavailable, left.outages),
                        (Outcome::Released, left.releases),
                    ] {
                        if left > 0 {
                            actions.push(Action::Settle(session, *item, outcome));
                        }
                    }
                }
                let same = |h: &&InHand| (h.token, h.event) == (item.token, item.event);
                let first = s.hands[session].iter().find(same) == Some(item);
                if first && s.hands[session].iter().filter(same).all(|h| h.delivered) {
                    actions.push(Action::Ack(session, item.token, item.event));
                }
                if s.left.releases > 0 && s.hands[session].iter().find(|h| h.token == item.token) == Some(item) {
                    actions.push(Action::Release(session, item.token));
                }
            }
        }
        if s.left.rollbacks > 0 {
            actions.push(Action::RollBack);
        }
        for (n, claim) in s.claims.iter().enumerate() {
            if claim.end == End::Not && s.left.lease_ends > 0 {
                actions.push(Action::LeaseEnds(n));
            }
        }
        if s.claims.iter().any(|c| c.end != End::Not || self.is(Broken::LeaseEndsEarly)) {
            actions.push(Action::Work);
        }
        if s.left.restarts > 0 {
            actions.push(Action::Restart);
        }
        for d in 0..DESTINATIONS {
            let to = &s.destinations[d];
            match to.circuit {
                Circuit::Open => actions.push(Action::HalfOpen(d)),
                Circuit::Closed | Circuit::HalfOpen => {}
            }
            if d > 0 && s.left.changes > 0 {
                actions.push(if to.there { Action::Remove(d) } else { Action::Add(d) });
            }
            if to.there && to.paused {
                actions.push(Action::Resume(d));
            } else if to.there && s.left.pauses > 0 {
                actions.push(Action::Pause(d));
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        self.after(last, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("handed out to one claim at a time", |_, s: &State| {
                s.fault != Some(Fault::HandedOutTwice)
            }),
            Property::always("in order", |_, s: &State| s.fault != Some(Fault::OutOfOrder)),
            Property::always("leaves when nothing is owed", |_, s: &State| s.fault != Some(Fault::Lost)),
            Property::always("a stale token changes nothing", |_, s: &State| s.fault != Some(Fault::StaleTokenChanged)),
            Property::always("an outage uses no attempt", |_, s: &State| s.fault != Some(Fault::AttemptUsed)),
            Property::always("the books are right", |_, s: &State| s.fault.is_some() || s.books_are_right()),
            Property::always("whoever holds an event knows it", |_, s: &State| s.fault.is_some() || s.holders_know()),
            Property::always("nothing is lost", |world: &World, s: &State| s.fault.is_some() || s.drains(world)),
            Property::sometimes("all is settled", |world: &World, s: &State| {
                world.ids().all(|e| matches!(s.rows[e], Row::Processed | Row::Failed | Row::Removed))
            }),
        ]
    }
}

//! What the worker does besides announcing. A chore is one transaction that waits for nobody for long: what it can't do
//! now it leaves, and comes back to. Between any two of them there is time for what is new.
//!
//! | chore | when | what |
//! | --- | --- | --- |
//! | recover | at the start, after a restore, when a count went wrong | shared memory from the tables |
//! | release | an attached session ended or detached | its claims are given back |
//! | leases | the first lease is over | the claims that are over are given back |
//! | due | a retry, a circuit, a scheduled event | consumers are woken |
//! | retain | a processed event is old enough | it is removed |

use crate::attempt::{Failure, Patience, attempt};
use crate::backoff::Backoff;
use crate::retention::{Next, Retention, Step};
use crate::shmem::{Database, NEVER};
use crate::status::Status;
use crate::worker::extension_is_here;
use crate::{clock, guc, session};
use pgrx::datum::{DatumWithOid, TimestampWithTimeZone};
use pgrx::prelude::*;
use std::ffi::CStr;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chore {
    Recover,
    Release,
    Leases,
    Due,
    Retain,
}

use Chore::*;

const ALL: [Chore; 5] = [Recover, Release, Leases, Due, Retain];

impl Chore {
    fn name(self) -> &'static CStr {
        match self {
            Recover => c"recovering",
            Release => c"releasing the claims of sessions that ended",
            Leases => c"releasing claims whose lease is over",
            Due => c"waking consumers for what is due",
            Retain => c"removing processed events",
        }
    }

    /// Nobody waits for an announcement because somebody else holds a lock; the chore is tried again instead. What a
    /// chore does once it has its locks takes as long as it takes, but for the code of others: triggers on a removal.
    fn patience(self, failures: u32, step: i32) -> Patience {
        let lock_ms = (10 << failures.min(3)).min(60);
        let all_ms = match self {
            Retain if step >= 100 => 1000,
            Retain => 150,
            _ => 0,
        };
        Patience { lock_ms, all_ms }
    }
}

pub struct Chores {
    database: &'static Database,
    wanted: [bool; ALL.len()],
    /// What waits for the claim lock.
    lockless: [bool; ALL.len()],
    backoffs: [Backoff; ALL.len()],
    retention: Retention,
    /// Steps of retention that met an error.
    complaints: u32,
}

impl Chores {
    /// At the start of the worker: the one before it may have been cut off in any of them.
    pub fn new(database: &'static Database) -> Self {
        Chores {
            database,
            wanted: [true; ALL.len()],
            lockless: [false; ALL.len()],
            backoffs: Default::default(),
            retention: Retention::new(clock::monotonic()),
            complaints: 0,
        }
    }

    /// Settings or the clock on the wall changed.
    pub fn look_at_all(&mut self) {
        self.database.timers.look_at_all(clock::now());
        self.retention.start_over(clock::monotonic());
    }

    /// Does the first chore that is wanted and may be tried; false: there is none.
    pub fn one(&mut self) -> bool {
        self.gather();
        let now = clock::monotonic();
        let ready = |chore: &&Chore| self.wanted[**chore as usize] && self.backoffs[**chore as usize].left(now) == 0;
        match ALL.iter().find(ready) {
            Some(chore) => {
                self.run(*chore);
                true
            }
            None => false,
        }
    }

    /// Time until the next try, in microseconds.
    pub fn left(&self) -> Option<i64> {
        let now = clock::monotonic();
        let retries = ALL.iter().filter(|c| self.wanted[**c as usize]).map(|c| self.backoffs[*c as usize].left(now));
        retries.chain(self.retention.left(now)).min()
    }

    /// What others asked for becomes this worker's own to do. Taken before the chore's snapshot: see `timers`.
    fn gather(&mut self) {
        let (database, now) = (self.database, clock::now());
        let timers = &database.timers;
        if database.recover.swap(false, SeqCst) || database.recount.is_spoiled() {
            database.recovered.store(false, SeqCst);
            self.wanted[Recover as usize] = true;
        }
        self.wanted[Release as usize] |= database.ended_attachments.swap(0, SeqCst) != 0;
        let due = timers.due.take(now);
        // What the application's locks and deletes left for later has no timer but this.
        self.wanted[Leases as usize] |= timers.leases.take(now) || due;
        self.wanted[Due as usize] |= due;
        let monotonic = clock::monotonic();
        self.wanted[Retain as usize] |= timers.retention.take(now) && !self.retention.is_resting(monotonic)
            || self.retention.left(monotonic) == Some(0);
        self.heed_the_claim_lock();
    }

    /// Whoever held the claim lock lets go of it: whoever waits for it tries again at once.
    fn heed_the_claim_lock(&mut self) {
        if self.lockless.contains(&true) && !self.database.claim_lock_wanted.load(SeqCst) {
            for chore in ALL.iter().filter(|chore| self.lockless[**chore as usize]) {
                self.backoffs[*chore as usize].cut_short();
            }
        }
    }

    fn run(&mut self, chore: Chore) {
        self.wanted[chore as usize] = false;
        let result = match chore {
            Recover => self.recover(),
            Release => self.release(),
            Leases => self.end_leases(),
            Due => self.due(),
            Retain => self.retain(),
        };
        let backoff = &mut self.backoffs[chore as usize];
        match result {
            Ok(()) => {
                backoff.succeeded();
                self.lockless[chore as usize] = false;
            }
            Err(failure) => {
                self.wanted[chore as usize] = true;
                backoff.failed(clock::monotonic());
                let lockless = failure.is_lock() && !failure.in_part && [Recover, Release, Leases].contains(&chore);
                self.lockless[chore as usize] = lockless;
                if lockless {
                    self.database.claim_lock_wanted.store(true, SeqCst);
                }
                // Nothing to report: a lock is held for a moment, or the extension was dropped meanwhile.
                let lasts = !failure.is_lock() || backoff.failures() >= 8;
                if backoff.is_worth_a_line() && lasts && extension_is_here().unwrap_or(true) {
                    failure.log(chore.name());
                }
            }
        }
    }

    fn attempt<R>(&self, chore: Chore, step: i32, body: impl FnOnce() -> R) -> Result<R, Failure> {
        attempt(chore.name(), chore.patience(self.backoffs[chore as usize].failures(), step), body)
    }

    fn recover(&mut self) -> Result<(), Failure> {
        let database = self.database;
        let count = !database.recovered.load(SeqCst);
        self.attempt(Recover, 0, || moment("SELECT outbox._recover($1)", &[count.into()]))?;
        // Consumers look for what came to light, and the worker for what is due.
        database.news.look_at_all();
        database.timers.look_at_all(clock::now());
        Ok(())
    }

    /// The claims of all under one lock: where many sessions come and go, many others wait for it.
    fn release(&mut self) -> Result<(), Failure> {
        let ended = session::ended(self.database);
        if ended.is_empty() {
            return Ok(());
        }
        let call = "SELECT r.released, r.error FROM outbox._release_attachments($1) r";
        let (released, error) = self.attempt(Release, 0, || {
            let row = Spi::get_two_with_args::<Vec<i64>, String>(call, &[ended.into()]);
            row.unwrap_or_else(|e| error!("{call}: {e}"))
        })?;
        released.unwrap_or_default().iter().for_each(|attachment| session::free(self.database, *attachment));
        some_left(error)
    }

    fn end_leases(&mut self) -> Result<(), Failure> {
        let call = "SELECT outbox._end_leases()";
        let error =
            self.attempt(Leases, 0, || Spi::get_one::<String>(call).unwrap_or_else(|e| error!("{call}: {e}")))?;
        some_left(error)
    }

    fn due(&mut self) -> Result<(), Failure> {
        let next = self.attempt(Due, 0, || moment("SELECT outbox._due()", &[]))?;
        self.database.timers.due.set(next);
        Ok(())
    }

    fn retain(&mut self) -> Result<(), Failure> {
        let nothing = self.database.recovered.load(SeqCst)
            && self.database.counters.by_status[Status::Processed].load(Relaxed) <= 0;
        let Some(kept) = guc::retention().filter(|_| !nothing) else {
            self.retention.start_over(clock::monotonic());
            return Ok(());
        };
        let begun = clock::monotonic();
        let (from, size) = self.retention.next_step(begun, kept);
        match self.attempt(Retain, size, || step_of_retention(from, size)) {
            Ok((step, error)) => {
                let now = clock::monotonic();
                if let Next::Wait(Some(young)) = self.retention.stepped(now, now - begun, kept, step) {
                    self.database.timers.retention.set(young);
                }
                self.complain(error);
                Ok(())
            }
            Err(failure) => {
                if !failure.is_lock() {
                    self.retention.failed();
                }
                Err(failure)
            }
        }
    }

    /// An event that can't be removed is no reason to stop, and for a line now and then.
    fn complain(&mut self, error: Option<String>) {
        if let Err(failure) = some_left(error) {
            self.complaints = self.complaints.saturating_add(1);
            if self.complaints.is_power_of_two() {
                failure.log(Retain.name());
            }
        }
    }
}

/// Some of it could not be done, for this reason.
fn some_left(error: Option<String>) -> Result<(), Failure> {
    error.map_or(Ok(()), |message| Err(Failure::in_part(&message)))
}

fn step_of_retention(from: i64, size: i32) -> (Step, Option<String>) {
    let call = "SELECT r.last, r.skipped, r.young, r.error FROM outbox._retain($1, $2) r";
    let read = || {
        Spi::connect(|client| {
            let row = client.select(call, Some(1), &[from.into(), size.into()])?.first();
            let young = row.get::<TimestampWithTimeZone>(3)?.map(TimestampWithTimeZone::into_inner);
            Ok::<_, spi::Error>((Step { last: row.get(1)?, skipped: row.get(2)?, young }, row.get::<String>(4)?))
        })
    };
    read().unwrap_or_else(|e| error!("{call}: {e}"))
}

/// Runs a statement that returns a moment; null and infinity are never.
fn moment(statement: &str, arguments: &[DatumWithOid<'_>]) -> i64 {
    match Spi::get_one_with_args::<TimestampWithTimeZone>(statement, arguments) {
        Ok(moment) => moment.map_or(NEVER, TimestampWithTimeZone::into_inner),
        Err(e) => error!("{statement}: {e}"),
    }
}

//! What the functions promise of claims, in memory.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

pub const CONSUMERS: usize = 3;
pub const EVERYTHING: i32 = 1000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Pending,
    /// Waits for its retry.
    Parked,
    /// Waits for its time, and until then for nobody.
    Scheduled,
    Held(i64),
    Processed,
    Failed,
}

pub struct Event {
    pub aggregate: u8,
    pub state: State,
}

/// What the functions promise.
#[derive(Default)]
pub struct Model {
    pub events: BTreeMap<i64, Event>,
    /// Of each consumer, the claims that still hold something, oldest first.
    pub claims: [Vec<i64>; CONSUMERS],
    pub over: Vec<i64>,
    pub late: Option<(i64, u8)>,
}

impl Model {
    pub fn open(&self, aggregate: u8, below: i64) -> impl Iterator<Item = (&i64, &Event)> {
        let out = |state| matches!(state, State::Processed | State::Failed | State::Scheduled);
        self.events.range(..below).filter(move |(_, e)| aggregate != 0 && e.aggregate == aggregate && !out(e.state))
    }

    pub fn held(&self, token: i64) -> Vec<i64> {
        self.events.iter().filter(|(_, e)| e.state == State::Held(token)).map(|(id, _)| *id).collect()
    }

    /// What a claim of everything gives.
    pub fn available(&self) -> Vec<i64> {
        let busy = |event: &Event| self.open(event.aggregate, i64::MAX).any(|(_, e)| matches!(e.state, State::Held(_)));
        let behind = |id: i64, event: &Event| self.open(event.aggregate, id).any(|(_, e)| e.state != State::Pending);
        let is_available = |(id, e): &(&i64, &Event)| e.state == State::Pending && !busy(e) && !behind(**id, e);
        self.events.iter().filter(is_available).map(|(id, _)| *id).collect()
    }

    /// Nothing is left that could have been handed out; what stands behind another event may come with it or after it.
    pub fn nothing_left(&self) -> Result<()> {
        let is_head =
            |id: &i64| self.events.get(id).is_some_and(|event| self.open(event.aggregate, *id).next().is_none());
        let missing: Vec<i64> = self.available().into_iter().filter(is_head).collect();
        ensure!(missing.is_empty(), "{missing:?} were not handed out");
        Ok(())
    }

    pub fn claimed(&mut self, by: usize, most: i32, ids: &[i64], token: i64) -> Result<()> {
        let available = self.available();
        ensure!(ids.is_sorted(), "not the oldest first: {ids:?}");
        ensure!(ids.len() <= most as usize, "{} events, where {most} were asked for", ids.len());
        for id in ids {
            ensure!(available.contains(id), "{id} was handed out, available were {available:?}");
            let aggregate = self.events.get(id).map_or(0, |e| e.aggregate);
            let skipped = self.open(aggregate, *id).find(|(earlier, _)| !ids.contains(earlier));
            ensure!(skipped.is_none(), "{id} was handed out before {skipped:?}", skipped = skipped.map(|(id, _)| id));
        }
        self.set(ids, State::Held(token));
        if !ids.is_empty() {
            self.claims[by].push(token);
        }
        Ok(())
    }

    pub fn set(&mut self, ids: &[i64], state: State) {
        for id in ids {
            if let Some(event) = self.events.get_mut(id) {
                event.state = state;
            }
        }
    }

    /// The claim holds nothing any more.
    pub fn end(&mut self, token: i64) {
        self.set(&self.held(token), State::Pending);
        self.claims.iter_mut().for_each(|claims| claims.retain(|t| *t != token));
        self.over.push(token);
    }

    pub fn end_if_empty(&mut self, token: i64) {
        if self.held(token).is_empty() {
            self.end(token);
        }
    }

    /// Later events of the aggregate leave the claim, because an earlier one is owed again.
    pub fn take_back(&mut self, token: i64, id: i64) {
        let aggregate = self.events.get(&id).map_or(0, |e| e.aggregate);
        let later: Vec<i64> = self
            .held(token)
            .into_iter()
            .filter(|held| {
                *held > id && aggregate != 0 && self.events.get(held).is_some_and(|e| e.aggregate == aggregate)
            })
            .collect();
        self.set(&later, State::Pending);
    }

    pub fn counts(&self) -> [i64; 4] {
        let count = |of: &dyn Fn(State) -> bool| self.events.values().filter(|e| of(e.state)).count() as i64;
        [
            count(&|s| matches!(s, State::Pending | State::Parked | State::Scheduled)),
            count(&|s| matches!(s, State::Held(_))),
            count(&|s| s == State::Processed),
            count(&|s| s == State::Failed),
        ]
    }
}

//! The protocol of claims as a state machine: random calls of the real functions beside a model of what they promise.
//! That the model would notice is shown by faults that are put into the functions on purpose.

mod calls;
mod promise;

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use outbox_tests::cluster::{Cluster, Stop};
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use calls::{Call, call};
use promise::{CONSUMERS, EVERYTHING, Event, Model, State};

use crate::claims::claim;

struct System {
    cluster: Cluster,
    database: String,
    admin: Session,
    late: Session,
    consumers: Vec<Session>,
}

impl System {
    async fn set() -> Result<Self> {
        let cluster = Cluster::start().await?;
        let database = cluster.database().await?;
        let (admin, late) = (cluster.connect(&database).await?, cluster.connect(&database).await?);
        let mut system = System { cluster, database, admin, late, consumers: Vec::new() };
        for _ in 0..CONSUMERS {
            system.consumers.push(system.consumer().await?);
        }
        Ok(system)
    }

    async fn consumer(&self) -> Result<Session> {
        let session = self.cluster.connect(&self.database).await?;
        session.batch_execute("SELECT outbox.attach('model')").await?;
        Ok(session)
    }

    async fn reset(&mut self) -> Result<()> {
        self.late.batch_execute("ROLLBACK").await?;
        self.admin.batch_execute("TRUNCATE outbox_events; DELETE FROM outbox.claims").await?;
        for consumer in 0..CONSUMERS {
            self.consumers[consumer] = self.consumer().await?;
        }
        // The worker counts anew after a TRUNCATE.
        let attached = format!(
            "SELECT consumers = {CONSUMERS} AND pending + processing + processed + failed = 0 FROM outbox.stats()"
        );
        self.admin.until(&attached, LONG).await
    }

    async fn run(&mut self, calls: &[Call]) -> Result<()> {
        self.reset().await?;
        let mut model = Model::default();
        for (number, call) in calls.iter().enumerate() {
            self.call(&mut model, call).await.with_context(|| format!("call {number}, {call:?}"))?;
        }
        self.drain(&mut model).await.context("at the end")
    }

    async fn call(&mut self, model: &mut Model, call: &Call) -> Result<()> {
        match call {
            Call::Insert(aggregates) => self.insert(model, aggregates).await,
            Call::Schedule(aggregates) => self.schedule(model, aggregates).await,
            Call::Delete { which } => self.delete(model, *which).await,
            Call::InsertLate(aggregate) => {
                if model.late.is_none() {
                    self.late.batch_execute("BEGIN").await?;
                    model.late = Some((insert(&self.late, &[*aggregate]).await?[0], *aggregate));
                }
                Ok(())
            }
            Call::EndLate { commit } => self.end_late(model, *commit).await,
            Call::Claim { by, most } => self.claim(model, *by, *most).await,
            Call::ClaimBriefly { by } => self.claim_briefly(model, *by).await,
            Call::AckAll { by } => self.ack_all(model, *by).await,
            Call::Ack { by, which } => self.ack(model, *by, *which).await,
            Call::Fail { by, which, at_once } => self.fail(model, *by, *which, *at_once).await,
            Call::Reject { by, which } => self.reject(model, *by, *which).await,
            Call::Release { by } => self.release(model, *by).await,
            Call::AckStale => self.ack_stale(model).await,
            Call::Due => self.due(model).await,
            Call::Die { by } => self.die(model, *by).await,
            Call::Crash => self.crash(model).await,
        }
    }

    async fn insert(&self, model: &mut Model, aggregates: &[u8]) -> Result<()> {
        let ids = insert(&self.admin, aggregates).await?;
        let pending = |aggregate: &u8| Event { aggregate: *aggregate, state: State::Pending };
        model.events.extend(ids.into_iter().zip(aggregates.iter().map(pending)));
        Ok(())
    }

    async fn schedule(&self, model: &mut Model, aggregates: &[u8]) -> Result<()> {
        self.admin.batch_execute("BEGIN").await?;
        let ids = insert(&self.admin, aggregates).await?;
        let later =
            format!("UPDATE outbox_events SET available_at = now() + '1 hour' WHERE id = ANY ('{{{}}}')", list(&ids));
        self.admin.batch_execute(&format!("{later}; COMMIT")).await?;
        let scheduled = |aggregate: &u8| Event { aggregate: *aggregate, state: State::Scheduled };
        model.events.extend(ids.into_iter().zip(aggregates.iter().map(scheduled)));
        Ok(())
    }

    /// What follows from a delete is the worker's to do.
    async fn delete(&self, model: &mut Model, which: usize) -> Result<()> {
        let there: Vec<i64> =
            model.events.iter().filter(|(_, e)| e.state != State::Processed).map(|(id, _)| *id).collect();
        let Some(id) = there.get(which % there.len().max(1)) else { return Ok(()) };
        self.admin.batch_execute(&format!("DELETE FROM outbox_events WHERE id = {id}")).await?;
        self.admin.until("SELECT NOT EXISTS (SELECT FROM outbox.touched)", LONG).await?;
        if let Some(Event { state: State::Held(token), .. }) = model.events.remove(id) {
            model.end_if_empty(token);
        }
        Ok(())
    }

    async fn end_late(&self, model: &mut Model, commit: bool) -> Result<()> {
        if let Some((id, aggregate)) = model.late.take() {
            self.late.batch_execute(if commit { "COMMIT" } else { "ROLLBACK" }).await?;
            if commit {
                model.events.insert(id, Event { aggregate, state: State::Pending });
            }
        }
        Ok(())
    }

    /// Claims until there are as many events as wanted, or no more: a wake-up says that another claim would find some.
    async fn claim(&self, model: &mut Model, by: usize, most: i32) -> Result<()> {
        let (mut room, mut empty) = (most, 0);
        while room > 0 && empty < 3 {
            let (ids, token) = claim(&self.consumers[by], &room.to_string()).await?;
            model.claimed(by, room, &ids, token)?;
            room -= ids.len() as i32;
            empty = if ids.is_empty() { empty + 1 } else { 0 };
        }
        if room > 0 { model.nothing_left() } else { Ok(()) }
    }

    async fn claim_briefly(&self, model: &mut Model, by: usize) -> Result<()> {
        let (ids, token) = claim(&self.consumers[by], "1000, NULL, '5 ms'").await?;
        model.claimed(by, EVERYTHING, &ids, token)?;
        self.claim_is_over(token).await?;
        model.end(token);
        Ok(())
    }

    async fn claim_is_over(&self, token: i64) -> Result<()> {
        self.admin.until(&format!("SELECT NOT EXISTS (SELECT FROM outbox.claims WHERE token = {token})"), LONG).await
    }

    async fn ack_all(&self, model: &mut Model, by: usize) -> Result<()> {
        let Some(token) = model.claims[by].first().copied() else { return Ok(()) };
        let held = model.held(token);
        let settled = self.admin.one::<i64>(&format!("SELECT outbox.ack({token})")).await?;
        ensure!(settled == held.len() as i64, "{settled} were settled, {held:?} are held");
        model.set(&held, State::Processed);
        model.end(token);
        Ok(())
    }

    /// One of the events that a consumer's oldest claim holds.
    fn pick(model: &Model, by: usize, which: usize) -> Option<(i64, i64)> {
        let token = *model.claims[by].first()?;
        let held = model.held(token);
        Some((token, *held.get(which % held.len().max(1))?))
    }

    async fn ack(&self, model: &mut Model, by: usize, which: usize) -> Result<()> {
        let Some((token, id)) = Self::pick(model, by, which) else { return Ok(()) };
        // Out of turn within its aggregate is the consumer's mistake, and none that this one makes.
        let aggregate = model.events.get(&id).map_or(0, |e| e.aggregate);
        let earlier = model.open(aggregate, id).find(|(_, e)| e.state == State::Held(token));
        let id = earlier.map_or(id, |(earlier, _)| *earlier);
        let settled = self.consumers[by].one::<i64>(&format!("SELECT outbox.ack({token}, ARRAY[{id}])")).await?;
        ensure!(settled == 1, "{id} of {token}: {settled} settled");
        model.set(&[id], State::Processed);
        model.end_if_empty(token);
        Ok(())
    }

    async fn fail(&self, model: &mut Model, by: usize, which: usize, at_once: bool) -> Result<()> {
        let Some((token, id)) = Self::pick(model, by, which) else { return Ok(()) };
        let retry_in = if at_once { "0" } else { "1 hour" };
        let call = format!("SELECT outbox.fail({token}, {id}, 'no luck', '{retry_in}')");
        ensure!(self.consumers[by].one::<bool>(&call).await?, "{id} of {token} did not fail");
        model.set(&[id], if at_once { State::Pending } else { State::Parked });
        model.take_back(token, id);
        model.end_if_empty(token);
        Ok(())
    }

    async fn reject(&self, model: &mut Model, by: usize, which: usize) -> Result<()> {
        let Some((token, id)) = Self::pick(model, by, which) else { return Ok(()) };
        let call = format!("SELECT outbox.reject({token}, {id}, 'never')");
        ensure!(self.consumers[by].one::<bool>(&call).await?, "{id} of {token} was not rejected");
        model.set(&[id], State::Failed);
        model.end_if_empty(token);
        Ok(())
    }

    async fn release(&self, model: &mut Model, by: usize) -> Result<()> {
        let Some(token) = model.claims[by].first().copied() else { return Ok(()) };
        let held = model.held(token).len() as i64;
        let released = self.consumers[by].one::<i64>(&format!("SELECT outbox.release({token})")).await?;
        ensure!(released == held, "{released} were released, {held} are held");
        model.end(token);
        Ok(())
    }

    async fn ack_stale(&self, model: &mut Model) -> Result<()> {
        for token in model.over.iter().rev().take(3) {
            ensure!(
                self.admin.one::<i64>(&format!("SELECT outbox.ack({token})")).await? == 0,
                "ack of a claim that is over"
            );
            let ids = "SELECT coalesce(max(id), 0) FROM outbox_events";
            let failed = format!("SELECT outbox.fail({token}, ({ids}), 'late')");
            ensure!(!self.admin.one::<bool>(&failed).await?, "failure by a claim that is over");
        }
        Ok(())
    }

    async fn due(&self, model: &mut Model) -> Result<()> {
        self.admin
            .batch_execute(
                "UPDATE outbox.delivery SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL;
                 UPDATE outbox_events SET available_at = now() WHERE available_at > now() AND NOT routed",
            )
            .await?;
        for event in model.events.values_mut().filter(|e| matches!(e.state, State::Parked | State::Scheduled)) {
            event.state = State::Pending;
        }
        Ok(())
    }

    async fn die(&mut self, model: &mut Model, by: usize) -> Result<()> {
        self.consumers[by] = self.consumer().await?;
        for token in model.claims[by].clone() {
            self.claim_is_over(token).await?;
            model.end(token);
        }
        Ok(())
    }

    async fn crash(&mut self, model: &mut Model) -> Result<()> {
        self.cluster.restart(Stop::Immediate).await?;
        (self.admin, self.late) =
            (self.cluster.connect(&self.database).await?, self.cluster.connect(&self.database).await?);
        self.admin.until("SELECT worker_state = 'idle' FROM outbox.stats()", LONG).await?;
        for by in 0..CONSUMERS {
            self.consumers[by] = self.consumer().await?;
        }
        let claims: Vec<i64> = model.claims.iter().flatten().copied().collect();
        claims.into_iter().for_each(|token| model.end(token));
        model.late = None;
        Ok(())
    }

    /// Whatever state the calls led to, all is delivered in the end, and the statistics say so.
    async fn drain(&mut self, model: &mut Model) -> Result<()> {
        self.end_late(model, true).await?;
        self.counted(model).await?;
        for by in 0..CONSUMERS {
            self.die(model, by).await?;
        }
        self.due(model).await?;
        loop {
            self.claim(model, 0, EVERYTHING).await?;
            if model.claims[0].is_empty() {
                break;
            }
            while !model.claims[0].is_empty() {
                self.ack_all(model, 0).await?;
            }
        }
        let [pending, processing, ..] = model.counts();
        ensure!((pending, processing) == (0, 0), "{pending} pending, {processing} processing");
        self.counted(model).await
    }

    async fn counted(&self, model: &Model) -> Result<()> {
        let rows = self.admin.query("SELECT status, count(*) FROM outbox_events GROUP BY status", &[]).await?;
        let by_status: BTreeMap<String, i64> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let names = ["pending", "processing", "processed", "failed"];
        let in_table = names.map(|name| by_status.get(name).copied().unwrap_or(0));
        ensure!(in_table == model.counts(), "the table has {in_table:?}, the model {:?}", model.counts());
        let row =
            self.admin.query_one("SELECT pending, processing, processed, failed FROM outbox.stats()", &[]).await?;
        let counted: [i64; 4] = std::array::from_fn(|column| row.get(column));
        let hidden: i64 = self.admin.one(crate::matching::LATE_NOTES).await?;
        ensure!(hidden == 0, "{hidden} deliveries are due before their destination's next_due");
        let miscounted: i64 = self.admin.one(MISCOUNTED).await?;
        ensure!(miscounted == 0, "outbox.tally is wrong for {miscounted} destinations");
        ensure!(counted == in_table, "stats() has {counted:?}, the table {in_table:?}");
        Ok(())
    }
}

/// Destinations whose deliveries outbox.tally has not counted right.
pub const MISCOUNTED: &str = "
    SELECT count(*)
      FROM (SELECT destination, count(*) FILTER (WHERE status <> 'failed') AS waiting, count(*) FILTER (WHERE status = 'failed') AS dead
              FROM outbox.delivery GROUP BY destination) d
      FULL JOIN outbox.tally t USING (destination)
     WHERE coalesce(d.waiting, 0) <> coalesce(t.waiting, 0) OR coalesce(d.dead, 0) <> coalesce(t.dead, 0)";

async fn insert(session: &Session, aggregates: &[u8]) -> Result<Vec<i64>> {
    let aggregates: Vec<Option<String>> = aggregates.iter().map(|a| (*a != 0).then(|| a.to_string())).collect();
    let rows = session
        .query(
            "INSERT INTO outbox_events (event_type, event_data, aggregate_type, aggregate_id)
             SELECT 'a.b', '{}', 'model', a FROM unnest($1::text[]) WITH ORDINALITY AS u (a, n) ORDER BY n RETURNING id",
            &[&aggregates],
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

fn list(ids: &[i64]) -> String {
    ids.iter().map(i64::to_string).collect::<Vec<_>>().join(",")
}

/// Runs so many random sequences of calls; the shortest that shows a fault, if one does.
fn explore(cases: u32, fault: &str) -> Result<Option<String>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let system = runtime.block_on(System::set())?;
    runtime.block_on(system.admin.batch_execute(fault))?;
    let system = std::cell::RefCell::new(system);
    let config = Config { cases, max_shrink_iters: 200, failure_persistence: None, ..Config::default() };
    // Other calls each time; a failure prints those that led to it.
    let seed = outbox_tests::scratch::random_hex(16)?;
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, seed.as_bytes()));
    let outcome = runner.run(&prop::collection::vec(call(), 1..60), |calls| {
        let result = runtime.block_on(system.borrow_mut().run(&calls));
        result.map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    match outcome {
        Ok(()) => Ok(None),
        Err(TestError::Fail(reason, calls)) => Ok(Some(format!("{reason}\nafter {calls:#?}"))),
        Err(TestError::Abort(reason)) => anyhow::bail!("{reason}"),
    }
}

/// MODEL_CASES=5000 looks further.
#[test]
fn the_functions_do_what_the_model_says() -> Result<()> {
    let cases = std::env::var("MODEL_CASES").ok().map_or(Ok(100), |cases| cases.parse())?;
    match explore(cases, "")? {
        None => Ok(()),
        Some(fault) => anyhow::bail!("{fault}"),
    }
}

#[tokio::test]
async fn a_crash_changes_no_outcome() -> Result<()> {
    let mut system = System::set().await?;
    let (insert, claim) = (Call::Insert(vec![1, 1, 2, 0, 3]), |by, most| Call::Claim { by, most });
    let mut calls = vec![insert.clone(), claim(0, 3), Call::Fail { by: 0, which: 0, at_once: false }, Call::Crash];
    calls.extend([
        claim(1, 1),
        insert.clone(),
        Call::Reject { by: 1, which: 0 },
        Call::InsertLate(1),
        claim(2, 2),
        Call::Crash,
    ]);
    calls.extend([claim(0, EVERYTHING), Call::AckStale, Call::Ack { by: 0, which: 1 }, Call::Due, insert, Call::Crash]);
    system.run(&calls).await
}

#[test]
fn the_model_finds_faults_put_in_on_purpose() -> Result<()> {
    for (what, fault) in [
        (
            "later events stay claimed when an earlier one fails",
            "CREATE OR REPLACE FUNCTION outbox._take_back(v_token bigint, v_destination text, v_key bigint, v_id bigint)
             RETURNS void LANGUAGE sql AS ''",
        ),
        (
            "no event has a line",
            "CREATE OR REPLACE FUNCTION outbox._ordering_key(aggregate_type text, aggregate_id text)
             RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN NULL::bigint",
        ),
        (
            "claims outlive their session",
            "CREATE OR REPLACE FUNCTION outbox._release(v_tokens bigint[]) RETURNS bigint LANGUAGE sql
             AS 'DELETE FROM outbox.claims c WHERE c.token = ANY (v_tokens) RETURNING 1::bigint'",
        ),
    ] {
        let found = explore(200, fault)?;
        assert!(found.is_some(), "not found: {what}");
    }
    Ok(())
}

//! What the application pays: commits a second, one insert each, beside the same table without a trigger and with
//! the trigger that most outboxes have, which calls pg_notify.

use anyhow::Result;
use outbox_tests::session::Session;
use outbox_tests::wait::LONG;
use serde_json::json;

use crate::pgbench::Script;
use crate::sample::Spread;
use crate::sheet::{Must, Sheet};
use crate::stage::Outbox;

const CLIENTS: [usize; 4] = [1, 8, 32, 64];
const TURNS: usize = 12;

/// Short, so that what else the machine does meets all three alike.
const SECONDS: usize = 2;

const TABLES: [&str; 3] = ["bench_bare", "outbox_events", "bench_notify"];

const NOTIFY: &str = "CREATE FUNCTION bench_notify() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_notify('bench_notify', NEW.id::text); RETURN NULL; END $$;
    CREATE TRIGGER after_insert AFTER INSERT ON bench_notify FOR EACH ROW EXECUTE FUNCTION bench_notify()";

pub async fn run(sheet: &mut Sheet) -> Result<()> {
    let outbox = Outbox::start(&[("shared_preload_libraries", "pg_outbox")]).await?;
    outbox.create_like("bench_bare").await?;
    outbox.create_like("bench_notify").await?;
    outbox.session.batch_execute(NOTIFY).await?;
    let listener = outbox.cluster.connect(&outbox.database).await?;
    listener.batch_execute("LISTEN outbox_events; LISTEN bench_notify").await?;
    tokio::spawn(read(listener));
    for clients in CLIENTS {
        let rates = rates(&outbox, clients, sheet.turns(TURNS)).await?;
        let [bare, ours, notify] = &rates;
        sheet.raw(format!("{clients} clients"), json!({ "bare": bare, "outbox": ours, "pg_notify": notify }))?;
        let clients = if clients == 1 { "1 client".into() } else { format!("{clients} clients") };
        let ratio = Spread::of_ratios(ours, bare);
        sheet.spread(format!("{clients}: commits/s, of no trigger"), ratio, "", Must::AtLeast(0.95))?;
        let ratio = Spread::of_ratios(notify, bare);
        sheet.spread(format!("{clients}: pg_notify in a trigger"), ratio, "", Must::Nothing)?;
    }
    Ok(())
}

/// Commits a second of each table, a value a turn. The first turn warms up.
async fn rates(outbox: &Outbox, clients: usize, turns: usize) -> Result<[Vec<f64>; 3]> {
    let mut rates = [const { Vec::new() }; 3];
    for turn in 0..=turns {
        // Each of them is first, second and last as often.
        for variant in (0..TABLES.len()).map(|place| (place + turn) % TABLES.len()) {
            let script = Script::insert(&outbox.cluster, TABLES[variant])?;
            let outcome = script.run(&outbox.cluster, &outbox.database, clients, SECONDS, None).await?;
            if turn > 0 {
                rates[variant].push(outcome.rate);
            }
        }
        outbox.empty(&TABLES.join(", ")).await?;
    }
    Ok(rates)
}

async fn read(mut listener: Session) {
    while !listener.is_closed() {
        // An error says that nothing came, or that the session ended, which the loop sees.
        let _ = listener.notification(LONG).await;
    }
}

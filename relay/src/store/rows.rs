//! Rows of the extension's functions, read. What can't be read of one event is that event's end, and no other's.

use std::collections::HashMap;

use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, Type};

use super::{Claimed, Unread};
use crate::destination::{Event, Object, Spec};
use crate::error::Result;

/// One event of a claim. With `keep` also what it says.
pub fn claimed(row: &Row, keep: bool) -> Result<Claimed> {
    let (data, metadata): (Bytes<'_>, Bytes<'_>) = (row.try_get(7)?, row.try_get(8)?);
    let mut claimed = Claimed {
        token: row.try_get(12)?,
        id: row.try_get(0)?,
        event_id: row.try_get(1)?,
        destinations: names(row, 11)?,
        attempts: HashMap::new(),
        retries: row.try_get(10)?,
        size: data.0.len() + metadata.0.len(),
        event: Err(Unread::NoRoom),
    };
    if keep {
        let event = event(row, data, metadata);
        claimed.event = event.map_err(|error| Unread::Unreadable(format!("the event can't be read: {error}")));
    }
    Ok(claimed)
}

/// The same of a claim that hands out no more than what identifies its events.
pub fn reference(row: &Row) -> Result<Claimed> {
    Ok(Claimed {
        token: row.try_get(4)?,
        id: row.try_get(0)?,
        event_id: row.try_get(1)?,
        destinations: names(row, 3)?,
        attempts: HashMap::new(),
        retries: row.try_get(2)?,
        size: 0,
        event: Err(Unread::NoRoom),
    })
}

fn event(row: &Row, data: Bytes<'_>, metadata: Bytes<'_>) -> Result<Event> {
    Ok(Event {
        event_id: row.try_get(1)?,
        event_type: text(row, 2)?.unwrap_or_default(),
        event_version: text(row, 3)?.unwrap_or_default(),
        aggregate_type: text(row, 4)?,
        aggregate_id: text(row, 5)?,
        tenant_id: text(row, 6)?,
        event_data: data.text()?.into(),
        metadata: Object::new(metadata.text()?),
        created_at: row.try_get(9)?,
    })
}

/// Adds to the events of a claim how often each of their destinations has failed so far.
pub fn add_attempts(claimed: &mut [Claimed], rows: &[Row]) -> Result<()> {
    let mut by_id: HashMap<i64, &mut Claimed> = claimed.iter_mut().map(|one| (one.id, one)).collect();
    for row in rows {
        if let Some(one) = by_id.get_mut(&row.try_get(0)?) {
            let name = row.try_get::<_, Bytes<'_>>(1)?.text()?;
            one.attempts.insert(name, u32::try_from(row.try_get::<_, i32>(2)?).unwrap_or(0));
        }
    }
    Ok(())
}

pub fn destination(row: &Row) -> Result<Spec> {
    let settings = row.try_get::<_, Option<String>>(5)?.unwrap_or_default();
    Ok(Spec {
        name: row.try_get::<_, &str>(0)?.into(),
        kind: row.try_get(1)?,
        exchange: row.try_get(2)?,
        routing_key: row.try_get(3)?,
        url: row.try_get(4)?,
        broker: Object::new(settings.as_str()).string("broker").map(|name| (*name).into()),
        settings,
        secrets: row.try_get::<_, Option<_>>(6)?.unwrap_or_default(),
        max_attempts: row.try_get(7)?,
    })
}

fn text(row: &Row, column: usize) -> Result<Option<String>> {
    row.try_get::<_, Option<Bytes<'_>>>(column)?.map(Bytes::text).transpose()
}

fn names(row: &Row, column: usize) -> Result<Vec<String>> {
    let names: Option<Vec<Bytes<'_>>> = row.try_get(column)?;
    names.unwrap_or_default().into_iter().map(Bytes::text).collect()
}

/// The text of a value, unparsed and not yet taken for UTF-8.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn text(self) -> Result<String> {
        let text = std::str::from_utf8(self.0);
        text.map(str::to_owned).map_err(|error| crate::error::Error::Server(error.to_string()))
    }
}

impl<'a> FromSql<'a> for Bytes<'a> {
    fn from_sql(ty: &Type, raw: &'a [u8]) -> std::result::Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        match raw {
            [1, text @ ..] if *ty == Type::JSONB => Ok(Bytes(text)),
            _ if *ty == Type::JSONB => Err("unknown version of jsonb".into()),
            text => Ok(Bytes(text)),
        }
    }

    fn accepts(ty: &Type) -> bool {
        matches!(*ty, Type::TEXT | Type::VARCHAR | Type::BYTEA | Type::JSON | Type::JSONB)
    }
}

//! How texts travel on the session that listens and claims.
//!
//! Where the database is UTF-8 they come as they are. In any other encoding the server makes no conversion on this session
//! (its client encoding is SQL_ASCII), because it would convert notifications too, and one that it can't convert is an
//! error that ends the session. There each text is converted by name, to and from UTF-8, and a text that can't be is an
//! error of its event alone.

/// The columns of `outbox.claimed_event`, in the order in which `rows` reads them.
const COLUMNS: [(&str, Kind); 13] = [
    ("id", Kind::Other),
    ("event_id", Kind::Other),
    ("event_type", Kind::Text),
    ("event_version", Kind::Text),
    ("aggregate_type", Kind::Text),
    ("aggregate_id", Kind::Text),
    ("tenant_id", Kind::Text),
    ("event_data", Kind::Json),
    ("metadata", Kind::Json),
    ("created_at", Kind::Other),
    ("retry_count", Kind::Other),
    ("destinations", Kind::Names),
    ("claim_token", Kind::Other),
];

/// Names of destinations and of brokers are ASCII, which is the same in every encoding.
const CLAIM_ARGUMENTS: &str = "$1::int, $2::float8 * interval '1 second', passed => $3::text[], patterns => $4::text[], \
     brokers => $5::text[], only_names => $6::text[]";

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Json,
    Names,
    Other,
}

#[derive(Clone, Copy)]
pub struct Dialect {
    pub utf8: bool,
}

impl Dialect {
    pub fn attach(self) -> String {
        format!("SELECT outbox.attach({})", self.given_text("$1"))
    }

    pub fn claim(self) -> String {
        format!("SELECT {} FROM outbox.claim_for({CLAIM_ARGUMENTS})", self.columns())
    }

    /// What the claim would hand out, without what it says: whatever an event holds, this can be read.
    pub fn claim_refs(self) -> String {
        let names = self.column("destinations", Kind::Names);
        format!("SELECT id, event_id, retry_count, {names}, claim_token FROM outbox.claim_refs_for({CLAIM_ARGUMENTS})")
    }

    /// One event of an open claim.
    pub fn claimed(self) -> String {
        format!("SELECT {} FROM outbox.claimed($1, $2) WHERE id IS NOT NULL", self.columns())
    }

    pub fn attempts(self) -> String {
        let destination = self.column("destination", Kind::Text);
        format!("SELECT id, {destination}, attempts FROM outbox.claimed_attempts($1)")
    }

    fn columns(self) -> String {
        let columns: Vec<String> = COLUMNS.iter().map(|(name, kind)| self.column(name, *kind)).collect();
        columns.join(", ")
    }

    fn column(self, name: &str, kind: Kind) -> String {
        match kind {
            _ if self.utf8 => name.to_owned(),
            Kind::Other => name.to_owned(),
            Kind::Text => format!("convert_to({name}, 'UTF8')"),
            Kind::Json => format!("convert_to({name}::text, 'UTF8')"),
            Kind::Names => format!(
                "ARRAY(SELECT convert_to(u.name, 'UTF8') FROM unnest({name}) WITH ORDINALITY AS u (name, n) ORDER BY u.n)"
            ),
        }
    }

    fn given_text(self, parameter: &str) -> String {
        match self.utf8 {
            true => format!("{parameter}::text"),
            false => format!("convert_from({parameter}::bytea, 'UTF8')"),
        }
    }
}

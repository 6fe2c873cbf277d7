//! The trace context of a statement: the transaction's setting `outbox.traceparent`, else the sqlcommenter comment of what
//! the client sent. Texts of any size and any bytes: a bounded part of them is looked at, and nothing here fails.
//!
//! Sources: W3C Trace Context, section 3.2; <https://google.github.io/sqlcommenter/spec>.

use crate::backend::{ClientStatement, Local};
use crate::guc;

/// `VERSION-TRACE-PARENT-FLAGS`, all in lower-case hexadecimal digits.
pub type Traceparent = [u8; 55];

/// Bytes of a statement's end, and of its beginning, in which a comment is looked for.
const MOST: usize = 4096;

/// A statement of the client, and what was found in it: each of its rows asks.
struct Seen {
    statement: (usize, i64),
    found: Option<Traceparent>,
}

static SEEN: Local<Seen> = Local::new(Seen { statement: (0, 0), found: None });

/// The context of the running statement.
pub fn of_statement() -> Option<Traceparent> {
    guc::traceparent().and_then(|text| parse(text.to_bytes())).or_else(of_comment)
}

fn of_comment() -> Option<Traceparent> {
    let running = ClientStatement::running()?;
    let statement = running.identity();
    SEEN.with(|seen| {
        if seen.statement != statement {
            *seen = Seen { statement, found: in_comment(running.text()) };
        }
        seen.found
    })
}

/// None of what is not well-formed, or names no trace or no parent.
fn parse(text: &[u8]) -> Option<Traceparent> {
    let text = Traceparent::try_from(text).ok()?;
    let hex = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let well_formed = text.iter().enumerate().all(|(at, byte)| match at {
        2 | 35 | 52 => *byte == b'-',
        _ => hex(byte),
    });
    let says_something = |part: &[u8]| part.iter().any(|byte| *byte != b'0');
    let valid = well_formed && &text[..2] != b"ff" && says_something(&text[3..35]) && says_something(&text[36..52]);
    valid.then_some(text)
}

/// A comment ends the statement, as sqlcommenter writes it, or begins it, as some libraries do.
fn in_comment(statement: &[u8]) -> Option<Traceparent> {
    at_end(statement).and_then(member).or_else(|| at_start(statement).and_then(member))
}

fn at_end(statement: &[u8]) -> Option<&[u8]> {
    let end = statement[statement.len().saturating_sub(MOST)..].trim_ascii_end();
    let end = end.strip_suffix(b";").unwrap_or(end).trim_ascii_end().strip_suffix(b"*/")?;
    let begin = end.windows(2).rposition(|two| two == b"/*")?;
    // A comment within a comment, or one that had ended before.
    let inner = &end[begin + 2..];
    (!inner.windows(2).any(|two| two == b"*/")).then_some(inner)
}

fn at_start(statement: &[u8]) -> Option<&[u8]> {
    let start = statement[..statement.len().min(MOST)].trim_ascii_start().strip_prefix(b"/*")?;
    let end = start.windows(2).position(|two| two == b"*/")?;
    let inner = &start[..end];
    (!inner.windows(2).any(|two| two == b"/*")).then_some(inner)
}

/// `key='value',…`: commas within values are escaped.
fn member(comment: &[u8]) -> Option<Traceparent> {
    comment.split(|byte| *byte == b',').find_map(|pair| {
        let value = pair.trim_ascii().strip_prefix(b"traceparent='")?.strip_suffix(b"'")?;
        parse(value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn found(statement: &str) -> bool {
        in_comment(statement.as_bytes()).is_some_and(|found| found == *GOOD.as_bytes())
    }

    #[test]
    fn only_what_the_standard_allows_is_a_context() {
        assert!(parse(GOOD.as_bytes()).is_some());
        assert!(parse(GOOD.replacen("00", "cc", 1).as_bytes()).is_some(), "a later version");
        for wrong in [
            "",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0g",
            "00_4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-extra",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1",
        ] {
            assert!(parse(wrong.as_bytes()).is_none(), "{wrong}");
        }
    }

    #[test]
    fn a_comment_is_found_at_the_end_or_at_the_beginning() {
        for statement in [
            format!("INSERT INTO x VALUES (1) /*traceparent='{GOOD}'*/"),
            format!("INSERT INTO x VALUES (1) /* db_driver='a%2Cb', traceparent='{GOOD}' ,tracestate='x' */ ; \n"),
            format!("/*traceparent='{GOOD}'*/ INSERT INTO x VALUES (1)"),
            format!("\n/*a='b',traceparent='{GOOD}'*/ INSERT INTO x VALUES (1) /* plain */"),
            format!("{} /*traceparent='{GOOD}'*/", "x".repeat(1_000_000)),
        ] {
            assert!(found(&statement), "{}", &statement[statement.len().saturating_sub(200)..]);
        }
    }

    #[test]
    fn texts_that_only_look_like_one_are_none() {
        let long = "x".repeat(MOST);
        for statement in [
            String::new(),
            "*/".into(),
            "/*".into(),
            "/*/".into(),
            "/**/".into(),
            GOOD.into(),
            format!("INSERT INTO x VALUES ('/*traceparent=''{GOOD}''*/')"),
            format!("INSERT INTO x VALUES ('traceparent=''{GOOD}''') /* nothing */"),
            format!("INSERT /*traceparent='{GOOD}'*/ INTO x VALUES (1)"),
            format!("INSERT INTO x VALUES (1) /*traceparent='{GOOD}*/"),
            format!("INSERT INTO x VALUES (1) /*traceparent={GOOD}*/"),
            format!("INSERT INTO x VALUES (1) /*not_traceparent='{GOOD}'*/"),
            format!("INSERT INTO x VALUES (1) /*traceparent='{GOOD}'"),
            format!("INSERT INTO x VALUES (1) /*/*traceparent='{GOOD}'*/ */"),
            format!("INSERT INTO x VALUES (1) /*traceparent='{GOOD}',a='{long}'*/"),
        ] {
            assert!(!found(&statement), "{}", &statement[..statement.len().min(200)]);
        }
        assert!(in_comment(b"\xff\xfe /*\xff traceparent='\xff'*/").is_none());
    }
}

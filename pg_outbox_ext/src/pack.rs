//! Many events in one payload, none longer than PostgreSQL allows. Bytes, not characters, in the database's encoding.

/// Longest payload of a notification: NOTIFY_PAYLOAD_MAX_LENGTH of PostgreSQL's async.c, less its end.
pub const MAX_BYTES: usize = 7999;

/// More than this many payloads at once say no more than "many".
pub const MAX_PAYLOADS: usize = 64;

const OPEN: &[u8] = b"{\"v\":1,\"events\":[";
const CLOSE: &[u8] = b"]}";

/// One event's descriptions, from what is wanted to what always fits.
#[derive(Debug, Clone)]
pub struct Described {
    pub body: Option<Vec<u8>>,
    pub cut: Option<Vec<u8>>,
    pub short: Vec<u8>,
}

impl Described {
    /// The longest description that fits a payload of its own.
    fn fitting(&self) -> &[u8] {
        let fits = |text: &&[u8]| OPEN.len() + text.len() + CLOSE.len() <= MAX_BYTES;
        [self.body.as_deref(), self.cut.as_deref()].into_iter().flatten().find(fits).unwrap_or(&self.short)
    }
}

/// A payload that names no event.
pub fn wake_up(reason: &str) -> Vec<u8> {
    format!("{{\"v\":1,\"events\":[],\"reason\":\"{reason}\"}}").into_bytes()
}

/// Payloads for events, in their order; one that says "overflow" when there would be too many. Holds no more than those.
#[derive(Default)]
pub struct Packer {
    payloads: Vec<Vec<u8>>,
}

impl Packer {
    pub fn add(&mut self, event: &Described) {
        if self.is_full() {
            return;
        }
        let text = event.fitting();
        match self.payloads.last_mut() {
            Some(last) if last.len() + 1 + text.len() + CLOSE.len() <= MAX_BYTES => {
                last.push(b',');
                last.extend_from_slice(text);
            }
            _ => self.payloads.push([OPEN, text].concat()),
        }
    }

    /// More events change nothing any more.
    pub fn is_full(&self) -> bool {
        self.payloads.len() > MAX_PAYLOADS
    }

    pub fn finish(mut self) -> Vec<Vec<u8>> {
        if self.is_full() {
            return vec![wake_up("overflow")];
        }
        self.payloads.iter_mut().for_each(|payload| payload.extend_from_slice(CLOSE));
        self.payloads
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pack(events: &[Described]) -> Vec<Vec<u8>> {
        let mut packer = Packer::default();
        events.iter().for_each(|event| packer.add(event));
        packer.finish()
    }

    fn event(bytes: usize) -> Described {
        Described { body: Some(vec![b'x'; bytes]), cut: Some(vec![b'c'; 100]), short: vec![b's'; 50] }
    }

    const ROOM: usize = MAX_BYTES - OPEN.len() - CLOSE.len();

    #[test]
    fn an_event_may_fill_a_payload_to_the_byte() {
        let payloads = pack(&[event(ROOM)]);
        assert_eq!(payloads.len(), 1);
        assert_eq!(payloads[0].len(), MAX_BYTES);
    }

    #[test]
    fn one_byte_more_and_it_is_cut() {
        let payloads = pack(&[event(ROOM + 1)]);
        assert_eq!(payloads[0], [OPEN, &[b'c'; 100], CLOSE].concat());
    }

    #[test]
    fn without_a_cut_that_fits_only_the_identity_is_sent() {
        let large = Described { cut: Some(vec![b'c'; 9000]), ..event(9000) };
        assert_eq!(pack(&[large])[0], [OPEN, &[b's'; 50], CLOSE].concat());
    }

    #[test]
    fn two_events_share_a_payload_that_they_fill_to_the_byte() {
        let payloads = pack(&[event(3000), event(ROOM - 3001)]);
        assert_eq!(payloads.iter().map(Vec::len).collect::<Vec<_>>(), [MAX_BYTES]);
        assert_eq!(pack(&[event(3000), event(ROOM - 3000)]).len(), 2);
    }

    #[test]
    fn multi_byte_text_counts_its_bytes() {
        let text = "ä€😀".repeat(ROOM / 9 + 1);
        let wide = Described { body: Some(text.clone().into_bytes()), ..event(0) };
        assert!(text.chars().count() < ROOM && text.len() > ROOM);
        assert_eq!(pack(&[wide])[0], [OPEN, &[b'c'; 100], CLOSE].concat());
    }

    #[test]
    fn too_many_payloads_become_one_wake_up() {
        let many = vec![event(7000); MAX_PAYLOADS + 1];
        assert_eq!(pack(&many), [wake_up("overflow")]);
        assert_eq!(pack(&many[1..]).len(), MAX_PAYLOADS);
    }

    /// An event as JSON, with a text of any length in it, and its shorter forms. The texts of other encodings than UTF-8 are
    /// bytes like any others here.
    fn any_event() -> impl Strategy<Value = Described> {
        let text = (".{0,40}", 0usize..4100, any::<bool>(), any::<bool>());
        text.prop_map(|(text, more, body, cut)| {
            let json = |kind: &str, more: usize| {
                let value = serde_json::json!({"kind": kind, "text": text, "more": "ä".repeat(more)});
                value.to_string().into_bytes()
            };
            Described {
                body: body.then(|| json("body", more)),
                cut: cut.then(|| json("cut", more / 2)),
                short: json("short", 0),
            }
        })
    }

    proptest! {
        #[test]
        fn payloads_of_any_events_fit_and_hold_them_in_order(events in proptest::collection::vec(any_event(), 0..120)) {
            let payloads = pack(&events);
            let mut found = Vec::new();
            for payload in &payloads {
                prop_assert!(payload.len() <= MAX_BYTES, "{} bytes", payload.len());
                let value: serde_json::Value = serde_json::from_slice(payload).expect("JSON");
                found.extend(value["events"].as_array().expect("a list").clone());
                if value["reason"] == "overflow" {
                    prop_assert!(payloads.len() == 1 && found.is_empty());
                    prop_assert!(events.iter().map(|e| e.fitting().len()).sum::<usize>() > MAX_BYTES * MAX_PAYLOADS / 2);
                    return Ok(());
                }
            }
            let expected: Vec<serde_json::Value> =
                events.iter().map(|e| serde_json::from_slice(e.fitting()).expect("JSON")).collect();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn payloads_of_any_bytes_fit(lengths in proptest::collection::vec((0usize..9000, 0usize..9000), 0..200)) {
            let bytes = |(body, cut)| Described { body: Some(vec![0xe4; body]), cut: Some(vec![0x81; cut]), short: vec![0xff; 90] };
            let payloads = pack(&lengths.into_iter().map(bytes).collect::<Vec<_>>());
            prop_assert!(payloads.len() <= MAX_PAYLOADS && payloads.iter().all(|payload| payload.len() <= MAX_BYTES));
        }
    }
}

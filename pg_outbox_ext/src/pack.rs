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
}

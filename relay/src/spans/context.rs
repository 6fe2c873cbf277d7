//! The trace context of an event. Source: W3C Trace Context, section 3.2.

pub struct Parent {
    pub trace_id: [u8; 16],
    pub span_id: [u8; 8],
    pub sampled: bool,
}

impl Parent {
    /// None of what is not well-formed, or names no trace or no span.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let mut part = |len: usize| parts.next().filter(|part| part.len() == len && part.bytes().all(is_hex));
        let (version, trace, span, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
        if version == "ff" || (version == "00" && parts.next().is_some()) {
            return None;
        }
        let (mut trace_id, mut span_id) = ([0; 16], [0; 8]);
        read(trace, &mut trace_id)?;
        read(span, &mut span_id)?;
        let sampled = u8::from_str_radix(flags, 16).ok()? & 1 == 1;
        (trace_id != [0; 16] && span_id != [0; 8]).then_some(Parent { trace_id, span_id, sampled })
    }
}

fn is_hex(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

fn read(text: &str, bytes: &mut [u8]) -> Option<()> {
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(at * 2..at * 2 + 2)?, 16).ok()?;
    }
    Some(())
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_standard_allows_is_a_parent() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let parent = Parent::parse(good).expect("a parent");
        assert_eq!((hex(&parent.trace_id), hex(&parent.span_id)), (good[3..35].into(), good[36..52].into()));
        assert!(parent.sampled && Parent::parse(&good.replace("-01", "-00")).is_some_and(|parent| !parent.sampled));
        assert!(Parent::parse(&format!("01{}-more", &good[2..])).is_some(), "a later version");
        for wrong in [
            "",
            "00-é",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
        ] {
            assert!(Parent::parse(wrong).is_none(), "{wrong}");
        }
    }
}

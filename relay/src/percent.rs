//! Percent-encoding in URLs that hold a login (RFC 3986, section 2.1), read strictly: a slip is an error and no guess.

/// `None`: a `%` is not followed by two hexadecimal digits, or what comes out is not UTF-8 or holds a NUL.
pub fn decode(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut out = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        out.push(u8::try_from(digit()? * 16 + digit()?).ok()?);
    }
    String::from_utf8(out).ok().filter(|text| !text.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_no_text() {
        assert_eq!(decode("a%40%2f%C3%A9+").as_deref(), Some("a@/é+"));
        for text in ["%", "%4", "%zz", "%+1", "%00", "%ff"] {
            assert_eq!(decode(text), None, "{text}");
        }
    }
}

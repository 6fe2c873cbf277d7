//! A stream from the server on which every text that nobody asked for can be read. A notification's payload, a notice and
//! an error's message come in the server's own encoding where no conversion is made, or before one is agreed on. The
//! client library takes them for UTF-8 and gives the connection up where they are not: anybody could end a session with
//! `NOTIFY outbox_events, E'\x80'`. Bytes that are no UTF-8 become question marks here; rows are left as they are.
//!
//! It looks at the messages of the protocol, so it lies below TLS's encryption: [`ReadableTls`] puts it there.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};

/// Type and length.
const HEADER: usize = 5;

pub struct Readable<S> {
    inner: S,
    messages: Messages,
}

impl<S> Readable<S> {
    /// `asks_for_tls`: the first byte is the answer to that question, and no message.
    pub fn new(inner: S, asks_for_tls: bool) -> Self {
        Readable { inner, messages: Messages { plain: usize::from(asks_for_tls), ..Messages::default() } }
    }
}

/// Where in the stream of messages the next byte is.
#[derive(Default)]
struct Messages {
    header: Vec<u8>,
    /// Bytes to leave as they are before the next header or text.
    plain: usize,
    /// Bytes of text that follow.
    text: usize,
}

impl Messages {
    fn pass(&mut self, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            let taken = if self.plain > 0 {
                let taken = self.plain.min(bytes.len());
                self.plain -= taken;
                taken
            } else if self.text > 0 {
                let taken = self.text.min(bytes.len());
                make_utf8(&mut bytes[..taken]);
                self.text -= taken;
                taken
            } else {
                let taken = (HEADER - self.header.len()).min(bytes.len());
                self.header.extend_from_slice(&bytes[..taken]);
                self.begin();
                taken
            };
            bytes = &mut bytes[taken..];
        }
    }

    fn begin(&mut self) {
        let &[tag, a, b, c, d] = &self.header[..] else { return };
        self.header.clear();
        // The length counts itself.
        let body = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX).saturating_sub(4);
        let binary = match tag {
            // Before a notification's texts comes the number of the process that sent it.
            b'A' => body.min(4),
            b'E' | b'N' | b'S' => 0,
            _ => body,
        };
        (self.plain, self.text) = (binary, body - binary);
    }
}

/// A character that is cut by the end of the bytes counts as none: what follows may never be read together with it.
fn make_utf8(mut bytes: &mut [u8]) {
    while let Err(error) = std::str::from_utf8(bytes) {
        let at = error.valid_up_to();
        bytes[at] = b'?';
        bytes = &mut bytes[at + 1..];
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Readable<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        self.messages.pass(&mut buf.filled_mut()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Readable<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl<S: TlsStream + Unpin> TlsStream for Readable<S> {
    fn channel_binding(&self) -> ChannelBinding {
        self.inner.channel_binding()
    }
}

/// TLS whose decrypted stream is readable; the encrypted one is passed through.
pub struct ReadableTls<T>(pub T);

impl<S, T> TlsConnect<Readable<S>> for ReadableTls<T>
where
    T: TlsConnect<S>,
    T::Stream: 'static,
    T::Error: 'static,
    T::Future: Send + 'static,
{
    type Stream = Readable<T::Stream>;
    type Error = T::Error;
    type Future = BoxFuture<'static, Result<Self::Stream, T::Error>>;

    fn connect(self, stream: Readable<S>) -> Self::Future {
        let connecting = self.0.connect(stream.inner);
        Box::pin(async move { Ok(Readable::new(connecting.await?, false)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
        [&[tag][..], &length, body].concat()
    }

    /// The stream, read in pieces of some size.
    fn read(stream: &[u8], piece: usize, asks_for_tls: bool) -> Vec<u8> {
        let mut messages = Readable::new((), asks_for_tls).messages;
        let mut stream = stream.to_vec();
        stream.chunks_mut(piece).for_each(|piece| messages.pass(piece));
        stream
    }

    #[test]
    fn texts_become_utf8_and_nothing_else_changes() {
        let pid = [0, 0, 0xff, 0xfe];
        let row = message(b'D', &[0xff, 0x80, 0, 1]);
        let sent = [
            row.clone(),
            message(b'A', &[&pid[..], b"channel\0a\x80b\xc3\xa9\0"].concat()),
            message(b'C', b"SELECT 1\0"),
            message(b'N', b"M\xfcber\0\0"),
            row.clone(),
        ]
        .concat();
        let expected = [
            row.clone(),
            message(b'A', &[&pid[..], "channel\0a?bé\0".as_bytes()].concat()),
            message(b'C', b"SELECT 1\0"),
            message(b'N', b"M?ber\0\0"),
            row,
        ]
        .concat();
        assert_eq!(read(&sent, sent.len(), false), expected);
        // In pieces a character may be lost where it is cut; the rest is the same, and all texts are readable.
        for piece in 1..20 {
            let read = read(&sent, piece, false);
            assert!(read.iter().zip(&expected).all(|(is, of)| is == of || *is == b'?'), "{piece}");
            assert_eq!(read[..13], expected[..13]);
        }
    }

    #[test]
    fn the_answer_to_the_question_for_tls_is_no_message() {
        let sent = [b"N".to_vec(), message(b'E', b"\x80\0")].concat();
        assert_eq!(read(&sent, 3, true), [b"N".to_vec(), message(b'E', b"?\0")].concat());
    }
}

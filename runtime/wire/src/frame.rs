//! Length-prefixed frames over any byte stream.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest frame: the largest volume or picture with room to spare.
pub const MAX_FRAME_BYTES: usize = 64 << 20;

/// Why a frame cannot be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The other side closed the stream between two frames.
    #[error("the other side closed the connection")]
    Closed,
    /// The stream failed, or ended within a frame.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// A length beyond the limit.
    #[error("a frame of {found} bytes, expected at most {MAX_FRAME_BYTES}")]
    TooLong {
        /// Length claimed or produced.
        found: usize,
    },
    /// Bytes that are no message of this type.
    #[error(
        "a frame of {len} bytes is not the expected message: are both processes of one version?"
    )]
    Decode {
        /// Length of the frame.
        len: usize,
        /// The decoder's reason.
        source: postcard::Error,
    },
    /// A length of values that holds a part of one.
    #[error("a frame of {len} bytes, expected values of 4 bytes each")]
    Values {
        /// Length of the frame.
        len: usize,
    },
    /// A message that cannot be encoded.
    #[error("a message cannot be encoded")]
    Encode(#[source] postcard::Error),
}

impl FrameError {
    /// The stream ended within a message.
    pub(crate) fn cut() -> FrameError {
        FrameError::Io(io::ErrorKind::UnexpectedEof.into())
    }
}

/// Sends one message.
///
/// # Errors
/// [`FrameError`] where it is too long or the stream fails.
pub fn write<T: Serialize>(stream: &mut impl Write, message: &T) -> Result<(), FrameError> {
    let bytes = postcard::to_stdvec(message).map_err(FrameError::Encode)?;
    write_bytes(stream, &bytes)
}

/// Sends bytes as one frame.
///
/// # Errors
/// [`FrameError`] where they are too many or the stream fails.
pub fn write_bytes(stream: &mut impl Write, bytes: &[u8]) -> Result<(), FrameError> {
    write_len(stream, bytes.len())?;
    stream.write_all(bytes).map_err(FrameError::Io)?;
    stream.flush().map_err(FrameError::Io)
}

/// Begins a frame of so many bytes.
pub(crate) fn write_len(stream: &mut impl Write, found: usize) -> Result<(), FrameError> {
    let len = u32::try_from(found)
        .ok()
        .filter(|_| found <= MAX_FRAME_BYTES)
        .ok_or(FrameError::TooLong { found })?;
    stream.write_all(&len.to_le_bytes()).map_err(FrameError::Io)
}

/// Receives one message.
///
/// # Errors
/// [`FrameError::Closed`] at the end of the stream, others where the frame is not this message.
pub fn read<T: DeserializeOwned>(stream: &mut impl Read) -> Result<T, FrameError> {
    let bytes = read_bytes(stream)?;
    postcard::from_bytes(&bytes).map_err(|source| FrameError::Decode {
        len: bytes.len(),
        source,
    })
}

/// Receives the bytes of one frame.
///
/// # Errors
/// As [`read`].
pub fn read_bytes(stream: &mut impl Read) -> Result<Vec<u8>, FrameError> {
    let len = read_len(stream)?;
    // `take` and `read_to_end` grow with what arrives: a claimed length alone allocates nothing.
    let mut bytes = Vec::new();
    let received = stream
        .take(len as u64)
        .read_to_end(&mut bytes)
        .map_err(FrameError::Io)?;
    if received < len {
        return Err(FrameError::cut());
    }
    Ok(bytes)
}

/// The length that a frame begins with, which is at most [`MAX_FRAME_BYTES`].
pub(crate) fn read_len(stream: &mut impl Read) -> Result<usize, FrameError> {
    let mut head = [0_u8; 4];
    let mut filled = 0;
    while filled < head.len() {
        match stream.read(&mut head[filled..]) {
            Ok(0) if filled == 0 => return Err(FrameError::Closed),
            Ok(0) => return Err(FrameError::cut()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(FrameError::Io(error)),
        }
    }
    let len = usize::try_from(u32::from_le_bytes(head)).unwrap_or(usize::MAX);
    if len > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong { found: len });
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FromAcquire, ParseReply};
    use proptest::prelude::*;
    use std::io::Cursor;

    #[test]
    fn messages_come_back_in_order_and_then_the_end() {
        let mut stream = Vec::new();
        let fault = |text: &str| FromAcquire::Fault { text: text.into() };
        write(&mut stream, &fault("one")).unwrap();
        write(&mut stream, &fault("two")).unwrap();
        let mut stream = Cursor::new(stream);
        assert_eq!(read::<FromAcquire>(&mut stream).unwrap(), fault("one"));
        assert_eq!(read::<FromAcquire>(&mut stream).unwrap(), fault("two"));
        assert!(matches!(
            read::<FromAcquire>(&mut stream),
            Err(FrameError::Closed)
        ));
    }

    #[test]
    fn a_claimed_length_beyond_the_limit_is_refused_before_reading() {
        let mut stream = Cursor::new(u32::MAX.to_le_bytes());
        assert!(matches!(
            read_bytes(&mut stream),
            Err(FrameError::TooLong { .. })
        ));
    }

    #[test]
    fn a_stream_that_ends_within_a_frame_is_an_error() {
        let mut stream = Vec::new();
        write_bytes(&mut stream, b"whole").unwrap();
        stream.pop();
        assert!(matches!(
            read_bytes(&mut Cursor::new(stream)),
            Err(FrameError::Io(_))
        ));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_crash(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let mut stream = Cursor::new(bytes);
            while read::<ParseReply>(&mut stream).is_ok() {}
        }
    }
}

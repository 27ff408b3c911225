//! What the processes of Afterimage say to each other: message types and framing.
//!
//! ```text
//! acquire ──stdin/stdout──► parse       file bytes out, ParseReply back
//! acquire ──acquire.sock──► decode, show    FromAcquire
//! decode  ──decode.sock───► show            FromDecode
//! ```
//!
//! Who owns a socket sends; who connects listens, after one [`Hello`]. On every connection the
//! owner first says again all that the newcomer needs, so that a restarted process misses nothing.
//!
//! A frame is its length (`u32`, little-endian) and a postcard encoding; the values of the parser's
//! images are frames of plain bytes. No length is believed
//! beyond [`MAX_FRAME_BYTES`], and memory grows with bytes received, not with lengths claimed.

mod frame;
mod message;
mod reply;

pub use frame::{FrameError, MAX_FRAME_BYTES, read, read_bytes, write, write_bytes};
pub use message::{
    CaptionMessage, FromAcquire, FromDecode, Hello, ImageMessage, PROTOCOL, ParseReply,
    PictureKind, PictureMessage, RoleName, SessionMessage, SliceMessage, Tier, TrialMessage,
    VolumeMessage, VolumeQuality,
};
pub use reply::{read_reply, write_reply};

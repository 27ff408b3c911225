//! The parser's answers: an image's values follow the rest as a frame of their own, as plain bytes.
//!
//! A volume is half a million numbers; one by one through the encoding they take longer than the rest
//! of the way. In pieces, the one side writes while the other already reads.

use std::io::{Read, Write};
use std::mem;

use crate::frame::{FrameError, read, read_len, write, write_len};
use crate::message::{ImageMessage, ParseReply, SliceMessage, VolumeMessage};

/// Bytes of one value.
const VALUE: usize = size_of::<f32>();
/// Bytes that are written and read at once.
const PIECE: usize = 64 << 10;

/// Sends the parser's answer; [`read_reply`] receives it.
///
/// # Errors
/// [`FrameError`] where it is too long or the stream fails.
pub fn write_reply(stream: &mut impl Write, mut reply: ParseReply) -> Result<(), FrameError> {
    let values = values_of(&mut reply).map(mem::take);
    write(stream, &reply)?;
    match values {
        Some(values) => write_values(stream, &values),
        None => Ok(()),
    }
}

/// Receives the parser's answer.
///
/// # Errors
/// [`FrameError::Closed`] at the end of the stream, others where the frames are no such answer.
pub fn read_reply(stream: &mut impl Read) -> Result<ParseReply, FrameError> {
    let mut reply = read(stream)?;
    if let Some(values) = values_of(&mut reply) {
        *values = read_values(stream)?;
    }
    Ok(reply)
}

/// What travels by itself.
fn values_of(reply: &mut ParseReply) -> Option<&mut Vec<f32>> {
    match reply {
        ParseReply::Volume(VolumeMessage { voxels, .. })
        | ParseReply::Image(ImageMessage {
            volume: Some(VolumeMessage { voxels, .. }),
            ..
        }) => Some(voxels),
        ParseReply::Slice(SliceMessage { pixels, .. }) => Some(pixels),
        ParseReply::Image(ImageMessage { volume: None, .. }) | ParseReply::Refused { .. } => None,
    }
}

fn write_values(stream: &mut impl Write, values: &[f32]) -> Result<(), FrameError> {
    write_len(stream, values.len().saturating_mul(VALUE))?;
    let mut piece = vec![0_u8; PIECE.min(values.len() * VALUE)];
    for values in values.chunks(PIECE / VALUE) {
        let bytes = &mut piece[..values.len() * VALUE];
        for (bytes, value) in bytes.as_chunks_mut::<VALUE>().0.iter_mut().zip(values) {
            *bytes = value.to_le_bytes();
        }
        stream.write_all(bytes).map_err(FrameError::Io)?;
    }
    stream.flush().map_err(FrameError::Io)
}

fn read_values(stream: &mut impl Read) -> Result<Vec<f32>, FrameError> {
    let len = match read_len(stream) {
        // Between these two frames nobody may leave.
        Err(FrameError::Closed) => return Err(FrameError::cut()),
        len => len?,
    };
    if !len.is_multiple_of(VALUE) {
        return Err(FrameError::Values { len });
    }
    // Grows with what arrives: a claimed length alone allocates one piece.
    let mut values = Vec::new();
    let mut piece = vec![0_u8; PIECE.min(len)];
    let mut left = len;
    while left > 0 {
        let bytes = &mut piece[..PIECE.min(left)];
        stream.read_exact(bytes).map_err(FrameError::Io)?;
        let (quads, _) = bytes.as_chunks::<VALUE>();
        values.extend(quads.iter().map(|quad| f32::from_le_bytes(*quad)));
        left -= bytes.len();
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;
    use crate::{MAX_FRAME_BYTES, read_bytes};

    fn volume(voxels: Vec<f32>) -> VolumeMessage {
        VolumeMessage {
            shape: [1, 1, u32::try_from(voxels.len()).unwrap()],
            voxels,
            affine_lps: [[1.5; 4]; 4],
            series: [7; 16],
            patient: 3,
            number: 12,
            tr_ms: 1500.0,
            time_ms: Some(4.5),
            slice_times_ms: Some(vec![0.0, 10.0]),
        }
    }

    fn slice(pixels: Vec<f32>) -> SliceMessage {
        SliceMessage {
            shape: [1, u32::try_from(pixels.len()).unwrap()],
            pixels,
            position_lps: [1.0, 2.0, 3.0],
            columns_lps: [1.0, 0.0, 0.0],
            rows_lps: [0.0, 1.0, 0.0],
            pixel_mm: [3.0, 3.0],
            spacing_mm: None,
            series: [7; 16],
            patient: 3,
            number: 2,
            slices: None,
            instance: Some(5),
            tr_ms: 1500.0,
            time_ms: None,
            taken_ms: None,
            rank: None,
            order: None,
        }
    }

    fn image(volume: Option<VolumeMessage>) -> ImageMessage {
        ImageMessage {
            volumes: 2,
            start: 352,
            volume_bytes: 64,
            volume,
        }
    }

    fn replies(values: &[f32]) -> [ParseReply; 5] {
        [
            ParseReply::Volume(volume(values.to_vec())),
            ParseReply::Slice(slice(values.to_vec())),
            ParseReply::Image(image(Some(volume(values.to_vec())))),
            ParseReply::Image(image(None)),
            ParseReply::Refused {
                reason: "no DICOM".into(),
            },
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn answers_come_back_to_the_bit_one_after_the_other(
            bits in prop::collection::vec(any::<u32>(), 0..40),
            repeats in prop::sample::select(vec![1_usize, 500, 1639]),
        ) {
            // Any bits, no number and infinity among them, within a piece and beyond.
            let values: Vec<f32> = bits
                .iter()
                .cycle()
                .take(bits.len() * repeats)
                .map(|bits| f32::from_bits(*bits))
                .collect();
            let mut stream = Vec::new();
            for reply in replies(&values) {
                write_reply(&mut stream, reply).unwrap();
            }
            let mut stream = Cursor::new(stream);
            for mut sent in replies(&values) {
                let mut found = read_reply(&mut stream).unwrap();
                let bits = |reply: &mut ParseReply| {
                    let values = values_of(reply).map(mem::take);
                    values.map(|values| values.into_iter().map(f32::to_bits).collect::<Vec<_>>())
                };
                prop_assert_eq!(bits(&mut found), bits(&mut sent));
                prop_assert_eq!(found, sent);
            }
            prop_assert!(matches!(read_reply(&mut stream), Err(FrameError::Closed)));
        }

        #[test]
        fn an_answer_that_is_cut_is_none(cut in 0_usize..1000) {
            let mut stream = Vec::new();
            write_reply(&mut stream, ParseReply::Volume(volume(vec![2.0; 200]))).unwrap();
            let cut = cut % stream.len();
            let found = read_reply(&mut Cursor::new(&stream[..cut]));
            match found {
                Err(FrameError::Closed) => prop_assert_eq!(cut, 0),
                Err(FrameError::Io(_)) => prop_assert!(cut > 0),
                other => prop_assert!(false, "{:?}", other),
            }
        }

        #[test]
        fn arbitrary_bytes_never_crash(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let mut stream = Cursor::new(bytes);
            while read_reply(&mut stream).is_ok() {}
        }
    }

    #[test]
    fn a_length_that_is_no_whole_number_of_values_or_beyond_the_limit_is_refused() {
        let mut head = Vec::new();
        write(&mut head, &ParseReply::Volume(volume(Vec::new()))).unwrap();
        assert!(read_bytes(&mut Cursor::new(&head)).is_ok());
        let with = |len: u32| {
            let mut stream = head.clone();
            stream.extend(len.to_le_bytes());
            stream.extend([0; 16]);
            read_reply(&mut Cursor::new(stream))
        };
        assert!(with(16).is_ok());
        assert!(matches!(with(15), Err(FrameError::Values { len: 15 })));
        assert!(matches!(with(20), Err(FrameError::Io(_))));
        let beyond = u32::try_from(MAX_FRAME_BYTES + 4).unwrap();
        assert!(matches!(with(beyond), Err(FrameError::TooLong { .. })));
        let too_many = ParseReply::Volume(volume(vec![0.0; MAX_FRAME_BYTES / VALUE + 1]));
        assert!(matches!(
            write_reply(&mut Vec::new(), too_many),
            Err(FrameError::TooLong { .. })
        ));
    }
}

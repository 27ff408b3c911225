//! Pixels to PNG files and back.
//!
//! Written files are 8-bit RGB with the text chunks asked for and no time stamp, so equal pictures
//! are equal bytes. Read files are untrusted: the size in the header is checked before memory is
//! taken for the pixels.

use std::io::Cursor;

use ::png::{
    BitDepth, ColorType, Compression, Decoder, DecodingError, Encoder, EncodingError,
    Transformations,
};

/// Bytes per RGB pixel.
const CHANNELS: usize = 3;

/// A colour picture, 8 bits per channel.
#[derive(Clone, PartialEq, Eq)]
pub struct Picture {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `[row, column, channel]`, row-major; red, green, blue.
    pub rgb: Vec<u8>,
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Picture({} x {})", self.width, self.height)
    }
}

/// The largest picture [`decode`] accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            width: 4096,
            height: 4096,
        }
    }
}

/// Why a picture is not written or read.
#[derive(Debug, thiserror::Error)]
pub enum PngError {
    /// A picture without pixels.
    #[error("a picture of {width} x {height} has no pixels")]
    Empty {
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// Pixels that do not fill the picture.
    #[error("{width} x {height} RGB pixels are {expected} bytes, found {found}")]
    Length {
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
        /// Bytes that width and height ask for.
        expected: u64,
        /// Bytes given.
        found: usize,
    },
    /// A text that does not fit a tEXt chunk: Latin-1, keyword of 1 to 79 bytes.
    #[error("text {keyword:?} does not fit a PNG text chunk")]
    Text {
        /// The text's keyword.
        keyword: String,
        /// The library's reason.
        source: EncodingError,
    },
    /// The encoder gave up.
    #[error("cannot write a PNG of {width} x {height}")]
    Encode {
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
        /// The library's reason.
        source: EncodingError,
    },
    /// The bytes are not a whole PNG.
    #[error("cannot read {found} bytes as a PNG")]
    Decode {
        /// Bytes given.
        found: usize,
        /// The library's reason.
        source: DecodingError,
    },
    /// A picture above the limits.
    #[error("the picture is {width} x {height}, expected at most {} x {}", limits.width, limits.height)]
    TooLarge {
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
        /// The largest allowed.
        limits: Limits,
    },
    /// A picture that is partly transparent, so its colours depend on what lies behind.
    #[error("the pixel at row {row}, column {column} is transparent, expected an opaque picture")]
    Transparent {
        /// Row of the first such pixel.
        row: usize,
        /// Column of the first such pixel.
        column: usize,
    },
}

/// Writes a picture as PNG; equal arguments give equal bytes.
///
/// - `rgb`: `[row, column, channel]`, row-major; red, green, blue.
/// - `text`: keyword and text of each tEXt chunk, such as `("Software", "Afterimage")`; Latin-1.
///
/// # Errors
/// [`PngError::Empty`], [`PngError::Length`] and [`PngError::Text`] for arguments that do not fit
/// together, [`PngError::Encode`] if the encoder gives up.
pub fn encode(
    width: u32,
    height: u32,
    rgb: &[u8],
    text: &[(&str, &str)],
) -> Result<Vec<u8>, PngError> {
    if width == 0 || height == 0 {
        return Err(PngError::Empty { width, height });
    }
    // Two u32 sides and three channels can pass u64 only above any slice's length.
    let expected = (u64::from(width) * u64::from(height)).saturating_mul(CHANNELS as u64);
    if u64::try_from(rgb.len()) != Ok(expected) {
        return Err(PngError::Length {
            width,
            height,
            expected,
            found: rgb.len(),
        });
    }
    let failed = |source| PngError::Encode {
        width,
        height,
        source,
    };

    let mut file = Vec::with_capacity(rgb.len() / 2);
    let mut encoder = Encoder::new(&mut file, width, height);
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    // The bedside waits for this, so speed counts more than size.
    encoder.set_compression(Compression::Fast);
    let mut writer = encoder.write_header().map_err(failed)?;
    for (keyword, text) in text {
        writer
            .write_text_chunk(&::png::text_metadata::TEXtChunk::new(*keyword, *text))
            .map_err(|source| PngError::Text {
                keyword: (*keyword).to_owned(),
                source,
            })?;
    }
    writer.write_image_data(rgb).map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(file)
}

/// Reads a PNG of any colour type as 8-bit RGB; of an animation, the still picture.
///
/// # Errors
/// [`PngError::TooLarge`] before memory is taken for the pixels, [`PngError::Transparent`] when the
/// colours depend on a background, [`PngError::Decode`] for everything else that is wrong.
pub fn decode(bytes: &[u8], limits: Limits) -> Result<Picture, PngError> {
    let failed = |source| PngError::Decode {
        found: bytes.len(),
        source,
    };
    let mut decoder = Decoder::new(Cursor::new(bytes));
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    decoder.set_transformations(Transformations::normalize_to_color8());
    let header = decoder.read_header_info().map_err(failed)?;
    let (width, height) = (header.width, header.height);
    if width > limits.width || height > limits.height {
        return Err(PngError::TooLarge {
            width,
            height,
            limits,
        });
    }

    let mut reader = decoder.read_info().map_err(failed)?;
    let mut samples = vec![
        0;
        reader.output_buffer_size().ok_or(PngError::TooLarge {
            width,
            height,
            limits,
        })?
    ];
    let (color, _) = reader.output_color_type();
    reader.next_frame(&mut samples).map_err(failed)?;
    // Past the pixels too, so that a file cut short is never passed on as whole.
    reader.finish().map_err(failed)?;

    let channels = color.samples();
    if matches!(color, ColorType::Rgba | ColorType::GrayscaleAlpha)
        && let Some(pixel) = samples
            .chunks_exact(channels)
            .position(|pixel| pixel.last() != Some(&u8::MAX))
    {
        let columns = width as usize;
        return Err(PngError::Transparent {
            row: pixel / columns,
            column: pixel % columns,
        });
    }
    let rgb = match color {
        ColorType::Rgb => samples,
        ColorType::Rgba => samples
            .chunks_exact(channels)
            .flat_map(|pixel| [pixel[0], pixel[1], pixel[2]])
            .collect(),
        ColorType::Grayscale | ColorType::GrayscaleAlpha | ColorType::Indexed => samples
            .chunks_exact(channels)
            .flat_map(|pixel| [pixel[0]; CHANNELS])
            .collect(),
    };
    Ok(Picture { width, height, rgb })
}

/// Width and height in a PNG's header, without reading its pixels.
///
/// # Errors
/// [`PngError::Decode`] if the bytes do not start with a PNG header.
pub fn size(bytes: &[u8]) -> Result<(u32, u32), PngError> {
    let mut decoder = Decoder::new(Cursor::new(bytes));
    let header = decoder
        .read_header_info()
        .map_err(|source| PngError::Decode {
            found: bytes.len(),
            source,
        })?;
    Ok((header.width, header.height))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradient(width: u32, height: u32) -> Vec<u8> {
        (0..height)
            .flat_map(|row| (0..width).map(move |column| (row, column)))
            .flat_map(|(row, column)| {
                [
                    row * 255 / height,
                    column * 255 / width,
                    (row ^ column) % 256,
                ]
                .map(|value| u8::try_from(value).unwrap())
            })
            .collect()
    }

    fn written(color: ColorType, depth: BitDepth, samples: &[u8]) -> Vec<u8> {
        let mut file = Vec::new();
        let mut encoder = Encoder::new(&mut file, 2, 1);
        encoder.set_color(color);
        encoder.set_depth(depth);
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(samples).unwrap();
        writer.finish().unwrap();
        file
    }

    #[test]
    fn pixels_survive_the_round_trip() {
        for (width, height) in [(1, 1), (1, 9), (31, 17), (257, 64)] {
            let rgb = gradient(width, height);
            let file = encode(width, height, &rgb, &[]).unwrap();
            assert_eq!(size(&file).unwrap(), (width, height));
            let picture = decode(&file, Limits::default()).unwrap();
            assert_eq!(picture, Picture { width, height, rgb });
        }
    }

    #[test]
    fn equal_pictures_are_equal_bytes() {
        let rgb = gradient(96, 64);
        let text = [("Software", "Afterimage"), ("Comment", "AI-generated")];
        assert_eq!(
            encode(96, 64, &rgb, &text).unwrap(),
            encode(96, 64, &rgb, &text).unwrap()
        );
    }

    #[test]
    fn text_chunks_are_in_the_file_in_order() {
        let text = [
            ("Software", "Afterimage 0.1.0"),
            ("Comment", "AI-generated reconstruction"),
        ];
        let file = encode(2, 2, &[7; 12], &text).unwrap();
        let reader = Decoder::new(Cursor::new(&file[..])).read_info().unwrap();
        let found: Vec<_> = reader
            .info()
            .uncompressed_latin1_text
            .iter()
            .map(|chunk| (chunk.keyword.as_str(), chunk.text.as_str()))
            .collect();
        assert_eq!(found, text);
    }

    #[test]
    fn pixels_that_do_not_fill_the_picture_are_refused() {
        assert!(matches!(
            encode(4, 4, &[0; 47], &[]),
            Err(PngError::Length {
                expected: 48,
                found: 47,
                ..
            })
        ));
        assert!(matches!(
            encode(u32::MAX, u32::MAX, &[], &[]),
            Err(PngError::Length { .. })
        ));
        assert!(matches!(
            encode(0, 4, &[], &[]),
            Err(PngError::Empty { .. })
        ));
    }

    #[test]
    fn text_outside_latin_1_is_refused_by_name() {
        let error = encode(1, 1, &[0; 3], &[("Comment", "λ")]).unwrap_err();
        assert!(matches!(&error, PngError::Text { keyword, .. } if keyword == "Comment"));
    }

    #[test]
    fn picture_above_the_limits_is_refused_from_its_header() {
        // The header of a valid file, with sides of 2^31 - 1 and the checksum made to fit.
        let mut file = encode(1, 1, &[0; 3], &[]).unwrap();
        file[16..24].copy_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff]);
        let sum = crc(&file[12..29]);
        file[29..33].copy_from_slice(&sum.to_be_bytes());
        assert!(matches!(
            decode(&file, Limits::default()),
            Err(PngError::TooLarge {
                width: 0x7fff_ffff,
                ..
            })
        ));

        let file = encode(4097, 1, &vec![0; 4097 * 3], &[]).unwrap();
        let error = decode(&file, Limits::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the picture is 4097 x 1, expected at most 4096 x 4096"
        );
    }

    #[test]
    fn truncated_file_is_refused_at_every_length() {
        let file = encode(16, 16, &gradient(16, 16), &[("Software", "x")]).unwrap();
        for len in 0..file.len() {
            assert!(
                decode(&file[..len], Limits::default()).is_err(),
                "{len} bytes"
            );
        }
    }

    #[test]
    fn flipped_byte_is_refused_or_changes_no_pixel() {
        let file = encode(16, 16, &gradient(16, 16), &[("Software", "x")]).unwrap();
        let whole = decode(&file, Limits::default()).unwrap();
        for at in 0..file.len() {
            let mut file = file.clone();
            file[at] ^= 0x20;
            if let Ok(picture) = decode(&file, Limits::default()) {
                assert_eq!(picture, whole, "byte {at}");
            }
        }
    }

    #[test]
    fn other_colour_types_become_rgb() {
        let gray = written(ColorType::Grayscale, BitDepth::Eight, &[10, 200]);
        let deep = written(ColorType::Grayscale, BitDepth::Sixteen, &[10, 0, 200, 0]);
        let opaque = written(
            ColorType::GrayscaleAlpha,
            BitDepth::Eight,
            &[10, 255, 200, 255],
        );
        for file in [gray, deep, opaque] {
            let picture = decode(&file, Limits::default()).unwrap();
            assert_eq!(picture.rgb, [10, 10, 10, 200, 200, 200]);
        }
        let rgba = [1, 2, 3, 255, 4, 5, 6, 255];
        let file = written(ColorType::Rgba, BitDepth::Eight, &rgba);
        let picture = decode(&file, Limits::default()).unwrap();
        assert_eq!(picture.rgb, [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn transparent_picture_is_refused() {
        let rgba = [1, 2, 3, 255, 4, 5, 6, 254];
        let file = written(ColorType::Rgba, BitDepth::Eight, &rgba);
        assert!(matches!(
            decode(&file, Limits::default()),
            Err(PngError::Transparent { row: 0, column: 1 })
        ));
    }

    /// CRC-32 as PNG uses it, bit by bit.
    fn crc(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(u32::MAX, |mut sum, byte| {
            sum ^= u32::from(*byte);
            for _ in 0..8 {
                sum = (sum >> 1) ^ (0xedb8_8320 * (sum & 1));
            }
            sum
        })
    }
}

//! A scanner's DICOM file to a [`Volume`]: Siemens mosaics, uncompressed little endian.
//!
//! Steps: every length is checked against the bytes present (`scan`), dicom-object parses
//! the file, other vendors' and other kinds of files are refused by name, the private
//! header (`csa`) gives the slice count, direction and times, and the tiles are stacked.
//! No message and no `Debug` here repeats a header's text.

pub(crate) mod csa;
mod scan;

use dicom_core::Tag;
use dicom_dictionary_std::tags;
use dicom_object::DefaultDicomObject;
use dicom_object::file::{OpenFileOptions, ReadPreamble};
use ndarray::Array3;

use crate::volume::{Affine, PatientTag, SeriesUid, Volume, VolumeHeader};

/// Siemens' private image header.
pub(crate) const CSA_IMAGE_HEADER: Tag = Tag(0x0029, 0x1010);
/// Siemens' private count of slices in a mosaic.
const IMAGES_IN_MOSAIC: Tag = Tag(0x0019, 0x100a);
const MR_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.4";
const ENHANCED_MR_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.4.1";
/// Far above any mosaic, far below any danger: 2048 x 2048 pixels.
const MAX_PIXELS: usize = 4 << 20;
/// How far from a right angle, and from length one, directions may be.
const DIRECTION_TOLERANCE: f64 = 1e-3;

/// Why a file is not a volume.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DicomError {
    /// The 128-byte preamble and `DICM` are not there.
    #[error("not a DICOM file: no DICM at byte 128")]
    NotDicom,
    /// A compressed, big-endian or unknown encoding.
    #[error("transfer syntax {uid} ({name}) is not supported, expected uncompressed little endian")]
    TransferSyntax {
        /// The transfer syntax's UID; digits and dots only.
        uid: String,
        /// Its name.
        name: &'static str,
    },
    /// A kind of image that this reader does not take.
    #[error("{name} is not supported, expected a Siemens mosaic")]
    Unsupported {
        /// What the file is.
        name: &'static str,
    },
    /// The file ends within an element's header.
    #[error("file ends within the element at byte {offset}")]
    Truncated {
        /// Byte offset of the element.
        offset: usize,
    },
    /// An element claims more bytes than there are.
    #[error(
        "element ({group:04x},{element:04x}) at byte {offset} claims {len} bytes, {left} are left"
    )]
    Length {
        /// The tag's group.
        group: u16,
        /// The tag's element.
        element: u16,
        /// Byte offset of the element.
        offset: usize,
        /// The claimed length.
        len: u32,
        /// What the file has left.
        left: usize,
    },
    /// The data set's order or nesting is broken.
    #[error("{what} at byte {offset}")]
    Structure {
        /// Byte offset.
        offset: usize,
        /// What stands there.
        what: &'static str,
    },
    /// The parser refused a file whose lengths all fit.
    #[error("data set cannot be parsed")]
    Parse,
    /// An element that a volume needs is absent or unreadable.
    #[error("{element} is missing or unreadable")]
    Missing {
        /// Tag and keyword.
        element: &'static str,
    },
    /// An element holds a value that no volume can have.
    #[error("{element} is {what}")]
    Value {
        /// Tag and keyword.
        element: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A number is out of range.
    #[error("{element} is {found}, expected {expected}")]
    Range {
        /// Tag and keyword.
        element: &'static str,
        /// The number found.
        found: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// Pixel data and the stated size disagree.
    #[error("pixel data holds {found} bytes, {rows} rows of {columns} columns need {expected}")]
    PixelBytes {
        /// Rows of the mosaic.
        rows: usize,
        /// Columns of the mosaic.
        columns: usize,
        /// Bytes needed.
        expected: usize,
        /// Bytes present.
        found: usize,
    },
    /// The slices do not tile the mosaic.
    #[error("{images} slices do not tile a mosaic of {rows} rows and {columns} columns")]
    Tiles {
        /// Slices stated.
        images: u32,
        /// Rows of the mosaic.
        rows: usize,
        /// Columns of the mosaic.
        columns: usize,
    },
    /// The private header is broken.
    #[error("Siemens CSA header (0029,1010): {what} at its byte {offset}")]
    Csa {
        /// Byte offset within the header.
        offset: usize,
        /// What is wrong.
        what: &'static str,
    },
}

/// Decodes one file to one volume.
///
/// # Errors
/// Whatever is not a complete, uncompressed Siemens mosaic, by name.
pub fn decode(bytes: &[u8]) -> Result<Volume, DicomError> {
    scan::check(bytes)?;
    let file = OpenFileOptions::new()
        .read_preamble(ReadPreamble::Always)
        .read_to(tags::PIXEL_DATA)
        .from_reader(bytes)
        .map_err(|_| DicomError::Parse)?;
    let header = Header { file: &file };
    header.check_kind()?;
    let csa = match header.bytes(CSA_IMAGE_HEADER) {
        Some(bytes) => csa::read(&bytes)?,
        None => csa::Csa::default(),
    };
    let mosaic = header.mosaic(&csa)?;
    let affine_lps = header.affine(&mosaic, &csa)?;
    let tr_ms = header.number(tags::REPETITION_TIME, "(0018,0080) RepetitionTime")?;
    if !(tr_ms > 0.0 && tr_ms <= 60_000.0) {
        return Err(DicomError::Range {
            element: "(0018,0080) RepetitionTime",
            found: tr_ms,
            expected: "above 0 and at most 60000 ms",
        });
    }
    let series_uid = header
        .text(tags::SERIES_INSTANCE_UID)
        .filter(|uid| !uid.is_empty() && uid.len() <= 64)
        .ok_or(DicomError::Missing {
            element: "(0020,000e) SeriesInstanceUID",
        })?;
    let acquisition = header
        .whole(tags::ACQUISITION_NUMBER)
        .filter(|number| *number > 0)
        .ok_or(DicomError::Missing {
            element: "(0020,0012) AcquisitionNumber",
        })?;
    Ok(Volume {
        voxels: header.voxels(&mosaic)?,
        affine_lps,
        header: VolumeHeader {
            series_uid: SeriesUid::new(series_uid),
            patient: header.patient(),
            acquisition,
            instance: header.whole(tags::INSTANCE_NUMBER),
            tr_ms,
            slice_times_ms: slice_times(&csa, mosaic.slices, tr_ms)?,
        },
    })
}

/// The mosaic's sizes, in pixels, proven to fit each other.
struct Mosaic {
    rows: usize,
    columns: usize,
    slices: usize,
    /// Tiles along each side.
    grid: usize,
}

struct Header<'a> {
    file: &'a DefaultDicomObject,
}

impl Header<'_> {
    fn text(&self, tag: Tag) -> Option<String> {
        let element = self.file.get(tag)?;
        let text = element.to_str().ok()?;
        Some(text.trim_matches(['\0', ' ']).to_owned())
    }

    fn bytes(&self, tag: Tag) -> Option<Vec<u8>> {
        let element = self.file.get(tag)?;
        Some(element.to_bytes().ok()?.into_owned())
    }

    fn whole(&self, tag: Tag) -> Option<u32> {
        self.file.get(tag)?.to_int::<u32>().ok()
    }

    fn numbers<const N: usize>(
        &self,
        tag: Tag,
        element: &'static str,
    ) -> Result<[f64; N], DicomError> {
        let found = self.file.get(tag).and_then(|e| e.to_multi_float64().ok());
        found
            .and_then(|numbers| <[f64; N]>::try_from(numbers).ok())
            .filter(|numbers| numbers.iter().all(|number| number.is_finite()))
            .ok_or(DicomError::Missing { element })
    }

    fn number(&self, tag: Tag, element: &'static str) -> Result<f64, DicomError> {
        self.numbers::<1>(tag, element).map(|[number]| number)
    }

    fn patient(&self) -> PatientTag {
        let parts = [
            tags::PATIENT_ID,
            tags::PATIENT_NAME,
            tags::PATIENT_BIRTH_DATE,
        ];
        PatientTag::of(&parts.map(|tag| self.text(tag)))
    }

    /// Refuses by name what is not a Siemens mosaic.
    fn check_kind(&self) -> Result<(), DicomError> {
        let refuse = |name| Err(DicomError::Unsupported { name });
        let class = self.text(tags::SOP_CLASS_UID).unwrap_or_default();
        let vendor = self.text(tags::MANUFACTURER).unwrap_or_default();
        let vendor = vendor.to_ascii_uppercase();
        if class == ENHANCED_MR_IMAGE {
            return match vendor.as_str() {
                v if v.contains("PHILIPS") => refuse("a Philips enhanced multi-frame file"),
                v if v.contains("SIEMENS") => refuse("a Siemens enhanced multi-frame file"),
                _ => refuse("an enhanced multi-frame file"),
            };
        }
        if class != MR_IMAGE {
            return refuse("a file that is not an MR image");
        }
        if vendor.contains("PHILIPS") {
            return refuse("a Philips single-slice file");
        }
        if vendor.starts_with("GE ") || vendor == "GE" {
            return refuse("a GE single-slice file");
        }
        let kind = self.file.get(tags::IMAGE_TYPE);
        let kind = kind.and_then(|e| e.to_multi_str().ok());
        match kind {
            Some(values) if values.iter().any(|value| value.trim() == "MOSAIC") => Ok(()),
            _ => refuse("an MR image whose ImageType holds no MOSAIC"),
        }
    }

    fn mosaic(&self, csa: &csa::Csa) -> Result<Mosaic, DicomError> {
        let exact = [
            (tags::SAMPLES_PER_PIXEL, "(0028,0002) SamplesPerPixel", 1),
            (tags::BITS_ALLOCATED, "(0028,0100) BitsAllocated", 16),
        ];
        for (tag, element, expected) in exact {
            let found = self.whole(tag).ok_or(DicomError::Missing { element })?;
            if found != expected {
                let expected = if expected == 1 { "1" } else { "16" };
                return Err(DicomError::Range {
                    element,
                    found: f64::from(found),
                    expected,
                });
            }
        }
        for (tag, element, unit) in [
            (tags::RESCALE_SLOPE, "(0028,1053) RescaleSlope", 1.0),
            (tags::RESCALE_INTERCEPT, "(0028,1052) RescaleIntercept", 0.0),
        ] {
            if self.file.get(tag).is_some() && self.number(tag, element)? != unit {
                return Err(DicomError::Value {
                    element,
                    what: "not that of a magnitude mosaic (slope 1, intercept 0)",
                });
            }
        }
        let side = |tag, element| {
            let side = self.whole(tag).ok_or(DicomError::Missing { element })?;
            usize::try_from(side)
                .ok()
                .filter(|side| (1..=65_535).contains(side))
                .ok_or(DicomError::Range {
                    element,
                    found: f64::from(side),
                    expected: "1 to 65535",
                })
        };
        let rows = side(tags::ROWS, "(0028,0010) Rows")?;
        let columns = side(tags::COLUMNS, "(0028,0011) Columns")?;
        let images = match (csa.images, self.whole(IMAGES_IN_MOSAIC)) {
            (Some(csa), Some(private)) if csa != private => {
                return Err(DicomError::Range {
                    element: "CSA NumberOfImagesInMosaic",
                    found: f64::from(csa),
                    expected: "what (0019,100a) states",
                });
            }
            (Some(images), _) | (None, Some(images)) => images,
            (None, None) => {
                return Err(DicomError::Missing {
                    element: "CSA NumberOfImagesInMosaic",
                });
            }
        };
        let slices = usize::try_from(images).unwrap_or(usize::MAX);
        let tiles = DicomError::Tiles {
            images,
            rows,
            columns,
        };
        if slices == 0 || slices > 1024 || rows * columns > MAX_PIXELS {
            return Err(tiles);
        }
        let grid = grid_side(slices);
        if rows % grid != 0 || columns % grid != 0 {
            return Err(tiles);
        }
        Ok(Mosaic {
            rows,
            columns,
            slices,
            grid,
        })
    }

    fn affine(&self, mosaic: &Mosaic, csa: &csa::Csa) -> Result<Affine, DicomError> {
        let position: [f64; 3] = self.numbers(
            tags::IMAGE_POSITION_PATIENT,
            "(0020,0032) ImagePositionPatient",
        )?;
        let orientation: [f64; 6] = self.numbers(
            tags::IMAGE_ORIENTATION_PATIENT,
            "(0020,0037) ImageOrientationPatient",
        )?;
        let [row_mm, column_mm] =
            self.numbers::<2>(tags::PIXEL_SPACING, "(0028,0030) PixelSpacing")?;
        let slice_mm = self.number(
            tags::SPACING_BETWEEN_SLICES,
            "(0018,0088) SpacingBetweenSlices",
        )?;
        for (element, found) in [
            ("(0028,0030) PixelSpacing", row_mm),
            ("(0028,0030) PixelSpacing", column_mm),
            ("(0018,0088) SpacingBetweenSlices", slice_mm),
        ] {
            if !(found > 0.0 && found <= 1000.0) {
                return Err(DicomError::Range {
                    element,
                    found,
                    expected: "above 0 and at most 1000 mm",
                });
            }
        }
        let [a, b, c, d, e, f] = orientation;
        let (along_columns, along_rows) = ([a, b, c], [d, e, f]);
        let normal = csa.normal.ok_or(DicomError::Missing {
            element: "CSA SliceNormalVector",
        })?;
        let square = |x, y| dot(x, y).abs() <= DIRECTION_TOLERANCE;
        let unit = |x| (dot(x, x) - 1.0).abs() <= DIRECTION_TOLERANCE;
        if !unit(along_columns) || !unit(along_rows) || !square(along_columns, along_rows) {
            return Err(DicomError::Value {
                element: "(0020,0037) ImageOrientationPatient",
                what: "not two perpendicular directions",
            });
        }
        if !unit(normal) || !square(normal, along_columns) || !square(normal, along_rows) {
            return Err(DicomError::Value {
                element: "CSA SliceNormalVector",
                what: "not perpendicular to ImageOrientationPatient",
            });
        }
        // ImagePositionPatient is where a slice as large as the whole mosaic would begin.
        let spare = |side: usize| as_f64(side - side / mosaic.grid) / 2.0;
        let (spare_columns, spare_rows) = (spare(mosaic.columns), spare(mosaic.rows));
        let mut affine = [[0.0; 4]; 4];
        for axis in 0..3 {
            let column_step = along_columns[axis] * column_mm;
            let row_step = along_rows[axis] * row_mm;
            affine[axis] = [
                column_step,
                row_step,
                normal[axis] * slice_mm,
                position[axis] + column_step * spare_columns + row_step * spare_rows,
            ];
        }
        affine[3][3] = 1.0;
        Ok(affine)
    }

    fn voxels(&self, mosaic: &Mosaic) -> Result<Array3<f32>, DicomError> {
        let pixels = self.file.get(tags::PIXEL_DATA);
        let pixels = pixels.and_then(|element| element.to_bytes().ok());
        let pixels = pixels.ok_or(DicomError::Missing {
            element: "(7fe0,0010) PixelData",
        })?;
        let (rows, columns) = (mosaic.rows, mosaic.columns);
        let expected = rows * columns * 2;
        if pixels.len() != expected {
            return Err(DicomError::PixelBytes {
                rows,
                columns,
                expected,
                found: pixels.len(),
            });
        }
        let signed = match self.whole(tags::PIXEL_REPRESENTATION) {
            Some(0) => false,
            Some(1) => true,
            _ => {
                return Err(DicomError::Value {
                    element: "(0028,0103) PixelRepresentation",
                    what: "neither 0 nor 1",
                });
            }
        };
        let (tile_rows, tile_columns) = (rows / mosaic.grid, columns / mosaic.grid);
        let shape = (mosaic.slices, tile_rows, tile_columns);
        Ok(Array3::from_shape_fn(shape, |(slice, row, column)| {
            let row = (slice / mosaic.grid) * tile_rows + row;
            let column = (slice % mosaic.grid) * tile_columns + column;
            let at = (row * columns + column) * 2;
            let pair = [pixels[at], pixels[at + 1]];
            if signed {
                f32::from(i16::from_le_bytes(pair))
            } else {
                f32::from(u16::from_le_bytes(pair))
            }
        }))
    }
}

/// Tiles along each side of the square mosaic that holds so many slices.
pub(crate) fn grid_side(slices: usize) -> usize {
    let root = slices.isqrt();
    root + usize::from(root * root < slices)
}

/// Slice times where the header stores credible ones.
///
/// A first multi-band volume may store times beyond the TR or wrapped by a day; such
/// times are absent rather than wrong.
fn slice_times(csa: &csa::Csa, slices: usize, tr_ms: f64) -> Result<Option<Vec<f64>>, DicomError> {
    let times = &csa.slice_times_ms;
    if times.is_empty() {
        return Ok(None);
    }
    if times.len() != slices {
        return Err(DicomError::Range {
            element: "count of CSA MosaicRefAcqTimes",
            found: as_f64(times.len()),
            expected: "one time per slice",
        });
    }
    let credible = times.iter().all(|time| (0.0..=tr_ms).contains(time));
    Ok(credible.then(|| times.clone()))
}

fn dot(a: [f64; 3], b: [f64; 3]) -> f64 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

/// A count as a float; counts here are far below 2^32.
fn as_f64(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

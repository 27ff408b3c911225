//! A Siemens-like mosaic file from a [`Volume`], for the simulated scanner.
//!
//! Written from the public standard: explicit little endian, our own 2.25 UIDs, no
//! patient, no date. [`crate::dicom::decode`] takes back what [`encode`] writes.

use ndarray::Axis;

use crate::dicom::write::{self, Elements, MR_IMAGE, decimal, decimals, derived_uid};
use crate::dicom::{csa, grid_side};
use crate::volume::{SeriesUid, Volume, VolumeHeader};

/// Why a volume cannot be written as a mosaic, an enhanced file or single slices.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum MosaicError {
    /// A stored pixel is a whole number of 16 bits.
    #[error("voxel value {value} is not a whole number from 0 to 65535")]
    VoxelValue {
        /// The value.
        value: f32,
    },
    /// The sides do not fit 16 bits, or there is nothing to write.
    #[error("{slices} slices of {rows} rows and {columns} columns do not make a file")]
    Size {
        /// Slices.
        slices: usize,
        /// Rows of one slice.
        rows: usize,
        /// Columns of one slice.
        columns: usize,
    },
    /// A header number cannot be written.
    #[error("{name} is {value}, expected {expected}")]
    Header {
        /// Which number.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// A UID holds digits and dots, at most 64.
    #[error("series UID is not one of digits and dots, at most 64 characters")]
    SeriesUid,
}

/// A series UID of our own (2.25, a number as UID) from a seed.
pub fn series_uid(seed: u128) -> SeriesUid {
    SeriesUid::new(format!("2.25.{seed}"))
}

/// Writes one volume as one file.
///
/// - `volume.voxels`: whole numbers from 0 to 65535.
/// - `volume.affine_lps`: perpendicular axes; kept to the 16 characters that a
///   decimal string has, better than 0.001 mm.
///
/// # Errors
/// [`MosaicError`] for what the format cannot hold.
pub fn encode(volume: &Volume) -> Result<Vec<u8>, MosaicError> {
    let (slices, rows, columns) = volume.voxels.dim();
    let size = MosaicError::Size {
        slices,
        rows,
        columns,
    };
    if slices == 0 || slices > 1024 || rows == 0 || columns == 0 {
        return Err(size);
    }
    let grid = grid_side(slices);
    let (Some(mosaic_rows), Some(mosaic_columns)) = (side(rows, grid), side(columns, grid)) else {
        return Err(size);
    };
    let header = &volume.header;
    let series = check_header(header)?;
    let geometry = Geometry::of(volume, grid)?;
    let times = header.slice_times_ms.as_deref().unwrap_or_default();
    let images = u32::try_from(slices).map_err(|_| size)?;

    let mut data = Elements::default();
    data.text((0x0008, 0x0008), b"CS", "ORIGINAL\\PRIMARY\\M\\ND\\MOSAIC");
    data.text((0x0008, 0x0016), b"UI", MR_IMAGE);
    let instance_uid = derived_uid(series, header.acquisition, "instance");
    data.text((0x0008, 0x0018), b"UI", &instance_uid);
    if let Some(time_ms) = header.time_ms {
        data.text((0x0008, 0x0032), b"TM", &write::time(time_ms));
    }
    data.text((0x0008, 0x0060), b"CS", "MR");
    data.text((0x0008, 0x0070), b"LO", "SIEMENS");
    data.text((0x0008, 0x1090), b"LO", "Afterimage simulator");
    data.text((0x0010, 0x0010), b"PN", "");
    data.text((0x0010, 0x0020), b"LO", "");
    data.text((0x0018, 0x0050), b"DS", &decimal(geometry.slice_mm));
    data.text((0x0018, 0x0080), b"DS", &decimal(header.tr_ms));
    data.text((0x0018, 0x0088), b"DS", &decimal(geometry.slice_mm));
    data.text((0x0020, 0x000d), b"UI", &derived_uid(series, 0, "study"));
    data.text((0x0020, 0x000e), b"UI", series);
    data.text((0x0020, 0x0011), b"IS", "1");
    data.text((0x0020, 0x0012), b"IS", &header.acquisition.to_string());
    if let Some(instance) = header.instance {
        data.text((0x0020, 0x0013), b"IS", &instance.to_string());
    }
    data.text((0x0020, 0x0032), b"DS", &decimals(&geometry.position));
    data.text((0x0020, 0x0037), b"DS", &decimals(&geometry.orientation));
    data.text((0x0020, 0x0052), b"UI", &derived_uid(series, 0, "frame"));
    data.word((0x0028, 0x0002), 1);
    data.text((0x0028, 0x0004), b"CS", "MONOCHROME2");
    data.word((0x0028, 0x0010), mosaic_rows);
    data.word((0x0028, 0x0011), mosaic_columns);
    data.text((0x0028, 0x0030), b"DS", &decimals(&geometry.pixel_mm));
    data.word((0x0028, 0x0100), 16);
    data.word((0x0028, 0x0101), 16);
    data.word((0x0028, 0x0102), 15);
    data.word((0x0028, 0x0103), 0);
    data.text((0x0029, 0x0010), b"LO", "SIEMENS CSA HEADER");
    let private = csa::write(images, geometry.normal, times);
    data.long((0x0029, 0x1010), b"OB", &private);
    data.long((0x7fe0, 0x0010), b"OW", &pixels(volume, grid)?);

    Ok(write::file(MR_IMAGE, &instance_uid, data))
}

/// The series' UID of a header that can be written.
pub(crate) fn check_header(header: &VolumeHeader) -> Result<&str, MosaicError> {
    let series = header.series_uid.expose();
    let uid_like = |c: char| c.is_ascii_digit() || c == '.';
    if series.is_empty() || series.len() > 64 || !series.chars().all(uid_like) {
        return Err(MosaicError::SeriesUid);
    }
    if !(header.tr_ms > 0.0 && header.tr_ms.is_finite()) {
        return Err(MosaicError::Header {
            name: "tr_ms",
            value: header.tr_ms,
            expected: "above 0",
        });
    }
    Ok(series)
}

/// One side of the mosaic, in pixels.
pub(crate) fn side(len: usize, grid: usize) -> Option<u16> {
    u16::try_from(len.checked_mul(grid)?).ok()
}

/// The header's geometry numbers, millimetres and unit vectors, LPS.
pub(crate) struct Geometry {
    pub(crate) position: [f64; 3],
    pub(crate) orientation: [f64; 6],
    pub(crate) normal: [f64; 3],
    /// Distance between rows, then between columns.
    pub(crate) pixel_mm: [f64; 2],
    pub(crate) slice_mm: f64,
}

impl Geometry {
    /// - `grid`: tiles along each side of the picture that holds the slices; 1 for single slices.
    pub(crate) fn of(volume: &Volume, grid: usize) -> Result<Self, MosaicError> {
        let affine = &volume.affine_lps;
        let axis = |index: usize| [affine[0][index], affine[1][index], affine[2][index]];
        let length = |v: [f64; 3]| (v[0] * v[0] + v[1] * v[1] + v[2] * v[2]).sqrt();
        let mut directions = [[0.0; 3]; 3];
        let mut sizes = [0.0; 3];
        for index in 0..3 {
            let size = length(axis(index));
            if !(size > 0.0 && size <= 1000.0) {
                return Err(MosaicError::Header {
                    name: "voxel size in mm",
                    value: size,
                    expected: "above 0 and at most 1000",
                });
            }
            sizes[index] = size;
            directions[index] = axis(index).map(|part| part / size);
        }
        for (a, b) in [(0, 1), (0, 2), (1, 2)] {
            let cosine: f64 = (0..3).map(|i| directions[a][i] * directions[b][i]).sum();
            if cosine.abs() > 5e-4 {
                return Err(MosaicError::Header {
                    name: "cosine between two axes",
                    value: cosine,
                    expected: "0",
                });
            }
        }
        // The header's position is where a slice as large as the mosaic would begin.
        let (_, rows, columns) = volume.voxels.dim();
        let spare = |len: usize| {
            let pixels = u32::try_from(len * (grid - 1)).unwrap_or(u32::MAX);
            f64::from(pixels) / 2.0
        };
        let position = volume.position_lps([-spare(columns), -spare(rows), 0.0]);
        if !position.iter().all(|value| value.abs() < 1e6) {
            return Err(MosaicError::Header {
                name: "position in mm",
                value: position[0],
                expected: "within 1000000 on each axis",
            });
        }
        let [[a, b, c], [d, e, f], normal] = directions;
        Ok(Self {
            position,
            orientation: [a, b, c, d, e, f],
            normal,
            pixel_mm: [sizes[1], sizes[0]],
            slice_mm: sizes[2],
        })
    }
}

/// One slice's pixels.
pub(crate) fn slice_pixels(volume: &Volume, slice: usize) -> Result<Vec<u8>, MosaicError> {
    let mut out = Vec::new();
    for value in volume.voxels.index_axis(Axis(0), slice) {
        let stored = write::stored_value(*value);
        let stored = stored.ok_or(MosaicError::VoxelValue { value: *value })?;
        out.extend_from_slice(&stored.to_le_bytes());
    }
    Ok(out)
}

/// The mosaic's pixels, unused tiles zero.
fn pixels(volume: &Volume, grid: usize) -> Result<Vec<u8>, MosaicError> {
    let (_, rows, columns) = volume.voxels.dim();
    let mut out = vec![0; rows * columns * grid * grid * 2];
    for ((slice, row, column), value) in volume.voxels.indexed_iter() {
        let stored =
            write::stored_value(*value).ok_or(MosaicError::VoxelValue { value: *value })?;
        let row = (slice / grid) * rows + row;
        let column = (slice % grid) * columns + column;
        let at = (row * columns * grid + column) * 2;
        out[at..at + 2].copy_from_slice(&stored.to_le_bytes());
    }
    Ok(out)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::hash::{DefaultHasher, Hash, Hasher};

    use ndarray::Array3;
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;

    use super::*;
    use crate::dicom::decode_volume as decode;
    use crate::volume::{Affine, PatientTag};

    /// Any oblique grid: a rotation by two angles, three voxel sizes, an origin.
    fn affine() -> impl Strategy<Value = Affine> {
        let angles = prop::array::uniform2(-3.0_f64..3.0);
        let sizes = prop::array::uniform3(0.5_f64..6.0);
        let origin = prop::array::uniform3(-300.0_f64..300.0);
        (angles, sizes, origin).prop_map(|([a, b], [x, y, z], origin)| {
            let ((sin_a, cos_a), (sin_b, cos_b)) = (a.sin_cos(), b.sin_cos());
            [
                [cos_a * x, -sin_a * cos_b * y, sin_a * sin_b * z, origin[0]],
                [sin_a * x, cos_a * cos_b * y, -cos_a * sin_b * z, origin[1]],
                [0.0, sin_b * y, cos_b * z, origin[2]],
                [0.0, 0.0, 0.0, 1.0],
            ]
        })
    }

    /// Any volume that a file holds.
    pub(crate) fn volume() -> impl Strategy<Value = Volume> {
        let shape = (1_usize..12, 1_usize..9, 1_usize..9);
        let times = (
            prop::option::of(0.0_f64..40.0),
            prop::option::of(0_u32..86_400_000),
        );
        let numbers = (
            1_u32..9999,
            prop::option::of(0_u32..9999),
            400.0_f64..9000.0,
        );
        (shape, affine(), times, numbers, any::<u64>()).prop_map(
            |(shape, affine_lps, (times, time_ms), (acquisition, instance, tr_ms), seed)| Volume {
                voxels: Array3::from_shape_fn(shape, |place| {
                    let mut hasher = DefaultHasher::new();
                    (seed, place).hash(&mut hasher);
                    let bytes = hasher.finish().to_le_bytes();
                    f32::from(u16::from_le_bytes([bytes[0], bytes[1]]))
                }),
                affine_lps,
                header: VolumeHeader {
                    series_uid: series_uid(u128::from(seed)),
                    patient: PatientTag::default(),
                    acquisition,
                    instance,
                    tr_ms,
                    slice_times_ms: times.map(|step| {
                        let slices = u32::try_from(shape.0).unwrap();
                        (0..slices)
                            .map(|slice| f64::from(slice) * step / 2.0)
                            .collect()
                    }),
                    time_ms: time_ms.map(f64::from),
                },
            },
        )
    }

    proptest! {
        #[test]
        fn written_volume_reads_back(volume in volume()) {
            let found = decode(&encode(&volume).unwrap()).unwrap();
            prop_assert_eq!(&found.voxels, &volume.voxels);
            for (found, written) in found.affine_lps.iter().zip(&volume.affine_lps) {
                for (found, written) in found.iter().zip(written) {
                    prop_assert!((found - written).abs() < 1e-3, "{found} for {written}");
                }
            }
            prop_assert!((found.header.tr_ms - volume.header.tr_ms).abs() < 1e-9);
            prop_assert_eq!(&found.header.slice_times_ms, &volume.header.slice_times_ms);
            prop_assert_eq!(&found.header.series_uid, &volume.header.series_uid);
            prop_assert_eq!(found.header.patient, volume.header.patient);
            prop_assert_eq!(found.header.acquisition, volume.header.acquisition);
            prop_assert_eq!(found.header.instance, volume.header.instance);
            prop_assert_eq!(found.header.time_ms, volume.header.time_ms);
            prop_assert_eq!(encode(&volume), encode(&volume));
        }

        #[test]
        fn changed_bytes_of_a_file_give_an_answer(
            volume in volume(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        ) {
            let mut bytes = encode(&volume).unwrap();
            for (index, value) in changes {
                let at = index.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(found) = decode(&bytes) {
                prop_assert!(found.voxels.len() * 2 <= bytes.len());
            }
        }

        #[test]
        fn any_cut_of_a_file_is_refused(volume in volume(), cut in any::<prop::sample::Index>()) {
            let bytes = encode(&volume).unwrap();
            prop_assert!(decode(&bytes[..cut.index(bytes.len())]).is_err());
        }
    }

    #[test]
    fn voxels_that_are_no_stored_value_are_refused() {
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let mut volume = volume().new_tree(&mut runner).unwrap().current();
        for value in [-1.0, 65_536.0, 0.5, f32::NAN, f32::INFINITY] {
            volume.voxels.fill(value);
            assert!(matches!(
                encode(&volume),
                Err(MosaicError::VoxelValue { .. })
            ));
        }
    }
}

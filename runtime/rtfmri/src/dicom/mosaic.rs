//! A Siemens mosaic: all slices of a volume as tiles of one picture.
//!
//! The private header (`csa`) gives the slice count, direction and times.

use ndarray::Array3;

use super::csa::{self, Csa};
use super::geometry::{self, Directions, check_mm, is_square, is_unit};
use super::header::{Item, doubles, tags};
use super::kind;
use super::pixels::Layout;
use super::{DicomError, as_f64, grid_side};
use crate::volume::{Affine, Volume, VolumeHeader};

/// Slices of one mosaic.
const MAX_SLICES: usize = 1024;

/// The mosaic's sizes, in pixels, proven to fit each other.
struct Mosaic {
    layout: Layout,
    slices: usize,
    /// Tiles along each side.
    grid: usize,
}

/// Decodes one mosaic.
///
/// - `top`: the data set of an MR image whose ImageType holds MOSAIC.
///
/// # Errors
/// [`DicomError`], naming the element.
pub(super) fn decode(top: &Item<'_>) -> Result<Volume, DicomError> {
    kind::refuse_other_contrasts(top.words(tags::IMAGE_TYPE))?;
    kind::refuse_later_echo(top)?;
    let csa = match top.private_bytes(tags::CSA_IMAGE) {
        Some(bytes) if !bytes.is_empty() => csa::read(bytes)?,
        _ => Csa::default(),
    };
    let mosaic = Mosaic::of(top, &csa)?;
    let affine_lps = mosaic.affine(top, &csa)?;
    let tr_ms = geometry::tr_ms(top)?;
    let acquisition = top
        .whole(tags::ACQUISITION_NUMBER)
        .filter(|number| *number > 0)
        .ok_or(DicomError::Missing {
            element: tags::ACQUISITION_NUMBER.name,
        })?;
    Ok(Volume {
        voxels: mosaic.voxels(top)?,
        affine_lps,
        header: VolumeHeader {
            series_uid: top.series()?,
            patient: top.patient(),
            acquisition,
            instance: top.whole(tags::INSTANCE_NUMBER),
            tr_ms,
            slice_times_ms: slice_times(top, &csa, mosaic.slices, tr_ms)?,
            time_ms: top.acquired_ms(),
        },
    })
}

impl Mosaic {
    fn of(top: &Item<'_>, csa: &Csa) -> Result<Mosaic, DicomError> {
        let layout = Layout::of(top)?;
        for (tag, unit) in [(tags::RESCALE_SLOPE, 1.0), (tags::RESCALE_INTERCEPT, 0.0)] {
            if top.has(tag) && top.number(tag)? != unit {
                return Err(DicomError::Value {
                    element: tag.name,
                    what: "not that of a magnitude mosaic (slope 1, intercept 0)",
                });
            }
        }
        let images = match (csa.images, top.private_whole(tags::IMAGES_IN_MOSAIC)) {
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
            rows: layout.rows,
            columns: layout.columns,
        };
        if slices == 0 || slices > MAX_SLICES {
            return Err(tiles);
        }
        let grid = grid_side(slices);
        if layout.rows % grid != 0 || layout.columns % grid != 0 {
            return Err(tiles);
        }
        Ok(Mosaic {
            layout,
            slices,
            grid,
        })
    }

    fn affine(&self, top: &Item<'_>, csa: &Csa) -> Result<Affine, DicomError> {
        let position = geometry::position(top)?;
        let directions = Directions::of(top)?;
        let [row_mm, column_mm] = geometry::pixel_mm(top)?;
        let slice_mm = top.number(tags::SLICE_SPACING)?;
        check_mm(tags::SLICE_SPACING, slice_mm)?;
        let normal = csa.normal.ok_or(DicomError::Missing {
            element: "CSA SliceNormalVector",
        })?;
        let (along_columns, along_rows) = (directions.columns, directions.rows);
        let square = is_square(normal, along_columns) && is_square(normal, along_rows);
        if !is_unit(normal) || !square {
            return Err(DicomError::Value {
                element: "CSA SliceNormalVector",
                what: "not perpendicular to ImageOrientationPatient",
            });
        }
        // ImagePositionPatient is where a slice as large as the whole mosaic would begin.
        let spare = |side: usize| as_f64(side - side / self.grid) / 2.0;
        let (spare_columns, spare_rows) = (spare(self.layout.columns), spare(self.layout.rows));
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

    fn voxels(&self, top: &Item<'_>) -> Result<Array3<f32>, DicomError> {
        let pixels = self.layout.data(top, 1)?;
        let rows = self.layout.rows / self.grid;
        let columns = self.layout.columns / self.grid;
        let mut voxels = Vec::with_capacity(self.slices * rows * columns);
        for slice in 0..self.slices {
            let first_row = (slice / self.grid) * rows;
            let first_column = (slice % self.grid) * columns;
            for row in first_row..first_row + rows {
                let at = (row * self.layout.columns + first_column) * 2;
                let stored = pixels.get(at..at + columns * 2).unwrap_or_default();
                voxels.extend(self.layout.values(stored));
            }
        }
        let shape = (self.slices, rows, columns);
        Array3::from_shape_vec(shape, voxels).map_err(|_| DicomError::Missing {
            element: tags::PIXEL_DATA.name,
        })
    }
}

/// Slice times where the header stores credible ones, or plans them.
///
/// A first multi-band volume may store times beyond the TR or wrapped by a day; such
/// times are absent rather than wrong. Where the private header was taken away, as by some
/// de-identification, the same times may stand in an element of their own.
fn slice_times(
    top: &Item<'_>,
    csa: &Csa,
    slices: usize,
    tr_ms: f64,
) -> Result<Option<Vec<f64>>, DicomError> {
    let mut times = csa.slice_times_ms.clone();
    if times.is_empty() {
        let stored = top.private_bytes(tags::MOSAIC_TIMES).and_then(doubles);
        times = stored.unwrap_or_default();
    }
    if times.is_empty() {
        let protocol = top.private_bytes(tags::CSA_SERIES).unwrap_or_default();
        return Ok(planned_times(protocol, slices, tr_ms));
    }
    if times.len() != slices {
        return Err(DicomError::Range {
            element: "count of CSA MosaicRefAcqTimes",
            found: as_f64(times.len()),
            expected: "one time per slice",
        });
    }
    let credible = times.iter().all(|time| (0.0..=tr_ms).contains(time));
    Ok(credible.then_some(times))
}

/// Slice times of releases that store none (VB12, VB13), from the protocol's order: one after the
/// other, backwards, or every other slice first; evenly over the TR less the pause at its end.
///
/// - `protocol`: the private series header, which holds the protocol as text.
fn planned_times(protocol: &[u8], slices: usize, tr_ms: f64) -> Option<Vec<f64>> {
    let value = |name: &[u8]| {
        let at = protocol.windows(name.len()).position(|part| part == name)?;
        let rest = protocol.get(at + name.len()..)?;
        let rest = rest.get(..rest.len().min(128))?;
        let line = rest.split(|byte| *byte == b'\n').next()?;
        let text = std::str::from_utf8(line).ok()?;
        let text = text.trim().strip_prefix('=')?.trim();
        match text.strip_prefix("0x") {
            Some(hex) => i64::from_str_radix(hex, 16).ok(),
            None => text.parse().ok(),
        }
    };
    let mode = value(b"sSliceArray.ucMode")?;
    let pause_us = value(b"lDelayTimeInTR").unwrap_or(0);
    let pause_ms = f64::from(i32::try_from(pause_us).ok().filter(|us| *us >= 0)?) / 1000.0;
    let step_ms = (tr_ms - pause_ms) / as_f64(slices);
    if step_ms <= 0.0 {
        return None;
    }
    // Siemens begins with the second slice where their count is even.
    let (of_first, of_second) = if slices.is_multiple_of(2) {
        (slices / 2, 0)
    } else {
        (0, slices.div_ceil(2))
    };
    let turn = |slice: usize| match mode {
        1 => Some(slice),
        2 => Some(slices - 1 - slice),
        4 if slice.is_multiple_of(2) => Some(of_first + slice / 2),
        4 => Some(of_second + slice / 2),
        _ => None,
    };
    (0..slices)
        .map(|slice| Some(as_f64(turn(slice)?) * step_ms))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocols_order_gives_times_where_none_are_stored() {
        let times = |mode: &str, slices, delay: &str| {
            let text = format!("\0sSliceArray.ucMode\t = {mode}\n{delay}\n");
            planned_times(text.as_bytes(), slices, 1000.0)
        };
        assert_eq!(times("0x1", 4, ""), Some(vec![0.0, 250.0, 500.0, 750.0]));
        assert_eq!(times("0x2", 4, ""), Some(vec![750.0, 500.0, 250.0, 0.0]));
        assert_eq!(times("0x4", 4, ""), Some(vec![500.0, 0.0, 750.0, 250.0]));
        let odd = times("0x4", 5, "lDelayTimeInTR = 500000");
        assert_eq!(odd, Some(vec![0.0, 300.0, 100.0, 400.0, 200.0]));
        assert_eq!(times("0x8", 4, ""), None);
        assert_eq!(times("0x1", 4, "lDelayTimeInTR = 1000000"), None);
        assert_eq!(planned_times(b"", 4, 1000.0), None);
        assert_eq!(planned_times(b"sSliceArray.ucMode", 4, 1000.0), None);
    }
}

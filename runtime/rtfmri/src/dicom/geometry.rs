//! Where an image lies in the patient: directions and distances, checked.

use super::DicomError;
use super::header::{Item, Tag, tags};
use crate::volume::dot;

/// How far from a right angle, and from length one, directions may be.
const DIRECTION_TOLERANCE: f64 = 1e-3;

/// The directions of an image's axes, LPS, unit length and perpendicular.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Directions {
    /// In which columns follow each other.
    pub(crate) columns: [f64; 3],
    /// In which rows follow each other.
    pub(crate) rows: [f64; 3],
}

impl Directions {
    /// - `item`: what holds the orientation.
    ///
    /// # Errors
    /// [`DicomError`] where it is absent or no right angle.
    pub(super) fn of(item: &Item<'_>) -> Result<Directions, DicomError> {
        let [a, b, c, d, e, f] = item.numbers(tags::ORIENTATION)?;
        let directions = Directions {
            columns: [a, b, c],
            rows: [d, e, f],
        };
        let square = is_square(directions.columns, directions.rows);
        if is_unit(directions.columns) && is_unit(directions.rows) && square {
            return Ok(directions);
        }
        Err(DicomError::Value {
            element: tags::ORIENTATION.name,
            what: "not two perpendicular directions",
        })
    }

    /// Where a position lies within the plane: along columns, along rows, millimetres.
    pub(crate) fn in_plane(&self, position: [f64; 3]) -> [f64; 2] {
        [dot(position, self.columns), dot(position, self.rows)]
    }

    /// The direction that makes a right-handed system with columns and rows.
    pub(crate) fn normal(&self) -> [f64; 3] {
        cross(self.columns, self.rows)
    }
}

/// Distances between rows and between columns, millimetres.
///
/// # Errors
/// [`DicomError`] where they are absent or nothing that a scanner makes.
pub(super) fn pixel_mm(item: &Item<'_>) -> Result<[f64; 2], DicomError> {
    let sizes: [f64; 2] = item.numbers(tags::PIXEL_SPACING)?;
    for size in sizes {
        check_mm(tags::PIXEL_SPACING, size)?;
    }
    Ok(sizes)
}

/// # Errors
/// [`DicomError::Range`] for a distance that no voxel has.
pub(super) fn check_mm(tag: Tag, found: f64) -> Result<(), DicomError> {
    if found > 0.0 && found <= 1000.0 {
        return Ok(());
    }
    Err(DicomError::Range {
        element: tag.name,
        found,
        expected: "above 0 and at most 1000 mm",
    })
}

/// A position that lies within ten metres of the magnet's centre, millimetres.
///
/// # Errors
/// [`DicomError`] where it is absent or further away.
pub(super) fn position(item: &Item<'_>) -> Result<[f64; 3], DicomError> {
    let position: [f64; 3] = item.numbers(tags::POSITION)?;
    for found in position {
        if found.abs() > 1e4 {
            return Err(DicomError::Range {
                element: tags::POSITION.name,
                found,
                expected: "within 10000 mm on each axis",
            });
        }
    }
    Ok(position)
}

/// The repetition time, milliseconds.
///
/// # Errors
/// [`DicomError`] where it is absent or no TR.
pub(super) fn tr_ms(item: &Item<'_>) -> Result<f64, DicomError> {
    let tr_ms = item.number(tags::REPETITION_TIME)?;
    check_tr(tr_ms)
}

/// # Errors
/// [`DicomError::Range`] for what is no TR.
pub(super) fn check_tr(tr_ms: f64) -> Result<f64, DicomError> {
    if tr_ms > 0.0 && tr_ms <= 60_000.0 {
        return Ok(tr_ms);
    }
    Err(DicomError::Range {
        element: tags::REPETITION_TIME.name,
        found: tr_ms,
        expected: "above 0 and at most 60000 ms",
    })
}

/// Whether a direction has length one.
pub(super) fn is_unit(a: [f64; 3]) -> bool {
    (dot(a, a) - 1.0).abs() <= DIRECTION_TOLERANCE
}

/// Whether two directions make a right angle.
pub(super) fn is_square(a: [f64; 3], b: [f64; 3]) -> bool {
    dot(a, b).abs() <= DIRECTION_TOLERANCE
}

fn cross(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    ]
}

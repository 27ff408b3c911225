//! Slices of one volume in the order of their places, and the affine that follows.

use super::geometry::Directions;
use crate::volume::{Affine, dot};

/// How far a slice may lie from where even spacing puts it, millimetres: headers round
/// positions to about a micrometre, and a missing slice is off by whole millimetres.
pub(crate) const PLACE_TOLERANCE_MM: f64 = 0.02;

/// Why positions make no stack.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum StackFault {
    /// Two slices lie at one place.
    SamePlace {
        /// The later one.
        index: usize,
    },
    /// Distances differ.
    Uneven {
        /// The slice, in order of places, that is off.
        place: usize,
        /// By how much, millimetres.
        off_mm: f64,
    },
    /// The line through the slices' corners is not perpendicular to them.
    Aslant {
        /// How far the last slice is off, millimetres.
        off_mm: f64,
    },
    /// There is but one slice, and its thickness is not known.
    NoSpacing,
}

/// Slices in order.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stack {
    /// Which of the slices lies at each place, from the first along the normal.
    pub(crate) order: Vec<usize>,
    origin: [f64; 3],
    /// From one slice to the next, millimetres, LPS.
    step: [f64; 3],
}

/// Orders slices along the right-handed normal of their plane.
///
/// - `positions`: `[slice]`, LPS, millimetres, of each slice's first pixel.
/// - `single_mm`: the spacing to state where there is but one slice.
///
/// # Errors
/// [`StackFault`] where they are not evenly spaced along the normal.
pub(crate) fn order(
    positions: &[[f64; 3]],
    directions: Directions,
    single_mm: Option<f64>,
) -> Result<Stack, StackFault> {
    let normal = directions.normal();
    let mut places: Vec<(f64, usize)> = positions
        .iter()
        .enumerate()
        .map(|(index, position)| (dot(*position, normal), index))
        .collect();
    places.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (Some(first), Some(last)) = (places.first(), places.last()) else {
        return Err(StackFault::NoSpacing);
    };
    let steps = places.len() - 1;
    let at = |index: usize| positions.get(index).copied().unwrap_or_default();
    let origin = at(first.1);
    if steps == 0 {
        let spacing = single_mm.ok_or(StackFault::NoSpacing)?;
        return Ok(Stack {
            order: vec![first.1],
            origin,
            step: normal.map(|part| part * spacing),
        });
    }
    for pair in places.windows(2) {
        if let [near, far] = pair
            && far.0 - near.0 <= PLACE_TOLERANCE_MM
        {
            return Err(StackFault::SamePlace {
                index: near.1.max(far.1),
            });
        }
    }
    let count = super::as_f64(steps);
    let spacing = (last.0 - first.0) / count;
    let end = at(last.1);
    let step = [0, 1, 2].map(|axis| (end[axis] - origin[axis]) / count);
    for (place, (found, index)) in places.iter().enumerate() {
        let steps = super::as_f64(place);
        let off_mm = (found - (first.0 + spacing * steps)).abs();
        if off_mm > PLACE_TOLERANCE_MM {
            return Err(StackFault::Uneven { place, off_mm });
        }
        let position = at(*index);
        let off =
            [0, 1, 2].map(|axis| position[axis] - origin[axis] - normal[axis] * spacing * steps);
        let off_mm = dot(off, off).sqrt();
        // Directions have six digits: a tall stack's far end is off by so much at most.
        if off_mm > PLACE_TOLERANCE_MM + 1e-4 * spacing * steps {
            return Err(StackFault::Aslant { off_mm });
        }
    }
    Ok(Stack {
        order: places.into_iter().map(|(_, index)| index).collect(),
        origin,
        step,
    })
}

impl Stack {
    /// `(column, row, slice)` to LPS, millimetres.
    ///
    /// - `pixel_mm`: distances between rows and between columns.
    pub(crate) fn affine(&self, directions: Directions, pixel_mm: [f64; 2]) -> Affine {
        let [row_mm, column_mm] = pixel_mm;
        let mut affine = [[0.0; 4]; 4];
        for (axis, row) in affine[..3].iter_mut().enumerate() {
            *row = [
                directions.columns[axis] * column_mm,
                directions.rows[axis] * row_mm,
                self.step[axis],
                self.origin[axis],
            ];
        }
        affine[3][3] = 1.0;
        affine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UPRIGHT: Directions = Directions {
        columns: [1.0, 0.0, 0.0],
        rows: [0.0, 1.0, 0.0],
    };

    fn places(z: &[f64]) -> Vec<[f64; 3]> {
        z.iter().map(|z| [-10.0, -20.0, *z]).collect()
    }

    #[test]
    fn slices_are_ordered_along_the_normal() {
        let stack = order(&places(&[3.0, -3.0, 0.0]), UPRIGHT, None).unwrap();
        assert_eq!(stack.order, [1, 2, 0]);
        let affine = stack.affine(UPRIGHT, [2.0, 4.0]);
        assert_eq!(affine[0], [4.0, 0.0, 0.0, -10.0]);
        assert_eq!(affine[1], [0.0, 2.0, 0.0, -20.0]);
        assert_eq!(affine[2], [0.0, 0.0, 3.0, -3.0]);
    }

    #[test]
    fn gaps_doubles_and_slanted_stacks_are_faults() {
        let fault = |z: &[f64]| order(&places(z), UPRIGHT, None).unwrap_err();
        assert!(matches!(fault(&[0.0, 3.0, 9.0]), StackFault::Uneven { .. }));
        assert_eq!(fault(&[0.0, 3.0, 3.0]), StackFault::SamePlace { index: 2 });
        assert_eq!(fault(&[0.0]), StackFault::NoSpacing);
        let mut aslant = places(&[0.0, 3.0, 6.0]);
        for (position, shift) in aslant.iter_mut().zip([0.0, 1.0, 2.0]) {
            position[0] += shift;
        }
        assert!(matches!(
            order(&aslant, UPRIGHT, None),
            Err(StackFault::Aslant { .. })
        ));
    }
}

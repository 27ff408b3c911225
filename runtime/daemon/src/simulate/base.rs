//! The head that is scanned, still and without noise.

use std::path::{Path, PathBuf};

use ndarray::Array3;
use rtfmri::volume::Affine;
use rtfmri::{PatientTag, SeriesUid, Volume, VolumeHeader, nifti};

use super::noise::single;

/// Brightness of the synthetic head, scanner units.
const HEAD: f64 = 900.0;
/// The synthetic head's half axes, left to right, front to back, up and down, as shares of the
/// field of view.
const HALF_AXES: [f64; 3] = [70.0 / 192.0, 82.0 / 192.0, 44.0 / 94.5];
/// Brighter than this share of the bright voxels belongs to the head.
const HEAD_SHARE: f64 = 0.25;
/// What whole numbers of 16 bits can show well, and leave room above.
const BRIGHTEST: std::ops::RangeInclusive<f64> = 100.0..=50_000.0;
/// Largest file of a base, bytes.
const MAX_BYTES: u64 = 64 << 20;

/// Why there is no base.
#[derive(Debug, thiserror::Error)]
pub(super) enum BaseError {
    /// The file.
    #[error("cannot read the base {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Too long to be one volume.
    #[error("the base {path} has {found} bytes, at most {MAX_BYTES} are read")]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// Its length.
        found: u64,
    },
    /// Not an image.
    #[error("the base {path} cannot be used, expected one 3-D NIfTI-1 volume")]
    Nifti {
        /// Which.
        path: PathBuf,
        /// Why.
        source: nifti::NiftiError,
    },
    /// Brightness that whole numbers cannot show.
    #[error(
        "the base {path}: its brightest voxel is {found}, expected {} to {}",
        BRIGHTEST.start(),
        BRIGHTEST.end()
    )]
    Brightness {
        /// Which.
        path: PathBuf,
        /// Largest value.
        found: f64,
    },
    /// Fewer head voxels than a mask is to have.
    #[error("the head holds {found} voxels that could respond, --voxels asks for {expected}")]
    Voxels {
        /// Voxels asked for.
        expected: usize,
        /// Voxels there.
        found: usize,
    },
}

/// A grid of the synthetic head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    /// Columns, rows, slices.
    pub(super) sides: [usize; 3],
    /// Along each, millimetres.
    pub(super) voxel_mm: [f64; 3],
}

/// A still head.
#[derive(Debug)]
pub(super) struct Base {
    /// The head; its header is not meant for anybody.
    pub(super) volume: Volume,
    /// Mean brightness of the head, scanner units.
    pub(super) head: f64,
    /// Above this a voxel belongs to the head, scanner units.
    limit: f32,
}

impl Base {
    /// An ellipsoid with some texture, in the middle of the field of view.
    pub(super) fn synthetic(grid: Grid) -> Base {
        let [columns, rows, slices] = grid.sides;
        let middle: [f64; 3] = std::array::from_fn(|axis| {
            -(count(grid.sides[axis]) - 1.0) / 2.0 * grid.voxel_mm[axis]
        });
        let affine_lps = [
            [grid.voxel_mm[0], 0.0, 0.0, middle[0]],
            [0.0, grid.voxel_mm[1], 0.0, middle[1]],
            [0.0, 0.0, grid.voxel_mm[2], middle[2]],
            [0.0, 0.0, 0.0, 1.0],
        ];
        let half: [f64; 3] = std::array::from_fn(|axis| {
            HALF_AXES[axis] * count(grid.sides[axis]) * grid.voxel_mm[axis]
        });
        let voxels = Array3::from_shape_fn((slices, rows, columns), |(slice, row, column)| {
            let index = [column, row, slice];
            let place =
                std::array::from_fn(|axis| middle[axis] + count(index[axis]) * grid.voxel_mm[axis]);
            brightness(place, half)
        });
        Base::of(voxels, affine_lps)
    }

    /// A volume from a NIfTI file, its rows turned round where its axes are left-handed.
    pub(super) fn read(path: &Path) -> Result<Base, BaseError> {
        let io = |source| BaseError::Io {
            path: path.into(),
            source,
        };
        let found = std::fs::metadata(path).map_err(io)?.len();
        if found > MAX_BYTES {
            let path = path.into();
            return Err(BaseError::TooLarge { path, found });
        }
        let bytes = std::fs::read(path).map_err(io)?;
        let image = nifti::read(&bytes).map_err(|source| BaseError::Nifti {
            path: path.into(),
            source,
        })?;
        let brightest = image.values.iter().copied().fold(0.0, f64::max);
        if !BRIGHTEST.contains(&brightest) {
            let (path, found) = (path.into(), brightest);
            return Err(BaseError::Brightness { path, found });
        }
        let mut affine = image.affine_ras;
        for row in &mut affine[..2] {
            for value in row {
                *value = -*value;
            }
        }
        let mut voxels = image.values.reversed_axes();
        if determinant(&affine) < 0.0 {
            let last = count(voxels.shape()[1]) - 1.0;
            voxels.invert_axis(ndarray::Axis(1));
            for row in &mut affine {
                row[3] += row[1] * last;
                row[1] = -row[1];
            }
        }
        // What is no number is air.
        let voxels = voxels.mapv(|value| single(value.max(0.0)));
        Ok(Base::of(voxels.as_standard_layout().into_owned(), affine))
    }

    fn of(voxels: Array3<f32>, affine_lps: Affine) -> Base {
        let mut sorted: Vec<f32> = voxels.iter().copied().collect();
        let bright = sorted.len() - 1 - sorted.len() / 50;
        let (_, bright, _) = sorted.select_nth_unstable_by(bright, f32::total_cmp);
        let limit = *bright * single(HEAD_SHARE);
        let head: Vec<f64> = voxels
            .iter()
            .filter(|value| **value > limit)
            .map(|value| f64::from(*value))
            .collect();
        Base {
            head: head.iter().sum::<f64>() / count(head.len().max(1)),
            limit,
            volume: Volume {
                voxels,
                affine_lps,
                header: VolumeHeader {
                    series_uid: SeriesUid::new(""),
                    patient: PatientTag::default(),
                    acquisition: 1,
                    instance: None,
                    tr_ms: 0.0,
                    slice_times_ms: None,
                    time_ms: None,
                },
            },
        }
    }

    /// Columns, rows, slices.
    pub(super) fn sides(&self) -> [usize; 3] {
        let (slices, rows, columns) = self.volume.voxels.dim();
        [columns, rows, slices]
    }

    /// `(column, row, slice)` to RAS, millimetres.
    pub(super) fn affine_ras(&self) -> Affine {
        let mut affine = self.volume.affine_lps;
        for row in &mut affine[..2] {
            for value in row {
                *value = -*value;
            }
        }
        affine
    }

    /// The middle of the grid, RAS, millimetres: what rotations are about.
    pub(super) fn centre_ras(&self) -> [f64; 3] {
        let middle = self.sides().map(|side| (count(side) - 1.0) / 2.0);
        let [l, p, s] = self.volume.position_lps(middle);
        [-l, -p, s]
    }

    /// Length of one step along columns, rows and slices, millimetres.
    pub(super) fn voxel_mm(&self) -> [f64; 3] {
        let affine = &self.volume.affine_lps;
        std::array::from_fn(|axis| {
            (0..3)
                .map(|row| affine[row][axis].powi(2))
                .sum::<f64>()
                .sqrt()
        })
    }

    /// The `wanted` voxels `[column, row, slice]` nearest to the back of the head.
    pub(super) fn responding(&self, wanted: usize) -> Result<Vec<[usize; 3]>, BaseError> {
        let [_, _, slices] = self.sides();
        let mut places: Vec<([f64; 3], [usize; 3])> = Vec::new();
        for ((slice, row, column), value) in self.volume.voxels.indexed_iter() {
            // The outermost slices leave the field of view first.
            if *value > self.limit && slice > 0 && slice + 1 < slices {
                let index = [column, row, slice];
                places.push((self.volume.position_lps(index.map(count)), index));
            }
        }
        if places.len() < wanted {
            return Err(BaseError::Voxels {
                expected: wanted,
                found: places.len(),
            });
        }
        let mean = |axis: usize| {
            places.iter().map(|(place, _)| place[axis]).sum::<f64>() / count(places.len())
        };
        let centre = [mean(0), mean(1), mean(2)];
        let spread = places
            .iter()
            .map(|(place, _)| (place[1] - centre[1]).powi(2));
        let spread = (spread.sum::<f64>() / count(places.len())).sqrt();
        // Of an ellipsoid, sqrt(5) times the spread is the half axis.
        let focus = [
            centre[0],
            centre[1] + 0.73 * 5.0_f64.sqrt() * spread,
            centre[2],
        ];
        let away = |place: &[f64; 3]| -> f64 {
            (0..3).map(|axis| (place[axis] - focus[axis]).powi(2)).sum()
        };
        places.sort_by(|(a, _), (b, _)| away(a).total_cmp(&away(b)));
        let mut nearest: Vec<_> = places.into_iter().take(wanted).map(|(_, v)| v).collect();
        nearest.sort_unstable();
        Ok(nearest)
    }
}

/// Brightness of the synthetic head at a place, LPS, millimetres from its middle.
fn brightness(place: [f64; 3], half: [f64; 3]) -> f32 {
    let [x, y, z] = place;
    let radius: f64 = (0..3).map(|axis| (place[axis] / half[axis]).powi(2)).sum();
    let inside = 1.0 / (1.0 + ((radius.sqrt() - 1.0) * 16.0).exp());
    let texture = 1.0
        + 0.22 * (x / 11.0).sin() * (y / 13.0).cos()
        + 0.16 * (y / 7.0 + z / 9.0).sin()
        + 0.12 * (z / 6.0).cos() * (x / 17.0).cos();
    single(inside * texture * HEAD)
}

fn determinant(affine: &Affine) -> f64 {
    let [a, b, c, _] = affine;
    a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0])
        + a[2] * (b[0] * c[1] - b[1] * c[0])
}

/// A count as a float; those here are far below 2^32.
pub(super) fn count(value: usize) -> f64 {
    f64::from(u32::try_from(value).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: Grid = Grid {
        sides: [64, 64, 27],
        voxel_mm: [3.0, 3.0, 3.5],
    };

    #[test]
    fn synthetic_head_lies_in_the_middle_and_air_around_it() {
        let base = Base::synthetic(GRID);
        assert_eq!(base.sides(), [64, 64, 27]);
        for axis in base.centre_ras() {
            assert!(axis.abs() < 1e-9);
        }
        assert!((700.0..1000.0).contains(&base.head), "{}", base.head);
        assert!(base.volume.voxels[[13, 0, 0]] < 1.0);
        assert!(base.volume.voxels[[13, 32, 32]] > 500.0);
    }

    #[test]
    fn responding_voxels_are_one_patch_at_the_back() {
        let base = Base::synthetic(GRID);
        let voxels = base.responding(500).unwrap();
        assert_eq!(voxels.len(), 500);
        let far = voxels
            .iter()
            .map(|v| base.volume.position_lps(v.map(count)));
        assert!(far.clone().all(|place| place[1] > 20.0));
        assert!(matches!(
            base.responding(200_000),
            Err(BaseError::Voxels { .. })
        ));
    }

    #[test]
    fn base_of_left_handed_axes_keeps_its_places() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base.nii.gz");
        let values = Array3::from_shape_fn((5, 6, 7), |(i, j, k)| {
            u8::try_from(i * 40 + j * 6 + k).unwrap()
        });
        // As dcm2niix writes: left-handed in LPS, right-handed in RAS and the other way round.
        for sign in [1.0, -1.0] {
            let affine = [
                [-3.0, 0.0, 0.0, 6.0],
                [0.0, 3.0 * sign, 0.0, -8.0],
                [0.0, 0.0, 4.0, 2.0],
                [0.0, 0.0, 0.0, 1.0],
            ];
            std::fs::write(&path, nifti::write(&values, &affine).unwrap()).unwrap();
            let base = Base::read(&path).unwrap();
            assert!(determinant(&base.volume.affine_lps) > 0.0);
            for ((i, j, k), value) in values.indexed_iter() {
                let index = [count(i), count(j), count(k)];
                let ras: [f64; 3] = std::array::from_fn(|axis| {
                    (0..3).map(|n| affine[axis][n] * index[n]).sum::<f64>() + affine[axis][3]
                });
                let row = if sign > 0.0 { 5 - j } else { j };
                // Whichever way the rows run, the voxel is where it was.
                let candidates = [j, row];
                let found = candidates.iter().any(|&row| {
                    let [l, p, s] = base.volume.position_lps([count(i), count(row), count(k)]);
                    let same = (l + ras[0]).abs() + (p + ras[1]).abs() + (s - ras[2]).abs() < 1e-4;
                    same && (f64::from(base.volume.voxels[[k, row, i]]) - f64::from(*value)).abs()
                        < 1e-6
                });
                assert!(found, "{i} {j} {k}");
            }
        }
    }

    #[test]
    fn base_too_dark_for_whole_numbers_is_refused_with_its_value() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base.nii.gz");
        let affine = Base::synthetic(GRID).affine_ras();
        std::fs::write(
            &path,
            nifti::write(&Array3::ones((4, 4, 4)), &affine).unwrap(),
        )
        .unwrap();
        let error = Base::read(&path).unwrap_err().to_string();
        assert!(
            error.contains("brightest voxel is 1, expected 100 to 50000"),
            "{error}"
        );
    }
}

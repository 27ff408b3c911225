//! Known motions found again.

use std::io::Read;
use std::time::Instant;

use nalgebra::{Matrix4, Rotation3, Vector3};
use ndarray::Array3;
use rtfmri::interpolation::Interpolation;
use rtfmri::motion::{Realigner, Rigid};
use rtfmri::quality::rms_displacement_mm;
use rtfmri::registration::{Freedom, register};
use rtfmri::{PatientTag, SeriesUid, Volume, VolumeHeader};
use serde_json::Value;

use crate::{json, read, scanner, tolerance};

/// Radius of the sphere that a motion's error is averaged over.
const SPHERE_MM: f64 = 50.0;

/// RMS distance over the sphere between two motions (Jenkinson 1999).
///
/// - `truth`, `found`: RAS to RAS, millimetres.
pub(crate) fn error_mm(truth: &Matrix4<f64>, found: &Matrix4<f64>, centre: Vector3<f64>) -> f64 {
    let off = truth.try_inverse().unwrap() * found - Matrix4::identity();
    let turn = off.fixed_view::<3, 3>(0, 0).into_owned();
    let shift = off.fixed_view::<3, 1>(0, 3) + turn * centre;
    let spread = SPHERE_MM * SPHERE_MM / 5.0 * (turn.transpose() * turn).trace();
    (spread + shift.norm_squared()).sqrt()
}

pub(crate) fn to_matrix(rows: &Value) -> Matrix4<f64> {
    Matrix4::from_fn(|row, column| rows[row][column].as_f64().unwrap())
}

/// The motion of six parameters: `[tx, ty, tz]` mm, `[rx, ry, rz]` degrees, RAS.
pub(crate) fn from_parameters(numbers: &Value, centre: Vector3<f64>) -> Matrix4<f64> {
    let number = |index: usize| numbers[index].as_f64().unwrap();
    let turn = Rotation3::from_euler_angles(
        number(3).to_radians(),
        number(4).to_radians(),
        number(5).to_radians(),
    );
    let shift = Vector3::new(number(0), number(1), number(2)) + centre - turn * centre;
    turn.to_homogeneous().append_translation(&shift)
}

pub(crate) fn to_vector(numbers: &Value) -> Vector3<f64> {
    Vector3::from_fn(|axis, _| numbers[axis].as_f64().unwrap())
}

/// A motion as a matrix from RAS to RAS.
pub(crate) fn ras(motion: &Rigid) -> Matrix4<f64> {
    let matrix = motion.matrix_ras();
    Matrix4::from_fn(|row, column| matrix[row][column])
}

/// The volumes of a 4-D NIfTI file of 16-bit unsigned integers.
fn volumes(packed: &[u8], truth: &Value) -> Vec<Volume> {
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(packed)
        .read_to_end(&mut bytes)
        .unwrap();
    let sides: [usize; 4] =
        std::array::from_fn(|axis| usize::try_from(truth["dim"][axis].as_u64().unwrap()).unwrap());
    let [columns, rows, slices, _] = sides;
    let affine = to_matrix(&truth["affine_ijk_to_ras_mm"]);
    let affine_lps = std::array::from_fn(|row| {
        let sign = if row < 2 { -1.0 } else { 1.0 };
        std::array::from_fn(|column| sign * affine[(row, column)])
    });
    let pixels = bytes[352..].chunks_exact(2);
    let pixels: Vec<f32> = pixels
        .map(|pair| f32::from(u16::from_le_bytes([pair[0], pair[1]])))
        .collect();
    let one = |(number, values): (u32, &[f32])| Volume {
        voxels: Array3::from_shape_vec((slices, rows, columns), values.to_vec()).unwrap(),
        affine_lps,
        header: VolumeHeader {
            series_uid: SeriesUid::new("2.25.1"),
            patient: PatientTag::default(),
            acquisition: number,
            instance: None,
            tr_ms: 1500.0,
            slice_times_ms: None,
            time_ms: None,
        },
    };
    (1..)
        .zip(pixels.chunks_exact(columns * rows * slices))
        .map(one)
        .collect()
}

#[test]
fn known_motions_are_found() {
    let Some(data) = scanner() else { return };
    for set in ["siemens_e11_large", "siemens_e11_small"] {
        let truth = json(data.join(format!("motion/{set}_truth.json")));
        let packed = read(data.join(format!("motion/{set}_bold.nii.gz")));
        let centre = to_vector(&truth["rotation_centre_ras_mm"]);
        let volumes = volumes(&packed, &truth);
        let realigner = Realigner::new(&volumes[0]).unwrap();
        let matrices = truth["matrices_ras"].as_array().unwrap();
        assert_eq!(matrices.len(), volumes.len());
        let start = Instant::now();
        let mut errors = Vec::new();
        let mut motion = Rigid::identity();
        for (volume, truth) in volumes.iter().zip(matrices).skip(1) {
            motion = realigner.realign(volume, &motion).unwrap();
            errors.push(error_mm(&to_matrix(truth), &ras(&motion), centre));
        }
        let each = start.elapsed() / u32::try_from(errors.len()).unwrap();
        errors.sort_by(f64::total_cmp);
        #[expect(clippy::cast_precision_loss, reason = "a few dozen volumes")]
        let mean = errors.iter().sum::<f64>() / errors.len() as f64;
        let worst = errors[errors.len() - 1];
        eprintln!("{set}: mean error {mean:.3} mm, largest {worst:.3} mm, {each:?} a volume");
        assert!(mean <= tolerance::MOTION_MEAN_MM, "{set}");
        assert!(worst <= tolerance::MOTION_WORST_MM, "{set}");
    }
}

/// A real head on another grid, elsewhere, in another contrast.
#[test]
fn known_registration_of_a_real_head_is_found() {
    let Some(data) = scanner() else { return };
    let set = "siemens_e11_small";
    let truth = json(data.join(format!("motion/{set}_truth.json")));
    let packed = read(data.join(format!("motion/{set}_bold.nii.gz")));
    let volumes = volumes(&packed, &truth);
    // Two volumes, so that they do not have the same noise.
    let (trained, session) = (&volumes[0], Interpolation::new(&volumes[20]).unwrap());
    let moved = to_matrix(&truth["matrices_ras"][20]);
    let flip = Matrix4::from_diagonal(&nalgebra::Vector4::new(-1.0, -1.0, 1.0, 1.0));
    let centre = flip.fixed_view::<3, 3>(0, 0) * to_vector(&truth["rotation_centre_ras_mm"]);
    let turn = Rotation3::from_euler_angles(0.1, -0.05, 0.08);
    let shift = Vector3::new(6.0, -9.0, 7.0) + centre - turn * centre;
    let placed = turn.to_homogeneous().append_translation(&shift);
    let plain: fn(f32) -> f32 = |value| 1.7 * value;
    let other: fn(f32) -> f32 = |value| 40.0 + 90.0 * value.max(0.0).powf(0.6);
    for (freedom, stretch, contrast, limit) in [
        (Freedom::Rigid, 1.0, plain, tolerance::REGISTRATION_MM),
        (Freedom::Affine, 1.03, plain, tolerance::REGISTRATION_MM),
        (Freedom::Rigid, 1.0, other, tolerance::OTHER_CONTRAST_MM),
        (Freedom::Affine, 1.03, other, tolerance::OTHER_CONTRAST_MM),
    ] {
        let grow = Matrix4::new_translation(&centre)
            * Matrix4::new_scaling(stretch)
            * Matrix4::new_translation(&-centre);
        let map = placed * grow;
        let spacing = [2.5, 2.5, 3.2];
        // So few slices that the measured volume holds nearly all of them.
        let sides = [14_u32, 70, 70];
        let mut affine_lps = [[0.0; 4]; 4];
        for axis in 0..3 {
            let half = (f64::from(sides[2 - axis]) - 1.0) / 2.0;
            affine_lps[axis][axis] = spacing[axis];
            affine_lps[axis][3] = centre[axis] + 4.0 - half * spacing[axis];
        }
        affine_lps[3][3] = 1.0;
        let [slices, rows, columns] = sides.map(|side| usize::try_from(side).unwrap());
        let mut placed_volume = Volume {
            voxels: Array3::zeros((slices, rows, columns)),
            affine_lps,
            header: trained.header.clone(),
        };
        let places: Vec<[f64; 3]> = placed_volume
            .voxels
            .indexed_iter()
            .map(|((slice, row, column), _)| {
                let index = [column, row, slice].map(|at| f64::from(u32::try_from(at).unwrap()));
                placed_volume.position_lps(index)
            })
            .collect();
        // Where the new volume's places are in the volume that was measured.
        let back = flip * moved * flip * map.try_inverse().unwrap();
        let rows_of = |matrix: &Matrix4<f64>| {
            std::array::from_fn(|row| std::array::from_fn(|column| matrix[(row, column)]))
        };
        let values = session.at(&places, &rows_of(&back));
        let values: Vec<f32> = values.into_iter().map(contrast).collect();
        placed_volume.voxels = Array3::from_shape_vec(placed_volume.voxels.dim(), values).unwrap();
        let start = Instant::now();
        let found = register(trained, &placed_volume, freedom).unwrap();
        let took = start.elapsed();
        let error = rms_displacement_mm(
            &found.matrix_lps(),
            &rows_of(&map),
            centre.into(),
            SPHERE_MM,
        );
        eprintln!("{freedom:?} registration: error {error:.3} mm, {took:?}");
        assert!(error <= limit, "{freedom:?}: {error} mm");
    }
}

//! A rigid motion: six numbers, and the matrices they stand for.

use nalgebra::{Matrix4, Rotation3, Vector3};

use super::MotionError;
use crate::interpolation::{affine, lps_to_ras};
use crate::volume::Affine;

/// Largest motion believed: beyond it the head is not the reference's.
const MAX_SHIFT_MM: f64 = 40.0;
const MAX_TURN_RAD: f64 = 0.6;

/// A rigid motion of the head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rigid {
    rotation: Rotation3<f64>,
    /// Shift of the centre, LPS, millimetres.
    shift: Vector3<f64>,
    /// What the rotation turns about, LPS, millimetres.
    centre: Vector3<f64>,
}

impl Rigid {
    /// No motion.
    #[must_use]
    pub fn identity() -> Self {
        Self {
            rotation: Rotation3::identity(),
            shift: Vector3::zeros(),
            centre: Vector3::zeros(),
        }
    }

    /// The motion of six numbers.
    ///
    /// - `parameters`: as [`Rigid::parameters`] gives them.
    /// - `centre`: what is turned about, LPS, millimetres.
    #[must_use]
    pub fn from_parameters(parameters: [f64; 6], centre: [f64; 3]) -> Self {
        let [l, p, s, about_l, about_p, about_s] = parameters;
        Self {
            rotation: Rotation3::from_euler_angles(about_l, about_p, about_s),
            shift: Vector3::new(l, p, s),
            centre: centre.into(),
        }
    }

    /// The motion as a matrix from LPS to LPS, millimetres.
    #[must_use]
    pub fn matrix_lps(&self) -> Affine {
        affine(&self.homogeneous())
    }

    /// The motion as a matrix from RAS to RAS, millimetres.
    #[must_use]
    pub fn matrix_ras(&self) -> Affine {
        lps_to_ras(&self.matrix_lps())
    }

    /// The six numbers of the motion, for a confound or a plot: the shift of the grid's
    /// centre along L, P and S, millimetres, then the angles about those axes, radians
    /// (turned about L first, S last).
    #[must_use]
    pub fn parameters(&self) -> [f64; 6] {
        let (about_l, about_p, about_s) = self.rotation.euler_angles();
        let [l, p, s] = self.shift.into();
        [l, p, s, about_l, about_p, about_s]
    }

    /// Where a place of the reference is in the volume.
    ///
    /// - `place`: LPS, millimetres.
    #[must_use]
    pub fn apply(&self, place: [f64; 3]) -> [f64; 3] {
        let place = Vector3::from(place) - self.centre;
        (self.rotation * place + self.shift + self.centre).into()
    }

    /// What the rotation turns about, LPS, millimetres.
    pub(crate) fn centre(&self) -> Vector3<f64> {
        self.centre
    }

    pub(crate) fn homogeneous(&self) -> Matrix4<f64> {
        let shift = self.shift + self.centre - self.rotation * self.centre;
        self.rotation.to_homogeneous().append_translation(&shift)
    }

    /// The same motion, its turn about another centre.
    pub(crate) fn about(&self, centre: Vector3<f64>) -> Self {
        Self {
            rotation: self.rotation,
            shift: Vector3::from(self.apply(centre.into())) - centre,
            centre,
        }
    }

    /// This motion after the inverse of a small one about the same centre.
    pub(super) fn after_inverse_of(&self, shift: Vector3<f64>, turn: Vector3<f64>) -> Self {
        let inverse = Rotation3::new(-turn);
        let rotation = self.rotation * inverse;
        Self {
            rotation,
            shift: self.shift - rotation * shift,
            centre: self.centre,
        }
    }

    pub(super) fn check(&self) -> Result<(), MotionError> {
        let (shift_mm, turn_rad) = (self.shift.norm(), self.rotation.angle());
        if shift_mm <= MAX_SHIFT_MM && turn_rad <= MAX_TURN_RAD {
            return Ok(());
        }
        Err(MotionError::TooFar { shift_mm, turn_rad })
    }
}

//! A moving head's files for who measures the front end: no site, no faults, no clock to wait for.

use chrono::NaiveDate;
use rtfmri::{Mask, Volume, mosaic};

use super::base::{Base, Grid, count};
use super::encode::{Format, encode};
use super::motion::Way;
use super::render::{Mix, Scanner, Subject};
use super::session::SimulateError;
use super::site;
use super::stamp::Stamp;
use super::timeline::{Run, plan};

/// Volumes that are rendered; a longer run goes through them to and fro, so that the head never jumps.
const DISTINCT: usize = 36;
const SEED: u64 = 1;
/// Root mean square displacement, millimetres.
const MOTION_MM: f64 = 0.3;
/// As `afterimage simulate` has it where nothing else is asked for.
const MIX: Mix = Mix {
    tsnr: 200.0,
    body_share: 0.3,
    ar1: 0.4,
    fwhm_mm: 5.0,
    drift_percent: 0.5,
};
/// The simulated scanner's field of view from left to right, and its smallest from foot to head,
/// millimetres.
const VIEW_MM: [f64; 2] = [192.0, 94.5];

/// Why there is no moving head.
#[derive(Debug, thiserror::Error)]
#[error("the simulated head cannot be scanned")]
pub(crate) struct HeadError(#[source] SimulateError);

/// A run of a head that moves a little.
pub(crate) struct MovingHead {
    volumes: Vec<Volume>,
    mask: Mask,
    voxel_mm: [f64; 3],
    tr_s: f64,
}

impl MovingHead {
    /// Renders it.
    ///
    /// - `sides`: columns, rows, slices.
    /// - `voxels`: of the mask, at the back of the head.
    pub(crate) fn new(
        sides: [usize; 3],
        voxels: usize,
        tr_s: f64,
    ) -> Result<MovingHead, HeadError> {
        MovingHead::render(sides, voxels, tr_s).map_err(HeadError)
    }

    fn render(sides: [usize; 3], voxels: usize, tr_s: f64) -> Result<MovingHead, SimulateError> {
        let in_plane_mm = VIEW_MM[0] / count(sides[0]);
        let slice_mm = in_plane_mm.max(VIEW_MM[1] / count(sides[2]));
        let voxel_mm = [in_plane_mm, in_plane_mm, slice_mm];
        let base = Base::synthetic(Grid { sides, voxel_mm });
        let mask = site::mask(&base, voxels)?;
        let run = Run {
            volumes: DISTINCT,
            tr_s,
            dummies: 0,
            export_s: 0.0,
            pulse_byte: b'5',
            seed: SEED,
        };
        let timeline = plan(&run, &[])?;
        let way = Way::Walk { rms_mm: MOTION_MM };
        let poses = way.poses(SEED, 0, 0, DISTINCT, tr_s)?;
        let subject = Subject {
            noise: MIX.of(&base),
            base,
            responses: None,
            seed: SEED,
            tr_s,
        };
        let uid = mosaic::series_uid(u128::from(SEED));
        let mut scanner = Scanner::new(subject, &timeline, vec![uid], &[poses]);
        let volumes: Result<Vec<Volume>, _> = timeline
            .deliveries
            .iter()
            .map(|delivery| scanner.volume(delivery))
            .collect();
        Ok(MovingHead {
            volumes: volumes?,
            mask,
            voxel_mm,
            tr_s,
        })
    }

    /// Voxels at the back of the head.
    pub(crate) fn mask(&self) -> &Mask {
        &self.mask
    }

    /// Along columns, rows and slices.
    pub(crate) fn voxel_mm(&self) -> [f64; 3] {
        self.voxel_mm
    }

    /// One volume's mosaic file.
    ///
    /// - `number`: in the run, from 1.
    pub(crate) fn file(&self, number: u32) -> Result<Vec<u8>, HeadError> {
        let at = place(number, self.volumes.len());
        let mut volume = self.volumes[at].clone();
        let began = NaiveDate::default()
            .and_hms_opt(9, 0, 0)
            .unwrap_or_default();
        let after = |volumes: u32| {
            let time_s = std::time::Duration::from_secs_f64(f64::from(volumes) * self.tr_s);
            began + time_s
        };
        let stamp = Stamp {
            began,
            acquired: after(number.saturating_sub(1)),
            created: after(number),
            study: mosaic::series_uid(0).expose().to_owned(),
            series: 1,
            description: "simulated run",
            patient: None,
        };
        volume.header.acquisition = number;
        volume.header.instance = Some(number);
        volume.header.time_ms = Some(stamp.time_ms());
        let files = encode(Format::Mosaic, &volume, &stamp).map_err(|source| {
            HeadError(SimulateError::Encode {
                series: 1,
                volume: at + 1,
                source,
            })
        })?;
        // A mosaic is one file.
        Ok(files.concat())
    }
}

/// Which of `distinct` volumes has a number: to the last one, back to the first, and again.
fn place(number: u32, distinct: usize) -> usize {
    let last = distinct.saturating_sub(1).max(1);
    let turns = 2 * last;
    let at = usize::try_from(number.saturating_sub(1)).unwrap_or(0) % turns;
    at.min(turns - at).min(distinct.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use rtfmri::dicom;

    use super::*;

    #[test]
    fn numbers_go_through_the_volumes_to_and_fro() {
        let places: Vec<usize> = (1..=9).map(|number| place(number, 4)).collect();
        assert_eq!(places, [0, 1, 2, 3, 2, 1, 0, 1, 2]);
        assert_eq!(place(5, 1), 0);
    }

    #[test]
    fn files_are_volumes_of_one_run_with_rising_numbers_and_times() {
        let head = MovingHead::new([24, 28, 10], 60, 1.5).unwrap();
        assert_eq!(head.mask().len(), 60);
        let read = |number| dicom::decode_volume(&head.file(number).unwrap()).unwrap();
        let volumes: Vec<Volume> = [1, 2, 71, 1000].map(read).into();
        for (volume, number) in volumes.iter().zip([1, 2, 71, 1000]) {
            assert_eq!(volume.voxels.dim(), (10, 28, 24));
            assert_eq!(volume.header.acquisition, number);
            let time_ms = 9.0 * 3.6e6 + 1500.0 * f64::from(number - 1);
            assert!((volume.header.time_ms.unwrap() - time_ms).abs() < 1e-6);
            assert_eq!(volume.header.series_uid, volumes[0].header.series_uid);
            assert!(head.mask().check_grid(volume).is_ok());
        }
        assert_ne!(volumes[0].voxels, volumes[1].voxels);
        // Seventy steps are the way there and back.
        assert_eq!(volumes[0].voxels, volumes[2].voxels);
    }
}

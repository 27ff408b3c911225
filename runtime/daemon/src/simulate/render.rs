//! One volume after the other: the base with its answers, its drift and the body's noise, moved
//! rigidly, and then the scanner's noise.

use std::collections::BTreeMap;

use ndarray::Array3;
use rtfmri::volume::Affine;
use rtfmri::{ResampleError, SeriesUid, Volume, VolumeHeader};

use super::base::{Base, count};
use super::motion::{Pose, turned_about_s};
use super::noise::{BodyNoise, NoiseSettings, Purpose, drift, normals, receive, single};
use super::response::Responses;
use super::timeline::{Delivery, Series, Timeline};

/// Largest stored value.
const MOST: f32 = 65_535.0;

/// Who lies in the scanner.
#[derive(Debug)]
pub(super) struct Subject {
    /// The still head.
    pub(super) base: Base,
    /// What it answers, where anything is shown.
    pub(super) responses: Option<Responses>,
    /// What blurs it all.
    pub(super) noise: NoiseSettings,
    /// Draws the noise.
    pub(super) seed: u64,
    /// Seconds.
    pub(super) tr_s: f64,
}

/// One series in the making.
struct Rendering {
    body: BodyNoise,
    /// `[volume]`, share of a voxel's brightness.
    drift: Vec<f64>,
    /// Volumes made so far.
    made: usize,
}

/// The scanner: makes each series' volumes in their order and keeps those still needed.
pub(super) struct Scanner {
    subject: Subject,
    /// As in the timeline.
    series: Vec<Series>,
    uids: Vec<SeriesUid>,
    /// By series and volume; base to volume, LPS, millimetres.
    motion: Vec<Vec<Affine>>,
    renderings: Vec<Rendering>,
    /// How often each volume of each series is still asked for.
    wanted: BTreeMap<(usize, usize), usize>,
    ready: BTreeMap<(usize, usize), Array3<f32>>,
}

impl Scanner {
    /// - `uids`: of each series.
    /// - `poses`: of each series' volumes; a twin's are not looked at.
    pub(super) fn new(
        subject: Subject,
        timeline: &Timeline,
        uids: Vec<SeriesUid>,
        poses: &[Vec<Pose>],
    ) -> Scanner {
        let centre = subject.base.centre_ras();
        let matrix = |pose: &Pose| turned_about_s(&pose.matrix_ras(centre));
        let series = timeline.series.iter().enumerate();
        let renderings = series.map(|(index, series)| Rendering {
            body: BodyNoise::new(&subject.noise),
            drift: drift(subject.seed, index, series.volumes, subject.tr_s),
            made: 0,
        });
        let renderings = renderings.collect();
        let mut wanted = BTreeMap::new();
        for delivery in &timeline.deliveries {
            let source = timeline.series[delivery.series].source;
            *wanted.entry((source, delivery.volume)).or_insert(0) += 1;
        }
        Scanner {
            motion: poses
                .iter()
                .map(|poses| poses.iter().map(matrix).collect())
                .collect(),
            subject,
            series: timeline.series.clone(),
            uids,
            renderings,
            wanted,
            ready: BTreeMap::new(),
        }
    }

    /// The volume that leaves now. Each delivery may be asked for once.
    pub(super) fn volume(&mut self, delivery: &Delivery) -> Result<Volume, ResampleError> {
        let source = self.series[delivery.series].source;
        let place = (source, delivery.volume);
        while !self.ready.contains_key(&place) && self.renderings[source].made < delivery.volume {
            let made = self.renderings[source].made + 1;
            let voxels = self.render(source)?;
            if self.wanted.contains_key(&(source, made)) {
                self.ready.insert((source, made), voxels);
            }
        }
        let left = self.wanted.get_mut(&place);
        let last = left.is_none_or(|left| {
            *left -= 1;
            *left == 0
        });
        let voxels = if last {
            self.wanted.remove(&place);
            self.ready.remove(&place)
        } else {
            self.ready.get(&place).cloned()
        };
        let number = u32::try_from(delivery.volume).unwrap_or(u32::MAX);
        let (slices, ..) = self.subject.base.volume.voxels.dim();
        Ok(Volume {
            voxels: voxels.unwrap_or_default(),
            affine_lps: self.subject.base.volume.affine_lps,
            header: VolumeHeader {
                series_uid: self.uids[delivery.series].clone(),
                acquisition: number,
                instance: Some(number),
                tr_ms: self.subject.tr_s * 1e3,
                // All slices are simulated at the volume's start.
                slice_times_ms: Some(vec![0.0; slices]),
                time_ms: None,
                ..self.subject.base.volume.header.clone()
            },
        })
    }

    /// The next volume of a series, `[slice, row, column]`, whole numbers.
    fn render(&mut self, series: usize) -> Result<Array3<f32>, ResampleError> {
        let Subject {
            base,
            responses,
            noise,
            seed,
            ..
        } = &self.subject;
        let rendering = &mut self.renderings[series];
        let frame = rendering.made;
        rendering.made += 1;
        let drift = rendering.drift.get(frame).copied().unwrap_or(0.0);
        let brightness = single(1.0 + noise.drift * drift);
        let mut moved = base.volume.clone();
        if noise.body > 0.0 {
            let (slices, rows, columns) = moved.voxels.dim();
            let mut drawn = normals(*seed, Purpose::Body, series, frame);
            let body = rendering.body.next([slices, rows, columns], &mut drawn);
            moved.voxels.zip_mut_with(body, |value, body| {
                *value *= brightness + noise.body * body;
            });
        } else {
            moved.voxels *= brightness;
        }
        if let Some(responses) = responses {
            responses.add_to(&mut moved.voxels, frame);
        }
        if let Some(motion) = self.motion.get(series).and_then(|poses| poses.get(frame)) {
            moved = moved.resampled(motion)?;
        }
        let mut drawn = normals(*seed, Purpose::Thermal, series, frame);
        receive(&mut moved.voxels, noise.thermal, MOST, &mut drawn);
        Ok(moved.voxels)
    }
}

/// How much of each kind of noise makes a temporal signal-to-noise ratio.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mix {
    /// Mean over standard deviation of a voxel of the head, over time.
    pub(super) tsnr: f64,
    /// Share of the variance that is the body's, 0 to 1.
    pub(super) body_share: f64,
    /// Correlation of the body's noise from one volume to the next.
    pub(super) ar1: f64,
    /// Its smoothness, full width at half maximum.
    pub(super) fwhm_mm: f64,
    /// Largest drift, per cent of the brightness.
    pub(super) drift_percent: f64,
}

impl Mix {
    /// The noise of a base.
    pub(super) fn of(&self, base: &Base) -> NoiseSettings {
        let share = 1.0 / self.tsnr;
        let [column_mm, row_mm, slice_mm] = base.voxel_mm();
        // A Gaussian's full width at half maximum is sqrt(8 ln 2) standard deviations.
        let std_dev_mm = self.fwhm_mm / (8.0 * std::f64::consts::LN_2).sqrt();
        NoiseSettings {
            thermal: single(base.head * share * (1.0 - self.body_share).sqrt()),
            body: single(share * self.body_share.sqrt()),
            ar1: single(self.ar1),
            std_dev_voxels: [slice_mm, row_mm, column_mm].map(|mm| std_dev_mm / mm),
            drift: self.drift_percent / 100.0,
        }
    }
}

/// The volumes of a run that ends some time after its last stimulus.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a run of minutes; the caller checks the number"
)]
pub(super) fn volumes_until(end_s: f64, tr_s: f64) -> usize {
    (end_s / tr_s).ceil() as usize
}

/// A part of a length, to the byte.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a share below 1 of a file's length"
)]
pub(super) fn part_of(len: usize, share: f64) -> usize {
    (count(len) * share) as usize
}

//! `truth.json`: everything that was simulated, so that any tool can be checked against it.
//!
//! Written before the first volume leaves, whole; the betas beside it in `truth_betas.npy`. Motion
//! is in the convention of [`super::motion`]; `matrices_ras` are from the first volume of their
//! series to each volume, `matrices_from_base_ras` from the base.

use std::collections::BTreeMap;

use rtfmri::volume::Affine;
use serde::Serialize;

use super::arguments::Arguments;
use super::base::count;
use super::motion::Pose;
use super::pace::HeaderClock;
use super::timeline::{Delivery, Injected, Pulse, Role, Timeline};

/// The layout of this file.
pub(super) const VERSION: u32 = 1;
/// Where the betas are.
pub(super) const BETAS_FILE: &str = "truth_betas.npy";

/// The whole file.
#[derive(Debug, Serialize)]
pub(super) struct Truth {
    pub(super) version: u32,
    pub(super) software: String,
    pub(super) seed: u64,
    pub(super) tr_s: f64,
    /// Times faster than the scanner's seconds below.
    pub(super) speed: f64,
    /// What the header's clock shows at 0 s.
    pub(super) began: String,
    /// How much faster it runs, millionths.
    pub(super) clock_drift_ppm: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) head: Option<HeadTruth>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) responses: Option<ResponseTruth>,
    pub(super) series: Vec<SeriesTruth>,
    /// Every byte of the pulse line, lost ones too.
    pub(super) pulses: Vec<Pulse>,
    pub(super) faults: Vec<Injected>,
}

/// The head and its noise.
#[derive(Debug, Serialize)]
pub(super) struct HeadTruth {
    /// Columns, rows, slices.
    pub(super) dim: [usize; 3],
    pub(super) affine_ijk_to_ras_mm: Affine,
    pub(super) rotation_centre_ras_mm: [f64; 3],
    pub(super) slice_timing: &'static str,
    /// Mean over the head, scanner units.
    pub(super) brightness: f64,
    pub(super) tsnr: f64,
    /// Scanner units, standard deviation in each channel.
    pub(super) thermal_sigma: f32,
    /// Share of a voxel's brightness, standard deviation.
    pub(super) body_share: f32,
    pub(super) ar1: f64,
    pub(super) fwhm_mm: f64,
    pub(super) drift_percent: f64,
}

/// What the head answers.
#[derive(Debug, Serialize)]
pub(super) struct ResponseTruth {
    pub(super) betas: &'static str,
    pub(super) unit: &'static str,
    pub(super) hrf: &'static str,
    pub(super) n_trials: usize,
    pub(super) n_mask_voxels: usize,
    /// Largest value of any trial's regressor.
    pub(super) peak_of_regressor: f32,
    pub(super) events: Vec<EventTruth>,
}

/// One stimulus.
#[derive(Debug, Serialize)]
pub(super) struct EventTruth {
    pub(super) onset: f64,
    pub(super) duration: f64,
    pub(super) trial_type: String,
}

/// One series.
#[derive(Debug, Serialize)]
pub(super) struct SeriesTruth {
    /// From 1; also the header's series number.
    pub(super) series: usize,
    pub(super) role: Role,
    /// The series whose volumes these are.
    pub(super) same_volumes_as: usize,
    pub(super) n_volumes: usize,
    /// Start of its first volume, seconds.
    pub(super) first_s: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) series_uid: Option<String>,
    pub(super) volumes: Vec<VolumeTruth>,
    /// Shifts in millimetres and turns in degrees, per volume.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) motion_params_txyz_mm_rxyz_deg: Vec<Pose>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) matrices_ras: Vec<Affine>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) matrices_from_base_ras: Vec<Affine>,
}

/// One volume.
#[derive(Debug, Serialize)]
pub(super) struct VolumeTruth {
    /// From 1.
    pub(super) volume: usize,
    /// Start of its acquisition, seconds.
    pub(super) start_s: f64,
    /// The same as its header says it.
    pub(super) header_time: String,
    /// Each time that it leaves; none where it is dropped.
    pub(super) exports: Vec<ExportTruth>,
}

/// A volume leaves.
#[derive(Debug, Serialize)]
pub(super) struct ExportTruth {
    pub(super) at_s: f64,
    /// The file's name; of a volume in slices with a `*` for the slice.
    pub(super) name: String,
    /// How much of the (last) file is there, where not all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) kept_share: Option<f64>,
}

/// What is true whether the volumes are simulated or files.
///
/// - `name`: what a delivery's file is called.
pub(super) fn of_any_source(
    arguments: &Arguments,
    timeline: &Timeline,
    header_clock: &HeaderClock,
    name: impl Fn(&Delivery) -> String,
) -> Truth {
    let time = |at_s: f64| {
        let time = header_clock.at(at_s);
        time.format("%Y-%m-%dT%H:%M:%S%.6f").to_string()
    };
    let mut exports: BTreeMap<(usize, usize), Vec<ExportTruth>> = BTreeMap::new();
    for delivery in &timeline.deliveries {
        let place = (delivery.series, delivery.volume);
        exports.entry(place).or_default().push(ExportTruth {
            at_s: delivery.at_s,
            name: name(delivery),
            kept_share: delivery.kept_share,
        });
    }
    let series = timeline.series.iter().enumerate().map(|(index, series)| {
        let volumes = (1..=series.volumes).map(|volume| {
            let start_s = series.first_s + count(volume - 1) * arguments.tr;
            VolumeTruth {
                volume,
                start_s,
                header_time: time(start_s),
                exports: exports.remove(&(index, volume)).unwrap_or_default(),
            }
        });
        SeriesTruth {
            series: index + 1,
            role: series.role,
            same_volumes_as: series.source + 1,
            n_volumes: series.volumes,
            first_s: series.first_s,
            series_uid: None,
            volumes: volumes.collect(),
            motion_params_txyz_mm_rxyz_deg: Vec::new(),
            matrices_ras: Vec::new(),
            matrices_from_base_ras: Vec::new(),
        }
    });
    let series = series.collect();
    Truth {
        version: VERSION,
        software: format!("afterimage {}", env!("CARGO_PKG_VERSION")),
        seed: arguments.seed,
        tr_s: arguments.tr,
        speed: arguments.speed,
        began: time(0.0),
        clock_drift_ppm: timeline.clock_drift_ppm,
        head: None,
        responses: None,
        series,
        pulses: timeline.pulses.clone(),
        faults: timeline.faults.clone(),
    }
}

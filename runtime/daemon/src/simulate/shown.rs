//! What is shown and answered: the mask, the events and the betas, from files or drawn.

use std::fs;
use std::path::Path;

use ndarray::Array2;
use rtfmri::Mask;
use rtfmri::events::{self, Event};

use super::arguments::{Arguments, BetasUnit};
use super::base::Base;
use super::noise::single;
use super::response::{ResponseError, of_percent, places};
use super::session::{SimulateError, io};
use super::site::drawn_betas;

/// What a beta of one stands for where nothing else is said.
const RESPONSE_SCANNER: f64 = 25.0;
const RESPONSE_PERCENT: f64 = 2.5;
/// Largest file of betas, bytes.
const MAX_BETAS_BYTES: u64 = 1 << 30;

/// What is shown, and what the head answers.
pub(super) struct Shown {
    /// By onset.
    pub(super) events: Vec<Event>,
    /// `[slice, row, column]` of each voxel.
    pub(super) places: Vec<[usize; 3]>,
    /// `[trial, voxel]`, scanner units.
    pub(super) betas: Array2<f32>,
}

impl Shown {
    /// Reads it from the files that the arguments or the site name.
    ///
    /// Nothing is shown where they name none.
    pub(super) fn read(arguments: &Arguments, base: &Base) -> Result<Option<Shown>, SimulateError> {
        let site = |name: &str| arguments.site.as_ref().map(|site| site.join(name));
        let mask_path = arguments.mask.clone().or_else(|| site("mask.nii"));
        let events_path = arguments.events.clone().or_else(|| site("events.tsv"));
        let needs = |given, needs| Err(SimulateError::Needs { given, needs });
        let (mask_path, events_path) = match (mask_path, events_path) {
            (Some(mask), Some(events)) => (mask, events),
            (Some(_), None) => return needs("mask", "events"),
            (None, Some(_)) => return needs("events", "mask"),
            (None, None) if arguments.betas.is_some() => return needs("betas", "mask"),
            (None, None) => return Ok(None),
        };
        let bytes = fs::read(&mask_path).map_err(io(&mask_path))?;
        let mask = Mask::from_nifti(&bytes).map_err(|source| SimulateError::Mask {
            path: mask_path.clone(),
            source,
        })?;
        if mask.is_empty() {
            return Err(ResponseError::Empty { path: mask_path }.into());
        }
        let bytes = fs::read(&events_path).map_err(io(&events_path))?;
        let events = events::parse(&bytes).map_err(|source| SimulateError::Events {
            path: events_path,
            source,
        })?;
        let places = places(&mask, base)?;
        let known = site("true_betas.npy").filter(|path| path.is_file());
        let betas_path = arguments.betas.clone().or(known);
        let mut betas = match &betas_path {
            Some(path) => read_betas(path, events.len(), mask.len())?,
            None => drawn_betas(arguments.seed, events.len(), mask.len()),
        };
        let usual = match (&arguments.betas, arguments.betas_unit) {
            (Some(_), _) => 1.0,
            (None, BetasUnit::Scanner) => RESPONSE_SCANNER,
            (None, BetasUnit::Percent) => RESPONSE_PERCENT,
        };
        betas *= single(arguments.response.unwrap_or(usual));
        if arguments.betas_unit == BetasUnit::Percent {
            of_percent(&mut betas, &places, base);
        }
        Ok(Some(Shown {
            events,
            places,
            betas,
        }))
    }
}

fn read_betas(path: &Path, trials: usize, voxels: usize) -> Result<Array2<f32>, SimulateError> {
    let wrong = |reason: String| SimulateError::Betas {
        path: path.into(),
        reason,
    };
    let len = fs::metadata(path).map_err(io(path))?.len();
    if len > MAX_BETAS_BYTES {
        return Err(wrong(format!(
            "{len} bytes, at most {MAX_BETAS_BYTES} are read"
        )));
    }
    let bytes = fs::read(path).map_err(io(path))?;
    let values = crate::reconstruct::npy(&bytes).map_err(wrong)?;
    if values.shape() != [trials, voxels] {
        return Err(ResponseError::Betas {
            path: path.into(),
            found: values.shape().to_vec(),
            trials,
            voxels,
        }
        .into());
    }
    let betas = values.into_dimensionality::<ndarray::Ix2>();
    let betas = betas.map_err(|error| wrong(error.to_string()))?;
    match betas.indexed_iter().find(|(_, beta)| !beta.is_finite()) {
        None => Ok(betas),
        Some(((trial, voxel), _)) => Err(ResponseError::NotFinite {
            path: path.into(),
            trial: trial + 1,
            voxel: voxel + 1,
        }
        .into()),
    }
}

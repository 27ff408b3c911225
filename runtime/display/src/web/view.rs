//! The JSON the pages read. Nothing in it names a person or a stimulus.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;

use crate::board::{
    Board, Entry, Fault, Kind, MAX_TRIALS, Progress, RoleState, SessionInfo, Trial, unix_ms,
};

/// One picture of a trial.
#[derive(Serialize)]
pub(super) struct PictureView {
    kind: Kind,
    /// Path and version: another picture in its place has another address.
    url: String,
    width: u32,
    height: u32,
    len_bytes: usize,
    tier: String,
    decoded_in_ms: u32,
    seed: String,
    steps: u32,
    fidelity: String,
    shown_at_ms: u64,
}

/// One trial and its pictures, coarsest first.
#[derive(Serialize)]
pub(super) struct TrialView {
    run: u32,
    trial: u32,
    stimulus_at_ms: Option<u64>,
    /// What the decoder says is in the picture.
    caption: Option<String>,
    kinds: Vec<PictureView>,
}

/// What the bedside page shows.
#[derive(Serialize)]
pub(super) struct Newest {
    pub(super) revision: u64,
    server_time_ms: u64,
    label: Option<String>,
    random_weights: Option<bool>,
    run: Option<u32>,
    tr_ms: Option<f64>,
    volume: Option<u32>,
    trial: Option<TrialView>,
}

/// Everything on the board.
#[derive(Serialize)]
pub(super) struct All {
    revision: u64,
    server_time_ms: u64,
    session: Option<SessionInfo>,
    progress: Option<Progress>,
    max_trials: usize,
    /// Newest last.
    trials: Vec<TrialView>,
    roles: BTreeMap<String, RoleState>,
    /// Newest last.
    faults: VecDeque<Fault>,
}

/// A sign of life.
#[derive(Serialize)]
pub(super) struct Beat {
    server_time_ms: u64,
}

/// Whether the server answers, and with how much to do.
#[derive(Serialize)]
pub(super) struct Health {
    status: &'static str,
    version: &'static str,
    server_time_ms: u64,
    revision: u64,
    trials: usize,
    watchers: usize,
}

pub(super) fn newest(board: &Board) -> Newest {
    let state = board.read();
    Newest {
        revision: state.revision,
        server_time_ms: unix_ms(),
        label: state.session.as_ref().map(|session| session.label.clone()),
        random_weights: state.session.as_ref().map(|session| session.random_weights),
        run: state.progress.map(|progress| progress.run),
        tr_ms: state.progress.and_then(|progress| progress.tr_ms),
        volume: state.progress.and_then(|progress| progress.volume),
        trial: state
            .trials
            .last_key_value()
            .map(|(&at, trial)| trial_view(board, at, trial)),
    }
}

pub(super) fn all(board: &Board) -> All {
    let state = board.read();
    All {
        revision: state.revision,
        server_time_ms: unix_ms(),
        session: state.session.clone(),
        progress: state.progress,
        max_trials: MAX_TRIALS,
        trials: state
            .trials
            .iter()
            .map(|(&at, trial)| trial_view(board, at, trial))
            .collect(),
        roles: state.roles.clone(),
        faults: state.faults.clone(),
    }
}

pub(super) fn beat() -> Beat {
    Beat {
        server_time_ms: unix_ms(),
    }
}

pub(super) fn health(board: &Board, watchers: usize) -> Health {
    let state = board.read();
    Health {
        status: "ok",
        version: env!("CARGO_PKG_VERSION"),
        server_time_ms: unix_ms(),
        revision: state.revision,
        trials: state.trials.len(),
        watchers,
    }
}

fn trial_view(board: &Board, (run, trial): (u32, u32), content: &Trial) -> TrialView {
    TrialView {
        run,
        trial,
        stimulus_at_ms: content.stimulus_at_ms,
        caption: content.caption.clone(),
        kinds: content
            .pictures
            .iter()
            .map(|(&kind, entry)| picture_view(board, (run, trial), kind, entry))
            .collect(),
    }
}

fn picture_view(board: &Board, (run, trial): (u32, u32), kind: Kind, entry: &Entry) -> PictureView {
    PictureView {
        kind,
        url: format!(
            "/pictures/{run}/{trial}/{}?v={}",
            kind.name(),
            board.version(entry)
        ),
        width: entry.width,
        height: entry.height,
        len_bytes: entry.png.len(),
        tier: entry.tier.clone(),
        decoded_in_ms: entry.decoded_in_ms,
        seed: entry.seed.clone(),
        steps: entry.steps,
        fidelity: entry.fidelity.clone(),
        shown_at_ms: entry.shown_at_ms,
    }
}

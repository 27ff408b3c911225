//! What the pages show: the newest pictures, the run's progress, the faults.
//!
//! A [`Board`] is a handle to one bounded state. Whoever decodes writes to it from any thread and
//! never waits for a browser; pages are told that something changed and read the newest state, so
//! a slow one misses what lies between and nothing piles up.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use serde::Serialize;
use tokio::sync::watch;

use crate::png::{self, PngError};

/// Trials kept; the oldest goes first.
pub const MAX_TRIALS: usize = 64;
/// Largest picture taken, bytes of PNG.
pub const MAX_PICTURE_BYTES: usize = 8 << 20;
/// Most that all pictures together may take; the oldest trial goes first.
pub const MAX_TOTAL_BYTES: usize = 256 << 20;
/// Faults kept; the oldest goes first.
pub const MAX_FAULTS: usize = 64;
/// Roles kept; the box has four.
pub const MAX_ROLES: usize = 16;
/// Longest text kept, in characters; a longer one ends in an ellipsis.
pub const MAX_TEXT_CHARS: usize = 400;

/// How far a picture has come, coarsest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The low-level picture straight from the brain's response.
    Blurry,
    /// The diffusion model's picture, before refinement.
    Unrefined,
    /// The refined picture, blended with the low-level one.
    Refined,
}

impl Kind {
    /// Every kind, coarsest first.
    pub const ALL: [Kind; 3] = [Kind::Blurry, Kind::Unrefined, Kind::Refined];

    /// The name in addresses and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Blurry => "blurry",
            Kind::Unrefined => "unrefined",
            Kind::Refined => "refined",
        }
    }

    /// The kind of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// Whether a role's process answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RoleState {
    /// It answers.
    Up,
    /// It is gone or silent.
    Down,
}

/// The visit whose pictures are shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SessionInfo {
    /// Tells one session from another.
    pub id: String,
    /// What the page calls the session; never a patient's name.
    pub label: String,
    /// The model was never trained, so its pictures mean nothing.
    pub random_weights: bool,
    /// Name and version of the model bundle.
    pub bundle: String,
}

/// One decoded picture.
#[derive(Clone, PartialEq, Eq)]
pub struct Shown {
    /// The run it belongs to.
    pub run: u32,
    /// The trial of that run.
    pub trial: u32,
    /// How far it has come.
    pub kind: Kind,
    /// Which of the trial's decodings this is, such as `fast` or `slow`.
    pub tier: String,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// The picture as a PNG file.
    pub png: Vec<u8>,
    /// When the stimulus appeared, Unix milliseconds.
    pub stimulus_at_ms: Option<u64>,
    /// How long decoding took, milliseconds.
    pub decoded_in_ms: u32,
    /// Seed of the sampler's noise; text, since JSON numbers do not hold 64 bits.
    pub seed: String,
    /// Sampler steps.
    pub steps: u32,
    /// The manifest's sampler section that was used.
    pub fidelity: String,
}

impl std::fmt::Debug for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shown")
            .field("run", &self.run)
            .field("trial", &self.trial)
            .field("kind", &self.kind)
            .field("tier", &self.tier)
            .field("len_bytes", &self.png.len())
            .finish_non_exhaustive()
    }
}

/// Why a picture is not shown.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// A file above [`MAX_PICTURE_BYTES`].
    #[error(
        "the picture of run {run}, trial {trial} has {found} bytes, expected at most {MAX_PICTURE_BYTES}"
    )]
    TooLarge {
        /// Its run.
        run: u32,
        /// Its trial.
        trial: u32,
        /// Its length.
        found: usize,
    },
    /// Not a PNG file.
    #[error("the picture of run {run}, trial {trial} is not a PNG file")]
    NotPng {
        /// Its run.
        run: u32,
        /// Its trial.
        trial: u32,
        /// What is wrong with it.
        source: PngError,
    },
    /// A file of another size than announced.
    #[error(
        "the picture of run {run}, trial {trial} is {found_width} x {found_height}, \
         announced as {width} x {height}"
    )]
    Size {
        /// Its run.
        run: u32,
        /// Its trial.
        trial: u32,
        /// Columns announced.
        width: u32,
        /// Rows announced.
        height: u32,
        /// Columns in the file.
        found_width: u32,
        /// Rows in the file.
        found_height: u32,
    },
    /// The board is full of newer trials.
    #[error(
        "run {run}, trial {trial} is older than the {kept} trials on the board, \
         which begin at run {oldest_run}, trial {oldest_trial}"
    )]
    Older {
        /// Its run.
        run: u32,
        /// Its trial.
        trial: u32,
        /// Trials kept.
        kept: usize,
        /// Run of the oldest.
        oldest_run: u32,
        /// Trial of the oldest.
        oldest_trial: u32,
    },
}

/// A picture on the board.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) revision: u64,
    pub(crate) tier: String,
    pub(crate) width: u32,
    pub(crate) height: u32,
    pub(crate) png: Bytes,
    pub(crate) decoded_in_ms: u32,
    pub(crate) seed: String,
    pub(crate) steps: u32,
    pub(crate) fidelity: String,
    pub(crate) shown_at_ms: u64,
}

/// A trial on the board, with its newest picture of each kind.
#[derive(Default)]
pub(crate) struct Trial {
    pub(crate) stimulus_at_ms: Option<u64>,
    pub(crate) caption: Option<String>,
    pub(crate) pictures: BTreeMap<Kind, Entry>,
}

impl Trial {
    fn len_bytes(&self) -> usize {
        self.pictures.values().map(|entry| entry.png.len()).sum()
    }
}

/// A sentence for the operator.
#[derive(Clone, Serialize)]
pub(crate) struct Fault {
    pub(crate) at_ms: u64,
    pub(crate) text: String,
}

/// How far the newest run has come.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Progress {
    pub(crate) run: u32,
    pub(crate) tr_ms: Option<f64>,
    pub(crate) volume: Option<u32>,
}

/// Everything the pages read.
#[derive(Default)]
pub(crate) struct State {
    /// Grows with every change.
    pub(crate) revision: u64,
    pub(crate) session: Option<SessionInfo>,
    pub(crate) progress: Option<Progress>,
    /// By run and trial, so the last is the newest.
    pub(crate) trials: BTreeMap<(u32, u32), Trial>,
    pub(crate) faults: VecDeque<Fault>,
    pub(crate) roles: BTreeMap<String, RoleState>,
}

struct Shared {
    state: Mutex<State>,
    changed: watch::Sender<()>,
    /// Sets this board's picture versions apart from those of an earlier process.
    opened_at_ms: u64,
}

/// A handle to what the pages show; clones share it.
///
/// ```
/// use display::{Board, Kind, SessionInfo, Shown, png};
///
/// let board = Board::new();
/// board.session(SessionInfo {
///     id: "1".into(),
///     label: "session 3".to_owned(),
///     random_weights: false,
///     bundle: "edge 1.2".to_owned(),
/// });
/// board.run_started(1, 1500.0);
/// board.picture(Shown {
///     run: 1,
///     trial: 1,
///     kind: Kind::Blurry,
///     tier: "fast".to_owned(),
///     width: 2,
///     height: 2,
///     png: png::encode(2, 2, &[128; 12], &[("Software", "Afterimage")])?,
///     stimulus_at_ms: None,
///     decoded_in_ms: 40,
///     seed: "17".to_owned(),
///     steps: 4,
///     fidelity: "edge".to_owned(),
/// })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Board {
    shared: Arc<Shared>,
}

impl Default for Board {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.read();
        write!(
            f,
            "Board(revision {}, {} trials)",
            state.revision,
            state.trials.len()
        )
    }
}

impl Board {
    /// An empty board.
    #[must_use]
    pub fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(State::default()),
                changed: watch::Sender::new(()),
                opened_at_ms: unix_ms(),
            }),
        }
    }

    /// Announces the session.
    ///
    /// Another id than before clears pictures, progress and faults, so that nobody sees the
    /// previous person's pictures; more about the same session, or the same again, clears nothing.
    pub fn session(&self, info: SessionInfo) {
        let info = SessionInfo {
            id: clip(info.id),
            label: clip(info.label),
            random_weights: info.random_weights,
            bundle: clip(info.bundle),
        };
        self.change(|state| {
            let other = state
                .session
                .as_ref()
                .is_none_or(|session| session.id != info.id);
            if other {
                state.progress = None;
                state.trials.clear();
                state.faults.clear();
            }
            state.session = Some(info);
        });
    }

    /// Announces a run and its repetition time.
    ///
    /// Clears nothing: pictures and runs are told by two processes, and either may be first.
    pub fn run_started(&self, run: u32, tr_ms: f64) {
        self.change(|state| match &mut state.progress {
            // A role that came back announces the run it is still in.
            Some(progress) if progress.run == run => progress.tr_ms = Some(tr_ms),
            _ => {
                state.progress = Some(Progress {
                    run,
                    tr_ms: Some(tr_ms),
                    volume: None,
                });
            }
        });
    }

    /// Counts a volume; one of an earlier run than the newest is not counted.
    pub fn volume(&self, run: u32, volume: u32) {
        self.change(|state| match &mut state.progress {
            Some(progress) if progress.run == run => progress.volume = Some(volume),
            Some(progress) if progress.run > run => {
                tracing::debug!(run, volume, "volume of an earlier run not counted");
            }
            _ => {
                state.progress = Some(Progress {
                    run,
                    tr_ms: None,
                    volume: Some(volume),
                });
            }
        });
    }

    /// Shows a picture, in place of an earlier one of the same run, trial and kind.
    ///
    /// # Errors
    /// [`BoardError::TooLarge`], [`BoardError::NotPng`] and [`BoardError::Size`] for a file that no
    /// page should get, [`BoardError::Older`] for a trial older than all on a full board.
    pub fn picture(&self, shown: Shown) -> Result<(), BoardError> {
        let (run, trial) = (shown.run, shown.trial);
        if shown.png.len() > MAX_PICTURE_BYTES {
            return Err(BoardError::TooLarge {
                run,
                trial,
                found: shown.png.len(),
            });
        }
        let (found_width, found_height) =
            png::size(&shown.png).map_err(|source| BoardError::NotPng { run, trial, source })?;
        if (found_width, found_height) != (shown.width, shown.height) {
            return Err(BoardError::Size {
                run,
                trial,
                width: shown.width,
                height: shown.height,
                found_width,
                found_height,
            });
        }
        let kind = shown.kind;
        let stimulus_at_ms = shown.stimulus_at_ms;
        let mut entry = Entry {
            revision: 0,
            tier: clip(shown.tier),
            width: shown.width,
            height: shown.height,
            png: Bytes::from(shown.png),
            decoded_in_ms: shown.decoded_in_ms,
            seed: clip(shown.seed),
            steps: shown.steps,
            fidelity: clip(shown.fidelity),
            shown_at_ms: unix_ms(),
        };
        self.change(|state| {
            let kept = state.trials.len();
            if let Some((&(oldest_run, oldest_trial), _)) = state.trials.first_key_value()
                && kept >= MAX_TRIALS
                && (run, trial) < (oldest_run, oldest_trial)
            {
                return Err(BoardError::Older {
                    run,
                    trial,
                    kept,
                    oldest_run,
                    oldest_trial,
                });
            }
            entry.revision = state.revision;
            let place = state.trials.entry((run, trial)).or_default();
            place.stimulus_at_ms = stimulus_at_ms.or(place.stimulus_at_ms);
            place.pictures.insert(kind, entry);
            state.drop_oldest();
            Ok(())
        })
    }

    /// Describes the pictures of a trial that is on the board; of another one there is nothing to
    /// describe. The words come from the decoder, never from the stimulus.
    pub fn caption(&self, run: u32, trial: u32, text: String) {
        let text = clip(text);
        self.change(|state| match state.trials.get_mut(&(run, trial)) {
            Some(place) => place.caption = Some(text),
            None => tracing::debug!(run, trial, "caption of a trial without pictures not shown"),
        });
    }

    /// Keeps a sentence for the operator.
    pub fn fault(&self, text: String) {
        let fault = Fault {
            at_ms: unix_ms(),
            text: clip(text),
        };
        self.change(|state| {
            if state.faults.len() >= MAX_FAULTS {
                state.faults.pop_front();
            }
            state.faults.push_back(fault);
        });
    }

    /// Says which roles answer, in place of what was said before.
    pub fn roles(&self, roles: BTreeMap<String, RoleState>) {
        if roles.len() > MAX_ROLES {
            tracing::warn!(
                found = roles.len(),
                limit = MAX_ROLES,
                "roles above the limit not shown"
            );
        }
        let roles = roles
            .into_iter()
            .take(MAX_ROLES)
            .map(|(name, state)| (clip(name), state))
            .collect();
        self.change(|state| state.roles = roles);
    }

    /// Marked as changed whenever the board changes; what lies between two looks is one change.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.shared.changed.subscribe()
    }

    /// The state, locked: to be read and let go, never held across an `await`.
    pub(crate) fn read(&self) -> MutexGuard<'_, State> {
        // No change to the state can panic halfway, so a poisoned lock guards a whole state.
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// One picture's file and its version, unique to this board.
    pub(crate) fn file(&self, run: u32, trial: u32, kind: Kind) -> Option<(Bytes, String)> {
        let state = self.read();
        let entry = state.trials.get(&(run, trial))?.pictures.get(&kind)?;
        Some((entry.png.clone(), self.version(entry)))
    }

    /// Tells a picture from every other one that had its address.
    pub(crate) fn version(&self, entry: &Entry) -> String {
        format!("{:x}-{:x}", self.shared.opened_at_ms, entry.revision)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.read();
        state.revision += 1;
        let result = change(&mut state);
        drop(state);
        self.shared.changed.send_replace(());
        result
    }
}

impl State {
    fn drop_oldest(&mut self) {
        let mut len_bytes: usize = self.trials.values().map(Trial::len_bytes).sum();
        while self.trials.len() > MAX_TRIALS || len_bytes > MAX_TOTAL_BYTES {
            let Some((_, trial)) = self.trials.pop_first() else {
                return;
            };
            len_bytes -= trial.len_bytes();
        }
    }
}

/// The time of day, Unix milliseconds.
pub(crate) fn unix_ms() -> u64 {
    // A clock before 1970 is shown as 1970: the page then counts from a wrong time, nothing else.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
}

fn clip(text: String) -> String {
    match text.char_indices().nth(MAX_TEXT_CHARS) {
        None => text,
        Some(_) => text.chars().take(MAX_TEXT_CHARS - 1).chain(['…']).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(run: u32, trial: u32, kind: Kind) -> Shown {
        Shown {
            run,
            trial,
            kind,
            tier: "fast".to_owned(),
            width: 2,
            height: 1,
            png: png::encode(2, 1, &[1, 2, 3, 4, 5, 6], &[]).unwrap(),
            stimulus_at_ms: Some(1_000),
            decoded_in_ms: 12,
            seed: u64::MAX.to_string(),
            steps: 4,
            fidelity: "edge".to_owned(),
        }
    }

    fn info(label: &str) -> SessionInfo {
        SessionInfo {
            id: label.into(),
            label: label.to_owned(),
            random_weights: true,
            bundle: "edge 1".to_owned(),
        }
    }

    #[test]
    fn newest_64_trials_are_kept() {
        let board = Board::new();
        for trial in 0..100 {
            board.picture(shown(1, trial, Kind::Blurry)).unwrap();
            board.picture(shown(1, trial, Kind::Unrefined)).unwrap();
        }
        let state = board.read();
        let kept: Vec<_> = state.trials.keys().copied().collect();
        assert_eq!(kept, (36..100).map(|trial| (1, trial)).collect::<Vec<_>>());
    }

    #[test]
    fn picture_older_than_a_full_board_is_refused() {
        let board = Board::new();
        for trial in 1..=64 {
            board.picture(shown(2, trial, Kind::Blurry)).unwrap();
        }
        assert!(matches!(
            board.picture(shown(1, 90, Kind::Blurry)),
            Err(BoardError::Older {
                oldest_run: 2,
                oldest_trial: 1,
                ..
            })
        ));
        board.picture(shown(2, 1, Kind::Unrefined)).unwrap();
    }

    #[test]
    fn all_pictures_together_are_bounded() {
        let board = Board::new();
        let mut large = shown(1, 0, Kind::Blurry);
        // Bytes behind the end of a PNG are not read, so this stands for a picture of that size.
        large.png.resize(MAX_PICTURE_BYTES, 0);
        for trial in 0..40 {
            let mut shown = large.clone();
            shown.trial = trial;
            board.picture(shown).unwrap();
        }
        let state = board.read();
        assert_eq!(state.trials.len(), MAX_TOTAL_BYTES / MAX_PICTURE_BYTES);
        assert!(state.trials.contains_key(&(1, 39)));
    }

    #[test]
    fn picture_above_8_mib_is_refused() {
        let board = Board::new();
        let mut large = shown(1, 2, Kind::Blurry);
        large.png.resize(MAX_PICTURE_BYTES + 1, 0);
        let error = board.picture(large).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the picture of run 1, trial 2 has 8388609 bytes, expected at most 8388608"
        );
        assert!(board.read().trials.is_empty());
    }

    #[test]
    fn file_that_is_no_png_or_of_another_size_is_refused() {
        let board = Board::new();
        let mut text = shown(1, 1, Kind::Blurry);
        text.png = b"<script>".to_vec();
        assert!(matches!(
            board.picture(text),
            Err(BoardError::NotPng { .. })
        ));
        let mut wide = shown(1, 1, Kind::Blurry);
        wide.width = 3;
        assert!(matches!(board.picture(wide), Err(BoardError::Size { .. })));
    }

    #[test]
    fn later_picture_replaces_the_earlier_under_a_new_version() {
        let board = Board::new();
        board.picture(shown(1, 1, Kind::Blurry)).unwrap();
        let (_, first) = board.file(1, 1, Kind::Blurry).unwrap();
        let mut slow = shown(1, 1, Kind::Blurry);
        slow.tier = "slow".to_owned();
        slow.stimulus_at_ms = None;
        board.picture(slow).unwrap();
        let (_, second) = board.file(1, 1, Kind::Blurry).unwrap();
        assert_ne!(first, second);
        let state = board.read();
        assert_eq!(state.trials[&(1, 1)].pictures[&Kind::Blurry].tier, "slow");
        assert_eq!(state.trials[&(1, 1)].stimulus_at_ms, Some(1_000));
    }

    #[test]
    fn another_session_clears_the_pictures_and_the_same_one_keeps_them() {
        let board = Board::new();
        board.session(info("a"));
        board.run_started(1, 1500.0);
        board.picture(shown(1, 1, Kind::Blurry)).unwrap();
        board.fault("the scanner folder is gone".to_owned());
        board.session(info("a"));
        assert_eq!(board.read().trials.len(), 1);
        board.session(info("b"));
        let state = board.read();
        assert!(state.trials.is_empty() && state.faults.is_empty() && state.progress.is_none());
    }

    #[test]
    fn newest_64_faults_are_kept_and_long_ones_cut() {
        let board = Board::new();
        for fault in 0..70 {
            board.fault(format!("fault {fault}"));
        }
        board.fault("é".repeat(1_000));
        let state = board.read();
        assert_eq!(state.faults.len(), MAX_FAULTS);
        assert_eq!(state.faults[0].text, "fault 7");
        let last = &state.faults[MAX_FAULTS - 1].text;
        assert_eq!(last.chars().count(), MAX_TEXT_CHARS);
        assert!(last.ends_with('…'));
    }

    #[test]
    fn volumes_count_in_the_newest_run_only() {
        let board = Board::new();
        board.run_started(2, 1500.0);
        board.volume(2, 7);
        board.volume(1, 200);
        board.run_started(2, 1500.0);
        let progress = board.read().progress.unwrap();
        assert_eq!((progress.run, progress.volume), (2, Some(7)));
        board.volume(3, 1);
        let progress = board.read().progress.unwrap();
        assert_eq!((progress.run, progress.tr_ms), (3, None));
    }

    #[test]
    fn an_announced_run_clears_nothing() {
        let board = Board::new();
        for run in [1, 2] {
            board.picture(shown(run, 1, Kind::Blurry)).unwrap();
        }
        board.run_started(1, 1500.0);
        assert!(board.read().trials.keys().eq(&[(1, 1), (2, 1)]));
    }

    #[test]
    fn many_changes_are_one_notice() {
        let board = Board::new();
        let mut changes = board.changes();
        for volume in 0..1_000 {
            board.volume(1, volume);
        }
        assert!(changes.has_changed().unwrap());
        changes.borrow_and_update();
        assert!(!changes.has_changed().unwrap());
    }
}

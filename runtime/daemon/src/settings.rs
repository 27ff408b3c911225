//! Settings: defaults, then the board's file, then the site's, then the environment; checked once.
//!
//! Nothing past [`Settings::load`] sees the raw form, and no port or folder is opened before it.
//! Environment variables are named after the field, `AFTERIMAGE__WEB__LISTEN` for `web.listen`.

mod receive;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use config::{Config, Environment, File, FileFormat};
use decoder::Fidelity;
use rtfmri::glm::{Hrf, Noise};
use rtfmri::registration::Freedom;
use serde::Deserialize;
use wire::Tier;

use self::receive::RawReceive;
pub(crate) use self::receive::{Receive, ReceiveTls};
use crate::acquire::TierPlan;
use crate::memory::Feature;
use crate::trigger::{PROTOCOLS, RawTrigger, TriggerSettings};

const DEFAULTS: &str = include_str!("defaults.toml");
/// Longest path of the sockets' folder; a socket's whole name has at most 107 bytes.
const MAX_SOCKET_DIR: usize = 85;
/// Longest settings file that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why the settings are refused. The program exits with 78, so that systemd does not try again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    /// A settings file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A settings file longer than any real one.
    #[error("{path} has {found} bytes, expected at most {MAX_FILE_BYTES}")]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
    },
    /// No file of this board.
    #[error("there is no board {board:?}: looked for {}", listed(.tried))]
    Board {
        /// The board.
        board: String,
        /// Files looked for.
        tried: Vec<PathBuf>,
    },
    /// Unknown field, wrong type, missing field, not TOML.
    #[error("{origin}: {message}")]
    Wrong {
        /// Which files were merged.
        origin: String,
        /// Field and reason.
        message: String,
    },
    /// A value out of its range.
    #[error("{field} = {found} is outside {expected}")]
    Range {
        /// The field.
        field: &'static str,
        /// What it is.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// A path that must be there.
    #[error("{field} = {path} is not there; expected {expected}")]
    Missing {
        /// The field.
        field: &'static str,
        /// As given.
        path: PathBuf,
        /// A file, a folder.
        expected: &'static str,
    },
}

fn listed(paths: &[PathBuf]) -> String {
    let shown: Vec<String> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    shown.join(", ")
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSettings {
    board: String,
    paths: RawPaths,
    session: RawSession,
    scanner: RawScanner,
    receive: RawReceive,
    trigger: RawTrigger,
    task: RawTask,
    subject: RawSubject,
    model: RawModel,
    memory: RawMemory,
    web: RawWeb,
    limits: RawLimits,
    log: RawLog,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPaths {
    state: PathBuf,
    runtime: PathBuf,
    boards: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSession {
    label: String,
    seed: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawScanner {
    folder: PathBuf,
    existing_files: ExistingFiles,
    max_file_mib: u64,
    tr_ms: Option<f64>,
}

/// What becomes of files that lie in the watched folder when a session begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ExistingFiles {
    /// They belong to somebody else.
    Ignore,
    /// They are the beginning of this run.
    Take,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTask {
    events: PathBuf,
    hrf: RawHrf,
    noise: RawNoise,
    tiers: Vec<Tier>,
    fast_s: f64,
    slow_s: f64,
    max_missing_share: f64,
    repeats: RawRepeats,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawRepeats {
    Single,
    Average,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawHrf {
    Glover,
    Spm,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawNoise {
    Ols,
    Ar1,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSubject {
    id: String,
    mask: Option<PathBuf>,
    reference: Option<PathBuf>,
    registration: RawFreedom,
    prior: Option<PathBuf>,
    prior_trials: f64,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawFreedom {
    Rigid,
    Affine,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawModel {
    bundle: PathBuf,
    key: PathBuf,
    fidelity: Fidelity,
    threads: u64,
    onnxruntime: Option<PathBuf>,
    without: Vec<Feature>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMemory {
    limit_mib: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWeb {
    listen: String,
    hosts: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLimits {
    queue: u64,
    parse_timeout_ms: u64,
    parse_memory_mib: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLog {
    format: LogFormat,
    filter: String,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// For people and journald.
    Text,
    /// One JSON object per line.
    Json,
}

/// Checked settings.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Sessions and what must survive a restart.
    pub(crate) state_dir: PathBuf,
    /// Sockets.
    pub(crate) runtime_dir: PathBuf,
    /// What the pages call the session; never a patient's name.
    pub(crate) label: String,
    /// Seed of the session's noise; drawn where absent.
    pub(crate) seed: Option<u64>,
    /// The folder that the scanner exports into.
    pub(crate) folder: PathBuf,
    /// What to do with files found there at the beginning.
    pub(crate) existing_files: ExistingFiles,
    /// The DICOM receiver, where it is asked for.
    pub(crate) receive: Option<Receive>,
    /// Longest scanner file.
    pub(crate) max_file_bytes: u64,
    /// Repetition time that runs must have, milliseconds.
    pub(crate) tr_ms: Option<f64>,
    /// The trigger line, where there is one.
    pub(crate) trigger: Option<TriggerSettings>,
    /// Events of a run.
    pub(crate) events: PathBuf,
    /// Shape of the response.
    pub(crate) hrf: Hrf,
    /// Noise model of the fit.
    pub(crate) noise: Noise,
    /// When trials are decoded.
    pub(crate) tiers: TierPlan,
    /// Largest share of a trial's window that may be missing.
    pub(crate) max_missing_share: f64,
    /// Who lies in the scanner, as the bundle calls them.
    pub(crate) subject: String,
    /// The mask, where the bundle does not carry it.
    pub(crate) mask: Option<PathBuf>,
    /// The volume that mask and model were made on, where runs are registered to it.
    pub(crate) reference: Option<PathBuf>,
    /// What may differ between it and a run.
    pub(crate) registration: Freedom,
    /// Mean and spread of the voxels' betas in earlier sessions.
    pub(crate) prior: Option<PathBuf>,
    /// Trials that they count as.
    pub(crate) prior_trials: f64,
    /// Whether repetitions of a stimulus are averaged.
    pub(crate) average_repeats: bool,
    /// The bundle's folder.
    pub(crate) bundle: PathBuf,
    /// The key that must have signed it.
    pub(crate) key: PathBuf,
    /// Which sampler.
    pub(crate) fidelity: Fidelity,
    /// Threads of the networks.
    pub(crate) threads: usize,
    /// ONNX Runtime's library, where it is not in its usual place.
    pub(crate) onnxruntime: Option<PathBuf>,
    /// What this box does without.
    pub(crate) without: Vec<Feature>,
    /// Memory that the networks may have; the machine's where the board does not say.
    pub(crate) memory_limit_bytes: Option<u64>,
    /// Where the pages are served.
    pub(crate) listen: SocketAddr,
    /// Names, besides loopback's, under which the pages may be asked for.
    pub(crate) hosts: Vec<String>,
    /// Length of every queue between threads and processes.
    pub(crate) queue: usize,
    /// Longest time for one file.
    pub(crate) parse_timeout: Duration,
    /// Address space of the parser.
    pub(crate) parse_memory_bytes: u64,
    /// How log lines look.
    pub(crate) log_format: LogFormat,
    /// Which log lines there are.
    pub(crate) log_filter: String,
}

impl Settings {
    /// Reads, merges and checks.
    ///
    /// # Errors
    /// [`SettingsError`] names the file, the field, what was found and what was expected.
    pub(crate) fn load(site: Option<&Path>) -> Result<Settings, SettingsError> {
        let site_text = site.map(read).transpose()?;
        let origin = match site {
            Some(path) => path.display().to_string(),
            None => "settings (defaults and environment; give a file with --config)".into(),
        };
        let wrong = |error: &dyn std::error::Error| SettingsError::Wrong {
            origin: origin.clone(),
            message: error.to_string(),
        };
        let merged = |board: Option<&str>| {
            let mut builder = Config::builder()
                .add_source(File::from_str(DEFAULTS, FileFormat::Toml))
                .add_source(File::from_str(PROTOCOLS, FileFormat::Toml));
            if let Some(text) = board {
                builder = builder.add_source(File::from_str(text, FileFormat::Toml));
            }
            if let Some(text) = &site_text {
                builder = builder.add_source(File::from_str(text, FileFormat::Toml));
            }
            // Values stay text here and are read as what their field is.
            let environment = Environment::with_prefix("AFTERIMAGE")
                .prefix_separator("__")
                .separator("__");
            builder.add_source(environment).build()
        };
        let first = merged(None).map_err(|error| wrong(&error))?;
        let base = site
            .and_then(Path::parent)
            .unwrap_or(Path::new(""))
            .to_path_buf();
        let board: String = first.get("board").map_err(|error| wrong(&error))?;
        let boards: Option<PathBuf> = first.get("paths.boards").ok();
        let board_text = read_board(&board, boards.map(|boards| base.join(boards)))?;
        let raw: RawSettings = merged(Some(&board_text))
            .and_then(Config::try_deserialize)
            .map_err(|error| wrong(&error))?;
        raw.checked(&base)
    }
}

impl Settings {
    /// Checks what must be there at the first start and may be gone for a while later.
    ///
    /// # Errors
    /// [`SettingsError::Missing`].
    pub(crate) fn check_folder(&self) -> Result<(), SettingsError> {
        present("scanner.folder", self.folder.clone(), Kind::Folder).map(|_| ())
    }
}

impl RawSettings {
    /// Checks every range; relative paths are taken from the site file's folder.
    fn checked(self, base: &Path) -> Result<Settings, SettingsError> {
        // The board's file was found by it already.
        let _ = (self.board, self.paths.boards);
        let folder = present(
            "scanner.folder",
            base.join(self.scanner.folder),
            Kind::Folder,
        )?;
        let bundle = present("model.bundle", base.join(self.model.bundle), Kind::Folder)?;
        let key = present("model.key", base.join(self.model.key), Kind::File)?;
        let mask = self
            .subject
            .mask
            .map(|mask| present("subject.mask", base.join(mask), Kind::File));
        within("subject.prior_trials", self.subject.prior_trials, 0.1, 1e6)?;
        let prior = self
            .subject
            .prior
            .map(|prior| present("subject.prior", base.join(prior), Kind::File));
        let reference = self
            .subject
            .reference
            .map(|reference| present("subject.reference", base.join(reference), Kind::File));
        let onnxruntime = self
            .model
            .onnxruntime
            .map(|library| present("model.onnxruntime", base.join(library), Kind::File));
        if let Some(tr_ms) = self.scanner.tr_ms {
            within("scanner.tr_ms", tr_ms, 300.0, 5000.0)?;
        }
        within("task.fast_s", self.task.fast_s, 2.0, 30.0)?;
        within("task.slow_s", self.task.slow_s, self.task.fast_s, 120.0)?;
        let has = |tier| self.task.tiers.contains(&tier);
        let tiers = TierPlan {
            fast_s: has(Tier::Fast).then_some(self.task.fast_s),
            slow_s: has(Tier::Slow).then_some(self.task.slow_s),
            end: has(Tier::End),
        };
        if self.task.tiers.is_empty() {
            return Err(SettingsError::Range {
                field: "task.tiers",
                found: "[]".into(),
                expected: "one or more of \"fast\", \"slow\" and \"end\"".into(),
            });
        }
        within(
            "task.max_missing_share",
            self.task.max_missing_share,
            0.0,
            0.9,
        )?;
        let max_file_mib = whole("scanner.max_file_mib", self.scanner.max_file_mib, 1, 63)?;
        let threads = whole("model.threads", self.model.threads, 1, 64)?;
        let queue = whole("limits.queue", self.limits.queue, 16, 4096)?;
        let timeout = whole(
            "limits.parse_timeout_ms",
            self.limits.parse_timeout_ms,
            100,
            60_000,
        )?;
        let memory = whole(
            "limits.parse_memory_mib",
            self.limits.parse_memory_mib,
            128,
            8192,
        )?;
        let limit_mib = self.memory.limit_mib;
        if let Some(limit) = limit_mib {
            whole("memory.limit_mib", limit, 256, 1 << 20)?;
        }
        let label = self.session.label.trim().to_owned();
        if label.is_empty() || label.chars().count() > 64 {
            return Err(SettingsError::Range {
                field: "session.label",
                found: format!("{} characters", label.chars().count()),
                expected: "1..=64 characters".into(),
            });
        }
        let listen: SocketAddr = self.web.listen.parse().map_err(|_| SettingsError::Range {
            field: "web.listen",
            found: self.web.listen.clone(),
            expected: "an address and port such as 127.0.0.1:8440".into(),
        })?;
        if !listen.ip().is_loopback() {
            return Err(SettingsError::Range {
                field: "web.listen",
                found: self.web.listen,
                expected: "a loopback address: pages for other machines need TLS and a login, \
                           which this version does not have"
                    .into(),
            });
        }
        if let Some(seed) = self.session.seed {
            whole("session.seed", seed, 0, i64::MAX.cast_unsigned())?;
        }
        let runtime_dir = base.join(self.paths.runtime);
        let len = runtime_dir.as_os_str().len();
        if len > MAX_SOCKET_DIR {
            return Err(SettingsError::Range {
                field: "paths.runtime",
                found: format!("a path of {len} bytes"),
                expected: format!("at most {MAX_SOCKET_DIR}: sockets have short names only"),
            });
        }
        Ok(Settings {
            state_dir: base.join(self.paths.state),
            runtime_dir,
            label,
            seed: self.session.seed,
            folder,
            existing_files: self.scanner.existing_files,
            receive: self.receive.checked(base)?,
            max_file_bytes: max_file_mib << 20,
            tr_ms: self.scanner.tr_ms,
            trigger: self.trigger.checked(base)?,
            // The file may appear after the daemon does; what is wrong with it is said at the run.
            events: base.join(self.task.events),
            hrf: match self.task.hrf {
                RawHrf::Glover => Hrf::Glover,
                RawHrf::Spm => Hrf::Spm,
            },
            noise: match self.task.noise {
                RawNoise::Ols => Noise::Ols,
                RawNoise::Ar1 => Noise::Ar1,
            },
            tiers,
            max_missing_share: self.task.max_missing_share,
            subject: self.subject.id,
            mask: mask.transpose()?,
            reference: reference.transpose()?,
            prior: prior.transpose()?,
            prior_trials: self.subject.prior_trials,
            average_repeats: self.task.repeats == RawRepeats::Average,
            registration: match self.subject.registration {
                RawFreedom::Rigid => Freedom::Rigid,
                RawFreedom::Affine => Freedom::Affine,
            },
            bundle,
            key,
            fidelity: self.model.fidelity,
            threads: usize::try_from(threads).unwrap_or(1),
            onnxruntime: onnxruntime.transpose()?,
            without: self.model.without,
            memory_limit_bytes: limit_mib.map(|limit| limit << 20),
            listen,
            hosts: self.web.hosts,
            queue: usize::try_from(queue).unwrap_or(16),
            parse_timeout: Duration::from_millis(timeout),
            parse_memory_bytes: memory << 20,
            log_format: self.log.format,
            log_filter: self.log.filter,
        })
    }
}

fn read(path: &Path) -> Result<String, SettingsError> {
    let error = |source| SettingsError::Read {
        path: path.into(),
        source,
    };
    let found = std::fs::metadata(path).map_err(error)?.len();
    if found > MAX_FILE_BYTES {
        return Err(SettingsError::TooLong {
            path: path.into(),
            found,
        });
    }
    std::fs::read_to_string(path).map_err(error)
}

/// The text of `<board>.toml`, from the given folder or from where boards are installed.
fn read_board(board: &str, folder: Option<PathBuf>) -> Result<String, SettingsError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if board.is_empty() || !board.chars().all(plain) {
        return Err(SettingsError::Range {
            field: "board",
            found: board.into(),
            expected: "letters, digits, '-' and '_'".into(),
        });
    }
    let folders = match folder {
        Some(folder) => vec![folder],
        None => installed_boards(),
    };
    let tried: Vec<PathBuf> = folders
        .into_iter()
        .map(|folder| folder.join(format!("{board}.toml")))
        .collect();
    match tried.iter().find(|path| path.is_file()) {
        Some(path) => read(path),
        None => Err(SettingsError::Board {
            board: board.into(),
            tried,
        }),
    }
}

/// Beside an installed program (`/usr/bin`), and beside one that was just built (`target/debug`).
fn installed_boards() -> Vec<PathBuf> {
    let program = std::env::current_exe().ok();
    let Some(dir) = program.as_deref().and_then(Path::parent) else {
        return Vec::new();
    };
    vec![
        dir.join("../share/afterimage/boards"),
        dir.join("../../boards"),
    ]
}

#[derive(Clone, Copy)]
enum Kind {
    File,
    Folder,
}

fn present(field: &'static str, path: PathBuf, kind: Kind) -> Result<PathBuf, SettingsError> {
    let (fine, expected) = match kind {
        Kind::File => (path.is_file(), "a file"),
        Kind::Folder => (path.is_dir(), "a folder"),
    };
    if fine {
        return Ok(std::path::absolute(&path).unwrap_or(path));
    }
    Err(SettingsError::Missing {
        field,
        path,
        expected,
    })
}

fn within(field: &'static str, found: f64, low: f64, high: f64) -> Result<(), SettingsError> {
    if (low..=high).contains(&found) {
        return Ok(());
    }
    Err(SettingsError::Range {
        field,
        found: found.to_string(),
        expected: format!("{low}..={high}"),
    })
}

/// A whole number in a range.
///
/// # Errors
/// [`SettingsError::Range`].
pub(crate) fn whole(
    field: &'static str,
    found: u64,
    low: u64,
    high: u64,
) -> Result<u64, SettingsError> {
    if (low..=high).contains(&found) {
        return Ok(found);
    }
    Err(SettingsError::Range {
        field,
        found: found.to_string(),
        expected: format!("{low}..={high}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A site file whose paths all exist, with lines added.
    fn site(dir: &Path, more: &str) -> PathBuf {
        std::fs::create_dir_all(dir.join("in")).unwrap();
        std::fs::create_dir_all(dir.join("bundle")).unwrap();
        std::fs::write(dir.join("key.pub"), "").unwrap();
        let boards = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../boards");
        let text = format!(
            "[paths]\nboards = {boards:?}\nstate = \"state\"\n[scanner]\nfolder = \"in\"\n{more}\n\
             [task]\nevents = \"events.tsv\"\n[model]\nbundle = \"bundle\"\nkey = \"key.pub\"\n"
        );
        let path = dir.join("site.toml");
        std::fs::write(&path, text).unwrap();
        path
    }

    fn refused(more: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        Settings::load(Some(&site(dir.path(), more)))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_site_file_over_defaults_is_enough() {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings::load(Some(&site(dir.path(), "tr_ms = 1500"))).unwrap();
        assert_eq!(settings.tr_ms, Some(1500.0));
        assert_eq!(settings.state_dir, dir.path().join("state"));
        assert_eq!(settings.listen.port(), 8440);
    }

    #[test]
    fn a_value_out_of_range_is_named_with_its_range() {
        assert_eq!(
            refused("tr_ms = 15"),
            "scanner.tr_ms = 15 is outside 300..=5000"
        );
    }

    #[test]
    fn a_misspelled_key_is_named() {
        let message = refused("foldr = \"in\"");
        assert!(
            message.contains("foldr") && message.contains("site.toml"),
            "{message}"
        );
    }

    #[test]
    fn a_receiver_is_off_until_it_listens_and_wants_to_know_who_may_send() {
        let dir = tempfile::tempdir().unwrap();
        let load = |more: &str| Settings::load(Some(&site(dir.path(), more)));
        assert!(load("").unwrap().receive.is_none());
        let on = "[receive]\nlisten = \"127.0.0.1:11112\"\n";
        let message = load(on).unwrap_err().to_string();
        assert!(message.contains("receive.allow"), "{message}");
        let receive = load(&format!(
            "{on}allow = [\" MR1 \"]\npeers = [\"::ffff:10.0.0.1\"]"
        ));
        let receive = receive.unwrap().receive.unwrap();
        assert_eq!(receive.allow, ["MR1"]);
        assert_eq!(receive.peers[0].to_string(), "10.0.0.1");
        for (wrong, field) in [
            ("ae_title = \"LONGER THAN SIXTEEN\"", "receive.ae_title"),
            ("allow = [\"back\\\\slash\"]", "receive.allow"),
            ("peers = [\"scanner\"]", "receive.peers"),
            ("idle_timeout_s = 0", "receive.idle_timeout_s"),
            ("max_associations = 99", "receive.max_associations"),
        ] {
            let message = load(&format!("[receive]\n{wrong}"))
                .unwrap_err()
                .to_string();
            assert!(message.contains(field), "{message}");
        }
    }

    #[test]
    fn an_address_for_other_machines_is_refused() {
        let message = refused("[web]\nlisten = \"0.0.0.0:8440\"");
        assert!(
            message.contains("web.listen") && message.contains("loopback"),
            "{message}"
        );
    }

    #[test]
    fn an_unknown_board_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = site(dir.path(), "");
        let text = format!(
            "board = \"toaster\"\n{}",
            std::fs::read_to_string(&path).unwrap()
        );
        std::fs::write(&path, text).unwrap();
        let message = Settings::load(Some(&path)).unwrap_err().to_string();
        assert!(message.contains("toaster.toml"), "{message}");
    }

    #[test]
    fn every_board_of_the_repository_loads() {
        let boards = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../boards");
        for entry in std::fs::read_dir(boards).unwrap() {
            let file = entry.unwrap().path();
            let board = file.file_stem().unwrap().to_str().unwrap().to_owned();
            let dir = tempfile::tempdir().unwrap();
            let path = site(dir.path(), "");
            let text = format!(
                "board = {board:?}\n{}",
                std::fs::read_to_string(&path).unwrap()
            );
            std::fs::write(&path, text).unwrap();
            Settings::load(Some(&path)).unwrap();
        }
    }
}

//! What the tests work on, made by the built programs, once per test process.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tempfile::TempDir;

use crate::program::{program, run};

/// Voxels of the simulated subject.
pub const VOXELS: usize = 500;
/// Trials of the simulated run.
pub const TRIALS: u32 = 12;

/// A folder of our own, short enough for the sockets in it and gone with its owner.
pub fn short_folder() -> TempDir {
    tempfile::Builder::new()
        .prefix("ai-")
        .tempdir_in("/tmp")
        .unwrap()
}

/// A key pair.
#[derive(Debug)]
pub struct Keys {
    /// Signs.
    pub secret: PathBuf,
    /// Verifies.
    pub public: PathBuf,
}

/// Generates a key pair into a folder.
pub fn keygen(dir: &Path, name: &str) -> Keys {
    let keys = Keys {
        secret: dir.join(format!("{name}.key")),
        public: dir.join(format!("{name}.pub")),
    };
    run(
        "afterimage-export",
        &[
            &"keygen",
            &"--secret",
            &keys.secret,
            &"--public",
            &keys.public,
        ],
    )
    .succeeded();
    keys
}

/// Writes tiny checkpoints with random weights into a folder.
pub fn synth(dir: &Path, voxels: &str) {
    run(
        "xtask",
        &[
            &"synth",
            &"--size",
            &"tiny",
            &"--voxels",
            &voxels,
            &"--out",
            &dir,
        ],
    )
    .succeeded();
}

/// Exports a folder of checkpoints.
pub fn export(checkpoints: &Path, precision: &str, bundle: &Path) {
    run(
        "afterimage-export",
        &[
            &"bundle",
            &"--folder",
            &checkpoints,
            &"--precision",
            &precision,
            &"--out",
            &bundle,
        ],
    )
    .succeeded();
}

/// Signs a bundle.
pub fn sign(bundle: &Path, keys: &Keys) {
    run(
        "afterimage-export",
        &[&"sign", &"--bundle", &bundle, &"--secret", &keys.secret],
    )
    .succeeded();
}

/// A signed bundle of random weights for one subject with [`VOXELS`] voxels.
#[derive(Debug)]
pub struct Signed {
    /// The bundle.
    pub bundle: PathBuf,
    /// Who signed it.
    pub keys: Keys,
}

/// The process's bundle.
pub fn signed() -> &'static Signed {
    static MADE: OnceLock<Signed> = OnceLock::new();
    MADE.get_or_init(|| {
        let dir = kept_folder().join("signed");
        let checkpoints = dir.join("checkpoints");
        synth(&checkpoints, &VOXELS.to_string());
        let bundle = dir.join("bundle");
        export(&checkpoints, "fp32", &bundle);
        let keys = keygen(&dir, "site");
        sign(&bundle, &keys);
        Signed { bundle, keys }
    })
}

/// A simulated subject: mask, events, truth, and one run's files.
#[derive(Debug)]
pub struct Phantom {
    /// Holds `mask.nii`, `events.tsv`, `true_betas.npy`.
    pub site: PathBuf,
    /// One DICOM file per volume, in the order of their names.
    pub files: Vec<PathBuf>,
}

/// The process's simulated subject, with [`VOXELS`] voxels and [`TRIALS`] trials.
pub fn phantom() -> &'static Phantom {
    static MADE: OnceLock<Phantom> = OnceLock::new();
    MADE.get_or_init(|| {
        let site = kept_folder().join("phantom");
        prepare(&site);
        let files = site.join("dicom");
        std::fs::create_dir(&files).unwrap();
        run(
            "afterimage",
            &[
                &"simulate",
                &"--site",
                &site,
                &"--into",
                &files,
                &"--speed",
                &"1000",
            ],
        )
        .succeeded();
        Phantom {
            files: crate::scanner::files_of(&files),
            site,
        }
    })
}

/// Writes what a simulated site knows before the run.
pub fn prepare(site: &Path) {
    let (trials, voxels) = (TRIALS.to_string(), VOXELS.to_string());
    run(
        "afterimage",
        &[
            &"simulate",
            &"--prepare",
            &"--site",
            &site,
            &"--trials",
            &trials,
            &"--voxels",
            &voxels,
        ],
    )
    .succeeded();
}

/// A folder for what lives as long as the process, in the target folder; what processes left that
/// are gone is removed first.
pub fn kept_folder() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let all = program("xtask")
            .ancestors()
            .nth(2)
            .unwrap()
            .join("system-tests");
        std::fs::create_dir_all(&all).unwrap();
        for entry in std::fs::read_dir(&all).unwrap().flatten() {
            let owner = Path::new("/proc").join(entry.file_name());
            if !owner.exists() {
                // Another process may be removing it as well.
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let own = all.join(std::process::id().to_string());
        std::fs::create_dir_all(&own).unwrap();
        own
    })
}

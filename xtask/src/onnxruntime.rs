//! ONNX Runtime's shared library, taken out of the official wheel.
//!
//! The runtime loads the library at start (`ort` with `load-dynamic`), so nothing links it and nothing else
//! downloads it. The wheel comes from the Python package index through pip; its SHA-256 and the library's own
//! are pinned here, and the library's is checked again at every use.
//!
//! The wheel is asked for by platform, Python version and ABI rather than for the Python that happens to be
//! here, so one pinned file serves every machine of an architecture.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use sha2::{Digest, Sha256};

use crate::workspace;

/// The version that also exists for CUDA.
pub(crate) const VERSION: &str = "1.31.1";

/// The environment variable that names another library; nothing is downloaded then.
pub(crate) const OVERRIDE: &str = "ORT_DYLIB_PATH";

const LIBRARY: &str = "libonnxruntime.so.1.31.1";
const LIBRARY_IN_WHEEL: &str = "onnxruntime/capi/libonnxruntime.so.1.31.1";
const NOTICES: [(&str, &str); 2] = [
    ("onnxruntime/LICENSE", "LICENSE"),
    ("onnxruntime/ThirdPartyNotices.txt", "ThirdPartyNotices.txt"),
];

/// What is expected for one architecture.
struct Pin {
    arch: &'static str,
    wheel: &'static str,
    wheel_sha256: &'static str,
    library_sha256: &'static str,
}

const PINS: [Pin; 2] = [
    Pin {
        arch: "x86_64",
        wheel: "onnxruntime-1.31.1-cp312-cp312-manylinux_2_28_x86_64.whl",
        wheel_sha256: "1f3dea47f2f0e5117c2404cea7d21fd253ae7836a3bf167a501cdfbb2600d536",
        library_sha256: "fc44112fbe06d7d689c57e11d3862031f64711007e4ee020f8eed5185fd2c1d3",
    },
    Pin {
        arch: "aarch64",
        wheel: "onnxruntime-1.31.1-cp312-cp312-manylinux_2_28_aarch64.whl",
        wheel_sha256: "0b9a492176886992e0e875f06bc0367e333f5fff11711a2d642e18b02f3009cc",
        library_sha256: "8aa3b76b28c778a2b1dd660d34161adb1d508c9ccd04ff9dc80e26eca5df8467",
    },
];

/// Why the library is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OnnxRuntimeError {
    /// No wheel is pinned for this kind of machine.
    #[error(
        "no ONNX Runtime is pinned for {os}/{arch}; set ORT_DYLIB_PATH to a libonnxruntime.so of version 1.24 or later"
    )]
    UnknownMachine {
        /// Operating system.
        os: &'static str,
        /// Architecture.
        arch: String,
    },
    /// `ORT_DYLIB_PATH` names something that is not a file.
    #[error("ORT_DYLIB_PATH names {path}, which is not a file; correct it or unset it")]
    OverrideMissing {
        /// As given.
        path: PathBuf,
    },
    /// pip is not installed under any of its names.
    #[error(
        "pip is not installed (tried `python3 -m pip`, `pip3`, `pip`); install it (Debian: `apt install python3-pip`) \
         or set ORT_DYLIB_PATH to a libonnxruntime.so"
    )]
    NoPip,
    /// pip ran and did not bring the wheel.
    #[error(
        "`{command}` failed: {reason}; check the network or pip's index setting, \
         or set ORT_DYLIB_PATH to a libonnxruntime.so"
    )]
    Download {
        /// The command, to repeat by hand.
        command: String,
        /// pip's last words.
        reason: String,
    },
    /// A file is not the pinned one.
    #[error(
        "{path}: expected SHA-256 {expected}, found {found}; delete it and run `cargo xtask onnxruntime`"
    )]
    WrongHash {
        /// The file.
        path: PathBuf,
        /// The pinned hash.
        expected: &'static str,
        /// The file's hash.
        found: String,
    },
    /// The wheel has another layout than expected.
    #[error("cannot take {member} out of {path}")]
    Wheel {
        /// The wheel.
        path: PathBuf,
        /// What was looked for in it.
        member: &'static str,
        /// Why not.
        source: zip::result::ZipError,
    },
    /// The file system refused.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Makes sure that the library is there and is the pinned one; prints one line and returns its path.
pub(crate) fn ensure() -> Result<PathBuf, OnnxRuntimeError> {
    if let Some(path) = std::env::var_os(OVERRIDE).filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        if !path.is_file() {
            return Err(OnnxRuntimeError::OverrideMissing { path });
        }
        println!("ONNX Runtime: {} (from {OVERRIDE})", path.display());
        return Ok(path);
    }
    ensure_for(std::env::consts::ARCH)
}

/// As [`ensure`], for a named architecture and without looking at `ORT_DYLIB_PATH`.
///
/// The library of another architecture than this one is kept in a folder of its own, for packaging.
pub(crate) fn ensure_for(arch: &str) -> Result<PathBuf, OnnxRuntimeError> {
    let Some(pin) = PINS.iter().find(|pin| pin.arch == arch) else {
        return Err(OnnxRuntimeError::UnknownMachine {
            os: std::env::consts::OS,
            arch: arch.to_owned(),
        });
    };
    if std::env::consts::OS != "linux" {
        return Err(OnnxRuntimeError::UnknownMachine {
            os: std::env::consts::OS,
            arch: arch.to_owned(),
        });
    }
    let mut home = workspace::target_dir().join("onnxruntime").join(VERSION);
    if arch != std::env::consts::ARCH {
        home.push(arch);
    }
    let library = home.join(LIBRARY);
    if library.is_file() {
        check(&library, pin.library_sha256)?;
        println!(
            "ONNX Runtime {VERSION} for {arch}: {} (SHA-256 as pinned)",
            library.display()
        );
        return Ok(library);
    }
    let began = Instant::now();
    let scratch = home.join(format!("download-{}", std::process::id()));
    fs::create_dir_all(&scratch).map_err(|source| OnnxRuntimeError::Io {
        doing: "make the folder",
        path: scratch.clone(),
        source,
    })?;
    let outcome = fetch(pin, &home, &scratch);
    let cleared = fs::remove_dir_all(&scratch).map_err(|source| OnnxRuntimeError::Io {
        doing: "remove the folder",
        path: scratch.clone(),
        source,
    });
    outcome?;
    cleared?;
    println!(
        "ONNX Runtime {VERSION} for {arch}: {} (taken out of {} in {:.1} s)",
        library.display(),
        pin.wheel,
        began.elapsed().as_secs_f64()
    );
    Ok(library)
}

/// Downloads into `scratch`, then moves the library and its licences into `home`; the library comes last.
fn fetch(pin: &Pin, home: &Path, scratch: &Path) -> Result<(), OnnxRuntimeError> {
    download(pin, scratch)?;
    let wheel = scratch.join(pin.wheel);
    check(&wheel, pin.wheel_sha256)?;
    let file = File::open(&wheel).map_err(|source| OnnxRuntimeError::Io {
        doing: "open",
        path: wheel.clone(),
        source,
    })?;
    let mut archive = zip::ZipArchive::new(file).map_err(|source| OnnxRuntimeError::Wheel {
        path: wheel.clone(),
        member: LIBRARY_IN_WHEEL,
        source,
    })?;
    let members = NOTICES.into_iter().chain([(LIBRARY_IN_WHEEL, LIBRARY)]);
    for (member, name) in members {
        let mut entry = archive
            .by_name(member)
            .map_err(|source| OnnxRuntimeError::Wheel {
                path: wheel.clone(),
                member,
                source,
            })?;
        let unpacked = scratch.join(name);
        File::create(&unpacked)
            .and_then(|mut out| {
                io::copy(&mut entry, &mut out)?;
                out.sync_all()
            })
            .map_err(|source| OnnxRuntimeError::Io {
                doing: "write",
                path: unpacked.clone(),
                source,
            })?;
        if name == LIBRARY {
            check(&unpacked, pin.library_sha256)?;
        }
        let place = home.join(name);
        fs::rename(&unpacked, &place).map_err(|source| OnnxRuntimeError::Io {
            doing: "put in place",
            path: place,
            source,
        })?;
    }
    Ok(())
}

/// Asks pip for the pinned wheel, under whichever name pip has here.
fn download(pin: &Pin, scratch: &Path) -> Result<(), OnnxRuntimeError> {
    let mut refused = None;
    for (program, first) in [("python3", &["-m", "pip"][..]), ("pip3", &[]), ("pip", &[])] {
        let mut command = Command::new(program);
        command
            .args(first)
            .args(["download", "--quiet", "--disable-pip-version-check"])
            .args(["--no-deps", "--only-binary=:all:"])
            .args(["--platform", &format!("manylinux_2_28_{}", pin.arch)])
            .args(["--python-version", "3.12"])
            .args(["--implementation", "cp", "--abi", "cp312", "--dest"])
            .arg(scratch)
            .arg(format!("onnxruntime=={VERSION}"))
            .stdin(Stdio::null());
        let Ok(output) = command.output() else {
            continue;
        };
        if output.status.success() {
            return Ok(());
        }
        let complaint = String::from_utf8_lossy(&output.stderr);
        if complaint.contains("No module named pip") {
            continue;
        }
        let reason = complaint
            .lines()
            .rev()
            .find(|line| line.starts_with("ERROR"))
            .or_else(|| complaint.lines().rfind(|line| !line.trim().is_empty()))
            .unwrap_or("it said nothing")
            .trim()
            .to_owned();
        refused.get_or_insert(OnnxRuntimeError::Download {
            command: workspace::spelled(&command),
            reason,
        });
    }
    Err(refused.unwrap_or(OnnxRuntimeError::NoPip))
}

/// Compares a file's SHA-256 with the pinned one.
fn check(path: &Path, expected: &'static str) -> Result<(), OnnxRuntimeError> {
    let io = |source| OnnxRuntimeError::Io {
        doing: "read",
        path: path.to_path_buf(),
        source,
    };
    let mut file = File::open(path).map_err(io)?;
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        let len_bytes = io::Read::read(&mut file, &mut chunk).map_err(io)?;
        if len_bytes == 0 {
            break;
        }
        hasher.update(&chunk[..len_bytes]);
    }
    let found = hex::encode(hasher.finalize());
    if found == expected {
        return Ok(());
    }
    Err(OnnxRuntimeError::WrongHash {
        path: path.to_path_buf(),
        expected,
        found,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_library_is_refused_with_both_hashes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(LIBRARY);
        fs::write(&path, b"not the library").unwrap();
        let error = check(&path, PINS[0].library_sha256)
            .unwrap_err()
            .to_string();
        assert!(error.contains(PINS[0].library_sha256), "{error}");
        assert!(
            error.contains(&hex::encode(Sha256::digest(b"not the library"))),
            "{error}"
        );
    }

    #[test]
    fn unknown_architecture_names_the_way_out() {
        let error = ensure_for("sparc64").unwrap_err().to_string();
        assert!(
            error.contains("sparc64") && error.contains(OVERRIDE),
            "{error}"
        );
    }
}

//! ONNX Runtime's shared library: where it is, and the one environment of this process.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// File name of the library this project is built and tested with.
pub const LIBRARY: &str = "libonnxruntime.so.1.31.1";
/// Its version, also the name of its folder beside the programs.
pub const VERSION: &str = "1.31.1";
/// The environment variable that names another library.
pub const OVERRIDE: &str = "ORT_DYLIB_PATH";

/// Why ONNX Runtime cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The library is in none of the usual places.
    #[error(
        "{LIBRARY} is not there (looked at {}); fetch it with `cargo xtask onnxruntime` or name it in {OVERRIDE}",
        listed(.tried)
    )]
    NotFound {
        /// Where it was looked for.
        tried: Vec<PathBuf>,
    },
    /// A path that was given by name is not a file.
    #[error("{origin} names {path}, which is not a file")]
    NotAFile {
        /// Who named it.
        origin: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The file is not a library that can be loaded, or is too old.
    #[error("cannot load {path}")]
    Load {
        /// The library.
        path: PathBuf,
        /// The loader's reason.
        source: ort::LoadDynamicError,
    },
    /// The environment cannot be set up.
    #[error("cannot start ONNX Runtime")]
    Environment(#[source] ort::Error),
    /// Another library was loaded before; a process has one.
    #[error("{loaded} is loaded in this process already, {asked} cannot be")]
    Other {
        /// The one in use.
        loaded: PathBuf,
        /// The one asked for.
        asked: PathBuf,
    },
}

fn listed(paths: &[PathBuf]) -> String {
    let shown: Vec<String> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    shown.join(", ")
}

/// The library to load: `explicit`, else `ORT_DYLIB_PATH`, else the usual places beside the program.
///
/// # Errors
/// [`RuntimeError::NotAFile`] where a named path is wrong (nothing else is tried then),
/// [`RuntimeError::NotFound`] with every place that was looked at.
pub fn find_library(explicit: Option<&Path>) -> Result<PathBuf, RuntimeError> {
    let from_environment = std::env::var_os(OVERRIDE).filter(|value| !value.is_empty());
    let named = match (explicit, from_environment) {
        (Some(path), _) => Some(("the setting", path.to_path_buf())),
        (None, Some(value)) => Some((OVERRIDE, PathBuf::from(value))),
        (None, None) => None,
    };
    if let Some((origin, path)) = named {
        return if path.is_file() {
            Ok(path)
        } else {
            Err(RuntimeError::NotAFile { origin, path })
        };
    }
    let mut tried = Vec::new();
    let program = std::env::current_exe().ok();
    if let Some(dir) = program.as_deref().and_then(Path::parent) {
        // target/debug, target/debug/deps (tests), and an installed box.
        for place in ["onnxruntime", "../onnxruntime", "../../onnxruntime"] {
            tried.push(dir.join(place).join(VERSION).join(LIBRARY));
        }
        tried.push(dir.join("../lib/afterimage").join(LIBRARY));
    }
    match tried.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => Err(RuntimeError::NotFound { tried }),
    }
}

/// A started ONNX Runtime; clones share it.
#[derive(Clone)]
pub struct Runtime {
    environment: Arc<ort::environment::Environment>,
    threads: usize,
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime")
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

/// ONNX Runtime allows one environment per process.
static LOADED: Mutex<Option<(PathBuf, Arc<ort::environment::Environment>)>> = Mutex::new(None);

impl Runtime {
    /// Loads the library, once per process; sessions made from the result use `threads` threads.
    ///
    /// # Errors
    /// [`RuntimeError`] where it is not a usable ONNX Runtime or another one is loaded already.
    pub fn load(library: &Path, threads: usize) -> Result<Runtime, RuntimeError> {
        let threads = threads.max(1);
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((path, environment)) = loaded.as_ref() {
            if path != library {
                return Err(RuntimeError::Other {
                    loaded: path.clone(),
                    asked: library.into(),
                });
            }
            return Ok(Runtime {
                environment: Arc::clone(environment),
                threads,
            });
        }
        let environment = ort::init_from(library)
            .map_err(|source| RuntimeError::Load {
                path: library.into(),
                source,
            })?
            .with_telemetry(false)
            .build()
            .map_err(RuntimeError::Environment)?;
        let environment = Arc::new(environment);
        *loaded = Some((library.into(), Arc::clone(&environment)));
        Ok(Runtime {
            environment,
            threads,
        })
    }

    pub(crate) fn environment(&self) -> &ort::environment::Environment {
        &self.environment
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_library_that_is_not_there_is_an_error_and_nothing_else_is_tried() {
        let error = find_library(Some(Path::new("/nowhere/lib.so"))).unwrap_err();
        assert!(error.to_string().contains("/nowhere/lib.so"), "{error}");
    }
}

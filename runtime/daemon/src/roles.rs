//! The roles as processes: how each starts, says that it is ready, and stops.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::sys::signal::{SigSet, Signal};
use wire::RoleName;

use crate::logging::chain;
use crate::record::RecordError;
use crate::settings::Settings;
use crate::{acquire, decode, logging, parse, show};

/// Exit code for what a restart cannot mend (`EX_CONFIG`).
pub(crate) const EXIT_SETTING: u8 = 78;

/// Why a role cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RoleError {
    /// A setting that does not fit what it names; trying again is of no use.
    #[error("{0}")]
    Setting(String),
    /// The bundle is refused; trying again is of no use.
    #[error("the bundle is refused")]
    Bundle(#[from] bundle::BundleError),
    /// The public key cannot be used; trying again is of no use.
    #[error("model.key cannot be used")]
    Key(#[from] bundle::KeyError),
    /// ONNX Runtime cannot be used; trying again is of no use.
    #[error("ONNX Runtime cannot be used")]
    Runtime(#[from] decoder::RuntimeError),
    /// The bundle does not fit this board; trying again is of no use.
    #[error("the bundle does not fit this board")]
    Memory(#[from] crate::memory::MemoryError),
    /// The networks cannot be loaded; trying again is of no use.
    #[error("the bundle's networks cannot be loaded")]
    Decoder(#[from] decoder::DecodeError),
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Another acquire writes the record.
    #[error("{path} is held by another afterimage")]
    Locked {
        /// The lock.
        path: std::path::PathBuf,
    },
    /// The threads that read the scanner's files are gone.
    #[error("the threads that read the scanner's files ended")]
    Readers,
    /// A socket between roles.
    #[error("a socket in paths.runtime cannot be used")]
    Socket {
        /// The system's reason.
        source: std::io::Error,
    },
    /// The address of the pages.
    #[error("web.listen = {address} cannot be used")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// No thread could be started.
    #[error("no thread can be started")]
    Thread {
        /// The system's reason.
        source: std::io::Error,
    },
    /// The web server stopped.
    #[error("the pages cannot be served")]
    Serve {
        /// Why.
        source: std::io::Error,
    },
}

impl RoleError {
    fn exit_code(&self) -> u8 {
        let setting = matches!(
            self,
            RoleError::Setting(_)
                | RoleError::Bundle(_)
                | RoleError::Key(_)
                | RoleError::Runtime(_)
                | RoleError::Memory(_)
                | RoleError::Decoder(_)
        );
        // A disk or a mount that fails now may work at the next try; what is missing or wrong will not.
        if setting && !is_transient(self) {
            EXIT_SETTING
        } else {
            1
        }
    }
}

/// Whether the system, and not what is there, is the cause.
fn is_transient(error: &dyn std::error::Error) -> bool {
    use std::io::ErrorKind;
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            let lasting = [
                ErrorKind::NotFound,
                ErrorKind::PermissionDenied,
                ErrorKind::InvalidData,
                ErrorKind::UnexpectedEof,
                ErrorKind::NotADirectory,
                ErrorKind::IsADirectory,
            ];
            return !lasting.contains(&io.kind());
        }
        cause = error.source();
    }
    false
}

/// Runs one role to its end.
pub(crate) fn main(role: RoleName, config: Option<&Path>, memory_bytes: Option<u64>) -> ExitCode {
    // A role does not outlive who started it; under systemd the parent is the manager itself. It is
    // killed and not asked to stop: everything here may be killed at any time.
    if let Err(error) = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL) {
        tracing::warn!(%error, "the role will outlive its supervisor");
    }
    if role == RoleName::Parse {
        return parse::main(memory_bytes.unwrap_or(512 << 20));
    }
    let settings = match Settings::load(config) {
        Ok(settings) => settings,
        Err(error) => return refuse(&error),
    };
    logging::start(&settings);
    let span = tracing::info_span!("role", name = %role);
    let _entered = span.enter();
    let stop = match stop_on_signal() {
        Ok(stop) => stop,
        Err(error) => {
            tracing::error!(%error, "signals cannot be waited for");
            return ExitCode::FAILURE;
        }
    };
    let ended = match role {
        RoleName::Acquire => acquire::main(&settings, &stop),
        RoleName::Decode => decode::main(&settings, &stop),
        RoleName::Show | RoleName::Parse => show::main(&settings, &stop),
    };
    match ended {
        Ok(()) => {
            tracing::info!("stopped");
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!(error = chain(&error), "role failed");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Says on standard error that the settings are refused.
pub(crate) fn refuse(error: &dyn std::error::Error) -> ExitCode {
    use std::io::Write;
    // Nothing can be done about a closed standard error.
    let _ = writeln!(std::io::stderr(), "error: {}", chain(error));
    ExitCode::from(EXIT_SETTING)
}

/// Tells whoever started this process (systemd or `afterimage run`) that the role works.
pub(crate) fn ready() {
    tracing::info!("ready");
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!(%error, "readiness could not be told");
    }
}

/// A flag that SIGTERM and SIGINT raise.
///
/// Must run before other threads start: they inherit the blocked signals.
pub(crate) fn stop_on_signal() -> Result<Arc<AtomicBool>, std::io::Error> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    let stop = Arc::new(AtomicBool::new(false));
    let raised = Arc::clone(&stop);
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if signals.wait().is_ok() {
                raised.store(true, Ordering::Relaxed);
            }
        })?;
    Ok(stop)
}

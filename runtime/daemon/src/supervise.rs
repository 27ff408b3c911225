//! `afterimage run`: starts the roles, each in its own process, and starts again what dies.
//!
//! A role that ends with 78 has a setting that no restart mends: everything stops with 78. Any
//! other end is a fault: the role comes back after a pause that doubles up to five seconds.
//! Readiness is told (to systemd, if it listens) once every role has told its own.

use std::os::unix::net::UnixDatagram as StdDatagram;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::net::UnixDatagram;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use wire::RoleName;

use crate::logging;
use crate::record;
use crate::roles::{EXIT_SETTING, refuse};
use crate::settings::Settings;

const ROLES: [RoleName; 3] = [RoleName::Acquire, RoleName::Decode, RoleName::Show];
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A role that lived this long has recovered from whatever ended it before.
const HEALTHY_AFTER: Duration = Duration::from_secs(30);
/// How long a role may take to stop before it is killed.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// What a role's keeper tells.
enum Told {
    Ready(RoleName),
    /// The role cannot work with these settings.
    Refused(RoleName),
}

/// Runs all roles until SIGTERM or SIGINT.
pub(crate) fn main(config: Option<&Path>) -> ExitCode {
    let settings = match Settings::load(config) {
        Ok(settings) => settings,
        Err(error) => return refuse(&error),
    };
    if let Err(error) = settings.check_folder() {
        return refuse(&error);
    }
    for (field, dir) in [
        ("paths.state", &settings.state_dir),
        ("paths.runtime", &settings.runtime_dir),
    ] {
        if let Err(error) = record::create_private(dir) {
            let message = format!("{field} = {} cannot be used: {error}", dir.display());
            return refuse(&std::io::Error::new(error.kind(), message));
        }
    }
    logging::start(&settings);
    match supervise(&settings, config) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!(error = logging::chain(&error), "cannot run");
            ExitCode::FAILURE
        }
    }
}

fn supervise(settings: &Settings, config: Option<&Path>) -> std::io::Result<ExitCode> {
    let lock = std::fs::File::create(settings.runtime_dir.join("lock"))?;
    let Ok(_lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else {
        tracing::error!(runtime = %settings.runtime_dir.display(), "another afterimage runs here already");
        return Ok(ExitCode::FAILURE);
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(watch_over(settings, config))
}

async fn watch_over(settings: &Settings, config: Option<&Path>) -> std::io::Result<ExitCode> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (stop, stopping) = watch::channel(false);
    let (tell, mut told) = mpsc::channel(16);
    let mut keepers = Vec::new();
    for role in ROLES {
        let keeper = Keeper::new(role, settings, config, tell.clone(), stopping.clone())?;
        keepers.push(tokio::spawn(keeper.keep()));
    }
    drop(tell);
    let mut waiting = ROLES.to_vec();
    let (mut code, mut asked) = (ExitCode::SUCCESS, true);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            message = told.recv() => match message {
                Some(Told::Ready(role)) => {
                    let before = waiting.len();
                    waiting.retain(|&other| other != role);
                    if waiting.is_empty() && before > 0 {
                        tracing::info!(page = %format!("http://{}/bedside", settings.listen), "ready");
                        if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
                            tracing::warn!(%error, "readiness could not be told");
                        }
                    }
                }
                Some(Told::Refused(role)) => {
                    tracing::error!(%role, "the role cannot work with these settings, stopping");
                    (code, asked) = (ExitCode::from(EXIT_SETTING), false);
                    break;
                }
                None => {
                    asked = false;
                    break;
                }
            }
        }
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    stop.send_replace(true);
    for keeper in keepers {
        let _ = keeper.await;
    }
    // Who was asked to stop ends the session; what dies by itself is taken up again.
    if asked && let Err(error) = record::end_session(&settings.state_dir) {
        tracing::error!(
            error = logging::chain(&error),
            "the session could not be ended"
        );
    }
    tracing::info!("all roles stopped");
    Ok(code)
}

/// Keeps one role running.
struct Keeper {
    role: RoleName,
    config: Option<PathBuf>,
    notify_path: PathBuf,
    notify: UnixDatagram,
    tell: mpsc::Sender<Told>,
    stopping: watch::Receiver<bool>,
    was_ready: bool,
}

impl Keeper {
    fn new(
        role: RoleName,
        settings: &Settings,
        config: Option<&Path>,
        tell: mpsc::Sender<Told>,
        stopping: watch::Receiver<bool>,
    ) -> std::io::Result<Keeper> {
        let notify_path = settings.runtime_dir.join(format!("notify-{role}.sock"));
        match std::fs::remove_file(&notify_path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let notify = StdDatagram::bind(&notify_path)?;
        notify.set_nonblocking(true)?;
        Ok(Keeper {
            role,
            config: config.map(Path::to_path_buf),
            notify_path,
            notify: UnixDatagram::from_std(notify)?,
            tell,
            stopping,
            was_ready: false,
        })
    }

    async fn keep(mut self) {
        let mut pause = FIRST_PAUSE;
        while !*self.stopping.borrow() {
            let started = Instant::now();
            let status = match self.start() {
                Ok(child) => self.follow(child).await,
                Err(error) => {
                    tracing::error!(role = %self.role, %error, "role cannot be started");
                    None
                }
            };
            if *self.stopping.borrow() {
                return;
            }
            // A role that worked before works again when the cause is gone; the others go on.
            let refused = status.and_then(|status| status.code()) == Some(i32::from(EXIT_SETTING));
            if refused && !self.was_ready {
                let _ = self.tell.send(Told::Refused(self.role)).await;
                return;
            }
            if started.elapsed() > HEALTHY_AFTER {
                pause = FIRST_PAUSE;
            }
            let ended = status.map_or("not started".into(), |status| status.to_string());
            tracing::warn!(role = %self.role, %ended, again_in_ms = pause.as_millis(), "role ended, it is started again");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = self.stopping.changed() => return,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn start(&self) -> std::io::Result<Child> {
        // The running program itself, also after an update has replaced its file.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("afterimage")
            .args(["role", self.role.as_str()]);
        if let Some(config) = &self.config {
            command.arg("--config").arg(config);
        }
        let child = command
            .env("NOTIFY_SOCKET", &self.notify_path)
            .stdin(std::process::Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        tracing::info!(role = %self.role, pid = child.id(), "role started");
        Ok(child)
    }

    /// Follows a role to its end.
    async fn follow(&mut self, mut child: Child) -> Option<ExitStatus> {
        let mut message = [0_u8; 256];
        loop {
            tokio::select! {
                status = child.wait() => return status.ok(),
                received = self.notify.recv(&mut message) => {
                    let text = received.map_or(&[][..], |len| &message[..len]);
                    if text.split(|&byte| byte == b'\n').any(|line| line == b"READY=1") {
                        self.was_ready = true;
                        let _ = self.tell.send(Told::Ready(self.role)).await;
                    }
                }
                _ = self.stopping.changed() => return stop_child(self.role, child).await,
            }
        }
    }
}

async fn stop_child(role: RoleName, mut child: Child) -> Option<ExitStatus> {
    let pid = child.id().and_then(|id| i32::try_from(id).ok());
    if let Some(pid) = pid {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    match tokio::time::timeout(STOP_WITHIN, child.wait()).await {
        Ok(status) => status.ok(),
        Err(_) => {
            tracing::warn!(%role, "role did not stop in time, it is killed");
            let _ = child.kill().await;
            None
        }
    }
}
